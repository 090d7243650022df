"""One forward and R backward passes, observed: the factored gradients of every block.

Parameters need no gradients meanwhile, so the backward pass skips the weight gradients and yields only the cotangents
at the layers' outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from wherefrom.data.examples import Batch, batch_length, has_rows, map_tensors, take, tensors
from wherefrom.errors import AttributionWarning, InputError
from wherefrom.persample import rows as forms
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.layers import CHANNELS_FIRST, Arguments, Unfactorable, inside, kind_of
from wherefrom.persample.layout import Layout, Use
from wherefrom.persample.rows import Lookup, Rows, Scattered
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import math_attention

Seeds = Callable[[Tensor, Batch], Tensor]  # (outputs (n, ...), batch) -> cotangents (R, n, ...)
Functional = Callable[[Batch], tuple[Callable[[Vectors], Tensor], Vectors]]


class _Call:
    """One call of a layer: its input, all its arguments, and where its output sits in the graph."""

    def __init__(self, x: Tensor, arguments: Arguments, output: Tensor, edge: GradientEdge):
        self.x, self.arguments, self.edge = x.detach(), arguments, edge
        self.shape = output.shape


@dataclass(frozen=True)
class Traced:
    """What one pass found.

    Args:
        gradients: the rows of all blocks.
        outputs: of the model, (n, ...), detached.
        cotangents: at the outputs, (R, n, ...).
        signature: the shapes of the batch, of the cotangents and of what the layers saw.
        merged: whether a layer saw the rows of all examples on one axis, and not a token of each batch entry for each:
            whose they are is then a guess.
    """

    gradients: Gradients
    outputs: Tensor
    cotangents: Tensor
    signature: tuple[Any, ...]
    merged: bool


def trace(
    forward: Callable[[Batch], Tensor],
    model: nn.Module,
    batch: Batch,
    seeds: Seeds,
    layout: Layout,
    functional: Functional,
    positions: int | None = None,
) -> Traced:
    """Rows J_n^T s_{n,r} of all blocks.

    Args:
        forward: computes the outputs (n, ...) of a batch with the hooked model.
        model: the model, in eval mode, no parameter requiring a gradient.
        batch: n examples.
        seeds: makes the cotangents from the outputs.
        layout: the blocks.
        functional: the outputs on a batch as a function of parameters, for blocks on the slow path.
        positions: the length S of the sequences: then n S rows, each what one position of one example contributes.

    Raises:
        UnsupportedError: if positions are asked for and those of a block cannot be told.
    """
    if positions and layout.slow:
        raise Unfactorable(layout.slow[0].name, "takes the slow path, where its gradient has no positions")
    with _hooked(model, layout, batch_length(batch)) as calls:
        outputs = forward(batch)
        cotangents = seeds(outputs, batch)
        g = _backward(outputs, cotangents, calls)  # hooked, for checkpoints that run parts of the model again
    n, S, R = len(outputs), positions or 1, len(cotangents)
    rows: dict[str, Rows] = {}
    for block in layout.blocks:
        uses = layout.uses[block.name]
        if not uses or block.name in layout.alone:
            continue
        parts = [
            _rows(model.get_submodule(use.module), call, g[call], use, n, S)
            for use in uses
            for call in calls[use.module]
            if call in g
        ]
        if parts:
            rows[block.name] = forms.total(parts)
        else:  # the batch does not use this layer
            rows[block.name] = Written(outputs.new_zeros(n * S, R, block.size), block.sides)
    if layout.alone:
        rows |= _alone(forward, model, batch, cotangents, layout, functional, positions)
    if layout.slow:
        for name, dense in _slow(batch, cotangents, layout, functional).items():
            rows[name] = Written(dense.reshape(*dense.shape[:2], -1), (1, dense[0, 0].numel(), 1))
    weights = outputs.new_ones(n * S, R, dtype=torch.float64)
    gradients = Gradients(layout.blocks, {b.name: rows[b.name] for b in layout.blocks}, weights)
    seen = tuple((path, tuple(c.x.shape), tuple(c.shape)) for path, called in calls.items() for c in called)
    given = tuple(tuple(t.shape) for t in tensors(batch))
    signature = (given, tuple(outputs.shape), R, S, seen)
    return Traced(gradients, outputs.detach(), cotangents.detach(), signature, _merged(batch, n, calls))


def watch_layers(
    forward: Callable[[Batch], Tensor], model: nn.Module, batch: Batch, layout: Layout
) -> tuple[Tensor, list[str]]:
    """Run a batch with the layers of a layout observed, which must not change its outputs.

    Returns:
        The outputs (n, ...), and the modules that were called with a single row.
    """
    with _hooked(model, layout, batch_length(batch)) as calls:
        outputs = forward(batch).detach()
    return outputs, [path for path, called in calls.items() if any(c.x.shape[0] == 1 for c in called)]


def _merged(batch: Batch, n: int, calls: Mapping[str, Sequence[_Call]]) -> bool:
    """Whether a layer's rows are some multiple of n that is no length of the batch's own."""
    lengths = {1, *(t.shape[1] for t in tensors(batch) if t.ndim > 1)}
    leading = {c.shape[0] for called in calls.values() for c in called}
    return n > 1 and any(size % n or size // n not in lengths for size in leading)


def _alone(
    forward: Callable[[Batch], Tensor],
    model: nn.Module,
    batch: Batch,
    cotangents: Tensor,
    layout: Layout,
    functional: Functional,
    positions: int | None,
) -> dict[str, Rows]:
    """Rows of the blocks that are traced one example at a time: whatever a layer then sees is this example's."""
    some = layout.only(layout.alone)
    found = []
    for i in range(cotangents.shape[1]):
        own = cotangents[:, i : i + 1]
        single = take(batch, torch.tensor([i], device="cpu"))
        seeds = lambda outputs, _, own=own: fit_to(own, outputs)  # noqa: E731
        found.append(trace(forward, model, single, seeds, some, functional, positions).gradients.rows)
    return {b.name: forms.gather([rows[b.name] for rows in found]) for b in some.blocks}


