"""The last section: how the scores were made, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from wherefrom import Scores
from wherefrom.tools.report.section import Section

# What the section on convergence says of scores of queries, and is not said twice.
IN_CONVERGENCE = ("solver", "chosen", "tolerance", "steps", "passes", "coverage", "agreement")


@dataclass(frozen=True)
class Provenance(Section):
    """Configuration and cost.

    Args:
        scores: whose provenance is shown.
        configuration: more rows for the table of the configuration.
        cost: more rows, in seconds, for the table of costs.
    """

    scores: Scores
    configuration: Mapping[str, object] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    template: ClassVar[str] = "provenance.html"
    anchor: ClassVar[str] = "setup"
    link: ClassVar[str] = "Configuration and cost"

    def content(self) -> dict[str, Any]:
        """Return the rows of both tables."""
        configuration = self._describe_provenance()
        configuration.update({name: str(value) for name, value in self.configuration.items()})
        return {"configuration": configuration, "cost": self._tabulate_cost()}

    def _describe_provenance(self) -> dict[str, str]:
        """Return the provenance as rows of words, without what is shown elsewhere."""
        elsewhere = ["seconds"]
        if len(self.scores.values):
            elsewhere.extend(IN_CONVERGENCE)

        rows = {}
        for name, value in self.scores.provenance.items():
            if name not in elsewhere and value is not None:
                rows[name] = _describe(value)
        return rows

    def _tabulate_cost(self) -> list[dict[str, Any]]:
        """Return the seconds of the attribution, of its parts, of what else there was, and of all.

        Each row has a "kind": a "whole" counts, a "part" is within the whole before it, and "all" is their sum.
        """
        parts = self.scores.provenance.get("seconds", {})
        rows = []
        if parts:
            rows.append({"name": "attribution", "seconds": sum(parts.values()), "kind": "whole"})
        rows.extend({"name": name, "seconds": seconds, "kind": "part"} for name, seconds in parts.items())
        rows.extend({"name": name, "seconds": seconds, "kind": "whole"} for name, seconds in self.cost.items())

        wholes = [row["seconds"] for row in rows if row["kind"] == "whole"]
        if len(wholes) > 1:
            rows.append({"name": "in all", "seconds": sum(wholes), "kind": "all"})
        return rows


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return _describe_mapping(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _describe_mapping(values: Mapping[str, Any]) -> str:
    """Return the values by name, or one of them if all are the same, as the damping of many parameters often is."""
    words = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    if len(set(words.values())) == 1:
        return f"{next(iter(words.values()))} for all"
    return ", ".join(f"{name}: {word}" for name, word in words.items())
