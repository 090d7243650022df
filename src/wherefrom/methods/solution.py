"""From the queries' gradients to the directions that score the training set, cut to a low rank if asked.

Directions of low rank take so little memory that many queries can share one pass over the training set. Those of full
rank are solved for and cut a piece of the queries at a time, so that they need not all fit into memory.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wherefrom.curvature import kronecker
from wherefrom.curvature.eigenbasis import KroneckerBlock
from wherefrom.data.examples import Examples
from wherefrom.digest import digest
from wherefrom.errors import AttributionWarning, ConvergenceWarning, DivergenceError
from wherefrom.methods.stream import Measurement, query_gradients, solved
from wherefrom.model.capture import OutputCotangents
from wherefrom.model.problem import Problem
from wherefrom.persample.gradients import Gradients, concatenate
from wherefrom.persample.lowrank import checked
from wherefrom.solvers.base import Inverse, Pairing, Solution
from wherefrom.solvers.kronecker import EigenInverse
from wherefrom.store import Shards

COPIES = 8  # full-rank vectors per query that a solve may hold
SAMPLE = 64  # training examples on which the error is measured


@dataclass(frozen=True)
class Pieces:
    """Gradients of the queries' measurements in pieces that fit into memory, computed anew each time.

    Args:
        problem: the model at the weights where they are taken.
        examples: the queries.
        output_cotangents: those of their measurements.
        size: queries in a piece.
    """

    problem: Problem
    examples: Examples
    output_cotangents: OutputCotangents
    size: int

    def __iter__(self) -> Iterator[Gradients]:
        held: list[Gradients] = []
        for _, batch in self.problem.batches(self.examples):
            rows = self.problem.gradients(batch, self.output_cotangents)
            for part in (rows[i : i + self.size] for i in range(0, len(rows), self.size)):
                if held and sum(map(len, held)) + len(part) > self.size:
                    yield concatenate(held)
                    held = []
                held.append(part)
        yield concatenate(held)


def pieces(
    problem: Problem,
    queries: Any,
    measurement: Measurement | None = None,
    batch_size: int | None = None,
    mean: bool = False,
    rank: float | None = None,
) -> Iterable[Gradients]:
    """The queries' gradients, or their mean, for `directions`: in one piece, or as many as memory asks for.

    Raises:
        InputError: for a bad rank.
    """
    if rank is not None:
        checked(rank)
    if rank is None or mean:
        rows = query_gradients(problem, queries, measurement, batch_size)
        return [rows.mean() if mean else rows]
    width = sum(b.size for b in problem.blocks) * problem.dtype.itemsize * COPIES
    cotangents = problem.output_cotangents("measurement", measurement)
    return Pieces(problem, Examples(queries, "queries", batch_size), cotangents, max(1, int(problem.memory / width)))


def fingerprint(rows: Iterable[Gradients]) -> str:
    """A hash of the queries' gradients, however they are cut into pieces."""
    found = hashlib.blake2b(digest_size=16)
    for piece in rows:
        written = piece.dense()
        for q in range(len(piece)):
            found.update(digest({p: t[q] for p, t in written.items()}).encode())
    return found.hexdigest()


def directions(
    inverse: Inverse, rows: Iterable[Gradients], certify: bool, shards: Shards | None = None, rank: float | None = None
) -> tuple[Pairing, Solution, dict[str, Any]]:
    """What scores the training set on all queries.

    Args:
        inverse: (C + damping)^-1.
        rows: the queries' gradients, see `pieces`.
        certify: measure the residuals, at full rank.
        shards: where solutions are kept, and taken from if they are there.
        rank: of each query's matrix in each block, see `wherefrom.persample.lowrank.truncated`; None: full.

    Returns:
        The pairing; the solution without x; with a rank, also ``truncation``: the rank; ``error`` and ``mean error``,
        |s_r - s| / |s| of the worst query and on average over up to 64 training examples, s their scores at full rank;
        and ``energy``, the average share of the squared norm kept, in the norm of `Pairing.truncated`.
    """
    pairings, solutions, start = [], [], 0
    cut = None if rank is None else Cut(inverse, rank)
    for piece in rows:
        stop = start + len(piece)
        name = "solution" if rank is None else f"solution-{start}-{stop}"
        with _numbered(start, stop) if start else nullcontext():
            pairing, solution = _full(inverse, piece, certify, shards, name, cut is None)
        pairings.append(cut(pairing) if cut else pairing)
        solutions.append(solution)
        start = stop
    return Pairing.joined(pairings), _joined(solutions), cut.report() if cut else {}


