"""The solver that chooses for the user, by size and budget, and moves on where a residual does not meet the tolerance.

In order, the first that fits:

    Exact()                        a side of at most 1,500: the dense decomposition costs seconds
    CG(preconditioner=Nystrom())   any layers, any positive semi-definite curvature; a few steps
    CG(preconditioner=EKFAC())     where memory or time do not allow the r right-hand sides of Nystrom
    CG()                           where there are no Kronecker factors either

Queries that miss the tolerance go on, from where they are, to CG(preconditioner=Dual()) where there are rows, and to
Exact() where its matrix fits.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import torch

from wherefrom.curvature.base import Curvature, Need, probe_signs
from wherefrom.curvature.damping import Damping
from wherefrom.errors import DivergenceError, UnsupportedError
from wherefrom.persample.directions import Directions
from wherefrom.solvers.base import Inverse, Iterates, Solver, relative_norm, require_positive
from wherefrom.solvers.cg import CG, MARGIN
from wherefrom.solvers.gram import Dual
from wherefrom.solvers.kronecker import EKFAC
from wherefrom.solvers.spectral import Exact, Nystrom, matrix_sides

logger = logging.getLogger("wherefrom")

SMALL = 1500  # side of a dense matrix that is decomposed without a second thought
STEPS = 50  # of CG before the next solver is tried
FEWEST = 20  # directions that are worth a Nystrom preconditioner


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it."""

    solver: Solver
    why: str


@dataclass(frozen=True, eq=False)
class AutoInverse(Inverse):
    """The chosen inverse, and the solvers that go on where it misses the tolerance; these are fitted if needed.

    Args:
        solver: the hyper-parameters.
        chosen: the solver that was chosen.
        why: the reason.
        first: what it fitted.
        others: the solvers behind it, in order.
    """

    solver: Auto
    chosen: Solver
    why: str
    first: Inverse
    others: tuple[Solver, ...]

    # What the others fitted, by their place: held here, so that it goes with the inverse, and not saved with it.
    _fits: dict[int, Inverse] = field(default_factory=dict, init=False, repr=False)

    @property
    def tolerance(self) -> float:
        """The relative residual at which a query has converged."""
        return self.solver.tolerance

    def apply(self, b: Directions) -> Directions:
        """Return x alone."""
        return self.iterate(b).x

    def iterate(self, b: Directions) -> Iterates:
        """Let each solver in turn solve for what the ones before it left of the queries that did not converge."""
        b = b.dense()
        x, residual = b.zeros_like(), (b.norm() > 0).double()
        history, passes, start = [residual], 0.0, time.perf_counter()
        late = residual.nonzero()[:, 0]  # queries that have not converged; a right-hand side of 0 has
        solvers = (self.chosen, *self.others) if len(late) else ()
        for i, solver in enumerate(solvers):
            mine = b[late]
            # What is left to solve for: at first everything, later the true residual.
            rest = mine if i == 0 else self.residual_vector(x[late], mine)
            try:
                iterates = self._inverse_of(i).iterate(rest)
            except (UnsupportedError, DivergenceError) as error:
                if i + 1 == len(solvers):
                    raise
                logger.info("%r cannot solve this (%s): going on with %r", solver, error, solvers[i + 1])
                continue

            share = rest.norm() / mine.norm().clamp(min=1e-300)
            x.add_to_(late, 1.0, iterates.x)
            passes += iterates.passes + (i > 0)
            if iterates.history is not None:
                # Residuals are relative to what was left; before the first step they are those known already.
                seen = iterates.history[1:] if len(iterates.history) > 1 else iterates.history
            else:  # a direct method: its residual is measured
                seen = relative_norm(self.residual_vector(x[late], mine), mine).unsqueeze(0) / share
                passes += 1
            for r in seen:
                residual = residual.index_copy(0, late.to(r.device), (r * share).to(residual))
                history.append(residual)

            late = (residual > MARGIN * self.tolerance).nonzero()[:, 0]
            if not len(late) or self._is_late(start):
                break
            if i + 1 < len(solvers):
                logger.info("%d queries above %g: going on with %r", len(late), self.tolerance, solvers[i + 1])
        return Iterates(x, torch.stack(history), passes)

    def _inverse_of(self, i: int) -> Inverse:
        """Return what the solver of this place fits; it is the same however often it is asked for."""
        if i == 0:
            return self.first
        if i not in self._fits:
            self._fits[i] = self.others[i - 1].fit(self.curvature, Damping.by_block(self.damping))
        return self._fits[i]

    def _is_late(self, start: float) -> bool:
        return self.solver.seconds is not None and time.perf_counter() - start > self.solver.seconds

    def report(self) -> dict[str, float | str]:
        """Return what was chosen and why, what stands behind it, and what the chosen one reports."""
        behind = ", ".join(repr(solver) for solver in self.others)
        report: dict[str, float | str] = {"solver": repr(self.chosen), "because": self.why}
        return report | ({"if that fails": behind} if behind else {}) | self.first.report()


