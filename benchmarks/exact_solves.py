"""What an accurate solve costs: CPU seconds, steps, residuals and memory of solvers stopped at a residual.

    python -m benchmarks.exact_solves digits concrete mnist --solvers exact ekfac@0.1 nystrom@0.03 dual@1e-3

Fit, solve of 100 queries, certificate and scores, in a fresh process at one thread. Names: `benchmarks.ours.build`.
"""

from __future__ import annotations

import argparse

from benchmarks import problems
from benchmarks.harness import machine, run

SOLVERS = ("ekfac@0.1", "cg@0.03", "block@0.03", "nystrom@0.03", "cg@1e-3", "block@1e-3", "nystrom@1e-3", "dual@1e-3")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"], choices=problems.NAMES)
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| problem | solver | CPU s, all | steps | residual, largest of 100 | peak MB |\n|---|---|---|---|---|---|")
    for name in args.problems:
        p = problems.load(name)
        for solver in args.solvers:
            options = {"problem": name, "solver": solver, "damping": p.damping}
            found = run("benchmarks.ours:attribute", options, threads=args.threads)
            cpu, result = found.phases["all"]["cpu_s"], found.result
            residual, steps = result["residual"].max(), int(result["steps"])
            print(f"| {name} | {solver} | {cpu:.1f} | {steps} | {residual:.1e} | {found.peak_mb:.0f} |", flush=True)
    print("\nMachine: " + ", ".join(f"{k} {v}" for k, v in machine().items() if k != "load"))


if __name__ == "__main__":
    main()
