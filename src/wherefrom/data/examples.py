"""Training and query examples: batches in a fixed order, any subset by index, and fingerprints.

Row n of every result is example n of the data set, whatever the batch size and whatever a loader would shuffle.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from wherefrom.data.batches import (
    Batch,
    Origin,
    batch_length,
    content,
    has_rows,
    leaves,
    map_tensors,
    mark,
    shapes,
    take,
    tensors,
)
from wherefrom.data.collation import check_count, check_order_of_rows
from wherefrom.data.columns import Column, columns
from wherefrom.data.samplers import check_order
from wherefrom.errors import AttributionError, InputError, expected
from wherefrom.surroundings import undisturbed

__all__ = [
    "Batch",
    "Examples",
    "batch_length",
    "has_rows",
    "leaves",
    "map_tensors",
    "shapes",
    "take",
    "tensors",
]

DRAWN = 4  # examples, besides the first and the last, whose batches are compared with examples collated alone
FEW = 8  # a batch of fewer examples may be in order by luck


class Examples:
    """A data set seen as numbered examples.

    Args:
        data: a tuple, list or dict of tensors, arrays or lists with one leading axis of examples, a data frame, a
            map-style ``Dataset``, or a ``DataLoader`` over one (its data set, collate function and batch size are used,
            its shuffling is not; a sampler that leaves out or repeats examples is refused).
        name: what to call it in messages, "train" or "queries".
        batch_size: examples per batch; None takes the loader's own, else 256, or fewer of more than 16 tokens each, so
            that a batch has 4,096 at most. It changes speed and memory, not results.

    Raises:
        InputError: empty data, axes of different lengths, or an iterable without length.
    """

    @undisturbed()
    def __init__(self, data: Any, name: str = "train", batch_size: int | None = None):
        self.name = name
        self._checksums: dict[tuple[int, int], int] = {}
        self._collate: Callable[[list[Any]], Batch] = default_collate
        loader, data = (data, data.dataset) if isinstance(data, DataLoader) else (None, data)
        if loader is not None:
            batch_size = loader.batch_size if batch_size is None else batch_size
            self._collate = loader.collate_fn
        if batch_size is not None and batch_size < 1:
            raise expected("batch_size", "a positive integer", batch_size)
        self._columns: Any = columns(data, name) if loader is None else None
        if self._columns is not None:
            self.data: Any = _map_columns(lambda column: column.values, self._columns)
            self._length = len(next(_iterate_columns(self._columns)))
        else:
            if not _is_map_style(data):
                raise InputError(
                    f"{name} must be a tuple of tensors, a map-style Dataset or a DataLoader over one, got "
                    f"{type(data).__name__}, which has no length and no index. Collect it into a list or a "
                    "Dataset first."
                )
            self.data = data
            self._length = len(self.data)
        if not self._length:
            raise InputError(f"{name} must hold at least one example, got none.")
        if loader is not None:
            check_order(loader, name)
        rng = torch.Generator().manual_seed(0)
        sample = torch.randint(self._length, (DRAWN,), generator=rng).tolist()
        # Columns are taken by number: no collate function could mix their rows.
        self._unchecked = {0, self._length - 1, *sample} if self._columns is None else set[int]()
        if not batch_size:
            tokens = max(1, _count_tokens(self._fetch([0], torch.float64)))
            batch_size = max(1, min(256, 4096 // tokens))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self._length

    def check_numbers(self, numbers: Any) -> Tensor:
        """Check numbers of examples, and make a tensor of them, (m,) int64 on the CPU.

        Raises:
            InputError: if there are none, or they are not whole numbers from 0 to N - 1 in one list.
        """
        index = torch.as_tensor(numbers).cpu()
        is_whole = not index.is_floating_point() and index.dtype != torch.bool
        is_list = index.ndim == 1 and len(index) > 0
        if not is_whole or not is_list or not ((index >= 0) & (index < len(self))).all():
            raise expected("index", f"numbers of {self.name} examples, 0..{len(self) - 1}", numbers)
        return index.long()

    def subset(self, index: Tensor) -> Examples:
        """Take some of the examples, by number, in that order."""
        if self._columns is not None:
            subset = copy.copy(self)
            subset._columns = _map_columns(lambda column: column.take(index), self._columns)
            subset.data = _map_columns(lambda column: column.values, subset._columns)
            subset._length = len(index)
            subset._checksums = {}  # those of other examples say nothing of these
            return subset
        part = Subset(self.data, index.tolist())
        return Examples(DataLoader(part, self.batch_size, collate_fn=self._collate), self.name)

    @undisturbed()
    def batch(self, index: Sequence[int] | Tensor, device: torch.device, dtype: torch.dtype) -> Batch:
        """Collate the examples of the given numbers, on the device, with narrower floats widened to ``dtype``.

        The batch knows which examples it is of: see `batch_length` and `take` of `wherefrom.data.batches`.

        Raises:
            InputError: if the collate function fails, drops, splits or joins examples, or changes their order.
        """
        numbers = torch.as_tensor(index).tolist()
        batch = self._gather(numbers, device, dtype)
        return self._move(numbers, batch, device, dtype)

    def single(self, number: int, device: torch.device, dtype: torch.dtype) -> Batch:
        """Collate the example of that number by itself, as a batch of one."""
        return self.batch([number], device, dtype)

    def batches(
        self, device: torch.device, dtype: torch.dtype, accept: Callable[[Batch], bool] | None = None
    ) -> Iterator[tuple[range, Batch]]:
        """Iterate over all examples in order, as (numbers, batch) pairs.

        Args:
            device, dtype: as for `batch`.
            accept: whether a batch that holds NaN or infinity is fine all the same, as missing labels may be.

        Raises:
            InputError: at NaN or infinity in the data, or when a batch differs from the one of an earlier pass.
        """
        for start in range(0, self._length, self.batch_size):
            index = range(start, min(start + self.batch_size, self._length))
            batch = self.batch(index, device, dtype)
            self._check(index, batch, accept)
            yield index, batch

    def fingerprint(self) -> str:
        """Hash all examples in order, whatever the batch size; this reads the data once."""
        digest = hashlib.blake2b(str(self._length).encode(), digest_size=16)
        whole = self._columns is not None
        for row in [self.data] if whole else (self._fetch([i], torch.float64) for i in range(self._length)):
            for leaf in leaves(row):
                if isinstance(leaf, Tensor):
                    digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                digest.update(content(leaf))
        return digest.hexdigest()

    # how a batch is made ----------------------------------------------------------------------------------------------

    def _gather(self, numbers: list[int], device: torch.device, dtype: torch.dtype) -> Batch:  # noqa: ARG002
        """Collate a batch and check it; its tensors may still be elsewhere."""
        batch = self._fetch(numbers, dtype)
        if self._columns is not None:
            return batch
        check_count(self.name, len(numbers), batch, lambda i: self._fetch([numbers[i]], dtype))
        if len(numbers) > 1 and not self._unchecked.isdisjoint(numbers):
            check_order_of_rows(self.name, numbers, batch, lambda some: self._fetch(some, dtype))
            if len(numbers) >= min(FEW, self.batch_size, self._length):
                self._unchecked.difference_update(numbers)
        return batch

    def _move(self, numbers: list[int], batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
        """Put a batch on the device, and note where it comes from."""
        moved = map_tensors(lambda t: _place(t, device, dtype), batch)
        return mark(moved, Origin(self, tuple(numbers), device, dtype))

    def _fetch(self, numbers: Sequence[int], dtype: torch.dtype) -> Batch:
        """Collate examples by number, and turn arrays into tensors."""
        if self._columns is not None:
            index = torch.as_tensor(numbers)
            return _map_columns(lambda column: column.rows(index, dtype), self._columns)
        return map_tensors(lambda t: t, self._call_collate([self.data[i] for i in numbers]))

    def _call_collate(self, examples: list[Any]) -> Batch:
        try:
            return self._collate(examples)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            if isinstance(error, AttributionError):
                raise
            raise InputError(
                f"{self.name} examples must fit into one batch, but their collate function failed: {error}. Pass a "
                "DataLoader with a collate_fn that pads them, such as wherefrom.hf.pad."
            ) from error

    def _check(self, index: range, batch: Batch, accept: Callable[[Batch], bool] | None) -> None:
        """Refuse values that are not finite, in the first pass, and other bytes than in it, in later ones."""
        key = (index.start, index.stop)
        checksum = 0
        for leaf in leaves(batch):
            checksum = zlib.crc32(content(leaf), checksum)
        if key not in self._checksums:
            bad = _first_not_finite(batch, len(index))
            if bad is not None and not (accept and accept(batch)):
                raise InputError(
                    f"{self.name} data must be finite, got NaN or infinity in example {index.start + bad}. Drop or "
                    "repair such examples. NaN may stand for a missing label where the task's loss leaves it out, so "
                    "that loss and gradient are finite: torch.where(y.isnan(), 0, h - y.nan_to_num()).square().sum(1)."
                )
        elif self._checksums[key] != checksum:
            raise InputError(
                f"{self.name} data must be the same in every pass, but examples {index.start}..{index.stop - 1} "
                "changed between two passes. Switch off random augmentation or shuffling inside the data set."
            )
        self._checksums[key] = checksum


def _is_map_style(data: Any) -> bool:
    other = (IterableDataset, str, bytes, Mapping)
    return not isinstance(data, other) and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _iterate_columns(nest: Any) -> Iterator[Column]:
    return iter(nest.values() if isinstance(nest, dict) else nest)


def _map_columns(f: Callable[[Column], Any], nest: Any) -> Any:
    """Build the same tuple, list or dict with ``f`` of each column."""
    if isinstance(nest, dict):
        return {key: f(column) for key, column in nest.items()}
    if hasattr(nest, "_fields"):
        return type(nest)(*map(f, nest))
    return type(nest)(map(f, nest))


def _count_tokens(batch: Batch) -> int:
    """Count the tokens of the example of a batch of one: numbers in its longest row of int64."""
    return max((t.numel() for t in tensors(batch) if t.dtype == torch.int64), default=0)


def _first_not_finite(batch: Batch, n: int) -> int | None:
    """Find the first example with NaN or infinity; 0 where it cannot be told which; None where all is finite."""
    for leaf in leaves(batch):
        if isinstance(leaf, float):
            leaf = torch.tensor(leaf)
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        wrong = ~leaf.isfinite()
        if wrong.any():
            rows = wrong.ndim > 0 and len(wrong) == n
            return int(wrong.reshape(n, -1).any(1).nonzero()[0]) if rows else 0
    return None


def _place(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Put the tensor on the device, as an object of its own: what the data set holds is not marked."""
    wider = t.is_floating_point() and torch.finfo(t.dtype).bits < torch.finfo(dtype).bits
    placed = t.detach().to(device=device, dtype=dtype if wider else t.dtype)
    return placed.clone() if placed.is_inference() else placed  # autograd takes no tensors of inference mode
