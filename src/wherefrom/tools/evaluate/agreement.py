"""Agreement: do methods rank the training examples alike?

For each two score matrices and each query, the correlation over all examples (Pearson, Spearman) and how much their k
strongest proponents and opponents overlap. Compare an approximation with the exact scores so, a method with its cheaper
setting, or influence with the proximal Bregman response.

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
from wherefrom.tools.evaluate.statistics import Bootstrap, QueryMean, pearson, query_mean


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
        """The means of one measure as a symmetric matrix in the order of ``names``, 1 on the diagonal."""
        found = np.eye(len(self.names))
        for (a, b), pair in self.pairs.items():
            i, j = self.names.index(a), self.names.index(b)
            found[i, j] = found[j, i] = getattr(pair, measure).mean
        return found

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
    values = {name: float_array(v, f"matrices[{name!r}]", (2,)).T for name, v in matrices.items()}  # (N, Q) each
    shapes = {name: v.shape[::-1] for name, v in values.items()}
    if len(values) < 2 or len(set(shapes.values())) > 1:
        raise expected("matrices", "two or more, all of one shape (Q, N)", shapes)
    n = len(next(iter(values.values())))
    if not 1 <= k <= n:
        raise expected("k", f"between 1 and the {n} training examples", k)
    boot = Bootstrap(bootstrap, level, np.random.default_rng(seed))
    ranks = {name: rankdata(v, axis=0) for name, v in values.items()}
    best, worst = ({name: _membership(sign * v, k) for name, v in values.items()} for sign in (1, -1))

    def pair(a: str, b: str) -> Pair:
        return Pair(
            spearman=query_mean(pearson(ranks[a], ranks[b]), boot),
            pearson=query_mean(pearson(values[a], values[b]), boot),
            proponents=query_mean((best[a] * best[b]).sum(0) / k, boot),
            opponents=query_mean((worst[a] * worst[b]).sum(0) / k, boot),
        )

    return Agreement(tuple(values), {(a, b): pair(a, b) for a, b in combinations(values, 2)}, k, n, seed)


def _membership(values: Floats, k: int) -> Floats:
    """The probability that each item is among the k largest of its column (N, Q) when ties are broken at random."""
    least = -np.partition(-values, k - 1, axis=0)[k - 1]
    above, tied = values > least, values == least
    return above + tied * (k - above.sum(0)) / tied.sum(0)
