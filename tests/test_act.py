"""Cleaning, selecting and explaining: hand values, dense answers, planted mistakes and clusters."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import wherefrom
from problems import problem
from wherefrom import InputError, Scores
from wherefrom.data.tables import read_table, write_table
from wherefrom.tools.act import clean, cleanest, explain, select
from wherefrom.tools.act.coverage import coverage, greedy
from wherefrom.tools.evaluate import flip_labels

# --- clean: the ranking ---------------------------------------------------------------------------------------------


def test_the_outer_fence_by_hand():
    found = clean([4.0, 0.0, 100.0, 2.0, 3.0, 1.0])  # quartiles 1.25 and 3.75, fence 3.75 + 3 * 2.5
    assert found.ranking.tolist() == [2, 0, 4, 3, 5, 1]
    assert found.by == "self-influence"
    assert [p.example for p in found.proposals] == [2]
    assert found.distances[2] == 38.5 and found.distances[4] == -0.3
    assert found.rule == "beyond the outer fence of 11.2, 3 interquartile ranges above the upper quartile: 1"
    assert found.proposals[0].reason == (
        "rank 1 of 6 by self-influence, 100, 38.5 interquartile ranges above the upper quartile; learnt by heart, not "
        "from others"
    )
    assert not clean([4.0, 0.0, 11.25, 2.0, 3.0, 1.0]).proposals  # on the fence is not beyond it


@pytest.mark.parametrize("wrap", [np.array, torch.tensor, lambda v: Scores(torch.tensor(v), None, torch.ones(2))])
def test_harm_is_minus_the_mean_over_trusted_queries(wrap):
    found = clean(wrap([[1.0, -6.0, 0.0, 2.0], [3.0, 2.0, -4.0, 2.0]]), count=2)
    assert found.by == "harm"
    assert found.scores.tolist() == [-2.0, 2.0, 2.0, -2.0]
    assert found.ranking.tolist() == [1, 2, 0, 3]  # ties by number
    assert [(p.example, p.action, p.change) for p in found.proposals] == [(1, "drop", -0.5), (2, "drop", -0.5)]
    assert "mean f of the trusted queries is predicted to change by -0.5" in found.proposals[0].reason
    assert found.rule == "looked at: the first 2, as asked"


def test_what_helps_is_never_proposed_unless_asked():
    helpful = -np.array([1.0, 1.1, 1.2, 1.0, 1.1, 0.1])  # harm; the last is far out, and still helps
    assert not clean(-helpful[None]).proposals
    assert [p.example for p in clean(-helpful[None], share=0.1).proposals] == [5]


def test_ties_go_by_number():
    assert clean([0.0, 1.0] * 250).ranking.tolist() == [*range(1, 500, 2), *range(0, 500, 2)]
    assert select([[0.0] * 500], count=300).examples.tolist() == list(range(300))
    assert explain([[1.0] * 500], k=300)["example"] == list(range(300))


def test_scores_that_are_mostly_the_same():
    assert not clean([1.0] * 9).proposals
    found = clean([0.0] * 8 + [1e-3])
    assert [p.example for p in found.proposals] == [8] and found.distances.tolist() == [0.0] * 8 + [math.inf]


def test_the_table_of_a_cleaning(tmp_path):
    found = clean([4.0, 0.0, 100.0, 2.0, 3.0, 1.0], share=1 / 3)
    table = found.table(caption=list("abcdef"))
    assert [table[name] for name in ("rank", "example", "action", "score", "caption")] == [
        [1, 2], [2, 0], ["drop", "drop"], [100.0, 4.0], ["c", "a"],
    ]  # fmt: skip
    assert table["given_label"] == table["new_label"] == table["predicted_change"] == [None, None]
    write_table(tmp_path / "clean.csv", table)
    assert read_table(tmp_path / "clean.csv") == table
    assert list(clean([1.0, 2.0]).table(caption="ab")) == list(table)  # no proposal, the same columns
    assert str(found).startswith("6 examples by self-influence: 2 to drop\nlooked at: the first 2")


# --- clean: labels --------------------------------------------------------------------------------------------------


def weighed(p, given, trusted, damping=0.05):
    """Dense: {example: (action, new label, change)} over the labels in the data."""
    matrix = torch.linalg.inv(p.ggn() + damping * torch.eye(p.dim, dtype=torch.float64))
    direction = p.measurement_gradients(trusted).mean(0) @ matrix
    found = {}
    for z, y in enumerate(given.tolist()):
        x = p.train[0][z : z + 1]
        s = {
            label: float(direction @ p.loss_gradients((x, torch.tensor([label])))[0])
            for label in given.unique().tolist()
        }
        best = max(s, key=lambda label: s[label])
        if best != y and best == int(p.outputs((x,))[0].argmax()):
            found[z] = ("relabel", best, (s[y] - s[best]) / p.n)
        else:
            found[z] = ("drop", None, s[y] / p.n) if s[y] < 0 else ("keep", None, 0.0)
    return found


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("name", ["mlp", "cnn_groups"])
def test_labels_are_weighed_as_dense_algebra_weighs_them(name, batch_size):
    p = problem(name)
    given = p.train[1].roll(2)
    influence = wherefrom.Influence(wherefrom.Exact(), 0.05, batch_size=batch_size).fit(
        p.model, p.task, (p.train[0], given)
    )
    found = clean(influence.self_influence(), influence, p.train, count=p.n)
    wanted = weighed(p, given, p.train)
    assert {c.example: (c.action, c.label) for c in found.proposals} == {z: w[:2] for z, w in wanted.items()}
    assert {w[0] for w in wanted.values()} >= {"keep", "relabel"}
    changes = torch.tensor([c.change for c in found.proposals])
    assert torch.allclose(changes, torch.tensor([wanted[c.example][2] for c in found.proposals]), rtol=1e-8, atol=0)
    assert [c.given for c in found.proposals] == given[found.ranking].tolist()


class Rating(wherefrom.Task):
    """A number for an example, compared by its square; f wants it large."""

    def outputs(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return (outputs[:, 0] - batch["y"]).square()

    def measurement(self, outputs, batch):
        return -outputs[:, 0] + 0 * batch["y"]


def test_dropping_wins_where_every_label_harms():
    """Model w x with w = 1: the loss gradient is 2 (x - y) x, C = E[2 x^2] = 7, f = -w x with gradient -x."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x, y = torch.tensor([[3.0], [1.0], [-2.0], [0.0]], dtype=torch.float64), torch.tensor([0, 1, 0, 0])
    influence = wherefrom.Influence(wherefrom.Exact(), 1.0).fit(model, Rating(), {"x": x, "y": y})
    trusted = {"x": x[:1], "y": y[:1]}
    found = clean([9.0, 8.0, 7.0, 6.0], influence, trusted, count=3, labels_at="y")
    # s(x, y) = -3 * 2 (x - y) x / 8: of example 0: -6.75 for 0, -4.5 for 1; of 1: -0.75, 0; of 2: -3, -4.5
    assert [(p.action, p.given, p.label) for p in found.proposals] == [
        ("drop", 0, None),  # 1 would harm less and is likelier, but harms
        ("keep", 1, None),
        ("drop", 0, None),
    ]
    assert [p.change for p in found.proposals] == pytest.approx([-6.75 / 4, 0, -3 / 4], rel=1e-12)
    assert "rare rather than wrong" in found.proposals[1].reason


