"""How the scores of an approximate inverse agree with accurate ones, found within a budget.

A method such as EKFAC answers for an approximation of C. The residual with the true C may be 10 or 1e4 and says little
on what its scores are good for, and measuring it can cost many times what the scores do. So one or two drawn queries
are also solved accurately, and what is shown is how their scores agree. Nothing of this takes longer than the fit and
the scores did, or than two seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from wherefrom.data.examples import Examples
from wherefrom.errors import DivergenceError
from wherefrom.methods.stream import score_stream
from wherefrom.persample import gradients
from wherefrom.persample.directions import Directions, concatenate
from wherefrom.persample.gradients import Gradients
from wherefrom.scores import Certificate
from wherefrom.solvers.auto import Auto
from wherefrom.solvers.base import Inverse, relative_norm
from wherefrom.solvers.cg import CG, ConjugateGradients
from wherefrom.solvers.identity import IdentityInverse

TOLERANCE = Auto.tolerance  # of the accurate solve: that at which scores stop changing
DRAWN = 2  # queries that are solved accurately
TOP = 10  # proponents that are compared
FLOOR = 2.0  # seconds that a certificate may always take
SAMPLE = 16  # examples on which a product is timed
STEPS = 3  # products without which an accurate solve is not begun


@dataclass(frozen=True)
class Costs:
    """Seconds of a product with C over all the training data: ``base`` and so many more for each right-hand side."""

    base: float
    each: float

    def of(self, count: int) -> float:
        """Return those of a product with so many right-hand sides."""
        return self.base + self.each * count


def certify(
    inverse: Inverse,
    queries: Iterable[Gradients],
    values: Tensor,
    scored: Examples | None,
    certificate: Certificate,
    spent: float,
    scoring: float,
) -> Certificate:
    """Add to a certificate what can be said of the scores of an approximate inverse.

    Args:
        inverse: what made the scores.
        queries: their gradients, in pieces that can be read again.
        values: the scores, (Q, n).
        scored: the examples of the columns; None: the training set.
        certificate: of the solve.
        spent: seconds that the fit, the solutions and the scores took.
        scoring: seconds of those that the scores took.

    Returns:
        The certificate with the agreement; with the residual too, where measuring it costs little beside the rest; and
        with the passes and seconds that all this took.
    """
    start = time.perf_counter()
    allowed = max(FLOOR, spent)
    Q = len(values)
    drawn = torch.randperm(Q, generator=torch.Generator().manual_seed(0), device="cpu")[:DRAWN].sort().values
    rows = _pick(queries, drawn)
    costs = _time_products(inverse, rows.dense(), allowed)

    residual, passes = None, 0.0
    if costs.of(Q) <= allowed / 2:
        residual = torch.cat([_measure_residual(inverse, piece) for piece in queries])
        passes = 1.0

    left = allowed - (time.perf_counter() - start) - scoring
    count = len(drawn)
    while count and STEPS * costs.of(count) > left:
        count -= 1
    if count:
        budget = left - costs.of(count)
        agreement, steps = _agree(inverse, rows[:count], drawn[:count], values, scored, budget)
        passes += steps
    else:
        needed = STEPS * costs.of(1) + scoring
        agreement = _unchecked(f"it would take about {needed:.0f} s, and the fit and the scores took {spent:.0f} s")
    return replace(
        certificate, residual=residual, agreement=agreement, passes=passes, seconds=time.perf_counter() - start
    )


def _agree(
    inverse: Inverse, rows: Gradients, drawn: Tensor, values: Tensor, scored: Examples | None, seconds: float
) -> tuple[dict[str, Any], float]:
    """Solve the drawn queries accurately and compare their scores.

    Returns:
        The agreement, and the passes over the training data that it took.
    """
    curvature, damping = inverse.curvature, inverse.damping
    # The inverse itself preconditions where it can, as it is near the answer.
    preconditioner = inverse if inverse.is_positive_definite else IdentityInverse(curvature, damping)
    solver = CG(tolerance=TOLERANCE, seconds=seconds)
    try:
        iterates = ConjugateGradients(curvature, damping, solver, preconditioner).iterate(rows.dense())
    except DivergenceError:
        return _unchecked("C is not positive definite, so that CG cannot solve accurately"), 0.0
    if iterates.history is None or not bool((iterates.history[-1] <= TOLERANCE).all()):
        return _unchecked(f"an accurate solve took more than {seconds:.0f} s"), iterates.passes
    accurate = score_stream(curvature.problem, iterates.x, scored, "accurate scores")
    return compare(values[drawn.to(values.device)], accurate, drawn), iterates.passes


def compare(values: Tensor, accurate: Tensor, drawn: Tensor) -> dict[str, Any]:
    """Compare scores (m, n) with accurate ones (m, n): their agreement, of the worst of the m queries."""
    top = min(TOP, max(1, values.shape[1] // 4))  # of few examples, fewer: else any scores would share them
    correlations, shared = [], []
    for mine, right in zip(values.double().cpu(), accurate.double().cpu(), strict=True):
        correlations.append(_rank_correlation(mine, right))
        best = set(mine.topk(top).indices.tolist()) & set(right.topk(top).indices.tolist())
        shared.append(len(best))
    if any(math.isnan(correlation) for correlation in correlations):
        return _unchecked("the scores of a query are all the same")
    worst = {"rank correlation": min(correlations), "shared": min(shared), "top": top}
    return {"queries": drawn.tolist(), **worst, "tolerance": TOLERANCE}


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Compute Spearman's, of vectors (n,); NaN for fewer than two numbers or equal ones."""
    if len(a) < 2:
        return float("nan")
    result: Any = spearmanr(a.numpy(), b.numpy())
    return float(result.statistic)


def _unchecked(why: str) -> dict[str, Any]:
    return {"not checked": why}


def _pick(pieces: Iterable[Gradients], numbers: Tensor) -> Gradients:
    """Take the gradients of some queries, in increasing order."""
    picked, start = [], 0
    for piece in pieces:
        here = numbers[(numbers >= start) & (numbers < start + len(piece))] - start
        if len(here):
            picked.append(piece[here.to(piece.weights.device)])
        start += len(piece)
    return gradients.concatenate(picked)


def _measure_residual(inverse: Inverse, rows: Gradients) -> Tensor:
    """Measure the residual of each of Q right-hand sides with the true operator, (Q,)."""
    b = rows.dense()
    return relative_norm(inverse.residual_vector(inverse.apply(b), b), b)


def _time_products(inverse: Inverse, b: Directions, allowed: float) -> Costs:
    """Time products over a small part of the training data, with one right-hand side and with two."""
    problem = inverse.curvature.problem
    N = len(problem.train)
    size = min(N, problem.train.batch_size, max(SAMPLE, N // 16))
    one = b[:1]

    def time_product(v: Directions) -> float:
        start = time.perf_counter()
        inverse.curvature.product(v, torch.arange(size, device="cpu"))
        return (time.perf_counter() - start) * N / size

    # The first in a process loads what PyTorch has for forward mode.
    inverse.curvature.product(one, torch.arange(1, device="cpu"))
    single = time_product(one)
    if single > allowed:
        return Costs(single, single)
    double = time_product(concatenate([one, one]))
    each = min(single, max(0.0, double - single))
    return Costs(single - each, each)
