"""Task: what was trained and what is asked.

A task says how a model is called on a batch, which loss trained it, and which measurement of a query is to be
explained. Subclass `Task`, or pass any object that has ``outputs`` and ``loss`` (the other methods then take the
defaults here).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.errors import InputError, UnsupportedError

Batch = Any
CHUNK = 2**22  # numbers in an intermediate result


class Task:
    """The user's contract. Batches are whatever the data set yields; B is their number of examples."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the model's outputs on a batch, differentiable in the parameters: (B, ..., C)."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the training loss, one number per example, summed over its own tokens: (B,)."""
        raise NotImplementedError

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute f of each query, lower is better; the loss unless overridden: (B,)."""
        return self.loss(outputs, batch)

    def token_measurements(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Split the measurement over the T tokens of each query, (B, T); its sum over T is `measurement`.

        Raises:
            UnsupportedError: unless the task overrides it.
        """
        del outputs, batch
        raise UnsupportedError(
            f"{type(self).__name__} does not say what each token adds to the measurement (method "
            "`token_measurements`). Define it, or pass parts=..., a function of (outputs, batch) that gives (B, T)."
        )

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw labels from the model's own distribution for the same batch (for the true Fisher).

        Raises:
            UnsupportedError: unless the task overrides it.
        """
        del outputs, batch, rng
        raise UnsupportedError(
            f"{type(self).__name__} does not say how to draw labels from the model (method `resample`). "
            "Define it, or use the true labels: labels='true'."
        )

    def padding(self, batch: Batch) -> Tensor | None:
        """Tell which positions are real, (B, S) bool; None where all are."""
        del batch
        return None

    def name(self) -> str:
        """Name the task in records; artefacts fitted under one name are refused under another."""
        return type(self).__name__


class Classification(Task):
    """Softmax cross-entropy on batches ``(x, y)``; the measurement is the negative correct-class margin.

    Outputs are logits (B, C) with labels (B,), or (B, ..., C) with labels (B, ...): losses and measurements are then
    summed over an example's positions, leaving out those labelled ``ignore_index``.

        loss         l = -log p_y
        measurement  f = -log(p_y / (1 - p_y)) = -(h_y - logsumexp of the other logits)     (ASTRA, appendix F.1)
    """

    def __init__(self, ignore_index: int = -100):
        self.ignore_index = ignore_index

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the logits ``model(x)``."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the cross-entropy in nats, summed over positions: (B,)."""
        labels = self._labels(outputs, batch)
        flat = F.cross_entropy(
            outputs.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=self.ignore_index
        )
        return flat.view(len(labels), -1).sum(1)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the negative margin, summed over positions: (B,)."""
        labels = self._labels(outputs, batch)
        real = labels != self.ignore_index
        target = labels.where(real, 0).unsqueeze(-1)
        others = outputs.scatter(-1, target, -torch.inf).logsumexp(-1)
        margin = outputs.gather(-1, target).squeeze(-1) - others
        return -margin.where(real, 0).view(len(labels), -1).sum(1)

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw labels from softmax(outputs) by the inverse of its CDF; ignored positions stay ignored."""
        labels = self._labels(outputs, batch)
        real = labels != self.ignore_index
        at = real.flatten().nonzero()[:, 0]  # padding draws nothing, so that its length changes no other draw
        u = torch.rand(len(at), generator=rng, dtype=torch.float64, device="cpu").to(labels.device)
        logits = outputs.detach().flatten(0, -2)  # (positions, C)
        drawn = torch.full_like(labels, self.ignore_index).flatten()
        step = max(1, CHUNK // logits.shape[1])  # a vocabulary is large: a few positions at a time
        for some, points in zip(at.split(step), u.split(step), strict=True):
            cdf = logits[some].double().softmax(-1).cumsum(-1)
            # The sum of all probabilities differs from 1 by rounding; so the points are scaled to it.
            drawn[some] = (cdf < points.unsqueeze(-1) * cdf[:, -1:]).sum(-1)
        return (batch[0], drawn.view_as(labels), *batch[2:])

    def padding(self, batch: Batch) -> Tensor | None:
        """Find the positions that have a label, where labels are per position."""
        labels = batch[1].long()  # as uint8, 156 would equal -100
        return (labels != self.ignore_index).flatten(1) if labels.ndim > 1 else None

    def _labels(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = batch[1]
        if outputs.ndim < 2 or labels.shape != outputs.shape[:-1]:
            raise InputError(
                f"Classification expects logits (B, ..., C) and labels (B, ...), got logits {tuple(outputs.shape)} and "
                f"labels {tuple(labels.shape)}. Pass class indices, one per position, or write your own Task."
            )
        if labels.is_floating_point():
            raise InputError(f"Classification expects integer class labels, got {labels.dtype}. Use y.long().")
        labels = labels.long()  # of any width, as NumPy and other libraries have them
        real = labels[labels != self.ignore_index]
        if real.numel() and not (0 <= int(real.min()) and int(real.max()) < outputs.shape[-1]):
            raise InputError(
                f"Class labels must lie in 0..{outputs.shape[-1] - 1} (the model has {outputs.shape[-1]} outputs) or "
                f"be {self.ignore_index}, got {int(real.min())}..{int(real.max())}."
            )
        return labels


class Regression(Task):
    """Squared error on batches ``(x, y)``; the measurement is the absolute error.

    loss         l = sum_k (h_k - y_k)^2                     (output Hessian 2 I; labels y ~ N(h, 1/2))
    measurement  f = sum_k |h_k - y_k|                       (ASTRA, appendix F.1)
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the predictions ``model(x)``."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the squared error, summed over outputs: (B,)."""
        return self._error(outputs, batch).square().sum(1)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the absolute error, summed over outputs: (B,)."""
        return self._error(outputs, batch).abs().sum(1)

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw targets from N(h, 1/2), the distribution whose negative log-likelihood is the squared error."""
        u = torch.rand(outputs.shape, generator=rng, dtype=torch.float64, device="cpu").clamp(1e-12, 1 - 1e-12)
        noise = torch.special.ndtri(u).to(outputs) * 0.5**0.5
        return (batch[0], (outputs.detach() + noise).view_as(batch[1]), *batch[2:])

    @staticmethod
    def _error(outputs: Tensor, batch: Batch) -> Tensor:
        # torch subtracts no booleans.
        targets = batch[1].to(outputs.dtype) if batch[1].dtype == torch.bool else batch[1]
        if targets.numel() != outputs.numel() or len(targets) != len(outputs):
            raise InputError(
                f"Regression expects one target per output, got outputs {tuple(outputs.shape)} and targets "
                f"{tuple(targets.shape)}. Give targets of the outputs' shape."
            )
        error = outputs - targets.reshape(outputs.shape)
        return error.flatten(1) if error.ndim > 1 else error.unsqueeze(1)  # (B, K)


def as_task(task: object) -> Task:
    """Make a `Task` of the user's object: itself, or a duck-typed one with the defaults for what it lacks.

    Raises:
        InputError: if ``outputs`` or ``loss`` is missing.
    """
    if isinstance(task, Task):
        return task
    missing = [name for name in ("outputs", "loss") if not callable(getattr(task, name, None))]
    if missing or isinstance(task, type):
        what = f"the class {task.__name__}" if isinstance(task, type) else f"a {type(task).__name__}"
        raise InputError(
            f"task must be an instance with methods outputs(model, batch) and loss(outputs, batch), got {what}"
            + (f" without {' and '.join(missing)}" if missing and not isinstance(task, type) else "")
            + ". Pass wherefrom.Classification(), wherefrom.Regression(), or subclass wherefrom.Task."
        )
    return cast(Task, _Duck(task))


class _Duck(Task):
    """A user's object with the defaults of `Task` for whatever it does not define."""

    def __init__(self, task: object):
        for name in ("outputs", "loss", "measurement", "token_measurements", "resample", "padding"):
            if hasattr(task, name):
                setattr(self, name, getattr(task, name))
        self.wrapped = task

    def name(self) -> str:
        """Name the user's class."""
        return type(self.wrapped).__name__
