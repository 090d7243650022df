"""What the curvature of a model looks like, and what it makes of the solvers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

import wherefrom
from wherefrom.solvers.neumann import MOST, Plan, corollary
from wherefrom.tools.cli.options import CURVATURES, Flat, Subject
from wherefrom.tools.cli.results import say


def spectrum(options: Flat[Subject]) -> None:
    """Measure the spectrum of a model's curvature, and what it makes of the solvers.

    For example: wherefrom spectrum wherefrom.tools.demo:problem --damping 0.01

    The target is module:function. The function, called without arguments, returns (model, task, train),
    (model, task, train, queries) or a wherefrom.tools.loading.Target; its module may lie in the current directory.
    Queries are not needed here.
    """
    options.chosen_damping()  # what is wrong with it is told before anything is loaded
    options, found = options.found()
    problem = wherefrom.Problem(found.model, found.task, found.train, options.parameters, options.batch_size)
    c = CURVATURES[options.curvature](problem)
    say(f"{type(c).__name__} of {options.name}, {c.problem.coverage()}\n")
    measured = wherefrom.spectrum(c, seed=options.seed or 0)
    say(f"{measured}\n")
    shift = min(options.chosen_damping().resolve(c).values())
    auto = wherefrom.Auto().choices(c)[0] if c.psd else None
    say("\n".join(planned(measured, shift, c.psd)) + "\n")
    because = f'solver="auto" would start with {auto.solver!r}: {auto.why}.' if auto else ""
    for sentence in filter(None, [*readings(measured, shift, c.psd), because]):
        say(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))


def lowest(measured: wherefrom.Spectrum, psd: bool) -> float:
    """What is known of the smallest eigenvalue of C."""
    return 0.0 if psd else min(measured.smallest, 0.0)


def planned(measured: wherefrom.Spectrum, damping: float, psd: bool) -> list[str]:
    """A title, names and numbers: the plan that the spectrum makes for stochastic iterations without preconditioner."""
    if lowest(measured, psd) + damping <= 0:
        return [f"No plan for damping {damping:.4g}: C + damping is indefinite."]
    plan, n = corollary(measured, damping), measured.examples
    row = {
        "damping": f"{damping:.4g}",
        "step size": f"{plan.step:.4g}",
        "batch size": f"{plan.batch or n:,}",
        "steps": f"{plan.steps:,}",
        "passes": f"{plan.steps * (plan.batch or n) / n:,.3g}",
        "sampling error / |x|": f"at most {sampling_error(plan, damping):.3g}" if psd else "no bound",
    }
    width = {name: max(len(name), len(value)) for name, value in row.items()}
    return [
        "Neumann() (LiSSA) by Corollary 1 of Klochkov & Liu (2024)",
        "  ".join(f"{name:>{width[name]}}" for name in row),
        "  ".join(f"{value:>{width[name]}}" for name, value in row.items()),
    ]


def sampling_error(plan: Plan, damping: float) -> float:
    """The most that minibatches leave of |x - x*| / |x*|, in mean square (Klochkov & Liu 2024, eq. 10, second term).

    With x*.C x* <= nu |x*|^2, nu the plan's bound on the largest eigenvalue of C: reached by a query along its
    eigenvector, and far too wide for one in flat directions.
    """
    if not plan.batch:
        return 0.0
    t, a = plan.constant * plan.effective_dimension / plan.batch, plan.step
    return math.sqrt(a * t * (plan.nu - damping) / (damping * (2 - a * damping)))


def readings(measured: wherefrom.Spectrum, damping: float, psd: bool) -> Iterator[str]:
    """What the numbers say of the solvers, a sentence or two each."""
    smallest = lowest(measured, psd)
    if smallest + damping <= 0:
        yield (
            f"An eigenvalue of C is {smallest:.3g} or less: CG and Neumann need a damping above {-smallest:.3g}, or "
            "--curvature ggn. Exact() takes the matrix as it is."
        )
        return
    condition = (measured.largest.value + damping) / (smallest + damping)
    most = math.ceil(math.sqrt(condition) / 2 * math.log(200))
    about = "at most" if psd else "about"
    yield (
        f"The condition number of C + damping is {about} {condition:,.3g}. CG() needs {about} {most:,} steps, a pass "
        "over the data each, until the error (in the norm of C + damping) is 1% of the first; a preconditioner makes "
        "it fewer."
    )
    plan = corollary(measured, damping)
    rest = (1 - plan.step * (damping + smallest)) ** plan.steps
    passes = plan.steps * (plan.batch or measured.examples) / measured.examples
    text = f"Neumann() as planned reads the data {passes:,.3g} times and leaves at most {rest:.0%} of its first error"
    if plan.batch:
        text += ", besides the sampling error of its minibatches, which halves with four times the batch. "
        text += "The table has the bound for the worst query." if psd else "There is a bound for that only if C >= 0."
    else:
        text += "; its batches would be as large as the data, so it takes all of it at every step."
    yield text
    if plan.steps > MOST:
        yield f"That is more than the {MOST:,} steps that Neumann() accepts. Raise the damping, or take CG()."
    yield (
        f"Condition C.1, which the plan assumes with c = {plan.constant:.3g}, was measured to need c = "
        f"{measured.constant} along the top eigenvectors"
        + (": more than the usual 2, so the batches are larger." if plan.constant > 2 / measured.terms else ".")
    )
