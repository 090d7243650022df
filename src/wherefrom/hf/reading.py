"""What a model's outputs may depend on: checked by changing some of its inputs, once for each model.

A causal language model sees nothing of later tokens, documents packed into one row see nothing of one another, and
padding changes no classification. Whether that holds of a model cannot be told from its configuration, and where it
does not, every score would be that of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wherefrom.data.examples import Batch
from wherefrom.errors import UnsupportedError
from wherefrom.hf.packing import document_starts

Forward = Callable[[Batch], Tensor]
SAME = 1e-4  # of the largest logit: well above rounding, well below what a token or a padded position changes

_checked: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # model -> the names of what holds of it


def check_once(model: nn.Module, what: str, batch: Batch, forward: Forward, check: Callable[..., bool]) -> None:
    """Check a model on the first batch that can tell; batches that cannot leave it to the next.

    Args:
        model: whose outputs are looked at, in eval mode; in training mode dropout would decide, so nothing is checked.
        what: a name for what is checked.
        batch: as the model takes it, padded on the right.
        forward: from such a batch to logits.
        check: takes the model, the batch and ``forward``; whether it could tell.

    Raises:
        UnsupportedError: if it does not hold.
    """
    if what in _checked.get(model, ()) or any(module.training for module in model.modules()):
        return
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if functorch.peek_interpreter_stack() is not None:  # a transformed pass has no plain numbers to compare
        return
    with torch.no_grad(), _hide_from_hooks(model):
        if check(model, batch, forward):
            _checked.setdefault(model, set()).add(what)


def check_is_causal(model: nn.Module, batch: Batch, forward: Forward) -> bool:
    """Change the later half of the longest sequence; the logits on the earlier half must stay.

    Returns:
        Whether another half could be written.

    Raises:
        UnsupportedError: if they do not.
    """
    row = _take_row(batch, int(_lengths(batch).argmax()))
    tokens = row["input_ids"]
    length = int(_lengths(row))
    half = length // 2
    changed = tokens.clone()
    changed[:, half:length] = tokens[:, : length - half]  # the model's own tokens, in another place
    if not half or torch.equal(changed, tokens):
        return False
    if _differ(forward(row)[:, :half], forward(row | {"input_ids": changed})[:, :half]):
        raise UnsupportedError(
            f"CausalLM needs a model whose tokens do not see later ones, but {type(model).__name__} reads both ways. "
            "Load a decoder with AutoModelForCausalLM; an encoder needs is_decoder=True, and to be trained so."
        )
    return True


def check_documents_stay_apart(model: nn.Module, batch: Batch, forward: Forward) -> bool:
    """Change the first document of a packed row; the logits on the others must stay.

    Returns:
        Whether there is such a row.

    Raises:
        UnsupportedError: if they do not.
    """
    starts = document_starts(batch["position_ids"])  # (B, S)
    fullest = int(starts.sum(1).argmax())
    row = _take_row(batch, fullest)
    tokens = row["input_ids"]
    end = int(starts[fullest, 1:].long().argmax()) + 1  # where the second document begins
    changed = tokens.clone()
    changed[:, :end] = tokens.roll(-end, 1)[:, :end]
    if torch.equal(changed, tokens):
        return False
    if _differ(forward(row)[:, end:], forward(row | {"input_ids": changed})[:, end:]):
        raise UnsupportedError(
            f"position_ids start again inside a row, but the documents of a row read each other in "
            f"{type(model).__name__}. Give each document a row of its own."
        )
    return True


def check_padding_changes_nothing(model: nn.Module, batch: Batch, forward: Forward) -> bool:
    """Cut the padding off the shortest sequence; its logits must stay.

    Returns:
        Whether there is any padding.

    Raises:
        UnsupportedError: if they do not.
    """
    lengths = _lengths(batch)
    row = _take_row(batch, int(lengths.argmin()))
    length = max(1, int(lengths.min()))
    width = row["input_ids"].shape[1]
    if length == width:
        return False
    short = {}
    for name, t in row.items():
        has_positions = t.shape[:2] == (1, width)
        short[name] = t[:, :length] if has_positions else t
    padded, alone = forward(row), forward(short)
    if padded.ndim == 3:
        padded = padded[:, :length]
    if padded.shape != alone.shape or _differ(padded, alone):
        raise UnsupportedError(
            f"the outputs of {type(model).__name__} depend on how far an example is padded, so it has no loss of its "
            "own. Give sequences of one length, or batch_size=1 without padding."
        )
    return True


def _lengths(batch: Batch) -> Tensor:
    """Count the tokens of each sequence that are no padding, (B,)."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        tokens = batch["input_ids"]
        return tokens.new_full((len(tokens),), tokens.shape[1])
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.bool() * steps).amax(1)  # the last position that is a token, counted from 1


def _take_row(batch: Batch, i: int) -> dict[str, Any]:
    """Take one example of a batch, as a batch."""
    count = len(batch["input_ids"])
    row = {}
    for name, t in batch.items():
        has_examples = isinstance(t, Tensor) and t.ndim and len(t) == count
        row[name] = t[i : i + 1] if has_examples else t
    return row


def _differ(a: Tensor, b: Tensor) -> bool:
    largest = torch.maximum(a.abs().max(), b.abs().max())
    return bool((a - b).abs().max() > SAME * largest)


@contextmanager
def _hide_from_hooks(model: nn.Module) -> Iterator[None]:
    """Hide the passes of a check from the hooks and function modes that observe the model."""
    with_hooks = [module._forward_hooks for module in model.modules() if module._forward_hooks]
    before = [(hooks, dict(hooks)) for hooks in with_hooks]
    try:
        for hooks in with_hooks:
            hooks.clear()
        with torch._C.DisableTorchFunction():
            yield
    finally:
        for hooks, original in before:
            hooks.update(original)
