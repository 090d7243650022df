"""Steps, passes and CPU seconds of nine ways to solve 100 queries, to three residuals: median and worst query.

    python -m experiments.astra.table digits concrete

One thread. "Fit" is all that needs no query: the curvature's rows, kept in memory, for every method; factors, test
matrices or Gram matrices of a preconditioner; the spectrum of a stochastic method. The steps of CG come from one run
with its history; each target is then run again by itself, with its own tolerance, for its time. Stochastic methods do
not see their residual: it is measured on all the data every few steps and that is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import machine
from torch import Tensor

import wherefrom
from experiments.astra import setting
from experiments.astra.setting import Setting, due
from wherefrom.curvature.ggn import GGN
from wherefrom.errors import DivergenceError
from wherefrom.solvers.base import Inverse, Solver
from wherefrom.solvers.cg import CG
from wherefrom.solvers.neumann import ASTRA, Neumann, StochasticNeumann

HERE = Path(__file__).resolve().parent
TARGETS = (0.3, 0.1, 0.03)
STATISTICS = {"median": torch.median, "worst": torch.max}
METHODS: dict[str, Solver] = {
    "CG(EKFAC)": CG(preconditioner=wherefrom.EKFAC()),
    "CG()": CG(),
    "CG(Nystrom)": CG(preconditioner=wherefrom.Nystrom()),
    "CG(Dual)": CG(preconditioner=wherefrom.Dual()),
    "block CG()": CG(block=True),
    "block CG(EKFAC)": CG(block=True, preconditioner=wherefrom.EKFAC()),
    "ASTRA()": ASTRA(),
    "ASTRA(), twice the schedule": ASTRA(steps=400, decay_every=100),
    "LiSSA: Neumann()": Neumann(),
    "LiSSA: Neumann(batch=256)": Neumann(batch=256),
}
HEADER = (
    "| problem | method | fit, CPU s | query | to residual 0.3: steps, passes, CPU s (with fit) | to 0.1 | to 0.03 |\n"
    "|---|---|---|---|---|---|---|"
)


def measure(s: Setting, solver: Solver, every: int) -> dict[str, Any]:
    """Fit and solve: ``fit_s``, and for each statistic and target the steps, passes and CPU seconds, if reached."""
    start = time.process_time()
    curvature = GGN(s.curvature.problem)
    for _ in curvature.gradients():
        pass
    inverse = solver.fit(curvature, s.damping)
    fit = time.process_time() - start
    if isinstance(inverse, StochasticNeumann):
        return {"fit_s": fit} | stochastic(s, inverse, every)
    if not isinstance(solver, CG):
        raise TypeError(f"expected CG or Neumann, got {type(solver).__name__}.")
    return {"fit_s": fit} | conjugate(s, solver, inverse)


def conjugate(s: Setting, solver: CG, inverse: Inverse) -> dict[str, Any]:
    """Each target of CG by itself, with what its residual really is."""
    curvature, reached = inverse.curvature, {}
    whole = replace(solver, tolerance=min(TARGETS), steps=400).fit(curvature, s.damping)  # factors are remembered
    history = whole.iterate(s.b).history  # (steps + 1, Q)
    assert history is not None
    for statistic in STATISTICS:
        for target in TARGETS:
            values = STATISTICS[statistic](history, dim=1).values
            hit = (values <= target).nonzero().flatten()
            if not len(hit):
                continue
            steps = int(hit[0])
            one = replace(solver, tolerance=target, steps=max(1, steps)).fit(curvature, s.damping)
            start = time.process_time()
            x = one.apply(s.b)
            spent = time.process_time() - start
            true = float(STATISTICS[statistic](s.residual(x), dim=0).values)
            reached[f"{statistic} {target}"] = {"steps": steps, "passes": float(steps), "cpu_s": spent, "true": true}
    return {"reached": reached, "steps": len(history) - 1}


def stochastic(s: Setting, inverse: StochasticNeumann, every: int) -> dict[str, Any]:
    """The first measured step at which each target is met; the run ends when all are."""
    plan, reached, spent, k, now = inverse.plan, {}, 0.0, 0, torch.zeros(2)
    share, best = (plan.batch or s.N) / s.N, torch.full((2,), float("inf"))
    iterates, every = inverse.iterates(s.b), max(every, plan.steps // 100)
    for k in range(1, plan.steps + 1):
        start = time.process_time()
        try:
            x, _ = next(iterates)
        except DivergenceError:
            return {"reached": reached, "steps": k, "diverged": True}
        spent += time.process_time() - start
        if not due(k, plan.steps, every if k > every else 1):
            continue
        r = s.residual(x)
        now = torch.stack([r.median(), r.max()])
        best = torch.minimum(best, now.to(best))
        for statistic, value in zip(STATISTICS, now.tolist(), strict=True):
            for target in TARGETS:
                if value <= target:
                    found = {"steps": k, "passes": k * share, "cpu_s": spent, "true": value}
                    reached.setdefault(f"{statistic} {target}", found)
        if len(reached) == len(STATISTICS) * len(TARGETS):
            break
    facts = {"steps": k, "passes": k * share, "cpu_s": spent, "best": best.tolist(), "batch": plan.batch}
    return {"reached": reached} | facts | {"step": plan.step, "final": now.tolist()}


def rows(name: str, method: str, found: dict[str, Any]) -> list[str]:
    """Two lines of the table: the median query and the worst."""
    lines = []
    for i, statistic in enumerate(STATISTICS):
        cells = []
        for target in TARGETS:
            hit = found["reached"].get(f"{statistic} {target}")
            missed = "diverged" if found.get("diverged") else "not reached"
            if hit:
                spent = f"{hit['cpu_s']:.1f} ({found['fit_s'] + hit['cpu_s']:.1f})"
                cells.append(f"{hit['steps']}, {hit['passes']:.1f}, {spent}")
            else:
                cells.append(missed)
        if "best" in found and "not reached" in cells:  # say once how far it came, at what cost
            last = f"{found['steps']}, {found['passes']:.0f}, {found['cpu_s']:.0f}"
            where = cells.index("not reached")
            cells[where] += f" (lowest {found['best'][i]:.2g}; {last} in all)"
        first = [name, method, f"{found['fit_s']:.2f}"] if i == 0 else ["", "", ""]
        lines.append("| " + " | ".join([*first, statistic, *cells]) + " |")
    return lines


def check(found: dict[str, Any]) -> Tensor:
    """How far the true residuals of the timed runs lie above their targets, as a ratio."""
    ratios = [hit["true"] / float(key.split()[1]) for key, hit in found["reached"].items()]
    return torch.tensor(ratios or [0.0])


def main() -> None:
    """Measure, print the table and write ``out/table.json`` and ``out/table.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the model")
    parser.add_argument("--every", type=int, default=10, help="steps between measurements of a stochastic method")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", wherefrom.AttributionWarning)
    lines, kept, above = [HEADER], {}, 0.0
    for name in args.problems:
        s = setting.load(name, args.seed, args.queries)
        for method in args.methods:
            found = measure(s, METHODS[method], args.every)
            kept[f"{name} {method}"] = found
            above = max(above, float(check(found).max()))
            lines += rows(name, method, found)
            print("\n".join(lines[-2:]), flush=True)
    facts = ", ".join(f"{k} {v}" for k, v in machine().items())
    lines += ["", f"{args.queries} queries, model {args.seed}. Largest true residual over target: {above:.3f}."]
    lines += ["; ".join(setting.sizes(args.problems)) + ".", f"Machine: {facts}; one thread."]
    text = "\n".join(lines) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.json").write_text(json.dumps(kept, indent=1))
    (args.out / "table.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
