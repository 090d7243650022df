"""whence on the benchmark problems, as `harness.run` calls it; the package is imported when a function runs."""

from __future__ import annotations

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

    import whence

    p = problems.load(problem)
    task = whence.Classification() if p.kind == "classification" else whence.Regression()
    amount = whence.Damping.relative(0.1) if damping is None else damping
    model = p.model(seed)
    influence = whence.Influence(solver=whence.EKFAC(labels=labels), damping=amount, batch_size=batch_size)
    with phase("fit"):
        influence = influence.fit(model, task, (p.x, p.y))
    with phase("scores"):
        scores = influence.score((p.xq, p.yq), certify=False)
        values = torch.as_tensor(scores.values).float().cpu().numpy()
    return {"scores": values.astype(np.float32), "version": getattr(whence, "__version__", "")}


def attribute(
    problem: str, solver: str, damping: float, kind: str = "absolute", seed: int = 0, batch_size: int | None = None
) -> dict[str, Any]:
    """`whence.attribute` with a solver of `SOLVERS`; ``kind`` is that of a `whence.Damping`.

    Returns:
        ``scores``: (Q, N) float32; ``residual``: (Q,), the measured relative residual of each query's solve.
    """
    import torch

    import whence

    p = problems.load(problem)
    task = whence.Classification() if p.kind == "classification" else whence.Regression()
    options = {} if batch_size is None else {"batch_size": batch_size}
    with phase("all"):
        scores = whence.attribute(
            p.model(seed),
            task,
            train=(p.x, p.y),
            queries=(p.xq, p.yq),
            solver=build(solver, damping),
            damping=whence.Damping(damping, kind),
            seed=seed,
            **options,
        )
    found = {"scores": torch.as_tensor(scores.values).float().cpu().numpy()}
    found["steps"] = np.array(scores.provenance["steps"])
    residual = getattr(scores, "residual", None)
    if residual is not None:
        found["residual"] = torch.as_tensor(residual).float().cpu().numpy()
    return found


SOLVERS = ("auto", "exact", "dual", "nystrom", "cg10", "astra", "astra3", "ekfac", "kfac", "dot", "lissa")


def build(name: str, damping: float) -> Any:
    """A solver of the tables by its short name.

    ``astra3`` has the step of the paper's table 3, 0.1 x damping. ``cg``, ``block``, ``ekfac``, ``dual``, ``nystrom``
    are conjugate gradients to a residual if one is given, as in ``nystrom@0.1``, without and with that preconditioner.
    """
    import whence

    first, _, tolerance = name.partition("@")
    inner = {
        "cg": whence.Identity,
        "block": whence.Identity,
        "ekfac": whence.EKFAC,
        "dual": whence.Dual,
        "nystrom": whence.Nystrom,
    }
    if tolerance or first in ("dual", "nystrom"):
        return whence.CG(inner[first](), tolerance=float(tolerance or 1e-4), block=first == "block")
    if name == "auto":
        return whence.Auto()
    if name == "exact":
        return whence.Exact()
    if name == "lissa":
        return whence.Neumann()
    if name == "cg10":
        return whence.CG(preconditioner=whence.EKFAC(), steps=10)
    if name == "astra":
        return whence.ASTRA()
    if name == "astra3":
        return whence.ASTRA(step=0.1 * damping)
    if name == "ekfac":
        return whence.EKFAC()
    if name == "kfac":
        return whence.KFAC()
    if name == "dot":
        return whence.Identity()
    raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}.")
