"""Trajectory: what was kept of a training run, and the recorder that keeps it.

    recorder = wherefrom.Recorder("run", model, optimiser, every=100)      # before the loop, the one line to add
    ...                                                                 # the loop as it was
    trajectory = wherefrom.Trajectory.load("run")

The recorder listens to ``optimiser.step``: it notes the learning rate of every step and, at the start and after every
so many steps, the model's weights. `Recorder.saw` notes which examples a step is made of, which only replaying needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom import store
from wherefrom.disk import Lock
from wherefrom.errors import ArtefactError, InputError, expected
from wherefrom.model.observe import unwrap_model

LOG = "trajectory.safetensors"  # the file of all but the checkpoints
# The settings of an optimiser that decide what a step does, besides the learning rate.
SETTINGS = (
    "momentum",
    "dampening",
    "nesterov",
    "weight_decay",
    "decoupled_weight_decay",
    "betas",
    "eps",
    "amsgrad",
    "maximize",
)
Group = Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """The model at one moment of its training.

    Args:
        step: optimiser steps taken before it.
        state: its ``state_dict``, on the CPU; of a run on disk, read when it is asked for.
    """

    step: int
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class Segment:
    """A stretch of training that is taken as stationary.

    Args:
        checkpoints: those within it, by step.
        steps: K, optimiser steps.
        rate: eta, mean effective learning rate: the mean over its steps of lr / (1 - momentum).
    """

    checkpoints: tuple[Checkpoint, ...]
    steps: int
    rate: float

    @property
    def damping(self) -> float:
        """Compute 1 / (eta K), the damping that the segment implies (SOURCE; ASTRA, appendix C)."""
        return 1 / (self.rate * self.steps)

    def mean(self) -> dict[str, Tensor]:
        """Average the checkpoints' weights; buffers of whole numbers are the last one's (FAST-SOURCE)."""
        states = [c.state for c in self.checkpoints]
        averages = {}
        for name, last in states[-1].items():
            averages[name] = last
            if last.is_floating_point():
                averages[name] = torch.stack([state[name] for state in states]).mean(0)
        return averages


@dataclass(frozen=True, repr=False)
class Trajectory:
    """A training run.

    Args:
        checkpoints: by step; the first has step 0 if the initial model was kept.
        rates: (T, groups) float64, the learning rate of each step.
        optimiser: the name of its class in `torch.optim`.
        groups: one for each parameter group: the names of its ``parameters``, and what else the optimiser was given.
        order: for each step the numbers of the examples in its minibatch, int64; None if they were not noted.

    Raises:
        InputError: if checkpoints are missing, out of order, or beyond the last step, or shapes disagree.
    """

    checkpoints: tuple[Checkpoint, ...]
    rates: Tensor
    optimiser: str
    groups: tuple[Group, ...]
    order: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        at = [c.step for c in self.checkpoints]
        is_increasing = at == sorted(set(at))
        if not at or not is_increasing or at[0] < 0 or at[-1] > self.steps:
            raise expected("checkpoints", f"one or more, by step, within 0..{self.steps}", at)
        has_shape = self.rates.ndim == 2 and self.rates.shape[1] == len(self.groups) and self.steps > 0
        if not has_shape or not bool((self.rates >= 0).all()):
            raise expected("rates", f"({self.steps or 'T'}, {len(self.groups)}) learning rates", self.rates.shape)
        if self.order is not None and len(self.order) != self.steps:
            raise expected("order", f"one minibatch for each of the {self.steps} steps", len(self.order))

    def __repr__(self) -> str:
        """Say what run it is, in a few words."""
        return f"Trajectory({self.steps} steps of {self.optimiser}, {len(self.checkpoints)} checkpoints)"

    @property
    def steps(self) -> int:
        """T, optimiser steps."""
        return len(self.rates)

    @classmethod
    def of_sgd(
        cls,
        checkpoints: Sequence[tuple[int, Mapping[str, Tensor]]],
        lr: float | Sequence[float],
        steps: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> Trajectory:
        """Describe a run of SGD that was not recorded, by its checkpoints.

        Args:
            checkpoints: (step, ``state_dict``) of each.
            lr: the learning rate, or that of each step.
            steps: T.
            momentum, weight_decay: as given to `torch.optim.SGD`, without dampening.
        """
        rates = torch.as_tensor(lr, dtype=torch.float64).reshape(-1, 1).expand(steps, 1)
        group = {"momentum": momentum, "weight_decay": weight_decay, "dampening": 0.0, "nesterov": False}
        ordered = sorted(checkpoints, key=lambda c: c[0])
        names = tuple(ordered[0][1]) if ordered else ()
        in_order = tuple(Checkpoint(step, state) for step, state in ordered)
        return cls(in_order, rates, "SGD", ({"parameters": names} | group,))

    def effective_rates(self) -> Tensor:
        """Compute lr / (1 - momentum) of each step, (T,): a mean over parameter groups, weighted by their sizes.

        With momentum, each gradient acts on this many times the learning rate, summed over the steps that follow.
        """
        state = self.checkpoints[-1].state
        sizes = [sum(state[p].numel() for p in group["parameters"]) for group in self.groups]
        weights = torch.tensor(sizes, dtype=torch.float64)  # (groups,)
        momentum = torch.tensor([float(group.get("momentum", 0.0)) for group in self.groups], dtype=torch.float64)
        return self.rates / (1 - momentum) @ (weights / weights.sum())

    def segments(self, count: int) -> list[Segment]:
        """Cut the run into stretches of equal numbers of steps, each with the checkpoints made in it.

        Args:
            count: L. A checkpoint belongs to the stretch that its step ends or lies within; one at step 0 to the first
                if that has no other.

        Raises:
            InputError: if a stretch has no checkpoint, or the optimiser was not SGD without dampening: the steps of
                others are no multiple of the gradient.
        """
        if self.optimiser != "SGD" or any(g.get("dampening") for g in self.groups):
            advice = "Take Unrolled, which replays Adam too, TracIn, or Influence at the final weights."
            raise expected("a trajectory cut into segments", "of SGD without dampening", self.optimiser, advice)
        edges = torch.linspace(0, self.steps, count + 1, dtype=torch.float64).round().long().tolist()
        rates = self.effective_rates()
        segments = []
        for low, high in pairwise(edges):
            inside = [c for c in self.checkpoints if low < c.step <= high]
            if not inside:
                inside = [c for c in self.checkpoints if low == c.step == 0]
            if not inside or high == low:
                at = [c.step for c in self.checkpoints]
                advice = "Take fewer segments, or keep checkpoints more often."
                raise expected(f"checkpoints of {count} segments", f"one in steps {low + 1}..{high}", at, advice)
            segments.append(Segment(tuple(inside), high - low, float(rates[low:high].mean())))
        return segments

    def spread(self, count: int) -> tuple[Checkpoint, ...]:
        """Choose at most ``count`` of the checkpoints after step 0, evenly spaced, the last among them."""
        candidates = [c for c in self.checkpoints if c.step] or list(self.checkpoints)
        n = len(candidates)
        count = min(count, n)
        # The last of each of ``count`` stretches of equal numbers of checkpoints.
        index = torch.linspace(n / count - 1, n - 1, count).round()
        return tuple(candidates[int(i)] for i in index)

    def save(self, folder: str | Path) -> None:
        """Write the run into a folder, a file for each checkpoint."""
        for checkpoint in self.checkpoints:
            _write_checkpoint(Path(folder), checkpoint)
        steps = [c.step for c in self.checkpoints]
        _write_log(Path(folder), self.rates, self.optimiser, self.groups, self.order, steps)

    @classmethod
    def load(cls, folder: str | Path) -> Trajectory:
        """Read what `save` or a `Recorder` wrote.

        Raises:
            ArtefactError: if a file is missing or damaged.
        """
        if not (Path(folder) / LOG).is_file():
            raise ArtefactError(
                f"{folder} must be a folder that a Recorder wrote, got none with {LOG}. Check the path."
            )
        path = Path(folder) / LOG
        tensors, header = store.load(path, "trajectory")
        shapes = {"rates": (None, None), "order": (None,), "sizes": (None,)}
        dtypes = {"order": torch.int64, "sizes": torch.int64}
        store.check_tensors(path, tensors, shapes, optional=("order", "sizes"), dtypes=dtypes)
        with store.reading(path):
            _check_header(header)
            checkpoints = tuple(Checkpoint(step, _read_checkpoint(folder, step)) for step in header["kept"])
            order = _split_order(path, tensors)
            groups = tuple({**g, "parameters": tuple(g["parameters"])} for g in header["groups"])
            run = cls(checkpoints, tensors["rates"], str(header["optimiser"]), groups, order)
        _check_run(path, run)
        return run


class Recorder:
    """Records checkpoints, learning rates and, if told, the order of the examples of a training run.

    Args:
        folder: where to write; made if need be. A run that is there already is refused.
        model: the model in training.
        optimiser: its `torch.optim.Optimizer`; every ``step`` of it counts as one.
        every: steps between checkpoints. The model as it is now and, at `close`, as it ends are kept too.

    Raises:
        InputError: if the folder holds a run, another process records into it, or the optimiser has parameters that
            are not the model's.
    """

    def __init__(self, folder: str | Path, model: nn.Module, optimiser: torch.optim.Optimizer, every: int):
        self.folder, self.optimiser, self.every = Path(folder), optimiser, every
        self.model = unwrap_model(model)  # so that names are those of the plain model
        if every < 1:
            raise expected("every", "a positive number of steps", every)
        if (self.folder / LOG).exists():
            raise expected("folder", "one without a recorded run", f"{folder}", "Give another, or delete it first.")
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = []
        for group in optimiser.param_groups:
            if any(id(p) not in names for p in group["params"]):
                advice = "Pass the model it was made for."
                raise expected("optimiser", "one of the model's own parameters", "others", advice)
            parameters = tuple(names[id(p)] for p in group["params"])
            groups.append({"parameters": parameters} | _get_settings(group))
        self.groups = tuple(groups)
        self._lock = Lock(self.folder, "Record in one process, or give another folder.")
        self._rates: list[list[float]] = []  # of each step, by group
        self._order: list[Tensor] = []  # the numbers of the examples of each step
        self._seen: list[Tensor] = []  # those of the step that is not taken yet
        self._written: list[int] = []  # the steps of the checkpoints
        self._handle = optimiser.register_step_post_hook(lambda *_: self._note_step())
        self._write()

    def saw(self, index: Sequence[int] | Tensor) -> None:
        """Note the numbers of examples that the next step is made of; several calls before a step add up.

        Args:
            index: their numbers in the training set, in the order of the minibatch.
        """
        self._seen.append(torch.as_tensor(index, dtype=torch.int64).cpu().flatten())

    def close(self) -> Trajectory:
        """Keep the last weights, stop listening, and return the run; ``with Recorder(...)`` does it too."""
        self._stop()
        return Trajectory.load(self.folder)

    def __enter__(self) -> Recorder:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._handle.remove()
        try:
            self._write()
        finally:
            self._lock.release()

    def _note_step(self) -> None:
        settings = [_get_settings(group) for group in self.optimiser.param_groups]
        at_the_start = [{k: v for k, v in group.items() if k != "parameters"} for group in self.groups]
        if settings != at_the_start:
            raise expected("the optimiser's settings", "constant but for the learning rate", settings)
        self._rates.append([float(group["lr"]) for group in self.optimiser.param_groups])

        if self._seen:
            self._order.append(torch.cat(self._seen))
            self._seen = []
        if len(self._order) not in (0, len(self._rates)):
            raise InputError(f"saw() must be called before every step or never, got none before {len(self._rates)}.")
        if len(self._rates) % self.every == 0:
            self._write()

    def _write(self) -> None:
        """Write the weights as they are, unless they are written already, and the log of the steps so far."""
        step = len(self._rates)
        if step not in self._written:
            _write_checkpoint(self.folder, Checkpoint(step, self.model.state_dict()))
            self._written.append(step)
        if step:
            rates = torch.tensor(self._rates, dtype=torch.float64)
            order = tuple(self._order) or None
            _write_log(self.folder, rates, type(self.optimiser).__name__, self.groups, order, self._written)


def _get_settings(group: Group) -> dict[str, Any]:
    """Get the settings of a parameter group of an optimiser; no optimiser has all of them."""
    return {name: group[name] for name in SETTINGS if name in group}


def _read_checkpoint(folder: str | Path, step: int) -> store.Stored:
    """Open a checkpoint, which is checked once, and read tensor by tensor later."""
    path = _name_file(folder, step)
    stored = store.Stored(path, "checkpoint")
    if stored.header.get("step") != step:
        raise store.wrong_contents(path, f"the checkpoint of step {step}", f"that of {stored.header.get('step')!r}")
    return stored


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse what no recorder notes.

    Raises:
        InputError: for steps, or settings of the optimiser, that are none. LookupError, TypeError: if any is missing.
    """
    for step in header["kept"]:
        if type(step) is not int or not 0 <= step < 2**53:
            raise expected("the steps of checkpoints", "whole numbers", repr(step)[: store.SHOWN])
    for group in header["groups"]:
        if not all(isinstance(name, str) for name in group["parameters"]):
            raise expected("the parameters of a group", "names", "others")
        for name in SETTINGS:
            value = group.get(name, 0.0)
            parts = value if name == "betas" and isinstance(value, list) else [value]
            highest = 1.0 if name in ("momentum", "betas") else float("inf")  # exclusive
            if not all(isinstance(part, (int, float)) and 0 <= part < highest for part in parts):
                raise expected(f"{name} of the optimiser", f"a number from 0 to below {highest}", repr(value)[:40])


