"""Query directions of low rank: how well they keep the ranking, and what one query and a hundred cost.

    python -m benchmarks.lowrank_queries

A GPT-2 of 4 layers x 256 with 4,096 words, trained on WikiText-2 (`experiments.language.setting`), its MLP layers,
EKFAC at a damping of 0.1 x the mean eigenvalue of each layer, training sequences of 128 tokens. Queries are the loss
per token of held-out sequences, or of their last 16 tokens after a prompt of the others. Every cost is that of a fresh
process with one thread, which takes the fit from a file.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from experiments.language.setting import Setting, Sizes, prepared

from benchmarks.harness import CACHE, machine, phase, run

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
COMPLETION = 16


@functools.cache
def _setting(count: int) -> Setting:
    return prepared(Sizes(width=256, layers=4, vocabulary=4096, length=128, train=count, queries=100))


def _queries(setting: Setting, count: int, kind: str) -> dict[str, torch.Tensor]:
    """Sequences of another text than was tuned on, then of the same; the model has seen none."""
    ids = torch.cat([setting.queries["input_ids"], setting.heldout["input_ids"]])[:count]
    labels = ids.clone()
    if kind == "completions":
        labels[:, :-COMPLETION] = -100
    return {"input_ids": ids, "labels": labels}


def fitted(count: int) -> Any:
    """The influence of a model tuned on so many sequences, fitted once and kept."""
    import wherefrom
    from wherefrom.hf import CausalLM

    setting, home = _setting(count), CACHE / "lowrank"
    home.mkdir(parents=True, exist_ok=True)
    weights, fit = home / f"tuned-{count}.pt", home / f"fit-{count}.safetensors"
    if not weights.exists():
        torch.save(setting.tuned().state_dict(), weights)
    model = setting.build()
    model.load_state_dict(torch.load(weights))
    influence = wherefrom.Influence(
        wherefrom.EKFAC(), wherefrom.Damping.relative(0.1), parameters="mlp", progress=False
    )
    if not fit.exists():
        influence.fit(model, CausalLM(), setting.train).save(fit)
    return influence.load(fit, model, CausalLM(), setting.train)


def quality(count: int, queries: int, kind: str) -> dict[str, Any]:
    """Scores by directions of each rank against those of full rank.

    Returns:
        For the library's truncation and for the plain one, which keeps |V| rather than scores: ``spearman`` over the
        training sequences, ``error`` |s_r - s| / |s| and the share of the ``top`` 20 in common, (2, ranks, Q) each.
    """
    from scipy.stats import spearmanr

    from wherefrom import Directions
    from wherefrom.persample import lowrank

    influence = fitted(count)
    inverse, problem = influence.inverse, influence.problem
    full = influence.solve(_queries(_setting(count), queries, kind), certify=False).directions
    cut = [full.truncate(rank, inverse.scoring_basis)[0] for rank in RANKS]
    written = full.dense().tensors()
    plain = [
        Directions(full.blocks, {name: lowrank.truncate(v, rank)[0] for name, v in written.items()}) for rank in RANKS
    ]
    scores = []
    for _, batch in problem.batches():
        g = problem.loss_gradients(batch)
        scores.append(np.stack([g.dot(directions)[..., 0].numpy() for directions in (full, *cut, *plain)]))
    exact, *others = np.concatenate(scores, 2)
    measures = {
        "spearman": lambda a, b: spearmanr(a, b).statistic,
        "error": lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(a),
        "top": lambda a, b: len(set(np.argsort(-a)[:20]) & set(np.argsort(-b)[:20])) / 20,
    }
    return {
        name: np.array([[f(a, b) for a, b in zip(exact, some, strict=True)] for some in others]).reshape(
            2, len(RANKS), -1
        )
        for name, f in measures.items()
    }


def cost(count: int, queries: int, rank: float | None) -> dict[str, Any]:
    """What scores take without a certificate. Phases ``solve`` (the queries' directions) and ``pass``."""
    influence = fitted(count)
    batch = _queries(_setting(count), queries, "sequences")
    with phase("solve"):
        solution = influence.solve(batch, certify=False, rank=rank)
    with phase("pass"):
        solution.score()
    return solution.truncation or {}


def _ranks(count: int, queries: int) -> None:
    print("| queries | rank | Spearman, mean | worst | error of scores | top 20 shared | plain: Spearman | error |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("sequences", "completions"):
        found = run("benchmarks.lowrank_queries:quality", {"count": count, "queries": queries, "kind": kind}).result
        s, e, t = (found[name] for name in ("spearman", "error", "top"))
        for i, rank in enumerate(RANKS):
            ours = f"{s[0, i].mean():.4f} | {s[0, i].min():.4f} | {e[0, i].mean():.3f} | {t[0, i].mean():.2f}"
            print(f"| {kind} | {rank} | {ours} | {s[1, i].mean():.4f} | {e[1, i].mean():.3f} |", flush=True)


def _costs(count: int, cases: Sequence[tuple[int, int | None]], repeats: int, one: float = 0.0) -> float:
    print("| queries | rank | solve, CPU s | pass, CPU s | both | x one query, full | peak MB |")
    print("|---|---|---|---|---|---|---|")
    runs: dict[Any, list[Any]] = {case: [] for case in cases}
    for _ in range(repeats):  # in turn, so that other work on the machine meets all alike
        for queries, rank in cases:
            job = {"count": count, "queries": queries, "rank": rank}
            runs[queries, rank].append(run("benchmarks.lowrank_queries:cost", job))
    for (queries, rank), repeated in runs.items():
        solve, through = (float(np.median([r.phases[k]["cpu_s"] for r in repeated])) for k in ("solve", "pass"))
        both, peak = solve + through, max(r.peak_mb for r in repeated)
        one = one or both
        spent = f"{solve:.1f} | {through:.1f} | {both:.1f} | {both / one:.2f}"
        print(f"| {queries} | {rank or 'full'} | {spent} | {peak:.0f} |", flush=True)
    return one


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1000, help="training sequences")
    parser.add_argument("--queries", type=int, default=30, help="of the table of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="of each cost; the median is shown")
    options = parser.parse_args()
    print(machine())
    one = _costs(options.sequences, [(1, None), (1, 32), (100, None), (100, 32)], options.repeats)
    _costs(options.sequences, [(1000, 32)], 1, one)
    _ranks(options.sequences, options.queries)


if __name__ == "__main__":
    main()
