"""The solver that chooses: what it chooses and says, what it falls back on, and that the answer is right anyway."""

import dataclasses
import functools
import logging
import warnings

import pytest
import torch

import solving
from problems import TinyProblem, problem
from solving import close, dense, library, right_hand_sides
from wherefrom import (
    CG,
    EKFAC,
    GGN,
    Auto,
    Classification,
    ConvergenceWarning,
    Damping,
    DivergenceError,
    Dual,
    EmpiricalFisher,
    Exact,
    Hessian,
    Influence,
    InputError,
    Nystrom,
    Problem,
    UnsupportedError,
    attribute,
    records,
)
from wherefrom.curvature import Need
from wherefrom.methods.influence import GIVEN
from wherefrom.solvers import auto
from wherefrom.solvers.cg import ConjugateGradients

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
TIGHT = 1e-6


class Products(GGN):
    """Nothing but products."""

    @property
    def offers(self):
        return frozenset({Need.MATVEC})


def small(matrix: torch.Tensor, factor: float = 1e-2) -> float:
    return factor * float(matrix.diagonal().mean())


def residual(p: TinyProblem, matrix: torch.Tensor, damping: float, x, b: torch.Tensor) -> torch.Tensor:
    """|(C + damping) x - b| / |b|, densely."""
    flat = p.flatten(x)
    return (b - flat @ matrix - damping * flat).norm(dim=1) / b.norm(dim=1)


def solvers(inverse) -> list:
    return [inverse.chosen, *inverse.others]


def fitted(inverse) -> list:
    """Those of them that had to be fitted."""
    return [inverse.chosen, *(inverse.others[i - 1] for i in sorted(inverse._fits))]


def tight(p: TinyProblem) -> int:
    """Memory for 20 directions and no more: on these problems, too few for an answer in one step."""
    return 20 * 6 * 8 * p.dim


def begin_with(inverse, solver):
    first = solver.fit(inverse.curvature, Damping.by_block(inverse.damping))
    return dataclasses.replace(inverse, chosen=solver, why="the test says so", first=first)


@pytest.fixture
def large(monkeypatch):
    """Every problem counts as one whose matrix is not decomposed at once."""
    monkeypatch.setattr(auto, "SMALL", 0)


@pytest.fixture
def hasty(monkeypatch):
    """Conjugate gradients get one step, and the dual a few rows."""
    monkeypatch.setattr(auto, "SMALL", 0)
    monkeypatch.setattr(auto, "STEPS", 1)
    monkeypatch.setattr(auto, "Dual", functools.partial(Dual, drop=1000.0))


# --- what is chosen ---


@pytest.mark.parametrize("curvature", [GGN, EmpiricalFisher, Hessian, Products])
def test_a_small_problem_is_solved_exactly(curvature):
    p = problem("mlp")
    inverse = Auto().fit(curvature(library(p)), 1.0)
    assert solvers(inverse) == [Exact(memory=4e9)]
    assert "is decomposed in seconds" in inverse.report()["because"]


def test_the_default_of_the_library_is_this_one():
    p = problem("mlp")
    scores = attribute(p.model, p.task, p.train, p.queries, damping=0.1)
    close(scores.values, p.exact_scores(p.ggn(), 0.1))
    assert scores.provenance["solver"] == repr(Auto()) and scores.provenance["tolerance"] == Auto().tolerance
    chosen = scores.provenance["chosen"]
    assert chosen["solver"] == repr(Exact(memory=4e9)) and chosen["because"].startswith("a 44 x 44 matrix")
    assert Influence().solver == "auto"


@pytest.mark.parametrize("curvature", [GGN, EmpiricalFisher])
def test_a_large_problem_is_solved_by_cg_with_nystrom_and_what_is_behind_it(curvature, large):
    p = problem("mlp")
    found = solvers(Auto(seed=7, seconds=1e9).fit(curvature(library(p)), 0.1))
    options = {"tolerance": 0.03, "steps": 50, "seconds": 1e9}
    assert found == [CG(Nystrom(200, 7), **options), CG(Dual(memory=1e9), **options), Exact(memory=4e9)]


def test_products_alone_leave_exact_behind(large):
    p = problem("mlp")
    found = solvers(Auto().fit(Products(library(p)), 0.1))
    assert found == [CG(Nystrom(200), tolerance=0.03, steps=50), Exact(memory=4e9)]


