"""Per-sample gradients of a batch from one forward pass and R backward passes.

The gradient of a layer's weight is a sum of outer products of what went into the layer and of the cotangents of what
came out of it. Hooks record the first in the forward pass, autograd gives the second in the backward pass, and the rule
of the layer's type (`wherefrom.persample.layers`) makes factored rows of the two. Parameters need no gradients
meanwhile, so that the backward pass computes cotangents of activations only.

Three kinds of blocks are captured in other ways, see `Layout`: those whose layers do not see the examples on an axis of
their own, one example at a time; those that no rule covers, by a vector-Jacobian product for each example under vmap;
and of these, those whose operations vmap does not know, by a backward pass for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from wherefrom.data.examples import Batch, batch_length, has_rows, map_tensors, take, tensors
from wherefrom.errors import AttributionWarning, InputError
from wherefrom.persample import rows as forms
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.gradients import Block, Gradients
from wherefrom.persample.layers import CHANNELS_FIRST, Arguments, Unfactorable, function_inside, kind_of
from wherefrom.persample.layout import Layout, Use
from wherefrom.persample.rows import Lookup, Rows, Scattered
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import math_attention

if TYPE_CHECKING:
    from wherefrom.model.problem import Problem

OutputCotangents = Callable[[Tensor, Batch], Tensor]  # (outputs (n, ...), batch) -> cotangents (R, n, ...)
VMAP_NUMBERS = 2**24  # of the gradients that vmap computes at a time


@dataclass(frozen=True)
class Capture:
    """What one pass over a batch gave.

    Args:
        gradients: the rows of all blocks.
        outputs: of the model, (n, ...), detached.
        cotangents: at the outputs, (R, n, ...), detached.
        signature: the shapes of the batch, of the cotangents and of what the layers saw. What was right once in these
            shapes is likely to be right again.
        has_guessed_owners: whether a layer saw the rows of all examples on one axis, and not a token of each batch
            entry for each: which example a row belongs to is then a guess.
    """

    gradients: Gradients
    outputs: Tensor
    cotangents: Tensor
    signature: tuple[Any, ...]
    has_guessed_owners: bool


def capture(
    problem: Problem,
    layout: Layout,
    batch: Batch,
    output_cotangents: OutputCotangents,
    positions: int | None = None,
) -> Capture:
    """Capture the per-sample gradients J_n^T s_{n,r} of all blocks, without checking them.

    It is called within ``problem.observed()``.

    Args:
        problem: the model and its task.
        layout: the blocks, and how each is captured.
        batch: n examples.
        output_cotangents: makes the cotangents s (R, n, ...) of the outputs (n, ...).
        positions: the length S of the sequences: then n S rows, each what one position of one example contributes.

    Raises:
        UnsupportedError: if a layer's rows cannot be told from its input and its output's cotangents, or if positions
            are asked for and those of a block cannot be told.
    """
    if positions and layout.slow:
        raise Unfactorable(layout.slow[0].name, "takes the slow path, where its gradient has no positions")
    for p in problem.parameters.values():  # a comparison with autograd may have asked for gradients
        p.requires_grad_(False)

    n = batch_length(batch)
    with _recorded_calls(problem.model, layout, n) as calls:
        outputs = problem.outputs(problem.model, batch)
        cotangents = output_cotangents(outputs, batch)  # (R, n, ...)
        # The hooks stay for the backward pass: checkpointed parts of the model run again in it.
        call_cotangents = _pull_back(outputs, cotangents, calls)
    R, S = len(cotangents), positions or 1

    rows: dict[str, Rows] = {}
    for block in layout.blocks:
        if not layout.uses[block.name] or block.name in layout.one_by_one:
            continue
        uses = _rows_of_uses(problem.model, layout.uses[block.name], calls, call_cotangents, n, S)
        if uses:
            rows[block.name] = forms.sum_uses(uses)
        else:  # the batch does not use this layer, as an expert that no token is sent to
            rows[block.name] = Written(outputs.new_zeros(n * S, R, block.size), block.sides)
    if layout.one_by_one:
        rows |= _capture_one_by_one(problem, layout, batch, cotangents, positions)
    if layout.slow:
        rows |= _capture_without_rules(problem, layout, batch, cotangents)

    in_order = {block.name: rows[block.name] for block in layout.blocks}
    weights = outputs.new_ones(n * S, R, dtype=torch.float64)
    return Capture(
        gradients=Gradients(layout.blocks, in_order, weights),
        outputs=outputs.detach(),
        cotangents=cotangents.detach(),
        signature=_signature(batch, outputs, R, S, calls),
        has_guessed_owners=_has_guessed_owners(batch, n, calls),
    )


def run_observed(problem: Problem, layout: Layout, batch: Batch) -> tuple[Tensor, list[str]]:
    """Run a batch with the layers of a layout observed, which must not change its outputs.

    Returns:
        The outputs (n, ...), and the modules that were called with a single row.
    """
    with _recorded_calls(problem.model, layout, batch_length(batch)) as calls:
        outputs = problem.outputs(problem.model, batch).detach()
    with_one_row = [path for path, own in calls.items() if any(call.input.shape[0] == 1 for call in own)]
    return outputs, with_one_row


def _signature(batch: Batch, outputs: Tensor, R: int, S: int, calls: Calls) -> tuple[Any, ...]:
    """The shapes of everything in a pass, to tell whether a pass like it was checked before."""
    given = tuple(tuple(t.shape) for t in tensors(batch))
    seen = tuple(
        (path, tuple(call.input.shape), tuple(call.output_shape)) for path, own in calls.items() for call in own
    )
    return given, tuple(outputs.shape), R, S, seen


def _has_guessed_owners(batch: Batch, n: int, calls: Calls) -> bool:
    """Whether a layer's rows are some multiple of n that is no length of the batch's own."""
    lengths = {1, *(t.shape[1] for t in tensors(batch) if t.ndim > 1)}
    leading = {call.output_shape[0] for own in calls.values() for call in own}
    return n > 1 and any(size % n or size // n not in lengths for size in leading)


# --- hooks: what goes into the layers and comes out of them ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer.

    Args:
        input: its first argument, detached.
        arguments: all its arguments.
        output_shape: the shape of its output.
        edge: where its output sits in the graph of autograd. The output itself is not kept.
    """

    input: Tensor
    arguments: Arguments
    output_shape: torch.Size
    edge: GradientEdge


