"""The protocol of everything that is fitted and scored, and what methods that score by gradients share.

A method is a frozen record of settings. Its ``fit`` does all that needs no query and returns something fitted, which is
immutable: scores depend on the settings, the model, the data and the queries, and on nothing that was done before.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wherefrom.methods.stream import Measurement, QueryGradients
from wherefrom.model.observe import Select
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample.directions import Directions
from wherefrom.scores import Certificate, Scores
from wherefrom.surroundings import undisturb, undisturbed
from wherefrom.training.trajectory import Trajectory


class Method(Protocol):
    """A frozen record of settings that can be fitted to a model and its training data."""

    def fit(self, model: nn.Module, task: Task | object, train: Any) -> Fitted:
        """Do all that needs no query."""
        ...


class Fitted(Protocol):
    """What a method made of a model and its training data."""

    def score(self, queries: Any) -> Scores:
        """Score all N training examples on Q queries, (Q, N)."""
        ...


@dataclass(frozen=True, kw_only=True)
class GradientMethod(ABC):
    """The settings that methods share which score by gradients.

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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "fit")

    @abstractmethod
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedMethod:
        """Do all that needs no query.

        Args:
            model: the trained model; it comes back as it was. Its weights are those that queries are measured at.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Raises:
            InputError: see `Problem`; or if something given lacks what the method needs.
        """

    def read_problem(self, model: nn.Module, task: Task | object, train: Any) -> Problem:
        """Put a model, its task and its data together with these settings, and try the model on a few examples."""
        problem = Problem(model, task, train, self.parameters, self.batch_size, self.memory, self.progress)
        problem.examine()
        return problem

    def __str__(self) -> str:
        """Write the method with its own settings."""
        shared = {f.name for f in fields(GradientMethod)}
        settings = []
        for f in fields(self):
            if f.name not in shared:
                value = repr(getattr(self, f.name))
                settings.append(f"{f.name}={value}" if f.kw_only else value)
        return f"{type(self).__name__}({', '.join(settings)})"


@dataclass(frozen=True, kw_only=True)
class TrajectoryMethod(GradientMethod):
    """The settings of methods that look at a whole training run.

    Args:
        trajectory: of the run, see `Recorder`.
    """

    trajectory: Trajectory = field(kw_only=False)


@dataclass(frozen=True, eq=False)
class FittedMethod(ABC):
    """What a method that scores by gradients made of a model and its training data.

    Args:
        method: its settings.
        problem: the model, task, data and parameters.
        seconds: that the fit took.
    """

    method: Any
    problem: Problem
    seconds: float

    @undisturbed()
    def score(self, queries: Any, measurement: Measurement | None = None) -> Scores:
        """Score all training examples on Q queries.

        Args:
            queries: in the form of the training data.
            measurement: f of a query, (outputs, batch) to (B,), lower is better; None takes the task's.

        Returns:
            `Scores`: (Q, N), positive where removing the example would raise f.
        """
        start = time.perf_counter()
        values, certificate = self.score_values(queries, measurement)
        provenance = {
            "solver": str(self.method),
            "coverage": self.problem.coverage(),
            "torch": torch.__version__,
            "examples": len(self.problem.train),
            "seconds": {"fit": self.seconds, "scores": time.perf_counter() - start},
        }
        return Scores(values, certificate, provenance)

    @abstractmethod
    def score_values(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Certificate]:
        """Return the values (Q, N), and how far each query's can be trusted."""

    def certificate(self, count: int) -> Certificate:
        """Make the certificate of Q queries for which nothing was solved: what remains is the check of the rows."""
        unsolved = torch.ones(count, dtype=torch.bool)
        return Certificate(None, unsolved, row_error=self.problem.row_error)

    def query_directions(self, problem: Problem, queries: Any, measurement: Measurement | None) -> Directions:
        """Take the gradients of the measurements at a problem's weights, written out: Q directions."""
        return QueryGradients.of(problem, queries, measurement, self.method.batch_size).together().dense()
