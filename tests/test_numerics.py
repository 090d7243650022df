"""Numbers that were once mistaken: convexity, sampling floors, implied dampings, caches, and messages that help."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wherefrom
from problems import NAMES, problem
from wherefrom import (
    CG,
    EKFAC,
    GGN,
    KFAC,
    SOURCE,
    AttributionError,
    Classification,
    Damping,
    DataInf,
    Dual,
    EmpiricalFisher,
    Exact,
    Hessian,
    HyperINF,
    Neumann,
    Problem,
    Regression,
    Task,
)
from wherefrom.curvature.lanczos import Estimate, Spectrum
from wherefrom.persample import vectors
from wherefrom.solvers.neumann import corollary

pytestmark = pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")


def mlp(outputs: int, inputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


# --- convexity ---


class Binary(Task):
    """Logistic loss of one output."""

    def outputs(self, model, batch):
        return model(batch[0])[:, 0]

    def loss(self, outputs, batch):
        return F.softplus(-outputs * (2.0 * batch[1] - 1))


class Weighted(Classification):
    """Cross-entropy with class weights in float32, which does not take float64 outputs."""

    def loss(self, outputs, batch):
        weight = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float32).to(outputs)
        return F.cross_entropy(outputs, batch[1], weight, reduction="none")


class Stubborn(Classification):
    """The same, and it refuses other dtypes."""

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1], torch.tensor([1.0, 3.0, 0.5, 2.0]), reduction="none")


class Poisson(Task):
    """Negative log-likelihood of counts, log rate as output."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return (outputs.exp() - outputs * batch[1].unsqueeze(1)).sum(1)


class Concave(Classification):
    """Cross-entropy and a little of what is not convex."""

    strength = 1e-3

    def loss(self, outputs, batch):
        return super().loss(outputs, batch) - self.strength * outputs.square().sum(1)


