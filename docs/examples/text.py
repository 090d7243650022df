"""Text: which sentences of Python's own manual taught a classifier what another sentence is about.

The sentences are those of ``help()``'s topics, which come with every Python. Run it with
``python docs/examples/text.py``; it takes seconds and writes text.html.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import wherefrom
from wherefrom.tools.evaluate import SGDRecipe, agreement, train_small
from wherefrom.tools.report import Example, write_report

NAMES = ("specialnames", "compound", "types", "formatstrings", "string-methods", "typesseq", "debugger", "import")
LENGTH = 24  # words of a sentence, at most


class MeanOfWords(nn.Module):
    """Word vectors, averaged over the words that are there, and a linear layer."""

    def __init__(self, words: int):
        super().__init__()
        self.embed = nn.Embedding(words, 16, padding_idx=0)
        self.head = nn.Linear(16, len(NAMES))

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return self.head(self.embed(tokens).sum(1) / there)


def sentences() -> list[tuple[str, int]]:
    """(sentence, topic), at most 150 a topic, in a fixed order."""
    found = []
    for label, name in enumerate(NAMES):
        prose = re.sub(r"\n[=*~^-]{3,}\n", ".\n", topics[name])  # headings end like sentences
        prose = re.sub(r"\s+", " ", prose)
        split = [s.strip() for s in re.split(r"(?<=[.:])\s", prose)]
        found += [(s, label) for s in split if 6 <= len(re.findall(r"[a-z]+", s)) <= LENGTH][:150]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order]


def main(out: str = "text.html") -> wherefrom.Scores:
    torch.set_num_threads(1)
    texts, labels = zip(*sentences(), strict=True)
    split = [re.findall(r"[a-z_]+", text.lower()) for text in texts]
    counts = Counter(word for words in split for word in words)
    number = {word: i + 1 for i, word in enumerate(word for word, n in counts.most_common() if n > 1)}
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, words in zip(tokens, split, strict=True):
        known = [number[word] for word in words if word in number][:LENGTH]
        row[: len(known)] = torch.tensor(known, dtype=torch.long)
    y, n = torch.tensor(labels), len(texts) - 40
    train, queries = (tokens[:n], y[:n]), (tokens[n:], y[n:])

    task, recipe = wherefrom.Classification(), SGDRecipe(lr=0.5, momentum=0.9, epochs=30)
    model = train_small(lambda: MeanOfWords(len(number) + 1), task, train, recipe, seeds=0)[0]
    scores = wherefrom.attribute(
        model, task, train, queries, solver=wherefrom.CG(wherefrom.EKFAC(), tolerance=0.01), seed=0
    )
    words = wherefrom.TFIDF().fit(texts[:n]).score(texts[n:])

    def sentence(i: int) -> Example:
        return Example(NAMES[labels[i]], text=texts[i])

    write_report(
        out,
        scores,
        title="Which sentences taught it the topic?",
        lead=f"A classifier of sentences from Python's manual, trained on {n:,} of them.",
        measurement="the negative margin of the right topic",
        train_examples=[sentence(i) for i in range(n)],
        query_examples=[sentence(i) for i in range(n, len(texts))],
        show=range(6),
        notes=[f"Against the overlap of words: {agreement({'influence': scores, 'TF-IDF': words})}"],
    )
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
