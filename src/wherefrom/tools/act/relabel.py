"""Other labels for some training examples, tried against trusted queries.

For an example (x, y) and trusted queries q, let s(y') = mean_q s(q, (x, y')). Then the mean f changes by -s(y') / N
where (x, y') is added and by s(y) / N where (x, y) is removed, to first order; by the sum of both where y becomes y'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom import FittedInfluence, Problem
from wherefrom.data.examples import Batch, Examples
from wherefrom.errors import InputError
from wherefrom.tools.act.ranking import Numbers
from wherefrom.tools.evaluate.arrays import Floats


def read_labels(problem: Problem, place: int | str) -> Numbers:
    """Read the labels of all training examples, (N,), in one pass over the data.

    Raises:
        InputError: if a batch has not one whole number per example at that place.
    """
    labels = [_get_labels(batch, place).cpu() for _, batch in problem.batches()]
    return torch.cat(labels).numpy()


def try_labels(
    influence: FittedInfluence, trusted: Any, suspects: Sequence[int], labels: Sequence[int], place: int | str
) -> tuple[Floats, Floats]:
    """Compute s of every suspect with every label, and the model's loss on it, both (S, C).

    One solve for each trusted query, and two passes over S C examples, one of them forward only.
    """
    problem = influence.problem
    variants = _Relabelled(problem.train, suspects, labels, place)
    s = influence.score(trusted, certify=False, examples=variants).values.double().mean(0)  # (S C,)
    losses = []
    with problem.observed() as model, torch.no_grad():
        for _, batch in problem.batches(variants):
            losses.append(problem.task.loss(problem.outputs(model, batch), batch))
    shape = len(suspects), len(labels)
    return s.view(shape).cpu().numpy(), torch.cat(losses).double().view(shape).cpu().numpy()


def draw_stand_ins(
    problem: Problem, labels: Numbers, least_suspicious: Numbers, count: int, seed: int
) -> tuple[Any, NDArray[np.int64]]:
    """Draw training examples to take the place of trusted queries.

    Args:
        problem: where they come from.
        labels: (N,) given labels.
        least_suspicious: numbers of those to draw from, least suspicious first.
        count: how many in all, about the same number for each label, from the first half of those that have it.
        seed: of the draw.

    Returns:
        The examples, in the form of queries, and their numbers.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels[least_suspicious])
    per_class = math.ceil(count / len(classes))
    drawn = []
    for label in classes:
        with_label = least_suspicious[labels[least_suspicious] == label]
        first_half = with_label[: math.ceil(len(with_label) / 2)]
        drawn.append(rng.choice(first_half, min(len(first_half), per_class), replace=False))
    numbers = np.concatenate(drawn)
    batch = problem.batch(torch.from_numpy(numbers))
    return (dict(batch) if isinstance(batch, Mapping) else batch), numbers


class _Relabelled(Examples):
    """Suspects with every label, made batch by batch: suspect i with label j is example i C + j."""

    def __init__(self, train: Examples, suspects: Sequence[int], labels: Sequence[int], place: int | str):
        super().__init__(torch.arange(len(suspects) * len(labels)), "relabelled", train.batch_size)
        self._train, self._place = train, place
        self._suspects, self._labels = torch.as_tensor(suspects), torch.as_tensor(labels)

    def _gather(self, numbers: list[int], device: torch.device, dtype: torch.dtype) -> Batch:
        index = torch.as_tensor(numbers)
        batch = self._train.batch(self._suspects[index // len(self._labels)], device, dtype)
        y = self._labels[index % len(self._labels)].to(_get_labels(batch, self._place))
        if isinstance(batch, Mapping):
            return dict(batch) | {self._place: y}
        return tuple(y if i == self._place else column for i, column in enumerate(batch))


def _get_labels(batch: Batch, place: int | str) -> Tensor:
    try:
        y = batch[place]
    except (KeyError, IndexError, TypeError):
        y = None
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point():
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else f"none in a {type(batch).__name__}"
        raise InputError(
            f"labels at {place!r} of a batch must be one whole number per example, (B,), got {got}. Say with labels_at "
            "where they are, or leave influence out: examples are then ranked and not relabelled."
        )
    return y
