"""Removal: what becomes of a query when the examples that a ranking names are removed and the model is trained again?

    change(k, q) = mean over repeats r of f(q) trained without the first k examples of q's ranking - f(q) trained on all
    flipped(k, q): f(q) > threshold in more than half of the repeats, at k or fewer examples removed

`removal_curve` measures the first, for the strongest proponents ("top"), the strongest opponents ("bottom"), random
examples and other methods' rankings (Koh & Liang 2017; kronfluence's examples; ASTRA, section 5). `flips` measures the
second, the subset-removal counterfactual (Ilyas et al. 2022; Park et al. 2023): how many examples hold a prediction up?
Ties in a ranking are broken at random. Give `runs` made with ``paired=True``: initial weights are then shared with the
run on all the data, and their noise cancels in the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats, float_array, int_array
from wherefrom.tools.evaluate.statistics import Bootstrap, rank_descending

Runs = Callable[[Tensor], Tensor]
Bools = NDArray[np.bool_]
OURS = ("top", "bottom", "random")  # the rankings that are made here; other methods' need other names


@dataclass(frozen=True)
class RemovalCurve:
    """How measurements change as more examples are removed.

    Attributes:
        counts: (K,) int, how many examples were removed from each query's training set.
        changes: ranking ("top", "bottom", "random", or a method's name) -> (K, Q): mean over repeats of f(q) after
            removal minus f(q) on all the data.
        intervals: ranking -> (K, 2): bootstrap interval over queries of the mean change.
        level: the probability that an interval covers.
        seed: of the random examples, the order of ties and the bootstrap.
    """

    counts: NDArray[np.int64]
    changes: Mapping[str, Floats]
    intervals: Mapping[str, Floats]
    level: float
    seed: int = 0

    def wins(self, ranking: str = "top", over: str = "random") -> NDArray[np.int64]:
        """Count the queries in which one ranking raises f more than another does, at each count: (K,)."""
        return (self.changes[ranking] > self.changes[over]).sum(1)

    def __str__(self) -> str:
        def cell(name: str, change: Floats, i: int) -> str:
            low, high = self.intervals[name][i]
            return f"{name} {change[i].mean():+.3f} ({low:+.3f} to {high:+.3f})"

        lines = [
            f"{k} removed: mean change {', '.join(cell(*c, i) for c in self.changes.items())}; top raises f more than "
            f"random in {won} of {self.changes['top'].shape[1]} queries"
            for i, (k, won) in enumerate(zip(self.counts, self.wins(), strict=True))
        ]
        return "\n".join([*lines, f"{100 * self.level:g}% intervals over queries"])


def removal_curve(
    scores: object,
    runs: Runs,
    counts: Sequence[int],
    rankings: Mapping[str, object] | None = None,
    level: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
) -> RemovalCurve:
    """Remove what each query's ranking names, retrain, and see how f changes.

    Costs K times Q subsets for each ranking, three of which are ours, and one for all the data.

    Args:
        scores: (Q, N) tensor or array, or an object whose ``values`` is one; positive: removing z raises f(q).
        runs: masks (M, N) bool -> targets (M, R, Q), such as ``functools.partial(retrain_small, build, task, train,
            queries, repeats=3, recipe=recipe, seed=0, paired=True, folder="runs")``.
        counts: (K,) how many examples to remove, increasing, below N.
        rankings: other methods' scores (Q, N) by name, whose top is removed as well.
        level: the probability that an interval should cover.
        bootstrap: number of bootstrap samples, of queries.
        seed: of the random examples, the order of ties and the bootstrap.

    Raises:
        InputError: if shapes disagree, a value is not finite, counts do not increase within 1..N - 1, or a ranking is
            called as one of ours.
    """
    tau = float_array(scores, "scores", (2,))
    queries, examples = tau.shape
    rng = np.random.default_rng(seed)
    boot = Bootstrap(bootstrap, level, rng)
    sizes = check_counts(counts, examples)
    places = {
        "top": rank_descending(tau, rng),
        "bottom": rank_descending(-tau, rng),
        "random": rank_descending(np.zeros_like(tau), rng),
    }
    places |= _rank_others(rankings, tau, rng)  # (Q, N) each

    masks = [np.ones((1, examples), dtype=bool)]  # first all the data
    for place in places.values():
        masks += [place >= k for k in sizes]  # each query's first k examples removed: (Q, N)
    f = measure(runs, np.concatenate(masks), queries).mean(1)  # (1 + rankings K Q, Q)

    # Of the queries measured after each removal, only the one whose examples were removed is asked.
    after_removal = f[1:].reshape(len(places) * len(sizes), queries, queries)
    own = np.einsum("iqq->iq", after_removal) - f[0]  # (rankings K, Q)
    changes = dict(zip(places, own.reshape(len(places), len(sizes), queries), strict=True))
    intervals = {name: boot.interval_of_mean(change) for name, change in changes.items()}
    return RemovalCurve(sizes, changes, intervals, level, seed)


@dataclass(frozen=True)
class Flips:
    """How many examples must go to flip the prediction of each query.

    Attributes:
        counts: (K,) int, how many examples were removed.
        asked: (Q,) bool, the queries that were asked: f at or below the threshold in every run on all the data.
        flipped: ranking -> (K, Q) bool, whether the query had flipped at that count or a smaller one.
        intervals: ranking -> (K, 2): bootstrap interval of the share of the queries asked that had flipped.
        threshold: above it, a prediction counts as flipped.
        level: the probability that an interval covers.
        seed: of the random examples, the order of ties and the bootstrap.
    """

    counts: NDArray[np.int64]
    asked: Bools
    flipped: Mapping[str, Bools]
    intervals: Mapping[str, Floats]
    threshold: float
    level: float
    seed: int

    def needed(self, ranking: str = "top") -> Floats:
        """Find the smallest count that flipped each query, (Q,); infinite if none did, NaN if it was not asked."""
        flipped = self.flipped[ranking]
        first = np.where(flipped.any(0), self.counts[flipped.argmax(0)], np.inf)
        return np.where(self.asked, first, np.nan)

    def __str__(self) -> str:
        def cell(name: str, flipped: Bools, i: int) -> str:
            low, high = self.intervals[name][i]
            return f"{name} {flipped[i].sum()} ({low:.0%} to {high:.0%})"

        lines = [
            f"{k} removed: flipped {', '.join(cell(*f, i) for f in self.flipped.items())}"
            for i, k in enumerate(self.counts)
        ]
        asked = f"of {self.asked.sum()} queries that are right on all the data"
        return "\n".join([*lines, f"{asked}; {100 * self.level:g}% intervals over queries"])


def flips(
    scores: object,
    runs: Runs,
    counts: Sequence[int],
    threshold: float = 0.0,
    labels: tuple[object, object] | None = None,
    rankings: Mapping[str, object] | None = None,
    level: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Flips:
    """Remove each query's strongest proponents, more and more, until its prediction flips.

    All queries go together, one call of ``runs`` for each count; those that have flipped are not trained again.

    Args:
        scores, runs, counts, level, bootstrap, seed: as in `removal_curve`.
        threshold: of f. 0 is right for the negative margin of `Classification`: above it the prediction is wrong.
        labels: those of the training examples (N,) and of the queries (Q,), whole numbers. The random examples, to
            compare with, are then of the query's own class for as long as there are any.
        rankings: other methods' scores (Q, N) by name, to compare with as well.

    Raises:
        InputError: as `removal_curve`; if labels do not fit; or if no query is at or below the threshold on all the
            data.
    """
    tau = float_array(scores, "scores", (2,))
    queries, examples = tau.shape
    rng = np.random.default_rng(seed)
    boot = Bootstrap(bootstrap, level, rng)
    sizes = check_counts(counts, examples)
    is_alike = np.zeros_like(tau)
    if labels is not None:
        train_labels, query_labels = labels
        y = int_array(train_labels, "labels", examples)
        yq = int_array(query_labels, "labels", queries)
        is_alike = (y == yq[:, None]).astype(float)
    # Random examples are a ranking of ties; with labels, those of the query's own class come first.
    places = {"top": rank_descending(tau, rng), "random": rank_descending(is_alike, rng)}
    places |= _rank_others(rankings, tau, rng)

    on_all_the_data = measure(runs, np.ones_like(tau[:1], dtype=bool), queries)[0]  # (R, Q)
    asked = (on_all_the_data <= threshold).all(axis=0)
    if not asked.any():
        raise expected("f on all the data", f"at or below {threshold} for some query", "none in every run")

    flipped = {name: np.zeros((len(sizes), queries), dtype=bool) for name in places}
    for i, k in enumerate(sizes):
        remaining = []
        for name in places:
            remaining += [(name, q) for q in np.flatnonzero(asked & ~flipped[name][i])]
        if not remaining:
            break
        f = measure(runs, np.stack([places[name][q] >= k for name, q in remaining]), queries)  # (M, R, Q)
        for (name, q), by_repeat in zip(remaining, f, strict=True):
            has_flipped = (by_repeat[:, q] > threshold).mean() > 0.5
            flipped[name][i:, q] = has_flipped  # also at every larger count

    intervals = {name: boot.interval_of_mean(which[:, asked].astype(float)) for name, which in flipped.items()}
    return Flips(sizes, asked, flipped, intervals, threshold, level, seed)


def check_counts(counts: Sequence[int], examples: int) -> NDArray[np.int64]:
    """Check that numbers of examples to remove increase and leave some.

    Raises:
        InputError: if they do not increase within 1..examples - 1.
    """
    sizes = int_array(counts, "counts")
    if sizes[0] < 1 or sizes[-1] >= examples or (np.diff(sizes) <= 0).any():
        raise expected("counts", f"increasing, from 1 to at most {examples - 1}", sizes.tolist())
    return sizes


def measure(runs: Runs, masks: Bools, queries: int) -> Floats:
    """Retrain on the subsets of masks (M, N), and check what comes back: the targets (M, R, Q).

    Raises:
        InputError: if they have another shape or are not finite.
    """
    f = float_array(runs(torch.from_numpy(masks)), "the targets of runs", (3,))
    if len(f) != len(masks) or f.shape[2] != queries:
        raise expected("the targets of runs", f"({len(masks)}, R, {queries})", f.shape, "Queries as those of scores.")
    return f


def _rank_others(rankings: Mapping[str, object] | None, tau: Floats, rng: np.random.Generator) -> dict[str, NDArray]:
    """Rank the examples by other methods' scores."""
    places = {}
    for name, values in (rankings or {}).items():
        other = float_array(values, f"rankings[{name!r}]", (2,))
        if other.shape != tau.shape or name in OURS:
            wanted = f"{tau.shape} as scores, not called as one of ours"
            raise expected(f"rankings[{name!r}]", wanted, f"{other.shape} {name}")
        places[name] = rank_descending(other, rng)
    return places
