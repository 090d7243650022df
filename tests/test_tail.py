"""How influence is spread: exact values on a few numbers, and known distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wherefrom.errors import InputError
from wherefrom.tools.evaluate import Tail, tail

LN2 = np.log(2)


def test_exact_values_on_a_few_numbers():
    """8, 4, 2, 1 of ten: the tail is the first three, each twice the next."""
    found = tail(torch.tensor([1.0, -3.0, 8.0, 0.0, 4.0, -1.0, 2.0, 0.0, -0.5, 0.0]))
    assert found.sizes.tolist() == [8, 4, 2, 1] and found.examples == 10 and found.length == 3
    assert found.covered == pytest.approx(np.array([8, 12, 14, 15]) / 15, rel=1e-14)
    assert found.ranks == pytest.approx([0.05, 0.15, 0.25, 0.35], rel=1e-14)
    assert found.hill == pytest.approx(3 / (3 * LN2 + 2 * LN2 + LN2), rel=1e-14)
    assert found.top == pytest.approx(8 / 15, rel=1e-14)
    y = np.log([0.05, 0.15, 0.25])  # over x = 3 ln 2, 2 ln 2, ln 2, the slope is (y_1 - y_3) / (2 ln 2)
    assert found.slope == pytest.approx((y[2] - y[0]) / (2 * LN2), rel=1e-13)
    assert found.r2 == pytest.approx((y[2] - y[0]) ** 2 / 2 / ((y - y.mean()) ** 2).sum(), rel=1e-13)
    assert found.line(np.array([4.0])) == pytest.approx([np.exp(y.mean())], rel=1e-13)  # the middle of the three


def test_the_top_is_of_all_examples():
    values = np.random.default_rng(0).normal(size=300)
    positive = np.sort(values.clip(0))
    assert (positive > 0).sum() < 200  # 1% of those would be fewer than three
    assert tail(values).top == pytest.approx(positive[-3:].sum() / positive.sum(), rel=1e-12)


def test_gini_is_the_mean_difference():
    values = np.random.default_rng(0).normal(size=301)
    positive = values.clip(0)
    pairs = np.abs(positive[:, None] - positive).mean() / (2 * positive.mean())
    assert tail(values).gini == pytest.approx(pairs, rel=1e-12)
    assert tail([1.0] * 7).gini == pytest.approx(0, abs=1e-15)
    assert tail([0.0] * 7 + [3.0]).gini == pytest.approx(1 - 1 / 8, rel=1e-14)


@pytest.mark.parametrize("exponent", [1.0, 2.5])
def test_a_pareto_distribution_has_its_exponent(exponent):
    """At the quantiles (rank - 1/2) / N the line is exact; a sample has the exponent within a few standard errors."""
    n = 20_000
    found = tail(3 * ((np.arange(n) + 0.5) / n) ** (-1 / exponent))
    assert found.length == n // 20
    assert found.slope == pytest.approx(exponent, rel=1e-10) and found.r2 == pytest.approx(1, abs=1e-12)
    assert found.line(found.sizes) == pytest.approx(found.ranks, rel=1e-10)
    drawn = tail(3 * np.random.default_rng(0).random(n) ** (-1 / exponent))
    error = exponent / np.sqrt(drawn.length)
    assert abs(drawn.hill - exponent) < 3 * error and abs(drawn.slope - exponent) < 5 * error
    assert drawn.r2 > 0.98


def test_a_tail_that_is_not_a_power_law_is_less_straight():
    heavy = tail(np.random.default_rng(0).random(2000) ** -0.5)
    light = tail(np.random.default_rng(0).random(2000))
    assert light.r2 < 0.9 < 0.97 < heavy.r2 and light.slope > 10 * heavy.slope


def test_neither_unit_nor_order_nor_harmful_examples_change_the_exponents():
    values = np.random.default_rng(0).standard_cauchy(400)
    a, b = tail(values), tail(np.where(values > 0, 7 * values, 100 * values)[::-1])
    for name in ("hill", "slope", "r2", "top", "gini"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-12), name


@pytest.mark.parametrize("values", [[1.0], [2.0, 1.0, -1.0], [3.0] * 30])
def test_no_exponent_without_a_tail(values):
    found = tail(values)
    assert all(np.isnan([found.hill, found.slope, found.height, found.r2]))
    assert 0 < found.top <= 1 and found.covered[-1] == pytest.approx(1)


def test_it_prints_as_a_line():
    found = Tail(np.ones(1), np.ones(1), 100, 5, 1.234, 1.1, 0.0, 0.987, 0.321, 0.75)
    assert str(found) == (
        "tail exponent 1.23 (Hill), 1.10 (least squares, R2 0.987) of the 5 largest; top 1% hold 32.1% of the positive "
        "influence; Gini 0.75"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [([-1.0, 0.0], "positive for at least one"), (np.zeros((2, 2)), "1 dimensions"), ([1.0, np.nan], "finite")],
)
def test_input_errors(values, message):
    with pytest.raises(InputError, match=message):
        tail(values)


def test_scores_of_a_language_model():
    """As they come: float32, of both signs, a row for each query."""
    pytest.importorskip("transformers")
    from test_candidates import language
    from wherefrom import EKFAC, Influence
    from wherefrom.hf import CausalLM

    model, train, _ = language()
    influence = Influence(EKFAC(), 0.1, parameters="mlp").fit(model.float(), CausalLM(), train)
    for row in influence.score(train, certify=False).values:
        found, best = tail(row), row.double().sort(descending=True).values.clamp(min=0)
        n = int((best > 0).sum())
        assert row.dtype == torch.float32 and (row < 0).any() and n < len(row) == found.examples
        assert found.covered == pytest.approx((best.cumsum(0) / best.sum())[:n].numpy(), rel=1e-12)
        assert found.top == pytest.approx(float(best[0] / best.sum()), rel=1e-12)  # 1% of 17, at least one
        logs = best[: found.length + 1].log()
        assert found.length == min(10, n - 1)
        assert found.hill == pytest.approx(float(1 / (logs[:-1] - logs[-1]).mean()), rel=1e-10)
        y = np.log((np.arange(found.length) + 0.5) / len(row))
        slope, height = np.polyfit(logs[:-1].numpy(), y, 1)
        assert (found.slope, found.height) == pytest.approx((-slope, height), rel=1e-8)
        assert found.r2 == pytest.approx(np.corrcoef(logs[:-1].numpy(), y)[0, 1] ** 2, rel=1e-8)
