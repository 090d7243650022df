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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.curvature.lanczos import embedding
from wherefrom.data.examples import Batch, Examples
from wherefrom.errors import DivergenceError, expected
from wherefrom.methods.base import Method
from wherefrom.methods.stream import Measurement
from wherefrom.model.capture import OutputCotangents
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.persample import vectors
from wherefrom.persample.gradients import Gradients
from wherefrom.surroundings import undisturbed

ROWS = 4096  # examples whose features are widened to float64 together


@dataclass(frozen=True)
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


@dataclass(kw_only=True)
class TRAK(Method):
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

    @undisturbed()
    def fit(self, model: nn.Module | Sequence[nn.Module], task: Task | object, train: Any) -> TRAK:
        """Features of the training examples, one pass for each model.

        Args:
            model: one trained model, or several that were trained independently on the same data.
            task: what was trained and what is measured.
            train: N training examples: a tuple of tensors, a Dataset or a DataLoader.

        Raises:
            InputError: see `Problem`.
            DivergenceError: if Phi^T Phi + reg I is singular.
        """
        if self.size < 1 or (self.regularisation or 0.0) < 0:
            raise expected("size and regularisation", ">= 1 and >= 0", (self.size, self.regularisation))
        self._models = [model] if isinstance(model, nn.Module) else list(model)
        if not self._models:
            raise expected("model", "a model, or several", "none")
        return super().fit(self._models[0], task, train)

    def _fit(self) -> None:
        first = self.problem
        more = [first.with_model(model, self.parameters) for model in self._models[1:]]
        self._members = [self._member(problem, self.seed + m) for m, problem in enumerate([first, *more])]

    def _score(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Tensor | None, Tensor]:
        examples, found = Examples(queries, "queries", self.batch_size), []
        for member in self._members:
            cotangents = member.problem.output_cotangents("measurement", measurement)
            found.append(self._features(member.problem, examples, cotangents, member.seed) @ member.solved.T)
        weights = torch.stack([member.weights for member in self._members]).mean(0)
        values = torch.stack(found).mean(0) * weights * len(weights)
        return values, None, torch.ones(len(values), dtype=torch.bool)

    def _member(self, problem: Problem, seed: int) -> Member:
        weights: list[Tensor] = []

        def output_cotangents(outputs: Tensor, batch: Batch) -> Tensor:
            f, loss = (problem.output_cotangents(what)(outputs, batch) for what in ("measurement", "loss"))
            s, r = f[0].flatten(1), loss[0].flatten(1)
            own = torch.linalg.vecdot(s, s)
            weights.append(torch.where(own > 0, torch.linalg.vecdot(r, s) / own, 0.0))
            return f

        phi = self._features(problem, problem.train, output_cotangents, seed, "TRAK features")
        return Member(problem, seed, self._solved(phi), torch.cat(weights))

    def _solved(self, phi: Tensor) -> Tensor:
        """Phi (Phi^T Phi + reg I)^-1, by Cholesky in float64, in place of Phi."""
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

    def _features(
        self,
        problem: Problem,
        examples: Examples,
        output_cotangents: OutputCotangents,
        seed: int,
        what: str | None = None,
    ) -> Tensor:
        """phi of all examples, (n, k); gradients are held, factored, for as long as half of the memory lasts."""
        held, numbers, found = [], 0, []
        for _, batch in problem.batches(examples, what):
            held.append(problem.gradients(batch, output_cotangents).compact())
            numbers += held[-1].numbers()
            if numbers * problem.dtype.itemsize > self.memory / 2:
                found.append(self._projected(problem, held, seed))
                held, numbers = [], 0
        if held:
            found.append(self._projected(problem, held, seed))
        return torch.cat(found)

    def _projected(self, problem: Problem, held: Sequence[Gradients], seed: int) -> Tensor:
        """P g of the gradients held, (n, k); P is made anew, in chunks of directions that the memory takes."""
        shapes, like = problem.shapes, next(iter(problem.parameters.values())).detach()
        D = sum(s.numel() for s in shapes.values())
        if self.size >= D:
            return torch.cat([vectors.flatten(rows.dense()) for rows in held])
        out = like.new_empty(sum(map(len, held)), self.size)
        step = max(1, int(self.memory / (32 * D)))
        for start in range(0, self.size, step):
            some = range(start, min(start + step, self.size))
            directions = {name: embedding(shapes, name, some, self.size, seed, like) for name in shapes}
            parts = [rows.dot(directions)[..., 0].T for rows in held]
            out[:, start : some.stop] = torch.cat(parts)
        return out
