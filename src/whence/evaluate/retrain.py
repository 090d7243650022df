"""Ground truth by retraining: what the queries' measurements become when the model is trained on subsets of the data.

    targets[m, r, q] = f(q) after training on subset m with repeat r, which has its own initial weights and order

`retrain` calls the user's own training function once per run. `retrain_small` trains K small models at once: their
parameters are stacked and the forward pass is vmapped over them (batched matrix products). Losses are one number per
example, so one backward pass of their sum gives each model its own gradient, and `torch.optim.SGD`, whose update is
elementwise, steps them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from whence.errors import DivergenceError, UnsupportedError, expected
from whence.evaluate.lds import bool_array
from whence.progress import track
from whence.task import Task, as_task

Data = Sequence[Tensor]
Run = tuple[Tensor, int]


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
        """Number of SGD steps on that many examples."""
        kept = examples if self.drop_last else examples + self.batch_size - 1
        return self.epochs * (kept // self.batch_size)


def random_subsets(n: int, count: int, fraction: float, seed: int) -> Tensor:
    """(count, n) bool: subsets of exactly round(fraction * n) of n examples, uniform without replacement.

    Raises:
        InputError: if a subset would be empty or count is not positive.
    """
    size = round(fraction * n)
    if count < 1 or not 0 < size <= n:
        raise expected("count and round(fraction * n)", f">= 1 and in 1..{n}", (count, size))
    rng = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, n, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(n, generator=rng)[:size]] = True
    return masks


def run_seed(seed: int, subset: int, repeat: int) -> int:
    """The 32-bit seed of the run on that subset with that repeat; it depends on nothing else."""
    return int(np.random.SeedSequence((seed, subset, repeat)).generate_state(1)[0])


def streams(seed: int) -> tuple[int, torch.Generator]:
    """A run's two independent random streams: the seed of its initial weights, the generator of its epochs' orders."""
    weights, order = np.random.SeedSequence(seed).generate_state(2).tolist()
    return weights, torch.Generator().manual_seed(order)


def retrain(
    train: Callable[[Tensor, int], nn.Module],
    measure: Callable[[nn.Module], Tensor],
    masks: object,
    repeats: int,
    seed: int,
    progress: bool | None = None,
) -> Tensor:
    """Targets (M, R, Q), on the CPU, of the linear datamodeling score by the user's own training function.

    Args:
        train: takes the (n,) indices of a subset and a seed, returns a model trained on it. PyTorch's global random
            state is set to that seed for the call, and put back afterwards.
        measure: takes a trained model, returns f of the queries (Q,), lower is better.
        masks: (M, N) bool, the subsets.
        repeats: R, runs per subset.
        seed: of everything; a run's own seed is ``run_seed(seed, m, r)``.
        progress: show a progress bar; None: on a terminal.

    Raises:
        InputError: if masks are not bool or ``measure`` does not return (Q,).
        DivergenceError: if a measurement is not finite.
    """
    values = []
    for i, (subset, run) in enumerate(track(_runs(masks, repeats, seed), "retraining", enabled=progress)):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(run)
            model = train(subset, run)
        values.append(_measured(measure, model, *divmod(i, repeats)))
    return torch.stack(values).unflatten(0, (-1, repeats))


def retrain_small(
    build: Callable[[], nn.Module],
    task: object,
    train: Data,
    queries: Data,
    masks: object,
    repeats: int,
    recipe: SGDRecipe,
    seed: int,
    chunk: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Targets (M, R, Q), on the CPU, of the linear datamodeling score for a small model, many runs at once.

    Args:
        build: makes a freshly initialised model; it is called under the run's own random state. No dropout.
        task: the loss (its mean over a minibatch is trained) and the measurement.
        train: (x, y), each (N, ...), on the device to train on.
        queries: (xq, yq), each (Q, ...), on the same device.
        masks, repeats, seed, progress: as in `retrain`.
        recipe: the optimiser; give it that of the attributed model.
        chunk: models trained at once, which bounds the memory; None: as many as fit the caches. Changes rounding only.

    Raises:
        InputError: if shapes disagree or a subset is too small for a single step.
        UnsupportedError: if the model cannot be run as stacked copies; use `retrain`.
        DivergenceError: if a measurement is not finite.
    """
    used, train, asked = as_task(task), _tensors(train, "train"), _tensors(queries, "queries")
    runs = _runs(masks, repeats, seed, len(train[0]))
    values: dict[int, Tensor] = {}
    for i, model in _Trainer(build, used, train, recipe).models(runs, chunk, progress):
        values[i] = _measured(lambda net: used.measurement(used.outputs(net, asked), asked), model, *divmod(i, repeats))
    return torch.stack([values[i] for i in range(len(runs))]).unflatten(0, (-1, repeats))


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
    """Small models trained at once, one per seed, in eval mode: the attributed model, an ensemble, or one per subset.

    Args:
        build, task, train, recipe, chunk, progress: as in `retrain_small`.
        seeds: one per model; the weights and the order of a model are `streams` of its seed.
        masks: (len(seeds), N) bool, the subset of each model; None: all the data.

    Raises:
        InputError, UnsupportedError: as `retrain_small`.
    """
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    train = _tensors(train, "train")
    everything = torch.ones(len(seeds), len(train[0]), dtype=torch.bool)
    subsets = _subsets(everything if masks is None else masks, len(train[0]))
    if len(subsets) != len(seeds):
        raise expected("masks", f"one row per seed, {len(seeds)}", f"{len(subsets)} rows")
    runs = list(zip(subsets, seeds, strict=True))
    models = dict(_Trainer(build, as_task(task), train, recipe).models(runs, chunk, progress))
    return [models[i] for i in range(len(seeds))]


