"""Data that are what they seem: rows of batches, collate functions, samplers, and every form of data.

Scores are compared with dense float64 algebra on plain autograd, one example at a time. What is not taken is refused in
one message that fits on a screen.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import solving
from wherefrom import CG, Classification, Exact, Identity, Influence, InputError, Regression, Scores, Task, attribute
from wherefrom.data.batches import batch_length, has_rows, take
from wherefrom.data.examples import Examples
from wherefrom.errors import MESSAGE, ArtefactError, UnsupportedError, expected


def close(found, wanted, tolerance: float = 1e-09) -> None:
    solving.close(found, wanted, tolerance)


N, QUERIES, DAMPING = 20, 4, 0.1
F64, CPU = torch.float64, torch.device("cpu")


# --- the reference --------------------------------------------------------------------------------------------------


def dense_scores(
    model: nn.Module,
    outputs: Callable[[Any], Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    train: Sequence[Any],
    queries: Sequence[Any],
) -> Tensor:
    """Scores (Q, N) of losses on losses: one example at a time, the output Hessian and C written out."""
    parameters = list(model.eval().parameters())

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts])

    rows, C = [], torch.zeros(())
    for item in train:
        h = outputs(item)  # (C,)
        rows.append(gradient(loss(h, item)))
        hessian = torch.autograd.functional.hessian(lambda t, item=item: loss(t, item), h.detach())
        J = torch.stack([gradient(part) for part in h])
        C = C + J.T @ hessian @ J / len(train)
    asked = torch.stack([gradient(loss(outputs(item), item)) for item in queries])
    return torch.linalg.solve(C + DAMPING * torch.eye(len(C), dtype=F64), asked.T).T @ torch.stack(rows).T


def cross_entropy(h: Tensor, y: Any) -> Tensor:
    return h.logsumexp(0) - h[int(y)]


def scores(model: nn.Module, task: Any, train: Any, queries: Any, **options: Any) -> Scores:
    """Exact scores with the loss as the measurement."""
    fitted = Influence(Exact(), DAMPING, progress=False, **options).fit(model, task, train)
    return fitted.score(queries, measurement=task.loss)


def refused(pattern: str, act: Callable[[], Any], error: type[Exception] = InputError) -> None:
    """The act is refused in one message that fits on a screen."""
    with pytest.raises(error, match=pattern) as caught:
        act()
    assert len(str(caught.value)) <= MESSAGE and str(caught.value).count("\n") < 10


class Named(Task):
    """Cross-entropy of named batches."""

    def __init__(self, outputs: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(batch["x"])):
        self.function = outputs

    def outputs(self, model, batch):
        return self.function(model, batch)

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["y"], reduction="none")


def linear_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), torch.randn(N, 4, dtype=F64), torch.randint(3, (N,))


def linear_scores(train: Sequence[int] | None = None, queries: Sequence[int] = range(QUERIES)) -> Tensor:
    """The dense scores of the linear model of `linear_data` on some of its examples."""
    model, x, y = linear_data()
    pairs = [(x[i], y[i]) for i in (range(N) if train is None else train)]
    asked = [(x[i], y[i]) for i in queries]
    return dense_scores(model, lambda p: model(p[0]), lambda h, p: cross_entropy(h, p[1]), pairs, asked)


class Bag(nn.Module):
    """Summed embeddings of padded sequences, and a linear layer; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).sum(1))


def ragged() -> tuple[Bag, list[tuple[Tensor, int]], Tensor]:
    """A model, sequences of different lengths with labels, and the dense scores of all on the first few."""
    torch.manual_seed(0)
    model = Bag().double()
    lengths = torch.randint(2, 9, (N,)).tolist()
    data = [(torch.randint(1, 20, (length,)), int(torch.randint(3, ()))) for length in lengths]
    outputs = lambda item: model(item[0].unsqueeze(0))[0]  # noqa: E731
    right = dense_scores(model, outputs, lambda h, item: cross_entropy(h, item[1]), data, data[:QUERIES])
    return model, data, right


