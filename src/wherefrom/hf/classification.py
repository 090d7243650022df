"""Classification of sequences by models of transformers: classes, targets of a regression, or several labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.errors import expected
from wherefrom.hf.outputs import base_of, logits, marked_padding
from wherefrom.hf.tasks import Labelled, aligned, whole_numbers
from wherefrom.model.task import Batch

PROBLEMS = ("single_label_classification", "regression", "multi_label_classification")  # of transformers


class SequenceClassification(Labelled):
    """One label per sequence: ``AutoModelForSequenceClassification``, in each of its three problem types.

    Classes, labels (B,) whole numbers:

        loss         l = -log p_y
        measurement  f = -log(p_y / (1 - p_y))                                          (ASTRA, appendix F.1)

    Regression, and rewards: labels (B,) or (B, K) for K outputs; a mean over outputs, as transformers trains them:

        loss         l = 1/K sum_k (h_k - y_k)^2                (output Hessian 2/K I; labels y ~ N(h, K/2))
        measurement  f = 1/K sum_k |h_k - y_k|

    Several labels, each true or not, (B, K) from 0 to 1, p_k = sigmoid(h_k):

        loss         l = -1/K sum_k (y_k log p_k + (1 - y_k) log(1 - p_k))
        measurement  f = 1/K sum_k (1 - 2 y_k) h_k              (the negative margin of each label)

    Args:
        problem_type: as in the model's configuration, "single_label_classification", "regression" or
            "multi_label_classification"; None takes regression for a model of one output, else classes.

    Raises:
        InputError: at another problem type.
    """

    def __init__(self, problem_type: str | None = None):
        super().__init__()
        if problem_type is not None and problem_type not in PROBLEMS:
            raise expected("problem_type", f"one of {', '.join(PROBLEMS)}", repr(problem_type))
        self.problem_type = problem_type

    def name(self) -> str:
        """Name the class, and the problem type where it was given."""
        return super().name() + (f"({self.problem_type})" if self.problem_type else "")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the logits on the `aligned` batch, (B, C), pooled at the last token whatever the padding.

        Raises:
            InputError: if the model was trained with another problem type; see also `CausalLM.outputs`.
            UnsupportedError: if the outputs depend on padding.
        """
        outputs = super().outputs(model, batch)
        config = getattr(base_of(model), "config", None)
        own = getattr(config, "problem_type", None)  # which transformers notes when it trains the model
        if own is not None and own != self._problem(outputs):
            raise expected(
                "problem_type",
                f"the model's own, {own}",
                self._problem(outputs),
                f"Use SequenceClassification({own!r}).",
            )
        return outputs

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        with marked_padding(base_of(model), batch) as padded:
            return logits(model, padded, ("labels", self._column(batch)))

    def labels(self, batch: Batch) -> Tensor:
        """Find the class of each sequence, -100 for none: (B,).

        Raises:
            InputError: if there are none, or they are no whole numbers.
        """
        return whole_numbers(
            self._read_labels(batch), "For targets of several outputs say SequenceClassification(problem_type)."
        )

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the loss of the problem type, a mean over outputs: (B,)."""
        problem = self._problem(outputs)
        if problem == "single_label_classification":
            return super().loss(outputs, batch)
        targets = self._targets(outputs, batch)
        if problem == "regression":
            return (outputs - targets).square().mean(1)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the negative margin, or the absolute error, a mean over outputs: (B,)."""
        problem = self._problem(outputs)
        if problem == "single_label_classification":
            return super().measurement(outputs, batch)
        targets = self._targets(outputs, batch)
        if problem == "regression":
            return (outputs - targets).abs().mean(1)
        return ((1 - 2 * targets) * outputs).mean(1)

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw labels for the `aligned` batch so that squared gradients have the loss's Hessian as their mean.

        The mean over K outputs makes the loss 1/K of a log-likelihood, so deviations from the mean are sqrt(K) times
        those of the model's own distribution.
        """
        problem = self._problem(outputs)
        if problem == "single_label_classification":
            return super().resample(outputs, batch, rng)

        outputs = outputs.detach()
        u = torch.rand(outputs.shape, generator=rng, dtype=torch.float64)
        u = u.clamp(1e-12, 1 - 1e-12).to(outputs.device)  # the normal quantiles of 0 and 1 are infinite
        if problem == "regression":
            mean = outputs
            noise = torch.special.ndtri(u) * 0.5**0.5
        else:
            mean = outputs.sigmoid()
            noise = (u < mean).to(mean) - mean
        labels = mean + outputs.shape[1] ** 0.5 * noise.to(mean)
        # The column of labels may have another name; the draws always stand under "labels".
        others = {name: t for name, t in aligned(batch).items() if name != self._column(batch)}
        return others | {"labels": labels.view_as(self._read_labels(batch))}

    def _problem(self, outputs: Tensor) -> str:
        if self.problem_type is not None:
            return self.problem_type
        return "regression" if outputs.shape[-1] == 1 else "single_label_classification"

    @staticmethod
    def _column(batch: Batch) -> str:
        """Find the column that holds the labels: transformers' collators rename these others."""
        return next((name for name in ("labels", "label", "label_ids") if name in batch), "labels")

    def _read_labels(self, batch: Batch) -> Tensor:
        """Take the labels as they are: they have no positions that would move with the padding."""
        if self._column(batch) not in aligned(batch):
            raise expected("a batch", "one with 'labels'", sorted(batch))
        return batch[self._column(batch)]

    def _targets(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Give the labels the shape of the outputs, (B, K), and their dtype."""
        labels = self._read_labels(batch)
        if labels.numel() != outputs.numel() or len(labels) != len(outputs):
            raise expected("labels", f"of the outputs' shape {tuple(outputs.shape)}", tuple(labels.shape))
        return labels.to(outputs).view_as(outputs)
