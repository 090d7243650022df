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
from wherefrom.tools.cli.expressions import suggest_nearest
from wherefrom.tools.loading import is_own, says_target, split_target

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

Command = Callable[..., Any]
RECORD = "record"  # the table of a written configuration that is no option


def read(path: str | Path) -> dict[str, Any]:
    """Read the options in a file, without the record of the run that wrote it.

    Raises:
        InputError: if it is no TOML. OSError, if it cannot be read.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    # Text that is no UTF-8 and numbers without end are ValueErrors too.
    except (ValueError, RecursionError) as error:
        raise expected(str(path), "a TOML file", f"this: {str(error)[:SHOWN]}") from error
    values = {key: value for key, value in table.items() if key != RECORD}
    for key, value in values.items():
        check_values(value, f"{path}: {key[:SHOWN]}")
    return values


def write(path: Path, options: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write a configuration that `read` takes, complete or not at all.

    Args:
        path: the file.
        options: name to value; those that are None are left out.
        record: what else is worth knowing of the run: versions, fingerprints.
    """
    lines = [f"{key} = {_write_toml(value)}" for key, value in options.items() if value is not None]
    lines += ["", f"[{RECORD}]"]
    lines += [f"{json.dumps(key)} = {_write_toml(value)}" for key, value in record.items()]
    with whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def configure(commands: Mapping[str, Command], name: str, path: str | Path) -> Command:
    """Return a command with the options of a file as its defaults.

    Args:
        commands: all that there are; the file may have options of any.
        name: the one to run.
        path: the file.

    Raises:
        InputError: for a key that no command has, with the nearest one, or a value of another type.
    """
    values = read(path)
    known: dict[str, Any] = {}
    for command in commands.values():
        known.update(list_options(command))
    known.pop("config", None)  # a file names no other
    for key in values:
        if key not in known:
            raise InputError(f"{path}: no command has an option {key[:SHOWN]!r}.{suggest_nearest(key, known)}")
    return _set_defaults(commands[name], values, path)


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
    module, _ = split_target(target)
    near = Path(path).resolve().is_relative_to(Path.cwd())
    is_trusted = (near and is_own(module)) or says_target(target)
    if not is_trusted:
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
    elif isinstance(value, str) and any(_is_unwritable(letter) for letter in value):
        raise expected(name, "text without nulls and halves of characters", repr(value)[:SHOWN])


def _is_unwritable(letter: str) -> bool:
    is_surrogate = "\ud800" <= letter <= "\udfff"
    return letter == "\0" or is_surrogate


def list_options(command: Command) -> Iterator[tuple[str, Any]]:
    """Yield names and types of a command's options; the fields of a record that is an argument count as its own."""
    for name, kind in get_type_hints(command).items():
        if _is_record(kind):
            types_of_fields = get_type_hints(kind)
            yield from ((field.name, types_of_fields[field.name]) for field in dataclasses.fields(kind))
        elif name != "return":
            yield name, kind


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and isinstance(kind, type)


def _set_defaults(command: Command, values: Mapping[str, Any], path: str | Path) -> Command:
    """Return the command with those of the values as defaults that it has options for.

    Raises:
        InputError: if a value is of another type than its option.
    """
    kinds = dict(list_options(command))
    own = {key: _convert(f"{path}: {key}", kinds[key], value) for key, value in values.items() if key in kinds}

    defaults: dict[str, Any] = {}
    for name, kind in get_type_hints(command).items():
        if _is_record(kind):
            fields = {field.name for field in dataclasses.fields(kind)}
            defaults[name] = kind(**{key: value for key, value in own.items() if key in fields})
        elif name in own:
            defaults[name] = own[name]
    configured = functools.partial(command, **defaults)
    configured.__doc__ = command.__doc__
    return configured


def _convert(what: str, kind: Any, value: Any) -> Any:
    """Return a value of TOML as one of a type.

    Raises:
        InputError: if it is of another.
    """
    if not _fits(kind, value):
        raise expected(what, _describe_type(kind), repr(value)[:SHOWN])
    return tuple(value) if isinstance(value, list) else value


def _describe_type(kind: Any) -> str:
    """Return a type in words: "int", "float or str", "a list of float", or the choices of a literal."""
    if _is_union(kind):
        # That an option may be left out is no news.
        choices = [choice for choice in get_args(kind) if choice is not types.NoneType]
        kind = choices[0] if len(choices) == 1 else kind
    parts = [part for part in get_args(kind) or [kind] if part not in (types.NoneType, ...)]
    names = " or ".join(getattr(part, "__name__", str(part)) for part in parts)
    return f"a list of {names}" if get_origin(kind) is tuple else names


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _fits(kind: Any, value: Any) -> bool:
    inner = get_args(kind)
    if _is_union(kind):
        return any(_fits(choice, value) for choice in inner)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(inner[0], part) for part in value)
    # For Python true is a number.
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _write_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_write_toml, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(str(key))} = {_write_toml(part)}" for key, part in value.items())
        return "{" + ", ".join(pairs) + "}"
    # JSON leaves the delete character as it is, TOML does not take it.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
