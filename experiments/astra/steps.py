"""ASTRA's step without a sweep against the best of a sweep: residual and LDS after 200 steps of the published schedule.

    python -m experiments.astra.steps digits concrete --seeds 3 --queries 50

``ASTRA()`` takes its step from the spectrum of P^-1 (C + damping), see `wherefrom.solvers.neumann`. Here it is
multiplied by factors from 1/30 to 30, and set to the paper's 0.1 x damping. Each run is measured twice on all the
data: at its last iterate, and at the mean of its iterates from the second half (Polyak & Juditsky 1992). The first
model is solved on all the data at each step as well: what is left without sampling noise is the part that has not
converged.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import wherefrom
from experiments.astra import setting
from experiments.astra.setting import Setting
from wherefrom.errors import DivergenceError
from wherefrom.persample.directions import Directions
from wherefrom.solvers.base import Inverse
from wherefrom.solvers.neumann import ASTRA

HERE = Path(__file__).resolve().parent
FACTORS = (1 / 30, 0.1, 1 / 3, 0.5, 1.0, 2.0, 3.0, 10.0, 30.0)
PAPER = "0.1 damping"
HEADER = (
    "| step / chosen | step | residual, median (worst) | LDS | averaged: residual, median (worst) | LDS | diverged |\n"
    "|---|---|---|---|---|---|---|"
)


def solve(s: Setting, solver: ASTRA) -> dict[str, Any]:
    """Residuals and LDS of the last iterate, and of the mean of the second half; ``diverged`` with nothing else."""
    inverse: Inverse = solver.fit(s.curvature, s.damping)
    steps, mean, held, x = inverse.plan.steps, s.b.zeros_like(), 0, s.b.zeros_like()  # type: ignore[attr-defined]
    start = time.process_time()
    try:
        for k, (x, _) in enumerate(inverse.iterates(s.b), 1):  # type: ignore[attr-defined]
            if 2 * k > steps:
                held += 1
                mean = x.clone() if held == 1 else mean.scale(1 - 1 / held).axpy(1 / held, x)
    except DivergenceError:
        return {"diverged": True}
    cpu = time.process_time() - start
    return {"diverged": False, "cpu_s": cpu, "last": measured(s, x), "mean": measured(s, mean)}


def measured(s: Setting, x: Directions) -> dict[str, float]:
    """Median and largest residual, LDS and mean objective; a residual above 10 is counted as divergence by `row`."""
    r = s.residual(x)
    return {
        "median": float(r.median()),
        "worst": float(r.max()),
        "lds": s.lds(x),
        "objective": float(s.objective(x).mean()),
    }


def spread(s: Setting) -> dict[str, float]:
    """The facts that the step comes from, and what the examples' shares h_n of d = tr P^-1 C add to them.

    ``c`` is mean(h^2) / mean(h)^2, condition C.1's constant on average for rank-one examples; ``top`` is max h / d.
    """
    inverse = ASTRA().fit(s.curvature, s.damping)
    plan, P = inverse.plan, inverse.preconditioner  # type: ignore[attr-defined]
    shares = torch.zeros(s.N, dtype=torch.float64)
    for rows in s.curvature.gradients():  # all in one piece
        for r in range(rows.weights.shape[1]):
            one = rows.pick(torch.arange(len(rows)), torch.full((len(rows),), r))
            shares += P.self_influence(one)[0].double() * rows.weights[:, r]
    d = float(shares.mean())
    return {
        "step": plan.step,
        "nu": plan.nu,
        "d by probes": plan.effective_dimension,
        "d": d,
        "c": float(shares.square().mean()) / d**2,
        "top": float(shares.max()) / d,
    }


def sweep(s: Setting, seed: int, factors: Sequence[float], bias: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Facts of one model, and its runs by name of the step."""
    facts = spread(s)
    runs: dict[str, Any] = {}
    for f in factors:
        runs[f"{f:.3g}"] = solve(s, ASTRA(step=f * facts["step"], seed=seed)) | {"step": f * facts["step"]}
        print(f"  {s.problem.name} seed {seed} x{f:.3g}: {runs[f'{f:.3g}']}", flush=True)
    runs[PAPER] = solve(s, ASTRA(step=0.1 * s.damping, seed=seed)) | {"step": 0.1 * s.damping}
    for f in (1 / 3, 1.0) if bias else ():
        step = f * facts["step"]
        runs[f"{f:.3g}, all the data, first model"] = solve_on_all(s, ASTRA(step=step)) | {"step": step}
    return facts, runs


