"""How loose may a solve be before the linear datamodeling score notices? LDS over a ladder of residuals.

    python -m benchmarks.tolerance digits concrete mnist-cnn --methods dual nystrom ekfac --seeds 5

All but ``astra`` are conjugate gradients with that preconditioner, stopped at each tolerance; ``astra`` is stopped
after each number of steps, because a residual is another error there. Every row is compared with ``dual`` at 1e-3,
models and damping being the same: the interval of the difference is a bootstrap over subsets and queries drawn anew for
both together, the models held fixed. A damping is as in `benchmarks.lds`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import problems
from benchmarks.harness import RESULTS, cpu_seconds, machine, run
from benchmarks.lds import describe, parse_damping

TOLERANCES = (0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 1e-3)
REFERENCE = 1e-3
CHECK = 1e-4  # one rung of Dual-CG beyond the reference, to see that the reference itself has settled
STEPS = (10, 25, 50, 100, 200, 400)
Kind = Literal["absolute", "relative", "per example"]  # of a damping
METHODS = ("dual", "nystrom", "ekfac", "cg", "astra")
NAMES = {"dual": "CG(Dual)", "nystrom": "CG(Nystrom)", "ekfac": "CG(EKFAC)", "cg": "CG", "astra": "ASTRA"}
MARGIN = 0.005  # of LDS: a smaller change is none
HEADER = (
    "| problem | damping | solver | stopped at | steps | residual, median (largest) | LDS, one model (± over seeds) "
    "| change (95% interval) | LDS, ensemble | change (95% interval) | top 10 shared | CPU s |\n" + "|---" * 12 + "|"
)


def ladder(problem: str, method: str, rungs: Sequence[float], damping: float, kind: Kind, seed: int) -> dict[str, Any]:
    """One model's scores at each rung, from one fit. To be run by `harness.run`.

    Returns:
        ``scores`` (K, Q, N) float32, ``residual`` (K, Q), ``steps`` (K,), ``cpu_s`` (K,) of the solve of all queries.
    """
    import torch

    import wherefrom

    p = problems.load(problem)
    task = wherefrom.Classification() if p.kind == "classification" else wherefrom.Regression()
    amount = wherefrom.Damping(damping, kind)
    influence = wherefrom.Influence(solver=wherefrom.EKFAC(), damping=amount).fit(p.model(seed), task, (p.x, p.y))
    fitted, curvature = influence.problem, influence.inverse.curvature
    b = influence.query_gradients((p.xq, p.yq), getattr(task, p.measured)).dense()
    solutions, spent = [], []
    for rung in rungs:
        inverse = solver(method, rung).fit(curvature, amount)  # shares the factors of the fit above
        start = cpu_seconds()
        solutions.append(inverse.solve(b))
        spent.append(cpu_seconds() - start)
    scores = torch.empty(len(rungs), len(p.xq), len(p.x))
    for index, batch in fitted.batches():
        g = fitted.loss_gradients(batch)
        for k, (x, _) in enumerate(solutions):
            scores[k, :, index.start : index.stop] = g.dot(x)[..., 0]
    certificates = [certificate for _, certificate in solutions]
    return {
        "scores": scores.numpy(),
        "residual": np.stack([c.residual.numpy() for c in certificates if c.residual is not None]),
        "steps": np.array([c.steps for c in certificates]),
        "cpu_s": np.array(spent),
    }


def solver(method: str, rung: float) -> Any:
    """The solver of a rung: of a tolerance, or for ASTRA of a number of steps."""
    import wherefrom

    inner = {"dual": wherefrom.Dual, "nystrom": wherefrom.Nystrom, "ekfac": wherefrom.EKFAC}
    if method in inner:
        return wherefrom.CG(preconditioner=inner[method](), tolerance=rung, steps=1000)
    if method == "cg":
        return wherefrom.CG(tolerance=rung, steps=2000)
    if method == "astra":
        return wherefrom.ASTRA(steps=int(rung))
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")


@dataclass(frozen=True)
class Row:
    """One line of the table, and of the record."""

    problem: str
    damping: str
    method: str
    rung: float  # a tolerance, or a number of steps
    steps: float  # mean over seeds
    median: float  # residual, over seeds and queries
    largest: float
    single: list[float]  # LDS of each seed's model
    change: tuple[float, float, float]  # of their mean: difference, interval
    ensemble: float
    ensemble_change: tuple[float, float, float]
    shared: float  # of the ten highest scores of a query, those that the reference has too
    cpu_s: float  # mean over seeds

    def __str__(self) -> str:
        at = f"{self.rung:g}" + (" steps" if self.method == "astra" else "")
        spread = f" ± {np.std(self.single, ddof=1):.3f}" if len(self.single) > 1 else ""
        cells = [self.problem, self.damping, NAMES[self.method], at, f"{self.steps:.0f}"]
        cells += [f"{self.median:.1e} ({self.largest:.1e})", f"{np.mean(self.single):.4f}{spread}"]
        cells += [_change(self.change), f"{self.ensemble:.4f}", _change(self.ensemble_change)]
        return f"| {' | '.join([*cells, f'{self.shared:.1f}', f'{self.cpu_s:.1f}'])} |"

    def passes(self, rule: str) -> bool:
        """Whether LDS has not changed, of one model and of the ensemble, by a rule of `RULES`."""
        return all(RULES[rule](*c) for c in (self.change, self.ensemble_change))


RULES = {
    f"change below {MARGIN}": lambda d, *_: abs(d) < MARGIN,
    f"change below {MARGIN}, its interval covers 0": lambda d, low, high: abs(d) < MARGIN and low <= 0 <= high,
    f"whole interval of the change within ±{MARGIN}": lambda _, low, high: max(abs(low), abs(high)) < MARGIN,
}


def _change(c: tuple[float, float, float]) -> str:
    return f"{c[0]:+.4f} ({c[1]:+.4f} to {c[2]:+.4f})"


def paired(rungs: np.ndarray, reference: np.ndarray, truth: np.ndarray, samples: int = 500) -> np.ndarray:
    """95% intervals of the mean change of LDS from the reference, (K, 2); every draw is the same for both.

    Args:
        rungs: (K, S, M, Q) sums of scores over the subsets, of S models; reference: (S, M, Q) likewise.
        truth: (M, Q) what they predict.
        samples: number of bootstrap samples, each of subsets and queries anew.
    """
    rng = np.random.default_rng(0)
    together = np.concatenate([reference[None], rungs])  # (K + 1, S, M, Q)
    (M, Q), drawn = truth.shape, []
    for _ in range(samples):
        subsets, weights = rng.integers(M, size=M), rng.multinomial(Q, np.full(Q, 1 / Q)) / Q
        rho = _spearman(together[:, :, subsets], truth[subsets]).mean(1) @ weights  # (K + 1,)
        drawn.append(rho[1:] - rho[0])
    rho = _spearman(together, truth).mean((1, 2))
    centre = rho[1:] - rho[0] - np.mean(drawn, 0)  # repeated subsets tie, which shrinks correlations: recentred
    return (np.quantile(drawn, (0.025, 0.975), axis=0) + centre).T


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of a (..., M, Q) with b (M, Q) over M: (..., Q)."""
    from scipy.stats import rankdata

    a, b = (rankdata(v, axis=-2) - (v.shape[-2] + 1) / 2 for v in (a, b))
    return (a * b).sum(-2) / np.sqrt((a * a).sum(-2) * (b * b).sum(-2))


