"""Runs that are killed in the middle, to be taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from wherefrom.model.problem import Problem


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[object]]:
    """The batches whose loss gradients are taken in the block; it is interrupted when there are so many."""
    original, passes = Problem.loss_gradients, []

    def counted(self, batch):
        if len(passes) == after:
            raise KeyboardInterrupt
        passes.append(batch)
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Problem, "loss_gradients", counted)
        yield passes
