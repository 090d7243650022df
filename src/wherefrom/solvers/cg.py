"""Preconditioned conjugate gradients on all the data, all right-hand sides at once.

    x <- x + a p,  r <- r - a (C + damping) p,  z = P^-1 r,  p <- z + b p         (Hestenes & Stiefel 1952)

with a = r.z / p.(C + damping) p and b = r'.z' / r.z separately for each query; queries that have converged are frozen.
The block method (O'Leary 1980) lets each query search along the directions of all: a and b become matrices, and many
queries need several times fewer products. Residuals are held as s q, q of orthonormal rows, and the method runs on q
(Dubrulle 2001): queries may then be equal, nearly equal or dependent, and of any length.
What is zero, dependent or solved exactly by a step is dropped from the block. Where the residual that the recursion
carries along may have left the true one, that one is measured and takes over, until rounding lets it shrink no further
(`Floor`). The residual returned is measured afresh at the end, not carried along.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.curvature.ggn import GGN
from wherefrom.errors import DivergenceError
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.progress import track
from wherefrom.solvers.base import Inverse, Solver, instance, positive
from wherefrom.solvers.identity import Identity


class Floor:
    """Watches each query for the point where rounding takes over, so that no query is iterated past it.

    The residual that the recursion carries along goes on to shrink when the true one, b - (C + damping) x, no longer
    does: they part by about eps |C| |x|, or more where the recursion lost its way before. Below that level the true
    residual is measured. If the two have parted, the recursion goes on from the true one; if that was done before and
    helped little, or the true residual is down to rounding already, the query has reached its floor.

    Args:
        size: lengths of the right-hand sides, (Q,); residuals are relative to them.
        limit: relative residual that is good enough.
        eps: relative rounding error of the arithmetic.
    """

    def __init__(self, size: Tensor, limit: float, eps: float):
        self.size, self.limit, self.eps = size, limit, eps
        self.largest = 0.0  # |C + damping|, from below
        self.rounding = torch.zeros_like(size)  # eps |C| |x| / |b|
        self.trust = torch.ones_like(size)  # share of ``rounding`` down to which the recursion was found right
        self.replaced = torch.full_like(size, torch.inf)  # true residual when it last replaced the other
        self.settled = torch.zeros_like(size, dtype=torch.bool)  # measured: good enough, or as good as it gets

    def note(self, alive: Tensor, stretch: Tensor, length: Tensor) -> None:
        """After a step: |(C + damping) p| / |p| of the directions, and |x| of the queries that are alive."""
        self.largest = max(self.largest, float(stretch.max()))
        self.rounding[alive] = self.eps * self.largest * length / self.size[alive]

    def doubts(self, alive: Tensor, carried: Tensor) -> Tensor:
        """Whether the recursion's relative residuals (q,) are so small that the true ones must be measured."""
        rounding = self.rounding[alive]
        lost = carried <= torch.minimum(self.trust[alive] * rounding, self.replaced[alive]) / 10
        unsure = self.limit <= 10 * rounding  # it says that the limit is met, which rounding alone may exceed
        return torch.where(carried <= self.limit, unsure, lost)

    def judge(self, some: Tensor, true: Tensor, apart: Tensor) -> Tensor:
        """Given true residuals and their distances from the recursion's, (q,): which of them it must take over."""
        agree = apart <= 0.1 * true
        self.trust[some] *= torch.where(agree, 0.01, 1.0)
        unmet = ~agree & (true > self.limit)
        lowest = (true > self.replaced[some] / 2) | (true <= 2 * self.rounding[some])
        self.settled[some] |= (true <= self.limit) | (unmet & lowest)
        replace = unmet & ~lowest
        self.replaced[some] = torch.where(replace, true, self.replaced[some])
        return replace


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
        """x, relative residuals (steps + 1, Q), and the passes: one a step, and one for each residual measured.

        Raises:
            DivergenceError: at a direction of non-positive curvature.
        """
        many = self.solver.block and vectors.count(b) > 1
        x, history, measured = self._together(b) if many else self._separately(b)
        return x, torch.stack(history), len(history) - 1.0 + measured

    def _separately(self, b: Vectors) -> tuple[Vectors, list[Tensor], int]:
        x = vectors.zeros_like(b)
        size = vectors.norm(b).clamp(min=1e-300)
        residual = vectors.norm(b) / size  # (Q,)
        history, measured = [residual], 0
        floor = Floor(size, self.limit, torch.finfo(self.curvature.problem.dtype).eps)
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
                raise indefinite(step, float(pap.min()), self.curvature)
            alpha = rz / pap
            for name, t in x.items():
                t.index_add_(0, alive, p[name] * vectors.expand(alpha, t))
            vectors.add_(r, ap, -alpha)
            carried = vectors.norm(r) / size[alive]

            floor.note(alive, vectors.norm(ap) / vectors.norm(p), vectors.norm(vectors.select(x, alive)))
            doubtful = floor.doubts(alive, carried).nonzero()[:, 0]
            if len(doubtful):
                some = alive[doubtful]
                true = self.residual_vector(vectors.select(x, some), vectors.select(b, some))
                measured += 1
                apart = vectors.norm(vectors.add(true, vectors.select(r, doubtful), -1.0)) / size[some]
                carried[doubtful] = vectors.norm(true) / size[some]
                replace = floor.judge(some, carried[doubtful], apart).nonzero()[:, 0]
                for name, t in r.items():
                    t[doubtful[replace]] = true[name][replace]
                    p[name][doubtful[replace]] = 0.0  # their search starts again

            residual = residual.index_copy(0, alive, carried)
            history.append(residual)
            going = (carried > self.limit) & ~floor.settled[alive]
            if not going.all():
                keep = going.nonzero()[:, 0]
                alive, rz, r, p = alive[keep], rz[keep], vectors.select(r, keep), vectors.select(p, keep)
        return x, history, measured

    def _together(self, b: Vectors) -> tuple[Vectors, list[Tensor], int]:
        shapes = {name: t.shape[1:] for name, t in b.items()}
        flat = vectors.flatten(b)  # (Q, D)
        size = flat.norm(dim=1).double()
        usable = size.isfinite() & (size > 0)  # a query that is not finite must not spoil the others
        size = size.where(usable, 1.0)
        flat = (flat / size.to(flat).unsqueeze(1)).where(usable.unsqueeze(1), 0.0)
        x, residual = torch.zeros_like(flat), usable.double()
        history, measured = [residual], 0
        everyone = torch.arange(len(flat), device=flat.device)
        floor = Floor(torch.ones_like(size), self.limit, torch.finfo(flat.dtype).eps)
        q, s = _basis(flat, usable)  # relative residuals are s q throughout: (n, D) and (Q, n), n <= min(Q, D)
        p, ap, factor, fresh = q, q, torch.empty(0), True
        start = time.perf_counter()
        for step in track(range(self.solver.steps), "block CG", enabled=self.curvature.problem.progress):
            if bool(((residual <= self.limit) | floor.settled).all()) or self._late(start):
                break
            z = _flat(self.preconditioner.apply(vectors.unflatten(q, shapes)), shapes)
            if not fresh:
                z = z - torch.cholesky_solve((ap @ z.T).double(), factor).T.to(z) @ p
            p = _basis(z / z.norm(dim=1, keepdim=True).clamp(min=1e-30))[0]
            ap = _flat(self._product(vectors.unflatten(p, shapes)), shapes)
            pap = (p @ ap.T).double()
            factor, info = torch.linalg.cholesky_ex((pap + pap.T) / 2)
            if int(info):
                raise indefinite(step, float(torch.linalg.eigvalsh((pap + pap.T) / 2)[0]), self.curvature)
            alpha = torch.cholesky_solve((p @ q.T).double(), factor).T.to(q)  # (n, directions)
            x.addmm_(s @ alpha, p)
            cancelled = float(
                (alpha.abs() @ ap.norm(dim=1)).max()
            )  # how far q - alpha @ ap can be wrong, in units of eps
            q, turn = _basis(q - alpha @ ap, noise=max(1.0, cancelled))
            s = s @ turn
            residual, fresh = s.norm(dim=1).double(), False

            floor.note(everyone, ap.norm(dim=1).double(), x.norm(dim=1).double())
            doubtful = floor.doubts(everyone, residual) & usable & ~floor.settled
            busy = (residual > self.limit) & ~doubtful & ~floor.settled
            # A restart costs all queries the directions that they share, so it waits until none gains from going on.
            if bool(busy.any() if not len(q) else doubtful.any() and not busy.any()):
                true = self._true_residual(x, flat, shapes)
                measured += 1
                apart, residual = (true - s @ q).norm(dim=1).double(), true.norm(dim=1).double()
                some = (usable & ~floor.settled).nonzero()[:, 0]
                if bool(floor.judge(some, residual[some], apart[some]).any()) or not len(q):
                    length = true.norm(dim=1, keepdim=True).clamp(min=1e-30)
                    q, s = _basis(true / length, usable)  # the search starts again from the residuals that are true
                    s, fresh = length * s, True
            history.append(residual)
        return vectors.unflatten(x * size.to(x).unsqueeze(1), shapes), history, measured

    def _true_residual(self, x: Tensor, b: Tensor, shapes: vectors.Shapes) -> Tensor:
        return _flat(self.residual_vector(vectors.unflatten(x, shapes), vectors.unflatten(b, shapes)), shapes)

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
        tolerance: relative residual at which a query is converged and frozen; None runs all steps. Either stops where
            rounding lets the residual shrink no further.
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


