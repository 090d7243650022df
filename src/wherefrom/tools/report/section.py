"""What a section of the page is: its data, the template that shows it, and what it adds to the top of the page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Tile:
    """One of the large numbers at the top of the page.

    Args:
        value: the number, as text.
        name: what it is, in a few words.
    """

    value: str
    name: str


class Section(ABC):
    """One section of a report. A subclass is a frozen dataclass that holds the section's data.

    Attributes:
        template: the name of the template file that shows the section; it lies beside the section's module and sees
            what `content` returns, and a ``suffix`` for its ids.
        anchor: the id of the section, for links to it; empty if nothing links to it.
        link: the text of the link in the navigation; empty for none.
        numbered: whether the first section of the kind has a number in its ids too, as those have of which a page
            usually holds several.
        alert_template: a template that is shown at the top of the page with the same content; empty for none.
    """

    template: ClassVar[str]
    anchor: ClassVar[str] = ""
    link: ClassVar[str] = ""
    numbered: ClassVar[bool] = False
    alert_template: ClassVar[str] = ""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Compute what the template shows, figures included; it is called once for each page."""

    def tiles(self) -> list[Tile]:
        """Return the numbers that the section adds to the top of the page."""
        return []

    def link_text(self) -> str:
        """Return the text of the link to the section in the navigation."""
        return self.link

    def anchors(self, suffix: str) -> list[str]:
        """Return the ids in the section that other sections may link to.

        Args:
            suffix: what makes the ids of a second section of the same kind differ from those of the first.
        """
        return [self.anchor + suffix] if self.anchor else []


def number_sections(sections: Sequence[Section]) -> list[str]:
    """Return a suffix for the ids of each section, so that no id is on a page twice."""
    counts: dict[type[Section], int] = {}
    suffixes = []
    for section in sections:
        kind = type(section)
        counts[kind] = counts.get(kind, 0) + 1
        needs_number = section.numbered or counts[kind] > 1
        suffixes.append(f"-{counts[kind]}" if needs_number else "")
    return suffixes
