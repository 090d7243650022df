"""Ground truth by retraining: what the queries' measurements become when the model is trained on subsets of the data.

    targets[m, r, q] = f(q) after training on subset m with repeat r, which has its own initial weights and order

`retrain` calls the user's own training function once per run, `retrain_small` trains many small models at once. A run
is a subset and a seed, and what it gave is known by these: equal runs are trained once, and with a folder a call that
was stopped goes on where it was. Every evaluation that retrains takes a function of the masks alone, such as

    runs = functools.partial(retrain_small, build, task, train, queries, repeats=3, recipe=recipe, seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wherefrom.digest import raw
from wherefrom.errors import ArtefactError, DivergenceError, expected
from wherefrom.model.task import as_task
from wherefrom.progress import track
from wherefrom.store import Shards
from wherefrom.tools.evaluate.finished_runs import KIND, NAME_BYTES, read_runs, write_runs
from wherefrom.tools.evaluate.ingredients import ingredients
from wherefrom.tools.evaluate.small import Data, Run, SGDRecipe, Trainer, check_masks, check_tensors

# Takes runs, yields the numbers of those of a chunk and their measurements, (K, Q).
Compute = Callable[[Sequence[Run]], Iterator[tuple[list[int], Tensor]]]


def random_subsets(n: int, count: int, fraction: float, seed: int) -> Tensor:
    """Draw (count, n) bool: subsets of exactly round(fraction * n) of n examples, uniform without replacement.

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
    """Derive the 32-bit seed of the run on that subset with that repeat; it depends on nothing else."""
    return int(np.random.SeedSequence((seed, subset, repeat)).generate_state(1)[0])


def retrain(
    train: Callable[[Tensor, int], nn.Module],
    measure: Callable[[nn.Module], Tensor],
    masks: object,
    repeats: int,
    seed: int,
    progress: bool | None = None,
    folder: str | Path | None = None,
    paired: bool = False,
) -> Tensor:
    """Compute targets (M, R, Q), on the CPU, by the user's own training function.

    Args:
        train: takes the (n,) indices of a subset and a seed, returns a model trained on it. PyTorch's global random
            state is set to that seed for the call, and put back afterwards.
        measure: takes a trained model, returns f of the queries (Q,), lower is better.
        masks: (M, N) bool, the subsets.
        repeats: R, runs per subset.
        seed: of everything; a run's own seed is ``run_seed(seed, m, r)``.
        progress: show a progress bar; None: on a terminal.
        folder: where to keep what each run gave as soon as it is done. The same call goes on from there; so do calls
            with other subsets, more repeats or another seed. ``train`` and ``measure`` are remembered by their code
            and by what they read; code of installed packages by its name.
        paired: the seed of a run is ``run_seed(seed, 0, r)``, the same for all subsets, so that noise cancels in the
            difference between two of them. For removals; the linear datamodeling score wants independent runs.

    Raises:
        InputError: if masks are not bool or ``measure`` does not return (Q,).
        DivergenceError: if a measurement is not finite.
        ArtefactError: if the folder was filled by other functions; it says what differs.
    """

    def compute(runs: Sequence[Run]) -> Iterator[tuple[list[int], Tensor]]:
        for i, run in enumerate(track(runs, "retraining", enabled=progress)):
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(run.seed)
                model = train(run.mask.nonzero().squeeze(1), run.seed)
            yield [i], _measure(measure, [model])

    cache_key = {"train": train, "measure": measure}
    return _collect_targets(check_masks(masks, None), repeats, seed, paired, folder, cache_key, compute)


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
    folder: str | Path | None = None,
    paired: bool = False,
) -> Tensor:
    """Compute targets (M, R, Q), on the CPU, for a small model, many runs at once.

    Args:
        build: makes a freshly initialised model; it is called under the run's own random state. No dropout.
        task: the loss (its mean over a minibatch is trained) and the measurement.
        train: (x, y), each (N, ...), on the device to train on.
        queries: (xq, yq), each (Q, ...), on the same device.
        masks, repeats, seed, progress: as in `retrain`.
        recipe: the optimiser; give it that of the attributed model.
        chunk: models trained at once, which bounds the memory; None: as many as fit the caches. Changes rounding only.
        folder: as in `retrain`; written after each chunk. It belongs to this model, task, data and recipe.
        paired: as in `retrain`; runs of one repeat also keep the order of the examples that they share.

    Raises:
        InputError: if shapes disagree or a subset is too small for a single step.
        UnsupportedError: if the model cannot be run as stacked copies; use `retrain`.
        DivergenceError: if a measurement is not finite.
        ArtefactError: if the folder was filled for something else; it says what differs.
    """
    checked_task = as_task(task)
    train, queries = check_tensors(train, "train"), check_tensors(queries, "queries")
    trainer = Trainer(build, checked_task, train, recipe)

    def measure(model: nn.Module) -> Tensor:
        return checked_task.measurement(checked_task.outputs(model, queries), queries)

    def compute(runs: Sequence[Run]) -> Iterator[tuple[list[int], Tensor]]:
        for numbers, models in trainer.train_chunks(runs, chunk, progress):
            yield numbers, _measure(measure, models)

    cache_key = {"model": build, "task": task, "train": train, "queries": queries, "recipe": recipe}
    return _collect_targets(check_masks(masks, len(train[0])), repeats, seed, paired, folder, cache_key, compute)


