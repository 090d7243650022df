"""One forward and R backward passes, observed: the factored gradients of every block.

Parameters need no gradients meanwhile, so the backward pass skips the weight gradients and yields only the cotangents
at the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence import rows as forms
from whence.data import Batch, batch_length, map_tensors, tensors
from whence.errors import UnsupportedError
from whence.factored import Factored, Written
from whence.gradients import Gradients
from whence.layers import kind_of
from whence.layout import Layout
from whence.rows import Lookup, Rows
from whence.vectors import Vectors

Seeds = Callable[[Tensor, Batch], Tensor]  # (outputs (n, ...), batch) -> cotangents (R, n, ...)
Functional = Callable[[Batch], tuple[Callable[[Vectors], Tensor], Vectors]]


class _Call:
    """One call of a layer: its input and where its output sits in the graph."""

    def __init__(self, x: Tensor, output: Tensor, edge: GradientEdge):
        self.x, self.edge = x.detach(), edge
        self.shape, self.dtype = output.shape, output.dtype


def trace(
    forward: Callable[[], Tensor], model: nn.Module, batch: Batch, seeds: Seeds, layout: Layout, functional: Functional
) -> Gradients:
    """Rows J_n^T s_{n,r} of all blocks.

    Args:
        forward: computes the outputs (n, ...) with the hooked model.
        model: the model, in eval mode, no parameter requiring a gradient.
        batch: the batch that ``forward`` runs on.
        seeds: makes the cotangents from the outputs.
        layout: the blocks.
        functional: the outputs on a batch as a function of parameters, for blocks on the slow path.
    """
    with _hooked(model, layout, batch_length(batch)) as calls:
        outputs = forward()
    cotangents = seeds(outputs, batch)
    g = _backward(outputs, cotangents, calls)
    rows: dict[str, Rows] = {}
    for block in layout.blocks:
        if uses := layout.uses[block.name]:
            parts = [
                _rows(model.get_submodule(use.module), call, g[call], use.parts, block.name, len(outputs))
                for use in uses
                for call in calls[use.module]
            ]
            rows[block.name] = (
                forms.total(parts)
                if parts
                else Written(outputs.new_zeros(len(outputs), len(cotangents), block.size), block.sides)
            )
    if layout.slow:
        for name, dense in _slow(batch, cotangents, layout, functional).items():
            rows[name] = Written(dense.flatten(2), (1, dense[0, 0].numel(), 1))
    weights = outputs.new_ones(len(outputs), len(cotangents), dtype=torch.float64)
    return Gradients(layout.blocks, {b.name: rows[b.name] for b in layout.blocks}, weights)


@contextmanager
def _hooked(model: nn.Module, layout: Layout, n: int) -> Iterator[dict[str, list[_Call]]]:
    """Record every call of the layers that the layout uses; the hooks are gone afterwards."""
    calls: dict[str, list[_Call]] = {use.module: [] for uses in layout.uses.values() for use in uses}

    def hook(path: str) -> Callable[..., Tensor]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                raise UnsupportedError(
                    f"{path} ({type(module).__name__}) must map one tensor to one tensor. Leave it out."
                )
            if x.shape[0] == 1 and n > 1:  # one position table for the whole batch: give each example its own
                x, output = x.expand(n, *x.shape[1:]), output.expand(n, *output.shape[1:])
            if not output.requires_grad:  # the first layers: the graph begins here
                output = output.detach().requires_grad_().clone()
            calls[path].append(_Call(x, output, get_gradient_edge(output)))
            return output

        return record

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _backward(outputs: Tensor, cotangents: Tensor, calls: dict[str, list[_Call]]) -> dict[_Call, Tensor]:
    """The cotangent at the output of every call, (R, *output.shape); in memory those of an example are together."""
    flat = [c for called in calls.values() for c in called]
    if not flat:
        return {}
    R = len(cotangents)
    stacks = [outputs.new_empty(c.shape[0], R, *c.shape[1:]).transpose(0, 1) for c in flat]
    for r, cotangent in enumerate(cotangents):
        grads: tuple[Tensor | None, ...] = (None,) * len(flat)
        if outputs.requires_grad:
            pulled = (outputs * cotangent).sum()  # a scalar: passing grad_outputs would import sympy, half a second
            grads = torch.autograd.grad(pulled, [c.edge for c in flat], retain_graph=r + 1 < R, allow_unused=True)
        for stack, grad in zip(stacks, grads, strict=True):
            stack[r] = 0.0 if grad is None else grad
    return dict(zip(flat, stacks, strict=True))


def _rows(
    layer: nn.Module, call: _Call, g: Tensor, parts: tuple[str, ...], name: str, n: int
) -> Factored | Written | Lookup:
    """The rows of one call; a layer run on (n m, ...) inputs contributes m positions to each of the n examples."""
    kind, length = kind_of(layer), call.x.shape[0]
    if kind is None or length % n or g.shape[1] != length:
        raise Unfactorable(name)
    found = kind.rows(layer, call.x, g, parts)
    if length == n:
        return found
    if isinstance(found, Lookup):
        return Lookup(found.ids.reshape(n, -1), _merge(found.g, n, 0), found.size)
    if isinstance(found, Written):
        return Written(found.rows.unflatten(0, (n, -1)).sum(1), found.sides)
    a = found.a.reshape(found.a.shape[0], n, -1, found.a.shape[-1])
    return Factored(a, _merge(found.g, n, 1))


class Unfactorable(UnsupportedError):
    """The layer's input does not have the examples on its leading axis."""

    def __init__(self, block: str):
        super().__init__(
            f"{block} does not see the examples on the first axis of its input. Leave it out with parameters=..."
        )
        self.block = block


def _merge(g: Tensor, n: int, dim: int) -> Tensor:
    """(..., n m, R, T, O) to (..., n, R, m T, O)."""
    g = g.unflatten(dim, (n, -1)).movedim(dim + 1, dim + 2)
    return g.flatten(dim + 2, dim + 3)


def _slow(batch: Batch, cotangents: Tensor, layout: Layout, functional: Functional) -> Vectors:
    """Rows (n, R, ...) of parameters that no layer entry covers: a vector-Jacobian product per example, by vmap."""
    names = [p for b in layout.slow for p in b.shapes]
    leaves = list(tensors(batch))

    def one(example: list[Tensor], seeds: Tensor) -> Vectors:  # tensors without the example axis; (R, ...)
        remaining = iter(example)
        single = map_tensors(lambda _: next(remaining).unsqueeze(0), batch)
        outputs, parameters = functional(single)
        held = {name: p for name, p in parameters.items() if name not in names}
        pull = torch.func.vjp(lambda p: outputs(held | p), {name: parameters[name] for name in names})[1]
        return torch.func.vmap(lambda s: pull(s.unsqueeze(0))[0])(seeds)

    size = sum(b.size for b in layout.slow) * len(cotangents)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(one, in_dims=(0, 1), chunk_size=max(1, 2**24 // size))(leaves, cotangents.detach())
    except RuntimeError as error:
        raise UnsupportedError(
            f"no exact gradients could be computed for {', '.join(names[:6])}: torch.func.vmap says: {error}. "
            "Leave these parameters out with parameters=..., or register a LayerKind for their module."
        ) from error
