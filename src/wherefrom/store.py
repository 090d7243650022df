"""Artefacts on disk: safetensors with a JSON header, written atomically, checked when read.

The first entry of the header is a checksum of every other byte of the file: of names, shapes and types, of settings and
of the framing as much as of the numbers. What is read is also looked at: a file that is whole may still hold what makes
no sense, if another program wrote it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wherefrom.digest import raw
from wherefrom.disk import write_atomically
from wherefrom.errors import ArtefactError, AttributionWarning, expected
from wherefrom.version import __version__

VERSION = 2
SHOWN = 200  # characters of a value in a message
COMPUTED = "first losses"  # the entry of a header that another machine computes a little differently

# How the header of a file of ours begins, after its length. The checksum comes next, so that it is in a known place.
HEADER_START = b'{"__metadata__":{"wherefrom":"{\\"checksum\\": \\"'
BLANK_CHECKSUM = "0" * 32  # stands in the place of the checksum while it is computed
CHUNK_BYTES = 2**24  # that are hashed at once
LONGEST_HEADER = 10**8  # bytes; safetensors takes no longer one

# The names that safetensors has for data types.
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SMALL = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint8: "U8", torch.int8: "I8"}
WHOLE = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.bool: "BOOL"}
UNSIGNED = {torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16"}
DTYPES = FLOATS | SMALL | WHOLE | UNSIGNED | {torch.complex64: "C64"}


def save(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any], sweep: bool = True) -> None:
    """Write an artefact, complete or not at all.

    Args:
        path: file name.
        kind: what it holds, such as "influence" or "scores".
        tensors: name to tensor.
        header: anything JSON can hold.
        sweep: remove what killed processes left in the folder first.

    Raises:
        ArtefactError: if it cannot be written.
        InputError: if a name is no Unicode, or a tensor is of a dtype that a file cannot hold.
    """
    versions = {"wherefrom": __version__, "torch": str(torch.__version__)}
    meta = {"checksum": BLANK_CHECKSUM, "kind": kind, "version": VERSION, "versions": versions, "header": header}
    # By alignment, as safetensors sorts them, so that every tensor can be mapped into memory where it lies.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    with write_atomically(path, sweep) as temporary, open(temporary, "wb") as file:
        text = _format_header(ordered, meta)
        before = len(text).to_bytes(8, "little") + HEADER_START
        after = text[len(HEADER_START) + len(BLANK_CHECKSUM) :]
        digest = hashlib.blake2b(before + after, digest_size=16)
        file.write(before + BLANK_CHECKSUM.encode() + after)
        for t in ordered.values():
            content = raw(t)
            digest.update(content)
            file.write(content)
        # Only now is the checksum known; it goes to its place in the header.
        file.seek(len(before))
        file.write(digest.hexdigest().encode())


def _format_header(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """Format the header of a safetensors file: our metadata, and where each tensor lies."""
    header: dict[str, Any] = {"__metadata__": {"wherefrom": json.dumps(meta)}}
    start = 0
    for name, t in tensors.items():
        name.encode()  # half of a character could be written, and not be read
        if t.dtype not in DTYPES or name in header:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise expected(f"the tensor {name!r}", f"of {names}", t.dtype)
        end = start + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes, the largest alignment that one needs.
    aligned = math.ceil(len(text) / 8) * 8
    return text.ljust(aligned)


def load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an artefact.

    Returns:
        Its tensors (on the CPU) and its header.

    Raises:
        ArtefactError: if it is missing, truncated, damaged, of another kind or of another version.
    """
    meta = _check_file(path, kind)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, meta["header"]
    except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise _damaged(path, error) from error


def _check_file(path: str | Path, kind: str) -> dict[str, Any]:
    """Check every byte of a file, and give what its header says besides the tensors."""
    try:
        if not Path(path).is_file():
            raise ArtefactError(f"{path} must be a file written by wherefrom, got nothing there. Check the path.")
        with open(path, "rb") as file:
            meta = _parse_header(path, _read_header(file, path))
            # The version comes before the checksum: a file of another version may have none.
            for what, wanted in (("version", VERSION), ("kind", kind)):
                if meta.get(what) != wanted:
                    raise ArtefactError(
                        f"{path} must have {what} {wanted!r}, got {_short(meta.get(what))}{_describe_writer(meta)}. "
                        "Write it again with this version."
                    )
            if meta["checksum"] != _hash_file(file):
                raise _damaged(path, "its checksum differs")
    except OSError as error:
        raise _damaged(path, error) from error

    if not (isinstance(meta.get("header"), dict) and isinstance(meta.get("versions"), dict)):
        raise ArtefactError(f"{path} must have a header with names and values, got another. Write it again.")
    _compare_versions(path, meta["versions"])
    return meta


