"""Texts for language models: documents read from files and data sets, and the text of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from torch import Tensor

from wherefrom.data.tables import read_arrow
from wherefrom.errors import InputError, expected
from wherefrom.hf.tokens import Conversation, is_conversation

FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
TEMPLATE = ("tools", "chat_template_kwargs")  # columns that chat templates take beside the messages

Document = str | Conversation | Mapping[str, Any]  # a text, messages, or a row with messages or prompt and completion


class Documents(NamedTuple):
    """Texts, and where they come from."""

    texts: list[Any]
    """Each document: a text, or a dict with "messages" or with "prompt" and "completion"; a row without any has "", so
    that numbers are those of the source."""
    origin: str
    """In words: what was read, and how it was taken apart."""


def documents(source: str | Path, split: str | None = None, column: str | None = None) -> Documents:
    """Read the documents of a file or a data set.

    A .txt file is taken apart at blank lines if it has any between its texts, else at line ends. The others have a
    document in each row: a .jsonl or .json list of texts or objects, a .csv, a .parquet, a folder that
    ``datasets.Dataset.save_to_disk`` wrote, or a name on the hub, written ``name:configuration`` where there are
    several.

    Args:
        source: the file, folder or name.
        split: of a data set, such as "train", on the hub also "train[:1000]"; it may be left out where there is only
            one.
        column: the one with the texts or conversations; without it "text", "messages", the pair of "prompt" and
            "completion", the only column of conversations, or the only one of texts, the first of these that is there.

    Raises:
        InputError: a source that is not there, of another form, or without texts; a split or column that it lacks.
    """
    path = Path(source)
    if path.suffix in FILES:
        if not path.is_file():
            raise expected("dataset", "a file that is there", path)
        if split is not None:
            raise expected("split", "left out for a file", split)
        return _read_text_file(path, column) if path.suffix == ".txt" else _read_table(path, column)
    return _read_dataset(str(source), split, column)


def _read_text_file(path: Path, column: str | None) -> Documents:
    if column is not None:
        raise expected("column", "left out for a .txt", column)
    text = _read_unicode(path).strip()
    if re.search(r"\n[^\S\n]*\n", text) is not None:
        separator = "blank lines"
        texts = re.split(r"\n(?:[^\S\n]*\n)+", text)
    else:
        separator = "line ends"
        texts = text.split("\n")
    return _require_text([text for text in texts if text], f"{path}, separated by {separator}")


def _read_table(path: Path, column: str | None) -> Documents:
    if path.suffix in (".json", ".jsonl"):
        rows = _read_json(path)
        if all(isinstance(row, str) for row in rows) and column is None:
            return _require_text(rows, str(path))
        if not all(isinstance(row, dict) for row in rows):
            raise expected(str(path), "a list of texts or of objects", "something else")
        names = list(dict.fromkeys(name for row in rows for name in row))
        return _read_column(str(path), names, lambda name: [row.get(name) for row in rows], column)
    import pyarrow as pa
    from pyarrow import csv

    try:
        if path.suffix == ".parquet":
            table: Any = read_arrow(path)
        else:
            # A cell must fit into a block, so the file is read as one.
            whole_file = csv.ReadOptions(block_size=min(max(path.stat().st_size, 2**20), 2**31 - 1))
            table = csv.read_csv(path, whole_file, csv.ParseOptions(newlines_in_values=True))
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise expected(str(path), f"a {path.suffix[1:]} file", f"this: {error}") from error

    def read_cells(name: str) -> list[Any]:
        try:
            return table[name].to_pylist()
        except (ValueError, ArithmeticError, pa.ArrowException) as error:  # of a text that is no UTF-8, of odd dates
            raise expected(str(path), f"a {path.suffix[1:]} file", f"in column {name!r}: {error}") from error

    return _read_column(str(path), names, read_cells, column)


def _read_json(path: Path) -> list[Any]:
    text = _read_unicode(path)
    try:
        if path.suffix == ".jsonl":
            value = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of characters, which should come in pairs
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = repr(error.object[error.start : error.end])
        raise expected(f"the text in {path}", "Unicode", f"half of a character, {half}") from error
    except (ValueError, RecursionError) as error:  # also of numbers without end, and of brackets within brackets
        raise expected(str(path), f"a {path.suffix[1:]} file", f"this: {error}") from error
    return value if isinstance(value, list) else [value]


def _read_unicode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise expected(str(path), "in UTF-8", f"this: {error}") from error


def _read_dataset(source: str, split: str | None, column: str | None) -> Documents:
    import datasets

    try:
        if Path(source).is_dir():
            data: Any = datasets.load_from_disk(source)
        else:
            name, _, configuration = source.partition(":")
            data = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:  # datasets' own errors are of these kinds
        wanted = f"a file ending in {', '.join(FILES)}, a folder written by save_to_disk or a data set on the hub"
        raise expected("dataset", wanted, repr(source), f"{error}") from error
    if isinstance(data, dict):
        if split is None and len(data) > 1:
            raise expected("split", f"one of {', '.join(data)}", "none")
        if split is not None and split not in data:
            raise expected("split", f"one of {', '.join(data)}", repr(split))
        split = split or next(iter(data))
        data = data[split]
    elif Path(source).is_dir() and split is not None:
        raise expected("split", "left out for a data set without splits", repr(split))
    origin = f"{source}, {split}" if split else source
    return _read_column(origin, data.column_names, lambda name: data[name][:], column)


def _read_column(origin: str, names: Sequence[str], get: Callable[[str], list[Any]], column: str | None) -> Documents:
    """Read the documents of a column, or of the two with prompts and completions."""
    if column is None and "text" not in names:
        chats = [name for name in names if any(is_conversation(cell) for cell in get(name))]
        if "messages" in chats:
            column = "messages"
        elif {"prompt", "completion"} <= set(names):
            return _read_conversations(origin, names, get, ("prompt", "completion"))
        else:
            texts = [name for name in names if any(isinstance(cell, str) for cell in get(name))]
            likely = chats or texts
            if len(likely) != 1:
                raise expected("column", f"one of {', '.join(likely or names)}", "none")
            column = likely[0]
    column = column or "text"
    if column not in names:
        raise expected("column", f"one of {', '.join(names)}", repr(column))
    cells = ["" if cell is None else cell for cell in get(column)]
    if any(is_conversation(cell) for cell in cells):
        return _read_conversations(origin, names, get, (column,))
    if wrong := [cell for cell in cells if not isinstance(cell, str)]:
        kinds = "one of texts, or of messages with 'role' and 'content'"
        raise expected(f"The column {column!r} of {origin}", kinds, repr(wrong[0])[:80])
    return _require_text(cells, f"{origin}, column {column!r}")


def _read_conversations(
    origin: str, names: Sequence[str], get: Callable[[str], list[Any]], columns: tuple[str] | tuple[str, str]
) -> Documents:
    """Read conversations of one column, or prompts and completions of two, with what their template takes besides."""
    keys = ("messages",) if len(columns) == 1 else columns
    options = [name for name in TEMPLATE if name in names]
    values = [get(name) for name in (*columns, *options)]

    documents: list[Document] = []
    for row in zip(*values, strict=True):
        cells = dict(zip((*keys, *options), row, strict=True))
        # What lacks an answer, or a prompt, keeps its number and says nothing.
        if any(not cells[key] for key in keys):
            documents.append("")
            continue
        for column, key in zip(columns, keys, strict=True):
            if not is_conversation(cells[key]) and (len(columns) == 1 or not isinstance(cells[key], str)):
                wanted = "messages with 'role' and 'content'" + (" or a text" if len(columns) > 1 else "")
                raise expected(f"A cell of the column {column!r} of {origin}", wanted, repr(cells[key])[:80])
        documents.append(cells)
    kind = "column" if len(columns) == 1 else "columns"
    return _require_text(documents, f"{origin}, {kind} {' and '.join(map(repr, columns))}")


def _require_text(documents: Sequence[Document], origin: str) -> Documents:
    if not any(says_something(document) for document in documents):
        raise InputError(f"{origin} must hold at least one text, got none.")
    return Documents(list(documents), origin)


def says_something(document: Document) -> bool:
    """Whether a document has any text."""
    if isinstance(document, str):
        return bool(document.strip())
    if isinstance(document, Mapping):
        cells = [document[name] for name in ("messages", "prompt", "completion") if name in document]
        return all(bool(cell) for cell in cells)
    return bool(document)


class Pieces(Sequence[str]):
    """What each token adds to the text, found when it is first asked for: the pieces, joined, are the text of all.

    Args:
        tokenizer: of transformers.
        tokens: token numbers. One that ends inside a character adds "", the one that completes it the character.
    """

    def __init__(self, tokenizer: Any, tokens: Tensor):
        self.tokenizer = tokenizer
        self.tokens = tokens.tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        return self.pieces[at]

    @cached_property
    def pieces(self) -> list[str]:
        """Decode all pieces. A token is decoded after the one before it, as the first of a text may lose its space."""
        pieces = []
        context = 0  # where the piece before the next one begins
        begin = 0  # where the next piece begins
        for end in range(1, len(self) + 1):
            before = self.text(context, begin)
            text = self.text(context, end)
            # The replacement character stands for a character of which some bytes are still to come.
            if text.endswith("\ufffd") and end < len(self):
                pieces.append("")
            else:
                pieces.append(text[len(before) :])
                context, begin = begin, end
        return pieces

    def text(self, start: int = 0, end: int | None = None) -> str:
        """Decode some tokens into a text."""
        return self.tokenizer.decode(self.tokens[start:end], clean_up_tokenization_spaces=False)
