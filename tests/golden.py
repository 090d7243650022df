"""Scores of every solver, curvature and method on the tiny problems, frozen in ``golden.npz``.

Weights and data are frozen with them, as what a seed makes differs by 1e-7 between processors. The file was made once,
before the changes that it guards. Make it again only when a number is meant to change, and say in the commit which and
why:

    .venv/bin/python tests/golden.py
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from problems import NAMES, TinyProblem, problem
from wherefrom import (
    ASTRA,
    CG,
    EKFAC,
    GGN,
    KFAC,
    SOURCE,
    TRAK,
    Arnoldi,
    DataInf,
    Dual,
    EmpiricalFisher,
    Exact,
    GradCos,
    Hessian,
    HyperINF,
    Identity,
    Influence,
    Neumann,
    Nystrom,
    RandProj,
    RandSelect,
    Recorder,
    TracIn,
)

FILE = Path(__file__).parent / "golden.npz"
DAMPING = 0.1
TOLERANCE = 1e-12  # relative to the largest score of the matrix

# One entry per solver, each with the settings that make its answer well determined: an iteration that stops at a loose
# tolerance would freeze where it happened to stop, and one that goes on for long gathers the rounding of its processor.
SOLVERS = {
    "exact primal": Exact(form="primal"),
    "exact dual": Exact(form="dual"),
    "dual pruned": Dual(drop=0.02),
    "cg": CG(tolerance=1e-14, steps=400),
    "cg block": CG(tolerance=1e-13, steps=100, block=True),
    "cg ekfac": CG(EKFAC(), tolerance=None, steps=2),
    "ekfac": EKFAC(),
    "ekfac true": EKFAC(labels="true"),
    "kfac": KFAC(),
    "datainf": DataInf(),
    "nystrom": Nystrom(rank=5),
    "arnoldi": Arnoldi(rank=4, steps=20),
    "neumann": Neumann(steps=30),
    "astra": ASTRA(steps=30),
    "projection": RandProj(16),
    "selection": RandSelect(16),
    "identity": Identity(),
    "auto": "auto",
}
CURVATURES = {
    "ggn jvp": partial(GGN, product="jvp"),
    "hessian": Hessian,
    "fisher": EmpiricalFisher,
}


def cases(name: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What is computed on one problem: a label, and the scores (Q, N)."""
    p = thawed(name)
    for label, solver in SOLVERS.items():
        yield label, partial(influence, p, solver)
    yield "hyperinf", partial(influence, p, HyperINF(), EmpiricalFisher)
    for label, curvature in CURVATURES.items():
        damping = 5.0 if curvature is Hessian else DAMPING
        yield label, partial(influence, p, Exact() if label != "ggn jvp" else CG(tolerance=1e-14), curvature, damping)
    yield "self-influence", partial(self_influence, p)
    if name in ("mlp", "mlp_regression", "tied_embedding"):
        yield "trak", lambda: TRAK(size=6, regularisation=0.01).fit(p.model, p.task, p.train).score(p.queries).values
        yield "gradcos", lambda: GradCos().fit(p.model, p.task, p.train).score(p.queries).values
        for label, method in {"tracin": TracIn, "source": SOURCE}.items():
            yield label, partial(trained, p, method)


def thawed(name: str) -> TinyProblem:
    """The problem with the weights and data that were frozen; its dense answers are of no use then."""
    p, frozen = problem(name), np.load(FILE)
    state = {key: torch.from_numpy(frozen[f"{name}|{key}"]) for key in p.model.state_dict()}
    p.model.load_state_dict(state)
    p.train = tuple(torch.from_numpy(frozen[f"{name}|train {i}"]) for i in range(len(p.train)))
    p.queries = tuple(torch.from_numpy(frozen[f"{name}|queries {i}"]) for i in range(len(p.queries)))
    return p


def influence(p: TinyProblem, solver: object, curvature: object = GGN, damping: float = DAMPING) -> Tensor:
    """Scores by an inverse."""
    method = Influence(solver, damping, curvature, batch_size=4, progress=False)  # type: ignore[arg-type]
    return method.fit(p.model, p.task, p.train).score(p.queries, certify=False).values


def self_influence(p: TinyProblem) -> Tensor:
    """Self-influence of the training examples by EKFAC, (1, N)."""
    return Influence(EKFAC(), DAMPING, batch_size=4).fit(p.model, p.task, p.train).self_influence().unsqueeze(0)


def trained(p: TinyProblem, method: Callable[..., object]) -> Tensor:
    """Scores by a method over training, which is a few steps of gradient descent from the problem's weights."""
    with tempfile.TemporaryDirectory() as folder:
        optimiser = torch.optim.SGD(p.model.parameters(), lr=0.02)
        recorder = Recorder(folder, p.model, optimiser, every=2)
        for start in range(6):
            index = torch.arange(start, start + 3)
            recorder.saw(index)
            optimiser.zero_grad()
            batch = tuple(t[index] for t in p.train)
            p.loss(p.model(batch[0]), batch).mean().backward()
            optimiser.step()
        trajectory = recorder.close()
        return method(trajectory=trajectory).fit(p.model, p.task, p.train).score(p.queries).values  # type: ignore[attr-defined]


def freeze() -> None:
    """Write weights and data, unless they are there already, and all scores."""
    frozen: dict[str, np.ndarray] = dict(np.load(FILE)) if FILE.exists() else {}
    for name in NAMES:
        p = problem(name)
        parts = p.model.state_dict() | {f"train {i}": t for i, t in enumerate(p.train)}
        for key, t in (parts | {f"queries {i}": t for i, t in enumerate(p.queries)}).items():
            frozen.setdefault(f"{name}|{key}", t.numpy())
    np.savez_compressed(FILE, **frozen)
    scores = {f"{name}/{label}": make().numpy() for name in NAMES for label, make in cases(name)}
    np.savez_compressed(FILE, **{key: t for key, t in frozen.items() if "|" in key}, **scores)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    freeze()
