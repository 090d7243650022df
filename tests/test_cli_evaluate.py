"""``wherefrom evaluate`` on real files: the numbers are the library's, ours and foreign scores alike."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

import wherefrom
from targets import load, placed, refused, run, table, whole
from wherefrom.tools.evaluate import (
    Truth,
    agreement,
    linear_datamodeling_score,
    mislabeled_curve,
    random_subsets,
    removal_curve,
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return placed(tmp_path, monkeypatch)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(folder: str = "j") -> dict[tuple[str, str], tuple[float, ...]]:
    """(scores, measure) -> value, low, high of a written evaluation."""
    found = table(f"{folder}/evaluation.csv")
    keys = zip(found["scores"], found["measure"], strict=True)
    values = zip(*([float(v) for v in found[name]] for name in ("value", "low", "high")), strict=True)
    return dict(zip(keys, values, strict=True))


@pytest.fixture
def files(mine):
    """Scores of 4 queries and 30 examples in three formats, and a truth."""
    ours = wherefrom.Scores(draw(4, 30), wherefrom.Certificate.of_nothing_solved(4))
    ours.save("a/scores.safetensors")
    np.save("b.npy", draw(4, 30, seed=1).numpy())
    with open("c.csv", "w", newline="") as file:
        csv.writer(file).writerows(draw(4, 30, seed=2).tolist())
    masks = random_subsets(30, 6, 0.5, 0)
    Truth(masks.numpy(), draw(6, 2, 4, seed=3).numpy()).save("truth.npz")
    return mine


@pytest.mark.usefixtures("files")
def test_against_a_truth_and_each_other(capsys):
    run("evaluate a/scores.safetensors other=b.npy c.csv --truth truth.npz --out j --k 4")
    matrices = {"a": draw(4, 30), "other": draw(4, 30, seed=1), "c": draw(4, 30, seed=2)}
    truth, found = Truth.load("truth.npz"), measured()
    for name, values in matrices.items():
        expected = linear_datamodeling_score(values, truth.masks, truth.targets)
        assert found[name, "LDS"] == pytest.approx((expected.mean, *expected.interval))
    pairs = agreement(matrices, 4).pairs
    assert len(found) == 3 + 3 * len(pairs)
    for (a, b), pair in pairs.items():
        assert found[a, f"Spearman with {b}"] == pytest.approx((pair.spearman.mean, *pair.spearman.interval))
        assert found[a, f"top 4 shared with {b}"][0] == pytest.approx(pair.proponents.mean)
        assert found[a, f"bottom 4 shared with {b}"][0] == pytest.approx(pair.opponents.mean)
    assert table("j/evaluation.csv")["ceiling"][0] == str(expected.ceiling)
    assert "LDS" in capsys.readouterr().out
    page = open("j/evaluate.html", encoding="utf-8").read()
    assert "Are these scores right?" in page and "Measures" in page
    run("evaluate --config j/evaluate.toml --out again")
    assert measured("again") == found


def test_against_training_again(mine, files, monkeypatch):
    line = "evaluate a/scores.safetensors --target mine:full --subsets 5 --removal 2 6 --out j --seed 3"
    run(line)
    t = load("full")
    masks = random_subsets(30, 5, 0.5, 3)
    expected = linear_datamodeling_score(draw(4, 30), masks, t.retrain(masks), seed=3)
    found = measured()
    assert found["a", "LDS"] == pytest.approx((expected.mean, *expected.interval))
    assert np.array_equal(Truth.load("j/truth.npz").masks, masks.numpy())
    curve = removal_curve(draw(4, 30), t.retrain, (2, 6), seed=3)
    for i, count in enumerate((2, 6)):
        for ranking, name in (("top", "a"), ("bottom", "a, opponents"), ("random", "random")):
            value = (curve.changes[ranking][i].mean(), *curve.intervals[ranking][i])
            assert found[name, f"change of f without {count}"] == pytest.approx(value)
    steps, original = [], torch.optim.SGD.zero_grad
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self: steps.append(1) or original(self))
    run(line)
    assert len(steps) == 12 and measured() == found  # those of the target's own model


def test_training_one_at_a_time_is_kept(mine, files, monkeypatch):
    line = "evaluate a/scores.safetensors --target mine:one_at_a_time --subsets 4 --repeats 2 --out"
    run(f"{line} j --seed 3")
    t = load("one_at_a_time")
    masks, task = random_subsets(30, 4, 0.5, 3), t.task

    def measure(model):
        with torch.no_grad():
            return task.measurement(model(t.queries[0]), t.queries)

    expected = wherefrom.tools.evaluate.retrain(t.retrain, measure, masks, 2, 3)
    np.testing.assert_allclose(Truth.load("j/truth.npz").targets, expected.numpy(), rtol=1e-9)
    before = measured()
    calls, original = [], torch.optim.SGD.zero_grad

    def stopped(self):
        if len(calls) == 12 + 3 * 4:  # steps of the target's own model, and of three others
            raise KeyboardInterrupt
        calls.append(self)
        return original(self)

    monkeypatch.setattr(torch.optim.SGD, "zero_grad", stopped)
    run(f"{line} k --seed 3", code=130)
    assert len(whole(mine / "k")) == 3
    calls.clear()
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self: calls.append(self) or original(self))
    run(f"{line} k --seed 3")
    assert measured("k") == before and len(calls) == 12 + (8 - 3) * 4


def test_wrong_labels(mine, files):
    flipped = torch.zeros(30, dtype=torch.bool)
    flipped[::4] = True
    with open("flags.csv", "w", newline="") as file:
        csv.writer(file).writerows([["example", "wrong"], *([i, bool(f)] for i, f in enumerate(flipped))])
    run("self-influence mine:problem --out s --solver EKFAC()")
    run("evaluate s/self-influence.safetensors a/scores.safetensors --flags flags.csv --column wrong --out j")
    found, own = measured(), wherefrom.Scores.load("s/self-influence.safetensors").self_influence
    for name, values, high in (("s self-influence", own, True), ("a", draw(4, 30).mean(0), False)):
        curve = mislabeled_curve(values, flipped, higher_is_suspicious=high)
        assert found[name, "AUC of wrong labels"] == pytest.approx((curve.auc, *curve.auc_interval))
        assert found[name, "average precision of wrong labels"][0] == pytest.approx(curve.average_precision)
    run("evaluate s/self-influence.safetensors --flags flags.csv --column wrong --out alone")
    assert len(measured("alone")) == 2


@pytest.mark.usefixtures("files")
def test_bad_input_is_one_line(capsys):
    with open("flags.csv", "w") as file:
        file.write("example,wrong\n0,yes\n")
    np.save("small.npy", draw(3, 30).numpy())
    np.savez("partial.npz", masks=np.ones((6, 30), dtype=bool))
    np.savez("other.npz", masks=np.ones((6, 29), dtype=bool), targets=np.ones((6, 1, 4)))
    for said, line in (
        ("what to judge by must be given, got nothing", "evaluate b.npy"),
        ("flags.csv must be a table with a column 'flipped', got example, wrong", "evaluate b.npy --flags flags.csv"),
        ("wrong of flags.csv must be true or false.*'yes'", "evaluate b.npy --flags flags.csv --column wrong"),
        ("flags.xyz", "evaluate b.npy --flags flags.xyz"),
        ("one, all of one shape|two or more, all of one shape", "evaluate b.npy small.npy"),
        ("masks must be .* 30", "evaluate b.npy --truth other.npz"),
        ("partial.npz must be an .npz with masks and targets", "evaluate b.npy --truth partial.npz"),
        ("absent.npz must be", "evaluate b.npy --truth absent.npz"),
        ("absent.npy must be a file with a score matrix", "evaluate absent.npy --truth truth.npz"),
        ("target must be given to train again", "evaluate b.npy --subsets 4"),
        ("retrain must be given, got none. .*Target", "evaluate b.npy --subsets 4 --target mine:problem"),
        ("truth and subsets must be one of them", "evaluate b.npy --subsets 4 --truth truth.npz --target mine:full"),
        ("names must be different, got b twice", "evaluate b.npy b=c.csv"),
        ("counts must be increasing", "evaluate b.npy --removal 3 2 --target mine:full"),
        ("k must be between 1 and", "evaluate b.npy c.csv --k 31"),
    ):
        refused(capsys, said, f"{line} --out j")


def test_nothing_to_judge_is_told(mine, capsys):
    np.savez("t.npz", masks=np.ones((6, 30), dtype=bool), targets=np.zeros((6, 1, 4)))
    refused(capsys, "the files must be one or more with scores of queries", "evaluate --truth t.npz")
