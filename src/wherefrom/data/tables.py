"""Tables as files: named columns of numbers, words and gaps, as CSV and Parquet, the same when they are read back.

A CSV has no types. They are found again from how numbers are written here: the shortest decimal that is exact for
floats, no leading zeros for whole numbers. What cannot come back from a CSV: a column of words that all look like
numbers comes back as numbers, and an empty word as a gap.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from wherefrom import store
from wherefrom.errors import ArtefactError, MissingExtraError, expected

CHECKSUM = b"wherefrom.checksum"  # of the cells, in a .parquet file of ours
CELLS = 10_000_000  # that a table may have however small its file is,
PER_BYTE = 300  # and more for each byte of it: equal cells take next to nothing

Cell = bool | int | float | str | None
Data = Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]]
Table = dict[str, list[Cell]]  # column name -> one cell per row; None is a gap


def as_table(data: Data, columns: Sequence[str] = ()) -> Table:
    """Columns, or rows, as a table of plain cells.

    Args:
        data: column name -> cells (list, tensor or array), in order; or rows, whose columns come in the order in which
            they are first met. A cell that a row lacks is a gap.

    Returns:
        Column name -> cells, each column of one kind: bool, int, float or str, with gaps. Whole numbers among floats
        become floats.

    Raises:
        InputError: if there is no column, lengths differ, or a column holds something else or several kinds.
    """
    if isinstance(data, Mapping):
        found = {name: [_plain(cell) for cell in _listed(cells)] for name, cells in data.items()}
    else:
        rows = list(data)
        names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
        found = {name: [_plain(row.get(name)) for row in rows] for name in names}
    lengths = {name: len(cells) for name, cells in found.items()}
    if not found or len(set(lengths.values())) > 1:
        raise expected("a table", "columns of one length", lengths or "no column")
    return {str(name): _one_kind(name, cells) for name, cells in found.items()}


def joined(table: Table, key: str, extra: Mapping[str, Sequence[Any]], prefix: str = "") -> Table:
    """The table with more columns, looked up by the numbers in one that it has.

    Args:
        table: the table.
        key: its column of numbers, such as "example".
        extra: name -> a value for every number: every training example, say.
        prefix: of the new columns' names.

    Raises:
        InputError: if a name is taken or values run out.
    """
    numbers, more = [int(number or 0) for number in table[key]], {}
    for name, values in extra.items():
        if prefix + name in table:
            raise expected("the name of a new column", f"none of {', '.join(table)}", prefix + name)
        if len(values) <= max(numbers, default=-1):
            raise expected(f"the column {name!r}", f"a value for each {key}", f"{len(values)} values")
        more[prefix + name] = [values[number] for number in numbers]
    return table | as_table(more) if more else table


def write_table(path: str | Path, data: Data) -> None:
    """Write a table to a file, complete or not at all.

    Args:
        path: .csv or .parquet (needs pyarrow); folders are made if need be.
        data: as for `as_table`; columns keep their order.

    Raises:
        InputError: if it is no table, or the suffix is another.
        MissingExtraError: if pyarrow is needed and not installed.
    """
    write = _by_suffix(path, {".csv": _write_csv, ".parquet": _write_parquet})
    table = as_table(data)
    for name, cells in table.items():
        if bad := next((cell for cell in (name, *cells) if isinstance(cell, str) and not _is_unicode(cell)), None):
            advice = "A broken JSON has such; text.encode(errors='replace').decode() mends it."
            raise expected(f"the column {name!r}", "of Unicode text", repr(bad)[: store.SHOWN], advice)
    with store.whole(path) as temporary:
        write(temporary, table)


def read_table(path: str | Path) -> Table:
    """Read a table from a .csv or .parquet file, ours or another's.

    Raises:
        InputError: if the suffix is another.
        ArtefactError: if the file is missing, damaged, or not a table of named columns of one length.
        MissingExtraError: if pyarrow is needed and not installed.
    """
    read = _by_suffix(path, {".csv": _read_csv, ".parquet": _read_parquet})
    try:
        return as_table(read(Path(path)))
    except ArtefactError:
        raise
    except (OSError, ValueError, ArithmeticError, csv.Error) as error:
        said = str(error)[: store.SHOWN]
        raise ArtefactError(f"{path} must be a table of named columns, got: {said}") from error


def _by_suffix(path: str | Path, formats: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    suffix = Path(path).suffix
    if suffix not in formats:
        raise expected("path", f"a file ending in {' or '.join(formats)}", path)
    return formats[suffix]


def _listed(cells: Any) -> Iterable[Any]:
    return cells.tolist() if isinstance(cells, (Tensor, np.ndarray)) else cells


def _plain(cell: Any) -> Any:
    """A number out of its array or tensor."""
    return cell.item() if isinstance(cell, (np.generic, Tensor, np.ndarray)) and cell.size else cell


def _one_kind(name: object, cells: list[Any]) -> list[Cell]:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {int, float}:
        return [None if cell is None else _float_of(name, cell) for cell in cells]
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        raise expected(
            f"the column {name!r}", "of bool, int, float or str, and None", sorted(kind.__name__ for kind in kinds)
        )
    return cells


def _float_of(name: object, cell: float) -> float:
    """A number among floats; a whole one that no float is exactly would come back as another."""
    exact = isinstance(cell, float) or (abs(cell) < 2**1023 and int(float(cell)) == cell)
    if not exact:
        advice = "Write them as text."
        raise expected(
            f"the column {name!r}", "of floats, or of whole numbers", "a large whole number among floats", advice
        )
    return float(cell)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: half of a character of UTF-16 cannot."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _write_csv(path: Path, table: Table) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def _read_csv(path: Path) -> Table:
    with open(path, newline="", encoding="utf-8-sig") as file:
        names, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    if len(set(names)) != len(names):
        raise expected("the first row", "column names, each once", names)
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise expected(f"row {number}", f"of {len(names)} columns", len(row))
    return {name: _typed(list(cells)) for name, *cells in zip(names, *rows, strict=True)}


def _typed(cells: list[str]) -> list[Cell]:
    """A column of text as the kind that all of it can be read as, "" as gaps."""
    for convert in (_bool, _int, _float):
        try:
            return [convert(cell) if cell else None for cell in cells]
        except ValueError:
            continue
    return [cell or None for cell in cells]


def _bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


def _int(text: str) -> int:
    if str(int(text)) != text:
        raise ValueError(text)
    return int(text)


def _float(text: str) -> float:
    digits = text.lstrip("+-")
    if (digits[:1] == "0" and digits[1:2].isdigit()) or "_" in text or text != text.strip():  # 007 is a name
        raise ValueError(text)
    number = float(text)
    if math.isinf(number) and text.lstrip("+-").lower() not in ("inf", "infinity"):  # too large for a float
        raise ValueError(text)
    return number


def _write_parquet(path: Path, table: Table) -> None:
    arrow, parquet = _arrow()
    for name, cells in table.items():
        if large := next((c for c in cells if type(c) is int and not -(2**63) <= c < 2**63), None):
            advice = "Write them as text, or the table as .csv."
            raise expected(
                f"the column {name!r}", "of whole numbers in 64 bits", f"one of {large.bit_length()} bits", advice
            )
    columns = {name: arrow.array(cells) for name, cells in table.items()}
    found = arrow.table(columns).replace_schema_metadata({CHECKSUM: _checksum(table)})
    parquet.write_table(found, path, write_page_checksum=True)


def _read_parquet(path: Path) -> Table:
    table = read_arrow(path)
    if len(set(table.column_names)) != len(table.column_names):
        raise expected("columns", "named, each once", table.column_names)
    found = table.to_pydict()
    checksum = (table.schema.metadata or {}).get(CHECKSUM)
    if checksum is not None and checksum != _checksum(found):
        raise ArtefactError(f"{path} is damaged: its checksum differs. Write it again.")
    return found


def read_arrow(path: Path) -> Any:
    """A .parquet file as a `pyarrow.Table`.

    Raises:
        ArtefactError: if it is missing or damaged, or claims more than so small a file can hold.
        MissingExtraError: if pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    try:
        about = parquet.read_metadata(path)
        most = max(CELLS, PER_BYTE * path.stat().st_size)
        if about.num_rows * max(1, about.num_columns) > most:
            raise ArtefactError(f"{path} claims {about.num_rows:,} rows, more than such a small file can hold.")
        return parquet.read_table(path, page_checksum_verification=True)
    except (arrow.ArrowException, OSError, ValueError, MemoryError) as error:
        said = " ".join(str(error).split())[: store.SHOWN]
        raise ArtefactError(f"{path} must be a .parquet file, got: {said}") from error


def _checksum(table: Table) -> bytes:
    """A hash of names, cells and their order."""
    found = hashlib.blake2b(digest_size=16)
    for name, cells in table.items():
        found.update(repr((name, cells)).encode())
    return found.hexdigest().encode()


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        advice = 'Run: pip install "wherefrom[cli]"'
        raise MissingExtraError(f"A .parquet file needs pyarrow, which is not installed. {advice}") from error
    return pyarrow, pyarrow.parquet
