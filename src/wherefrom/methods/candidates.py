"""Shortlists: a cheap method names some training examples, and these alone are scored exactly.

    cheap = BM25().fit(texts).score(asked)                 # or GradientStore.score(queries)
    scores = rescored(fitted, queries, shortlist(cheap, 100))
    scores.top(10).proponents                              # numbers of training examples

Grosse et al. (2023, section 3.2.1) take the 10,000 sequences of best TF-IDF. `recall` says what a shortlist misses,
where exact scores of all examples can be had once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wherefrom.methods.influence import FittedInfluence
from wherefrom.scores import Scores


def shortlist(scores: Scores, k: int) -> Tensor:
    """List the k best training examples of each query together, ascending: (m,) int64, k <= m <= min(N, Q k).

    Args:
        scores: by any method, (Q, N); ties go by number.
        k: proponents of each query.
    """
    return scores.top(k).proponents.unique()


def rescored(fitted: FittedInfluence, queries: Any, index: Tensor | Sequence[int], **options: Any) -> Scores:
    """Score some training examples exactly on all queries, in time for these alone.

    Args:
        fitted: to all N training examples.
        queries: as for `FittedInfluence.score`.
        index: m numbers of training examples.
        options: of `FittedInfluence.score`.

    Returns:
        `Scores` (Q, m), the columns of ``fitted.score(queries, **options)`` that ``index`` names, which are its
        ``numbers``: `Scores.top` gives numbers of training examples.

    Raises:
        InputError: if there is none, or a number is not one of 0..N-1; and see `FittedInfluence.score`.
    """
    train = fitted.problem.train
    numbers = train.check_numbers(index)
    scores = fitted.score(queries, examples=train.subset(numbers), **options)
    return dataclasses.replace(scores, numbers=numbers)


def recall(index: Tensor, scores: Scores, k: int) -> Tensor:
    """Return the share of each query's k best training examples that a shortlist has: (Q,) float64 in 0..1.

    Args:
        index: the shortlist, (m,), or one for each query, (Q, m), as ``cheap.top(m).proponents``.
        scores: exact scores of all training examples, (Q, N).
        k: proponents of each query.
    """
    best = scores.top(k).proponents.unsqueeze(2)  # (Q, k, 1)
    return (best == index.unsqueeze(-2).to(best)).any(2).double().mean(1)