def _read_header(file: Any, path: str | Path) -> bytes:
    """Read the JSON text in front of the tensors, only as far as the file goes, whatever length it claims."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise _damaged(path, "its header is longer than the file, or than any of ours")
    return file.read(length)


def _parse_header(path: str | Path, text: bytes) -> dict[str, Any]:
    """Parse the JSON text in front of the tensors, and give our part of it."""
    try:
        header = json.loads(text)
        ours = header.get("__metadata__", {}).get("wherefrom")
    except (ValueError, RecursionError, AttributeError) as error:
        raise _damaged(path, f"its header is no JSON: {_short(error)}") from error
    if ours is None:
        raise ArtefactError(f"{path} was not written by wherefrom: it has no header of ours. Check the path.")

    # Safetensors takes only text for metadata, so that ours is JSON within JSON.
    try:
        meta = json.loads(ours)
        if not isinstance(meta, dict):
            raise ValueError(f"a {type(meta).__name__} in place of an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {_short(error)}") from error
    if meta.get("version") == VERSION and not text.startswith(HEADER_START):
        raise _damaged(path, "its header does not begin with a checksum")
    return meta


def _hash_file(file: Any) -> str:
    """Hash every byte of a file but those of the checksum itself."""
    file.seek(0)
    digest = hashlib.blake2b(file.read(8 + len(HEADER_START)), digest_size=16)
    file.read(len(BLANK_CHECKSUM))
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _compare_versions(path: str | Path, versions: Mapping[str, Any]) -> None:
    """Warn of files from another major version of the library or of torch, once for each folder."""
    for name, now in (("wherefrom", __version__), ("torch", str(torch.__version__))):
        then = str(versions.get(name))[:SHOWN]
        if then.partition(".")[0] != now.partition(".")[0]:
            message = f"Files in {Path(path).parent} were written with {name} {then}, this is {name} {now}."
            warnings.warn(f"{message} If results differ, write them again.", AttributionWarning, stacklevel=5)


def _describe_writer(meta: Mapping[str, Any]) -> str:
    versions = meta.get("versions")
    if not isinstance(versions, dict):
        return ""
    return f" (by wherefrom {_short(versions.get('wherefrom'))}, this is {__version__})"


def _damaged(path: str | Path, why: object) -> ArtefactError:
    return ArtefactError(f"{path} is damaged or cut short ({why}). Write it again.")


def _short(value: object) -> str:
    text = str(value) if isinstance(value, BaseException) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Stored(Mapping[str, Tensor]):
    """The tensors of an artefact, each read when it is asked for, so that many large ones take no memory.

    Args:
        path, kind: as for `load`, which checks the artefact once.

    Attributes:
        shapes: of the tensors, by name.
        diverged: the names of those with numbers that are not finite.

    Raises:
        ArtefactError: as `load`.
    """

    def __init__(self, path: str | Path, kind: str):
        tensors, self.header = load(path, kind)
        self.path, self.names = path, tuple(tensors)
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        numbers = {name: t for name, t in tensors.items() if t.is_floating_point()}
        self.diverged = {name for name, t in numbers.items() if not bool(t.isfinite().all())}

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
        self._swept = False

    def path(self, name: str | int) -> Path:
        """Name the file of a piece."""
        label = f"{name:08d}" if isinstance(name, int) else name
        return self.folder / f"{self.kind}-{label}.safetensors"

    def get(
        self,
        name: str | int,
        shapes: Shapes | None = None,
        optional: Sequence[str] = (),
        dtypes: Mapping[str, torch.dtype] | None = None,
        unbounded: Sequence[str] = (),
    ) -> dict[str, Tensor] | None:
        """Read a piece, or give None if it is not there yet.

        Args:
            name: of the piece.
            shapes, optional, dtypes, unbounded: what it must and may hold, see `check_tensors`.

        Raises:
            ArtefactError: if it is damaged, or made of something else, by name of what differs.
        """
        path = self.path(name)
        if not path.exists():
            return None
        tensors, header = load(path, self.kind)
        check_same(path, header, self.header)
        if shapes is not None:
            check_tensors(path, tensors, shapes, optional, dtypes, unbounded)
        return tensors

    def put(self, name: str | int, tensors: dict[str, Tensor]) -> None:
        """Write a piece."""
        save(self.path(name), self.kind, tensors, self.header, sweep=not self._swept)
        self._swept = True  # once for all pieces: there may be many

    def get_or_compute(
        self,
        name: str | int,
        compute: Callable[[], dict[str, Tensor]],
        shapes: Shapes | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, Tensor]:
        """Read a piece from the disk; if it is not there, compute and write it."""
        tensors = self.get(name, shapes, dtypes=dtypes)
        if tensors is None:
            tensors = compute()
            self.put(name, tensors)
        return tensors

    made = get_or_compute  # the name before


Shapes = Mapping[str, Sequence[int | None]]


def check_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    shapes: Shapes,
    optional: Sequence[str] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
    unbounded: Sequence[str] = (),
) -> None:
    """Refuse an artefact that lacks a tensor, holds others, or holds shapes or numbers that make no sense.

    Args:
        path: of the artefact, for messages.
        tensors: what it holds.
        shapes: name to shape; None stands for any size.
        optional: names that may be missing.
        dtypes: of those that are not of floats.
        unbounded: names of those whose numbers need not be finite.

    Raises:
        ArtefactError: naming the first tensor that is wrong.
    """
    missing = [name for name in shapes if name not in tensors and name not in optional]
    others = [name for name in tensors if name not in shapes]
    if missing or others:
        got = f"no {missing[0]}" if missing else f"also {_short(others[0])}"
        raise wrong_contents(path, f"the tensors {_short(', '.join(shapes))}", got)

    for name, t in tensors.items():
        if not _has_shape(t, shapes[name]):
            sizes = ", ".join("any" if size is None else str(size) for size in shapes[name])
            raise wrong_contents(path, f"{name} of shape ({sizes})", tuple(t.shape))
        dtype = (dtypes or {}).get(name)
        has_dtype = t.is_floating_point() if dtype is None else t.dtype == dtype
        if not has_dtype:
            raise wrong_contents(path, f"{name} of {dtype or 'floats'}", t.dtype)
    check_finite(path, {name: t for name, t in tensors.items() if name not in unbounded})


def _has_shape(t: Tensor, shape: Sequence[int | None]) -> bool:
    if t.ndim != len(shape):
        return False
    return all(wanted in (None, size) for wanted, size in zip(shape, t.shape, strict=True))


def check_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an artefact with a number that is NaN or infinite.

    Raises:
        ArtefactError: naming the first tensor that has one.
    """
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise wrong_contents(path, f"finite numbers in {name}", f"{int((~t.isfinite()).sum())} that are not")


