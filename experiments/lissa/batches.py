"""Correlation of a query's influences with the converged ones against steps, for three batch sizes (figure 2).

The step size is the recommended one throughout, as in the paper; the batch is 0.1, 1 and 2 times the recommended one.
The small batch is run with several seeds: each run's correlation, and that of the mean of the runs, which has read as
much data as the recommended batch. A last line gives the small batch the step size that Corollary 1 has for it.

Whether mean squares grow is decided by the spectrum. With condition C.1 as an equality, E (C_b - C) M (C_b - C) =
(c / |B|) tr(C M) C, the squared errors m along the eigenvectors evolve as (cf. Lemma 1)

    m' = diag((1 - a (l_i + damping))^2) m + (a^2 c / |B|) l (l . m) + what x* brings in,

stable if and only if the largest eigenvalue of this matrix is below 1.

Two dampings: tr(C) / N, and the largest eigenvalue over 66, which is the paper's 5 for ResNet-18 (its step size, 0.003,
is 1 / (largest + 5)). What was measured is kept in ``out`` and not measured again.

    python -m experiments.lissa.batches                        # about 7 minutes of one core
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import wherefrom
from experiments.lissa import problems
from wherefrom.curvature import Curvature
from wherefrom.curvature.lanczos import arnoldi
from wherefrom.errors import DivergenceError
from wherefrom.persample import vectors
from wherefrom.persample.directions import Directions
from wherefrom.solvers.neumann import Neumann, StochasticNeumann

QUERIES = 20
STEPS = 1000
EIGENVALUES = 150
SHARES = (2.0, 1.0, 0.1)  # of the recommended batch
RATIO = 66  # largest eigenvalue over damping in the paper's figure
KINDS = {"per example": "damping tr(C) / N", "paper": f"damping λmax / {RATIO}"}


def growth(values: Tensor, damping: float, step: float, batch: int, c: float) -> float:
    """By how much the mean square error grows a step: the largest eigenvalue of the matrix above."""
    stay = (1 - step * (values + damping)).square()
    noise = step**2 * c / batch * torch.outer(values, values)
    return float(torch.linalg.eigvalsh(torch.diag(stay) + noise)[-1])


def scores(curvature: Curvature, x: Directions) -> Tensor:
    """Influences of all training examples, (Q, N) float64."""
    problem = curvature.problem
    parts = [problem.loss_gradients(batch).dot(x)[..., 0] for _, batch in problem.batches()]
    return torch.cat(parts, 1).double()


def correlation(found: Tensor, truth: Tensor) -> list[float]:
    """Of each query's influences, (Q,); 0 where they are not finite."""
    f, t = (s - s.mean(1, keepdim=True) for s in (found, truth))
    return ((f * t).sum(1) / (f.norm(dim=1) * t.norm(dim=1))).nan_to_num(0.0).tolist()


def run(
    inverse: StochasticNeumann, b: Directions, at: list[int], star: Directions
) -> tuple[dict[int, Tensor], list[list[float]], int]:
    """Influences at some steps, the relative error at every step (K, Q), and the step at which it diverged, or 0."""
    found: dict[int, Tensor] = {}
    errors: list[list[float]] = []
    size = star.norm()
    try:
        for k, (x, _) in enumerate(inverse.iterates(b), 1):
            errors.append((x.axpy(-1.0, star).norm() / size).tolist())
            if k in at:
                found[k] = scores(inverse.curvature, x)
    except DivergenceError:
        return found, errors, len(errors) + 1
    return found, errors, 0


def measure(name: str, kind: str, seeds: int, steps: int) -> dict[str, Any]:
    """All lines of one problem at one damping."""
    case = problems.load(name)
    influence = case.fit(Neumann(), wherefrom.Damping.per_example())
    seen = influence.inverse.curvature.cached(("spectrum", 0), lambda: None)
    if kind == "paper":
        influence = influence.at(seen.largest.value / RATIO)
    inverse = influence.inverse
    assert isinstance(inverse, StochasticNeumann)
    curvature, plan, damping = inverse.curvature, inverse.plan, min(inverse.damping.values())
    b = influence.query_gradients(tuple(t[:QUERIES] for t in case.queries)).dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star = wherefrom.CG(tolerance=1e-6, block=True).fit(curvature, damping).apply(b)
    truth = scores(curvature, star)
    signs = vectors.random_signs(curvature.problem.shapes, 1, torch.Generator().manual_seed(2), torch.float32)
    start = Directions.from_parameters(curvature.problem.blocks, signs)
    values = arnoldi(curvature.product, start, EIGENVALUES).ritz()[0]
    at = sorted({round(steps ** (i / 29)) for i in range(30)} | {plan.steps} | set(range(100, steps + 1, 100)))
    lines: list[dict[str, Any]] = []
    for share, own in [(s, False) for s in SHARES] + [(SHARES[-1], True)]:
        batch = max(1, round(share * plan.batch))
        begun, scored = time.process_time(), []
        step = plan.step
        if own:
            planned = Neumann(batch=batch).fit(curvature, damping)
            assert isinstance(planned, StochasticNeumann)
            step = planned.plan.step
        alone: list[dict[int, list[float]]] = []
        lost, final = [], []
        for seed in range(seeds if share < 1 and not own else 1):
            solver = Neumann(step=step, batch=batch, steps=steps, seed=seed)
            fitted = solver.fit(curvature, damping)
            assert isinstance(fitted, StochasticNeumann)
            found, errors, diverged = run(fitted, b, at, star)
            scored.append(found)
            lost.append(diverged)
            final.append(torch.tensor(errors).median(1).values.tolist())
            alone.append({k: correlation(s, truth) for k, s in found.items()})
        common = [k for k in at if all(k in f for f in scored)]
        together = {k: correlation(torch.stack([f[k] for f in scored]).mean(0), truth) for k in common}
        c = {"average": seen.gap.value, "top": seen.constant.value}
        lines.append(
            {
                "share": share,
                "own step": own,
                "batch": batch,
                "step": step,
                "alone": alone,
                "together": together,
                "diverged at": lost,
                "median errors": final,
                "growth": {k: growth(values, damping, step, batch, v) for k, v in c.items()},
                "seconds": time.process_time() - begun,
            }
        )
        print(
            f"{name}, |B| = {batch}, step {step:.3g}: {lines[-1]['seconds']:.0f} CPU s, diverged at {lost}", flush=True
        )
    return {"problem": name, "kind": kind, "damping": damping, "planned": plan.steps, "steps": steps, "lines": lines}


