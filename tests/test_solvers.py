"""Every solver against the dense damped solve at a small damping, and what each promises besides."""

import math
import warnings

import pytest
import torch

import solving
from problems import NAMES, TinyProblem, problem
from solving import close, dense, library, right_hand_sides
from wherefrom import (
    CG,
    EKFAC,
    GGN,
    KFAC,
    Classification,
    ConvergenceWarning,
    Damping,
    DivergenceError,
    Dual,
    EmpiricalFisher,
    Exact,
    Hessian,
    Identity,
    InputError,
    Neumann,
    Problem,
    UnsupportedError,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
DIRECT = {  # the answer itself, to 1e-8
    "primal": Exact(form="primal"),
    "dual": Exact(form="dual"),
    "kept": Dual(drop=0.0),
    "cg": CG(tolerance=1e-10, steps=3000),
    "cg-ekfac": CG(preconditioner=EKFAC(), tolerance=1e-10, steps=3000),
    "cg-kfac": CG(preconditioner=KFAC(labels="true"), tolerance=1e-10, steps=3000),
    "cg-dual": CG(preconditioner=Dual(), tolerance=1e-10),
}
SOME = ("mlp", "masked_sequence", "tied_embedding", "odd_parameters")  # and the quicker ones are SOME[::2]


def small(matrix: torch.Tensor, factor: float = 1e-4) -> float:
    return factor * float(matrix.diagonal().mean())


def solve(p: TinyProblem, inverse, b: torch.Tensor, **options) -> torch.Tensor:
    return p.flatten(solving.solve(inverse, p.unflatten(b), **options).x)


# --- exact answers ---


@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, solver) for solver in DIRECT for name in (SOME[::2] if solver.startswith("cg-") else NAMES)],
)
def test_exact_solvers_equal_the_dense_solve_at_small_damping(name, solver):
    p = problem(name)
    damping = small(p.ggn(), 1e-4 if "cg" not in solver else 1e-2)
    b = torch.cat([right_hand_sides(p, 2), p.measurement_gradients()])
    inverse = DIRECT[solver].fit(GGN(library(p, batch_size=4)), damping)
    close(solve(p, inverse, b), dense(p.ggn(), damping, b))
    close(solve(p, inverse, b[1:2]), dense(p.ggn(), damping, b[1:2]))


@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
def test_the_empirical_fisher_is_solved_exactly(solver):
    p = problem("mlp")
    b, damping = right_hand_sides(p), small(p.empirical_fisher(), 1e-3)
    inverse = DIRECT[solver].fit(EmpiricalFisher(library(p)), damping)
    close(solve(p, inverse, b), dense(p.empirical_fisher(), damping, b))


@pytest.mark.parametrize("solver", [Exact(), Exact(form="primal"), CG(tolerance=1e-10)])
def test_the_hessian_is_solved_exactly_where_it_can_be(solver):
    p = problem("mlp")
    b, lowest = right_hand_sides(p), float(torch.linalg.eigvalsh(p.hessian())[0])
    assert lowest < 0
    inverse = solver.fit(Hessian(library(p)), 0.05 - lowest)
    close(solve(p, inverse, b), dense(p.hessian(), 0.05 - lowest, b))


def test_an_indefinite_hessian_is_solved_by_exact_alone():
    p = problem("mlp")
    values = torch.linalg.eigvalsh(p.hessian())
    damping = -0.4 * float(values[0])
    b = right_hand_sides(p)
    close(solve(p, Exact().fit(Hessian(library(p)), damping), b), dense(p.hessian(), damping, b))
    with pytest.raises(DivergenceError, match="non-positive curvature.*[Rr]aise the damping, take the GGN"):
        solving.solve(CG(tolerance=1e-10).fit(Hessian(library(p)), damping), p.unflatten(b))


def test_a_singular_matrix_is_refused():
    p = problem("mlp")
    values = torch.linalg.eigvalsh(p.hessian())
    with pytest.raises(DivergenceError, match="singular.*Raise the damping"):
        Exact().fit(Hessian(library(p)), -float(values[0]))


