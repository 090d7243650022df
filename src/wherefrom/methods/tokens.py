"""Scores by token of the query: each token of a measurement is a right-hand side of its own.

The tokens' measurements sum to the query's, and so do their gradients and their solutions: what is solved for each
token answers for the whole query too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.data.examples import Batch, Examples
from wherefrom.errors import expected
from wherefrom.methods.parts import Indices, batches_of
from wherefrom.methods.stream import Measurement
from wherefrom.model.problem import Problem
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients, concatenate
from wherefrom.solvers.base import Inverse

COPIES = 8  # full-rank vectors for each right-hand side that a solve may hold


@dataclass(frozen=True, eq=False)
class TokenGradients:
    """Gradients of the queries' measurements, token by token, in pieces that fit into the problem's memory.

    Args:
        problem: the model at the weights where they are taken.
        examples: the queries, one to a batch.
        parts: (outputs, batch) to (B, T), whose sum over T is the measurement.
    """

    problem: Problem
    examples: Examples
    parts: Measurement

    def __iter__(self) -> Iterator[tuple[Gradients, list[tuple[int, int]]]]:
        """Yield gradients, one row for each token that has one, and the query and the place of each.

        Raises:
            UnsupportedError: if the task does not split its measurement and no parts are given.
        """
        held: list[Gradients] = []
        places: list[tuple[int, int]] = []
        for (q, *_), batch in self.problem.batches(self.examples):
            with self.problem.observed() as model, torch.no_grad():
                outputs = self.problem.outputs(model, batch)
            width, cotangent = _token_cotangents(self.parts, outputs, batch)
            tokens = [t for t in range(width) if cotangent(t).any()]
            size = self._tokens_at_once(outputs.numel())

            for i in range(0, len(tokens), size):
                some = tokens[i : i + size]
                held.append(self._differentiate(batch, some, cotangent))
                places += [(q, t) for t in some]
                if sum(map(len, held)) >= size:
                    yield concatenate(held), places
                    held, places = [], []
        if held:
            yield concatenate(held), places

    def widths(self) -> list[int]:
        """Count the tokens of each query, those without a gradient too."""
        widths = []
        for _, batch in self.problem.batches(self.examples):
            with self.problem.observed() as model, torch.no_grad():
                outputs = self.problem.outputs(model, batch)
            widths.append(_token_cotangents(self.parts, outputs, batch)[0])
        return widths

    def _tokens_at_once(self, outputs: int) -> int:
        numbers = max(outputs, sum(block.size for block in self.problem.blocks))
        return max(1, int(self.problem.memory / (COPIES * self.problem.dtype.itemsize * numbers)))

    def _differentiate(self, batch: Batch, tokens: list[int], cotangent: Callable[[int], Tensor]) -> Gradients:
        """Take the gradient of each of some tokens of one query, as examples of one row each."""
        rows = self.problem.gradients(batch, lambda *_: torch.stack([cotangent(t) for t in tokens]))
        r = torch.arange(len(tokens), device=self.problem.device)
        return rows.pick(torch.zeros_like(r), r)


@dataclass(frozen=True, eq=False)
class QueryTokens:
    """Solutions for the tokens of the queries.

    Args:
        gradients: the tokens' right-hand sides.
        pieces: solutions, and the query and the place of each; None if they did not all fit into the problem's memory:
            then they are solved for again when they are asked for.
        count: of queries.
        widest: tokens of the longest query.
    """

    gradients: TokenGradients
    pieces: tuple[tuple[Directions, list[tuple[int, int]]], ...] | None
    count: int
    widest: int

    def score(self, inverse: Inverse, examples: Indices) -> Tensor:
        """Score n training examples by token of each query: (Q, T, n), 0 for tokens without a gradient."""
        problem = inverse.curvature.problem
        numbers = problem.train.check_numbers(examples)  # before anything is solved
        values = torch.zeros(self.count, self.widest, len(numbers), dtype=problem.dtype, device=problem.device)
        for directions, places in self.pieces or solve_tokens(inverse, self.gradients):
            batches = [problem.loss_gradients(batch) for batch in batches_of(problem, numbers)]
            scores = torch.cat([rows.dot(directions)[..., 0] for rows in batches], 1)  # (tokens, n)
            for (q, t), row in zip(places, scores, strict=True):
                values[q, t] = row
        return values


def solve_tokens(inverse: Inverse, gradients: TokenGradients) -> Iterator[tuple[Directions, list[tuple[int, int]]]]:
    """Yield solutions for the tokens, a piece at a time, with the query and the place of each; nothing is certified."""
    for rows, places in gradients:
        b = rows.to_directions().to_eigenbasis(inverse.scoring_basis)
        yield inverse.solve(b, certify=False)[0], places


def sum_over_tokens(inverse: Inverse, gradients: TokenGradients) -> tuple[Directions, QueryTokens]:
    """Solve for every token, and sum the solutions of each query: Q directions, and the tokens'.

    The tokens' own solutions are held as long as they fit into the problem's memory.
    """
    problem = inverse.curvature.problem
    count, widest = len(gradients.examples), max(gradients.widths())
    total: Directions | None = None
    held: list[tuple[Directions, list[tuple[int, int]]]] | None = []
    free = problem.memory
    for directions, places in solve_tokens(inverse, gradients):
        queries = torch.tensor([q for q, _ in places], device=problem.device)
        part = directions.sum_by(queries, count)
        total = part if total is None else total.add(part)
        free -= directions.numbers() * problem.dtype.itemsize
        if held is not None and free >= 0:
            held.append((directions, places))
        else:
            held = None
    if total is None:  # no query has a label: no token has a gradient, and all scores are 0
        like = next(iter(problem.parameters.values())).detach()
        total = Directions.zeros(problem.blocks, count, like)
    return total, QueryTokens(gradients, None if held is None else tuple(held), count, widest)


def _token_cotangents(parts: Measurement, outputs: Tensor, batch: Batch) -> tuple[int, Callable[[int], Tensor]]:
    """Return how many parts a query has, and what makes the cotangent of the outputs that belongs to each."""
    h = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = parts(h, batch)
    if value.ndim != 2 or len(value) != 1 or not value.isfinite().all():
        got = f"{tuple(value.shape)}" + ("" if value.isfinite().all() else " with NaN or infinity")
        raise expected("the parts of a measurement", f"finite numbers of shape ({len(h)}, T)", got)
    if not value.requires_grad:
        raise expected("the parts of a measurement", "computed from the outputs", "numbers that do not depend on them")

    def cotangent(t: int) -> Tensor:
        return torch.autograd.grad(value[0, t], h, retain_graph=True)[0]

    return value.shape[1], cotangent
