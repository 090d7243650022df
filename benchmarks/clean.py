"""What cleaning finds, and what training on the cleaned data gains: digits with labels flipped on purpose.

    python -m benchmarks.clean                   # about five minutes of one core

800 training digits, 200 trusted ones, accuracy on the other 797. Labels are flipped anew three times; what is proposed
comes from one model, accuracies from five others. A gain is paired: same flips, same initial weights. The random
examples are as many as were relabelled or dropped; the oracle drops all that were flipped.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import machine

TRAIN, TRUSTED, MODELS = 800, 200, 5


def build() -> nn.Module:
    """A network of one hidden layer."""
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=3)
    args = parser.parse_args()
    from sklearn.datasets import load_digits

    import wherefrom
    from wherefrom.tools.act import clean
    from wherefrom.tools.evaluate import SGDRecipe, flip_labels, train_small

    torch.set_num_threads(1)
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = torch.as_tensor(bunch.data[order] / 16).float(), torch.as_tensor(bunch.target[order]).long()
    trusted, test = (x[TRAIN:][:TRUSTED], y[TRAIN:][:TRUSTED]), (x[TRAIN + TRUSTED :], y[TRAIN + TRUSTED :])
    task, recipe = wherefrom.Classification(), SGDRecipe(lr=0.05, momentum=0.9, batch_size=32, epochs=40)

    def accuracy(labels: Tensor, kept: Tensor) -> Tensor:
        models = train_small(build, task, (x[:TRAIN][kept], labels[kept]), recipe, seeds=range(MODELS))
        return torch.stack([(m(test[0]).argmax(1) == test[1]).double().mean() for m in models])

    heads = [
        "flipped",
        "ranked by, labels tried on",
        "stand out",
        "flipped of these",
        "relabel: flipped, right",
        "drop",
    ]
    heads += ["keep", "accuracy on all", "gain as proposed", "gain at random", "gain of the oracle"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for fraction in (0.0, 0.05, 0.1, 0.2):
        rows: dict[str, list[list[float]]] = {}
        for seed in range(args.flips):
            given, flipped = flip_labels(y[:TRAIN], fraction, 10, seed)
            (model,) = train_small(build, task, (x[:TRAIN], given), recipe, seeds=99)
            influence = wherefrom.Influence(wherefrom.Dual()).fit(model, task, (x[:TRAIN], given))
            everything = torch.ones(TRAIN, dtype=torch.bool)
            before = accuracy(given, everything)
            oracle = accuracy(given, ~flipped) - before
            ranks = {"harm": influence.score(trusted, certify=False), "self-influence": influence.self_influence()}
            for by, scores in ranks.items():
                for name, queries in (("trusted", trusted), ("own data", None)):
                    found = clean(scores, influence, queries).proposals
                    labels, kept, other = given.clone(), everything.clone(), everything.clone()
                    for p in found:
                        labels[p.example] = p.label if p.label is not None else labels[p.example]
                        kept[p.example] = p.action != "drop"
                    changed = [p for p in found if p.action == "relabel"]
                    dropped = sum(p.action == "drop" for p in found)
                    rng = torch.Generator().manual_seed(1000 + seed)  # flip_labels permutes by its seed, too
                    other[torch.randperm(TRAIN, generator=rng)[: len(changed) + dropped]] = False
                    gains = [accuracy(labels, kept) - before, accuracy(given, other) - before, oracle]
                    numbers = [
                        len(found),
                        sum(flipped[p.example] for p in found),
                        len(changed),
                        sum(flipped[p.example] for p in changed),
                        sum(p.label == y[p.example] for p in changed),
                        dropped,
                        len(found) - dropped - len(changed),
                    ]
                    rows.setdefault(f"{by}, {name}", []).append(
                        [*map(float, numbers), *(float(100 * t) for t in (before.mean(), *(g.mean() for g in gains)))]
                    )
        for name, several in rows.items():
            m, sd = np.mean(several, 0), np.std(several, 0, ddof=1) / len(several) ** 0.5
            print(
                f"| {fraction:.0%} | {name} | {m[0]:.0f} | {m[1]:.0f} of {fraction * TRAIN:.0f} "
                f"| {m[2]:.0f}: {m[3]:.0f}, {m[4]:.0f} | {m[5]:.0f} | {m[6]:.0f} | {m[7]:.1f} "
                f"| {m[8]:+.1f} ± {sd[8]:.1f} | {m[9]:+.1f} ± {sd[9]:.1f} | {m[10]:+.1f} ± {sd[10]:.1f} |",
                flush=True,
            )
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
