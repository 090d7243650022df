"""Scores in parts that sum to them: over blocks of parameters, tokens of a training sequence, or tokens of a query.

    score(q, n) = sum_l sum_t g[n,l,t]^T V[q,l] a[n,l,t],     V[q] = (C + damping I)^-1 grad f(q)   (Grosse et al. 2023)

The part of position t is that of the gradient signal written there: it has credit for the losses of later tokens, which
flow back to it, and for what its activations a have read of earlier ones. Nothing is certified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.data.examples import Batch, Examples
from wherefrom.errors import UnsupportedError, expected
from wherefrom.methods.solution import COPIES, directions
from wherefrom.methods.stream import Measurement
from wherefrom.model.problem import Problem
from wherefrom.persample.gradients import Gradients, concatenate
from wherefrom.solvers.base import Inverse

Indices = Sequence[int] | Tensor


def by_block(inverse: Inverse, rows: Gradients, examples: Indices) -> dict[str, Tensor]:
    """Scores of n training examples on Q queries' gradients by block of parameters: block name to (Q, n)."""
    problem = inverse.curvature.problem
    batches = _batches(problem, examples)
    pairing = directions(inverse, [rows], certify=False)[0]
    parts = [pairing.by_block(problem.loss_gradients(batch)) for batch in batches]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def by_token(inverse: Inverse, rows: Gradients, examples: Indices) -> Tensor:
    """Scores of n training examples on Q queries' gradients by position: (Q, n, T).

    Raises:
        UnsupportedError: if the task has no positions, or a block's gradient cannot be told apart by them.
    """
    problem = inverse.curvature.problem
    batches = _batches(problem, examples)
    pairing = directions(inverse, [rows], certify=False)[0]
    parts = []
    for batch in batches:
        real = problem.task.padding(batch)
        if real is None:
            raise UnsupportedError(
                f"{problem.task.name()} does not say which positions an example has (method `padding`), so a score "
                "cannot be split over them. Define it, or take by_block."
            )
        S = real.shape[1]
        parts.append(pairing(problem.gradients(batch, problem.output_cotangents("loss"), S)).unflatten(1, (-1, S)))
    T = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, T - part.shape[2])) for part in parts], 1)


def by_query_token(inverse: Inverse, queries: Any, examples: Indices, parts: Measurement | None = None) -> Tensor:
    """Scores of n training examples by token of the query: (Q, T, n); each token is a right-hand side of its own.

    As many are solved together as the problem's memory holds.

    Raises:
        UnsupportedError: if the task does not split its measurement and no parts are given.
    """
    problem, given = inverse.curvature.problem, Examples(queries, "queries", 1)
    examples = problem.train.chosen(examples)  # before anything is solved
    held: list[Gradients] = []
    where: list[tuple[int, int]] = []
    found: list[Tensor] = []
    T = 0

    def score() -> None:
        pairing = directions(inverse, [concatenate(held)], certify=False)[0]
        scored = [pairing(problem.loss_gradients(batch)) for batch in _batches(problem, examples)]
        found.append(torch.cat(scored, 1))
        held.clear()

    for (q, *_), batch in problem.batches(given):
        with problem.observed() as model, torch.no_grad():
            outputs = problem.outputs(model, batch)
        width, slope = _slopes(parts or problem.task.token_measurements, outputs, batch)
        tokens, T = [t for t in range(width) if slope(t).any()], max(T, width)
        numbers = max(outputs.numel(), sum(b.size for b in problem.blocks))
        size = max(1, int(problem.memory / (COPIES * problem.dtype.itemsize * numbers)))
        for i in range(0, len(tokens), size):
            some = tokens[i : i + size]
            rows = problem.gradients(batch, lambda *_, some=some, slope=slope: torch.stack([slope(t) for t in some]))
            r = torch.arange(len(some), device=problem.device)
            held.append(rows.pick(torch.zeros_like(r), r))
            where += [(q, t) for t in some]
            if sum(map(len, held)) >= size:
                score()
    if held:
        score()
    values = torch.zeros(len(given), T, len(examples), dtype=problem.dtype, device=problem.device)
    for (q, t), scores in zip(where, [s for block in found for s in block], strict=True):
        values[q, t] = scores
    return values


def _batches(problem: Problem, examples: Indices) -> Iterator[Batch]:
    """Batches of some training examples; the numbers are checked at once."""
    index = problem.train.chosen(examples)
    return (problem.batch(some) for some in index.split(problem.train.batch_size))


def _slopes(parts: Measurement, outputs: Tensor, batch: Batch) -> tuple[int, Callable[[int], Tensor]]:
    """How many parts a query has, and the cotangent of the outputs that belongs to each."""
    h = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = parts(h, batch)
    if value.ndim != 2 or len(value) != 1 or not value.isfinite().all():
        got = f"{tuple(value.shape)}" + ("" if value.isfinite().all() else " with NaN or infinity")
        raise expected("the parts of a measurement", f"finite numbers of shape ({len(h)}, T)", got)
    if not value.requires_grad:
        raise expected("the parts of a measurement", "computed from the outputs", "numbers that do not depend on them")
    return value.shape[1], lambda t: torch.autograd.grad(value[0, t], h, retain_graph=True)[0]
