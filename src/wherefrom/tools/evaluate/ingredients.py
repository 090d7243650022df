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
from wherefrom.model import observe as models

PLAIN = (bool, int, float, complex, str, bytes, type(None), range, PurePath, np.generic, torch.dtype, torch.device)
RECORDS = (Namespace, SimpleNamespace, Dataset, DataLoader)
LONG = 32  # parts of a container; more of them are hashed together


def ingredients(**things: object) -> dict[str, str]:
    """Name -> short text of everything that the things are made of; equal for equal things, in any process."""
    found: dict[str, str] = {}
    seen: dict[int, object] = {}
    for name, thing in things.items():
        found |= _taken_apart(name, thing, seen)
    return found


def _taken_apart(name: str, thing: object, seen: dict[int, object]) -> dict[str, str]:
    if isinstance(thing, PLAIN):
        return {name: _short(repr(thing))}
    if id(thing) in seen:
        return {}
    seen[id(thing)] = thing  # held, so that the id stays its own
    itself, parts = _parts(thing)
    inner: dict[str, str] = {}
    for key, part in parts.items():
        inner |= _taken_apart(f"{name}.{key}", part, seen)
    if isinstance(thing, (Mapping, Sequence, Set)) and len(inner) > LONG:
        itself, inner = f"{itself} {_hash(map(repr, inner.items()))}", {}
    return {name: itself} | inner


def _parts(thing: Any) -> tuple[str, Mapping[str, object]]:
    """A short text for the thing itself, and what else it is made of."""
    kind = _name(type(thing))
    if hasattr(thing, "__array__") and not isinstance(thing, (Tensor, type)):
        thing = np.asarray(thing)
        if thing.dtype.kind not in "biufc":
            return kind, {"items": thing.tolist()}
    if isinstance(thing, (Tensor, np.ndarray)):
        t = torch.as_tensor(thing)
        return f"{t.dtype} {tuple(t.shape)} {hashlib.blake2b(raw(t), digest_size=8).hexdigest()}", {}
    if isinstance(thing, nn.Module):
        return f"{kind} {_hash([str(thing), models.fingerprint(thing)])}", {"class": type(thing)}
    if isinstance(thing, functools.partial):
        return kind, {"func": thing.func} | _numbered(thing.args) | thing.keywords
    if isinstance(thing, MethodType):
        return kind, {"func": thing.__func__, "self": thing.__self__}
    if isinstance(thing, ModuleType) or (isinstance(thing, (FunctionType, type)) and _installed(thing.__module__)):
        return _name(thing), {}
    if isinstance(thing, FunctionType):
        return _hash(_code(thing.__code__, thing.__doc__)), _read(thing)
    if isinstance(thing, type):
        own = {k: getattr(v, "__func__", getattr(v, "fget", v)) for k, v in vars(thing).items()}
        members = {k: v for k, v in own.items() if isinstance(v, FunctionType) or not k.startswith("__")}
        return _name(thing), _numbered(thing.__bases__) | members
    if isinstance(thing, Mapping):
        return kind, {str(k): v for k, v in thing.items()}
    if isinstance(thing, (Sequence, Set)):
        return kind, _numbered(sorted(thing, key=repr) if isinstance(thing, Set) else thing)
    module = type(thing).__module__
    if isinstance(thing, RECORDS) or dataclasses.is_dataclass(thing) or "wherefrom" in module or not _installed(module):
        return kind, {"class": type(thing)} | getattr(thing, "__dict__", {})
    return _name(thing) if hasattr(thing, "__qualname__") else kind, {}


def _read(function: FunctionType) -> dict[str, object]:
    """The defaults of a function and what it reads from around it."""
    code, around = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    read = {name: cell.cell_contents for name, cell in cells if cell != CellType()}
    names = sorted(set(_names(code)) & set(around))
    for name in names:
        value = around[name]
        if not isinstance(value, ModuleType):
            read[name] = value
        elif not _installed(value.__name__):
            read |= {f"{name}.{n}": getattr(value, n) for n in sorted(set(_names(code))) if hasattr(value, n)}
    return read | _numbered(function.__defaults__ or ()) | (function.__kwdefaults__ or {})


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _code(code: CodeType, doc: str | None) -> Iterable[str]:
    """What decides what a function does: not its comments, its line numbers, nor its docstring."""
    yield from (code.co_code.hex(), repr(code.co_names), repr(code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant, None)
        elif constant != doc:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)


def _installed(module: str) -> bool:
    """Whether a module belongs to Python, to wherefrom, or to an installed package, rather than to the user."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] in (*sys.stdlib_module_names, "wherefrom") or "-packages" in file


def _name(thing: Any) -> str:
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None) or thing.__name__
    return f"{module}.{name}" if module else name


def _numbered(things: Iterable[object]) -> dict[str, object]:
    return {str(i): thing for i, thing in enumerate(things)}


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}... {_hash([text])}"


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
