"""Vectors: Q parameter-shaped right-hand sides, a dict from parameter name to a tensor of shape (Q, *param.shape).

The algebra that the solvers need, and no more. Sums over parameters accumulate in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Vectors = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]
Scalar = float | Tensor


def count(v: Vectors) -> int:
    """The number Q of right-hand sides."""
    return next(iter(v.values())).shape[0]


def zeros_like(v: Vectors) -> Vectors:
    """Zeros of the same names and shapes."""
    return {name: torch.zeros_like(t) for name, t in v.items()}


def clone(v: Vectors) -> Vectors:
    """A copy that shares no memory."""
    return {name: t.clone() for name, t in v.items()}


def dot(u: Vectors, v: Vectors) -> Tensor:
    """Inner products u_q . v_q over all parameters, shape (Q,)."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for name, t in u.items():
        a, b = t.reshape(len(t), -1), v[name].reshape(len(t), -1)
        total = total.to(t.device) + torch.linalg.vecdot(_wide(a), _wide(b)).double()
    return total


def norm(v: Vectors) -> Tensor:
    """Euclidean norms over all parameters, float64, shape (Q,)."""
    return dot(v, v).sqrt()


def scale(v: Vectors, by: Scalar | Mapping[str, float]) -> Vectors:
    """``by * v``; ``by`` is a number, one number per right-hand side (Q,), or one number per parameter."""
    return {name: t * _factor(by, name, t) for name, t in v.items()}


def add(x: Vectors, y: Vectors, by: Scalar | Mapping[str, float] = 1.0) -> Vectors:
    """``x + by * y`` as new tensors."""
    return {name: t + y[name] * _factor(by, name, t) for name, t in x.items()}


def add_(x: Vectors, y: Vectors, by: Scalar | Mapping[str, float] = 1.0) -> Vectors:
    """``x += by * y`` in place."""
    for name, t in x.items():
        factor = _factor(by, name, t)
        if isinstance(factor, Tensor):
            t.addcmul_(y[name], factor.expand_as(t))
        else:
            t.add_(y[name], alpha=factor)
    return x


def chunk(v: Vectors, size: int) -> Iterator[Vectors]:
    """Views of at most ``size`` right-hand sides each, in order."""
    for start in range(0, count(v), size):
        yield {name: t[start : start + size] for name, t in v.items()}


def select(v: Vectors, index: Tensor) -> Vectors:
    """Some right-hand sides, as new tensors."""
    return {name: t[index] for name, t in v.items()}


def concatenate(parts: Sequence[Vectors]) -> Vectors:
    """The right-hand sides of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def flatten(v: Vectors) -> Tensor:
    """One row per right-hand side, parameters in the order of the dict: (Q, D)."""
    return torch.cat([t.reshape(len(t), -1) for t in v.values()], dim=1)


def unflatten(matrix: Tensor, shapes: Shapes) -> Vectors:
    """The inverse of `flatten`: (Q, D) to Vectors of the given shapes."""
    parts = matrix.split([s.numel() for s in shapes.values()], dim=1)
    return {name: t.reshape(-1, *shape) for (name, shape), t in zip(shapes.items(), parts, strict=True)}


def random_signs(shapes: Shapes, count: int, generator: torch.Generator, dtype: torch.dtype) -> Vectors:
    """Rademacher probes: independent +1 or -1 entries, (count, *shape)."""
    return {
        name: torch.randint(0, 2, (count, *shape), generator=generator).mul_(2).sub_(1).to(dtype)
        for name, shape in shapes.items()
    }


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def expand(by: Tensor, t: Tensor) -> Tensor:
    """One number per right-hand side (Q,), shaped to multiply (Q, ...)."""
    return by.to(t).view(-1, *[1] * (t.ndim - 1))


def _factor(by: Scalar | Mapping[str, float], name: str, t: Tensor) -> Scalar:
    if isinstance(by, Mapping):
        by = by[name]
    if isinstance(by, Tensor) and by.ndim:
        return expand(by, t)
    return float(by)
