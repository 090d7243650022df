"""Scores in parts that sum to them: over blocks of parameters, or over the tokens of a training sequence.

    score(q, n) = sum_l sum_t g[n,l,t]^T V[q,l] a[n,l,t],     V[q] = (C + damping I)^-1 grad f(q)   (Grosse et al. 2023)

The part of position t is that of the gradient signal written there: it has credit for the losses of later tokens, which
flow back to it, and for what its activations a have read of earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.data.examples import Batch
from wherefrom.errors import UnsupportedError
from wherefrom.model.problem import Problem
from wherefrom.persample.directions import Directions

Indices = Sequence[int] | Tensor


def by_block(problem: Problem, directions: Directions, examples: Indices) -> dict[str, Tensor]:
    """Score n training examples along Q directions by block of parameters: block name to (Q, n)."""
    batches = batches_of(problem, examples)
    parts = [problem.loss_gradients(batch).dot_by_block(directions) for batch in batches]
    return {name: torch.cat([part[name][..., 0] for part in parts], 1) for name in parts[0]}


def by_token(problem: Problem, directions: Directions, examples: Indices) -> Tensor:
    """Score n training examples along Q directions by position: (Q, n, T).

    Raises:
        UnsupportedError: if the task has no positions, or a block's gradient cannot be told apart by them.
    """
    parts = []
    for batch in batches_of(problem, examples):
        real = problem.task.padding(batch)
        if real is None:
            raise UnsupportedError(
                f"{problem.task.name()} does not say which positions an example has (method `padding`), so a score "
                "cannot be split over them. Define it, or take by_block."
            )
        positions = real.shape[1]
        rows = problem.gradients(batch, problem.output_cotangents("loss"), positions)
        scores = rows.dot(directions)[..., 0]  # (Q, m positions)
        parts.append(scores.unflatten(1, (-1, positions)))
    widest = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[2])) for part in parts], 1)


def batches_of(problem: Problem, examples: Indices) -> Iterator[Batch]:
    """Yield batches of some training examples; the numbers are checked at once."""
    index = problem.train.check_numbers(examples)
    return (problem.batch(some) for some in index.split(problem.train.batch_size))
