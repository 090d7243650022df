"""The WikiText row of ASTRA at the size of one core: does the order of the methods hold, and what does exactness cost?

    python -m experiments.language.wikitext retrain    # fine-tune on random halves of the training sequences
    python -m experiments.language.wikitext score      # each method's scores, with their cost
    python -m experiments.language.wikitext table      # linear datamodeling scores of all that was scored

One thread. Each run and each method's scores are kept in ``experiments/language/cache``, and the same command goes on
where it was stopped. ``WHEREFROM_DATA`` as in `setting`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from benchmarks.harness import machine
from torch import Tensor, nn

import wherefrom
from experiments.language import setting
from experiments.language.setting import CACHE, TUNING, Setting, Sizes, losses, prepared
from wherefrom.hf import CausalLM
from wherefrom.methods.stream import score_stream
from wherefrom.solvers.base import Solver, relative_norm
from wherefrom.tools.evaluate import linear_datamodeling_score, random_subsets, retrain
from wherefrom.tools.evaluate.statistics import spearman

SIZES = Sizes(train=500)
FOLDER = CACHE / "wikitext"
MLP = {"parameters": "mlp", "batch_size": 8, "progress": False}  # 8 x 64 tokens: what a core's cache takes
PER_EXAMPLE, RELATIVE = wherefrom.Damping.per_example(), wherefrom.Damping.relative(0.1)
SWEPT = wherefrom.Damping.of(1.1)
PAPER = wherefrom.Damping.of(0.011)  # ASTRA, table 3, WikiText-2; its schedule:
SCHEDULE = {"batch": 16, "steps": 300, "momentum": 0.9, "decay": 0.9, "decay_every": 100}
TO_TENTH = wherefrom.CG(preconditioner=wherefrom.EKFAC(), tolerance=0.1, block=True)
EVERY = 5  # of some solvers only every fifth query is asked
SOLVERS: dict[str, tuple[Solver, wherefrom.Damping, int]] = {
    "gradient dot": (wherefrom.Identity(), PER_EXAMPLE, 1),
    "EKFAC": (wherefrom.EKFAC(), PER_EXAMPLE, 1),
    "EKFAC, damping 0.1 x mean": (wherefrom.EKFAC(), RELATIVE, 1),
    "EKFAC, damping 0.011": (wherefrom.EKFAC(), PAPER, 1),
    "EKFAC, damping 1.1": (wherefrom.EKFAC(), SWEPT, 1),
    "CG(EKFAC) to 0.1": (TO_TENTH, PER_EXAMPLE, 1),
    "CG(EKFAC) to 0.1, damping 1.1": (TO_TENTH, SWEPT, EVERY),
    "ASTRA": (wherefrom.ASTRA(step=0.011, **SCHEDULE), PER_EXAMPLE, EVERY),
}
PAIRS = (
    ("EKFAC", "gradient dot"),
    ("ASTRA", "EKFAC"),
    ("CG(EKFAC) to 0.1", "EKFAC"),
    ("CG(EKFAC) to 0.1", "ASTRA"),
    ("EKFAC, damping 0.1 x mean", "EKFAC"),
    ("CG(EKFAC) to 0.1", "EKFAC, damping 0.1 x mean"),
    ("CG(EKFAC) to 0.1", "EKFAC, damping 0.011"),
    ("CG(EKFAC) to 0.1, damping 1.1", "EKFAC, damping 0.011"),
    ("CG(EKFAC) to 0.1, damping 1.1", "CG(EKFAC) to 0.1"),
    ("CG(EKFAC) to 0.1, damping 1.1", "EKFAC, damping 1.1"),
)
HEADER = (
    "| method | LDS (95% interval) | fit, CPU s | solve and scores, CPU s | steps | residual, median (largest) |\n"
    "|---|---|---|---|---|---|"
)


def targets(s: Setting, subsets: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Random halves (M, N) of the training sequences, and the queries' losses after fine-tuning on each, (M, R, Q)."""
    start, ids, queries = s.start(), s.train["input_ids"], s.queries
    masks = random_subsets(len(ids), subsets, 0.5, seed=0)

    def tuned(index: Tensor, seed: int) -> nn.Module:
        return setting.train(copy.deepcopy(start), ids[index], TUNING, seed)

    def measure(model: nn.Module) -> Tensor:
        return losses(model, queries)

    return masks, retrain(tuned, measure, masks, repeats, seed=0, folder=FOLDER / "runs", progress=True)