def confident(scale: float, dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A classifier whose margins grow with ``scale``."""
    torch.manual_seed(0)
    model, y = nn.Linear(6, 4).to(dtype), torch.randint(4, (64,))
    x = torch.randn(64, 6, dtype=dtype)
    x[:, :4] = 3 * F.one_hot(y, 4).to(dtype)
    with torch.no_grad():
        model.weight.copy_(scale * torch.eye(4, 6))
        model.bias.zero_()
    return model, (x, y)


@pytest.mark.parametrize("scale", [1, 3, 5, 8, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("task", [Classification(), Weighted(), Binary(), Poisson()], ids=lambda t: type(t).__name__)
def test_a_confident_model_of_a_convex_loss_is_convex(scale, dtype, task):
    model, data = confident(scale if not isinstance(task, Poisson) else -scale, dtype)
    if isinstance(task, Stubborn) and dtype == torch.float64:
        return
    curvature = GGN(Problem(model, task, data, batch_size=4, progress=False))
    for _ in curvature.gradients():
        pass
    assert curvature.psd


@pytest.mark.parametrize("scale", [1, 5, 15])
def test_a_loss_that_takes_no_float64_is_judged_in_its_own_precision(scale):
    model, data = confident(scale, torch.float32)
    curvature = GGN(Problem(model, Stubborn(), data, batch_size=4, progress=False))
    for _ in curvature.gradients():
        pass
    assert curvature.psd


@pytest.mark.parametrize("scale", [1, 5, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e-3, 0.1])
def test_a_loss_that_is_not_convex_is_found_out(scale, dtype, strength):
    model, data = confident(scale, dtype)
    task = Concave()
    task.strength = strength
    curvature = GGN(Problem(model, task, data, batch_size=4, progress=False))
    for _ in curvature.gradients():
        pass
    assert not curvature.psd
    for solver in (Dual(), DataInf(), HyperINF()):
        with pytest.raises(AttributionError, match="not convex in the outputs.*EmpiricalFisher.*Exact"):
            inverse = solver.fit(curvature, 0.1)
            inverse.apply({name: torch.ones(1, *s, dtype=dtype) for name, s in curvature.problem.shapes.items()})


@pytest.mark.parametrize("solver", [DataInf(), HyperINF(), Dual(), CG(Dual()), CG()], ids=repr)
def test_a_confident_float32_classifier_is_solved(solver):
    model, (x, y) = confident(3, torch.float32)  # float32 itself loses the gradients of more confident ones
    influence = wherefrom.Influence(solver, 0.01, batch_size=4, progress=False)
    found = influence.fit(model, Classification(), (x, y)).score((x[:3], y[:3])).values
    exact = wherefrom.Influence(Exact(form="primal"), 0.01).fit(model.double(), Classification(), (x.double(), y))
    wanted = exact.score((x[:3].double(), y[:3])).values
    assert found.isfinite().all()
    if isinstance(solver, CG):
        assert float((found - wanted).norm()) <= 1e-2 * float(wanted.norm())


# --- what the messages advise helps ---


class L1(Task):
    """Absolute error."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return (outputs[:, 0] - batch[1]).abs()


class Hinge(L1):
    """Hinge loss of a label's sign."""

    def loss(self, outputs, batch):
        return (1 - outputs[:, 0] * batch[1].sign()).clamp(min=0)


class Pinball(L1):
    """Quantile loss."""

    def loss(self, outputs, batch):
        error = batch[1] - outputs[:, 0]
        return torch.maximum(0.9 * error, -0.1 * error)


class Gaussian(L1):
    """Likelihood with mean and log variance: not convex in the outputs."""

    def loss(self, outputs, batch):
        variance = outputs[:, 1:].exp()
        return F.gaussian_nll_loss(outputs[:, :1], batch[1].unsqueeze(1), variance, reduction="none").sum(1)


X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DATA = (X, 3 * X[:, 0])


@pytest.mark.parametrize("task", [L1(), Hinge(), Pinball()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("damping", [Damping.per_example(), Damping.relative(0.1)], ids=str)
def test_a_loss_without_curvature_asks_for_the_empirical_fisher(task, damping):
    model = mlp(1).double()
    with pytest.raises(AttributionError, match="trace of GGN.*must be positive.*EmpiricalFisher") as error:
        wherefrom.Influence("auto", damping).fit(model, task, DATA)
    assert len(str(error.value)) < 300
    fitted = wherefrom.Influence("auto", damping, EmpiricalFisher).fit(model, task, DATA)
    assert bool(fitted.score((X[:2], DATA[1][:2])).converged.all())


@pytest.mark.parametrize("solver", [CG(tolerance=1e-9), CG(tolerance=1e-9, block=True), CG(Dual()), Dual()], ids=repr)
def test_a_likelihood_that_is_not_convex_is_solved_as_advised(solver):
    model, queries = mlp(2).double(), (X[:2], DATA[1][:2])
    with pytest.raises(AttributionError, match="not convex in the outputs.*EmpiricalFisher.*Exact.form='primal'"):
        wherefrom.Influence(solver, 0.01).fit(model, Gaussian(), DATA).score(queries)
    exact = wherefrom.Influence(Exact(form="primal"), 0.01).fit(model, Gaussian(), DATA).score(queries)
    assert float(exact.residual.max()) < 1e-8
    fisher = wherefrom.Influence(solver, 0.01, EmpiricalFisher).fit(model, Gaussian(), DATA).score(queries)
    assert bool(fisher.converged.all())


# --- the floor of Corollary 1 ---


def measured(terms: float, constant: float = 0.3) -> Spectrum:
    one = Estimate(1.0, 0.0)
    return Spectrum(Estimate(100.0, 0.0), one, one, 0.0, 1.0, one, Estimate(constant, 0.0), 10**6, 10, 64, terms)


def test_the_floor_of_c_is_that_of_a_token():
    assert corollary(measured(1.0), 0.1).constant == 2.0
    assert corollary(measured(4.0), 0.1).constant == 0.5
    assert corollary(measured(50.0), 0.1).constant == 0.3  # what was measured
    assert corollary(measured(50.0, 3.0), 0.1).constant == 3.0
    assert corollary(measured(4.0), 0.1).batch * 4 == pytest.approx(corollary(measured(1.0), 0.1).batch, abs=4)


@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "tied_embedding", "cnn_groups", "mlp_regression"])
def test_an_example_has_as_many_terms_as_labelled_positions(name):
    p = problem(name)
    labels = p.train[1]
    tokens = p.name in ("masked_sequence", "tied_embedding")
    wanted = max(1.0, float((labels != -100).sum()) / len(labels)) if tokens else 1.0
    lib = Problem(p.model, p.task, p.train, batch_size=4, progress=False)
    assert GGN(lib).terms() == Hessian(lib).terms() == pytest.approx(wanted)
    assert EmpiricalFisher(lib).terms() == 1.0


def test_fewer_sequences_than_tokens_are_planned_and_do():
    """Sixteen independent tokens an example: the batch is that of the tokens, and the iteration gets there."""
    torch.manual_seed(0)
    x, y = torch.randn(600, 16, 5, dtype=torch.float64), torch.randint(3, (600, 16))
    model = nn.Linear(5, 3).double()
    problem_ = Problem(model, Classification(), (x, y), batch_size=200, progress=False)
    curvature = GGN(problem_)
    damping = 0.05 * curvature.terms()
    inverse = Neumann().fit(curvature, damping)
    plan = inverse.plan
    assert curvature.terms() == 16 and plan.constant < 2 and 0 < plan.batch <= 6
    b = {name: torch.randn(2, *s, dtype=torch.float64) for name, s in problem_.shapes.items()}
    solution, exact = inverse(b), Exact().fit(curvature, damping)(b)
    error = vectors.norm(vectors.add(solution.x, exact.x, -1.0)) / vectors.norm(exact.x)
    assert solution.converged.all() and (error <= 2 * solution.predicted).all() and (error < 0.5).all()


# --- dampings that training implies ---


@pytest.mark.parametrize(
    "schedule", [[0.1] * 30, [0.3] * 10 + [0.1] * 20, list(torch.linspace(0.2, 0.001, 31).tolist())]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("segments", [1, 3])
def test_from_training_is_the_damping_of_source(schedule, momentum, segments, tmp_path):
    p = problem("linear_regression")
    optimiser = torch.optim.SGD(p.model.parameters(), lr=schedule[0], momentum=momentum)
    recorder = wherefrom.Recorder(tmp_path, p.model, optimiser, every=5)
    for i, rate in enumerate(schedule):
        optimiser.param_groups[0]["lr"] = rate
        index = torch.arange(i % 5, i % 5 + 4)
        recorder.saw(index)
        optimiser.zero_grad()
        (0.01 * p.loss(p.model(p.train[0][index]), (p.train[0][index], p.train[1][index])).mean()).backward()
        optimiser.step()
    trajectory = recorder.close()
    source = SOURCE(trajectory=trajectory, segments=segments)
    implied = Damping.from_training(schedule, len(schedule), momentum, segments).value
    assert source.damping() == pytest.approx(implied, rel=1e-9)


@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "tied_embedding"])  # the dual form is the smaller one
def test_source_with_an_exact_basis(name, tmp_path):
    p = problem(name)
    optimiser = torch.optim.SGD(p.model.parameters(), lr=0.02)
    recorder = wherefrom.Recorder(tmp_path, p.model, optimiser, every=1)
    for i in range(3):
        recorder.saw(torch.arange(i, i + 3))
        optimiser.zero_grad()
        batch = tuple(t[i : i + 3] for t in p.train)
        p.loss(p.model(batch[0]), batch).mean().backward()
        optimiser.step()
    trajectory = recorder.close()
    found = SOURCE(trajectory=trajectory, segments=1, basis=Exact()).fit(p.model, p.task, p.train).score(p.queries)
    primal = SOURCE(trajectory=trajectory, segments=1, basis=Exact(form="primal")).fit(p.model, p.task, p.train)
    assert torch.equal(found.values, primal.score(p.queries).values)
    for basis in (Exact(form="dual"), CG(), Dual()):
        with pytest.raises(AttributionError, match="basis must be a solver that holds the eigenvalues"):
            SOURCE(trajectory=trajectory, segments=1, basis=basis).fit(p.model, p.task, p.train)


