"""Tasks for models of transformers: language modelling, and classification of tokens.

Batches are dicts as the models take them: ``input_ids`` and ``attention_mask`` (B, S), ``labels``, and whatever else
the model's ``forward`` knows. A label of -100 is no label: it has no loss, no measurement and draws nothing. How far a
batch is padded, and on which side, changes nothing: the model always gets it padded on the right, see `aligned`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.errors import InputError, UnsupportedError, expected
from wherefrom.hf import reading
from wherefrom.hf.outputs import base_of, inputs_of, logits
from wherefrom.hf.packing import document_starts, is_packed
from wherefrom.model.task import Batch, Classification, Task

IGNORE = -100
LOSS_MASKS = ("completion_mask", "assistant_masks")  # as trl names them: 0 where a token has no label


class Labelled(Task):
    """Cross-entropy of logits with labels that a batch holds under "labels"."""

    def __init__(self) -> None:
        self._classification = Classification(IGNORE)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the model's logits on the `aligned` batch: (B, C) or (B, S, C).

        Raises:
            InputError: if the batch has columns that neither the model nor the loss takes.
            UnsupportedError: if the outputs depend on padding.
        """
        batch = aligned(batch)
        _refuse_packing(batch)
        outputs = self._logits(model, batch)
        if "input_ids" in batch:
            forward = lambda some: self._logits(model, some)  # noqa: E731
            reading.check_once(model, "unpadded", batch, forward, reading.check_padding_changes_nothing)
        return outputs

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return logits(model, batch)

    def labels(self, batch: Batch) -> Tensor:
        """Find the label of each vector of logits, -100 for none: (B,) or (B, S).

        Raises:
            InputError: if there are none, or they are no whole numbers.
        """
        batch = aligned(batch)
        if "labels" not in batch:
            raise expected("a batch", "one with 'labels'", sorted(batch))
        return whole_numbers(batch["labels"])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the cross-entropy in nats, summed over an example's labelled positions: (B,)."""
        return self._classification.loss(outputs, (None, self.labels(batch)))

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the negative margin of the right class, summed over labelled positions: (B,)."""
        return self._classification.measurement(outputs, (None, self.labels(batch)))

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw each label of the `aligned` batch from softmax(outputs)."""
        return aligned(batch) | {"labels": self._classification.resample(outputs, (None, self.labels(batch)), rng)[1]}

    def padding(self, batch: Batch) -> Tensor | None:
        """Take the attention mask of the `aligned` batch, (B, S), or all of its tokens; None if it has neither."""
        batch = aligned(batch)
        has_tokens = bool(batch.keys() & {"attention_mask", "input_ids"})
        return _mask_of_tokens(batch) if has_tokens else None


