"""Files: score matrices of any origin, and the ground truth of retraining."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from whence import store
from whence.attribution.scores import Scores
from whence.errors import ArtefactError, InputError, MissingExtraError, expected
from whence.evaluate.arrays import Floats, bool_array, float_array

BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


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
        raise ArtefactError(f"{path} must hold a score matrix (Q, N) of finite numbers, got: {error}") from error


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
        """Write an .npz, complete or not at all: ``masks`` packed by `numpy.packbits`, ``n`` = N, ``targets``."""
        with store.whole(path) as temporary, open(temporary, "wb") as file:
            packed = np.packbits(self.masks, axis=1)
            np.savez_compressed(file, masks=packed, n=self.masks.shape[1], targets=self.targets)

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
                masks = np.unpackbits(masks, axis=1, count=int(found["n"])).astype(bool)
            return cls(masks, found["targets"])
        except BROKEN as error:
            raise ArtefactError(f"{path} must be an .npz with masks and targets, got: {error}") from error


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
        if "whence" not in (file.metadata() or {}):
            return {key: file.get_tensor(key).double().numpy() for key in file.keys()}
    return Scores.load(path).values.double().numpy()


def _npy(path: Path) -> NDArray:
    return np.load(path, allow_pickle=False)


def _npz(path: Path) -> Mapping[str, NDArray]:
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise InputError("a single array, not an .npz.")
    with file:
        return dict(file)


def _csv(path: Path) -> NDArray:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
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
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("A .parquet file needs pyarrow. Run: pip install pyarrow") from error
    table = pyarrow.parquet.read_table(path)
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    if not names:
        raise InputError("a table without columns.")
    return np.stack([table.column(name).to_numpy() for name in names], axis=1)
