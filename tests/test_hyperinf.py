"""Schulz's iteration, DataInf and HyperINF against dense matrices written out, and the identities of their papers."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import solving
import wherefrom
from problems import TinyProblem, problem
from solving import close, library
from wherefrom import (
    GGN,
    ConvergenceWarning,
    Damping,
    DataInf,
    DivergenceError,
    EmpiricalFisher,
    Exact,
    Hessian,
    HyperINF,
    InputError,
    Problem,
    Regression,
    UnsupportedError,
)
from wherefrom.solvers.schulz import cholesky, predict_steps, schulz, upper_bound
from wherefrom.testing import check_solver

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
ROOT = Path(__file__).resolve().parent.parent
SOME = ("mlp", "masked_sequence", "tied_embedding", "cnn_groups", "odd_parameters", "positions")


def spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric matrix of these eigenvalues in random directions."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=rng).double())[0]
    m = (q * values.double()) @ q.T
    return (m + m.T) / 2


def gram(d: int, n: int, damping: float, seed: int = 0) -> torch.Tensor:
    """(1/n) sum of s s^T + damping: the smallest eigenvalue is the damping, d - n times."""
    s = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()
    return s.T @ s / n + damping * torch.eye(d).double()


# --- Schulz's iteration ---


@pytest.mark.parametrize("order", [2, 3])
def test_the_residual_is_raised_to_a_power_in_each_step(order):
    A = gram(24, 10, 0.05)
    eye, before = torch.eye(24).double(), None
    for steps in range(1, 9):
        found = schulz(A, 0.05, tolerance=1e-300, steps=steps, order=order, mixed=False)
        r = eye - A @ found.x
        assert found.steps == steps and found.residuals.shape == (steps + 1,)
        assert float(found.residuals[-1]) == pytest.approx(float(r.norm()), rel=1e-9)
        if before is not None and float(r.norm()) > 1e-6:
            close(r, torch.linalg.matrix_power(before, order), 1e-8)
        close(found.x, found.x.T, 1e-12)
        close(found.x @ A, A @ found.x, 1e-10)
        before = r


@pytest.mark.parametrize(("d", "n", "damping"), [(128, 50, 0.01), (128, 50, 1.0), (64, 200, 0.5), (200, 20, 1e-4)])
@pytest.mark.parametrize("order", [2, 4])
def test_the_number_of_steps_is_known_in_advance(d, n, damping, order):
    A = gram(d, n, damping)
    lower = damping if d > n else float(torch.linalg.eigvalsh(A)[0])
    wanted = predict_steps(lower, float(upper_bound(A)), 1e-9, d, order)
    found = schulz(A, lower, tolerance=1e-9, order=order, mixed=False)
    assert found.steps == wanted and float(found.residuals[-1]) <= 1e-9
    # the formula, written out
    upper = float(upper_bound(A))
    rho = (upper - lower) / (upper + lower)
    assert math.sqrt(d) * rho ** (order**wanted) <= 1e-9 < math.sqrt(d) * rho ** (order ** (wanted - 1))


def test_the_bound_is_above_every_eigenvalue_and_tight_where_one_of_the_three_is():
    for seed in range(5):
        A = gram(40, 5 + 20 * seed, 0.1, seed)
        assert float(torch.linalg.eigvalsh(A)[-1]) <= float(upper_bound(A))
    assert float(upper_bound(3 * torch.eye(7))) == 3  # row sum
    v = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    assert float(upper_bound(torch.outer(v, v))) == pytest.approx(float(v @ v))  # trace


def test_a_small_multiple_of_the_identity_approaches_from_below():
    A = gram(20, 8, 0.1)
    exact, c = torch.linalg.inv(A), 0.9 / float(torch.linalg.eigvalsh(A)[-1])
    for steps in range(1, 6):
        x = schulz(A, 0.1, start=c, steps=steps).x
        assert float(torch.linalg.eigvalsh(exact - (x + x.T) / 2)[0]) > -1e-10


def test_the_papers_start_diverges_beyond_an_eigenvalue_of_4000_and_ours_does_not():
    A = spectrum(torch.cat([torch.linspace(0.01, 10, 63), torch.tensor([5000.0])]))
    with pytest.raises(DivergenceError, match=r"diverged.*grew from .* to .* at step \d+.*start of c I.*4\.\de-04"):
        schulz(A, 0.01, start=5e-4)
    with pytest.raises(DivergenceError, match="diverged"):
        schulz(A, 0.01, start=5e-4 * torch.eye(64).double())
    found = schulz(A, 0.01)
    close(found.x, torch.linalg.inv(A), 1e-9)
    slow = schulz(spectrum(torch.linspace(0.01, 10, 64)), 0.01, start=5e-4)  # and is slow below
    assert float(slow.residuals[20]) > 1e-3 and float(slow.residuals[-1]) < 1e-9


def test_a_matrix_that_is_not_positive_definite_is_named():
    A = spectrum(torch.tensor([-0.5, 0.3, 1.0, 2.0]))
    with pytest.raises(DivergenceError, match="not positive definite.*raise the damping"):
        schulz(A, 0.1)
    with pytest.raises(DivergenceError, match="pivot that is not positive.*raise the damping"):
        cholesky(A)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_float32_matrices_get_inverses_of_float64_quality(condition):
    A = spectrum(0.01 * torch.logspace(0, math.log10(condition), 48)).float()
    A = (A + A.T) / 2
    lower = 0.5 * float(torch.linalg.eigvalsh(A.double())[0])
    found = schulz(A, lower)
    assert found.x.dtype == torch.float64
    values, q = torch.linalg.eigh(A.double())
    close(found.x, (q / values) @ q.T, 1e-10)
    assert float(found.residuals[-1]) < max(1e-10, 1e-15 * condition)
    assert float(found.residuals[-1]) == pytest.approx(float((torch.eye(48) - A.double() @ found.x).norm()), rel=1e-6)


def test_few_steps_are_in_float64(monkeypatch):
    """As the residual is squared, one to three steps polish what float32 leaves."""
    used = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: used.append(a.dtype) or matmul(a, b))
    A = spectrum(torch.logspace(-2, 1, 64))
    found = schulz(A, 0.01)
    double = used.count(torch.float64)
    assert used.count(torch.float32) > 10 and double <= 1 + 1 + 2 * 3  # two residuals, three steps
    used.clear()
    alone = schulz(A, 0.01, mixed=False)
    assert torch.float32 not in used
    close(found.x, alone.x, 1e-12)
    assert abs(found.steps - alone.steps) <= 1


def test_where_float32_cannot_follow_all_is_done_in_float64():
    A = spectrum(torch.logspace(-9, 1, 40, dtype=torch.float64))
    found, alone = schulz(A, 1e-9), schulz(A, 1e-9, mixed=False)
    torch.testing.assert_close(found.x, alone.x, rtol=0, atol=0)
    # as good as a factorisation at this condition number, and not stuck above it
    assert float(found.residuals[-1]) < 5 * float(cholesky(A).residuals[-1]) < 1e-4


def test_matrices_of_a_batch_are_inverted_as_if_alone():
    A = torch.stack([gram(12, n, 0.1, n) * scale for n, scale in ((3, 1), (20, 100), (12, 1e-2))])
    found = schulz(A, 1e-3)
    assert found.x.shape == (3, 12, 12) and found.residuals.shape == (found.steps + 1, 3)
    for a, x in zip(A, found.x, strict=True):
        close(x, torch.linalg.inv(a), 1e-9)
        close(x, schulz(a, 1e-3).x, 1e-9)


def test_a_near_inverse_is_a_start_of_few_steps():
    A = gram(30, 12, 0.1)
    near = schulz(A + 0.01 * torch.eye(30).double(), 0.11).x
    found = schulz(A, 0.1, start=near)
    assert found.steps < schulz(A, 0.1).steps - 5
    close(found.x, torch.linalg.inv(A), 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": torch.ones(3, 4)}, "A must be square"),
        ({"A": torch.ones(3, 3, dtype=torch.long)}, "A must be square floating-point.*int64"),
        ({"A": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, "A must be symmetric and finite"),
        ({"A": torch.tensor([[math.nan, 0.0], [0.0, 1.0]])}, "A must be symmetric and finite"),
        ({"lower": 0.0}, "lower must be positive, got 0"),
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"order": 1}, "order and steps must be at least 2 and 1"),
        ({"steps": 0}, "order and steps must be at least 2 and 1"),
    ],
)
def test_bad_arguments_of_schulz_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        schulz(**({"A": torch.eye(3), "lower": 0.1} | arguments))


# --- dense references ---


def entries(p: TinyProblem, block) -> torch.Tensor:
    """Where a block's parameters lie in the flat D."""
    return torch.cat([torch.arange(p.dim)[p.slices[q]] for q in block.shapes])


