"""What the command line works on: a function of the user's, named as ``module:function``, and what it returns."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np
from torch import Tensor

from wherefrom import Trajectory
from wherefrom.data.examples import Examples
from wherefrom.errors import InputError, expected
from wherefrom.tools.report import Example


@dataclass(frozen=True)
class Target:
    """What the user's function returned, or may return to say more than a tuple of the first four.

    Args:
        model: the trained model; for methods that take several, a list of them, the attributed one first.
        task: what was trained and what is measured.
        train: the N training examples.
        queries: those that are asked about; the fields below are in the form of the training examples too.
        trusted: examples with labels that are known to be right, for ``wherefrom clean``.
        candidates: examples that might be trained on, for ``wherefrom select``.
        trajectory: the recorded run, or its folder, for methods that look at training.
        retrain: the training again, for ``wherefrom evaluate``: a function of masks (M, N) that returns the
            measurements (M, R, Q), such as a ``functools.partial`` of `retrain_small`; or one of the numbers of the
            examples to train on and a seed, that returns a trained model.
        show: how an example looks: a function of a data set, which is one of those above, and a number in it, to a
            caption or a `report.Example`. None: its label where the data are a pair with labels, else its number.
        defaults: options that commands take where they are left out, such as ``{"damping": 0.01}``.
        page: what every report says: its "title" and "lead", and arguments of `report.usual_sections`, such as
            ``{"measurement": "the loss in nats"}``. Its "notes" are shown on the screen too.
    """

    model: Any
    task: Any
    train: Any
    queries: Any = None
    trusted: Any = None
    candidates: Any = None
    trajectory: Trajectory | str | Path | None = None
    retrain: Callable[..., Any] | None = None
    show: Callable[[Any, int], Example | str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    page: Mapping[str, Any] = field(default_factory=dict)

    def given(self, name: str) -> Any:
        """Return a field.

        Raises:
            InputError: if it was left out.
        """
        value = getattr(self, name)
        if value is None:
            prompts = ", or with --hf give --prompt and --completion" if name == "queries" else ""
            advice = f"Let the target's function return wherefrom.tools.loading.Target(..., {name}=...){prompts}."
            raise expected(name, "given", "none", advice)
        return value

    def shown(self, name: str) -> Shown:
        """Return how the examples of a data set look.

        Args:
            name: of the field.

        Raises:
            InputError: if it was left out.
        """
        return Shown(self.given(name), name, self.show or _name_by_label)

    def run(self) -> Trajectory:
        """Return the recorded run, which is read if it is given by its folder."""
        trajectory = self.given("trajectory")
        return trajectory if isinstance(trajectory, Trajectory) else Trajectory.load(trajectory)


class Captions(Sequence[str]):
    """The captions of examples."""

    def __init__(self, shown: Shown):
        self.shown = shown

    def __len__(self) -> int:
        return len(self.shown)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [example.caption for example in self.shown[at]]
        return self.shown[at].caption


class Shown(Sequence[Example]):
    """How the examples of a data set look; each is made when it is asked for."""

    def __init__(self, data: Any, name: str, show: Callable[[Any, int], Example | str]):
        self.data, self.show, self.length = data, show, len(Examples(data, name))
        self.captions = Captions(self)

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[i] for i in range(self.length)[at]]
        shown = self.show(self.data, range(self.length)[at])
        return shown if isinstance(shown, Example) else Example(str(shown))


def _name_by_label(data: Any, number: int) -> str:
    """Return an example's label where it has one, else its number."""
    labels = data[1] if isinstance(data, (tuple, list)) and len(data) > 1 else None
    if isinstance(labels, (Tensor, np.ndarray)) and labels.ndim == 1:
        return f"label {labels[number].item():.6g}"
    return f"example {number}"


@contextmanager
def import_from_here() -> Iterator[None]:
    """Let the modules of the current directory be imported until the block ends.

    They come after all that is installed: a file json.py or torch.py that happens to lie there is not taken for these.
    """
    here = os.getcwd()
    sys.path.append(here)
    # A module may be younger than the last look at its folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        # The last one is ours.
        for at in reversed(range(len(sys.path))):
            if sys.path[at] == here:
                del sys.path[at]
                break


