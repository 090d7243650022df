"""What the three scripts share: a problem with its curvature, right-hand sides and retraining targets, measured."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from benchmarks import problems
from torch import Tensor

import wherefrom
from wherefrom.curvature.base import Curvature
from wherefrom.persample import gradients
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.tools.evaluate import linear_datamodeling_score


@dataclass(frozen=True)
class Setting:
    """A model, its queries' gradients, and the two measures of an iterate: objective or residual, and LDS.

    Args:
        problem: the benchmark problem.
        curvature: its Gauss-Newton matrix, rows kept in memory.
        damping: lambda, absolute.
        queries: numbers of the queries in the problem, Q of them.
        b: gradients of the queries' measurements, Q directions.
        train: factored gradients of the N training losses.
    """

    problem: problems.Problem
    curvature: Curvature
    damping: float
    queries: Tensor
    b: Directions
    train: Gradients

    @property
    def N(self) -> int:
        """Number of training examples."""
        return len(self.problem.x)

    def objective(self, x: Directions) -> Tensor:
        """h(x) = x.(C + damping) x / 2 - x.b on all the data (ASTRA eq. 4), (Q,)."""
        form = torch.zeros(len(x), dtype=torch.float64)
        for rows in self.curvature.gradients():
            t = rows.dot(x)  # (Q, N, R)
            form += (t.double().square() * rows.weights).sum((1, 2)) / self.N
        return 0.5 * (form + self.damping * x.norm().square()) - x.dot(self.b)

    def residual(self, x: Directions) -> Tensor:
        """|b - (C + damping) x| / |b| on all the data, (Q,)."""
        r = self.b.axpy(-1.0, self.curvature.product(x)).axpy(-self.damping, x)
        return r.norm() / self.b.norm()

    def lds(self, x: Directions) -> float:
        """Linear datamodeling score of x.g over the training gradients g, mean over the queries."""
        scores = self.train.dot(x)[..., 0]  # (Q, N)
        masks, targets = self.problem.masks, self.problem.targets
        if masks is None or targets is None:
            raise ValueError(f"{self.problem.name} has no retraining targets: take digits or concrete.")
        return linear_datamodeling_score(scores, masks, targets[..., self.queries.numpy()], bootstrap=1, splits=1).mean


def load(name: str, seed: int = 0, queries: int = 100, damping: float | None = None) -> Setting:
    """One model of a benchmark problem; of the 100 queries, the first ``queries`` in a fixed random order.

    Args:
        name: digits or concrete.
        seed: of the trained model, 0 to 4.
        queries: how many of the problem's queries.
        damping: absolute; None takes the problem's, implied by its training.
    """
    p = problems.load(name)
    task = wherefrom.Classification() if p.kind == "classification" else wherefrom.Regression()
    damping = damping or p.damping
    influence = wherefrom.Influence(solver=wherefrom.Identity(), damping=damping, progress=False)
    fitted = influence.fit(p.model(seed), task, (p.x, p.y))
    index = torch.randperm(len(p.xq), generator=torch.Generator().manual_seed(0))[:queries].sort().values
    problem, curvature = fitted.problem, fitted.inverse.curvature
    b = fitted.query_gradients((p.xq[index], p.yq[index])).dense()
    for _ in curvature.gradients():  # rows are kept from here on: a minibatch is a choice of rows
        pass
    train = gradients.concatenate([problem.loss_gradients(batch) for _, batch in problem.batches()])
    return Setting(p, curvature, damping, index, b, train)


def due(step: int, steps: int, every: int, tail: int = 0) -> bool:
    """Whether to measure after this step, counted from 1: every so many, at the last, and in the last ``tail``."""
    return step % every == 0 or step > steps - max(1, tail)


def sizes(names: list[str]) -> Iterator[str]:
    """A line on each problem."""
    for name in names:
        p = problems.load(name)
        D = sum(t.numel() for t in p.states[0].values())
        M, R, Q = (0, 0, 0) if p.targets is None else p.targets.shape
        yield f"{name}: N = {len(p.x)}, D = {D:,}, damping {p.damping:g}; {M} subsets x {R} retrainings, {Q} queries"


def where() -> str:
    """The machine and versions, for the record."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}"