def weighted_rows(p: TinyProblem, curvature) -> torch.Tensor:
    """Rows whose squares sum to each example's matrix: (N, R, D)."""
    if curvature is EmpiricalFisher:
        return p.loss_gradients().unsqueeze(1)
    values, u = torch.linalg.eigh(p.output_hessians())
    return torch.einsum("nk,nlk,nld->nkd", values.clamp(min=0).sqrt(), u, p.jacobian())


def applied(p: TinyProblem, inverse, b: torch.Tensor) -> torch.Tensor:
    return p.flatten(solving.solve(inverse, p.unflatten(b), certify=False).x)


def as_matrix(p: TinyProblem, inverse) -> torch.Tensor:
    """The inverse written out, (D, D)."""
    return applied(p, inverse, torch.eye(p.dim).double())


def mean_of_inverses(p: TinyProblem, lib: Problem, rows: torch.Tensor, damping: dict[str, float]) -> torch.Tensor:
    """Block by block, the mean over examples of (B_n^T B_n + damping)^-1, (D, D)."""
    out = torch.zeros(p.dim, p.dim).double()
    for block in lib.blocks:
        i = entries(p, block)
        b = rows[:, :, i]
        matrices = b.mT @ b + damping[block.name] * torch.eye(len(i)).double()
        out[i.unsqueeze(1), i] = torch.linalg.inv(matrices).mean(0)
    return out


