"""The proximal Bregman response: closed forms, dense influence, an independent optimiser, and LiSSA as its SGD."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import wherefrom
from problems import problem
from wherefrom.errors import ConvergenceWarning, InputError
from wherefrom.solvers import neumann
from wherefrom.tools.evaluate import PBRF, pbrf
from wherefrom.tools.evaluate.pbrf import divergence

EXAMPLES = (3, 0, 7)


def respond(p, examples=EXAMPLES, damping: float | wherefrom.Damping = 0.05, **options: Any) -> PBRF:
    """The response of a tiny problem, in ragged batches."""
    options = {"batch_size": 4, "tolerance": 1e-8, "progress": False} | options
    return pbrf(p.model, p.task, p.train, p.queries, examples, damping, **options)


def shifted(p, matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def f_at(p, flat: Tensor) -> Tensor:
    """The measurement of the queries with the parameters moved by ``flat`` (D,)."""
    moved = {n: q + flat[p.slices[n]].view(q.shape) for n, q in p.reference.named_parameters()}
    with torch.no_grad():
        return p.measurement(functional_call(p.reference, moved, (p.queries[0],)), p.queries)


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_linear_model_has_the_dense_influence():
    p = problem("linear_regression")
    found = respond(p)
    torch.testing.assert_close(found.values, p.exact_scores(p.ggn(), 0.05)[:, EXAMPLES], rtol=1e-8, atol=1e-8)
    assert found.converged.all() and (found.residual <= 1e-8).all() and (found.change < 1e-8).all()


@pytest.mark.parametrize("eps", [0.01, 1.0])
def test_a_linear_model_has_the_closed_form_at_any_eps(eps):
    """theta_eps - theta_s = -eps (G + lambda + eps H_z)^-1 g_z, for the loss of z is quadratic."""
    p = problem("linear_regression")
    A, J, H, g = shifted(p, p.ggn(), 0.3), p.jacobian(), p.output_hessians(), p.loss_gradients()
    expected = []
    for i in EXAMPLES:
        own = J[i].T @ H[i] @ J[i]
        up, down = (f_at(p, -e * torch.linalg.solve(A + e * own, g[i])) for e in (eps / 13, -eps / 13))
        expected.append((down - up) / (2 * eps / 13))
    found = respond(p, damping=0.3, eps=eps / 13)
    torch.testing.assert_close(found.values, torch.stack(expected, 1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["logistic", "mlp", "mlp_regression", "cnn_groups", "masked_sequence"])
def test_the_derivative_is_the_dense_influence(name):
    p = problem(name)
    found, exact = respond(p), p.exact_scores(p.ggn(), 0.05)[:, EXAMPLES]
    torch.testing.assert_close(found.values, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    assert found.converged.all() and (found.change < 1e-6).all()


def test_the_distance_from_the_derivative_is_of_second_order_in_eps():
    p = problem("mlp")
    exact = p.exact_scores(p.ggn(), 0.05)[:, EXAMPLES]
    responses = [respond(p, eps=eps) for eps in (3e-3, 3e-4)]
    far, near = ((r.values - exact).norm(dim=0) for r in responses)
    assert ((far / near > 70) & (far / near < 140)).all()
    torch.testing.assert_close(responses[0].change, far / exact.norm(dim=0), rtol=0.05, atol=0.0)


@pytest.mark.parametrize(
    ("name", "examples", "share"),
    [("mlp", (3, 7), 0.3), ("mlp_regression", (3, 7), 0.3), ("mlp_regression_scalar", (3, 8), 0.5)],
)
def test_a_large_weight_agrees_with_another_optimiser(name, examples, share):
    """torch's L-BFGS on the objective as it is written in the paper; the last needs shorter steps to converge."""
    p, damping = problem(name), 0.05
    eps = share / p.n
    found = respond(p, examples=examples, damping=damping, eps=eps)
    assert found.converged.all() and (found.change > 1e-3).all()  # here it is not linear
    h = p.outputs()

    def objective(model: nn.Module, i: int, eps: float) -> Tensor:
        there = model(p.train[0])
        if name == "mlp":
            distance = (h.softmax(1) * (h.log_softmax(1) - there.log_softmax(1))).sum(1)
        else:
            distance = (h - there).square().sum(1)
        pairs = zip(model.parameters(), p.reference.parameters(), strict=True)
        way = sum((a - b).square().sum() for a, b in pairs)
        return distance.mean() + damping / 2 * way + eps * p.loss(there, p.train)[i]

    def response(i: int, eps: float) -> Tensor:
        model = copy.deepcopy(p.reference)
        optimiser = torch.optim.LBFGS(
            model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = objective(model, i, eps)
            value.backward()
            return value

        optimiser.step(closure)
        with torch.no_grad():
            return p.measurement(model(p.queries[0]), p.queries)

    for column, i in enumerate(examples):
        expected = (response(i, -eps) - response(i, eps)) / (2 * eps)
        torch.testing.assert_close(found.values[:, column], expected, rtol=1e-6, atol=1e-6)


def test_a_group_responds_as_its_sum():
    p = problem("mlp")
    exact = p.exact_scores(p.ggn(), 0.05)
    found = respond(p, examples=[[1, 4, 5], [2]])
    torch.testing.assert_close(found.values[:, 0], exact[:, [1, 4, 5]].sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.values[:, 1], exact[:, 2], rtol=1e-6, atol=1e-6)


def test_only_the_selected_parameters_move():
    p = problem("mlp")
    some = torch.cat([torch.arange(p.dim)[p.slices[name]] for name in ("2.weight", "2.bias")])
    A = shifted(p, p.ggn()[some][:, some], 0.05)
    expected = p.measurement_gradients()[:, some] @ torch.linalg.solve(A, p.loss_gradients()[EXAMPLES, :][:, some].T)
    found = respond(p, parameters=r"^2\.")
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-6)
    assert set(found.damping) == {"2"}


