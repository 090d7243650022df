"""The Hessian of the mean training loss; it may be indefinite.

H v = d/de grad L(theta + e v),        forward mode over reverse mode              (Schioppa et al. 2022, sec. 3)
"""

from __future__ import annotations

from torch import Tensor
from torch.func import grad, jvp, vmap

from whence import vectors
from whence.curvature.base import Curvature, Need
from whence.curvature.ggn import rhs_at_once
from whence.data import Batch
from whence.vectors import Vectors


class Hessian(Curvature):
    """The second derivative of the mean training loss in the selected parameters."""

    @property
    def psd(self) -> bool:
        """It may have negative eigenvalues."""
        return False

    @property
    def offers(self) -> frozenset[Need]:
        """No rows."""
        return frozenset({Need.MATVEC, Need.KRONECKER})

    def product(self, v: Vectors, index: Tensor | None = None) -> Vectors:
        """H v over all training examples, or over those of the given numbers."""

        def part(batch: Batch) -> Vectors:
            outputs, theta = self.problem.functional(batch)
            slope = grad(lambda p: self.problem.task.loss(outputs(p), batch).sum())
            pieces = vectors.chunk(v, rhs_at_once(self.problem, outputs, theta))
            return vectors.concatenate([vmap(lambda w: jvp(slope, (theta,), (w,))[1])(some) for some in pieces])

        return self.streamed(part, index)
