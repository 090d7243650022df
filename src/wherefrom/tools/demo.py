"""A target to try the commands on: handwritten digits with wrong labels among them, and a small network.

It needs no download, and the network is trained in two seconds on one core:

    wherefrom explain wherefrom.tools.demo:problem --out digits

``wherefrom demo`` runs several commands on it, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import wherefrom
from wherefrom.errors import MissingExtraError
from wherefrom.tools.evaluate import SGDRecipe, flip_labels, retrain_small, train_small
from wherefrom.tools.loading import Target
from wherefrom.tools.report import Example

RECIPE = SGDRecipe(lr=3e-2, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=20)
POOL = 1300  # of the 1,797 digits; the others are never trained on
EXAMPLES, QUERIES = 1000, 40
REPEATS = 2  # models for each random subset, where the scores are compared with retraining


@dataclass(frozen=True)
class Digits:
    """N training digits, some with a wrong label, and held-out ones.

    Args:
        train: pixels (N, 64) in [0, 1], and labels (N,) as trained.
        labels: (N,), the right ones.
        flipped: (N,) bool, which of the labels are wrong.
        held_out: pixels and labels of digits that are not trained on.
    """

    train: tuple[Tensor, Tensor]
    labels: Tensor
    flipped: Tensor
    held_out: tuple[Tensor, Tensor]


def problem() -> Target:
    """Return the trained network with its digits, for ``wherefrom.tools.demo:problem``."""
    return make_target(load_digits())


def load_digits(examples: int = EXAMPLES, seed: int = 0) -> Digits:
    """Load scikit-learn's digits, shuffled, and give a tenth of the training digits a wrong label.

    Args:
        examples: digits to train on, at most 1,300.
        seed: of the order and of the wrong labels.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        advice = 'Run: pip install "wherefrom[demo]"'
        raise MissingExtraError(f"The demo needs scikit-learn, which is not installed. {advice}") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(pixels).float()[order] / 16, torch.from_numpy(labels).long()[order]
    noisy, flipped = flip_labels(y[:examples], 0.1, 10, seed)
    return Digits((x[:examples], noisy), y[:examples], flipped, (x[POOL:], y[POOL:]))


def make_target(digits: Digits, seed: int = 0) -> Target:
    """Train the network and return it with all that the commands can use.

    Args:
        digits: what it is trained on, and asked about.
        seed: of the training; training again for a comparison takes another.
    """
    task = wherefrom.Classification()
    with use_one_thread():
        model = train_small(build, task, digits.train, RECIPE, seed)[0]
    queries = (digits.held_out[0][:QUERIES], digits.held_out[1][:QUERIES])
    retrain = partial(retrain_small, build, task, digits.train, queries, repeats=REPEATS, recipe=RECIPE, seed=seed + 2)
    examples, wrong = len(digits.labels), int(digits.flipped.sum())
    lead = (
        f"A small network was trained on {examples:,} handwritten digits, {wrong} of which were given a wrong label on "
        "purpose. For each digit that it had not seen, these are the training examples behind its answer."
    )
    page = {"lead": lead, "measurement": "the negative margin of the right digit (log-odds against it)"}
    return Target(model, task, digits.train, queries, retrain=retrain, show=make_show(digits, model), page=page)


def build() -> nn.Module:
    """Return the untrained network."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def damping_of(examples: int) -> wherefrom.Damping:
    """Return the damping that stopping the training where it stopped implies; no sweep."""
    return wherefrom.Damping.from_training(RECIPE.lr, RECIPE.steps(examples), RECIPE.momentum)


def make_show(digits: Digits, model: nn.Module) -> Callable[[Any, int], Example]:
    """Return a function that shows a digit: its picture, its label, and what is wrong with its label or its answer."""
    probabilities = predict(model, digits.held_out[0][:QUERIES])

    def show(data: Any, number: int) -> Example:
        pixels, label = 1 - data[0][number].view(8, 8), int(data[1][number])
        if data is digits.train:
            is_flipped = bool(digits.flipped[number])
            mark = f"really {int(digits.labels[number])}" if is_flipped else None
            return Example(f"label {label}", image=pixels, mark=mark)

        guess, probability = int(probabilities[number].argmax()), probabilities[number, label]
        mark = None if guess == label else f"taken for {guess}"
        detail = f"{float(probability):.1%} for {label}, loss {-float(probability.log()):.2g}"
        return Example(f"A {label}", image=pixels, mark=mark, detail=detail)

    return show


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Return the probabilities of the classes, (B, 10)."""
    return model(x).softmax(1)


def measure_accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of right predictions."""
    x, y = data
    return float((predict(model, x).argmax(1) == y).float().mean())


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Work on one thread in the block; the setting comes back as it was.

    Work this small is fastest so, much so if something else runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
