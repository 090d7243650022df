"""Query directions of low rank: every contraction and truncation against dense ones, and scores end to end."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from problems import TinyProblem, problem
from solving import normal, solve
from wherefrom import (
    CG,
    EKFAC,
    Arnoldi,
    ArtefactError,
    AttributionWarning,
    Classification,
    ConvergenceWarning,
    Damping,
    DivergenceError,
    Dual,
    EmpiricalFisher,
    Exact,
    FittedInfluence,
    Influence,
    InputError,
    Neumann,
    RandProj,
    Scores,
)
from wherefrom.curvature.kronecker import fit
from wherefrom.methods import influence as method
from wherefrom.methods.tokens import COPIES
from wherefrom.persample import lowrank
from wherefrom.persample.directions import Directions
from wherefrom.persample.eigenbasis import Basis
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.lowrank import LowRank
from wherefrom.persample.rows import Lookup, Routed, Several
from wherefrom.solvers.kronecker import EigenInverse

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def decaying(*shape: int, by: float, seed: int = 0) -> torch.Tensor:
    """Matrices with singular values 1, by, by^2, ..."""
    u, s, w = torch.linalg.svd(normal(*shape, seed=seed), full_matrices=False)
    return (u * by ** torch.arange(s.shape[-1], dtype=s.dtype)) @ w


# --- contractions ---


def factored_rows(G: int, n: int, R: int, T: int, O: int, I: int) -> tuple[Factored, torch.Tensor]:
    a, g = normal(G, n, T, I, seed=1), normal(G, n, R, T, O, seed=2)
    return Factored(a, g), torch.einsum("gnti,gnrto->nrgoi", a, g)


def lookup_rows(n: int, R: int, T: int, size: int, d: int) -> tuple[Lookup, torch.Tensor]:
    ids = torch.randint(size, (n, T), generator=torch.Generator().manual_seed(3))
    g = normal(n, R, T, d, seed=4)
    one_hot = torch.nn.functional.one_hot(ids, size).double()
    return Lookup(ids, g, size), torch.einsum("nto,nrti->nroi", one_hot, g).unsqueeze(2)


def rows_of_every_form():
    for G, R, T in ((1, 1, 5), (1, 1, 1), (3, 1, 4), (2, 3, 2)):
        yield factored_rows(G, 7, R, T, 6, 4)
    rows, dense = factored_rows(2, 7, 1, 3, 6, 4)
    yield Routed(rows.a, rows.g, torch.zeros(2, 7, 3, dtype=torch.int64)), dense
    yield Written(dense.flatten(2), (2, 6, 4)), dense
    lookup, table = lookup_rows(7, 2, 5, 6, 4)
    yield lookup, table
    rows, dense = factored_rows(1, 7, 2, 3, 6, 4)
    yield Several((rows, lookup)), dense + table


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("thin", [False, True])
def test_every_order_of_contraction_gives_the_dense_inner_products(monkeypatch, thin, small):
    monkeypatch.setattr(LowRank, "_is_cheaper_thin", lambda *_: thin)
    if small:
        for name in ("CHUNK", "ROWS", "TILE"):
            monkeypatch.setattr(lowrank, name, 12)
    for rows, dense in rows_of_every_form():
        G = dense.shape[2]
        low = LowRank(normal(5, G, 6, 2, seed=5), normal(5, G, 2, 4, seed=6))
        wanted = torch.einsum("qgok,qgki,nrgoi->qnr", low.left, low.right, dense)
        torch.testing.assert_close(low.dot(rows), wanted, **TIGHT)
        torch.testing.assert_close(rows.dot(low.write()), wanted, **TIGHT)


def test_the_order_is_the_cheaper_one():
    low = LowRank(torch.empty(100, 1, 1024, 32), torch.empty(100, 1, 32, 257))
    sequences = Factored(torch.empty(1, 32, 128, 257), torch.empty(1, 32, 1, 128, 1024))
    assert not low._is_cheaper_thin(sequences), "128 positions: 100 matrices written out cost less"
    assert low[:1]._is_cheaper_thin(sequences), "one query: it costs less than writing the rows out"
    assert low._is_cheaper_thin(Factored(torch.empty(1, 32, 1, 257), torch.empty(1, 32, 1, 1, 1024))), "one position"


# --- truncation ---


@pytest.mark.parametrize("shape", [(3, 1, 40, 30), (2, 3, 25, 60)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_is_that_of_the_dense_singular_value_decomposition(shape, rank):
    v = decaying(*shape, by=0.4)
    low, dropped = lowrank.truncate(v, rank)
    u, s, w = torch.linalg.svd(v, full_matrices=False)
    wanted = (u[..., :rank] * s[..., None, :rank]) @ w[..., :rank, :]
    assert isinstance(low, LowRank) and low.left.shape[-1] == rank
    torch.testing.assert_close(low.write(), wanted, **TIGHT)
    torch.testing.assert_close(dropped, s[..., rank:].square().sum((1, 2)), rtol=1e-9, atol=1e-12)


def test_without_decay_little_more_is_dropped_than_must_be_and_that_is_what_is_said():
    v = normal(4, 1, 90, 70)
    for rank in (2, 8, 20):
        low, dropped = lowrank.truncate(v, rank)
        least = torch.linalg.svdvals(v)[..., rank:].square().sum((1, 2))
        torch.testing.assert_close(dropped, (v - low.write()).square().sum((1, 2, 3)), **TIGHT)
        assert (dropped > least * (1 - 1e-12)).all() and (dropped < 1.05 * least).all()


def test_matrices_of_that_rank_are_kept_and_smaller_ones_are_not_touched():
    v = normal(3, 2, 40, 5) @ normal(3, 2, 5, 50, seed=1)
    low, dropped = lowrank.truncate(v, 5)
    torch.testing.assert_close(low.write(), v, **TIGHT)
    assert (dropped < 1e-20 * v.square().sum()).all()
    for rank in (23, 40, 10**6):
        same, nothing = lowrank.truncate(v, rank)
        assert same is v and not nothing.any(), "23 x (40 + 50) numbers are more than 40 x 50"
    vector = normal(3, 1, 70, 1)
    assert lowrank.truncate(vector, 1)[0] is vector
    zero, nothing = lowrank.truncate(torch.zeros(2, 1, 40, 50), 3)
    assert not zero.write().any() and not nothing.any()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_share_of_the_energy_takes_the_lowest_rank_that_keeps_it(share):
    fast, slow = decaying(2, 2, 150, 130, by=0.5), decaying(1, 2, 150, 130, by=0.98, seed=1)
    v = torch.cat([fast, slow * 1e3])
    low, dropped = lowrank.truncate(v, share)
    energy = torch.linalg.svdvals(v).square()
    kept = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    ranks = ((kept < share).sum(-1) + 1).clamp(max=32)  # (Q, G)
    found = low.left.norm(dim=2).gt(0).sum(-1)
    assert found.tolist() == ranks.tolist() and low.left.shape[-1] == ranks.max()
    enough = ranks.amax(1) < 32
    assert (1 - dropped / energy.sum((1, 2)) >= share)[enough].all() and enough[:2].all()


def test_a_bad_rank_is_an_error_before_anything_is_computed(monkeypatch):
    influence, p = fitted("mlp", EKFAC())
    whole = influence.solve(p.queries)
    monkeypatch.setattr(method, "QueryGradients", None)
    for bad in (0, -3, True, 1.0, 1.5, 0.0, -0.5, float("nan"), "32"):
        for ask in (lambda r: influence.solve(p.queries, rank=r), whole.truncate):
            with pytest.raises(InputError, match="rank must be a positive integer, or a share of the energy"):
                ask(bad)


def test_a_rank_may_be_an_integer_of_numpy():
    influence, p = fitted("mlp", EKFAC())
    found, wanted = (influence.solve(p.queries, certify=False, rank=r).score().values for r in (np.int64(2), 2))
    assert torch.equal(found, wanted)


# --- scores ---


def fitted(name: str, solver, **options) -> tuple[FittedInfluence, TinyProblem]:
    p = problem(name)
    return Influence(solver, 0.1, **options).fit(p.model, p.task, p.train), p


def root(side: Basis, d: torch.Tensor, power: float) -> torch.Tensor:
    """The covariance of one side with these eigenvalues (G, d), a hundredth of their mean added, to a power: dense."""
    vectors = side.from_basis(torch.eye(d.shape[1], dtype=torch.float64).expand(len(d), -1, -1))  # in rows
    return vectors.mT @ torch.diag_embed((d + d.mean(1, keepdim=True) / 100).pow(power)) @ vectors


def cut(
    influence: FittedInfluence, x: dict[str, torch.Tensor], rank: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every matrix of the solutions truncated by dense decompositions, in the norm of the gradients' covariances.

    Returns:
        The solutions; the squared norms of what was dropped and of all, (2, Q).
    """
    problem, out, energies = influence.problem, {}, 0
    own = influence.inverse.factors if isinstance(influence.inverse, EigenInverse) else fit(problem, "true")
    for block in problem.blocks:
        v, f = block.pack(x), own[block.name]
        d, e = f.kfac.sum(2), f.kfac.sum(1) / f.kfac.sum((1, 2)).unsqueeze(1)
        z = root(f.left, d, 0.5) @ v @ root(f.right, e, 0.5)
        low = z
        if rank * sum(v.shape[2:]) < v.shape[2] * v.shape[3]:
            u, s, w = torch.linalg.svd(z, full_matrices=False)
            low = (u[..., :rank] * s[..., None, :rank]) @ w[..., :rank, :]
            v = root(f.left, d, -0.5) @ low @ root(f.right, e, -0.5)
        energies = energies + torch.stack([(z - low).square().sum((1, 2, 3)), z.square().sum((1, 2, 3))])
        out |= block.unpack(v)
    return out, energies


