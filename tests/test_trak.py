"""TRAK against its formula written out in float64, with the projection as an explicit matrix."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import solving
import wherefrom
from problems import TinyProblem, problem
from wherefrom import TRAK, Classification, DivergenceError, Exact, Fitted, InputError, Regression
from wherefrom.curvature.lanczos import embedding


def close(found, wanted, tolerance: float = 1e-09) -> None:
    solving.close(found, wanted, tolerance)


pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
NAMES = ["mlp", "mlp_regression", "mlp_regression_scalar", "masked_sequence", "tied_embedding", "cnn_groups", "norms"]


def projection(p: TinyProblem, size: int, seed: int) -> Tensor:
    """P written out, (k, D)."""
    like = torch.zeros((), dtype=torch.float64)
    return torch.cat([embedding(p.shapes, n, range(size), size, seed, like).flatten(1) for n in p.shapes], 1)


def slopes(p: TinyProblem) -> Tensor:
    """dl / df of the training examples, by autograd over the outputs of each: (N,)."""
    found = []
    for data in p.batches(1):
        h = p.reference(data[0]).detach().requires_grad_()
        loss, f = (torch.autograd.grad(function(h, data).sum(), h)[0] for function in (p.loss, p.measurement))
        found.append((loss * f).sum() / (f * f).sum() if f.any() else torch.zeros(()).double())
    return torch.stack(found)


def first_factor(p: TinyProblem, P: Tensor, ratio: float) -> Tensor:
    """phi_q^T (Phi^T Phi + reg I)^-1 phi_i, (Q, N)."""
    phi, queries = p.measurement_gradients(p.train) @ P.T, p.measurement_gradients() @ P.T
    gram = phi.T @ phi
    reg = ratio * gram.diagonal().mean() * torch.eye(len(gram)).double()
    return queries @ torch.linalg.solve(gram + reg, phi.T)


def fitted(p: TinyProblem, **options) -> Fitted:
    return TRAK(**options).fit(p.model, p.task, p.train)


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "odd_parameters"])
@pytest.mark.parametrize(("size", "regularisation", "ratio"), [(3, None, 0.0), (7, None, None), (12, 0.2, 0.2)])
def test_scores_equal_the_formula_with_an_explicit_projection(name, size, regularisation, ratio):
    p = problem(name)
    if ratio is None:  # as it stands: none for few directions
        ratio = 0.0 if size < p.n / 2 else size / p.n
    found = fitted(p, size=size, regularisation=regularisation, seed=4, batch_size=4).score(p.queries)
    close(found.values, p.n * first_factor(p, projection(p, size, 4), ratio) * slopes(p))
    assert found.residual is None and found.converged.all()


@pytest.mark.parametrize("name", NAMES)
def test_as_many_directions_as_parameters_take_the_gradients_as_they_are(name):
    p = problem(name)
    wanted = p.n * first_factor(p, torch.eye(p.dim).double(), 1e-3) * slopes(p)
    for size in (p.dim, p.dim + 1):
        close(fitted(p, size=size, regularisation=1e-3).score(p.queries).values, wanted)
    assert not torch.allclose(fitted(p, size=p.dim - 1, regularisation=1e-3).score(p.queries).values, wanted)


def test_the_weights_are_what_the_paper_and_the_squared_error_have():
    p = problem("mlp")
    right = p.outputs().softmax(1).gather(1, p.train[1].unsqueeze(1))[:, 0]
    close(slopes(p), 1 - right, 1e-12)
    q = problem("mlp_regression_scalar")
    close(slopes(q), 2 * (q.outputs()[:, 0] - q.train[1]).abs(), 1e-12)
    for each in (p, q):
        close(fitted(each, size=3).members[0].weights, slopes(each), 1e-12)


def linear(n: int = 40) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(n + 3, 4, generator=rng).double(), torch.randn(n + 3, generator=rng).double()
    return nn.Linear(4, 1).double(), (x[:n], y[:n]), (x[n:], y[n:])


def test_without_projection_it_is_exact_for_least_squares_but_for_the_curvature_of_the_loss():
    model, train, queries = linear()
    found = TRAK().fit(model, Regression(), train).score(queries).values
    exact = wherefrom.attribute(model, Regression(), train, queries, solver=Exact(), damping=1e-13)
    close(found, 2 * exact.values)  # the second derivative of (h - y)^2, which TRAK leaves out


class Scaled(Classification):
    def measurement(self, outputs, batch):
        return -3 * super().measurement(outputs, batch)


@pytest.mark.parametrize("size", [3, 8, 10_000])
def test_the_sign_follows_the_measurement_and_its_scale_changes_no_rank(size):
    p = problem("mlp")
    found = TRAK(size=size).fit(p.model, Scaled(), p.train).score(p.queries)
    close(found.values, fitted(p, size=size).score(p.queries).values / -3)


def test_queries_may_be_measured_in_another_way():
    p = problem("mlp")
    trak = fitted(p, size=5)
    scaled = trak.score(p.queries, lambda outputs, batch: -3 * p.task.measurement(outputs, batch))
    close(scaled.values, -3 * trak.score(p.queries).values)
    other = trak.score(p.queries, p.task.loss).values
    rates = torch.autograd.grad
    for i, q in enumerate(p.batches(1, p.queries)):  # the loss is a function of the margin
        h = p.reference(q[0]).detach().requires_grad_()
        f, loss = rates(p.measurement(h, q).sum(), h)[0], rates(p.loss(h, q).sum(), h)[0]
        close(other[i], trak.score(p.queries).values[i] * float((loss * f).sum() / (f * f).sum()))


def test_examples_without_a_label_have_no_influence():
    p = problem("masked_sequence")
    values = fitted(p, size=3).score(p.queries).values
    assert (values[:, 1] == 0).all() and values.isfinite().all() and values[:, 2].abs().min() > 0


# --- several models -------------------------------------------------------------------------------------------------


def test_factors_are_averaged_over_models_before_they_are_multiplied():
    p = problem("mlp")
    members = []
    for seed in (1, 2, 3):
        reference, rng = copy.deepcopy(p.reference), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in reference.parameters():
                weight += 0.3 * torch.randn(weight.shape, generator=rng, dtype=torch.float64)
        members.append(dataclasses.replace(p, model=copy.deepcopy(reference), reference=reference, cache={}))
    factor = torch.stack([first_factor(m, projection(m, 4, 7 + i), 0.0) for i, m in enumerate(members)]).mean(0)
    weights = torch.stack([slopes(m) for m in members]).mean(0)
    trak = TRAK(size=4, seed=7, batch_size=4).fit([m.model for m in members], p.task, p.train)
    close(trak.score(p.queries).values, p.n * factor * weights)


# --- what must change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "masked_sequence"])
def test_how_the_work_is_cut_changes_nothing(name):
    p = problem(name)
    whole = fitted(p, size=7).score(p.queries).values
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"memory": 1.0, "batch_size": 3}, {"memory": 64 * p.dim}):
        trak = fitted(p, size=7, **options)
        close(trak.score(p.queries).values, whole)
        close(torch.cat([trak.score(q).values for q in p.batches(1, p.queries)]), whole)


def test_a_seed_is_a_projection():
    p = problem("mlp")
    one, again, other = (fitted(p, size=4, seed=s).score(p.queries).values for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.allclose(one, other)


def test_parameters_can_be_selected():
    p = problem("mlp")
    last = torch.cat([torch.arange(p.dim)[p.slices[name]] for name in ("4.weight", "4.bias")])
    phi, queries = p.measurement_gradients(p.train)[:, last], p.measurement_gradients()[:, last]
    gram = phi.T @ phi
    gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    found = fitted(p, parameters=r"^4\.", regularisation=0.1).score(p.queries)
    close(found.values, p.n * queries @ torch.linalg.solve(gram, phi.T) * slopes(p))
    assert f"{len(last)} of {p.dim} trainable" in found.provenance["coverage"]
    assert found.provenance["solver"] == "TRAK(size=4096, regularisation=0.1, seed=0)"
    assert set(found.provenance["seconds"]) == {"fit", "scores"}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_second_moment_is_refused(dtype):
    model, (x, y), _ = linear()
    model, x, labels = nn.Linear(4, 2).to(dtype), x.to(dtype), (y > 0).long()  # rank 5 of 10: only differences count
    with pytest.raises(DivergenceError, match=r"40 examples in k = 10 dimensions is singular.*raise regularisation"):
        TRAK().fit(model, Classification(), (x, labels))
    TRAK(regularisation=1e-3).fit(model, Classification(), (x, labels))
    TRAK(size=5).fit(model, Classification(), (x, labels))


def test_more_directions_than_examples_need_a_ridge():
    p = problem("mlp")
    with pytest.raises(DivergenceError, match="size below the number of examples"):
        fitted(p, size=p.n + 1, regularisation=0.0)


def test_bad_arguments_are_refused():
    p = problem("mlp")
    with pytest.raises(InputError, match="model must be a model, or several, got none"):
        TRAK().fit([], p.task, p.train)
    for options in ({"size": 0}, {"regularisation": -1.0}):
        with pytest.raises(InputError, match="size and regularisation must be"):
            fitted(p, **options)
