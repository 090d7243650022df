"""Does a collate function keep one row for each example, and in their order? Found out by collating examples alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from wherefrom.data.batches import VALUES, Batch, children, is_rows, leaves, lists, tensors
from wherefrom.errors import InputError

ROWS = 16  # of a batch that are compared with examples collated alone

Path = tuple[object, ...]  # where something stands in a nested batch


def check_count(name: str, asked: int, batch: Batch, single: Callable[[int], Batch]) -> None:
    """Make sure that something in a batch has a row for each example that was asked for.

    Not everything need have: the tokens of several texts may lie end to end, beside one label for each text.

    Args:
        name: of the data set.
        asked: for how many examples.
        batch: what the collate function made of them.
        single: what it makes of one of them, by its place.

    Raises:
        InputError: with both counts if nothing has.
    """
    lengths = [t.shape[0] for t in tensors(batch) if t.ndim] + [len(values) for values in lists(batch)]
    if asked in lengths:
        return
    counts = list(_counts(batch, single(0))) if asked > 1 else list(_containers(batch))
    if asked in counts:
        return
    likely = counts if asked > 1 and counts else lengths
    rows = " or ".join(f"{count:,}" for count in dict.fromkeys(likely)) or "no"
    raise InputError(
        f"{name}: a batch must have one row for each example, but the collate function was asked for {asked} examples "
        f"and gave {rows} rows. It may not drop, split or join examples: leave examples out of the data set itself "
        "(Subset), and join or split them within the model."
    )


def check_order_of_rows(
    name: str, numbers: Sequence[int], batch: Batch, fetch: Callable[[Sequence[int]], Batch]
) -> None:
    """Make sure that row i of a batch is example i, by comparison with examples that are collated alone.

    Rows may be padded at either end, and leaves may depend on the rest of the batch, as offsets do. Evidence of another
    order is a row that is not its own example, and is another one.

    Args:
        name: of the data set.
        numbers: of the examples of the batch.
        batch: what the collate function made of them.
        fetch: collates the examples of the given numbers.

    Raises:
        InputError: if rows are in another order, or the collate function is random.
    """
    n = len(numbers)
    singles: dict[int, Batch] = {}

    def collate_alone(i: int) -> Batch:
        if i not in singles:
            singles[i] = fetch([numbers[i]])
        return singles[i]

    differs = False
    for i in torch.linspace(0, n - 1, min(n, ROWS)).round().long().tolist():
        own = collate_alone(i)
        for path in _rows(batch, own, n):
            row, wanted = _find_at(batch, path)[i], _find_at(own, path)[0]
            if _rows_leaves_agree(row, wanted):
                continue
            differs = True
            for j in range(n):
                other = _find_at(collate_alone(j), path)
                if other is not None and _rows_leaves_agree(row, other[0]) and not _rows_leaves_agree(other[0], wanted):
                    raise InputError(
                        f"{name}: row i of a batch must be example i, but the collate function puts example "
                        f"{numbers[j]} where example {numbers[i]} belongs. Pass a collate_fn that does not sort, "
                        "shuffle or mix examples; a model that needs them sorted can sort them itself."
                    )
    if differs and not _rows_leaves_agree(fetch(numbers), batch):
        raise InputError(
            f"{name} data must be the same in every pass, but examples {min(numbers)}..{max(numbers)} changed between "
            "two passes. Switch off random augmentation, masking or shuffling in the data set and its collate_fn."
        )


def _counts(batch: Batch, single: Batch) -> Iterator[int]:
    """Find the lengths of what has one row where an example is collated alone."""
    if isinstance(batch, Tensor) and isinstance(single, Tensor):
        if batch.ndim and single.ndim and len(single) == 1:
            yield len(batch)
    elif not isinstance(batch, (Tensor, *VALUES)) and not isinstance(single, (Tensor, *VALUES)):
        parts, others = children(batch), children(single)
        if list(parts) == list(others):
            for key, part in parts.items():
                yield from _counts(part, others[key])
        elif len(others) == 1:
            yield len(parts)


def _containers(batch: Batch) -> Iterator[int]:
    """Find the lengths of the tuples and lists of a batch, which may hold one thing for each example."""
    if not isinstance(batch, (Tensor, *VALUES)):
        if isinstance(batch, (tuple, list)):
            yield len(batch)
        for part in children(batch).values():
            yield from _containers(part)


def _rows(batch: Batch, single: Batch, n: int, path: Path = ()) -> Iterator[Path]:
    """Find where a batch has one row for each of its n examples."""
    if is_rows(batch, single, n):
        yield path
    elif not isinstance(batch, (Tensor, *VALUES)) and not isinstance(single, (Tensor, *VALUES)):
        parts, others = children(batch), children(single)
        for key in parts.keys() & others.keys():
            yield from _rows(parts[key], others[key], n, (*path, key))


def _find_at(batch: Batch, path: Path) -> Batch:
    """Find what stands at a place; None if nothing does."""
    for key in path:
        batch = children(batch).get(key)
    return batch


def _rows_leaves_agree(row: Batch, own: Batch) -> bool:
    """Whether a row holds the same as one of an example collated alone, up to padding at one end of each axis."""
    in_batch, alone = leaves(row), leaves(own)
    return len(in_batch) == len(alone) and all(map(_leaves_agree, in_batch, alone))


def _leaves_agree(in_batch: object, alone: object) -> bool:
    if not isinstance(in_batch, Tensor) or not isinstance(alone, Tensor):
        return type(in_batch) is type(alone) and repr(in_batch) == repr(alone)  # NaN is not equal to itself
    if in_batch.ndim != alone.ndim or in_batch.dtype != alone.dtype:
        return False
    if any(longer < shorter for longer, shorter in zip(in_batch.shape, alone.shape, strict=True)):
        return False
    starts = tuple(slice(0, size) for size in alone.shape)
    ends = tuple(slice(whole - size, None) for whole, size in zip(in_batch.shape, alone.shape, strict=True))
    # Padding is at the end of each axis, or at its start.
    return any(torch.equal(in_batch[part].nan_to_num(), alone.nan_to_num()) for part in (starts, ends))