def rows(p: problems.Problem, method: str, damping: str, found: dict[str, Any], reference: np.ndarray) -> list[Row]:
    """The rows of one ladder; ``found`` as from `ladder` with a leading axis of seeds, reference (S, Q, N)."""
    from wherefrom.tools.evaluate import linear_datamodeling_score

    if p.masks is None or p.targets is None:
        raise ValueError(f"{p.name} has no retraining targets.")

    def lds(scores: np.ndarray) -> float:
        return linear_datamodeling_score(scores, p.masks, p.targets, bootstrap=1, splits=1).mean

    def predicted(scores: np.ndarray) -> np.ndarray:  # (..., Q, N) to (..., M, Q)
        return -np.swapaxes(scores @ kept, -1, -2)

    kept, truth = p.masks.T.astype(np.float64), p.targets.astype(np.float64).mean(1)
    scores = np.swapaxes(found["scores"], 0, 1).astype(np.float64)  # (K, S, Q, N)
    exact, mean = reference.astype(np.float64), reference.astype(np.float64).mean(0)
    single = np.array([[lds(s) for s in rung] for rung in scores])  # (K, S)
    ensemble = np.array([lds(rung.mean(0)) for rung in scores])  # (K,)
    of_one = paired(predicted(scores), predicted(exact), truth)
    of_all = paired(predicted(scores.mean(1, keepdims=True)), predicted(mean[None]), truth)
    change, shift = single.mean(1) - np.mean([lds(s) for s in exact]), ensemble - lds(mean)
    best = _top(exact)
    return [
        Row(
            problem=p.name,
            damping=damping,
            method=method,
            rung=float(found["rungs"][k]),
            steps=float(found["steps"][:, k].mean()),
            median=float(np.median(found["residual"][:, k])),
            largest=float(found["residual"][:, k].max()),
            single=single[k].tolist(),
            change=(float(change[k]), *of_one[k].tolist()),
            ensemble=float(ensemble[k]),
            ensemble_change=(float(shift[k]), *of_all[k].tolist()),
            shared=float((_top(scores[k]) & best).sum(-1).mean()),
            cpu_s=float(found["cpu_s"][:, k].mean()),
        )
        for k in range(len(scores))
    ]


def _top(scores: np.ndarray, count: int = 10) -> np.ndarray:
    """True at the highest scores of each query, (..., Q, N)."""
    return scores >= -np.partition(-scores, count - 1, axis=-1)[..., count - 1 : count]


