"""Frozen records as tensors and a description: the one rule by which every fit is saved and taken back.

A record is a frozen dataclass. Its fields may be tensors, numbers, text, None, other records, and tuples and mappings
of these. The description says what they are, in a form that JSON can hold; the tensors go beside it, each under the
path that leads to it. What belongs to the moment, such as the curvature of a fit, is left out and given again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from wherefrom.errors import expected

Description = Any  # what JSON can hold


def describe(record: Any, given: Iterable[str] = ()) -> tuple[dict[str, Tensor], Description]:
    """Take a record apart.

    Args:
        record: a frozen dataclass.
        given: fields that are left out wherever they stand, as `rebuild` is given them.

    Returns:
        Its tensors by path, and the description of the rest.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _describe(record, "", set(given), tensors)


def rebuild(
    description: Description, tensors: Mapping[str, Tensor], given: Mapping[str, Any], known: Iterable[type]
) -> Any:
    """Put a record together again: the inverse of `describe`.

    Args:
        description: of the record.
        tensors: those that belong to it, by path.
        given: the fields that were left out.
        known: the classes that may be built, no others are.

    Raises:
        InputError: if it is no description of such a record, or something in it does not fit.
    """
    return _rebuild(description, tensors, given, {name_of(cls): cls for cls in known})


def name_of(cls: type) -> str:
    """Return the name that a class has in descriptions."""
    return f"{cls.__module__}.{cls.__qualname__}"


def with_subclasses(*classes: type) -> list[type]:
    """List these classes and all that are derived from them, wherever they were defined."""
    listed = list(classes)
    for cls in listed:  # grows as it goes
        listed += [child for child in cls.__subclasses__() if child not in listed]
    return listed


def _describe(value: Any, path: str, given: set[str], tensors: dict[str, Tensor]) -> Description:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value

    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}

    if isinstance(value, (tuple, list)):
        return {"tuple": [_describe(item, _join(path, str(i)), given, tensors) for i, item in enumerate(value)]}

    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise expected(f"the keys of {path} of a record", "text", [*value][:3])
        return {"mapping": {key: _describe(item, _join(path, key), given, tensors) for key, item in value.items()}}

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        fields = {
            name: _describe(getattr(value, name), _join(path, name), given, tensors)
            for name in names
            if name not in given
        }
        return {"record": name_of(type(value)), "fields": fields, "given": [name for name in names if name in given]}

    raise expected(f"the field {path} of a record", "a tensor, a number, text or a record", type(value).__name__)


def _rebuild(
    description: Description, tensors: Mapping[str, Tensor], given: Mapping[str, Any], known: Mapping[str, type]
) -> Any:
    if description is None or isinstance(description, (bool, int, float, str)):
        return description

    match description:
        case {"tensor": str(path)}:
            if path not in tensors:
                raise expected("a saved record", f"one with the tensor {path}", "none")
            return tensors[path]

        case {"tuple": list(items)}:
            return tuple(_rebuild(item, tensors, given, known) for item in items)

        case {"mapping": dict(items)}:
            return {key: _rebuild(item, tensors, given, known) for key, item in items.items()}

        case {"record": str(name), "fields": dict(fields), "given": list(left_out)}:
            if name not in known:
                raise expected("a saved record", "of a class that is known here", name, "Import what defines it first.")
            values = {key: _rebuild(item, tensors, given, known) for key, item in fields.items()}
            values |= {key: given[key] for key in left_out if key in given}
            try:
                return known[name](**values)
            except TypeError as error:  # a field too many, or one that is missing
                raise expected(f"a saved {name}", "one with its fields", str(error)) from error

    raise expected("a saved record", "a description of one", repr(description))


def _join(path: str, name: str) -> str:
    return f"{path}|{name}" if path else name
