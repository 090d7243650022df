"""Products with derivatives by plain autograd, for models that the transforms of torch.func do not take.

An operation may lack a forward-mode derivative or a batching rule: an `autograd.Function` of the old style, a fused
kernel. Its backward pass still gives J^T u, and double backward the rest:

    J v = d/du (J^T u) . v                         exact where the backward pass is itself written in operations
    H v = d/dtheta (grad L . v)                    that autograd knows; what it gives is compared with what is certain
    J v ~ (h(theta + d v) - h(theta - d v)) / 2d   central differences, where it is not

One right-hand side is taken at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.checkpoint import CheckpointError

from wherefrom.errors import UnsupportedError
from wherefrom.model.observe import copy_model
from wherefrom.model.problem import Problem
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import jvp

Function = Callable[[Vectors], Tensor]

# What a model raises that a transform of torch.func does not take; where the fault is the model's own, plain autograd
# raises it again.
GAPS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
CHECKED = 4  # examples that second derivatives are checked on
AGREE = 1e-3  # relative difference of a second derivative from central differences, in float64


class NotDifferentiableError(UnsupportedError):
    """A backward pass that autograd cannot differentiate, or differentiates wrongly."""


def is_gap(error: BaseException) -> bool:
    """Whether another way of differentiation may do what this one did not: not when memory ran out."""
    return isinstance(error, GAPS) and not isinstance(error, torch.OutOfMemoryError)


class Linearised:
    """A function at a point, with products by its Jacobian J and by J^T.

    Args:
        function: of parameters, to a tensor.
        theta: the point.
    """

    def __init__(self, function: Function, theta: Vectors):
        self.names = list(theta)
        self.leaves = [t.detach().requires_grad_() for t in theta.values()]
        with torch.enable_grad():
            self.value = function(dict(zip(self.names, self.leaves, strict=True)))
        self._transposed: tuple[Tensor, list[Tensor | None]] | None = None

    def pull(self, u: Tensor) -> Vectors:
        """Multiply by the transpose: J^T u, of the shapes of the parameters."""
        return dict(zip(self.names, gradients_of((self.value * u).sum(), self.leaves), strict=True))

    def push(self, v: Vectors) -> Tensor:
        """Multiply: J v, of the shape of the value.

        Raises:
            NotDifferentiableError: if the backward pass does not tell it.
        """
        if not self.value.requires_grad:
            return torch.zeros_like(self.value)
        # J^T u is linear in u, so that its derivative by u along v is J v, at u = 0 as anywhere.
        u, back = self._backward_of_zero()
        with torch.enable_grad():
            terms = [(t * v[name]).sum() for name, t in zip(self.names, back, strict=True) if t is not None]
            along = torch.stack(terms).sum()
        if not along.requires_grad:
            raise NotDifferentiableError("The backward pass of the model is not differentiable.")
        try:
            (product,) = gradients_of(along, [u])
        except RuntimeError as error:  # once_differentiable
            if not is_gap(error):
                raise
            raise NotDifferentiableError(f"The backward pass of the model is not differentiable: {error}") from error
        return product

    def _backward_of_zero(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return u = 0 and J^T u as a function of it."""
        if self._transposed is None:
            back: tuple[Tensor | None, ...]
            with torch.enable_grad():
                u = torch.zeros_like(self.value).requires_grad_()
                pulled = (self.value * u).sum()
                with _name_checkpoints():
                    back = torch.autograd.grad(pulled, self.leaves, create_graph=True, allow_unused=True)
            pulled_back: list[Tensor | None] = [t.to_dense() if t is not None and t.is_sparse else t for t in back]
            self._transposed = (u, pulled_back)
        return self._transposed

    def check(self, v: Vectors, pushed: Tensor) -> None:
        """Compare u . J v with J^T u . v for a drawn u.

        Raises:
            NotDifferentiableError: if they differ by more than rounding.
        """
        rng = torch.Generator().manual_seed(0)
        u = torch.randn(pushed.shape, generator=rng, dtype=torch.float64, device="cpu").to(pushed)
        pulled = self.pull(u)
        single = {name: t.unsqueeze(0) for name, t in pulled.items()}
        direction = {name: t.unsqueeze(0) for name, t in v.items()}
        here, there = float((u * pushed).sum()), float(vectors.dot(single, direction))
        scale = float(vectors.norm(single) * vectors.norm(direction))
        if not are_adjoint(here, there, scale, pushed.dtype):
            raise NotDifferentiableError("The derivative of the model's backward pass is wrong.")


