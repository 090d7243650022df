"""From texts and conversations to token numbers: one start token, no end token in the middle, and who wrote what."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from wherefrom.errors import AttributionError, InputError, expected

Text = str | Sequence[int] | Tensor
Message = Mapping[str, Any]  # such as {"role": "user", "content": "Where is Lima?"}
Conversation = Sequence[Message]
Tokenizer = Callable[..., Any] | None

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # with it a template marks what the assistant wrote
REFUSALS = (ValueError, TypeError, LookupError, AttributeError, TemplateError)  # of a tokenizer or a chat template


class Framed(NamedTuple):
    """A text's token numbers, and the special tokens that the tokenizer puts around them; each (length,) int64."""

    before: Tensor
    inner: Tensor
    after: Tensor


def numbers(tokenizer: Tokenizer, text: Text, special: bool) -> Tensor:
    """Tokenize a text; token numbers come back as they are.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers.
        text: the text or its token numbers.
        special: with the special tokens that a tokenizer of transformers adds. A text that begins or ends with them
            already, such as a rendered chat template, gets no second ones.

    Returns:
        (S,) int64.

    Raises:
        InputError: if a text comes without a tokenizer, or the tokenizer has no numbers for it.
    """
    if special and isinstance(text, str):
        return torch.cat(frame(tokenizer, text))
    return _tokenize(tokenizer, text)


def frame(tokenizer: Tokenizer, text: str) -> Framed:
    """Tokenize a text, and tell the special tokens before and after it from its own.

    Raises:
        InputError: if special tokens are put inside the text, or a tokenizer that is a function adds any.
    """
    inner = _tokenize(tokenizer, text)
    if not _takes_options(tokenizer):
        _check_adds_nothing(tokenizer)
        return Framed(inner[:0], inner, inner[:0])

    whole = _tokenize(tokenizer, text, add_special_tokens=True)
    for start in range(len(whole) - len(inner), -1, -1):
        if torch.equal(whole[start : start + len(inner)], inner):
            break
    else:
        raise expected("special tokens", "before and after the text", "others inside it", "Give token numbers.")
    before, after = whole[:start], whole[start + len(inner) :]

    # A rendered chat template begins with the start token: training saw one, so a second one is not added.
    if torch.equal(inner[: len(before)], before):
        before = before[:0]
    if len(after) and torch.equal(inner[-len(after) :], after):
        after = after[:0]
    return Framed(before, inner, after)


def prompt_and_completion(tokenizer: Tokenizer, prompt: Text, completion: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Tokenize a prompt and what follows it as one text.

    A completion that begins with white space is tokenized in its place after the prompt, where the prompt's own tokens
    stay the same, since some tokenizers put a space in front of every text; any other is tokenized by itself.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers.
        prompt: a text or token numbers, which come back as they are.
        completion: likewise.

    Returns:
        Three tensors int64: the start token and the prompt; the completion; the end token that the tokenizer would put
        at the end of both, if it does.
    """
    start = _tokenize(tokenizer, prompt)
    end = _tokenize(tokenizer, completion)
    nothing = start[:0]

    # Only texts get special tokens: who gives token numbers gives all of them.
    after = frame(tokenizer, completion).after if isinstance(completion, str) else nothing
    first = prompt if len(prompt) else completion  # an empty prompt leaves the start token
    before = nothing
    if isinstance(prompt, str) and isinstance(first, str):
        before = frame(tokenizer, first).before

    if isinstance(prompt, str) and isinstance(completion, str) and completion[:1].isspace():
        whole = _tokenize(tokenizer, prompt + completion)
        if torch.equal(whole[: len(start)], start):
            end = whole[len(start) :]
    return torch.cat([before, start]), end, after


# Conversations --------------------------------------------------------------------------------------------------------


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in value)


def chat_prompt(tokenizer: Tokenizer, messages: Conversation, options: Mapping[str, Any] | None = None) -> Tensor:
    """Render messages by the tokenizer's chat template, up to where the assistant's answer begins.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: those before the answer; if the last one is the assistant's, the answer continues it.
        options: what else the template takes, such as ``tools``.

    Returns:
        Token numbers (S,), int64.

    Raises:
        InputError: if there is no chat template, or it does not take the messages.
    """
    if messages and messages[-1]["role"] == "assistant":
        return _render(tokenizer, messages, options, continue_final_message=True)[0]
    return _render(tokenizer, messages, options, add_generation_prompt=True)[0]


def chat_tokens(
    tokenizer: Tokenizer, messages: Conversation, options: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Render a conversation by the tokenizer's chat template, and tell which tokens the assistant wrote.

    A template with ``{% generation %}`` marks them itself. Of any other the messages up to each of the assistant's are
    rendered, with and without it: what lies between is the assistant's, its end-of-turn token too.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: of all roles.
        options: what else the template takes, such as ``tools``.

    Returns:
        Token numbers (S,) int64, and (S,) bool: True where the assistant wrote them.

    Raises:
        InputError: if there is no chat template, it does not take the messages, or renders a part of the conversation
            otherwise than the whole, so that the assistant's tokens cannot be told.
    """
    whole, marked = _render(tokenizer, messages, options)
    if marked is not None:
        return whole, marked

    by_assistant = torch.zeros(len(whole), dtype=torch.bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], options, add_generation_prompt=True)[0]
        after = _render(tokenizer, messages[: i + 1], options)[0]
        for part in (before, after):
            if not torch.equal(whole[: len(part)], part):
                raise InputError(
                    f"The tokens of the assistant's message {i} cannot be told: the chat template renders the messages "
                    "up to it otherwise than within the whole. Mark what the assistant writes in the template by "
                    "{% generation %} ... {% endgeneration %}, or give input_ids and labels."
                )
        by_assistant[len(before) : len(after)] = True
    return whole, by_assistant


