"""Linear datamodeling scores of the solvers over a sweep of the damping, for one model and for an ensemble.

    python -m benchmarks.lds digits concrete --solvers ekfac cg10 exact --dampings x0.1 x1 x10 mean0.1 --seeds 5

A damping is ``x1`` (times the one implied by training), ``mean0.1`` (times the mean eigenvalue of each layer) or a
number. Every score matrix is made in its own process, so CPU seconds and memory are per model. Rows of kronfluence come
from its kept runs (``python -m benchmarks.peers digits concrete --seeds 5`` makes them).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours, peers, problems
from benchmarks.harness import RESULTS, machine, run

HEADER = (
    "| problem | solver | damping | LDS, one model (± over seeds) | LDS, ensemble (95% interval) | CPU s | peak MB "
    "| residual, median (largest) |\n|---|---|---|---|---|---|---|---|"
)


def parse_damping(text: str, implied: float) -> tuple[float, str]:
    """``x10``: 10 times the implied one; ``mean0.1``: of each layer's mean eigenvalue; ``trace1``: of tr(C) / N."""
    for prefix, kind in (("mean", "relative"), ("trace", "per example")):
        if text.startswith(prefix):
            return float(text.removeprefix(prefix)), kind
    return (float(text[1:]) * implied if text.startswith("x") else float(text)), "absolute"


def describe(damping: float, kind: str) -> str:
    """A damping as the table prints it."""
    return {"relative": f"{damping:g} x mean", "per example": f"{damping:g} x tr C / N"}.get(kind, f"{damping:.4g}")


def row(
    p: problems.Problem,
    solver: str,
    damping: str,
    matrices: Sequence[np.ndarray],
    cpu: float,
    peak: float,
    residuals: np.ndarray | None,
    whole: np.ndarray | None = None,
) -> tuple[str, dict[str, Any]]:
    """One line of the table and its record, from one (Q, N) score matrix per seed; ``whole`` is that of all models."""
    from wherefrom.tools.evaluate import linear_datamodeling_score

    single = [linear_datamodeling_score(m, p.masks, p.targets, bootstrap=1).mean for m in matrices]
    mean = np.mean(np.stack(matrices).astype(np.float64), axis=0) if whole is None else whole  # (Q, N)
    ensemble = linear_datamodeling_score(mean, p.masks, p.targets)
    low, high = ensemble.interval
    spread = f" ± {np.std(single, ddof=1):.3f}" if len(single) > 1 else ""
    solved = "" if residuals is None else f"{np.median(residuals):.1e} ({np.max(residuals):.1e})"
    together = f"{ensemble.mean:.3f} ({low:.3f} to {high:.3f}), {len(matrices)} models"
    one = f"{np.mean(single):.3f}{spread}"
    line = f"| {p.name} | {solver} | {damping} | {one} | {together} | {cpu:.1f} | {peak:.0f} | {solved} |"
    record = {
        "problem": p.name,
        "solver": solver,
        "damping": damping,
        "single": [float(v) for v in single],
        "ensemble": ensemble.mean,
        "interval": [low, high],
        "ceiling": ensemble.ceiling,
        "cpu_s": cpu,
        "peak_mb": peak,
    }
    return line, record


def table(p: problems.Problem, args: argparse.Namespace) -> tuple[list[str], list[dict[str, Any]]]:
    """All rows of one problem, printed as they come."""
    lines, records = [], []

    def add(*what: Any) -> None:
        line, record = row(p, *what)
        lines.append(line)
        records.append(record)
        print(line, flush=True)

    seeds = range(min(args.seeds, len(p.states)))
    for solver in args.solvers:
        for text in args.dampings:
            damping, kind = parse_damping(text, p.damping)
            if solver in ("dot", *ours.OVER_TRAINING) and text != args.dampings[0]:
                continue  # they take no damping, or only scale with it
            options = {"problem": p.name, "solver": solver, "damping": damping, "kind": kind}
            try:
                runs = [run("benchmarks.ours:attribute", {**options, "seed": s}, threads=args.threads) for s in seeds]
            except RuntimeError as error:
                print(f"| {p.name} | {solver} | {describe(damping, kind)} | failed |", str(error)[-1500:], flush=True)
                continue
            residuals = [r.result["residual"] for r in runs if "residual" in r.result]
            cpu = float(np.mean([r.phases["all"]["cpu_s"] for r in runs]))
            matrices = [r.result["scores"] for r in runs]
            whole = None  # of all models, where that is not the mean of each one's
            if solver in ours.TRAKS:
                job = {"problem": p.name, "solver": solver, "seed": list(seeds)}
                whole = run("benchmarks.ours:attribute", job, threads=args.threads).result["scores"]
            found = np.concatenate(residuals) if residuals else None
            said = "its own" if solver in ours.OVER_TRAINING else describe(damping, kind)
            add(solver, said, matrices, cpu, max(r.peak_mb for r in runs), found, whole)
    for labels in args.kronfluence:
        kept = [peers.cached(p.name, labels, (p.damping, None), s, args.threads) for s in seeds]
        for i, damping in enumerate((p.damping, None)):
            cpu = float(np.mean([peers.fit_seconds(r) + peers.score_seconds(r, i) for r in kept]))
            said = describe(0.1, "relative") if damping is None else describe(damping, "absolute")
            matrices = [r.result["scores"][i] for r in kept]
            add(f"kronfluence EKFAC, {labels} labels", said, matrices, cpu, max(r.peak_mb for r in kept), None)
    return lines, records


def main() -> None:
    """Compute the tables and write them to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"], help="digits, concrete")
    parser.add_argument("--solvers", nargs="*", default=list(ours.SOLVERS), choices=ours.SOLVERS + ours.OVER_TRAINING)
    parser.add_argument("--dampings", nargs="+", default=["x0.1", "x1", "x10"], help="x1, mean0.1, trace1 or a number")
    parser.add_argument("--seeds", type=int, default=5, help="models in the ensemble")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--kronfluence",
        nargs="*",
        default=["true"],
        choices=("true", "sampled"),
        help="labels of its rows; none to omit",
    )
    args = parser.parse_args()
    texts, records = [], []
    print(HEADER)
    for name in args.problems:
        p = problems.load(name)
        if p.masks is None:
            parser.error(f"{name} has no retraining targets; LDS needs digits or concrete.")
        found, new = table(p, args)
        texts += found
        records += new
    facts = machine()
    where = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "load")
    text = f"# LDS\n\n{HEADER}\n" + "\n".join(texts) + f"\n\nMachine: {where}; {args.threads} thread(s).\n"
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"lds_{time.strftime('%Y%m%d-%H%M%S')}"
    Path(f"{stem}.md").write_text(text)
    Path(f"{stem}.json").write_text(json.dumps({"arguments": vars(args), "rows": records, "machine": facts}, indent=1))
    print(f"\nwritten: {stem}.md", flush=True)


if __name__ == "__main__":
    main()
