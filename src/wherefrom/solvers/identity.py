"""No curvature at all: x = b, so that scores are gradient dot products.

It is TracIn at one checkpoint, and the plain preconditioner of CG and Neumann.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.solvers.base import Inverse, Solver


@dataclass(frozen=True, eq=False)
class IdentityInverse(Inverse):
    """The identity in place of (C + damping)^-1."""

    is_approximate: ClassVar[bool] = True
    is_positive_definite: ClassVar[bool] = True

    def apply(self, b: Directions) -> Directions:
        """Return b itself."""
        return b

    def self_influence(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return the squared gradient norms, (n,)."""
        values = rows.square_norms().sum(1)
        return values, torch.ones_like(values, dtype=torch.bool)


@dataclass(frozen=True)
class Identity(Solver):
    """Gradient dot: C + damping I replaced by I."""

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Resolve the damping; there is nothing else to fit."""
        return IdentityInverse(curvature, Damping.of(damping).resolve(curvature))