def test_damping_by_block():
    p, damping = problem("mlp"), wherefrom.Damping.relative(0.5)
    found = respond(p, damping=damping)
    of = {n: found.damping[n.rpartition(".")[0]] for n in p.shapes}  # the blocks are the layers
    diagonal = torch.cat([torch.full((s.numel(),), of[n], dtype=torch.float64) for n, s in p.shapes.items()])
    assert len(set(found.damping.values())) == 3
    x = torch.linalg.solve(p.ggn() + diagonal.diag(), p.loss_gradients()[EXAMPLES, :].T)
    torch.testing.assert_close(found.values, p.measurement_gradients() @ x, rtol=1e-6, atol=1e-6)


def test_a_measurement_of_ones_own():
    p = problem("mlp")
    found = respond(p, measurement=p.task.loss)
    x = torch.linalg.solve(shifted(p, p.ggn(), 0.05), p.loss_gradients()[EXAMPLES, :].T)
    torch.testing.assert_close(found.values, p.loss_gradients(p.queries) @ x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 11}, {"memory": 2e4}])
def test_how_data_are_cut_changes_nothing(options):
    p = problem("mlp")
    torch.testing.assert_close(
        respond(p, eps=0.02, **options).values, respond(p, eps=0.02).values, rtol=1e-8, atol=1e-8
    )


def test_the_sign_and_scale_are_those_of_scores():
    p = problem("mlp")
    scores = wherefrom.attribute(p.model, p.task, p.train, p.queries, solver=wherefrom.Exact(), damping=0.05).values
    torch.testing.assert_close(respond(p).values, scores[:, EXAMPLES], rtol=1e-6, atol=1e-6)


# --- conventions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "masked_sequence"])
def test_the_divergence_of_cross_entropy_is_the_kullback_leibler_divergence(name):
    p, rng = problem(name), torch.Generator().manual_seed(0)
    trained = p.outputs()
    there = trained + torch.randn(trained.shape, generator=rng, dtype=torch.float64)
    kl = (trained.softmax(-1) * (trained.log_softmax(-1) - there.log_softmax(-1))).sum(-1)
    real = (p.train[1] != -100).double()
    found = divergence(p.task, there, trained, p.train)
    torch.testing.assert_close(found, (kl * real).reshape(p.n, -1).sum(1), rtol=1e-12, atol=1e-12)
    if name == "mlp":  # it knows no label
        torch.testing.assert_close(found, divergence(p.task, there, trained, (p.train[0], 3 - p.train[1])))


def test_the_divergence_of_squared_error_is_the_squared_distance():
    p, rng = problem("mlp_regression"), torch.Generator().manual_seed(0)
    trained = p.outputs()
    there = trained + torch.randn(trained.shape, generator=rng, dtype=torch.float64)
    found = divergence(p.task, there, trained, p.train)
    torch.testing.assert_close(found, (there - trained).square().sum(1), rtol=1e-12, atol=1e-12)


