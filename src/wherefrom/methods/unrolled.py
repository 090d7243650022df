"""Unrolled: the derivative of a query's final measurement by each training example's weight, through all of training.

    score(q, z) = -N d f_q(theta_T) / d w_z  at  w = 1

theta_T is the end of the run that `Replay` takes again. One sweep backwards serves all examples: with (A, ...) the
derivative of f by the state after step t, one entry each for the weights and for what the optimiser keeps,

    a          = what (A, ...) becomes through the optimiser's step, by the gradient g_t
    d f / d w_i += (1 / |B_t|) a . grad l_i(theta_t)                                           for each i in B_t
    A          <- what (A, ...) becomes by the weights,  +  H_t a,                             H_t: Hessian of L_t

States are kept every so many steps and the others computed again (Griewank & Walther 2000), so that memory grows with
the square root of the steps. It is exact: what is left between it and retraining is that f is not linear in w.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from wherefrom.curvature.ggn import rhs_at_once
from wherefrom.curvature.plain import GAPS, Function, has_second_derivatives, hessian_products, is_gap
from wherefrom.errors import UnsupportedError
from wherefrom.methods.base import FittedMethod, TrajectoryMethod
from wherefrom.methods.optimisers import pull_back
from wherefrom.methods.replay import Replay, State
from wherefrom.methods.stream import Measurement
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.progress import track
from wherefrom.scores import Certificate, Scores
from wherefrom.surroundings import jvp, undisturbed


@dataclass(frozen=True, kw_only=True)
class Unrolled(TrajectoryMethod):
    """Exact unrolled differentiation of SGD, Adam or AdamW.

    A query costs about three times the run, and 4 to 5 sets of parameters, so that ``memory`` decides how many go
    together.

    Args:
        segment: see `Replay`.
        dropped: the share of the examples that are dropped together to measure metasmoothness; 0 leaves it out.
    """

    segment: int | None = None
    dropped: float = 0.05

    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedUnrolled:
        """Take the run again, and measure how far it can be trusted.

        Raises:
            InputError, UnsupportedError: see `Replay`.
        """
        start = time.perf_counter()
        # A run that cannot be taken again is refused by name, before the model is tried on any data.
        problem = Problem(model, task, train, self.parameters, self.batch_size, self.memory, self.progress)
        replay = Replay(problem, self.trajectory, self.segment)
        measured = {"replay error": replay.error}
        if self.dropped:
            measured["metasmoothness"] = float(replay.metasmoothness(self.dropped).mean())
        return FittedUnrolled(self, problem, time.perf_counter() - start, replay, measured)


@dataclass(frozen=True, eq=False)
class FittedUnrolled(FittedMethod):
    """A run that was taken again, ready for queries.

    Args:
        replay: the run.
        measured: "replay error" and "metasmoothness".
    """

    method: Unrolled
    replay: Replay
    measured: dict[str, float]

    @undisturbed()
    def score(self, queries: Any, measurement: Measurement | None = None) -> Scores:
        """Score all training examples on Q queries.

        Args:
            queries: in the form of the training data.
            measurement: f of a query, (outputs, batch) to (B,), lower is better; None takes the task's.

        Returns:
            `Scores`: (Q, N), positive where removing the example would raise f; over N the predicted change, with the
            initial weights and the order of the others as they were.
        """
        scores = super().score(queries, measurement)
        return replace(scores, provenance=scores.provenance | {"measured": self.measured})

    def score_values(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Certificate]:
        """Sweep backwards through the run, with as many queries together as the memory holds."""
        f = self.query_directions(self.replay.trained, queries, measurement).to_parameters()
        # A query takes its adjoint (the parameters' and the optimiser's), and two more sets for the Hessian product.
        sets = 2 + max(len(rows) for rows in self.replay.states[0].values())
        size_of_set = sum(t[0].numel() * t.element_size() for t in f.values())
        together = max(1, int(self.method.memory / (sets * size_of_set)))
        values = torch.cat([self._sweep(some) for some in vectors.chunk(f, together)])
        return -len(self.problem.train) * values, self.certificate(len(values))

    def _sweep(self, f: Vectors) -> Tensor:
        """Return the derivatives by the examples' weights, (Q, N), from those by the final weights."""
        replay = self.replay
        batch = replay.problem.batch(replay.order[-1])
        with replay.open_model():
            at_once = rhs_at_once(replay.problem, *replay.problem.functional(batch))
        adjoints: list[State] = []
        values: list[Tensor] = []
        for some in vectors.chunk(f, at_once):
            adjoints.append(self._start_adjoint(some))
            values.append(next(iter(some.values())).new_zeros(vectors.count(some), len(replay.problem.train)))

        steps = replay.trajectory.steps
        for step, state, g in track(replay.backwards(), "unrolling", total=steps, enabled=self.method.progress):
            slopes = replay.slopes(state, g, step)
            theta = {name: rows[0][0] for name, rows in state.items()}
            index = replay.order[step].to(replay.problem.device)
            for i, adjoint in enumerate(adjoints):
                back = {name: pull_back(slopes[name], rows) for name, rows in adjoint.items()}
                by_gradient = {name: a for name, (_, a) in back.items()}
                by_weight, by_theta = self._differentiate_gradient(index, theta, by_gradient)
                values[i].index_add_(1, index, by_weight)
                adjoints[i] = {name: (rows[0].add_(by_theta[name]), *rows[1:]) for name, (rows, _) in back.items()}
        return torch.cat(values)

    def _start_adjoint(self, f: Vectors) -> State:
        """Make the adjoint of the final state: f depends on the weights, and on nothing that the optimiser keeps."""
        adjoint: State = {}
        for name, t in f.items():
            others = len(self.replay.states[0][name]) - 1
            adjoint[name] = (t, *[torch.zeros_like(t)] * others)
        return adjoint

    def _differentiate_gradient(self, index: Tensor, theta: Vectors, a: Vectors) -> tuple[Tensor, Vectors]:
        """Compute a . d g / d w_i for each example of a minibatch, (Q, B), and H a, (Q, ...)."""
        problem = self.replay.problem
        batch = problem.batch(index)
        outputs, _ = problem.functional(batch)

        def loss(theta: Vectors) -> tuple[Tensor, Tensor]:
            each = problem.task.loss(outputs(theta), batch) / len(index)
            return each.sum(), each

        def along(a: Vectors) -> tuple[Vectors, Tensor]:
            return jvp(grad(loss, has_aux=True), (theta,), (a,))[1]

        with self.replay.open_model():
            try:
                hessian_product, slopes = vmap(along)(a)
            except GAPS as error:
                if not is_gap(error):
                    raise
                hessian_product, slopes = self._differentiate_twice_backwards(lambda p: loss(p)[1], theta, a)
        return slopes, hessian_product

    def _differentiate_twice_backwards(self, each: Function, theta: Vectors, a: Vectors) -> tuple[Vectors, Tensor]:
        """Compute the same by double backward, for a model without forward-mode derivatives.

        Raises:
            UnsupportedError: if its second derivatives are missing or wrong.
        """
        if not self._has_second_derivatives:
            raise UnsupportedError(
                "Unrolled needs second derivatives of the loss, and those of an operation of this model are missing or "
                "wrong. Write the operation out in differentiable ones, or take SOURCE or TracIn."
            )
        directions = ({name: t[0] for name, t in one.items()} for one in vectors.chunk(a, 1))
        return hessian_products(each, theta, directions)

    @cached_property
    def _has_second_derivatives(self) -> bool:
        return has_second_derivatives(self.replay.problem)
