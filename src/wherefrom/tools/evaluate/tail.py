"""How a query's influence is spread over the training examples: a heavy tail, or a few that dominate?

    c(k) = sum_{i <= k} s_(i) / sum_i max(s_i, 0),        s_(1) >= s_(2) >= ...
    P(score > s) ~ s^-a in the tail:                      Hill (1975), and least squares of ln((rank - 1/2) / N) on ln s

Grosse et al. (2023, section 5.2.1) find a power law in language models. Hill's a is the most likely one of a tail of k
examples, k / sum_{i <= k} ln(s_(i) / s_(k + 1)); R2 of the line says how straight that tail is. Half a rank takes the
bias out of its slope (Gabaix & Ibragimov 2011). Only positive scores count: for those that hurt, pass the negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import linregress

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats, float_array

TAIL_SHARE = 0.05  # the tail: this share of the examples ...
SHORTEST_TAIL = 10  # ... and at least so many, where so many scores are positive


@dataclass(frozen=True)
class Tail:
    """How one query's positive scores are spread over N training examples.

    Attributes:
        sizes: the n positive scores, largest first, (n,).
        covered: c(k) of k = 1..n, the share of all positive influence that the k largest hold, (n,).
        examples: N, with those whose score is not positive.
        length: k, the number of examples in the tail.
        hill: the exponent a by Hill's estimator; its standard error is about a / sqrt(k).
        slope: the exponent a by least squares; both are NaN where the tail has fewer than two examples or is constant.
        height: ln(rank / N) of the fitted line at a score of 1.
        r2: the share of the variance of ln(rank / N) in the tail that the line explains.
        top: the share of all positive influence that the top 1% of the N examples holds (at least one example).
        gini: Gini coefficient of max(s, 0) over the N examples: 0 if all have the same, 1 - 1/N if one has all.
    """

    sizes: Floats
    covered: Floats
    examples: int
    length: int
    hill: float
    slope: float
    height: float
    r2: float
    top: float
    gini: float

    @property
    def ranks(self) -> Floats:
        """Give (rank - 1/2) / N of each of the sizes, (n,): about the share of examples with a larger score."""
        return _rank_shares(len(self.sizes), self.examples)

    def line(self, sizes: Floats) -> Floats:
        """Read the share of examples with a larger score off the fitted line, of the shape of ``sizes``."""
        return np.exp(self.height - self.slope * np.log(sizes))

    def __str__(self) -> str:
        return (
            f"tail exponent {self.hill:.2f} (Hill), {self.slope:.2f} (least squares, R2 {self.r2:.3f}) of the "
            f"{self.length} largest; top 1% hold {self.top:.1%} of the positive influence; Gini {self.gini:.2f}"
        )


def tail(scores: object) -> Tail:
    """Measure how one query's positive scores are spread.

    Args:
        scores: (N,) of one query, in any unit.

    Raises:
        InputError: if they are not one finite number per example, or none is positive.
    """
    values = float_array(scores, "scores", (1,))
    sizes = np.sort(values[values > 0])[::-1]
    n, n_examples = len(sizes), len(values)
    if n == 0:
        raise expected("scores", "positive for at least one example", "none", "Leave out queries that nothing helps.")

    covered = np.cumsum(sizes / sizes.sum())
    one_percent = min(max(1, round(n_examples / 100)), n)
    # Gini = (N + 1 - 2 sum_k c_k) / N with the sums c_k of the k smallest; here they run from the largest down, and are
    # 1 for the N - n examples whose score is not positive.
    gini = (2 * (covered.sum() + n_examples - n) - n_examples - 1) / n_examples

    # Hill's estimator needs one example beyond the tail.
    length = min(max(SHORTEST_TAIL, round(TAIL_SHARE * n_examples)), n - 1)
    log_sizes = np.log(sizes[: length + 1])
    log_ranks = np.log(_rank_shares(length, n_examples))
    hill, slope, height, r2 = _fit_tail(log_sizes, log_ranks)
    return Tail(
        sizes=sizes,
        covered=covered,
        examples=n_examples,
        length=length,
        hill=hill,
        slope=slope,
        height=height,
        r2=r2,
        top=float(covered[one_percent - 1]),
        gini=float(gini),
    )


def _rank_shares(n: int, n_examples: int) -> Floats:
    return (np.arange(n) + 0.5) / n_examples


def _fit_tail(log_sizes: Floats, log_ranks: Floats) -> tuple[float, float, float, float]:
    """Compute Hill's exponent, and the exponent, height and R2 of the least-squares line.

    Args:
        log_sizes: ln s of the k examples of the tail and of the one next to it, (k + 1,), largest first.
        log_ranks: ln rank of those of the tail, (k,).
    """
    tail_sizes, next_size = log_sizes[:-1], log_sizes[-1]
    if len(tail_sizes) < 2 or tail_sizes[0] == tail_sizes[-1]:
        nan = float("nan")
        return nan, nan, nan, nan
    hill = 1 / float((tail_sizes - next_size).mean())
    line: Any = linregress(tail_sizes, log_ranks)
    return hill, -float(line.slope), float(line.intercept), float(line.rvalue) ** 2
