"""What the methods that look at training itself share: a recorded run, and scores summed over its checkpoints."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from whence import gradients
from whence.attribution.scores import Scores
from whence.attribution.stream import Measurement, query_gradients
from whence.errors import InputError
from whence.models import Select
from whence.problem import Problem
from whence.task import Task
from whence.trajectory import Trajectory
from whence.vectors import Vectors

Self = TypeVar("Self", bound="OverTraining")


@dataclass(kw_only=True)
class OverTraining(ABC):
    """A method that scores by a recorded run.

    Args:
        trajectory: the run that the model came out of.
        parameters: which trainable parameters; see `Problem`.
        batch_size: examples per pass of the model; changes speed and memory only.
        memory: bytes that may be cached; changes speed and memory only.
        progress: show progress bars; None shows them on a terminal.
    """

    trajectory: Trajectory = field(kw_only=False)
    parameters: Select = None
    batch_size: int | None = None
    memory: float = 2**31
    progress: bool | None = None

    def fit(self: Self, model: nn.Module, task: Task | object, train: Any) -> Self:
        """Everything that needs no query.

        Args:
            model: the trained model; it comes back as it was. Its weights are those that queries are measured at.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Returns:
            Itself.

        Raises:
            InputError: see `Problem`; or if the run is of another model, or lacks what the method needs.
        """
        start = time.perf_counter()
        self._problem = Problem(model, task, train, self.parameters, self.batch_size, self.memory, self.progress)
        self._fit()
        self._seconds = {"fit": time.perf_counter() - start}
        return self

    def score(self, queries: Any, measurement: Measurement | None = None) -> Scores:
        """Scores of all training examples on Q queries.

        Args:
            queries: in the form of the training data.
            measurement: f of a query, (outputs, batch) to (B,), lower is better; None takes the task's.

        Returns:
            `Scores`: (Q, N), positive where removing the example would raise f; over N the predicted change.
        """
        start = time.perf_counter()
        values, residual, converged = self._score(queries, measurement)
        seconds = self._seconds | {"scores": time.perf_counter() - start}
        provenance = {
            "solver": str(self),
            "coverage": self.problem.coverage(),
            "torch": torch.__version__,
            "examples": len(self.problem.train),
            "seconds": seconds,
        }
        return Scores(values, residual, converged, provenance=provenance)

    @property
    def problem(self) -> Problem:
        """The model, task, data and parameters of the fit.

        Raises:
            InputError: before `fit`.
        """
        if not hasattr(self, "_problem"):
            raise InputError(f"{type(self).__name__} must be fitted before it is used. Call fit(model, task, train).")
        return self._problem

    def __str__(self) -> str:
        """The method with its own settings, as it would be written."""
        own = [f.name for f in fields(self) if f.name not in {g.name for g in fields(OverTraining)}]
        said = [repr(self.trajectory), *(f"{name}={getattr(self, name)!r}" for name in own)]
        return f"{type(self).__name__}({', '.join(said)})"

    def _fit(self) -> None:  # noqa: B027
        """What a method prepares."""

    @abstractmethod
    def _score(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Values (Q, N), residuals (Q,) or None, and whether each query converged (Q,)."""

    def _query_vectors(self, problem: Problem, queries: Any, measurement: Measurement | None) -> Vectors:
        """Gradients of the measurements at a problem's weights, (Q, ...)."""
        return query_gradients(problem, queries, measurement, self.batch_size).dense()


def packed(problem: Problem, x: Vectors) -> gradients.Packed:
    """Vectors as the matrices that are paired with training gradients."""
    return gradients.pack(problem.blocks, x)
