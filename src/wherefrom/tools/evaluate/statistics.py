"""Ranks, correlations and bootstrap intervals, written once for the whole room.

Intervals are percentile bootstrap intervals. Ties have the mean of their ranks; where an order is needed, ties are
broken at random, never by the number of the example, which often follows the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats

Resample = Literal["both", "rows", "queries"]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        count: number of samples drawn with replacement.
        level: the probability that an interval should cover.
        rng: what is drawn from.
    """

    count: int
    level: float
    rng: np.random.Generator

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.level < 1:
            raise expected("bootstrap and level", ">= 1 and in (0, 1)", (self.count, self.level))

    def draws(self, n: int) -> Floats:
        """How often each of n items is in each sample, (n, count)."""
        return self.rng.multinomial(n, np.full(n, 1 / n), size=self.count).T.astype(float)

    def ends(self, samples: Floats) -> Floats:
        """The interval of samples (..., count): (..., 2)."""
        return np.moveaxis(np.nanquantile(samples, [(1 - self.level) / 2, (1 + self.level) / 2], axis=-1), 0, -1)

    def of_mean(self, values: Floats) -> Floats:
        """Intervals of means over the last axis of values (..., n), which is drawn anew: (..., 2)."""
        return self.ends(values @ self.draws(values.shape[-1]) / values.shape[-1])


@dataclass(frozen=True)
class QueryMean:
    """A number for each query, and their mean.

    Attributes:
        per_query: (Q,); NaN where it does not exist, as a correlation with a constant.
        mean: over the queries that have one; NaN if none has.
        interval: bootstrap interval of ``mean``.
        n_constant: number of queries left out of the mean.
        level: the probability that the interval covers.
    """

    per_query: Floats
    mean: float
    interval: tuple[float, float]
    n_constant: int
    level: float

    def __str__(self) -> str:
        low, high = self.interval
        left_out = f"; {self.n_constant} constant queries left out" if self.n_constant else ""
        return f"{self.mean:.3f} ({100 * self.level:g}% interval {low:.3f} to {high:.3f}{left_out})"


def places(values: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """The place of each item of values (..., n) in its row's order, 0 for the largest; ties in random order."""
    return np.argsort(np.lexsort((rng.random(values.shape), -values)))


def pearson(a: Floats, b: Floats) -> Floats:
    """Pearson correlation of each column of (M, Q) and (M, Q): (Q,); NaN where a column is constant."""
    a, b = (v - v[:1] for v in (a, b))  # so that a constant column is exactly zero
    a, b = (v - v.mean(0) for v in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def spearman(a: Floats, b: Floats) -> Floats:
    """Spearman correlation of each column, (Q,); average ranks for ties, NaN where a column is constant."""
    return pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def query_mean(per_query: Floats, bootstrap: Bootstrap) -> QueryMean:
    """The mean of a number per query (Q,), with an interval for new queries."""
    return _summary(per_query, lambda finite: bootstrap.of_mean(per_query[finite]), bootstrap.level)


def correlation(
    a: Floats, b: Floats, bootstrap: Bootstrap, ranked: bool = True, resample: Resample = "both"
) -> QueryMean:
    """The correlation of each column of (M, Q) and (M, Q), and its mean over the columns.

    Args:
        a, b: rows are what is correlated over, such as subsets; columns are queries.
        bootstrap: of the mean; the interval is recentred on it.
        ranked: Spearman's; else Pearson's.
        resample: what is drawn anew, rows and queries independently, or one of them.
    """

    def interval(finite: NDArray[np.bool_]) -> Floats:
        means = _bootstrap_means(a[:, finite], b[:, finite], bootstrap, ranked, resample)
        # A row drawn twice ties with itself, which pulls the resampled correlations towards zero: recentre them.
        return (bootstrap.ends(means) - np.nanmean(means) + per_query[finite].mean()).clip(-1, 1)

    per_query = (spearman if ranked else pearson)(a, b)
    return _summary(per_query, interval, bootstrap.level)


def reliability(f: Floats, splits: int, rng: np.random.Generator) -> float | None:
    """Reliability of the ranks of the mean over R repeats of f (M, R, Q), a mean over queries; None if it has none.

    From random halves stepped up by Spearman-Brown: if means of h repeats correlate by r over the rows, the mean of R
    has reliability k r / (1 + (k - 1) r), k = R / h.
    """
    repeats = f.shape[1]
    half = repeats // 2
    if half == 0:
        return None
    found = []
    for _ in range(splits):
        order = rng.permutation(repeats)
        found.append(spearman(f[:, order[:half]].mean(1), f[:, order[half : 2 * half]].mean(1)))
    finite = np.isfinite(found)
    if not finite.any():
        return None
    r, k = max(0.0, float(np.asarray(found)[finite].mean())), repeats / half
    return k * r / (1 + (k - 1) * r)


def _summary(per_query: Floats, interval: Callable[[NDArray[np.bool_]], Floats], level: float) -> QueryMean:
    finite = np.isfinite(per_query)
    if not finite.any():
        return QueryMean(per_query, float("nan"), (float("nan"), float("nan")), len(per_query), level)
    low, high = interval(finite)
    return QueryMean(per_query, float(per_query[finite].mean()), (float(low), float(high)), int((~finite).sum()), level)


def _bootstrap_means(a: Floats, b: Floats, bootstrap: Bootstrap, ranked: bool, resample: Resample) -> Floats:
    """The mean correlation in each bootstrap sample of rows and queries (columns): (count,)."""
    rows = np.ones((len(a), 1)) if resample == "queries" else bootstrap.draws(len(a))
    queries = np.ones((a.shape[1], 1)) if resample == "rows" else bootstrap.draws(a.shape[1])
    centred = _resampled_ranks if ranked else _resampled_values
    total, weight = np.zeros(bootstrap.count), np.zeros(bootstrap.count)
    for q in range(a.shape[1]):
        x, y = centred(a[:, q], rows), centred(b[:, q], rows)
        wx, wy = rows * x, rows * y
        with np.errstate(invalid="ignore"):
            rho = (wx * y).sum(0) / np.sqrt((wx * x).sum(0) * (wy * y).sum(0))
        exists = np.isfinite(rho) & ((rows > 0).sum(0) > 1)  # a sample can happen to be constant
        total += np.where(exists, queries[q] * rho, 0)
        weight += queries[q] * exists
    with np.errstate(invalid="ignore"):
        return total / weight


def _resampled_ranks(values: Floats, weights: Floats) -> Floats:
    """Centred average ranks (M, B) of values (M,) in samples that hold value m weights[m, b] times."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    held = np.add.reduceat(weights[np.argsort(group)], np.cumsum(sizes) - sizes, axis=0)  # (distinct values, B)
    ranks = np.cumsum(held, axis=0) - held / 2 - len(values) / 2
    return ranks[group]


def _resampled_values(values: Floats, weights: Floats) -> Floats:
    """The values (M,) minus their mean in each sample: (M, B)."""
    values = values - values[0]
    return values[:, None] - values @ weights / len(values)
