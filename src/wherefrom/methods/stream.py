"""The scoring engine: one stream of examples, against what any method made of the queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wherefrom.data.examples import Batch, Examples
from wherefrom.model.problem import Problem
from wherefrom.persample import gradients, vectors
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.lowrank import written
from wherefrom.solvers.base import Inverse, Pairing, Solution, warn_unconverged
from wherefrom.store import Shards

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
    examples = Examples(queries, "queries", batch_size)
    cotangents = problem.output_cotangents("measurement", measurement)
    return gradients.concatenate([problem.gradients(batch, cotangents) for _, batch in problem.batches(examples)])


def solved(
    inverse: Inverse, rows: Gradients, certify: bool, shards: Shards | None = None, name: str = "solution"
) -> Solution:
    """The solution for Q queries' gradients, R = 1; from the disk if it lies there, else kept there if asked."""
    if shards is None:
        return inverse(rows.dense(), certify)
    names = ("residual", "converged", "history", "predicted")

    def make() -> dict[str, Tensor]:
        found = inverse(rows.dense(), certify)
        kept = {key: t for key in names if (t := getattr(found, key)) is not None}
        cost = torch.tensor([found.steps, found.passes, found.seconds], dtype=torch.float64)
        return kept | {"cost": cost} | {f"x|{p}": t for p, t in found.x.items()}

    Q = len(rows)
    shapes = {f"x|{p}": (Q, *shape) for p, shape in inverse.curvature.problem.shapes.items()}
    shapes |= {"residual": (Q,), "converged": (Q,), "predicted": (Q,), "history": (None, None), "cost": (3,)}
    measured = ("residual", "history", "predicted")  # a theory may expect an error without bound
    t = shards.get(name, shapes, ("residual", "predicted"), {"converged": torch.bool}, measured)
    if t is None:
        t = shards.made(name, make)
    elif inverse.tolerance is not None:
        warn_unconverged(t["converged"], "queries", inverse.tolerance)
    device, (steps, passes, seconds) = rows.weights.device, t["cost"].tolist()
    x = {key[2:]: v.to(device) for key, v in t.items() if key.startswith("x|")}
    rest = {key: t[key].to(device) if key in t else None for key in names}
    return Solution(x, steps=int(steps), passes=passes, seconds=seconds, **rest)  # pyright: ignore[reportArgumentType]


def streamed(
    problem: Problem,
    pairing: Pairing,
    examples: Examples | None = None,
    what: str = "scores",
    shards: Shards | None = None,
) -> Tensor:
    """Scores of all training examples, or of those given, in one pass over them: (Q, n).

    Args:
        problem: the model at the weights where the examples' gradients are taken.
        pairing: what scores them.
        examples: those to score; None: the training set.
        what: words for the progress bar.
        shards: where each batch's scores are kept, and taken from if they are there.
    """
    values = torch.empty(0)
    for index, batch in problem.batches(examples, what):
        found = _against(problem, batch, pairing) if shards is None else _kept(problem, index, batch, pairing, shards)
        if not index.start:
            values = found.new_empty(len(found), len(examples or problem.train), dtype=problem.dtype)
        values[:, index.start : index.stop] = found
    if examples is None and shards is None and not _takes_slopes(problem, pairing):
        problem.name_unseen()
    return values


def self_influence(inverse: Inverse, examples: Examples | None = None, shards: Shards | None = None) -> Tensor:
    """g^T (C + damping)^-1 g of all training examples, or of those given, in one pass over them: (n,)."""
    problem, parts = inverse.curvature.problem, []
    for index, batch in problem.batches(examples, "self-influence"):

        def make(batch: Batch = batch) -> dict[str, Tensor]:
            values, converged = inverse.quadratic(problem.loss_gradients(batch))
            return {"values": values, "converged": converged}

        shapes = {"values": (len(index),), "converged": (len(index),)}
        parts.append(make() if shards is None else shards.made(index.start, make, shapes, {"converged": torch.bool}))
    warn_unconverged(torch.cat([part["converged"] for part in parts]), "training examples", inverse.tolerance or 0.0)
    return torch.cat([part["values"] for part in parts]).to(problem.device, problem.dtype)


def _kept(problem: Problem, index: range, batch: Batch, pairing: Pairing, shards: Shards) -> Tensor:
    make = lambda: {"values": _against(problem, batch, pairing)}  # noqa: E731
    queries = len(next(iter(pairing.packed.values())) if pairing.mix is None else pairing.mix)
    return shards.made(index.start, make, {"values": (queries, len(index))})["values"].to(problem.device)


def _against(problem: Problem, batch: Batch, pairing: Pairing) -> Tensor:
    """Scores of a batch, (Q, n), by contractions of factored gradients.

    Where some parameters' gradients would have to be written out and few directions are enough, by forward-mode
    derivatives along these.
    """
    mix = pairing.mix
    if mix is None or not _takes_slopes(problem, pairing):
        return pairing(problem.loss_gradients(batch))
    directions = {p: t for b in problem.blocks for p, t in b.unpack(written(pairing.packed[b.name])).items()}
    return mix @ torch.cat([problem.slopes(batch, some) for some in vectors.chunk(directions, 16)])


def _takes_slopes(problem: Problem, pairing: Pairing) -> bool:
    """Whether few directions stand for many rows that would have to be written out."""
    return pairing.mix is not None and bool(problem.layout.slow)
