"""Stochastic Neumann iterations against dense answers: LiSSA's plan and its promised error, ASTRA, what diverges."""

import dataclasses
import functools
import math
import re

import pytest
import torch
from torch import nn

import solving
from problems import TinyProblem, problem
from solving import close, dense, each_ggn, library, right_hand_sides
from wherefrom import (
    ASTRA,
    EKFAC,
    GGN,
    KFAC,
    Classification,
    ConvergenceWarning,
    Damping,
    Directions,
    DivergenceError,
    EmpiricalFisher,
    Exact,
    Hessian,
    Identity,
    InputError,
    Neumann,
    Problem,
    Spectrum,
    UnsupportedError,
)
from wherefrom.curvature.lanczos import Estimate
from wherefrom.persample import vectors
from wherefrom.solvers.neumann import MOST, SAFETY, StochasticNeumann, corollary, preconditioned_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
PLANNED = (  # two of regression, one of convolutions, two of masked sequences
    "mlp",
    "linear_regression",
    "mlp_regression_scalar",
    "cnn_groups",
    "masked_sequence",
    "tied_embedding",
    "norms",
    "logistic",
)


class FullBatch(GGN):
    """Every minibatch is the whole data set, whose size is asked for."""

    def product(self, v, index=None):
        return super().product(v)


class Quick(GGN):
    """The same matrix and minibatches from every example's dense matrix, (N, D, D)."""

    def __init__(self, made: Problem, each: torch.Tensor):
        super().__init__(made)
        self.each = each

    def product(self, v, index=None):
        matrix = (self.each if index is None else self.each[index]).mean(0)
        by_parameter, shapes = v.to_parameters(), self.problem.shapes  # the matrices are in the order of the parameters
        flat = vectors.flatten({name: by_parameter[name] for name in shapes}) @ matrix
        return Directions.from_parameters(v.blocks, vectors.unflatten(flat, shapes))


def cached(curvature: GGN) -> GGN:
    """Its rows are made once, as they are by any product over all the data, not for each minibatch."""
    list(curvature.gradients())
    return curvature


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def solve(p: TinyProblem, inverse, b: torch.Tensor, **options) -> torch.Tensor:
    return p.flatten(solving.solve(inverse, p.unflatten(b), **options).x)


