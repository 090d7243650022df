"""Batches: tensors and values in tuples, lists and dicts, whose examples are known by number.

A batch is whatever the collate function returns, and goes to the user's task as it is. Which examples its rows are is
noted beside it, by its tensors: so a batch knows how many examples were asked for, whatever the axes of its tensors,
and each of them can be had alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from wherefrom.digest import raw
from wherefrom.errors import expected

Batch = Any
VALUES = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device)
LEAVES = (Tensor, *VALUES)
SHOWN = 6  # leaves of a batch that an error names


class Source(Protocol):
    """What gives an example alone; see `wherefrom.data.examples.Examples`."""

    def batch(self, index: Sequence[int] | Tensor, device: torch.device, dtype: torch.dtype) -> Batch:
        """Collate the examples of those numbers into a batch."""
        ...

    def single(self, number: int, device: torch.device, dtype: torch.dtype) -> Batch:
        """Collate the example of that number by itself, as a batch of one."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where a batch comes from.

    Args:
        source: the data set.
        numbers: of the examples that were asked for, in order.
        device, dtype: that were asked for.
    """

    source: Source
    numbers: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


_ORIGINS: Any = WeakTensorKeyDictionary()  # tensor of a batch -> Origin


def mark(batch: Batch, origin: Origin) -> Batch:
    """Note where a batch comes from, and give it back."""
    for t in tensors(batch):
        _ORIGINS[t] = origin
    return batch


def origin_of(batch: Batch) -> Origin | None:
    """Find where a batch comes from; None if it was not made by a data set, or has no tensors."""
    if isinstance(batch, Tensor):
        return _ORIGINS.get(batch)
    if isinstance(batch, VALUES):
        return None
    for part in children(batch).values():
        origin = origin_of(part)
        if origin is not None:
            return origin
    return None


def batch_length(batch: Batch) -> int:
    """Count the examples in a batch: those that were asked for.

    Of a batch that comes from no data set: the leading axis of its first tensor, or the length of its first list.

    Raises:
        InputError: if it has none.
    """
    if (origin := origin_of(batch)) is not None:
        return len(origin.numbers)
    lengths = [t.shape[0] for t in tensors(batch) if t.ndim] or [len(values) for values in lists(batch)]
    if not lengths:
        raise expected("a batch", "made of tensors", f"{type(batch).__name__} without any")
    return lengths[0]


def take(batch: Batch, index: Tensor) -> Batch:
    """Take some examples of a batch, by their place in it, (m,), as a batch of m.

    Where each leaf has a row for each example, these rows: then the padding is that of the batch. Where one has not
    (tokens laid end to end, the nodes of several graphs), the examples are collated anew.

    Raises:
        InputError: if the rows cannot be told and the batch comes from no data set.
    """
    rows = take_rows(batch, index)
    if rows is not None:
        return rows
    origin = origin_of(batch)
    if origin is None:
        raise expected("a batch", f"made of leaves with its {batch_length(batch)} examples first", shapes(batch))
    return origin.source.batch([origin.numbers[i] for i in index.tolist()], origin.device, origin.dtype)


def take_rows(batch: Batch, index: Tensor) -> Batch | None:
    """Take the same where each leaf has a row for each example; None where one has not."""
    n = batch_length(batch)
    places = index.tolist()
    if places == list(range(n)):
        return batch
    origin = origin_of(batch)
    if origin is None:
        return cut(batch, None, n, places)
    numbers = tuple(origin.numbers[i] for i in places)
    rows = cut(batch, origin.source.single(numbers[0], origin.device, origin.dtype), n, places)
    return None if rows is None else mark(rows, dataclasses.replace(origin, numbers=numbers))


def has_rows(batch: Batch) -> bool:
    """Whether every tensor of a batch has a row for each example, and all other values are the same for all of them.

    Such a batch can be taken apart, row by row, without its collate function, as `torch.func.vmap` does.
    """
    n, origin = batch_length(batch), origin_of(batch)
    if any(not t.ndim or t.shape[0] != n for t in tensors(batch)):
        return False
    if n == 1:
        return True
    if origin is None:
        return not any(len(values) == n for values in lists(batch))
    single = origin.source.single(origin.numbers[0], origin.device, origin.dtype)
    rows = cut(batch, single, n, [0])
    return rows is not None and _others(rows) == _others(batch)


class _NotRows(Exception):
    """A leaf has not a row for each example."""


def cut(batch: Batch, single: Batch | None, n: int, places: list[int]) -> Batch | None:
    """Cut the rows of some of the n examples out of a batch, or None if a leaf has none.

    Args:
        batch: of n examples.
        single: one of them collated by itself, which shows what is an axis of examples: its length there is 1. None:
            every tensor is taken to have one, and every list of n values.
        n: examples in the batch.
        places: of those that are wanted.
    """
    try:
        if single is None:
            return _cut_alike(batch, n, places)
        return _cut(batch, single, n, places)
    except _NotRows:
        return None


def _cut(batch: Batch, single: Batch, n: int, places: list[int]) -> Batch:
    if isinstance(batch, Tensor) and isinstance(single, Tensor):
        if is_rows(batch, single, n):
            return batch[torch.tensor(places, device=batch.device)]
        if batch.shape == single.shape and torch.equal(batch, single):
            return batch.detach()  # another object, as it is marked as part of another batch
        raise _NotRows
    if isinstance(batch, VALUES) or isinstance(single, VALUES):
        counts = type(batch) is int and batch == n and single == 1  # the number of examples itself
        return len(places) if counts else batch
    if is_rows(batch, single, n):
        return type(batch)(batch[i] for i in places)
    parts, others = children(batch), children(single)
    if type(batch) is not type(single) or list(parts) != list(others):
        raise _NotRows
    return rebuild(batch, {key: _cut(part, others[key], n, places) for key, part in parts.items()})


def _cut_alike(batch: Batch, n: int, places: list[int]) -> Batch:
    if isinstance(batch, Tensor):
        if not batch.ndim or batch.shape[0] != n:
            raise _NotRows
        return batch[torch.tensor(places, device=batch.device)]
    if isinstance(batch, VALUES):
        return batch
    if isinstance(batch, list) and len(batch) == n and all(isinstance(v, VALUES) for v in batch):
        return [batch[i] for i in places]
    return rebuild(batch, {key: _cut_alike(part, n, places) for key, part in children(batch).items()})


def is_rows(batch: Batch, single: Batch, n: int) -> bool:
    """Whether a leaf of a batch of n examples, or a list in it, has one entry for each; ``single`` is that of one."""
    if isinstance(batch, Tensor) and isinstance(single, Tensor):
        return batch.ndim == single.ndim > 0 and batch.shape[0] == n and single.shape[0] == 1
    lists = type(batch) in (list, tuple) and type(single) in (list, tuple)
    return lists and len(batch) == n and len(single) == 1 and n > 1


def children(batch: Batch) -> dict[Any, Batch]:
    """Find the parts of a tuple, list, dict or dataclass by place, name or field.

    Raises:
        InputError: if the batch is anything else.
    """
    if isinstance(
        batch, (tuple, list)
    ):  # first, as it is the commonest, and quicker to ask than whether it is a mapping
        return dict(enumerate(batch))
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
    raise expected(
        "a batch",
        "made of tensors, numbers and texts in tuples, lists, dicts and dataclasses",
        f"an object of the class {type(batch).__module__}.{type(batch).__qualname__}",
        "Return its tensors from the collate function, and make the object of them in task.outputs.",
    )


def rebuild(batch: Batch, parts: Mapping[Any, Batch]) -> Batch:
    """Build a batch like another, of other parts."""
    if isinstance(batch, Mapping):
        return dict(parts)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*parts.values())
    if isinstance(batch, (tuple, list)):
        return type(batch)(parts.values())
    return dataclasses.replace(batch, **parts)


def leaves(batch: Batch) -> list[Any]:
    """List all tensors and values in a nested batch, in order.

    Raises:
        InputError: if there is something else in it.
    """
    in_order: list[Any] = []
    _append_leaves(batch, in_order)
    return in_order


def _append_leaves(batch: Batch, to: list[Any]) -> None:
    # Every pass over the data walks each batch several times, so one list takes the leaves of all levels.
    if isinstance(batch, LEAVES):
        to.append(batch)
        return
    for part in children(batch).values():
        if isinstance(part, LEAVES):
            to.append(part)
        else:
            _append_leaves(part, to)


def tensors(batch: Batch) -> list[Tensor]:
    """List all tensors in a nested batch, in order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def lists(batch: Batch) -> list[list[Any]]:
    """List the lists of values in a nested batch."""
    if isinstance(batch, LEAVES):
        return []
    if _is_list_of_values(batch):
        return [batch]
    return [values for part in children(batch).values() for values in lists(part)]