def inverse_of_the_mean(p: TinyProblem, lib: Problem, matrix: torch.Tensor, damping: dict[str, float]) -> torch.Tensor:
    """Block by block, (C_l + damping)^-1, (D, D)."""
    out = torch.zeros(p.dim, p.dim).double()
    for block in lib.blocks:
        i = entries(p, block)
        out[i.unsqueeze(1), i] = torch.linalg.inv(
            matrix[i.unsqueeze(1), i] + damping[block.name] * torch.eye(len(i)).double()
        )
    return out


def gfim_solve(p, lib, rows, damping, b, side, drop_r=True) -> torch.Tensor:
    """HyperINF written out with loops over blocks and groups: (Q, D)."""
    out = torch.zeros_like(b)
    for block in lib.blocks:
        G, O, I = block.sides
        i = entries(p, block)
        M, v = matrices(p, block, rows.flatten(0, 1)), matrices(p, block, b)
        one = "input" if (side != "output" and I <= O) or side == "input" else "output"
        if block.matrix is None:
            one = "input" if I <= O else "output"
        x = torch.empty_like(v)
        for g in range(G):
            m = M[:, g] if one == "input" else M[:, g].mT  # (N R, other, d)
            A = (m.mT @ m).sum(0) / p.n / (1 if drop_r else m.shape[1])
            A = A + damping[block.name] * torch.eye(len(A)).double()
            w = v[:, g] if one == "input" else v[:, g].mT
            w = torch.linalg.solve(A, w.mT).mT
            x[:, g] = w if one == "input" else w.mT
        back = block.unpack(x)
        out[:, i] = torch.cat([back[q].flatten(1) for q in block.shapes], 1)
    return out


