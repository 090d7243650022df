"""Files: score matrices of any origin, and the ground truth of retraining."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from wherefrom import Scores, store
from wherefrom.data.tables import read_arrow
from wherefrom.errors import ArtefactError, InputError, MissingExtraError, expected
from wherefrom.tools.evaluate.arrays import Floats, bool_array, float_array

# What reading a damaged file can raise, in any of the libraries that read one.
READ_ERRORS = (
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
CHECKSUM_MARK = "wherefrom"  # the array that says that a file of ground truth ends with a checksum
FORMAT_VERSION = 2
CHECKSUM_DIGITS = 32
MAX_INFLATION = 1100  # bytes that one compressed byte can stand for, and a little more


def load_matrix(path: str | Path, name: str | None = None) -> Floats:
    """Read a score matrix (Q, N) from a file, ours or another library's; its sign is taken as it is.

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
    readers = {
        ".safetensors": _read_safetensors,
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise expected("path", f"a file ending in {', '.join(readers)}", path)
    if not path.is_file():
        raise ArtefactError(f"{path} must be a file with a score matrix, got nothing there. Check the path.")
    try:
        content = readers[path.suffix](path)
        matrix = content if isinstance(content, np.ndarray) else _choose_matrix(content, name)
        return float_array(matrix, "the matrix", (2,))
    except MissingExtraError:
        raise
    except (*READ_ERRORS, SafetensorError) as error:
        reason = _summarise(error)
        raise ArtefactError(f"{path} must hold a score matrix (Q, N) of finite numbers, got: {reason}") from error


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
        packed = np.packbits(self.masks, axis=1)
        arrays = {"masks": packed, "n": self.masks.shape[1], "targets": self.targets, CHECKSUM_MARK: FORMAT_VERSION}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        # A comment is the last part of a zip file, so that the checksum is one of all bytes before it.
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = b"0" * CHECKSUM_DIGITS
        body = buffer.getbuffer()[:-CHECKSUM_DIGITS]
        with store.write_atomically(path) as temporary, open(temporary, "wb") as file:
            file.write(body)
            file.write(_hash_bytes(body))

    @classmethod
    def load(cls, path: str | Path) -> Truth:
        """Read an .npz with ``targets`` and ``masks``, the latter bool, or packed with ``n``.

        Raises:
            ArtefactError: if the file is missing, damaged or lacks one of them.
        """
        try:
            arrays = _read_npz(Path(path))
            masks = arrays["masks"]
            if masks.dtype == np.uint8 and "n" in arrays:
                n = int(arrays["n"])
                packed_width = (n + 7) // 8
                # Checked before unpacking, which makes room for n bits a row, however many a damaged file claims.
                if masks.ndim != 2 or masks.shape[1] != packed_width:
                    raise expected("masks", f"(M, {packed_width}), {n} bits a row", masks.shape)
                masks = np.unpackbits(masks, axis=1, count=n).astype(bool)
            return cls(masks, arrays["targets"])
        except READ_ERRORS as error:
            reason = _summarise(error)
            raise ArtefactError(f"{path} must be an .npz with masks and targets, got: {reason}") from error


def _choose_matrix(arrays: Mapping[str, NDArray], name: str | None) -> NDArray:
    if name is not None:
        if name not in arrays:
            raise InputError(f"no array {name!r} among {sorted(arrays)}.")
        return arrays[name]
    matrices = [key for key, array in arrays.items() if array.ndim == 2]
    if len(matrices) != 1:
        raise InputError(f"{len(matrices)} two-dimensional arrays among {sorted(arrays)}. Say which with name.")
    return arrays[matrices[0]]


def _summarise(error: BaseException) -> str:
    return " ".join(str(error).split())[: store.SHOWN] or type(error).__name__


# --- safetensors and NumPy ---


def _read_safetensors(path: Path) -> Mapping[str, NDArray] | NDArray:
    with safe_open(path, framework="pt") as file:
        is_ours = "wherefrom" in (file.metadata() or {})
        if not is_ours:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            # A cast to float would drop the imaginary half of complex numbers.
            return {key: t.double().numpy() for key, t in tensors.items() if not t.is_complex()}
    return Scores.load(path).values.double().numpy()


def _read_npy(path: Path) -> NDArray:
    with open(path, "rb") as file:
        _check_array_size(file, path.stat().st_size)
        return np.load(file, allow_pickle=False)


def _read_npz(path: Path) -> Mapping[str, NDArray]:
    content = path.read_bytes()
    if not content.startswith(b"PK"):
        raise InputError("another file, not an .npz.")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        is_ours = f"{CHECKSUM_MARK}.npy" in archive.namelist() or len(archive.comment) > 0
        if is_ours and _hash_bytes(memoryview(content)[:-CHECKSUM_DIGITS]) != content[-CHECKSUM_DIGITS:]:
            raise InputError("a damaged file: its checksum differs.")
        for about in archive.infolist():
            if about.file_size > MAX_INFLATION * about.compress_size:
                raise InputError(f"{about.file_size:,} bytes claimed by {about.filename}, of {about.compress_size:,}.")
            with archive.open(about) as member:
                _check_array_size(member, about.file_size)
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    version = arrays.pop(CHECKSUM_MARK, None)
    if version is not None and (version.shape or int(version) != FORMAT_VERSION):
        raise InputError(f"version {version}, this library writes {FORMAT_VERSION}.")
    return arrays


def _check_array_size(file: IO[bytes], size: int) -> None:
    """Refuse an array whose header claims other bytes than follow, before room is made for them; goes to the start."""
    start = file.tell()
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise InputError(f"version {version} of the format.")
    shape, _, dtype = readers[version](file)
    claimed, following = math.prod(shape) * dtype.itemsize, size - file.tell()
    # Arrays of Python objects have no fixed size, and are refused later, without being read.
    has_wrong_size = claimed != following and not dtype.hasobject
    if min(shape, default=0) < 0 or has_wrong_size:
        raise InputError(f"an array {shape} of {dtype} in {following:,} bytes.")
    file.seek(start)


def _hash_bytes(content: memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_DIGITS // 2).hexdigest().encode()


# --- tables of numbers ---


def _read_csv(path: Path) -> NDArray:
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        first_row = next(csv.reader(lines, strict=True), None)
        if first_row is None:
            raise InputError("an empty file.")
        has_names = _is_header(first_row)
        # pandas writes the names of its rows in a first column without a name.
        has_row_names = has_names and not first_row[0]
        numbers = lines if has_names else chain([",".join(first_row)], lines)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are no rows is refused by `load_matrix`
            matrix = np.loadtxt(
                numbers,
                delimiter=",",
                quotechar='"',
                comments=None,
                ndmin=2,
                converters={0: lambda _: 0.0} if has_row_names else None,
            )
    return matrix[:, 1:] if has_row_names else matrix


def _is_header(row: list[str]) -> bool:
    """Tell whether a row holds column names: something that is no number, or 0, 1, 2, ... as pandas writes them."""
    try:
        return [float(cell) for cell in row] == list(range(len(row))) and len(row) > 1
    except ValueError:
        return True


def _read_parquet(path: Path) -> NDArray:
    table = read_arrow(path)
    names = [name for name in table.column_names if not name.startswith("__index_level_")]  # of rows, by pandas
    if not names:
        raise InputError("a table without columns.")
    return np.stack([table.column(name).to_numpy() for name in names], axis=1)
