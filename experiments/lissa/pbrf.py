"""Influence by LiSSA, CG and ASTRA against the proximal Bregman response of the same model (figures 1, 5 and 6).

Eight training examples, five at random and the three of largest gradients, against 100 queries, all in float64. x
solves for a training example, as in the paper. Three settings a problem:

    derivative      eps to 0, at the paper's damping, lambda_max / 66: what is left is the solver's error
    removal         eps = 1/N, at ten times that damping
    removal, low    eps = 1/N, at the damping implied by training

    python -m experiments.lissa.pbrf                           # about 7 minutes of one core
    python -m experiments.lissa.pbrf --redraw
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

import wherefrom
from experiments.lissa import problems
from wherefrom.persample import gradients
from wherefrom.tools.evaluate import pbrf

RATIO = 66  # largest eigenvalue over damping, of the paper's ResNets
RANDOM, HARDEST = 5, 3
SETTINGS = ("derivative", "removal", "removal, low")


def measure(name: str) -> list[dict[str, Any]]:
    """The response and the scores of each method in the three settings."""
    found = problems.load(name)
    (x, y), (xq, yq) = found.train, found.queries
    model = copy.deepcopy(found.model).double()
    case = problems.Case(name, model, found.task, (x.double(), y), (xq.double(), yq), found.damping)
    base = case.fit(wherefrom.Identity(), case.damping)
    problem, curvature, N = base.problem, base.inverse.curvature, len(case.train[0])
    largest = wherefrom.spectrum(curvature, probes=64).largest.value
    of_loss = gradients.concatenate([problem.loss_gradients(batch) for _, batch in problem.batches()])
    hard = of_loss.square_norms()[:, 0].topk(HARDEST).indices
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    examples = torch.cat([order[~torch.isin(order, hard)][:RANDOM], hard])
    b, q = of_loss[examples].dense(), problem.measurement_gradients(case.queries)

    def scores(solver: wherefrom.Solver, damping: float) -> dict[str, Any]:
        begun = time.process_time()
        x, _ = solver.fit(curvature, damping).solve(b)
        seconds = time.process_time() - begun
        return {"values": listed(q.dot(x)[..., 0]), "seconds": seconds}  # (m, Q)

    results = []
    low, high = case.damping, largest / RATIO
    for setting, damping, eps in zip(SETTINGS, (high, 10 * high, low), (None, 1 / N, 1 / N), strict=True):
        begun = time.process_time()
        given = case.model, case.task, case.train, case.queries, examples.tolist()
        truth = pbrf(*given, damping=damping, eps=eps, tolerance=1e-4, steps=60, progress=False)
        seconds = time.process_time() - begun
        print(f"{name}, {setting}: {truth}, {seconds:.0f} CPU s", flush=True)
        planned = wherefrom.Neumann().fit(curvature, damping).report()
        batch, steps = int(planned["batch"]) or N, int(planned["steps"])
        methods = {
            "LiSSA": wherefrom.Neumann(),
            "LiSSA, decaying": wherefrom.Neumann(
                batch=4 * batch, steps=2 * steps, decay=0.5, decay_every=-(-steps // 4), step=float(planned["step"])
            ),
            "ASTRA": wherefrom.ASTRA(),
            "CG": wherefrom.CG(),
        }
        if setting == "derivative":
            methods["ASTRA, batch 1024"] = wherefrom.ASTRA(batch=1024)
        results.append(
            {
                "problem": name,
                "setting": setting,
                "damping": damping,
                "eps": truth.eps.tolist(),
                "examples": examples.tolist(),
                "converged": truth.converged.tolist(),
                "residual": truth.residual.tolist(),
                "change": truth.change.tolist(),
                "steps": truth.steps,
                "seconds": seconds,
                "plan": [batch, steps],
                "values": listed(truth.values.T),
                "methods": {name: scores(solver, damping) for name, solver in methods.items()},
            }
        )
    return results


def listed(values: Tensor) -> list[list[float]]:
    """Six digits of each."""
    return [[float(f"{v:.6g}") for v in row] for row in values.tolist()]


def compared(values: NDArray, truth: NDArray) -> dict[str, Any]:
    """Of (m, Q) scores against the response: over all pairs, and Pearson's of each example."""
    each = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(values, truth, strict=True)]
    return {
        "pearson": float(np.corrcoef(values.ravel(), truth.ravel())[0, 1]),
        "spearman": float(np.corrcoef(rankdata(values), rankdata(truth))[0, 1]),
        "slope": float(np.polyfit(truth.ravel(), values.ravel(), 1)[0]),
        "random": each[:RANDOM],
        "hardest": each[RANDOM:],
    }


