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
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.errors import DivergenceError, UnsupportedError
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver, positive, relative, saved_tensor
from wherefrom.solvers.cg import CG
from wherefrom.solvers.exact import Exact, dimensions
from wherefrom.solvers.gram import Dual
from wherefrom.solvers.kronecker import EKFAC
from wherefrom.solvers.nystrom import Nystrom

logger = logging.getLogger("wherefrom")

SMALL = 1500  # side of a dense matrix that is decomposed without a second thought
STEPS = 50  # of CG before the next solver is tried


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it."""

    solver: Solver
    why: str

    @property
    def name(self) -> str:
        """The preconditioner's class, or the solver's own."""
        return type(getattr(self.solver, "preconditioner", self.solver)).__name__


class AutoInverse(Inverse):
    """The chosen inverse; the ones behind it are fitted only if they are needed."""

    def __init__(self, curvature: Curvature, shift: Shift, solver: Auto, choices: list[Choice]):
        super().__init__(curvature, shift)
        self.tolerance, self.limit, self.choices = solver.tolerance, 0.95 * solver.tolerance, choices
        self.damping, self.seconds = Damping.by_parameter(shift), solver.seconds
        self.fitted: dict[int, Inverse] = {}  # by place among the choices

    def apply(self, b: Vectors) -> Vectors:
        """x alone."""
        return self.solve(b)[0]

    def solve(self, b: Vectors) -> tuple[Vectors, Tensor, float]:
        """Each choice in turn solves for what the ones before it left of the queries that did not converge."""
        x, residual = vectors.zeros_like(b), (vectors.norm(b) > 0).double()
        late = residual.nonzero()[:, 0]  # queries that have not converged; a right-hand side of 0 has
        history, passes, start = [residual], 0.0, time.perf_counter()
        for i, choice in enumerate(self.choices if len(late) else []):
            some = {name: t[late] for name, t in b.items()}
            rest = some if i == 0 else self.residual_vector({name: t[late] for name, t in x.items()}, some)
            try:
                found, steps, spent = self._fit(i).solve(rest)
            except (UnsupportedError, DivergenceError) as error:
                if i + 1 == len(self.choices):
                    raise
                following = self.choices[i + 1]
                logger.info("%r cannot solve this (%s): going on with %r", choice.solver, error, following.solver)
                continue
            share = vectors.norm(rest) / vectors.norm(some).clamp(min=1e-300)
            if not len(steps):  # a direct method: its residual is measured
                left = {n: t[late] + found[n] for n, t in x.items()}
                steps, spent = relative(self.residual_vector(left, some), some).unsqueeze(0) / share, spent + 1
            for name, t in x.items():
                t[late] += found[name]
            for r in steps[1:] if len(steps) > 1 else steps:
                residual = residual.index_copy(0, late.to(r.device), (r * share).to(residual))
                history.append(residual)
            passes += spent + (i > 0)
            late = (residual > self.limit).nonzero()[:, 0]
            if not len(late) or (self.seconds is not None and time.perf_counter() - start > self.seconds):
                break
            if i + 1 < len(self.choices):
                following = self.choices[i + 1]
                logger.info("%d queries above %g: going on with %r", len(late), self.tolerance, following.solver)
        return x, torch.stack(history), passes

    def report(self) -> dict[str, float | str]:
        """What was chosen and why, and what else had to be fitted."""
        first = {"solver": repr(self.choices[0].solver), "because": self.choices[0].why}
        more = [repr(c.solver) for i, c in enumerate(self.choices) if i and i in self.fitted]
        return first | ({"then": ", ".join(more)} if more else {}) | self._fit(0).report()

    def state(self) -> dict[str, Tensor]:
        """The first choice's name, and its inverse's state."""
        return {"auto|first": torch.tensor(list(self.choices[0].name.encode()))} | self._fit(0).state()

    def begin(self) -> None:
        """Fit the first choice; one that this curvature does not allow is struck off.

        Raises:
            UnsupportedError: the last choice's, if none can be fitted.
        """
        while 0 not in self.fitted:
            try:
                self._fit(0)
            except UnsupportedError as error:
                if len(self.choices) == 1:
                    raise
                failed = self.choices.pop(0)
                logger.info("%r cannot be fitted (%s): going on with %r", failed.solver, error, self.choices[0].solver)

    def _fit(self, i: int) -> Inverse:
        if i not in self.fitted:
            self.fitted[i] = self.choices[i].solver.fit(self.curvature, self.damping)
        return self.fitted[i]


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
        positive(tolerance=self.tolerance, memory=self.memory, seconds=self.seconds)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Choose, say so in the log, and fit the first choice."""
        self.check(curvature)
        inverse = AutoInverse(curvature, Damping.of(damping).resolve(curvature), self, self.choices(curvature))
        inverse.begin()
        logger.info("chose %r: %s", inverse.choices[0].solver, inverse.choices[0].why)
        return inverse

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the state of the first choice."""
        first = bytes(saved_tensor(state, "auto|first", None, dtype=torch.int64).tolist()).decode()
        choices = self.choices(curvature, first)
        while len(choices) > 1 and choices[0].name != first:
            del choices[0]
        inverse = AutoInverse(curvature, shift, self, choices)
        inverse.fitted[0] = choices[0].solver.restore(curvature, shift, state)
        return inverse

    def choices(self, curvature: Curvature, first: str | None = None) -> list[Choice]:
        """The first choice, or the one whose name is given, and what to fall back on, in order."""
        sizes = dimensions(curvature)
        side, D = min(sizes.values()), int(sizes["primal"])
        exact = [Choice(Exact(memory=self.memory), "its matrix fits into memory")] if self._fits(side) else []
        if side <= SMALL and exact:
            return [Choice(Exact(memory=self.memory), f"a {side:,.0f} x {side:,.0f} matrix is decomposed in seconds")]
        plain = CG(tolerance=self.tolerance, steps=STEPS, seconds=self.seconds)
        behind = exact or [Choice(plain, "too large for anything but products")]
        if Need.GRADIENTS in curvature.offers:
            dual = CG(Dual(memory=self.memory / 4), self.tolerance, STEPS, seconds=self.seconds)
            behind = [Choice(dual, "the curvature is made of rows"), *exact]
        leading = self._first(curvature, D, first)
        return [leading, *(c for c in behind if c.solver != leading.solver)]

    def _first(self, curvature: Curvature, D: int, name: str | None) -> Choice:
        rank = min(Nystrom().rank, int(self.memory / (6 * D * curvature.problem.dtype.itemsize)))
        allowed = rank >= 20 and name in (None, "Nystrom")
        why = f"{D:,} parameters: {rank} directions take the top off the spectrum, CG does the rest"
        short = "memory"
        if allowed and name is None and self.seconds is not None:
            needed = _seconds(curvature, rank)
            allowed, short = needed <= self.seconds / 2, f"time (one pass with {rank} directions takes {needed:.0f} s)"
        options = {"tolerance": self.tolerance, "steps": STEPS, "seconds": self.seconds}
        if allowed:
            return Choice(CG(Nystrom(rank, self.seed), **options), why)
        if Need.KRONECKER in curvature.offers and name in (None, "EKFAC"):
            return Choice(CG(EKFAC(seed=self.seed), **options), f"too little {short} for a low-rank preconditioner")
        return Choice(CG(**options), f"too little {short} for a preconditioner, and no Kronecker factors")

    def _fits(self, side: float) -> bool:
        return 3 * 8 * side**2 <= self.memory


def _seconds(curvature: Curvature, count: int) -> float:
    """Time of a product with so many right-hand sides, from products with 1 and with 8."""
    v = vectors.random_signs(curvature.problem.shapes, 8, torch.Generator().manual_seed(0), curvature.problem.dtype)
    v = {name: t.to(curvature.problem.device) for name, t in v.items()}
    taken = []
    for n in (1, 1, 8):  # the first fills the caches
        start = time.perf_counter()
        curvature.product({name: t[:n] for name, t in v.items()})
        taken.append(time.perf_counter() - start)
    return taken[1] + max(0.0, taken[2] - taken[1]) / 7 * (count - 1)
