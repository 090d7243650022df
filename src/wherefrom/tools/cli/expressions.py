"""Solvers, methods and dampings as they are written in Python, read without running any of it.

    CG(preconditioner=EKFAC(), tolerance=0.01)          SOURCE(segments=3, solver=ASTRA())          relative(0.1)

An expression may hold the library's public names, calls of them and literals, nothing else.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import wherefrom
from wherefrom.errors import InputError, expected
from wherefrom.store import SHOWN

Names = Mapping[str, Callable[..., Any]]
PUBLIC = {name: getattr(wherefrom, name) for name in wherefrom.__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def _is_solver(kind: type) -> bool:
    return issubclass(kind, wherefrom.Solver) and kind is not wherefrom.Solver


def _is_method(kind: type) -> bool:
    return hasattr(kind, "fit") and not issubclass(kind, wherefrom.Solver) and not getattr(kind, "_is_protocol", False)


SOLVERS: Names = {name: kind for name, kind in CLASSES.items() if _is_solver(kind)}
METHODS: Names = {name: kind for name, kind in CLASSES.items() if _is_method(kind)}
CURVATURES: Names = {name: CLASSES[name] for name in ("GGN", "Hessian", "EmpiricalFisher")}
DAMPINGS: Names = {
    "absolute": wherefrom.Damping.absolute,
    "relative": wherefrom.Damping.relative,
    "per_example": wherefrom.Damping.per_example,
    "from_training": wherefrom.Damping.from_training,
    "by_block": wherefrom.Damping.by_block,
}
NAMES: Names = SOLVERS | CURVATURES | METHODS | DAMPINGS


def read_expression(what: str, text: str, example: str, names: Names = NAMES) -> Any:
    """Read what an expression says.

    Args:
        what: whose value it is, for messages.
        text: the expression.
        example: one that would do, for messages.
        names: what may be called by which name.

    Raises:
        InputError: if it is not Python, holds anything but these names, calls of them and literals, or gives a name an
            argument that it does not take; with the nearest name that there is.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    # Brackets within brackets within brackets exhaust the parser's stack or its memory.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise expected(what, f"written as in Python, such as {example}", repr(text)[:SHOWN]) from error
    try:
        return _Reader(what, names).read(tree.body)
    except RecursionError as error:
        raise expected(what, "an expression of some depth", f"{len(text)} characters") from error


class _Reader:
    """Reads the nodes of an expression.

    Args:
        what: whose value it is, for messages.
        names: what may be called by which name.
    """

    def __init__(self, what: str, names: Names):
        self.what, self.names = what, names

    def read(self, node: ast.expr) -> Any:
        """Return the value of a node."""
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._look_up(node)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError) as error:
            wanted = "calls of the library's names and literals"
            raise expected(self.what, wanted, ast.unparse(node)[:SHOWN]) from error

    def _look_up(self, node: ast.expr) -> Callable[..., Any]:
        name = ast.unparse(node).removeprefix("wherefrom.").removeprefix("Damping.")
        if name not in self.names:
            raise InputError(f"{self.what}: there is no {name}.{suggest_nearest(name, self.names)}")
        return self.names[name]

    def _call(self, node: ast.Call) -> Any:
        function, name = self._look_up(node.func), ast.unparse(node.func)
        parameters = inspect.signature(function).parameters
        for keyword in node.keywords:
            if keyword.arg not in parameters:
                suggestion = suggest_nearest(keyword.arg, parameters)
                raise InputError(f"{self.what}: {name} has no argument {keyword.arg or '**'}.{suggestion}")

        arguments = [self.read(argument) for argument in node.args]
        keywords = {str(keyword.arg): self.read(keyword.value) for keyword in node.keywords}
        try:
            return function(*arguments, **keywords)
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            wanted = f"one that {name} accepts"
            raise expected(self.what, wanted, ast.unparse(node)[:SHOWN], f"{error}.") from error


def suggest_nearest(name: str | None, known: Iterable[str]) -> str:
    """Return a sentence with the name that may have been meant, or else with all that there are."""
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches((name or "").lower(), lower, 1, 0.5)
    if near:
        return f" Do you mean {lower[near[0]]}?"
    return f" There are: {', '.join(lower.values())}."


def bind_arguments(names: Names, **values: Any) -> Names:
    """Return the same names, where those that take one of these arguments get it if an expression leaves it out."""
    bound = {}
    for name, function in names.items():
        parameters = inspect.signature(function).parameters
        own = {argument: value for argument, value in values.items() if argument in parameters}
        bound[name] = functools.partial(function, **own)
    return bound