def fit_to(cotangents: Tensor, outputs: Tensor) -> Tensor:
    """Cotangents (R, n, ...) cut to the shape of outputs (n, ...) that a model made shorter for fewer examples.

    Raises:
        InputError: if something else than zeros would be cut off.
    """
    shape = outputs.shape[1:]
    if cotangents.shape[2:] == shape:
        return cotangents
    if cotangents.ndim == outputs.ndim + 1 and all(a >= b for a, b in zip(cotangents.shape[2:], shape, strict=True)):
        kept = cotangents[(slice(None), slice(None), *map(slice, shape))]
        if kept.count_nonzero() == cotangents.count_nonzero():
            return kept
    raise InputError(
        "An example's output must not depend on the other examples of its batch, but its shape does: "
        f"{tuple(shape)} alone or in a smaller batch, {tuple(cotangents.shape[2:])} in the batch. A loss over all "
        "pairs of a batch, as in contrastive learning, has no per-example gradient: write a task whose outputs are "
        "those of one example, such as its own embedding against fixed others."
    )


@contextmanager
def _hooked(model: nn.Module, layout: Layout, n: int) -> Iterator[dict[str, list[_Call]]]:
    """Record every call of the layers that the layout uses; the hooks are gone afterwards."""
    calls: dict[str, list[_Call]] = {use.module: [] for uses in layout.uses.values() for use in uses}
    blocked: list[str] = []

    def record(path: str, arguments: Arguments, output: Any) -> Tensor:
        x = next(iter((*arguments[0], *arguments[1].values())), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise Unfactorable(path, "does not map one tensor to one tensor")
        if x.shape[0] == 1 and n > 1 and path in layout.shared:  # so that each example has a row of its own
            x, output = x.expand(n, *x.shape[1:]), output.expand(n, *output.shape[1:])
        if not torch.is_grad_enabled():  # as a frozen backbone is run: nothing flows into it
            blocked.append(path)
            return output
        if not output.requires_grad:  # the first layers: the graph begins here
            output = output.detach().requires_grad_().clone()
        calls[path].append(_Call(x, arguments, output, get_gradient_edge(output)))
        return output

    def hook(path: str) -> Callable[..., Tensor]:
        return lambda _module, args, kwargs, output: record(path, (args, kwargs), output)

    modules = {path: model.get_submodule(path) for path in calls}
    watched = {}
    handles = []
    for path, parts in {use.module: use.parts for uses in layout.uses.values() for use in uses}.items():
        function, weight = inside(modules[path], parts[0]), modules[path]._parameters.get("weight")
        if function is not None:
            watched[function, id(weight)] = path
        else:
            handles.append(modules[path].register_forward_hook(hook(path), with_kwargs=True))
    try:
        with _Watch(watched, record) if watched else nullcontext():
            yield calls
        if blocked and not any(calls.values()) and not layout.slow:
            raise InputError(
                f"the model's outputs have no gradient: {blocked[0]} runs under torch.no_grad() or inference_mode(). "
                "Take it out of the forward pass; the library switches gradients off and on itself."
            )
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Record the calls of functions such as F.linear that are given certain weights.

    Args:
        watched: (function, id of the weight) to the path of its module.
        record: what to do with (path, arguments, output); it gives the output to go on with.
    """

    def __init__(self, watched: Mapping[tuple[Any, int], str], record: Callable[..., Tensor]):
        super().__init__()
        self.watched, self.functions, self.record = watched, {function for function, _ in watched}, record

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.functions and len(args) > 1 and (func, id(args[1])) in self.watched:
            return self.record(self.watched[func, id(args[1])], (args, {}), output)
        return output


class InjectCotangent(torch.autograd.Function):
    """A scalar whose gradient by the outputs is a given cotangent; its value is of no use."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Keep the cotangent."""
        ctx.save_for_backward(cotangent)
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _scale: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The cotangent itself."""
        return ctx.saved_tensors[0], None


def _backward(outputs: Tensor, cotangents: Tensor, calls: Mapping[str, Sequence[_Call]]) -> dict[_Call, Tensor]:
    """The cotangent at the output of every call that matters, (R, *output.shape); those of an example are together."""
    flat = [c for called in calls.values() for c in called]
    stacks: dict[_Call, Tensor] = {}
    if not flat or not outputs.requires_grad:
        return stacks
    R = len(cotangents)
    for r, cotangent in enumerate(cotangents):
        pulled = InjectCotangent.apply(
            outputs, cotangent
        )  # a scalar: passing grad_outputs would import sympy, half a second
        grads = torch.autograd.grad(pulled, [c.edge for c in flat], retain_graph=r + 1 < R, allow_unused=True)
        for call, grad in zip(flat, grads, strict=True):
            if grad is None:
                continue
            if R == 1:
                stacks[call] = grad.unsqueeze(0)
            else:
                if call not in stacks:
                    stacks[call] = outputs.new_empty(call.shape[0], R, *call.shape[1:]).transpose(0, 1)
                stacks[call][r] = grad
    return stacks


def _rows(layer: nn.Module, call: _Call, g: Tensor, use: Use, n: int, S: int) -> Factored | Written | Lookup:
    """The rows of one call; for S > 1, n S of them: a position is then treated as an example of its own."""
    if S == 1 or call.shape[0] % (n * S) == 0:
        return _found(layer, call.x, call.arguments, g, use, n * S)
    if call.x.shape[:2] == call.shape[:2] == (n, S) and len(call.shape) > 2 and not isinstance(layer, CHANNELS_FIRST):

        def flat(t: Any) -> Any:
            whole = isinstance(t, Tensor) and t.shape[:2] in ((1, S), (n, S))
            return t.expand(n, *t.shape[1:]).flatten(0, 1) if whole else t

        arguments = tuple(map(flat, call.arguments[0])), {name: flat(t) for name, t in call.arguments[1].items()}
        return _found(layer, flat(call.x), arguments, g.flatten(1, 2), use, n * S)
    found = _found(layer, call.x, call.arguments, g, use, n)
    T = found.a.shape[2] if isinstance(found, Factored) else found.ids.shape[1] if isinstance(found, Lookup) else 0
    if T == 1 or (T == 0 and call.x.ndim == 2):
        said = f"{use.module} sees one vector of each sequence: its part of the scores stands at the first position."
        warnings.warn(said, AttributionWarning, stacklevel=2)
    elif T != S:
        raise Unfactorable(use.module, f"does not see the {S} positions of a sequence one by one")
    return forms.apart(found, S)


def _found(
    layer: nn.Module, x: Tensor, arguments: Arguments, g: Tensor, use: Use, n: int
) -> Factored | Written | Lookup:
    """What the entry gives; a layer run on (n m, ...) inputs contributes m positions to each of the n examples."""
    if n == 1 and x.ndim == 1 and g.ndim == 2:  # one vector, called without an axis of examples
        x, g = x.unsqueeze(0), g.unsqueeze(1)
    kind, length = kind_of(layer, use.parts[0]), x.shape[0]
    if kind is None or length % n or g.shape[1] != length:
        raise Unfactorable(use.module, "does not see the examples on the first axis of its input")
    more = (arguments,) if getattr(kind, "whole", False) else ()
    try:
        found = kind.rows(layer, x, g, use.parts, *more)
    except Unfactorable as error:
        raise Unfactorable(use.module, error.why) from error
    except (RuntimeError, LookupError, ValueError) as error:  # such as a single vector, as long as the batch
        raise Unfactorable(use.module, f"was called with a shape {tuple(x.shape)} that its entry fails on") from error
    if isinstance(found, Scattered):
        return found.gathered(n)
    if length == n:
        return found
    if isinstance(found, Lookup):
        return Lookup(found.ids.reshape(n, -1), _merge(found.g, n, 0), found.size)
    if isinstance(found, Written):
        return Written(found.rows.unflatten(0, (n, -1)).sum(1), found.sides)
    a = found.a.reshape(found.a.shape[0], n, -1, found.a.shape[-1])
    return Factored(a, _merge(found.g, n, 1))


def _merge(g: Tensor, n: int, dim: int) -> Tensor:
    """(..., n m, R, T, O) to (..., n, R, m T, O)."""
    g = g.unflatten(dim, (n, -1)).movedim(dim + 1, dim + 2)
    return g.flatten(dim + 2, dim + 3)


def _slow(batch: Batch, cotangents: Tensor, layout: Layout, functional: Functional) -> Vectors:
    """Rows (n, R, ...) of parameters that no layer entry covers: a vector-Jacobian product per example.

    By vmap over the examples; for a model that vmap does not take, such as one that looks at its data, one by one.
    """
    names = [p for b in layout.slow for p in b.shapes]
    if layout.looped or not has_rows(batch):
        return _one_by_one(batch, cotangents, names, functional)
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
        with math_attention():
            rows = torch.func.vmap(one, in_dims=(0, 1), chunk_size=max(1, 2**24 // size))(leaves, cotangents.detach())
    except (RuntimeError, InputError):
        return _one_by_one(batch, cotangents, names, functional)
    leading = cotangents.shape[1], cotangents.shape[0]
    right = all(rows[p].shape == (*leading, *shape) for b in layout.slow for p, shape in b.shapes.items())
    return rows if right else _one_by_one(batch, cotangents, names, functional)  # some batching rules lose axes


def _one_by_one(batch: Batch, cotangents: Tensor, names: list[str], functional: Functional) -> Vectors:
    """The same by plain backward passes."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(cotangents.shape[1]):
        outputs, parameters = functional(take(batch, torch.tensor([i], device="cpu")))
        held = {name: parameters[name].detach().requires_grad_() for name in names}
        h, leaves = outputs(parameters | held), list(held.values())
        for cotangent in fit_to(cotangents[:, i : i + 1].detach(), h):  # (1, ...)
            grads = [torch.zeros_like(p) for p in leaves]
            if h.requires_grad:
                pulled = (h * cotangent).sum()
                grads = torch.autograd.grad(
                    pulled, leaves, retain_graph=True, materialize_grads=True, allow_unused=True
                )
            for name, grad in zip(names, grads, strict=True):
                rows[name].append(grad.to_dense() if grad.is_sparse else grad)
    R = len(cotangents)
    return {name: torch.stack(found).unflatten(0, (-1, R)) for name, found in rows.items()}
