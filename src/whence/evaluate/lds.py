"""The linear datamodeling score: do the scores foretell what retraining on a subset does?

    predicted(m, q) = - sum_{z in S_m} tau(q, z)        truth(m, q) = mean over repeats r of f(q) after training on S_m
    LDS(q) = Spearman over the subsets m of predicted and truth             (Park et al. 2023, TRAK; ASTRA, eq. 6)

Differs from the papers: f is lower-is-better and a positive tau says that removing z raises f, so the minus above makes
a good method score towards +1 (the formula as printed in ASTRA is anti-correlated under its own definitions). Reported
with an interval for the randomness of subsets and queries, and with the ceiling that the noise of retraining sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from whence.errors import expected

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LDS:
    """A linear datamodeling score.

    Attributes:
        per_query: (Q,) Spearman correlation of each query; NaN where predictions or targets are constant.
        mean: mean of ``per_query`` over the queries that have one; NaN if none has.
        interval: percentile bootstrap interval of ``mean``, recentred on it.
        ceiling: about the most a perfect attribution can score, sqrt(reliability) of the targets; None with one repeat.
        n_constant: number of queries left out of the mean because a correlation does not exist.
        n_subsets: M.
        n_repeats: R.
        level: the probability that the interval covers.
        resample: what the bootstrap drew anew.
        seed: of the bootstrap and of the random halves.
    """

    per_query: Floats
    mean: float
    interval: tuple[float, float]
    ceiling: float | None
    n_constant: int
    n_subsets: int
    n_repeats: int
    level: float
    resample: str
    seed: int

    def __str__(self) -> str:
        low, high = self.interval
        ceiling = "unknown (one repeat)" if self.ceiling is None else f"{self.ceiling:.3f}"
        left_out = f"; {self.n_constant} constant queries left out" if self.n_constant else ""
        return (
            f"LDS {self.mean:.3f} ({100 * self.level:g}% interval {low:.3f} to {high:.3f}; ceiling {ceiling}; "
            f"{len(self.per_query)} queries, {self.n_subsets} subsets x {self.n_repeats} repeats{left_out})"
        )


def linear_datamodeling_score(
    scores: object,
    masks: object,
    targets: object,
    *,
    repeats_axis: int = 1,
    bootstrap: int = 1000,
    resample: Literal["both", "subsets", "queries"] = "both",
    level: float = 0.95,
    splits: int = 50,
    seed: int = 0,
) -> LDS:
    """Compare attribution scores with models retrained on random subsets.

    Args:
        scores: (Q, N) tensor or array, or an object whose ``values`` is one; positive: removing z raises f(q).
            Their scale does not matter.
        masks: (M, N) bool, True where an example is in the subset.
        targets: (M, R, Q) measurements f of the queries (lower is better) after retraining on subset m with repeat r;
            (M, Q) for one repeat.
        repeats_axis: where R stands in three-dimensional targets.
        bootstrap: number of bootstrap samples of the interval.
        resample: what the bootstrap draws anew. "both" (subsets and queries, independently) is an interval for new
            subsets and new queries; the other two hold queries or subsets fixed. Noise of the repeats is part of each
            subset's mean and so is drawn with the subsets; randomness of the attributed model is not covered.
        level: the probability that the interval should cover.
        splits: number of random halvings of the repeats for the ceiling.
        seed: of the bootstrap and the halvings.

    Raises:
        InputError: if shapes disagree, a value is not finite, masks are not bool, or there are fewer than 3 subsets.
    """
    tau, kept = float_array(scores, "scores", (2,)), bool_array(masks, "masks", 2)
    f = float_array(targets, "targets", (2, 3))
    f = f[:, None] if f.ndim == 2 else np.moveaxis(f, repeats_axis, 1)  # (M, R, Q)
    _check_shapes(tau, kept, f)
    if resample not in ("both", "subsets", "queries"):
        raise expected("resample", "'both', 'subsets' or 'queries'", repr(resample))
    if bootstrap < 1 or splits < 1 or not 0 < level < 1:
        raise expected("bootstrap, splits and level", ">= 1, >= 1 and in (0, 1)", (bootstrap, splits, level))

    predicted, truth = -_subset_sums(tau, kept), f.mean(1)  # (M, Q) each
    per_query = _spearman(predicted, truth)
    finite = np.isfinite(per_query)
    rng = np.random.default_rng(seed)
    mean, interval = float("nan"), (float("nan"), float("nan"))
    if finite.any():
        means = _bootstrap_means(predicted[:, finite], truth[:, finite], bootstrap, resample, rng)
        mean = float(per_query[finite].mean())
        # A subset drawn twice ties with itself, which pulls the resampled correlations towards zero: recentre them.
        ends = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2]) - np.nanmean(means) + mean
        low, high = ends.clip(-1, 1)
        interval = (float(low), float(high))
    return LDS(
        per_query=per_query,
        mean=mean,
        interval=interval,
        ceiling=_ceiling(f, splits, rng),
        n_constant=int((~finite).sum()),
        n_subsets=f.shape[0],
        n_repeats=f.shape[1],
        level=level,
        resample=resample,
        seed=seed,
    )


def _subset_sums(tau: Floats, kept: NDArray[np.bool_]) -> Floats:
    """sum_{z in S_m} tau(q, z), (M, Q). A query whose scores are all equal gives exact ties, not rounding noise."""
    first = tau[:, :1]  # (Q, 1)
    return kept @ (tau - first).T + kept.sum(1, keepdims=True) * first.T


def _spearman(a: Floats, b: Floats) -> Floats:
    """Spearman correlation of each column, (Q,); average ranks for ties, NaN where a column is constant."""
    a, b = (rankdata(v, axis=0) - (len(v) + 1) / 2 for v in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def _bootstrap_means(a: Floats, b: Floats, count: int, resample: str, rng: np.random.Generator) -> Floats:
    """The mean Spearman correlation in each bootstrap sample of subsets (rows) and queries (columns): (count,)."""

    def draws(n: int, anew: bool) -> Floats:  # how often each of n items is in each sample: (n, count)
        return rng.multinomial(n, np.full(n, 1 / n), size=count).T.astype(float) if anew else np.ones((n, count))

    subsets, queries = draws(len(a), resample != "queries"), draws(a.shape[1], resample != "subsets")
    total, weight = np.zeros(count), np.zeros(count)
    for q in range(a.shape[1]):
        x, y = _resampled_ranks(a[:, q], subsets), _resampled_ranks(b[:, q], subsets)
        wx, wy = subsets * x, subsets * y
        with np.errstate(invalid="ignore"):
            rho = (wx * y).sum(0) / np.sqrt((wx * x).sum(0) * (wy * y).sum(0))
        exists = np.isfinite(rho)  # a sample can happen to be constant
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


def _ceiling(f: Floats, splits: int, rng: np.random.Generator) -> float | None:
    """sqrt of the reliability of the mean over R repeats, from random halves stepped up by Spearman-Brown.

    With halves of h repeats that correlate by r, the mean of R has reliability k r / (1 + (k - 1) r), k = R / h.
    """
    repeats = f.shape[1]
    half = repeats // 2
    if half == 0:
        return None
    found = []
    for _ in range(splits):
        order = rng.permutation(repeats)
        found.append(_spearman(f[:, order[:half]].mean(1), f[:, order[half : 2 * half]].mean(1)))
    finite = np.isfinite(found)
    if not finite.any():
        return None
    r, k = max(0.0, float(np.asarray(found)[finite].mean())), repeats / half
    return float(np.sqrt(k * r / (1 + (k - 1) * r)))


def _check_shapes(tau: Floats, kept: NDArray[np.bool_], f: Floats) -> None:
    (queries, examples), subsets = tau.shape, len(kept)
    if kept.shape[1] != examples:
        raise expected(
            "masks",
            f"(M, N) with N = {examples} as in scores {tau.shape}",
            kept.shape,
            "Queries lead in scores: (Q, N).",
        )
    if (f.shape[0], f.shape[2]) != (subsets, queries):
        raise expected(
            "targets",
            f"(M, R, Q) with M = {subsets} as in masks {kept.shape} and Q = {queries} as in scores {tau.shape}",
            f.shape,
            "Say where the repeats stand with repeats_axis, or give (M, Q) for one repeat.",
        )
    if subsets < 3:
        raise expected("masks", "at least 3 subsets", subsets, "A rank correlation needs more; 100 is usual.")


def float_array(value: object, what: str, ndims: tuple[int, ...]) -> Floats:
    """A tensor, an array or an object with ``values`` as a finite float64 array.

    Raises:
        InputError: if it has another number of dimensions, is empty, or is not finite.
    """
    array = _array(value, what).astype(np.float64)
    if array.ndim not in ndims or array.size == 0:
        raise expected(what, f"a non-empty array of {' or '.join(map(str, ndims))} dimensions", array.shape)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise expected(what, "finite", f"{bad} NaN or infinite values", "Look for a solve or a training that diverged.")
    return array


def bool_array(value: object, what: str, ndim: int) -> NDArray[np.bool_]:
    """A tensor or an array of bool as an array.

    Raises:
        InputError: if it is not bool, has another number of dimensions, or is empty.
    """
    array = _array(value, what)
    if array.dtype != np.bool_:
        raise expected(what, "bool", array.dtype, "Indices and 0/1 numbers are ambiguous; use == 1 on the latter.")
    if array.ndim != ndim or array.size == 0:
        raise expected(what, f"a non-empty array of {ndim} dimensions", array.shape)
    return array


def _array(value: object, what: str) -> NDArray:
    if not isinstance(value, (Tensor, np.ndarray)):
        value = getattr(value, "values", value)
    if isinstance(value, Tensor):
        array = (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
    else:
        array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise expected(what, "a tensor or an array of real numbers", f"{type(value).__name__} of {array.dtype}")
    return array