def padded(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return pad_sequence([ids for ids, _ in items], True), torch.tensor([label for _, label in items])


# --- a row for each example -----------------------------------------------------------------------------------------


def items(drop: Sequence[int] = ()) -> list[Any]:
    _, x, y = linear_data()
    return [None if i in drop else (x[i], y[i]) for i in range(N)]


def without_gaps(some):
    x, y = default_collate([item for item in some if item is not None])
    return {"x": x, "y": y}


def flattened(some):
    x, y = default_collate(some)
    return {"x": x.reshape(1, -1), "y": y[:1]}


def joined(some):
    x, y = default_collate(some)
    return {"x": x.mean(0, keepdim=True), "y": y[:1]}


def split(some):
    x, y = default_collate(some)
    return {"x": x.repeat_interleave(2, 0), "y": y.repeat_interleave(2)}


def one_less(some):
    return without_gaps(some[:-1] or some)


@pytest.mark.parametrize("collate", [without_gaps, flattened, joined, split, one_less])
@pytest.mark.parametrize("role", ["train", "queries", "examples"])
def test_a_collate_function_that_changes_the_number_of_rows(collate, role):
    """Refused by both counts. A batch of one, or three, may come before one of seven."""
    counts = {
        without_gaps: [(7, 6)],
        flattened: [(3, 1), (7, 1)],
        joined: [(3, 1), (7, 1)],
        split: [(1, 2), (3, 6), (7, 14)],
        one_less: [(3, 2), (7, 6)],
    }
    gaps = (5, 13) if collate is without_gaps else ()
    loader = DataLoader(items(gaps), 7, collate_fn=collate)
    good = DataLoader(items(), 7, collate_fn=without_gaps)
    train, queries, examples = (loader if role == name else good for name in ("train", "queries", "examples"))
    said = "|".join(f"asked for {asked} examples and gave {rows} rows" for asked, rows in counts[collate])

    def act():
        Influence(Identity(), DAMPING).fit(linear_data()[0], Named(), train).score(queries, examples=examples)

    refused(f"{role}: a batch must have one row for each example, .*({said})", act)


def test_a_collate_function_that_leaves_nothing():
    model = linear_data()[0]
    for nothing in (lambda _: None, lambda _: (), lambda some: without_gaps(some)["x"][:0]):
        loader = DataLoader(items(), 4, collate_fn=nothing)
        refused(
            "gave (no|0) rows",
            lambda loader=loader: Influence(Identity(), 1.0).fit(model, Named(), loader).score(loader),
        )


def test_outputs_without_a_row_for_each_example():
    model, x, y = linear_data()
    data = {"x": x, "y": y}
    for outputs in (lambda m, b: m(b["x"])[: -(-len(b["x"]) // 2)], lambda m, b: m(b["x"]).mean(0, keepdim=True)):
        refused(
            "task.outputs must be a tensor with the [0-9]+ examples of the batch first",
            lambda task=Named(outputs): scores(model, task, data, data),
        )


# --- in their order -------------------------------------------------------------------------------------------------


def by_length(some):
    return padded(sorted(some, key=lambda item: -len(item[0])))


def backwards(some):
    return padded(some[::-1])


def by_label(some):
    return padded(sorted(some, key=lambda item: item[1]))


def labels_sorted(some):
    x, y = padded(some)
    return x, y.sort().values


def left_padded_by_length(some):
    some = sorted(some, key=lambda item: len(item[0]))
    return pad_sequence([ids for ids, _ in some], True, padding_side="left"), padded(some)[1]


def swapped_ends(some):
    return padded([some[-1], *some[1:-1], some[0]] if len(some) > 1 else some)


def rotated_once_full(some):
    return padded(some[1:] + some[:1] if len(some) == 8 else some)


def last_batch_backwards(some):
    return padded(some[::-1] if len(some) == N % 8 else some)


def mixed_up(some):
    x, y = padded(some)
    return x.roll(1, 0), y


SORTS = [
    by_length,
    backwards,
    by_label,
    labels_sorted,
    left_padded_by_length,
    swapped_ends,
    rotated_once_full,
    last_batch_backwards,
    mixed_up,
]


@pytest.mark.parametrize("collate", SORTS)
@pytest.mark.parametrize("role", ["train", "queries"])
def test_a_collate_function_that_reorders(collate, role):
    model, data, _ = ragged()
    bad, good = DataLoader(data, 8, collate_fn=collate), DataLoader(data, 8, collate_fn=padded)
    train, queries = (bad, good) if role == "train" else (good, bad)
    refused(
        f"{role}: row i of a batch must be example i, but the collate function puts example",
        lambda: scores(model, Classification(), train, queries),
    )


def test_a_collate_function_that_reorders_named_and_listed_fields():
    model, data, _ = ragged()

    def collate(some):
        x, y = padded(some)
        return {"x": x, "y": y, "text": [str(ids.tolist()) for ids, _ in reversed(some)]}

    loader = DataLoader(data, 8, collate_fn=collate)
    refused("row i of a batch must be example i", lambda: scores(model, Named(), loader, loader))


def test_a_random_collate_function():
    model, data, _ = ragged()

    def masked(some):
        x, y = padded(some)
        return x.where(torch.rand(x.shape) < 0.8, 19), y

    loader = DataLoader(data, 8, collate_fn=masked)
    refused("train data must be the same in every pass", lambda: scores(model, Classification(), loader, loader))


def test_fields_that_depend_on_the_rest_of_a_batch_are_no_other_order():
    """Places in the batch, lengths, the longest of them, constants, left padding."""
    model, data, right = ragged()

    def collate(some):
        ids, y = [ids for ids, _ in some], padded(some)[1]
        lengths = [len(one) for one in ids]
        return {
            "x": pad_sequence(ids, True, padding_side="left"),
            "y": y,
            "place": torch.arange(len(some)),
            "lengths": lengths,
            "longest": max(lengths),
            "n": len(some),
            "names": ["a", "b"],
            "weights": torch.ones(3),
            "none": None,
            "flag": True,
        }

    def outputs(model, batch):
        assert batch["n"] == len(batch["x"]) == len(batch["lengths"]) and isinstance(batch["n"], int)
        return model(batch["x"][:, -batch["longest"] :])

    for size in (1, 3, 8):
        loader = DataLoader(data, size, collate_fn=collate)
        queries = DataLoader(data[:QUERIES], size, collate_fn=collate)
        close(scores(model, Named(outputs), loader, queries).values, right)


# --- samplers -------------------------------------------------------------------------------------------------------


class Given:
    """A sampler of the user's own."""

    def __init__(self, numbers: Sequence[int], epochs_differ: bool = False):
        self.numbers, self.differ = list(numbers), epochs_differ

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self):
        return iter(np.random.permutation(self.numbers).tolist() if self.differ else self.numbers)


def forever():
    while True:
        yield from range(N)


def loaders(data: Dataset) -> dict[str, Callable[[], DataLoader]]:
    part = list(range(12))
    weights = [1.0] * 12 + [0.0] * 8
    return {
        "subset": lambda: DataLoader(data, 4, sampler=SubsetRandomSampler(part)),
        "subset batches": lambda: DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler(part), 4, False)),
        "weighted": lambda: DataLoader(data, 4, sampler=WeightedRandomSampler(weights, 12)),
        "weighted, all": lambda: DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * N, N, replacement=False)),
        "replacement": lambda: DataLoader(data, 4, sampler=RandomSampler(data, replacement=True)),
        "fewer": lambda: DataLoader(data, 4, sampler=RandomSampler(data, num_samples=12)),
        "more": lambda: DataLoader(data, 4, sampler=RandomSampler(data, num_samples=30)),
        "half of it": lambda: DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=2, rank=0)),
        "sequence of another": lambda: DataLoader(data, 4, sampler=SequentialSampler(part)),
        "own": lambda: DataLoader(data, 4, sampler=Given(part)),
        "own with repeats": lambda: DataLoader(data, 4, sampler=Given([0, *range(N)])),
        "own batches": lambda: DataLoader(data, batch_sampler=[[0, 1], [5, 7, 9]]),
        "dropping the tail": lambda: DataLoader(data, 6, drop_last=True),
        "dropping batches": lambda: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 6, True)),
        "without batches": lambda: DataLoader(data, batch_size=None),
    }