@pytest.mark.parametrize("solver", [*DIRECT.values(), EKFAC(), KFAC(), Identity(), Neumann(batch=4, steps=20)])
@pytest.mark.parametrize("curvature", [GGN, EmpiricalFisher])
def test_the_certificate_is_the_true_residual(solver, curvature):
    p = problem("mlp")
    matrix = p.ggn() if curvature is GGN else p.empirical_fisher()
    b = right_hand_sides(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = solving.solve(solver.fit(curvature(library(p, batch_size=3)), 0.02), p.unflatten(b))
    x = p.flatten(solution.x)
    wanted = (b - x @ matrix - 0.02 * x).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(solution.residual, wanted, rtol=1e-6, atol=1e-12)


# --- damping ---


@pytest.mark.parametrize("solver", ["primal", "dual", "cg", "cg-ekfac", "cg-dual"])
@pytest.mark.parametrize("name", SOME[:3])
def test_relative_damping_is_a_diagonal_of_its_own_for_each_block(name, solver):
    p = problem(name)
    lib = library(p)
    shift = torch.empty(p.dim, dtype=torch.float64)
    for block in lib.blocks:
        entries = torch.cat([torch.arange(p.dim)[p.slices[q]] for q in block.shapes])
        shift[entries] = 0.1 * p.ggn().diagonal()[entries].mean()
    assert len(shift.unique()) > 1
    b = right_hand_sides(p)
    inverse = DIRECT[solver].fit(GGN(lib), Damping.relative(0.1))
    close(solve(p, inverse, b), dense(p.ggn(), shift, b))
    rows = lib.loss_gradients(lib.batch(range(4)))
    wanted = (p.loss_gradients()[:4] * dense(p.ggn(), shift, p.loss_gradients()[:4])).sum(1)
    close(inverse.self_influence(rows)[0], wanted)


@pytest.mark.parametrize("solver", [EKFAC(labels="true"), KFAC(labels="true")])
def test_relative_damping_enters_the_eigenvalues_of_each_block(solver):
    p = problem("mlp")
    curvature = GGN(library(p))
    relative, b = solver.fit(curvature, Damping.relative(0.1)), right_hand_sides(p)
    for block in curvature.problem.blocks:
        level = relative.damping[block.name]
        layer = torch.cat([p.ggn().diagonal()[p.slices[q]] for q in block.shapes])
        mean = float(layer.mean())
        assert level == pytest.approx(0.1 * mean, rel=1e-9)
        absolute = solver.fit(curvature, level)
        first, second = (solving.solve(i, p.unflatten(b), certify=False).x for i in (relative, absolute))
        for name in block.shapes:
            torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-12)