@pytest.mark.parametrize(
    ("curvature", "memory", "first", "why"),
    [
        (GGN, 124800, CG(Nystrom(20), tolerance=0.03, steps=50), "130 parameters: 20 directions"),
        (GGN, 1.2e5, CG(EKFAC(), tolerance=0.03, steps=50), "too little memory for a low-rank preconditioner"),
        (EmpiricalFisher, 1.2e5, CG(EKFAC(), tolerance=0.03, steps=50), "too little memory for a low-rank"),
        (Hessian, 1.2e5, CG(EKFAC(), tolerance=0.03, steps=50), "too little memory for a low-rank preconditioner"),
        (Products, 1.2e5, CG(tolerance=0.03, steps=50), "too little memory for a preconditioner, and no Kronecker"),
    ],
)
def test_short_memory_chooses_what_fits(curvature, memory, first, why, large):
    p = problem("mlp")
    b = right_hand_sides(p)
    inverse = Auto(memory=memory).fit(curvature(library(p)), 5.0)
    assert inverse.chosen == first and inverse.report()["because"].startswith(why)
    for solver in solvers(inverse)[1:]:
        assert solver in (CG(Dual(memory=memory / 4), 0.03, 50), Exact(memory=memory), CG(tolerance=0.03, steps=50))
    assert len(set(solvers(inverse))) == len(solvers(inverse))
    solution = solving.solve(inverse, p.unflatten(b))
    matrix = {GGN: p.ggn, Products: p.ggn, EmpiricalFisher: p.empirical_fisher, Hessian: p.hessian}[curvature]()
    assert (residual(p, matrix, 5.0, solution.x, b) <= 0.03).all() and solution.converged.all()


def test_exact_is_not_behind_where_it_does_not_fit(large):
    p = problem("mlp")
    side = p.n * 4
    for memory, there in ((3 * 8 * side**2, True), (3 * 8 * side**2 - 1, False)):
        found = solvers(Auto(memory=memory).fit(GGN(library(p)), 0.1))
        assert any(isinstance(s, Exact) for s in found) == there


@pytest.mark.parametrize(("needed", "first"), [(1.0, Nystrom(200)), (6.0, EKFAC())])
def test_short_time_chooses_what_is_quicker(needed, first, large, monkeypatch):
    asked = []
    monkeypatch.setattr(auto, "_estimate_seconds", lambda curvature, count: asked.append(count) or needed)
    p = problem("mlp")
    inverse = Auto(seconds=10.0).fit(GGN(library(p)), 0.1)
    assert asked == [200]
    assert inverse.chosen == CG(first, tolerance=0.03, steps=50, seconds=10.0)
    if first == EKFAC():
        assert "too little time (one pass with 200 directions takes 6 s)" in inverse.report()["because"]
    Auto().fit(GGN(library(p)), 0.1)
    assert asked == [200], "without a budget nothing is timed"