def blobs(seed=0, n=240, classes=3):
    """Classes in the plane, 10% of the labels flipped, and a network that has learnt part of them by heart."""
    rng = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.arange(classes, dtype=torch.float64) / classes
    true = torch.randint(classes, (n + 60,), generator=rng)
    x = (
        torch.randn(n + 60, 2, generator=rng, dtype=torch.float64)
        + 3 * torch.stack([angle.cos(), angle.sin()], 1)[true]
    )
    y, flipped = flip_labels(true[:n], 0.1, classes, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, classes)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[:n]), y).backward()
        optimiser.step()
    return model, (x[:n], y), (x[n:], true[n:]), true[:n], flipped


@pytest.fixture(scope="module")
def noisy():
    model, train, trusted, true, flipped = blobs()
    return (
        wherefrom.Influence(wherefrom.Exact(), 0.01).fit(model, wherefrom.Classification(), train),
        trusted,
        true,
        flipped,
    )


@pytest.mark.parametrize("by", ["self-influence", "harm"])
@pytest.mark.parametrize("with_trusted", [True, False])
def test_most_proposals_are_flipped_labels_and_the_true_ones_come_back(noisy, by, with_trusted):
    influence, trusted, true, flipped = noisy
    scores = influence.self_influence() if by == "self-influence" else influence.score(trusted)
    found = clean(scores, influence, trusted if with_trusted else None)
    changed = [p for p in found.proposals if p.action == "relabel"]
    hits = [p for p in changed if flipped[p.example]]
    assert len(hits) >= 0.8 * len(changed) and len(hits) >= 0.75 * int(flipped.sum())
    assert sum(p.label == true[p.example] for p in hits) >= 0.9 * len(hits)
    assert all(p.change < 0 for p in changed)
    assert ("the trusted queries" if with_trusted else "unsuspicious training examples") in found.rule


