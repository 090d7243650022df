"""What the room takes: tensors, arrays, and objects whose ``values`` is one, as checked arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected

Floats = NDArray[np.float64]


def float_array(value: object, what: str, ndims: tuple[int, ...]) -> Floats:
    """A tensor, an array or an object with ``values`` as a finite float64 array.

    Raises:
        InputError: if it has another number of dimensions, is empty, or is not finite.
    """
    array = _array(value, what).astype(np.float64)
    if array.ndim not in ndims or array.size == 0:
        raise expected(what, f"a non-empty array of {' or '.join(map(str, ndims))} dimensions", array.shape)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise expected(what, "finite", f"{bad} NaN or infinite values", "Look for a solve or a training that diverged.")
    return array


def bool_array(value: object, what: str, ndim: int) -> NDArray[np.bool_]:
    """A tensor or an array of bool as an array.

    Raises:
        InputError: if it is not bool, has another number of dimensions, or is empty.
    """
    array = _array(value, what)
    if array.dtype != np.bool_:
        raise expected(what, "bool", array.dtype, "Indices and 0/1 numbers are ambiguous; use == 1 on the latter.")
    if array.ndim != ndim or array.size == 0:
        raise expected(what, f"a non-empty array of {ndim} dimensions", array.shape)
    return array


def int_array(value: object, what: str, length: int | None = None) -> NDArray[np.int64]:
    """A sequence, tensor or array of whole numbers as a one-dimensional array.

    Raises:
        InputError: if it is not of whole numbers, not one-dimensional, empty, or of another length.
    """
    array = _array(value, what)
    if array.dtype.kind not in "iu" or array.ndim != 1 or array.size == 0 or len(array) != (length or len(array)):
        raise expected(what, f"({length or 'n'},) whole numbers", f"{array.shape} of {array.dtype}")
    return array.astype(np.int64)


def _array(value: object, what: str) -> NDArray:
    if not isinstance(value, (Tensor, np.ndarray)):
        value = getattr(value, "values", value)
    if isinstance(value, Tensor):
        array = (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
    else:
        array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise expected(what, "a tensor or an array of real numbers", f"{type(value).__name__} of {array.dtype}")
    return array
