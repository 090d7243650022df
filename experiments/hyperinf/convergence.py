"""The synthetic convergence test of HyperINF: section 4 (figure 1) and appendix H (figures 12 to 16).

    M = (1/N) sum_i s_i s_i^T + lambda I,    error |x - M^-1 v| / |M^-1 v|    after each iteration of each method

with the entries of all s_i and of v from one distribution, lambda = 0.01. The paper prints absolute errors; these are
relative. Everything is in float64.

    python -m experiments.hyperinf.convergence --dims 512 1024 2048
    python -m experiments.hyperinf.convergence --dims 4096 --methods schulz schulz-paper
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.solvers.schulz import predict_steps, schulz, upper_bound

HERE = Path(__file__).resolve().parent
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of standard normal z; the second number is the deviation
    "N(0,1)": lambda z: z,
    "N(0.5,1)": lambda z: 0.5 + z,
    "N(0,5)": lambda z: 5 * z,
    "N(0.5,5)": lambda z: 0.5 + 5 * z,
    "U(0,1)": lambda z: torch.special.ndtr(z),
    "N(3,1)": lambda z: 3 + z,  # not in the paper: the largest eigenvalue, about 9 d, is too much for its start
}
PAPERS = tuple(DISTRIBUTIONS)[:5]
PAPERS_START = 5e-4
LIMIT = 1e-4  # relative error that ours must stay below in every cell


@dataclass(frozen=True)
class Case:
    """One cell: M, v, the answer, and what the methods need to know."""

    s: Tensor  # (N, d)
    m: Tensor  # (d, d)
    v: Tensor  # (d,)
    exact: Tensor  # (d,)
    damping: float
    largest: float  # eigenvalue of M, by power iteration

    def error(self, x: Tensor) -> float:
        """Relative error; infinite where x is not finite."""
        error = float((x - self.exact).norm() / self.exact.norm())
        return error if math.isfinite(error) else math.inf


@dataclass
class Run:
    """Relative errors after each iteration, the first being that of the start; seconds; what else is known."""

    errors: list[float]
    seconds: float = 0.0
    note: str = ""

    def at(self, step: int) -> float:
        """The error after so many iterations; one that stopped earlier stays."""
        return self.errors[min(step, len(self.errors) - 1)]


def case(d: int, N: int, distribution: str, damping: float = 0.01, seed: int = 0, device: str = "cpu") -> Case:
    """The matrix, the vector, and the answer by a Cholesky factorisation."""
    rng = torch.Generator().manual_seed(seed)
    s, v = (DISTRIBUTIONS[distribution](torch.randn(*n, generator=rng).double()).to(device) for n in ((N, d), (d,)))
    m = s.T @ s / N
    m.diagonal().add_(damping)
    x = torch.ones_like(v)
    for _ in range(200):
        x = m @ (x / x.norm())
    largest = float(x.norm())
    exact = torch.cholesky_solve(v[:, None], torch.linalg.cholesky(m))[:, 0]
    return Case(s, m, v, exact, damping, largest)


# --- the methods: iterates x_0, x_1, ... ---


def lissa(c: Case) -> Iterator[Tensor]:
    """As printed: x <- v + (I - M) x from v. Diverges if an eigenvalue of M exceeds 2."""
    x = c.v
    while True:
        yield x
        x = c.v + x - c.m @ x


def richardson(c: Case, step: float, x: Tensor) -> Iterator[Tensor]:
    """x <- x + step (v - M x)."""
    while True:
        yield x
        x = x + step * (c.v - c.m @ x)


def datainf(c: Case) -> Iterator[Tensor]:
    """The closed form; no iteration."""
    weights = (c.s @ c.v) / (c.damping + c.s.square().sum(1))
    yield (c.v - c.s.T @ weights / len(c.s)) / c.damping


def sor(c: Case, omega: float, printed: bool) -> Iterator[Tensor]:
    """Successive over-relaxation on M = D + L + U: as in eq. 28, whose L and U have the wrong sign, or corrected."""
    sign = -1 if printed else 1
    diagonal = c.m.diagonal()
    factor = sign * omega * c.m.tril(-1)
    factor.diagonal().add_(diagonal)
    upper, x = c.m.triu(1), PAPERS_START * c.v
    while True:
        yield x
        b = omega * c.v - sign * omega * (upper @ x) + (1 - omega) * diagonal * x
        x = torch.linalg.solve_triangular(factor, b[:, None], upper=False)[:, 0]


def schulz_paper(c: Case) -> Iterator[Tensor]:
    """X <- X (2 I - M X) from 5e-4 I."""
    x = PAPERS_START * torch.eye(len(c.m), dtype=c.m.dtype, device=c.m.device)
    while True:
        yield x @ c.v
        x = 2 * x - x @ (c.m @ x)


METHODS: dict[str, tuple[str, Callable[[Case], Iterator[Tensor]]]] = {
    "schulz-paper": ("Schulz from 5e-4 I", schulz_paper),
    "datainf": ("DataInf", datainf),
    "lissa": ("LiSSA as printed", lissa),
    "lissa-scaled": ("LiSSA, step 1/λmax, from v/λ", lambda c: richardson(c, _step(c), c.v / c.damping)),
    "lissa-scaled-v": ("LiSSA, step 1/λmax, from v·step", lambda c: richardson(c, _step(c), c.v * _step(c))),
    "neumann": ("Neumann series from 5e-4 I", lambda c: richardson(c, PAPERS_START, PAPERS_START * c.v)),
    "sor-0.5-printed": ("SOR 0.5 as printed", lambda c: sor(c, 0.5, printed=True)),
    "sor-1.5-printed": ("SOR 1.5 as printed", lambda c: sor(c, 1.5, printed=True)),
    "sor-0.5": ("SOR 0.5 corrected", lambda c: sor(c, 0.5, printed=False)),
    "sor-1.5": ("SOR 1.5 corrected", lambda c: sor(c, 1.5, printed=False)),
}


def _step(c: Case) -> float:
    return 1 / c.largest


def run(c: Case, iterates: Iterator[Tensor], iterations: int) -> Run:
    """Errors of at most so many iterations; stops where one is no longer finite, or nothing changes."""
    errors: list[float] = []
    start = time.perf_counter()
    for x in iterates:
        errors.append(c.error(x))
        if len(errors) > iterations or errors[-1] == math.inf:
            break
        if len(errors) > 3 and errors[-1] < 1e-8 and errors[-1] > 0.5 * errors[-2]:
            break
    note = "" if errors[-1] < math.inf else f"not finite after {len(errors) - 1} iterations"
    return Run(errors, time.perf_counter() - start, note)


def ours(c: Case) -> Run:
    """The library's Schulz iteration: its own start, its own number of steps. One error, the last."""
    start = time.perf_counter()
    found = schulz(c.m, lower=c.damping)
    seconds = time.perf_counter() - start
    steps = predict_steps(c.damping, float(upper_bound(c.m)), 1e-10, len(c.m))
    residual = float(found.residuals[-1])
    return Run([c.error(found.x @ c.v)], seconds, f"{found.steps} steps, {steps} predicted, |I - M X| = {residual:.1e}")


