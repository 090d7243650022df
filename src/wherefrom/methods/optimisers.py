"""Optimisers as pure functions of one parameter, entry by entry, with the arithmetic of `torch.optim`.

    (theta, what is kept), gradient  ->  (theta', what is kept)'

Being elementwise, an update has a diagonal Jacobian: `jacobian` finds its entries by pulling ones back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vjp

from wherefrom.errors import UnsupportedError

Rows = tuple[Tensor, ...]  # a parameter and what the optimiser keeps of it, (K, *shape) each
Jacobian = tuple[tuple[Rows, Tensor], ...]  # of each new row: the derivative by each old row, and by the gradient


class Optimiser(Protocol):
    """One parameter group's settings."""

    @property
    def kept(self) -> int:
        """How many tensors of a parameter's shape it keeps; they begin at zero."""
        ...

    def update(self, rows: Rows, g: Tensor, rate: float, step: int) -> Rows:
        """One step.

        Args:
            rows: the parameter and what is kept of it.
            g: the loss's gradient.
            rate: the learning rate of this step.
            step: how many were taken before.
        """
        ...


@dataclass(frozen=True)
class SGD:
    """`torch.optim.SGD`; the settings are its own."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def kept(self) -> int:
        """The running sum of gradients, if there is momentum."""
        return int(self.momentum != 0)

    def update(self, rows: Rows, g: Tensor, rate: float, step: int) -> Rows:
        theta, *kept = rows
        g = g + self.weight_decay * theta
        if not kept:
            return (theta - rate * g,)
        m = g if step == 0 else self.momentum * kept[0] + (1 - self.dampening) * g
        return theta - rate * (g + self.momentum * m if self.nesterov else m), m


@dataclass(frozen=True)
class Adam:
    """`torch.optim.Adam`, and with ``decoupled`` `torch.optim.AdamW`; the settings are theirs."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def kept(self) -> int:
        """Running means of gradients and of their squares."""
        return 2

    def update(self, rows: Rows, g: Tensor, rate: float, step: int) -> Rows:
        theta, m, v = rows
        b1, b2 = self.betas
        if self.decoupled:
            theta = theta * (1 - rate * self.weight_decay)
        else:
            g = g + self.weight_decay * theta
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        # A weight that never had a gradient stands at v = m = 0: the root's slope there meets m and counts for nothing.
        root = torch.where(v > 0, v, 1).sqrt() * (v > 0)
        size = root / (1 - b2 ** (step + 1)) ** 0.5 + self.eps
        return theta - rate / (1 - b1 ** (step + 1)) * m / size, m, v


def optimiser(name: str, group: Mapping[str, Any]) -> Optimiser:
    """The optimiser of a recorded parameter group.

    Args:
        name: its class in `torch.optim`.
        group: its settings, as recorded.

    Raises:
        UnsupportedError: if its steps are not known here.
    """
    odd = [k for k in ("maximize", "amsgrad") if group.get(k)]
    if name not in ("SGD", "Adam", "AdamW") or odd:
        got = f"{name} with {' and '.join(odd)}" if odd else name
        raise UnsupportedError(f"Only SGD, Adam and AdamW can be replayed, and as they stand, got {got}.")
    own = ("momentum", "dampening", "nesterov", "weight_decay") if name == "SGD" else ("betas", "eps", "weight_decay")
    given = {k: group[k] for k in own if k in group}
    if name == "SGD":
        return SGD(**given)
    return Adam(**given, decoupled=name == "AdamW" or bool(group.get("decoupled_weight_decay")))


def jacobian(update: Callable[[Rows, Tensor], Rows], rows: Rows, g: Tensor) -> Jacobian:
    """The derivative of an elementwise update, a tensor of the parameter's shape for each pair of new and old."""
    pull = vjp(update, rows, g)[1]
    ones = [tuple(torch.full_like(r, float(i == j)) for i, r in enumerate(rows)) for j in range(len(rows))]
    return tuple(pull(one) for one in ones)


def pulled(slope: Jacobian, adjoint: Rows) -> tuple[Rows, Tensor]:
    """The adjoint of the old rows, and that of the gradient, from the adjoint of the new rows.

    Args:
        slope: see `jacobian`; its tensors are (1, *shape).
        adjoint: (Q, *shape) each.
    """
    by_old, by_gradient = zip(*slope, strict=True)
    return tuple(_weighted(column, adjoint) for column in zip(*by_old, strict=True)), _weighted(by_gradient, adjoint)


def _weighted(slopes: Rows, adjoint: Rows) -> Tensor:
    """The sum of their products, as a new tensor."""
    (slope, a), *rest = [pair for pair in zip(slopes, adjoint, strict=True) if pair[0].any()] or [
        (slopes[0], adjoint[0])
    ]
    total = slope * a
    for slope, a in rest:
        total.addcmul_(slope, a)
    return total
