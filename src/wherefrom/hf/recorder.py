"""A recorder for the transformers Trainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from wherefrom.errors import expected
from wherefrom.training.trajectory import Recorder


class RecorderCallback(TrainerCallback):
    """A `Recorder` for the transformers ``Trainer``: ``Trainer(..., callbacks=[RecorderCallback("run", 100)])``.

    It keeps checkpoints, learning rates and the order of the examples, those of accumulated batches together.

    Args:
        folder: where to write; a run that is there already is refused.
        every: steps between checkpoints.
        order: note the order of the examples. It needs a data set with a length and one process.
    """

    def __init__(self, folder: str | Path, every: int, order: bool = True):
        self.folder, self.every, self.order = folder, every, order
        self._recorder: Recorder | None = None
        self._batches: deque[list[int]] = deque()
        self._left = 0

    def on_train_begin(self, args: Any, *_args: Any, **objects: Any) -> None:
        """Begin to listen.

        Raises:
            InputError: if the order was asked for and cannot be noted; see `Recorder` for the others.
        """
        if getattr(args, "process_index", 0):  # of several processes the first one records
            return
        optimiser = objects["optimizer"]
        optimiser = getattr(optimiser, "optimizer", optimiser)  # accelerate wraps it
        self._recorder = Recorder(self.folder, objects["model"], optimiser, self.every)
        if self.order:
            loader = objects["train_dataloader"]
            loader = getattr(loader, "base_dataloader", loader)
            if args.world_size > 1 or getattr(loader, "batch_sampler", None) is None:
                raise expected("order", "False for several processes or data without a length", True)
            # DataLoader refuses a plain assignment once it is built.
            object.__setattr__(loader, "batch_sampler", _BatchSamplerThatNotes(loader.batch_sampler, self._batches))

    def on_epoch_begin(self, *_args: Any, **objects: Any) -> None:
        """Count the batches of the epoch."""
        self._left = len(objects["train_dataloader"])

    def on_step_begin(self, args: Any, *_args: Any, **_objects: Any) -> None:
        """Note the batches that the step accumulates; the last of an epoch may have fewer."""
        if self._recorder is not None and self.order:
            for _ in range(min(args.gradient_accumulation_steps, self._left)):
                self._recorder.saw(self._batches.popleft())
                self._left -= 1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Keep the last weights and stop."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


class _BatchSamplerThatNotes:
    """A batch sampler that notes what it draws."""

    def __init__(self, sampler: Any, batches: deque[list[int]]):
        self.inner = sampler
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        self.batches.clear()  # what the loader drew ahead in the last epoch was not used
        for index in self.inner:
            self.batches.append(list(index))
            yield index

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
