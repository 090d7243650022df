"""`Neumann()` without an argument: its plan, the error that equation 10 predicts, and the error it makes (table 1).

    error = |x_K - x*| / |x*|,        x* by CG(tolerance=1e-6, block=True), 100 queries

Beside equation 10 stands what its second term leaves out. With noise of covariance (c / |B|) (x*.C x*) C a step, the
stationary error is, to leading order in the step a,

    |x_K - x*|^2 ~ a c (x*.C x*) d / (2 |B|),        d = tr C (C + damping)^-1,

where equation 10 has tr(C) / damping for d. Here c is the one that condition C.1 needs on average.

    python -m experiments.lissa.predicted                      # all six rows, about 8 minutes of one core
    python -m experiments.lissa.predicted --problems digits
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch

import wherefrom
from experiments.lissa import problems
from wherefrom.curvature import Curvature
from wherefrom.curvature.lanczos import spectrum
from wherefrom.persample import vectors
from wherefrom.persample.directions import Directions
from wherefrom.solvers.neumann import StochasticNeumann

LIMIT = 2.0  # that measured over predicted must stay below
PROBES = 16


def dimension(curvature: Curvature, damping: float) -> float:
    """Effective dimension tr C (C + damping)^-1 by random signs."""
    problem = curvature.problem
    signs = vectors.random_signs(problem.shapes, PROBES, torch.Generator().manual_seed(1), problem.dtype)
    z = Directions.from_parameters(problem.blocks, signs)
    x = wherefrom.CG(tolerance=1e-3, block=True).fit(curvature, damping).apply(z)
    return float((z.dot(z) - damping * z.dot(x)).mean())


def measure(influence: wherefrom.FittedInfluence, case: problems.Case) -> dict[str, Any]:
    """One row: the spectrum, the plan, and every query's predicted and measured error."""
    inverse = influence.inverse
    assert isinstance(inverse, StochasticNeumann)
    curvature, plan, damping = inverse.curvature, inverse.plan, min(inverse.damping.values())
    b = influence.query_gradients(case.queries).dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float32 ends at a few 1e-6; the residual is in the table
        star, reference = wherefrom.CG(tolerance=1e-6, block=True).fit(curvature, damping).solve(b)
    begun = time.process_time()
    x, solution = inverse.solve(b)
    spent = time.process_time() - begun
    assert solution.predicted is not None and reference.residual is not None and solution.residual is not None
    size = star.norm()
    error = x.axpy(-1.0, star).norm() / size
    first = (1 - plan.step * damping) ** plan.steps
    first = first * b.scale(1 / damping).axpy(-1.0, star).norm() / size
    seen = curvature.cached(("spectrum", 0), lambda: spectrum(curvature))
    form = (star.dot(b) - damping * star.dot(star)).clamp(min=0)
    d = dimension(curvature, damping)
    leading = (plan.step * seen.gap.value * form * d / (2 * max(plan.batch, 1))).sqrt() / size
    return {
        "damping": damping,
        "trace": [seen.trace.value, seen.trace.error],
        "norm": seen.square.value**0.5,
        "lanczos": seen.largest.value,
        "sketch": seen.sketched,
        "average": [seen.gap.value, seen.gap.error],
        "constant": [seen.constant.value, seen.constant.error],
        "dimension": d,
        "step": plan.step,
        "batch": plan.batch,
        "steps": plan.steps,
        "reference": float(reference.residual.max()),
        "residual": solution.residual.tolist(),
        "predicted": solution.predicted.tolist(),
        "first": first.tolist(),
        "leading": leading.tolist(),
        "measured": error.tolist(),
        "seconds": spent,
        "passes": solution.passes,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables: spectrum and plan; errors."""
    one = [
        "| problem | damping | tr C | \\|C\\|_F | λmax, Lanczos | λmax, sketch | c, average | c, top eigenvectors "
        "| step | \\|B\\| | K | passes | CPU s |",
        "|" + "---|" * 13,
    ]
    two = [
        "| problem | damping | predicted (eq. 10) | its first term | measured, median (largest) "
        "| measured / predicted, median (largest) | d | leading order | measured / leading order | residual of x* |",
        "|" + "---|" * 10,
    ]
    for r in rows:
        label = f"| {r['problem']} | {r['damping']:.3g} ({r['kind']}) "
        one.append(
            f"{label}| {r['trace'][0]:.3g} ± {r['trace'][1]:.1g} | {r['norm']:.3g} | {r['lanczos']:.4g} "
            f"| {r['sketch']:.3g} | {r['average'][0]:.2f} ± {r['average'][1]:.2f} "
            f"| {r['constant'][0]:.2f} ± {r['constant'][1]:.2f} | {r['step']:.3g} | {r['batch']} | {r['steps']} "
            f"| {r['passes']:.1f} | {r['seconds']:.0f} |"
        )
        predicted, first, leading, found = (torch.tensor(r[k]) for k in ("predicted", "first", "leading", "measured"))
        ratio, against = found / predicted, found / leading
        two.append(
            f"{label}| {float(predicted.median()):.2f} | {float(first.median()):.2f} "
            f"| {float(found.median()):.3f} ({float(found.max()):.2f}) "
            f"| **{float(ratio.median()):.2f}** ({float(ratio.max()):.2f}) | {r['dimension']:.0f} "
            f"| {float(leading.median()):.3f} | {float(against.median()):.2f} ({float(against.max()):.2f}) "
            f"| {r['reference']:.0e} |"
        )
    worst = [max(m / p for m, p in zip(r["measured"], r["predicted"], strict=True)) for r in rows]
    kept = f"Measured over predicted stays below {LIMIT:g} in {sum(w <= LIMIT for w in worst)} of {len(rows)} rows."
    return "\n".join([*one, "", *two, "", kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(problems.NAMES), choices=problems.NAMES)
    args = parser.parse_args()
    problems.OUT.mkdir(exist_ok=True)
    file = problems.OUT / "predicted.json"
    rows: list[dict[str, Any]] = []
    for name in args.problems:
        case = problems.load(name)
        influence = case.fit(wherefrom.Neumann(), wherefrom.Damping.per_example())
        for kind, fitted in (("per example", influence), ("from training", influence.at(case.damping))):
            rows.append({"problem": name, "kind": kind} | measure(fitted, case))
            print(f"{name}, {kind}: {rows[-1]['seconds']:.0f} CPU s", flush=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