def indefinite(step: int, form: float, curvature: Curvature) -> DivergenceError:
    """The error at a direction p of non-positive curvature."""
    if isinstance(curvature, GGN):
        why, instead = "the loss is not convex in the outputs", "curvature=EmpiricalFisher"
    else:
        why, instead = "it needs a positive definite matrix", "the GGN instead of the Hessian"
    return DivergenceError(
        f"CG met a direction of non-positive curvature at step {step + 1} (p.(C + damping)p = {form:.1e}): {why}. "
        f"Raise the damping, take {instead}, or solve with Exact(form='primal')."
    )


def _flat(v: Vectors, shapes: vectors.Shapes) -> Tensor:
    return vectors.flatten({name: v[name] for name in shapes})


def _basis(z: Tensor, used: Tensor | None = None, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Orthonormal rows q and a matrix t with z = t q, for z (Q, D) with rows that are right to eps times ``noise``.

    There are as many rows q as z has dimensions: none for what is zero or dependent, up to rounding. A factorisation
    that made up directions for these would have the search follow noise.
    """
    q, t = (m.T for m in torch.linalg.qr(z.T))
    left, values, right = torch.linalg.svd(t.double(), full_matrices=False)
    kept = values > 10 * noise * torch.finfo(t.dtype).eps
    if len(values) == len(q) and bool(kept.all()):
        return q, t
    t = (left[:, kept] * values[kept]).to(t)
    return right[kept].to(q) @ q, t if used is None else t * used.unsqueeze(1)  # exactly 0 for what is not used
