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
from wherefrom import methods as attribution
from wherefrom import solvers
from wherefrom.errors import InputError, expected
from wherefrom.store import SHOWN

Names = Mapping[str, Callable[..., Any]]

SOLVERS: Names = {n: getattr(solvers, n) for n in solvers.__all__ if issubclass(getattr(solvers, n), wherefrom.Solver)}
CURVATURES: Names = {"GGN": wherefrom.GGN, "Hessian": wherefrom.Hessian, "EmpiricalFisher": wherefrom.EmpiricalFisher}
METHODS: Names = {n: m for n in attribution.__all__ if hasattr(m := getattr(attribution, n), "score")}
DAMPINGS: Names = {
    n: getattr(wherefrom.Damping, n) for n in ("absolute", "relative", "per_example", "from_training", "by_parameter")
}
NAMES: Names = {n: f for n, f in (SOLVERS | CURVATURES | METHODS | DAMPINGS).items() if n != "Solver"}


def made(what: str, text: str, example: str, names: Names = NAMES) -> Any:
    """What an expression says.

    Args:
        what: whose value it is, for messages.
        text: the expression.
        example: one that would do, for messages.
        names: what may be called by which name.

    Raises:
        InputError: if it is not Python, holds anything but these names, calls of them and literals, or gives a name an
            argument that it does not take; with the nearest name that there is.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            return called(node)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return named(node)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError) as error:
            raise expected(what, "calls of the library's names and literals", ast.unparse(node)[:SHOWN]) from error

    def named(node: ast.expr) -> Callable[..., Any]:
        name = ast.unparse(node).removeprefix("wherefrom.").removeprefix("Damping.")
        if name not in names:
            raise InputError(f"{what}: there is no {name}.{nearest(name, names)}")
        return names[name]

    def called(node: ast.Call) -> Any:
        function, name = named(node.func), ast.unparse(node.func)
        takes = inspect.signature(function).parameters
        for keyword in node.keywords:
            if keyword.arg not in takes:
                raise InputError(f"{what}: {name} has no argument {keyword.arg or '**'}.{nearest(keyword.arg, takes)}")
        arguments = [value(a) for a in node.args]
        try:
            return function(*arguments, **{str(k.arg): value(k.value) for k in node.keywords})
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise expected(what, f"one that {name} accepts", ast.unparse(node)[:SHOWN], f"{error}.") from error

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: brackets within brackets
        raise expected(what, f"written as in Python, such as {example}", repr(text)[:SHOWN]) from error
    try:
        return value(tree.body)
    except RecursionError as error:
        raise expected(what, "an expression of some depth", f"{len(text)} characters") from error


def nearest(name: str | None, known: Iterable[str]) -> str:
    """A sentence with what may have been meant, or else with all that there is."""
    lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches((name or "").lower(), lower, 1, 0.5)
    return f" Do you mean {lower[found[0]]}?" if found else f" There are: {', '.join(lower.values())}."


def given(names: Names, **values: Any) -> Names:
    """The same names, where those that take one of these arguments get it if an expression leaves it out."""

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        takes = inspect.signature(function).parameters
        return functools.partial(function, **{k: v for k, v in values.items() if k in takes})

    return {name: bound(function) for name, function in names.items()}
