"""Agreement: do several methods rank the training examples alike?

For each two score matrices and each query, the correlation over all examples (Pearson, Spearman) and how much their k
strongest proponents and opponents overlap. In this way one compares an approximation with the exact scores, a method
with its cheaper setting, or influence with the proximal Bregman response.

    overlap(q) = expected |top k of a and top k of b| / k,  ties broken at random in either; by chance k / N
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats, float_array
from wherefrom.tools.evaluate.statistics import Bootstrap, QueryMean, average_queries, pearson


@dataclass(frozen=True)
class Pair:
    """How much two score matrices agree, by query and on average; intervals are for new queries.

    Attributes:
        spearman, pearson: correlation over the examples; NaN for a query with constant scores.
        proponents, opponents: overlap of the k largest and of the k smallest scores, 0..1; ties count by chance.
    """

    spearman: QueryMean
    pearson: QueryMean
    proponents: QueryMean
    opponents: QueryMean


@dataclass(frozen=True)
class Agreement:
    """Agreement of several score matrices.

    Attributes:
        names: those of the matrices.
        pairs: (name, other name) -> `Pair`, in the order of ``names``.
        k: of the overlaps.
        n_examples: N; an overlap by chance is k / N.
        seed: of the bootstrap.
    """

    names: tuple[str, ...]
    pairs: Mapping[tuple[str, str], Pair]
    k: int
    n_examples: int
    seed: int

    def table(self, measure: Literal["spearman", "pearson", "proponents", "opponents"] = "spearman") -> Floats:
        """Arrange the means of one measure as a symmetric matrix in the order of ``names``, 1 on the diagonal."""
        means = np.eye(len(self.names))
        for (a, b), pair in self.pairs.items():
            i, j = self.names.index(a), self.names.index(b)
            means[i, j] = means[j, i] = getattr(pair, measure).mean
        return means

    def __str__(self) -> str:
        lines = [
            f"{a} and {b}: Spearman {pair.spearman}, Pearson {pair.pearson}, top {self.k} shared "
            f"{pair.proponents.mean:.2f} (proponents), {pair.opponents.mean:.2f} (opponents)"
            for (a, b), pair in self.pairs.items()
        ]
        return "\n".join([*lines, f"top {self.k} shared by chance {self.k / self.n_examples:.2f}"])


def agreement(
    matrices: Mapping[str, object], k: int = 10, level: float = 0.95, bootstrap: int = 1000, seed: int = 0
) -> Agreement:
    """Compare score matrices with each other.

    Args:
        matrices: name -> (Q, N) tensor or array, or an object whose ``values`` is one; two or more. Scales do not
            matter.
        k: how many of the strongest examples to compare.
        level: the probability that an interval should cover.
        bootstrap: number of bootstrap samples, of queries.
        seed: of the bootstrap.

    Raises:
        InputError: if there are fewer than two matrices, shapes disagree, a value is not finite, or k is not in 1..N.
    """
    # Examples lead here, because correlations are over the columns: (N, Q) each.
    values = {name: float_array(matrix, f"matrices[{name!r}]", (2,)).T for name, matrix in matrices.items()}
    shapes = {name: columns.shape[::-1] for name, columns in values.items()}
    if len(values) < 2 or len(set(shapes.values())) > 1:
        raise expected("matrices", "two or more, all of one shape (Q, N)", shapes)
    n = len(next(iter(values.values())))
    if not 1 <= k <= n:
        raise expected("k", f"between 1 and the {n} training examples", k)

    boot = Bootstrap(bootstrap, level, np.random.default_rng(seed))
    ranks = {name: rankdata(columns, axis=0) for name, columns in values.items()}
    is_top = {name: _top_probability(columns, k) for name, columns in values.items()}
    is_bottom = {name: _top_probability(-columns, k) for name, columns in values.items()}

    pairs = {}
    for a, b in combinations(values, 2):
        pairs[a, b] = Pair(
            spearman=average_queries(pearson(ranks[a], ranks[b]), boot),
            pearson=average_queries(pearson(values[a], values[b]), boot),
            proponents=average_queries((is_top[a] * is_top[b]).sum(0) / k, boot),
            opponents=average_queries((is_bottom[a] * is_bottom[b]).sum(0) / k, boot),
        )
    return Agreement(tuple(values), pairs, k, n, seed)


def _top_probability(values: Floats, k: int) -> Floats:
    """Compute the probability that each item is among the k largest of its column (N, Q), ties broken at random."""
    smallest_of_top = -np.partition(-values, k - 1, axis=0)[k - 1]  # (Q,)
    is_above, is_tied = values > smallest_of_top, values == smallest_of_top
    places_left = k - is_above.sum(0)
    return is_above + is_tied * places_left / is_tied.sum(0)
