"""Artefacts on disk: safetensors with a JSON header, written atomically, checked when read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whence.data import digest
from whence.errors import ArtefactError

VERSION = 1
SHOWN = 200  # characters of a value in a message
COMPUTED = "first losses"  # the entry of a header that another machine computes a little differently


def save(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write an artefact, complete or not at all.

    Args:
        path: file name.
        kind: what it holds, such as "influence" or "scores".
        tensors: name to tensor.
        header: anything JSON can hold.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    meta = {"kind": kind, "version": VERSION, "checksum": _checksum(tensors), "header": header}
    with whole(path) as temporary:
        save_file(tensors, temporary, {"whence": json.dumps(meta)})


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, which becomes ``path`` if nothing fails; folders are made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an artefact.

    Returns:
        Its tensors (on the CPU) and its header.

    Raises:
        ArtefactError: if it is missing, truncated, damaged, of another kind or of another version.
    """
    if not Path(path).is_file():
        raise ArtefactError(f"{path} must be a file written by whence, got nothing there. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("whence")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged or cut short ({error}). Write it again.") from error
    if text is None:
        raise ArtefactError(f"{path} was not written by whence: it has no header of ours. Check the path.")
    meta = json.loads(text)
    for what, wanted in (("version", VERSION), ("kind", kind)):
        if meta.get(what) != wanted:
            raise ArtefactError(
                f"{path} must have {what} {wanted!r}, got {meta.get(what)!r}. Write it again with this version."
            )
    if meta["checksum"] != _checksum(tensors):
        raise ArtefactError(f"{path} is damaged: its checksum differs. Write it again.")
    return tensors, meta["header"]


class Stored(Mapping[str, Tensor]):
    """The tensors of an artefact, each read when it is asked for, so that many large ones take no memory.

    Args:
        path, kind: as for `load`, which checks the artefact once.

    Raises:
        ArtefactError: as `load`.
    """

    def __init__(self, path: str | Path, kind: str):
        self.path, self.names = path, tuple(load(path, kind)[0])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Shards:
    """The pieces of one long result in a folder, each written whole or not at all: a killed run loses at most one.

    Args:
        folder: where they lie.
        kind: what they are pieces of; part of their file names.
        header: what the result is made of; pieces made of anything else are refused when they are met.
    """

    def __init__(self, folder: str | Path, kind: str, header: dict[str, Any]):
        self.folder, self.kind, self.header = Path(folder), kind, json.loads(json.dumps(header))

    def path(self, name: str | int) -> Path:
        """The file of a piece."""
        label = f"{name:08d}" if isinstance(name, int) else name
        return self.folder / f"{self.kind}-{label}.safetensors"

    def get(self, name: str | int) -> dict[str, Tensor] | None:
        """A piece, or None if it is not there yet.

        Raises:
            ArtefactError: if it is damaged, or made of something else, by name of what differs.
        """
        path = self.path(name)
        if not path.exists():
            return None
        tensors, header = load(path, self.kind)
        same(path, header, self.header)
        return tensors

    def put(self, name: str | int, tensors: dict[str, Tensor]) -> None:
        """Keep a piece."""
        save(self.path(name), self.kind, tensors, self.header)

    def made(self, name: str | int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A piece from the disk, or from ``make``, and then kept."""
        found = self.get(name)
        if found is None:
            found = make()
            self.put(name, found)
        return found


def same(path: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse an artefact made for something else, by name of what differs.

    The first losses may differ by a thousandth, and are named only if all else is the same.

    Raises:
        ArtefactError: naming each entry that differs, with both values.
    """
    differing = [key for key in {**current, **saved} if key != COMPUTED and saved.get(key) != current.get(key)]
    if not differing and not _close(saved.get(COMPUTED, []), current.get(COMPUTED, [])):
        differing = [COMPUTED]
    if differing:
        details = "; ".join(
            f"{key}: file {repr(saved.get(key))[:SHOWN]}, now {repr(current.get(key))[:SHOWN]}" for key in differing
        )
        raise ArtefactError(
            f"{path} was made for another {', '.join(differing)} ({details}). Fit again, or pass what it was made with."
        )


def _close(a: list[float], b: list[float]) -> bool:
    near = (math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-6) for x, y in zip(a, b, strict=False))
    return len(a) == len(b) and all(near)


def _checksum(tensors: dict[str, Tensor]) -> str:
    return digest(dict(sorted(tensors.items())))
