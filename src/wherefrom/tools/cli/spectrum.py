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
    """Measure the eigenvalues of a model's curvature, and say what they mean for the choice of a solver.

    For example: wherefrom spectrum wherefrom.tools.demo:problem --damping 0.01

    The target is module:function. The function, called without arguments, returns (model, task, train),
    (model, task, train, queries) or a wherefrom.tools.loading.Target; its module may lie in the current directory.
    Queries are not needed here.
    """
    # What is wrong with the damping is told before anything is loaded, which may take long.
    options.parse_damping()
    target = options.load_target()
    options = options.complete(target)
    problem = wherefrom.Problem(target.model, target.task, target.train, options.parameters, options.batch_size)
    curvature = CURVATURES[options.curvature](problem)
    say(f"{type(curvature).__name__} of {options.name}, {curvature.problem.coverage()}\n")

    measured = wherefrom.spectrum(curvature, seed=options.seed or 0)
    say(f"{measured}\n")

    # Of a damping with several values the smallest makes the hardest system.
    damping = min(options.parse_damping().resolve(curvature).values())
    say("\n".join(tabulate_plan(measured, damping, curvature.psd)) + "\n")

    sentences = list(interpret(measured, damping, curvature.psd))
    if curvature.psd:
        choice = wherefrom.Auto().choices(curvature)[0]
        sentences.append(f'solver="auto" would start with {choice.solver!r}: {choice.why}.')
    for sentence in sentences:
        say(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))


def bound_smallest(measured: wherefrom.Spectrum, psd: bool) -> float:
    """Return what is known of the smallest eigenvalue of C: it is at least, or for an indefinite C about, this."""
    return 0.0 if psd else min(measured.smallest, 0.0)


def tabulate_plan(measured: wherefrom.Spectrum, damping: float, psd: bool) -> list[str]:
    """Return a title, names and numbers: what the spectrum plans for stochastic iterations without preconditioner."""
    if bound_smallest(measured, psd) + damping <= 0:
        return [f"No plan for damping {damping:.4g}: C + damping is indefinite."]
    plan, examples = corollary(measured, damping), measured.examples
    batch = plan.batch or examples  # 0 stands for all the data
    error = f"at most {bound_sampling_error(plan, damping):.3g}" if psd else "no bound"
    row = {
        "damping": f"{damping:.4g}",
        "step size": f"{plan.step:.4g}",
        "batch size": f"{batch:,}",
        "steps": f"{plan.steps:,}",
        "passes": f"{plan.steps * batch / examples:,.3g}",
        "sampling error / |x|": error,
    }
    widths = {name: max(len(name), len(value)) for name, value in row.items()}
    return [
        "Neumann() (LiSSA) by Corollary 1 of Klochkov & Liu (2024)",
        "  ".join(name.rjust(widths[name]) for name in row),
        "  ".join(value.rjust(widths[name]) for name, value in row.items()),
    ]


def bound_sampling_error(plan: Plan, damping: float) -> float:
    """Return the most that minibatches leave of |x - x*| / |x*|, in mean square.

    It is the second term of eq. 10 of Klochkov & Liu (2024). With x*.C x* <= nu |x*|^2, nu the plan's bound on the
    largest eigenvalue of C: reached by a query along its eigenvector, and far too wide for one in flat directions.
    """
    if not plan.batch:
        return 0.0
    noise = plan.constant * plan.effective_dimension / plan.batch
    curvature = plan.nu - damping
    return math.sqrt(plan.step * noise * curvature / (damping * (2 - plan.step * damping)))


def interpret(measured: wherefrom.Spectrum, damping: float, psd: bool) -> Iterator[str]:
    """Yield what the numbers say of the solvers, a sentence or two each."""
    smallest = bound_smallest(measured, psd)
    if smallest + damping <= 0:
        yield (
            f"An eigenvalue of C is {smallest:.3g} or less: CG and Neumann need a damping above {-smallest:.3g}, or "
            "--curvature ggn. Exact() takes the matrix as it is."
        )
        return

    condition = (measured.largest.value + damping) / (smallest + damping)
    # CG's error falls by (sqrt(condition) - 1) / (sqrt(condition) + 1) a step, from twice the first one.
    steps = math.ceil(math.sqrt(condition) / 2 * math.log(200))
    about = "at most" if psd else "about"
    yield (
        f"The condition number of C + damping is {about} {condition:,.3g}. CG() needs {about} {steps:,} steps, a pass "
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

    is_large = plan.constant > 2 / measured.terms
    yield (
        f"Condition C.1, which the plan assumes with c = {plan.constant:.3g}, was measured to need c = "
        f"{measured.constant} along the top eigenvectors"
        + (": more than the usual 2, so the batches are larger." if is_large else ".")
    )
