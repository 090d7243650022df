"""How well the top eigenvalues of the Hessian are found: by Arnoldi and by random projections (figure 1).

    W1(p) = (1/p) sum_k |exact_k - estimated_k|        over the p largest by absolute value, both sorted

Arnoldi takes the p largest of n = 200 Ritz values. RandProj takes the eigenvalues of G H G^T with p Gaussian rows,
entries N(0, 1/p) (so that E G^T G = I), and as a line of its own with these rows orthonormalised. H is the Hessian of
the training objective, its regulariser included. Then a table of the relative errors of the 20 largest Ritz values
against the dense ones, for the Hessian and for the Gauss-Newton matrix, after different n.

    python -m experiments.arnoldi.eigenvalues                  # about 5 minutes of one core
    python -m experiments.arnoldi.eigenvalues --redraw
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

import wherefrom
from experiments.arnoldi import problems
from wherefrom.curvature.lanczos import Krylov, arnoldi
from wherefrom.persample.directions import Directions
from wherefrom.solvers.spectral import write_matrix

N = 200
RANKS = (5, 10, 20, 30, 50, 75, 100, 150, 200)
WIDER = (300, 500, 1000)  # for the projections alone
STEPS = (30, 40, 60, 80, 100, 150, 200)
TOP, TARGET = 20, 1e-6


def top(values: Tensor, p: int) -> Tensor:
    """The p largest by absolute value, in descending order."""
    return values[values.abs().sort(descending=True).indices[:p]].sort(descending=True).values


def distance(exact: Tensor, estimated: Tensor, p: int) -> float:
    """W1 between the top p of both; fewer estimates than p are filled up with zeros."""
    some = top(estimated, p)
    some = torch.cat([some, some.new_zeros(p - len(some))]).sort(descending=True).values
    return float((top(exact, p) - some).abs().mean())


def krylov(curvature: wherefrom.Curvature, n: int) -> tuple[Krylov, float]:
    """The Arnoldi process from a Gaussian start, and its CPU seconds."""
    problem, rng, begun = curvature.problem, torch.Generator().manual_seed(0), time.process_time()
    drawn = {name: torch.randn(1, *s, generator=rng, dtype=problem.dtype) for name, s in problem.shapes.items()}
    start = Directions.from_parameters(problem.blocks, drawn)
    return arnoldi(curvature.product, start, n), time.process_time() - begun


def shortened(found: Krylov, n: int) -> Tensor:
    """Ritz values after n of its products."""
    return torch.linalg.eigvalsh(found.projected[:n, :n])


def ritz_errors(found: Krylov, exact: Tensor) -> dict[int, list[float]]:
    """Relative errors of the 20 largest after different n."""
    truth = top(exact, TOP)
    return {n: ((top(shortened(found, n), TOP) - truth).abs() / truth.abs()).tolist() for n in STEPS}


def measure(draws: int) -> dict[str, Any]:
    """Everything, on seed 0."""
    case = problems.load(0)
    curvature = wherefrom.Hessian(case.problem())
    inverse, seconds = problems.exact(curvature, 0)
    plain = inverse.values
    exact, vectors = plain + problems.L2, inverse.vectors
    found, spent = krylov(curvature, N)
    estimate = torch.linalg.eigvalsh(found.projected) + problems.L2
    projected: dict[str, dict[int, list[float]]] = {"gaussian": {}, "orthonormal": {}}
    for p in RANKS + WIDER:
        for draw in range(draws):
            rng = torch.Generator().manual_seed(1000 * draw + p)
            g = torch.randn(p, len(exact), generator=rng, dtype=torch.float64)
            for kind, rows in (("gaussian", g / p**0.5), ("orthonormal", torch.linalg.qr(g.T).Q.T)):
                turned = rows @ vectors.T
                values = torch.linalg.eigvalsh((turned * exact) @ turned.T)
                projected[kind].setdefault(p, []).append(distance(exact, values, p))
    gauss = wherefrom.GGN(case.problem())
    fisher = torch.linalg.eigvalsh(write_matrix(gauss))
    second, again = krylov(gauss, N)
    largest = top(plain, TOP).abs()
    return {
        "note": case.note,
        "parameters": len(exact),
        "extremes": [float(exact[0]), float(exact[-1])],
        "trace": float(exact.sum()),
        "dense seconds": seconds,
        "arnoldi seconds": [spent, again],
        "deviation": {p: float(top(exact, p).std(correction=0)) for p in RANKS + WIDER},
        "arnoldi": {p: distance(exact, estimate, p) for p in RANKS},
        "projected": projected,
        "ritz": {"Hessian": ritz_errors(found, plain), "GGN": ritz_errors(second, fisher)},
        "twentieth": [float(largest.min()), float(top(fisher, TOP).min())],
    }


def summary(r: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        r["note"],
        f"{r['parameters']:,} parameters; eigenvalues of H + L2 I from {r['extremes'][0]:.2g} to "
        f"{r['extremes'][1]:.3g}, trace {r['trace']:.3g}; dense {r['dense seconds']:.0f} CPU s, 200 products "
        f"{r['arnoldi seconds'][0]:.0f} CPU s (GGN {r['arnoldi seconds'][1]:.1f} s).",
        "",
        "| p | std of the exact | Arnoldi, n = 200 | RandProj, Gaussian | RandProj, orthonormal |",
        "|---|---|---|---|---|",
    ]
    for p in map(str, RANKS + WIDER):
        cells = [f"{r['deviation'][p]:.3g}", f"{r['arnoldi'][p]:.1e}" if p in r["arnoldi"] else "–"]
        cells += [_spread(r["projected"][kind][p]) for kind in ("gaussian", "orthonormal")]
        lines.append(f"| {p} | " + " | ".join(cells) + " |")
    lines += ["", "| n | " + " | ".join(f"{k}, largest of {TOP} (median)" for k in r["ritz"]) + " |", "|---|---|---|"]
    for n in map(str, STEPS):
        cells = [f"{max(e[n]):.0e} ({sorted(e[n])[TOP // 2]:.0e})" for e in r["ritz"].values()]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    reached = {k: next((n for n in STEPS if max(e[str(n)]) <= TARGET), None) for k, e in r["ritz"].items()}
    lines += ["", f"All {TOP} within {TARGET:g} from n = {reached['Hessian']} (Hessian), {reached['GGN']} (GGN)."]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    t = torch.tensor(values)
    return f"{float(t.mean()):.3g} ± {float(t.std()):.1g}" if len(values) > 1 else f"{values[0]:.3g}"


def draw(r: dict[str, Any]) -> None:
    """W1 against p, logarithmic."""
    problems.style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    both = RANKS + WIDER
    for kind, colour, label in (
        ("gaussian", "#d55e00", "RandProj, Gaussian rows"),
        ("orthonormal", "#cc79a7", "RandProj, orthonormal rows"),
    ):
        means = [sum(v) / len(v) for v in (r["projected"][kind][str(p)] for p in both)]
        axes.plot(both, means, "o-", ms=3, color=colour, label=label)
    axes.plot(RANKS, [r["arnoldi"][str(p)] for p in RANKS], "o-", ms=3, color="#0072b2", label="Arnoldi, n = 200")
    deviations = [r["deviation"][str(p)] for p in both]
    axes.plot(both, deviations, color="#666666", lw=1, ls="--", label="std of the exact values")
    axes.set(xscale="log", yscale="log", xlabel="p", ylabel="W1 of the top p eigenvalues")
    axes.legend(fontsize=7)
    problems.save(figure, "eigenvalues")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5, help="of the random projections")
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    file = problems.OUT / "eigenvalues.json"
    if not args.redraw:
        results = measure(args.draws)
        file.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    draw(results)
    print(summary(results))


if __name__ == "__main__":
    main()