def wrong_contents(path: str | Path, wanted: str, got: object) -> ArtefactError:
    """Build the error of an artefact that is whole and holds what it should not; the caller raises it."""
    shown = got if isinstance(got, str) else _short(got)
    return ArtefactError(f"{path} must hold {wanted}, got {shown}. Write it again.")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn errors over what an artefact holds, where it is taken apart, into errors of that artefact.

    Raises:
        ArtefactError: for whatever the contents caused.
    """
    try:
        yield
    except ArtefactError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        # Errors of ours are sentences; those of Python, such as a KeyError, need their name.
        is_ours = type(error).__module__ != "builtins"
        what = str(error) if is_ours else f"{type(error).__name__}: {_short(error)}"
        raise ArtefactError(f"{path} does not hold what it should ({what}). Write it again.") from error


def check_same(path: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse an artefact made for something else, by name of what differs.

    The first losses may differ by a thousandth, and are named only if all else is the same.

    Raises:
        ArtefactError: naming each entry that differs, with both values.
    """
    if not isinstance(saved, dict):
        raise wrong_contents(path, "what it was made of, by name", saved)
    keys = {**current, **saved}  # a dict in place of a set, because it keeps the order
    differing = [key for key in keys if key != COMPUTED and saved.get(key) != current.get(key)]
    if not differing and not _is_close(saved.get(COMPUTED, []), current.get(COMPUTED, [])):
        differing = [COMPUTED]
    if not differing:
        return

    details = []
    for key in differing:
        then, now = repr(saved.get(key))[:SHOWN], repr(current.get(key))[:SHOWN]
        details.append(f"{key}: file {then}, now {now}")
    raise ArtefactError(
        f"{path} was made for another {', '.join(differing)} ({'; '.join(details)}). "
        "Fit again, or pass what it was made with."
    )


def _is_close(saved: Any, current: list[float]) -> bool:
    """Tell whether a list of numbers from a file, which may hold anything, equals another up to a thousandth."""
    if not isinstance(saved, list) or len(saved) != len(current):
        return False
    if not all(isinstance(x, (int, float)) and abs(x) <= sys.float_info.max for x in saved):
        return False
    return all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-6) for x, y in zip(saved, current, strict=True))


# The names before, for callers that use them still.
same, wrong, whole = check_same, wrong_contents, write_atomically