def matrices(p: TinyProblem, block, flat: torch.Tensor) -> torch.Tensor:
    """The block of flat vectors (Q, D) as (Q, G, O, I), with the bias as last column; plain for one linear layer."""
    named = p.unflatten(flat)
    found = block.pack({q: named[q] for q in block.shapes})
    if block.matrix and block.matrix[0] == 1 and len(block.shapes) == 2:
        weight, bias = (named[q] for q in block.shapes)
        assert torch.equal(found[:, 0], torch.cat([weight.flatten(2), bias.unsqueeze(2)], 2))
    return found


# --- DataInf ---


@pytest.mark.parametrize("curvature", [EmpiricalFisher, GGN])
@pytest.mark.parametrize("name", SOME)
def test_datainf_is_the_mean_of_the_inverses(name, curvature):
    p = problem(name)
    lib, rows = library(p, batch_size=4), weighted_rows(p, curvature)
    for damping in (0.05, Damping.relative(0.1)):
        inverse = DataInf().fit(curvature(lib), damping)
        wanted = mean_of_inverses(p, lib, rows, inverse.damping)
        b = torch.cat([p.measurement_gradients(), p.loss_gradients()[:2]])
        close(applied(p, inverse, b), b @ wanted)


def test_datainf_is_exact_for_one_example():
    """And for several of the same one."""
    p = problem("mlp")
    for copies in (1, 3):
        one = [t[2:3].expand(copies, *t.shape[1:]) for t in p.train]
        lib = Problem(p.model, p.task, tuple(one), progress=False)
        inverse = DataInf().fit(EmpiricalFisher(lib), 0.01)
        g = p.loss_gradients()[2:3]
        wanted = inverse_of_the_mean(p, lib, g.T @ g, inverse.damping)
        close(as_matrix(p, inverse), wanted)


@pytest.mark.parametrize("curvature", [EmpiricalFisher, GGN])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "norms"])
def test_datainf_is_never_below_the_exact_block_inverse(name, curvature):
    """The inverse is operator convex: the mean of inverses is above the inverse of the mean."""
    p = problem(name)
    lib = library(p)
    matrix = p.empirical_fisher() if curvature is EmpiricalFisher else p.ggn()
    inverse = DataInf().fit(curvature(lib), Damping.relative(0.1))
    exact = inverse_of_the_mean(p, lib, matrix, inverse.damping)
    excess = as_matrix(p, inverse) - exact
    close(excess, excess.T)
    values = torch.linalg.eigvalsh((excess + excess.T) / 2)
    assert float(values[0]) > -1e-10 * float(exact.norm()) and float(values[-1]) > 0.01 * float(exact.norm())


def test_the_published_damping_is_relative():
    p = problem("mlp")
    lib = library(p)
    damping = DataInf().fit(EmpiricalFisher(lib), Damping.relative(0.1)).damping
    for block in lib.blocks:
        g = p.loss_gradients()[:, entries(p, block)]
        wanted = 0.1 * float(g.square().sum()) / (p.n * g.shape[1])
        assert damping[block.name] == pytest.approx(wanted)


# --- HyperINF ---


@pytest.mark.parametrize("options", [{}, {"side": "input"}, {"side": "output"}, {"drop_r": False}])
@pytest.mark.parametrize("curvature", [EmpiricalFisher, GGN])
@pytest.mark.parametrize("name", SOME)
def test_hyperinf_is_the_inverse_of_the_generalised_fisher_matrix(name, curvature, options):
    p = problem(name)
    lib, rows = library(p, batch_size=4), weighted_rows(p, curvature)
    for damping in (0.05, Damping.relative(0.1)):
        inverse = HyperINF(**options).fit(curvature(lib), damping)
        b = torch.cat([p.measurement_gradients(), p.loss_gradients()[:2]])
        wanted = gfim_solve(p, lib, rows, inverse.damping, b, **({"side": "auto"} | options))
        close(applied(p, inverse, b), wanted)


