"""Ranks, correlations and bootstrap intervals, written once for the whole room.

Correlations and ranks are scipy's, one for each query. Intervals are percentile bootstrap intervals;
`scipy.stats.bootstrap` draws along one axis only, whereas here the rows (subsets of the training data, say) and the
queries are drawn anew independently, so that the drawing is ours. Ties have the mean of their ranks; where an order is
needed, ties are broken at random, never by the number of the example, which often follows the class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, rankdata

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats

Resample = Literal["both", "rows", "queries"]


@dataclass(frozen=True)
class Bootstrap:
    """How bootstrap intervals are computed.

    Attributes:
        count: B, the number of samples drawn with replacement.
        level: the probability that an interval should cover.
        rng: what is drawn from.
    """

    count: int
    level: float
    rng: np.random.Generator

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.level < 1:
            raise expected("bootstrap and level", ">= 1 and in (0, 1)", (self.count, self.level))

    def draw_counts(self, n: int) -> Floats:
        """Draw B samples of n items with replacement: how often each item is in each sample, (n, B)."""
        uniform = np.full(n, 1 / n)
        return self.rng.multinomial(n, uniform, size=self.count).T.astype(float)

    def percentile_interval(self, samples: Floats) -> Floats:
        """Take the interval of a statistic from its values in the samples, (..., B): (..., 2). NaN is left out."""
        tails = [(1 - self.level) / 2, (1 + self.level) / 2]
        ends = np.nanquantile(samples, tails, axis=-1)  # (2, ...)
        return np.moveaxis(ends, 0, -1)

    def interval_of_mean(self, values: Floats) -> Floats:
        """Compute intervals of means over the last axis of values (..., n), which is drawn anew: (..., 2)."""
        n = values.shape[-1]
        means = values @ self.draw_counts(n) / n  # (..., B)
        return self.percentile_interval(means)


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


def rank_descending(values: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rank each item of values (..., n) in its row, 0 for the largest; ties in random order: (..., n)."""
    # The last key of lexsort decides first; the random one breaks ties.
    order = np.lexsort((rng.random(values.shape), -values))
    return np.argsort(order)  # the inverse permutation: from items by place to places by item


def pearson(a: Floats, b: Floats) -> Floats:
    """Compute the Pearson correlation of each column of (M, Q) with that of (M, Q) or (M, 1): (Q,).

    It is NaN where a column is constant.
    """
    if len(a) < 2:
        return np.full(np.broadcast_shapes(a.shape, b.shape)[1:], np.nan)
    with warnings.catch_warnings():
        # A constant column is no accident here: the NaN says so, and `QueryMean` counts them.
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.simplefilter("ignore", NearConstantInputWarning)
        result: Any = pearsonr(a, b, axis=0)
        return np.asarray(result.statistic)


def spearman(a: Floats, b: Floats) -> Floats:
    """Compute the Spearman correlation of each column, as `pearson` does; ties have the mean of their ranks."""
    return pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def average_queries(per_query: Floats, bootstrap: Bootstrap) -> QueryMean:
    """Average a number per query, (Q,), with an interval for new queries."""

    def interval(exists: NDArray[np.bool_]) -> Floats:
        return bootstrap.interval_of_mean(per_query[exists])

    return _summarise(per_query, interval, bootstrap.level)


def correlate(
    a: Floats, b: Floats, bootstrap: Bootstrap, ranked: bool = True, resample: Resample = "both"
) -> QueryMean:
    """Correlate each column of (M, Q) with that of (M, Q), and average over the columns.

    Args:
        a, b: rows are what is correlated over, such as subsets; columns are queries.
        bootstrap: of the mean; the interval is recentred on it.
        ranked: Spearman's; else Pearson's.
        resample: what is drawn anew, rows and queries independently, or one of them.
    """
    per_query = (spearman if ranked else pearson)(a, b)

    def interval(exists: NDArray[np.bool_]) -> Floats:
        means = _resample_means(a[:, exists], b[:, exists], bootstrap, ranked, resample)
        ends = bootstrap.percentile_interval(means)
        # A row drawn twice ties with itself, which pulls the resampled correlations towards zero: recentre them.
        shift = per_query[exists].mean() - np.nanmean(means)
        return (ends + shift).clip(-1, 1)

    return _summarise(per_query, interval, bootstrap.level)


