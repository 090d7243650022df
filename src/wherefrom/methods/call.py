"""The whole library in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping
from wherefrom.curvature.ggn import GGN
from wherefrom.methods.influence import Influence
from wherefrom.methods.stream import Measurement
from wherefrom.model.observe import Select
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.scores import Scores
from wherefrom.solvers.base import Solver


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
    """Score which training examples made the model behave so on each query: the whole library in one call.

    Args:
        model: the trained model; it comes back as it was.
        task: `Classification()`, `Regression()`, or your own `Task`.
        train: N training examples: a tuple of tensors, a Dataset or a DataLoader.
        queries: Q queries, in the same form.
        solver: how (C + damping I)^-1 is applied; "auto" chooses by size and budget, see `wherefrom.Auto`.
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
