"""Greedy choice of a set that serves every query, not one query again and again.

    maximise  F(S) = sum_q sqrt(sum_{z in S} max(s(q, z), 0)),   |S| = k

The root makes more help worth less to a query that is served already, so that the next example goes to another. F is
monotone and submodular (a concave function of a sum of what is not negative), so that the greedy choice reaches at
least (1 - 1/e) = 63% of the best F of k examples (Nemhauser, Wolsey & Fisher 1978). It is made lazily (Minoux 1978): a
gain never grows as S does, hence one that was computed earlier bounds it, and most are never computed again.
"""

from __future__ import annotations

import heapq

import numpy as np

from wherefrom.tools.act.ranking import Numbers
from wherefrom.tools.evaluate.arrays import Floats


def coverage(chosen: Floats) -> float:
    """F of the examples whose scores are given, (Q, k)."""
    return float(np.sqrt(np.maximum(chosen, 0).sum(1)).sum())


def greedy(scores: Floats, count: int) -> Numbers:
    """The greedy choice of ``count`` examples, in order; ties by the mean score, then by example number.

    Args:
        scores: (Q, N). They should be of one unit: a query whose scores are larger weighs more.
        count: k, at most N.
    """
    helps = np.ascontiguousarray(np.maximum(scores, 0).T)  # (N, Q)
    covered, chosen = np.zeros(len(scores)), []
    ends = zip(_gain(helps, covered).tolist(), scores.mean(0).tolist(), strict=True)
    heap = [(-gain, -mean, z, 0) for z, (gain, mean) in enumerate(ends)]  # the last number: |S| when it was computed
    heapq.heapify(heap)
    for size in range(count):
        while heap[0][3] < size:
            _, mean, z, _ = heap[0]
            heapq.heapreplace(heap, (-float(_gain(helps[z], covered)), mean, z, size))
        z = heapq.heappop(heap)[2]
        chosen.append(z)
        covered += helps[z]
    return np.array(chosen)


def _gain(helps: Floats, covered: Floats) -> Floats:
    """F(S + z) - F(S) of examples (..., Q), for what S gives each query (Q,): (...).

    Written as s / (sqrt(c + s) + sqrt(c)), it does not grow with c in floating point either.
    """
    roots = np.sqrt(covered + helps) + np.sqrt(covered)
    return np.divide(helps, roots, out=np.zeros_like(helps), where=helps > 0).sum(-1)
