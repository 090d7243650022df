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

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats, bool_array, float_array
from wherefrom.tools.evaluate.statistics import Bootstrap, QueryMean, correlate, estimate_reliability


@dataclass(frozen=True)
class LDS(QueryMean):
    """A linear datamodeling score: the Spearman correlation of each query, and their mean.

    Attributes:
        ceiling: about the most a perfect attribution can score, sqrt(reliability) of the targets; None with one repeat.
        n_subsets: M.
        n_repeats: R.
        resample: what the bootstrap drew anew.
        seed: of the bootstrap and of the random halves.
    """

    ceiling: float | None
    n_subsets: int
    n_repeats: int
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
    tau = float_array(scores, "scores", (2,))
    subsets = bool_array(masks, "masks", 2)
    f = float_array(targets, "targets", (2, 3))
    f = f[:, None] if f.ndim == 2 else np.moveaxis(f, repeats_axis, 1)  # (M, R, Q)
    _check_shapes(tau, subsets, f)
    if resample not in ("both", "subsets", "queries"):
        raise expected("resample", "'both', 'subsets' or 'queries'", repr(resample))
    if splits < 1:
        raise expected("splits", ">= 1", splits)

    rng = np.random.default_rng(seed)
    predicted = -_sum_over_subsets(tau, subsets)  # (M, Q)
    truth = f.mean(1)  # (M, Q)
    drawn = "rows" if resample == "subsets" else resample
    correlation = correlate(predicted, truth, Bootstrap(bootstrap, level, rng), resample=drawn)
    reliability = estimate_reliability(f, splits, rng)
    return LDS(
        **vars(correlation),
        # A perfect attribution correlates with the measured mean by the root of that mean's reliability.
        ceiling=None if reliability is None else float(np.sqrt(reliability)),
        n_subsets=f.shape[0],
        n_repeats=f.shape[1],
        resample=resample,
        seed=seed,
    )


def _sum_over_subsets(tau: Floats, subsets: NDArray[np.bool_]) -> Floats:
    """Compute sum_{z in S_m} tau(q, z), (M, Q)."""
    # A query whose scores are all equal gives exact ties in this way, and rounding noise in the plain product.
    first = tau[:, :1]  # (Q, 1)
    sizes = subsets.sum(1, keepdims=True)  # (M, 1)
    return subsets @ (tau - first).T + sizes * first.T


def _check_shapes(tau: Floats, subsets: NDArray[np.bool_], f: Floats) -> None:
    (queries, examples), n_subsets = tau.shape, len(subsets)
    if subsets.shape[1] != examples:
        raise expected(
            "masks",
            f"(M, N) with N = {examples} as in scores {tau.shape}",
            subsets.shape,
            "Queries lead in scores: (Q, N).",
        )
    if (f.shape[0], f.shape[2]) != (n_subsets, queries):
        raise expected(
            "targets",
            f"(M, R, Q) with M = {n_subsets} as in masks {subsets.shape} and Q = {queries} as in scores {tau.shape}",
            f.shape,
            "Say where the repeats stand with repeats_axis, or give (M, Q) for one repeat.",
        )
    if n_subsets < 3:
        raise expected("masks", "at least 3 subsets", n_subsets, "A rank correlation needs more; 100 is usual.")