def test_sgd_on_the_objective_is_lissa():
    """With -(theta - theta_s) / eps for LiSSA's iterate, the same minibatches, and eps to 0."""
    p, step, damping, eps, example = problem("mlp"), 0.1, 0.05, 1e-7, 7
    solver = wherefrom.Neumann(step=step, batch=4, steps=8, start="zero", seed=5)
    curvature = wherefrom.GGN(wherefrom.Problem(p.model, p.task, p.train, progress=False))
    inverse = solver.fit(curvature, damping)
    assert isinstance(inverse, neumann.StochasticNeumann)
    b = wherefrom.Directions.from_parameters(curvature.problem.blocks, p.unflatten(p.loss_gradients()[[example]]))
    path = [p.flatten(x.to_parameters())[0].clone() for x, _ in inverse.iterates(b)]
    rng, trained = torch.Generator().manual_seed(5), p.outputs()
    start = {n: q.detach() for n, q in p.reference.named_parameters()}
    theta = {n: q.clone() for n, q in start.items()}
    for u in path:
        index = torch.randint(p.n, (4,), generator=rng)
        batch, own = tuple(t[index] for t in p.train), tuple(t[[example]] for t in p.train)

        def objective(theta, batch=batch, own=own, index=index):
            there = functools.partial(functional_call, p.reference, theta)
            way = sum((theta[n] - start[n]).square().sum() for n in theta)
            distance = divergence(p.task, there((batch[0],)), trained[index], batch)
            return distance.mean() + damping / 2 * way + eps * p.loss(there((own[0],)), own)[0]

        slope = torch.func.grad(objective)(theta)
        theta = {n: t - step * slope[n] for n, t in theta.items()}
        moved = p.flatten({n: (t - start[n]).unsqueeze(0) for n, t in theta.items()})[0]
        torch.testing.assert_close(-moved / eps, u, rtol=1e-5, atol=1e-6 * float(u.abs().max()))


# --- what it takes and says -----------------------------------------------------------------------------------------


def test_a_float32_model_is_taken_in_float64_and_comes_back_as_it_was():
    p = problem("mlp")
    model = copy.deepcopy(p.model).float().train()
    before = copy.deepcopy(model.state_dict())
    train, queries = ((x.float(), y) for x, y in (p.train, p.queries))
    found = pbrf(model, p.task, train, queries, EXAMPLES, 0.05, tolerance=1e-8, progress=False)
    double = pbrf(copy.deepcopy(model).double(), p.task, train, queries, EXAMPLES, 0.05, tolerance=1e-8, progress=False)
    torch.testing.assert_close(found.values, double.values, rtol=1e-12, atol=1e-12)
    assert found.values.dtype == torch.float64 and found.converged.all()
    assert model.training and all(q.requires_grad and q.dtype == torch.float32 for q in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_eps_moves_the_parameters_by_a_set_length():
    p = problem("mlp")
    x = torch.linalg.solve(shifted(p, p.ggn(), 0.05), p.loss_gradients()[EXAMPLES, :].T).norm(dim=0)
    size = torch.cat([q.flatten() for q in p.reference.parameters()]).norm()
    torch.testing.assert_close(respond(p).eps * x / size, torch.full((3,), 2**-52 / 1.0).double() ** (1 / 3))
    assert respond(p, eps=1e-5).eps.tolist() == [1e-5] * 3


def test_an_example_without_a_gradient_changes_nothing():
    found = respond(problem("masked_sequence"), examples=[1, 3])  # the first has no label
    assert not found.values[:, 0].any() and found.values[:, 1].all()
    assert found.converged.all() and found.residual[0] == 0 and found.change[0] == 0


def test_examples_that_do_not_converge_are_named():
    with pytest.warns(ConvergenceWarning, match=r"1 of 2 examples .* for examples\[1\], above 1e-08"):
        found = respond(problem("masked_sequence"), examples=[1, 3], eps=0.1, steps=1)
    assert found.converged.tolist() == [True, False] and found.residual[1] > 1e-8 and found.steps == 1
    assert "1 of 2 converged in 1 steps" in str(found)


def test_a_pull_without_end_is_named():
    """The loss of a deep network grows faster than the square of the way, so that -eps has no minimum."""
    p = problem("mlp_regression")
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 examples did not converge"):
        found = respond(p, examples=[[0], list(range(p.n))], damping=1e-3, eps=10 / p.n, steps=15)
    assert found.values.isfinite().all()


def test_all_of_an_example_must_converge():
    """Here only -eps does not; eps, eps / 10 and -eps / 10 do."""
    p = problem("mlp")
    with pytest.warns(ConvergenceWarning, match=r"1 of 1 examples did not converge"):
        respond(p, examples=[3], eps=1 / p.n, tolerance=1e-6)


def test_converged_examples_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "3 of 3 converged" in str(respond(problem("mlp")))


@pytest.mark.parametrize("examples", [[], [11], [-1], [[2, 2]], [[]], [0.5], [[[0, 1]]]])
def test_examples_must_be_numbers_of_training_examples(examples):
    with pytest.raises(InputError, match="examples"):
        respond(problem("mlp"), examples=examples)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": -1.0}, {"tolerance": 0.0}, {"steps": 0}, {"damping": 0.0}])
def test_settings_must_be_positive(options):
    with pytest.raises(InputError, match="positive"):
        respond(problem("mlp"), **options)
