"""Leaving out: does a score say what happens if one example, or one group of examples, is left out?

    ELOO(q, z) = E_xi f(q) trained without z - E_xi f(q) trained on all      to be foretold by score / N (ASTRA, eq. 29)
    LOGO(C)    = mean over queries of f trained without the group C - f trained on all          (HyperINF, appendix D.2)

xi is the randomness of training. A single example changes less than xi does: take many repeats, paired runs (the same
xi with and without it; `retrain_small(..., paired=True)`), and judge a correlation by the reliability that comes with
it. Groups are made by ranking the examples by their mean score; HyperINF's influence has the other sign, so that
positive is good here and bad there.

Where training drops an epoch's last, smaller batch and N is a multiple of the batch size, leaving out one example costs
a whole step, which no score foretells: retrain without ``drop_last``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats, float_array, int_array
from wherefrom.tools.evaluate.removal import Runs, measure
from wherefrom.tools.evaluate.statistics import (
    Bootstrap,
    QueryMean,
    correlate,
    estimate_reliability,
    rank_descending,
    spearman,
)


@dataclass(frozen=True)
class LeaveOneOut:
    """What leaving out single examples changes, beside what the scores foretell.

    Attributes:
        examples: (E,) the numbers of those that were left out.
        changes: (Q, E), mean over repeats of f(q) without the example minus f(q) on all the data.
        errors: (Q, E), standard errors of ``changes`` over the repeats; NaN with one repeat.
        predicted: (Q, E), score / N.
        pearson: correlation over the examples of ``predicted`` and ``changes``, by query and their mean.
        spearman: the same of ranks.
        reliability: of the ranks of ``changes``, a mean over queries; its square root is about the most that
            ``spearman`` can be. None with one repeat.
        n_repeats: R.
        seed: of the bootstrap and of the random halves.
    """

    examples: NDArray[np.int64]
    changes: Floats
    errors: Floats
    predicted: Floats
    pearson: QueryMean
    spearman: QueryMean
    reliability: float | None
    n_repeats: int
    seed: int

    def __str__(self) -> str:
        reliable = "unknown (one repeat)" if self.reliability is None else f"{self.reliability:.3f}"
        return (
            f"expected leave-one-out against score / N: Pearson {self.pearson}, Spearman {self.spearman}; reliability "
            f"{reliable}; {len(self.changes)} queries, {len(self.examples)} examples x {self.n_repeats} repeats"
        )


def expected_leave_one_out(
    scores: object,
    examples: Sequence[int],
    runs: Runs,
    level: float = 0.95,
    bootstrap: int = 1000,
    splits: int = 50,
    seed: int = 0,
) -> LeaveOneOut:
    """Leave out one example at a time, retrain, and compare with the scores.

    Args:
        scores: (Q, N) tensor or array, or an object whose ``values`` is one; positive: removing z raises f(q).
        examples: (E,) the numbers of three or more examples to leave out, one by one.
        runs: masks (M, N) bool -> targets (M, R, Q), as in `removal_curve`; they should be paired.
        level: the probability that an interval should cover, for new examples and new queries.
        bootstrap: number of bootstrap samples, of examples and of queries.
        splits: number of random halvings of the repeats for the reliability.
        seed: of the bootstrap and the halvings.

    Raises:
        InputError: if shapes disagree, a value is not finite, or examples are fewer than three, unknown or repeated.
    """
    tau = float_array(scores, "scores", (2,))
    left_out = int_array(examples, "examples")
    queries, n = tau.shape
    has_repeated = len(set(left_out.tolist())) != len(left_out)
    if has_repeated or len(left_out) < 3 or left_out.min() < 0 or left_out.max() >= n:
        raise expected("examples", f"three or more different numbers in 0..{n - 1}", left_out.tolist())
    rng = np.random.default_rng(seed)
    boot = Bootstrap(bootstrap, level, rng)

    masks = np.arange(n) != left_out[:, None]  # (E, N)
    changes_by_repeat = _measure_changes(runs, masks, queries)  # (E, R, Q)
    repeats = changes_by_repeat.shape[1]
    changes = changes_by_repeat.mean(1)  # (E, Q)
    predicted = tau[:, left_out].T / n  # (E, Q)
    errors = np.full_like(changes, np.nan)
    if repeats > 1:
        errors = changes_by_repeat.std(1, ddof=1) / np.sqrt(repeats)

    return LeaveOneOut(
        examples=left_out,
        changes=changes.T,
        errors=errors.T,
        predicted=predicted.T,
        pearson=correlate(predicted, changes, boot, ranked=False),
        spearman=correlate(predicted, changes, boot),
        reliability=estimate_reliability(changes_by_repeat, splits, rng),
        n_repeats=repeats,
        seed=seed,
    )


@dataclass(frozen=True)
class LeaveOneGroupOut:
    """What leaving out groups of examples changes, beside their mean scores.

    Attributes:
        groups: (N,) the group of each example: 0 has the highest mean scores, K - 1 the lowest.
        scores: (K,) mean score of each group.
        changes: (K,) mean over repeats and queries of f without the group minus f on all the data.
        intervals: (K, 2) bootstrap intervals of ``changes``, for new queries and repeats.
        spearman: correlation over the groups of ``scores`` and ``changes``; positive is good. NaN if one is constant.
        interval: bootstrap interval of ``spearman``, for new queries and repeats.
        n_repeats: R.
        level: the probability that an interval covers.
        seed: of the order of ties and the bootstrap.
    """

    groups: NDArray[np.int64]
    scores: Floats
    changes: Floats
    intervals: Floats
    spearman: float
    interval: tuple[float, float]
    n_repeats: int
    level: float
    seed: int

    def __str__(self) -> str:
        low, high = self.interval
        changes = ", ".join(f"{change:+.3g}" for change in self.changes)
        return (
            f"leave-one-group-out: Spearman {self.spearman:.2f} ({100 * self.level:g}% interval {low:.2f} to "
            f"{high:.2f}); f changes by {changes}, most helpful group first; {self.n_repeats} repeats"
        )


def leave_one_group_out(
    scores: object,
    runs: Runs,
    groups: int = 5,
    level: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LeaveOneGroupOut:
    """Cut the examples into groups by their mean score, leave out one group at a time, and retrain.

    Args:
        scores: (Q, N) tensor or array, or an object whose ``values`` is one; positive: removing z raises f(q). Their
            mean over the queries makes the groups.
        runs: masks (M, N) bool -> targets (M, R, Q), as in `removal_curve`; they should be paired.
        groups: K, at least 3, of equal sizes (to one example). With few, the correlation takes few values.
        level: the probability that an interval should cover.
        bootstrap: number of bootstrap samples, of queries and of repeats.
        seed: of the order of ties and the bootstrap.

    Raises:
        InputError: if shapes disagree, a value is not finite, or groups are fewer than three or more than examples.
    """
    tau = float_array(scores, "scores", (2,))
    queries, n = tau.shape
    if not 3 <= groups <= n:
        raise expected("groups", f"in 3..{n}", groups)
    rng = np.random.default_rng(seed)
    boot = Bootstrap(bootstrap, level, rng)

    # The best n / K examples are group 0, and so on.
    mean = tau.mean(0)
    group = rank_descending(mean, rng) * groups // n
    # Means of differences from the first score, so that they are exactly equal if all scores are.
    of_group = mean[0] + np.bincount(group, mean - mean[0]) / np.bincount(group)  # (K,)

    masks = group != np.arange(groups)[:, None]  # (K, N)
    changes_by_repeat = _measure_changes(runs, masks, queries)  # (K, R, Q)
    changes = changes_by_repeat.mean((1, 2))
    repeats = changes_by_repeat.shape[1]

    # Repeats and queries are drawn anew, independently of each other.
    repeat_weights = boot.draw_counts(repeats) / repeats  # (R, B)
    query_weights = boot.draw_counts(queries) / queries  # (Q, B)
    resampled = np.einsum("krq,rb,qb->kb", changes_by_repeat, repeat_weights, query_weights, optimize=True)
    correlations = spearman(resampled, of_group[:, None])  # (B,)
    low, high = np.nan, np.nan
    if np.isfinite(correlations).any():
        low, high = boot.percentile_interval(correlations)

    return LeaveOneGroupOut(
        groups=group,
        scores=of_group,
        changes=changes,
        intervals=boot.percentile_interval(resampled),
        spearman=float(spearman(changes[:, None], of_group[:, None])[0]),
        interval=(float(low), float(high)),
        n_repeats=repeats,
        level=level,
        seed=seed,
    )


def _measure_changes(runs: Runs, masks: NDArray[np.bool_], queries: int) -> Floats:
    """Measure f after training on each subset minus f after training on all the data, by repeat: (M, R, Q)."""
    all_the_data = np.ones_like(masks[:1])
    f = measure(runs, np.concatenate([all_the_data, masks]), queries)
    return f[1:] - f[0]
