"""TracIn: gradient dot products summed over the checkpoints of training.

    score(q, z) = sum_c w_c grad f_c(q) . grad l_c(z)                            (Pruthi et al. 2020, TracInCP, eq. 3)

w_c is the effective learning rate summed over the steps since the checkpoint before: what gradient steps on z would
have changed f by, to first order, if f at the end followed f at each step. Differs from the paper: that sum in place of
the rate at the checkpoint (the same weights up to a constant where both are evenly spaced), which makes score / N the
predicted change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wherefrom.methods.stream import Measurement, streamed
from wherefrom.methods.training import OverTraining
from wherefrom.model.problem import Problem
from wherefrom.persample.vectors import norm, scale
from wherefrom.solvers.base import Pairing
from wherefrom.surroundings import undisturbed


@dataclass(kw_only=True)
class TracIn(OverTraining):
    """Gradient dot products over checkpoints.

    Args:
        checkpoints: how many of the recorded ones, at most, evenly spaced; None takes all but the one at step 0.
        rates: weigh by learning rates; False takes the mean over checkpoints, as for optimisers other than SGD.
        cosine: of gradients of length 1 (gradient aggregated similarity, Hammoudeh & Lowd 2022).
    """

    checkpoints: int | None = None
    rates: bool = True
    cosine: bool = False

    @undisturbed()
    def self_influence(self) -> Tensor:
        """The sum of w_c |grad l_c(z)|^2 of each training example, (N,); large for examples learnt by heart."""
        total = torch.zeros(len(self.problem.train), dtype=torch.float64, device=self.problem.device)
        for problem, weight in self._weighted():
            for index, batch in problem.batches(what="self-influence"):
                norms = problem.loss_gradients(batch).square_norms().sum(1)
                total[index.start : index.stop] += weight * (torch.ones_like(norms) if self.cosine else norms)
        return total.to(self.problem.dtype)

    def _score(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Tensor | None, Tensor]:
        total = torch.zeros(())
        for problem, weight in self._weighted():
            f = self._query_vectors(problem, queries, measurement)
            f = scale(f, weight / norm(f).clamp(min=1e-30) if self.cosine else weight)
            total = total + streamed(problem, Pairing.of(f, problem.blocks, unit=self.cosine))
        return total, None, torch.ones(len(total), dtype=torch.bool)

    def _weighted(self) -> Iterator[tuple[Problem, float]]:
        """The model at each checkpoint, one after the other, and w_c."""
        chosen = self.trajectory.spread(self.checkpoints or len(self.trajectory.checkpoints))
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), self.trajectory.effective_rates().cumsum(0)])
        at = sums[[0, *(c.step for c in chosen)]].diff()
        weights = at.tolist() if self.rates else [1 / len(chosen)] * len(chosen)
        return ((self.problem.at(c.state), w) for c, w in zip(chosen, weights, strict=True))