@pytest.mark.parametrize("name", loaders(TensorDataset(torch.zeros(N, 1))))
def test_samplers_that_leave_out_or_repeat_examples_are_refused(name):
    model, x, y = linear_data()
    loader = loaders(TensorDataset(x, y))[name]()
    wanted = (
        "gives 1[28] of the 20|gives 5 of the 20|gives 10 of the 20|more than once|repeats or weights|batch_size=None"
    )
    refused(f"train: .*({wanted})", lambda: scores(model, Classification(), loader, (x, y)))
    refused(f"queries: .*({wanted})", lambda: scores(model, Classification(), (x, y), loader))


def test_the_examples_of_a_sampler_can_be_scored_as_a_subset():
    model, x, y = linear_data()
    part = [3, 4, 7, 19]
    found = scores(
        model, Classification(), DataLoader(Subset(TensorDataset(x, y), part), 3), (x[:QUERIES], y[:QUERIES])
    )
    close(found.values, linear_scores(part))


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, 6, shuffle=True),
        lambda data: DataLoader(data, 6, shuffle=True, drop_last=True),
        lambda data: DataLoader(data, 5, drop_last=True),
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 6, True)),
        lambda data: DataLoader(data, 6, sampler=Given(range(N), True)),
        lambda data: DataLoader(data, 6, sampler=SubsetRandomSampler(range(N))),
        lambda data: DataLoader(data, 6, sampler=DistributedSampler(data, num_replicas=1, rank=0)),
        lambda data: DataLoader(data, batch_sampler=[[1, 0], [*range(2, N)]]),
    ],
)
def test_samplers_that_only_reorder_are_taken_in_the_order_of_the_data(make):
    model, x, y = linear_data()
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # pyright: ignore[reportAttributeAccessIssue]
    examples = Examples(make(TensorDataset(x, y)))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()  # type: ignore
    assert len(examples) == N
    close(
        scores(model, Classification(), make(TensorDataset(x, y)), (x[:QUERIES], y[:QUERIES])).values, linear_scores()
    )