def are_adjoint(here: float, there: float, scale: float, dtype: torch.dtype) -> bool:
    """Whether u . J v and J^T u . v are the same number, up to rounding in sums of this scale."""
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    return abs(here - there) <= tolerance * (abs(here) + abs(there)) + 100 * torch.finfo(dtype).eps * scale


@contextmanager
def _name_checkpoints() -> Iterator[None]:
    """Say why a backward pass fails that runs parts of the model again: they have other parameters by then.

    Raises:
        UnsupportedError: in place of torch's own.
    """
    try:
        yield
    except CheckpointError as error:
        raise UnsupportedError(
            "The model checkpoints its activations, which products with this curvature cannot follow. Checkpoint in "
            "training mode alone (if self.training: ...), or take GGN by rows or EmpiricalFisher."
        ) from error


def gradients_of(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Differentiate a scalar by some leaves, zero where it does not depend on a leaf; the graph is kept.

    Raises:
        UnsupportedError: if the backward pass runs parts of the model again, which then have other parameters.
    """
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    with _name_checkpoints():
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [t.to_dense() if t.is_sparse else t for t in grads]


def differentiate_by_differences(
    function: Callable[[Vectors], Tensor], theta: Vectors, v: Vectors, length: float | None
) -> Tensor:
    """Differentiate a function along v by central differences.

    Args:
        function: of parameters.
        theta: where.
        v: the direction, of the parameters' shapes.
        length: of the step, relative to max(1, |theta|); None: eps^(1/3).
    """
    dtype = next(iter(theta.values())).dtype
    relative: float = torch.finfo(dtype).eps ** (1 / 3) if length is None else length
    size = float(vectors.norm({name: t.unsqueeze(0) for name, t in theta.items()}))
    step = relative * max(1.0, size) / max(float(vectors.norm({n: t.unsqueeze(0) for n, t in v.items()})), 1e-300)
    ahead = {name: theta[name] + step * t for name, t in v.items()}
    behind = {name: theta[name] - step * t for name, t in v.items()}
    return (function(ahead) - function(behind)) / (2 * step)


def multiply_by_second_derivative(loss: Callable[[Tensor], Tensor], h: Tensor, t: Tensor) -> Tensor:
    """Multiply t by the second derivative of a scalar loss at h."""
    h = h.detach()
    try:
        return jvp(grad(loss), (h,), (t,))[1]
    except GAPS as error:
        if not is_gap(error):
            raise
    return multiply_by_backward(loss, h, t)


def multiply_by_backward(loss: Callable[[Tensor], Tensor], h: Tensor, t: Tensor) -> Tensor:
    """Do the same by double backward."""
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(h)
        if not value.requires_grad:
            return torch.zeros_like(h)
        (slope,) = torch.autograd.grad(value, h, create_graph=True)
        along = (slope * t).sum()
    return gradients_of(along, [h])[0]


def check_curvature(loss: Callable[[Tensor], Tensor], h: Tensor) -> None:
    """Compare the second derivative of a scalar loss at h with central differences of the first, along a drawn one.

    In float64, or in h's own type where the loss does not take that.

    Raises:
        UnsupportedError: if they differ: autograd does not know the derivative of the loss's backward pass.
    """
    cause = None
    h = h.detach()
    # A confident model has next to no curvature at its own outputs, and differences there are rounding: its loss is
    # tried at outputs of moderate size too.
    moderate = h / h.abs().max().clamp(min=1.0)
    for at, tolerance in ((h.double(), AGREE), (h, 100 * AGREE)):
        try:
            if _is_curved_so(loss, at, tolerance) or _is_curved_so(loss, moderate.to(at), tolerance):
                return
            break
        except GAPS as error:
            if not is_gap(error):
                raise
            cause = error
    raise UnsupportedError(
        "The loss's second derivative by the outputs is missing or wrong: autograd cannot differentiate its backward "
        "pass. Write the loss in differentiable operations (not as a fused kernel), or take EmpiricalFisher."
    ) from cause


def _is_curved_so(loss: Callable[[Tensor], Tensor], h: Tensor, tolerance: float) -> bool:
    rng = torch.Generator().manual_seed(0)

    def slope(v: Vectors) -> Tensor:
        leaf = v["h"].detach().requires_grad_()
        with torch.enable_grad():
            value = loss(leaf)
        return gradients_of(value, [leaf])[0]

    for _ in range(2):  # a step may cross a kink of the loss
        t = torch.randn(h.shape, generator=rng, dtype=torch.float64, device="cpu").to(h)
        exact, near = multiply_by_backward(loss, h, t), differentiate_by_differences(slope, {"h": h}, {"h": t}, None)
        if (exact - near).norm() <= tolerance * near.norm() + 1e-3 * tolerance * slope({"h": h}).norm():
            return True
    return False


def gradients_at_points(function: Callable[..., Tensor], theta: Vectors, *others: Tensor) -> Vectors:
    """Differentiate a scalar function at K points: gradients (K, *shape).

    Args:
        function: of parameters, and of one row of each other tensor.
        theta: the points, (K, *shape).
        others: (K, ...).
    """
    try:
        return vmap(grad(function))(theta, *others)
    except GAPS as error:
        if not is_gap(error):
            raise
    grads = []
    for k, one in enumerate(vectors.chunk(theta, 1)):
        point = {name: t[0] for name, t in one.items()}
        mine = [t[k] for t in others]
        at = Linearised(lambda p, mine=mine: function(p, *mine), point)
        grads.append({name: t.unsqueeze(0) for name, t in at.pull(torch.ones_like(at.value)).items()})
    return vectors.concatenate(grads)


def hessian_products(each: Function, theta: Vectors, v: Iterable[Vectors]) -> tuple[Vectors, Tensor]:
    """Return H v and the derivatives along v of the terms of a sum, for each v, by double backward.

    Args:
        each: of parameters, to the terms (n,) of the function whose second derivative is H.
        theta: where.
        v: Q directions, each of the parameters' shapes.

    Returns:
        H v (Q, *shape), and the terms' derivatives (Q, n).

    Raises:
        NotDifferentiableError: if the backward pass is not differentiable.
    """
    names = list(theta)
    leaves = [t.detach().requires_grad_() for t in theta.values()]
    with torch.enable_grad():
        terms = each(dict(zip(names, leaves, strict=True)))
        weights = torch.ones_like(terms).requires_grad_()
        total = (weights * terms).sum()
        with _name_checkpoints():
            slope = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    curves, along = [], []
    for one in v:
        with torch.enable_grad():
            pieces = [(t * one[name]).sum() for name, t in zip(names, slope, strict=True)]
            value = torch.stack(pieces).sum()
        try:
            *by_theta, by_weight = gradients_of(value, [*leaves, weights])
        except RuntimeError as error:
            if not is_gap(error):
                raise
            raise NotDifferentiableError(f"The backward pass of the model is not differentiable: {error}") from error
        curves.append({name: t.unsqueeze(0) for name, t in zip(names, by_theta, strict=True)})
        along.append(by_weight)
    return vectors.concatenate(curves), torch.stack(along)


def has_second_derivatives(problem: Problem) -> bool:
    """Whether double backward of the mean loss agrees with central differences of its gradient along a drawn direction.

    On a few training examples, by a copy of the model in float64 if that runs, else by itself.
    """
    try:
        return _agrees(_in_double(problem))
    except GAPS as error:
        if not is_gap(error):
            raise
    return _agrees(problem, AGREE if problem.dtype == torch.float64 else 100 * AGREE)


def _in_double(problem: Problem) -> Problem:
    keep = set(problem.parameters)
    double = copy_model(problem.model).double()
    for name, p in double.named_parameters():  # which no longer say so where the model is being observed
        p.requires_grad_(name in keep)
    return Problem(double, problem.task, problem.train, lambda name: name in keep, None, problem.memory, False)


def _agrees(problem: Problem, tolerance: float = AGREE) -> bool:
    batch = problem.batch(range(min(CHECKED, len(problem.train))))
    outputs, theta = problem.functional(batch)
    each: Function = lambda p: problem.task.loss(outputs(p), batch)  # noqa: E731

    def slope(p: Vectors) -> Tensor:
        at = Linearised(each, p)
        return torch.cat([t.flatten() for t in at.pull(torch.ones_like(at.value)).values()])

    rng = torch.Generator().manual_seed(0)
    with problem.observed():
        for _ in range(2):  # a step may cross a kink of the model
            v = {
                name: torch.randn(t.shape, generator=rng, dtype=torch.float64, device="cpu").to(t)
                for name, t in theta.items()
            }
            try:
                exact = vectors.flatten(hessian_products(each, theta, [v])[0])[0]
            except NotDifferentiableError:
                return False
            near = differentiate_by_differences(slope, theta, v, None)
            if (exact - near).norm() <= tolerance * near.norm():
                return True
    return False
