"""Spectra measured from products against dense ones: traces, norms, extreme eigenvalues, sampling gaps and sketches."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from problems import problem
from solving import each_ggn, library, normal
from wherefrom import GGN, Directions, Hessian, Problem, Regression, Spectrum, Task, spectrum
from wherefrom.curvature import lanczos as module
from wherefrom.curvature.lanczos import Estimate, arnoldi, embedding, sketch
from wherefrom.persample.blocks import Block

SHAPES = {"a": torch.Size([4, 3]), "b": torch.Size([28])}  # 40 numbers


def blocks(shapes=SHAPES) -> tuple[Block, ...]:
    """A block for each parameter, in whose matrix the numbers stand in the order of the parameter's."""
    return tuple(Block(name, {name: s}, (1, s[0]) if len(s) == 2 else None) for name, s in shapes.items())


def layout(shapes=SHAPES):
    """What a sketch asks of a problem."""
    like = {name: torch.empty(s, dtype=torch.float64) for name, s in shapes.items()}
    return SimpleNamespace(shapes=shapes, blocks=blocks(shapes), parameters=like)


def with_eigenvalues(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    return (q * values) @ q.T


def product(matrix: torch.Tensor, backwards: bool = False):
    """A symmetric matrix as a map of directions; ``backwards`` returns the blocks in another order."""

    def apply(v):
        out = Directions.unflatten(v.blocks, v.flatten() @ matrix)
        return Directions(v.blocks, dict(reversed(out.forms.items()))) if backwards else out

    return apply


def starting(seed: int = 1, shapes=SHAPES):
    return Directions.unflatten(blocks(shapes), normal(1, sum(s.numel() for s in shapes.values()), seed=seed))


def top(matrix: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def between(values: torch.Tensor, low: float, high: float) -> None:
    assert low <= float(values) <= high


# --- trace, Frobenius norm and sampling gap ---


@pytest.mark.parametrize("name", ["mlp", "linear_regression", "masked_sequence", "odd_parameters"])
@pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
def test_trace_and_norm_are_within_four_standard_errors(name):
    p = problem(name)
    C = p.ggn()
    found = spectrum(GGN(library(p)), seed=1)
    for estimate, exact, width in (
        (found.trace, float(C.trace()), 0.05),
        (found.square, float(C.square().sum()), 0.12),
    ):
        assert abs(estimate.value - exact) <= 4 * estimate.error
        assert estimate.error < width * exact, "too wide to say anything"
    assert (found.examples, found.parameters, found.batch) == (p.n, p.dim, p.n)


def test_the_standard_errors_are_honest():
    """Deviations in units of the reported error have a spread of about 1, over seeds."""
    p = problem("linear_regression")
    C, each = p.ggn(), each_ggn(p)
    gap = (each.square().sum((1, 2)).mean() - C.square().sum()) / C.trace().square()  # |B| tr(gap) / tr(C)^2
    curvature = GGN(library(p))
    found = [spectrum(curvature, probes=320, steps=3, seed=seed) for seed in range(60)]
    exact = {"trace": C.trace(), "square": C.square().sum(), "gap": gap}
    for name, value in exact.items():
        estimates = [getattr(s, name) for s in found]
        z = torch.tensor([(e.value - float(value)) / e.error for e in estimates])
        between(z.std(), 0.6, 1.6)
        assert abs(float(z.mean())) < 4 / len(z) ** 0.5 * float(z.std()), name


def test_the_trace_agrees_with_an_independent_estimator():
    curvlinops = pytest.importorskip("curvlinops")
    p = problem("mlp")
    C, calls, matvecs = p.ggn(), 5, 100
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = sum(float(curvlinops.hutchinson_trace(C, matvecs)) for _ in range(calls)) / calls
    spread = math.sqrt(2 * float(C.square().sum() - C.diagonal().square().sum()) / (calls * matvecs))
    ours = spectrum(GGN(library(p)), seed=2).trace
    assert abs(ours.value - theirs) <= 3 * math.hypot(ours.error, spread)
    assert math.hypot(ours.error, spread) < 0.06 * theirs


def test_probing_stops_when_the_trace_is_known_to_a_percent():
    p, calls = problem("linear_regression"), []

    class Counted(GGN):
        def product(self, v, index=None):
            calls.append(index is not None)
            return super().product(v, index)

    found = spectrum(Counted(library(p)), probes=6400, batch=2000, seed=0)
    assert found.trace.error < 0.01 * found.trace.value
    assert 40 <= sum(calls) < 2 * 6400 / 16, "two minibatches a group of 16 probes, at least 20 groups"
    calls.clear()
    more = spectrum(Counted(library(p)), probes=6400, batch=200, seed=0)
    assert more.trace.error < 0.01 * more.trace.value and 2 * 21 < sum(calls) < 2 * 6400 / 16
    calls.clear()
    assert spectrum(Counted(library(p)), probes=32, batch=2, seed=0).trace.error > 0.01 * found.trace.value
    assert sum(calls) == 2 * 2


def test_one_seed_one_spectrum():
    curvature = GGN(library(problem("logistic")))
    first, again, other = (spectrum(curvature, probes=64, steps=4, seed=s) for s in (3, 3, 4))
    assert first == again and first != other


# --- condition C.1 ---


def gaussian(levels: torch.Tensor, examples: int = 12_000) -> GGN:
    """Linear regression on Gaussian inputs: the GGN of an example is 2 x x^T, of covariance ``levels``."""
    x = normal(examples, len(levels), seed=5) * (levels / 2).sqrt()
    model = nn.Linear(len(levels), 1, bias=False).double()
    return GGN(Problem(model, Regression(), (x, x[:, :1]), batch_size=5000, progress=False))


def test_the_constant_of_gaussian_regression_is_the_exact_one():
    """E[C_b^2] - C^2 = (C^2 + tr(C) C) / |B|: c = 1 + |C|^2 / tr(C)^2 on average, 1 + lmax / tr(C) along the top."""
    levels = torch.tensor([4.0, 0.6, 0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    curvature = gaussian(levels)
    assert len(curvature.problem.train) > module.SAMPLE
    found = [spectrum(curvature, batch=64, seed=s) for s in range(12)]
    trace = float(levels.sum())
    for name, wanted in (
        ("gap", 1 + float(levels.square().sum()) / trace**2),
        ("constant", 1 + float(levels[0]) / trace),
    ):
        estimates = [getattr(s, name) for s in found]
        mean = sum(e.value for e in estimates) / len(estimates)
        assert mean == pytest.approx(wanted, rel=0.1), name
        assert all(abs(e.value - wanted) < 5 * e.error for e in estimates)
    assert found[0].largest.value == pytest.approx(4.0, rel=0.05), "on a sample of the examples"
    assert found[0].trace.value == pytest.approx(trace, rel=0.05)


def test_the_sampling_gap_shrinks_with_the_batch():
    levels = torch.tensor([2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    curvature, sizes = gaussian(levels, 5000), (16, 64, 256)
    raw = []
    for batch in sizes:
        found = [spectrum(curvature, batch=batch, seed=s) for s in range(6)]
        raw.append(sum(s.gap.value * s.trace.value**2 / batch for s in found) / len(found))
    slopes = [math.log(b / a) / math.log(4) for a, b in itertools.pairwise(raw)]
    assert all(abs(s + 1) < 0.1 for s in slopes), slopes


@pytest.mark.parametrize("name", ["mlp", "reused_layer"])  # where it is the top one, and where it is not
def test_the_constant_is_that_of_the_worst_of_the_top_eigenvectors(name):
    """Against |B| E|(C_1 - C_2) q|^2 / 2 / (tr(C) q.C q), exactly, from every example's own matrix."""
    p = problem(name)
    C, each = p.ggn(), each_ggn(p)
    values, directions = torch.linalg.eigh(C)
    q = directions[:, -5:]
    exact = ((each @ q).square().sum(1).mean(0) - (C @ q).square().sum(0)) / (C.trace() * values[-5:])
    found = [spectrum(GGN(library(p)), seed=s).constant for s in range(3)]
    mean = sum(e.value for e in found) / 3
    assert mean == pytest.approx(float(exact.max()), rel=0.15) and float(exact.max()) > 1.3 * float(exact.min())


# --- extreme eigenvalues ---


@pytest.mark.parametrize("steps", [3, 6, 30])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "norms", "linear_regression"])
@pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
def test_extreme_eigenvalues_are_within_the_bound(name, steps):
    p = problem(name)
    values = torch.linalg.eigvalsh(p.ggn())
    found = spectrum(GGN(library(p)), probes=16, steps=steps)
    error = abs(found.largest.value - float(values[-1]))
    assert error <= found.largest.error + 1e-12 * float(values[-1])
    assert float(values[0]) - 1e-12 <= found.smallest <= found.largest.value <= float(values[-1]) * (1 + 1e-12)
    if steps == 3:
        assert found.largest.error > 1e-6 * float(values[-1]), "converged at once: the test says nothing"
    if steps == 30:
        assert error <= 1e-6 * float(values[-1])


def test_a_negative_eigenvalue_is_found():
    p = problem("mlp")
    lowest, largest = torch.linalg.eigvalsh(p.hessian())[[0, -1]].tolist()
    found = spectrum(Hessian(library(p)), probes=16, steps=60)
    assert lowest < 0 and found.smallest == pytest.approx(lowest, rel=1e-6)
    assert found.largest.value == pytest.approx(largest, rel=1e-9)


class Linear(Task):
    """A loss that is linear in the outputs: there is no curvature."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return outputs.sum(1)


def test_no_curvature_is_a_spectrum_too():
    p = problem("logistic")
    found = spectrum(GGN(Problem(p.model, Linear(), p.train, progress=False)), probes=32)
    assert found.trace == Estimate(0.0, 0.0) and found.largest.value == 0.0 and found.constant.value == 0.0
    assert "trace" in str(found)


def test_a_spectrum_prints_as_a_table():
    found = Spectrum(
        *(Estimate(12.345, 0.1), Estimate(16.0, 1.0), Estimate(3.0, 1e-9), -0.5, 3.2),
        *(Estimate(0.9, 0.1), Estimate(1.5, 0.2), 12_000, 34_567, 64),
    )
    lines = str(found).splitlines()
    assert len(lines) == 9 and len({line.rfind("  ") for line in lines}) == 1
    for line, wanted in zip(
        lines,
        ("34,567, 12,000", "12.3 ± 0.1", "4", "3 (within 1e-09)", "3.2", "-0.5", "4.12", "0.9 ± 0.1", "1.5 ± 0.2"),
        strict=True,
    ):
        assert line.endswith("  " + wanted)


# --- the Arnoldi process ---


def test_the_basis_is_orthonormal_and_the_projection_tridiagonal():
    A = with_eigenvalues(torch.linspace(-2, 5, 40, dtype=torch.float64))
    found = arnoldi(product(A), starting(), 15)
    W = found.basis
    assert W.shape == (15, 40) and found.projected.shape == (15, 15)
    torch.testing.assert_close(W @ W.T, torch.eye(15).double(), rtol=0, atol=1e-12)
    inside = W @ A @ W.T
    torch.testing.assert_close(inside, found.projected, rtol=0, atol=1e-12)
    assert not (found.projected - found.projected.triu(-1).tril(1)).any() and found.asymmetry < 1e-12
    r = A @ W[-1] - W.T @ (W @ A @ W[-1])
    assert found.beyond == pytest.approx(float(r.norm()), rel=1e-9) and found.beyond > 0.1


def test_the_basis_stays_orthonormal_where_one_pass_would_lose_it():
    A = with_eigenvalues(torch.logspace(-10, 0, 40, dtype=torch.float64))
    W = arnoldi(product(A), starting(), 40).basis
    torch.testing.assert_close(W @ W.T, torch.eye(40).double(), rtol=0, atol=1e-13)


def test_all_steps_recover_the_whole_spectrum():
    values = torch.cat([torch.linspace(-2, 5, 39), torch.tensor([50.0])]).double()
    A = with_eigenvalues(values)
    for steps in (40, 100):
        found = arnoldi(product(A), starting(), steps)
        torch.testing.assert_close(found.ritz()[0], values, rtol=0, atol=1e-10)
        assert len(found.basis) == 40 and found.beyond < 1e-9


def test_ritz_values_lie_inside_and_the_top_one_grows():
    values = torch.linspace(-1, 3, 40, dtype=torch.float64)
    A, tops = with_eigenvalues(values), []
    for steps in range(1, 41):
        ritz = arnoldi(product(A), starting(), steps).ritz()[0]
        assert values[0] - 1e-12 <= ritz[0] and ritz[-1] <= values[-1] + 1e-12
        tops.append(float(ritz[-1]))
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(tops)) and tops[0] < 2 < 2.99 < tops[-1]


@pytest.mark.parametrize("steps", [2, 8, 20, 33])
def test_the_bounds_of_the_ritz_values_hold(steps):
    values = torch.linspace(0, 1, 40, dtype=torch.float64) ** 4 * 10
    A = with_eigenvalues(values)
    found = arnoldi(product(A), starting(), steps)
    ritz, coefficients, bounds = found.ritz()
    distance = (ritz.unsqueeze(1) - values).abs().min(1).values
    assert (distance <= bounds + 1e-12).all() and float(bounds.max()) > 1e-3
    x = found.basis.T @ coefficients  # the bound is the residual of the Ritz vector
    torch.testing.assert_close((A @ x - x * ritz).norm(dim=0), bounds, rtol=1e-6, atol=1e-11)


def test_products_that_change_are_told_by_the_asymmetry():
    A, seeds = with_eigenvalues(torch.linspace(0, 5, 40, dtype=torch.float64)), iter(range(100))

    def noisy(v):
        noise = 0.1 * normal(40, 40, seed=next(seeds))
        return product(A + noise + noise.T)(v)

    assert arnoldi(noisy, starting(), 15).asymmetry > 0.01


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e24])
@pytest.mark.parametrize("backwards", [False, True])
def test_with_a_solve_it_is_the_generalised_problem(scale, backwards):
    """Eigenvalues of P^-1 A; in whatever order the solve names its blocks, and at whatever scale P is."""
    A = with_eigenvalues(torch.linspace(-1, 4, 40, dtype=torch.float64))
    P = scale * with_eigenvalues(torch.logspace(-2, 1, 40, dtype=torch.float64), seed=7)
    root = torch.linalg.cholesky(P)
    half = torch.linalg.solve_triangular(root, A, upper=False)
    values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.mT, upper=False))
    solve = product(torch.linalg.inv(P), backwards=backwards)
    found = arnoldi(product(A, backwards=backwards), starting(), 40, solve)
    spread = float(values[-1] - values[0])
    torch.testing.assert_close(found.ritz()[0], values, rtol=0, atol=1e-10 * spread)
    few = arnoldi(product(A), starting(), 12, solve)
    W = few.basis
    torch.testing.assert_close(W @ P @ W.T, torch.eye(12).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(W @ A @ W.T, few.projected, rtol=0, atol=1e-10 * spread)
    ritz, _, bounds = few.ritz()
    assert ((ritz.unsqueeze(1) - values).abs().min(1).values <= bounds + 1e-10 * spread).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_invariant_subspace_stops_it(dtype):
    values = torch.linspace(1, 8, 40, dtype=torch.float64)
    values, directions = torch.linalg.eigh(with_eigenvalues(values))
    A = (directions * values) @ directions.T
    inside = directions[:, ::8].sum(1)  # 5 eigenvectors
    found = arnoldi(product(A.to(dtype)), Directions.unflatten(blocks(), inside.to(dtype).unsqueeze(0)), 20)
    assert len(found.basis) == 5 and found.beyond == 0
    torch.testing.assert_close(found.ritz()[0], values[::8], rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


# --- sketches ---


def test_a_sketch_is_its_seed():
    A = with_eigenvalues(torch.linspace(0, 5, 40, dtype=torch.float64))
    first = sketch(product(A), layout(), 8, seed=3)
    assert first.shape == (16,) and torch.equal(first, sketch(product(A, backwards=True), layout(), 8, seed=3))
    assert not torch.allclose(first, sketch(product(A), layout(), 8, seed=4))
    assert not torch.equal(first, sketch(product(A), layout(), 8, seed=3, corrected=False))


def test_rows_are_regenerated_one_at_a_time():
    like = torch.empty(0, dtype=torch.float32)
    block = embedding(SHAPES, "a", range(6), 6, 2, like)
    assert block.shape == (6, 4, 3) and block.dtype == torch.float32
    for row in (5, 0, 3):
        assert torch.equal(embedding(SHAPES, "a", range(row, row + 1), 6, 2, like)[0], block[row])
    twins = {"a": torch.Size([4, 3]), "c": torch.Size([4, 3])}
    assert not torch.allclose(embedding(twins, "c", range(6), 6, 2, like), block), "independent for each parameter"
    many = embedding({"a": torch.Size([500])}, "a", range(40), 40, 0, like).double()
    assert float(many.mean().abs()) < 4 / math.sqrt(40 * 500 * 40)
    assert float(many.var()) == pytest.approx(1 / 40, rel=4 * math.sqrt(2 / 20_000))


def test_an_embedding_for_each_parameter_has_the_smaller_variance():
    """Of dot products: sum_l (|v_l|^2 |w_l|^2 + (v_l.w_l)^2) / m against (|v|^2 |w|^2 + (v.w)^2) / m."""
    layers, size, runs = {name: torch.Size([12]) for name in "abcd"}, 10, 600
    whole = {"all": torch.Size([48])}
    v, w = normal(2, 48, seed=8) + 0.3
    like = v
    found = {}
    for key, shapes in (("layers", layers), ("whole", whole)):
        dots = []
        for seed in range(runs):
            total = 0.0
            for (name, _), vl, wl in zip(shapes.items(), v.chunk(len(shapes)), w.chunk(len(shapes)), strict=True):
                phi = embedding(shapes, name, range(size), size, seed, like)
                total += float((phi @ vl) @ (phi @ wl))
            dots.append(total)
        dots = torch.tensor(dots)
        between(dots.mean(), float(v @ w - 4 * dots.std() / runs**0.5), float(v @ w + 4 * dots.std() / runs**0.5))
        parts = zip(v.chunk(len(shapes)), w.chunk(len(shapes)), strict=True)
        wanted = sum(float((a @ a) * (b @ b) + (a @ b).square()) for a, b in parts) / size
        assert float(dots.var()) == pytest.approx(wanted, rel=0.25), key
        found[key] = float(dots.var())
    assert found["layers"] < 0.5 * found["whole"]


def test_the_correction_takes_the_bias_off_the_top_eigenvalue():
    values = torch.cat([torch.full((36,), 2.5), torch.tensor([3.0, 4.0, 6.0, 10.0])]).double()
    A, size = with_eigenvalues(values), 20
    one = {"a": torch.Size([40])}
    for shapes in (one, SHAPES):
        raw, corrected = (
            torch.tensor([sketch(product(A), layout(shapes), size, s, c)[-1] for s in range(40)]) for c in (False, True)
        )
        assert abs(float(corrected.mean()) - 10) < 0.4 * abs(float(raw.mean()) - 10)
        assert float(raw.mean()) > 10 + 0.5 * float(values.sum()) / size / len(shapes)


@pytest.mark.parametrize("size", [20, 80])
@pytest.mark.parametrize("name", ["mlp", "logistic", "masked_sequence"])
def test_a_sketch_is_near_the_largest_eigenvalue(name, size):
    p = problem(name)
    curvature, C = GGN(library(p)), p.ggn()
    errors = [float(sketch(curvature.product, curvature.problem, size, seed)[-1]) - top(C) for seed in range(4)]
    assert max(map(abs, errors)) <= 3 * float(C.norm()) / size**0.5
