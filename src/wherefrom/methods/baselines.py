"""Baselines that any method should beat: gradients without a curvature, similar representations, chance."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.data.examples import Batch, Examples, batch_length
from wherefrom.errors import expected
from wherefrom.methods.base import FittedMethod, GradientMethod
from wherefrom.methods.stream import Measurement, score_stream
from wherefrom.model.observe import observe_model, prepare_model
from wherefrom.model.task import Task, as_task
from wherefrom.scores import Certificate, Scores, unsolved
from wherefrom.surroundings import undisturbed


@dataclass(frozen=True, kw_only=True)
class GradCos(GradientMethod):
    """Cosines between the gradient of the measurement and those of the training losses (Charpiat et al. 2019).

    The gradient dot product is `Influence` with `Identity`.
    """

    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedGradCos:
        """Put the model and the data together."""
        start = time.perf_counter()
        problem = self.read_problem(model, task, train)
        return FittedGradCos(self, problem, time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class FittedGradCos(FittedMethod):
    """Gradient cosines, ready for queries."""

    def score_values(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Certificate]:
        """Compare the queries' gradients with those of all training examples."""
        f = self.query_directions(self.problem, queries, measurement)
        f = f.scale(1 / f.norm().clamp(min=1e-30))
        values = score_stream(self.problem, f, cosine=True)
        return values, self.certificate(len(values))


@dataclass(frozen=True)
class Embeddings:
    """Similarity of what a layer makes of the queries and of the training examples.

    Args:
        layer: the name of a module, whose (last) output on a batch is taken, or a function of the model and a batch.
            (B, T, d) is averaged over positions, those that ``task.padding`` calls real; other shapes are flattened.
        cosine: of the angle between them; False takes the dot product.
        batch_size: examples per pass of the model; changes speed and memory only.
    """

    layer: str | Callable[[nn.Module, Batch], Tensor]
    cosine: bool = True
    batch_size: int | None = None

    @undisturbed()
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedEmbeddings:
        """Compute the representations of N training examples.

        Args:
            model: the trained model; it comes back as it was.
            task: what was trained.
            train: a tuple of tensors, a Dataset or a DataLoader.

        Raises:
            InputError: if there is no such layer, or its output is not a tensor with the examples first.
        """
        model, read_task = prepare_model(model), as_task(task)
        names = [name for name, _ in model.named_modules() if name]
        if isinstance(self.layer, str) and self.layer not in names:
            raise expected("layer", f"a module of the model ({', '.join(names)})", repr(self.layer))
        examples = Examples(train, "train", self.batch_size)
        return FittedEmbeddings(self, model, read_task, self.represent(model, read_task, examples))

    def represent(self, model: nn.Module, task: Task, examples: Examples) -> Tensor:
        """Compute representations, (n, d); of length 1 for cosines."""
        first = next(model.parameters())
        with observe_model(model), torch.no_grad():
            batches = examples.batches(first.device, first.dtype)
            rows = torch.cat([self._represent_batch(model, task, batch) for _, batch in batches])
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30) if self.cosine else rows

    def _represent_batch(self, model: nn.Module, task: Task, batch: Batch) -> Tensor:
        n, h = batch_length(batch), self._layer_output(model, task, batch)
        if not isinstance(h, Tensor) or not h.ndim or len(h) != n:
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise expected("the layer's output", f"a tensor with the {n} examples first", got, "Give a function.")
        if h.ndim != 3:
            return h.reshape(n, -1)
        real = task.padding(batch)
        mask = torch.ones_like(h[..., :1]) if real is None else real.to(h).unsqueeze(-1)
        return (h * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _layer_output(self, model: nn.Module, task: Task, batch: Batch) -> object:
        """Run a batch through the model; return what the layer gave last."""
        if callable(self.layer):
            return self.layer(model, batch)
        outputs = []
        hook = model.get_submodule(self.layer).register_forward_hook(lambda *call: outputs.append(call[2]))
        try:
            task.outputs(model, batch)
        finally:
            hook.remove()
        return outputs[-1] if outputs else None


@dataclass(frozen=True, eq=False)
class FittedEmbeddings:
    """Representations of the training examples, ready for queries.

    Args:
        method: the settings.
        model, task: what makes representations.
        train: those of the N training examples, (N, d).
    """

    method: Embeddings
    model: nn.Module
    task: Task
    train: Tensor

    @undisturbed()
    def score(self, queries: Any) -> Scores:
        """Compare with Q queries, in the form of the training data; whatever is measured of them."""
        examples = Examples(queries, "queries", self.method.batch_size)
        rows = self.method.represent(self.model, self.task, examples)
        return unsolved(rows @ self.train.T, solver=repr(self.method))


@dataclass(frozen=True)
class Random:
    """Independent normal scores.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    @undisturbed()
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedRandom:  # noqa: ARG002
        """Count the N training examples."""
        return FittedRandom(self, len(Examples(train, "train")))


@dataclass(frozen=True)
class FittedRandom:
    """Independent normal scores of so many training examples."""

    method: Random
    examples: int

    @undisturbed()
    def score(self, queries: Any) -> Scores:
        """Draw the same scores for the same number of queries."""
        rng = torch.Generator().manual_seed(self.method.seed)
        values = torch.randn(len(Examples(queries, "queries")), self.examples, generator=rng)
        return unsolved(values, solver=repr(self.method))