def summary(results: list[dict[str, Any]]) -> str:
    """A table of the responses, and one of the methods."""
    heads = ["problem", "setting", "damping", "eps N", "converged", "residual", "change: random", "hardest", "steps"]
    rows = ["| " + " | ".join([*heads, "CPU s"]) + " |", "|" + "---|" * (len(heads) + 1)]
    for r in results:
        weights = np.array(r["eps"]) * {"digits": 1600, "cnn": 2000}[r["problem"]]
        change = [f"{max(some):.1e}" for some in (r["change"][:RANDOM], r["change"][RANDOM:])]
        said = "1" if r["setting"] != "derivative" else f"{weights.min():.1g} to {weights.max():.1g}"
        cells = [r["problem"], r["setting"], f"{r['damping']:.3g}", said]
        cells += [f"{sum(r['converged'])} of {len(r['converged'])}", f"{max(r['residual']):.0e}", *change]
        rows.append("| " + " | ".join([*cells, str(r["steps"]), f"{r['seconds']:.0f}"]) + " |")
    heads = ["problem", "setting", "method", "Pearson", "Spearman", "slope", "least of random", "least of hardest"]
    rows += ["", "| " + " | ".join([*heads, "CPU s"]) + " |", "|" + "---|" * (len(heads) + 1)]
    for r in results:
        for name, method in r["methods"].items():
            c = compared(np.array(method["values"]), np.array(r["values"]))
            cells = [f"{c[k]:.4f}" for k in ("pearson", "spearman", "slope")]
            cells += [f"{min(c[k]):.4f}" for k in ("random", "hardest")]
            rows.append(f"| {r['problem']} | {r['setting']} | {name} | {' | '.join(cells)} | {method['seconds']:.1f} |")
    return "\n".join(rows)


def draw(results: list[dict[str, Any]]) -> None:
    """A row for each problem, with eps to 0 and with eps = 1/N at the low damping; a column for each method.

    Both in units of the example's largest response; scores beyond 1.5 lie on the edge.
    """
    problems.style()
    from matplotlib.figure import Figure

    shown = [r for r in results if r["setting"] != "removal"]
    names = [name for name in shown[0]["methods"] if name != "ASTRA, batch 1024"]
    figure = Figure(figsize=(2.2 * len(names), 2.2 * len(shown)), layout="constrained")
    for i, r in enumerate(shown):
        x = np.array(r["values"])
        unit = np.abs(x).max(1, keepdims=True)  # (m, 1)
        for j, name in enumerate(names):
            axes = figure.add_subplot(len(shown), len(names), i * len(names) + j + 1)
            y = np.array(r["methods"][name]["values"])
            axes.axline((0, 0), slope=1, color="#999999", lw=0.8)
            for some, colour, label in (
                (slice(RANDOM, None), "#d55e00", "largest gradients"),
                (slice(RANDOM), "#0072b2", "random examples"),
            ):
                options = {"s": 5, "lw": 0, "alpha": 0.6, "rasterized": True}
                drawn = ((v / unit).clip(-1.5, 1.5)[some].ravel() for v in (x, y))
                axes.scatter(*drawn, color=colour, label=label, **options)
            axes.set(xlim=(-1.1, 1.1), ylim=(-1.55, 1.55), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
            c = compared(y, x)
            axes.set_title(f"{name if not i else ''}\nr = {c['pearson']:.3f}", fontsize=8)
            if not j:
                axes.set_ylabel(f"{r['problem']}, {'eps to 0' if r['setting'] == 'derivative' else 'eps = 1/N'}\nscore")
            if i + 1 == len(shown):
                axes.set_xlabel("proximal Bregman response")
            if not i and not j:
                axes.legend(fontsize=6, markerscale=2, loc="upper left")
    problems.save(figure, "pbrf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits", "cnn"], choices=["digits", "cnn"])
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    file = problems.OUT / "pbrf.json"
    problems.OUT.mkdir(exist_ok=True)
    if not args.redraw:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wherefrom.ConvergenceWarning)  # the tables say it
            results = [r for name in args.problems for r in measure(name)]
        file.write_text(json.dumps(results) + "\n")
    results = json.loads(file.read_text())
    draw(results)
    print("\n" + summary(results))


if __name__ == "__main__":
    main()
