"""Dense answers for any model and task, in float64, by plain autograd of one example at a time.

Unlike `problems`, which holds fixed problems with losses written out again, this takes whatever a test makes up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any


def single(batch: Batch, i: int) -> Batch:
    """Example i of a batch of tensors, nested in any way."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1]
    if isinstance(batch, dict):
        return {key: single(value, i) for key, value in batch.items()}
    return type(batch)(single(value, i) for value in batch)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that are trained, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def gradient(scalar: Tensor, model: nn.Module) -> Tensor:
    """d scalar / d parameters, flattened: (D,)."""
    found = parameters(model)
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in found])
    grads = torch.autograd.grad(scalar, found, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def gradients(model: nn.Module, task: Any, data: Batch, n: int, function: Callable[..., Tensor]) -> Tensor:
    """Gradients of the loss or measurement of each of n examples: (n, D)."""
    singles = [single(data, i) for i in range(n)]
    return torch.stack([gradient(function(task.outputs(model, z), z).sum(), model) for z in singles])


def gauss_newton(model: nn.Module, task: Any, data: Batch, n: int) -> Tensor:
    """The mean over n examples of J^T H J, H the output Hessian: (D, D)."""
    total: Tensor | float = 0.0
    for i in range(n):
        z = single(data, i)
        h = task.outputs(model, z)
        jacobian = torch.stack([gradient(t, model) for t in h.flatten()])
        hessian = torch.autograd.functional.hessian(lambda t, z=z: task.loss(t, z).sum(), h.detach())
        total = total + jacobian.T @ hessian.reshape(h.numel(), h.numel()) @ jacobian / n  # type: ignore[union-attr]
    return total  # type: ignore[return-value]


def exact_scores(model: nn.Module, task: Any, train: Batch, n: int, queries: Batch, q: int, damping: float) -> Tensor:
    """grad f^T (G + damping I)^-1 grad l with the Gauss-Newton matrix G: (q, n)."""
    model = model.eval()
    matrix = gauss_newton(model, task, train, n).double()
    matrix += damping * torch.eye(len(matrix), dtype=torch.float64)
    loss = gradients(model, task, train, n, task.loss).double()
    measurement = gradients(model, task, queries, q, task.measurement).double()
    return measurement @ torch.linalg.solve(matrix, loss.T)
