"""Preconditioned conjugate gradients on all the data, all right-hand sides at once.

    x <- x + a p,  r <- r - a (C + damping) p,  z = P^-1 r,  p <- z + b p         (Hestenes & Stiefel 1952)

with a = r.z / p.(C + damping) p and b = r'.z' / r.z separately for each query. Queries that have converged are frozen.
The residual returned is measured afresh at the end, not carried along.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from whence import vectors
from whence.curvature.base import Curvature
from whence.damping import Damping, Shift
from whence.errors import DivergenceError
from whence.progress import track
from whence.solvers.base import Inverse, Solution, Solver, instance, positive
from whence.solvers.identity import Identity
from whence.vectors import Vectors


class ConjugateGradients(Inverse):
    """Runs the iteration for each set of right-hand sides."""

    def __init__(
        self, curvature: Curvature, shift: Shift, preconditioner: Inverse, tolerance: float | None, steps: int
    ):
        super().__init__(curvature, shift)
        self.preconditioner, self.steps = preconditioner, steps
        self.tolerance = tolerance
        self.limit = 0.95 * (tolerance or 0.0)  # so that rounding does not undo a met tolerance

    def apply(self, b: Vectors) -> Vectors:
        """x alone."""
        return self._iterate(b)[0]

    def __call__(self, b: Vectors, certify: bool = True) -> Solution:
        """Solve for Q right-hand sides together.

        Raises:
            DivergenceError: at a direction of non-positive curvature, or if x is not finite.
        """
        x, history = self._iterate(b)
        return self.certified(x, b, certify, history, passes=len(history) - 1)

    def _iterate(self, b: Vectors) -> tuple[Vectors, Tensor]:
        x = vectors.zeros_like(b)
        size = vectors.norm(b).clamp(min=1e-300)
        residual = vectors.norm(b) / size  # (Q,)
        history = [residual]
        alive = (residual > self.limit).nonzero()[:, 0]  # queries still iterated; r, p and rz hold these alone
        r, p, rz = vectors.select(b, alive), {}, torch.empty(0)
        for step in track(range(self.steps), "conjugate gradients", enabled=self.curvature.problem.progress):
            if not len(alive):
                break
            z = self.preconditioner.apply(r)
            rz, before = vectors.dot(r, z), rz
            p = vectors.clone(z) if step == 0 else vectors.add(z, p, rz / before)
            ap = vectors.add_(self.curvature.product(p), p, self.shift)
            pap = vectors.dot(p, ap)
            if bool((pap <= 0).any()):
                raise DivergenceError(
                    f"CG met a direction of non-positive curvature at step {step + 1} (p.(C + damping)p = "
                    f"{float(pap.min()):.1e}): it needs a positive definite matrix. Raise the damping, take the GGN "
                    "instead of the Hessian, or Exact()."
                )
            alpha = rz / pap
            for name, t in x.items():
                t.index_add_(0, alive, p[name] * vectors.expand(alpha, t))
            vectors.add_(r, ap, -alpha)
            residual = residual.index_copy(0, alive, vectors.norm(r) / size[alive])
            history.append(residual)
            going = residual[alive] > self.limit
            if not going.all():
                keep = going.nonzero()[:, 0]
                alive, rz, r, p = alive[keep], rz[keep], vectors.select(r, keep), vectors.select(p, keep)
        return x, torch.stack(history)

    def state(self) -> dict[str, Tensor]:
        """The preconditioner's."""
        return self.preconditioner.state()

    def report(self) -> dict[str, float]:
        """The preconditioner's."""
        return self.preconditioner.report()


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients.

    Args:
        preconditioner: any solver whose inverse is symmetric positive definite; EKFAC() makes 10 steps enough for
            ranking, Dual() 2 or 3 for an exact answer.
        tolerance: relative residual at which a query is converged and frozen; None runs all steps.
        steps: most iterations; each is one pass over the training data.
    """

    preconditioner: Solver = field(default_factory=Identity)
    tolerance: float | None = 1e-3
    steps: int = 500

    def __post_init__(self) -> None:
        instance(preconditioner=self.preconditioner)
        positive(tolerance=self.tolerance, steps=self.steps)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Fits the preconditioner."""
        self.check(curvature)
        inner = self.preconditioner.fit(curvature, damping)
        return ConjugateGradients(curvature, inner.shift, inner, self.tolerance, self.steps)

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """Restores the preconditioner."""
        inner = self.preconditioner.restore(curvature, shift, state)
        return ConjugateGradients(curvature, inner.shift, inner, self.tolerance, self.steps)
