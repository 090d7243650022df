"""The first section: how much was scored, how exactly, and how to read a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from wherefrom import Scores
from wherefrom.tools.report.convergence import classify_solves
from wherefrom.tools.report.examples import Example, check_count
from wherefrom.tools.report.numbers import short
from wherefrom.tools.report.section import Section, Tile

MEASUREMENT = "the query's measurement"


@dataclass(frozen=True)
class Overview(Section):
    """How to read a score, and above it the size of the scores, the worst residual and the queries to be careful with.

    Args:
        scores: (Q, N) scores; of no query only their size is shown.
        query_examples: how each of the Q queries is shown; the captions of those that did not converge are.
        measurement: what f is, in words.
    """

    scores: Scores
    query_examples: Sequence[Example]
    measurement: str = MEASUREMENT

    template: ClassVar[str] = "overview.html"
    alert_template: ClassVar[str] = "alert.html"
    anchor: ClassVar[str] = "reading"

    def __post_init__(self) -> None:
        check_count("query_examples", self.query_examples, len(self.scores.values), self.scores)

    def content(self) -> dict[str, Any]:
        """Compute what the template shows."""
        queries = len(self.scores.values)
        late_numbers = [i for i in range(queries) if not bool(self.scores.converged[i])]
        return {
            "queries": queries,
            "measurement": self.measurement,
            "total": count_examples(self.scores),
            "coverage": self.scores.provenance.get("coverage"),
            "late": [{"number": i, "caption": self.query_examples[i].caption} for i in late_numbers],
        }

    def tiles(self) -> list[Tile]:
        """Return the size of the scores, and how exact they are if anything was measured."""
        queries, examples = self.scores.values.shape
        if not queries:
            return [Tile(f"{examples:,}", "training examples")]

        size = Tile(f"{queries:,} × {examples:,}", "queries × training examples")
        if self.scores.agreement is not None:
            # The residual of an approximate method says little; how it ranks beside accurate scores says more.
            return [size, _tile_of_agreement(self.scores.agreement)]
        if self.scores.residual is not None:
            return [size, self._tile_of_residual(short(float(self.scores.residual.max())))]
        return [size]

    def _tile_of_residual(self, worst: str) -> Tile:
        converged, queries = int(self.scores.converged.sum()), len(self.scores.converged)
        status = classify_solves(self.scores)
        if converged < queries or status == "converged":
            status = f"{converged} of {queries} converged"
        return Tile(worst, f"worst residual; {status}")


@dataclass(frozen=True)
class Notes(Section):
    """Paragraphs on what the reader should know.

    Args:
        paragraphs: the texts.
    """

    paragraphs: Sequence[str]

    template: ClassVar[str] = "notes.html"

    def content(self) -> dict[str, Any]:
        """Return the paragraphs."""
        return {"notes": self.paragraphs}


def count_examples(scores: Scores) -> int:
    """Return N, the number of training examples, of which perhaps only some are scored."""
    return scores.provenance.get("examples", scores.values.shape[1])


def _tile_of_agreement(agreement: Mapping[str, Any]) -> Tile:
    if "not checked" in agreement:
        return Tile("–", "not checked against accurate scores")
    shared, top = agreement["shared"], agreement["top"]
    words = f"ranks as the accurate answer does; {shared} of the {top} strongest shared"
    return Tile(f"{agreement['rank correlation']:.2f}", words)
