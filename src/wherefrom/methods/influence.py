"""Influence: fit an inverse once, then solve for any queries and score them against one stream of the training set.

    score(q, z) = grad f(q)^T (C + damping I)^-1 grad l(z)                       (Koh & Liang 2017; ASTRA eq. 2)

The sign is the one of removal: a positive score means that removing z would raise f(q).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wherefrom import records, store
from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import ByBlock, Damping
from wherefrom.curvature.ggn import GGN
from wherefrom.data.examples import Examples
from wherefrom.errors import InputError
from wherefrom.methods.solution import RankCut, Solution, hash_gradients, key_of, read_examples, solve_queries
from wherefrom.methods.stream import Measurement, QueryGradients, score_self_influence
from wherefrom.methods.tokens import COPIES, TokenGradients, sum_over_tokens
from wherefrom.model.observe import Select
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample.eigenbasis import Basis, KroneckerBlock
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.lowrank import check_rank
from wherefrom.scores import Certificate, Scores
from wherefrom.solvers.auto import Auto
from wherefrom.solvers.base import Inverse, Solver, relative_norm, require_solvers, with_seed
from wherefrom.solvers.neumann import Plan
from wherefrom.store import Shards
from wherefrom.surroundings import undisturbed

logger = logging.getLogger("wherefrom")


@dataclass(frozen=True)
class Influence:
    """Influence functions with any curvature and any solver: a frozen record of settings.

    Args:
        solver: how (C + damping I)^-1 is applied.
        damping: a number, or a `Damping`.
        curvature: which C, a function of the `Problem`: GGN, Hessian, EmpiricalFisher, or ``functools.partial`` of one.
        parameters: which trainable parameters; see `Problem`.
        batch_size: examples per pass of the model; changes speed and memory only.
        memory: bytes that may be cached; changes speed and memory only.
        seed: replaces the seed of every solver that has one; None leaves them.
        progress: show progress bars; None shows them on a terminal.
    """

    solver: Solver | Literal["auto"] = "auto"
    damping: float | Damping = field(default_factory=Damping.per_example)
    curvature: Callable[[Problem], Curvature] = GGN
    parameters: Select = None
    batch_size: int | None = None
    memory: float = 2**31
    seed: int | None = None
    progress: bool | None = None

    @undisturbed()
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedInfluence:
        """Fit the inverse to a trained model and its training data; everything that needs no query.

        Args:
            model: the trained model; it comes back as it was.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Raises:
            InputError, UnsupportedError: see `Problem` and the solver.
        """
        start = time.perf_counter()
        damping, solver = Damping.of(self.damping), self.resolve_solver()
        problem = self._read_problem(model, task, train)
        logger.info(problem.coverage())
        curvature = self.curvature(problem)
        solver.check(curvature)  # what is wrong with the settings is told before the model is run
        problem.examine()  # what is wrong with the model is told here
        inverse = solver.fit(curvature, damping)
        return FittedInfluence(self, inverse, time.perf_counter() - start)

    @undisturbed()
    def load(self, path: str | Path, model: nn.Module, task: Task | object, train: Any) -> FittedInfluence:
        """Take a fit from a file that was saved with the same configuration, model and data.

        Raises:
            ArtefactError: naming what differs: the configuration, the task, the weights, the parameters or the data.
        """
        tensors, header = store.load(path, "influence")
        problem, solver = self._read_problem(model, task, train), self.resolve_solver()
        store.same(path, header.get("config", {}), self.configuration())
        store.same(path, header.get("fingerprint", {}), problem.fingerprint())
        store.check_finite(path, tensors)
        problem.examine()
        damping = _check_damping(path, header.get("damping"), problem)

        on_device = {name: t.to(problem.device) for name, t in tensors.items()}
        given = {"curvature": self.curvature(problem), "damping": damping}
        with store.reading(path):
            inverse = records.rebuild(header.get("inverse"), on_device, given, saved_classes())
        if not isinstance(inverse, Inverse):
            raise store.wrong(path, "a fitted inverse", type(inverse).__name__)
        if unknown := set(tensors) - set(records.describe(inverse, GIVEN)[0]):
            raise store.wrong(path, f"what {solver!r} saves", f"also {min(unknown)}")
        solver.share(inverse)
        return FittedInfluence(self, inverse, 0.0)

    def resolve_solver(self) -> Solver:
        """Return the solver, with the seed that was asked for."""
        solver = Auto() if self.solver == "auto" else self.solver
        require_solvers(solver=solver)
        return solver if self.seed is None else with_seed(solver, self.seed)

    def configuration(self) -> dict[str, Any]:
        """Return what tells these settings from others that give other scores, in a form that JSON can hold."""
        curvature = getattr(self.curvature, "__name__", None) or repr(self.curvature)
        return {"solver": repr(self.resolve_solver()), "damping": str(Damping.of(self.damping)), "curvature": curvature}

    def _read_problem(self, model: nn.Module, task: Task | object, train: Any) -> Problem:
        return Problem(model, task, train, self.parameters, self.batch_size, self.memory, self.progress)


GIVEN = ("curvature", "damping")  # fields of an inverse that are not saved with it


@dataclass(frozen=True, eq=False)
class FittedInfluence:
    """An inverse that is fitted to a model and its training data, for any number of queries.

    Args:
        influence: the settings.
        inverse: the fitted inverse.
        seconds: that the fit took.
    """

    influence: Influence
    inverse: Inverse
    seconds: float = 0.0

    @property
    def problem(self) -> Problem:
        """The model, task, data and parameters of the fit."""
        return self.inverse.curvature.problem

    @undisturbed()
    def solve(
        self,
        queries: Any,
        measurement: Measurement | None = None,
        *,
        certify: bool = True,
        mean: bool = False,
        rank: float | None = None,
        by_token: bool | Measurement = False,
        folder: str | Path | None = None,
    ) -> Solution:
        """Solve for all queries together.

        Args:
            queries: Q queries, in the form of the training data.
            measurement: f of a query, (outputs, batch) to (B,), lower is better; None takes the task's.
            certify: measure each query's residual with the true operator (one more pass over the training data). For an
                approximate inverse such as EKFAC's, compare one or two queries with accurate solutions too, when they
                are scored.
            mean: solve for the mean of the queries' measurements, as of a validation set.
            rank: keep this rank of each query's direction in each block, 32 say, or in (0, 1) that share of its energy
                by rank 32 at most, so that many queries fit into one pass; see `Solution.truncate`.
            by_token: solve for each token of the queries, whose solutions sum to the query's, so that
                `Solution.by_query_token` can be asked. True takes the task's ``token_measurements``, in a language
                model at the tokens that are predicted; or give (outputs, batch) to (B, T), whose sum over T is the
                measurement.
            folder: where solutions are kept, so that the same call goes on where a killed one stopped; what lies there
                must be of the same model, data and settings.

        Raises:
            InputError: queries that the model does not accept, a measurement that is not one finite number a query, or
                a rank that is neither.
            UnsupportedError: if tokens are asked for and the task does not split its measurement.
            DivergenceError: if a solve does not stay finite.
            ArtefactError: if the folder holds solutions of something else, by name of what differs.
        """
        start = time.perf_counter()
        inverse, problem = self.inverse, self.problem
        if rank is not None:
            check_rank(rank)
        asked = QueryGradients.of(
            problem,
            queries,
            measurement,
            self.influence.batch_size,
            size=None if rank is None else _queries_at_once(problem),
            mean=mean,
        )
        shards = None
        if folder is not None:
            key = key_of(inverse, self.provenance()) | {"queries": hash_gradients(asked), "rank": rank}
            shards = Shards(folder, "solution", key)

        tokens = None
        if by_token:
            if folder is not None:
                raise InputError(
                    "Solutions by token are not kept in a folder. Leave out folder= or by_token=; the scores that come "
                    "out of the solution can be kept."
                )
            parts = by_token if callable(by_token) else problem.task.token_measurements
            directions, certificate, tokens = self._solve_by_token(queries, asked, parts, certify)
            truncation = None
            if rank is not None:
                cut = RankCut(inverse, rank)
                directions = cut(directions)
                truncation = cut.report()
        else:
            directions, certificate, truncation = solve_queries(inverse, asked, certify, rank, shards)
        return Solution(
            inverse,
            directions,
            dataclasses.replace(certificate, row_error=problem.row_error),
            asked,
            self.provenance(),
            certify,
            {"fit": self.seconds, "solve": time.perf_counter() - start},
            tokens,
            truncation,
            self.influence.batch_size,
        )

    @undisturbed()
    def score(
        self,
        queries: Any,
        measurement: Measurement | None = None,
        *,
        certify: bool = True,
        examples: Any = None,
        self_influence: bool = False,
        folder: str | Path | None = None,
    ) -> Scores:
        """Solve for all queries and score the training examples: ``solve(queries, ...).score(...)``.

        Args:
            queries, measurement, certify: see `solve`, which has more to choose.
            examples, self_influence: see `Solution.score`.
            folder: where solutions and scores are kept, see both.
        """
        solution = self.solve(queries, measurement, certify=certify, folder=folder)
        return solution.score(examples, self_influence, folder)

    @undisturbed()
    def self_influence(self, examples: Any = None, folder: str | Path | None = None) -> Tensor:
        """Return g^T (C + damping)^-1 g of the loss gradient of every training example, or of those given, (N,).

        Solves go by the solver's own residual; examples that miss its tolerance are named in a `ConvergenceWarning`.

        Args:
            examples, folder: as for `Solution.score`.
        """
        scored = read_examples(examples, self.influence.batch_size)
        shards = None
        if folder is not None:
            more = {
                "examples": scored.fingerprint() if scored else None,
                "batch size": (scored or self.problem.train).batch_size,
            }
            shards = Shards(folder, "self-influence", key_of(self.inverse, self.provenance()) | more)
        return score_self_influence(self.inverse, scored, shards)

    def at(self, damping: float | Damping) -> FittedInfluence:
        """Return the fit at another damping; what does not depend on it (factors, rows, decompositions) is shared.

        A sweep is ``[fitted.at(x).score(queries) for x in dampings]``.
        """
        influence = dataclasses.replace(self.influence, damping=damping)
        inverse = influence.resolve_solver().fit(self.inverse.curvature, Damping.of(damping))
        return FittedInfluence(influence, inverse, 0.0)

    @undisturbed()
    def query_gradients(self, queries: Any, measurement: Measurement | None = None) -> Gradients:
        """Return the gradients of the Q queries' measurements, factored; ``.dense()`` writes them out."""
        return QueryGradients.of(self.problem, queries, measurement, self.influence.batch_size).together()

    @undisturbed()
    def save(self, path: str | Path) -> None:
        """Write the fitted inverse, with the fingerprints of the model and data that it belongs to."""
        tensors, description = records.describe(self.inverse, GIVEN)
        header = {
            "config": self.influence.configuration(),
            "fingerprint": self.problem.fingerprint(),
            "damping": dict(self.inverse.damping),
            "inverse": description,
        }
        store.save(path, "influence", tensors, header)

    def provenance(self) -> dict[str, Any]:
        """Return the configuration, versions and coverage, in a form that JSON can hold."""
        chosen = self.inverse.report()
        return (
            self.influence.configuration()
            | ({"chosen": chosen} if chosen else {})
            | {
                "coverage": self.problem.coverage(),
                "damping by block": dict(self.inverse.damping),
                "tolerance": self.inverse.tolerance,
                "torch": torch.__version__,
                "examples": len(self.problem.train),
            }
        )

    def _solve_by_token(
        self, queries: Any, asked: QueryGradients, parts: Measurement, certify: bool
    ) -> tuple[Any, Certificate, Any]:
        """Solve for each token, and certify the sums, which are the queries' solutions."""
        if asked.mean:
            raise InputError("The mean of queries has no tokens. Solve with by_token=True, or with mean=True.")
        inverse = self.inverse
        gradients = TokenGradients(self.problem, Examples(queries, "queries", 1), parts)
        directions, tokens = sum_over_tokens(inverse, gradients)
        certificate = Certificate.of_nothing_solved(len(directions))
        if certify and not inverse.is_approximate:
            directions = directions.dense()
            b = asked.together().dense()
            residual = relative_norm(inverse.residual_vector(directions, b), b)
            limit = float("inf") if inverse.tolerance is None else inverse.tolerance
            certificate = Certificate(residual, residual <= limit, passes=1.0)
        return directions, certificate, tokens


def saved_classes() -> list[type]:
    """List the classes that a saved fit may be made of, those of the user's own solvers too."""
    return records.with_subclasses(Inverse, Solver, KroneckerBlock, Basis, Plan)


def _queries_at_once(problem: Problem) -> int:
    """Count the queries that can be solved for together at full rank in the problem's memory."""
    width = sum(block.size for block in problem.blocks) * problem.dtype.itemsize
    return max(1, int(problem.memory / (COPIES * width)))


def _check_damping(path: str | Path, saved: Any, problem: Problem) -> ByBlock:
    """Read the damping of each block from a file.

    Raises:
        ArtefactError: if there is none, one of another block, or one that is not positive.
    """
    names = {block.name for block in problem.blocks}
    are_numbers = isinstance(saved, dict) and all(type(value) in (int, float) for value in saved.values())
    if not are_numbers or set(saved) != names:
        raise store.wrong(path, "a damping for each block of parameters", saved)
    if bad := [name for name, value in saved.items() if not 0 < value <= sys.float_info.max]:
        raise store.wrong(path, "positive finite dampings", f"{saved[bad[0]]} for {bad[0]}")
    return {name: float(value) for name, value in saved.items()}