def largest(matrix: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def matrix_of(p: TinyProblem, inverse) -> torch.Tensor:
    """P^-1 as a matrix, (D, D)."""
    return p.flatten(solving.apply(inverse, p.unflatten(eye(p.dim))))


def iterates(inverse, b: dict[str, torch.Tensor], repeat: int = 0):
    """x_1, x_2, ... by parameter, changed in place or not."""
    for x, _ in inverse.iterates(solving.directions(inverse, b), repeat):
        yield x.to_parameters()


def predicted(p: TinyProblem, inverse, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The error that equation 10 predicts if x (Q, D) is the solution for b (Q, D): (Q,)."""
    return inverse.predict_error(*(solving.directions(inverse, p.unflatten(v)) for v in (b, x)))


def errors(p: TinyProblem, solution, damping: float | torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x = dense(p.ggn(), damping, b)
    return (p.flatten(solution.x) - x).norm(dim=1) / x.norm(dim=1)


# --- the second moments of the error, exactly ---


def covariance(each: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """E[(C_i - C) X (C_i - C)] over examples, each (N, D, D), X (D, D)."""
    deviations = each - each.mean(0)
    return (deviations @ x @ deviations.mT).mean(0)


def growth(each: torch.Tensor, damping: float, step: float, batch: int, inverse: torch.Tensor | None = None) -> float:
    """Spectral radius of M -> E[F_k M F_k], F_k = I - a P^-1/2 (C_k + damping) P^-1/2: the mean square's growth."""
    N, D, _ = each.shape
    root = torch.linalg.cholesky(eye(D) if inverse is None else (inverse + inverse.T) / 2)
    each, level = root.T @ each @ root, damping * root.T @ root
    F = eye(D) - step * (each.mean(0) + level)
    parts = (each - each.mean(0)).reshape(N, -1)
    by = parts.T @ parts * (step**2 / N / batch) + F.reshape(-1, 1) * F.reshape(1, -1)  # (ij, kl)
    return float(torch.linalg.eigvalsh(by.view(D, D, D, D).transpose(1, 2).reshape(D * D, D * D))[-1])


def signs(levels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same for g g^T with g = sqrt(levels) times random signs: C X C + tr(X C) C - 2 C diag(X) C."""
    C = torch.diag(levels)
    return C @ x @ C + (x.diagonal() * levels).sum() * C - 2 * torch.diag(levels * x.diagonal() * levels)


def normals(levels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same for g g^T with g Gaussian: C X C + tr(X C) C."""
    C = torch.diag(levels)
    return C @ x @ C + (x.diagonal() * levels).sum() * C


def mean_squares(
    gap, levels: torch.Tensor, damping: float, step: float, batch: int, steps: int, b: torch.Tensor, start: torch.Tensor
) -> list[float]:
    """E |x_k - x*|^2 for k = 0 .. steps, in the eigenbasis; ``gap`` maps X to the covariance for |B| = 1."""
    star = b / (levels + damping)
    factor = 1 - step * (levels + damping)
    m, found = start - star, [float((start - star).square().sum())]
    M = torch.outer(m, m)
    for _ in range(steps):
        x = M + torch.outer(m, star) + torch.outer(star, m) + torch.outer(star, star)
        M = factor.unsqueeze(1) * M * factor + step**2 / batch * gap(levels, x)
        m = factor * m
        found.append(float(M.trace()))
    return found


def growth_by_signs(levels: torch.Tensor, damping: float, step: float, batch: float) -> float:
    """The growth for random signs, whose mean squares along the eigenvectors evolve by themselves."""
    own = (1 - step * (levels + damping)).square() - step**2 * levels.square() / batch
    return float(torch.linalg.eigvalsh(torch.diag(own) + step**2 / batch * torch.outer(levels, levels))[-1])


def measured(levels: torch.Tensor, constant: float = 2.0, examples: int = 10**9) -> Spectrum:
    """A spectrum that knows the eigenvalues."""
    exact = [Estimate(float(v), 0.0) for v in (levels.sum(), levels.square().sum(), levels.max())]
    c = Estimate(constant, 0.0)
    return Spectrum(*exact, float(levels.min()), float(levels.max()), c, c, examples, len(levels), 64)


def random_levels(seed: int) -> torch.Tensor:
    """Eigenvalues of one of several shapes and scales."""
    rng = torch.Generator().manual_seed(seed)
    u = torch.rand(2 + seed % 19, generator=rng, dtype=torch.float64)
    shapes = (u, u**6, (-8 * u).exp(), torch.ones_like(u), torch.cat([1 + u[:1], 1e-3 * u]))
    return shapes[seed % len(shapes)].clamp(min=1e-9) * 10 ** float(torch.rand(1, generator=rng) * 4 - 2)


# --- Corollary 1 ---


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_meets_corollary_1(seed):
    levels = random_levels(seed)
    top, trace = float(levels.max()), float(levels.sum())
    damping = top * 10 ** (-3 * (seed % 7) / 6)
    plan = corollary(measured(levels, constant=1 + seed % 4), damping)
    c = max(2.0, 1 + seed % 4)
    assert plan.constant == c and plan.nu == pytest.approx(SAFETY * top + damping)
    assert plan.batch >= c * trace / (plan.nu - damping) > plan.batch - 1
    t = c * trace / plan.batch
    for bound in (top, SAFETY * top):  # also if the largest eigenvalue was measured too small
        assert 1 / plan.step >= (damping + (bound + t) / 2) * (1 - 1e-12)
        mu = torch.linspace(0, bound, 200, dtype=torch.float64)
        shrink = (1 - plan.step * (mu + damping)).square() + plan.step**2 * t * mu  # equation 9
        assert float(shrink.max()) <= (1 - plan.step * damping) ** 2 * (1 + 1e-12)
    assert plan.steps == math.ceil(2 / (plan.step * damping))
    assert corollary(measured(levels), damping, contraction=5.0).steps == pytest.approx(2.5 * plan.steps, abs=2)
    for batch in (1, 3, 10**6):  # and any other batch, with a step to match
        given = corollary(measured(levels), damping, batch=batch)
        assert given.batch == batch
        assert 1 / given.step >= (damping + (top + 2 * trace / batch) / 2) * (1 - 1e-12)
        assert given.step >= min(1 / plan.nu, 1 / (damping + (SAFETY * top + 2 * trace / batch) / 2)) * (1 - 1e-12)


def test_all_the_data_are_taken_where_they_are_no_more():
    levels = torch.ones(40).double()
    wanted = math.ceil(2 * 40 / 1.1)
    assert corollary(measured(levels, examples=wanted + 1), 0.1).batch == wanted
    plan = corollary(measured(levels, examples=wanted), 0.1)
    assert plan.batch == 0 and plan.step == pytest.approx(1 / 1.2)
    assert corollary(measured(levels, examples=10), 0.1, batch=5).batch == 5


@pytest.mark.parametrize("gap", [signs, normals])
@pytest.mark.parametrize("seed", range(20))
def test_the_recommended_batch_keeps_the_error_below_equation_10(gap, seed):
    """Over random spectra, second moments evolved exactly; c is 1 for random signs and at most 2 for Gaussians."""
    levels = random_levels(seed)
    damping = 0.05 * float(levels.max())
    plan = corollary(measured(levels), damping)
    b = torch.randn(len(levels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    star, start = b / (levels + damping), b / damping
    found = mean_squares(gap, levels, damping, plan.step, plan.batch, 3 * plan.steps, b, start)
    rate = 1 - plan.step * damping
    t = plan.constant * plan.effective_dimension / plan.batch
    noise = math.sqrt(plan.step * t * float((star.square() * levels).sum()) / (damping * (1 + rate)))
    for k, square in enumerate(found):
        assert math.sqrt(square) <= rate**k * float((start - star).norm()) * (1 + 1e-9) + noise
    assert growth_by_signs(levels, damping, plan.step, plan.batch) < rate**2 * (1 + 1e-9)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", ["logistic", "linear_regression"])
def test_what_is_planned_is_stable_in_mean_square(name, batch):
    """The exact map of a real problem's second moments contracts as promised; with eight times the step it grows."""
    p = problem(name)
    damping = 0.02 * largest(p.ggn())
    curvature, each = GGN(library(p)), each_ggn(p)
    plan = Neumann(batch=batch).fit(curvature, damping).plan
    assert growth(each, damping, plan.step, batch) <= (1 - plan.step * damping) ** 2 * (1 + 1e-9)
    assert growth(each, damping, 8 * plan.step, batch) > 1
    for inner in (EKFAC(), KFAC(labels="true")):
        inverse = Neumann(inner, batch=batch).fit(curvature, damping)
        P = matrix_of(p, inverse.preconditioner)
        assert growth(each, damping, inverse.plan.step, batch, P) < 1


# --- the counter-example: logistic regression on random signs, theta = 0 ---


def flat_signs(d: int = 60, blocks: int = 64) -> torch.Tensor:
    """Random signs of which the mean of x x^T is the identity, exactly: (64 blocks, d), d at most 64."""
    h, rng = eye(1), torch.Generator().manual_seed(0)
    while len(h) < 64:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])  # orthogonal columns
    flips = 1.0 - 2.0 * torch.randint(2, (blocks, 1, d), generator=rng).double()
    return (h[:, :d] * flips).flatten(0, 1)


def all_signs(d: int) -> torch.Tensor:
    """Every pattern of d signs, (2^d, d)."""
    return 1.0 - 2.0 * ((torch.arange(2**d).unsqueeze(1) >> torch.arange(d)) & 1).double()


def coins(inputs: torch.Tensor, levels: torch.Tensor, seed: int = 0) -> GGN:
    """Two classes at theta = 0: an example's GGN is g g^T, g = u x sqrt(levels) signs, u = (1, -1) / sqrt(2).

    Labels have nothing to do with the inputs, as the counter-example has it.
    """
    model = nn.Linear(len(levels), 2, bias=False).double()
    nn.init.zeros_(model.weight)
    labels = torch.randint(2, (len(inputs),), generator=torch.Generator().manual_seed(seed))
    return cached(GGN(Problem(model, Classification(), (inputs * (2 * levels).sqrt(), labels), progress=False)))


def along_classes(v: torch.Tensor) -> dict[str, torch.Tensor]:
    """u x v for rows v (Q, d), as right-hand sides."""
    return {"weight": torch.stack([v, -v], 1) / math.sqrt(2)}


def coordinates(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The inverse: (Q, d)."""
    return (x["weight"][:, 0] - x["weight"][:, 1]) / math.sqrt(2)


def runs(curvature: GGN, solver: Neumann, damping: float, b: torch.Tensor, count: int) -> torch.Tensor:
    """Iterates x_1 .. x_K of runs with different seeds: (count, K, Q, d)."""
    found = []
    for seed in range(count):
        options = {name: getattr(solver, name) for name in ("step", "batch", "steps", "start")}
        inverse = Neumann(**options, seed=seed).fit(curvature, damping)
        found.append(torch.stack([coordinates(x) for x in iterates(inverse, along_classes(b))]))
    return torch.stack(found)


def test_the_threshold_of_the_counter_example():
    """Sixty eigenvalues of 1, damping 0.05, step 1 / 1.05: stable from a batch of 53.5 on."""
    levels = torch.ones(60).double()
    rate = functools.partial(growth_by_signs, levels, 0.05, 1 / 1.05)
    assert rate(40) == pytest.approx(1.34, abs=5e-3) and rate(60) == pytest.approx(0.89, abs=5e-3)
    assert rate(53.6) < 1 < rate(53.4)
    each = torch.einsum("ni,nj->nij", all_signs(7), all_signs(7))  # the same, dense and small
    assert growth(each, 0.05, 1 / 1.05, 4) == pytest.approx(growth_by_signs(torch.ones(7).double(), 0.05, 1 / 1.05, 4))


def test_the_counter_example_is_the_model_it_is_said_to_be():
    curvature = coins(flat_signs(), torch.ones(60).double())
    v = torch.randn(3, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(coordinates(solving.product(curvature, along_classes(v))), v, 1e-12)
    g = flat_signs()[300]
    close(
        coordinates(solving.product(curvature, along_classes(v), torch.tensor([300]))), (v @ g).unsqueeze(1) * g, 1e-12
    )


@pytest.mark.parametrize(("batch", "rate"), [(40, 1.34), (60, 0.89)])
def test_below_the_threshold_the_mean_converges_and_the_mean_square_grows(batch, rate):
    """At this step the mean over runs is the solution after one step already; 1.34^10 is 19."""
    levels, damping, step, steps, count = torch.ones(60).double(), 0.05, 1 / 1.05, 10, 200
    b = torch.randn(10, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    solver = Neumann(step=step, batch=batch, steps=steps)
    found = runs(coins(flat_signs(), levels), solver, damping, b, count) - b / 1.05  # (count, K, Q, d)
    square = found.square().sum(3).mean(0)  # (K, Q)
    wanted = [mean_squares(signs, levels, damping, step, batch, steps, one, one / damping)[1:] for one in b]
    torch.testing.assert_close(square.sum(1), torch.tensor(wanted).double().sum(0), rtol=0.12, atol=0)
    assert float(square[-1].sum() / square[1].sum()) ** (1 / (steps - 2)) == pytest.approx(rate, rel=0.03)
    off = found.mean(0).square().sum(2)  # of the mean of so many runs: the mean square over their number
    assert (off <= 2 * square / count).all()
    start = (b / damping - b / 1.05).square().sum(1)
    assert (off[-1] < 0.2 * start).all() and bool((square[-1] > 5 * start).all()) == (batch == 40)


def test_the_recursion_is_what_the_iteration_does():
    """All 256 sign patterns of 8 inputs, eigenvalues from 0.1 to 2, the mean square at every step."""
    levels = torch.tensor([2.0, 1.5, 1.0, 0.6, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0, 0.5, 2.0, 1.0, -0.5, 1.0, 1.0]]).double()
    solver = Neumann(step=0.35, batch=4, steps=20, start="zero")
    found = runs(coins(all_signs(8), levels), solver, 0.1, b, 250)[:, :, 0]
    square = (found - b[0] / (levels + 0.1)).square().sum(2).mean(0)
    wanted = mean_squares(signs, levels, 0.1, 0.35, 4, 20, b[0], torch.zeros(8).double())[1:]
    torch.testing.assert_close(square, torch.tensor(wanted).double(), rtol=0.15, atol=0)


def test_the_plan_of_the_counter_example_converges():
    levels = torch.full((7,), 0.5).double()
    inverse = Neumann().fit(coins(all_signs(7), levels), 0.02)
    assert inverse.plan.batch == math.ceil(2 * inverse.plan.effective_dimension / (1.1 * 0.5)) < 20
    b = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = solving.solve(inverse, along_classes(b))
    error = (coordinates(solution.x) - b / 0.52).norm(dim=1) / (b / 0.52).norm(dim=1)
    assert solution.predicted is not None and (error <= 2 * solution.predicted).all() and solution.converged.all()


# --- Neumann() with no argument ---


@pytest.mark.parametrize("name", PLANNED)
def test_without_arguments_the_error_is_what_was_predicted(name):
    p = problem(name)
    damping = 0.05 * largest(p.ggn())
    b = torch.cat([p.measurement_gradients(), right_hand_sides(p)])
    solution = solving.solve(Neumann().fit(GGN(library(p)), damping), p.unflatten(b))
    assert solution.predicted is not None and solution.converged.all() and solution.predicted.shape == (len(b),)
    assert (errors(p, solution, damping, b) <= 2 * solution.predicted).all()
    assert (errors(p, solution, damping, b) < 0.3).all() and (solution.predicted < 3).all()
    assert "predicted error" in str(solution.certificate)


@pytest.mark.parametrize("options", [{"batch": 3}, {"batch": 3, "repeats": 4}, {"batch": 3, "momentum": 0.5}, {}])
@pytest.mark.parametrize("start", ["preconditioned", "zero"])
def test_the_prediction_is_equation_10(start, options):
    p = problem("mlp")
    C, damping, b = p.ggn(), 0.1, right_hand_sides(p)
    solver = Neumann(start=start, **options)
    inverse = solver.fit(GGN(library(p)), damping)
    plan, x = inverse.plan, dense(C, damping, b)
    assert plan.batch == options.get("batch", plan.batch) > 0
    step = plan.step / (1 - solver.momentum)  # what a heavy ball moves by in the end
    first = (1 - step * damping) ** plan.steps * ((b / damping if start == "preconditioned" else 0 * b) - x).norm(dim=1)
    t = plan.constant * plan.effective_dimension / plan.batch
    form = ((x @ C) * x).sum(1)
    second = (step * t * form / (damping * (2 - step * damping)) / solver.repeats).sqrt()
    close(predicted(p, inverse, b, x), (first + second) / x.norm(dim=1), 1e-9)
    if not options:  # and the plan's numbers are those of the dense matrix
        trace, top = float(C.trace()), largest(C)
        assert plan.effective_dimension == pytest.approx(trace, rel=0.08)
        assert plan.nu == pytest.approx(1.1 * top + damping, rel=1e-9)
        solution = solving.solve(inverse, p.unflatten(b))
        again = predicted(p, inverse, b, p.flatten(solution.x))
        assert solution.predicted is not None and torch.equal(solution.predicted, again)


def test_a_step_that_shrinks_converges_less_far():
    p = problem("mlp")
    b = right_hand_sides(p)
    curvature = FullBatch(library(p))
    for decay, every in ((1.0, 50), (0.5, 10)):
        inverse = Neumann(decay=decay, decay_every=every, steps=40).fit(curvature, 0.1)
        inverse = dataclasses.replace(inverse, plan=dataclasses.replace(inverse.plan, batch=0))  # the first term alone
        x, left = dense(p.ggn(), 0.1, b), 1.0
        for k in range(40):
            left *= 1 - inverse.plan.step * 0.1 * decay ** (k // every)
        wanted = left * (b / 0.1 - x).norm(dim=1) / x.norm(dim=1)
        close(predicted(p, inverse, b, x), wanted, 1e-9)
        assert (errors(p, solving.solve(inverse, p.unflatten(b)), 0.1, b) <= wanted).all()


def test_a_wrong_prediction_is_told():
    """A constant measured far too small: condition C.1 fails, the residual proves it, and the queries are named."""
    p = problem("mlp_regression")
    b = torch.linalg.eigh(p.ggn()).eigenvectors[:, -3:].T.contiguous()
    inverse = Neumann(batch=1).fit(GGN(library(p)), 3.0)
    inverse = dataclasses.replace(inverse, plan=dataclasses.replace(inverse.plan, constant=1e-8, steps=300))
    message = r"\d of 3 queries have an error above twice.*queries \[\d.*Raise the batch size"
    with pytest.warns(ConvergenceWarning, match=message):
        solution = solving.solve(inverse, p.unflatten(b))
    assert solution.predicted is not None and not solution.converged.all()
    assert (errors(p, solution, 3.0, b)[~solution.converged] > 2 * solution.predicted[~solution.converged]).all()


def test_all_the_data_leave_no_sampling_error():
    p = problem("linear_regression")
    damping, b = 0.1 * largest(p.ggn()), right_hand_sides(p)
    found = [Neumann(seed=s).fit(GGN(library(p)), damping) for s in (0, 5)]
    plan = found[0].plan
    assert plan.batch == 0 == found[1].plan.batch and plan.step == pytest.approx(1 / plan.nu)
    close(solve(p, found[0], b), solve(p, found[1], b), 1e-9)
    x, A = dense(p.ggn(), damping, b), p.ggn() + damping * eye(p.dim)
    exact = x + (b / damping - x) @ torch.linalg.matrix_power(eye(p.dim) - plan.step * A, plan.steps)
    close(solve(p, found[0], b), exact, 1e-10)
    solution = solving.solve(found[0], p.unflatten(b))
    first = (1 - plan.step * damping) ** plan.steps * (b / damping - p.flatten(solution.x)).norm(dim=1)
    assert solution.predicted is not None
    close(solution.predicted, first / p.flatten(solution.x).norm(dim=1), 1e-9)
    assert solution.passes == plan.steps + 1


@pytest.mark.parametrize("solver", [Neumann(batch=3), Neumann(repeats=2), ASTRA(batch=3, steps=30)])
def test_the_answer_is_linear_in_the_right_hand_side(solver):
    p = problem("mlp")
    u, v = right_hand_sides(p, 1), right_hand_sides(p, 1, seed=5)
    inverse = solver.fit(GGN(library(p)), 0.1)
    both = solve(p, inverse, 2 * u - 3 * v, certify=False)
    close(both, 2 * solve(p, inverse, u, certify=False) - 3 * solve(p, inverse, v, certify=False), 1e-10)


def stationary_variance(p: TinyProblem, batch: int, damping: float, step: float, b: torch.Tensor) -> torch.Tensor:
    """E |x_k - x*|^2 along one long run, (Q,)."""
    inverse = Neumann(step=step, batch=batch, steps=2600).fit(Quick(library(p), each_ggn(p)), damping)
    x, kept = dense(p.ggn(), damping, b), []
    for k, found in enumerate(iterates(inverse, p.unflatten(b))):
        if k >= 100:
            kept.append((p.flatten(found) - x).square().sum(1))
    return torch.stack(kept).mean(0)


def test_twice_the_batch_halves_the_stationary_variance():
    p = problem("logistic")
    top, b = largest(p.ggn()), right_hand_sides(p, 4)
    found = [stationary_variance(p, batch, 0.3 * top, 0.15 / top, b) for batch in (4, 8)]
    ratio = float((found[0] / found[1]).mean())
    assert ratio == pytest.approx(2, rel=0.25)
    x, each = dense(p.ggn(), 0.3 * top, b), each_ggn(p)  # leading order in a: A M + M A = a covariance / |B|
    values, directions = torch.linalg.eigh(p.ggn() + 0.3 * top * eye(p.dim))
    for i, one in enumerate(x):
        noise = directions.T @ covariance(each, torch.outer(one, one)) @ directions * (0.15 / top) / 4
        assert float(found[0][i]) == pytest.approx(float((noise.diagonal() / (2 * values)).sum()), rel=0.25)


def test_the_variance_of_a_score():
    """Var(g.x_K) ~ a / (2 |B|) (x*.C x*) (g.C (C + damping)^-1 g), for flat random signs, where c is 1."""
    levels, damping, step, batch = torch.ones(60).double(), 0.5, 0.1, 40
    b = torch.randn(4, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inverse = Neumann(step=step, batch=batch, steps=700).fit(coins(flat_signs(), levels), damping)
    x = torch.stack([coordinates(v) for v in iterates(inverse, along_classes(b))])[100:]  # (K, Q, d)
    star = b / 1.5
    variance = (x - star).square().mean(0).mean(1)  # over unit vectors g, (Q,)
    wanted = step / (2 * batch) * star.square().sum(1) * (1 / 1.5)
    torch.testing.assert_close(variance, wanted, rtol=0.25, atol=0)


def test_repeats_shrink_the_sampling_error():
    p, R = problem("logistic"), 4
    damping, b = 0.2 * largest(p.ggn()), right_hand_sides(p, 4)
    curvature, x = Quick(library(p), each_ggn(p)), dense(p.ggn(), 0.2 * largest(p.ggn()), b)
    one = Neumann(batch=3, contraction=6.0).fit(curvature, damping)
    single, together = [], []
    for seed in range(12):
        solver = Neumann(batch=3, contraction=6.0, repeats=R, seed=10 * seed)
        inverse = dataclasses.replace(one, solver=solver)
        ends = torch.stack([p.flatten(list(iterates(inverse, p.unflatten(b), r))[-1]) for r in range(R)])
        single.append((ends - x).square().sum((0, 2)) / R)
        together.append((ends.mean(0) - x).square().sum(1))
        if seed == 0:
            solution = solving.solve(inverse, p.unflatten(b))
            close(p.flatten(solution.x), ends.mean(0), 1e-12)
            assert solution.passes == pytest.approx(R * one.plan.steps * 3 / p.n + 1)
            assert len(solution.history) == one.plan.steps + 1
            small, large = (predicted(p, i, b, x) for i in (inverse, one))
            close(small, large / R**0.5, 0.05)
    root = (torch.stack(single).mean() / torch.stack(together).mean()).sqrt()
    assert float(root) == pytest.approx(R**0.5, rel=0.25)


@pytest.mark.parametrize("name", ["mlp", "masked_sequence"])
def test_a_damping_of_its_own_for_each_block(name):
    p = problem(name)
    curvature, b = GGN(library(p)), p.measurement_gradients()
    inverse = Neumann().fit(curvature, Damping.relative(2.0))
    levels = solving.diagonal(inverse)
    assert len(set(inverse.damping.values())) > 1
    spread = max(inverse.damping.values()) - min(inverse.damping.values())
    assert inverse.plan.nu == pytest.approx(1.1 * largest(p.ggn()) + min(inverse.damping.values()) + spread, rel=1e-6)
    assert inverse.plan.nu > largest(p.ggn() + torch.diag(levels))
    solution = solving.solve(inverse, p.unflatten(b))
    assert solution.predicted is not None
    assert (errors(p, solution, levels, b) <= 2 * solution.predicted).all() and solution.converged.all()
    assert (errors(p, solution, levels, b) < 0.3).all()
    plan = inverse.plan
    form = ((dense(p.ggn(), levels, b) @ p.ggn()) * dense(p.ggn(), levels, b)).sum(1)
    x, low = dense(p.ggn(), levels, b), min(inverse.damping.values())
    first = (1 - plan.step * low) ** plan.steps * (b / levels - x).norm(dim=1)
    t = plan.constant * plan.effective_dimension / plan.batch if plan.batch else 0.0
    second = (plan.step * t * form / (low * (2 - plan.step * low))).sqrt()
    close(predicted(p, inverse, b, x), (first + second) / x.norm(dim=1), 1e-9)


@pytest.mark.parametrize("solver", [Neumann(), Neumann(batch=3, momentum=0.3), ASTRA(batch=4, steps=12)])
def test_the_plan_is_saved_and_restored(solver):
    p = problem("mlp")
    curvature, b = GGN(library(p)), p.unflatten(right_hand_sides(p))
    inverse = solver.fit(curvature, Damping.relative(2.0))
    restored = solving.restore(inverse, GGN(library(p)))
    assert restored.plan == inverse.plan and isinstance(restored.plan.batch, int)
    assert restored.report() == inverse.report() and restored.report()["steps"] == inverse.plan.steps
    first, second = solving.solve(inverse, b), solving.solve(restored, b)
    close(p.flatten(second.x), p.flatten(first.x), 1e-12)
    assert (first.predicted is None) == (second.predicted is None) == isinstance(solver, ASTRA)
    if first.predicted is not None and second.predicted is not None:
        close(second.predicted, first.predicted, 1e-12)


# --- what is refused ---


@pytest.mark.parametrize("name", ["mlp", "logistic"])
def test_an_indefinite_hessian_is_refused_with_the_damping_it_needs(name):
    p = problem(name)
    curvature, lowest = Hessian(library(p)), float(torch.linalg.eigvalsh(p.hessian())[0])
    if name == "logistic":  # linear in its parameters: the Hessian is the GGN
        assert Neumann().fit(curvature, 0.1).plan.steps > 0
        return
    assert lowest < -0.01
    with pytest.raises(UnsupportedError, match="negative eigenvalue.*Raise the damping above.*GGN") as refused:
        Neumann().fit(curvature, -0.5 * lowest)
    (needed,) = re.findall(r"Raise the damping above (\S+),", str(refused.value))
    assert float(needed) == pytest.approx(-lowest, rel=0.02)
    plan = Neumann().fit(curvature, 1.05 * float(needed)).plan
    values = torch.linalg.eigvalsh(p.hessian()) + 1.05 * float(needed)
    assert ((1 - plan.step * values).abs() < 1).all()


@pytest.mark.parametrize("preconditioner", [EKFAC(), KFAC()])
def test_an_indefinite_hessian_is_refused_with_a_preconditioner_too(preconditioner):
    p = problem("mlp")
    lowest = float(torch.linalg.eigvalsh(p.hessian())[0])
    with pytest.raises(UnsupportedError, match="negative eigenvalue.*Raise the damping.*GGN"):
        Neumann(preconditioner).fit(Hessian(library(p)), -0.5 * lowest)
    Neumann(preconditioner).fit(Hessian(library(p)), -2 * lowest)


def test_too_many_steps_are_refused_and_counted():
    p = problem("mlp")
    curvature, damping = GGN(library(p)), 1e-6 * largest(p.ggn())
    with pytest.raises(
        UnsupportedError, match="steps would be needed.*largest eigenvalue.*Raise the damping"
    ) as refused:
        Neumann().fit(curvature, damping)
    counted = int(re.findall(r"^([\d,]+) steps", str(refused.value))[0].replace(",", ""))
    assert counted == pytest.approx(2 * 1.1e6, rel=0.01) and counted > MOST
    assert f"{largest(p.ggn()) / damping:.1e} times the damping" in str(refused.value)
    assert Neumann(steps=MOST + 1).fit(curvature, damping).plan.steps == MOST + 1, "who gives the steps is not refused"


def test_a_far_start_is_no_divergence():
    """b / damping is far from the solution at a small damping; the residual falls from there."""
    p = problem("mlp")
    top, b = largest(p.ggn()), right_hand_sides(p)
    inverse = Neumann(step=0.5 / top, batch=8, steps=30).fit(FullBatch(library(p)), 1e-9 * top)
    history = solving.solve(inverse, p.unflatten(b)).history
    assert float(history[0].min()) > 1e6 and (history[-1] < 0.1 * history[0]).all()


@pytest.mark.filterwarnings("error::wherefrom.errors.ConvergenceWarning")
def test_what_is_solved_to_rounding_has_converged():
    class Zero(GGN):
        def product(self, v, index=None):  # unused: index
            return v.zeros_like()

    p = problem("logistic")
    b = right_hand_sides(p)
    close(solve(p, Neumann().fit(Zero(library(p)), 0.1), b), b / 0.1, 1e-12)
    inverse = Neumann(contraction=100.0, step=1 / (1.5 * largest(p.ggn()))).fit(FullBatch(library(p)), 0.1)
    inverse = dataclasses.replace(inverse, plan=dataclasses.replace(inverse.plan, batch=0))
    solution = solving.solve(inverse, p.unflatten(b))
    assert solution.predicted is not None and float(solution.predicted.max()) < 1e-30 and solution.converged.all()
    close(p.flatten(solution.x), dense(p.ggn(), 0.1, b), 1e-12)


# --- ASTRA ---


def objective(matrix: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((x @ matrix) * x).sum(1) / 2 - (x * b).sum(1)


@pytest.mark.parametrize("preconditioner", [EKFAC(), KFAC(labels="true")])
@pytest.mark.parametrize("name", ["mlp", "conv1d"])
def test_the_objective_falls_at_every_step_below_two_over_nu(name, preconditioner):
    p = problem(name)
    damping, b = 0.02 * largest(p.ggn()), right_hand_sides(p)
    curvature = FullBatch(library(p))
    A = p.ggn() + damping * eye(p.dim)
    nu = float(torch.linalg.eigvals(matrix_of(p, preconditioner.fit(curvature, damping)) @ A).real.max())
    for share, falls in ((1.0, True), (1.9, True), (2.2, False)):
        inverse = Neumann(preconditioner, step=share / nu, batch=4, steps=40, start="zero").fit(curvature, damping)
        values = torch.stack([objective(A, p.flatten(x), b) for x in iterates(inverse, p.unflatten(b))])  # (K, Q)
        assert bool((values[1:] < values[:-1]).all()) == falls


def test_the_fixed_point_does_not_depend_on_the_preconditioner(monkeypatch):
    p = problem("mlp")
    b, curvature = right_hand_sides(p), FullBatch(library(p))
    x = dense(p.ggn(), 0.1, b)
    for inner in (Identity(), EKFAC(), KFAC(labels="true"), Exact()):
        inverse = Neumann(inner, batch=4, step=1e-2, steps=1).fit(curvature, 0.1)
        with monkeypatch.context() as m:
            m.setattr(StochasticNeumann, "_start", lambda self, _: solving.directions(self, p.unflatten(x)))
            close(solve(p, inverse, b, certify=False), x, 1e-12)
        P = inner.fit(curvature, 5.0)  # damped otherwise than the system
        moved = solving.apply(P, p.unflatten(b - x @ p.ggn() - 0.1 * x))
        assert float(p.flatten(moved).norm()) < 1e-12 * float(x.norm())


@pytest.mark.parametrize("damping", [0.05, Damping.relative(0.5)])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "odd_parameters", "linear_regression"])
def test_the_preconditioned_spectrum_is_the_dense_one(name, damping):
    p = problem(name)
    inner = EKFAC().fit(GGN(library(p)), damping)
    P = matrix_of(p, inner)
    levels = solving.diagonal(inner)
    root = torch.linalg.cholesky((P + P.T) / 2)
    nu = largest(root.T @ (p.ggn() + torch.diag(levels)) @ root)
    trace, both = float((P @ p.ggn()).trace()), (P @ p.ggn() + p.ggn() @ P) / 2
    spread = math.sqrt(2 * float(both.square().sum() - both.diagonal().square().sum()) / 200)
    found_nu, found = preconditioned_spectrum(inner, probes=200)
    assert nu * 0.98 <= found_nu <= nu * (1 + 1e-9)
    assert abs(found - trace) <= 4 * spread and spread < 0.1 * trace
    full, _ = preconditioned_spectrum(inner, steps=p.dim)
    assert full == pytest.approx(nu, rel=1e-9)
    few = preconditioned_spectrum(inner)[1]  # as a plan takes it
    assert abs(few - trace) <= 4 * spread * 5


def test_the_effective_dimension_is_that_of_the_eigenvalues():
    """tr P^-1 C = sum Lambda / (Lambda + damping), as EKFAC's eigenvalues are C's diagonal in its basis."""
    p = problem("mlp")
    inner = EKFAC(labels="true").fit(EmpiricalFisher(library(p)), 0.02)
    wanted = sum(float((f.ekfac / (f.ekfac + 0.02)).sum()) for f in inner.factors.values())
    assert float((matrix_of(p, inner) @ p.empirical_fisher()).trace()) == pytest.approx(wanted, rel=1e-9)
    assert preconditioned_spectrum(inner, probes=400)[1] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("seed", range(8))
def test_mean_squares_are_stable_below_the_bound_of_the_preconditioned_step(seed):
    """a < 2 / (nu + c d / |B|), with a preconditioner that has nothing to do with C, on all sign patterns (c = 1)."""
    rng = torch.Generator().manual_seed(seed)
    levels = torch.rand(5, generator=rng, dtype=torch.float64) ** 3
    g = all_signs(5) * levels.sqrt()
    each = g.unsqueeze(2) * g.unsqueeze(1)
    root = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    P, damping, batch = root @ root.T + 0.1 * eye(5), 0.01, 1 + seed % 3
    nu = float(torch.linalg.eigvals(P @ (torch.diag(levels) + damping * eye(5))).real.max())
    bound = 2 / (nu + float((P.diagonal() * levels).sum()) / batch)
    assert growth(each, damping, 0.999 * bound, batch, P) < 1 < growth(each, damping, 3 * bound, batch, P)


# --- truncated series ---


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_a_truncated_series_has_a_closed_form(steps):
    """a sum_{j<J} (I - a A)^j = A^-1 (I - (I - a A)^J), from zero."""
    p = problem("mlp")
    b, damping = right_hand_sides(p), 0.1
    A = p.ggn() + damping * eye(p.dim)
    step = 0.7 / largest(A)
    left = torch.linalg.matrix_power(eye(p.dim) - step * A, steps)
    found = solve(p, Neumann(step=step, batch=4, steps=steps, start="zero").fit(FullBatch(library(p)), damping), b)
    close(found, dense(p.ggn(), damping, b - b @ left), 1e-10)


def test_truncation_damps_by_one_over_the_length_within_30_percent():
    """In every eigendirection the J-step answer is 1 to 1.2985 times that of a damping of 1 / (a J) more."""
    p = problem("mlp")
    values, directions = torch.linalg.eigh(p.ggn())
    damping = 1e-3 * float(values[-1])
    curvature, step = Quick(library(p), p.ggn().expand(p.n, -1, -1)), 1e-2 / float(values[-1])
    for k in (1, 3, 6):  # the ratio peaks at the k-th eigenvalue
        steps = round(1.793 / (step * float(values[-k] + damping)))
        inverse = Neumann(step=step, batch=1, steps=steps, start="zero").fit(curvature, damping)
        x = (solve(p, inverse, directions.T.contiguous(), certify=False) * directions.T).sum(1)
        ratio = x * (values + damping + 1 / (step * steps))
        assert float(ratio.min()) >= 1 - 3e-3 and 1.298 < float(ratio.max()) < 1.2985 * (1 + 3e-3)
    u = torch.logspace(-6, 6, 20_001, dtype=torch.float64)
    exact = -torch.expm1(-u) * (1 + 1 / u)
    assert float(exact.min()) >= 1 and float(exact.max()) == pytest.approx(1.2985, abs=1e-4)
    assert float(u[exact.argmax()]) == pytest.approx(1.793, abs=2e-3)


# --- the iteration ---


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("preconditioner", [Identity(), EKFAC(labels="true"), KFAC(), Exact()])
def test_full_batches_converge_to_the_dense_solve(preconditioner, momentum):
    p = problem("mlp")
    damping, b = 0.2, right_hand_sides(p)
    curvature = FullBatch(library(p))
    nu, _ = preconditioned_spectrum(preconditioner.fit(curvature, damping))
    solver = Neumann(preconditioner, step=1 / (1.2 * nu), steps=400, momentum=momentum)
    solution = solving.solve(solver.fit(curvature, damping), p.unflatten(b))
    close(p.flatten(solution.x), dense(p.ggn(), damping, b))
    assert (solution.residual < 1e-8).all() and solution.steps == 400


def test_full_batches_converge_at_the_predicted_rate():
    """Along an eigenvector of eigenvalue mu the residual shrinks by 1 - a (mu + damping) a step."""
    p = problem("mlp")
    values, directions = torch.linalg.eigh(p.ggn())
    b = directions[:, [-1, -4]].T
    step, damping = 0.3 / float(values[-1]), 0.1
    solver = Neumann(step=step, steps=20, start="zero")
    history = solving.solve(solver.fit(FullBatch(library(p)), damping), p.unflatten(b)).history
    rate = 1 - step * (values[[-1, -4]] + damping)
    close(history[:20], rate ** torch.arange(20).unsqueeze(1))


def test_too_long_a_step_diverges_and_says_which():
    p = problem("mlp")
    largest = float(torch.linalg.eigvalsh(p.ggn())[-1])
    solver = Neumann(step=3 / largest, steps=400)
    with pytest.raises(DivergenceError, match="diverged at step .* of 400.*step size.*Lower the step size"):
        solving.solve(solver.fit(FullBatch(library(p)), 0.01), p.unflatten(right_hand_sides(p)))


def test_one_step_of_astra_from_zero_is_ekfac():
    p = problem("mlp")
    b = p.unflatten(right_hand_sides(p))
    curvature = GGN(library(p))
    ekfac = EKFAC().fit(curvature, 0.1)
    astra = ASTRA(step=1.0, steps=1, momentum=0.0, start="zero", batch=3).fit(curvature, 0.1)
    close(p.flatten(solving.solve(astra, b).x), p.flatten(solving.solve(ekfac, b).x), 1e-12)
    none = Neumann(preconditioner=EKFAC(), step=1e-12, steps=1).fit(curvature, 0.1)  # and so is where it starts from
    close(p.flatten(solving.solve(none, b).x), p.flatten(solving.solve(ekfac, b).x), 1e-9)


def test_an_exact_preconditioner_solves_in_one_full_step():
    p = problem("mlp")
    b = right_hand_sides(p)
    solver = Neumann(Exact(), step=1.0, steps=1, start="zero")
    close(solve(p, solver.fit(FullBatch(library(p)), 0.05), b), dense(p.ggn(), 0.05, b))


def test_the_published_schedule_is_heavy_ball_with_a_step_that_halves():
    """Two hundred steps written out again, on the same minibatches."""
    p = problem("mlp")
    b, damping = right_hand_sides(p, 2), 0.1
    curvature = GGN(library(p))
    solver = ASTRA(step=0.02, batch=6, steps=120, decay_every=50, seed=4)
    inverse = solver.fit(curvature, damping)
    P, rng = EKFAC().fit(curvature, damping), torch.Generator().manual_seed(4)
    jacobian, hessian = p.jacobian(), p.output_hessians()
    x, m = solve(p, P, b, certify=False), torch.zeros_like(b)
    for k in range(120):
        i = torch.randint(p.n, (6,), generator=rng)
        matrix = torch.einsum("nkd,nkl,nle->de", jacobian[i], hessian[i], jacobian[i]) / 6
        m = 0.9 * m + solve(p, P, b - x @ matrix - damping * x, certify=False)
        x = x + 0.02 * 0.5 ** (k // 50) * m
    close(solve(p, inverse, b), x)


def test_the_step_and_the_number_of_steps_follow_from_the_spectrum():
    p = problem("mlp")
    damping = 0.1
    A = p.ggn() + damping * torch.eye(p.dim).double()
    plan = Neumann(batch=64).fit(GGN(library(p)), damping).plan
    nu, trace = float(torch.linalg.eigvalsh(A)[-1]), float(p.ggn().trace())
    assert plan.nu == pytest.approx(1.1 * (nu - damping) + damping, rel=1e-3)
    assert plan.effective_dimension == pytest.approx(trace, rel=0.3)
    t = plan.constant * plan.effective_dimension / 64
    assert plan.constant >= 2 and plan.step == pytest.approx(1 / max(plan.nu, (plan.nu + damping + t) / 2))
    assert plan.steps == math.ceil(2 / (plan.step * damping)) and plan.batch == 64
    heavy = ASTRA(batch=64).fit(GGN(library(p)), damping).plan
    assert heavy.step == pytest.approx(0.1 / (1.1 * heavy.nu + 2 * heavy.effective_dimension / 64))
    assert heavy.steps == 200
    given = Neumann(step=0.1, steps=7, batch=4).fit(GGN(library(p)), damping).plan
    assert (given.step, given.steps, given.nu) == (0.1, 7, 0.0)


@pytest.mark.parametrize("solver", [Neumann(batch=8), ASTRA(batch=8), Neumann(EKFAC(), batch=4)])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "mlp_regression"])
def test_what_is_chosen_does_not_diverge(name, solver):
    p = problem(name)
    b = p.measurement_gradients()
    solution = solving.solve(solver.fit(GGN(library(p)), 0.1), p.unflatten(b))
    if solution.predicted is None:
        assert (solution.residual < 1).all()
    else:
        x = dense(p.ggn(), 0.1, b)
        error = (p.flatten(solution.x) - x).norm(dim=1) / x.norm(dim=1)
        assert (error <= 2 * solution.predicted).all() and (error < 0.5).all() and solution.converged.all()


def test_the_mean_over_seeds_is_the_full_batch():
    """The expected iterate is the one of the whole matrix: the noise has mean zero and the map is linear."""
    p = problem("mlp")
    b, runs = right_hand_sides(p, 1), 200
    options = {"step": 0.05, "steps": 5, "start": "zero"}
    wanted = solve(p, Neumann(**options).fit(FullBatch(library(p)), 0.1), b)
    curvature = cached(GGN(library(p)))
    found = torch.cat(
        [solve(p, Neumann(batch=4, seed=s, **options).fit(curvature, 0.1), b, certify=False) for s in range(runs)]
    )
    error = float((found.mean(0) - wanted[0]).norm())
    expected = float(found.std(0).norm()) / runs**0.5
    assert error < 3 * expected and expected < 0.05 * float(wanted.norm())


@pytest.mark.parametrize("options", [{"step": 0.0}, {"batch": 0}, {"steps": -1}, {"decay": 0.0}, {"momentum": 1.0}])
def test_bad_hyperparameters_are_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        Neumann(**options)
    with pytest.raises(InputError, match="start must be 'preconditioned' or 'zero', got 'warm'"):
        Neumann(start="warm")  # type: ignore[arg-type]