def _tensors(data: Data, what: str) -> tuple[Tensor, ...]:
    lengths = [len(part) if isinstance(part, Tensor) and part.ndim else type(part).__name__ for part in data]
    if not lengths or lengths != lengths[:1] * len(lengths) or not isinstance(lengths[0], int):
        raise expected(what, "a tuple (x, y) of tensors of one length", lengths)
    return tuple(data)


def _subsets(masks: object, examples: int | None) -> list[Tensor]:
    """The indices of each subset."""
    kept = torch.from_numpy(bool_array(masks, "masks", 2).copy())
    if examples not in (None, kept.shape[1]):
        raise expected("masks", f"(M, N) with N = {examples} training examples", tuple(kept.shape))
    if not kept.any(1).all():
        raise expected("masks", "non-empty subsets", f"no example in subset {int(kept.any(1).int().argmin())}")
    return [mask.nonzero().squeeze(1) for mask in kept]


def _runs(masks: object, repeats: int, seed: int, examples: int | None = None) -> list[Run]:
    """The subset and the seed of each run, all repeats of a subset together."""
    if repeats < 1:
        raise expected("repeats", "at least 1", repeats)
    subsets = _subsets(masks, examples)
    return [(subset, run_seed(seed, m, r)) for m, subset in enumerate(subsets) for r in range(repeats)]


class _Outputs(nn.Module):
    """``task.outputs`` of a model as a module of its own, so that its parameters can be replaced from outside."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model = model
        self.outputs = task.outputs  # a method, so a task that is a module is not taken for a part of the model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.outputs(self.model, batch)


@dataclass(frozen=True)
class _Trainer:
    """Trains models at once. A run is a subset's indices and a seed."""

    build: Callable[[], nn.Module]
    task: Task
    train: tuple[Tensor, ...]
    recipe: SGDRecipe

    def models(self, runs: Sequence[Run], chunk: int | None, progress: bool | None) -> Iterator[tuple[int, nn.Module]]:
        """Yield (run number, trained model), a chunk of runs with subsets of one size after the other."""
        by_size: dict[int, list[int]] = defaultdict(list)
        for i, (subset, _) in enumerate(runs):
            by_size[len(subset)].append(i)
        if not self.recipe.steps(min(by_size)):
            raise expected("recipe", f"one with a step on {min(by_size)} examples", self.recipe, "See drop_last.")
        if chunk is None:  # on a CPU about 2 MiB of parameters was fastest, a GPU wants more
            size = sum(p.numel() * p.element_size() for p in self.initial(runs[0]).parameters())
            chunk = max(1, (2**21 if self.train[0].device.type == "cpu" else 2**28) // max(1, size))
        if chunk < 1:
            raise expected("chunk", "at least 1", chunk)
        groups = [same[i : i + chunk] for same in by_size.values() for i in range(0, len(same), chunk)]
        for group in track(groups, "training", enabled=progress):
            yield from zip(group, self.together([runs[i] for i in group]), strict=True)

    def initial(self, run: Run) -> nn.Module:
        """The untrained model of a run."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(streams(run[1])[0])
            return self.build().to(self.train[0].device)

    @torch.enable_grad()
    def together(self, runs: Sequence[Run]) -> list[nn.Module]:
        """K trained models, each on its own subset (all of one size), in its own order."""
        models, recipe = [self.initial(run) for run in runs], self.recipe
        wrapped = [_Outputs(model, self.task).train() for model in models]
        parameters, buffers = stack_module_state(wrapped)  # name -> (K, ...)
        forward = vmap(lambda p, b, *batch: functional_call(wrapped[0], (p, b), batch))
        trained = [p for p in parameters.values() if p.requires_grad]
        sgd = torch.optim.SGD(trained, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
        rngs = [streams(seed)[1] for _, seed in runs]
        for _ in range(recipe.epochs):
            orders = [rows[torch.randperm(len(rows), generator=rng)] for (rows, _), rng in zip(runs, rngs, strict=True)]
            for rows in torch.stack(orders).to(self.train[0].device).split(recipe.batch_size, dim=1):  # (K, B)
                if recipe.drop_last and rows.shape[1] < recipe.batch_size:
                    break
                batch = tuple(part[rows] for part in self.train)  # (K, B, ...) each
                try:
                    outputs = forward(parameters, buffers, *batch)  # (K, B, ..., C)
                except RuntimeError as error:
                    what = f"The model must run as {len(runs)} stacked copies, got: {error}. "
                    raise UnsupportedError(what + "If it runs alone, give `retrain` a function to train it.") from error
                loss = self.task.loss(outputs.flatten(0, 1), tuple(part.flatten(0, 1) for part in batch))  # (K * B,)
                if loss.shape != (rows.numel(),):
                    raise expected("task.loss", f"one number per example, ({rows.numel()},)", tuple(loss.shape))
                sgd.zero_grad()
                (loss.sum() / rows.shape[1]).backward()
                sgd.step()
        stacked = {**parameters, **buffers}
        with torch.no_grad():
            for k, model in enumerate(wrapped):
                for name, tensor in chain(model.named_parameters(), model.named_buffers()):
                    tensor.copy_(stacked[name][k])
        return [model.eval() for model in models]


@torch.no_grad()
def _measured(measure: Callable[[nn.Module], Tensor], model: nn.Module, m: int, r: int) -> Tensor:
    values = measure(model).cpu()
    if values.ndim != 1:
        raise expected("The measurement", "one number per query, (Q,)", tuple(values.shape))
    if not values.isfinite().all():
        what = f"The measurements after training on subset {m}, repeat {r} are not finite: the training diverged. "
        raise DivergenceError(what + "Lower the step size, also for the attributed model.")
    return values
