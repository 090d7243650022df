"""Training and query examples: batches in a fixed order, any subset by index, and fingerprints.

Row n of every result is example n of the data set, whatever the batch size and whatever a loader would shuffle.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from whence.errors import InputError, expected
from whence.surroundings import undisturbed

Batch = Any


class Examples:
    """A data set seen as numbered examples.

    Args:
        data: a tuple, list or dict of tensors or arrays with one leading axis of examples, a map-style ``Dataset``, or
            a ``DataLoader`` over one (its data set, collate function and batch size are used, its shuffling is not).
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
        collate: Callable[[list[Any]], Batch] = default_collate
        if isinstance(data, DataLoader):
            batch_size = data.batch_size if batch_size is None else batch_size
            collate, data = data.collate_fn, data.dataset
        if batch_size is not None and batch_size < 1:
            raise expected("batch_size", "a positive integer", batch_size)
        columns = _columns(data)
        if columns is not None:
            self._length = _common_length(columns, name)
            self._fetch = lambda index: map_tensors(lambda t: t[index], columns)
        else:
            if isinstance(data, Mapping):
                wrong = {name: type(v).__name__ for name, v in data.items() if not isinstance(v, (Tensor, np.ndarray))}
                raise expected(name, "tensors or arrays by name where it is a dict", wrong, "Convert these columns.")
            if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
                raise InputError(
                    f"{name} must be a tuple of tensors, a map-style Dataset or a DataLoader over one, got "
                    f"{type(data).__name__}, which has no length and no index. Collect it into a list or a "
                    "Dataset first."
                )
            self._length = len(data)
            self._fetch = lambda index: self._collated([data[int(i)] for i in index])
        self._collate = collate
        self.data = columns if columns is not None else data
        if not self._length:
            raise InputError(f"{name} must hold at least one example, got none.")
        self.batch_size = batch_size or max(1, min(256, 4096 // max(1, _tokens(self._fetch(torch.tensor([0]))))))

    def __len__(self) -> int:
        return self._length

    def chosen(self, numbers: Any) -> Tensor:
        """Numbers of examples as a tensor, (m,) int64 on the CPU.

        Raises:
            InputError: if there are none, or they are not whole numbers from 0 to N - 1 in one list.
        """
        found = torch.as_tensor(numbers).cpu()
        whole = not found.is_floating_point() and found.dtype != torch.bool
        if not whole or found.ndim != 1 or not len(found) or not ((found >= 0) & (found < len(self))).all():
            raise expected("index", f"numbers of {self.name} examples, 0..{len(self) - 1}", numbers)
        return found.long()

    def _collated(self, examples: list[Any]) -> Batch:
        try:
            return self._collate(examples)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.name} examples must fit into one batch, but their collate function failed: {error}. Pass a "
                "DataLoader with a collate_fn that pads them, such as whence.hf.pad."
            ) from error

    def subset(self, index: Tensor) -> Examples:
        """Some of the examples, by number, in that order."""
        if _columns(self.data) is not None:
            return Examples(self._fetch(index), self.name, self.batch_size)
        some = Subset(self.data, index.tolist())
        return Examples(DataLoader(some, self.batch_size, collate_fn=self._collate), self.name)

    @undisturbed()
    def batch(self, index: Sequence[int] | Tensor, device: torch.device, dtype: torch.dtype) -> Batch:
        """The examples of the given numbers as one batch, on the device, narrower floats widened to ``dtype``."""
        return map_tensors(lambda t: _place(t, device, dtype), self._fetch(torch.as_tensor(index)))

    def batches(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[range, Batch]]:
        """All examples in order, as (numbers, batch) pairs.

        Raises:
            InputError: at NaN or infinity in the data, or when a batch differs from the one of an earlier pass.
        """
        for start in range(0, self._length, self.batch_size):
            index = range(start, min(start + self.batch_size, self._length))
            batch = self.batch(index, device, dtype)
            self._check(index, batch)
            yield index, batch

    def _check(self, index: range, batch: Batch) -> None:
        """First pass: finite values. Later passes: the same bytes."""
        key, checksum = (index.start, index.stop), 0
        for t in tensors(batch):
            checksum = zlib.crc32(raw(t), checksum)
        if key not in self._checksums:
            for t in tensors(batch):
                if t.is_floating_point() and not t.isfinite().all():
                    bad = (
                        (~t.isfinite()).flatten(1).any(1).nonzero()[0].item()
                        if t.ndim > 1
                        else int((~t.isfinite()).nonzero()[0])
                    )
                    raise InputError(
                        f"{self.name} data must be finite, got NaN or infinity in example {index.start + int(bad)}. "
                        "Drop or repair such examples."
                    )
        elif self._checksums[key] != checksum:
            raise InputError(
                f"{self.name} data must be the same in every pass, but examples {index.start}..{index.stop - 1} "
                "changed "
                "between two passes. Switch off random augmentation or shuffling inside the data set."
            )
        self._checksums[key] = checksum

    def fingerprint(self) -> str:
        """A hash of all examples in order, whatever the batch size; reads the data once."""
        digest = hashlib.blake2b(str(self._length).encode(), digest_size=16)
        whole = _columns(self.data) is not None
        for row in [self.data] if whole else (self._fetch(torch.tensor([i])) for i in range(self._length)):
            for t in tensors(map_tensors(lambda t: t, row)):
                digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
                digest.update(raw(t))
        return digest.hexdigest()