@dataclass(frozen=True)
class Auto(Solver):
    """The solver that fits the problem; ``solver="auto"`` is Auto().

    Args:
        tolerance: relative residual; the default is the loosest at which linear datamodeling scores stop changing
            (``benchmarks/RESULTS.md``).
        memory: bytes that factors and matrices may take.
        seconds: time that may be spent on a fit or on a solve, roughly; None: as much as it takes.
        seed: of what is random in a preconditioner.
    """

    tolerance: float = 0.03
    memory: float = 4e9
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(tolerance=self.tolerance, memory=self.memory, seconds=self.seconds)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Choose, say so in the log, and fit the first choice; one that this curvature does not allow is struck off.

        Raises:
            UnsupportedError: the last choice's, if none can be fitted.
        """
        self.check(curvature)
        resolved = Damping.of(damping).resolve(curvature)
        choices = self.choices(curvature)
        while True:
            chosen, *others = choices
            try:
                first = chosen.solver.fit(curvature, Damping.by_block(resolved))
                break
            except UnsupportedError as error:
                if not others:
                    raise
                logger.info("%r cannot be fitted (%s): going on with %r", chosen.solver, error, others[0].solver)
                choices = others
        logger.info("chose %r: %s", chosen.solver, chosen.why)
        return AutoInverse(
            curvature, resolved, self, chosen.solver, chosen.why, first, tuple(choice.solver for choice in others)
        )

    def share(self, inverse: Inverse) -> None:
        """Share what the chosen solver knows."""
        if isinstance(inverse, AutoInverse):
            inverse.chosen.share(inverse.first)

    def choices(self, curvature: Curvature) -> list[Choice]:
        """List the first choice and what to fall back on, in order."""
        sides = matrix_sides(curvature)
        side, D = min(sides.values()), int(sides["primal"])
        dense = Exact(memory=self.memory)
        fits = 3 * 8 * side**2 <= self.memory
        if side <= SMALL and fits:
            return [Choice(dense, f"a {side:,.0f} x {side:,.0f} matrix is decomposed in seconds")]

        plain = CG(tolerance=self.tolerance, steps=STEPS, seconds=self.seconds)
        behind = [Choice(plain, "too large for anything but products")]
        if fits:
            behind = [Choice(dense, "its matrix fits into memory")]
        if Need.GRADIENTS in curvature.offers:
            dual = replace(plain, preconditioner=Dual(memory=self.memory / 4))
            last = [Choice(dense, "its matrix fits into memory")] if fits else []
            behind = [Choice(dual, "the curvature is made of rows"), *last]

        first = self._choose_first(curvature, D, plain)
        return [first, *(choice for choice in behind if choice.solver != first.solver)]

    def _choose_first(self, curvature: Curvature, D: int, plain: CG) -> Choice:
        """Choose a preconditioner for CG: Nystrom where memory and time allow its right-hand sides, else EKFAC."""
        rank = min(Nystrom().rank, int(self.memory / (6 * D * curvature.problem.dtype.itemsize)))
        short = "memory"
        is_allowed = rank >= FEWEST
        if is_allowed and self.seconds is not None:
            needed = _estimate_seconds(curvature, rank)
            is_allowed = needed <= self.seconds / 2
            short = f"time (one pass with {rank} directions takes {needed:.0f} s)"

        if is_allowed:
            why = f"{D:,} parameters: {rank} directions take the top off the spectrum, CG does the rest"
            return Choice(replace(plain, preconditioner=Nystrom(rank, self.seed)), why)
        if Need.KRONECKER in curvature.offers:
            why = f"too little {short} for a low-rank preconditioner"
            return Choice(replace(plain, preconditioner=EKFAC(seed=self.seed)), why)
        return Choice(plain, f"too little {short} for a preconditioner, and no Kronecker factors")


def _estimate_seconds(curvature: Curvature, count: int) -> float:
    """Estimate the time of a product with so many right-hand sides, from products with 1 and with 8."""
    v = probe_signs(curvature.problem, 8, torch.Generator().manual_seed(0))
    taken = []
    for n in (1, 1, 8):  # the first fills the caches
        start = time.perf_counter()
        curvature.product(v[:n])
        taken.append(time.perf_counter() - start)
    return taken[1] + max(0.0, taken[2] - taken[1]) / 7 * (count - 1)
