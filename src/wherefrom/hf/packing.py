"""Documents that are packed into one row and told apart by positions that start again."""

from __future__ import annotations

from torch import Tensor


def document_starts(positions: Tensor) -> Tensor:
    """Tell where documents begin: at the first token of a row, and wherever positions do not rise.

    Args:
        positions: position_ids, (..., S).

    Returns:
        (..., S) bool.
    """
    starts = positions.new_ones(positions.shape).bool()
    starts[..., 1:] = positions[..., 1:] <= positions[..., :-1]
    return starts


def is_packed(positions: Tensor, real: Tensor | None = None) -> bool:
    """Whether positions start again inside a row, (..., S); ``real`` is True at tokens that are no padding."""
    starts = document_starts(positions)[..., 1:]
    if real is not None:
        starts = starts & real[..., 1:] & real[..., :-1]
    return bool(starts.any())
