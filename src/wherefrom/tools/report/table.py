"""A section of ranked rows, such as what to drop and why, with the examples that they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from wherefrom.errors import expected
from wherefrom.tools.report.examples import Example
from wherefrom.tools.report.numbers import format_digits
from wherefrom.tools.report.section import Section

Cell = tuple[str, float | None]  # the text, and what the cell is sorted by if it is a number
GAP: Cell = ("–", None)


@dataclass(frozen=True)
class Table(Section):
    """Ranked rows under a heading of their own.

    Args:
        heading: of the section.
        columns: name to one value per row: strings, numbers, bools or None; sequences, arrays or tensors.
        examples: shown in front of each row.
        lead: a paragraph above.

    Raises:
        InputError: if the columns or examples differ in length, or there is no column.
    """

    heading: str
    columns: Mapping[str, Any]
    examples: Sequence[Example] | None = None
    lead: str = ""

    template: ClassVar[str] = "table.html"
    anchor: ClassVar[str] = "table"
    numbered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if self.examples is not None:
            lengths["examples"] = len(self.examples)
        if not self.columns or len(set(lengths.values())) > 1:
            raise expected("A table of the report", "columns and examples of one length", lengths or "no column")

    def link_text(self) -> str:
        """Return the heading."""
        return self.heading

    def content(self) -> dict[str, Any]:
        """Return the cells, by row, and which columns hold numbers."""
        columns = {name: [format_cell(value) for value in values] for name, values in self.columns.items()}
        rows = list(zip(*columns.values(), strict=True))
        examples = [None] * len(rows) if self.examples is None else self.examples
        return {
            "heading": self.heading,
            "lead": self.lead,
            "columns": [(name, _holds_numbers(cells)) for name, cells in columns.items()],
            "has_examples": self.examples is not None,
            "rows": list(zip(examples, rows, strict=True)),
        }


def format_cell(value: Any) -> Cell:
    """Return a cell's text, and what it is sorted by if it is a number."""
    value = value.item() if hasattr(value, "item") else value
    is_nan = value != value
    if value is None or is_nan:
        return GAP
    if isinstance(value, bool):
        return ("yes" if value else "no"), None
    if isinstance(value, int):
        return str(value), value
    if isinstance(value, float):
        return format_digits(value, 3), value
    return str(value), None


def _holds_numbers(cells: Sequence[Cell]) -> bool:
    return all(cell == GAP or cell[1] is not None for cell in cells)
