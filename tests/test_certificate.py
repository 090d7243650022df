"""The certificate of approximate methods: agreement with accurate scores, within a budget of time."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from problems import problem
from wherefrom import (
    CG,
    EKFAC,
    GGN,
    KFAC,
    Arnoldi,
    Classification,
    DataInf,
    EmpiricalFisher,
    Exact,
    Hessian,
    HyperINF,
    Identity,
    Influence,
    Nystrom,
    RandProj,
    attribute,
)
from wherefrom.methods import agreement as checks

APPROXIMATE = [EKFAC(), KFAC(), DataInf(), Identity(), Arnoldi(rank=4, steps=10), Nystrom(rank=5), RandProj(16)]
DAMPING = 0.05


@pytest.fixture(autouse=True)
def _no_floor_of_time(monkeypatch):
    """What is checked must not depend on how busy the machine is."""
    monkeypatch.setattr(checks, "FLOOR", 1e6)


@pytest.mark.parametrize("solver", APPROXIMATE, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["mlp", "masked_sequence"])
@pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
def test_agreement_is_that_with_the_dense_answer(name, solver, monkeypatch):
    monkeypatch.setattr(checks, "TOLERANCE", 1e-9)  # at the usual one the ranks of so few examples may move
    p = problem(name)
    found = attribute(p.model, p.task, p.train, p.queries, solver=solver, damping=DAMPING)
    exact = p.exact_scores(p.ggn(), DAMPING)
    agreement = found.agreement
    drawn = agreement["queries"]
    assert len(drawn) == 2 and agreement["top"] == max(1, p.n // 4)
    wanted = min(float(spearmanr(found.values[q].numpy(), exact[q].numpy()).statistic) for q in drawn)
    assert agreement["rank correlation"] == pytest.approx(wanted, abs=1e-9)
    assert found.residual is not None and found.residual.shape == (3,)
    assert f"ranks as the accurate answer does: {agreement['rank correlation']:.2f}" in str(found)


@pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
def test_scores_are_the_same_with_and_without_a_certificate():
    p = problem("mlp")
    for solver in (*APPROXIMATE, HyperINF()):
        curvature = EmpiricalFisher if isinstance(solver, HyperINF) else GGN
        fitted = Influence(solver, DAMPING, curvature).fit(p.model, p.task, p.train)
        bare, certified = fitted.score(p.queries, certify=False), fitted.score(p.queries)
        assert torch.equal(bare.values, certified.values)
        assert bare.agreement is None and bare.residual is None and certified.agreement is not None


def test_methods_that_solve_the_system_have_a_residual_and_no_agreement():
    p = problem("mlp")
    for solver in (Exact(), CG(EKFAC(), tolerance=1e-8), "auto"):
        found = attribute(p.model, p.task, p.train, p.queries, solver=solver, damping=DAMPING)
        assert found.agreement is None and float(found.residual.max()) < 0.03


def test_what_cannot_be_solved_is_not_checked():
    p = problem("mlp")
    found = Influence(EKFAC(), 1e-3, Hessian).fit(p.model, p.task, p.train).score(p.queries)
    assert "not positive definite" in found.agreement["not checked"]
    assert "not checked against accurate scores" in str(found)


def test_agreement_survives_saving(tmp_path):
    p = problem("mlp")
    found = attribute(p.model, p.task, p.train, p.queries, solver=EKFAC(), damping=DAMPING)
    found.save(tmp_path / "scores.safetensors")
    again = type(found).load(tmp_path / "scores.safetensors")
    assert again.agreement == found.agreement and again.row_error == found.row_error


class Slow(nn.Module):
    """A model whose products with C cost far more than its gradients: many outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 2000)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_certificate_costs_no_more_than_the_fit_and_the_scores(monkeypatch):
    monkeypatch.setattr(checks, "FLOOR", 0.0)
    torch.manual_seed(0)
    x, y = torch.randn(400, 16), torch.randint(2000, (400,))
    fitted = Influence(EKFAC(limit=256), 0.01, batch_size=32).fit(Slow(), Classification(), (x, y))
    queries = torch.randn(60, 16), torch.randint(2000, (60,))
    fitted.score(queries)  # what PyTorch loads once in a process is not its cost
    seconds = fitted.score(queries).provenance["seconds"]
    spent = seconds["fit"] + seconds["solve"] + seconds["scores"]
    assert seconds["certificate"] <= 1.5 * spent  # a product that has begun is ended
