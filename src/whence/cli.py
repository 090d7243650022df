"""The command line.

A subcommand is a function: its arguments are the options, its docstring is the help, and it returns the exit code.

0   done
2   bad input, told in one line
3   done or given up, but a solve did not converge
130 interrupted
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import whence
from whence.errors import DivergenceError, WhenceError, expected
from whence.solvers.neumann import MOST, Plan, corollary

CURVATURES = {"ggn": whence.GGN, "hessian": whence.Hessian, "fisher": whence.EmpiricalFisher}
OK, BAD_INPUT, NO_CONVERGENCE, INTERRUPTED = 0, 2, 3, 130

DESCRIPTION = """\
Whence did a trained model learn this? Training-data attribution for PyTorch.

  whence demo                    half a minute on handwritten digits, and a report to look at
  whence spectrum mine:problem   the curvature of a model of yours, and what it makes of the solvers
  whence COMMAND --help          options and an example
  whence --version               the version

Exit codes: 0 done, 2 bad input, 3 a solve did not converge, 130 interrupted.
"""


def demo(
    out: str = "whence-demo/report.html", seed: int = 0, queries: int = 6, examples: int = 1000, lds: bool = True
) -> int:
    """Find the training digits behind a network's answers, and the wrong labels among them.

    Trains a small network on handwritten digits, a tenth of them with a wrong label, attributes its answers to the
    training examples, ranks these by self-influence, checks the scores by retraining, and writes an HTML report.

    Args:
        out: the report to write.
        seed: of the data, the training and everything else.
        queries: held-out digits to show, at most 40.
        examples: digits to train on, 100 to 1300; time grows with the square.
        lds: check against retraining.
    """
    from whence import demo

    scores = demo.run(say, out, seed, queries, examples, lds)
    return OK if bool(scores.converged.all()) else NO_CONVERGENCE


def spectrum(
    target: str,
    /,
    *,
    damping: float | None = None,
    curvature: Literal["ggn", "hessian", "fisher"] = "ggn",
    parameters: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> int:
    """Measure the spectrum of a model's curvature, and what it makes of the solvers.

    For example: whence spectrum whence.demo:problem --damping 0.01

    The target is module:function. The function, called without arguments, returns (model, task, train) or
    (model, task, train, queries); its module may lie in the current directory. Queries are not needed here.

    Args:
        target: module:function, which gives the model, its task and its training data.
        damping: lambda; without it tr(C) / N, which is Damping.per_example().
        curvature: C, as Gauss-Newton matrix, Hessian or empirical Fisher.
        parameters: a regular expression; only parameters with such a name count.
        batch_size: examples per pass of the model; changes speed and memory only.
        seed: of random vectors and minibatches.
    """
    from whence import loading

    try:
        re.compile(parameters or "")
    except re.error as error:
        raise expected("parameters", "a regular expression", repr(parameters), f"{error}.") from error
    wanted = whence.Damping.per_example() if damping is None else whence.Damping.of(damping)
    with loading.from_here():
        found = loading.load(target)
        c = CURVATURES[curvature](whence.Problem(found.model, found.task, found.train, parameters, batch_size))
        say(f"{type(c).__name__} of {target}, {c.problem.coverage()}\n")
        measured = whence.spectrum(c, seed=seed)
        say(f"{measured}\n")
        shift = min(wanted.resolve(c).values())
        auto = whence.Auto().choices(c)[0] if c.psd else None
    say("\n".join(planned(measured, shift, c.psd)) + "\n")
    because = f'solver="auto" would start with {auto.solver!r}: {auto.why}.' if auto else ""
    for sentence in filter(None, [*readings(measured, shift, c.psd), because]):
        say(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))
    return OK


COMMANDS: dict[str, Callable[..., int]] = {"demo": demo, "spectrum": spectrum}


def lowest(measured: whence.Spectrum, psd: bool) -> float:
    """What is known of the smallest eigenvalue of C."""
    return 0.0 if psd else min(measured.smallest, 0.0)


def planned(measured: whence.Spectrum, damping: float, psd: bool) -> list[str]:
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


def readings(measured: whence.Spectrum, damping: float, psd: bool) -> Iterator[str]:
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
        + (": more than the usual 2, so the batches are larger." if plan.constant > 2 else ".")
    )


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; None: those of the process.

    Returns:
        the exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):
        say(f"whence {whence.__version__}")
        return OK
    try:
        import tyro
    except ImportError:
        return complain(
            'The command line needs tyro, which is not installed. Run: pip install "whence[cli]"', BAD_INPUT
        )
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: complain(f"warning: {message}", OK) and None
        try:
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="whence", description=DESCRIPTION.strip(), args=arguments or ["--help"]
            )
        except SystemExit as stop:  # --help, or arguments that do not parse: tyro has said what is wrong
            return stop.code if isinstance(stop.code, int) and arguments else BAD_INPUT
        except DivergenceError as error:
            return complain(error, NO_CONVERGENCE)
        except (WhenceError, OSError) as error:
            return complain(error, BAD_INPUT)
        except KeyboardInterrupt:
            return complain("interrupted", INTERRUPTED)


def complain(what: Any, code: int) -> int:
    """A message in one line on standard error, and the exit code that goes with it."""
    print(f"whence: {textwrap.shorten(str(what), 2000)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