def test_an_endless_sampler_is_refused():
    class Endless:
        def __iter__(self):
            return forever()

    model, x, y = linear_data()
    loader = DataLoader(TensorDataset(x, y), 4, sampler=Endless())  # pyright: ignore[reportArgumentType]
    refused("more than once", lambda: scores(model, Classification(), loader, (x, y)))


def test_a_loader_over_a_list_of_tensors_has_them_as_examples():
    """A plain list of columns may be one; the items of a loader's data set are examples always."""
    rows = [torch.full((4,), float(i), dtype=F64) for i in range(N)]
    (_, batch), *_ = Examples(DataLoader(rows, 5)).batches(CPU, F64)
    assert torch.equal(batch, torch.stack(rows[:5]))
    refused("a list of 20 tensors of the shape .* which could be either", lambda: Examples(rows))


# --- batches with more than tensors ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    text: list[str]


Pair = namedtuple("Pair", "x y n")


def test_values_beside_tensors_are_taken():
    model, x, y = linear_data()
    data = list(zip(x, y, strict=True))

    def fields(some):
        a, b = default_collate(some)
        return {"x": a, "y": b}

    cases: dict[str, tuple[Any, Any]] = {
        "lengths": (Named(), lambda some: fields(some) | {"lengths": [4] * len(some)}),
        "number of examples": (Named(), lambda some: fields(some) | {"n": len(some)}),
        "texts": (Named(), lambda some: fields(some) | {"text": ["abc"] * len(some)}),
        "array of texts": (Named(), lambda some: fields(some) | {"text": np.array(["a", "bc"] * 50)[: len(some)]}),
        "array": (Named(), lambda some: fields(some) | {"m": np.ones((len(some), 2), np.float32)}),
        "scalar of NumPy": (Named(), lambda some: fields(some) | {"m": np.float64(0.5)}),
        "nested": (Named(lambda m, b: m(b["in"]["x"])), lambda some: {"in": fields(some)} | fields(some)),
        "dataclass": (_Attributes(), lambda some: Record(*default_collate(some), text=["a"] * len(some))),
        "named tuple": (_Attributes(), lambda some: Pair(*default_collate(some), n=len(some))),
        "time first": (
            Named(lambda m, b: m(b["x"].transpose(0, 1)[:, 0])),
            lambda some: {"x": fields(some)["x"].unsqueeze(0).expand(2, -1, -1), "y": fields(some)["y"]},
        ),
    }
    for name, (task, collate) in cases.items():
        for size in (1, 7):
            loader, queries = (DataLoader(some, size, collate_fn=collate) for some in (data, data[:QUERIES]))
            found = scores(model, task, loader, queries).values
            assert (found - linear_scores()).norm() <= 1e-9 * found.norm(), name


class _Attributes(Task):
    def outputs(self, model, batch):
        return model(batch.x)

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch.y, reduction="none")


def test_texts_that_the_task_encodes():
    torch.manual_seed(0)
    texts = ["abc", "cab", "bbb", "aac", "bca", "cca", "aba"]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    encode = lambda some: torch.tensor([["abc".index(c) for c in text] for text in some])  # noqa: E731
    pairs = list(zip(texts, labels, strict=True))
    outputs = lambda pair: model(encode([pair[0]]))[0]  # noqa: E731
    right = dense_scores(model, outputs, lambda h, pair: cross_entropy(h, pair[1]), pairs, pairs[:2])

    class Texts(Task):
        def outputs(self, model, batch):
            return model(encode(batch[0]))

        def loss(self, outputs, batch):
            return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    for train, queries in (
        ((texts, labels), (texts[:2], labels[:2])),
        ((np.array(texts), labels), (np.array(texts)[:2], labels[:2])),
        (DataLoader(pairs, 3), DataLoader(pairs[:2], 3)),
        (pairs, pairs[:2]),
    ):
        close(scores(model, Texts(), train, queries).values, right)
    first, other = (
        Influence(Identity(), 0.1).fit(model, Texts(), (some, labels)) for some in (texts, ["abb", *texts[1:]])
    )
    assert first.problem.fingerprint()["train"] != other.problem.fingerprint()["train"]


