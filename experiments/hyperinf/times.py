"""Time and error of ways to invert M: appendix G of HyperINF (tables 9 and 10, figure 11).

    M = S^T S / N + 0.1 I  ("mean"),  or  S^T S + 0.1 I  ("sum"),     S (N, d) standard normal, N = 12800

Errors are relative in the Frobenius norm, |X - M^-1| / |M^-1|, against the inverse by an eigendecomposition in float64,
which is not timed. Times are processor seconds of one thread on a CPU, which other work on the machine disturbs little,
and wall seconds on a GPU, synchronised before and after; the better of two runs (of one above d = 1024), then mean and
standard deviation over seeds.

    python -m experiments.hyperinf.times --dims 16 64 256 1024
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.errors import DivergenceError
from wherefrom.solvers.schulz import cholesky, schulz

HERE = Path(__file__).resolve().parent
DAMPING, ITERATIONS = 0.1, 20


def conjugate_gradients(m: Tensor, b: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """M^-1 b for the columns of b (d, k), all at once."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r, r.square().sum(0)
    for _ in range(iterations):
        q = m @ p
        step = rr / (p * q).sum(0).clamp(min=1e-300)
        x, r = x + step * p, r - step * q
        rr, before = r.square().sum(0), rr
        p = r + rr / before.clamp(min=1e-300) * p
    return x


def gmres(m: Tensor, b: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """M^-1 b for the columns of b (d, k) from Krylov spaces of their own, by modified Gram-Schmidt; no restart."""
    d, k = b.shape
    steps = min(iterations, d)
    size = b.norm(dim=0)  # (k,)
    basis = [b / size]
    h = b.new_zeros(k, steps + 1, steps)
    for j in range(steps):
        w = m @ basis[j]
        for i, q in enumerate(basis):
            h[:, i, j] = (q * w).sum(0)
            w = w - h[:, i, j] * q
        h[:, j + 1, j] = w.norm(dim=0)
        basis.append(torch.where(h[:, j + 1, j] > 1e-14 * size, w / h[:, j + 1, j].clamp(min=1e-300), 0.0))
    target = b.new_zeros(k, steps + 1, 1)
    target[:, 0, 0] = size
    # the least-squares problem of each column; a space that is exhausted leaves zero columns
    y = torch.linalg.pinv(h, rtol=1e-14) @ target  # (k, steps, 1)
    x = torch.zeros_like(b)
    for j in range(steps):
        x.addcmul_(basis[j], y[:, j, 0].expand_as(b))
    return x


def blocks(solve: Callable[[Tensor, Tensor], Tensor], m: Tensor, columns: int) -> Tensor:
    """The inverse, so many columns at a time."""
    eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
    return torch.cat([solve(m, b.contiguous()) for b in eye.split(columns, 1)], 1)


def schulz_from(m: Tensor, start: float, iterations: int) -> Tensor:
    """X <- X (2 I - M X) from ``start`` I, in the dtype of M."""
    x = start * torch.eye(len(m), dtype=m.dtype, device=m.device)
    for _ in range(iterations):
        x = 2 * x - x @ (m @ x)
    return x


METHODS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "schulz": ("Schulz, ours", lambda m: schulz(m, DAMPING).x),
    "schulz-double": ("Schulz, ours, float64 alone", lambda m: schulz(m, DAMPING, mixed=False).x),
    "schulz-5e-5": ("Schulz from 5e-5 I, 20 it.", lambda m: schulz_from(m, 5e-5, ITERATIONS)),
    "cholesky": ("Cholesky", lambda m: cholesky(m).x),
    "inv": ("torch.linalg.inv", torch.linalg.inv),
    "cg": ("CG, all columns, 20 it.", lambda m: blocks(conjugate_gradients, m, 1024)),
    "cg-column": ("CG, column by column, 20 it.", lambda m: blocks(conjugate_gradients, m, 1)),
    "gmres": ("GMRES, all columns, 20 it.", lambda m: blocks(gmres, m, 256)),
}


def timed(f: Callable[[Tensor], Tensor], m: Tensor, repeats: int) -> tuple[float, Tensor | None]:
    """Seconds of the best of some runs, and the result; None where it diverged."""
    best, x = math.inf, None
    for _ in range(repeats):
        start = _now(m)
        try:
            x = f(m)
        except DivergenceError:
            x = None
        best = min(best, _now(m) - start)
    return best, x


def _now(m: Tensor) -> float:
    """Processor seconds, or wall seconds once the GPU is done."""
    if not m.is_cuda:
        return time.process_time()
    torch.cuda.synchronize(m.device)
    return time.perf_counter()


def measure(d: int, methods: list[str], N: int, seed: int, device: str, dtype: torch.dtype, slow: int) -> list[dict]:
    """Every method on both matrices of one seed; those that go column by column up to d = ``slow``."""
    rng = torch.Generator().manual_seed(seed)
    s = torch.randn(N, d, generator=rng).double().to(device)
    values, q = torch.linalg.eigh(s.T @ s)
    found = []
    for scale, by in (("mean", 1 / N), ("sum", 1.0)):
        m = (s.T @ s * by).to(dtype)
        m.diagonal().add_(DAMPING)
        exact = (q / (values * by + DAMPING)) @ q.T
        for name in methods:
            if name == "cg-column" and d > slow:
                continue
            seconds, x = timed(METHODS[name][1], m, 2 if d <= 1024 else 1)
            error = math.inf if x is None else float((x.double() - exact).norm() / exact.norm())
            error = error if math.isfinite(error) else math.inf
            found.append({"d": d, "scale": scale, "method": name, "seed": seed, "seconds": seconds, "error": error})
            print(f"d={d} {scale} seed {seed} {METHODS[name][0]}: {seconds:.4f} s, error {error:.1e}", flush=True)
    return found


def table(rows: list[dict], what: str) -> str:
    """Mean and standard deviation over seeds of ``what``, a row per matrix, a column per method."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    cells = list(dict.fromkeys((r["d"], r["scale"]) for r in rows))
    heads = ["d", "matrix", *(METHODS[m][0] for m in methods)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for d, scale in cells:
        values = [str(d), scale]
        for m in methods:
            some = [r[what] for r in rows if (r["d"], r["scale"], r["method"]) == (d, scale, m)]
            values.append(_mean(some))
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _mean(some: list[float]) -> str:
    if not some:
        return "–"
    if math.inf in some:
        return "∞"
    spread = statistics.stdev(some) if len(some) > 1 else 0.0
    return f"{statistics.fmean(some):.2g} ± {spread:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--examples", type=int, default=12800)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--slow", type=int, default=256, help="largest d for methods that go column by column")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warm = torch.eye(64, dtype=torch.float64, device=args.device)
    for name in args.methods:  # the first call of each pays for loading libraries
        METHODS[name][1](warm)
    rows = []
    for d in args.dims:
        for seed in range(args.seeds):
            dtype = getattr(torch, args.dtype)
            rows += measure(d, args.methods, args.examples, seed, args.device, dtype, args.slow)
    head = f"N = {args.examples}, damping {DAMPING}, {args.seeds} seeds, M in {args.dtype}, torch {torch.__version__}, "
    head += f"{args.device}, {torch.get_num_threads()} threads, {platform.machine()}."
    text = f"{head}\n\nRelative error:\n\n{table(rows, 'error')}\n\nSeconds:\n\n{table(rows, 'seconds')}\n"
    name = f"times-{args.dtype}-" + "-".join(map(str, args.dims))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps({"configuration": head, "runs": rows}, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
