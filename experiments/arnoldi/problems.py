"""The small network of Schioppa et al. 2022, section 5.1: 3,206 parameters, smooth, trained on relabelled MNIST.

Training minimises the mean loss + L2 / 2 |theta|^2 by L-BFGS on all the data in float64, so that the objective's
Hessian is H + L2 I: the regulariser is the damping. ``WHEREFROM_DATA`` names the folder with ``mnist.npz``; what is
trained here is kept in ``out``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.problems import folder
from torch import Tensor, nn

import wherefrom
from wherefrom.solvers.spectral import SpectralInverse
from wherefrom.tools.evaluate import flip_labels

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
IMAGES = 600
NOISE = 0.2
L2 = 5e-3
EVALUATIONS = 3000  # of the objective, at most


@dataclass(frozen=True)
class Case:
    """A trained network and its data, float64."""

    model: nn.Module
    x: Tensor  # (N, 1, 28, 28)
    y: Tensor  # (N,), a fifth of them wrong
    flipped: Tensor  # (N,) True where the label was changed
    note: str

    def problem(self) -> wherefrom.Problem:
        """For a curvature of one's own."""
        return wherefrom.Problem(self.model, wherefrom.Classification(), (self.x, self.y), progress=False)


def network() -> nn.Sequential:
    """Two strided convolutions with tanh and a linear layer, for 28 x 28 images."""
    first = nn.Conv2d(1, 8, 7, stride=4, padding=3)  # to 7 x 7
    second = nn.Conv2d(8, 12, 3, stride=2, padding=1)  # to 4 x 4
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(192, 10))


def load(seed: int) -> Case:
    """The images from 600 x seed on, other relabelled ones and other initial weights for each seed."""
    with np.load(folder("WHEREFROM_DATA") / "mnist.npz") as data:
        x, xt = (torch.as_tensor(data[k]).unsqueeze(1).double() / 255 for k in ("x_train", "x_test"))
        y, yt = (torch.as_tensor(data[k]).long() for k in ("y_train", "y_test"))
    mine = slice(IMAGES * seed, IMAGES * (seed + 1))
    x, (y, flipped) = x[mine], flip_labels(y[mine], NOISE, 10, seed)
    file = OUT / f"network-{seed}.pt"
    if not file.exists():
        OUT.mkdir(exist_ok=True)
        torch.save(train(x, y, seed), file)
    kept = torch.load(file, weights_only=True)
    model = network().double()
    model.load_state_dict(kept["state"])
    with torch.no_grad():
        wrong, _ = flip_labels(yt, NOISE, 10, seed + 1000)
        found, own = model(xt).argmax(1), model(x).argmax(1)
    accuracy = [float((found == t).double().mean()) for t in (yt, wrong)]
    note = (
        f"seed {seed}: gradient norm {kept['slope']:.1e} after {kept['evaluations']} evaluations, "
        f"{kept['seconds']:.0f} CPU s; accuracy {accuracy[0]:.3f} on true, {accuracy[1]:.3f} on relabelled test "
        f"images, {float((own == y).double().mean()):.3f} on the training labels"
    )
    return Case(model.eval(), x, y, flipped, note)


def train(x: Tensor, y: Tensor, seed: int) -> dict[str, object]:
    """L-BFGS until the gradient's largest entry is below 1e-9 or the evaluations are spent."""
    begun = time.process_time()
    torch.manual_seed(seed)
    model = network().double()
    parameters = list(model.parameters())
    lbfgs = torch.optim.LBFGS(
        parameters,
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )
    evaluations, slope = 0, float("inf")

    def objective() -> Tensor:
        nonlocal evaluations, slope
        lbfgs.zero_grad()
        value = nn.functional.cross_entropy(model(x), y) + L2 / 2 * sum(p.square().sum() for p in parameters)
        value.backward()
        evaluations += 1
        slope = float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())
        return value

    lbfgs.step(objective)
    objective()
    seconds = time.process_time() - begun
    return {"state": model.state_dict(), "slope": slope, "evaluations": evaluations, "seconds": seconds}


def exact(curvature: wherefrom.Hessian, seed: int) -> tuple[SpectralInverse, float]:
    """The dense inverse of H + L2 I, and the CPU seconds that forming and decomposing H took."""
    file, solver = OUT / f"eigenpairs-{seed}.pt", wherefrom.Exact(form="primal")
    if not file.exists():
        begun = time.process_time()
        fitted = solver.fit(curvature, L2)
        assert isinstance(fitted, SpectralInverse)
        state = {"values": fitted.values, "vectors": fitted.vectors}
        torch.save({"state": state, "seconds": time.process_time() - begun}, file)
    kept = torch.load(file, weights_only=True)
    damping = wherefrom.Damping.of(L2).resolve(curvature)
    return SpectralInverse(curvature, damping, **kept["state"]), kept["seconds"]


def style() -> None:
    """Small SVG figures whose bytes depend on the numbers alone."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "arnoldi",
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