class TokenClassification(Labelled):
    """One label per token, (B, S): ``AutoModelForTokenClassification``; both are summed over labelled tokens.

    loss         l = -sum_t log p_t,                         p_t the probability of the right label
    measurement  f = -sum_t log(p_t / (1 - p_t))
    """

    def token_measurements(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute each token's negative margin, at its position in the `aligned` batch; 0 without a label: (B, S)."""
        labels = self.labels(batch)
        return self._classification.measurement(outputs.flatten(0, 1), (None, labels.flatten())).view_as(labels)


class CausalLM(Labelled):
    """Next-token prediction: ``AutoModelForCausalLM``. Labels (B, S) stand at the token itself, as in transformers.

        loss         l = -sum_t log p(token t | tokens before)          over the labelled tokens t
        measurement  f = l / number of labelled tokens

    The loss is a sum, so that the unit of C is the sequence. f is minus the average log-probability of a completion
    given its prompt, in nats per token (Klochkov & Liu 2024); ``measurement=task.loss`` makes it the sum of Grosse et
    al. (2023). Without "labels" every token has one. Nothing predicts the first token, so a label there has no effect.
    Where a "completion_mask" or "assistant_masks" is 0, there is no label, as trl trains.

    Documents packed into one row are told apart by position_ids that start again, and do not read each other: there
    must be no 2-D attention mask then, as transformers itself wants it. Without "labels" nothing predicts the first
    token of each document.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the model's logits on the `aligned` batch: (B, S, C).

        Raises:
            InputError: if the batch has columns that neither the model nor the loss takes, or packed documents under a
                2-D mask.
            UnsupportedError: if the model is an encoder or has one, or lets packed documents read each other.
        """
        base = base_of(model)
        encoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        if encoder or "decoder_input_ids" in (inputs_of(base) or ()):
            raise UnsupportedError(
                f"CausalLM is for decoders, but {type(base).__name__} has an encoder and a decoder. Write a Task whose "
                "outputs are the decoder's logits and whose loss is that of its labels."
            )
        batch = aligned(batch)
        _check_mask_of_packed(batch)
        outputs = self._logits(model, batch)
        mask = batch.get("attention_mask")
        if "input_ids" in batch and (mask is None or mask.ndim == 2):
            forward = lambda some: self._logits(model, some)  # noqa: E731
            reading.check_once(model, "causal", batch, forward, reading.check_is_causal)
            if mask is None and _is_packed(batch):
                reading.check_once(model, "apart", batch, forward, reading.check_documents_stay_apart)
        return outputs

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return logits(model, batch, ("labels", *LOSS_MASKS))

    def labels(self, batch: Batch) -> Tensor:
        """Put labels at the positions that predict them: (B, S), the last without any."""
        batch = aligned(batch)
        labels = whole_numbers(batch["labels"]) if "labels" in batch else _label_all_tokens(batch)
        for name in LOSS_MASKS:
            if name in batch:
                _check_shape_of_mask(labels, name, batch[name])
                labels = labels.where(batch[name].bool(), IGNORE)
        if labels.ndim != 2:
            raise expected("labels", "one for each token, (B, S)", tuple(labels.shape))

        # The logits at position t predict the token at t + 1; nothing follows the last one.
        last = labels.new_full((len(labels), 1), IGNORE)
        return torch.cat([labels[:, 1:], last], 1)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the cross-entropy in nats per labelled token: (B,)."""
        count = (self.labels(batch) != IGNORE).sum(1)  # (B,)
        return self.loss(outputs, batch) / count.clamp(min=1)

    def token_measurements(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute what each labelled token adds to the measurement, (B, S).

        A part stands at the position of the token that is predicted, in the `aligned` batch; 0 where there is no label.
        """
        labels = self.labels(batch)
        losses = self._classification.loss(outputs.flatten(0, 1), (None, labels.flatten())).view_as(labels)
        at_predicted_token = F.pad(losses[:, :-1], (1, 0))  # (B, S), one position later
        count = (labels != IGNORE).sum(1, keepdim=True)  # (B, 1)
        return at_predicted_token / count.clamp(min=1)

    def resample(self, outputs: Tensor, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw each labelled token of the `aligned` batch from the model; the tokens it reads stay."""
        resampled = super().resample(outputs, batch, rng)
        # Back from where a label is predicted to its token. The last position, which predicts nothing, comes first.
        return resampled | {"labels": resampled["labels"].roll(1, 1)}

    def padding(self, batch: Batch) -> Tensor:
        """Tell which positions are real up to the last that predicts a label, (B, S); later ones have no gradient."""
        is_labelled = (self.labels(batch) != IGNORE).long()
        labels_from_here = is_labelled.flip(1).cumsum(1).flip(1)  # (B, S), how many at this position or later
        return _mask_of_tokens(aligned(batch)) & (labels_from_here > 0)


def aligned(batch: Batch) -> Batch:
    """Move every sequence of a batch to the left, so that its padding is on the right.

    Models number positions from the left, and some read the first token for the whole sequence. A mask of more axes,
    of sequences packed into one, stays as it is: all tokens count as real.

    Raises:
        InputError: if the batch is not a dict.
    """
    if not isinstance(batch, Mapping):
        raise expected("a batch", "a dict of tensors such as wherefrom.hf.pad makes", type(batch).__name__)
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(batch)

    # Rotate each row so that its first token comes first; what stood before it follows at the end.
    first = mask.bool().long().argmax(1, keepdim=True)  # (B, 1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    index = (first + steps) % mask.shape[1]  # (B, S)

    def move(t: Tensor) -> Tensor:
        if t.shape[:2] != mask.shape:
            return t
        further_axes = [1] * (t.ndim - 2)
        return t.gather(1, index.view(*index.shape, *further_axes).expand(t.shape))

    return {name: move(t) for name, t in batch.items()}


def _mask_of_tokens(batch: Batch) -> Tensor:
    """Tell which tokens are real, (B, S) bool."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return mask.bool()


def whole_numbers(labels: Tensor, advice: str = "Convert them with labels.long().") -> Tensor:
    """Give labels as int64.

    Raises:
        InputError: if they have fractions, which transformers would not take for classes either.
    """
    if labels.is_floating_point():
        raise expected("labels", "whole numbers, the numbers of classes", f"{labels.dtype}", advice)
    return labels.long()


def _check_shape_of_mask(labels: Tensor, name: str, mask: Tensor) -> None:
    if mask.shape != labels.shape:
        raise expected(name, f"of the labels' shape {tuple(labels.shape)}", tuple(mask.shape))


def _label_all_tokens(batch: Batch) -> Tensor:
    """Make a label for each real token but the first of each document, (B, S)."""
    if "input_ids" not in batch:
        raise expected("a batch", "one with 'labels' or 'input_ids'", sorted(batch))
    labels = batch["input_ids"].where(_mask_of_tokens(batch), IGNORE)
    positions = batch.get("position_ids")
    has_mask = batch.get("attention_mask") is not None
    # With a mask every row is one document, whose first token nothing predicts anyway.
    if not has_mask and positions is not None and positions.shape == labels.shape:
        labels = labels.masked_fill(document_starts(positions), IGNORE)
    return labels.long()


def _is_packed(batch: Batch, real: Tensor | None = None) -> bool:
    """Whether position_ids start again inside a row."""
    positions = batch.get("position_ids")
    return positions is not None and positions.ndim == 2 and is_packed(positions, real)


def _check_mask_of_packed(batch: Batch) -> None:
    """Refuse packed documents under a mask, which flash attention keeps apart and other implementations do not.

    Raises:
        InputError: if there are any.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2 and _is_packed(batch, _mask_of_tokens(batch)):
        raise InputError(
            "position_ids start again inside a row that has an attention_mask (B, S): under it transformers lets the "
            "documents of a row read each other, except in flash attention. Leave attention_mask out to keep them "
            "apart, as wherefrom.hf.pad does, or give a mask of pairs of tokens."
        )


def _refuse_packing(batch: Batch) -> None:
    """Refuse packed documents where padding can be told from tokens by a mask alone.

    Raises:
        InputError: if there are any.
    """
    if batch.get("attention_mask") is None and _is_packed(batch):
        raise expected(
            "position_ids",
            "rising along each row, or beside an attention_mask",
            "some that start again",
            "Documents are packed into rows for CausalLM; give each a row of its own.",
        )
