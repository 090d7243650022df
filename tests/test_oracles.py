"""Independent libraries on the same problems: curvlinops for matrices, kronfluence for EKFAC and its scores."""

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from curvlinops import EKFACLinearOperator, FisherType, GGNLinearOperator, KFACLinearOperator
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as PeerTask
from torch import nn
from torch.utils.data import TensorDataset

import solving
from problems import TinyProblem, problem
from solving import close
from wherefrom import EKFAC, GGN, KFAC, Classification, Damping, EmpiricalFisher, Influence, Problem, Regression, Solver
from wherefrom.data.examples import Examples

SEED = 0


def columns(operator, p: TinyProblem) -> torch.Tensor:
    """A linear operator of curvlinops as a matrix over the flat parameters: (D, D)."""
    return operator @ torch.eye(p.dim, dtype=torch.float64)


def curvlinops(p: TinyProblem, kind, **options):
    """Its operators take the mean over examples of a mean-reduced loss."""
    x, y = p.train
    loss = nn.CrossEntropyLoss() if isinstance(p.task, Classification) else nn.MSELoss()
    data = [(x[i : i + 4], y[i : i + 4]) for i in range(0, p.n, 4)]
    model = copy.deepcopy(p.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(model, loss, list(model.parameters()), data, **options)


def scale(p: TinyProblem) -> float:
    """MSELoss also divides by the number of outputs; our loss is their sum."""
    return 1.0 if isinstance(p.task, Classification) else float(p.train[1].shape[1])


@pytest.mark.parametrize("product", ["rows", "jvp"])
@pytest.mark.parametrize("name", ["mlp", "mlp_no_bias", "mlp_regression"])
def test_the_gauss_newton_matrix_is_the_one_of_curvlinops(name, product):
    p = problem(name)
    theirs = scale(p) * columns(curvlinops(p, GGNLinearOperator), p)
    curvature = GGN(Problem(p.model, p.task, p.train, batch_size=3), product)
    ours = p.flatten(solving.product(curvature, p.unflatten(torch.eye(p.dim, dtype=torch.float64))))
    close(ours, theirs, 1e-9)


@pytest.mark.parametrize(("solver", "kind"), [(EKFAC, EKFACLinearOperator), (KFAC, KFACLinearOperator)])
@pytest.mark.parametrize("name", ["mlp", "mlp_no_bias"])
def test_the_factors_are_those_of_curvlinops(name, solver, kind):
    """With true labels, and a layer's weight and bias as one matrix; its factor is inverted here, densely."""
    p = problem(name)
    options = {"fisher_type": FisherType.EMPIRICAL, "separate_weight_and_bias": False, "check_deterministic": False}
    theirs = columns(curvlinops(p, kind, **options), p)
    close(theirs, theirs.T, 1e-9)
    inverse = solver(labels="true").fit(GGN(Problem(p.model, p.task, p.train)), 0.01)
    ours = p.flatten(solving.apply(inverse, p.unflatten(torch.eye(p.dim, dtype=torch.float64))))
    close(ours, torch.linalg.inv(theirs + 0.01 * torch.eye(p.dim).double()), 1e-7)


# --- kronfluence ---


def digits() -> tuple[nn.Module, Classification, tuple, tuple]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 10))
    return model, Classification(), (x[:250], y[:250]), (x[250:260], y[250:260])


def diabetes() -> tuple[nn.Module, Regression, tuple, tuple]:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) * 20, torch.tensor(y, dtype=torch.float32) / 77 - 2
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.GELU(), nn.Linear(8, 1))
    return model, Regression(), (x[:250], y[:250, None]), (x[250:260], y[250:260, None])


def trained(make, steps: int = 150):
    torch.manual_seed(SEED)
    model, task, train, queries = make()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        task.loss(model(train[0]), train).mean().backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval(), task, train, queries


class Summed(PeerTask):
    """Our task in kronfluence's form: sums over the batch."""

    def __init__(self, classify: bool):
        self.classify = classify

    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum") if self.classify else (model(x) - y).square().sum()

    def compute_measurement(self, batch, model):
        x, y = batch
        h = model(x)
        if not self.classify:
            return (h - y).abs().sum()
        others = h.scatter(-1, y[:, None], -torch.inf).logsumexp(-1, keepdim=True)
        return (others - h.gather(-1, y[:, None])).sum()


def kronfluence(model, task, train, queries, damping: float | None, strategy: str, folder) -> torch.Tensor:
    """Its pairwise scores with true labels: (Q, N), in our sign. ``damping`` None is 0.1 x the mean eigenvalue."""
    peer = Summed(isinstance(task, Classification))
    prepared = prepare_model(copy.deepcopy(model), peer)
    analyzer = Analyzer("run", prepared, peer, cpu=True, disable_tqdm=True, output_dir=folder, log_level=logging.ERROR)
    arguments = FactorArguments(
        strategy=strategy, use_empirical_fisher=True, covariance_max_examples=None, lambda_max_examples=None
    )
    data, asked = TensorDataset(*train), TensorDataset(*queries)
    analyzer.fit_all_factors("factors", data, per_device_batch_size=64, factor_args=arguments)
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        asked,
        data,
        per_device_query_batch_size=10,
        per_device_train_batch_size=64,
        score_args=ScoreArguments(damping_factor=damping),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].double()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("damping", [1e-2, None])
@pytest.mark.parametrize("make", [digits, diabetes])
def test_ekfac_scores_are_those_of_kronfluence(make, damping, tmp_path):
    model, task, train, queries = trained(make)
    theirs = kronfluence(model, task, train, queries, damping, "ekfac", tmp_path)
    ours = scores(EKFAC(labels="true"), damping, model, task, train, queries)
    close(ours, theirs, 1e-3)
    exact = scores(EKFAC(labels="true"), damping, model.double(), task, *double(train, queries))
    close(exact, theirs, 1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [digits, diabetes])
def test_kfac_scores_are_those_of_kronfluence(make, tmp_path):
    """One position per example, so that its eigenvalues lack no factor."""
    model, task, train, queries = trained(make)
    theirs = kronfluence(model, task, train, queries, 1e-2, "kfac", tmp_path)
    close(scores(KFAC(labels="true"), 1e-2, model, task, train, queries), theirs, 1e-3)


def scores(solver: Solver, damping: float | None, model, task, train, queries) -> torch.Tensor:
    """``damping`` None is relative to the mean eigenvalues of the empirical Fisher, as kronfluence has it."""
    options = {"curvature": EmpiricalFisher, "batch_size": 100, "progress": False}
    influence = Influence(solver, Damping.relative(0.1) if damping is None else damping, **options)
    return influence.fit(model, task, train).score(queries, certify=False).values.double()


def double(*data: tuple) -> list[tuple]:
    return [tuple(t.double() if t.is_floating_point() else t for t in Examples(d).data) for d in data]
