"""Influence similarity: cosines of loss gradients in the inner product of the inverse curvature.

    s(i, j) = g_i^T A^-1 g_j / sqrt((g_i^T A^-1 g_i) (g_j^T A^-1 g_j)),     A = C + damping I     (Klochkov & Liu 2024)

g is the gradient of the task's training loss on both sides, whatever is measured of queries elsewhere; the mean over an
example's tokens, which the paper takes, gives the same cosines as the sum. As damping grows s becomes the plain cosine
of gradients, which `Influence(Identity())` gives. With an A that is positive definite, |s| <= 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from wherefrom.methods.influence import Influence
from wherefrom.scores import Scores
from wherefrom.surroundings import undisturbed


@undisturbed()
def similarity(influence: Influence, queries: Any, others: Any = None, certify: bool = True) -> Scores:
    """Similarities of n examples with one another, or with m others.

    Args:
        influence: fitted; the examples need not be of its training set.
        queries: n examples in the form of the training data.
        others: m examples in the same form, such as ``influence.problem.train``; None takes the queries.
        certify: measure each solve's residual, as in `Influence.score`.

    Returns:
        `Scores` whose values are cosines, (n, n) or (n, m), and whose columns are the others. Among themselves the
        diagonal is 1, and max |s - s^T|, the solver's error, is ``provenance["measured"]["asymmetry"]``.

    Raises:
        InputError: if the self-influence of an example is not positive.
    """
    alone, loss = others is None, influence.problem.task.loss
    scored = queries if alone else others
    scores = influence.score(queries, loss, certify=certify, self_influence=not alone, candidates=scored)
    mine = scores.values.diagonal() if alone else influence.self_influence(queries)
    theirs = dataclasses.replace(scores, self_values=mine) if alone else scores
    half = theirs.relative()
    values = dataclasses.replace(half, values=half.values.T, self_values=mine).relative().values.T
    measured = {"asymmetry": float((values - values.T).abs().max())} if alone else {}
    return dataclasses.replace(half, values=values, provenance=half.provenance | {"measured": measured})
