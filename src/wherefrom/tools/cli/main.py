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
        from wherefrom.tools.cli.results import releasing
        from wherefrom.tools.cli.run import heard
    except ImportError as error:
        if error.name not in ("tyro", "tomli"):
            raise
        return complain(
            f'The command line needs {error.name}, which is not installed. Run: pip install "wherefrom[cli]"', BAD_INPUT
        )
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: complain(f"warning: {message}", OK) and None
        try:
            command = _parsed(COMMANDS, arguments or ["--help"])
            with _terminable(), _path_of(command, arguments), releasing(), heard() as late:
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


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a SIGTERM raise `Terminated` in the block, unless the process has other plans for it."""

    def stop(*_: object) -> None:
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()  # no other may set a handler
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _path_of(command: functools.partial[None], arguments: Sequence[str]) -> Iterator[None]:
    """Let the modules of the current directory be imported in the block if the command's target is to be."""
    from wherefrom.tools.cli.config import check_target, check_values

    given = [*command.args, *command.keywords.values()]
    for value in given:
        check_values(value)
    records = [command.keywords, *(vars(value) for value in given if dataclasses.is_dataclass(value))]
    target, config = (next((r[name] for r in records if r.get(name)), None) for name in ("target", "config"))
    if target is None:
        yield
        return
    with loading.from_here():
        typed = any(text == target or text.endswith(f"={target}") for text in arguments)
        if config is not None and not typed:
            check_target(config, target)
        yield


def _drop_unwritten() -> None:
    """Forget what standard output does not take, on a full disk or in a broken pipe: Python would fail on it again."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def _parsed(commands: Mapping[str, Callable[..., None]], arguments: Sequence[str]) -> functools.partial[None]:
    """The command that the arguments ask for, ready to be called; what is wrong with them is told in one line."""
    import tyro

    from wherefrom.tools.cli.config import configured

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
                ready, prog="wherefrom", description=DESCRIPTION.strip(), args=arguments
            )
    finally:
        if text := " ".join(line.strip("╭╮╰╯│─ ") for line in said.getvalue().splitlines()[1:]).strip():
            complain(" ".join(text.split()), BAD_INPUT)


def _later(command: Callable[..., None]) -> Callable[..., functools.partial[None]]:
    """The same arguments, and nothing done yet."""

    @functools.wraps(command)
    def call(*arguments: Any, **keywords: Any) -> functools.partial[None]:
        return functools.partial(command, *arguments, **keywords)

    return call


def complain(what: Any, code: int) -> int:
    """A message in one line on standard error, and the exit code that goes with it."""
    print(f"wherefrom: {textwrap.shorten(str(what), 2000)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