def test_tokens_end_to_end():
    """Embedding bags with offsets: no axis of examples; an example alone is collated by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 5), nn.Linear(5, 3)).double()
    data = [(torch.randint(20, (int(k),)), int(k) % 3) for k in torch.randint(2, 6, (N,))]
    outputs = lambda item: model[1](model[0](item[0], torch.tensor([0])))[0]  # noqa: E731
    right = dense_scores(model, outputs, lambda h, item: cross_entropy(h, item[1]), data, data[:QUERIES])

    def flat(some):
        starts = torch.tensor([0] + [len(ids) for ids, _ in some]).cumsum(0)[:-1]
        return {"x": torch.cat([ids for ids, _ in some]), "o": starts, "y": torch.tensor([label for _, label in some])}

    task = Named(lambda m, b: m[1](m[0](b["x"], b["o"])))
    for size in (1, 7):
        loader, queries = DataLoader(data, size, collate_fn=flat), DataLoader(data[:QUERIES], size, collate_fn=flat)
        with pytest.warns(match="slow path"):
            close(scores(model, task, loader, queries).values, right)


class Graphs(nn.Module):
    """One round of messages and a sum over the nodes of each graph; the nodes' matrix is a layer or a loose one."""

    def __init__(self, loose: bool) -> None:
        super().__init__()
        self.loose, self.w = loose, nn.Parameter(torch.randn(4, 6)) if loose else nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, h, edges, graph, n):
        h = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]) + h
        h = torch.relu(h @ self.w if self.loose else self.w(h))
        return self.head(h.new_zeros(n, 6).index_add(0, graph, h))


@pytest.mark.parametrize("loose", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.filterwarnings("ignore:.*(slow path|one example at a time)")
def test_graphs_side_by_side(loose, size):
    torch.manual_seed(0)
    model = Graphs(loose).double()
    data = [(torch.randn(k, 4, dtype=F64), torch.randint(k, (2, 6)), k % 3) for k in torch.randint(1, 7, (N,)).tolist()]
    outputs = lambda g: model(g[0], g[1], torch.zeros(len(g[0]), dtype=torch.long), 1)[0]  # noqa: E731
    right = dense_scores(model, outputs, lambda h, g: cross_entropy(h, g[2]), data, data[:QUERIES])

    def collate(some):
        sizes = torch.tensor([len(h) for h, _, _ in some])
        starts = sizes.cumsum(0) - sizes
        return {
            "h": torch.cat([h for h, _, _ in some]),
            "edges": torch.cat([edges + start for (_, edges, _), start in zip(some, starts, strict=True)], 1),
            "graph": torch.arange(len(some)).repeat_interleave(sizes),
            "y": torch.tensor([label for *_, label in some]),
        }

    task = Named(lambda m, b: m(b["h"], b["edges"], b["graph"], len(b["y"])))
    loader, queries = (DataLoader(some, size, collate_fn=collate) for some in (data, data[:QUERIES]))
    close(scores(model, task, loader, queries).values, right)


def test_batches_know_their_examples():
    model, data, _ = ragged()
    examples = Examples(DataLoader(data, 6, collate_fn=padded))
    batch = examples.batch([7, 3, 11], CPU, F64)
    assert batch_length(batch) == 3 and has_rows(batch)
    for i, number in enumerate((7, 3, 11)):
        alone, single = take(batch, torch.tensor([i])), examples.single(number, CPU, F64)
        assert batch_length(alone) == batch_length(single) == 1
        assert alone[0].shape == (1, batch[0].shape[1]) and single[0].shape == (1, len(data[number][0]))
        assert torch.equal(alone[0][0, : len(data[number][0])], data[number][0]) and int(single[1]) == data[number][1]
    flat = lambda some: (torch.cat([ids for ids, _ in some]), padded(some)[1])  # noqa: E731
    batch = Examples(DataLoader(data, 6, collate_fn=flat)).batch([7, 3, 11], CPU, F64)
    assert batch_length(batch) == 3 and not has_rows(batch)
    assert torch.equal(take(batch, torch.tensor([1]))[0], data[3][0])
    assert torch.equal(take(batch, torch.tensor([2, 0]))[0], torch.cat([data[11][0], data[7][0]]))


def test_a_batch_of_another_class_is_refused():
    class Graph:
        def __init__(self, x, y):
            self.x, self.y = x, y

    model, x, y = linear_data()
    loader = DataLoader(TensorDataset(x, y), 4, collate_fn=lambda some: Graph(*default_collate(some)))
    refused(
        "made of tensors, .* got an object of the class .*Graph. Return its tensors",
        lambda: scores(model, _Attributes(), loader, loader),
    )


def test_values_that_change_between_two_passes():
    _, x, y = linear_data()
    passes = []

    def collate(some):
        passes.append(len(some))
        return (*default_collate(some), [f"text {len(passes) > 40}"] * len(some))

    examples = Examples(DataLoader(TensorDataset(x, y), 4, collate_fn=collate))

    def look():
        for _ in range(20):
            list(examples.batches(CPU, F64))

    refused("train data must be the same in every pass, but examples", look)


class PerBatch(Classification):
    """A loss that is a share of the batch's."""

    def loss(self, outputs, batch):
        return super().loss(outputs, batch) / len(outputs)


class PerToken(Named):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) / batch["tokens"]