def summary(results: list[dict[str, Any]]) -> str:
    """A row per line of the figure."""
    rows = [
        "| problem | damping | \\|B\\| | step | runs | diverged (at step) | median error after 10, 100, 1000 steps "
        "| correlation after 10, 100, 1000 steps | of the mean of the runs "
        "| growth of squares a step, c on average (top) |",
        "|" + "---|" * 10,
    ]
    for r in results:
        for line in r["lines"]:
            runs, lost = line["alone"], line["diverged at"]
            gone = [str(k) for k in lost if k]
            steps = [k for k in (10, 100, 1000) if k <= r["steps"]]
            errors, single, mean = [], [], []
            for k in steps:
                some = [e[k - 1] for e in line["median errors"] if len(e) >= k]
                errors.append(f"{sorted(some)[len(some) // 2]:.2g}" if some else "–")
                near = [_nearest(a, k) for a in runs]
                near = [v for v in near if v is not None]
                single.append(f"{sum(near) / len(near):.3f}" if near else "–")
                m = _nearest(line["together"], k)
                mean.append(f"{m:.3f}" if m is not None and len(runs) > 1 else "–")
            rows.append(
                f"| {r['problem']} | {r['damping']:.3g} | {line['batch']} ({line['share']:g}×) "
                f"| {line['step']:.3g}{' (its own)' if line['own step'] else ''} | {len(runs)} "
                f"| {len(gone)}{' (' + ', '.join(gone) + ')' if gone else ''} | {', '.join(errors)} "
                f"| {', '.join(single)} | {', '.join(mean)} "
                f"| {line['growth']['average']:.3f} ({line['growth']['top']:.3f}) |"
            )
    return "\n".join(rows)


def _nearest(curve: dict[Any, list[float]], k: int) -> float | None:
    """Mean over queries at the recorded step next to k, if the run came so far."""
    steps = [int(s) for s in curve]
    if not steps or max(steps) < 0.9 * k:
        return None
    near = min(steps, key=lambda s: abs(math.log(s / k)))
    values = curve[near] if near in curve else curve[str(near)]
    return sum(values) / len(values)


def draw(results: list[dict[str, Any]]) -> None:
    """Correlation against steps, a panel a problem and damping."""
    problems.style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.9 * ((len(results) + 1) // 2)), layout="constrained")
    colours = {2.0: "#0072b2", 1.0: "#009e73", 0.1: "#d55e00"}
    for i, r in enumerate(results):
        axes = figure.add_subplot((len(results) + 1) // 2, 2, i + 1)
        for line in r["lines"]:
            if line["own step"]:
                axes.plot(
                    *_curve(line["alone"][0]), color="#cc79a7", ls=(0, (4, 2)), label="0.1×, its own step, one run"
                )
                continue
            colour = colours[line["share"]]
            if len(line["alone"]) == 1:
                axes.plot(*_curve(line["alone"][0]), color=colour, label=f"{line['share']:g}× (|B| = {line['batch']})")
                continue
            for a in line["alone"]:
                axes.plot(*_curve(a), color=colour, lw=0.4, alpha=0.5)
            label = f"{line['share']:g}× (|B| = {line['batch']}), mean of {len(line['alone'])} runs; thin: each"
            axes.plot(*_curve(line["together"]), color=colour, label=label)
        axes.axvline(r["planned"], color="#999999", lw=0.8, ls=":", label="planned K")
        axes.set(xscale="log", ylim=(-0.2, 1.02), title=f"{r['problem']}, {KINDS[r['kind']]}", xlabel="step")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        if not i % 2:
            axes.set_ylabel("correlation with converged influences")
    problems.save(figure, "batches")


def _curve(found: dict[Any, list[float]]) -> tuple[list[int], list[float]]:
    steps = sorted(int(k) for k in found)
    values = {int(k): sum(v) / len(v) for k, v in found.items()}
    return steps, [values[k] for k in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits", "cnn"], choices=problems.NAMES)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    file = problems.OUT / "batches.json"
    problems.OUT.mkdir(exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else []
    for kind in KINDS:
        for name in args.problems:
            if not any(r["problem"] == name and r["kind"] == kind for r in results):
                results.append(json.loads(json.dumps(measure(name, kind, args.seeds, args.steps))))
                file.write_text(json.dumps(results) + "\n")
    draw(results)
    print("\n" + summary(results))


if __name__ == "__main__":
    main()
