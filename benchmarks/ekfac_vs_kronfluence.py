"""EKFAC side by side: wherefrom, kronfluence, and the time of the scoring pass's matrix products, in one run.

    python -m benchmarks.ekfac_vs_kronfluence digits concrete mnist --damping given

Each measurement is a fresh process with the same number of threads; the two libraries alternate. The table says CPU
seconds (median of the repeats), peak memory, and how far the two score matrices are apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import matmul_bound, peers, problems
from benchmarks.harness import RESULTS, Run, machine, run

HEADER = (
    "| problem | library | fit, CPU s | scores, CPU s | total, CPU s | against kronfluence | wall s | peak MB "
    "| Pearson / largest difference |\n|---|---|---|---|---|---|---|---|---|"
)


def difference(scores: np.ndarray, reference: np.ndarray) -> str:
    """Pearson correlation over all pairs, and the largest difference relative to the largest reference score."""
    a, b = scores.astype(np.float64), reference.astype(np.float64)
    worst = np.abs(a - b).max() / np.abs(b).max()
    return f"{np.corrcoef(a.ravel(), b.ravel())[0, 1]:.6f} / {worst:.1e}"


def compare(name: str, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Measure one problem. Returns the rows of the table and a record of every run."""
    p = problems.load(name)
    damping = {"given": p.damping, "heuristic": None}.get(args.damping, args.damping)
    damping = float(damping) if damping is not None else None
    theirs: list[Run] = []
    ours: list[Run] = []
    for repeat in range(args.repeats):
        if args.keep_peer and repeat == 0:
            theirs.append(_kept(name, args, damping))
        elif not args.keep_peer:
            theirs.append(peers.cached(name, args.labels, (damping,), threads=args.threads, fresh=True))
        if not args.no_ours:
            options = {"labels": args.labels, "damping": damping, "batch_size": args.batch_size}
            ours.append(run("benchmarks.ours:ekfac", {"problem": name, **options}, threads=args.threads))
    physical = matmul_bound.measure(name, args.threads)

    index = theirs[0].result["dampings"].index(damping)
    reference = theirs[0].result["scores"][index]
    their_fit = _median(theirs, peers.fit_seconds)
    their_scores = _median(theirs, lambda r: peers.score_seconds(r, index))
    their_total = their_fit + their_scores
    label = f"{name}, {'0.1 x mean' if damping is None else f'{damping:g}'}"
    version = f"kronfluence {theirs[0].result['version']}" + (" (kept)" if args.keep_peer else "")
    rows = [_row(label, version, their_fit, their_scores, 1.0, theirs, (*peers.FIT, f"scores {index}"), "")]
    if ours:
        our_fit = _median(ours, lambda r: r.phases["fit"]["cpu_s"])
        our_scores = _median(ours, lambda r: r.phases["scores"]["cpu_s"])
        ratio = their_total / (our_fit + our_scores)
        agreement = difference(ours[0].result["scores"], reference)
        rows.append(_row(label, "wherefrom", our_fit, our_scores, ratio, ours, ("fit", "scores"), agreement))
    bound = f"scoring matmuls alone ({physical['gflops_per_s']:g} Gflop/s)"
    rows.append(f"| {label} | {bound} | | {physical['cpu_s']:.2f} | | | | | |")
    record = {"kronfluence": [_costs(r) for r in theirs], "wherefrom": [_costs(r) for r in ours], "bound": physical}
    return rows, record


def _kept(name: str, args: argparse.Namespace, damping: float | None) -> Run:
    """The newest kept kronfluence run of this problem, labels and damping."""
    p = problems.load(name)
    for dampings in ((p.damping, None), (damping,)):
        if damping in dampings:
            return peers.cached(name, args.labels, dampings, threads=args.threads)
    return peers.cached(name, args.labels, (damping,), threads=args.threads)


def _median(runs: Sequence[Run], of: Callable[[Run], float]) -> float:
    return statistics.median(of(r) for r in runs)


def _row(
    label: str,
    who: str,
    fit: float,
    scores: float,
    ratio: float,
    runs: Sequence[Run],
    phases: Sequence[str],
    agreement: str,
) -> str:
    wall = statistics.median(sum(r.phases[k]["wall_s"] for k in phases) for r in runs)
    peak = statistics.median(r.peak_mb for r in runs)
    return (
        f"| {label} | {who} | {fit:.2f} | {scores:.2f} | {fit + scores:.2f} | {ratio:.2f}x | {wall:.2f} | {peak:.0f} "
        f"| {agreement} |"
    )


def _costs(done: Run) -> dict[str, Any]:
    return {k: v for k, v in vars(done).items() if k != "result"}


def main() -> None:
    """Measure, print the table, and write it to ``benchmarks/results``."""
    import json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"], help="any of digits concrete mnist")
    parser.add_argument("--labels", choices=("true", "sampled"), default="true")
    parser.add_argument("--damping", default="given", help="given (implied by training), heuristic, or a number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=512, help="of wherefrom")
    parser.add_argument(
        "--keep-peer", action="store_true", help="take kronfluence from benchmarks/cache if it is there"
    )
    parser.add_argument("--no-ours", action="store_true", help="measure kronfluence and the bound only")
    args = parser.parse_args()
    rows, records = [], {}
    for name in args.problems:
        found, records[name] = compare(name, args)
        rows += found
        print("\n".join(found), flush=True)
    facts = machine()
    where = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "load")
    text = (
        f"# EKFAC, {args.labels} labels, {args.threads} thread(s), median of {args.repeats}\n\n"
        + HEADER
        + "\n"
        + "\n".join(rows)
        + f"\n\nMachine: {where}.\n"
    )
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"ekfac_{args.labels}_{args.damping}_{time.strftime('%Y%m%d-%H%M%S')}"
    Path(f"{stem}.md").write_text(text)
    Path(f"{stem}.json").write_text(json.dumps({"arguments": vars(args), "runs": records, "machine": facts}, indent=1))
    print("\n" + text + f"\nwritten: {stem}.md", flush=True)


if __name__ == "__main__":
    main()
