"""Configuration files: the options of the commands, by the same names, in TOML.

    target = "mine:problem"
    solver = "CG(preconditioner=EKFAC(), tolerance=0.01)"
    damping = 0.01

One file serves several commands: each takes the options that it has. What is given on the command line goes first.
A file is data and may come from elsewhere: solvers and methods in it are read and not run, and the function that its
target names is called only if it is the user's own or says that it is a target.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from wherefrom.errors import InputError, expected
from wherefrom.store import SHOWN, whole
from wherefrom.tools.cli.expressions import nearest
from wherefrom.tools.loading import is_own, parts, says_target

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

Command = Callable[..., Any]
DEMO = "wherefrom.tools.demo:problem"
RECORD = "record"  # the table of a written configuration that is no option


def read(path: str | Path) -> dict[str, Any]:
    """The options in a file, without the record of the run that wrote it.

    Raises:
        InputError: if it is no TOML. OSError, if it cannot be read.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of no UTF-8, and of numbers without end
        raise expected(str(path), "a TOML file", f"this: {str(error)[:SHOWN]}") from error
    values = {key: value for key, value in found.items() if key != RECORD}
    for key, value in values.items():
        check_values(value, f"{path}: {key[:SHOWN]}")
    return values


def write(path: Path, options: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """A configuration that `read` takes, complete or not at all.

    Args:
        path: the file.
        options: name to value; those that are None are left out.
        record: what else is worth knowing of the run: versions, fingerprints.
    """
    lines = [f"{key} = {_toml(value)}" for key, value in options.items() if value is not None]
    lines += ["", f"[{RECORD}]", *(f"{json.dumps(key)} = {_toml(value)}" for key, value in record.items())]
    with whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def configured(commands: Mapping[str, Command], name: str, path: str | Path) -> Command:
    """A command with the options of a file as its defaults.

    Args:
        commands: all that there are; the file may have options of any.
        name: the one to run.
        path: the file.

    Raises:
        InputError: for a key that no command has, with the nearest one, or a value of another type.
    """
    values, known = read(path), dict(option for command in commands.values() for option in options(command))
    known.pop("config", None)
    for key in values:
        if key not in known:
            raise InputError(f"{path}: no command has an option {key[:SHOWN]!r}.{nearest(key, known)}")
    return _with(commands[name], dict(options(commands[name])), values, path)


def check_target(path: str | Path, target: str) -> None:
    """Refuse a file's target that may be any function at all, before its module is imported.

    It must be of a module in the current directory, where the file lies too; or the function's definition must say that
    it gives a target.

    Args:
        path: the configuration file.
        target: what it names.

    Raises:
        InputError: if neither holds.
    """
    module, _ = parts(target)
    near = Path(path).resolve().is_relative_to(Path.cwd())
    if target != DEMO and not (near and is_own(module)) and not says_target(target):
        wanted = (
            "a function of a module in the current directory, where the file lies too, or one defined with -> Target"
        )
        advice = f"Give it on the command line: wherefrom COMMAND {target} --config {path}."
        raise expected(f"{path}: target", wanted, target, advice)


def check_values(value: Any, name: str = "an option") -> None:
    """Refuse options that no part of the library could take, wherever they come from.

    Args:
        value: of an option, or a record or sequence of several.
        name: of the option.

    Raises:
        InputError: for a number beyond 64 bits, or a text with a null or half of a character.
    """
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            check_values(getattr(value, field.name), field.name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_values(part, f"{name}.{key[:SHOWN]}")
    elif isinstance(value, (tuple, list)):
        for part in value:
            check_values(part, name)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise expected(name, "a whole number of 64 bits", f"one of {value.bit_length()} bits")
    elif isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise expected(name, "text without nulls and halves of characters", repr(value)[:SHOWN])


def _with(command: Command, taken: Mapping[str, Any], values: Mapping[str, Any], path: str | Path) -> Command:
    mine = {key: _of(f"{path}: {key}", taken[key], value) for key, value in values.items() if key in taken}
    own: dict[str, Any] = {}
    for name, kind in get_type_hints(command).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            own[name] = kind(**{f.name: mine[f.name] for f in dataclasses.fields(kind) if f.name in mine})
        elif name in mine:
            own[name] = mine[name]
    changed = functools.partial(command, **own)
    changed.__doc__ = command.__doc__
    return changed


def options(command: Command) -> Iterator[tuple[str, Any]]:
    """Names and types; those of a record that is an argument count as the command's own."""
    for name, kind in get_type_hints(command).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from ((f.name, get_type_hints(kind)[f.name]) for f in dataclasses.fields(kind))
        elif name != "return":
            yield name, kind


def _of(what: str, kind: Any, value: Any) -> Any:
    """A value of TOML as one of that type.

    Raises:
        InputError: if it is of another.
    """
    if not _fits(kind, value):
        options = [k for k in get_args(kind) if k is not types.NoneType]
        kind = options[0] if get_origin(kind) in (Union, types.UnionType) and len(options) == 1 else kind
        inner = [getattr(k, "__name__", str(k)) for k in get_args(kind) or [kind] if k not in (types.NoneType, ...)]
        raise expected(
            what, ("a list of " if get_origin(kind) is tuple else "") + " or ".join(inner), repr(value)[:SHOWN]
        )
    return tuple(value) if isinstance(value, list) else value


def _fits(kind: Any, value: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(k, value) for k in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(inner[0], v) for v in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