class Cut:
    """Cuts pairings to a rank, and keeps what that does to the scores of a few training examples, evenly spread.

    Args:
        inverse: (C + damping)^-1. EKFAC's own Kronecker factors tell what matters to scores; for other methods those of
            the few training examples do.
        rank: see `wherefrom.persample.lowrank.truncated`.
    """

    def __init__(self, inverse: Inverse, rank: float):
        self.problem, self.rank = inverse.curvature.problem, rank
        N = len(self.problem.train)
        self.sample = self.problem.train.subset(torch.linspace(0, N - 1, min(SAMPLE, N)).round().long())
        self.factors = inverse.factors if isinstance(inverse, EigenInverse) else self._sampled()
        self.kept: list[Tensor] = []
        self.errors: list[Tensor] = []

    def __call__(self, full: Pairing) -> Pairing:
        """The pairing by directions of low rank."""
        low, (dropped, whole) = full.truncated(self.rank, self.factors)
        self.kept.append(1 - dropped / whole.clamp(min=1e-300))
        squares = []
        for _, batch in self.problem.batches(self.sample):
            g = self.problem.loss_gradients(batch)
            exact = full(g).double()
            squares.append(torch.stack([(low(g) - exact).square().sum(1), exact.square().sum(1)]))
        difference, scores = torch.stack(squares).sum(0)
        self.errors.append((difference / scores.clamp(min=1e-300)).sqrt())
        return low

    def report(self) -> dict[str, Any]:
        """What is said of all queries; a `AttributionWarning` names those whose scores changed by more than half."""
        errors = torch.cat(self.errors)
        if len(bad := (errors > 0.5).nonzero().flatten().tolist()):
            warnings.warn(
                f"rank {self.rank} changes the scores of {len(bad)} of {len(errors)} queries by more than half of them "
                f"(up to {float(errors.max()):.2g} times): queries {bad[:10]}. Raise the rank, or leave it out.",
                AttributionWarning,
                stacklevel=4,
            )
        error = {"error": float(errors.max()), "mean error": float(errors.mean())}
        return {"truncation": {"rank": self.rank, **error, "energy": float(torch.cat(self.kept).mean())}}

    def _sampled(self) -> dict[str, KroneckerBlock]:
        return kronecker.fit(self.problem.with_train(self.sample), "true")


def _full(
    inverse: Inverse, rows: Gradients, certify: bool, shards: Shards | None, name: str, turned: bool
) -> tuple[Pairing, Solution]:
    """Directions of full rank, in the inverse's shorter way if nothing is certified; in its bases if not ``turned``."""
    if not certify:
        pairing = inverse.within(rows) if isinstance(inverse, EigenInverse) and not turned else inverse.pairing(rows)
        if pairing is not None:
            return pairing, Solution({}, None, torch.ones(len(rows), dtype=torch.bool))
    solution = solved(inverse, rows, certify, shards, name)
    return Pairing.of(solution.x, rows.blocks), solution


def _joined(parts: list[Solution]) -> Solution:
    """The certificates of several solves; histories go on with their last residuals to the longest."""
    steps = max(len(p.history) for p in parts)
    residuals = [p.residual for p in parts if p.residual is not None]
    history = [
        torch.cat([p.history, p.history[-1:].expand(steps - len(p.history), -1)]) if len(p.history) else p.history
        for p in parts
    ]
    return Solution(
        {},
        torch.cat(residuals) if residuals else None,
        torch.cat([p.converged for p in parts]),
        max(p.steps for p in parts),
        torch.cat(history, 1),
        sum(p.passes for p in parts),
        sum(p.seconds for p in parts),
    )


@contextmanager
def _numbered(start: int, stop: int) -> Iterator[None]:
    """Warnings and errors that name queries by their numbers in a piece say which piece that is."""
    where = f"among queries {start} to {stop - 1}, counted from 0: "
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        try:
            yield
        except DivergenceError as error:
            raise DivergenceError(f"{where}{error}") from error
    for found in caught:
        said = f"{where}{found.message}" if found.category is ConvergenceWarning else str(found.message)
        warnings.warn_explicit(said, found.category, found.filename, found.lineno)
