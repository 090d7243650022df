"""Solutions: what an inverse made of the queries, solved once and used for everything that is asked of it.

    solution = fitted.solve(queries)
    solution.score(), solution.by_block([3, 17]), solution.by_token([3, 17]), solution.certificate

Directions that are kept in their eigenbases, or cut to a low rank, take less work or memory. Those of full rank are
solved for and cut a piece of the queries at a time, so that they need not all fit into memory.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wherefrom.curvature import kronecker
from wherefrom.data.examples import Examples
from wherefrom.digest import digest
from wherefrom.errors import AttributionWarning, ConvergenceWarning, DivergenceError, InputError
from wherefrom.methods import agreement, parts
from wherefrom.methods.stream import QueryGradients, score_self_influence, score_stream
from wherefrom.methods.tokens import QueryTokens
from wherefrom.model.problem import Problem
from wherefrom.persample.directions import Directions, concatenate
from wherefrom.persample.eigenbasis import KroneckerBlock
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.lowrank import check_rank
from wherefrom.scores import Certificate, Scores
from wherefrom.solvers.base import Inverse, relative_norm, warn_unconverged
from wherefrom.store import Shards
from wherefrom.surroundings import undisturbed

SAMPLE = 64  # training examples on which the error of a low rank is measured


@dataclass(frozen=True, eq=False)
class Solution:
    """x with (C + damping) x ~ grad f of Q queries, and what can be asked of it.

    Args:
        inverse: what made it.
        directions: x.
        certificate: how good it is.
        queries: the gradients of the measurements, computed anew each time they are read.
        provenance: the configuration, versions and coverage of the fit.
        certify: whether scores are to be certified where their agreement with accurate ones says more than a residual.
        seconds: of the fit and of the solve.
        tokens: the solution of each token of the queries, where these were asked for.
        truncation: how the directions were cut to a low rank, and what that does to scores.
        batch_size: examples per pass of the model, of those that are scored in place of the training set.
    """

    inverse: Inverse
    directions: Directions
    certificate: Certificate
    queries: QueryGradients
    provenance: dict[str, Any]
    certify: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: QueryTokens | None = None
    truncation: dict[str, Any] | None = None
    batch_size: int | None = None

    def __len__(self) -> int:
        """Count the queries, Q."""
        return len(self.directions)

    @property
    def problem(self) -> Problem:
        """The model, task, data and parameters of the fit."""
        return self.inverse.curvature.problem

    @undisturbed()
    def score(self, examples: Any = None, self_influence: bool = False, folder: str | Path | None = None) -> Scores:
        """Score all training examples on all queries, in one pass over them.

        Args:
            examples: n examples to score in place of the training set, in its form, such as data that might be trained
                on: adding one to the N training examples changes f by minus its score / N, to first order.
            self_influence: compute the self-influence of what is scored too.
            folder: where each batch's scores are kept, so that the same call goes on where a killed one stopped; what
                lies there must be of the same model, data and settings.

        Returns:
            `Scores` (Q, N), positive where removing the example would raise f. Where they are of an approximate inverse
            such as EKFAC's, one or two queries are compared with accurate solutions too, all within the time that the
            fit and the scores took: see `Scores.agreement`.

        Raises:
            ArtefactError: if the folder holds scores of something else, by name of what differs.
        """
        start = time.perf_counter()
        scored = read_examples(examples, self.batch_size)
        shards = Shards(folder, "scores", self.cache_key(scored)) if folder is not None else None
        values = score_stream(self.problem, self.directions, scored, shards=shards)
        seconds = self.seconds | {"scores": time.perf_counter() - start}

        certificate = replace(self.certificate, row_error=self.problem.row_error)
        if self.certify and self.inverse.is_approximate:
            spent, scoring = sum(seconds.values()), seconds["scores"]
            certificate = agreement.certify(self.inverse, self.queries, values, scored, certificate, spent, scoring)
            seconds["certificate"] = certificate.seconds

        cut = {"truncation": self.truncation} if self.truncation else {}
        costs = {"seconds": seconds, "passes": certificate.passes, "steps": certificate.steps}
        return Scores(
            values,
            certificate,
            self.provenance | costs | cut,
            score_self_influence(self.inverse, scored) if self_influence else None,
        )

    @undisturbed()
    def by_block(self, examples: parts.Indices) -> dict[str, Tensor]:
        """Split the scores of some training examples by the block of parameters that each part comes through.

        Args:
            examples: n training examples, by number.

        Returns:
            block name to (Q, n); over all blocks they sum to the scores.
        """
        return parts.by_block(self.problem, self.directions, examples)

    @undisturbed()
    def by_token(self, examples: parts.Indices) -> Tensor:
        """Split the scores of some training examples over the positions of each.

        A position's part is that of the gradient signal written there, so it has credit for losses at later tokens that
        reach it. What comes through a layer that sees one vector of each sequence stands at the first, with a warning.

        Args:
            examples: n training examples, by number.

        Returns:
            (Q, n, T), T the widest batch of those examples, in the order of `wherefrom.hf.aligned`, 0 at padding; over
            T they sum to the scores.

        Raises:
            UnsupportedError: if the task has no positions, or the gradient of a block has others or none.
        """
        return parts.by_token(self.problem, self.directions, examples)

    @undisturbed()
    def by_query_token(self, examples: parts.Indices) -> Tensor:
        """Split the scores of some training examples over the tokens of each query.

        Args:
            examples: n training examples, by number.

        Returns:
            (Q, T, n), T the widest query; over T they sum to the scores.

        Raises:
            InputError: if the queries were not solved token by token: ``solve(queries, by_token=True)``.
        """
        if self.tokens is None:
            raise InputError(
                "Scores by token of the query need a solution for each token, and these queries were solved as wholes. "
                "Solve with by_token=True."
            )
        return self.tokens.score(self.inverse, examples)

    @undisturbed()
    def similarity(self, others: Any = None) -> Scores:
        """Compare queries with one another, or with other examples: cosines in the inner product of the inverse.

        The queries' measurement must be the training loss, on which both sides of a similarity stand: see
        `wherefrom.similarity`.

        Args:
            others: m examples in the form of the training data; None takes the Q queries.

        Returns:
            `Scores` whose values are cosines, (Q, Q) or (Q, m), and whose columns are the others. Among themselves the
            diagonal is 1, and max |s - s^T|, the solver's error, is ``provenance["measured"]["asymmetry"]``.

        Raises:
            InputError: if the self-influence of an example is not positive.
        """
        alone = others is None
        scores = self.score(self.queries.examples if alone else others, self_influence=not alone)
        mine = scores.values.diagonal() if alone else self.quadratic_forms().to(scores.values)
        theirs = replace(scores, self_values=mine) if alone else scores
        half = theirs.relative()
        values = replace(half, values=half.values.T, self_values=mine).relative().values.T
        measured = {"asymmetry": float((values - values.T).abs().max())} if alone else {}
        return replace(half, values=values, provenance=half.provenance | {"measured": measured})

    @undisturbed()
    def quadratic_forms(self) -> Tensor:
        """Return b . x of each query, (Q,): its self-influence, if what is measured is its loss."""
        forms, start = [], 0
        for rows in self.queries:
            b = rows.to_directions()
            forms.append(b.dot(self.directions[start : start + len(b)]))
            start += len(b)
        return torch.cat(forms)

    def mean(self) -> Solution:
        """Return the solution for the mean of the queries' measurements, as of a validation set; nothing is solved.

        Its residual is measured if theirs were, one pass over the training data.
        """
        directions, queries = self.directions.mean(), replace(self.queries, mean=True)
        residual, passes = None, 0.0
        if self.certificate.residual is not None:
            b = next(iter(queries)).dense()
            residual, passes = relative_norm(self.inverse.residual_vector(directions, b), b), 1.0
        certificate = Certificate(
            residual,
            self.certificate.converged.all().view(1),
            self.certificate.steps,
            passes=passes + self.certificate.passes,
            seconds=self.certificate.seconds,
        )
        return replace(self, directions=directions, certificate=certificate, queries=queries, tokens=None)

    @undisturbed()
    def truncate(self, rank: float) -> Solution:
        """Cut each query's direction in each block to a low rank, so that many fit into memory and into one pass.

        Args:
            rank: 32, say; or in (0, 1) that share of its energy, by rank 32 at most.

        Returns:
            The solution; what that does to scores is its ``truncation``: ``error`` and ``mean error``, |s_r - s| / |s|
            of the worst query and on average over up to 64 training examples, s their scores at full rank; and
            ``energy``, the average share of the squared norm kept, in the norm of `Directions.truncate`.
        """
        cut = RankCut(self.inverse, rank)
        return replace(self, directions=cut(self.directions), truncation=cut.report())

    def cache_key(self, scored: Examples | None) -> dict[str, Any]:
        """Return all that the scores depend on; the queries by their gradients, which the measurement is part of."""
        return key_of(self.inverse, self.provenance) | {
            "queries": hash_gradients(self.queries),
            "rank": self.truncation["rank"] if self.truncation else None,
            "examples": scored.fingerprint() if scored else None,
            "batch size": (scored or self.problem.train).batch_size,
        }


# solving --------------------------------------------------------------------------------------------------------------


def solve_queries(
    inverse: Inverse,
    queries: QueryGradients,
    certify: bool = True,
    rank: float | None = None,
    shards: Shards | None = None,
) -> tuple[Directions, Certificate, dict[str, Any] | None]:
    """Solve for the queries, a piece at a time.

    Args:
        inverse: (C + damping)^-1.
        queries: their gradients.
        certify: measure the residuals, at full rank; not of approximate inverses, whose residual says little.
        rank: of each query's matrix in each block, see `wherefrom.persample.lowrank.truncate`; None: full.
        shards: where solutions are kept, and taken from if they are there.

    Returns:
        The directions, their certificate, and how they were cut.
    """
    cut = None if rank is None else RankCut(inverse, rank)
    directions: list[Directions] = []
    certificates: list[Certificate] = []
    start = 0
    for rows in queries:
        stop = start + len(rows)
        name = "all" if rank is None else f"{start}-{stop}"
        with _name_piece(start, stop) if start else nullcontext():
            # A low rank is cut in the eigenbasis, and comes out of it.
            bases = inverse.scoring_basis if cut else _choose_bases(inverse, rows)
            x, certificate = _solve_piece(inverse, rows, bases, certify, shards, name)
        directions.append(cut(x) if cut else x)
        certificates.append(certificate)
        start = stop
    return concatenate(directions), Certificate.join(certificates), cut.report() if cut else None


def _solve_piece(
    inverse: Inverse,
    rows: Gradients,
    bases: Mapping[str, KroneckerBlock],
    certify: bool,
    shards: Shards | None,
    name: str,
) -> tuple[Directions, Certificate]:
    """Solve for Q queries' gradients, R = 1; take the solution from the disk if it lies there, else keep it there."""
    if inverse.is_approximate:
        # Solutions come in the bases that right-hand sides are in. What is factored is rotated position by position.
        return inverse.solve(rows.to_directions().to_eigenbasis(bases), certify=False)
    if shards is None:
        return inverse.solve(rows.to_directions(), certify)

    tensors = _read_solution(inverse, shards, name, len(rows))
    if tensors is None:
        x, certificate = inverse.solve(rows.to_directions(), certify)
        shards.put(name, _pack_solution(x, certificate))
        return x, certificate
    if inverse.tolerance is not None:
        warn_unconverged(tensors["converged"], "queries", inverse.tolerance)
    return _unpack_solution(inverse.curvature.problem, tensors)


