"""Tables as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whence.store import whole


def write(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table, complete or not at all."""
    with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        w = csv.writer(file)
        w.writerow(columns)
        w.writerows(zip(*columns.values(), strict=True))


def read(path: str) -> dict[str, list[str]]:
    """Read a table."""
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file))
    return {name: [row[i] for row in rows] for i, name in enumerate(head)}
