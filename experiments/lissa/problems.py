"""The problems of the LiSSA experiments: digits and concrete of `benchmarks.problems`, and a small CNN on MNIST.

The CNN (8,314 parameters, three strided convolutions with GELU) is the network of the benchmark mnist-cnn, trained by
its recipe on MNIST's first 2,000 training images; here one model is trained, in seconds, and kept in ``out``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import problems
from torch import Tensor, nn

import wherefrom
from wherefrom.tools.evaluate import SGDRecipe, train_small

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
NAMES = ("digits", "concrete", "cnn")


@dataclass(frozen=True)
class Case:
    """A trained model, its data and 100 queries; float32."""

    name: str
    model: nn.Module
    task: Any
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    damping: float  # implied by training

    def fit(self, solver: wherefrom.Solver, damping: float | wherefrom.Damping) -> wherefrom.FittedInfluence:
        """The solver fitted with the Gauss-Newton matrix."""
        influence = wherefrom.Influence(solver=solver, damping=damping, progress=False)
        return influence.fit(self.model, self.task, self.train)


def load(name: str) -> Case:
    """A problem by name: digits, concrete or cnn."""
    if name == "cnn":
        return _cnn()
    p = problems.load(name)
    task = wherefrom.Classification() if p.kind == "classification" else wherefrom.Regression()
    return Case(name, p.model(), task, (p.x, p.y), (p.xq, p.yq), p.damping)


def _cnn() -> Case:
    with np.load(problems.folder("WHEREFROM_DATA") / "mnist.npz") as data:
        x, xq = (torch.as_tensor(data[k]).unsqueeze(1).float() / 255 for k in ("x_train", "x_test"))
        y, yq = (torch.as_tensor(data[k]).long() for k in ("y_train", "y_test"))
    x, y = x[:2000], y[:2000]
    task = wherefrom.Classification()
    recipe = SGDRecipe(lr=0.03, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=30)
    file = OUT / "cnn.pt"
    if not file.exists():
        OUT.mkdir(exist_ok=True)
        torch.save(train_small(problems.cnn, task, (x, y), recipe, 0)[0].state_dict(), file)
    model = problems.cnn()
    model.load_state_dict(torch.load(file, weights_only=True))
    damping = wherefrom.Damping.from_training(recipe.lr, recipe.steps(len(x)), recipe.momentum).value
    return Case("cnn", model.eval(), task, (x, y), (xq[:100], yq[:100]), damping)


def style() -> None:
    """Small SVG figures whose bytes depend on the numbers alone."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "lissa",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "legend.frameon": False,
        }
    )


def save(figure: Any, name: str) -> None:
    """The committed SVG, and a PNG of the same in ``out`` to look at."""
    for axes in figure.axes:
        axes.minorticks_off()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / f"{name}.png", dpi=110, bbox_inches="tight")