def solve_on_all(s: Setting, solver: ASTRA) -> dict[str, Any]:
    """`solve` with every product on all the data, in order."""
    inverse = solver.fit(s.curvature, s.damping)
    plan, x = inverse.plan, inverse.preconditioner.apply(s.b)  # type: ignore[attr-defined]
    m = x.zeros_like()
    for k in range(plan.steps):
        step = inverse.preconditioner.apply(inverse.residual_vector(x, s.b))  # type: ignore[attr-defined]
        m = m.scale(solver.momentum).add_(1.0, step)
        x = x.add_(plan.step * solver.decay ** (k // solver.decay_every), m)
    return {"diverged": False, "last": measured(s, x), "mean": None}


def row(name: str, runs: list[dict[str, Any]], chosen: str) -> tuple[str, dict[str, float] | None]:
    """A line of the table from the runs of several models, and their means; None where a run diverged."""
    lost = sum(bool(r["diverged"] or r["last"]["median"] > 10) for r in runs)
    step = f"{np.mean([r['step'] for r in runs]):.2g}"
    if lost:
        return f"| {name} | {step} | | | | | {lost} of {len(runs)} |", None
    found = {f"{where} {k}": float(np.mean([r[where][k] for r in runs])) for where, k in _fields(runs)}
    bold = "**" if name == chosen else ""
    text = f"| {bold}{name}{bold} | {step} | {found['last median']:.3f} ({found['last worst']:.2f}) "
    text += f"| {found['last lds']:.3f} |"
    averaged = "mean median" in found
    text += (
        f" {found['mean median']:.3f} ({found['mean worst']:.2f}) | {found['mean lds']:.3f} |" if averaged else " | |"
    )
    return text + " 0 |", found


def _fields(runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(where, k) for where in ("last", "mean") if runs[0][where] for k in ("median", "worst", "lds", "objective")]


def verdict(name: str, means: dict[str, dict[str, float]]) -> str:
    """The chosen step against the best of the sweep: in residual, in LDS, and with averaging."""
    swept = {k: v for k, v in means.items() if "all the data" not in k}
    one = swept["1"]
    low, high = (min(swept, key=lambda k: swept[k]["last median"]), max(swept, key=lambda k: swept[k]["last lds"]))
    best, top = swept[low]["last median"], swept[high]["last lds"]

    def against(ours: float, theirs: float) -> str:
        return f"{100 * (ours / theirs - 1):+.0f}%"

    within = one["last median"] <= 1.05 * best and one["last lds"] >= 0.95 * top
    deep = min(v["mean median"] for v in swept.values())
    return (
        f"{name}: chosen step, last iterate: median residual {one['last median']:.3f}, "
        f"{against(one['last median'], best)} of the sweep's best ({best:.3f} at {low}); LDS {one['last lds']:.3f}, "
        f"{against(one['last lds'], top)} of the best ({top:.3f} at {high}). Within 5% of both: "
        f"{'yes' if within else 'no'}. Chosen step, second half averaged: {one['mean median']:.3f}, "
        f"{against(one['mean median'], best)} of the sweep's best last iterate and "
        f"{against(one['mean median'], deep)} of the sweep's best average; LDS {one['mean lds']:.3f}, "
        f"{against(one['mean lds'], top)}."
    )


def main() -> None:
    """Sweep, print the tables and write ``out/steps.json`` and ``out/steps.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"])
    parser.add_argument("--seeds", type=int, default=3, help="models")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", wherefrom.AttributionWarning)
    lines = [f"{args.seeds} models, {args.queries} queries; means over models. {setting.where()}.", ""]
    kept: dict[str, Any] = {}
    for name in args.problems:
        facts, runs = [], defaultdict(list)
        for seed in range(args.seeds):
            s = setting.load(name, seed, args.queries)
            fact, found = sweep(s, seed, args.factors, bias=seed == 0)
            exact = wherefrom.CG(preconditioner=wherefrom.Dual(), tolerance=1e-4).fit(s.curvature, s.damping).apply(s.b)
            facts.append(fact | {"exact lds": s.lds(exact), "exact objective": float(s.objective(exact).mean())})
            for key, r in found.items():
                runs[key].append(r)
        kept[name] = {"facts": facts, "runs": dict(runs)}
        said = ", ".join(f"{k} {np.mean([f[k] for f in facts]):.4g}" for k in facts[0])
        lines += [next(setting.sizes([name])) + ".", "", f"Measured: {said}.", "", HEADER]
        means = {}
        for key, several in runs.items():
            text, found = row(key, several, "1")
            lines.append(text)
            means |= {key: found} if found else {}
        lines += ["", verdict(name, means), ""]
    text = "\n".join(lines)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "steps.json").write_text(json.dumps(kept, indent=1))
    (args.out / "steps.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
