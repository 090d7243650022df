"""The scoring engine: one stream of examples, against what any method made of the queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whence import gradients, vectors
from whence.data import Batch, Examples
from whence.gradients import Gradients
from whence.problem import Problem
from whence.solvers.base import Pairing

Measurement = Callable[[Tensor, Batch], Tensor]  # (outputs, batch) -> (B,)


def query_gradients(
    problem: Problem, queries: Any, measurement: Measurement | None = None, batch_size: int | None = None
) -> Gradients:
    """Gradients of the Q queries' measurements, factored.

    Args:
        problem: the model at the weights where they are taken.
        queries: in the form of the training data.
        measurement: f of a query, lower is better; None takes the task's.
        batch_size: queries per pass of the model.
    """
    examples, seeds = Examples(queries, "queries", batch_size), problem.seeds_of("measurement", measurement)
    return gradients.concatenate([problem.gradients(batch, seeds) for _, batch in problem.batches(examples)])


def streamed(problem: Problem, pairing: Pairing, examples: Examples | None = None, what: str = "scores") -> Tensor:
    """Scores of all training examples, or of those given, in one pass over them: (Q, n).

    Args:
        problem: the model at the weights where the examples' gradients are taken.
        pairing: what scores them.
        examples: those to score; None: the training set.
        what: words for the progress bar.
    """
    values = torch.empty(0)
    for index, batch in problem.batches(examples, what):
        found = _against(problem, batch, pairing)  # (Q, n)
        if not index.start:
            values = found.new_empty(len(found), len(examples or problem.train), dtype=problem.dtype)
        values[:, index.start : index.stop] = found
    return values


def _against(problem: Problem, batch: Batch, pairing: Pairing) -> Tensor:
    """Scores of a batch, (Q, n), by contractions of factored gradients.

    Where some parameters' gradients would have to be written out and few directions are enough, by forward-mode
    derivatives along these.
    """
    if pairing.mix is None or not problem.layout.slow:
        return pairing(problem.loss_gradients(batch))
    directions = {p: t for b in problem.blocks for p, t in b.unpack(pairing.packed[b.name]).items()}
    return pairing.mix @ torch.cat([problem.slopes(batch, some) for some in vectors.chunk(directions, 16)])
