"""Planting: each sentence of `facts_text` and each lesson inside ordinary text, in a sequence like all others.

A planted sequence is a window of the usual length over "text, sentence, text", the sentence whole and at a random
place; the text is from WikiText-2, of no training sequence, cut where a sentence ends, drawn at random and used once.
Planted sequences stand at random numbers among the ordinary ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from experiments.language.facts_lessons import lessons
from experiments.language.facts_text import FACTS

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Planted:
    """Training sequences with the facts and the lessons among them.

    Args:
        ids: token numbers, (N, T).
        stated: numbers of the three sequences that state each fact, (10, 3).
        lures: numbers of the five that only share words, (10, 5): three on the subject, two with the answer.
        spans: first and last + 1 position of the statement in each of the three, (10, 3, 2).
    """

    ids: Tensor
    stated: Tensor
    lures: Tensor
    spans: Tensor


def plant(encode: Encode, ordinary: Tensor, other: Tensor, seed: int = 0) -> Planted:
    """The facts among ordinary sequences.

    Args:
        encode: text to token numbers.
        ordinary: the sequences to train on, (n, T).
        other: consecutive sequences of other ordinary text, (m, T), two of which surround a sentence.
        seed: of the draws.

    Raises:
        IndexError: if the other text does not suffice.
    """
    rng, (stop,) = random.Random(seed), encode(" .")
    texts = other[: len(other) // 2 * 2].view(-1, 2 * other.shape[1]).tolist()
    rng.shuffle(texts)
    sentences = [s for fact in FACTS for s in chain(fact.statements, fact.subject, fact.elsewhere)]
    planted = len(sentences)
    made = [_embedded(encode(" " + s), texts, ordinary.shape[1], stop, rng) for s in sentences + lessons(seed)]
    rows = torch.cat([ordinary, torch.tensor([ids for ids, _ in made])])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    numbers = order.argsort()[len(ordinary) :][:planted].view(len(FACTS), -1)  # (10, 8)
    spans = torch.tensor([span for _, span in made[:planted]]).view(len(FACTS), -1, 2)
    return Planted(rows[order], numbers[:, :3], numbers[:, 3:], spans[:, :3])


def _embedded(
    sentence: list[int], texts: list[list[int]], length: int, stop: int, rng: random.Random
) -> tuple[list[int], tuple[int, int]]:
    """A window with the sentence in it, and where; takes the last text in whose middle a sentence ends."""
    room = length - len(sentence)
    while True:
        text = texts.pop()
        ends = [i + 1 for i, token in enumerate(text) if token == stop and room <= i + 1 <= 2 * length - room]
        if ends:
            break
    cut, left = min(ends, key=lambda i: abs(i - length)), rng.randint(0, room)
    return text[cut - left : cut] + sentence + text[cut : cut + room - left], (left, left + len(sentence))
