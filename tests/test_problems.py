"""The reference itself: dense answers against identities and finite differences that need no library code."""

import itertools

import pytest
import torch

from problems import IGNORE, NAMES, TinyProblem, _build, problem, problems
from wherefrom.model.task import Classification, Regression

CLASSIFIERS = [name for name in NAMES if isinstance(problem(name).task, Classification)]


@pytest.fixture(params=NAMES)
def tiny(request) -> TinyProblem:
    return problem(request.param)


def flat_parameters(p: TinyProblem) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in p.model.parameters() if t.requires_grad])


def at(p: TinyProblem, theta: torch.Tensor, function, data) -> torch.Tensor:
    """A reference function of the model's outputs with its parameters moved to theta: (B,)."""
    moved = {name: t[0] for name, t in p.unflatten(theta[None]).items()}
    with torch.no_grad():
        return function(torch.func.functional_call(p.model, moved, (data[0],)), data)


def test_every_problem_is_tiny_float64_and_in_eval_mode(tiny):
    assert 15 < tiny.dim <= 400
    assert 7 <= tiny.n <= 13
    assert len(tiny.queries[0]) >= 2
    assert not any(module.training for module in tiny.model.modules())
    assert all(t.dtype == torch.float64 for t in tiny.model.state_dict().values() if t.is_floating_point())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_copies_share_answers_but_not_weights():
    first, second = problem("mlp"), problem("mlp")
    before = first.ggn()
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(first.loss_gradients(), second.loss_gradients(), rtol=0, atol=0)
    torch.testing.assert_close(second.ggn(), before, rtol=0, atol=0)
    assert all(parameter.abs().max() > 0 for parameter in second.model.parameters())


def test_building_is_deterministic_and_leaves_the_global_seed():
    state = torch.random.get_rng_state()
    again = _build("mlp")
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(flat_parameters(again), flat_parameters(problem("mlp")))
    assert all(torch.equal(a, b) for a, b in zip(again.train, problem("mlp").train, strict=True))


def test_flatten_and_unflatten_are_inverse_in_the_order_of_named_parameters(tiny):
    matrix = torch.arange(3 * tiny.dim, dtype=torch.float64).reshape(3, tiny.dim)
    vectors = tiny.unflatten(matrix)
    assert list(vectors) == [name for name, t in tiny.model.named_parameters() if t.requires_grad]
    assert torch.equal(tiny.flatten(dict(reversed(vectors.items()))), matrix)


def test_losses_agree_with_the_task_in_whole_batches(tiny):
    for data in (tiny.train, tiny.queries):
        outputs = tiny.task.outputs(tiny.model, data).detach()
        torch.testing.assert_close(outputs, tiny.outputs(data), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tiny.task.loss(outputs, data), tiny.loss(outputs, data))
        torch.testing.assert_close(tiny.task.measurement(outputs, data), tiny.measurement(outputs, data))


def test_gradients_against_finite_differences(tiny):
    theta, step = flat_parameters(tiny), 1e-5
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(tiny.dim, generator=rng, dtype=torch.float64) / tiny.dim**0.5
    for function, data, gradients in (
        (tiny.loss, tiny.train, tiny.loss_gradients()),
        (tiny.measurement, tiny.queries, tiny.measurement_gradients()),
    ):
        ahead, behind = (at(tiny, theta + sign * step * direction, function, data) for sign in (1, -1))
        torch.testing.assert_close(gradients @ direction, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_hessian_against_finite_differences_of_the_gradient(tiny):
    theta, step = flat_parameters(tiny), 1e-5
    rng = torch.Generator().manual_seed(1)
    direction = torch.randn(tiny.dim, generator=rng, dtype=torch.float64) / tiny.dim**0.5

    def gradient(sign: int) -> torch.Tensor:
        moved = theta + sign * step * direction
        for tensor, (name, shape) in zip(
            (t for t in tiny.model.parameters() if t.requires_grad), tiny.shapes.items(), strict=True
        ):
            tensor.data = moved[tiny.slices[name]].reshape(shape)
        there = TinyProblem("moved", tiny.model, tiny.task, tiny.train, tiny.queries, tiny.model)
        return there.loss_gradients().mean(0)

    difference = (gradient(1) - gradient(-1)) / (2 * step)
    torch.testing.assert_close(tiny.hessian() @ direction, difference, rtol=1e-5, atol=1e-7)


def test_gradient_is_jacobian_times_output_gradient(tiny):
    h = tiny.outputs().requires_grad_()
    (residual,) = torch.autograd.grad(tiny.loss(h, tiny.train).sum(), h)
    expected = torch.einsum("nk,nkd->nd", residual.flatten(1), tiny.jacobian())
    torch.testing.assert_close(tiny.loss_gradients(), expected, rtol=1e-10, atol=1e-12)


def test_matrices_are_symmetric_and_the_ones_that_should_be_are_positive(tiny):
    for matrix in (tiny.ggn(), tiny.hessian(), tiny.empirical_fisher()):
        assert matrix.shape == (tiny.dim, tiny.dim)
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-11)
    for matrix in (tiny.ggn(), tiny.empirical_fisher()):
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-12 * values[-1]
        assert 0.01 < values[-1] < 1e3