def estimate_reliability(f: Floats, splits: int, rng: np.random.Generator) -> float | None:
    """Estimate the reliability of the ranks of the mean over R repeats of f (M, R, Q), a mean over queries.

    From random halves stepped up by Spearman-Brown: if means of h repeats correlate by r over the rows, the mean of R
    has reliability k r / (1 + (k - 1) r), k = R / h.

    Args:
        f: measurements, (M, R, Q).
        splits: number of random halvings.
        rng: of the halvings.

    Returns:
        The reliability, at least 0; None with one repeat, or if all columns are constant.
    """
    repeats = f.shape[1]
    half = repeats // 2
    if half == 0:
        return None

    correlations = []
    for _ in range(splits):
        order = rng.permutation(repeats)
        first_half, second_half = order[:half], order[half : 2 * half]
        correlations.append(spearman(f[:, first_half].mean(1), f[:, second_half].mean(1)))  # (Q,)
    exists = np.isfinite(correlations)
    if not exists.any():
        return None

    r = max(0.0, float(np.asarray(correlations)[exists].mean()))
    k = repeats / half
    return k * r / (1 + (k - 1) * r)


def _summarise(per_query: Floats, interval: Callable[[NDArray[np.bool_]], Floats], level: float) -> QueryMean:
    """Average over the queries that have a number; ``interval`` is given which do."""
    exists = np.isfinite(per_query)
    n_constant = int((~exists).sum())
    if not exists.any():
        nan = float("nan")
        return QueryMean(per_query, nan, (nan, nan), n_constant, level)
    low, high = interval(exists)
    return QueryMean(per_query, float(per_query[exists].mean()), (float(low), float(high)), n_constant, level)


def _resample_means(a: Floats, b: Floats, bootstrap: Bootstrap, ranked: bool, resample: Resample) -> Floats:
    """Compute the mean correlation in each bootstrap sample of rows and queries (columns): (B,).

    A sample is never written out. Counts of how often it holds a row, and a query, are the weights of weighted means,
    so that all B samples of a query are one array.
    """
    row_counts = np.ones((len(a), 1))
    if resample != "queries":
        row_counts = bootstrap.draw_counts(len(a))  # (M, B)
    query_counts = np.ones((a.shape[1], 1))
    if resample != "rows":
        query_counts = bootstrap.draw_counts(a.shape[1])  # (Q, B)
    centre = _centre_ranks if ranked else _centre_values
    has_two_rows = (row_counts > 0).sum(0) > 1  # (B,)

    total, weight = np.zeros(bootstrap.count), np.zeros(bootstrap.count)
    for q in range(a.shape[1]):
        x, y = centre(a[:, q], row_counts), centre(b[:, q], row_counts)  # (M, B) each
        weighted_x, weighted_y = row_counts * x, row_counts * y
        with np.errstate(invalid="ignore"):
            rho = (weighted_x * y).sum(0) / np.sqrt((weighted_x * x).sum(0) * (weighted_y * y).sum(0))  # (B,)
        exists = np.isfinite(rho) & has_two_rows  # a sample can happen to be constant
        total += np.where(exists, query_counts[q] * rho, 0)
        weight += query_counts[q] * exists
    with np.errstate(invalid="ignore"):
        return total / weight


def _centre_ranks(values: Floats, counts: Floats) -> Floats:
    """Compute centred average ranks (M, B) of values (M,) in samples that hold value m counts[m, b] times."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    # How many members of each sample have each distinct value, smallest value first: (distinct values, B).
    members = np.add.reduceat(counts[np.argsort(group)], starts, axis=0)
    ranks = np.cumsum(members, axis=0) - members / 2 - len(values) / 2
    return ranks[group]


def _centre_values(values: Floats, counts: Floats) -> Floats:
    """Subtract from values (M,) their mean in each sample: (M, B)."""
    values = values - values[0]  # so that a constant column is exactly zero
    return values[:, None] - values @ counts / len(values)