def _is_list_of_values(batch: Batch) -> bool:
    return isinstance(batch, list) and all(isinstance(value, VALUES) for value in batch)


def map_tensors(f: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply ``f`` to each tensor of the same nesting; arrays become tensors, or lists if they hold texts."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, VALUES):
        return batch
    if isinstance(batch, np.ndarray):
        return batch.tolist() if batch.dtype.kind in "OUS" else f(torch.as_tensor(batch))
    return rebuild(batch, {key: map_tensors(f, part) for key, part in children(batch).items()})


def content(leaf: Any) -> bytes | memoryview:
    """Give what a leaf holds, for hashing."""
    return raw(leaf) if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}|".encode("utf-8", "replace")


def shapes(batch: Batch) -> str:
    """List the shapes and dtypes of a batch's first few tensors, and how many more there are, for an error."""
    descriptions = [f"{tuple(t.shape)} {t.dtype}" for t in tensors(batch)]
    more = f" and {len(descriptions) - SHOWN:,} more" if len(descriptions) > SHOWN else ""
    return f"{descriptions[:SHOWN]}{more}"


def _others(batch: Batch) -> list[Any]:
    """List the leaves that are no tensors."""
    return [leaf for leaf in leaves(batch) if not isinstance(leaf, Tensor)]
