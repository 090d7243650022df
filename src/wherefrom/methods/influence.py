"""Influence: fit an inverse once, then score any queries against one stream of the training set.

    score(q, z) = grad f(q)^T (C + damping I)^-1 grad l(z)                       (Koh & Liang 2017; ASTRA eq. 2)

The sign is the one of removal: a positive score means that removing z would raise f(q).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wherefrom import store
from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping
from wherefrom.curvature.ggn import GGN
from wherefrom.data.examples import Examples
from wherefrom.errors import InputError
from wherefrom.methods import certificate
from wherefrom.methods.parts import by_block, by_query_token, by_token
from wherefrom.methods.solution import directions, fingerprint, pieces
from wherefrom.methods.stream import Measurement, query_gradients, self_influence, streamed
from wherefrom.model.observe import Select
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample.gradients import Gradients
from wherefrom.scores import Scores
from wherefrom.solvers.auto import Auto
from wherefrom.solvers.base import Inverse, Solver, instance, seeded
from wherefrom.store import Shards
from wherefrom.surroundings import undisturbed

logger = logging.getLogger("wherefrom")


@dataclass
class Influence:
    """Influence functions with any curvature and any solver, fitted once and used for many queries.

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
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> Influence:
        """Fit the inverse to a trained model and its training data; everything that needs no query.

        Args:
            model: the trained model; it comes back as it was.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Returns:
            Itself.

        Raises:
            InputError, UnsupportedError: see `Problem` and the solver.
        """
        start = time.perf_counter()
        damping, solver = Damping.of(self.damping), self._solver()
        problem = self._problem(model, task, train)
        logger.info(problem.coverage())
        problem.examine()  # what is wrong with the model is told here
        self._curvature = self.curvature(problem)
        solver.check(self._curvature)
        self._inverse = solver.fit(self._curvature, damping)
        self._seconds = {"fit": time.perf_counter() - start}
        return self

    @undisturbed()
    def score(
        self,
        queries: Any,
        measurement: Measurement | None = None,
        certify: bool = True,
        self_influence: bool = False,
        candidates: Any = None,
        folder: str | Path | None = None,
        mean: bool = False,
        rank: float | None = None,
    ) -> Scores:
        """Scores of all training examples on all queries, solved together and streamed once.

        Args:
            queries: Q queries, in the form of the training data.
            measurement: f of a query, (outputs, batch) to (B,), lower is better; None takes the task's.
            certify: measure each query's residual with the true operator (one more pass over the training data). For an
                approximate inverse such as EKFAC's, compare one or two queries with accurate solutions too, all within
                the time that the fit and the scores took: see `Scores.agreement`.
            self_influence: compute the self-influence of what is scored too.
            candidates: n examples to score in place of the training set, such as data that might be trained on: adding
                one to the N training examples changes f by minus its score / N, to first order.
            folder: where the solution and each batch's scores are kept, so that the same call goes on where a killed
                one stopped; what lies there must be of the same model, data and settings.
            mean: score the mean of the queries' measurements, as of a validation set: (1, N), by one solve.
            rank: keep this rank of each query's direction in each block, 32 say, or in (0, 1) that share of its energy
                by rank 32 at most, so that many queries fit into one pass; the error is ``provenance["truncation"]``.

        Raises:
            InputError: queries that the model does not accept, a measurement that is not one finite number a query, or
                a rank that is neither.
            DivergenceError: if a solve does not stay finite.
            ArtefactError: if the folder holds scores of something else, by name of what differs.
        """
        inverse, problem = self.inverse, self.problem
        start = time.perf_counter()
        make_rows = lambda: pieces(problem, queries, measurement, self.batch_size, mean, rank)  # noqa: E731
        rows = make_rows()
        scored = self._candidates(candidates)
        shards = Shards(folder, "scores", self._made_of(rows, scored, rank)) if folder is not None else None
        pairing, solution, more = directions(inverse, rows, certify and not inverse.approximate, shards, rank)
        del rows  # nearly as large as the directions
        solving = time.perf_counter()
        values = streamed(problem, pairing, scored, shards=shards)
        seconds = self._seconds | {"solve": solving - start, "scores": time.perf_counter() - solving}
        residual, passes = solution.residual, solution.passes
        if certify and inverse.approximate:
            spent, scoring = sum(seconds.values()), seconds["scores"]
            found = certificate.check(inverse, make_rows, values, scored, spent, scoring)
            residual, passes = found.residual, found.passes
            seconds["certificate"] = found.seconds
            more["agreement"] = found.agreement
        return Scores(
            values,
            residual,
            solution.converged,
            solution.history,
            self.provenance() | {"seconds": seconds, "passes": passes, "steps": solution.steps} | more,
            self.self_influence(scored) if self_influence else None,
        )

    @undisturbed()
    def by_block(
        self, queries: Any, examples: Sequence[int], measurement: Measurement | None = None
    ) -> dict[str, Tensor]:
        """The scores of some training examples, by the block of parameters that each part comes through.

        Args:
            queries, measurement: as for `score`.
            examples: n training examples, by number.

        Returns:
            block name to (Q, n); over all blocks they sum to the scores. Nothing is certified.
        """
        return by_block(self.inverse, self.query_gradients(queries, measurement), examples)

    @undisturbed()
    def by_token(self, queries: Any, examples: Sequence[int], measurement: Measurement | None = None) -> Tensor:
        """The scores of some training examples, split over the positions of each.

        A position's part is that of the gradient signal written there, so it has credit for losses at later tokens that
        reach it. What comes through a layer that sees one vector of each sequence stands at the first, with a warning.

        Args:
            queries, measurement: as for `score`.
            examples: n training examples, by number.

        Returns:
            (Q, n, T), T the widest batch of those examples, in the order of `wherefrom.hf.aligned`, 0 at padding; over
            T they sum to the scores. Nothing is certified.

        Raises:
            UnsupportedError: if the task has no positions, or the gradient of a block has others or none.
        """
        return by_token(self.inverse, self.query_gradients(queries, measurement), examples)

    @undisturbed()
    def by_query_token(self, queries: Any, examples: Sequence[int], parts: Measurement | None = None) -> Tensor:
        """The scores of some training examples, split over the tokens of each query: one solve for each token.

        Args:
            queries: as for `score`.
            examples: n training examples, by number.
            parts: (outputs, batch) to (B, T), whose sum over T is the measurement; None takes the task's
                ``token_measurements``, in a language model at the tokens that are predicted.

        Returns:
            (Q, T, n), T the widest query; over T they sum to the scores. Nothing is certified.

        Raises:
            UnsupportedError: if the task does not split its measurement and nothing else does.
        """
        return by_query_token(self.inverse, queries, examples, parts)

    def at(self, damping: float | Damping) -> Influence:
        """The same fit at another damping; what does not depend on damping (factors, rows, decompositions) is shared.

        A sweep is ``[influence.at(x).score(queries) for x in dampings]``.
        """
        other = dataclasses.replace(self, damping=damping)
        other._curvature, other._seconds = self.inverse.curvature, {"fit": 0.0}
        other._inverse = other._solver().fit(other._curvature, Damping.of(damping))
        return other

    @undisturbed()
    def self_influence(self, candidates: Any = None, folder: str | Path | None = None) -> Tensor:
        """g^T (C + damping)^-1 g of the loss gradient of every training example, or of those given, (N,).

        Solves go by the solver's own residual; examples that miss its tolerance are named in a `ConvergenceWarning`.
        ``candidates`` and ``folder`` are as for `score`.
        """
        scored = self._candidates(candidates)
        shards = Shards(folder, "self-influence", self._made_of(None, scored)) if folder is not None else None
        return self_influence(self.inverse, scored, shards)

    @undisturbed()
    def query_gradients(self, queries: Any, measurement: Measurement | None = None) -> Gradients:
        """Gradients of the Q queries' measurements, factored; ``.dense()`` writes them out as right-hand sides."""
        return query_gradients(self.problem, queries, measurement, self.batch_size)

    @undisturbed()
    def save(self, path: str | Path) -> None:
        """Write the fitted inverse, with the fingerprints of the model and data that it belongs to."""
        header = {
            "config": self._config(),
            "fingerprint": self.problem.fingerprint(),
            "shift": self.inverse.shift,
        }
        store.save(path, "influence", self.inverse.state(), header)

    @undisturbed()
    def load(self, path: str | Path, model: nn.Module, task: Task | object, train: Any) -> Influence:
        """Take the fit from a file that was saved with the same configuration, model and data.

        Raises:
            ArtefactError: naming what differs: the configuration, the task, the weights, the parameters or the data.
        """
        tensors, header = store.load(path, "influence")
        problem, solver = self._problem(model, task, train), self._solver()
        store.same(path, header.get("config", {}), self._config())
        store.same(path, header.get("fingerprint", {}), problem.fingerprint())
        store.check_finite(path, tensors)
        shift = _checked_damping(path, header.get("shift"), problem)
        problem.examine()
        self._curvature = self.curvature(problem)
        state = {name: t.to(problem.device) for name, t in tensors.items()}
        with store.reading(path):
            self._inverse = solver.restore(self._curvature, shift, state)
        if unknown := set(tensors) - set(self._inverse.state()):
            raise store.wrong(path, f"what {solver!r} saves", f"also {min(unknown)}")
        self._seconds = {"fit": 0.0}
        return self

    @property
    def inverse(self) -> Inverse:
        """The fitted inverse.

        Raises:
            InputError: before `fit` or `load`.
        """
        if not hasattr(self, "_inverse"):
            raise InputError(
                "Influence must be fitted before it is used. Call fit(model, task, train) or load(path, ...)."
            )
        return self._inverse

    @property
    def problem(self) -> Problem:
        """The model, task, data and parameters of the fit."""
        return self.inverse.curvature.problem

    def provenance(self) -> dict[str, Any]:
        """The configuration, versions and coverage, in a form that JSON can hold."""
        chosen = self.inverse.report()
        return (
            self._config()
            | ({"chosen": chosen} if chosen else {})
            | {
                "coverage": self.problem.coverage(),
                "damping by parameter": self.inverse.shift,
                "tolerance": self.inverse.tolerance,
                "torch": torch.__version__,
                "examples": len(self.problem.train),
                "row error": self.problem.row_error,
            }
        )

    def _solver(self) -> Solver:
        solver = Auto() if self.solver == "auto" else self.solver
        instance(solver=solver)
        return solver if self.seed is None else seeded(solver, self.seed)

    def _problem(self, model: nn.Module, task: Task | object, train: Any) -> Problem:
        return Problem(model, task, train, self.parameters, self.batch_size, self.memory, self.progress)

    def _config(self) -> dict[str, Any]:
        damping = Damping.of(self.damping)
        return {"solver": repr(self._solver()), "damping": str(damping), "curvature": _name(self.curvature)}

    def _made_of(
        self, rows: Iterable[Gradients] | None, scored: Examples | None, rank: float | None = None
    ) -> dict[str, Any]:
        """What scores depend on; the queries by their gradients, which the measurement is part of."""
        mine = {
            "lambda": self.inverse.shift,
            "queries": fingerprint(rows) if rows else None,
            "rank": rank,
            "candidates": scored.fingerprint() if scored else None,
            "batch size": (scored or self.problem.train).batch_size,
        }
        return self._config() | self.problem.fingerprint() | mine

    def _candidates(self, candidates: Any) -> Examples | None:
        given = candidates is None or isinstance(candidates, Examples)
        return candidates if given else Examples(candidates, "candidates", self.batch_size)


def _checked_damping(path: str | Path, saved: Any, problem: Problem) -> dict[str, float]:
    """The damping of each parameter in a file.

    Raises:
        ArtefactError: if there is none, one of another parameter, or one that is not positive.
    """
    numbers = isinstance(saved, dict) and all(type(value) in (int, float) for value in saved.values())
    if not numbers or set(saved) != set(problem.shapes):
        raise store.wrong(path, "a damping for each parameter", saved)
    if bad := [name for name, value in saved.items() if not 0 < value <= sys.float_info.max]:
        raise store.wrong(path, "positive finite dampings", f"{saved[bad[0]]} for {bad[0]}")
    return {name: float(value) for name, value in saved.items()}


def _name(curvature: Callable[[Problem], Curvature]) -> str:
    return getattr(curvature, "__name__", None) or repr(curvature)
