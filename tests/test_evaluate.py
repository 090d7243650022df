"""The evaluate room, compared with scipy, scikit-learn, hand values and plain loops of torch.optim.SGD."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn

from wherefrom.errors import DivergenceError, InputError, MissingExtraError, UnsupportedError
from wherefrom.model.task import Classification, Regression
from wherefrom.tools.evaluate import (
    SGDRecipe,
    flip_labels,
    linear_datamodeling_score,
    mislabeled_curve,
    random_subsets,
    retrain,
    retrain_small,
    run_seed,
    train_small,
)
from wherefrom.tools.evaluate.small import derive_streams
from wherefrom.tools.evaluate.statistics import Bootstrap, _resample_means

# --- the linear datamodeling score ---


def datamodel(noise=0.0, Q=6, N=40, M=60, R=4, seed=0):
    """Scores (Q, N), masks (M, N) and targets (M, R, Q) of which the scores are the exact linear datamodel."""
    rng = np.random.default_rng(seed)
    scores, masks = rng.normal(size=(Q, N)), random_subsets(N, M, 0.5, seed).numpy()
    clean = 3.0 - masks @ scores.T
    return scores, masks, clean[:, None] + noise * rng.normal(size=(M, R, Q))


def test_true_datamodel_scores_one_and_its_negative_minus_one():
    scores, masks, targets = datamodel()
    right = linear_datamodeling_score(scores, masks, targets)
    assert right.mean == pytest.approx(1) and right.ceiling == pytest.approx(1)
    assert right.interval == pytest.approx((1, 1))
    assert linear_datamodeling_score(-scores, masks, targets).mean == pytest.approx(-1)
    assert linear_datamodeling_score(scores, masks, -targets).mean == pytest.approx(-1)


def test_sign_on_least_squares():
    """Refitting a linear regression without some of its data, against influence scores in the library's convention."""
    rng = np.random.default_rng(0)
    x, xq = rng.normal(size=(200, 4)), rng.normal(size=(10, 4))
    y = x.sum(1) + rng.normal(size=200)

    def fit(rows):
        return np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]

    everything = np.ones(200, dtype=bool)
    gradients = 2 * (x @ fit(everything) - y)[:, None] * x  # of the squared errors, (N, 4)
    scores = xq @ np.linalg.solve(2 * x.T @ x / 200, gradients.T)  # f(q) is the prediction; positive: removal raises it
    masks = random_subsets(200, 60, 0.8, 0).numpy()
    targets = np.array([xq @ fit(rows) for rows in masks])
    assert linear_datamodeling_score(scores, masks, targets).mean > 0.95


def test_equals_scipy_with_ties():
    rng = np.random.default_rng(1)
    scores = rng.integers(-1, 2, size=(7, 20)).astype(float)  # integer sums, so many ties
    masks = rng.random((30, 20)) < 0.5
    targets = rng.integers(0, 4, size=(30, 3, 7)).astype(float)
    got = linear_datamodeling_score(scores, masks, targets).per_query
    predicted, truth = -(masks @ scores.T), targets.mean(1)
    want = [spearmanr(predicted[:, q], truth[:, q]).statistic for q in range(7)]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_accepts_tensors_scores_objects_and_other_axes():
    scores, masks, targets = datamodel(noise=3.0)
    want = linear_datamodeling_score(scores, masks, targets)
    holder = SimpleNamespace(values=torch.tensor(scores, requires_grad=True))
    got = linear_datamodeling_score(holder, torch.tensor(masks), targets.swapaxes(0, 1), repeats_axis=0)
    np.testing.assert_array_equal(got.per_query, want.per_query)
    assert got.interval == want.interval and got.ceiling == want.ceiling
    one = linear_datamodeling_score(scores, masks, targets[:, 0])
    assert one.ceiling is None and one.n_repeats == 1 and "unknown" in str(one)


def test_constant_columns_are_nan_and_counted():
    scores, masks, targets = datamodel()
    scores[1] = 0.1  # all subsets have one size, so the prediction is constant, but for rounding
    targets[:, :, 4] = 2.0
    result = linear_datamodeling_score(scores, masks, targets)
    assert np.isnan(result.per_query[[1, 4]]).all() and result.n_constant == 2
    assert result.mean == pytest.approx(1) and "2 constant queries left out" in str(result)
    nothing = linear_datamodeling_score(np.zeros_like(scores), masks, targets)
    assert np.isnan(nothing.mean) and np.isnan(nothing.interval).all() and nothing.n_constant == 6
    assert "nan" in str(nothing)


