"""Exact influence by conjugate gradients preconditioned with the pruned dual: CPU seconds, steps and residuals.

    python -m benchmarks.exact_solves digits mnist

Fit, solve of 100 queries, certificate and scores, in a fresh process at one thread: digits to a residual of 1e-4, MNIST
to 1e-3.
"""

from __future__ import annotations

import argparse

from benchmarks import problems
from benchmarks.harness import machine, run

TOLERANCE = {"digits": "1e-4", "concrete": "1e-4", "mnist": "1e-3"}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "mnist"], choices=problems.NAMES)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| problem | CPU s, all | steps | residual, largest of 100 | peak MB |\n|---|---|---|---|---|")
    for name in args.problems:
        p = problems.load(name)
        options = {"problem": name, "solver": f"dual{TOLERANCE[name]}", "damping": p.damping}
        found = run("benchmarks.ours:attribute", options, threads=args.threads)
        cpu, result = found.phases["all"]["cpu_s"], found.result
        residual = result["residual"].max()
        print(f"| {name} | {cpu:.1f} | {int(result['steps'])} | {residual:.1e} | {found.peak_mb:.0f} |", flush=True)
    print("\nMachine: " + ", ".join(f"{k} {v}" for k, v in machine().items() if k != "load"))


if __name__ == "__main__":
    main()