Calls = Mapping[str, Sequence[_Call]]  # by the path of the layer


class _Recorder:
    """Records every call of the layers that a layout uses.

    Args:
        layout: the blocks.
        n: examples in the batch.
    """

    def __init__(self, layout: Layout, n: int):
        self.calls: dict[str, list[_Call]] = {use.module: [] for uses in layout.uses.values() for use in uses}
        self.without_grad: list[str] = []  # layers that ran under torch.no_grad()
        self._broadcast = layout.broadcast
        self._n = n

    def record(self, path: str, arguments: Arguments, output: Any) -> Tensor:
        """Record a call, and give the output that the model goes on with."""
        first = next(iter((*arguments[0], *arguments[1].values())), None)
        if not isinstance(first, Tensor) or not isinstance(output, Tensor):
            raise Unfactorable(path, "does not map one tensor to one tensor")

        if first.shape[0] == 1 and self._n > 1 and path in self._broadcast:
            # A row for each example, so that the backward pass keeps their cotangents apart.
            first = first.expand(self._n, *first.shape[1:])
            output = output.expand(self._n, *output.shape[1:])

        if not torch.is_grad_enabled():  # as a frozen backbone is run: no cotangent arrives here
            self.without_grad.append(path)
            return output
        if not output.requires_grad:
            # Nothing before this layer needs a gradient: the graph begins here. The clone is what later operations may
            # change in place, which autograd forbids of a leaf.
            output = output.detach().requires_grad_().clone()
        call = _Call(first.detach(), arguments, output.shape, get_gradient_edge(output))
        self.calls[path].append(call)
        return output

    def hook(self, path: str) -> Callable[..., Tensor]:
        """Make the forward hook of the module at a path."""
        return lambda _module, args, kwargs, output: self.record(path, (args, kwargs), output)


@contextmanager
def _recorded_calls(model: nn.Module, layout: Layout, n: int) -> Iterator[Calls]:
    """Record every call of the layers that the layout uses; the hooks are gone afterwards."""
    recorder = _Recorder(layout, n)
    parts = {use.module: use.parts for uses in layout.uses.values() for use in uses}
    watched: dict[tuple[Any, int], str] = {}
    handles = []
    for path in recorder.calls:
        module = model.get_submodule(path)
        # A module of an unknown type may do more than apply its weight, so its output says nothing. What is observed
        # then is the function that it gives its weight to.
        function = function_inside(module, parts[path][0])
        if function is None:
            handles.append(module.register_forward_hook(recorder.hook(path), with_kwargs=True))
        else:
            watched[function, id(module._parameters.get("weight"))] = path

    try:
        with _WatchFunctions(watched, recorder.record) if watched else nullcontext():
            yield recorder.calls
    finally:
        for handle in handles:
            handle.remove()
    if recorder.without_grad and not any(recorder.calls.values()) and not layout.slow:
        raise InputError(
            f"the model's outputs have no gradient: {recorder.without_grad[0]} runs under torch.no_grad() or "
            "inference_mode(). Take it out of the forward pass; the library switches gradients off and on itself."
        )


