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
from wherefrom.model.observe import unwrapped

LOG = "trajectory.safetensors"
KEPT = (
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
        """1 / (eta K), the damping that the segment implies (SOURCE; ASTRA, appendix C)."""
        return 1 / (self.rate * self.steps)

    def mean(self) -> dict[str, Tensor]:
        """The checkpoints' weights, averaged; buffers of whole numbers are the last one's (FAST-SOURCE)."""
        states = [c.state for c in self.checkpoints]
        return {
            name: torch.stack([s[name] for s in states]).mean(0) if t.is_floating_point() else t
            for name, t in states[-1].items()
        }


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
        found = [c.step for c in self.checkpoints]
        if not found or found != sorted(set(found)) or found[0] < 0 or found[-1] > self.steps:
            raise expected("checkpoints", f"one or more, by step, within 0..{self.steps}", found)
        if (
            self.rates.ndim != 2
            or self.rates.shape[1] != len(self.groups)
            or not self.steps
            or not bool((self.rates >= 0).all())
        ):
            raise expected("rates", f"({self.steps or 'T'}, {len(self.groups)}) learning rates", self.rates.shape)
        if self.order is not None and len(self.order) != self.steps:
            raise expected("order", f"one minibatch for each of the {self.steps} steps", len(self.order))

    def __repr__(self) -> str:
        """What run it is, in a few words."""
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
        """A run of SGD that was not recorded, from its checkpoints.

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
        kept = tuple(Checkpoint(step, state) for step, state in ordered)
        return cls(kept, rates, "SGD", ({"parameters": names} | group,))

    def effective_rates(self) -> Tensor:
        """lr / (1 - momentum) of each step, the mean over parameter groups by their numbers of parameters, (T,)."""
        state = self.checkpoints[-1].state
        size = torch.tensor([sum(state[p].numel() for p in g["parameters"]) for g in self.groups], dtype=torch.float64)
        momentum = torch.tensor([float(g.get("momentum", 0.0)) for g in self.groups], dtype=torch.float64)
        return self.rates / (1 - momentum) @ (size / size.sum())

    def segments(self, count: int) -> list[Segment]:
        """The run cut into stretches of equal numbers of steps, each with the checkpoints made in it.

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
        rates, found = self.effective_rates(), []
        for low, high in pairwise(edges):
            inside = [c for c in self.checkpoints if low < c.step <= high]
            inside = inside or [c for c in self.checkpoints if low == c.step == 0]
            if not inside or high == low:
                have = [c.step for c in self.checkpoints]
                advice = "Take fewer segments, or keep checkpoints more often."
                raise expected(f"checkpoints of {count} segments", f"one in steps {low + 1}..{high}", have, advice)
            found.append(Segment(tuple(inside), high - low, float(rates[low:high].mean())))
        return found

    def spread(self, count: int) -> tuple[Checkpoint, ...]:
        """At most ``count`` of the checkpoints after step 0, evenly spaced, the last among them."""
        kept = [c for c in self.checkpoints if c.step] or list(self.checkpoints)
        index = torch.linspace(len(kept) / min(count, len(kept)) - 1, len(kept) - 1, min(count, len(kept))).round()
        return tuple(kept[int(i)] for i in index)

    def save(self, folder: str | Path) -> None:
        """Write the run into a folder, a file for each checkpoint."""
        for checkpoint in self.checkpoints:
            _keep(Path(folder), checkpoint)
        _log(Path(folder), self.rates, self.optimiser, self.groups, self.order, [c.step for c in self.checkpoints])

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
        found, header = store.load(path, "trajectory")
        shapes = {"rates": (None, None), "order": (None,), "sizes": (None,)}
        whole = {"order": torch.int64, "sizes": torch.int64}
        store.check_tensors(path, found, shapes, ("order", "sizes"), whole)
        with store.reading(path):
            _check_header(header)
            kept = tuple(Checkpoint(step, _read(folder, step)) for step in header["kept"])
            order = _order(path, found)
            groups = tuple({**g, "parameters": tuple(g["parameters"])} for g in header["groups"])
            run = cls(kept, found["rates"], str(header["optimiser"]), groups, order)
        _check(path, run)
        return run


class Recorder:
    """Keeps checkpoints, learning rates and, if told, the order of the examples of a training run.

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
        self.model = unwrapped(model)  # so that names are those of the plain model
        if every < 1:
            raise expected("every", "a positive number of steps", every)
        if (self.folder / LOG).exists():
            raise expected("folder", "one without a recorded run", f"{folder}", "Give another, or delete it first.")
        names = {id(p): name for name, p in self.model.named_parameters()}
        if any(id(p) not in names for g in optimiser.param_groups for p in g["params"]):
            raise expected(
                "optimiser", "one of the model's own parameters", "others", "Pass the model it was made for."
            )
        self.groups = tuple(
            {"parameters": tuple(names[id(p)] for p in g["params"])} | {k: g[k] for k in KEPT if k in g}
            for g in optimiser.param_groups
        )
        advice = "Record in one process, or give another folder."
        self._lock = Lock(self.folder, advice)
        self._rates: list[list[float]] = []
        self._order: list[Tensor] = []
        self._seen: list[Tensor] = []
        self._kept: list[int] = []
        self._handle = optimiser.register_step_post_hook(lambda *_: self._stepped())
        self._keep()

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
            self._keep()
        finally:
            self._lock.release()

    def _stepped(self) -> None:
        now = [{k: g[k] for k in KEPT if k in g} for g in self.optimiser.param_groups]
        if now != [{k: v for k, v in g.items() if k != "parameters"} for g in self.groups]:
            raise expected("the optimiser's settings", "constant but for the learning rate", now)
        self._rates.append([float(g["lr"]) for g in self.optimiser.param_groups])
        if self._seen:
            self._order.append(torch.cat(self._seen))
            self._seen = []
        if len(self._order) not in (0, len(self._rates)):
            raise InputError(f"saw() must be called before every step or never, got none before {len(self._rates)}.")
        if len(self._rates) % self.every == 0:
            self._keep()

    def _keep(self) -> None:
        step = len(self._rates)
        if step not in self._kept:
            _keep(self.folder, Checkpoint(step, self.model.state_dict()))
            self._kept.append(step)
        if step:
            rates = torch.tensor(self._rates, dtype=torch.float64)
            order = tuple(self._order) or None
            _log(self.folder, rates, type(self.optimiser).__name__, self.groups, order, self._kept)


def _read(folder: str | Path, step: int) -> store.Stored:
    """A checkpoint, checked once."""
    path = _file(folder, step)
    stored = store.Stored(path, "checkpoint")
    if stored.header.get("step") != step:
        raise store.wrong(path, f"the checkpoint of step {step}", f"that of {stored.header.get('step')!r}")
    return stored


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse what no recorder notes.

    Raises:
        InputError: for steps, or settings of the optimiser, that are none. LookupError, TypeError: if any is missing.
    """
    if bad := [step for step in header["kept"] if type(step) is not int or not 0 <= step < 2**53]:
        raise expected("the steps of checkpoints", "whole numbers", repr(bad[0])[: store.SHOWN])
    for group in header["groups"]:
        if not all(isinstance(name, str) for name in group["parameters"]):
            raise expected("the parameters of a group", "names", "others")
        for name in KEPT:
            value = group.get(name, 0.0)
            parts = value if name == "betas" and isinstance(value, list) else [value]
            highest = 1.0 if name in ("momentum", "betas") else float("inf")  # exclusive
            if not all(isinstance(part, (int, float)) and 0 <= part < highest for part in parts):
                raise expected(f"{name} of the optimiser", f"a number from 0 to below {highest}", repr(value)[:40])


def _order(path: Path, found: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """The minibatches, from their numbers one after another and their sizes."""
    if ("order" in found) != ("sizes" in found):
        raise store.wrong(path, "order and sizes together", "one of them")
    if "order" not in found:
        return None
    order, sizes = found["order"], found["sizes"]
    if bool((order < 0).any()) or bool((sizes < 0).any()) or int(sizes.sum()) != len(order):
        raise store.wrong(path, "the numbers of the examples of each step", "others")
    return order.split(sizes.tolist())


def _check(path: Path, run: Trajectory) -> None:
    """Refuse a run whose parts do not belong together.

    Raises:
        ArtefactError: for checkpoints of several models, or a group with a parameter that they lack.
    """
    states = [checkpoint.state for checkpoint in run.checkpoints if isinstance(checkpoint.state, store.Stored)]
    if any(state.shapes != states[0].shapes for state in states):
        raise store.wrong(path, "checkpoints of one model", "tensors of several shapes")
    parameters = {name for group in run.groups for name in group["parameters"]}
    if lost := parameters - set(states[0]):
        raise store.wrong(path, "parameters of its checkpoints", min(lost))
    for state in states:
        if bad := parameters & state.diverged:
            raise store.wrong(state.path, "finite weights", f"others in {min(bad)}: the training diverged")


def _file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}.safetensors"


def _keep(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: t.detach().clone() for name, t in checkpoint.state.items()}
    store.save(_file(folder, checkpoint.step), "checkpoint", tensors, {"step": checkpoint.step})


def _log(
    folder: Path,
    rates: Tensor,
    optimiser: str,
    groups: Sequence[Group],
    order: Sequence[Tensor] | None,
    kept: Sequence[int],
) -> None:
    tensors = {"rates": rates}
    if order is not None:
        tensors |= {"order": torch.cat(tuple(order)), "sizes": torch.tensor([len(o) for o in order])}
    plain = json.loads(json.dumps([dict(g) for g in groups]))
    store.save(folder / LOG, "trajectory", tensors, {"optimiser": optimiser, "groups": plain, "kept": list(kept)})
