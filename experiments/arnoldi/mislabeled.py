"""Relabelled MNIST images found by self-influence (table 1), and what dropping them does to test accuracy.

A CNN of 8,314 parameters, 3,000 images of which 20% were given another label, 10 epochs of SGD, one checkpoint each.
Every method scores all training images; fit and scoring are timed in CPU seconds on one thread. Then the networks are
trained again without the images that rank highest.

    python -m experiments.arnoldi.mislabeled                   # three seeds, about half an hour of one core
    python -m experiments.arnoldi.mislabeled --redraw
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.problems import cnn, folder
from torch import Tensor, nn

import wherefrom
from experiments.arnoldi.problems import OUT
from wherefrom.tools.evaluate import SGDRecipe, flip_labels, mislabeled_curve, train_small

IMAGES, NOISE, EPOCHS, RETRAINED = 3000, 0.2, 10, 5
RECIPE = SGDRecipe(lr=0.03, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=EPOCHS)
SHARES = (0.05, 0.1, 0.2, 0.3)
DROPPED_BY = ("CG", "EKFAC", "TracIn, 10 checkpoints", "Arnoldi, p = 100", "random")


@dataclass(frozen=True)
class Case:
    """A trained network, its run and its data."""

    model: nn.Module
    trajectory: wherefrom.Trajectory
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flipped: Tensor
    note: str


def load(seed: int) -> Case:
    """Other images, labels and weights for each seed."""
    with np.load(folder("WHEREFROM_DATA") / "mnist.npz") as data:
        x, xt = (torch.as_tensor(data[k]).unsqueeze(1).float() / 255 for k in ("x_train", "x_test"))
        y, yt = (torch.as_tensor(data[k]).long() for k in ("y_train", "y_test"))
    rng = torch.Generator().manual_seed(seed)
    mine = torch.randperm(len(x), generator=rng)[:IMAGES]
    x, (y, flipped) = x[mine], flip_labels(y[mine], NOISE, 10, seed)
    torch.manual_seed(seed)
    model = cnn()
    optimiser = torch.optim.SGD(model.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay)
    with tempfile.TemporaryDirectory() as kept:
        recorder = wherefrom.Recorder(Path(kept) / "run", model, optimiser, IMAGES // RECIPE.batch_size)
        for _ in range(EPOCHS):
            for rows in torch.randperm(IMAGES, generator=rng).split(RECIPE.batch_size)[: IMAGES // RECIPE.batch_size]:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimiser.step()
        trajectory = recorder.close()
    note = f"seed {seed}: accuracy {accuracy(model, (xt, yt)):.3f} on true test labels, {accuracy(model, (x, y)):.3f} "
    return Case(model.eval(), trajectory, (x, y), (xt, yt), flipped, note + "on the training labels")


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def methods(case: Case, seed: int) -> dict[str, Callable[[], Tensor]]:
    """What makes each method's ranking, fit included."""
    damping = wherefrom.Damping.from_training(RECIPE.lr, RECIPE.steps(IMAGES), RECIPE.momentum)

    def influence(solver: wherefrom.Solver, **options: Any) -> Callable[[], Tensor]:
        fitted = wherefrom.Influence(solver, damping, seed=seed, **options)
        return lambda: fitted.fit(case.model, wherefrom.Classification(), case.train).self_influence()

    def tracin(checkpoints: int) -> Callable[[], Tensor]:
        method = wherefrom.TracIn(case.trajectory, checkpoints=checkpoints)
        return lambda: method.fit(case.model, wherefrom.Classification(), case.train).self_influence()

    found = {
        "CG": influence(wherefrom.CG(wherefrom.Nystrom(), tolerance=0.1)),
        "EKFAC": influence(wherefrom.EKFAC()),
        "LiSSA, r = 10": influence(wherefrom.Neumann(steps=10)),
        "LiSSA, r = 100, last layer": influence(wherefrom.Neumann(steps=100), parameters=r"^7\."),
        "TracIn, last checkpoint": tracin(1),
        "TracIn, 10 checkpoints": tracin(EPOCHS),
    }
    for p in (10, 100):
        found[f"Arnoldi, p = {p}"] = influence(wherefrom.Arnoldi(rank=p, sample=512, fresh=True, positive=True))
        found[f"RandProj, p = {p}"] = influence(wherefrom.RandProj(p))
        found[f"RandSelect, p = {p}"] = influence(wherefrom.RandSelect(p))
    return found