# --- caches ---

FITS = [
    EKFAC(),
    EKFAC(seed=3),
    EKFAC(labels="true"),
    KFAC(limit=2),
    CG(EKFAC()),
    Exact(),
    Dual(),
    DataInf(),
    HyperINF(),
]


@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "norms"])
@pytest.mark.parametrize("kind", ["rows", "jvp", "fisher", "hessian"])
def test_lambda_does_not_depend_on_what_was_fitted_before(name, kind):
    p = problem(name)
    make = {
        "rows": GGN,
        "jvp": lambda problem: GGN(problem, product="jvp"),
        "fisher": EmpiricalFisher,
        "hessian": Hessian,
    }[kind]
    dampings = (Damping.per_example(), Damping.relative(0.1))

    def resolve(curvature) -> list[dict[str, float]]:
        return [d.resolve(curvature) for d in dampings]

    try:
        wanted = resolve(make(Problem(p.model, p.task, p.train, batch_size=4)))
    except AttributionError:  # a Hessian of negative trace
        pytest.skip("no such damping")
    for before in FITS:
        curvature = make(Problem(p.model, p.task, p.train, batch_size=4))
        try:
            before.fit(curvature, 100.0)
        except AttributionError:
            continue
        assert resolve(curvature) == wanted, before


def test_the_mean_eigenvalue_is_the_trace_where_there_are_rows():
    for name in NAMES[:4]:
        p = problem(name)
        curvature = GGN(Problem(p.model, p.task, p.train, batch_size=4))
        EKFAC().fit(curvature, 0.1)
        damping = Damping.per_example().resolve(curvature)
        assert next(iter(damping.values())) == pytest.approx(float(p.ggn().trace()) / p.n, rel=1e-9)


# --- TRAK ---


def test_trak_in_more_dimensions_than_examples_still_ranks():
    """A logistic regression, which TRAK's linear model is exact for: scores must follow the exact influences."""
    torch.manual_seed(0)
    x = torch.randn(60, 20, dtype=torch.float64)
    y = (x @ torch.randn(20, 4, dtype=torch.float64) + torch.randn(60, 4)).argmax(1)
    model = nn.Linear(20, 4).double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=100)

    def loss():
        optimiser.zero_grad()
        value = F.cross_entropy(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimiser.step(loss)
    queries = (torch.randn(10, 20, dtype=torch.float64), torch.randint(4, (10,)))
    wanted = wherefrom.Influence(Exact(), 0.02).fit(model, Classification(), (x, y)).score(queries).values

    def agreement(**options) -> float:
        scores = wherefrom.TRAK(**options).fit(model, Classification(), (x, y)).score(queries).values
        pairs = zip(scores, wanted, strict=True)
        return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())

    for size in (40, 60, 80, 4096):
        assert agreement(size=size) > 0.5, size
    assert agreement(size=4096) > agreement(size=4096, regularisation=1e-3) + 0.1


def test_regression_stays_convex():
    p = problem("mlp_regression")
    curvature = GGN(Problem(p.model, Regression(), p.train))
    assert [len(rows) for rows in curvature.gradients()] and curvature.psd