def test_the_time_of_a_pass_is_measured_on_products(monkeypatch):
    clock = iter(
        [0.0, 5.0, 10.0, 11.0, 20.0, 28.0]
    )  # 5 s to warm up, then 1 s with one right-hand side, 8 s with eight
    monkeypatch.setattr(auto.time, "perf_counter", lambda: next(clock))
    assert auto._estimate_seconds(GGN(library(problem("mlp"))), 200) == pytest.approx(1 + 199)


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"memory": -1.0}, {"seconds": 0.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be positive"):
        Auto(**options)


# --- the answer ---


@pytest.mark.parametrize("directions", [200, 20, 19])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "odd_parameters", "tied_embedding"])
def test_the_answer_is_within_the_tolerance_of_the_dense_one(name, directions, large):
    p = problem(name)
    memory = 4e9 if directions == 200 else tight(p) - (directions < 20)
    damping, b = small(p.ggn()), torch.cat([right_hand_sides(p, 3), p.measurement_gradients()])
    for tolerance in (0.03, 1e-9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            inverse = Auto(tolerance, memory).fit(GGN(library(p)), damping)
            solution = solving.solve(inverse, p.unflatten(b))
        inner = inverse.chosen.preconditioner
        assert inner == (Nystrom(directions) if directions >= 20 else EKFAC())
        true = residual(p, p.ggn(), damping, solution.x, b)
        torch.testing.assert_close(solution.residual, true, rtol=1e-6, atol=1e-12)
        met = true <= tolerance
        assert (solution.converged == met).all()
        assert met.all() or not any(isinstance(s, Exact) for s in solvers(inverse)), "Exact does, if it fits"
        assert solution.history.shape == (solution.steps + 1, len(b))
        close(
            p.flatten(solution.x)[met], dense(p.ggn(), damping, b)[met], 1e-5 if tolerance < 1e-6 else 100 * tolerance
        )
        close(p.flatten(solving.apply(inverse, p.unflatten(b))), p.flatten(solution.x), 1e-10)


@pytest.mark.parametrize("small_enough", [1500, 0])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence"])
def test_the_answer_does_not_depend_on_the_queries_solved_with_it(name, small_enough, monkeypatch):
    monkeypatch.setattr(auto, "SMALL", small_enough)
    p = problem(name)
    damping = small(p.ggn())
    b = torch.cat([right_hand_sides(p, 4), p.measurement_gradients(), torch.zeros(1, p.dim).double()])
    inverse = Auto(memory=tight(p) if not small_enough else 4e9).fit(GGN(library(p)), damping)
    solution = solving.solve(inverse, p.unflatten(b))
    x = p.flatten(solution.x)
    assert small_enough or solution.residual.max() > 1e-4, "two answers of rounding alone would agree anyway"
    for i in range(len(b)):
        close(p.flatten(solving.solve(inverse, p.unflatten(b[i : i + 1])).x), x[i : i + 1], 1e-10)
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
    for some, wanted in ((b[order], x[order]), (b[::2], x[::2])):
        close(p.flatten(solving.solve(inverse, p.unflatten(some)).x), wanted, 1e-10)


def test_the_answer_does_not_depend_on_the_queries_that_fall_back_with_it(hasty):
    p = problem("mlp")
    damping, b = small(p.ggn()), right_hand_sides(p, 4)
    inverse = Auto(TIGHT, tight(p)).fit(GGN(library(p)), damping)
    x = p.flatten(solving.solve(inverse, p.unflatten(b)).x)
    assert fitted(inverse) == solvers(inverse) and len(fitted(inverse)) == 3
    for i in range(4):
        close(p.flatten(solving.solve(inverse, p.unflatten(b[i : i + 1])).x), x[i : i + 1], 1e-10)


@pytest.mark.parametrize("small_enough", [1500, 0])
def test_relative_damping(small_enough, monkeypatch):
    monkeypatch.setattr(auto, "SMALL", small_enough)
    p = problem("mlp")
    b, inverse = right_hand_sides(p), Auto(1e-10).fit(GGN(library(p)), Damping.relative(0.1))
    assert len(set(inverse.damping.values())) == 3
    close(p.flatten(solving.solve(inverse, p.unflatten(b)).x), dense(p.ggn(), solving.diagonal(inverse), b), 1e-6)


def test_self_influence_and_scores(large):
    p = problem("mlp")
    scores = attribute(p.model, p.task, p.train, p.queries, solver=Auto(1e-10), damping=0.1, self_influence=True)
    close(scores.values, p.exact_scores(p.ggn(), 0.1))
    close(scores.self_influence, (p.loss_gradients() * dense(p.ggn(), 0.1, p.loss_gradients())).sum(1))


@pytest.mark.parametrize("small_enough", [1500, 0])
def test_a_right_hand_side_of_zero_is_solved(small_enough, monkeypatch):
    """As the gradient of a training example without labels is."""
    monkeypatch.setattr(auto, "SMALL", small_enough)
    p = problem("masked_sequence")
    g = p.loss_gradients()
    assert (g.norm(dim=1) == 0).any()
    inverse = Auto(TIGHT).fit(GGN(library(p)), 0.1)
    for b in (g, 0 * g):
        for certify in (True, False):
            solution = solving.solve(inverse, p.unflatten(b), certify)
            assert solution.converged.all() and solution.history.isfinite().all()
            assert (p.flatten(solution.x)[b.norm(dim=1) == 0] == 0).all()
    attribute(p.model, p.task, p.train, p.queries, damping=0.1, self_influence=True)  # an unconverged one would warn


# --- moving on ---


def test_an_unmet_tolerance_moves_on_and_ends_converged(hasty, caplog):
    p = problem("mlp")
    damping, b = small(p.ggn()), torch.cat([right_hand_sides(p), torch.zeros(1, p.dim).double()])
    solver = Auto(1e-9, tight(p))
    with caplog.at_level(logging.INFO, logger="wherefrom"):
        inverse = solver.fit(GGN(library(p)), damping)
        solution = solving.solve(inverse, p.unflatten(b))
    assert solution.converged.all() and (residual(p, p.ggn(), damping, solution.x, b)[:3] <= 1e-9).all()
    assert solution.history.shape == (solution.steps + 1, 4) and solution.history.isfinite().all()
    assert solution.steps == 3  # one of each CG, and the direct method's residual
    first, second, direct = solution.history[1:, :3].tolist()
    assert solution.history[0].tolist() == [1, 1, 1, 0]
    assert min(first) > 1e-9 and min(second) > 1e-9 and max(direct) <= 1e-9
    again = solver.fit(GGN(library(p)), damping)
    assert fitted(again) == [again.chosen] and fitted(inverse) == solvers(inverse)
    x = torch.zeros_like(b[:3])
    for i, said in enumerate((first, second)):
        left = b[:3] - x @ p.ggn() - damping * x
        x = x + p.flatten(solving.apply(again._inverse_of(i), p.unflatten(left)))
        wanted = residual(p, p.ggn(), damping, p.unflatten(x), b[:3])
        close(torch.tensor(said, dtype=torch.float64), wanted, 1e-9)  # of the query, not of what was left of it
    assert (solution.history[:, 3] == 0).all()
    report, lines = inverse.report(), [r.getMessage() for r in caplog.records if r.name == "wherefrom"]
    assert "Nystrom" in report["solver"] and "Dual" in report["if that fails"] and "Exact" in report["if that fails"]
    assert any("chose CG(preconditioner=Nystrom" in s and "130 parameters" in s for s in lines)
    moves = [s for s in lines if s.startswith("3 queries above 1e-09: going on with")]
    assert "Dual" in moves[0] and "Exact" in moves[1] and len(moves) == 2


def test_passes_count_those_of_all_solvers(hasty):
    p = problem("mlp")
    b, calls = p.unflatten(right_hand_sides(p)), []
    curvature = Products(library(p))
    inverse = Auto(1e-9).fit(curvature, small(p.ggn()))
    inverse = begin_with(inverse, CG(Nystrom(5), tolerance=1e-9, steps=1))
    inverse._inverse_of(1)  # Exact, which takes products to build its matrix
    product = curvature.product
    curvature.product = lambda *args: calls.append(1) or product(*args)
    # CG, what it left, Exact's residual, the certificate
    assert solving.solve(inverse, b).passes == len(calls) == 1 + 1 + 1 + 1


def test_only_the_queries_that_are_late_move_on(large, monkeypatch):
    p = problem("mlp")
    easy, hard = torch.linalg.eigh(p.ggn())[1][:, [-1]].T, right_hand_sides(p, 2)
    inverse = Auto(1e-5).fit(GGN(library(p)), small(p.ggn(), 1e-4))
    inverse = begin_with(inverse, CG(tolerance=1e-5, steps=3))  # one step is enough for an eigenvector
    counts, iterate = [], ConjugateGradients.iterate

    def counted(self, b):
        if self.solver != inverse.chosen:
            counts.append(len(b))
        return iterate(self, b)

    monkeypatch.setattr(ConjugateGradients, "iterate", counted)
    solution = solving.solve(inverse, p.unflatten(torch.cat([hard[:1], easy, hard[1:]])))
    assert counts == [2] and solution.converged.all()
    assert (solution.history[1:, 1] == solution.history[1, 1]).all() and solution.history[1, 1] < 1e-5


def test_the_report_and_the_provenance_name_what_stands_behind(hasty):
    p = problem("mlp")
    influence = Influence(Auto(1e-9, tight(p)), small(p.ggn())).fit(p.model, p.task, p.train)
    scores = influence.score(p.queries)
    chosen = scores.provenance["chosen"]
    assert chosen == influence.provenance()["chosen"], "it does not depend on what was solved for before"
    assert set(chosen) >= {"solver", "because", "if that fails", "directions"}
    assert "Dual" in chosen["if that fails"] and scores.history.shape == (scores.provenance["steps"] + 1, 3)
    close(scores.values, p.exact_scores(p.ggn(), small(p.ggn())), 1e-6)


def test_what_cannot_be_fitted_is_passed_over(hasty, monkeypatch, caplog):
    """A later choice that fails does not stand in the way of the ones behind it."""

    def refuse(*_):
        raise UnsupportedError("not today")

    monkeypatch.setattr(Dual, "fit", refuse)
    p = problem("mlp")
    damping, b = small(p.ggn()), right_hand_sides(p)
    curvature = GGN(library(p), "rows")
    inverse = Auto(1e-9, tight(p)).fit(curvature, damping)
    inverse = dataclasses.replace(inverse, others=(inverse.others[0], Exact(form="primal")))  # the dual is out of order
    with caplog.at_level(logging.INFO, logger="wherefrom"):
        solution = solving.solve(inverse, p.unflatten(b))
    assert solution.converged.all()
    close(p.flatten(solution.x), dense(p.ggn(), damping, b), 1e-7)
    assert "cannot solve this (not today): going on with Exact(form='primal'" in caplog.text
    assert solution.history.shape == (solution.steps + 1, 3) and fitted(inverse) == [inverse.chosen, inverse.others[1]]


def test_an_indefinite_hessian_ends_with_exact(large, caplog):
    p = problem("mlp")
    values = torch.linalg.eigvalsh(p.hessian())
    damping, b = -0.4 * float(values[0]), right_hand_sides(p)
    with caplog.at_level(logging.INFO, logger="wherefrom"):
        inverse = Auto(TIGHT).fit(Hessian(library(p)), damping)
    assert isinstance(inverse.chosen, Exact) and "Exact" in inverse.report()["solver"]
    assert "cannot be fitted (Nystrom needs a positive semi-definite curvature" in caplog.text
    assert "going on with Exact" in caplog.text and "chose Exact" in caplog.text
    solution = solving.solve(inverse, p.unflatten(b))
    assert solution.converged.all() and solution.history.shape == (solution.steps + 1, 3)
    close(p.flatten(solution.x), dense(p.hessian(), damping, b))


def test_an_indefinite_hessian_found_while_solving_ends_with_exact(large, caplog):
    """A preconditioner that fits says nothing of the matrix."""
    p = problem("mlp")
    damping, b = -0.4 * float(torch.linalg.eigvalsh(p.hessian())[0]), right_hand_sides(p)
    inverse = Auto(TIGHT, memory=1.2e5).fit(Hessian(library(p)), damping)
    assert inverse.chosen.preconditioner == EKFAC()
    inverse = dataclasses.replace(inverse, others=(Exact(),))
    with caplog.at_level(logging.INFO, logger="wherefrom"):
        solution = solving.solve(inverse, p.unflatten(b))
    assert "cannot solve this (CG met a direction of non-positive curvature" in caplog.text
    assert solution.converged.all() and solution.history.shape == (solution.steps + 1, 3)
    close(p.flatten(solution.x), dense(p.hessian(), damping, b))


def test_a_hessian_that_damping_makes_definite_is_solved_where_exact_does_not_fit(large):
    """Nystrom refuses the Hessian itself; products are enough for the damped one."""
    p = problem("mlp")
    damping, b = 0.2 - 1.5 * float(torch.linalg.eigvalsh(p.hessian())[0]), right_hand_sides(p)
    inverse = Auto(TIGHT, memory=3e5).fit(Hessian(library(p)), damping)
    assert solvers(inverse) == [CG(tolerance=TIGHT, steps=50)]
    solution = solving.solve(inverse, p.unflatten(b))
    assert solution.converged.all()
    close(p.flatten(solution.x), dense(p.hessian(), damping, b), 1e-5)


def test_the_last_choice_says_why_nothing_works(large):
    p = problem("mlp")
    damping = -0.4 * float(torch.linalg.eigvalsh(p.hessian())[0])
    inverse = Auto(TIGHT, memory=3e5).fit(Hessian(library(p)), damping)
    with pytest.raises(DivergenceError, match="non-positive curvature"):
        solving.solve(inverse, p.unflatten(right_hand_sides(p)))


def test_a_task_without_labels_to_draw_needs_no_kronecker_factors(large):
    class Bare:
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            return Classification().loss(outputs, batch)

    p = problem("mlp")
    curvature = GGN(Problem(p.model, Bare(), p.train, progress=False))
    with pytest.raises(UnsupportedError, match="does not say how to draw labels"):
        EKFAC().fit(curvature, 0.1)
    inverse = Auto(memory=1.2e5).fit(curvature, 0.1)
    assert isinstance(inverse.chosen.preconditioner, Dual)
    assert solving.solve(inverse, p.unflatten(right_hand_sides(p))).converged.all()


def test_a_budget_of_time_names_what_has_not_converged(large):
    p = problem("mlp")
    b = right_hand_sides(p)
    inverse = Auto(1e-9, seconds=1e-9).fit(GGN(library(p)), 1e-4)
    assert inverse.chosen.preconditioner == EKFAC() and len(solvers(inverse)) == 3
    with pytest.warns(ConvergenceWarning, match="3 of 3 queries did not converge"):
        solution = solving.solve(inverse, p.unflatten(b))
    assert fitted(inverse) == [inverse.chosen], "no time is left for another solver"
    assert solution.steps <= 1 and solution.history.shape == (solution.steps + 1, 3)


# --- files ---


@pytest.mark.parametrize(
    ("curvature", "memory", "slow", "first"),
    [
        (GGN, 4e9, False, "Nystrom"),
        (GGN, 4e9, True, "EKFAC"),
        (GGN, 1.2e5, False, "EKFAC"),
        (Products, 1.2e5, False, "Identity"),
        (Hessian, 4e9, False, "Exact"),
        (Hessian, 3e5, False, "Identity"),
    ],
)
def test_what_is_restored_is_what_was_chosen_without_timing(curvature, memory, slow, first, large, monkeypatch):
    p, solver = problem("mlp"), Auto(1e-4, memory, seconds=100.0)
    monkeypatch.setattr(auto, "_estimate_seconds", lambda *_: 1e9 if slow else 0.0)
    b, damping = p.unflatten(right_hand_sides(p)), 5.0
    inverse = solver.fit(curvature(library(p)), damping)
    assert type(getattr(inverse.chosen, "preconditioner", inverse.chosen)).__name__ == first
    x, (tensors, description) = p.flatten(solving.solve(inverse, b).x), records.describe(inverse, GIVEN)
    monkeypatch.setattr(auto, "_estimate_seconds", lambda *_: pytest.fail("timed"))
    with monkeypatch.context() as m:
        for fitted in (Nystrom, EKFAC, Exact):
            m.setattr(fitted, "fit", lambda *_: pytest.fail("fitted again"))
        restored = solving.restore(inverse, curvature(library(p)))
        assert restored.report() == inverse.report()
    assert solvers(restored) == solvers(inverse)
    close(p.flatten(solving.solve(restored, b).x), x, 1e-9)
    again, same = records.describe(restored, GIVEN)
    assert same == description and set(again) == set(tensors)
    assert all(torch.equal(again[path], t) for path, t in tensors.items())


# --- damping by block ---


def test_damping_by_block_is_what_it_says():
    p = problem("mlp")
    curvature = GGN(library(p))
    by_block = {block.name: 0.1 * (1 + i) for i, block in enumerate(curvature.problem.blocks)}
    damping = Damping.by_block(by_block)
    assert damping.resolve(curvature) == by_block and damping.value == max(by_block.values())
    assert "by block" in str(damping) and damping == Damping.by_block(dict(by_block))
    assert damping != Damping.by_block(by_block | {"0": 0.2})
    matrix = p.ggn() + torch.diag(solving.diagonal(Exact(form="primal").fit(curvature, damping)))
    scores = attribute(p.model, p.task, p.train, p.queries, damping=damping)
    close(scores.values, p.measurement_gradients() @ torch.linalg.solve(matrix, p.loss_gradients().T))
    assert scores.provenance["damping by block"] == by_block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "2"}, "a positive number for each block of parameters"),
        (lambda s: s | {"9": 0.1}, "a positive number for each block of parameters"),
        (lambda s: s | {"2": 0.0}, "a positive number for each block of parameters"),
        (lambda s: s | {"2": -0.1}, "a positive number for each block of parameters"),
        (lambda s: s | {"2": float("nan")}, "a positive"),
        (lambda s: s | {"2": float("inf")}, "a positive finite number"),
        (lambda s: dict.fromkeys(s, 0.0), "a positive finite number"),
        (lambda s: {}, "a positive number for each block of parameters"),
        (lambda s: dict.fromkeys(("2.weight", "2.bias"), 0.1), r"each block of parameters \(0, 2, 4\), got.*2.weight"),
    ],
)
def test_a_damping_by_block_that_does_not_fit_is_refused(change, message):
    curvature = GGN(library(problem("mlp")))
    by_block = {block.name: 0.1 for block in curvature.problem.blocks}
    with pytest.raises(InputError, match=message):
        Damping.by_block(change(by_block)).resolve(curvature)