def test_interval_and_ceiling():
    scores, masks, targets = datamodel(noise=8.0, Q=20, M=100, R=6)
    result = linear_datamodeling_score(scores, masks, targets)
    assert str(result).startswith(f"LDS {result.mean:.3f} (95% interval")
    assert result.interval[0] < result.mean < result.interval[1]
    # The scores are the noiseless truth, so the ceiling is what they reach.
    assert result.ceiling == pytest.approx(result.mean, abs=0.05) and result.ceiling < 0.95
    again = linear_datamodeling_score(scores, masks, targets)
    assert again.interval == result.interval
    widths = {
        kind: np.ptp(linear_datamodeling_score(scores, masks, targets, resample=kind).interval)
        for kind in ("both", "subsets", "queries")
    }
    assert widths["both"] > max(widths["subsets"], widths["queries"])


def test_resampled_ranks_are_those_of_the_drawn_sample():
    """The weighted bootstrap equals spearmanr on the rows written out."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, size=(2, 12, 1)).astype(float)
    draws = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=20)
    for ranked, reference in ((True, spearmanr), (False, pearsonr)):
        means = _resample_means(a, b, Bootstrap(20, 0.95, np.random.default_rng(7)), ranked, "rows")
        want = [reference(np.repeat(a[:, 0], d), np.repeat(b[:, 0], d)).statistic for d in draws]
        np.testing.assert_allclose(means, want, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m, t: (s.T, m, t), r"masks must be \(M, N\) with N = 6"),
        (lambda s, m, t: (s, m.astype(int), t), "masks must be bool"),
        (lambda s, m, t: (s, m, t[:-1]), "targets must be"),
        (lambda s, m, t: (s, m, t[:, 0, :-1]), "targets must be"),
        (lambda s, m, t: (np.where(s > 2, np.nan, s), m, t), "scores must be finite"),
        (lambda s, m, t: (s, m, t / 0), "targets must be finite"),
        (lambda s, m, t: (s[:0], m, t), "scores must be a non-empty"),
        (lambda s, m, t: (s, m[:0], t), "masks must be a non-empty"),
        (lambda s, m, t: (s, m[:2], t[:2]), "at least 3"),
        (lambda s, m, t: ("scores", m, t), "real numbers"),
    ],
)
def test_lds_bad_input(change, message):
    with np.errstate(divide="ignore"), pytest.raises(InputError, match=message):
        linear_datamodeling_score(*change(*datamodel()))


# --- mislabelled examples ---


def test_flip_labels():
    y = torch.arange(1000) % 5
    wrong, flipped = flip_labels(y, 0.2, 5, seed=0)
    assert flipped.sum() == 200 and torch.equal(flipped, wrong != y) and wrong.max() == 4 and wrong.min() == 0
    assert torch.bincount((wrong - y)[flipped] % 5, minlength=5)[1:].min() > 30  # every other class is drawn
    assert torch.equal(wrong, flip_labels(y, 0.2, 5, seed=0)[0])
    assert not torch.equal(flipped, flip_labels(y, 0.2, 5, seed=1)[1])
    for bad in (
        lambda: flip_labels(y.float(), 0.1, 5, 0),
        lambda: flip_labels(y, 0.1, 4, 0),
        lambda: flip_labels(y, 2, 5, 0),
    ):
        with pytest.raises(InputError):
            bad()


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_in_the_right_order(ties):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    flipped = rng.random(300) < 0.2
    scores = rng.normal(size=300) + flipped
    scores = np.round(scores) if ties else scores
    curve = mislabeled_curve(scores, torch.tensor(flipped))
    ahead = scores[flipped][:, None] - scores[~flipped]
    assert curve.auc == pytest.approx((ahead > 0).mean() + (ahead == 0).mean() / 2, abs=1e-12)
    assert curve.auc_interval[0] < curve.auc < curve.auc_interval[1]
    assert curve.base_rate == pytest.approx(flipped.mean()) and "AUC" in str(curve)
    reverse = mislabeled_curve(-scores, flipped, higher_is_suspicious=False)
    assert reverse.auc == curve.auc and np.array_equal(reverse.detection, curve.detection)


def test_intervals_equal_an_explicit_bootstrap():
    """Flipped and clean examples drawn anew, measured by scikit-learn."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    flipped = np.arange(120) < 30
    scores = np.round(rng.normal(size=120) + flipped, 1)
    curve = mislabeled_curve(scores, flipped, fractions=[0, 0.3, 1], bootstrap=400)
    samples = []
    for _ in range(400):
        rows = np.concatenate([rng.integers(0, 30, 30), rng.integers(30, 120, 90)])
        found = metrics.roc_auc_score(flipped, scores[rows]), metrics.average_precision_score(flipped, scores[rows])
        first = np.lexsort((rng.random(120), -scores[rows]))[:36]
        samples.append((*found, flipped[first].mean() * 36 / 30))
    ends = np.quantile(samples, [0.025, 0.975], axis=0).T
    got = [curve.auc_interval, curve.average_precision_interval, curve.detection_interval[1]]
    np.testing.assert_allclose(got, ends, atol=0.035)
    np.testing.assert_allclose(curve.detection_interval[[0, 2]], [[0, 0], [1, 1]])
    assert curve.average_precision_interval[0] < curve.average_precision < curve.average_precision_interval[1]


