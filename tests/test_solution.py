"""What is solved once: solutions and all that is asked of them, frozen fits, and inverses of a user's own in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import wherefrom
from problems import TinyProblem, problem
from solving import solve
from wherefrom import (
    CG,
    EKFAC,
    KFAC,
    ArtefactError,
    Classification,
    Curvature,
    Damping,
    Directions,
    Dual,
    Exact,
    FittedInfluence,
    Identity,
    Influence,
    InputError,
    Inverse,
    RandProj,
    Solver,
)

DAMPING = 0.05
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
SOLVERS = [Exact(), Exact(form="primal"), EKFAC(labels="true"), RandProj(rank=8), CG(Dual(), tolerance=1e-11)]


def fitted(p: TinyProblem, solver: Solver | None = None, **options) -> FittedInfluence:
    return Influence(solver or Exact(), DAMPING, **options).fit(p.model, p.task, p.train)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Inverse], list[int]]:
    """What makes an inverse note the number of right-hand sides of each call of its ``apply``."""

    def watch(inverse: Inverse) -> list[int]:
        calls: list[int] = []
        original = type(inverse).apply

        def apply(self: Inverse, b: Directions) -> Directions:
            calls.append(len(b))
            return original(self, b)

        monkeypatch.setattr(type(inverse), "apply", apply)
        return calls

    return watch


# --- solved once ---


class Spelled(Classification):
    """A task of sequences that also says what each position of a query adds to its measurement."""

    def padding(self, batch):
        return batch[0] != 0

    def measurement(self, outputs, batch):
        return self.token_measurements(outputs, batch).sum(1)

    def token_measurements(self, outputs, batch):
        labels = batch[1]
        losses = nn.functional.cross_entropy(outputs.mT, labels.clamp(min=0), reduction="none")
        return losses * (labels >= 0)


# The agreement of an approximate inverse is measured with solves of its own, so that those are asked for without.
@pytest.mark.parametrize(
    ("solver", "certify"),
    [
        (Exact(), True),
        (Exact(form="primal"), True),
        (Exact(), False),
        (EKFAC(labels="true"), False),
        (Identity(), False),
    ],
)
def test_scores_and_parts_of_the_same_queries_are_solved_once(solver, certify, count):
    p = problem("masked_sequence")
    p.task = Spelled()
    fit = fitted(p, solver)
    calls = count(fit.inverse)
    solution = fit.solve(p.queries, certify=certify)
    scores, blocks, tokens = solution.score().values, solution.by_block([0, 2]), solution.by_token([0, 2])
    assert calls == [3]
    torch.testing.assert_close(sum(blocks.values()), scores[:, [0, 2]], **TIGHT)
    torch.testing.assert_close(tokens.sum(2), scores[:, [0, 2]], **TIGHT)


@pytest.mark.parametrize("solver", [Exact(), EKFAC(labels="true"), Identity()])
def test_tokens_of_the_queries_are_solved_once_for_everything(solver, count):
    p = problem("masked_sequence")
    p.task = Spelled()
    fit = fitted(p, solver)
    whole = fit.score(p.queries, certify=False).values
    calls = count(fit.inverse)
    solution = fit.solve(p.queries, certify=False, by_token=True)
    scores, blocks, tokens = solution.score().values, solution.by_block([0, 2]), solution.by_token([0, 2])
    asked = solution.by_query_token([0, 2])
    assert calls == [int((p.queries[1] >= 0).sum())]
    torch.testing.assert_close(scores, whole, **TIGHT)
    for part in (sum(blocks.values()), tokens.sum(2), asked.sum(1)):
        torch.testing.assert_close(part, whole[:, [0, 2]], **TIGHT)


def test_queries_that_were_solved_as_wholes_have_no_tokens():
    p = problem("masked_sequence")
    with pytest.raises(InputError, match="Solve with by_token=True"):
        fitted(p).solve(p.queries).by_query_token([0])


def test_the_mean_of_queries_has_no_tokens():
    p = problem("masked_sequence")
    p.task = Spelled()
    with pytest.raises(InputError, match="mean of queries has no tokens"):
        fitted(p).solve(p.queries, by_token=True, mean=True)


def test_a_rank_is_not_forgotten_where_tokens_are_solved_for():
    p = problem("masked_sequence")
    p.task = Spelled()
    fit = fitted(p, EKFAC(labels="true"))
    both = fit.solve(p.queries, by_token=True, rank=1, certify=False)
    alone = fit.solve(p.queries, rank=1, certify=False)
    assert both.truncation is not None and both.truncation["rank"] == 1
    torch.testing.assert_close(both.score().values, alone.score().values, rtol=1e-6, atol=1e-8)


# --- against dense answers ---


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "cnn_groups"])
def test_the_mean_of_a_solution_is_the_solution_of_the_mean(name, solver, count):
    p = problem(name)
    fit = fitted(p, solver)
    solution = fit.solve(p.queries)
    calls = count(fit.inverse)
    mean = solution.mean()
    assert not calls and len(mean) == 1
    mean_gradient = p.unflatten(p.measurement_gradients().mean(0, keepdim=True))
    dense = solve(fit.inverse, mean_gradient)
    torch.testing.assert_close(mean.score().values, p.flatten(dense.x) @ p.loss_gradients().T, **TIGHT)
    asked = fit.solve(p.queries, mean=True)
    torch.testing.assert_close(mean.score().values, asked.score().values, **TIGHT)
    if isinstance(solver, Exact):
        exact = p.exact_scores(p.ggn(), DAMPING).mean(0, keepdim=True)
        torch.testing.assert_close(mean.score().values, exact, rtol=1e-7, atol=1e-9)
    if solution.certificate.residual is not None:
        torch.testing.assert_close(mean.certificate.residual, dense.residual, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("solver", [Exact(), EKFAC(labels="true"), CG(Dual(), tolerance=1e-11)])
@pytest.mark.filterwarnings("ignore:.*changes the scores of")
def test_a_truncated_solution_is_what_was_asked_for_with_that_rank(solver, rank, count):
    p = problem("mlp")
    fit = fitted(p, solver)
    solution = fit.solve(p.queries)
    wanted = fit.solve(p.queries, rank=rank)
    calls = count(fit.inverse)
    low = solution.truncate(rank)
    assert not calls and low.truncation is not None and wanted.truncation is not None
    torch.testing.assert_close(low.score().values, wanted.score().values, rtol=1e-7, atol=1e-9)
    for name, value in wanted.truncation.items():
        assert low.truncation[name] == pytest.approx(value, rel=1e-6, abs=1e-9)
    x, y = (s.directions.dense().to_parameters() for s in (solution, low))
    exact, approximate = (p.flatten(v) @ p.loss_gradients().T for v in (x, y))
    torch.testing.assert_close(low.score().values, approximate, rtol=1e-7, atol=1e-9)
    error = (approximate - exact).norm(dim=1) / exact.norm(dim=1)
    assert low.truncation["error"] == pytest.approx(float(error.max()), rel=1e-6)


@pytest.mark.parametrize("solver", [Exact(), Exact(form="primal"), CG(Dual(), tolerance=1e-11)])
@pytest.mark.parametrize("name", ["mlp", "norms", "mlp_regression"])
def test_the_similarity_of_a_solution_is_the_dense_one(name, solver):
    p = problem(name)
    A = torch.linalg.inv(p.ggn() + DAMPING * torch.eye(p.dim).double())
    asked, train = p.loss_gradients(p.queries), p.loss_gradients()

    def cosines(a: Tensor, b: Tensor) -> Tensor:
        lengths = [torch.einsum("nd,de,ne->n", t, A, t).sqrt() for t in (a, b)]
        return a @ A @ b.T / torch.outer(*lengths)

    solution = fitted(p, solver, batch_size=4).solve(p.queries, p.task.loss)
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(solution.similarity().values, cosines(asked, asked), **close)
    torch.testing.assert_close(solution.similarity(p.train).values, cosines(asked, train), **close)
    forms = torch.einsum("nd,de,ne->n", asked, A, asked)
    torch.testing.assert_close(solution.quadratic_forms(), forms, **close)


# --- frozen ---


def test_a_fit_is_frozen():
    p = problem("mlp")
    fit = fitted(p)
    solution = fit.solve(p.queries)
    others = [
        m.fit(p.model, p.task, p.train)
        for m in (wherefrom.GradCos(), wherefrom.TRAK(size=3), wherefrom.Embeddings("2"), wherefrom.Random())
    ]
    for record in (fit, fit.influence, fit.inverse, solution, solution.certificate, solution.score(), *others):
        for f in dataclasses.fields(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, f.name, None)


def test_the_order_of_fits_changes_no_bit():
    """What a fit is does not depend on those that were made before on the same curvature, with other seeds."""
    p = problem("mlp")
    solvers = {
        "ekfac": EKFAC(),
        "other seed": EKFAC(seed=3),
        "kfac": KFAC(),
        "dual": Dual(),
        "cg": CG(EKFAC(), tolerance=1e-8),
        "primal": Exact(form="primal"),
    }
    damping = Damping.per_example()

    def scores(order: list[str]) -> dict[str, Tensor]:
        curvature = wherefrom.GGN(wherefrom.Problem(p.model, p.task, p.train))
        values: dict[str, Tensor] = {}
        for name in order:
            influence = Influence(solvers[name], damping, curvature=lambda _: curvature)
            values[name] = influence.fit(p.model, p.task, p.train).score(p.queries, certify=False).values
        return values

    forwards, backwards = scores(list(solvers)), scores(list(reversed(solvers)))
    for name, values in forwards.items():
        assert torch.equal(values, backwards[name]), name
        alone = Influence(solvers[name], damping).fit(p.model, p.task, p.train)
        assert torch.equal(alone.score(p.queries, certify=False).values, values), name


# --- a solver of one's own ---


@dataclass(frozen=True, eq=False)
class Diagonal(Inverse):
    """Divides by the diagonal of C + damping.

    Args:
        squares: the diagonal of C, coordinates block after block, (D,).
        scale: of the result.
    """

    squares: Tensor
    scale: float

    def apply(self, b: Directions) -> Directions:
        parts = self.squares.split([block.size for block in b.blocks])
        by = {
            block.name: (self.scale / (part + self.damping[block.name])).view(block.sides)
            for block, part in zip(b.blocks, parts, strict=True)
        }
        return b.dense().multiply(lambda name: by[name])


@dataclass(frozen=True)
class DiagonalSolver(Solver):
    """The empirical diagonal."""

    scale: float = 1.0

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        total = torch.cat([g.dense().flatten().square() for g in gradients_of(curvature)]).mean(0)
        return Diagonal(curvature, Damping.of(damping).resolve(curvature), total, self.scale)


def gradients_of(curvature: Curvature):
    lib = curvature.problem
    for _, batch in lib.batches():
        yield lib.loss_gradients(batch)


def test_an_inverse_of_ones_own_is_saved_and_loaded_by_its_fields(tmp_path, monkeypatch):
    p = problem("mlp")
    influence = Influence(DiagonalSolver(scale=2.0), DAMPING)
    fit = influence.fit(p.model, p.task, p.train)
    wanted = fit.score(p.queries)
    diagonal = p.loss_gradients().square().mean(0) + DAMPING
    torch.testing.assert_close(
        wanted.values, 2 * (p.measurement_gradients() / diagonal) @ p.loss_gradients().T, **TIGHT
    )
    fit.save(tmp_path / "fit")

    monkeypatch.setattr(DiagonalSolver, "fit", None)  # nothing is fitted again
    again = problem("mlp")
    loaded = influence.load(tmp_path / "fit", again.model, again.task, again.train)
    assert isinstance(loaded.inverse, Diagonal) and loaded.inverse.scale == 2.0
    assert torch.equal(loaded.inverse.squares, fit.inverse.squares)
    assert torch.equal(loaded.score(p.queries).values, wanted.values)
    with pytest.raises(ArtefactError, match="was made for another solver"):
        Influence(DiagonalSolver(), DAMPING).load(tmp_path / "fit", again.model, again.task, again.train)
