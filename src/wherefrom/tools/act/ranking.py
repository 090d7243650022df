"""How many examples are asked for, and the order of a ranking, for all of the room."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import Floats

Numbers = NDArray[np.int64]


def example_numbers(scores: object, columns: int) -> Numbers:
    """Say which example each column of the scores is of: all in order, unless they are `Scores` of some."""
    numbers = getattr(scores, "numbers", None)
    return np.arange(columns) if numbers is None else np.asarray(numbers.cpu())


def rank_examples(values: Floats) -> Numbers:
    """Order example numbers by values (N,), largest first, ties by example number: (N,)."""
    return np.argsort(-values, kind="stable")


def resolve_count(examples: int, share: float | None, count: int | None) -> int:
    """Turn a count, or a share in (0, 1], into a number of examples: rounded, at least one.

    Raises:
        InputError: if neither or both are given, or out of range.
    """
    if (share is None) == (count is None):
        raise expected("the size", "a share or a count", "both" if share is not None else "neither")
    if share is not None:
        if not 0 < share <= 1:
            raise expected("share", "in (0, 1]", share, "5% is share=0.05.")
        return max(1, round(share * examples))
    if not isinstance(count, (int, np.integer)) or not 1 <= count <= examples:
        raise expected("count", f"a whole number from 1 to the {examples} examples", count)
    return int(count)