@pytest.mark.parametrize("inverse", ["schulz", "cholesky"])
@pytest.mark.parametrize("curvature", [EmpiricalFisher, GGN])
@pytest.mark.parametrize("name", SOME)
def test_the_fisher_version_is_the_block_diagonal_inverse(name, curvature, inverse):
    p = problem(name)
    lib = library(p, batch_size=4)
    matrix = p.empirical_fisher() if curvature is EmpiricalFisher else p.ggn()
    fitted = HyperINF(matrix="fim", inverse=inverse).fit(curvature(lib), Damping.relative(0.01))
    wanted = inverse_of_the_mean(p, lib, matrix, fitted.damping)
    b = torch.cat([p.measurement_gradients(), p.loss_gradients()[:2]])
    close(applied(p, fitted, b), b @ wanted)


def linear(n: int, inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> Problem:
    """Linear regression whose residuals are independent standard normal, so that gradients have independent rows."""
    rng = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, k, generator=rng).double() for k in (inputs, outputs))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(inputs, outputs, bias=bias).double()
    return Problem(model, Regression(), (x, model(x).detach() + noise / 2), progress=False)


def test_with_one_line_the_generalised_matrix_is_the_fisher_matrix():
    lib = linear(20, 5, 1)
    curvature = EmpiricalFisher(lib)
    b = {"weight": torch.randn(3, 1, 5).double(), "bias": torch.randn(3, 1).double()}
    full = solving.solve(HyperINF(matrix="fim").fit(curvature, 0.05), b).x
    exact = solving.solve(Exact(form="primal").fit(curvature, 0.05), b).x
    for options in ({"side": "input"}, {"side": "larger"}, {"side": "input", "drop_r": False}):
        found = solving.solve(HyperINF(**options).fit(curvature, 0.05), b).x
        for name in b:
            close(found[name], full[name])
            close(found[name], exact[name])


def test_with_independent_lines_the_generalised_matrix_over_r_tends_to_the_fisher_matrix():
    errors = []
    for n in (400, 25600):
        inverse = HyperINF(side="input", drop_r=False).fit(EmpiricalFisher(linear(n, 3, 4, bias=False)), 0.3)
        full = HyperINF(matrix="fim").fit(inverse.curvature, 0.3)
        b = {"weight": torch.eye(12).double().view(12, 4, 3)}
        found, wanted = solving.apply(inverse, b)["weight"], solving.apply(full, b)["weight"]
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[0] > 0.03 and errors[1] < errors[0] / 4  # a root of 64 is 8


def scores(p: TinyProblem, solver, damping=None, train=None, task=None, curvature=EmpiricalFisher) -> torch.Tensor:
    made = wherefrom.attribute(
        p.model,
        task or p.task,
        train=train or p.train,
        queries=p.queries,
        solver=solver,
        damping=damping or Damping.relative(0.1),
        curvature=curvature,
        progress=False,
    )
    return made.values


@pytest.mark.parametrize("options", [{}, {"matrix": "fim"}, {"side": "larger"}, {"drop_r": False}])
def test_schulz_and_cholesky_give_the_same_scores(options):
    for name in ("mlp", "masked_sequence"):
        p = problem(name)
        close(scores(p, HyperINF(**options)), scores(p, HyperINF(inverse="cholesky", **options)))


@pytest.mark.parametrize("solver", [DataInf(), HyperINF(), HyperINF(matrix="fim")])
def test_the_order_of_the_examples_does_not_matter(solver):
    p = problem("mlp")
    order = torch.randperm(p.n, generator=torch.Generator().manual_seed(3))
    moved = scores(p, solver, train=tuple(t[order] for t in p.train))
    close(moved, scores(p, solver)[:, order], 1e-10)


@pytest.mark.parametrize("solver", [DataInf(), HyperINF(), HyperINF(matrix="fim"), HyperINF(drop_r=False)])
def test_multiplying_all_losses_changes_no_score(solver):
    p = problem("mlp")

    class Scaled(type(p.task)):
        factor = 1.0

        def loss(self, outputs, batch):
            return self.factor * super().loss(outputs, batch)

        def measurement(self, outputs, batch):
            return self.loss(outputs, batch)

    class Times(Scaled):
        factor = 7.0

    close(scores(p, solver, task=Times()), scores(p, solver, task=Scaled()), 1e-9)
    absolute = scores(p, solver, 0.1, task=Times()) - scores(p, solver, 0.1, task=Scaled())
    assert float(absolute.norm()) > 1e-3, "with absolute damping they do change"


