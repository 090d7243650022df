"""The section on queries: a card for each, with the training examples that helped it and that hurt it most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from wherefrom import Scores
from wherefrom.errors import expected
from wherefrom.tools.report.convergence import describe_certificate
from wherefrom.tools.report.examples import Example, check_count
from wherefrom.tools.report.overview import count_examples
from wherefrom.tools.report.section import Section
from wherefrom.tools.report.split import Split, split_card

CARDS = 12  # queries with a card, unless others are chosen


@dataclass(frozen=True)
class Queries(Section):
    """A card for each shown query, with its proponents and opponents.

    Args:
        scores: (Q, N) scores.
        train_examples: how each of the training examples is shown, also of those without a score; only those on the
            page are looked up.
        query_examples: how each of the Q queries is shown.
        show: the numbers of the queries that get a card; None: the first twelve.
        k: proponents and opponents of each query.
        split: the scores of all examples in the cards, split over tokens and layers; the cards then show it.
        notes: paragraphs on what the reader should know.

    Raises:
        InputError: if the examples do not fit the scores, or there is no query of a number.
    """

    scores: Scores
    train_examples: Sequence[Example]
    query_examples: Sequence[Example]
    show: Sequence[int] | None = None
    k: int = 5
    split: Split | None = None
    notes: Sequence[str] = ()

    template: ClassVar[str] = "queries.html"
    anchor: ClassVar[str] = "queries"
    link: ClassVar[str] = "Queries"

    def __post_init__(self) -> None:
        queries, columns = self.scores.values.shape
        # Scores of a shortlist know their examples by number, and cards look these up among all training examples.
        examples = columns if self.scores.numbers is None else count_examples(self.scores)
        check_count("train_examples", self.train_examples, examples, self.scores)
        check_count("query_examples", self.query_examples, queries, self.scores)
        if any(not 0 <= i < queries for i in self.shown):
            raise expected("show", f"query numbers in 0..{queries - 1}", self.shown)

    @property
    def shown(self) -> list[int]:
        """The numbers of the queries that get a card."""
        if self.show is None:
            return list(range(min(len(self.scores.values), CARDS)))
        return list(self.show)

    def anchors(self, suffix: str) -> list[str]:
        """Return the ids of the section and of its cards."""
        return [*super().anchors(suffix), *(f"query-{i}{suffix}" for i in self.shown)]

    def content(self) -> dict[str, Any]:
        """Compute the cards."""
        return {
            "cards": self._cards(),
            "queries": len(self.scores.values),
            "k": self.k,
            "notes": self.notes,
        }

    def _cards(self) -> list[dict[str, Any]]:
        top = self.scores.top(min(self.k, self.scores.values.shape[1]))
        cards = []
        for i in self.shown:
            proponents = self._rank(top.proponents[i], top.proponent_scores[i], sign=1)
            opponents = self._rank(top.opponents[i], top.opponent_scores[i], sign=-1)
            card = {
                "number": i,
                "example": self.query_examples[i],
                "certificate": describe_certificate(self.scores, i),
                "proponents": proponents,
                "opponents": opponents,
                "split": None,
            }
            if self.split is not None:
                helpful = {item["number"]: item["example"] for item in proponents}
                harmful = {item["number"]: item["example"] for item in opponents}
                card["split"] = split_card(self.split, i, self.query_examples[i], helpful, harmful)
            cards.append(card)
        return cards

    def _rank(self, numbers: Tensor, values: Tensor, sign: int) -> list[dict[str, Any]]:
        """Return the examples whose scores have the sign: a query may have fewer than k of either side."""
        total = count_examples(self.scores)
        ranking = []
        for number, value in zip(numbers.tolist(), values.tolist(), strict=True):
            if sign * value > 0:
                example = self.train_examples[number]
                ranking.append({"number": number, "score": value, "change": value / total, "example": example})
        return ranking
