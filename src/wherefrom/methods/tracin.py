"""TracIn: gradient dot products summed over the checkpoints of training.

    score(q, z) = sum_c w_c grad f_c(q) . grad l_c(z)                            (Pruthi et al. 2020, TracInCP, eq. 3)

w_c is the effective learning rate summed over the steps since the checkpoint before: what gradient steps on z would
have changed f by, to first order, if f at the end followed f at each step. Differs from the paper: that sum in place of
the rate at the checkpoint (the same weights up to a constant where both are evenly spaced), which makes score / N the
predicted change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.methods.base import FittedMethod, TrajectoryMethod
from wherefrom.methods.stream import Measurement, score_stream
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.scores import Certificate
from wherefrom.surroundings import undisturbed


@dataclass(frozen=True, kw_only=True)
class TracIn(TrajectoryMethod):
    """Gradient dot products over checkpoints.

    Args:
        checkpoints: how many of the recorded ones, at most, evenly spaced; None takes all but the one at step 0.
        rates: weigh by learning rates; False takes the mean over checkpoints, as for optimisers other than SGD.
        cosine: of gradients of length 1 (gradient aggregated similarity, Hammoudeh & Lowd 2022).
    """

    checkpoints: int | None = None
    rates: bool = True
    cosine: bool = False

    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedTracIn:
        """Put the model and the data together; every checkpoint is visited when scores are asked for."""
        start = time.perf_counter()
        problem = self.read_problem(model, task, train)
        return FittedTracIn(self, problem, time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class FittedTracIn(FittedMethod):
    """TracIn, ready for queries."""

    method: TracIn

    @undisturbed()
    def self_influence(self) -> Tensor:
        """Return the sum of w_c |grad l_c(z)|^2 of each training example, (N,); large for examples learnt by heart."""
        total = torch.zeros(len(self.problem.train), dtype=torch.float64, device=self.problem.device)
        for problem, weight in self._visit_checkpoints():
            for index, batch in problem.batches(what="self-influence"):
                squares = problem.loss_gradients(batch).square_norms().sum(1)
                if self.method.cosine:  # gradients of length 1
                    squares = torch.ones_like(squares)
                total[index.start : index.stop] += weight * squares
        return total.to(self.problem.dtype)

    def score_values(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Certificate]:
        """Sum the scores of the checkpoints."""
        cosine = self.method.cosine
        total = torch.zeros(())
        for problem, weight in self._visit_checkpoints():
            f = self.query_directions(problem, queries, measurement)
            f = f.scale(weight / f.norm().clamp(min=1e-30) if cosine else weight)
            total = total + score_stream(problem, f, cosine=cosine)
        return total, self.certificate(len(total))

    def _visit_checkpoints(self) -> Iterator[tuple[Problem, float]]:
        """Yield the model at each checkpoint, one after the other, with its weight w_c."""
        trajectory = self.method.trajectory
        chosen = trajectory.spread(self.method.checkpoints or len(trajectory.checkpoints))
        if self.method.rates:
            sums = torch.cat([torch.zeros(1, dtype=torch.float64), trajectory.effective_rates().cumsum(0)])
            weights = sums[[0, *(checkpoint.step for checkpoint in chosen)]].diff().tolist()
        else:
            weights = [1 / len(chosen)] * len(chosen)
        for checkpoint, weight in zip(chosen, weights, strict=True):
            yield self.problem.at(checkpoint.state), weight
