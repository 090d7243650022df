"""Batches of token sequences of different lengths, and queries made of a prompt and its completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whence.errors import expected
from whence.hf.tasks import IGNORE

Text = str | Sequence[int] | Tensor


def pad(examples: Sequence[Mapping[str, Any]], token: int = 0) -> dict[str, Tensor]:
    """One batch of examples of different lengths, padded on the right: a ``collate_fn`` for a ``DataLoader``.

    Args:
        examples: dicts of numbers and of sequences of numbers, all with the same fields; fields of text are left out,
            all others go to the model.
        token: the tokenizer's padding token; it matters for models that find a sequence's end by it.

    Returns:
        Each field as a tensor with the B examples first: labels padded with -100, input_ids with the token, all else
        with 0, and an "attention_mask" if there is none. Whole numbers become int64.

    Raises:
        InputError: if there are no examples, they lack input_ids, differ in their fields, or have something else there.
    """
    if not examples or not all(isinstance(e, Mapping) and "input_ids" in e for e in examples):
        wrong = next((type(e).__name__ for e in examples if not isinstance(e, Mapping)), "one without")
        raise expected("examples", "dicts with 'input_ids'", wrong if len(examples) else "none")
    columns: dict[str, list[Tensor]] = {}
    for name in dict.fromkeys(name for e in examples for name in e):
        values = [e.get(name) for e in examples]
        if any(isinstance(v, str) or (isinstance(v, list) and any(isinstance(x, str) for x in v)) for v in values):
            continue
        if lacking := [i for i, e in enumerate(examples) if name not in e]:
            raise expected(f"field {name!r}", "in every example of a batch or in none", f"none in example {lacking[0]}")
        columns[name] = [_tensor(name, v) for v in values]
    columns.setdefault("attention_mask", [torch.ones_like(t) for t in columns["input_ids"]])
    fill = {"labels": IGNORE, "input_ids": token}
    return {
        name: pad_sequence(column, True, fill.get(name, 0)) if column[0].ndim else torch.stack(column)
        for name, column in columns.items()
    }


def _tensor(name: str, value: Any) -> Tensor:
    try:
        t = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise expected(f"field {name!r}", "numbers or sequences of numbers", repr(value)[:80]) from error
    return t if t.is_floating_point() and name != "input_ids" else t.long()


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
    for q, (some, more) in enumerate(zip(prompts, completions, strict=True)):
        start, end = numbers(tokenizer, some, True), numbers(tokenizer, more, False)
        if not len(start) or not len(end):
            raise expected(f"prompt and completion {q}", "at least one token each", f"{len(start)} and {len(end)}")
        labels = torch.cat([torch.full_like(start, IGNORE), end])
        examples.append({"input_ids": torch.cat([start, end]), "labels": labels})
    return pad(examples)


def _listed(texts: Text | Sequence[Text]) -> Sequence[Text]:
    """Several texts; a single one, as text or as numbers, becomes a list of one."""
    if isinstance(texts, Tensor):
        return list(texts) if texts.ndim > 1 else [texts]
    single = isinstance(texts, str) or not len(texts) or isinstance(texts[0], (int, np.integer))
    return cast(Sequence[Text], [texts] if single else texts)


def numbers(tokenizer: Callable[..., Any] | None, text: Text, special: bool) -> Tensor:
    """A text's token numbers, (S,); numbers come back as they are.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers.
        text: the text or its token numbers.
        special: with the special tokens that a tokenizer of transformers adds.

    Raises:
        InputError: if a text comes without a tokenizer, or the tokenizer has no numbers for it.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise expected("tokenizer", "a tokenizer, since texts are given", None)
        options = {"add_special_tokens": special} if hasattr(tokenizer, "all_special_ids") else {}
        found = tokenizer(text, **options)
        text = found["input_ids"] if isinstance(found, Mapping) else found
    try:
        return torch.as_tensor(text, dtype=torch.long)
    except (TypeError, ValueError, RuntimeError) as error:
        raise expected("tokens", "whole numbers", f"{text!r:.80}", "The tokenizer may not know a word.") from error
