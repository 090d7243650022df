"""The command line.

A command is a function of ``wherefrom.tools.cli``: its arguments are the options, its docstring is the help.

0   done
2   bad input, told in one line
3   done or given up, but a solve did not converge
130 interrupted
143 terminated
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import wherefrom
from wherefrom.errors import AttributionError, DivergenceError
from wherefrom.tools import loading

OK, BAD_INPUT, NO_CONVERGENCE, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143

DESCRIPTION = """\
Where did a trained model learn this? Training-data attribution for PyTorch.

  wherefrom demo                    half a minute on handwritten digits, and a report to look at
  wherefrom explain mine:problem    a model of yours: which training examples are behind its answers
  wherefrom COMMAND --help          options and an example
  wherefrom --version               the version

Exit codes: 0 done, 2 bad input, 3 a solve did not converge, 130 interrupted, 143 terminated.
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
        print(f"wherefrom {wherefrom.__version__}", flush=True)
        return OK
    try:
        from wherefrom.tools.cli.registry import COMMANDS
        from wherefrom.tools.cli.results import release_folders
        from wherefrom.tools.cli.run import record_warnings
    except ImportError as error:
        if error.name not in ("tyro", "tomli"):
            raise
        return complain(
            f'The command line needs {error.name}, which is not installed. Run: pip install "wherefrom[cli]"', BAD_INPUT
        )
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            command = parse_arguments(COMMANDS, arguments or ["--help"])
            with _stop_on_sigterm(), _import_target(command, arguments), release_folders(), record_warnings() as late:
                command()
            return NO_CONVERGENCE if late else OK
        except SystemExit as stop:  # --help, or arguments that do not parse
            return stop.code if isinstance(stop.code, int) and arguments else BAD_INPUT
        except DivergenceError as error:
            return complain(error, NO_CONVERGENCE)
        except (AttributionError, OSError) as error:
            _drop_unwritten()
            return complain(error, BAD_INPUT)
        except Terminated:
            return complain("terminated", TERMINATED)
        except KeyboardInterrupt:
            return complain("interrupted", INTERRUPTED)


class Terminated(KeyboardInterrupt):
    """A SIGTERM: it ends a command as Ctrl-C does, so that what it holds is put back and what is done is kept."""


def _show_warning(message: Warning | str, *_: Any) -> None:
    complain(f"warning: {message}", OK)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Let a SIGTERM raise `Terminated` in the block, unless the process has other plans for it."""

    def stop(*_: object) -> None:
        raise Terminated

    # No other thread may set a handler.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _import_target(command: functools.partial[None], arguments: Sequence[str]) -> Iterator[None]:
    """Let the modules of the current directory be imported in the block if the command's target is to be.

    Raises:
        InputError: if an option has a value that no part of the library could take, or a configuration file names a
            target that may be any function at all.
    """
    from wherefrom.tools.cli.config import check_target, check_values

    options: dict[str, Any] = {}
    for name, value in [*enumerate(command.args), *command.keywords.items()]:
        check_values(value)
        # The fields of a record are options of the command itself.
        options |= vars(value) if dataclasses.is_dataclass(value) else {str(name): value}

    target, config = options.get("target"), options.get("config")
    if not target:
        yield
        return
    with loading.import_from_here():
        is_typed = any(text == target or text.endswith(f"={target}") for text in arguments)
        if config and not is_typed:
            check_target(config, target)
        yield


def _drop_unwritten() -> None:
    """Forget what standard output does not take, on a full disk or in a broken pipe: Python would fail on it again."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def parse_arguments(commands: Mapping[str, Callable[..., None]], arguments: Sequence[str]) -> functools.partial[None]:
    """Return the command that the arguments ask for, ready to be called; what is wrong with them is told in one line.

    Args:
        commands: all that there are.
        arguments: those after the program's name.

    Raises:
        SystemExit: for --help, or arguments that do not parse.
        InputError: for a configuration file that does not fit.
    """
    import tyro

    from wherefrom.tools.cli.config import configure

    ready = {name: _postpone(command) for name, command in commands.items()}
    for name, command in ready.items():
        # In the list of all commands each has one line of help.
        if name not in arguments[:1]:
            command.__doc__ = str(command.__doc__).partition("\n")[0]

    path = _find_configuration(arguments)
    if path and arguments[0] in ready:
        ready[arguments[0]] = configure(ready, arguments[0], path)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                ready, prog="wherefrom", description=DESCRIPTION.strip(), args=arguments
            )
    finally:
        # tyro draws a box, whose first line is a heading.
        lines = complaint.getvalue().splitlines()[1:]
        text = " ".join(" ".join(line.strip("╭╮╰╯│─ ") for line in lines).split())
        if text:
            complain(text, BAD_INPUT)


def _find_configuration(arguments: Sequence[str]) -> str:
    """Return the path in --config PATH or --config=PATH, the last if there are several; else an empty text."""
    path = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = argument.partition("=")
        if option == "--config":
            path = value or following
    return path


def _postpone(command: Callable[..., None]) -> Callable[..., functools.partial[None]]:
    """Return a function with the command's arguments that does nothing yet, but returns what would do it."""

    @functools.wraps(command)
    def call(*arguments: Any, **keywords: Any) -> functools.partial[None]:
        return functools.partial(command, *arguments, **keywords)

    return call


def complain(what: Any, code: int) -> int:
    """Show a message in one line on standard error, and return the exit code that goes with it."""
    print(f"wherefrom: {textwrap.shorten(str(what), 2000)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
