"""Traces of both sides of condition C.1 against the batch size (figure 4).

    tr E (C_b - C)^2 = E |C_1 z - C_2 z|^2 / 2   against   (c / |B|) tr(C)^2,        1,000 z of random signs

C_1 and C_2 are on independent minibatches drawn with replacement, a new pair for every four z.

    python -m experiments.lissa.gap                            # about 3 minutes of one core
    python -m experiments.lissa.gap --redraw
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

import wherefrom
from experiments.lissa import problems
from wherefrom.persample import vectors
from wherefrom.persample.directions import Directions
from wherefrom.solvers.identity import Identity

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROBES, GROUP = 1000, 4


def measure(name: str) -> dict[str, Any]:
    """Both sides for every batch size."""
    case = problems.load(name)
    curvature = case.fit(Identity(), wherefrom.Damping.per_example()).inverse.curvature
    problem, begun = curvature.problem, time.process_time()
    means = curvature.mean_eigenvalues()
    trace = sum(means[block.name] * block.size for block in problem.blocks)
    rng = torch.Generator().manual_seed(0)
    gaps, errors = [], []
    for size in SIZES:
        draw, found = curvature.operator(rng, size), []
        for _ in range(PROBES // GROUP):
            signs = vectors.random_signs(problem.shapes, GROUP, rng, problem.dtype)
            z = Directions.from_parameters(problem.blocks, signs)
            found.append(float(draw(z).axpy(-1.0, draw(z)).norm().square().mean()) / 2)
        gaps.append(float(np.mean(found)))
        errors.append(float(np.std(found, ddof=1) / len(found) ** 0.5))
    relative = np.array(errors) / gaps
    (slope, _), cov = np.polyfit(np.log(SIZES), np.log(gaps), 1, w=1 / relative, cov="unscaled")
    return {
        "problem": name,
        "trace": trace,
        "gap": gaps,
        "error": errors,
        "slope": [float(slope), float(cov[0, 0] ** 0.5)],
        "seconds": time.process_time() - begun,
    }


def summary(results: list[dict[str, Any]]) -> str:
    """A row per problem."""
    heads = ["problem", "tr C", "slope (log-log)", *(f"c, \\|B\\| = {b}" for b in (1, 8, 64, 512)), "CPU s"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in results:
        c = [
            f"{SIZES[i] * r['gap'][i] / r['trace'] ** 2:.2f} ± {SIZES[i] * r['error'][i] / r['trace'] ** 2:.2f}"
            for i in (0, 3, 6, 9)
        ]
        cells = [r["problem"], f"{r['trace']:.3g}", f"{r['slope'][0]:.3f} ± {r['slope'][1]:.3f}", *c]
        rows.append("| " + " | ".join([*cells, f"{r['seconds']:.0f}"]) + " |")
    return "\n".join(rows)


def draw(results: list[dict[str, Any]]) -> None:
    """A panel a problem."""
    problems.style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(results), 2.5), layout="constrained")
    for i, r in enumerate(results):
        axes = figure.add_subplot(1, len(results), i + 1)
        bound = [r["trace"] ** 2 / b for b in SIZES]
        axes.plot(SIZES, [2 * v for v in bound], color="#999999", lw=1.0, ls="--", label="right side, c = 2")
        axes.plot(SIZES, bound, color="#999999", lw=1.0, ls=":", label="right side, c = 1")
        error = [2 * e for e in r["error"]]
        axes.errorbar(SIZES, r["gap"], yerr=error, fmt="o", ms=3, lw=0.8, color="#0072b2", label="left side ± 2 SE")
        axes.set(xscale="log", yscale="log", title=f"{r['problem']}: slope {r['slope'][0]:.2f}", xlabel="batch size")
        if not i:
            axes.set_ylabel("trace")
            axes.legend(fontsize=7)
    problems.save(figure, "gap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(problems.NAMES), choices=problems.NAMES)
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    file = problems.OUT / "gap.json"
    problems.OUT.mkdir(exist_ok=True)
    if not args.redraw:
        results = []
        for name in args.problems:
            results.append(measure(name))
            print(f"{name}: {results[-1]['seconds']:.0f} CPU s", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    draw(results)
    print("\n" + summary(results))


if __name__ == "__main__":
    main()
