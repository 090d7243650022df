"""Check what the tools are given: tensors, arrays, and objects whose ``values`` is one, as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected

Floats = NDArray[np.float64]


def float_array(value: object, what: str, ndims: tuple[int, ...]) -> Floats:
    """Turn a tensor, an array or an object with ``values`` into a finite float64 array.

    Raises:
        InputError: if it has another number of dimensions, is empty, or is not finite.
    """
    array = _to_array(value, what).astype(np.float64)
    if array.ndim not in ndims or array.size == 0:
        raise expected(what, f"a non-empty array of {' or '.join(map(str, ndims))} dimensions", array.shape)
    n_bad = int((~np.isfinite(array)).sum())
    if n_bad:
        raise expected(
            what, "finite", f"{n_bad} NaN or infinite values", "Look for a solve or a training that diverged."
        )
    return array


def bool_array(value: object, what: str, ndim: int) -> NDArray[np.bool_]:
    """Turn a tensor or an array of bool into an array.

    Raises:
        InputError: if it is not bool, has another number of dimensions, or is empty.
    """
    array = _to_array(value, what)
    if array.dtype != np.bool_:
        raise expected(what, "bool", array.dtype, "Indices and 0/1 numbers are ambiguous; use == 1 on the latter.")
    if array.ndim != ndim or array.size == 0:
        raise expected(what, f"a non-empty array of {ndim} dimensions", array.shape)
    return array


def int_array(value: object, what: str, length: int | None = None) -> NDArray[np.int64]:
    """Turn a sequence, tensor or array of whole numbers into a one-dimensional array.

    Raises:
        InputError: if it is not of whole numbers, not one-dimensional, empty, or of another length.
    """
    array = _to_array(value, what)
    is_list_of_whole_numbers = array.dtype.kind in "iu" and array.ndim == 1 and array.size > 0
    if not is_list_of_whole_numbers or length not in (None, len(array)):
        raise expected(what, f"({length or 'n'},) whole numbers", f"{array.shape} of {array.dtype}")
    return array.astype(np.int64)


def _to_array(value: object, what: str) -> NDArray:
    if not isinstance(value, (Tensor, np.ndarray)):
        value = getattr(value, "values", value)
    if isinstance(value, Tensor):
        array = (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
    else:
        array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise expected(what, "a tensor or an array of real numbers", f"{type(value).__name__} of {array.dtype}")
    return array
