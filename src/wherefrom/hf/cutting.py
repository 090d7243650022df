"""Documents cut into sequences of tokens: every token of a text has a label, of a conversation the assistant's."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.hf.batches import training_example
from wherefrom.hf.tasks import IGNORE
from wherefrom.hf.text import Document, says_something
from wherefrom.hf.tokens import Tokenizer, numbers


@dataclass(frozen=True, eq=False)
class Sequences(Sequence[dict[str, Tensor]]):
    """Training sequences. With ``pad`` as its ``collate_fn`` a ``DataLoader`` takes them.

    Args:
        tokens: the token numbers of each.
        starts: the document that each begins in, and at which of its tokens.
        dropped: what was left out: reason to count.
        labels: of each, -100 for no label; None where every token has one.
    """

    tokens: list[Tensor]
    starts: list[tuple[int, int]]
    dropped: dict[str, int]
    labels: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, at: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        return {"input_ids": self.tokens[at], "labels": (self.labels or self.tokens)[at]}


def sequences(tokenizer: Tokenizer, texts: Sequence[Document], length: int, pack: bool = False) -> Sequences:
    """Cut documents into sequences of at most ``length`` tokens, in order and without overlap.

    Each text is tokenized with the tokenizer's special tokens. Cut one by one, its last sequence may be shorter;
    packed, the documents follow one another, with the tokenizer's end-of-sequence token after each, and only the very
    last sequence may be. Documents without text, and sequences of a single token, which predict nothing, are dropped.

    Conversations, and prompts with completions, are a sequence each, of which the first ``length`` tokens are kept.
    They go through the tokenizer's chat template where they are messages, and only what the assistant wrote, or the
    completion, has labels; those without any label are dropped.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers.
        texts: the documents: all of them texts, or each a list of messages, a dict with "messages", or a dict with
            "prompt" and "completion", both as texts or as messages.
        length: tokens in a sequence.
        pack: let sequences run over the ends of documents; of texts only.

    Raises:
        InputError: a length below 2, one text where a list is due, texts beside conversations, conversations that the
            chat template does not take, or no sequence at all.
    """
    if isinstance(texts, str):
        raise expected("texts", "a list of documents", "one text", "Put it into a list.")
    if length < 2:
        raise expected("length", "at least 2 tokens", length)
    with_text = {i: document for i, document in enumerate(texts) if says_something(document)}
    plain_texts = {i: document for i, document in with_text.items() if isinstance(document, str)}
    if plain_texts and len(plain_texts) < len(with_text):
        mixed = f"{len(plain_texts)} texts and {len(with_text) - len(plain_texts)} others"
        raise expected("texts", "all texts, or all conversations and completions", mixed)
    empty = len(texts) - len(with_text)
    if plain_texts or not with_text:
        return _cut_texts(tokenizer, plain_texts, length, pack, empty)
    if pack:
        raise expected("pack", "False for conversations and completions", True, "Each is a sequence of its own.")
    return _tokenize_answers(tokenizer, with_text, length, empty)


def _cut_texts(tokenizer: Tokenizer, texts: Mapping[int, str], length: int, pack: bool, empty: int) -> Sequences:
    """Cut texts, by number, whose every token has a label."""
    documents = {i: numbers(tokenizer, text, True) for i, text in texts.items()}
    end = getattr(tokenizer, "eos_token_id", None)
    if pack and end is not None:
        documents = {i: _end_with(t, end) for i, t in documents.items()}
    # Documents that follow one another are cut as one run; else each is a run of its own.
    runs = [documents] if pack else [{i: t} for i, t in documents.items()]

    tokens: list[Tensor] = []
    starts: list[tuple[int, int]] = []
    single = 0
    for run in runs:
        if not run:
            continue
        names = list(run)
        begins = list(accumulate(map(len, run.values()), initial=0))  # where each document begins in the run
        pieces = torch.cat(list(run.values())).split(length)
        for number, piece in enumerate(pieces):
            if len(piece) < 2:
                single += 1
                continue
            begin = number * length
            document = bisect(begins, begin) - 1
            tokens.append(piece)
            starts.append((names[document], begin - begins[document]))
    if not tokens:
        raise expected("the documents", "long enough for a sequence of two tokens", f"{len(texts) + empty} without one")
    dropped = {"documents without text": empty, "sequences of a single token": single}
    return Sequences(tokens, starts, {reason: count for reason, count in dropped.items() if count})


def _end_with(tokens: Tensor, end: int) -> Tensor:
    """Put the end token after a document, unless it has it."""
    return tokens if end in tokens[-1:] else torch.cat([tokens, tokens.new_tensor([end])])


def _tokenize_answers(tokenizer: Tokenizer, rows: Mapping[int, Any], length: int, empty: int) -> Sequences:
    """Tokenize conversations and completions, by number; only what was answered has labels."""
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    starts: list[tuple[int, int]] = []
    too_long = unlabelled = 0
    for i, row in rows.items():
        example = training_example(tokenizer, i, row)
        too_long += len(example["input_ids"]) > length
        first_labels = example["labels"][:length]
        if not (first_labels[1:] != IGNORE).any():  # nothing predicts the first token
            unlabelled += 1
            continue
        tokens.append(example["input_ids"][:length])
        labels.append(first_labels)
        starts.append((i, 0))
    if not tokens:
        raise expected("the documents", "some with an answer in their first tokens", f"{len(rows)} without one")
    dropped = {
        "documents without text": empty,
        f"ends of documents beyond {length} tokens": too_long,
        "documents without an answer": unlabelled,
    }
    return Sequences(tokens, starts, {reason: count for reason, count in dropped.items() if count}, labels)