OPTIONAL = ("residual", "predicted")  # tensors of a certificate that may be missing


def _pack_solution(x: Directions, certificate: Certificate) -> dict[str, Tensor]:
    costs = [certificate.steps, certificate.passes, certificate.seconds]
    tensors = {f"x|{name}": t for name, t in x.dense().tensors().items()}
    tensors |= {"converged": certificate.converged, "history": certificate.history}
    tensors |= {name: t for name in OPTIONAL if (t := getattr(certificate, name)) is not None}
    return tensors | {"cost": torch.tensor(costs, dtype=torch.float64)}


def _read_solution(inverse: Inverse, shards: Shards, name: str, count: int) -> dict[str, Tensor] | None:
    shapes: dict[str, tuple[int | None, ...]] = {
        f"x|{block.name}": (count, *block.sides) for block in inverse.curvature.problem.blocks
    }
    shapes |= {"converged": (count,), "history": (None, None), "cost": (3,)}
    shapes |= {"residual": (count,), "predicted": (count,)}
    measured = ("residual", "history", "predicted")  # a theory may expect an error without bound
    return shards.get(name, shapes, OPTIONAL, {"converged": torch.bool}, measured)


def _unpack_solution(problem: Problem, tensors: dict[str, Tensor]) -> tuple[Directions, Certificate]:
    t = {name: value.to(problem.device) for name, value in tensors.items()}
    steps, passes, seconds = t["cost"].tolist()
    x = Directions(problem.blocks, {block.name: t[f"x|{block.name}"] for block in problem.blocks})
    certificate = Certificate(
        t.get("residual"), t["converged"], int(steps), t["history"], passes, seconds, t.get("predicted")
    )
    return x, certificate


