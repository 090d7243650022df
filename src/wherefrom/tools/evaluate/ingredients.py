"""What results were made of, as names and short texts, so that kept results are refused where any of it differs.

Numbers and strings stand for themselves, tensors and modules are hashed, containers and records are taken apart. A
function is its code, its defaults and what it reads: variables around it and globals, each by name. Functions and
classes of installed packages are known by name alone, and so are objects of their types.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wherefrom.digest import raw
from wherefrom.model.observe import fingerprint

# Types whose repr says all there is to say.
PLAIN = (bool, int, float, complex, str, bytes, type(None), range, PurePath, np.generic, torch.dtype, torch.device)
# Installed types whose objects are told by their attributes all the same: users fill them with their own things.
RECORDS = (Namespace, SimpleNamespace, Dataset, DataLoader)
MANY_PARTS = 32  # of a container; more of them are hashed together
LONGEST_TEXT = 60  # characters


def ingredients(**things: object) -> dict[str, str]:
    """Describe everything that the things are made of: name -> short text, equal for equal things in any process."""
    texts: dict[str, str] = {}
    seen: dict[int, object] = {}
    for name, thing in things.items():
        texts |= _take_apart(name, thing, seen)
    return texts


def _take_apart(name: str, thing: object, seen: dict[int, object]) -> dict[str, str]:
    if isinstance(thing, PLAIN):
        return {name: _shorten(repr(thing))}
    if id(thing) in seen:  # functions and objects may refer to each other in circles
        return {}
    seen[id(thing)] = thing  # held, so that the id stays its own

    own_text, parts = _split(thing)
    inner: dict[str, str] = {}
    for key, part in parts.items():
        inner |= _take_apart(f"{name}.{key}", part, seen)
    if isinstance(thing, (Mapping, Sequence, Set)) and len(inner) > MANY_PARTS:
        own_text, inner = f"{own_text} {_hash(map(repr, inner.items()))}", {}
    return {name: own_text} | inner


def _split(thing: Any) -> tuple[str, Mapping[str, object]]:
    """Give a short text for the thing itself, and what else it is made of."""
    kind = _qualified_name(type(thing))

    # Numbers: tensors, arrays, and what can become an array, such as the columns of a data frame.
    if hasattr(thing, "__array__") and not isinstance(thing, (Tensor, type)):
        thing = np.asarray(thing)
        if thing.dtype.kind not in "biufc":
            return kind, {"items": thing.tolist()}
    if isinstance(thing, (Tensor, np.ndarray)):
        t = torch.as_tensor(thing)
        return f"{t.dtype} {tuple(t.shape)} {hashlib.blake2b(raw(t), digest_size=8).hexdigest()}", {}

    # Modules of torch come before plain objects: their parameters and the text of their structure say what they are.
    if isinstance(thing, nn.Module):
        return f"{kind} {_hash([str(thing), fingerprint(thing)])}", {"class": type(thing)}

    # Code.
    if isinstance(thing, functools.partial):
        return kind, {"func": thing.func} | _number(thing.args) | thing.keywords
    if isinstance(thing, MethodType):
        return kind, {"func": thing.__func__, "self": thing.__self__}
    if isinstance(thing, ModuleType):
        return _qualified_name(thing), {}
    if isinstance(thing, (FunctionType, type)) and _is_installed(thing.__module__):
        return _qualified_name(thing), {}
    if isinstance(thing, FunctionType):
        return _hash(_describe_code(thing.__code__, thing.__doc__)), _collect_reads(thing)
    if isinstance(thing, type):
        return _qualified_name(thing), _number(thing.__bases__) | _collect_members(thing)

    # Containers and records.
    if isinstance(thing, Mapping):
        return kind, {str(k): v for k, v in thing.items()}
    if isinstance(thing, Set):
        return kind, _number(sorted(thing, key=repr))
    if isinstance(thing, Sequence):
        return kind, _number(thing)
    module = type(thing).__module__
    is_record = isinstance(thing, RECORDS) or dataclasses.is_dataclass(thing)
    if is_record or "wherefrom" in module or not _is_installed(module):
        return kind, {"class": type(thing)} | getattr(thing, "__dict__", {})
    return _qualified_name(thing) if hasattr(thing, "__qualname__") else kind, {}


def _collect_members(kind: type) -> dict[str, object]:
    """Collect what a class defines: its functions, also within properties and class methods, and its attributes."""
    members = {}
    for name, member in vars(kind).items():
        unwrapped = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(unwrapped, FunctionType) or not name.startswith("__"):
            members[name] = unwrapped
    return members


def _collect_reads(function: FunctionType) -> dict[str, object]:
    """Collect the defaults of a function and what it reads from around it."""
    code, around = function.__code__, function.__globals__
    names = sorted(set(_names(code)))

    reads: dict[str, object] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell != CellType():  # an empty cell: a variable that has no value yet
            reads[name] = cell.cell_contents
    for name in names:
        if name not in around:
            continue
        value = around[name]
        if not isinstance(value, ModuleType):
            reads[name] = value
        elif not _is_installed(value.__name__):
            # Of a module of the user's own, only what the function names can matter.
            reads |= {f"{name}.{n}": getattr(value, n) for n in names if hasattr(value, n)}
    return reads | _number(function.__defaults__ or ()) | (function.__kwdefaults__ or {})


def _names(code: CodeType) -> Iterable[str]:
    """Yield the global names and attributes that a function uses, and the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _describe_code(code: CodeType, doc: str | None) -> Iterable[str]:
    """Yield what decides what a function does: not its comments, its line numbers, nor its docstring."""
    yield from (code.co_code.hex(), repr(code.co_names), repr(code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _describe_code(constant, None)
        elif constant != doc:
            # The order of a set differs between processes.
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)


def _is_installed(module: str) -> bool:
    """Tell whether a module belongs to Python, to wherefrom, or to an installed package, rather than to the user."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] in (*sys.stdlib_module_names, "wherefrom") or "-packages" in file


def _qualified_name(thing: Any) -> str:
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None) or thing.__name__
    return f"{module}.{name}" if module else name


def _number(things: Iterable[object]) -> dict[str, object]:
    return {str(i): thing for i, thing in enumerate(things)}


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:40]}... {_hash([text])}"


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