def measure(p: problems.Problem, args: argparse.Namespace) -> list[Row]:
    """All rows of one problem, printed as they come."""
    out: list[Row] = []
    check = (CHECK,) if args.check else ()
    for text in args.dampings:
        damping, kind = parse_damping(text, p.damping)

        def seeds(method: str, rungs: Sequence[float], d: float = damping, k: str = kind) -> dict[str, Any]:
            options = {"problem": p.name, "method": method, "rungs": list(rungs), "damping": d, "kind": k}
            count = range(min(args.seeds, len(p.states)))
            runs = [run("benchmarks.tolerance:ladder", {**options, "seed": s}, args.threads).result for s in count]
            return {"rungs": rungs} | {key: np.stack([r[key] for r in runs]) for key in runs[0]}

        whole = seeds("dual", (*TOLERANCES, *check) if "dual" in args.methods else (REFERENCE,))
        reference = whole["scores"][:, whole["rungs"].index(REFERENCE)]
        for method in args.methods:
            rungs = whole["rungs"] if method == "dual" else STEPS if method == "astra" else TOLERANCES
            found = whole if method == "dual" else seeds(method, rungs)
            out += rows(p, method, describe(damping, kind), found, reference)
            print("\n".join(str(r) for r in out[-len(rungs) :]), flush=True)
    return out


def recommend(found: Sequence[Row]) -> list[str]:
    """For each method and rule, the loosest rung at which, and at all tighter ones, no problem and damping changes."""
    lines = []
    for method in dict.fromkeys(r.method for r in found):
        mine = [r for r in found if r.method == method and r.rung != CHECK]
        rungs = sorted({r.rung for r in mine}, reverse=method == "astra")  # the tightest first
        for rule in RULES:
            held, worst = None, None
            for rung in rungs:
                level = [r for r in mine if r.rung == rung]
                if not all(r.passes(rule) for r in level):
                    break
                held, worst = rung, max(level, key=lambda r: r.median)
            if held is None or worst is None:
                lines.append(f"- {NAMES[method]}: {rule}: no rung")
                continue
            at = f"{held:g} steps" if method == "astra" else f"tolerance {held:g}"
            lines.append(f"- {NAMES[method]}: {rule}: {at}, median residual up to {worst.median:.2g}")
    return lines


def write(stem: Path, found: Sequence[Row], notes: Sequence[str], args: argparse.Namespace) -> str:
    """The tables so far as text, written with the record."""
    facts = machine()
    where = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "load")
    said = "\n".join(recommend(found))
    table = "\n".join(str(r) for r in found)
    text = f"# LDS against the residual\n\n{HEADER}\n{table}\n\nLoosest without change, everywhere:\n\n{said}\n\n"
    text += "\n".join(f"- {n}" for n in notes) + f"\n\nMachine: {where}; {args.threads} thread(s).\n"
    RESULTS.mkdir(exist_ok=True)
    Path(f"{stem}.md").write_text(text)
    record = {
        "arguments": vars(args) | {"add": [str(path) for path in args.add]},
        "rows": [asdict(r) for r in found],
        "notes": list(notes),
        "machine": facts,
    }
    Path(f"{stem}.json").write_text(json.dumps(record, indent=1))
    return said


def main() -> None:
    """Compute the tables and write them to ``benchmarks/results``, again after each problem."""
    from wherefrom.tools.evaluate import linear_datamodeling_score

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(problems.RETRAINED), help=", ".join(problems.RETRAINED))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dampings", nargs="+", default=["x1", "trace1"], help="x1, mean0.1, trace1 or a number")
    parser.add_argument("--seeds", type=int, default=5, help="models in the ensemble")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help=f"one rung of dual at {CHECK:g} too")
    parser.add_argument("--add", nargs="*", default=[], type=Path, help="records of earlier runs, to be put in front")
    args = parser.parse_args()
    stem = RESULTS / f"tolerance_{time.strftime('%Y%m%d-%H%M%S')}"
    earlier = [json.loads(path.read_text()) for path in args.add]
    found = [Row(**row) for record in earlier for row in record["rows"]]
    notes = [note for record in earlier for note in record["notes"]]
    said = ""
    print(HEADER)
    for name in args.problems:
        p = problems.load(name)
        if p.masks is None or p.targets is None:
            parser.error(f"{name} has no retraining targets; LDS needs one of {', '.join(problems.RETRAINED)}.")
        found += measure(p, args)
        ceiling = linear_datamodeling_score(np.zeros((len(p.xq), len(p.x))), p.masks, p.targets, bootstrap=1).ceiling
        m, r, q = p.targets.shape
        size = f"{len(p.x)} examples, {q} queries, {m} subsets x {r} repeats, {min(args.seeds, len(p.states))} models"
        notes.append(f"{name}: {size}, LDS ceiling {ceiling:.3f}{'; ' + p.note if p.note else ''}")
        said = write(stem, found, notes, args)
    print("\n" + "\n".join([said, *notes]) + f"\n\nwritten: {stem}.md", flush=True)


if __name__ == "__main__":
    main()