@pytest.mark.parametrize("solver", [DataInf(), HyperINF(matrix="fim")])
def test_scores_are_positive_where_the_example_helped(solver):
    """An example as its own query."""
    p = problem("mlp")
    task = type("Loss", (type(p.task),), {"measurement": lambda self, outputs, batch: self.loss(outputs, batch)})()
    same = {"train": p.train, "queries": p.train, "curvature": EmpiricalFisher, "progress": False}
    own = wherefrom.attribute(p.model, task, solver=solver, damping=0.1, **same).values
    assert (own.diagonal() > 0).all()


def test_loose_numbers_take_one_number_unless_the_larger_side_is_asked_for():
    p = problem("odd_parameters")
    lib = library(p)
    curvature = EmpiricalFisher(lib)
    loose = [b for b in lib.blocks if b.matrix is None]
    assert loose
    for side in ("auto", "input", "output"):
        inverse = HyperINF(side=side).fit(curvature, 0.1)
        for block in loose:
            g = p.loss_gradients()[:, entries(p, block)]
            assert inverse.inverses[block.name].shape == (1, 1, 1)
            assert float(inverse.inverses[block.name]) == pytest.approx(1 / (float(g.square().sum(1).mean()) + 0.1))
    inverse = HyperINF(side="larger").fit(curvature, 0.1)
    for block in loose:  # a 1 x d gradient: the Fisher matrix itself
        g = p.loss_gradients()[:, entries(p, block)]
        exact = torch.linalg.inv(g.T @ g / p.n + 0.1 * torch.eye(g.shape[1]).double())
        close(inverse.inverses[block.name][0], exact)


def test_the_sides_are_as_asked():
    p = problem("mlp")  # 8 x (5 + 1), 6 x (8 + 1), 4 x (6 + 1)
    lib = library(p)
    for side, widths in (("auto", [6, 6, 4]), ("larger", [8, 9, 7]), ("input", [6, 9, 7]), ("output", [8, 6, 4])):
        inverse = HyperINF(side=side).fit(EmpiricalFisher(lib), 0.1)
        assert [inverse.inverses[b.name].shape[-1] for b in lib.blocks] == widths


def test_another_damping_costs_no_pass(monkeypatch):
    p = problem("mlp")
    curvature = EmpiricalFisher(library(p))
    first = HyperINF().fit(curvature, 0.1)
    wanted = HyperINF().fit(EmpiricalFisher(library(p)), 0.01).inverses
    monkeypatch.setattr(curvature, "gradients", lambda: pytest.fail("a pass over the rows"))
    again = HyperINF().fit(curvature, 0.01)
    for name, x in wanted.items():
        close(again.inverses[name], x, 1e-12)
        assert float((first.inverses[name] - x).norm()) > 0


def test_the_report_has_the_worst_residual_and_the_most_steps():
    p = problem("mlp")
    curvature = EmpiricalFisher(library(p))
    inverse = HyperINF(tolerance=1e-9).fit(curvature, 1e-3)
    report = inverse.report()
    moments = curvature.cached(("second moments", tuple(inverse.sides.items())), lambda: pytest.fail("not kept"))
    worst = max(
        float((torch.eye(len(x[0])).double() - (moments[name][0] + 1e-3 * torch.eye(len(x[0])).double()) @ x[0]).norm())
        for name, x in inverse.inverses.items()
    )
    assert report["inverse residual"] == pytest.approx(worst, rel=1e-3) and worst < 1e-9
    assert 8 < report["inverse iterations"] < 40
    assert HyperINF(inverse="cholesky").fit(curvature, 1e-3).report()["inverse iterations"] == 0


