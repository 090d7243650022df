"""Is a layout believed? Its rows are compared with autograd, example by example, for random cotangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from whence.data import Batch, batch_length, map_tensors
from whence.gradients import Gradients
from whence.layers import Unfactorable
from whence.layout import Layout, demoted

Truth = tuple[Tensor, dict[str, Tensor]]  # cotangents (1, n, ...) and, by parameter, the gradients (n, *shape)


def truth(
    batch: Batch,
    outputs: Callable[[Batch], Tensor],
    loss: Callable[[Tensor, Batch], Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
) -> Truth:
    """Gradients of each example for random cotangents, by plain autograd.

    The cotangents are 0 where the loss has no slope: what a model puts out at padding may depend on the batch.

    Args:
        batch: a few examples.
        outputs: of the model, its parameters requiring gradients.
        loss: of outputs; what is wrong with it is told when it is used in earnest.
        parameters: those of interest.
    """
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    cotangents = []
    for i in range(batch_length(batch)):
        single = map_tensors(lambda t, i=i: t[i : i + 1], batch)
        h = outputs(single)
        used = _slope(lambda t, single=single: loss(t, single), h.detach()) != 0
        random = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
        cotangents.append(random * used if used.any() else random)
        leaves, pulled = list(parameters.values()), (h * cotangents[-1]).sum()
        grads = [torch.zeros_like(p) for p in leaves]
        if h.requires_grad:
            grads = torch.autograd.grad(pulled, leaves, allow_unused=True, materialize_grads=True)
        for found, grad in zip(rows.values(), grads, strict=True):
            found.append(grad)
    return torch.cat(cotangents).unsqueeze(0), {name: torch.stack(found) for name, found in rows.items()}


def _slope(loss: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    value = loss(h.requires_grad_())
    if not isinstance(value, Tensor) or not value.requires_grad:
        return torch.zeros_like(h)
    return torch.autograd.grad(value.sum(), h, allow_unused=True, materialize_grads=True)[0]


def verified(layout: Layout, known: Truth, traced: Callable[[Layout, Tensor], Gradients], dtype: torch.dtype) -> Layout:
    """The layout with each block that differs from autograd demoted to the slow path.

    Args:
        layout: the blocks as planned.
        known: what they must give.
        traced: the rows of a layout for given cotangents.
        dtype: of the model.
    """
    cotangents, expected = known
    scale = max(float(t.norm()) for t in expected.values())
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    while True:
        fast = Layout(tuple(b for b in layout.blocks if layout.uses[b.name]), layout.uses)
        try:
            found = traced(fast, cotangents)
            break
        except Unfactorable as error:
            using = [b for b in layout.blocks if any(use.module == error.module for use in layout.uses[b.name])]
            layout = demoted(layout, {p for b in using for p in b.shapes})
    wrong = set()
    for b in fast.blocks:  # one at a time: written out, they are large
        for name, rows in b.unpack(found.rows[b.name].written().rows.reshape(-1, *b.sides)).items():
            if not (rows - expected[name]).norm() <= tolerance * (expected[name].norm() + 1e-3 * scale):
                wrong.add(name)
    return demoted(layout, wrong)