def test_the_stand_ins_are_of_every_label_unsuspicious_and_seeded(noisy, monkeypatch):
    influence, *_ = noisy
    values, asked = influence.self_influence(), []
    y = influence.problem.train.data[1]
    real = wherefrom.Influence.score

    def score(self, queries, *args, **kwargs):
        asked.append(queries)
        return real(self, queries, *args, **kwargs)

    monkeypatch.setattr(wherefrom.Influence, "score", score)
    runs = [clean(values, influence, count=30, seed=seed) for seed in (0, 0, 1)]
    (x0, y0), (x1, _), (x2, _) = asked
    assert torch.equal(x0, x1) and not torch.equal(x0, x2)
    assert runs[0].proposals == runs[1].proposals
    numbers = [int((influence.problem.train.data[0] == row).all(1).nonzero()) for row in x0]
    assert f"against {len(set(numbers))} unsuspicious" in runs[0].rule
    left = set(values.argsort(descending=True)[30:].tolist())
    for label in range(3):
        of_label = [z for z in values.argsort().tolist() if y[z] == label and z in left]
        half = math.ceil(len(of_label) / 2)
        drawn = {n for n in numbers if y[n] == label}
        assert drawn <= set(of_label[:half]) and len(drawn) == min(half, 34)
    assert torch.equal(y0, y[numbers])


def test_positions_that_do_not_count_are_no_label():
    p = problem("mlp")
    y = p.train[1].clone()
    y[3] = -100
    influence = wherefrom.Influence(wherefrom.Exact(), 0.05).fit(p.model, p.task, (p.train[0], y))
    values = torch.arange(p.n, 0, -1.0)
    found = clean(values, influence, p.queries, count=4)
    assert found.proposals[3].given == -100
    assert all(c.label != -100 for c in found.proposals)


def test_nothing_to_look_at_costs_nothing():
    p = problem("mlp")
    influence = wherefrom.Influence(wherefrom.Exact(), 0.05).fit(p.model, p.task, p.train)
    assert clean(torch.ones(p.n), influence).proposals == ()


def test_what_clean_refuses():
    p, lm = problem("mlp"), problem("masked_sequence")
    influence = wherefrom.Influence(wherefrom.Exact(), 0.05).fit(p.model, p.task, p.train)
    ones = torch.ones(p.n)
    with pytest.raises(InputError, match="a share or a count, got both"):
        clean(ones, share=0.1, count=2)
    with pytest.raises(InputError, match=r"share must be in \(0, 1\], got 5"):
        clean(ones, share=5)
    with pytest.raises(InputError, match=r"count must be a whole number from 1 to the 11 examples, got 12"):
        clean(ones, count=12)
    with pytest.raises(InputError, match="finite"):
        clean(ones * math.nan)
    with pytest.raises(InputError, match="Pass influence"):
        clean(ones, trusted=p.queries)
    with pytest.raises(InputError, match="of the 11 examples that influence was fitted to, got 5"):
        clean(ones[:5], influence, p.queries, count=1)
    with pytest.raises(InputError, match="pass trusted queries"):
        clean(ones, influence, count=p.n)
    for place, got in ((2, "none in a tuple"), ("label", "none in a tuple"), (0, r"\(11, \d+\) torch.float64")):
        with pytest.raises(InputError, match=f"labels at {place!r}.* got {got}.*labels_at"):
            clean(ones, influence, p.queries, count=1, labels_at=place)
    influence = wherefrom.Influence(wherefrom.Identity(), 1.0).fit(lm.model, lm.task, lm.train)
    with pytest.raises(InputError, match="one whole number per example"):
        clean(torch.ones(lm.n), influence, count=1)


# --- select ---------------------------------------------------------------------------------------------------------

