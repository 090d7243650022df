"""The certificate of an approximate inverse: how its scores agree with accurate ones, found within a budget.

A method such as EKFAC answers for an approximation of C. The residual with the true C may be 10 or 1e4 and says little
on what its scores are good for, and measuring it can cost many times what the scores do. So one or two drawn queries
are also solved accurately, and what is shown is how their scores agree. Nothing of this takes longer than the fit and
the scores did, or than two seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from wherefrom.data.examples import Examples
from wherefrom.errors import DivergenceError
from wherefrom.methods.stream import streamed
from wherefrom.persample import gradients, vectors
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.auto import Auto
from wherefrom.solvers.base import Inverse, Pairing, relative
from wherefrom.solvers.cg import CG, ConjugateGradients
from wherefrom.solvers.identity import Unit
from wherefrom.solvers.kronecker import EigenInverse

TOLERANCE = Auto.tolerance  # of the accurate solve: that at which scores stop changing
DRAWN = 2  # queries that are solved accurately
TOP = 10  # proponents that are compared
FLOOR = 2.0  # seconds that a certificate may always take
SAMPLE = 16  # examples on which a product is timed
STEPS = 3  # products without which an accurate solve is not begun


@dataclass(frozen=True)
class Checked:
    """What was found.

    Args:
        residual: of each query with the true operator, (Q,); None if measuring it would have cost too much.
        agreement: see `Scores.agreement`.
        passes: over the training data.
        seconds: that it took.
    """

    residual: Tensor | None
    agreement: dict[str, Any]
    passes: float
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a product with C over all the training data: ``base`` and so many more for each right-hand side."""

    base: float
    each: float

    def of(self, count: int) -> float:
        """Those of a product with so many right-hand sides."""
        return self.base + self.each * count


def check(
    inverse: Inverse,
    make_rows: Callable[[], Iterable[Gradients]],
    values: Tensor,
    scored: Examples | None,
    spent: float,
    scoring: float,
) -> Checked:
    """Certify the scores of an approximate inverse.

    Args:
        inverse: what made the scores.
        make_rows: the queries' gradients, in pieces.
        values: the scores, (Q, n).
        scored: the examples of the columns; None: the training set.
        spent: seconds that the fit, the solutions and the scores took.
        scoring: seconds of those that the scores took.
    """
    start = time.perf_counter()
    allowed = max(FLOOR, spent)
    Q = len(values)
    drawn = torch.randperm(Q, generator=torch.Generator().manual_seed(0), device="cpu")[:DRAWN].sort().values
    rows = _pick(make_rows(), drawn)
    costs = _time_products(inverse, rows.dense(), allowed)
    residual, passes = None, 0.0
    if costs.of(Q) <= allowed / 2:
        residual = torch.cat([_residual(inverse, piece.dense()) for piece in make_rows()])
        passes = 1.0
    left = allowed - (time.perf_counter() - start) - scoring
    count = next((m for m in range(len(drawn), 0, -1) if STEPS * costs.of(m) <= left), 0)
    if count:
        agreement, steps = _agree(inverse, rows[:count], drawn[:count], values, scored, left - costs.of(count))
        passes += steps
    else:
        needed = STEPS * costs.of(1) + scoring
        agreement = _unchecked(f"it would take about {needed:.0f} s, and the fit and the scores took {spent:.0f} s")
    return Checked(residual, agreement, passes, time.perf_counter() - start)


def _agree(
    inverse: Inverse, rows: Gradients, drawn: Tensor, values: Tensor, scored: Examples | None, seconds: float
) -> tuple[dict[str, Any], float]:
    """Solve the drawn queries accurately and compare their scores; the passes that took."""
    problem = inverse.curvature.problem
    positive = isinstance(inverse, EigenInverse)  # else the inverse may be no preconditioner
    preconditioner = inverse if positive else Unit(inverse.curvature, inverse.shift)
    solver = CG(tolerance=TOLERANCE, seconds=seconds)
    try:
        x, history, passes = ConjugateGradients(inverse.curvature, inverse.shift, solver, preconditioner).solve(
            rows.dense()
        )
    except DivergenceError:
        return _unchecked("C is not positive definite, so that CG cannot solve accurately"), 0.0
    if not bool((history[-1] <= TOLERANCE).all()):
        return _unchecked(f"an accurate solve took more than {seconds:.0f} s"), passes
    accurate = streamed(problem, Pairing.of(x, problem.blocks), scored, "accurate scores")
    return compare(values[drawn.to(values.device)], accurate, drawn), passes


def compare(values: Tensor, accurate: Tensor, drawn: Tensor) -> dict[str, Any]:
    """The agreement of scores (m, n) with accurate ones (m, n), of the worst of the m queries."""
    top = min(TOP, max(1, values.shape[1] // 4))  # of few examples, fewer: else any scores would share them
    correlations, shared = [], []
    for mine, right in zip(values.double().cpu(), accurate.double().cpu(), strict=True):
        correlations.append(_rank_correlation(mine, right))
        best = set(mine.topk(top).indices.tolist()) & set(right.topk(top).indices.tolist())
        shared.append(len(best))
    if not all(c == c for c in correlations):
        return _unchecked("the scores of a query are all the same")
    worst = {"rank correlation": min(correlations), "shared": min(shared), "top": top}
    return {"queries": drawn.tolist(), **worst, "tolerance": TOLERANCE}


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of vectors (n,); NaN for fewer than two numbers or equal ones."""
    if len(a) < 2:
        return float("nan")
    found: Any = spearmanr(a.numpy(), b.numpy())
    return float(found.statistic)


def _unchecked(why: str) -> dict[str, Any]:
    return {"not checked": why}


def _pick(pieces: Iterable[Gradients], numbers: Tensor) -> Gradients:
    """The gradients of some queries, in increasing order."""
    found, start = [], 0
    for piece in pieces:
        here = numbers[(numbers >= start) & (numbers < start + len(piece))] - start
        if len(here):
            found.append(piece[here.to(piece.weights.device)])
        start += len(piece)
    return gradients.concatenate(found)


def _residual(inverse: Inverse, b: Vectors) -> Tensor:
    """The residual of each of Q right-hand sides with the true operator, (Q,)."""
    return relative(inverse.residual_vector(inverse.apply(b), b), b)


def _time_products(inverse: Inverse, b: Vectors, allowed: float) -> Costs:
    """Time products over a small part of the training data, with one right-hand side and with two."""
    problem = inverse.curvature.problem
    N = len(problem.train)
    size = min(N, problem.train.batch_size, max(SAMPLE, N // 16))
    one = vectors.select(b, torch.zeros(1, dtype=torch.long, device="cpu"))

    def seconds(v: Vectors) -> float:
        start = time.perf_counter()
        inverse.curvature.product(v, torch.arange(size, device="cpu"))
        return (time.perf_counter() - start) * N / size

    inverse.curvature.product(
        one, torch.arange(1, device="cpu")
    )  # the first in a process loads what PyTorch has for forward mode
    single = seconds(one)
    if single > allowed:
        return Costs(single, single)
    double = seconds(vectors.concatenate([one, one]))
    each = min(single, max(0.0, double - single))
    return Costs(single - each, each)
