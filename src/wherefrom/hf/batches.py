"""Batches of token sequences of different lengths, and queries made of a prompt and its completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wherefrom.errors import InputError, expected
from wherefrom.hf.packing import document_starts, is_packed
from wherefrom.hf.tasks import IGNORE
from wherefrom.hf.tokens import (
    Conversation,
    Text,
    Tokenizer,
    chat_prompt,
    chat_tokens,
    is_conversation,
    prompt_and_completion,
)


def pad(examples: Sequence[Mapping[str, Any]], token: int = 0) -> dict[str, Tensor]:
    """Make one batch of examples of different lengths, padded on the right: a ``collate_fn`` for a ``DataLoader``.

    Documents that are packed into one row, told apart by position_ids that start again, get no attention mask:
    transformers keeps them apart only without one. Padding then is a document of its own, and has no labels.

    Args:
        examples: dicts of numbers and of sequences of numbers, all with the same fields; fields of text and messages
            are left out, all others go to the task, which refuses what neither it nor the model takes.
        token: the tokenizer's padding token; it matters for models that find a sequence's end by it.

    Returns:
        Each field as a tensor with the B examples first: labels padded with -100, input_ids with the token, all else
        with 0, and an "attention_mask" if there is none and no row is packed. Whole numbers become int64.

    Raises:
        InputError: if there are no examples, they lack input_ids, differ in their fields, or have something else there.
    """
    if not examples or not all(isinstance(example, Mapping) and "input_ids" in example for example in examples):
        wrong = next(
            (type(example).__name__ for example in examples if not isinstance(example, Mapping)), "one without"
        )
        raise expected("examples", "dicts with 'input_ids'", wrong if len(examples) else "none")

    columns: dict[str, list[Tensor]] = {}
    names = dict.fromkeys(name for example in examples for name in example)  # in the order in which they appear
    for name in names:
        values = [example.get(name) for example in examples]
        if any(_is_text(value) for value in values):
            continue
        if lacking := [i for i, example in enumerate(examples) if name not in example]:
            raise expected(f"field {name!r}", "in every example of a batch or in none", f"none in example {lacking[0]}")
        columns[name] = [_to_tensor(name, value) for value in values]

    tokens = columns["input_ids"]
    positions = columns.get("position_ids", [])
    if "attention_mask" not in columns and any(is_packed(p) for p in positions if p.ndim == 1):
        # Without a mask only labels tell padding from tokens; nothing predicts the first token of a document.
        unlabelled = [t.masked_fill(document_starts(p), IGNORE) for t, p in zip(tokens, positions, strict=True)]
        columns.setdefault("labels", unlabelled)
    else:
        columns.setdefault("attention_mask", [torch.ones_like(t) for t in tokens])

    fill = {"labels": IGNORE, "input_ids": token}
    batch = {}
    for name, column in columns.items():
        is_sequence = column[0].ndim > 0
        batch[name] = pad_sequence(column, True, fill.get(name, 0)) if is_sequence else torch.stack(column)
    return batch


def _is_text(value: Any) -> bool:
    """Whether a field is a text, a message, or a list of either: none of them can enter a loss."""
    if isinstance(value, (list, tuple)):
        return any(_is_text(part) for part in value)
    return isinstance(value, (str, Mapping))


def _to_tensor(name: str, value: Any) -> Tensor:
    try:
        if name == "labels" and isinstance(value, (float, list)):
            value = np.asarray(value)  # targets of a regression keep the digits that Python gives them
        t = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise expected(f"field {name!r}", "numbers or sequences of numbers", repr(value)[:80]) from error
    is_number = t.is_floating_point() and name != "input_ids"
    return t if is_number else t.long()


def completion_batch(
    tokenizer: Tokenizer,
    prompt: Text | Conversation | Mapping[str, Any] | Sequence[Text | Conversation],
    completion: Text | Conversation | Sequence[Text | Conversation],
) -> dict[str, Tensor]:
    """Make queries of how likely a completion is after its prompt: only the completion's tokens have labels.

    Prompt and completion become one text, as in training: with one start token, even if the prompt is a rendered chat
    template that has it, and with an end token only where the tokenizer ends the whole with one. That end token has no
    label, since nobody asked about it; write it into the completion to ask about it too.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers; None if token numbers are given.
        prompt: a text, its token numbers, or the messages of a conversation, which go through the tokenizer's chat
            template; or one of these for each query; or what a tokenizer returns, with "input_ids".
        completion: a text, token numbers, or one for each query, with no special tokens; the space in front of it
            counts. After messages it may be messages too: then the assistant's tokens among them have labels.

    Returns:
        "input_ids", "attention_mask" and "labels" (Q, S), padded on the right.

    Raises:
        InputError: an empty completion, an empty prompt, not as many of one as of the other, or messages that the chat
            template does not take.
    """
    prompts, completions = _as_list(prompt), _as_list(completion)
    if len(prompts) != len(completions):
        raise expected("completions", f"one for each of the {len(prompts)} prompts", len(completions))
    pairs = zip(prompts, completions, strict=True)
    return pad([_make_query(tokenizer, q, *pair) for q, pair in enumerate(pairs)])


def _make_query(
    tokenizer: Tokenizer, number: int, prompt: Text | Conversation, completion: Text | Conversation
) -> dict[str, Tensor]:
    """Make the token numbers of one query, and its labels: (S,)."""
    if is_conversation(completion):
        if not is_conversation(prompt):
            raise expected(f"prompt {number}", "messages, as the completion is", "a text")
        return answer(tokenizer, cast(Conversation, prompt), cast(Conversation, completion))
    if is_conversation(prompt):
        start = chat_prompt(tokenizer, cast(Conversation, prompt))
        _, end, _ = prompt_and_completion(tokenizer, start, cast(Text, completion))
        after = end[:0]  # the template ends a turn, not the tokenizer
    else:
        start, end, after = prompt_and_completion(tokenizer, cast(Text, prompt), cast(Text, completion))
    if not len(start) or not len(end):
        raise expected(f"prompt and completion {number}", "at least one token each", f"{len(start)} and {len(end)}")
    labels = torch.cat([torch.full_like(start, IGNORE), end, torch.full_like(after, IGNORE)])
    return {"input_ids": torch.cat([start, end, after]), "labels": labels}


def answer(
    tokenizer: Tokenizer,
    prompt: Conversation,
    completion: Conversation,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Render a conversation whose last messages are the completion; the assistant's tokens in these have labels.

    Args:
        tokenizer: of transformers, with a chat template.
        prompt: the messages before.
        completion: the messages after.
        options: what else the template takes.

    Returns:
        "input_ids" and "labels", (S,).

    Raises:
        InputError: if the template renders the prompt alone otherwise than within the whole, or the completion has
            nothing of the assistant's.
    """
    if not any(message["role"] == "assistant" for message in completion):
        raise expected("a completion of messages", "one with the assistant's", "none of the assistant's")
    start = chat_prompt(tokenizer, prompt, options)
    whole, by_assistant = chat_tokens(tokenizer, [*prompt, *completion], options)
    if not torch.equal(whole[: len(start)], start):
        raise InputError(
            "The completion cannot be told from the prompt: the chat template renders the prompt's messages otherwise "
            "than within the whole. Give the completion as a text, or token numbers."
        )
    by_assistant[: len(start)] = False
    return {"input_ids": whole, "labels": whole.masked_fill(~by_assistant, IGNORE)}