MATRIX = [[5.0, 0.0, 1.0, 2.0], [-4.0, 0.0, 2.0, 2.0], [1.0, 3.0, 0.0, -1.0]]  # means 2/3, 1, 1, 1


def test_the_rules_by_hand():
    mean = select(MATRIX, count=3)
    assert mean.examples.tolist() == [1, 2, 3]  # ties by number
    assert mean.scores.tolist() == [1.0, 1.0, 1.0]
    assert mean.served.tolist() == [3.0, 4.0, 2.0]
    assert select(MATRIX, count=3, by="max").examples.tolist() == [0, 1, 2]
    grouped = select(torch.tensor(MATRIX), share=0.5, by="max", groups=["a", "a", "b"])
    assert grouped.examples.tolist() == [1, 3]  # groups: 0.5 0 1.5 2 and 1 3 0 -1
    assert grouped.scores.tolist() == [3.0, 2.0] and grouped.served.tolist() == [2.0, 2.0]
    assert select(MATRIX, count=1, groups=torch.tensor([0, 0, 1])).examples.tolist() == [1]  # 0.75 1.5 0.75 0.5
    diverse = select(MATRIX, count=2, by="coverage")  # sqrt gains: 3.24, 1.73, 2.41, 2.83; then -, 1.0, 1.63, 1.82
    assert diverse.examples.tolist() == [0, 3]


def test_the_random_examples_are_as_many_distinct_and_seeded():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    one, two, other = (select(scores, share=0.2, seed=seed) for seed in (0, 0, 1))
    assert len(one.random) == len(set(one.random.tolist())) == len(one.examples) == 10
    assert one.random.tolist() == two.random.tolist() != other.random.tolist()
    assert one.served_by_random == pytest.approx(scores[:, one.random].sum(1).tolist(), rel=1e-6)
    assert str(one).startswith("10 of 50 examples by mean: 3 of 3 helped")
    whole = select(scores, share=1.0)
    assert sorted(whole.random.tolist()) == list(range(50)) and whole.served == pytest.approx(whole.served_by_random)


def test_cleanest_takes_the_lowest_self_influence():
    found = cleanest([3.0, 1.0, 2.0, 1.0], count=3)
    assert found.examples.tolist() == [1, 3, 2] and found.scores.tolist() == [-1.0, -1.0, -2.0]
    with pytest.raises(InputError, match="1 dimensions"):
        cleanest(MATRIX, count=1)


def planted(seed=0):
    """24 queries of 4 kinds, half of them of the first; 60 examples that help one kind each, 10 that harm all."""
    rng = np.random.default_rng(seed)
    kinds, helped = np.repeat(range(4), [12, 6, 4, 2]), np.repeat(range(5), [30, 15, 10, 5, 10])
    scores = np.where(kinds[:, None] == helped, 1.0, 0.0) * rng.uniform(0.5, 1.5, (24, 70))
    return np.where(helped == 4, -1.0, scores) + 0.01 * rng.normal(size=(24, 70)), kinds, helped


def test_a_diverse_choice_serves_every_planted_cluster():
    scores, kinds, helped = planted()
    plain, diverse = (select(scores, count=16, by=by) for by in ("mean", "coverage"))
    assert set(helped[plain.examples]) == {0}
    assert set(helped[diverse.examples]) == {0, 1, 2, 3}
    assert diverse.served.min() > 0.5 > plain.served.min()
    evenly = select(scores, count=16, by="coverage", groups=kinds.tolist())  # a kind counts as one, however often asked
    assert np.bincount(helped[evenly.examples]).tolist() == [4, 4, 4, 4]


def naive(scores, count):
    """Greedy choice that tries everything anew each time, by the function itself."""
    chosen: list[int] = []
    for _ in range(count):
        left = [z for z in range(scores.shape[1]) if z not in chosen]
        chosen.append(max(left, key=lambda z: (coverage(scores[:, [*chosen, z]]), -z)))
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_lazy_greedy_is_greedy_and_as_good_as_promised(seed):
    rng = np.random.default_rng(seed)
    q, n, k = rng.integers([1, 5, 1], [6, 10, 5])
    scores = rng.normal(size=(q, n)) * rng.lognormal(sigma=2, size=(q, 1))
    found = greedy(scores, k)
    positive = [z for z in found if (scores[:, z] > 0).any()]  # the order of those that add nothing is by the mean
    assert positive == naive(scores, k)[: len(positive)]
    best = max(coverage(scores[:, list(some)]) for some in combinations(range(n), k))
    assert coverage(scores[:, found]) >= (1 - 1 / math.e) * best
    assert coverage(scores[:, found]) <= best * (1 + 1e-12)


