"""The command line.

A subcommand is a function: its arguments are the options, its docstring is the help, and it returns the exit code.

0   done
2   bad input, told in one line
3   done or given up, but a solve did not converge
130 interrupted
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import whence
from whence.errors import DivergenceError, WhenceError

OK, BAD_INPUT, NO_CONVERGENCE, INTERRUPTED = 0, 2, 3, 130

DESCRIPTION = """\
Whence did a trained model learn this? Training-data attribution for PyTorch.

  whence demo                    half a minute on handwritten digits, and a report to look at
  whence demo --help             its options
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


COMMANDS: dict[str, Callable[..., int]] = {"demo": demo}


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