def load(target: str) -> Target:
    """Import a module, call its function without arguments, and take what it returns.

    Args:
        target: ``module:function``, with dots for packages.

    Raises:
        InputError: if it has another form, the module cannot be imported, it has no such function, the function wants
            arguments, or it returns anything but a `Target`, (model, task, train) or (model, task, train, queries).
            What the function itself raises comes through.
    """
    function = _import_function(*split_target(target))
    result = function()
    if isinstance(result, Target):
        return result

    is_sequence = isinstance(result, (tuple, list))
    if is_sequence and len(result) in (3, 4):
        return Target(*result)
    wanted = "(model, task, train), (model, task, train, queries) or a wherefrom.tools.loading.Target"
    got = f"({', '.join(type(part).__name__ for part in result)})" if is_sequence else type(result).__name__
    raise expected(f"What {target} returns", wanted, got)


def split_target(target: str) -> tuple[str, str]:
    """Return the module and the function that a target names.

    Raises:
        InputError: if it has another form.
    """
    form = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", target)
    if form is None:
        advice = "The module is written as in an import. For example: wherefrom.tools.demo:problem."
        raise expected("the target", "module:function", repr(target), advice)
    return form[1], form[2]


def says_target(target: str) -> bool:
    """Tell whether the definition of a function says ``-> Target``.

    That is read from its source: nothing is imported or called.
    """
    module, name = split_target(target)
    try:
        spec = PathFinder.find_spec(module.partition(".")[0])
        for inner in module.split(".")[1:]:
            if spec is None or spec.submodule_search_locations is None:
                return False
            spec = PathFinder.find_spec(f"{spec.name}.{inner}", list(spec.submodule_search_locations))
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return False
        tree = ast.parse(spec.loader.get_data(spec.loader.get_filename(spec.name)))
    except (ImportError, OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name and node.returns is not None:
            # The annotation may be quoted, and have the package in front.
            annotation = ast.unparse(node.returns).strip("'\"")
            if annotation.rpartition(".")[2] == "Target":
                return True
    return False


def is_own(module: str) -> bool:
    """Tell whether a module lies in the current directory or below, and not among installed packages."""
    spec = PathFinder.find_spec(module.partition(".")[0])
    if spec is None:
        return False
    places = spec.submodule_search_locations or [spec.origin or ""]
    origin = next(iter(places), None)
    if not origin or "-packages" in origin:
        return False
    return Path(origin).resolve().is_relative_to(Path.cwd())


def _import_function(module: str, name: str) -> Callable[[], Any]:
    """Import a function that can be called without arguments.

    Raises:
        InputError: if the module cannot be imported, or has no such function, or it wants arguments.
    """
    if _is_python_own(module):
        raise expected("the target", "a function of yours", f"one of Python's own module {module}", "Rename the file.")
    try:
        imported = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        advice = _advise_on_import(module, error)
        raise InputError(f"{module} cannot be imported. {type(error).__name__}: {error}. {advice}") from error

    function = getattr(imported, name, None)
    # What was imported there from Python's own modules, such as an exit, gives no target, and is not called.
    is_foreign = _is_python_own(str(getattr(function, "__module__", None)))
    if not callable(function) or isinstance(function, type) or is_foreign:
        raise expected("the target", f"a function of {module}", repr(name), _advise_on_name(module, imported))

    signature = inspect.signature(function)
    if any(_is_required(parameter) for parameter in signature.parameters.values()):
        raise expected(f"{module}:{name}", "callable without arguments", f"{name}{signature}", "Give each a default.")
    return function


def _is_python_own(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _is_required(parameter: inspect.Parameter) -> bool:
    takes_any_number = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not takes_any_number


def _advise_on_import(module: str, error: ImportError | SyntaxError) -> str:
    """Return what to do if a module cannot be imported: it is missing itself, or something in it fails."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    is_itself = missing is not None and f"{module}.".startswith(f"{missing}.")
    if is_itself:
        return f"Run wherefrom in the folder that holds {str(missing).split('.')[0]}, or install it."
    return f'python -c "import {module}" shows where.'


def _advise_on_name(module: str, imported: ModuleType) -> str:
    """Return what to do if a module has no such function: another package of its name was imported, or a typo."""
    if Path(f"{module.partition('.')[0]}.py").exists() and not is_own(module):
        return f"{imported.__file__} was imported, an installed package of the same name. Rename your file."
    names = []
    for name, value in vars(imported).items():
        is_own_function = inspect.isfunction(value) and value.__module__ == imported.__name__
        if is_own_function and not name.startswith("_"):
            names.append(name)
    return f"The functions there: {', '.join(names) or 'none'}."
