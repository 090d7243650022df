"""Tables as files: named columns of numbers, text and gaps, as CSV and Parquet, the same when they are read back.

A CSV has no types, so the quotation marks stand for them: text is always written in quotes, numbers never are, and what
is in quotes is text again when it is read, however much it looks like a number. pyarrow reads both formats. In a CSV of
another program, where text may stand without quotes, a column is what pyarrow can read all of its cells as, with one
exception: a number that would come back changed, such as 007 or a number that is too large for a float, stays text.

What does not come back from a CSV: in a table of a single column, an empty text comes back as a gap.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wherefrom import store
from wherefrom.errors import ArtefactError, expected, missing_extra

CHECKSUM = b"wherefrom.checksum"  # the metadata entry of a .parquet file of ours that holds the checksum of its cells

# A compressed column of equal cells takes next to nothing, so that a small file may honestly hold many cells. These
# bound how many we believe before we make room for them.
MAX_CELLS_OF_ANY_FILE = 10_000_000
MAX_CELLS_PER_BYTE = 300

# One field of a CSV line: the opening quote if it is in quotes, its text, and what ends it.
CSV_FIELD = re.compile(r'(?:(?P<quote>")(?P<quoted>(?:[^"]|"")*)"|(?P<bare>[^,\r\n]*))(?P<end>,|\r\n|\r|\n|\Z)')
LEADING_ZERO = r"^[+-]?0[0-9]"
OTHER_BASE = "^[+-]?0[xX]"
BEYOND_64_BITS = "^[+-]?[0-9]{19,}$"  # candidates: the smallest whole number beyond 64 bits has 19 digits
SMALLEST_BLOCK, LARGEST_BLOCK = 2**16, 2**30  # bytes; pyarrow takes no block of 2**31

Cell = bool | int | float | str | None
Data = Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]]
Table = dict[str, list[Cell]]  # column name -> one cell per row; None is a gap


def as_table(data: Data, columns: Sequence[str] = ()) -> Table:
    """Turn columns, or rows, into a table of plain cells.

    Args:
        data: column name -> cells (list, tensor or array), in order; or rows, whose columns come in the order in which
            they are first met. A cell that a row lacks is a gap.
        columns: names of columns of rows that come first, and are there even if no row has them.

    Returns:
        Column name -> cells, each column of one type: bool, int, float or str, with gaps. Whole numbers among floats
        become floats.

    Raises:
        InputError: if there is no column, lengths differ, or a column holds something else or several types.
    """
    table: dict[Any, list[Any]] = {}
    if isinstance(data, Mapping):
        for name, cells in data.items():
            table[name] = [_to_plain(cell) for cell in _to_iterable(cells)]
    else:
        rows = list(data)
        # A dict in place of a set, because it keeps the order.
        names = dict.fromkeys(columns)
        for row in rows:
            names |= dict.fromkeys(row)
        for name in names:
            table[name] = [_to_plain(row.get(name)) for row in rows]

    lengths = {name: len(cells) for name, cells in table.items()}
    if not table or len(set(lengths.values())) > 1:
        raise expected("a table", "columns of one length", lengths or "no column")
    return {str(name): _unify_type(name, cells) for name, cells in table.items()}


def joined(table: Table, key: str, extra: Mapping[str, Sequence[Any]], prefix: str = "") -> Table:
    """Add columns whose values are looked up by the numbers in a column that the table has.

    Args:
        table: the table.
        key: its column of numbers, such as "example".
        extra: name -> a value for every number: every training example, say.
        prefix: of the new columns' names.

    Returns:
        A new table; the one given stays as it is.

    Raises:
        InputError: if a name is taken or there are too few values.
    """
    numbers = [int(number or 0) for number in table[key]]
    largest = max(numbers, default=-1)

    new_columns = {}
    for name, values in extra.items():
        if prefix + name in table:
            raise expected("the name of a new column", f"none of {', '.join(table)}", prefix + name)
        if len(values) <= largest:
            raise expected(f"the column {name!r}", f"a value for each {key}", f"{len(values)} values")
        new_columns[prefix + name] = [values[number] for number in numbers]
    return table | as_table(new_columns) if new_columns else table


def write_table(path: str | Path, data: Data) -> None:
    """Write a table to a file, complete or not at all.

    Args:
        path: .csv or .parquet (needs pyarrow); folders are made if need be.
        data: as for `as_table`; columns keep their order.

    Raises:
        InputError: if it is no table, or the suffix is another.
        MissingExtraError: if pyarrow is needed and not installed.
    """
    write = _choose_by_suffix(path, {".csv": _write_csv, ".parquet": _write_parquet})
    table = as_table(data)
    for name, cells in table.items():
        _check_unicode(name, (name, *cells))
    with store.write_atomically(path) as temporary:
        write(temporary, table)


def read_table(path: str | Path) -> Table:
    """Read a table from a .csv or .parquet file, ours or another program's.

    Raises:
        InputError: if the suffix is another.
        ArtefactError: if the file is missing, damaged, or not a table of named columns of one length.
        MissingExtraError: if pyarrow is not installed.
    """
    read = _choose_by_suffix(path, {".csv": _read_csv, ".parquet": _read_parquet})
    try:
        return as_table(read(Path(path)))
    except ArtefactError:
        raise
    except (OSError, ValueError, ArithmeticError, csv.Error) as error:  # errors of pyarrow are ValueErrors
        reason = " ".join(str(error).split())[: store.SHOWN]
        raise ArtefactError(f"{path} must be a table of named columns, got: {reason}") from error


def _choose_by_suffix(path: str | Path, functions: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    suffix = Path(path).suffix
    if suffix not in functions:
        raise expected("path", f"a file ending in {' or '.join(functions)}", path)
    return functions[suffix]


# --- cells ---


def _to_iterable(cells: Any) -> Iterable[Any]:
    return cells.tolist() if isinstance(cells, (Tensor, np.ndarray)) else cells


def _to_plain(cell: Any) -> Any:
    """Take a number out of its array or tensor."""
    return cell.item() if isinstance(cell, (np.generic, Tensor, np.ndarray)) and cell.size else cell


def _unify_type(name: object, cells: list[Any]) -> list[Cell]:
    types = {type(cell) for cell in cells if cell is not None}
    if types == {int, float}:
        return [None if cell is None else _to_float(name, cell) for cell in cells]
    if len(types) > 1 or not types <= {bool, int, float, str}:
        names = sorted(t.__name__ for t in types)
        raise expected(f"the column {name!r}", "of bool, int, float or str, and None", names)
    return cells


def _to_float(name: object, cell: float) -> float:
    """Turn a number that stands among floats into one; a whole one that no float equals would come back as another."""
    is_exact = isinstance(cell, float) or (abs(cell) < 2**1023 and int(float(cell)) == cell)
    if not is_exact:
        raise expected(
            f"the column {name!r}",
            "of floats, or of whole numbers",
            "a large whole number among floats",
            "Write them as text.",
        )
    return float(cell)


def _check_unicode(name: str, cells: Iterable[object]) -> None:
    """Refuse text that no file can hold: half of a character of UTF-16 has no encoding.

    Raises:
        InputError: naming the column.
    """
    for cell in cells:
        if not isinstance(cell, str) or cell.isascii():
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in cell):
            advice = "A broken JSON has such; text.encode(errors='replace').decode() mends it."
            raise expected(f"the column {name!r}", "of Unicode text", repr(cell)[: store.SHOWN], advice)


# --- CSV ---


def _write_csv(path: Path, table: Table) -> None:
    # pyarrow's writer quotes text as well, but writes 1.0 as 1, which would come back as a whole number.
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(",".join(_quote(name) for name in table) + "\n")
        # The line of a gap in a table of one column would be empty, and empty lines are skipped.
        gap = '""' if len(table) == 1 else ""
        for row in zip(*table.values(), strict=True):
            file.write(",".join(_format_cell(cell, gap) for cell in row) + "\n")


def _format_cell(cell: Cell, gap: str) -> str:
    if cell is None:
        return gap
    # repr of a float is the shortest decimal that is read as the same float.
    return _quote(cell) if isinstance(cell, str) else repr(cell)


def _quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _read_csv(path: Path) -> Table:
    pyarrow = import_pyarrow("Reading a .csv file")
    content = path.read_bytes().decode("utf-8-sig")
    lines = csv.reader(io.StringIO(content, newline=""))
    names = next((line for line in lines if line), [])
    if not names:
        raise expected("a table", "a first row of column names", "an empty file")
    if len(set(names)) != len(names):
        raise expected("the first row", "column names, each once", names)

    # Every column is read as text first, so that pyarrow does not make a number of what was in quotes, nor dates.
    encoded = content.encode()
    options = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pyarrow.string()),
        null_values=[""],
        strings_can_be_null=True,
        # Only in a table of one column does `_write_csv` quote a gap.
        quoted_strings_can_be_null=len(names) == 1,
    )
    text = pyarrow.csv.read_csv(
        pyarrow.BufferReader(encoded),
        # One block for the whole file, because pyarrow refuses a cell that is longer than a block.
        pyarrow.csv.ReadOptions(block_size=min(max(len(encoded), SMALLEST_BLOCK), LARGEST_BLOCK)),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        options,
    )

    numbers = {name: _parse_numbers(pyarrow, text.column(name)) for name in names}
    could_be_numbers = {name for name, cells in numbers.items() if cells is not None}
    quoted = _find_quoted(content, names, could_be_numbers)
    table: Table = {}
    for name, cells in numbers.items():
        table[name] = text.column(name).to_pylist() if cells is None or name in quoted else cells
    return table


def _parse_numbers(pyarrow: Any, column: Any) -> list[Cell] | None:
    """Read a column of text (a `pyarrow.ChunkedArray`) as whole numbers, truth values or floats; None if it is text.

    A column of gaps alone is text: it comes out the same.
    """
    compute = pyarrow.compute

    def any_matches(pattern: str) -> bool:
        return bool(compute.any(compute.match_substring_regex(column, pattern)).as_py())

    if column.null_count == len(column) or any_matches(LEADING_ZERO) or any_matches(OTHER_BASE):
        return None
    for kind in (pyarrow.int64(), pyarrow.bool_(), pyarrow.float64()):
        try:
            numbers = compute.cast(column, kind)
        except pyarrow.ArrowInvalid:
            continue
        if kind == pyarrow.float64():
            # As a float a large whole number would lose digits. Python's own whole numbers have no limit.
            if any_matches(BEYOND_64_BITS):
                return _parse_large(column.to_pylist())
            overflown = compute.and_(compute.is_inf(numbers), compute.match_substring_regex(column, "[0-9]"))
            if compute.any(overflown).as_py():
                return None
        return numbers.to_pylist()
    return None


def _parse_large(cells: list[str | None]) -> list[Cell] | None:
    try:
        return [None if cell is None else int(cell) for cell in cells]
    except ValueError:  # a fraction among them, or more digits than Python reads
        return None


def _find_quoted(content: str, names: Sequence[str], candidates: Collection[str]) -> set[str]:
    """Find the columns of text: those whose first cell that is not empty is in quotes.

    pyarrow does not say what was in quotes. One row decides about most tables, so this reads no further than it must.

    Args:
        content: of the CSV file.
        names: of its columns.
        candidates: the columns to decide about, none of which is empty throughout.
    """
    quoted: set[str] = set()
    undecided = set(candidates)
    is_header = True
    column = 0
    for field in CSV_FIELD.finditer(content):
        if not undecided:
            break
        name = names[column] if column < len(names) else None
        if not is_header and name in undecided and (field["quoted"] or field["bare"]):
            undecided.remove(name)
            if field["quote"]:
                quoted.add(name)

        if field["end"] == ",":
            column += 1
            continue
        is_empty_line = column == 0 and not field["quote"] and not field["bare"]
        column = 0
        is_header = is_header and is_empty_line  # empty lines before the header are skipped
    return quoted


# --- Parquet ---


def _write_parquet(path: Path, table: Table) -> None:
    pyarrow = import_pyarrow("A .parquet file")
    for name, cells in table.items():
        _check_64_bits(name, cells)
    columns = {name: pyarrow.array(cells) for name, cells in table.items()}
    with_checksum = pyarrow.table(columns).replace_schema_metadata({CHECKSUM: _hash_cells(table)})
    pyarrow.parquet.write_table(with_checksum, path, write_page_checksum=True)


def _check_64_bits(name: str, cells: Iterable[Cell]) -> None:
    """Refuse whole numbers that no column of a .parquet file can hold.

    Raises:
        InputError: naming the column.
    """
    for cell in cells:
        if type(cell) is int and not -(2**63) <= cell < 2**63:
            size = f"one of {cell.bit_length()} bits"
            advice = "Write them as text, or the table as .csv."
            raise expected(f"the column {name!r}", "of whole numbers in 64 bits", size, advice)


def _read_parquet(path: Path) -> Table:
    table = read_arrow(path)
    if len(set(table.column_names)) != len(table.column_names):
        raise expected("columns", "named, each once", table.column_names)
    cells = table.to_pydict()
    checksum = (table.schema.metadata or {}).get(CHECKSUM)
    if checksum is not None and checksum != _hash_cells(cells):
        raise ArtefactError(f"{path} is damaged: its checksum differs. Write it again.")
    return cells


def read_arrow(path: Path) -> Any:
    """Read a .parquet file as a `pyarrow.Table`.

    Raises:
        ArtefactError: if it is missing or damaged, or claims more than so small a file can hold.
        MissingExtraError: if pyarrow is not installed.
    """
    pyarrow = import_pyarrow("A .parquet file")
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        # Checked before reading: a damaged or malicious file of a few bytes can claim billions of rows.
        most = max(MAX_CELLS_OF_ANY_FILE, MAX_CELLS_PER_BYTE * path.stat().st_size)
        if metadata.num_rows * max(1, metadata.num_columns) > most:
            raise ArtefactError(f"{path} claims {metadata.num_rows:,} rows, more than such a small file can hold.")
        return pyarrow.parquet.read_table(path, page_checksum_verification=True)
    except ArtefactError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[: store.SHOWN]
        raise ArtefactError(f"{path} must be a .parquet file, got: {reason}") from error


def _hash_cells(table: Table) -> bytes:
    """Hash names, cells and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, cells in table.items():
        digest.update(repr((name, cells)).encode())
    return digest.hexdigest().encode()


def import_pyarrow(what: str) -> Any:
    """Import pyarrow with the modules that tables need; typed `Any`, for its functions are made when it is imported.

    Args:
        what: needs it, as the beginning of a sentence.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra(what, "pyarrow", "cli") from error
    return pyarrow
