"""The benchmark problems: a trained model, its training data, 100 queries, and retraining targets where there are any.

Data folders come from the environment: WHEREFROM_DATA (``concrete.npz``, ``mnist.npz``) and WHEREFROM_GROUNDTRUTH
(``digits.npz``, ``digits_models.pt``, the same for concrete). What is trained here is kept in ``benchmarks/cache``; the
600 retrainings of mnist-cnn take a quarter of an hour of one core, once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import CACHE

if TYPE_CHECKING:
    from wherefrom.tools.evaluate import SGDRecipe
    from wherefrom.training.trajectory import Trajectory

NAMES = ("digits", "concrete", "mnist")
RETRAINED = ("digits", "concrete", "mnist-cnn")  # those with retraining targets


@dataclass(frozen=True)
class Problem:
    """A trained model and what is asked of it; tensors are float32, labels int64."""

    name: str
    kind: str  # "classification" (cross-entropy) or "regression" (squared error)
    sizes: tuple[int, ...]  # layer widths of a multilayer perceptron, input first; empty: the network of `cnn`
    x: Tensor  # (N, I); images are (N, 1, 28, 28)
    y: Tensor  # (N,)
    xq: Tensor  # (Q, I)
    yq: Tensor  # (Q,)
    states: tuple[Mapping[str, Tensor], ...]  # one trained model per seed
    damping: float  # implied by training: 3 / (effective learning rate * steps)
    masks: np.ndarray | None = None  # (M, N) True where subset m holds example n
    targets: np.ndarray | None = None  # (M, R, Q) measurement after retraining on the subset
    measured: Literal["measurement", "loss"] = "measurement"  # which function of the task the targets are
    note: str = ""  # how well the models do
    checkpoints: tuple[
        tuple[Mapping[str, Tensor], ...], ...
    ] = ()  # of each seed's training, evenly spaced, the last last
    recipe: Mapping[str, float] | None = None  # lr, momentum, weight_decay, steps of that training

    def model(self, seed: int = 0) -> nn.Sequential:
        """The trained model of one seed, in eval mode."""
        model = mlp(self.sizes) if self.sizes else cnn()
        model.load_state_dict(self.states[seed])
        return model.eval()

    def trajectory(self, seed: int = 0) -> Trajectory:
        """The training of one seed, from its checkpoints."""
        import wherefrom

        if not self.checkpoints or self.recipe is None:
            raise ValueError(f"{self.name} has no checkpoints.")
        states, steps = self.checkpoints[seed], int(self.recipe["steps"])
        at = [round(steps * (i + 1) / len(states)) for i in range(len(states))]
        settings = {k: v for k, v in self.recipe.items() if k != "steps"}
        return wherefrom.Trajectory.of_sgd(list(zip(at, states, strict=True)), steps=steps, **settings)


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these widths with ReLU in between."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Three strided convolutions with GELU and a linear layer, 8,314 parameters, for 28 x 28 images."""
    layers: list[nn.Module] = []
    for i, o, width in ((1, 8, 5), (8, 16, 5), (16, 16, 3)):
        layers += [nn.Conv2d(i, o, width, stride=2, padding=width // 2), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def load(name: str) -> Problem:
    """Load a problem by name: digits, concrete, mnist or mnist-cnn."""
    if name == "digits":
        return _digits()
    if name == "concrete":
        return _concrete()
    if name == "mnist":
        return _mnist()
    if name == "mnist-cnn":
        return _mnist_cnn()
    raise ValueError(f"problem must be one of {', '.join(dict.fromkeys(NAMES + RETRAINED))}, got {name!r}.")


def folder(variable: str) -> Path:
    """The folder that an environment variable names."""
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        raise SystemExit(f"Set {variable} to the folder with the benchmark data (it is {value!r}).")
    return Path(value)


def _digits() -> Problem:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.as_tensor(bunch.data[order] / 16, dtype=torch.float32)
    y = torch.as_tensor(bunch.target[order], dtype=torch.int64)
    return _retrained(
        "digits", "classification", (64, 128, 64, 10), x[:1600], y[:1600], x[1600:1700], y[1600:1700], 0.01
    )


def _concrete() -> Problem:
    with np.load(folder("WHEREFROM_DATA") / "concrete.npz") as data:
        x, y, xq, yq = (torch.as_tensor(data[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    return _retrained("concrete", "regression", (8, 128, 128, 128, 1), x, y, xq[:100], yq[:100], 0.018)


def _retrained(
    name: str, kind: str, sizes: tuple[int, ...], x: Tensor, y: Tensor, xq: Tensor, yq: Tensor, damping: float
) -> Problem:
    """A problem with models and targets in the ground-truth folder."""
    home = folder("WHEREFROM_GROUNDTRUTH")
    with np.load(home / f"{name}.npz") as truth:
        masks = np.unpackbits(truth["masks"], axis=1, count=int(truth["n"])).astype(bool)
        targets = truth["targets"]
    models = torch.load(home / f"{name}_models.pt", map_location="cpu", weights_only=True)
    states = tuple(_in_order(s, sizes) for s in models["final"])
    kept = tuple(tuple(_in_order(s, sizes) for s in one) for one in models["checkpoints"])
    found = models["settings"]
    recipe = {
        "lr": found["lr"],
        "momentum": 0.9,
        "weight_decay": found["wd"],
        "steps": found["epochs"] * (len(x) // found["bs"]),
    }
    return Problem(name, kind, sizes, x, y, xq, yq, states, damping, masks, targets, checkpoints=kept, recipe=recipe)


def _in_order(state: Mapping[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Rename ``K.weight``, ``K.bias`` in layer order to the names of `mlp`, whatever numbers the file gave them."""
    numbers = sorted({int(k.split(".")[0]) for k in state})
    if len(numbers) != len(sizes) - 1:
        raise ValueError(f"expected {len(sizes) - 1} linear layers, the state dict has {len(numbers)}.")
    new = {old: str(2 * place) for place, old in enumerate(numbers)}
    return {f"{new[int(k.split('.')[0])]}.{k.split('.')[1]}": v for k, v in state.items()}


def _mnist() -> Problem:
    sizes = (784, 512, 256, 128, 10)
    with np.load(folder("WHEREFROM_DATA") / "mnist.npz") as data:
        x, xq = (torch.as_tensor(data[k]).flatten(1).float() / 255 for k in ("x_train", "x_test"))
        y, yq = (torch.as_tensor(data[k]) for k in ("y_train", "y_test"))
    file = CACHE / "mnist_model.pt"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(train(mlp(sizes), x, y, lr=0.03, weight_decay=1e-3, batch=64, epochs=20), file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return Problem("mnist", "classification", sizes, x, y, xq[:100], yq[:100], (state,), 0.0052)


def _mnist_cnn() -> Problem:
    """MNIST's first 2,000 training images and first 100 test images; the targets are the loss, on 100 random halves."""
    import wherefrom
    from wherefrom.tools.evaluate import SGDRecipe

    with np.load(folder("WHEREFROM_DATA") / "mnist.npz") as data:
        x, xt = (torch.as_tensor(data[k]).unsqueeze(1).float() / 255 for k in ("x_train", "x_test"))
        y, yt = (torch.as_tensor(data[k]) for k in ("y_train", "y_test"))
    x, y = x[:2000], y[:2000]
    recipe = SGDRecipe(lr=0.03, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=30)
    file = CACHE / "mnist_cnn.pt"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(_retrain_halves((x, y), (xt, yt), recipe), file)
    kept = torch.load(file, map_location="cpu", weights_only=True)
    damping = wherefrom.Damping.from_training(recipe.lr, recipe.steps(len(x)), recipe.momentum).value
    full, half = kept["accuracy"], kept["accuracy_halves"]
    note = f"test accuracy {full.mean():.3f} ({full.min():.3f} to {full.max():.3f}), on halves {half.mean():.3f}"
    states, masks, targets = tuple(kept["final"]), kept["masks"].numpy(), kept["targets"].numpy()
    task = "classification"
    return Problem("mnist-cnn", task, (), x, y, xt[:100], yt[:100], states, damping, masks, targets, "loss", note)


def _retrain_halves(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], recipe: SGDRecipe, repeats: int = 6
) -> dict[str, Any]:
    """Five models on all the data, their test accuracy, and the losses of 100 queries after training on 100 halves."""
    import wherefrom
    from wherefrom.tools.evaluate import random_subsets, run_seed, train_small

    task = wherefrom.Classification()
    masks = random_subsets(len(train[0]), 100, 0.5, seed=0)
    seeds = [run_seed(0, m, r) for m in range(len(masks)) for r in range(repeats)]
    models = train_small(cnn, task, train, recipe, range(5))
    halves = train_small(cnn, task, train, recipe, seeds, masks.repeat_interleave(repeats, 0))
    with torch.no_grad():
        outputs = [torch.stack([model(test[0]) for model in some]) for some in (models, halves)]  # (K, T, 10) each
        losses = torch.stack([task.loss(h[:100], (test[0][:100], test[1][:100])) for h in outputs[1]])  # (K, 100)
    accuracy, of_halves = ((h.argmax(2) == test[1]).float().mean(1) for h in outputs)
    return {
        "final": [model.state_dict() for model in models],
        "accuracy": accuracy,
        "accuracy_halves": of_halves,
        "masks": masks,
        "targets": losses.unflatten(0, (-1, repeats)),
    }


def train(
    model: nn.Sequential, x: Tensor, y: Tensor, lr: float, weight_decay: float, batch: int, epochs: int, seed: int = 0
) -> dict[str, Tensor]:
    """Train a classifier by SGD with momentum 0.9 at a constant rate, dropping the last ragged batch."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):  # PyTorch's default initialisation, from our own generator
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=rng)
                layer.bias.uniform_(-bound, bound, generator=rng)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=rng)
        for rows in order[: len(x) // batch * batch].split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return {k: v.detach() for k, v in model.state_dict().items()}