def test_losses_that_depend_on_the_rest_of_the_batch():
    model, data, right = ragged()
    said = "task.{} of an example must not depend on the other examples of its batch"

    def counted(some):
        x, y = padded(some)
        return {"x": x, "y": y, "tokens": int((x != 0).sum())}

    loader, counting = (DataLoader(data, 8, collate_fn=collate) for collate in (padded, counted))
    refused(said.format("loss"), lambda: scores(model, PerBatch(), loader, loader))
    refused(said.format("loss"), lambda: scores(model, PerToken(), counting, counting))
    fitted = Influence(Exact(), DAMPING, progress=False).fit(model, Classification(), loader)
    queries = DataLoader(data[:QUERIES], QUERIES, collate_fn=padded)
    for measurement in (lambda h, b: PerBatch().loss(h, b), lambda h, b: Classification().loss(h, b) - h.mean()):
        refused(said.format("measurement"), lambda m=measurement: fitted.score(queries, measurement=m))
    close(fitted.score(queries, measurement=Classification().loss).values, right)


def test_padding_that_a_model_does_not_mask():
    torch.manual_seed(0)

    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

        def forward(self, ids):
            return self.head(self.embedding(ids).sum(1))

    model, (_, data, _) = Unmasked().double(), ragged()
    loader = DataLoader(data, 8, collate_fn=padded)
    refused("depend on the other examples.*mask", lambda: scores(model, Classification(), loader, loader))


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, np.uint16, np.uint32, np.int32])
def test_labels_of_any_width(dtype):
    model, x, y = linear_data()
    labels = y.to(dtype) if isinstance(dtype, torch.dtype) else y.numpy().astype(dtype)
    found = attribute(model, Classification(), (x, labels), (x[:2], labels[:2]), solver=Exact(), damping=0.1)
    wanted = attribute(model, Classification(), (x, y), (x[:2], y[:2]), solver=Exact(), damping=0.1)
    assert torch.equal(found.values, wanted.values)


def test_labels_as_bool_and_bytes():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 200).double(), torch.randn(N, 4, dtype=F64), torch.randint(2, (N,))
    kinds = {}
    for name, labels in {"long": y, "bool": y.bool(), "uint8": y.byte()}.items():
        kinds[name] = attribute(model, Classification(), (x, labels), (x, labels), solver=CG(), damping=0.1).values
    assert torch.equal(kinds["bool"], kinds["long"]) and torch.equal(kinds["uint8"], kinds["long"])
    # As bytes, class 156 equals -100: it must not be taken for padding.
    marks = torch.full((N, 5), 156, dtype=torch.uint8)
    assert Classification().padding((x, marks)).all()


def test_float64_arrays_and_a_float32_model():
    model, x, y = linear_data()
    single = nn.Linear(4, 3)
    single.load_state_dict(model.float().state_dict())
    right = linear_scores()
    for data in (
        (x.numpy(), y.numpy()),
        {"x": x.numpy(), "y": y.numpy()},
        (x.tolist(), y.tolist()),
        (x.numpy().astype(">f8"), y.numpy().astype(">i4")),
    ):
        task = Named() if isinstance(data, dict) else Classification()
        queries = (
            {k: v[:QUERIES] for k, v in data.items()} if isinstance(data, dict) else tuple(v[:QUERIES] for v in data)
        )
        close(scores(single, task, data, queries).values.double(), right, 1e-4)
    # Tensors are left as they are; where the model rejects them, the remedy is said.
    for data in ((x, y), [(a.numpy(), int(b)) for a, b in zip(x, y, strict=True)]):
        refused(
            r"model is float32 and data are float64.*x.float\(\)",
            lambda data=data: scores(single, Classification(), data, (x, y)),
        )


def test_float64_numbers_that_float32_cannot_tell_apart_stay():
    """Time stamps and keys: the model gets them as they are, and converts them itself or rejects them."""

    class Days(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 3)

        def forward(self, t):
            return self.head(((t - 1.7e9) / 100).float())

    torch.manual_seed(0)
    model, y = Days(), torch.randint(3, (N,))
    t = 1.7e9 + torch.rand(N, 1, dtype=F64) * 100
    found = attribute(model, Classification(), (t.numpy(), y), (t[:3].numpy(), y[:3]), solver=Exact(), damping=0.1)
    wanted = attribute(model, Classification(), (t, y), (t[:3], y[:3]), solver=Exact(), damping=0.1)
    assert torch.equal(found.values, wanted.values)


# --- forms of data --------------------------------------------------------------------------------------------------