def _render(
    tokenizer: Any, messages: Conversation, options: Mapping[str, Any] | None, **how: bool
) -> tuple[Tensor, Tensor | None]:
    """Render token numbers (S,), and the assistant's among them, (S,) bool, if the template marks them itself."""
    if not hasattr(tokenizer, "apply_chat_template"):
        raise expected("tokenizer", "one of transformers with a chat template, since messages are given", tokenizer)
    options = {name: value for name, value in (options or {}).items() if value}
    # Tables fill in what a message lacks with None; a template would print it.
    messages = [_drop_missing(message) for message in messages]
    try:
        marks = not how and GENERATION.search(tokenizer.get_chat_template(tools=options.get("tools"))) is not None
        encoding = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks, **options, **how
        )
    except REFUSALS as error:
        roles = ", ".join(str(message["role"]) for message in messages) or "no message"
        reason = " ".join(str(error).split())[:200]
        raise expected("messages", "what the tokenizer's chat template takes", f"those of {roles}: {reason}") from error
    whole = _as_numbers(encoding["input_ids"])
    by_assistant = torch.as_tensor(encoding["assistant_masks"]).bool() if marks else None
    return whole, by_assistant


def _drop_missing(message: Message) -> Message:
    return {name: value for name, value in message.items() if value is not None}


# One text -------------------------------------------------------------------------------------------------------------


def _tokenize(tokenizer: Tokenizer, text: Text, add_special_tokens: bool = False) -> Tensor:
    """Tokenize a text without special tokens, (S,); numbers come back as they are."""
    if isinstance(text, str):
        if tokenizer is None:
            raise expected("tokenizer", "a tokenizer, since texts are given", None)
        options = {"add_special_tokens": add_special_tokens} if _takes_options(tokenizer) else {}
        encoding = tokenizer(text, **options)
        text = encoding["input_ids"] if isinstance(encoding, Mapping) else encoding
    return _as_numbers(text)


def _as_numbers(tokens: Any) -> Tensor:
    try:
        return torch.as_tensor(tokens, dtype=torch.long)
    except (TypeError, ValueError, RuntimeError) as error:
        raise expected("tokens", "whole numbers", f"{tokens!r:.80}", "The tokenizer may not know a word.") from error


def _takes_options(tokenizer: Tokenizer) -> bool:
    return hasattr(tokenizer, "all_special_ids")


def _check_adds_nothing(tokenizer: Tokenizer) -> None:
    """Refuse a function that adds special tokens: nobody can tell them from the text's own."""
    try:
        added = len(_tokenize(tokenizer, ""))
    except (AttributionError, RuntimeError, ArithmeticError, *REFUSALS):  # it takes no empty text: nothing can be said
        return
    if added:
        raise expected(
            "a tokenizer that is a function",
            "one that adds no special tokens",
            f"{added} tokens for an empty text",
            "Pass the tokenizer itself, or add_special_tokens=False inside the function.",
        )