SOLVERS = {
    "exact": Exact(),
    "ekfac": EKFAC(),
    "cg": CG(Dual(), tolerance=1e-10),
    "astra": Neumann(preconditioner=EKFAC(), steps=6, batch=8, seed=3),
    "arnoldi": Arnoldi(rank=8),
    "randproj": RandProj(rank=9),
}


@pytest.mark.filterwarnings(
    "ignore:.*slow path:wherefrom.errors.AttributionWarning", "ignore::wherefrom.ConvergenceWarning"
)
@pytest.mark.filterwarnings("ignore:.*changes the scores of:wherefrom.errors.AttributionWarning")
@pytest.mark.parametrize(
    ("solver", "name"),
    [(solver, name) for solver in SOLVERS for name in ("mlp", "cnn_groups", "tied_embedding", "masked_sequence")]
    + [("ekfac", "odd_parameters"), ("arnoldi", "odd_parameters")],
)
def test_scores_are_those_of_the_truncated_solutions(solver, name):
    influence, p = fitted(name, SOLVERS[solver], batch_size=4)
    full = influence.score(p.queries)
    x = solve(influence.inverse, p.unflatten(p.measurement_gradients())).x
    g = p.loss_gradients()
    torch.testing.assert_close(full.values, p.flatten(x) @ g.T, rtol=1e-7, atol=1e-8)
    changed = []
    for rank in (1, 2):
        solutions, (dropped, whole) = cut(influence, x, rank)
        y = p.flatten(solutions)
        gap = (p.flatten(x) - y).norm(dim=1)
        error = (p.flatten(x) @ g.T - y @ g.T).norm(dim=1) / (p.flatten(x) @ g.T).norm(dim=1)
        for certify in (True, False):
            found = influence.solve(p.queries, rank=rank, certify=certify).score()
            torch.testing.assert_close(found.values, y @ g.T, rtol=1e-6, atol=1e-7)
            assert (found.values - full.values).abs().le(gap[:, None] * g.norm(dim=1) + 1e-9).all()
            said = found.provenance["truncation"]
            assert said["rank"] == rank
            assert said["error"] == pytest.approx(float(error.max()), rel=1e-5, abs=1e-7)
            assert said["mean error"] == pytest.approx(float(error.mean()), rel=1e-5, abs=1e-7)
            assert said["energy"] == pytest.approx(1 - float((dropped / whole).mean()), abs=1e-7)
            assert f"queries cut to rank {rank} (error at most {said['error']:.2g})" in str(found)
            changed.append(said["error"] > 1e-3)
        if solver != "astra":
            torch.testing.assert_close(
                influence.solve(p.queries, rank=rank).score().residual, full.residual, rtol=1e-6, atol=1e-9
            )
    assert any(changed), "nothing was cut"
    assert "truncation" not in full.provenance and "cut" not in str(full)
    complete = influence.solve(p.queries, rank=10**4, certify=False).score()
    torch.testing.assert_close(complete.values, full.values, rtol=1e-9, atol=1e-10)
    assert complete.provenance["truncation"]["error"] < 1e-9 and complete.provenance["truncation"]["energy"] == 1