class _WatchFunctions(TorchFunctionMode):
    """Record the calls of functions such as F.linear that are given certain weights.

    Args:
        watched: (function, id of the weight) to the path of its module.
        record: what to do with (path, arguments, output); it gives the output to go on with.
    """

    def __init__(self, watched: Mapping[tuple[Any, int], str], record: Callable[..., Tensor]):
        super().__init__()
        self.watched, self.record = watched, record
        self.functions = {function for function, _ in watched}

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.functions and len(args) > 1:
            path = self.watched.get((func, id(args[1])))
            if path is not None:
                return self.record(path, (args, {}), output)
        return output


# --- the backward passes --------------------------------------------------------------------------------------------


class InjectCotangent(torch.autograd.Function):
    """A scalar whose gradient by the outputs is a given cotangent; its value is of no use.

    The same as to pass the cotangent as ``grad_outputs``, which would import sympy: half a second in a new process.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Keep the cotangent."""
        ctx.save_for_backward(cotangent)
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _scale: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the cotangent as it is."""
        return ctx.saved_tensors[0], None


def _pull_back(outputs: Tensor, cotangents: Tensor, calls: Calls) -> dict[_Call, Tensor]:
    """Find the cotangents at the outputs of the layers' calls, by one backward pass for each of R.

    Args:
        outputs: of the model, (n, ...), with their graph.
        cotangents: at the outputs, (R, n, ...).
        calls: the calls of the layers.

    Returns:
        (R, *output_shape) for each call that the outputs depend on. In memory, the R of an example are together, as the
        products of rows want them.
    """
    all_calls = [call for own in calls.values() for call in own]
    pulled: dict[_Call, Tensor] = {}
    if not all_calls or not outputs.requires_grad:
        return pulled

    R = len(cotangents)
    edges = [call.edge for call in all_calls]
    for r, cotangent in enumerate(cotangents):
        scalar = InjectCotangent.apply(outputs, cotangent)
        grads = torch.autograd.grad(scalar, edges, retain_graph=r + 1 < R, allow_unused=True)
        for call, grad in zip(all_calls, grads, strict=True):
            if grad is None:  # the outputs do not depend on this call
                continue
            if R == 1:
                pulled[call] = grad.unsqueeze(0)  # no copy
                continue
            if call not in pulled:
                length, *rest = call.output_shape
                pulled[call] = outputs.new_empty(length, R, *rest).transpose(0, 1)
            pulled[call][r] = grad
    return pulled


# --- from calls to rows ---------------------------------------------------------------------------------------------


def _rows_of_uses(
    model: nn.Module, uses: Sequence[Use], calls: Calls, call_cotangents: Mapping[_Call, Tensor], n: int, S: int
) -> list[Factored | Written | Lookup]:
    """Make the rows of every call of the layers that share a block's parameters."""
    rows = []
    for use in uses:
        layer = model.get_submodule(use.module)
        for call in calls[use.module]:
            if call in call_cotangents:
                rows.append(_rows_of_call(layer, call, call_cotangents[call], use, n, S))
    return rows


def _rows_of_call(
    layer: nn.Module, call: _Call, cotangents: Tensor, use: Use, n: int, S: int
) -> Factored | Written | Lookup:
    """Make the rows of one call, n of them; or n S, where each position is treated as an example of its own.

    Args:
        layer: the module.
        call: its call.
        cotangents: at the output of the call, (R, *output_shape).
        use: which parameters of the layer are wanted.
        n: examples in the batch.
        S: positions of a sequence; 1 for rows of whole examples.
    """
    if S == 1 or call.output_shape[0] % (n * S) == 0:
        # For S > 1 the layer has the positions of all examples on its first axis, one after another.
        return _apply_rule(layer, call.input, call.arguments, cotangents, use, n * S)

    has_positions = call.input.shape[:2] == call.output_shape[:2] == (n, S) and len(call.output_shape) > 2
    if has_positions and not isinstance(layer, CHANNELS_FIRST):
        # Examples and positions become one axis.
        x = _flatten_positions(call.input, n, S)  # (n S, ...)
        arguments = (
            tuple(_flatten_positions(value, n, S) for value in call.arguments[0]),
            {name: _flatten_positions(value, n, S) for name, value in call.arguments[1].items()},
        )
        return _apply_rule(layer, x, arguments, cotangents.flatten(1, 2), use, n * S)

    rows = _apply_rule(layer, call.input, call.arguments, cotangents, use, n)
    seen = _positions_of(rows)
    if seen == 1 or (seen == 0 and call.input.ndim == 2):
        warnings.warn(
            f"{use.module} sees one vector of each sequence: its part of the scores stands at the first position.",
            AttributionWarning,
            stacklevel=2,
        )
    elif seen != S:
        raise Unfactorable(use.module, f"does not see the {S} positions of a sequence one by one")
    return forms.split_positions(rows, S)


