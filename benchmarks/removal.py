"""What removing a query's strongest proponents does: measurements after retraining, and flipped predictions.

    python -m benchmarks.removal                 # digits, 20 queries; about ten minutes of one core

Rankings of one model: influence (CG to a residual of 0.01), ASTRA-SOURCE, TracIn over six checkpoints, random. Runs of
the same repeat share their initial weights and, as far as they can, their order. What is trained is kept in
``benchmarks/cache``.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks import ours, problems
from benchmarks.harness import CACHE, machine

COUNTS = (16, 40, 80, 160)  # of 1,600: 1% to 10%


def main() -> None:
    """Print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--queries", type=int, default=20)
    args = parser.parse_args()
    import wherefrom
    from wherefrom.tools.evaluate import SGDRecipe, flips, removal_curve, retrain_small

    torch.set_num_threads(1)
    p = problems.load("digits")
    task, train, queries = wherefrom.Classification(), (p.x, p.y), (p.xq[: args.queries], p.yq[: args.queries])
    methods = {
        "influence": wherefrom.Influence(wherefrom.CG(wherefrom.Nystrom(), tolerance=0.01), p.damping),
        "ASTRA-SOURCE": ours.over_training("astra-source", p, 0),
        "TracIn": ours.over_training("tracin", p, 0),
    }
    scores = {name: m.fit(p.model(), task, train).score(queries).values for name, m in methods.items()}
    first, others = scores["influence"], {name: s for name, s in scores.items() if name != "influence"}
    recipe = SGDRecipe(lr=0.03, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=20)
    settings = {"repeats": args.repeats, "recipe": recipe, "seed": 0, "paired": True, "folder": CACHE / "removal"}
    runs = partial(retrain_small, partial(problems.mlp, p.sizes), task, train, queries, **settings)
    curve = removal_curve(first, runs, COUNTS, others)
    print(f"{args.queries} queries, {args.repeats} repeats\n{curve}")
    for ranking in others:
        print(f"{ranking} raises f more than random in {curve.wins(ranking).tolist()} queries at {COUNTS}")
    print(f"\n{flips(first, runs, COUNTS, labels=(p.y, queries[1]), rankings=others)}\n\n{machine()}")


if __name__ == "__main__":
    main()