def _collect_targets(
    masks: Tensor,
    repeats: int,
    seed: int,
    paired: bool,
    folder: str | Path | None,
    cache_key: Mapping[str, object],
    compute: Compute,
) -> Tensor:
    """Collect what all runs gave, (M, R, Q): read, or computed once for each that is new, chunk by chunk.

    Args:
        masks, repeats, seed, paired, folder: as in `retrain`.
        cache_key: all that the measurements depend on besides the runs; a folder belongs to one.
        compute: trains and measures.
    """
    if repeats < 1:
        raise expected("repeats", "at least 1", repeats)
    runs = []
    for m, mask in enumerate(masks):
        runs += [Run(mask, run_seed(seed, 0 if paired else m, r)) for r in range(repeats)]
    names = [_name(run) for run in runs]  # equal runs have one name, and are trained once

    pieces, measurements = None, {}
    if folder is not None:
        pieces = Shards(folder, KIND, ingredients(**cache_key))
        measurements = read_runs(pieces)
    new_runs = {name: run for name, run in zip(names, runs, strict=True) if name not in measurements}
    new_names = list(new_runs)
    chunks = compute(list(new_runs.values())) if new_runs else ()
    for numbers, values in chunks:
        chunk = {new_names[i]: of_run for i, of_run in zip(numbers, values, strict=True)}
        for name, of_run in chunk.items():
            if not of_run.isfinite().all():
                raise _diverged(*divmod(names.index(name), repeats))
        # Written before the next chunk begins, so that a killed call loses no more than one.
        if pieces is not None:
            write_runs(pieces, chunk)
        measurements |= chunk

    n_queries = sorted({len(measurements[name]) for name in names})
    if len(n_queries) > 1:
        raise ArtefactError(f"The runs in {folder} have measurements of {n_queries} queries. Give another folder.")
    targets = torch.stack([measurements[name] for name in names])  # (M R, Q)
    return targets.unflatten(0, (-1, repeats))


def _diverged(subset: int, repeat: int) -> DivergenceError:
    return DivergenceError(
        f"The measurements after training on subset {subset}, repeat {repeat} are not finite: the training diverged. "
        "Lower the step size, also for the attributed model."
    )


def _name(run: Run) -> str:
    return hashlib.blake2b(bytes(raw(run.mask)) + str(run.seed).encode(), digest_size=NAME_BYTES).hexdigest()


@torch.no_grad()
def _measure(measure: Callable[[nn.Module], Tensor], models: Sequence[nn.Module]) -> Tensor:
    """Measure each of K models: (K, Q)."""
    values = [measure(model).cpu() for model in models]
    if values[0].ndim != 1:
        raise expected("The measurement", "one number per query, (Q,)", tuple(values[0].shape))
    return torch.stack(values)
