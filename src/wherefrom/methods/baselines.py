"""Baselines that any method should beat: gradients without a curvature, similar representations, chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.data.examples import Batch, Examples, batch_length
from wherefrom.errors import expected
from wherefrom.methods.base import Method, fitted
from wherefrom.methods.stream import Measurement, streamed
from wherefrom.model.observe import observed, ready
from wherefrom.model.task import Task, as_task
from wherefrom.persample.vectors import norm, scale
from wherefrom.scores import Scores, unsolved
from wherefrom.solvers.base import Pairing
from wherefrom.surroundings import undisturbed


@dataclass(kw_only=True)
class GradCos(Method):
    """Cosines between the gradient of the measurement and those of the training losses (Charpiat et al. 2019).

    The gradient dot product is `Influence` with `Identity`.
    """

    def _score(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Tensor | None, Tensor]:
        f = self._query_vectors(self.problem, queries, measurement)
        f = scale(f, 1 / norm(f).clamp(min=1e-30))
        values = streamed(self.problem, Pairing.of(f, self.problem.blocks, unit=True))
        return values, None, torch.ones(len(values), dtype=torch.bool)


@dataclass
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
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> Embeddings:
        """The representations of N training examples.

        Args:
            model: the trained model; it comes back as it was.
            task: what was trained.
            train: a tuple of tensors, a Dataset or a DataLoader.

        Raises:
            InputError: if there is no such layer, or its output is not a tensor with the examples first.
        """
        self._model, self._task = ready(model), as_task(task)
        names = [name for name, _ in self._model.named_modules() if name]
        if isinstance(self.layer, str) and self.layer not in names:
            raise expected("layer", f"a module of the model ({', '.join(names)})", repr(self.layer))
        self._train = self._of(Examples(train, "train", self.batch_size))
        return self

    @undisturbed()
    def score(self, queries: Any) -> Scores:
        """Similarities with Q queries, in the form of the training data; whatever is measured of them."""
        train: Tensor = fitted(self, "_train")
        return unsolved(self._of(Examples(queries, "queries", self.batch_size)) @ train.T, solver=repr(self))

    def _of(self, examples: Examples) -> Tensor:
        """Representations, (n, d); of length 1 for cosines."""
        first = next(self._model.parameters())
        with observed(self._model), torch.no_grad():
            found = torch.cat([self._pooled(batch) for _, batch in examples.batches(first.device, first.dtype)])
        return found / found.norm(dim=1, keepdim=True).clamp(min=1e-30) if self.cosine else found

    def _pooled(self, batch: Batch) -> Tensor:
        n, h = batch_length(batch), self._output(batch)
        if not isinstance(h, Tensor) or not h.ndim or len(h) != n:
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise expected("the layer's output", f"a tensor with the {n} examples first", got, "Give a function.")
        if h.ndim != 3:
            return h.reshape(n, -1)
        real = self._task.padding(batch)
        mask = torch.ones_like(h[..., :1]) if real is None else real.to(h).unsqueeze(-1)
        return (h * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _output(self, batch: Batch) -> object:
        if callable(self.layer):
            return self.layer(self._model, batch)
        outputs = []
        hook = self._model.get_submodule(self.layer).register_forward_hook(lambda *call: outputs.append(call[2]))
        try:
            self._task.outputs(self._model, batch)
        finally:
            hook.remove()
        return outputs[-1] if outputs else None


@dataclass
class Random:
    """Independent normal scores.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    @undisturbed()
    def fit(self, model: nn.Module, task: Task | object, train: Any) -> Random:  # noqa: ARG002
        """Counts the N training examples."""
        self._examples = len(Examples(train, "train"))
        return self

    @undisturbed()
    def score(self, queries: Any) -> Scores:
        """The same scores for the same number of queries."""
        N, rng = fitted(self, "_examples"), torch.Generator().manual_seed(self.seed)
        return unsolved(torch.randn(len(Examples(queries, "queries")), N, generator=rng), solver=repr(self))
