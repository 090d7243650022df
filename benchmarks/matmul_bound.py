"""The physical limit of pairwise scoring: the time of its matrix products alone, as plain torch.matmul.

Scoring Q queries against N examples costs, in a linear layer with O outputs and I inputs plus bias,

    (Q O, I+1) @ (I+1, N)        2 Q N O (I+1) flops                the query matrices on the training activations

(contracting the result with the output gradients is smaller by a factor I+1). Each layer is timed over several layouts
and chunk sizes with the same flops, and the fastest counts, so that the bound is a fast one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from benchmarks import problems
from benchmarks.harness import cpu_seconds, run

CHUNKS = (128, 256, 512, 1024)
PROBE = 1024  # examples on which the layouts are compared
REPEATS = 2


def bound(problem: str) -> dict[str, Any]:
    """Time the products of one problem. To be run by `harness.run`.

    Returns:
        ``cpu_s`` and ``flops`` of all layers over all examples, ``gflops_per_s``, and per layer layout, chunk, time.
    """
    import torch

    p = problems.load(problem)
    n, q = len(p.x), len(p.xq)
    layers = []
    for i, o in pairwise(p.sizes):
        options = {}
        for layout in LAYOUTS:
            for chunk in sorted({min(c, n) for c in CHUNKS}):
                options[layout, chunk] = _seconds(layout, q, o, i + 1, min(PROBE, n), chunk) / min(PROBE, n)
        finalists = sorted(options, key=options.__getitem__)[:2]
        spent = {key: _seconds(key[0], q, o, i + 1, n, key[1]) for key in finalists}
        layout, chunk = best = min(spent, key=spent.__getitem__)
        flops = 2 * q * n * o * (i + 1)
        rate = round(flops / spent[best] / 1e9, 1)
        layers.append(
            {"O": o, "I+1": i + 1, "layout": layout, "chunk": chunk, "cpu_s": spent[best], "gflops_per_s": rate}
        )
    total, flops = sum(layer["cpu_s"] for layer in layers), sum(2 * q * n * la["O"] * la["I+1"] for la in layers)
    return {
        "cpu_s": total,
        "flops": flops,
        "gflops_per_s": round(flops / total / 1e9, 1),
        "layers": layers,
        "torch": torch.__version__,
    }


LAYOUTS = ("queries @ activations", "activations @ queries", "queries @ gradients")


def _seconds(layout: str, q: int, o: int, i: int, n: int, chunk: int) -> float:
    """CPU seconds (best of `REPEATS`) of the products for n examples, cut into chunks, outputs allocated beforehand."""
    import torch

    if layout == "queries @ activations":  # (Q O, I) @ (I, n)
        left, right = torch.randn(q * o, i), torch.randn(i, chunk)
    elif layout == "activations @ queries":  # (n, I) @ (I, Q O)
        left, right = torch.randn(chunk, i), torch.randn(i, q * o)
    else:  # (Q, O I) @ (O I, n), the per-example gradients being there already
        left, right = torch.randn(q, o * i), torch.randn(chunk, o * i).T
    times = n / chunk
    out = torch.matmul(left, right)
    best = float("inf")
    for _ in range(REPEATS):
        start = cpu_seconds()
        for _ in range(max(1, round(times))):
            torch.matmul(left, right, out=out)
        best = min(best, (cpu_seconds() - start) * times / max(1, round(times)))
    return best


def measure(problem: str, threads: int = 1) -> dict[str, Any]:
    """`bound` in its own process."""
    return run("benchmarks.matmul_bound:bound", {"problem": problem}, threads=threads).result


def main() -> None:
    """Print the bound of each problem."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete", "mnist"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in args.problems:
        found = measure(name, args.threads)
        print(f"{name}: {found['cpu_s']:.3f} CPU s, {found['flops'] / 1e9:.1f} Gflop, {found['gflops_per_s']} Gflop/s")
        for layer in found["layers"]:
            print("   ", layer)


if __name__ == "__main__":
    main()
