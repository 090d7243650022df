"""Data given as columns: tensors, arrays, lists, data frames and series that have one entry for each example.

pandas is not imported: what has a ``to_numpy`` is asked for it, and a frame is known by its ``columns``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wherefrom.errors import InputError, expected

PAD = "Give a list of examples, such as list(zip(x, y)), to a DataLoader with a collate_fn that pads them."
ROUNDING = 1e-5  # of a feature's range: what float32 may lose of it


@dataclass(frozen=True)
class Column:
    """One entry for each of the N examples.

    Args:
        values: a tensor (N, ...), or a list of N texts.
        free: whether its float64 numbers come from NumPy, lists or data frames, which have no other by default, and
            lose nothing that matters as float32; a model in float32 then gets them as float32.
    """

    values: Tensor | list[Any]
    free: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Tensor) -> Column:
        """Take the entries of the examples of the given numbers, in that order."""
        if isinstance(self.values, list):
            return Column([self.values[i] for i in index.tolist()])
        return Column(self.values[index.to(self.values.device)], self.free)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor | list[Any]:
        """Take the same as a part of a batch; ``dtype`` is the model's."""
        values = self.take(index).values
        return values.to(dtype) if self.free and isinstance(values, Tensor) else values


def columns(data: Any, name: str) -> Any | None:
    """Read the data as a tuple, list or dict of `Column`, or None if they are examples one by one.

    Columns are a tensor, array or series alone, a data frame (a dict of its columns), a dict, a tuple of these and of
    lists, and a list of tensors or arrays of one length.

    Raises:
        InputError: if a column cannot be read, or has another number of examples than the rest.
    """
    if is_frame(data):
        data = {str(key): data[key] for key in data.columns}
    if is_array(data):
        nest: Any = (_column(data, name),)
    elif isinstance(data, Mapping):
        if split := next((key for key, v in data.items() if hasattr(v, "column_names")), None):
            raise expected(name, "one data set", f"a dict of {len(data)}", f"Pick one, such as data[{split!r}].")
        nest = {key: _column(part, f"{name}[{key!r}]") for key, part in data.items()}
    elif isinstance(data, tuple) and data and all(map(_may_be_column, data)):
        parts: Any = [_column(part, f"{name}[{i}]") for i, part in enumerate(data)]
        nest = type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
        _check_index(data, name)
    elif isinstance(data, list) and data and all(isinstance(v, (Tensor, np.ndarray)) and v.ndim for v in data):
        if len({len(v) for v in data}) != 1:
            return None  # examples of different lengths
        if len(data) > 2 and len({tuple(v.shape) for v in data}) == 1:
            raise expected(
                name,
                "a tuple of columns, or a data set of examples",
                f"a list of {len(data)} tensors of the shape {tuple(data[0].shape)}, which could be either",
                "Pass tuple(data) if they are columns, or torch.stack(data) or a DataLoader if they are examples.",
            )
        nest = [_column(part, f"{name}[{i}]") for i, part in enumerate(data)]
    else:
        return None

    every_column = nest.values() if isinstance(nest, dict) else nest
    lengths = [len(column) for column in every_column]
    if len(set(lengths)) > 1:
        raise InputError(f"{name} tensors must have the same number of examples, got {lengths}.")
    return nest


def is_array(part: Any) -> bool:
    """Whether something is a tensor or can be asked for its NumPy array, as a series can."""
    return isinstance(part, (Tensor, np.ndarray)) or (hasattr(part, "to_numpy") and hasattr(part, "__len__"))


def is_frame(part: Any) -> bool:
    """Whether something is a data frame."""
    return hasattr(part, "to_numpy") and hasattr(part, "columns") and hasattr(part, "__getitem__")


def _may_be_column(part: Any) -> bool:
    """Whether a part of a tuple may be a column: a tuple or a dict in it is an example; a list is a column."""
    other = isinstance(part, (tuple, str, bytes))
    return is_array(part) or hasattr(part, "toarray") or (isinstance(part, Sequence) and not other)


def _column(part: Any, name: str) -> Column:
    if isinstance(part, Tensor):
        if not part.ndim or part.layout != torch.strided or part.is_nested:
            if part.is_nested:
                kind = "nested"
            else:
                kind = str(part.layout) if part.ndim else "0-dim"
            raise expected(name, "a dense tensor with the examples first", f"a {kind} one", "Use to_dense(), or pad.")
        return Column(part.detach())
    if isinstance(part, np.ma.MaskedArray):
        raise expected(name, "an array without a mask", "a masked array", "Fill it: x.filled(0), and pass the mask.")
    if hasattr(part, "toarray"):
        raise expected(name, "dense", f"a sparse {type(part).__name__}", "Use x.toarray().")
    if hasattr(part, "to_numpy"):
        part = part.to_numpy()
    elif isinstance(part, Sequence) and not isinstance(part, (str, bytes)):
        values = list(part)
        if values and all(isinstance(value, str) for value in values):
            return Column(values)
        part = _stack(values, name)
        if isinstance(part, Tensor):
            return Column(part.detach())
    if not isinstance(part, np.ndarray):
        raise expected(name, "a tensor, an array, a list or a series", type(part).__name__, "Convert it to a tensor.")
    return _from_array(part, name)


def _stack(values: list[Any], name: str) -> Tensor | np.ndarray:
    """Make one tensor or array of a list of them, or of numbers and lists of numbers."""
    try:
        if values and all(isinstance(value, Tensor) for value in values):
            return torch.stack(values)
        return np.array(values)
    except (ValueError, RuntimeError, TypeError) as error:
        raise expected(name, "a list of N numbers, texts, or equally long lists", "ragged ones", PAD) from error


def _from_array(array: np.ndarray, name: str) -> Column:
    if not array.ndim:
        raise expected(name, "an array with the examples first", "a single number")
    texts = array.ravel().tolist() if array.dtype.kind in "OU" else []
    if array.ndim == 1 and texts and all(isinstance(value, str) for value in texts):
        return Column(texts)
    if array.dtype.kind not in "biufc":
        raise expected(
            name, "of numbers, or a list of texts", f"an array of {array.dtype}", "Encode it: x.astype('float32')."
        )
    if not array.dtype.isnative:  # as files of other machines have it
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch can do little with these
        array = array.astype(np.int64)
    if array.dtype == np.longdouble and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    values = torch.as_tensor(np.require(array, requirements=["C", "W"]))
    return Column(values, values.dtype == torch.float64 and _survives_float32(values))


def _survives_float32(values: Tensor) -> bool:
    """Whether float32 keeps what distinguishes the examples: not so for time stamps or large keys."""
    if not len(values):
        return True
    error = (values - values.float().double()).abs().nan_to_num(0).amax(0)
    is_finite = values.isfinite()
    spread = values.where(is_finite, -torch.inf).amax(0) - values.where(is_finite, torch.inf).amin(0)
    is_constant = spread <= 0
    return bool(((error <= ROUNDING * spread) | is_constant).all())


def _check_index(parts: tuple[Any, ...], name: str) -> None:
    """Refuse data frames and series that name their rows unlike: rows are paired by place."""
    named = [part.index for part in parts if hasattr(part, "to_numpy") and hasattr(part, "index")]
    if any(len(index) == len(named[0]) and not index.equals(named[0]) for index in named[1:]):
        raise expected(
            name,
            "data frames and series with one index",
            "different ones, so that row i of one is not row i of the other",
            "Align them, or use reset_index(drop=True) if they are aligned.",
        )
