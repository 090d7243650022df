"""Pictures: wrong labels found, put right, and the network trained again.

Scikit-learn's handwritten digits, a fifth of the training labels wrong. Run it with
``python docs/examples/image.py``; it takes half a minute and writes image.html.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import wherefrom
from wherefrom.tools.act import clean
from wherefrom.tools.evaluate import SGDRecipe, flip_labels, mislabeled_curve, train_small
from wherefrom.tools.report import Example, Suspects, Table, write_report


def build() -> nn.Module:
    convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 8)), convolution, nn.GELU(), nn.Flatten(), nn.Linear(128, 10))


def main(out: str = "image.html") -> tuple[float, float]:
    torch.set_num_threads(1)
    pixels, labels = load_digits(return_X_y=True)
    x, true = torch.tensor(pixels).float().view(-1, 8, 8) / 16, torch.tensor(labels)
    y, flipped = flip_labels(true[:1000], fraction=0.2, num_classes=10, seed=0)
    train, trusted, test = (x[:1000], y), (x[1000:1100], true[1000:1100]), (x[1100:], true[1100:])

    task, recipe = wherefrom.Classification(), SGDRecipe(lr=0.05, momentum=0.9, weight_decay=1e-3, epochs=20)
    model = train_small(build, task, train, recipe, seeds=0)[0]

    fitted = wherefrom.Influence(wherefrom.EKFAC(), wherefrom.Damping.relative(0.1)).fit(model, task, train)
    scores = fitted.score(trusted, self_influence=True)
    found = clean(scores.self_influence, fitted, trusted, count=200)

    repaired, kept = y.clone(), torch.ones(1000, dtype=torch.bool)
    for proposal in found.proposals:
        if proposal.action == "relabel":
            repaired[proposal.example] = proposal.label
        else:
            kept[proposal.example] = False
    again = train_small(build, task, (x[:1000], repaired), recipe, seeds=0, masks=kept[None])[0]
    before, after = (float((m(test[0]).argmax(1) == test[1]).float().mean()) for m in (model, again))

    def digit(i: int) -> Example:
        label, mark = (int(y[i]), f"really {int(true[i])}") if i < 1000 and bool(flipped[i]) else (int(true[i]), None)
        return Example(f"label {label}", image=1 - x[i], mark=mark)

    table, shown = found.table(), ("action", "given_label", "new_label", "predicted_change", "reason")
    columns = {name: table[name][:20] for name in shown}
    train_examples = [digit(i) for i in range(1000)]
    write_report(
        out,
        scores,
        title="Which labels are wrong?",
        lead=f"A fifth of 1,000 labels were changed on purpose. Test accuracy {before:.1%} as trained, {after:.1%} "
        f"after {len(found.proposals)} proposals were followed.",
        measurement="the negative margin of the right digit",
        train_examples=train_examples,
        query_examples=[digit(i) for i in range(1000, 1100)],
        show=range(4),
        sections=[
            Table("The first proposals", columns, [train_examples[p.example] for p in found.proposals[:20]]),
            Suspects(train_examples, scores.self_influence, mislabeled_curve(scores.self_influence, flipped)),
        ],
    )
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:])