def test_lists_of_numbers():
    model, x, y = linear_data()
    first = (x[:QUERIES].tolist(), y[:QUERIES].tolist())
    close(scores(model, Classification(), (x.tolist(), y.tolist()), first).values, linear_scores())
    close(
        scores(model, Classification(), (list(x), y.tolist()), (list(x[:QUERIES]), y[:QUERIES])).values, linear_scores()
    )
    named = [{"x": x[:n].tolist(), "y": y[:n].tolist()} for n in (N, QUERIES)]
    close(scores(model, Named(), *named).values, linear_scores())
    rows = [{"x": a, "y": int(b)} for a, b in zip(x, y, strict=True)]
    close(scores(model, Named(), rows, rows[:QUERIES]).values, linear_scores())


def test_what_cannot_be_read_is_refused_with_its_remedy():
    model, x, y = linear_data()
    task = Classification()
    many = torch.randn(5000, 4).tolist()
    masked = np.ma.masked_array(x.numpy(), mask=x.numpy() > 1)
    cases: dict[str, tuple[Any, str]] = {
        "ragged lists": (([[1.0], [1.0, 2.0]], [0, 1]), r"train\[0\] must be .*equally long.* ragged ones.*collate_fn"),
        "texts as data": ("data.csv", "got str, which has no length and no index"),
        "a mask": ((masked, y), r"without a mask.*x.filled\(0\)"),
        "dates": ((np.array(["2020-01-01"] * N, dtype="datetime64[D]"), y), "of numbers, .*Encode it"),
        "objects": ((np.array([object()] * N), y), "of numbers, .*Encode it"),
        "a sparse tensor": ((x.to_sparse(), y), "a dense tensor.*torch.sparse_coo one.*to_dense"),
        "another length": ((x.tolist(), y.tolist()[:-1]), r"same number of examples, got \[20, 19\]"),
        "rows of lists": ([[*row, 0] for row in many], "the model failed on a batch"),
        "rows named by lists": (
            [{"x": row, "y": 0} for row in many],
            "the model failed on a batch.*takes lists of numbers apart",
        ),
        "no tensors": ([{"x": None} for _ in range(9)], "must fit into one batch, but their collate function failed"),
    }
    for data, pattern in cases.values():
        used = Named() if isinstance(data, list) and isinstance(data[0], dict) else task
        refused(pattern, lambda data=data, used=used: scores(model, used, data, (x, y)))


def test_sparse_matrices_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    model, x, y = linear_data()
    refused(r"sparse csr_matrix.*toarray", lambda: scores(model, Classification(), (sparse.csr_matrix(x), y), (x, y)))