def cell(
    d: int,
    N: int,
    distribution: str,
    methods: tuple[str, ...] = ("schulz", *METHODS),
    iterations: int = 40,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Case, dict[str, Run]]:
    """All methods on one matrix; "schulz" is ours."""
    c = case(d, N, distribution, seed=seed, device=device)
    return c, {name: ours(c) if name == "schulz" else run(c, METHODS[name][1](c), iterations) for name in methods}


# --- the table ---


def table(rows: list[dict], methods: list[str], iterations: int) -> str:
    """Final relative errors, a row per cell."""
    names = {"schulz": "Schulz, ours", **{key: title for key, (title, _) in METHODS.items()}}
    heads = ["d", "N", "entries", "λmax"]
    for m in methods:
        heads += [f"{names[m]}, 20 it."] if m == "schulz-paper" else []
        heads += [names[m] + (" (steps)" if m == "schulz" else "")]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        values = [str(row["d"]), str(row["N"]), row["distribution"], f"{row['largest']:.3g}"]
        for m in methods:
            found = Run(**row["runs"][m])
            values += [_number(found.at(20))] if m == "schulz-paper" else []
            values += [_number(found.at(iterations)) + (f" ({found.note.split()[0]})" if m == "schulz" else "")]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _number(error: float) -> str:
    return "∞" if error == math.inf else f"{error:.0e}"


def verdict(rows: list[dict]) -> str:
    """The cells in which ours misses the limit, and those in which the others reach it."""
    where = [
        f"d={r['d']} N={r['N']} {r['distribution']}" for r in rows if not r["runs"]["schulz"]["errors"][-1] < LIMIT
    ]
    lines = [f"Cells in which ours is above {LIMIT:g}: {', '.join(where) or 'none'} (of {len(rows)})."]
    for m, (title, _) in METHODS.items():
        held = [Run(**r["runs"][m]) for r in rows if m in r["runs"]]
        for steps in (20, None) if m == "schulz-paper" and held else (None,) if held else ():
            errors = [r.errors[-1] if steps is None else r.at(steps) for r in held]
            grown, reached = sum(not e < 1 for e in errors), sum(e < LIMIT for e in errors)
            lines.append(
                f"- {title}{f', {steps} iterations' if steps else ''}: below {LIMIT:g} in {reached} of {len(errors)} "
                f"cells, at 1 or above in {grown}."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--examples", type=int, nargs="+", default=[200, 800, 6400, 12800])
    parser.add_argument("--distributions", nargs="+", default=list(PAPERS), choices=list(DISTRIBUTIONS))
    parser.add_argument("--methods", nargs="+", default=["schulz", *METHODS], choices=["schulz", *METHODS])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["schulz", *args.methods]))
    rows, begun = [], time.perf_counter()
    for d in args.dims:
        for distribution in args.distributions:
            for N in args.examples:
                c, runs = cell(d, N, distribution, tuple(methods), args.iterations, args.seed, args.device)
                found = {name: asdict(r) for name, r in runs.items()}
                rows.append({"d": d, "N": N, "distribution": distribution, "largest": c.largest, "runs": found})
                print(
                    f"d={d} N={N} {distribution}: ours {runs['schulz'].errors[-1]:.1e}, {runs['schulz'].note}, "
                    f"{runs['schulz'].seconds:.1f} s",
                    flush=True,
                )
                _write(args, methods, rows, time.perf_counter() - begun)  # a killed run loses one cell
    print("\n" + _write(args, methods, rows, time.perf_counter() - begun))


def _write(args: argparse.Namespace, methods: list[str], rows: list[dict], seconds: float) -> str:
    """The cells so far as JSON, and their table, which is returned."""
    said = f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {platform.machine()}"
    head = f"{args.iterations} iterations, seed {args.seed}, {said}, {seconds:.0f} s in all."
    text = f"{head}\n\n{table(rows, methods, args.iterations)}\n\n{verdict(rows)}\n"
    extra = [n for n in args.distributions if n not in PAPERS]
    name = "-".join(["convergence", *map(str, args.dims), *(["beyond"] if extra else [])])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps({"configuration": head, "cells": rows}, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(text)
    return text


if __name__ == "__main__":
    main()
