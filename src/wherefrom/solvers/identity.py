"""No curvature at all: x = b, so that scores are gradient dot products.

It is TracIn at one checkpoint, and the plain preconditioner of CG and Neumann.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver


class Unit(Inverse):
    """The identity."""

    approximate = True

    def apply(self, b: Vectors) -> Vectors:
        """B itself."""
        return b

    def quadratic(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Squared gradient norms, (n,)."""
        values = rows.square_norms().sum(1)
        return values, torch.ones_like(values, dtype=torch.bool)


@dataclass(frozen=True)
class Identity(Solver):
    """Gradient dot: C + damping I replaced by I."""

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Nothing to fit."""
        return Unit(curvature, Damping.of(damping).resolve(curvature))

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:  # noqa: ARG002
        """Nothing to restore."""
        return Unit(curvature, shift)
