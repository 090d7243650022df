"""The scoring engine: one stream of examples, against what any method made of the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wherefrom.data.examples import Batch, Examples
from wherefrom.model.capture import OutputCotangents
from wherefrom.model.problem import Problem
from wherefrom.persample import gradients
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.solvers.base import Inverse, warn_unconverged
from wherefrom.store import Shards

Measurement = Callable[[Tensor, Batch], Tensor]  # (outputs, batch) -> (B,)

SLOPES = 16  # directions that go together through the model in forward mode


@dataclass(frozen=True, eq=False)
class QueryGradients:
    """Gradients of the queries' measurements, in pieces that fit into memory, computed anew each time they are read.

    Args:
        problem: the model at the weights where they are taken.
        examples: the queries.
        cotangents: makes the cotangents of the outputs that belong to their measurements.
        size: queries in a piece, at most; None: all of them.
        mean: take the mean over all queries as one.
    """

    problem: Problem
    examples: Examples
    cotangents: OutputCotangents
    size: int | None = None
    mean: bool = False

    @classmethod
    def of(
        cls,
        problem: Problem,
        queries: Any,
        measurement: Measurement | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> QueryGradients:
        """Read queries in the form of the training data; None takes the task's measurement."""
        examples = Examples(queries, "queries", batch_size)
        return cls(problem, examples, problem.output_cotangents("measurement", measurement), **options)

    def __len__(self) -> int:
        """Count the right-hand sides, Q."""
        return 1 if self.mean else len(self.examples)

    def __iter__(self) -> Iterator[Gradients]:
        if self.mean:
            yield self.together().mean()
            return
        held: list[Gradients] = []
        for batch in self._batches():
            for part in self._cut(batch):
                if held and self.size is not None and sum(map(len, held)) + len(part) > self.size:
                    yield gradients.concatenate(held)
                    held = []
                held.append(part)
        yield gradients.concatenate(held)

    def together(self) -> Gradients:
        """Compute the gradients of all queries as one piece."""
        return gradients.concatenate(list(self._batches()))

    def _batches(self) -> Iterator[Gradients]:
        for _, batch in self.problem.batches(self.examples):
            yield self.problem.gradients(batch, self.cotangents)

    def _cut(self, rows: Gradients) -> Iterator[Gradients]:
        size = self.size or len(rows)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def score_stream(
    problem: Problem,
    directions: Directions,
    examples: Examples | None = None,
    what: str = "scores",
    shards: Shards | None = None,
    cosine: bool = False,
) -> Tensor:
    """Score all training examples, or those given, in one pass over them: (Q, n).

    Args:
        problem: the model at the weights where the examples' gradients are taken.
        directions: what the queries were made to.
        examples: those to score; None: the training set.
        what: words for the progress bar.
        shards: where each batch's scores are kept, and taken from if they are there.
        cosine: divide by the lengths of the examples' gradients.
    """
    values = torch.empty(0)
    for index, batch in problem.batches(examples, what):

        def compute(batch: Batch = batch) -> dict[str, Tensor]:
            return {"values": _score_batch(problem, batch, directions, cosine)}

        if shards is None:
            part = compute()["values"]
        else:
            shape = (len(directions), len(index))
            part = shards.made(index.start, compute, {"values": shape})["values"].to(problem.device)

        if not index.start:
            values = part.new_empty(len(part), len(examples or problem.train), dtype=problem.dtype)
        values[:, index.start : index.stop] = part

    if examples is None and shards is None and not _takes_slopes(problem, directions):
        problem.name_unseen()
    return values


def score_self_influence(inverse: Inverse, examples: Examples | None = None, shards: Shards | None = None) -> Tensor:
    """Return g^T (C + damping)^-1 g of all training examples, or of those given, in one pass over them: (n,)."""
    problem, parts = inverse.curvature.problem, []
    for index, batch in problem.batches(examples, "self-influence"):

        def compute(batch: Batch = batch) -> dict[str, Tensor]:
            values, converged = inverse.self_influence(problem.loss_gradients(batch))
            return {"values": values, "converged": converged}

        shapes = {"values": (len(index),), "converged": (len(index),)}
        if shards is None:
            parts.append(compute())
        else:
            parts.append(shards.made(index.start, compute, shapes, {"converged": torch.bool}))

    converged = torch.cat([part["converged"] for part in parts])
    warn_unconverged(converged, "training examples", inverse.tolerance or 0.0)
    return torch.cat([part["values"] for part in parts]).to(problem.device, problem.dtype)


def _score_batch(problem: Problem, batch: Batch, directions: Directions, cosine: bool) -> Tensor:
    """Score a batch, (Q, n), by contractions of factored gradients.

    Where some parameters' gradients would have to be written out and few directions are enough, by forward-mode
    derivatives along these.
    """
    if _takes_slopes(problem, directions) and not cosine:
        return _score_by_slopes(problem, batch, directions)
    rows = problem.loss_gradients(batch)
    scores = rows.dot(directions)[..., 0]  # (Q, n)
    if cosine:
        scores = scores / rows.square_norms().sum(1).sqrt().clamp(min=1e-30)
    return scores


def _score_by_slopes(problem: Problem, batch: Batch, directions: Directions) -> Tensor:
    common = Directions(
        directions.blocks, directions.forms, directions.bases
    )  # the p directions, before they are mixed
    parts = [problem.slopes(batch, some) for some in common.chunk(SLOPES)]
    slopes = torch.cat(parts)  # (p, n)
    return slopes if directions.mix is None else directions.mix.to(slopes) @ slopes


def _takes_slopes(problem: Problem, directions: Directions) -> bool:
    """Whether few directions stand for many rows that would have to be written out."""
    return directions.mix is not None and bool(problem.layout.slow)
