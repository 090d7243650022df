"""The gradient store: its sketch against dense matrices, its error over seeds, and what lies on the disk."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors import safe_open
from torch import Tensor

from problems import TinyProblem, problem
from solving import solve
from test_candidates import language
from wherefrom import (
    CG,
    EKFAC,
    KFAC,
    ArtefactError,
    DataInf,
    EmpiricalFisher,
    Exact,
    FittedInfluence,
    GradientStore,
    Identity,
    Influence,
    InputError,
    rescored,
    shortlist,
)
from wherefrom.hf import CausalLM, pad
from wherefrom.methods import gradient_store
from wherefrom.methods.gradient_store import Sketch
from wherefrom.model.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
NAMES = ["mlp", "tied_embedding", "masked_sequence", "cnn_groups", "norms", "odd_parameters"]


def fitted(p: TinyProblem, solver=None, damping: float = 0.01, **options) -> FittedInfluence:
    return Influence(solver or EKFAC(), damping, **options).fit(p.model, p.task, p.train)


def packed(influence: FittedInfluence, p: TinyProblem, flat: Tensor) -> dict[str, Tensor]:
    """Block name to (n, G O I) of flat gradients (n, D)."""
    return {b.name: b.pack(p.unflatten(flat)).flatten(1) for b in influence.problem.blocks}


def shares(influence: FittedInfluence) -> dict[str, Tensor]:
    """The expected squared coordinates of each block, flat: second moments over eigenvalues + damping."""
    inverse = influence.inverse
    factors = inverse.factors.items()
    return {name: (f.ekfac / ((f.ekfac if inverse.corrected else f.kfac) + 0.01)).flatten() for name, f in factors}


def shrunk(influence: FittedInfluence, size: int) -> dict[str, Tensor]:
    """W^2 by non-negative least squares: the expected squared error |(1 - w) e|^2 + (w . e)^2 / k."""
    parts = shares(influence)
    e = torch.cat([*parts.values()]).numpy()
    matrix = np.vstack([np.diag(e), e / np.sqrt(size)])
    w = torch.from_numpy(scipy.optimize.nnls(matrix, np.append(e, 0.0))[0])
    return dict(zip(parts, w.split([len(part) for part in parts.values()]), strict=True))


def halves(influence: FittedInfluence, p: TinyProblem, flat: Tensor, size: int) -> dict[str, Tensor]:
    """W (Lambda + damping)^-1/2 Q^T g, block by block, with the eigenbases written out as matrices."""
    found, kept = {}, shrunk(influence, size)
    for b in influence.problem.blocks:
        factors, (G, O, I) = influence.inverse.factors[b.name], b.sides
        basis = factors.to_eigenbasis(torch.eye(G * O * I).double().view(-1, G, O, I)).flatten(1)
        root = (kept[b.name] / (factors.ekfac.flatten() + 0.01)).sqrt()
        found[b.name] = packed(influence, p, flat)[b.name] @ basis * root
    return found


def dense(sketch: Sketch, name: str) -> Tensor:
    """S of one block with the signs alone, (D_b, k)."""
    S = torch.zeros(len(sketch.buckets[name]), sketch.size).double()
    for i, (bucket, factor) in enumerate(zip(sketch.buckets[name].tolist(), sketch.factors[name], strict=True)):
        S[i, bucket] = factor.sign()
    return S


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", [EKFAC(), Identity()], ids=["root", "plain"])
def test_a_sketch_equals_its_matrix(name, solver):
    p = problem(name)
    influence = fitted(p, solver)
    flat = p.loss_gradients()
    parts = halves(influence, p, flat, 13) if isinstance(solver, EKFAC) else packed(influence, p, flat)
    sketch = Sketch.of(influence.inverse, 13, 2)
    found = sketch(influence.problem.loss_gradients(p.train))
    wanted = sum(part @ dense(sketch, block) for block, part in parts.items())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", [EKFAC(), KFAC()], ids=repr)
def test_the_root_is_half_of_the_inverse(solver):
    """With a number for every coordinate nothing collides, and nothing is shrunk for many: these are the scores."""
    p = problem("masked_sequence")
    influence = fitted(p, solver)
    sketch, start, buckets = Sketch.of(influence.inverse, 2**29, 0), 0, {}
    for block, drawn in sketch.buckets.items():
        buckets[block] = torch.arange(start, start + len(drawn), dtype=torch.int32)
        start += len(drawn)
    sketch = dataclasses.replace(sketch, size=p.dim, buckets=buckets)
    found = sketch(influence.query_gradients(p.queries)) @ sketch(influence.problem.loss_gradients(p.train)).T
    wanted = influence.score(p.queries).values
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
@pytest.mark.parametrize("solver", [EKFAC(), KFAC()], ids=repr)
def test_coordinates_are_shrunk_to_the_least_expected_error(solver, size):
    p = problem("mlp")
    influence = fitted(p, solver)
    kept = gradient_store._shrink(influence.inverse, size)
    for name, w in shrunk(influence, size).items():
        found = kept[name].square() * influence.inverse.damped_eigenvalues(name).flatten()
        # w = 1 - tau / e is the difference of float32 numbers of size 1: an error of some eps, however small w is.
        torch.testing.assert_close(found, w, rtol=0, atol=8 * torch.finfo(torch.float32).eps)
        assert torch.equal(found == 0, w == 0)


def test_without_bias_and_with_the_variance_of_the_formula():
    p, k, seeds = problem("mlp"), 16, 2000
    influence = fitted(p)
    rows = influence.query_gradients(p.queries), influence.problem.loss_gradients(p.train)
    x, g = (
        torch.cat([*halves(influence, p, f, k).values()], 1) for f in (p.measurement_gradients(), p.loss_gradients())
    )
    draws = []
    for seed in range(seeds):
        sketch = Sketch.of(influence.inverse, k, seed)
        a, b = (sketch(r) for r in rows)
        draws.append(a @ b.T)
    found, exact = torch.stack(draws), x @ g.T
    squares = torch.outer(x.square().sum(1), g.square().sum(1)) + exact.square() - 2 * x.square() @ g.square().T
    variance = squares / k
    error = (found.mean(0) - exact) / (variance / seeds).sqrt()
    assert float(error.abs().max()) < 4.5 and 0.7 < float(error.square().mean()) < 1.4  # 33 numbers, correlated
    ratio = (found - exact).square().mean(0) / variance
    assert float((ratio - 1).abs().max()) < 0.25 and abs(float(ratio.mean()) - 1) < 0.05


@pytest.mark.parametrize("solver", [Exact(), CG(EKFAC(), tolerance=1e-10), DataInf(), Identity()], ids=repr)
def test_solvers_without_a_root_ask_with_their_solutions(tmp_path, solver):
    p = problem("mlp")
    influence = fitted(p, solver, 0.1, curvature=EmpiricalFisher)
    x = solve(influence.inverse, p.unflatten(p.measurement_gradients()), certify=False).x
    store = GradientStore.build(influence, tmp_path, size=50, seed=1)
    S = torch.cat([dense(store.sketch, b.name) for b in influence.problem.blocks])
    flat = [torch.cat([*packed(influence, p, f).values()], 1) for f in (p.flatten(x), p.loss_gradients())]
    torch.testing.assert_close(store.score(p.queries).values, by_signs(*(f @ S for f in flat)), rtol=1e-8, atol=1e-10)


def test_one_plain_store_serves_every_solver(tmp_path, monkeypatch):
    p = problem("mlp")
    GradientStore.build(fitted(p, Identity()), tmp_path, size=32)
    monkeypatch.setattr(Problem, "loss_gradients", refuse)
    for solver, damping in ((Exact(), 0.1), (Exact(), 0.01), (CG(), 0.1)):
        influence = fitted(p, solver, damping)
        assert GradientStore.build(influence, tmp_path, size=32).score(p.queries).values.shape == (3, p.n)


def by_signs(a: Tensor, b: Tensor) -> Tensor:
    """Estimates of a b^T from the signs of b, (Q, n): zeros have a sign too."""
    return a @ torch.where(b > 0, 1.0, -1.0).double().T * (b.square().sum(1) / b.abs().sum(1).clamp(min=1e-30))


def refuse(*_: object) -> None:
    raise AssertionError("a training example was looked at")


def test_queries_look_at_no_training_example(tmp_path, monkeypatch):
    p = problem("masked_sequence")
    store = GradientStore.build(fitted(p), tmp_path, size=64)
    before = store.score(p.queries)
    monkeypatch.setattr(Problem, "loss_gradients", refuse)
    found = store.score(p.queries)
    assert torch.equal(found.values, before.values) and found.residual is None and found.converged.all()
    x, sizes = store.sketch(store.influence.query_gradients(p.queries)), store.pieces[0]["sizes"]
    noise = x.square().sum(1) * sizes.square().mean() / found.values.var(1)
    assert found.provenance["measured"] == {"sketch noise": pytest.approx(float(noise.median()))}
    assert found.provenance["bits"] == 64 and json.dumps(found.provenance)
    other = store.score(p.queries, measurement=store.influence.problem.task.loss)
    assert not torch.allclose(other.values, found.values)


@pytest.mark.parametrize("size", [64, 37])  # whole bytes, and not
def test_a_bit_a_number_is_kept_and_a_size(tmp_path, size):
    p = problem("mlp")
    influence = fitted(p)
    store = GradientStore.build(influence, tmp_path, size=size)
    exact, asked = (
        store.sketch(influence.problem.loss_gradients(p.train)),
        store.sketch(influence.query_gradients(p.queries)),
    )
    assert store.pieces[0]["signs"].dtype == torch.uint8 and store.pieces[0]["signs"].shape == (p.n, -(-size // 8))
    torch.testing.assert_close(store.score(p.queries).values, by_signs(asked, exact), rtol=1e-10, atol=1e-12)
    own = gradient_store.multiply_signs(exact, store.pieces[0]["signs"]) * store.pieces[0]["sizes"]
    torch.testing.assert_close(own.diagonal(), exact.square().sum(1))  # exact for an example with itself


@pytest.mark.parametrize("angle", [0.0, 0.8])
def test_signs_of_normal_numbers_have_no_bias_and_half_pi_times_the_variance(angle):
    k, draws, rng = 64, 20_000, torch.Generator().manual_seed(0)
    b, other = torch.randn(2, draws, k, generator=rng, dtype=torch.float64)
    a = angle * b + (1 - angle**2) ** 0.5 * other
    kept = gradient_store.pack_signs(b)
    found = torch.cat(
        [gradient_store.multiply_signs(x[None], s[None])[0] for x, s in zip(a, kept["signs"], strict=True)]
    )
    found *= kept["sizes"] / k
    wanted = (angle**2 * 2 + (1 - angle**2) * torch.pi / 2) / k
    assert float(found.mean()) == pytest.approx(angle, abs=4 * (wanted / draws) ** 0.5)
    assert float(found.var()) == pytest.approx(wanted, rel=0.05)


def test_batches_and_files_change_nothing(tmp_path, monkeypatch):
    p = problem("masked_sequence")
    once = fitted(p)
    once.save(tmp_path / "fit")
    wanted = GradientStore.build(once, tmp_path / "one", size=32).score(p.queries).values
    monkeypatch.setattr(gradient_store, "SHARD", 4)
    for batch_size in (1, 3, 5):
        influence = Influence(EKFAC(), 0.01, batch_size=batch_size).load(tmp_path / "fit", p.model, p.task, p.train)
        store = GradientStore.build(influence, tmp_path / str(batch_size), size=32)
        assert len(store.pieces) == 3
        torch.testing.assert_close(store.score(p.queries).values, wanted, rtol=1e-10, atol=1e-12)


def test_a_killed_build_goes_on(tmp_path, monkeypatch):
    p = problem("mlp")
    monkeypatch.setattr(gradient_store, "SHARD", 3)
    influence, plain = fitted(p, batch_size=2), Problem.loss_gradients
    wanted = GradientStore.build(influence, tmp_path / "whole", size=32).score(p.queries).values
    seen: list[int] = []

    def counted(self, batch):
        seen.append(len(batch[0]))
        if len(seen) == 4:  # within the second file
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(Problem, "loss_gradients", counted)
    with pytest.raises(KeyboardInterrupt):
        GradientStore.build(influence, tmp_path / "killed", size=32)
    assert len([*(tmp_path / "killed").iterdir()]) == 1
    seen[:] = [0] * 10
    assert torch.equal(GradientStore.build(influence, tmp_path / "killed", size=32).score(p.queries).values, wanted)
    assert sum(seen) == p.n - 3
    seen.clear()
    assert torch.equal(GradientStore.build(influence, tmp_path / "killed", size=32).score(p.queries).values, wanted)
    assert not seen


def test_a_store_of_something_else_is_refused_by_name(tmp_path):
    p, other = problem("mlp"), problem("mlp")
    influence = fitted(p)
    GradientStore.build(influence, tmp_path, size=32)
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    fewer = Influence(EKFAC(), 0.01, parameters="0").fit(p.model, p.task, p.train)
    x, y = p.train
    for wrong, options, name in (
        (influence, {"size": 33}, "size"),
        (influence, {"seed": 1}, "seed"),
        (fitted(p, damping=0.02), {}, "lambda"),
        (fitted(p, EKFAC(seed=1)), {}, "root"),
        (fitted(p, Identity()), {}, "root, lambda"),
        (fitted(other), {}, "model"),
        (fewer, {}, "parameters"),
        (Influence(EKFAC(), 0.01).fit(p.model, p.task, (x, y.flip(0))), {}, "train"),
    ):
        with pytest.raises(ArtefactError, match=f"made for another .*{name}"):
            GradientStore.build(wrong, tmp_path, **{"size": 32} | options)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="damaged"):
        GradientStore.build(influence, tmp_path, size=32)
    with pytest.raises(InputError, match="size must be positive"):
        GradientStore.build(influence, tmp_path, size=0)


def test_a_saved_fit_opens_its_store(tmp_path, monkeypatch):
    p = problem("mlp")
    influence = fitted(p)
    wanted = GradientStore.build(influence, tmp_path / "store", size=32).score(p.queries).values
    influence.save(tmp_path / "fit")
    loaded = Influence(EKFAC(), 0.01).load(tmp_path / "fit", p.model, p.task, p.train)
    monkeypatch.setattr(Problem, "loss_gradients", refuse)
    assert torch.equal(GradientStore.build(loaded, tmp_path / "store", size=32).score(p.queries).values, wanted)


def test_the_best_by_the_store_are_rescored_in_a_language_model(tmp_path):
    """Ragged sequences; a query that is a training sequence finds it first."""
    model, train, texts = language()
    influence = Influence(EKFAC(), 0.1, parameters="mlp").fit(model, CausalLM(), train)
    queries = pad([{"input_ids": texts[i], "labels": texts[i]} for i in (5, 11)])
    store = GradientStore.build(influence, tmp_path, size=1024)
    index = shortlist(store.score(queries), 4)
    assert {5, 11} <= set(index.tolist())
    asked = {**queries, "labels": queries["labels"].index_fill(0, torch.tensor([0]), -100)}  # nothing is asked
    assert 0 < store.score(asked).provenance["measured"]["sketch noise"] < 1
    full = influence.score(queries).values
    found = rescored(influence, queries, index)
    torch.testing.assert_close(found.values, full[:, index], rtol=1e-10, atol=1e-12)
    with safe_open(next(tmp_path.iterdir()), framework="pt") as file:
        assert json.loads(file.metadata()["wherefrom"])["header"]["size"] == 1024