@pytest.mark.parametrize("name", ["mlp", "cnn_groups", "tied_embedding", "masked_sequence"])
def test_directions_leave_their_eigenbases_when_they_are_truncated(name):
    influence, p = fitted(name, EKFAC())
    factors, lib = influence.inverse.factors, influence.problem
    x = solve(influence.inverse, p.unflatten(p.measurement_gradients())).x
    g = lib.loss_gradients(lib.batch(range(p.n)))
    outside = Directions.from_parameters(lib.blocks, x)
    low, found = outside.to_eigenbasis(factors).truncate(1, factors)
    y, energies = cut(influence, x, 1)
    scores = g.dot(low)
    torch.testing.assert_close(scores[..., 0], p.flatten(y) @ p.loss_gradients().T, **TIGHT)
    torch.testing.assert_close(sum(g.dot_by_block(low).values()), scores, **TIGHT)
    torch.testing.assert_close(found, energies, rtol=1e-8, atol=1e-12)
    assert any(isinstance(v, LowRank) for v in low.forms.values()) and not low.bases
    other, same = outside.truncate(1, factors)
    torch.testing.assert_close(g.dot(other), scores, **TIGHT)
    torch.testing.assert_close(same, found, **TIGHT)


def test_the_mean_of_the_queries_and_candidates_take_a_rank_too():
    influence, p = fitted("mlp", EKFAC(), batch_size=4)
    mean = influence.solve(p.queries, mean=True, rank=1).score()
    x = p.unflatten(p.measurement_gradients().mean(0, keepdim=True))
    y = p.flatten(cut(influence, solve(influence.inverse, x).x, 1)[0])
    torch.testing.assert_close(mean.values, y @ p.loss_gradients().T, **TIGHT)
    some = tuple(t[2:7] for t in p.train)
    low = influence.solve(p.queries, rank=1)
    torch.testing.assert_close(low.score(some).values, low.score().values[:, 2:7], **TIGHT)