def test_float32_models_get_the_same_scores():
    p = problem("masked_sequence")
    wanted = {solver: scores(p, solver) for solver in (DataInf(), HyperINF())}
    p.model.float()
    for solver, values in wanted.items():
        found = scores(p, solver)
        assert found.dtype == torch.float32
        close(found.double(), values, 1e-4)


# --- what is refused, and what is warned of ---


def test_matrices_that_do_not_fit_are_refused_with_their_size():
    p = problem("mlp")
    curvature = EmpiricalFisher(library(p))
    D = 9 * 6  # the largest block
    for solver in (HyperINF(matrix="fim", memory=1000), HyperINF(side="larger", memory=10)):
        with pytest.raises(UnsupportedError, match=r"needs [\d,]+ bytes, of which block \S+ takes [\d,]+.*allowed are"):
            solver.fit(curvature, 0.1)
    with pytest.raises(UnsupportedError, match=f"takes {64 * D**2:,}"):
        HyperINF(matrix="fim", memory=1000).fit(curvature, 0.1)


@pytest.mark.parametrize("solver", [DataInf(), HyperINF()])
def test_curvatures_without_rows_are_refused(solver):
    p = problem("mlp")
    with pytest.raises(UnsupportedError, match="per-example rows, which Hessian cannot give.*EmpiricalFisher"):
        solver.fit(Hessian(library(p)), 0.1)

    class Concave(type(p.task)):
        def loss(self, outputs, batch):
            return -super().loss(outputs, batch)

    with pytest.raises(UnsupportedError, match="weights of at least 0.*not convex.*EmpiricalFisher"):
        solving.solve(
            solver.fit(GGN(Problem(p.model, Concave(), p.train)), 0.1), p.unflatten(p.measurement_gradients())
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "full"}, "matrix must be one of 'gfim', 'fim', got 'full'"),
        ({"side": "left"}, "side must be one of 'auto', 'larger', 'input', 'output', got 'left'"),
        ({"inverse": "lu"}, "inverse must be one of 'schulz', 'cholesky', got 'lu'"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"memory": 0}, "memory must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        HyperINF(**options)


def test_a_condition_number_beyond_float64_is_said():
    p = problem("mlp")
    with pytest.warns(ConvergenceWarning, match=r"block \S+ has \|I - A X\| = .*Raise the damping"):
        inverse = HyperINF(matrix="fim").fit(EmpiricalFisher(library(p)), 1e-12)
    assert inverse.report()["inverse residual"] > 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HyperINF(matrix="fim").fit(EmpiricalFisher(library(p)), 1e-4)


# --- the contract ---


@pytest.mark.parametrize("curvature", [EmpiricalFisher, GGN])
@pytest.mark.parametrize("name", [*SOME, "norms", "reused_layer", "mlp_regression_scalar"])
def test_both_fulfil_the_contract(name, curvature):
    p = problem(name)
    for solver in (
        DataInf(),
        HyperINF(),
        HyperINF(side="larger", inverse="cholesky"),
        HyperINF(matrix="fim", drop_r=False),
    ):
        check_solver(solver, curvature(library(p, batch_size=4)), 0.1)


# --- the experiment ---


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["N(0,1)", "N(0.5,1)", "N(0,5)", "N(0.5,5)", "U(0,1)", "N(3,1)"])
@pytest.mark.parametrize("N", [200, 800])
def test_ours_converges_in_every_cell_of_the_convergence_test(N, distribution, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments.hyperinf.convergence import LIMIT, cell

    c, runs = cell(512, N, distribution, ("schulz", "schulz-paper", "datainf", "sor-1.5-printed"))
    close(c.m @ c.exact, c.v, 1e-9)
    assert runs["schulz"].errors[-1] < 1e-8 < LIMIT
    paper = runs["schulz-paper"]
    assert paper.errors[-1] == math.inf if distribution == "N(3,1)" else paper.errors[-1] < 1e-8
    assert runs["datainf"].errors[-1] > 0.1 and runs["sor-1.5-printed"].errors[-1] > 1
