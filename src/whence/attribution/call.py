"""The whole library in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from whence.attribution.influence import Influence
from whence.attribution.scores import Scores
from whence.attribution.stream import Measurement
from whence.curvature.base import Curvature
from whence.curvature.ggn import GGN
from whence.damping import Damping
from whence.models import Select
from whence.problem import Problem
from whence.solvers.base import Solver
from whence.task import Task


def attribute(
    model: nn.Module,
    task: Task | object,
    train: Any,
    queries: Any,
    *,
    solver: Solver | Literal["auto"] = "auto",
    damping: float | Damping | None = None,
    curvature: Callable[[Problem], Curvature] = GGN,
    parameters: Select = None,
    measurement: Measurement | None = None,
    self_influence: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Scores:
    """Which training examples made the model behave so on each query: the whole library in one call.

    Args:
        model: the trained model; it comes back as it was.
        task: `Classification()`, `Regression()`, or your own `Task`.
        train: N training examples: a tuple of tensors, a Dataset or a DataLoader.
        queries: Q queries, in the same form.
        solver: how (C + damping I)^-1 is applied; "auto" chooses by size and budget, see `whence.Auto`.
        damping: a number or a `Damping`; None takes Damping.per_example().
        curvature, parameters, batch_size, seed, progress: see `Influence`.
        measurement: f of a query, lower is better; None takes the task's.
        self_influence: compute the training examples' self-influence too.

    Returns:
        `Scores`: values (Q, N), positive where removing the example would raise f, and each query's residual (Q,).

    Raises:
        InputError, UnsupportedError, DivergenceError: each says what was expected, what was got and what to do.
    """
    influence = Influence(
        solver=solver,
        damping=damping if damping is not None else Damping.per_example(),
        curvature=curvature,
        parameters=parameters,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return influence.fit(model, task, train).score(queries, measurement, self_influence=self_influence)