def wide(n: int = 200) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A classifier with a wide layer, and its data."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(90, 80), torch.nn.Tanh(), torch.nn.Linear(80, 4)).double()
    return net, normal(n, 90), torch.arange(n) % 4


def test_a_share_of_the_energy_end_to_end():
    net, x, y = wide(30)
    influence = Influence(EKFAC(), 0.01, EmpiricalFisher).fit(net, Classification(), (x, y))
    found, full = influence.solve((x[:5], y[:5]), rank=0.9).score(), influence.score((x[:5], y[:5]))
    said = found.provenance["truncation"]
    assert said["rank"] == 0.9 and 0.9 <= said["energy"] < 1
    error = (found.values - full.values).norm(dim=1) / full.values.norm(dim=1)
    assert said["error"] == pytest.approx(float(error.max()), rel=1e-9) and said["error"] > 1e-4
    assert "queries cut to 0.9 of their energy (error at most" in str(found)


def test_the_error_is_measured_on_training_examples_spread_over_all():
    net, x, y = wide()
    influence = Influence(Exact(), 0.1, EmpiricalFisher).fit(net, Classification(), (x, y))
    full, found = influence.score((x[:5], y[:5])).values, influence.solve((x[:5], y[:5]), rank=2).score()
    index = [round(i * 199 / 63) for i in range(64)]
    error = (found.values - full)[:, index].norm(dim=1) / full[:, index].norm(dim=1)
    assert found.provenance["truncation"]["error"] == pytest.approx(float(error.max()), rel=1e-6)
    assert found.provenance["truncation"]["mean error"] == pytest.approx(float(error.mean()), rel=1e-6)


