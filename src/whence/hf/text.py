"""Texts for language models: documents read from files and data sets, and cut into sequences of tokens."""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from whence.errors import InputError, expected
from whence.hf.batches import numbers
from whence.tables import read_arrow

FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet")


class Documents(NamedTuple):
    """Texts, and where they come from."""

    texts: list[str]
    """Each document's text; a row without any has "", so that numbers are those of the source."""
    origin: str
    """In words: what was read, and how it was taken apart."""


def documents(source: str | Path, split: str | None = None, column: str | None = None) -> Documents:
    """The documents of a file or a data set.

    A .txt file is taken apart at blank lines if it has any between its texts, else at line ends. The others have a
    document in each row: a .jsonl or .json list of texts or objects, a .csv, a .parquet, a folder that
    ``datasets.Dataset.save_to_disk`` wrote, or a name on the hub, written ``name:configuration`` where there are
    several.

    Args:
        source: the file, folder or name.
        split: of a data set, such as "train", on the hub also "train[:1000]"; it may be left out where there is only
            one.
        column: the one with the texts; without it "text", or the only column with texts.

    Raises:
        InputError: a source that is not there, of another form, or without texts; a split or column that it lacks.
    """
    path = Path(source)
    if path.suffix in FILES:
        if not path.is_file():
            raise expected("dataset", "a file that is there", path)
        if split is not None:
            raise expected("split", "left out for a file", split)
        return _text(path, column) if path.suffix == ".txt" else _file(path, column)
    return _dataset(str(source), split, column)


def _text(path: Path, column: str | None) -> Documents:
    if column is not None:
        raise expected("column", "left out for a .txt", column)
    text = _read(path).strip()
    blank = re.search(r"\n[^\S\n]*\n", text) is not None
    texts = re.split(r"\n(?:[^\S\n]*\n)+", text) if blank else text.split("\n")
    return _some([text for text in texts if text], f"{path}, separated by {'blank lines' if blank else 'line ends'}")


def _file(path: Path, column: str | None) -> Documents:
    if path.suffix in (".json", ".jsonl"):
        rows = _json(path)
        if all(isinstance(row, str) for row in rows) and column is None:
            return _some(rows, str(path))
        if not all(isinstance(row, dict) for row in rows):
            raise expected(str(path), "a list of texts or of objects", "something else")
        names = list(dict.fromkeys(name for row in rows for name in row))
        return _column(str(path), names, lambda name: [row.get(name) for row in rows], column)
    import pyarrow as pa
    from pyarrow import csv

    try:
        if path.suffix == ".parquet":
            table: Any = read_arrow(path)
        else:
            whole = csv.ReadOptions(block_size=min(max(path.stat().st_size, 2**20), 2**31 - 1))  # a cell must fit
            table = csv.read_csv(path, whole, csv.ParseOptions(newlines_in_values=True))
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise expected(str(path), f"a {path.suffix[1:]} file", f"this: {error}") from error

    def cells(name: str) -> list[Any]:
        try:
            return table[name].to_pylist()
        except (ValueError, ArithmeticError, pa.ArrowException) as error:  # of a text that is no UTF-8, of odd dates
            raise expected(str(path), f"a {path.suffix[1:]} file", f"in column {name!r}: {error}") from error

    return _column(str(path), names, cells, column)


def _json(path: Path) -> list[Any]:
    text = _read(path)
    try:
        if path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            found = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of characters, which should come in pairs
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = repr(error.object[error.start : error.end])
        raise expected(f"the text in {path}", "Unicode", f"half of a character, {half}") from error
    except (ValueError, RecursionError) as error:  # also of numbers without end, and of brackets within brackets
        raise expected(str(path), f"a {path.suffix[1:]} file", f"this: {error}") from error
    return found if isinstance(found, list) else [found]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise expected(str(path), "in UTF-8", f"this: {error}") from error


def _dataset(source: str, split: str | None, column: str | None) -> Documents:
    import datasets

    try:
        if Path(source).is_dir():
            found: Any = datasets.load_from_disk(source)
        else:
            name, _, configuration = source.partition(":")
            found = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:  # datasets' own errors are of these kinds
        wanted = f"a file ending in {', '.join(FILES)}, a folder written by save_to_disk or a data set on the hub"
        raise expected("dataset", wanted, repr(source), f"{error}") from error
    if isinstance(found, dict):
        if split is None and len(found) > 1:
            raise expected("split", f"one of {', '.join(found)}", "none")
        if split is not None and split not in found:
            raise expected("split", f"one of {', '.join(found)}", repr(split))
        split = split or next(iter(found))
        found = found[split]
    elif Path(source).is_dir() and split is not None:
        raise expected("split", "left out for a data set without splits", repr(split))
    return _column(f"{source}, {split}" if split else source, found.column_names, lambda name: found[name][:], column)


