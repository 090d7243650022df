"""Many small models trained at once, by plain SGD, each on a subset of the data of its own.

Their parameters are stacked and the forward pass is vmapped over them (batched matrix products). Losses are one number
per example, so one backward pass of their sum gives each model its own gradient, and `torch.optim.SGD`, whose update is
elementwise, steps them all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from wherefrom import Task
from wherefrom.errors import UnsupportedError, expected
from wherefrom.model.task import as_task
from wherefrom.progress import track
from wherefrom.tools.evaluate.arrays import bool_array

Data = Sequence[Tensor]


class Run(NamedTuple):
    """One training: the subset it is trained on, as a mask (N,) bool, and its seed."""

    mask: Tensor
    seed: int


@dataclass(frozen=True)
class SGDRecipe:
    """Plain minibatch SGD with a constant step, as `torch.optim.SGD` and ``DataLoader(shuffle=True)`` do it.

    Attributes:
        lr: step size, on the mean loss of a minibatch.
        momentum: heavy-ball momentum, without dampening.
        weight_decay: added to the gradient of every parameter, biases too.
        batch_size: examples per step.
        epochs: passes over the subset; a smaller subset therefore takes fewer steps.
        drop_last: leave out an epoch's last, smaller minibatch.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    epochs: int = 20
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.batch_size < 1 or self.epochs < 1:
            raise expected("lr, batch_size and epochs", "> 0, >= 1 and >= 1", (self.lr, self.batch_size, self.epochs))

    def steps(self, examples: int) -> int:
        """Count the SGD steps on that many examples."""
        batches = examples / self.batch_size
        per_epoch = math.floor(batches) if self.drop_last else math.ceil(batches)
        return self.epochs * per_epoch


def derive_streams(seed: int) -> tuple[int, torch.Generator]:
    """Derive a run's two independent random streams: the seed of its weights, the generator of its epochs' orders.

    An epoch's order is one of all N examples, of which those in the run's subset are taken: runs of the same seed keep
    the order of the examples that they share.
    """
    weights, order = np.random.SeedSequence(seed).generate_state(2).tolist()
    return weights, torch.Generator().manual_seed(order)


def train_small(
    build: Callable[[], nn.Module],
    task: object,
    train: Data,
    recipe: SGDRecipe,
    seeds: int | Sequence[int],
    masks: object = None,
    chunk: int | None = None,
    progress: bool | None = None,
) -> list[nn.Module]:
    """Train small models at once, one per seed: the attributed model, an ensemble, or one per subset.

    Args:
        build, task, train, recipe, chunk, progress: as in `retrain_small`.
        seeds: one per model; the weights and the order of a model are `derive_streams` of its seed.
        masks: (len(seeds), N) bool, the subset of each model; None: all the data.

    Returns:
        The models, in eval mode, in the order of the seeds.

    Raises:
        InputError, UnsupportedError: as `retrain_small`.
    """
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    train = check_tensors(train, "train")
    if masks is None:
        masks = torch.ones(len(seeds), len(train[0]), dtype=torch.bool)
    subsets = check_masks(masks, len(train[0]))
    if len(subsets) != len(seeds):
        raise expected("masks", f"one row per seed, {len(seeds)}", f"{len(subsets)} rows")
    runs = [Run(mask, seed) for mask, seed in zip(subsets, seeds, strict=True)]
    models: dict[int, nn.Module] = {}
    for numbers, chunk_models in Trainer(build, as_task(task), train, recipe).train_chunks(runs, chunk, progress):
        models |= zip(numbers, chunk_models, strict=True)
    # Chunks come by the size of their subsets, not in the order of the seeds.
    return [models[i] for i in range(len(seeds))]


def check_tensors(data: Data, what: str) -> tuple[Tensor, ...]:
    """Check data (x, y), and give it as a tuple.

    Raises:
        InputError: unless all are tensors of one length.
    """
    lengths = [len(part) if isinstance(part, Tensor) and part.ndim else type(part).__name__ for part in data]
    if not lengths or lengths != lengths[:1] * len(lengths) or not isinstance(lengths[0], int):
        raise expected(what, "a tuple (x, y) of tensors of one length", lengths)
    return tuple(data)


def check_masks(masks: object, examples: int | None) -> Tensor:
    """Check subsets, and give them as a tensor (M, N) of bool.

    Raises:
        InputError: if they are not bool, are of another number of examples, or one is empty.
    """
    subsets = torch.from_numpy(bool_array(masks, "masks", 2).copy())
    if examples not in (None, subsets.shape[1]):
        raise expected("masks", f"(M, N) with N = {examples} training examples", tuple(subsets.shape))
    is_empty = ~subsets.any(1)
    if is_empty.any():
        raise expected("masks", "non-empty subsets", f"no example in subset {int(is_empty.int().argmax())}")
    return subsets