def test_data_frames():
    pd = pytest.importorskip("pandas")
    model, x, y = linear_data()
    frame, labels = pd.DataFrame(x.numpy(), columns=list("abcd")), pd.Series(y.numpy())
    first = (frame[:QUERIES], labels[:QUERIES])
    close(scores(model, Classification(), (frame, labels), first).values, linear_scores())
    close(scores(model, Classification(), (frame, y.tolist()), first).values, linear_scores())
    close(scores(model, Named(), {"x": frame, "y": labels}, {"x": first[0], "y": first[1]}).values, linear_scores())
    single = nn.Linear(4, 3)
    single.load_state_dict(model.float().state_dict())
    close(scores(single, Classification(), (frame, labels), first).values.double(), linear_scores(), 1e-4)

    class Columns(Named):
        def outputs(self, model, batch):
            return model(torch.stack([batch[name] for name in "abcd"], 1))

    whole = frame.assign(y=labels, city=["x"] * N)
    close(scores(model.double(), Columns(), whole, whole[:QUERIES]).values, linear_scores(), 1e-6)

    shuffled = labels.sample(frac=1, random_state=0)
    refused("one index.*reset_index", lambda: scores(model, Classification(), (frame, shuffled), first))
    mixed = frame.assign(city=["x"] * N)
    refused(r"train\[0\] must be of numbers.*Encode", lambda: scores(model, Classification(), (mixed, labels), first))
    gaps = pd.Series([0, None] * (N // 2), dtype="Int64")
    refused("of numbers|integer class labels|finite", lambda: scores(model, Classification(), (frame, gaps), first))


def test_data_sets_of_hugging_face():
    hub = pytest.importorskip("datasets")
    model, x, y = linear_data()
    made = hub.Dataset.from_dict({"x": x.tolist(), "y": y.tolist(), "text": ["a"] * N})
    for kind in ("torch", "numpy"):
        data = made.with_format(kind)
        found = scores(model, Named(_as_double), data, data.select(range(QUERIES)))
        close(found.values, linear_scores(), 1e-6)
    close(
        scores(model, Classification(), (made["x"], made["y"]), (made["x"][:QUERIES], made["y"][:QUERIES])).values,
        linear_scores(),
    )
    refused("takes lists of numbers apart.*with_format", lambda: scores(model, Named(), made, made))
    split = hub.DatasetDict({"train": made, "test": made})
    refused(
        r"one data set, got a dict of 2. Pick one, such as data\['train'\]", lambda: scores(model, Named(), split, made)
    )
    stream = made.to_iterable_dataset()
    refused("which has no length and no index", lambda: scores(model, Named(), stream, made))


def _as_double(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"].double())


# --- missing labels -------------------------------------------------------------------------------------------------


def test_a_missing_label_that_the_loss_leaves_out():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(N, 4, dtype=F64)
    y = torch.randn(N, 3, dtype=F64)
    missing = torch.rand(N, 3) < 0.3
    known = y.masked_fill(missing, torch.nan)

    class Partial(Task):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            return torch.where(batch[1].isnan(), 0, outputs - batch[1].nan_to_num()).square().sum(1)

    items = list(zip(x, y, missing, strict=True))
    squares = lambda h, item: ((h - item[1]) ** 2)[~item[2]].sum()  # noqa: E731
    right = dense_scores(model, lambda item: model(item[0]), squares, items, items[:QUERIES])
    close(scores(model, Partial(), (x, known), (x[:QUERIES], known[:QUERIES])).values, right)

    class Trap(Partial):
        """The value is finite, the gradient is 0 times NaN."""

        def loss(self, outputs, batch):
            return torch.where(batch[1].isnan(), 0, (outputs - batch[1]).square()).sum(1)

    wanted = "train data must be finite, got NaN or infinity in example|derivative of task.loss"
    refused(wanted, lambda: scores(model, Trap(), (x, known), (x, y)))
    refused("train data must be finite", lambda: scores(model, Regression(), (x, known), (x, y)))
    for bad in (torch.nan, torch.inf):
        squashed = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        worse = x.clone()
        worse[6, 2] = bad
        refused(
            "train data must be finite, got NaN or infinity in example 6",
            lambda w=worse, m=squashed: scores(m, Partial(), (w, known), (x, y)),
        )


@pytest.mark.parametrize(("solver", "which"), [(Identity(), "derivative"), (Exact(), "second derivative")])
def test_a_gradient_that_is_not_finite_is_named(solver, which):
    model, x, _ = linear_data()

    class Root(Task):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            return (outputs - batch[1]).square().sum(1).sqrt()

    y = torch.randn(N, 3, dtype=F64)
    hit = torch.where(torch.arange(N)[:, None] == 4, model(x).detach(), y)
    refused(
        f"the {which} of task.loss by the outputs must be finite, got NaN or infinity for example 4",
        lambda: Influence(solver, 0.1).fit(model, Root(), (x, hit)).score((x, y), certify=False),
    )


# --- messages -------------------------------------------------------------------------------------------------------


def test_outputs_of_another_shape_are_told_with_the_reason():
    _, x, y = linear_data()
    target = x[:, 0]

    class Squeezed(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze()

    refused(
        r"task.outputs .* got \(\). A squeeze\(\)",
        lambda: scores(Squeezed(4, 1).double(), Regression(), (x, target), (x, target)),
    )

    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    refused(
        r"got a tuple of 2: \([13], 3\), \([13], 4\). Subclass the task",
        lambda: scores(Two(4, 3).double(), Classification(), (x, y), (x, y)),
    )

    wrapped = WithoutGradient(nn.Sequential(nn.Linear(4, 3)).double())
    refused(
        r"outputs have no gradient: .* runs under torch.no_grad\(\)",
        lambda: scores(wrapped, Classification(), (x, y), (x, y)),
    )


class WithoutGradient(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


def test_a_backbone_without_gradients_has_none():
    """What runs under no_grad is a constant: its parameters have gradient 0, as autograd has it."""
    torch.manual_seed(0)

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.body(x).relu()
            return self.head(h)

    model, x, y = Probe().double(), torch.randn(N, 4, dtype=F64), torch.randint(3, (N,))
    pairs = list(zip(x, y, strict=True))
    right = dense_scores(model, lambda p: model(p[0]), lambda h, p: cross_entropy(h, p[1]), pairs, pairs[:QUERIES])
    close(scores(model, Classification(), (x, y), (x[:QUERIES], y[:QUERIES])).values, right)


def test_no_error_is_longer_than_a_screen():
    long = [float(i) for i in range(100_000)]
    for error in (
        expected("x", "short", long, "Cut it."),
        InputError("y" * 10**6),
        UnsupportedError(f"{long} Cut it."),
    ):
        assert len(str(error)) <= MESSAGE
    assert str(expected("x", "short", long, "Cut it.")).endswith("Cut it.")
    assert str(UnsupportedError(f"{long} Cut it.")).endswith("Cut it.") and "characters" in str(
        UnsupportedError(f"{long}")
    )
    assert str(ArtefactError("as it is")) == "as it is"