def measure(seed: int) -> dict[str, Any]:
    """All methods on one network, and the accuracies without the images that rank highest."""
    case = load(seed)
    print(case.note, flush=True)
    rows, scores = {}, {"random": torch.rand(IMAGES, generator=torch.Generator().manual_seed(seed))}
    for name, made in methods(case, seed).items():
        begun = time.process_time()
        scores[name] = made()
        seconds, curve = time.process_time() - begun, mislabeled_curve(scores[name], case.flipped, bootstrap=1)
        rows[name] = {"auc": curve.auc, "ap": curve.average_precision, "seconds": seconds}
        print(name, rows[name], flush=True)
    return {"note": case.note, "rows": rows, "dropped": dropped(case, scores, seed)}


def dropped(case: Case, scores: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Test accuracies (RETRAINED,) on everything, without each ranking's top shares, and without the flipped ones."""
    kept = {"everything": torch.ones(IMAGES, dtype=torch.bool), "without the relabelled": ~case.flipped}
    for name in DROPPED_BY:
        order = scores[name].argsort(descending=True, stable=True)
        for share in SHARES:
            mask = torch.ones(IMAGES, dtype=torch.bool)
            mask[order[: round(share * IMAGES)]] = False
            kept[f"{name}|{share}"] = mask
    masks = torch.stack(list(kept.values())).repeat_interleave(RETRAINED, 0)
    seeds = [1000 * (seed + 1) + r for _ in kept for r in range(RETRAINED)]
    models = train_small(cnn, wherefrom.Classification(), case.train, RECIPE, seeds, masks)
    found = torch.tensor([accuracy(m, case.test) for m in models]).view(len(kept), RETRAINED)
    return dict(zip(kept, found.tolist(), strict=True))


def interval(values: Tensor) -> str:
    """A mean with the 95% interval of Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * float(values.std()) / len(values) ** 0.5
    return f"{100 * float(values.mean()):+.2f} ± {100 * half:.2f}"


def summary(results: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = [f"- {r['note']}" for r in results]
    lines += ["", "| method | AUC | AP | CPU s |", "|---|---|---|---|"]
    for name in results[0]["rows"]:
        each = torch.tensor([[r["rows"][name][k] for k in ("auc", "ap", "seconds")] for r in results])
        spread = each.std(0) if len(results) > 1 else torch.zeros(3)
        cells = [f"{100 * float(each[:, k].mean()):.1f} ± {100 * float(spread[k]):.1f}" for k in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} | {float(each[:, 2].mean()):.1f} |")
    base = torch.tensor([r["dropped"]["everything"] for r in results])  # (seeds, RETRAINED)
    lines += ["", f"Test accuracy on everything: {100 * float(base.mean()):.2f}. Change in points, paired by seed:", ""]
    lines += ["| dropped by | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |", "|---" * (len(SHARES) + 1) + "|"]
    for name in DROPPED_BY:
        gains = [torch.tensor([r["dropped"][f"{name}|{s}"] for r in results]) - base for s in SHARES]
        lines.append(f"| {name} | " + " | ".join(interval(g.flatten()) for g in gains) + " |")
    best = torch.tensor([r["dropped"]["without the relabelled"] for r in results]) - base
    return "\n".join([*lines, "", f"Without exactly the relabelled ones: {interval(best.flatten())}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", wherefrom.ConvergenceWarning)  # LiSSA cut short
    file = OUT / "mislabeled.json"
    if not args.redraw:
        OUT.mkdir(exist_ok=True)
        results = []
        for seed in range(args.seeds):
            results.append(measure(seed))
            file.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