def _shuffle_epoch(mask: Tensor, rng: torch.Generator) -> Tensor:
    """Draw the order of a subset's examples in one epoch, as numbers of examples."""
    order = torch.randperm(len(mask), generator=rng)
    return order[mask[order]]


class _Outputs(nn.Module):
    """``task.outputs`` of a model as a module of its own, so that its parameters can be replaced from outside."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model = model
        self.outputs = task.outputs  # a method, so a task that is a module is not taken for a part of the model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.outputs(self.model, batch)


@dataclass(frozen=True)
class Trainer:
    """Trains models at once.

    Attributes:
        build: makes a freshly initialised model.
        task: what is trained.
        train: (x, y), each (N, ...).
        recipe: the optimiser.
    """

    build: Callable[[], nn.Module]
    task: Task
    train: tuple[Tensor, ...]
    recipe: SGDRecipe

    def train_chunks(
        self, runs: Sequence[Run], chunk: int | None, progress: bool | None
    ) -> Iterator[tuple[list[int], list[nn.Module]]]:
        """Yield (run numbers, trained models), one chunk of runs with subsets of one size after the other."""
        # Models step together, so that those of a chunk must have epochs of one length.
        by_size: dict[int, list[int]] = defaultdict(list)
        for i, run in enumerate(runs):
            by_size[int(run.mask.sum())].append(i)
        if not self.recipe.steps(min(by_size)):
            raise expected("recipe", f"one with a step on {min(by_size)} examples", self.recipe, "See drop_last.")
        if chunk is None:
            chunk = self._choose_chunk(runs[0])
        if chunk < 1:
            raise expected("chunk", "at least 1", chunk)
        chunks = []
        for same_size in by_size.values():
            chunks += [same_size[i : i + chunk] for i in range(0, len(same_size), chunk)]
        for numbers in track(chunks, "training", enabled=progress):
            yield numbers, self.train_together([runs[i] for i in numbers])

    def _choose_chunk(self, run: Run) -> int:
        """Choose how many models fit the caches: about 2 MiB of parameters was fastest on a CPU; a GPU wants more."""
        model_bytes = sum(p.numel() * p.element_size() for p in self.build_initial(run).parameters())
        bytes_at_once = 2**21 if self.train[0].device.type == "cpu" else 2**28
        return max(1, bytes_at_once // max(1, model_bytes))

    def build_initial(self, run: Run) -> nn.Module:
        """Build the untrained model of a run."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(derive_streams(run.seed)[0])
            return self.build().to(self.train[0].device)

    @torch.enable_grad()
    def train_together(self, runs: Sequence[Run]) -> list[nn.Module]:
        """Train K models, each on its own subset (all of one size), in its own order; they come in eval mode."""
        recipe = self.recipe
        models = [self.build_initial(run) for run in runs]
        wrapped = [_Outputs(model, self.task).train() for model in models]
        parameters, buffers = stack_module_state(wrapped)  # name -> (K, ...)
        forward = vmap(lambda p, b, *batch: functional_call(wrapped[0], (p, b), batch))
        trained = [p for p in parameters.values() if p.requires_grad]
        sgd = torch.optim.SGD(trained, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
        rngs = [derive_streams(run.seed)[1] for run in runs]

        for _ in range(recipe.epochs):
            orders = [_shuffle_epoch(run.mask, rng) for run, rng in zip(runs, rngs, strict=True)]
            order = torch.stack(orders).to(self.train[0].device)  # (K, examples of a subset)
            for rows in order.split(recipe.batch_size, dim=1):  # (K, B)
                if recipe.drop_last and rows.shape[1] < recipe.batch_size:
                    break
                batch = tuple(part[rows] for part in self.train)  # (K, B, ...) each
                try:
                    outputs = forward(parameters, buffers, *batch)  # (K, B, ..., C)
                except RuntimeError as error:
                    what = f"The model must run as {len(runs)} stacked copies, got: {error}. "
                    raise UnsupportedError(what + "If it runs alone, give `retrain` a function to train it.") from error
                flat_batch = tuple(part.flatten(0, 1) for part in batch)
                loss = self.task.loss(outputs.flatten(0, 1), flat_batch)  # (K B,)
                if loss.shape != (rows.numel(),):
                    raise expected("task.loss", f"one number per example, ({rows.numel()},)", tuple(loss.shape))
                sgd.zero_grad()
                # No parameter is shared by two models, so that the gradient of the sum of their mean losses is, model
                # by model, that of each mean.
                (loss.sum() / rows.shape[1]).backward()
                sgd.step()

        stacked = {**parameters, **buffers}
        with torch.no_grad():
            for k, model in enumerate(wrapped):
                for name, tensor in chain(model.named_parameters(), model.named_buffers()):
                    tensor.copy_(stacked[name][k])
        return [model.eval() for model in models]