def _flatten_positions(value: Any, n: int, S: int) -> Any:
    """Join the axes of examples and positions of a tensor (n, S, ...) or (1, S, ...); leave anything else as it is."""
    if isinstance(value, Tensor) and value.shape[:2] in ((1, S), (n, S)):
        return value.expand(n, *value.shape[1:]).flatten(0, 1)
    return value


def _positions_of(rows: Factored | Written | Lookup) -> int:
    """How many positions of an example rows are sums over; 0 where they were summed already."""
    if isinstance(rows, Factored):
        return rows.a.shape[2]
    return rows.ids.shape[1] if isinstance(rows, Lookup) else 0


def _apply_rule(
    layer: nn.Module, x: Tensor, arguments: Arguments, cotangents: Tensor, use: Use, n: int
) -> Factored | Written | Lookup:
    """Make n rows by the rule of the layer's type.

    A layer that is run on n m inputs, such as all tokens of all examples on one axis, contributes m positions to each
    of n examples. That the inputs of an example stand together is assumed here, and checked against autograd later.

    Args:
        layer: the module.
        x: its input, (n m, ...).
        arguments: all its arguments.
        cotangents: of its output, (R, n m, ...).
        use: which parameters of the layer are wanted.
        n: examples.
    """
    if n == 1 and x.ndim == 1 and cotangents.ndim == 2:  # one vector, called without an axis of examples
        x, cotangents = x.unsqueeze(0), cotangents.unsqueeze(1)

    kind, length = kind_of(layer, use.parts[0]), x.shape[0]
    if kind is None or length % n or cotangents.shape[1] != length:
        raise Unfactorable(use.module, "does not see the examples on the first axis of its input")

    more = (arguments,) if getattr(kind, "whole", False) else ()
    try:
        rows = kind.rows(layer, x, cotangents, use.parts, *more)
    except Unfactorable as error:
        raise Unfactorable(use.module, error.why) from error
    except (RuntimeError, LookupError, ValueError) as error:  # such as a single vector, as long as the batch
        raise Unfactorable(use.module, f"was called with a shape {tuple(x.shape)} that its entry fails on") from error

    if isinstance(rows, Scattered):
        return rows.gather(n)
    return rows if length == n else forms.merge_positions(rows, n)


# --- the other ways -------------------------------------------------------------------------------------------------


def _capture_one_by_one(
    problem: Problem, layout: Layout, batch: Batch, cotangents: Tensor, positions: int | None
) -> dict[str, Rows]:
    """Capture blocks one example at a time: whatever a layer then sees is this example's."""
    restricted = layout.restrict_to(layout.one_by_one)
    captured: list[Mapping[str, Rows]] = []
    for i in range(cotangents.shape[1]):
        own = cotangents[:, i : i + 1]  # (R, 1, ...)
        single = take(batch, torch.tensor([i], device="cpu"))

        def crop_own(outputs: Tensor, _batch: Batch, own: Tensor = own) -> Tensor:
            return crop_to_outputs(own, outputs)

        captured.append(capture(problem, restricted, single, crop_own, positions).gradients.rows)
    return {block.name: forms.gather([rows[block.name] for rows in captured]) for block in restricted.blocks}


