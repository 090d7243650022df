"""Files: score matrices of any origin, and the ground truth of retraining."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from wherefrom import store
from wherefrom.data import tables
from wherefrom.errors import ArtefactError, InputError, MissingExtraError, expected
from wherefrom.scores import Scores
from wherefrom.tools.evaluate.arrays import Floats, bool_array, float_array

BROKEN = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    RuntimeError,  # also NotImplementedError, of zip files with what Python does not read
    SyntaxError,  # of the header of an array, as the next
    tokenize.TokenError,
    MemoryError,
    RecursionError,
    csv.Error,
    zipfile.BadZipFile,
    zlib.error,
)
MARK = "wherefrom"  # the array that says that a file of ground truth ends with a checksum
FORMAT = 2
DIGITS = 32  # of that checksum
INFLATION = 1100  # bytes that one compressed byte can stand for, and a little more


def load_matrix(path: str | Path, name: str | None = None) -> Floats:
    """A score matrix (Q, N) from a file, ours or another library's; its sign is taken as it is.

    Args:
        path: .safetensors (ours, or any tensors), .npy, .npz, .csv (rows are queries; a first row of column names and
            a first column without a name are skipped) or .parquet (the same; needs pyarrow).
        name: of the array in an .npz or a foreign .safetensors; None: the only two-dimensional one.

    Raises:
        ArtefactError: if the file is missing, damaged, or does not hold one matrix of finite numbers.
        InputError: if the suffix is none of these.
        MissingExtraError: if pyarrow is needed and not installed.
    """
    path = Path(path)
    readers = {".safetensors": _safetensors, ".npy": _npy, ".npz": _npz, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise expected("path", f"a file ending in {', '.join(readers)}", path)
    if not path.is_file():
        raise ArtefactError(f"{path} must be a file with a score matrix, got nothing there. Check the path.")
    try:
        found = readers[path.suffix](path)
        return float_array(found if isinstance(found, np.ndarray) else _chosen(found, name), "the matrix", (2,))
    except (*BROKEN, SafetensorError) as error:
        said = _said(error)
        raise ArtefactError(f"{path} must hold a score matrix (Q, N) of finite numbers, got: {said}") from error


@dataclass(frozen=True)
class Truth:
    """The ground truth of retraining on subsets, as `retrain` and `retrain_small` make it.

    Attributes:
        masks: (M, N) bool, True where an example is in the subset.
        targets: (M, R, Q), f of the queries after retraining on subset m with repeat r.

    Raises:
        InputError: if shapes disagree, masks are not bool or targets are not finite.
    """

    masks: NDArray[np.bool_]
    targets: Floats

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", bool_array(self.masks, "masks", 2))
        object.__setattr__(self, "targets", float_array(self.targets, "targets", (3,)))
        if len(self.masks) != len(self.targets):
            raise expected("targets", f"(M, R, Q) with M = {len(self.masks)} as in masks", self.targets.shape)

    def save(self, path: str | Path) -> None:
        """Write an .npz, complete or not at all: ``masks`` packed by `numpy.packbits`, ``n`` = N, ``targets``.

        It ends with a checksum of all of it, as a comment, which the array ``wherefrom`` announces.
        """
        buffer = io.BytesIO()
        packed = np.packbits(self.masks, axis=1)
        np.savez_compressed(buffer, masks=packed, n=self.masks.shape[1], targets=self.targets, wherefrom=FORMAT)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = b"0" * DIGITS
        body = buffer.getbuffer()[:-DIGITS]
        with store.whole(path) as temporary, open(temporary, "wb") as file:
            file.write(body)
            file.write(_checksum(body))

    @classmethod
    def load(cls, path: str | Path) -> Truth:
        """Read an .npz with ``targets`` and ``masks``, the latter bool, or packed with ``n``.

        Raises:
            ArtefactError: if the file is missing, damaged or lacks one of them.
        """
        try:
            found = _npz(Path(path))
            masks = found["masks"]
            if masks.dtype == np.uint8 and "n" in found:
                n = int(found["n"])
                if masks.ndim != 2 or masks.shape[1] != (n + 7) // 8:
                    raise expected("masks", f"(M, {(n + 7) // 8}), {n} bits a row", masks.shape)
                masks = np.unpackbits(masks, axis=1, count=n).astype(bool)
            return cls(masks, found["targets"])
        except BROKEN as error:
            raise ArtefactError(f"{path} must be an .npz with masks and targets, got: {_said(error)}") from error


def _chosen(arrays: Mapping[str, NDArray], name: str | None) -> NDArray:
    if name is not None:
        if name not in arrays:
            raise InputError(f"no array {name!r} among {sorted(arrays)}.")
        return arrays[name]
    flat = [key for key, array in arrays.items() if array.ndim == 2]
    if len(flat) != 1:
        raise InputError(f"{len(flat)} two-dimensional arrays among {sorted(arrays)}. Say which with name.")
    return arrays[flat[0]]


def _safetensors(path: Path) -> Mapping[str, NDArray] | NDArray:
    with safe_open(path, framework="pt") as file:
        if "wherefrom" not in (file.metadata() or {}):
            found = {key: file.get_tensor(key) for key in file.keys()}
            real = {key: t for key, t in found.items() if not t.is_complex()}  # a cast would drop their other half
            return {key: t.double().numpy() for key, t in real.items()}
    return Scores.load(path).values.double().numpy()


def _npy(path: Path) -> NDArray:
    with open(path, "rb") as file:
        _check_size(file, path.stat().st_size)
        return np.load(file, allow_pickle=False)


def _npz(path: Path) -> Mapping[str, NDArray]:
    with open(path, "rb") as file:
        content = file.read()
    if not content.startswith(b"PK"):
        raise InputError("another file, not an .npz.")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        ours = f"{MARK}.npy" in archive.namelist() or len(archive.comment) > 0
        if ours and _checksum(memoryview(content)[:-DIGITS]) != content[-DIGITS:]:
            raise InputError("a damaged file: its checksum differs.")
        for about in archive.infolist():
            if about.file_size > INFLATION * about.compress_size:
                raise InputError(f"{about.file_size:,} bytes claimed by {about.filename}, of {about.compress_size:,}.")
            with archive.open(about) as member:
                _check_size(member, about.file_size)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        found = dict(arrays)
    version = found.pop(MARK, None)
    if version is not None and (version.shape or int(version) != FORMAT):
        raise InputError(f"version {version}, this library writes {FORMAT}.")
    return found


def _check_size(file: IO[bytes], size: int) -> None:
    """Refuse an array whose header claims other bytes than follow, before room is made for them; goes to the start."""
    start = file.tell()
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise InputError(f"version {version} of the format.")
    shape, _, dtype = readers[version](file)
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or (claimed != size - file.tell() and not dtype.hasobject):  # those are never read
        raise InputError(f"an array {shape} of {dtype} in {size - file.tell():,} bytes.")
    file.seek(start)


def _checksum(content: memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGITS // 2).hexdigest().encode()


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[: store.SHOWN] or type(error).__name__


def _csv(path: Path) -> NDArray:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, strict=True) if row]
    if not rows:
        raise InputError("an empty file.")
    named = _header(rows[0])
    skip = int(named and not rows[0][0])
    width, values = len(rows[0]), []
    for number, row in enumerate(rows[named:], 1 + named):
        try:
            values.append([float(cell) for cell in row[skip:]])
        except ValueError as error:
            raise InputError(f"{error} in row {number}.") from error
        if len(row) != width:
            raise InputError(f"{len(row)} columns in row {number}, {width} in the first.")
    return np.array(values)


def _header(row: list[str]) -> bool:
    """Whether a row holds column names: something that is no number, or 0, 1, 2, ... as pandas writes them."""
    try:
        return [float(cell) for cell in row] == list(range(len(row))) and len(row) > 1
    except ValueError:
        return True


def _parquet(path: Path) -> NDArray:
    if find_spec("pyarrow") is None:
        raise MissingExtraError("A .parquet file needs pyarrow. Run: pip install pyarrow")
    table = tables.read_arrow(path)
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    if not names:
        raise InputError("a table without columns.")
    return np.stack([table.column(name).to_numpy() for name in names], axis=1)