def attributed(s: Setting) -> tuple[nn.Module, wherefrom.Trajectory]:
    """The model fine-tuned on all the data, and its recorded run with six checkpoints after the start."""
    folder = FOLDER / "trajectory"
    if not folder.exists():
        s.tuned(record=folder, every=-(-len(TUNING.rates(s.sizes.train)) // 6))
    run = wherefrom.Trajectory.load(folder)
    model = s.build()
    model.load_state_dict(run.checkpoints[-1].state)
    return model, run


class Clock:
    """CPU seconds by what they were spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.process_time()

    def __call__(self, what: str) -> None:
        now = time.process_time()
        self.spent[what], self.last = now - self.last, now


def methods(s: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what fits and scores, and says what it cost."""
    model, run = attributed(s)
    ids, asked = list(s.train["input_ids"]), list(s.queries["input_ids"])
    others = {
        "gradient cosine": wherefrom.GradCos(**MLP),
        "TracIn, 6 checkpoints": wherefrom.TracIn(run, checkpoints=6, rates=False, **MLP),
        "TRAK, 1 model": wherefrom.TRAK(**MLP),
        "random": wherefrom.Random(),
    }
    words = {"TF-IDF": wherefrom.TFIDF(), "BM25": wherefrom.BM25()}

    def by_solver(solver: Solver, damping: wherefrom.Damping, every: int) -> dict[str, Any]:
        clock = Clock()
        plain = wherefrom.Influence(wherefrom.Identity(), damping, **MLP).fit(model, CausalLM(), s.train)
        levels = dict(plain.inverse.damping)
        clock("damping")
        known = wherefrom.Damping.by_block(levels)
        fitted = wherefrom.Influence(solver, known, **MLP).fit(model, CausalLM(), s.train)
        inverse, problem = fitted.inverse, fitted.problem
        clock("fit")
        b = fitted.query_gradients({"input_ids": s.queries["input_ids"][::every]}).dense()
        x, solution = inverse.solve(b, certify=False)
        clock("solve")
        values = score_stream(problem, x)
        clock("scores")
        residual = relative_norm(inverse.residual_vector(x, b), b)
        clock("certificate")
        more = {"steps": solution.steps, "history": solution.history, "lambda": levels, "every": every}
        return {"values": values, "residual": residual, "spent": clock.spent, "report": inverse.report()} | more

    def by(method: Any, *fitted_on: Any, queries: Any) -> dict[str, Any]:
        clock = Clock()
        fitted = method.fit(*fitted_on)
        clock("fit")
        values = fitted.score(queries).values
        clock("scores")
        return {"values": values, "spent": clock.spent}

    made = {name: (lambda given=given: by_solver(*given)) for name, given in SOLVERS.items()}
    made |= {k: (lambda m=m: by(m, model, CausalLM(), s.train, queries=s.queries)) for k, m in others.items()}
    return made | {k: (lambda m=m: by(m, ids, queries=asked)) for k, m in words.items()}


def score(s: Setting, names: list[str]) -> None:
    """Keep the scores and costs of each method that are not there yet."""
    known = methods(s)
    for name in names or known:
        file = FOLDER / "scores" / f"{name}.pt"
        if not file.exists():
            found = known[name]()
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, file)
            print(name, found["spent"], found.get("report", ""), flush=True)


def row(name: str, kept: dict[str, Any], masks: Tensor, f: Tensor, every: int) -> str:
    """A line of the table, of every so many queries."""
    step = every // kept.get("every", 1)
    found = linear_datamodeling_score(kept["values"][::step], masks, f[..., ::every])
    low, high = found.interval
    spent = kept["spent"]
    asked = sum(spent.get(part, 0.0) for part in ("solve", "scores"))
    residual = kept.get("residual")
    solved = "" if residual is None else f"{float(residual[::step].median()):.2f} ({float(residual[::step].max()):.2f})"
    steps = kept.get("steps") or ""
    cells = f"{found.mean:.3f} ({low:.3f} to {high:.3f}) | {spent['fit']:.1f} | {asked:.1f}"
    return f"| {name} | {cells} | {steps} | {solved} |"


def difference(a: dict[str, Any], b: dict[str, Any], masks: Tensor, f: Tensor) -> str:
    """LDS of one method less that of another on the queries that both were asked, subsets and queries drawn anew."""
    every, rng = max(a.get("every", 1), b.get("every", 1)), np.random.default_rng(0)
    truth, kept = f.mean(1)[:, ::every].double().numpy(), masks.double().numpy()  # (M, Q), (M, N)
    sums = [-kept @ x["values"][:: every // x.get("every", 1)].double().numpy().T for x in (a, b)]  # (M, Q)
    found = np.subtract(*(spearman(x, truth) for x in sums))
    M, Q = truth.shape
    drawn = []
    for _ in range(1000):
        m, q = rng.integers(0, M, M), rng.integers(0, Q, Q)
        drawn.append(np.subtract(*(spearman(x[m][:, q], truth[m][:, q]) for x in sums)).mean())
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{found.mean():+.3f} | {low:+.3f} to {high:+.3f} | {(found > 0).sum()} of {Q} |"


def table(s: Setting, subsets: int, repeats: int) -> str:
    """The tables of all that was scored, of all queries and of those that every method was asked, and their ground."""
    masks, f = targets(s, subsets, repeats)
    files = sorted((FOLDER / "scores").glob("*.pt"))
    kept = {file.stem: torch.load(file, weights_only=True) for file in files}
    whole = {name: some for name, some in kept.items() if some.get("every", 1) == 1}

    def mean(name: str, every: int) -> float:
        step = every // kept[name].get("every", 1)
        return linear_datamodeling_score(kept[name]["values"][::step], masks, f[..., ::every], bootstrap=1).mean

    lines = []
    for every, some in ((1, whole), (EVERY, kept)):
        ranked = sorted(some, key=lambda name: -mean(name, every))
        lines += [f"Every {every} of {f.shape[2]} queries", "", HEADER]
        lines += [*(row(name, kept[name], masks, f, every) for name in ranked), ""]
    lines += ["| LDS of one less that of another | | 95% interval | better on |", "|---|---|---|---|"]
    lines += [f"| {a} − {b} | {difference(kept[a], kept[b], masks, f)}" for a, b in PAIRS if {a, b} <= set(kept)] + [""]
    chance = linear_datamodeling_score(kept["random"]["values"], masks, f)
    start, (model, _) = s.start(), attributed(s)
    heldout = {"input_ids": s.heldout["input_ids"][::4]}
    said = [
        f"{name}: held-out {float(losses(m, heldout).mean()):.3f}, queries {float(losses(m, s.queries).mean()):.3f}"
        for name, m in (("before fine-tuning", start), ("after", model))
    ]
    lines += [
        f"{chance.n_subsets} subsets x {chance.n_repeats} repeats, {len(chance.per_query)} queries, ceiling "
        f"{chance.ceiling}; {s.sizes}. Loss per token in nats, {'; '.join(said)}.",
        f"Machine: {', '.join(f'{k} {v}' for k, v in machine().items() if k != 'load')}; one thread.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("retrain", "score", "table"))
    parser.add_argument("methods", nargs="*", help="for score: which; all that are not kept yet")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    s = prepared(SIZES)
    if args.part == "retrain":
        targets(s, args.subsets, args.repeats)
    elif args.part == "score":
        score(s, args.methods)
    else:
        print(table(s, args.subsets, args.repeats))


if __name__ == "__main__":
    main()