def _choose_bases(inverse: Inverse, rows: Gradients) -> dict[str, KroneckerBlock]:
    """Choose the blocks whose solutions stay in their eigenbasis, where N examples' gradients are then rotated to.

    The others are rotated back, which costs less where the queries are few or the examples' rows are long.
    """
    N = len(inverse.curvature.problem.train)
    bases = {}
    for name, basis in inverse.scoring_basis.items():
        each_example, each_solution = basis.rotation_costs(rows.rows[name])
        if each_example * N <= each_solution * len(rows):
            bases[name] = basis
    return bases


class RankCut:
    """Cuts directions to a rank, and measures what that does to the scores of a few training examples, evenly spread.

    Args:
        inverse: (C + damping)^-1. EKFAC's own Kronecker factors tell what matters to scores; for other methods those of
            the few training examples do.
        rank: see `wherefrom.persample.lowrank.truncate`.
    """

    def __init__(self, inverse: Inverse, rank: float):
        check_rank(rank)
        self.problem, self.rank = inverse.curvature.problem, rank
        N = len(self.problem.train)
        self.sample = self.problem.train.subset(torch.linspace(0, N - 1, min(SAMPLE, N)).round().long())
        self.factors = inverse.scoring_basis or self._fit_factors()
        self._energies: list[Tensor] = []
        self._errors: list[Tensor] = []

    def __call__(self, full: Directions) -> Directions:
        """Return directions of low rank."""
        low, (dropped, whole) = full.truncate(self.rank, self.factors)
        self._energies.append(1 - dropped / whole.clamp(min=1e-300))

        squares = []
        for _, batch in self.problem.batches(self.sample):
            rows = self.problem.loss_gradients(batch)
            exact = rows.dot(full)[..., 0].double()
            change = rows.dot(low)[..., 0].double() - exact
            squares.append(torch.stack([change.square().sum(1), exact.square().sum(1)]))
        changes, scores = torch.stack(squares).sum(0)
        self._errors.append((changes / scores.clamp(min=1e-300)).sqrt())
        return low

    def report(self) -> dict[str, Any]:
        """Say what was cut; an `AttributionWarning` names queries whose scores changed by more than half."""
        errors = torch.cat(self._errors)
        if len(bad := (errors > 0.5).nonzero().flatten().tolist()):
            warnings.warn(
                f"rank {self.rank} changes the scores of {len(bad)} of {len(errors)} queries by more than half of them "
                f"(up to {float(errors.max()):.2g} times): queries {bad[:10]}. Raise the rank, or leave it out.",
                AttributionWarning,
                stacklevel=4,
            )
        error = {"error": float(errors.max()), "mean error": float(errors.mean())}
        return {"rank": self.rank, **error, "energy": float(torch.cat(self._energies).mean())}

    def _fit_factors(self) -> dict[str, KroneckerBlock]:
        return kronecker.fit(self.problem.with_train(self.sample), "true")