def test_what_a_rank_costs_is_said_where_it_is_much():
    net, x, y = wide(30)
    influence = Influence(RandProj(rank=9)).fit(net, Classification(), (x, y))
    with pytest.warns(AttributionWarning, match=r"rank 1 changes the scores of \d of 5 queries by more than half"):
        found = influence.solve((x[:5], y[:5]), rank=1)
    assert found.truncation["error"] > 0.5


def test_what_matters_to_scores_is_kept_better_than_what_is_long():
    net, x, y = wide()
    influence = Influence(EKFAC(), Damping.relative(0.1), EmpiricalFisher).fit(net, Classification(), (x, y))
    blocks, full = influence.problem.blocks, influence.score((x[:20], y[:20])).values
    v = influence.inverse.apply(influence.query_gradients((x[:20], y[:20])).dense())
    g = influence.problem.loss_gradients((x, y))
    plain = g.dot(Directions(blocks, {b.name: lowrank.truncate(v.matrices(b.name), 2)[0] for b in blocks}))[..., 0]
    assert (influence.solve((x[:20], y[:20]), rank=2).score().values - full).norm() < 0.7 * (plain - full).norm()


# --- many queries ---


@pytest.mark.filterwarnings("ignore::wherefrom.ConvergenceWarning", "ignore:.*changes the scores of")
@pytest.mark.parametrize("solver", [EKFAC(), CG(EKFAC(), tolerance=1e-2, steps=12), RandProj(rank=9)])
@pytest.mark.parametrize(("certify", "size"), [(True, 3), (False, 1), (False, 7)])
def test_queries_are_solved_in_pieces_that_fit_into_memory_with_the_same_scores(monkeypatch, solver, certify, size):
    p, lengths = problem("mlp"), []
    queries = tuple(t[:10] for t in p.train)
    whole = Influence(solver, 0.1, batch_size=4).fit(p.model, p.task, p.train)
    wanted = whole.solve(queries, rank=1, certify=certify).score()
    memory = size * p.dim * 8 * COPIES
    influence = Influence(solver, 0.1, batch_size=4, memory=memory).fit(p.model, p.task, p.train)
    inverse = type(influence.inverse)
    original = inverse.solve
    monkeypatch.setattr(inverse, "solve", lambda i, b, *more, **k: lengths.append(len(b)) or original(i, b, *more, **k))
    solved = influence.solve(queries, rank=1, certify=certify)
    monkeypatch.setattr(inverse, "solve", original)
    found = solved.score()
    assert sum(lengths) == 10 and max(lengths) <= size
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-7, atol=1e-9)
    assert found.converged.tolist() == wanted.converged.tolist()
    for key in ("error", "mean error", "energy"):
        assert found.provenance["truncation"][key] == pytest.approx(wanted.provenance["truncation"][key], abs=1e-8)
    if certify:
        torch.testing.assert_close(found.residual, wanted.residual, rtol=1e-7, atol=1e-9)
    if isinstance(solver, CG):
        torch.testing.assert_close(found.history, wanted.history, rtol=1e-6, atol=1e-9)
        assert 1 < found.provenance["steps"] == wanted.provenance["steps"]


