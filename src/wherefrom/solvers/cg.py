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
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping
from wherefrom.curvature.ggn import GGN
from wherefrom.errors import DivergenceError
from wherefrom.persample.directions import Directions
from wherefrom.progress import track
from wherefrom.solvers.base import Inverse, Iterates, Solver, require_positive, require_solvers
from wherefrom.solvers.identity import Identity

# So that rounding does not undo a tolerance that was met.
MARGIN = 0.95


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


@dataclass(frozen=True, eq=False)
class ConjugateGradients(Inverse):
    """Runs the iteration for each set of right-hand sides.

    Args:
        solver: the hyper-parameters.
        preconditioner: applied at every step; symmetric positive definite.
    """

    solver: CG
    preconditioner: Inverse

    is_positive_definite: ClassVar[bool] = True

    @property
    def tolerance(self) -> float | None:
        """The relative residual at which a query has converged."""
        return self.solver.tolerance

    @property
    def limit(self) -> float:
        """The relative residual at which a query is frozen."""
        return MARGIN * (self.solver.tolerance or 0.0)

    def apply(self, b: Directions) -> Directions:
        """Return x alone."""
        return self.iterate(b).x

    def iterate(self, b: Directions) -> Iterates:
        """Return x, relative residuals (steps + 1, Q), and the passes: one a step, and one for each residual measured.

        Raises:
            DivergenceError: at a direction of non-positive curvature.
        """
        b = b.dense()
        solve = self._solve_as_block if self.solver.block and len(b) > 1 else self._solve_separately
        x, history, measured = solve(b)
        return Iterates(x, torch.stack(history), len(history) - 1.0 + measured)

    def _solve_separately(self, b: Directions) -> tuple[Directions, list[Tensor], int]:
        """Run preconditioned conjugate gradients, each query with step lengths of its own.

        Returns:
            x; relative residuals before every step and after the last, (Q,) each; how many residuals were measured.
        """
        x = b.zeros_like()
        norms = b.norm().clamp(min=1e-300)
        relative = b.norm() / norms  # relative residuals of all queries, (Q,): 1, or 0 where b = 0
        history, measured = [relative], 0
        floor = Floor(norms, self.limit, torch.finfo(self.curvature.problem.dtype).eps)

        # Only the queries that still iterate are held: residual, direction and product are theirs alone.
        active = (relative > self.limit).nonzero()[:, 0]
        residual, direction, product = b[active], b[active], torch.empty(0)
        start = time.perf_counter()
        for step in track(range(self.solver.steps), "conjugate gradients", enabled=self.curvature.problem.progress):
            if not len(active) or self._is_late(start):
                break

            preconditioned = self.preconditioner.apply(residual)
            new_product = residual.dot(preconditioned)  # r.z of each query, (q,)
            if step == 0:
                direction = preconditioned.clone()
            else:
                direction = preconditioned.axpy(new_product / product, direction)
            product = new_product

            image = self._damped_product(direction)  # (C + damping) p
            curvature_along = direction.dot(image)
            # A Hessian can be indefinite: along such a direction the quadratic has no minimum and CG would climb.
            if bool((curvature_along <= 0).any()):
                raise indefinite(step, float(curvature_along.min()), self.curvature)

            step_length = product / curvature_along
            x.add_to_(active, step_length, direction)
            residual.add_(-step_length, image)
            carried = residual.norm() / norms[active]

            # Where rounding may have taken over, the true residual is measured and may replace the carried one.
            floor.note(active, image.norm() / direction.norm(), x[active].norm())
            doubtful = floor.doubts(active, carried).nonzero()[:, 0]
            if len(doubtful):
                queries = active[doubtful]
                true = self.residual_vector(x[queries], b[queries])
                measured += 1
                apart = true.axpy(-1.0, residual[doubtful]).norm() / norms[queries]
                carried[doubtful] = true.norm() / norms[queries]
                replaced = floor.judge(queries, carried[doubtful], apart).nonzero()[:, 0]
                residual.set_(doubtful[replaced], true[replaced])
                direction.set_(doubtful[replaced], 0.0)  # their search starts again

            relative = relative.index_copy(0, active, carried)
            history.append(relative)

            # Freeze what has converged, so that the next product pays for the others alone.
            going_on = (carried > self.limit) & ~floor.settled[active]
            if not going_on.all():
                keep = going_on.nonzero()[:, 0]
                active, product = active[keep], product[keep]
                residual, direction = residual[keep], direction[keep]
        return x, history, measured

    def _solve_as_block(self, b: Directions) -> tuple[Directions, list[Tensor], int]:
        """Run block conjugate gradients: each query searches along the directions of all (O'Leary 1980).

        Relative residuals are s q throughout, q (n, D) of orthonormal rows and s (Q, n), n <= min(Q, D).
        """
        flat = b.flatten()  # (Q, D)
        norms = flat.norm(dim=1).double()
        # A query that is not finite must not spoil the others, whose directions it would share.
        usable = norms.isfinite() & (norms > 0)
        norms = norms.where(usable, 1.0)
        flat = (flat / norms.to(flat).unsqueeze(1)).where(usable.unsqueeze(1), 0.0)

        x, relative = torch.zeros_like(flat), usable.double()
        history, measured = [relative], 0
        everyone = torch.arange(len(flat), device=flat.device)
        floor = Floor(torch.ones_like(norms), self.limit, torch.finfo(flat.dtype).eps)
        q, s = _orthonormalise(flat, usable)
        p, image, factor, is_fresh = q, q, torch.empty(0), True
        start = time.perf_counter()
        for step in track(range(self.solver.steps), "block CG", enabled=self.curvature.problem.progress):
            if bool(((relative <= self.limit) | floor.settled).all()) or self._is_late(start):
                break

            z = self.preconditioner.apply(Directions.unflatten(b.blocks, q)).flatten()
            if not is_fresh:  # make the new directions conjugate to the last ones
                z = z - torch.cholesky_solve((image @ z.T).double(), factor).T.to(z) @ p
            p = _orthonormalise(z / z.norm(dim=1, keepdim=True).clamp(min=1e-30))[0]

            image = self._damped_product(Directions.unflatten(b.blocks, p)).flatten()  # (C + damping) p
            curvature_along = (p @ image.T).double()
            curvature_along = (curvature_along + curvature_along.T) / 2
            factor, info = torch.linalg.cholesky_ex(curvature_along)
            if int(info):
                raise indefinite(step, float(torch.linalg.eigvalsh(curvature_along)[0]), self.curvature)

            step_lengths = torch.cholesky_solve((p @ q.T).double(), factor).T.to(q)  # (n, directions)
            x.addmm_(s @ step_lengths, p)
            # How far q - step_lengths @ image can be wrong, in units of eps.
            cancelled = float((step_lengths.abs() @ image.norm(dim=1)).max())
            q, turn = _orthonormalise(q - step_lengths @ image, noise=max(1.0, cancelled))
            s = s @ turn
            relative, is_fresh = s.norm(dim=1).double(), False

            floor.note(everyone, image.norm(dim=1).double(), x.norm(dim=1).double())
            doubtful = floor.doubts(everyone, relative) & usable & ~floor.settled
            busy = (relative > self.limit) & ~doubtful & ~floor.settled
            # A restart costs all queries the directions that they share, so it waits until none gains from going on.
            must_measure = busy.any() if not len(q) else doubtful.any() and not busy.any()
            if bool(must_measure):
                true = self._true_residual(x, flat, b)
                measured += 1
                apart, relative = (true - s @ q).norm(dim=1).double(), true.norm(dim=1).double()
                some = (usable & ~floor.settled).nonzero()[:, 0]
                if bool(floor.judge(some, relative[some], apart[some]).any()) or not len(q):
                    length = true.norm(dim=1, keepdim=True).clamp(min=1e-30)
                    q, s = _orthonormalise(true / length, usable)  # the search starts again from the true residuals
                    s, is_fresh = length * s, True
            history.append(relative)
        solutions = Directions.unflatten(b.blocks, x * norms.to(x).unsqueeze(1))
        return solutions, history, measured

    def _true_residual(self, x: Tensor, flat: Tensor, b: Directions) -> Tensor:
        return self.residual_vector(Directions.unflatten(b.blocks, x), Directions.unflatten(b.blocks, flat)).flatten()

    def _damped_product(self, p: Directions) -> Directions:
        return self.curvature.product(p).axpy(self.damping, p)

    def _is_late(self, start: float) -> bool:
        return self.solver.seconds is not None and time.perf_counter() - start > self.solver.seconds

    def report(self) -> dict[str, float | str]:
        """Return the preconditioner's."""
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
        require_solvers(preconditioner=self.preconditioner)
        require_positive(tolerance=self.tolerance, steps=self.steps, seconds=self.seconds)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Fit the preconditioner."""
        self.check(curvature)
        preconditioner = self.preconditioner.fit(curvature, damping)
        return ConjugateGradients(curvature, preconditioner.damping, self, preconditioner)

    def share(self, inverse: Inverse) -> None:
        """Share what the preconditioner knows."""
        if isinstance(inverse, ConjugateGradients):
            self.preconditioner.share(inverse.preconditioner)


def indefinite(step: int, form: float, curvature: Curvature) -> DivergenceError:
    """Make the error of a direction p of non-positive curvature."""
    if isinstance(curvature, GGN):
        why, instead = "the loss is not convex in the outputs", "curvature=EmpiricalFisher"
    else:
        why, instead = "it needs a positive definite matrix", "the GGN instead of the Hessian"
    return DivergenceError(
        f"CG met a direction of non-positive curvature at step {step + 1} (p.(C + damping)p = {form:.1e}): {why}. "
        f"Raise the damping, take {instead}, or solve with Exact(form='primal')."
    )


def _orthonormalise(z: Tensor, used: Tensor | None = None, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows q and a matrix t with z = t q, for rows z (Q, D) that are right to eps times ``noise``.

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