def crop_to_outputs(cotangents: Tensor, outputs: Tensor) -> Tensor:
    """Crop cotangents (R, n, ...) to the shape of outputs (n, ...) that a model made shorter for fewer examples.

    Raises:
        InputError: if something else than zeros would be cut off.
    """
    shape = outputs.shape[1:]
    if cotangents.shape[2:] == shape:
        return cotangents
    if cotangents.ndim == outputs.ndim + 1 and all(a >= b for a, b in zip(cotangents.shape[2:], shape, strict=True)):
        cropped = cotangents[(slice(None), slice(None), *map(slice, shape))]
        if cropped.count_nonzero() == cotangents.count_nonzero():
            return cropped
    raise InputError(
        "An example's output must not depend on the other examples of its batch, but its shape does: "
        f"{tuple(shape)} alone or in a smaller batch, {tuple(cotangents.shape[2:])} in the batch. A loss over all "
        "pairs of a batch, as in contrastive learning, has no per-example gradient: write a task whose outputs are "
        "those of one example, such as its own embedding against fixed others."
    )


def _capture_without_rules(problem: Problem, layout: Layout, batch: Batch, cotangents: Tensor) -> dict[str, Rows]:
    """Capture the blocks that no layer rule covers: by vmap, or where that fails by a backward pass for each row."""
    rows = None
    # Without an axis of examples in its tensors, there is nothing in a batch that vmap could map over.
    if not layout.without_vmap and has_rows(batch):
        rows = _rows_by_vmap(problem, layout.slow, batch, cotangents)
    if rows is None:
        rows = _rows_by_backward_passes(problem, layout.slow, batch, cotangents)

    written: dict[str, Rows] = {}
    for block in layout.slow:
        (parameter,) = block.shapes  # blocks on the slow path hold one parameter each
        flat = rows[parameter].reshape(*rows[parameter].shape[:2], -1)  # (n, R, D)
        written[block.name] = Written(flat, (1, flat.shape[2], 1))
    return written


def _rows_by_vmap(problem: Problem, blocks: Sequence[Block], batch: Batch, cotangents: Tensor) -> Vectors | None:
    """Compute a vector-Jacobian product for each example by vmap: (n, R, ...) for each parameter.

    Returns:
        None where vmap does not take the model, such as one that looks at its data, or gives rows of a wrong shape.
    """
    names = [parameter for block in blocks for parameter in block.shapes]
    R, n = cotangents.shape[:2]

    def one_example(leaves: list[Tensor], own_cotangents: Tensor) -> Vectors:  # without the axis of examples; (R, ...)
        remaining = iter(leaves)
        single = map_tensors(lambda _: next(remaining).unsqueeze(0), batch)
        outputs, parameters = problem.functional(single)
        fixed = {name: p for name, p in parameters.items() if name not in names}
        pull_back = torch.func.vjp(lambda p: outputs(fixed | p), {name: parameters[name] for name in names})[1]
        return torch.func.vmap(lambda cotangent: pull_back(cotangent.unsqueeze(0))[0])(own_cotangents)

    size = sum(block.size for block in blocks) * R
    rows_of_all = torch.func.vmap(one_example, in_dims=(0, 1), chunk_size=max(1, VMAP_NUMBERS // size))
    try:
        with math_attention():  # fused attention has no batching rule
            rows = rows_of_all(list(tensors(batch)), cotangents.detach())
    except (RuntimeError, InputError):
        return None
    # Some batching rules lose axes.
    shapes = {parameter: shape for block in blocks for parameter, shape in block.shapes.items()}
    is_right = all(rows[parameter].shape == (n, R, *shape) for parameter, shape in shapes.items())
    return rows if is_right else None


def _rows_by_backward_passes(problem: Problem, blocks: Sequence[Block], batch: Batch, cotangents: Tensor) -> Vectors:
    """Compute the same by plain autograd: a forward pass for each example, a backward pass for each of its R rows."""
    names = [parameter for block in blocks for parameter in block.shapes]
    R, n = cotangents.shape[:2]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(n):
        outputs_of, parameters = problem.functional(take(batch, torch.tensor([i], device="cpu")))
        leaves = {name: parameters[name].detach().requires_grad_() for name in names}
        outputs = outputs_of(parameters | leaves)  # (1, ...)
        for cotangent in crop_to_outputs(cotangents[:, i : i + 1].detach(), outputs):  # (1, ...)
            if outputs.requires_grad:
                grads = torch.autograd.grad(
                    (outputs * cotangent).sum(),
                    list(leaves.values()),
                    retain_graph=True,
                    materialize_grads=True,
                    allow_unused=True,
                )
            else:  # no parameter here acts on the outputs of this example
                grads = [torch.zeros_like(p) for p in leaves.values()]
            for name, grad in zip(names, grads, strict=True):
                rows[name].append(grad.to_dense() if grad.is_sparse else grad)
    return {name: torch.stack(own).unflatten(0, (n, R)) for name, own in rows.items()}
