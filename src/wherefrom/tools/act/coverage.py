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
    """Compute F of the examples whose scores are given, (Q, k)."""
    return float(np.sqrt(np.maximum(chosen, 0).sum(1)).sum())


def greedy(scores: Floats, count: int) -> Numbers:
    """Choose ``count`` examples greedily, in order; ties by the mean score, then by example number.

    Args:
        scores: (Q, N). They should be of one unit: a query whose scores are larger weighs more.
        count: k, at most N.
    """
    helps = np.ascontiguousarray(np.maximum(scores, 0).T)  # (N, Q)
    covered = np.zeros(len(scores))  # what the chosen examples give each query, (Q,)
    chosen: list[int] = []

    # Python's heap has the smallest first, hence the signs. The last number is |S| when the gain was computed.
    gains, means = _gain(helps, covered).tolist(), scores.mean(0).tolist()
    heap = [(-gain, -mean, z, 0) for z, (gain, mean) in enumerate(zip(gains, means, strict=True))]
    heapq.heapify(heap)
    for size in range(count):
        # A gain of an earlier S bounds that of this one from above: only what is on top must be up to date.
        while heap[0][3] < size:
            _, mean, z, _ = heap[0]
            heapq.heapreplace(heap, (-float(_gain(helps[z], covered)), mean, z, size))
        z = heapq.heappop(heap)[2]
        chosen.append(z)
        covered += helps[z]
    return np.array(chosen)


def _gain(helps: Floats, covered: Floats) -> Floats:
    """Compute F(S + z) - F(S) of examples (..., Q), for what S gives each query (Q,): (...).

    Written as s / (sqrt(c + s) + sqrt(c)), it does not grow with c in floating point either.
    """
    roots = np.sqrt(covered + helps) + np.sqrt(covered)
    return np.divide(helps, roots, out=np.zeros_like(helps), where=helps > 0).sum(-1)