def test_training_implies_a_damping():
    assert Damping.from_training(0.1, 1000, segments=1).value == pytest.approx(1 / (0.1 * 1000))
    # the published values: digits and MNIST (ASTRA, table 3)
    assert Damping.from_training(0.03, 1000, momentum=0.9).value == pytest.approx(0.01)
    assert Damping.from_training(0.03, 1920, momentum=0.9).value == pytest.approx(0.0052, rel=2e-2)
    assert Damping.from_training([0.2, 0.1, 0.0], 30).value == pytest.approx(3 / (0.1 * 30))
    assert "lr=0.1" in Damping.from_training(0.1, 10).origin and "steps=10" in repr(Damping.from_training(0.1, 10))
    assert Damping.of(0.3) == Damping.absolute(0.3) and Damping.of(Damping.relative(0.2)) == Damping.relative(0.2)
    curvature = GGN(library(problem("mlp")))
    resolved = Damping.of(0.3).resolve(curvature)
    assert set(resolved.values()) == {0.3} and list(resolved) == [block.name for block in curvature.problem.blocks]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Damping.of(0.0), "damping must be a positive finite number, got 0.0.*from_training"),
        (lambda: Damping.of(-1), "positive finite number, got -1"),
        (lambda: Damping.of(math.nan), "positive finite number, got nan"),
        (lambda: Damping.of(math.inf), "positive finite number, got inf"),
        (lambda: Damping.of(True), "damping must be a positive number or a wherefrom.Damping, got True"),
        (lambda: Damping.of("0.1"), "damping must be a positive number or a wherefrom.Damping, got '0.1'"),
        (lambda: Damping.relative(0.0), "damping must be a positive finite number"),
        (lambda: Damping.from_training(0.1, 0), "steps must be a positive number of optimiser steps, got 0"),
        (lambda: Damping.from_training(0.0, 10), "lr must be a positive learning rate"),
        (lambda: Damping.from_training([], 10), "lr must be a positive learning rate"),
        (lambda: Damping.from_training(0.1, 10, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_dampings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- self-influence ---


@pytest.mark.parametrize(
    "solver",
    [*DIRECT.values(), Dual(), Identity(), KFAC(), EKFAC(), EKFAC(labels="true"), Neumann(batch=4, steps=9)],
)
@pytest.mark.parametrize("name", SOME[:3])
def test_self_influence_is_the_quadratic_form(name, solver):
    p = problem(name)
    lib = library(p)
    inverse = solver.fit(GGN(lib), 0.5)
    rows = lib.loss_gradients(lib.batch(range(5)))
    g = p.loss_gradients()[:5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        wanted = (g * solve(p, inverse, g, certify=False)).sum(1)
        close(inverse.self_influence(rows)[0], wanted)
    if solver in DIRECT.values():
        close(inverse.self_influence(rows)[0], (g * dense(p.ggn(), 0.5, g)).sum(1))


# --- the pruned dual ---


@pytest.mark.parametrize("drop", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["mlp", "logistic", "masked_sequence", "norms"])
def test_the_pruned_dual_bounds_the_condition_number(name, drop):
    p = problem(name)
    damping = 3 * small(p.ggn(), 1e-1)
    inverse = Dual(drop=drop).fit(GGN(library(p)), damping)
    assert 0 <= inverse.dropped <= drop
    P = solve(p, inverse, torch.eye(p.dim, dtype=torch.float64))  # the preconditioner's inverse, symmetric
    close(P, P.T)
    root = torch.linalg.cholesky(p.ggn() + damping * torch.eye(p.dim).double())
    values = torch.linalg.eigvalsh(root.T @ P @ root)
    assert float(values[0]) >= 1 - 1e-8
    assert float(values[-1]) <= 1 + drop + 1e-8
    if drop == 10:
        assert not inverse.kept.all() and float(values[-1]) > 1.01, "nothing was dropped: the test says nothing"


def test_the_largest_rows_that_fit_are_kept():
    p = problem("mlp")
    full = Dual(drop=0.0).fit(GGN(library(p)), 0.1)
    few = Dual(drop=0.0, memory=8 * 10**2).fit(GGN(library(p)), 0.1)
    assert int(full.kept.sum()) > 10 and int(few.kept.sum()) == 10
    curvature = GGN(library(p))
    sizes = torch.cat([rows.square_norms().double() * rows.weights for rows in curvature.gradients()])
    assert float(sizes[few.kept].min()) >= float(sizes[~few.kept].max())


def test_a_dual_that_may_drop_everything_is_nearly_the_identity_over_the_damping():
    p = problem("mlp")
    b = right_hand_sides(p)
    inverse = Dual(drop=1e12).fit(GGN(library(p)), 0.1)
    assert int(inverse.kept.sum()) <= 1
    forms = (solve(p, inverse, b) * b).sum(1) * 0.1 / b.square().sum(1)
    assert (forms > 0.5).all() and (forms <= 1 + 1e-12).all()


# --- conjugate gradients ---


def test_converged_queries_are_frozen():
    p = problem("mlp")
    values, directions = torch.linalg.eigh(p.ggn())
    b = torch.cat([directions[:, -1:].T, right_hand_sides(p, 1), torch.zeros(1, p.dim).double()])
    inverse = CG(tolerance=1e-6).fit(GGN(library(p)), 0.05)
    solution = solving.solve(inverse, p.unflatten(b))
    assert solution.history.shape == (solution.steps + 1, 3) and solution.steps > 3
    assert solution.history[1, 0] < 1e-6, "an eigenvector takes one step"
    assert (solution.history[1:, 0] == solution.history[1, 0]).all()
    assert (solution.history[1:, 2] == 0).all() and p.flatten(solution.x)[2].abs().max() == 0
    close(p.flatten(solution.x)[:1], b[:1] / (values[-1] + 0.05), 1e-6)
    assert solution.converged.all() and (solution.residual <= 1e-6).all()
    assert solution.passes == solution.steps + 1


def test_queries_that_miss_the_tolerance_are_named():
    p = problem("mlp")
    b = torch.cat([torch.zeros(1, p.dim).double(), right_hand_sides(p, 2)])
    inverse = CG(tolerance=1e-8, steps=2).fit(GGN(library(p)), 1e-4)
    with pytest.warns(ConvergenceWarning, match=r"2 of 3 queries did not converge.*for queries \[1, 2\].*Allow more"):
        solution = solving.solve(inverse, p.unflatten(b))
    assert solution.converged.tolist() == [True, False, False] and solution.steps == 2


def test_a_good_preconditioner_needs_few_steps():
    p = problem("mlp")
    b, damping = p.unflatten(right_hand_sides(p)), small(p.ggn(), 1e-2)
    steps = {}
    for name, inner in (("none", Identity()), ("dual", Dual(drop=1.0)), ("exact", Exact())):
        steps[name] = solving.solve(CG(preconditioner=inner, tolerance=1e-8).fit(GGN(library(p)), damping), b).steps
    assert steps["exact"] == 1
    assert steps["dual"] <= 12 < steps["none"]  # condition number 2: a factor 0.17 a step


# --- what is refused ---


@pytest.mark.parametrize("solver", [Dual(), Exact(form="dual"), CG(preconditioner=Dual())])
def test_rows_are_asked_of_a_curvature_that_has_them(solver):
    curvature = Hessian(library(problem("mlp")))
    with pytest.raises(UnsupportedError, match="Dual needs per-example rows, which Hessian cannot give.*matrix-vector"):
        solver.fit(curvature, 0.1)


def test_exact_says_how_much_memory_it_would_need():
    p = problem("mlp")
    for form in ("auto", "primal", "dual"):
        with pytest.raises(
            UnsupportedError, match=r"Exact \(\w+\) needs 0.0 GiB for \d+ x \d+.*allowed are 0.0 GiB.*CG"
        ):
            Exact(form=form, memory=1000).fit(GGN(library(p)), 0.1)
    with pytest.raises(UnsupportedError, match=f"for {p.dim} x {p.dim} matrices"):
        Exact(form="primal", memory=3 * 8 * p.dim**2 - 1).fit(GGN(library(p)), 0.1)
    Exact(form="primal", memory=3 * 8 * p.dim**2).fit(GGN(library(p)), 0.1)


def test_exact_takes_the_smaller_matrix():
    p = problem("mlp")  # 130 parameters, 11 x 4 rows
    assert type(Exact().fit(GGN(library(p)), 0.1)).__name__ == "DualInverse"
    p = problem("linear_regression")  # 21 parameters, 13 x 3 rows
    assert type(Exact().fit(GGN(library(p)), 0.1)).__name__ == "SpectralInverse"


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="form must be 'auto', 'primal' or 'dual', got 'both'"):
        Exact(form="both").fit(GGN(library(problem("mlp"))), 0.1)  # type: ignore[arg-type]


def test_a_preconditioner_must_be_an_instance():
    with pytest.raises(InputError, match="preconditioner must be.*EKFAC"):
        CG(preconditioner=EKFAC)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="preconditioner must be.*EKFAC"):
        Neumann(preconditioner=EKFAC)  # type: ignore[arg-type]


def test_a_solution_that_is_not_finite_raises():
    p = problem("mlp")
    b = right_hand_sides(p)
    b[1, 0] = math.nan
    for solver in (Identity(), EKFAC(), Exact()):
        with pytest.raises(DivergenceError, match=r"NaN or infinity for queries \[1\].*raise the damping"):
            solving.solve(solver.fit(GGN(library(p)), 0.1), p.unflatten(b))


def test_another_damping_costs_no_pass(monkeypatch):
    p = problem("mlp")
    curvature = GGN(library(p))
    for solver in (EKFAC(), KFAC(), Exact(form="primal")):
        solver.fit(curvature, 0.1)
        with monkeypatch.context() as m:
            m.setitem(vars(curvature.problem), "gradients", lambda *_: pytest.fail("a pass over the data"))
            solver.fit(curvature, 0.01)


def test_dual_refuses_a_loss_that_is_not_convex():
    p = problem("mlp")

    class Concave(type(p.task)):
        def loss(self, outputs, batch):
            return -super().loss(outputs, batch)

    for solver in (Dual(), Exact(form="dual")):
        with pytest.raises(UnsupportedError, match="positive semi-definite"):
            solver.fit(GGN(Problem(p.model, Concave(), p.train)), 0.1)


def test_a_certificate_prints_as_a_short_table():
    p = problem("mlp")
    inverse = Exact().fit(GGN(library(p)), 0.1)
    x, certificate = inverse.solve(solving.directions(inverse, p.unflatten(right_hand_sides(p))))
    assert "3 right-hand sides" in str(certificate) and "3 converged" in str(certificate)
    assert len(x) == 3


def test_dual_is_not_misled_by_the_rounding_of_a_zero_eigenvalue():
    """All logits together move a thousand times as far as their differences: a zero eigenvalue, large gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight.add_(1000 * torch.randn(1, 6))
    curvature = GGN(Problem(model, Classification(), (torch.randn(40, 4), torch.randint(3, (40,)))))
    shares = torch.cat([rows.square_norms().double() * rows.weights for rows in curvature.gradients()])
    assert float(shares.min()) < -1e-6 * float(shares.max()) and curvature.psd
    b = {name: torch.randn(2, *shape) for name, shape in curvature.problem.shapes.items()}
    assert (solving.solve(CG(Dual(), tolerance=1e-2).fit(curvature, 0.1), b).residual <= 1e-2).all()


def test_dampings_of_layers_that_are_swapped_are_not_confused():
    p = problem("mlp")
    curvature, b = GGN(library(p)), right_hand_sides(p)
    blocks = curvature.problem.blocks
    for order in (1, -1):
        damping = {block.name: 0.05 * 3 ** (i * order) for i, block in enumerate(blocks)}
        inverse = Exact(form="primal").fit(curvature, Damping.by_block(damping))
        wanted = torch.linalg.solve(p.ggn() + torch.diag(solving.diagonal(inverse)), b.T).T
        close(solve(p, inverse, b), wanted)


def test_cg_raises_for_a_right_hand_side_that_is_not_finite():
    p = problem("mlp")
    b = right_hand_sides(p)
    b[1, 0] = math.nan
    for block in (False, True):
        with pytest.raises(DivergenceError, match=r"NaN or infinity for queries \[1\]"):
            solving.solve(CG(block=block).fit(GGN(library(p)), 0.1), p.unflatten(b))
