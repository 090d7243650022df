"""Finding relabelled images by self-influence: AUC and average precision against p (figure 2, and table 1 in small).

    self-influence of z = grad l(z)^T M grad l(z)

with M the inverse of H + L2 I (dense, by CG), of G + L2 I (by CG, EKFAC, LiSSA), the p top eigenpairs of H + L2 I
inverted (Arnoldi, n = 200), or a random projection of rank p (RandProj, RandSelect). All in float64 on one network per
seed, the fit and the scoring of all training images timed.

    python -m experiments.arnoldi.retrieval                    # three seeds, about 20 minutes of one core
    python -m experiments.arnoldi.retrieval --redraw
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

import wherefrom
from experiments.arnoldi import problems
from experiments.arnoldi.problems import L2, Case
from wherefrom.solvers.base import Inverse
from wherefrom.tools.evaluate import mislabeled_curve

STEPS = 200
RANKS = (5, 10, 20, 50, 100, 200)
WIDER = (500, 1000)  # for the projections
FIXED = {
    "exact Hessian": "#000000",
    "CG, Hessian": "#56b4e9",
    "CG, GGN": "#0072b2",
    "EKFAC": "#009e73",
    "LiSSA, r = 10": "#e69f00",
    "LiSSA, r = 100": "#cc79a7",
    "LiSSA, planned": "#8c564b",
    "gradient norm": "#999999",
}


def judged(inverse: Inverse, case: Case) -> dict[str, float]:
    """AUC, average precision and CPU seconds of the self-influence of all training images."""
    problem, begun = inverse.curvature.problem, time.process_time()
    values = torch.cat([inverse.self_influence(problem.loss_gradients(batch))[0] for _, batch in problem.batches()])
    seconds = time.process_time() - begun
    curve = mislabeled_curve(values, case.flipped, bootstrap=1)
    return {"auc": curve.auc, "ap": curve.average_precision, "score": seconds, "negative": int((values < 0).sum())}


def fitted(solver: wherefrom.Solver, curvature: wherefrom.Curvature, case: Case) -> dict[str, float]:
    """The same with the CPU seconds of the fit."""
    begun = time.process_time()
    inverse = solver.fit(curvature, L2)
    return {"fit": time.process_time() - begun} | judged(inverse, case)


def measure(seed: int, draws: int) -> dict[str, Any]:
    """All methods on one network."""
    case = problems.load(seed)
    print(case.note, flush=True)
    hessian, ggn = wherefrom.Hessian(case.problem()), wherefrom.GGN(case.problem())
    found: dict[str, Any] = {"note": case.note, "share": float(case.flipped.double().mean())}
    inverse, seconds = problems.exact(hessian, seed)
    found["smallest"] = float(inverse.values[0]) + L2
    fixed = {"exact Hessian": {"fit": seconds} | judged(inverse, case)}
    block = wherefrom.CG(tolerance=1e-3, block=True)
    solvers: dict[str, tuple[wherefrom.Solver, wherefrom.Curvature]] = {
        "CG, GGN": (block, ggn),
        "EKFAC": (wherefrom.EKFAC(), wherefrom.GGN(case.problem())),
        "LiSSA, r = 10": (wherefrom.Neumann(steps=10), ggn),
        "LiSSA, r = 100": (wherefrom.Neumann(steps=100), wherefrom.GGN(case.problem())),
        "LiSSA, planned": (wherefrom.Neumann(), wherefrom.GGN(case.problem())),
        "gradient norm": (wherefrom.Identity(), ggn),
        "CG, Hessian": (block, hessian),
    }
    for name, (solver, curvature) in solvers.items():
        try:
            fixed[name] = fitted(solver, curvature, case)
            print(name, fixed[name], flush=True)
        except wherefrom.AttributionError as error:
            found.setdefault("failed", {})[name] = str(error)
            print(name, error, flush=True)
    plan = wherefrom.Neumann().fit(ggn, L2).report()
    found["planned"] = {k: plan[k] for k in ("step", "batch", "steps")}
    first = wherefrom.Arnoldi(rank=RANKS[-1], steps=STEPS)
    begun = time.process_time()
    first.fit(hessian, L2)
    spent = time.process_time() - begun
    by_rank: dict[str, dict[int, list[dict[str, float]]]] = {"Arnoldi": {}, "RandProj": {}, "RandSelect": {}}
    for p in RANKS:
        by_rank["Arnoldi"][p] = [fitted(replace(first, rank=p), hessian, case) | {"fit": spent}]
    for p in RANKS + WIDER:
        for name, solver in (("RandProj", wherefrom.RandProj), ("RandSelect", wherefrom.RandSelect)):
            by_rank[name][p] = [fitted(solver(rank=p, seed=s), ggn, case) for s in range(draws)]
    return found | {"fixed": fixed, "by rank": by_rank}


def summary(results: list[dict[str, Any]]) -> str:
    """The table: means over seeds and draws, ± the standard deviation over seeds."""
    lines = [f"- {r['note']}; smallest eigenvalue of H + L2 I {r['smallest']:.1e}" for r in results]
    lines += [f"- Corollary 1 on the GGN of seed 0: {results[0]['planned']}"]
    lines += [f"- failed: {r['failed']}" for r in results if r.get("failed")]
    lines += ["", "| method | p | AUC | AP | fit, CPU s | scoring, CPU s |", "|---|---|---|---|---|---|"]
    for name in FIXED:
        each = [[r["fixed"][name]] for r in results if name in r["fixed"]]
        if each:
            lines.append(_row(name, "–", each))
    for name in ("Arnoldi", "RandProj", "RandSelect"):
        for p in results[0]["by rank"][name]:
            lines.append(_row(name, str(p), [r["by rank"][name][p] for r in results]))
    share = sum(r["share"] for r in results) / len(results)
    return "\n".join([*lines, "", f"By chance: AUC 50, AP {100 * share:.0f}. {len(results)} seeds."])


def _row(name: str, p: str, each: list[list[dict[str, float]]]) -> str:
    cells = []
    for key, scale, digits in (("auc", 100, 1), ("ap", 100, 1), ("fit", 1, 1), ("score", 1, 2)):
        means = torch.tensor([scale * sum(d[key] for d in draws) / len(draws) for draws in each])
        spread = f" ± {float(means.std()):.1f}" if len(means) > 1 and scale == 100 else ""
        cells.append(f"{float(means.mean()):.{digits}f}{spread}")
    return f"| {name} | {p} | " + " | ".join(cells) + " |"


def draw(results: list[dict[str, Any]]) -> None:
    """AUC and average precision against p."""
    problems.style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    styles = {"Arnoldi": "#d55e00", "RandProj": "#0072b2", "RandSelect": "#999999"}
    for i, (key, title) in enumerate((("auc", "AUC"), ("ap", "average precision"))):
        axes = figure.add_subplot(1, 2, i + 1)
        for name, colour in styles.items():
            ranks = [int(p) for p in results[0]["by rank"][name]]
            each = torch.tensor(
                [[sum(d[key] for d in r["by rank"][name][str(p)]) for p in ranks] for r in results]
            ) / torch.tensor([len(results[0]["by rank"][name][str(p)]) for p in ranks])
            axes.plot(ranks, each.mean(0), "o-", ms=3, color=colour, label=name)
            if len(results) > 1:
                low, high = each.min(0).values, each.max(0).values
                axes.fill_between(ranks, low, high, color=colour, alpha=0.15, lw=0)
        for k, (name, colour) in enumerate(FIXED.items()):
            values = [r["fixed"][name][key] for r in results if name in r["fixed"]]
            if values:
                dashes = (k, (4, 2)) if k % 2 else (0, (1, 1.5))
                axes.axhline(sum(values) / len(values), color=colour, lw=1.1, ls=dashes, label=name)
        axes.set(xscale="log", xlabel="p", title=title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside right center")
    problems.save(figure, "retrieval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3, help="of the random projections, for each seed")
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", wherefrom.ConvergenceWarning)  # LiSSA cut short
    file = problems.OUT / "retrieval.json"
    if not args.redraw:
        results = []
        for seed in range(args.seeds):
            results.append(measure(seed, args.draws))
            file.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    draw(results)
    print(summary(results))


if __name__ == "__main__":
    main()