def _column(origin: str, names: Sequence[str], get: Callable[[str], list[Any]], column: str | None) -> Documents:
    """The documents of a column."""
    if column is None:
        column = "text" if "text" in names else None
        if column is None:
            texts = [name for name in names if any(isinstance(cell, str) for cell in get(name))]
            if len(texts) != 1:
                raise expected("column", f"one of {', '.join(texts or names)}", "none")
            column = texts[0]
    elif column not in names:
        raise expected("column", f"one of {', '.join(names)}", repr(column))
    cells = ["" if cell is None else cell for cell in get(column)]
    if wrong := [cell for cell in cells if not isinstance(cell, str)]:
        raise expected(f"The column {column!r} of {origin}", "one of texts", repr(wrong[0])[:80])
    return _some(cells, f"{origin}, column {column!r}")


def _some(texts: list[str], origin: str) -> Documents:
    if not any(text.strip() for text in texts):
        raise InputError(f"{origin} must hold at least one text, got none.")
    return Documents(texts, origin)


@dataclass(frozen=True, eq=False)
class Sequences(Sequence[dict[str, Tensor]]):
    """Training sequences: every token has a label. With ``pad`` as its ``collate_fn`` a ``DataLoader`` takes them.

    Args:
        tokens: the token numbers of each.
        starts: the document that each begins in, and at which of its tokens.
        dropped: what was left out: reason to count.
    """

    tokens: list[Tensor]
    starts: list[tuple[int, int]]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, at: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        return {"input_ids": self.tokens[at], "labels": self.tokens[at]}


def sequences(tokenizer: Callable[..., Any], texts: Sequence[str], length: int, pack: bool = False) -> Sequences:
    """Documents cut into sequences of at most ``length`` tokens, in order and without overlap.

    Each document is tokenized with the tokenizer's special tokens. Cut one by one, its last sequence may be shorter;
    packed, the documents follow one another, with the tokenizer's end-of-sequence token after each, and only the very
    last sequence may be. Documents without text, and sequences of a single token, which predict nothing, are dropped.

    Args:
        tokenizer: of transformers, or any function from a text to token numbers.
        texts: the documents.
        length: tokens in a sequence.
        pack: let sequences run over the ends of documents.

    Raises:
        InputError: a length below 2, one text where a list is due, or no sequence at all.
    """
    if isinstance(texts, str):
        raise expected("texts", "a list of documents", "one text", "Put it into a list.")
    if length < 2:
        raise expected("length", "at least 2 tokens", length)
    documents = {i: numbers(tokenizer, text, True) for i, text in enumerate(texts) if text.strip()}
    end = getattr(tokenizer, "eos_token_id", None)
    if pack and end is not None:
        documents = {i: torch.cat([t, t.new_tensor([end])]) if end not in t[-1:] else t for i, t in documents.items()}
    tokens, starts, single = [], [], 0
    for run in filter(None, [documents] if pack else [{i: t} for i, t in documents.items()]):
        names, firsts = list(run), list(accumulate(map(len, run.values()), initial=0))
        for at, piece in enumerate(torch.cat(list(run.values())).split(length)):
            if len(piece) < 2:
                single += 1
                continue
            place = bisect(firsts, at * length) - 1
            tokens.append(piece)
            starts.append((names[place], at * length - firsts[place]))
    if not tokens:
        raise expected("the documents", "long enough for a sequence of two tokens", f"{len(texts)} without one")
    dropped = {"documents without text": len(texts) - len(documents), "sequences of a single token": single}
    return Sequences(tokens, starts, {reason: count for reason, count in dropped.items() if count})


class Pieces(Sequence[str]):
    """What each token adds to the text, found when it is first asked for: the pieces, joined, are the text of all.

    Args:
        tokenizer: of transformers.
        tokens: token numbers. One that ends inside a character adds "", the one that completes it the character.
    """

    def __init__(self, tokenizer: Any, tokens: Tensor):
        self.tokenizer, self.tokens = tokenizer, tokens.tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        return self.found[at]

    @cached_property
    def found(self) -> list[str]:
        """All pieces. A token is decoded after the one before it, since the first of a text may lose its space."""
        found, start, done = [], 0, 0
        for end in range(1, len(self) + 1):
            before, text = self.text(start, done), self.text(start, end)
            if text.endswith("\ufffd") and end < len(self):
                found.append("")
            else:
                found.append(text[len(before) :])
                start, done = done, end
        return found

    def text(self, start: int = 0, end: int | None = None) -> str:
        """The text of some tokens."""
        return self.tokenizer.decode(self.tokens[start:end], clean_up_tokenization_spaces=False)