@pytest.mark.parametrize("name", ["linear_regression", "logistic"])
def test_hessian_is_the_ggn_for_models_linear_in_their_parameters(name):
    p = problem(name)
    torch.testing.assert_close(p.hessian(), p.ggn(), rtol=1e-10, atol=1e-12)


def test_hessian_is_not_the_ggn_otherwise():
    for p in problems():
        if p.name not in ("linear_regression", "logistic"):
            assert (p.hessian() - p.ggn()).norm() > 1e-2 * p.ggn().norm(), p.name


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_ggn_of_cross_entropy_is_the_enumerated_true_fisher(name):
    """E over labels of g g^T; positions are independent given the outputs, so their Fishers add up."""
    p = problem(name)
    fisher = torch.zeros_like(p.ggn())
    outputs, labels = p.outputs(), p.train[1]
    classes = outputs.shape[-1]
    jacobians = p.jacobian().reshape(p.n, -1, classes, p.dim)  # (N, positions, C, D)
    probabilities = outputs.softmax(-1).reshape(p.n, -1, classes)
    for i, position in itertools.product(range(p.n), range(probabilities.shape[1])):
        if labels.reshape(p.n, -1)[i, position] == IGNORE:
            continue
        for y in range(classes):
            chance = probabilities[i, position]
            gradient = (chance - torch.eye(classes, dtype=torch.float64)[y]) @ jacobians[i, position]
            fisher += chance[y] * torch.outer(gradient, gradient) / p.n
    torch.testing.assert_close(p.ggn(), fisher, rtol=1e-10, atol=1e-12)


def test_squared_error_has_output_hessian_two():
    for p in problems():
        if isinstance(p.task, Regression):
            two = 2 * torch.eye(p.output_hessians().shape[-1], dtype=torch.float64)
            torch.testing.assert_close(p.output_hessians(), two.expand(p.n, -1, -1))


def test_a_positive_score_means_that_removal_raises_the_measurement():
    """Leave one out of a ridge regression, solved in closed form; the first-order change is score / N."""
    p = problem("linear_regression")
    x = torch.cat([p.train[0], torch.ones(p.n, 1, dtype=torch.float64)], 1)
    start = torch.cat([p.model.weight, p.model.bias[:, None]], 1).detach()

    def solution(weights: torch.Tensor) -> torch.Tensor:
        """argmin of (1/N) sum w |theta x - y|^2 + damping / 2 |theta - theta_0|^2, theta_0 the model: (3, 7)."""
        matrix = 2 / p.n * (x.T * weights) @ x + 0.3 * torch.eye(7, dtype=torch.float64)
        return torch.linalg.solve(matrix, (2 / p.n * (x.T * weights) @ p.train[1]) + 0.3 * start.T).T

    def measured(weights: torch.Tensor) -> torch.Tensor:
        theta = solution(weights)
        return p.measurement(p.queries[0] @ theta[:, :-1].T + theta[:, -1], p.queries)

    theta = solution(torch.ones(p.n, dtype=torch.float64))
    moved = TinyProblem("ridge", p.model, p.task, p.train, p.queries, p.model)
    p.model.weight.data, p.model.bias.data = theta[:, :-1].clone(), theta[:, -1].clone()
    scores = moved.exact_scores(moved.hessian(), damping=0.3)
    for i in range(p.n):
        bump, step = torch.eye(p.n, dtype=torch.float64)[i], 1e-5
        change = (measured(1 - step * bump) - measured(1 + step * bump)) / (2 * step)
        torch.testing.assert_close(change, scores[:, i] / p.n, rtol=1e-6, atol=1e-9)


def test_labels_of_the_masked_problems_are_missing_where_they_should_be():
    tokens, labels = problem("masked_sequence").train
    assert (labels[tokens == 0] == IGNORE).all()
    assert ((tokens != 0) & (labels == IGNORE)).any(), "a prompt: real tokens without labels"
    assert (labels[1] == IGNORE).all() and (tokens[1] != 0).any(), "an example without any label"
    assert problem("masked_sequence").loss_gradients()[1].abs().max() == 0
    tokens = problem("masked_sequence_left").train[0]
    assert (tokens[:, 0] == 0).any() and (tokens[:, -1] == 0).any()
