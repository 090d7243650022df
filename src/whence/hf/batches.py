"""Batches of token sequences of different lengths, and queries made of a prompt and its completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whence.errors import expected
from whence.hf.tasks import IGNORE

Text = str | Sequence[int] | Tensor


def pad(examples: Sequence[Mapping[str, Any]], token: int = 0) -> dict[str, Tensor]:
    """One batch of examples of different lengths, padded on the right: a ``collate_fn`` for a ``DataLoader``.

    Args:
        examples: dicts of numbers and of sequences of numbers; fields of text are left out.
        token: the tokenizer's padding token; it matters for models that find a sequence's end by it.

    Returns:
        Each field as a tensor with the B examples first: labels padded with -100, input_ids with the token, all else
        with 0, and an "attention_mask" if there is none.
    """
    columns = {
        name: [torch.as_tensor(e[name]) for e in examples]
        for name, first in examples[0].items()
        if not isinstance(first, str) and all(name in e for e in examples)
    }
    columns.setdefault("attention_mask", [torch.ones_like(t) for t in columns["input_ids"]])
    fill = {"labels": IGNORE, "input_ids": token}
    return {
        name: pad_sequence(column, True, fill.get(name, 0)) if column[0].ndim else torch.stack(column)
        for name, column in columns.items()
    }


def completion_batch(
    tokenizer: Callable[..., Any] | None, prompt: Text | Sequence[Text], completion: Text | Sequence[Text]
) -> dict[str, Tensor]:
    """Queries: how likely is a completion after its prompt? Only the completion's tokens have labels.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers; None if token numbers are given.
        prompt: a text or its token numbers, or one for each query. The tokenizer's special tokens go before it.
        completion: likewise; it is tokenized by itself, with no special tokens, so a space in front of it counts.

    Returns:
        "input_ids", "attention_mask" and "labels" (Q, S), padded on the right.

    Raises:
        InputError: an empty completion, an empty prompt, or not as many of one as of the other.
    """
    prompts, completions = _listed(prompt), _listed(completion)
    if len(prompts) != len(completions):
        raise expected("completions", f"one for each of the {len(prompts)} prompts", len(completions))
    examples = []
    for some, more in zip(prompts, completions, strict=True):
        start, end = numbers(tokenizer, some, True), numbers(tokenizer, more, False)
        if not len(start) or not len(end):
            raise expected("a prompt and its completion", "at least one token each", (len(start), len(end)))
        labels = torch.cat([torch.full_like(start, IGNORE), end])
        examples.append({"input_ids": torch.cat([start, end]), "labels": labels})
    return pad(examples)


def _listed(texts: Text | Sequence[Text]) -> Sequence[Text]:
    """Several texts; a single one, as text or as numbers, becomes a list of one."""
    single = isinstance(texts, (str, Tensor)) or not len(texts) or isinstance(texts[0], int)
    return cast(Sequence[Text], [texts] if single else texts)


def numbers(tokenizer: Callable[..., Any] | None, text: Text, special: bool) -> Tensor:
    """A text's token numbers, (S,); numbers come back as they are.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers.
        text: the text or its token numbers.
        special: with the special tokens that a tokenizer of transformers adds.

    Raises:
        InputError: if a text comes without a tokenizer.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise expected("tokenizer", "a tokenizer, since texts are given", None)
        options = {"add_special_tokens": special} if hasattr(tokenizer, "all_special_ids") else {}
        found = tokenizer(text, **options)
        text = found["input_ids"] if isinstance(found, Mapping) else found
    return torch.as_tensor(text, dtype=torch.long)
