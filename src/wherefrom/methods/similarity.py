"""Influence similarity: cosines of loss gradients in the inner product of the inverse curvature.

    s(i, j) = g_i^T A^-1 g_j / sqrt((g_i^T A^-1 g_i) (g_j^T A^-1 g_j)),     A = C + damping I     (Klochkov & Liu 2024)

g is the gradient of the task's training loss on both sides, whatever is measured of queries elsewhere; the mean over an
example's tokens, which the paper takes, gives the same cosines as the sum. As damping grows s becomes the plain cosine
of gradients, which `Influence(Identity())` gives. With an A that is positive definite, |s| <= 1.
"""

from __future__ import annotations

from typing import Any

from wherefrom.methods.influence import FittedInfluence
from wherefrom.scores import Scores


def similarity(fitted: FittedInfluence, queries: Any, others: Any = None, certify: bool = True) -> Scores:
    """Compare n examples with one another, or with m others.

    Args:
        fitted: the fit; the examples need not be of its training set.
        queries: n examples in the form of the training data.
        others: m examples in the same form, such as ``fitted.problem.train``; None takes the queries.
        certify: measure each solve's residual, as in `FittedInfluence.solve`.

    Returns:
        `Scores` whose values are cosines, (n, n) or (n, m), and whose columns are the others; see
        `Solution.similarity`.

    Raises:
        InputError: if the self-influence of an example is not positive.
    """
    solution = fitted.solve(queries, fitted.problem.task.loss, certify=certify)
    return solution.similarity(others)
