"""What a command leaves behind: lines on the screen, and files in a folder."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch

import wherefrom
from wherefrom.data.tables import write_table
from wherefrom.disk import Lock, sweep_parts
from wherefrom.errors import expected
from wherefrom.tools.cli import config
from wherefrom.tools.report import Report

_LOCKED = ExitStack()  # the folders of the command that runs
WIDEST = 48  # characters of a cell on the screen
RECORDED = ("made of", "warned")  # what the commands add to the provenance in files of scores


def say(line: str = "") -> None:
    """Show a line at once, also into a pipe; letters that the terminal does not have, by their numbers."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{line}\n".encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


@contextmanager
def release_folders() -> Iterator[None]:
    """Let go of the folders that `Results` locked when the block ends."""
    try:
        yield
    finally:
        _LOCKED.close()


class Results:
    """The folder that a command writes to; every file is complete or absent.

    Args:
        command: its name.
        folder: where; made when it is locked.

    Raises:
        InputError: if there is a file of that name.
    """

    def __init__(self, command: str, folder: str):
        self.command, self.folder, self.written = command, Path(folder), list[Path]()
        if self.folder.exists() and not self.folder.is_dir():
            raise expected("out", "a folder", f"the file {self.folder}")

    def lock(self) -> None:
        """Keep other commands from writing to the folder until this one ends; what a killed one left there is swept.

        Raises:
            InputError: if one is writing there, by the number of its process.
        """
        lock = Lock(self.folder, "Wait for it, or give another --out.")
        _LOCKED.callback(lock.release)
        for inner in self.folder.rglob("*"):
            if inner.is_dir():
                sweep_parts(inner)

    def path(self, name: str) -> Path:
        """Return the path of a file that is going to be written, and note it for the last line on the screen."""
        self.written.append(self.folder / name)
        return self.folder / name

    def table(
        self, name: str, columns: Mapping[str, Sequence[Any]], rows: int = 10, hidden: Sequence[str] = ()
    ) -> None:
        """Print the first rows of a table, and write all of it as CSV and Parquet.

        Args:
            name: of the files.
            columns: name to cells.
            rows: how many to print.
            hidden: columns that are only written.
        """
        for line in format_table(columns, rows, hidden):
            say(line)
        for suffix in ("csv", "parquet"):
            write_table(self.path(f"{name}.{suffix}"), columns)

    def write_report(self, report: Report) -> None:
        """Write the report of the command."""
        report.write(self.path(f"{self.command}.html"))

    def write_configuration(self, options: Mapping[str, Any], record: Mapping[str, str] | None = None) -> None:
        """Write the configuration, and say what was written.

        Args:
            options: name to value, as the command takes them back.
            record: what else is worth knowing, by name.
        """
        record = {
            "command": self.command,
            "wherefrom": wherefrom.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        } | dict(record or {})
        options = {name: value for name, value in options.items() if name != "config"}
        config.write(self.path(f"{self.command}.toml"), options, record)
        say(f"Written: {', '.join(map(str, self.written))}")


def format_table(columns: Mapping[str, Sequence[Any]], rows: int = 10, hidden: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of a table: names, and as many rows as asked; numbers stand to the right."""
    columns = {name: cells for name, cells in columns.items() if name not in hidden}
    count = max(map(len, columns.values()), default=0)
    shown = min(rows, count)

    aligned: list[list[str]] = []
    for name, cells in columns.items():
        words = [name, *map(_format_cell, cells[:rows])]
        width = max(map(len, words))
        holds_numbers = all(isinstance(cell, (Real, type(None))) for cell in cells)
        aligned.append([word.rjust(width) if holds_numbers else word.ljust(width) for word in words])

    for i in range(1 + shown):
        yield "  ".join(words[i] for words in aligned).rstrip()
    if count > rows:
        yield f"... and {count - rows:,} more"


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
