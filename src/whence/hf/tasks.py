"""Tasks for models of transformers: language modelling, and classification of sequences and of tokens.

Batches are dicts as the models take them: ``input_ids`` and ``attention_mask`` (B, S), ``labels``, and whatever else
the model's ``forward`` knows. A label of -100 is no label: it has no loss, no measurement and draws nothing. How far a
batch is padded, and on which side, changes nothing: the model always gets it padded on the right, see `aligned`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whence.errors import expected
from whence.hf.outputs import logits
from whence.task import Batch, Classification, Task

IGNORE = -100


class _Labelled(Task):
    """Cross-entropy of logits with labels that a batch holds under "labels"."""

    def __init__(self) -> None:
        self._plain = Classification(IGNORE)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits on the `aligned` batch: (B, C) or (B, S, C)."""
        return logits(model, aligned(batch))

    def labels(self, batch: Batch) -> Tensor:
        """The label of each vector of logits, -100 for none: (B,) or (B, S)."""
        batch = aligned(batch)
        if "labels" not in batch:
            raise expected("a batch", "one with 'labels'", sorted(batch))
        return batch["labels"].long()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats, summed over an example's labelled positions: (B,)."""
        return self._plain.loss(outputs, (None, self.labels(batch)))

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Negative margin of the right class, summed over labelled positions: (B,)."""
        return self._plain.measurement(outputs, (None, self.labels(batch)))

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """The `aligned` batch with each label drawn from softmax(outputs)."""
        return aligned(batch) | {"labels": self._plain.resample(outputs, (None, self.labels(batch)), rng)[1]}

    def padding(self, batch: Batch) -> Tensor | None:
        """(B, S): the attention mask of the `aligned` batch, or all of its tokens; None if it has neither."""
        batch = aligned(batch)
        return _real(batch) if batch.keys() & {"attention_mask", "input_ids"} else None


class SequenceClassification(_Labelled):
    """One label per sequence, (B,): ``AutoModelForSequenceClassification`` with integer labels.

    loss         l = -log p_y
    measurement  f = -log(p_y / (1 - p_y))                                              (ASTRA, appendix F.1)
    """


class TokenClassification(_Labelled):
    """One label per token, (B, S): ``AutoModelForTokenClassification``; both are summed over labelled tokens.

    loss         l = -sum_t log p_t,                         p_t the probability of the right label
    measurement  f = -sum_t log(p_t / (1 - p_t))
    """

    def token_measurements(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The negative margin of each token, at its position in the `aligned` batch; 0 without a label: (B, S)."""
        labels = self.labels(batch)
        return self._plain.measurement(outputs.flatten(0, 1), (None, labels.flatten())).view_as(labels)


class CausalLM(_Labelled):
    """Next-token prediction: ``AutoModelForCausalLM``. Labels (B, S) stand at the token itself, as in transformers.

        loss         l = -sum_t log p(token t | tokens before)          over the labelled tokens t
        measurement  f = l / number of labelled tokens

    The loss is a sum, so that the unit of C is the sequence. f is minus the average log-probability of a completion
    given its prompt, in nats per token (Klochkov & Liu 2024); ``measurement=task.loss`` makes it the sum of Grosse et
    al. (2023). Without "labels" every token has one. Nothing predicts the first token, so a label there has no effect.
    """

    def labels(self, batch: Batch) -> Tensor:
        """Labels at the positions that predict them: (B, S), the last without any."""
        batch = aligned(batch)
        own = batch["labels"] if "labels" in batch else batch["input_ids"].where(_real(batch), IGNORE)
        return torch.cat([own[:, 1:], own.new_full((len(own), 1), IGNORE)], 1).long()

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats per labelled token: (B,)."""
        return self.loss(outputs, batch) / (self.labels(batch) != IGNORE).sum(1).clamp(min=1)

    def token_measurements(self, outputs: Tensor, batch: Batch) -> Tensor:
        """What each labelled token adds to the measurement, (B, S).

        A part stands at the position of the token that is predicted, in the `aligned` batch; 0 where there is no label.
        """
        labels = self.labels(batch)
        losses = self._plain.loss(outputs.flatten(0, 1), (None, labels.flatten())).view_as(labels)
        return F.pad(losses[:, :-1], (1, 0)) / (labels != IGNORE).sum(1, keepdim=True).clamp(min=1)

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """The `aligned` batch with each labelled token drawn from the model; the tokens it reads stay."""
        drawn = super().resample(outputs, batch, rng)
        return drawn | {"labels": drawn["labels"].roll(1, 1)}  # the last position predicts nothing

    def padding(self, batch: Batch) -> Tensor:
        """(B, S): real positions up to the last one that predicts a label; those after it have no gradient."""
        labelled = (self.labels(batch) != IGNORE).long()
        return _real(aligned(batch)) & (labelled.flip(1).cumsum(1).flip(1) > 0)


def aligned(batch: Batch) -> Batch:
    """The batch with every sequence moved to the left, so that its padding is on the right.

    Models number positions from the left, and some read the first token for the whole sequence. A mask of more axes,
    of sequences packed into one, stays as it is: all tokens count as real.

    Raises:
        InputError: if the batch is not a dict.
    """
    if not isinstance(batch, Mapping):
        raise expected("a batch", "a dict of tensors such as whence.hf.pad makes", type(batch).__name__)
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(batch)
    steps = torch.arange(mask.shape[1], device=mask.device)
    index = (mask.bool().long().argmax(1, keepdim=True) + steps) % mask.shape[1]  # (B, S)

    def move(t: Tensor) -> Tensor:
        if t.shape[:2] != mask.shape:
            return t
        return t.gather(1, index.view(*index.shape, *[1] * (t.ndim - 2)).expand(t.shape))

    return {name: move(t) for name, t in batch.items()}


def _real(batch: Batch) -> Tensor:
    """(B, S): True at real tokens."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return mask.bool()