def _tokens(batch: Batch) -> int:
    """How many tokens the example of a batch of one has: numbers in its longest row of int64."""
    return max((t.numel() for t in tensors(map_tensors(lambda t: t, batch)) if t.dtype == torch.int64), default=0)


def batch_length(batch: Batch) -> int:
    """Number of examples in a batch: the leading axis of its first tensor.

    Raises:
        InputError: if it has none.
    """
    first = next(iter(tensors(batch)), None)
    if first is None:
        raise expected("a batch", "made of tensors", f"{type(batch).__name__} without any")
    return first.shape[0]


def tensors(batch: Batch) -> Iterator[Tensor]:
    """All tensors in a nested batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors(value)


def map_tensors(f: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The same nesting with ``f`` applied to each tensor (arrays and numbers become tensors)."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, (np.ndarray, np.generic, int, float)) and not isinstance(batch, bool):
        return f(torch.as_tensor(batch))
    if isinstance(batch, Mapping):
        return {k: map_tensors(f, v) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(f, v) for v in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(f, v) for v in batch)
    return batch


def take(batch: Batch, index: Tensor) -> Batch:
    """Some examples of a batch, by their place in it."""
    return map_tensors(lambda t: t[index.to(t.device)], batch)


def _columns(data: Any) -> Batch | None:
    """The data as nested columns if every leaf is a tensor or an array, else None."""
    if isinstance(data, (Tensor, np.ndarray)):
        return (torch.as_tensor(data),)
    values = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(values, (tuple, list)) and values and all(isinstance(v, (Tensor, np.ndarray)) for v in values):
        if isinstance(data, list) and len({len(v) if v.ndim else 0 for v in values}) != 1:
            return None
        return map_tensors(lambda t: t, data)
    return None


def _common_length(columns: Batch, name: str) -> int:
    lengths = [t.shape[0] if t.ndim else 0 for t in tensors(columns)]
    if len(set(lengths)) != 1:
        raise InputError(f"{name} tensors must have the same number of examples, got {lengths}.")
    return lengths[0]


def _place(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    wider = t.is_floating_point() and torch.finfo(t.dtype).bits < torch.finfo(dtype).bits
    placed = t.to(device=device, dtype=dtype if wider else t.dtype)
    return placed.clone() if placed.is_inference() else placed  # autograd takes no tensors of inference mode


def raw(t: Tensor) -> memoryview:
    """A tensor's bytes, for hashing."""
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest(named: Mapping[str, Tensor]) -> str:
    """A hash of tensors, their names, dtypes and shapes, in the order given."""
    found = hashlib.blake2b(digest_size=16)
    for name, t in named.items():
        found.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        found.update(raw(t))
    return found.hexdigest()
