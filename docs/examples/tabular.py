"""A table: which patients taught a network its prediction, and which rows hurt it most.

442 patients of scikit-learn's diabetes table, ten measurements each; the target is the progression of the disease
after a year. Run it with ``python docs/examples/tabular.py``; it takes seconds and writes tabular.html.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import wherefrom
from wherefrom.tools.evaluate import SGDRecipe, removal_curve, retrain_small, train_small
from wherefrom.tools.report import Example, Retraining, write_report


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def main(out: str = "tabular.html") -> wherefrom.Scores:
    torch.set_num_threads(1)
    table = load_diabetes()
    x, y = torch.tensor(table.data).float(), torch.tensor(table.target).float()
    x, y = x / x[:400].std(0), (y - y[:400].mean()) / y[:400].std()
    train, queries = (x[:400], y[:400, None]), (x[400:], y[400:, None])

    task, recipe = wherefrom.Regression(), SGDRecipe(lr=0.01, momentum=0.9, weight_decay=1e-3, epochs=30)
    model = train_small(build, task, train, recipe, seeds=0)[0]

    damping = wherefrom.Damping.from_training(recipe.lr, recipe.steps(400), recipe.momentum)
    fitted = wherefrom.Influence(damping=damping, seed=0).fit(model, task, train)
    scores = fitted.score(queries, self_influence=True)

    runs = partial(retrain_small, build, task, train, queries, repeats=2, recipe=recipe, seed=1, paired=True)
    removal = removal_curve(scores.values[:8], lambda masks: runs(masks)[..., :8], counts=[10, 20, 40])

    def patient(i: int) -> Example:
        row = {name: f"{v:+.2f}" for name, v in zip(table.feature_names, x[i].tolist(), strict=True)}
        return Example(f"progression {y[i]:+.2f}", row=row)

    write_report(
        out,
        scores,
        title="Where does the network know a patient's progression?",
        lead="Trained on 400 patients. All numbers are in standard deviations.",
        measurement="the absolute error",
        train_examples=[patient(i) for i in range(400)],
        query_examples=[patient(i) for i in range(400, 442)],
        show=range(6),
        sections=[Retraining(removal=removal)],
    )
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