def test_detection_ratio_by_hand():
    pytest.importorskip("sklearn")
    flipped = np.array([True, False, True, False, False])
    fractions = [0, 0.2, 0.4, 0.6, 0.8, 1]
    curve = mislabeled_curve([9, 8, 7, 2, 1], flipped, fractions=fractions)
    np.testing.assert_allclose(curve.detection, [0, 0.5, 0.5, 1, 1, 1])
    np.testing.assert_allclose(curve.oracle, [0, 0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(curve.random, fractions)
    assert curve.auc == pytest.approx(5 / 6) and curve.average_precision == pytest.approx((1 + 2 / 3) / 2)
    tied = mislabeled_curve([5, 5, 5, 5, 5], flipped, fractions=fractions)  # the mean over random orders
    np.testing.assert_allclose(tied.detection, fractions)
    assert tied.auc == 0.5 and tied.average_precision == pytest.approx(0.4)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingExtraError, match=r'scikit-learn.*pip install "wherefrom\[eval\]"'):
        mislabeled_curve([1, 2], [True, False])


@pytest.mark.parametrize(
    ("scores", "flipped", "message"),
    [
        ([1, 2, 3], [True, False], "flipped must be of the shape"),
        ([1, 2, np.nan], [True, False, False], "finite"),
        ([1, 2, 3], [1, 0, 0], "bool"),
        ([1, 2, 3], [True] * 3, "some"),
        ([], [], "non-empty"),
    ],
)
def test_mislabeled_bad_input(scores, flipped, message):
    with pytest.raises(InputError, match=message):
        mislabeled_curve(scores, flipped)


# --- retraining ---

N, FEATURES, CLASSES = 50, 5, 3


def mlp():
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


def batchnorm():
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES)).double()


def frozen():
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