def test_lazy_greedy_on_a_larger_problem_with_copies():
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.standard_cauchy(size=(7, 60)), 3, axis=1)[:, rng.permutation(180)]
    chosen = greedy(scores, 180).tolist()
    assert sorted(chosen) == list(range(180))
    assert chosen[:40] == naive(scores, 40)
    copies = scores[0][chosen[:40]]
    assert len(set(copies)) < 40  # some were taken again


def test_what_adds_nothing_comes_by_the_mean():
    scores = np.array([[-3.0, 1.0, -1.0, -2.0, -1.0]])
    assert greedy(scores, 5).tolist() == [1, 2, 4, 3, 0]


def test_what_select_refuses():
    with pytest.raises(InputError, match="a share or a count, got neither"):
        select(MATRIX)
    with pytest.raises(InputError, match="by must be one of mean, max, coverage, got median"):
        select(MATRIX, count=1, by="median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="one for each of the 3 queries, got 2"):
        select(MATRIX, count=1, groups=[0, 1])
    with pytest.raises(InputError, match="2 dimensions"):
        select([1.0, 2.0], count=1)
    with pytest.raises(InputError, match="count must be"):
        select(MATRIX, count=0)


def test_of_a_shortlist_the_examples_are_numbered_as_in_training():
    some = Scores(torch.tensor([[1.0, 3.0, 2.0]]), None, torch.ones(1, dtype=torch.bool))
    some = dataclasses.replace(some, numbers=torch.tensor([6, 7, 5]))
    found = select(some, count=2)
    assert found.examples.tolist() == some.top(2).proponents[0].tolist() == [7, 5]
    assert set(found.random) <= {5, 6, 7}
    assert select(some, count=2, by="coverage").examples.tolist() == [7, 5]
    with pytest.raises(InputError, match="needs the scores of all training examples"):
        clean(some)


def test_the_table_of_a_selection():
    assert select(MATRIX, count=2, by="max").table(caption=list("wxyz")) == {
        "place": [1, 2],
        "example": [0, 1],
        "score": [5.0, 3.0],
        "caption": ["w", "x"],
    }


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_by_hand(tmp_path):
    values = torch.tensor([[1.0, -2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.0, -0.5, 0.0]])
    scores = Scores(values, torch.tensor([0.25, 0.5]), torch.tensor([True, False]))
    found = explain(scores, k=2, examples={"label": list("abcde")}, queries={"caption": ["one", "two"]})
    assert found == {
        "query": [0, 0, 0, 1],
        "side": ["proponent", "proponent", "opponent", "opponent"],
        "rank": [1, 2, 1, 1],
        "example": [3, 0, 1, 3],
        "score": [3.0, 1.0, -2.0, -0.5],
        "predicted_change": [0.6, 0.2, -0.4, -0.1],
        "residual": [0.25, 0.25, 0.25, 0.5],
        "converged": [True, True, True, False],
        "query_caption": ["one", "one", "one", "two"],
        "example_label": ["d", "a", "b", "d"],
    }
    write_table(tmp_path / "explain.parquet", found)
    assert read_table(tmp_path / "explain.parquet") == found


def test_explain_of_a_plain_matrix_and_of_nothing():
    found = explain(np.array([[1.0, -2.0]]), k=9)
    assert found["example"] == [0, 1] and found["residual"] == found["converged"] == [None, None]
    assert set(map(len, explain(torch.zeros(2, 3)).values())) == {0}
    with pytest.raises(InputError, match="at least 1"):
        explain([[1.0]], k=0)


def test_the_predicted_change_of_candidates_is_over_the_training_examples():
    p = problem("mlp")
    influence = wherefrom.Influence(wherefrom.Exact(), 0.05).fit(p.model, p.task, p.train)
    scores = influence.score(p.queries, candidates=tuple(t[:4] for t in p.train))
    found = explain(scores, k=1)
    assert found["predicted_change"] == pytest.approx([s / p.n for s in found["score"]])
    same = explain(dataclasses.replace(scores, provenance={}), k=1)
    assert same["predicted_change"] == pytest.approx([s / 4 for s in found["score"]])