def _split_order(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """Split the numbers of all examples, one after another, into the minibatches, whose sizes lie beside them."""
    if ("order" in tensors) != ("sizes" in tensors):
        raise store.wrong_contents(path, "order and sizes together", "one of them")
    if "order" not in tensors:
        return None
    order, sizes = tensors["order"], tensors["sizes"]
    has_negative = bool((order < 0).any()) or bool((sizes < 0).any())
    if has_negative or int(sizes.sum()) != len(order):
        raise store.wrong_contents(path, "the numbers of the examples of each step", "others")
    return order.split(sizes.tolist())


def _check_run(path: Path, run: Trajectory) -> None:
    """Refuse a run whose parts do not belong together.

    Raises:
        ArtefactError: for checkpoints of several models, or a group with a parameter that they lack.
    """
    states = [checkpoint.state for checkpoint in run.checkpoints if isinstance(checkpoint.state, store.Stored)]
    if any(state.shapes != states[0].shapes for state in states):
        raise store.wrong_contents(path, "checkpoints of one model", "tensors of several shapes")
    parameters = {name for group in run.groups for name in group["parameters"]}
    if missing := parameters - set(states[0]):
        raise store.wrong_contents(path, "parameters of its checkpoints", min(missing))
    for state in states:
        if diverged := parameters & state.diverged:
            got = f"others in {min(diverged)}: the training diverged"
            raise store.wrong_contents(state.path, "finite weights", got)


def _name_file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}.safetensors"


def _write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: t.detach().clone() for name, t in checkpoint.state.items()}
    store.save(_name_file(folder, checkpoint.step), "checkpoint", tensors, {"step": checkpoint.step})


def _write_log(
    folder: Path,
    rates: Tensor,
    optimiser: str,
    groups: Sequence[Group],
    order: Sequence[Tensor] | None,
    steps: Sequence[int],
) -> None:
    tensors = {"rates": rates}
    if order is not None:
        tensors |= {"order": torch.cat(tuple(order)), "sizes": torch.tensor([len(numbers) for numbers in order])}
    # Through JSON and back, which turns tuples into the lists that a header has.
    plain_groups = json.loads(json.dumps([dict(group) for group in groups]))
    header = {"optimiser": optimiser, "groups": plain_groups, "kept": list(steps)}
    store.save(folder / LOG, "trajectory", tensors, header)