def data(kind):
    x = torch.randn(N + 8, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = x[:, :CLASSES].argmax(1)
    y = labels if kind == "classification" else x[:, :CLASSES].sin()
    task = Classification() if kind == "classification" else Regression()
    return task, (x[:N], y[:N]), (x[N:], y[N:])


def alone(build, kind, train, subset, recipe, seed):
    """One model, trained by torch.optim.SGD."""
    weights, rng = derive_streams(seed)
    torch.manual_seed(weights)
    model = build()
    sgd = torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    for _ in range(recipe.epochs):
        order = torch.randperm(N, generator=rng)
        for rows in order[torch.isin(order, subset)].split(recipe.batch_size):
            if recipe.drop_last and len(rows) < recipe.batch_size:
                continue
            out, y = model(train[0][rows]), train[1][rows]
            loss = nn.functional.cross_entropy(out, y) if kind == "classification" else ((out - y) ** 2).sum(1).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    return model.eval()


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(
    ("build", "kind"),
    [(mlp, "classification"), (mlp, "regression"), (batchnorm, "classification"), (frozen, "regression")],
)
def test_training_together_equals_training_alone(build, kind, drop_last):
    task, train, queries = data(kind)
    recipe = SGDRecipe(lr=0.05, momentum=0.9, weight_decay=1e-2, batch_size=8, epochs=3, drop_last=drop_last)
    masks = random_subsets(N, 3, 0.6, 0)
    masks[1] = torch.arange(N) < 21  # another size, so another number of steps; neither is a multiple of 8
    targets = retrain_small(build, task, train, queries, masks, 2, recipe, seed=5)
    assert targets.shape == (3, 2, 8)
    for m in range(3):
        for r in range(2):
            model = alone(build, kind, train, masks[m].nonzero().squeeze(1), recipe, run_seed(5, m, r))
            with torch.no_grad():
                want = task.measurement(task.outputs(model, queries), queries)
            torch.testing.assert_close(targets[m, r], want, rtol=0, atol=1e-10)
    for chunk in (1, 2, 5):
        again = retrain_small(build, task, train, queries, masks, 2, recipe, seed=5, chunk=chunk)
        torch.testing.assert_close(again, targets, rtol=0, atol=1e-10)


def test_train_small_makes_ordinary_models():
    _, train, _ = data("classification")
    recipe = SGDRecipe(lr=0.1, momentum=0.9, batch_size=16, epochs=2)
    before = torch.get_rng_state()
    models = train_small(mlp, Classification(), train, recipe, seeds=[3, 4])
    assert torch.equal(torch.get_rng_state(), before)
    (single,) = train_small(mlp, Classification(), train, recipe, seeds=4)
    for model, seed in ((models[0], 3), (models[1], 4), (single, 4)):
        want = alone(mlp, "classification", train, torch.arange(N), recipe, seed)
        assert not model.training and all(p.requires_grad and p.is_leaf for p in model.parameters())
        for got, p in zip(model.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(got, p, rtol=0, atol=1e-10)
    halves = random_subsets(N, 2, 0.5, 0)
    part = train_small(mlp, Classification(), train, recipe, [3, 4], masks=halves)[1]
    want = alone(mlp, "classification", train, halves[1].nonzero().squeeze(1), recipe, 4)
    torch.testing.assert_close(part[0].weight, want[0].weight, rtol=0, atol=1e-10)
    assert recipe.steps(50) == 6 and SGDRecipe(0.1, batch_size=16, epochs=2, drop_last=False).steps(50) == 8


def test_retrain_by_the_users_own_function():
    task, train, queries = data("regression")
    recipe = SGDRecipe(lr=0.05, batch_size=8, epochs=2)
    masks = random_subsets(N, 3, 0.5, 1)

    def measure(model):
        return task.measurement(task.outputs(model, queries), queries)

    targets = retrain(lambda rows, seed: alone(mlp, "regression", train, rows, recipe, seed), measure, masks, 2, seed=9)
    small = retrain_small(mlp, task, train, queries, masks, 2, recipe, seed=9)
    torch.testing.assert_close(targets, small, rtol=0, atol=1e-10)
    # A function that ignores its seed is reproducible all the same, and does not disturb the caller's random state.
    before = torch.get_rng_state()
    first, second = (retrain(lambda rows, seed: mlp(), measure, masks, 2, seed=9) for _ in range(2))
    assert torch.equal(first, second) and len(first[:, :, 0].unique()) == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_random_subsets():
    masks = random_subsets(11, 2000, 0.5, seed=0)
    assert masks.shape == (2000, 11) and (masks.sum(1) == round(5.5)).all()
    assert (masks.double().mean(0) - 6 / 11).abs().max() < 0.05
    assert torch.equal(masks, random_subsets(11, 2000, 0.5, seed=0))
    with pytest.raises(InputError):
        random_subsets(10, 5, 0.01, seed=0)


def test_retraining_bad_input():
    task, train, queries = data("classification")
    recipe, masks = SGDRecipe(lr=0.1, batch_size=8, epochs=1), random_subsets(N, 2, 0.5, 0)

    def run(build=mlp, task=task, train=train, masks=masks, recipe=recipe, repeats=1):
        return retrain_small(build, task, train, queries, masks, repeats, recipe, seed=0)

    class Summed(Classification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch).sum()

    with pytest.raises(InputError, match="N = 50"):
        run(masks=masks[:, 1:])
    with pytest.raises(InputError, match="bool"):
        run(masks=masks.float())
    with pytest.raises(InputError, match="non-empty subsets"):
        run(masks=masks & torch.tensor([[True], [False]]))
    with pytest.raises(InputError, match="one length"):
        run(train=(train[0], train[1][1:]))
    with pytest.raises(InputError, match="one number per example"):
        run(task=Summed())
    with pytest.raises(InputError, match="drop_last"):
        run(recipe=SGDRecipe(lr=0.1, batch_size=32))
    with pytest.raises(InputError, match="repeats"):
        run(repeats=0)
    with pytest.raises(InputError, match="batch_size"):
        SGDRecipe(lr=0.1, batch_size=0)
    with pytest.raises(InputError, match="one row per seed"):
        train_small(mlp, task, train, recipe, seeds=[1, 2, 3], masks=masks)
    with pytest.raises(UnsupportedError, match="stacked copies"):
        run(build=lambda: nn.Sequential(nn.Dropout(), mlp()))
    with pytest.raises(InputError, match="one number per query"):
        retrain(lambda rows, seed: mlp(), lambda model: torch.zeros(()), masks, 1, seed=0)
    with pytest.raises(DivergenceError, match="subset 0, repeat 0"):
        retrain(lambda rows, seed: mlp(), lambda model: torch.full((2,), torch.nan), masks, 1, seed=0)
