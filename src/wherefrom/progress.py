"""One progress bar for long work: silent off a terminal, off rank 0 and where the caller says so."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from wherefrom.parallel import rank

T = TypeVar("T")


def track(
    iterable: Iterable[T], description: str, total: int | None = None, enabled: bool | None = None
) -> Iterator[T]:
    """Iterate with a progress bar.

    Args:
        iterable: what to iterate over.
        description: a few words on the work.
        total: number of items where ``len`` cannot tell.
        enabled: True or False to force the bar on or off; None shows it on a terminal of rank 0.
    """
    show = (sys.stderr.isatty() if enabled is None else enabled) and rank() == 0
    return iter(tqdm(iterable, desc=description, total=total, disable=not show, leave=False, mininterval=0.3))
