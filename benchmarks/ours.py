"""wherefrom on the benchmark problems, as `harness.run` calls it; the package is imported when a function runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import problems
from benchmarks.harness import phase


def ekfac(
    problem: str, labels: str = "true", damping: float | None = None, seed: int = 0, batch_size: int = 512
) -> dict[str, Any]:
    """EKFAC fit and scores; ``damping`` None is 0.1 x the mean eigenvalue of each layer. Phases ``fit`` and ``scores``.

    Returns:
        ``scores``: (Q, N) float32.
    """
    import torch

    import wherefrom

    p = problems.load(problem)
    task = wherefrom.Classification() if p.kind == "classification" else wherefrom.Regression()
    amount = wherefrom.Damping.relative(0.1) if damping is None else damping
    model = p.model(seed)
    influence = wherefrom.Influence(solver=wherefrom.EKFAC(labels=labels), damping=amount, batch_size=batch_size)
    with phase("fit"):
        influence = influence.fit(model, task, (p.x, p.y))
    with phase("scores"):
        scores = influence.score((p.xq, p.yq), certify=False)
        values = torch.as_tensor(scores.values).float().cpu().numpy()
    return {"scores": values.astype(np.float32), "version": getattr(wherefrom, "__version__", "")}


def attribute(
    problem: str,
    solver: str,
    damping: float = 0.0,
    kind: str = "absolute",
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Any method of `SOLVERS` or `OVER_TRAINING`; ``kind`` is that of a `wherefrom.Damping`.

    ``seed`` is that of the model; `TRAKS` take several models at once.

    Returns:
        ``scores``: (Q, N) float32; ``residual``: (Q,), the measured relative residual of each query's solve.
    """
    import torch

    import wherefrom

    p = problems.load(problem)
    task = wherefrom.Classification() if p.kind == "classification" else wherefrom.Regression()
    model: Any = p.model(seed) if isinstance(seed, int) else [p.model(s) for s in seed]
    if solver in TRAKS:
        size, regularisation = TRAKS[solver]
        method = wherefrom.TRAK(size=size, regularisation=regularisation)
    elif solver in OVER_TRAINING:
        method = over_training(solver, p, seed)
    else:
        amount = wherefrom.Damping(damping, kind)
        method = wherefrom.Influence(build(solver, damping), amount, batch_size=batch_size, seed=seed)
    with phase("all"):
        scores = method.fit(model, task, (p.x, p.y)).score((p.xq, p.yq))
    found = {"scores": torch.as_tensor(scores.values).float().cpu().numpy()}
    if "steps" in scores.provenance:
        found["steps"] = np.array(scores.provenance["steps"])
    if scores.residual is not None:
        found["residual"] = torch.as_tensor(scores.residual).float().cpu().numpy()
    return found


# k, and the ridge over the mean diagonal: None is that of the paper, 0 where k is small beside N
TRAKS = {"trak512": (512, None), "trak4096": (4096, None), "trak512-ridge": (512, 1.0), "trak4096-ridge": (4096, 1.0)}
OVER_TRAINING = (
    "tracin",
    "source",
    "fast-source",
    "astra-source",
    "cg-source",
    "cg-source1",
    "cg-source6",
    "random",
    "cosine",
    *TRAKS,
)


def over_training(name: str, p: problems.Problem, seed: int) -> Any:
    """A method that takes no damping of ours, by its short name: those of a recorded run, and baselines."""
    import wherefrom

    run = p.trajectory(seed)
    methods = {
        "tracin": lambda: wherefrom.TracIn(run),
        "cosine": lambda: wherefrom.TracIn(run, checkpoints=1, cosine=True),
        "source": lambda: wherefrom.SOURCE(run),
        "fast-source": lambda: wherefrom.SOURCE(run, average="weights"),
        "astra-source": lambda: wherefrom.SOURCE(run, solver=wherefrom.ASTRA()),
        "cg-source": lambda: wherefrom.SOURCE(run, solver=wherefrom.CG(wherefrom.Nystrom(), tolerance=0.01)),
        "cg-source1": lambda: wherefrom.SOURCE(
            run, segments=1, solver=wherefrom.CG(wherefrom.Nystrom(), tolerance=0.05)
        ),
        "cg-source6": lambda: wherefrom.SOURCE(
            run, segments=6, solver=wherefrom.CG(wherefrom.Nystrom(), tolerance=0.05)
        ),
        "random": lambda: wherefrom.Random(seed),
    }
    return methods[name]()


SOLVERS = ("auto", "exact", "dual", "nystrom", "cg10", "astra", "astra3", "ekfac", "kfac", "dot", "lissa")


def build(name: str, damping: float) -> Any:
    """A solver of the tables by its short name.

    ``astra3`` has the step of the paper's table 3, 0.1 x damping. ``cg``, ``block``, ``ekfac``, ``dual``, ``nystrom``
    are conjugate gradients to a residual if one is given, as in ``nystrom@0.1``, without and with that preconditioner.
    """
    import wherefrom

    first, _, tolerance = name.partition("@")
    inner = {
        "cg": wherefrom.Identity,
        "block": wherefrom.Identity,
        "ekfac": wherefrom.EKFAC,
        "dual": wherefrom.Dual,
        "nystrom": wherefrom.Nystrom,
    }
    if tolerance or first in ("dual", "nystrom"):
        return wherefrom.CG(inner[first](), tolerance=float(tolerance or 1e-4), block=first == "block")
    if name == "auto":
        return wherefrom.Auto()
    if name == "exact":
        return wherefrom.Exact()
    if name == "lissa":
        return wherefrom.Neumann()
    if name == "cg10":
        return wherefrom.CG(preconditioner=wherefrom.EKFAC(), steps=10)
    if name == "astra":
        return wherefrom.ASTRA()
    if name == "astra3":
        return wherefrom.ASTRA(step=0.1 * damping)
    if name == "ekfac":
        return wherefrom.EKFAC()
    if name == "kfac":
        return wherefrom.KFAC()
    if name == "dot":
        return wherefrom.Identity()
    raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}.")
