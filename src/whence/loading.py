"""What the command line works on: a function of the user's, named as ``module:function``, and what it returns."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from whence.errors import InputError, expected


@dataclass(frozen=True)
class Target:
    """What the user's function returned: a trained model, its task, its training data, and queries or None."""

    model: Any
    task: Any
    train: Any
    queries: Any = None


@contextmanager
def from_here() -> Iterator[None]:
    """Let the modules of the current directory be imported, as ``python -m`` does, until the block ends."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()  # a module may be younger than the last look at its folder
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def load(target: str) -> Target:
    """Import a module, call its function without arguments, and take what it returns.

    Args:
        target: ``module:function``, with dots for packages.

    Raises:
        InputError: if it has another form, the module cannot be imported, it has no such function, the function wants
            arguments, or it returns anything but (model, task, train) or (model, task, train, queries). What the
            function itself raises comes through.
    """
    form = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", target)
    if form is None:
        advice = "The module is written as in an import. For example: whence.demo:problem."
        raise expected("the target", "module:function", repr(target), advice)
    made = _function(form[1], form[2])()
    if not isinstance(made, (tuple, list)) or len(made) not in (3, 4):
        got = (
            f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, (tuple, list)) else type(made).__name__
        )
        raise expected(f"What {target} returns", "(model, task, train) or (model, task, train, queries)", got)
    return Target(*made)


def _function(module: str, name: str) -> Callable[[], Any]:
    try:
        found = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            advice = f"Run whence in the folder that holds {missing.split('.')[0]}, or install it."
        else:
            advice = f'python -c "import {module}" shows where.'
        raise InputError(f"{module} cannot be imported. {type(error).__name__}: {error}. {advice}") from error
    function = getattr(found, name, None)
    if not callable(function):
        own = [n for n, f in vars(found).items() if inspect.isfunction(f) and f.__module__ == found.__name__]
        there = ", ".join(n for n in own if not n.startswith("_")) or "none"
        raise expected("the target", f"a function of {module}", repr(name), f"The functions there: {there}.")
    signature = inspect.signature(function)
    if any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()
    ):
        raise expected(f"{module}:{name}", "callable without arguments", f"{name}{signature}", "Give each a default.")
    return function
