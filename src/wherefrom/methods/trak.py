"""TRAK: the model linearised, its gradients randomly projected, and one solve of least squares (Park et al. 2023).

    score(q, z) = N [mean_m phi_m(q)^T (Phi_m^T Phi_m + reg I)^-1 phi_m(z)] [mean_m Q_m(z)]           (section 3)

    phi = P grad f in R^k        Phi: its N rows        Q = dl / df        m: models trained independently

For `Classification`, f is the margin, up to a sign that cancels, and Q(z) = 1 - p_y: the published method. For any task
Q is read from the cotangents of the outputs, s_l = dl/dh and s_f = df/dh, as (s_l . s_f) / (s_f . s_f): exact where the
loss depends on the outputs through f alone, else by least squares. Differs from the paper: Gaussian P; no
soft-thresholding of the scores; a ridge where k is not small beside N; times N, as all scores here. As there, the least
squares is not weighted by the loss's second derivative in f, so that scores rank and their size predicts no change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.curvature.lanczos import embedding
from wherefrom.data.examples import Batch, Examples
from wherefrom.errors import DivergenceError, expected
from wherefrom.methods.base import FittedMethod, GradientMethod
from wherefrom.methods.stream import Measurement
from wherefrom.model.capture import OutputCotangents
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.scores import Certificate

ROWS = 4096  # examples whose features are widened to float64 together


@dataclass(frozen=True, eq=False)
class Member:
    """One model.

    Args:
        problem: the model with its data.
        seed: of its projection.
        solved: Phi (Phi^T Phi + reg I)^-1, (N, k).
        weights: Q, (N,).
    """

    problem: Problem
    seed: int
    solved: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class TRAK(GradientMethod):
    """Projected gradients of the measurement and their inverse second moment; better with several models.

    Args:
        size: k, dimensions of the projection; D or more takes the gradients as they are.
        regularisation: reg over the mean diagonal of Phi^T Phi; None takes 0 if k < N / 2, else k / N, which makes reg
            tr(Phi^T Phi) / N, as `Damping.per_example` does: least squares in nearly as many dimensions as there are
            examples, or more, would fit each example by itself.
        seed: of the projection; each further model takes the next.
    """

    size: int = 4096
    regularisation: float | None = None
    seed: int = 0

    def fit(self, model: nn.Module | Sequence[nn.Module], task: Task | object, train: Any) -> FittedTRAK:
        """Compute the features of the training examples, one pass for each model.

        Args:
            model: one trained model, or several that were trained independently on the same data.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Raises:
            InputError: see `Problem`.
            DivergenceError: if Phi^T Phi + reg I is singular.
        """
        start = time.perf_counter()
        if self.size < 1 or (self.regularisation or 0.0) < 0:
            raise expected("size and regularisation", ">= 1 and >= 0", (self.size, self.regularisation))
        models = [model] if isinstance(model, nn.Module) else list(model)
        if not models:
            raise expected("model", "a model, or several", "none")

        first = self.read_problem(models[0], task, train)
        problems = [first, *(first.with_model(other, self.parameters) for other in models[1:])]
        members = tuple(self._fit_member(problem, self.seed + m) for m, problem in enumerate(problems))
        return FittedTRAK(self, first, time.perf_counter() - start, members)

    def _fit_member(self, problem: Problem, seed: int) -> Member:
        weights: list[Tensor] = []

        def seeds(outputs: Tensor, batch: Batch) -> Tensor:
            f, loss = (problem.output_cotangents(what)(outputs, batch) for what in ("measurement", "loss"))
            s, r = f[0].flatten(1), loss[0].flatten(1)
            own = torch.linalg.vecdot(s, s)
            weights.append(torch.where(own > 0, torch.linalg.vecdot(r, s) / own, 0.0))
            return f

        phi = self.compute_features(problem, problem.train, seeds, seed, "TRAK features")
        return Member(problem, seed, self._solve(phi), torch.cat(weights))

    def _solve(self, phi: Tensor) -> Tensor:
        """Return Phi (Phi^T Phi + reg I)^-1, by Cholesky in float64, in place of Phi."""
        N, k = phi.shape
        gram = torch.zeros(k, k, dtype=torch.float64, device=phi.device)
        for rows in phi.split(ROWS):
            wide = rows.double()
            gram.addmm_(wide.T, wide)
        level = float(gram.diagonal().mean())
        reg = self.regularisation if self.regularisation is not None else (0.0 if k < N / 2 else k / N)
        gram.diagonal().add_(reg * level)
        factor, info = torch.linalg.cholesky_ex(gram)
        noise = max(k * torch.finfo(torch.float64).eps, (100 * torch.finfo(phi.dtype).eps) ** 2)
        if int(info) or not float(factor.diagonal().min()) ** 2 > noise * level:
            raise DivergenceError(
                f"TRAK's second moment of {N} examples in k = {k} dimensions is singular with regularisation {reg:g}. "
                "Lower size below the number of examples and the rank of their gradients, or raise regularisation."
            )
        for rows in phi.split(ROWS):
            rows.copy_(torch.cholesky_solve(rows.double().T, factor).T)
        return phi

    def compute_features(
        self, problem: Problem, examples: Examples, seeds: OutputCotangents, seed: int, what: str | None = None
    ) -> Tensor:
        """Compute phi of all examples, (n, k); gradients are held, factored, while half of the memory lasts."""
        held, numbers, features = [], 0, []
        for _, batch in problem.batches(examples, what):
            held.append(problem.gradients(batch, seeds).compact())
            numbers += held[-1].numbers()
            if numbers * problem.dtype.itemsize > self.memory / 2:
                features.append(self._project(problem, held, seed))
                held, numbers = [], 0
        if held:
            features.append(self._project(problem, held, seed))
        return torch.cat(features)

    def _project(self, problem: Problem, held: Sequence[Gradients], seed: int) -> Tensor:
        """Return P g of the gradients held, (n, k); P is made anew, in chunks of directions that the memory takes."""
        shapes, like = problem.shapes, next(iter(problem.parameters.values())).detach()
        D = sum(s.numel() for s in shapes.values())
        if self.size >= D:
            return torch.cat([rows.dense().flatten() for rows in held])
        out = like.new_empty(sum(map(len, held)), self.size)
        step = max(1, int(self.memory / (32 * D)))
        for start in range(0, self.size, step):
            some = range(start, min(start + step, self.size))
            drawn = {name: embedding(shapes, name, some, self.size, seed, like) for name in shapes}
            directions = Directions.from_parameters(problem.blocks, drawn)
            parts = [rows.dot(directions)[..., 0].T for rows in held]
            out[:, start : some.stop] = torch.cat(parts)
        return out


@dataclass(frozen=True, eq=False)
class FittedTRAK(FittedMethod):
    """TRAK, ready for queries.

    Args:
        members: one for each model.
    """

    method: TRAK
    members: tuple[Member, ...]

    def score_values(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Certificate]:
        """Average over the models."""
        examples, products = Examples(queries, "queries", self.method.batch_size), []
        for member in self.members:
            cotangents = member.problem.output_cotangents("measurement", measurement)
            features = self.method.compute_features(member.problem, examples, cotangents, member.seed)
            products.append(features @ member.solved.T)
        weights = torch.stack([member.weights for member in self.members]).mean(0)
        values = torch.stack(products).mean(0) * weights * len(weights)
        return values, self.certificate(len(values))