def training_example(tokenizer: Tokenizer, number: int, document: Any) -> dict[str, Tensor]:
    """Tokenize a conversation, or a prompt and its completion, as trl trains on them.

    Args:
        tokenizer: of transformers; for texts also any function from a text to token numbers.
        number: what to call the document in messages.
        document: a list of messages, a dict with "messages", or one with "prompt" and "completion", both texts or both
            messages; "tools" and "chat_template_kwargs" go to the chat template.

    Returns:
        "input_ids" and "labels", (S,): what the assistant wrote has labels, or the completion and the end token that
        the tokenizer puts after it.

    Raises:
        InputError: if it is of another form, or the chat template does not take it.
    """
    row: Mapping[str, Any] = {"messages": document} if is_conversation(document) else document
    if not isinstance(row, Mapping) or not ("messages" in row or {"prompt", "completion"} <= row.keys()):
        got = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise expected(f"document {number}", "a text, messages, or a dict with 'prompt' and 'completion'", got)
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    if "messages" in row:
        if not is_conversation(row["messages"]):
            wanted = "a list of dicts with 'role' and 'content'"
            raise expected(f"the messages of document {number}", wanted, repr(row["messages"])[:80])
        whole, by_assistant = chat_tokens(tokenizer, row["messages"], options)
        return {"input_ids": whole, "labels": whole.masked_fill(~by_assistant, IGNORE)}

    prompt, completion = row["prompt"], row["completion"]
    if is_conversation(prompt) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if is_conversation(prompt) and is_conversation(completion):
        return answer(tokenizer, prompt, completion, options)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        got = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise expected(f"prompt and completion of document {number}", "two texts, or two lists of messages", got)
    start, end, after = prompt_and_completion(tokenizer, prompt, completion)
    labels = torch.cat([torch.full_like(start, IGNORE), end, after])
    return {"input_ids": torch.cat([start, end, after]), "labels": labels}


def _as_list(texts: Any) -> Sequence[Any]:
    """Make a list of texts or conversations; a single one, as text, numbers or messages, becomes a list of one."""
    if isinstance(texts, Mapping):  # what a tokenizer or a chat template returns
        if "input_ids" not in texts:
            raise expected("a prompt that is a dict", "one with 'input_ids'", sorted(map(str, texts)))
        rows, masks = _as_list(texts["input_ids"]), _as_list(texts.get("attention_mask", []))
        if len(masks) != len(rows) or not len(masks[0]):
            return rows
        pairs = zip(rows, masks, strict=True)
        return [torch.as_tensor(row)[torch.as_tensor(mask).bool()] for row, mask in pairs]
    if isinstance(texts, Tensor):
        return list(texts) if texts.ndim > 1 else [texts]
    is_text = isinstance(texts, str)
    is_single = is_text or not len(texts) or isinstance(texts[0], (int, np.integer)) or is_conversation(texts)
    return [texts] if is_single else texts
