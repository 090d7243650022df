"""Agreement between score matrices, and matrices and ground truth from files."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.stats import pearsonr, spearmanr

import wherefrom
from wherefrom.errors import ArtefactError, InputError, MissingExtraError
from wherefrom.tools.evaluate import Truth, agreement, linear_datamodeling_score, load_matrix

Q, N = 6, 25


@pytest.fixture
def matrices():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(Q, N))
    return {
        "exact": exact,
        "near": torch.tensor(exact + 0.5 * rng.normal(size=(Q, N))),
        "random": rng.normal(size=(Q, N)),
    }


# --- agreement ---


def test_correlations_equal_scipy(matrices):
    matrices["tied"] = np.round(matrices["exact"])
    found = agreement(matrices, k=5)
    assert (
        list(found.pairs)[:3] == [("exact", "near"), ("exact", "random"), ("exact", "tied")] and len(found.pairs) == 6
    )
    for (a, b), pair in found.pairs.items():
        for q in range(Q):
            x, y = (np.asarray(matrices[name])[q] for name in (a, b))
            assert pair.spearman.per_query[q] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
            assert pair.pearson.per_query[q] == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
        for measure in (pair.spearman, pair.pearson, pair.proponents, pair.opponents):
            assert measure.mean == pytest.approx(measure.per_query.mean())
            assert measure.interval[0] <= measure.mean <= measure.interval[1]
    table = found.table("pearson")
    assert table.shape == (4, 4) and (table == table.T).all() and (np.diag(table) == 1).all()
    assert table[0, 1] == found.pairs["exact", "near"].pearson.mean
    assert "exact and near: Spearman" in str(found) and "by chance 0.20" in str(found)


def test_overlap_of_the_strongest(matrices):
    pair = agreement(matrices, k=5).pairs["exact", "near"]
    exact, near = (np.asarray(matrices[name]) for name in ("exact", "near"))
    for q in range(Q):
        for sign, measure in ((-1, pair.proponents), (1, pair.opponents)):
            shared = set(np.argsort(sign * exact[q])[:5]) & set(np.argsort(sign * near[q])[:5])
            assert measure.per_query[q] == pytest.approx(len(shared) / 5)
    same = agreement({"a": exact, "b": 3 * exact + 7}, k=5).pairs["a", "b"]
    assert same.proponents.mean == same.opponents.mean == 1 and same.spearman.interval == pytest.approx((1, 1))
    opposite = agreement({"a": exact, "b": -exact}, k=5).pairs["a", "b"]
    assert opposite.proponents.mean == opposite.opponents.mean == 0 and opposite.spearman.mean == pytest.approx(-1)


def test_ties_do_not_depend_on_the_order_of_the_examples():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, size=(2, Q, N)).astype(float)
    want, shuffled = agreement({"a": a, "b": b}, k=7), rng.permutation(N)
    got = agreement({"a": a[:, shuffled], "b": b[:, shuffled]}, k=7)
    for one, other in zip(vars(want.pairs["a", "b"]).values(), vars(got.pairs["a", "b"]).values(), strict=True):
        np.testing.assert_allclose(one.per_query, other.per_query, atol=1e-12)
    # The expected overlap is the mean over ties broken at random.
    drawn = []
    for _ in range(4000):
        top = [set(np.lexsort((rng.random(N), -v[0]))[:7]) for v in (a, b)]
        drawn.append(len(top[0] & top[1]) / 7)
    assert want.pairs["a", "b"].proponents.per_query[0] == pytest.approx(np.mean(drawn), abs=0.01)


def test_constant_scores_are_left_out_and_overlap_by_chance(matrices):
    constant = matrices["exact"].copy()
    constant[2] = 0.1
    pair = agreement({"a": matrices["exact"], "b": constant}, k=5).pairs["a", "b"]
    assert np.isnan(pair.spearman.per_query[2]) and pair.spearman.n_constant == pair.pearson.n_constant == 1
    assert pair.spearman.mean == pytest.approx(1) and pair.proponents.per_query[2] == pytest.approx(5 / N)
    nothing = agreement({"a": matrices["exact"], "b": np.zeros((Q, N))}).pairs["a", "b"]
    assert np.isnan(nothing.spearman.mean) and nothing.spearman.n_constant == Q


def test_agreement_bad_input(matrices):
    exact = matrices["exact"]
    for bad, message in (
        ({"a": exact}, "two or more"),
        ({"a": exact, "b": exact[:, 1:]}, "one shape"),
        ({"a": exact, "b": exact[0]}, "2 dimensions"),
        ({"a": exact, "b": exact * np.nan}, "finite"),
    ):
        with pytest.raises(InputError, match=message):
            agreement(bad)
    for k in (0, N + 1):
        with pytest.raises(InputError, match="k must be"):
            agreement(matrices, k=k)


# --- matrices from files ---


def test_every_format_gives_the_same_matrix(tmp_path, matrices):
    want = matrices["exact"]
    scores = wherefrom.Scores(torch.tensor(want), None, torch.ones(Q, dtype=torch.bool))
    scores.save(tmp_path / "ours.safetensors")
    save_file({"all_modules": want, "extra": np.zeros(3)}, tmp_path / "foreign.safetensors")
    np.save(tmp_path / "plain.npy", want)
    np.savez(tmp_path / "only.npz", scores=want, n=3, other=np.zeros((2, 2, 2)))
    np.savetxt(tmp_path / "plain.csv", want, delimiter=",", fmt="%.17g")
    header = ",".join(f"example {i}" for i in range(N))
    np.savetxt(tmp_path / "named.csv", want, delimiter=",", fmt="%.17g", header=header, comments="")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(load_matrix(path), want, err_msg=path.name)
    np.savez(tmp_path / "two.npz", a=want, b=want.T)
    np.testing.assert_array_equal(load_matrix(tmp_path / "two.npz", name="b"), want.T)
    assert load_matrix(str(tmp_path / "plain.npy")).dtype == np.float64


def test_tables_as_pandas_writes_them(tmp_path, matrices):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(matrices["exact"])
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "b.csv", index=False)  # the names 0, 1, 2, ... are no scores
    frame.rename(index=lambda i: f"query {i}", columns=str).to_parquet(tmp_path / "c.parquet")
    for name in ("a.csv", "b.csv", "c.parquet"):
        np.testing.assert_allclose(load_matrix(tmp_path / name), matrices["exact"], rtol=1e-15, err_msg=name)
    frame.rename(columns=str).assign(label="a").to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ArtefactError, match="real numbers"):
        load_matrix(tmp_path / "d.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtraError, match=re.escape('pip install "wherefrom[cli]"')):
            load_matrix(tmp_path / "c.parquet")


def test_bad_files(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    np.savez(tmp_path / "good.npz", a=np.zeros((100, 100)), b=np.zeros((2, 2)), c=np.zeros(2))
    np.save(tmp_path / "object.npy", np.array([[{}]]))
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    wherefrom.store.save(tmp_path / "other.safetensors", "influence", {"a": torch.zeros(2, 2)}, {})
    good = (tmp_path / "good.npz").read_bytes()
    for path, message in (
        (tmp_path / "missing.npy", "got nothing there"),
        (tmp_path / "good.npz", r"2 two-dimensional arrays among \['a', 'b', 'c'\]. Say which with name"),
        (tmp_path / "object.npy", "allow_pickle"),
        (tmp_path / "flat.npy", "2 dimensions"),
        (tmp_path / "nan.npy", "4 NaN"),
        (tmp_path / "other.safetensors", "kind 'scores'"),
        (written("cut.npz", good[:-50]), "zip"),
        (written("cut.npy", b"\x93NUMPY"), "must hold a score matrix"),
        (written("empty.npy", b""), "must hold a score matrix"),
        (written("cut.safetensors", b"123"), "must hold a score matrix"),
        (written("single.npz", (tmp_path / "flat.npy").read_bytes()), "not an .npz"),
        (written("empty.csv", b""), "an empty file"),
        (written("ragged.csv", b"1,2\n3\n"), "from 2 to 1"),
        (written("words.csv", b"a,b\n1,2\n1,x\n"), "'x' to float64"),
        (written("header.csv", b"a,b\n"), "non-empty"),
        (written("latin.csv", b"1,\xff\n"), "utf-8"),
        (written("bad.parquet", b"PAR1"), "must hold a score matrix"),
    ):
        with pytest.raises(ArtefactError, match=message):
            load_matrix(path)
    with pytest.raises(ArtefactError, match="no array 'z'"):
        load_matrix(tmp_path / "good.npz", name="z")
    with pytest.raises(InputError, match="ending in"):
        load_matrix(tmp_path / "scores.txt")


# --- ground truth ---


def test_truth_is_packed_and_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    truth = Truth(rng.random((4, 19)) < 0.5, rng.normal(size=(4, 3, 5)))
    truth.save(tmp_path / "new" / "truth.npz")
    assert os.listdir(tmp_path / "new") == ["truth.npz"]
    stored = np.load(tmp_path / "new" / "truth.npz")
    assert stored["masks"].dtype == np.uint8 and stored["masks"].shape == (4, 3) and stored["n"] == 19
    np.savez(tmp_path / "bool.npz", masks=truth.masks, targets=truth.targets)
    for path in (tmp_path / "new" / "truth.npz", tmp_path / "bool.npz"):
        again = Truth.load(path)
        np.testing.assert_array_equal(again.masks, truth.masks)
        np.testing.assert_array_equal(again.targets, truth.targets)
    tensors = Truth(torch.tensor(truth.masks), torch.tensor(truth.targets))
    assert isinstance(tensors.masks, np.ndarray) and np.array_equal(tensors.targets, truth.targets)


def test_bad_truths(tmp_path):
    masks, targets = np.ones((4, 9), dtype=bool), np.zeros((4, 3, 5))
    for bad, message in (
        ((masks, targets[:3]), "M = 4"),
        ((masks, targets[0]), "3 dim"),
        ((1 * masks, targets), "bool"),
    ):
        with pytest.raises(InputError, match=message):
            Truth(*bad)
    np.savez(tmp_path / "a.npz", masks=np.packbits(masks, axis=1), targets=targets)  # no n
    np.savez(tmp_path / "b.npz", masks=masks)
    for path, message in ((tmp_path / "a.npz", "bool"), (tmp_path / "b.npz", "targets"), (tmp_path / "c.npz", "c.npz")):
        with pytest.raises(ArtefactError, match=message):
            Truth.load(path)


@pytest.mark.skipif("WHEREFROM_GROUNDTRUTH" not in os.environ, reason="WHEREFROM_GROUNDTRUTH does not name a folder")
@pytest.mark.parametrize(("name", "reliability"), [("digits", 0.854), ("concrete", 0.841)])
def test_stored_ground_truth(name, reliability):
    stored = Truth.load(Path(os.environ["WHEREFROM_GROUNDTRUTH"]) / f"{name}.npz")
    truth = stored.targets.mean(1)  # (M, Q)
    # The mean effect of leaving z out, from the targets themselves: in sample, so above any honest method.
    scores = np.stack([truth[~kept].mean(0) - truth[kept].mean(0) for kept in stored.masks.T], 1)  # (Q, N)
    result = linear_datamodeling_score(scores, stored.masks, stored.targets)
    assert result.ceiling == pytest.approx(reliability**0.5, abs=0.01)
    assert result.mean > 0.9
    noise = linear_datamodeling_score(np.random.default_rng(0).normal(size=scores.shape), stored.masks, stored.targets)
    assert noise.interval[0] < 0 < noise.interval[1]