@contextmanager
def _name_piece(start: int, stop: int) -> Iterator[None]:
    """Let warnings and errors that name queries by their numbers in a piece say which piece that is."""
    where = f"among queries {start} to {stop - 1}, counted from 0: "
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        try:
            yield
        except DivergenceError as error:
            raise DivergenceError(f"{where}{error}") from error
    for warning in caught:
        text = f"{where}{warning.message}" if warning.category is ConvergenceWarning else str(warning.message)
        warnings.warn_explicit(text, warning.category, warning.filename, warning.lineno)


# keys -----------------------------------------------------------------------------------------------------------------


def key_of(inverse: Inverse, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return what a fit depends on: its configuration, the damping, the model and the data."""
    configuration = {name: provenance[name] for name in ("solver", "damping", "curvature") if name in provenance}
    return configuration | inverse.curvature.problem.fingerprint() | {"lambda": dict(inverse.damping)}


def hash_gradients(pieces: Iterable[Gradients]) -> str:
    """Hash the queries' gradients, however they are cut into pieces."""
    total = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        written = piece.dense().tensors()
        for q in range(len(piece)):
            total.update(digest({name: t[q] for name, t in written.items()}).encode())
    return total.hexdigest()


def read_examples(examples: Any, batch_size: int | None) -> Examples | None:
    """Read examples that are to be scored in place of the training set."""
    if examples is None or isinstance(examples, Examples):
        return examples
    return Examples(examples, "examples", batch_size)
