"""Removal curves, flips and leave-outs: against exact datamodels, ridge regression, and planted examples."""

import functools
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import wherefrom
from wherefrom.errors import InputError
from wherefrom.tools.evaluate import (
    SGDRecipe,
    expected_leave_one_out,
    flips,
    leave_one_group_out,
    removal_curve,
    retrain,
    retrain_small,
)
from wherefrom.tools.evaluate.statistics import (
    Bootstrap,
    average_queries,
    estimate_reliability,
    pearson,
    rank_descending,
    spearman,
)

Q, N, R = 5, 30, 4


def datamodel(weights, start=0.0, noise=0.0, seen=None):
    """Runs of which the weights (Q, N) are the exact effects: f(q) = start - sum of the weights that are in."""
    weights = torch.as_tensor(weights)
    jitter = noise * torch.randn(R, len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def runs(masks):
        if seen is not None:
            seen.append(masks)
        return (start - masks.double() @ weights.T).unsqueeze(1) + jitter  # the same in all subsets: paired

    return runs


@pytest.fixture
def weights():
    return np.random.default_rng(0).normal(size=(Q, N))


# --- removal curves ---


def test_removal_curve_of_an_exact_datamodel(weights):
    counts, seen = [1, 4, 10], []
    other = -weights
    holder = SimpleNamespace(values=torch.tensor(weights))
    curve = removal_curve(holder, datamodel(weights, noise=5.0, seen=seen), counts, {"other": other})
    ordered = np.sort(weights, axis=1)
    best, worst, random = ordered[:, ::-1].cumsum(1), ordered.cumsum(1), curve.changes["random"]
    for i, k in enumerate(counts):
        np.testing.assert_allclose(curve.changes["top"][i], best[:, k - 1], atol=1e-10)
        np.testing.assert_allclose(curve.changes["bottom"][i], worst[:, k - 1], atol=1e-10)
        np.testing.assert_allclose(curve.changes["other"][i], worst[:, k - 1], atol=1e-10)
        assert (curve.changes["random"][i] > worst[:, k - 1]).all() and (
            curve.changes["random"][i] < best[:, k - 1]
        ).all()
    assert list(curve.changes) == ["top", "bottom", "random", "other"]
    assert curve.wins().tolist() == [Q] * 3 and curve.wins("other", over="bottom").tolist() == [0] * 3
    for name, change in curve.changes.items():
        low, high = curve.intervals[name].T
        assert (low < change.mean(1)).all() and (change.mean(1) < high).all()
        assert (change.min(1) <= low).all() and (high <= change.max(1)).all()
    assert "4 removed" in str(curve) and "in 5 of 5 queries" in str(curve)
    (masks,) = seen  # one call: all the data, then 4 rankings x 3 counts x Q queries
    assert masks[0].all() and len(masks) == 1 + 4 * 3 * Q
    assert (N - masks[1:].sum(1)).unique(return_counts=True)[1].tolist() == [20, 20, 20]
    # The random examples of a larger count hold those of a smaller one.
    random = masks[1:].view(4, 3, Q, N)[2]
    assert not (~random[0] & random[1]).any() and not (~random[1] & random[2]).any()
    again = removal_curve(weights, datamodel(weights), counts)
    assert np.array_equal(
        again.intervals["random"], removal_curve(weights, datamodel(weights), counts).intervals["random"]
    )


def test_removing_planted_proponents_raises_f():
    """A small network: nothing but six examples of the training set says what the queries' far corner is."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=rng)
    x[:6] = torch.tensor([6.0, 6.0]) + 0.3 * x[:6]
    xq = torch.tensor([6.0, 6.0]) + 0.3 * torch.randn(4, 2, generator=rng)
    y = (x[:, 0] < 0).long()
    y[:6] = 1
    yq = torch.ones(4, dtype=torch.int64)
    scores = torch.zeros(4, 60)
    scores[:, :6] = 1

    def build():
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    recipe = SGDRecipe(lr=0.1, momentum=0.9, batch_size=16, epochs=20, drop_last=False)
    task = wherefrom.Classification()
    runs = functools.partial(
        retrain_small, build, task, (x, y), (xq, yq), repeats=2, recipe=recipe, seed=0, paired=True
    )
    curve = removal_curve(scores, runs, [6])
    assert (curve.changes["top"] > 3).all() and curve.wins().tolist() == [4]
    assert abs(curve.changes["random"].mean()) < 1
    found = flips(scores, runs, [1, 6], labels=(y, yq))
    assert found.asked.all() and (found.needed() == 6).all() and np.isinf(found.needed("random")).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [0, 1]}, "counts must be increasing"),
        ({"counts": [3, 2]}, "counts must be increasing"),
        ({"counts": [N]}, "at most 29"),
        ({"counts": [1.5]}, "whole numbers"),
        ({"scores": np.zeros((Q + 1, N))}, "targets of runs"),
        ({"scores": np.full((Q, N), np.nan)}, "finite"),
        ({"rankings": {"a": np.zeros((Q, N - 1))}}, "rankings"),
        ({"rankings": {"top": np.zeros((Q, N))}}, "rankings"),
        ({"runs": lambda masks: torch.zeros(len(masks), Q)}, "3 dimensions"),
        ({"runs": lambda masks: torch.zeros(len(masks) - 1, 1, Q)}, "targets of runs"),
        ({"runs": lambda masks: torch.full((len(masks), 1, Q), torch.nan)}, "finite"),
        ({"bootstrap": 0}, "bootstrap and level"),
    ],
)
@pytest.mark.parametrize("function", [removal_curve, flips])
def test_removal_bad_input(function, change, message, weights):
    arguments = {"scores": weights, "runs": datamodel(weights), "counts": [1, 2]} | change
    with pytest.raises(InputError, match=message):
        function(**arguments)


# --- flips ---


def test_flips_of_an_exact_datamodel():
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.5, 1.5, size=(Q, N))
    weights[3] = 0.01  # never flips
    start = weights.sum(1) - np.array([1.6, 4.0, 0.1, 4.0, -0.5])  # f on all the data is minus that
    counts = [1, 2, 3, 5, 8]

    def needed(order):
        """The first of the counts at which f is above 0."""
        f = -np.array([1.6, 4.0, 0.1, 4.0, -0.5])[:, None] + np.take_along_axis(weights, order, 1).cumsum(1)
        above = f[:, np.array(counts) - 1] > 0
        return np.where(above.any(1), np.array(counts)[above.argmax(1)], np.inf)

    seen = []
    runs = datamodel(weights, torch.as_tensor(start), seen=seen)
    found = flips(weights, runs, counts, rankings={"reverse": -weights})
    assert found.asked.tolist() == [True, True, True, True, False]  # the last is wrong with all the data
    for name, order in {"top": np.argsort(-weights), "reverse": np.argsort(weights)}.items():
        want = needed(order)
        np.testing.assert_array_equal(found.needed(name), [*want[:4], np.nan])
        at = np.array(counts)[:, None] >= want
        np.testing.assert_array_equal(found.flipped[name][:, :4], at[:, :4])
        assert not found.flipped[name][:, 4].any()
    # Only what has not flipped is trained again.
    left = [sum((found.needed(name) >= k).sum() for name in found.flipped) for k in counts]
    assert [len(masks) for masks in seen] == [1, *left] and left[0] == 12 and 3 <= left[-1] < 12
    np.testing.assert_allclose(found.intervals["top"][0], [0, 0.75], atol=1e-12)  # one of four has flipped at 1
    assert "of 4 queries" in str(found) and "1 removed: flipped top 1" in str(found)


def test_once_flipped_counts_as_flipped():
    def runs(masks):  # wrong without an example, right again without two
        return torch.where(masks.sum(1) == N - 1, 1.0, -1.0).view(-1, 1, 1).expand(-1, 2, 1)

    assert flips(np.arange(N)[None], runs, [1, 2]).flipped["top"].tolist() == [[True], [True]]
    assert flips(np.arange(N)[None], runs, [2, 3]).flipped["top"].tolist() == [[False], [False]]


@pytest.mark.parametrize(("wrong", "flipped"), [(1, False), (2, False), (3, True)])
def test_flipped_means_wrong_in_more_than_half_of_the_repeats(wrong, flipped):
    def runs(masks):
        f = torch.full((len(masks), 4, 1), -1.0)
        f[masks.sum(1) < N, :wrong] = 100.0
        return f

    assert flips(np.arange(N)[None], runs, [1]).flipped["top"].item() is flipped
    assert not flips(np.arange(N)[None], runs, [1], threshold=200).flipped["top"].item()


def test_random_flips_are_of_the_same_class():
    y, yq, seen = np.arange(N) % 3, np.array([0, 1, 2, 0, 1]), []
    runs = datamodel(np.full((Q, N), 1e-3), seen=seen)
    flips(np.zeros((Q, N)), runs, [4, 10, 12], labels=(torch.tensor(y), yq))
    for masks, k in zip(seen[1:], (4, 10, 12), strict=True):
        for removed, label in zip(~masks[Q:].numpy(), yq, strict=True):
            assert removed.sum() == k and (y[removed] == label).sum() == min(k, 10)
    with pytest.raises(InputError, match=r"labels must be \(30,\)"):
        flips(np.zeros((Q, N)), runs, [1], labels=(y[1:], yq))
    with pytest.raises(InputError, match="whole numbers"):
        flips(np.zeros((Q, N)), runs, [1], labels=(y, yq.astype(float)))
    with pytest.raises(InputError, match="at or below"):
        flips(np.zeros((Q, N)), datamodel(np.full((Q, N), -1.0)), [1])


# --- leave-one-out ---


class Ridge(nn.Linear):
    """A regression fitted in closed form to some of the data, with noise as training has it."""

    mu = 0.05

    def __init__(self, x, y, rows, noise):
        super().__init__(x.shape[1], 1, bias=False, dtype=x.dtype)
        n, kept = len(x), x[rows]
        system = kept.T @ kept / n + self.mu * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(system, kept.T @ y[rows] / n)
        self.weight.data = (weight + noise * torch.randn(weight.shape, dtype=x.dtype)).mT


def ridge(noise, repeats=6, paired=True, harmful=0):
    """A problem of which the influence is known: (model on all the data, train, queries, runs)."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(66, 3, generator=rng, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(66, 1, generator=rng, dtype=torch.float64)
    train, queries = (x[:60], y[:60].clone()), (x[60:], y[60:] + 9)  # far from the predictions: |error| stays smooth
    train[1][:harmful] *= -1

    def measure(model):
        return (model(queries[0]) - queries[1]).abs().squeeze(1)

    def fit(rows, seed):
        return Ridge(*train, rows, noise)

    runs = functools.partial(retrain, fit, measure, repeats=repeats, seed=0, paired=paired)
    return Ridge(*train, torch.arange(60), 0.0), train, queries, runs


def influence(model, train, queries):
    """Scores by the exact solver: the loss is the squared error, so mu |w|^2 is a damping of 2 mu."""
    return wherefrom.attribute(
        model, wherefrom.Regression(), train, queries, solver=wherefrom.Exact(), damping=2 * Ridge.mu
    )


def test_leave_one_out_of_ridge_regression_is_what_influence_foretells():
    model, train, queries, runs = ridge(noise=0.5)
    scores = influence(model, train, queries)
    examples = list(range(0, 60, 2))
    found = expected_leave_one_out(scores, examples, runs)
    assert found.pearson.mean > 0.99 and found.spearman.mean > 0.97
    # The exact answer, by the formula of Sherman and Morrison: the noise cancels in every repeat.
    x, y = train
    inverse = torch.linalg.inv(x.T @ x / 60 + Ridge.mu * torch.eye(3, dtype=x.dtype)) / 60
    leverage = (x @ inverse * x).sum(1)
    error = (model(x) - y).squeeze(1)
    sign = (model(queries[0]) - queries[1]).sign()
    want = sign * (queries[0] @ inverse @ x.T) * error / (1 - leverage)
    np.testing.assert_allclose(found.changes, want[:, examples].detach(), atol=1e-12)
    np.testing.assert_allclose(found.predicted, scores.values[:, examples] / 60)
    np.testing.assert_allclose(found.predicted, (want * (1 - leverage))[:, examples].detach(), atol=1e-12)
    assert found.errors.max() < 1e-12 and found.reliability == pytest.approx(1)
    assert found.n_repeats == 6 and "reliability 1.000" in str(found)
    for q in range(6):
        assert found.spearman.per_query[q] == pytest.approx(spearmanr(found.predicted[q], found.changes[q]).statistic)


def test_unpaired_leave_one_out_is_noise_and_says_so():
    model, train, queries, runs = ridge(noise=0.5, paired=False)
    found = expected_leave_one_out(influence(model, train, queries), range(20), runs)
    f = runs(torch.cat([torch.ones(1, 60), 1 - torch.eye(60)[:20]]).bool()).numpy()
    each = f[1:] - f[0]
    np.testing.assert_allclose(found.errors, each.std(1, ddof=1).T / 6**0.5)
    assert found.errors.min() > 0.05 and found.reliability < 0.5 and found.pearson.mean < 0.9
    one = expected_leave_one_out(influence(model, train, queries), range(20), ridge(0.5, repeats=1)[3])
    assert np.isnan(one.errors).all() and one.reliability is None and "one repeat" in str(one)


@pytest.mark.parametrize("examples", [[0, 1], [0, 1, 1], [0, 1, N], [0, 1, -1], [0.5, 1, 2], np.ones(5, dtype=bool)])
def test_leave_one_out_bad_input(examples, weights):
    with pytest.raises(InputError, match="examples must be"):
        expected_leave_one_out(weights, examples, datamodel(weights))


# --- leave-one-group-out ---


@pytest.mark.parametrize("groups", [4, 7])
def test_leave_one_group_out_of_an_exact_datamodel(groups, weights):
    found = leave_one_group_out(weights, datamodel(weights, noise=3.0), groups)
    mean = weights.mean(0)
    members = [mean[found.groups == k] for k in range(groups)]
    assert all(a.min() > b.max() for a, b in pairwise(members))  # the most helpful first
    assert {len(m) for m in members} <= {N // groups, N // groups + 1}
    np.testing.assert_allclose(found.scores, [m.mean() for m in members], atol=1e-12)
    np.testing.assert_allclose(found.changes, [m.sum() for m in members], atol=1e-10)
    assert found.spearman == pytest.approx(1) and f"Spearman {found.spearman:.2f}" in str(found)
    assert (found.intervals[:, 0] < found.changes).all() and (found.changes < found.intervals[:, 1]).all()
    assert found.interval[0] < 1 and found.interval[1] == pytest.approx(1)
    assert leave_one_group_out(-weights, datamodel(weights), groups).spearman == pytest.approx(-1)


def test_leave_one_group_out_finds_a_planted_harmful_group():
    """Twelve of sixty targets have the wrong sign; without them the errors fall."""
    model, train, queries, runs = ridge(noise=0.3, harmful=12)
    clean = (queries[0], queries[0].sum(1, keepdim=True))
    scores = influence(model, train, clean)
    runs = functools.partial(runs.func, runs.args[0], lambda m: wherefrom.Regression().measurement(m(clean[0]), clean))
    found = leave_one_group_out(scores, functools.partial(runs, repeats=4, seed=0, paired=True))
    assert found.intervals[-1, 1] < 0 and found.changes[-1] == found.changes.min()
    assert (found.groups[:12] == 4).sum() >= 8 and found.spearman >= 0.9


def test_constant_scores_have_no_correlation(weights):
    found = leave_one_group_out(np.full((Q, N), 0.7), datamodel(weights), groups=8)  # of three and of four
    assert np.isnan(found.spearman) and np.isnan(found.interval).all() and np.ptp(found.scores) == 0
    single = expected_leave_one_out(np.vstack([weights[:4], np.full(N, 0.1)]), range(10), datamodel(weights))
    assert np.isnan(single.pearson.per_query[4]) and single.pearson.n_constant == single.spearman.n_constant == 1
    assert single.pearson.mean == pytest.approx(1)
    for groups in (2, N + 1):
        with pytest.raises(InputError, match="groups"):
            leave_one_group_out(weights, datamodel(weights), groups)


# --- what they share ---


def test_places():
    rng = np.random.default_rng(0)
    assert rank_descending(np.array([[3.0, 9.0, 5.0]]), rng).tolist() == [[2, 0, 1]]
    drawn = np.array([rank_descending(np.array([0.0, 1.0, 0.0, 0.0]), rng) for _ in range(3000)])
    assert (drawn[:, 1] == 0).all()
    for item in (0, 2, 3):  # tied: any of the last three places, equally often
        assert np.bincount(drawn[:, item])[1:] / 3000 == pytest.approx([1 / 3] * 3, abs=0.03)


def test_correlations_of_columns():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 4))
    a[:, 2], b[:, 3] = 0.1, 1e9 + 0.1
    assert np.isnan(pearson(a, b)).tolist() == np.isnan(spearman(a, b)).tolist() == [False, False, True, True]
    assert pearson(a, b)[0] == pytest.approx(np.corrcoef(a[:, 0], b[:, 0])[0, 1], abs=1e-14)
    assert spearman(a, b)[0] == pytest.approx(spearmanr(a[:, 0], b[:, 0]).statistic, abs=1e-14)


def test_intervals_of_means_cover():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(300, 40))  # 300 experiments of 40 queries, mean 1
    ends = Bootstrap(500, 0.9, rng).interval_of_mean(values)
    assert 0.84 < ((ends[:, 0] < 1) & (ends[:, 1] > 1)).mean() < 0.93
    found = average_queries(np.array([1.0, np.nan, 3.0]), Bootstrap(500, 0.9, rng))
    assert found.mean == 2 and found.interval == (1, 3) and found.n_constant == 1 and "1 constant" in str(found)


def test_reliability_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=(400, 1, 30)), 2 * rng.normal(size=(400, 6, 30))
    want = 1 / (1 + 4 / 6)  # of the values; that of ranks is a little lower
    assert estimate_reliability(signal + noise, 20, rng) == pytest.approx(want, abs=0.03)