def test_many_queries_store_few_numbers(monkeypatch):
    net, x, y = wide()
    D, largest = 91 * 80 + 81 * 4, []
    memory = COPIES * D * 8 * 10
    influence = Influence(EKFAC(), 0.1, EmpiricalFisher, memory=memory).fit(net, Classification(), (x, y))
    original = EigenInverse.apply
    monkeypatch.setattr(EigenInverse, "apply", lambda i, b: largest.append(len(b)) or original(i, b))
    low = influence.solve((x, y), rank=3, certify=False).directions
    assert all(isinstance(v, LowRank) for v in low.forms.values())
    stored = {name: v.numbers() for name, v in low.forms.items()}
    assert stored == {"0": 200 * 3 * (91 + 80), "2": 200 * 3 * (81 + 4)}
    assert sum(largest) == 200 and max(largest) == 10


def test_what_is_said_of_queries_in_a_piece_says_which_piece(monkeypatch):
    p = problem("mlp")
    queries = tuple(t[:5] for t in p.train)
    memory = 2 * p.dim * 8 * COPIES
    influence = Influence(CG(steps=1, tolerance=1e-9), 0.1, memory=memory).fit(p.model, p.task, p.train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = influence.solve(queries, rank=1)
    said = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert not found.certificate.converged.any() and len(said) == 3
    assert said[0].startswith("2 of 2 queries did not converge")
    assert said[1].startswith("among queries 2 to 3, counted from 0: 2 of 2") and "queries 4 to 4" in said[2]
    inverse = type(influence.inverse)
    original = inverse.iterate

    def spoil(self, b):
        iterates = original(self, b)
        last = len(b) == 1  # the third piece
        return dataclasses.replace(iterates, x=iterates.x.scale(float("nan")) if last else iterates.x)

    monkeypatch.setattr(inverse, "iterate", spoil)
    with warnings.catch_warnings(), pytest.raises(DivergenceError, match=r"^among queries 4 to 4, counted from 0: "):
        warnings.simplefilter("ignore")
        influence.solve(queries, rank=1)


# --- resumed ---


@pytest.mark.parametrize("certify", [True, False])
def test_a_folder_is_of_one_rank_and_goes_on_whatever_the_memory(tmp_path, monkeypatch, certify):
    p = problem("mlp")
    queries = tuple(t[:5] for t in p.train)

    def influence(size: int) -> FittedInfluence:
        memory = size * p.dim * 8 * COPIES
        solver = CG(EKFAC(), tolerance=1e-12) if certify else EKFAC()  # one that solves, and keeps its solutions
        return Influence(solver, 0.1, batch_size=4, memory=memory).fit(p.model, p.task, p.train)

    def scored(size: int, rank: float | None = 1) -> Scores:
        solution = influence(size).solve(queries, rank=rank, certify=certify, folder=tmp_path)
        return solution.score(folder=tmp_path)

    wanted = influence(2).solve(queries, rank=1, certify=certify).score()
    first = scored(2)
    names = {f.name for f in tmp_path.iterdir()}
    assert {f"solution-{a}-{b}.safetensors" for a, b in ((0, 2), (2, 4), (4, 5))} <= names or not certify
    (tmp_path / "scores-00000004.safetensors").unlink()
    again = scored(3)
    for found in (first, again):
        torch.testing.assert_close(found.values, wanted.values, **TIGHT)
        for key, value in wanted.provenance["truncation"].items():
            assert found.provenance["truncation"][key] == pytest.approx(value, abs=1e-12)
    for rank in (2, 0.5, None):
        with pytest.raises(ArtefactError, match="another rank"):
            scored(2, rank)
