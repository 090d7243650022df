"""A hundred random models, and bugs planted in every layer rule: right, or refused in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import fuzz_models
import reference
from wherefrom import AttributionError, Classification, Exact, Influence
from wherefrom.persample import layers
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.rows import Lookup

pytestmark = pytest.mark.filterwarnings("ignore")
HUNDRED = range(100)


@pytest.fixture(autouse=True)
def _doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("first", HUNDRED[::10])
def test_random_models_are_right_or_refused(first):
    outcomes = [fuzz_models.run(seed) for seed in range(first, first + 10)]
    assert [o for o in outcomes if o.what not in ("right", "refused")] == []
    assert sum(o.what == "right" for o in outcomes) >= 4


def test_a_wrong_score_is_found():
    """The fuzzer itself: what is off by a millionth is told, whichever solver it comes from."""
    for seed in range(12):
        case = fuzz_models.make(seed)
        if fuzz_models.compare(case).what != "right":
            continue
        dense = fuzz_models.Dense(case)
        dense.gradients = dense.gradients * (1 + 1e-5)
        case.solvers = ["exact"]
        if float(dense.asked.norm()) and case.dtype == torch.float64:
            assert fuzz_models.compare(case, dense).what == "wrong"


# --- planted bugs ---

Found = Any  # Factored | Lookup | Written
Plant = Callable[[Found, int], Found]  # rows of n examples, made wrong


def times(found: Found, factor: Tensor | float) -> Found:
    """The rows of each example times a number."""
    if isinstance(found, Written):
        return dataclasses.replace(found, rows=_scaled(found.rows, factor, 0))
    return dataclasses.replace(found, g=_scaled(found.g, factor, 1 if isinstance(found, Factored) else 0))


def _scaled(t: Tensor, factor: Tensor | float, axis: int) -> Tensor:
    if isinstance(factor, float):
        return t * factor
    return t * factor.view([-1 if d == axis else 1 for d in range(t.ndim)])


def scaled(found: Found, n: int) -> Found:
    return times(found, 1.01)


def permuted(found: Found, n: int) -> Found:
    return found[torch.arange(n).roll(1)]


def without_bias(found: Found, n: int) -> Found:
    """The last column, or the last numbers, are lost."""
    if isinstance(found, Factored):
        return dataclasses.replace(found, a=torch.cat([found.a[..., :-1], 0 * found.a[..., -1:]], -1))
    if isinstance(found, Written):
        return dataclasses.replace(found, rows=torch.cat([found.rows[..., :-1], 0 * found.rows[..., -1:]], -1))
    return dataclasses.replace(found, g=torch.cat([found.g[..., :-1], 0 * found.g[..., -1:]], -1))


def turned_positions(found: Found, n: int) -> Found:
    """Inputs and cotangents of other positions belong together; of a single one, the numbers."""
    if isinstance(found, Factored):
        return dataclasses.replace(found, a=found.a.flip(2 if found.a.shape[2] > 1 else 3))
    if isinstance(found, Lookup):
        return dataclasses.replace(found, ids=found.ids.flip(1))
    return dataclasses.replace(found, rows=found.rows.flip(2))


def late(found: Found, n: int) -> Found:
    """Batches of more than the three examples that a layout is tried on."""
    return times(found, 1.5) if n > 3 else found


def ragged(found: Found, n: int) -> Found:
    """Batches of two examples, which the last one is."""
    return times(found, 1.5) if n == 2 else found


def long(found: Found, n: int) -> Found:
    """Sequences longer than those of the first examples."""
    T = found.a.shape[2] if isinstance(found, Factored) else found.ids.shape[1] if isinstance(found, Lookup) else 9
    return times(found, 1.5) if T > 3 and n != 3 else found


def last_example(found: Found, n: int) -> Found:
    return times(found, torch.tensor([1.0] * (n - 1) + [1.5])) if n > 3 else found


def second_cotangent(found: Found, n: int) -> Found:
    """Where there are several."""
    t = found.rows if isinstance(found, Written) else found.g
    axis = 2 if isinstance(found, Factored) else 1
    if t.shape[axis] == 1 or n <= 3:
        return found
    wrong = torch.ones(t.shape[axis])
    wrong[1] = 1.5
    return dataclasses.replace(found, **{"rows" if isinstance(found, Written) else "g": _scaled(t, wrong, axis)})


PLANTS = (
    scaled,
    permuted,
    without_bias,
    turned_positions,
    late,
    ragged,
    long,
    last_example,
    second_cotangent,
)


class Small(nn.Module):
    """Something before the layer, the layer, and a mean over positions that are real."""

    def __init__(self, before: nn.Module, layer: nn.Module, width: int, turned: bool = False):
        super().__init__()
        self.before, self.layer, self.head, self.turned = before, layer, nn.Linear(width, 3), turned

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.before(x)
        if mask is None:
            x = self.layer(x).tanh()
            return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)
        x = x * mask.unsqueeze(2) if x.is_floating_point() else x
        x = (self.layer(x.mT).mT if self.turned else self.layer(x)).tanh()
        return self.head((x * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))


class Sequences(Classification):
    """Batches (x, y, mask)."""

    def outputs(self, model, batch):
        return model(batch[0], batch[2])

    def padding(self, batch):
        return batch[2]


LENGTHS = [2, 3, 3, 5, 4, 6, 1, 5, 2, 4]


def sequences(tokens: bool) -> tuple[Any, Any]:
    """Ragged sequences: a loader that pads each batch by itself, and all of them as one batch."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i, length in enumerate(LENGTHS):
        x = torch.randint(5, (length,), generator=generator) if tokens else torch.randn(length, 4, generator=generator)
        examples.append((x, torch.tensor(i % 3), torch.ones(length, dtype=torch.bool)))

    def collate(some: list[Any]) -> Any:
        x, y, mask = zip(*some, strict=True)
        return pad_sequence(x, batch_first=True), torch.stack(y), pad_sequence(mask, batch_first=True)

    return DataLoader(examples, 4, collate_fn=collate), collate(examples)  # type: ignore[arg-type]


