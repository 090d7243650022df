"""Optimisers as pure functions of one parameter, entry by entry, with the arithmetic of `torch.optim`.

    (theta, state), gradient  ->  (theta', state')

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

Rows = tuple[Tensor, ...]  # a parameter and the optimiser's state of it, (K, *shape) each
Jacobian = tuple[tuple[Rows, Tensor], ...]  # of each new row: the derivative by each old row, and by the gradient


class Optimiser(Protocol):
    """The settings of one parameter group, and its update rule."""

    @property
    def state_size(self) -> int:
        """How many tensors of a parameter's shape it keeps; they begin at zero."""
        ...

    def update(self, rows: Rows, g: Tensor, rate: float, step: int) -> Rows:
        """Take one step.

        Args:
            rows: the parameter and the optimiser's state of it.
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
    def state_size(self) -> int:
        """The running sum of gradients, if there is momentum."""
        return int(self.momentum != 0)

    def update(self, rows: Rows, g: Tensor, rate: float, step: int) -> Rows:
        """Take one step; rows are (theta,), or (theta, m) with momentum."""
        theta, *state = rows
        g = g + self.weight_decay * theta
        if not state:
            return (theta - rate * g,)

        # torch starts the running sum with the first gradient itself, undampened.
        m = g if step == 0 else self.momentum * state[0] + (1 - self.dampening) * g
        direction = g + self.momentum * m if self.nesterov else m
        return theta - rate * direction, m


@dataclass(frozen=True)
class Adam:
    """`torch.optim.Adam`, and with ``decoupled`` `torch.optim.AdamW`; the settings are theirs."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def state_size(self) -> int:
        """Running means of gradients and of their squares."""
        return 2

    def update(self, rows: Rows, g: Tensor, rate: float, step: int) -> Rows:
        """Take one step; rows are (theta, m, v)."""
        theta, m, v = rows
        b1, b2 = self.betas
        if self.decoupled:
            theta = theta * (1 - rate * self.weight_decay)
        else:
            g = g + self.weight_decay * theta
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g

        # A weight that never had a gradient stands at v = m = 0: the root's slope there meets m and counts for nothing.
        root = torch.where(v > 0, v, 1).sqrt() * (v > 0)
        denominator = root / (1 - b2 ** (step + 1)) ** 0.5 + self.eps
        return theta - rate / (1 - b1 ** (step + 1)) * m / denominator, m, v


def optimiser(name: str, group: Mapping[str, Any]) -> Optimiser:
    """Make the optimiser of a recorded parameter group.

    Args:
        name: its class in `torch.optim`.
        group: its settings, as recorded.

    Raises:
        UnsupportedError: if its steps are not known here.
    """
    variants = [option for option in ("maximize", "amsgrad") if group.get(option)]
    if name not in ("SGD", "Adam", "AdamW") or variants:
        got = f"{name} with {' and '.join(variants)}" if variants else name
        raise UnsupportedError(f"Only SGD, Adam and AdamW can be replayed, and as they stand, got {got}.")

    if name == "SGD":
        return SGD(**_take_settings(group, "momentum", "dampening", "nesterov", "weight_decay"))
    decoupled = name == "AdamW" or bool(group.get("decoupled_weight_decay"))
    return Adam(**_take_settings(group, "betas", "eps", "weight_decay"), decoupled=decoupled)


def _take_settings(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: group[name] for name in names if name in group}


def jacobian(update: Callable[[Rows, Tensor], Rows], rows: Rows, g: Tensor) -> Jacobian:
    """Differentiate an elementwise update: a tensor of the parameter's shape for each pair of new and old."""
    pull_back = vjp(update, rows, g)[1]
    slopes = []
    for j in range(len(rows)):
        # The Jacobian is diagonal, so pulling back ones in row j and zeros elsewhere gives all of its entries at once.
        cotangent = tuple(torch.full_like(row, float(i == j)) for i, row in enumerate(rows))
        slopes.append(pull_back(cotangent))
    return tuple(slopes)


def pull_back(slope: Jacobian, adjoint: Rows) -> tuple[Rows, Tensor]:
    """Compute the adjoint of the old rows, and that of the gradient, from the adjoint of the new rows.

    Args:
        slope: see `jacobian`; its tensors are (1, *shape).
        adjoint: (Q, *shape) each.
    """
    by_old, by_gradient = zip(*slope, strict=True)
    columns = zip(*by_old, strict=True)  # the derivatives of all new rows by one old row
    old = tuple(_sum_products(column, adjoint) for column in columns)
    return old, _sum_products(by_gradient, adjoint)


def _sum_products(slopes: Rows, adjoint: Rows) -> Tensor:
    """Sum the products of slopes and adjoints into a new tensor."""
    pairs = list(zip(slopes, adjoint, strict=True))
    # Many slopes are zero throughout, such as that of Adam's v by theta without weight decay; one pair gives the shape.
    (slope, a), *rest = [pair for pair in pairs if pair[0].any()] or pairs[:1]
    total = slope * a
    for slope, a in rest:
        total.addcmul_(slope, a)
    return total
