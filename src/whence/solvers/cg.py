"""Preconditioned conjugate gradients on all the data, all right-hand sides at once.

    x <- x + a p,  r <- r - a (C + damping) p,  z = P^-1 r,  p <- z + b p         (Hestenes & Stiefel 1952)

with a = r.z / p.(C + damping) p and b = r'.z' / r.z separately for each query; queries that have converged are frozen.
The block method (O'Leary 1980) lets each query search along the directions of all: a and b become matrices, and many
queries need several times fewer products. Residuals are held as s q, q of orthonormal rows, and the method runs on q
(Dubrulle 2001): queries may then be equal, nearly equal or dependent, and of any length.
The residual returned is measured afresh at the end, not carried along.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whence import vectors
from whence.curvature.base import Curvature
from whence.damping import Damping, Shift
from whence.errors import DivergenceError
from whence.progress import track
from whence.solvers.base import Inverse, Solver, instance, positive
from whence.solvers.identity import Identity
from whence.vectors import Vectors


class ConjugateGradients(Inverse):
    """Runs the iteration for each set of right-hand sides."""

    def __init__(self, curvature: Curvature, shift: Shift, solver: CG, preconditioner: Inverse):
        super().__init__(curvature, shift)
        self.solver, self.preconditioner = solver, preconditioner
        self.tolerance = solver.tolerance
        self.limit = 0.95 * (solver.tolerance or 0.0)  # so that rounding does not undo a met tolerance

    def apply(self, b: Vectors) -> Vectors:
        """x alone."""
        return self.solve(b)[0]

    def solve(self, b: Vectors) -> tuple[Vectors, Tensor, float]:
        """x, relative residuals (steps + 1, Q), and one pass a step.

        Raises:
            DivergenceError: at a direction of non-positive curvature.
        """
        many = self.solver.block and vectors.count(b) > 1
        x, history = self._together(b) if many else self._separately(b)
        return x, torch.stack(history), len(history) - 1.0

    def _separately(self, b: Vectors) -> tuple[Vectors, list[Tensor]]:
        x = vectors.zeros_like(b)
        size = vectors.norm(b).clamp(min=1e-300)
        residual = vectors.norm(b) / size  # (Q,)
        history = [residual]
        alive = (residual > self.limit).nonzero()[:, 0]  # queries still iterated; r, p and rz hold these alone
        r, p, rz = vectors.select(b, alive), {}, torch.empty(0)
        start = time.perf_counter()
        for step in track(range(self.solver.steps), "conjugate gradients", enabled=self.curvature.problem.progress):
            if not len(alive) or self._late(start):
                break
            z = self.preconditioner.apply(r)
            rz, before = vectors.dot(r, z), rz
            p = vectors.clone(z) if step == 0 else vectors.add(z, p, rz / before)
            ap = self._product(p)
            pap = vectors.dot(p, ap)
            if bool((pap <= 0).any()):
                raise indefinite(step, float(pap.min()))
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
        return x, history

    def _together(self, b: Vectors) -> tuple[Vectors, list[Tensor]]:
        shapes = {name: t.shape[1:] for name, t in b.items()}
        flat = vectors.flatten(b)  # (Q, D)
        x, size = torch.zeros_like(flat), flat.norm(dim=1).double()
        flat = flat.where(size.isfinite().unsqueeze(1), 0.0)  # one that is not finite must not spoil the others
        q, s = _orthonormal(flat)  # r = s q throughout: (n, D) and (Q, n), n = min(Q, D)
        p, ap, factor = q, q, torch.empty(0)
        history = [(size > 0).double()]
        start = time.perf_counter()
        for step in track(range(self.solver.steps), "block CG", enabled=self.curvature.problem.progress):
            if not bool((history[-1] > self.limit).any()) or self._late(start):
                break
            z = _flat(self.preconditioner.apply(vectors.unflatten(q, shapes)), shapes)
            if step:
                z = z - torch.cholesky_solve((ap @ z.T).double(), factor).T.to(z) @ p
            p = _orthonormal(z)[0]
            ap = _flat(self._product(vectors.unflatten(p, shapes)), shapes)
            pap = (p @ ap.T).double()
            factor, info = torch.linalg.cholesky_ex((pap + pap.T) / 2)
            if int(info):
                raise indefinite(step, float(torch.linalg.eigvalsh((pap + pap.T) / 2)[0]))
            alpha = torch.cholesky_solve((p @ q.T).double(), factor).T.to(q)  # (n, n)
            x.addmm_(s @ alpha, p)
            q, turn = _orthonormal(q - alpha @ ap)
            s = s @ turn
            history.append(s.norm(dim=1).double() / size.clamp(min=1e-300))
        return vectors.unflatten(x, shapes), history

    def _product(self, p: Vectors) -> Vectors:
        return vectors.add(self.curvature.product(p), p, self.shift)

    def _late(self, start: float) -> bool:
        return self.solver.seconds is not None and time.perf_counter() - start > self.solver.seconds

    def state(self) -> dict[str, Tensor]:
        """The preconditioner's."""
        return self.preconditioner.state()

    def report(self) -> dict[str, float | str]:
        """The preconditioner's."""
        return self.preconditioner.report()


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients.

    Args:
        preconditioner: any solver whose inverse is symmetric positive definite; EKFAC() makes 10 steps enough for
            ranking, Dual() 2 or 3 for an exact answer, Nystrom() serves any positive semi-definite curvature.
        tolerance: relative residual at which a query is converged and frozen; None runs all steps.
        steps: most iterations; each is one pass over the training data.
        block: let all queries share their search directions. Many queries then need several times fewer passes; an
            answer depends, within the tolerance, on the queries solved with it.
        seconds: budget of a solve; it stops at the first step after it, and names what has not converged.
    """

    preconditioner: Solver = field(default_factory=Identity)
    tolerance: float | None = 1e-3
    steps: int = 500
    block: bool = False
    seconds: float | None = None

    def __post_init__(self) -> None:
        instance(preconditioner=self.preconditioner)
        positive(tolerance=self.tolerance, steps=self.steps, seconds=self.seconds)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Fits the preconditioner."""
        self.check(curvature)
        inner = self.preconditioner.fit(curvature, damping)
        return ConjugateGradients(curvature, inner.shift, self, inner)

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """Restores the preconditioner."""
        inner = self.preconditioner.restore(curvature, shift, state)
        return ConjugateGradients(curvature, inner.shift, self, inner)


def indefinite(step: int, form: float) -> DivergenceError:
    """The error at a direction p of non-positive curvature."""
    return DivergenceError(
        f"CG met a direction of non-positive curvature at step {step + 1} (p.(C + damping)p = {form:.1e}): it needs a "
        "positive definite matrix. Raise the damping, take the GGN instead of the Hessian, or Exact()."
    )


def _flat(v: Vectors, shapes: vectors.Shapes) -> Tensor:
    return vectors.flatten({name: v[name] for name in shapes})


def _orthonormal(z: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows q and a matrix t with z = t q, for z (Q, D) of any rank."""
    q, t = torch.linalg.qr(z.T)
    return q.T, t.T
