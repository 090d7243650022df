"""What methods that are fitted to a model and its training data share: fit, score, and where the scores come from."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wherefrom.errors import InputError
from wherefrom.methods.stream import Measurement, query_gradients
from wherefrom.model.observe import Select
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample.vectors import Vectors
from wherefrom.scores import Scores
from wherefrom.surroundings import undisturbed

Self = TypeVar("Self", bound="Method")


@dataclass(kw_only=True)
class Method(ABC):
    """A method that scores by gradients.

    Args:
        parameters: which trainable parameters; see `Problem`.
        batch_size: examples per pass of the model; changes speed and memory only.
        memory: bytes that may be cached; changes speed and memory only.
        progress: show progress bars; None shows them on a terminal.
    """

    parameters: Select = None
    batch_size: int | None = None
    memory: float = 2**31
    progress: bool | None = None

    @undisturbed()
    def fit(self: Self, model: nn.Module, task: Task | object, train: Any) -> Self:
        """Everything that needs no query.

        Args:
            model: the trained model; it comes back as it was. Its weights are those that queries are measured at.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Returns:
            Itself.

        Raises:
            InputError: see `Problem`; or if something given lacks what the method needs.
        """
        start = time.perf_counter()
        self._problem = Problem(model, task, train, self.parameters, self.batch_size, self.memory, self.progress)
        self._fit()
        self._seconds = {"fit": time.perf_counter() - start}
        return self

    @undisturbed()
    def score(self, queries: Any, measurement: Measurement | None = None) -> Scores:
        """Scores of all training examples on Q queries.

        Args:
            queries: in the form of the training data.
            measurement: f of a query, (outputs, batch) to (B,), lower is better; None takes the task's.

        Returns:
            `Scores`: (Q, N), positive where removing the example would raise f.
        """
        start, problem = time.perf_counter(), self.problem
        values, residual, converged = self._score(queries, measurement)
        seconds = self._seconds | {"scores": time.perf_counter() - start}
        provenance = {
            "solver": str(self),
            "coverage": problem.coverage(),
            "torch": torch.__version__,
            "examples": len(problem.train),
            "row error": problem.row_error,
            "seconds": seconds,
        }
        return Scores(values, residual, converged, provenance=provenance)

    @property
    def problem(self) -> Problem:
        """The model, task, data and parameters of the fit.

        Raises:
            InputError: before `fit`.
        """
        return fitted(self, "_problem")

    def __str__(self) -> str:
        """The method with its own settings, as it would be written."""
        shared = {f.name for f in fields(Method)}
        own = [(f, repr(getattr(self, f.name))) for f in fields(self) if f.name not in shared]
        said = (f"{f.name}={value}" if f.kw_only else value for f, value in own)
        return f"{type(self).__name__}({', '.join(said)})"

    def _fit(self) -> None:  # noqa: B027
        """What a method prepares."""

    @abstractmethod
    def _score(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Values (Q, N), residuals (Q,) or None, and whether each query converged (Q,)."""

    def _query_vectors(self, problem: Problem, queries: Any, measurement: Measurement | None) -> Vectors:
        """Gradients of the measurements at a problem's weights, (Q, ...)."""
        return query_gradients(problem, queries, measurement, self.batch_size).dense()


def fitted(method: object, name: str) -> Any:
    """What ``fit`` has set.

    Raises:
        InputError: before it did.
    """
    if not hasattr(method, name):
        raise InputError(f"{type(method).__name__} must be fitted before it is used. Call fit first.")
    return getattr(method, name)
