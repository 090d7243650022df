"""The command line.

A command is a function of ``whence.commands``: its arguments are the options, its docstring is the help.

0   done
2   bad input, told in one line
3   done or given up, but a solve did not converge
130 interrupted
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import whence
from whence import loading
from whence.errors import DivergenceError, WhenceError

OK, BAD_INPUT, NO_CONVERGENCE, INTERRUPTED = 0, 2, 3, 130

DESCRIPTION = """\
Whence did a trained model learn this? Training-data attribution for PyTorch.

  whence demo                    half a minute on handwritten digits, and a report to look at
  whence explain mine:problem    a model of yours: which training examples are behind its answers
  whence COMMAND --help          options and an example
  whence --version               the version

Exit codes: 0 done, 2 bad input, 3 a solve did not converge, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; None: those of the process.

    Returns:
        the exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):
        print(f"whence {whence.__version__}", flush=True)
        return OK
    try:
        from whence.commands import COMMANDS, heard
    except ImportError as error:
        if error.name not in ("tyro", "tomli"):
            raise
        return complain(
            f'The command line needs {error.name}, which is not installed. Run: pip install "whence[cli]"', BAD_INPUT
        )
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: complain(f"warning: {message}", OK) and None
        try:
            command = _parsed(COMMANDS, arguments or ["--help"])
            with loading.from_here(), heard() as late:
                command()
            return NO_CONVERGENCE if late else OK
        except SystemExit as stop:  # --help, or arguments that do not parse
            return stop.code if isinstance(stop.code, int) and arguments else BAD_INPUT
        except DivergenceError as error:
            return complain(error, NO_CONVERGENCE)
        except (WhenceError, OSError) as error:
            return complain(error, BAD_INPUT)
        except KeyboardInterrupt:
            return complain("interrupted", INTERRUPTED)


def _parsed(commands: Mapping[str, Callable[..., None]], arguments: Sequence[str]) -> Callable[[], None]:
    """The command that the arguments ask for, ready to be called; what is wrong with them is told in one line."""
    import tyro

    from whence.commands import configured

    ready = {name: _later(command) for name, command in commands.items()}
    for name, command in ready.items():
        if name not in arguments[:1]:  # in the list of all commands a line each
            command.__doc__ = str(command.__doc__).partition("\n")[0]
    for given, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, inside = given.partition("=")
        if option == "--config" and arguments[0] in ready and (inside or value):
            ready[arguments[0]] = configured(ready, arguments[0], inside or value)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                ready, prog="whence", description=DESCRIPTION.strip(), args=arguments
            )
    finally:
        if text := " ".join(line.strip("╭╮╰╯│─ ") for line in said.getvalue().splitlines()[1:]).strip():
            complain(" ".join(text.split()), BAD_INPUT)


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same arguments, and nothing done yet."""

    @functools.wraps(command)
    def call(*arguments: Any, **keywords: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **keywords)

    return call


def complain(what: Any, code: int) -> int:
    """A message in one line on standard error, and the exit code that goes with it."""
    print(f"whence: {textwrap.shorten(str(what), 2000)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