def pictures(*shape: int) -> tuple[Any, Any]:
    x = torch.randn(len(LENGTHS), *shape, generator=torch.Generator().manual_seed(0))
    data = x, torch.arange(len(LENGTHS)) % 3
    return data, data


def statistics(layer: Any) -> Any:
    layer.running_mean.copy_(0.3 * torch.randn(layer.num_features))
    return layer


# A model with a layer of each kind, its task, and data as the library and as the reference are given them.
KINDS: dict[type[nn.Module], Callable[[], tuple[nn.Module, Classification, tuple[Any, Any]]]] = {
    nn.Linear: lambda: (Small(nn.Identity(), nn.Linear(4, 3), 3), Sequences(), sequences(False)),
    nn.Conv1d: lambda: (Small(nn.Identity(), nn.Conv1d(4, 3, 3, padding=1), 3, True), Sequences(), sequences(False)),
    nn.Conv2d: lambda: (Small(nn.Identity(), nn.Conv2d(2, 4, 2, groups=2), 4), Classification(), pictures(2, 3, 3)),
    nn.Embedding: lambda: (Small(nn.Identity(), nn.Embedding(5, 3), 3), Sequences(), sequences(True)),
    nn.LayerNorm: lambda: (Small(nn.Linear(4, 4), nn.LayerNorm(4), 4), Sequences(), sequences(False)),
    nn.RMSNorm: lambda: (Small(nn.Linear(4, 4), nn.RMSNorm(4), 4), Sequences(), sequences(False)),
    nn.GroupNorm: lambda: (Small(nn.Linear(4, 4), nn.GroupNorm(2, 4), 4), Classification(), pictures(4)),
    nn.BatchNorm1d: lambda: (Small(nn.Linear(4, 4), statistics(nn.BatchNorm1d(4)), 4), Classification(), pictures(4)),
    nn.BatchNorm2d: lambda: (
        Small(nn.Conv2d(2, 3, 2), statistics(nn.BatchNorm2d(3)), 3),
        Classification(),
        pictures(2, 3, 3),
    ),
    nn.BatchNorm3d: lambda: (
        Small(nn.Identity(), statistics(nn.BatchNorm3d(2)), 2),
        Classification(),
        pictures(2, 2, 2, 2),
    ),
}


def test_every_rule_has_a_planted_bug():
    assert set(KINDS) == set(layers.KINDS) - {k for k in layers.KINDS if not k.__module__.startswith("torch.nn")}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("layer", KINDS)
def test_planted_bugs_are_put_right_or_refused(layer, plant, monkeypatch):
    torch.manual_seed(0)
    model, task, (given, whole) = KINDS[layer]()
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    wanted = reference.exact_scores(model, task, whole, len(LENGTHS), whole, 2, 0.1)
    kind = type(layers.KINDS[layer])
    right, planted = kind.rows, []

    def wrong(self: Any, module: Any, x: Tensor, g: Tensor, parts: Any, *more: Any) -> Found:
        found = right(self, module, x, g, parts, *more)
        if module is not model.layer:
            return found
        made = plant(found, g.shape[1])
        planted.append(made is not found)
        return made

    monkeypatch.setattr(kind, "rows", wrong)
    queries = DataLoader([tuple(t[i] for t in whole) for i in range(2)], 2)
    try:
        fitted = Influence(Exact(), 0.1, batch_size=4, progress=False).fit(model, task, given)
        scores = fitted.score(queries)
    except AttributionError:
        return
    assert any(planted) or plant is long
    assert float((scores.values - wanted).norm() / wanted.norm()) < 1e-9
    assert scores.row_error is not None and scores.row_error < 1e-9
