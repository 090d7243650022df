"""Does a DataLoader hand out every example of its data set? Only then is its data set what the model saw.

Row n of every result is example n of the data set, in its own order. A sampler that selects, repeats or weights
examples would make of that something else, so it is refused, and the data set that it stands for is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from wherefrom.errors import InputError


def check_order(loader: DataLoader[Any], name: str) -> None:
    """Make sure that a loader hands out each example once, in whatever order.

    Raises:
        InputError: if it leaves out, repeats or weights examples, or its data set holds whole batches.
    """
    N = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    if loader.batch_size is None and loader.batch_sampler is None:
        raise InputError(
            f"{name}: a DataLoader with batch_size=None takes the items of its data set as batches, but each must be "
            "one example. Give the DataLoader a batch_size, and a data set of single examples."
        )
    custom = loader.batch_size is None
    sampler: Any = loader.batch_sampler if custom else loader.sampler
    drops = loader.batch_size if loader.drop_last and not custom else 0
    while type(sampler) is BatchSampler:
        drops = sampler.batch_size if sampler.drop_last else 0
        sampler, custom = sampler.sampler, False
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == N == len(sampler.data_source):
        return  # its last batch differs from epoch to epoch: none is left out
    kind = type(sampler).__name__
    if (type(sampler) is RandomSampler and sampler.replacement) or kind == "WeightedRandomSampler":
        raise InputError(
            f"{name}: the DataLoader's {kind} draws examples with repeats or weights, where influence is asked of each "
            "example once. Pass the data set itself, or Subset(dataset, indices) of those that can be drawn."
        )
    sequential = type(sampler) is SequentialSampler
    order: Any = range(len(sampler.data_source)) if sequential else _draw_epoch(sampler, custom, N)
    if drops:
        order = order[: len(order) // drops * drops]
    if order == range(N):
        return
    if not all(isinstance(i, (int, np.integer)) for i in order):
        raise InputError(
            f"{name}: the DataLoader's {kind} gives {order[0]!r:.50} where numbers of examples are expected. Pass the "
            "data set itself."
        )
    distinct = len(set(map(int, order)))
    if distinct < N:
        why = " with drop_last=True" if drops else ""
        raise InputError(
            f"{name}: the DataLoader's {kind}{why} gives {distinct:,} of the {N:,} examples of its data set. Rows are "
            "numbered by the data set, so make one of those examples: DataLoader(Subset(dataset, indices), batch_size, "
            "collate_fn=...), or pass it without the sampler if all of them count."
        )
    if len(order) > N:
        raise InputError(
            f"{name}: the DataLoader's {kind} gives examples more than once, where influence is asked of each example "
            "once. Pass the data set itself."
        )


def _draw_epoch(sampler: Iterable[Any], batched: bool, N: int) -> list[Any]:
    """Draw what a sampler gives in one epoch, N + 1 at most; random states are as they were afterwards."""
    with _keep_random_states(getattr(sampler, "generator", None)):
        flat = (i for batch in sampler for i in batch) if batched else iter(sampler)
        return list(islice(flat, N + 1))


@contextmanager
def _keep_random_states(generator: Any) -> Iterator[None]:
    mine = generator if isinstance(generator, torch.Generator) else None
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    own = None if mine is None else mine.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if mine is not None and own is not None:
            mine.set_state(own)
