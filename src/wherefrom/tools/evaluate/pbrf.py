"""PBRF: the response of a trained model to one example's weight, found by optimising, without retraining.

    PBO_eps(theta) = (1/N) sum_i D(h_i(theta), h_i(theta_s)) + (lambda / 2) |theta - theta_s|^2 + eps l(z, theta)
    D(h, h')       = l(h) - l(h') - grad l(h') . (h - h')       for cross-entropy KL(p' || p), which knows no label
    value(q, z)    = -(f_q(theta_eps) - f_q(theta_-eps)) / (2 eps),        theta_eps = argmin PBO_eps

theta_s are the trained weights: a minimum of PBO_0 however training ended, with Hessian G + lambda there. So as eps
goes to 0 the values become grad f (G + lambda)^-1 grad l exactly, and what is left between them and scores is the
solver's error. At eps = 1/N, the weight of an example, it is also what no linear prediction can know. The proximal
Bregman response function is Bae et al. 2022's; Klochkov & Liu 2024 (figure 1) compare LiSSA with it.

Differs from the papers: their SGD has the errors of the solvers that it should judge (with LiSSA's minibatches and a
small eps it is LiSSA). Here each minimum is found by L-BFGS from (G + lambda)^-1, on all the data in float64, and
certified by its gradient, in which no approximate inverse takes part; and the difference is central.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad

from wherefrom import GGN, Auto, Damping, Directions, Inverse, Problem, Task
from wherefrom.curvature.ggn import rhs_at_once
from wherefrom.curvature.plain import gradients_at_points
from wherefrom.data.examples import Batch, Examples
from wherefrom.errors import ConvergenceWarning, expected
from wherefrom.methods.stream import Measurement
from wherefrom.model.observe import Select, copy_model, prepare_model
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.progress import track
from wherefrom.solvers.base import require_positive
from wherefrom.surroundings import math_attention
from wherefrom.tools.evaluate.arrays import int_array

STEP_LENGTH = torch.finfo(torch.float64).eps ** (1 / 3)  # of a finite difference, relative to the weights
MEMORY_PAIRS = 6  # of L-BFGS


@dataclass(frozen=True)
class PBRF:
    """The responses of Q queries to m examples, or groups of examples. All tensors are float64.

    Attributes:
        values: (Q, m), of the sign and scale of `Scores.values`: positive where removing raises f, over N the predicted
            change of f on removal. A group's is that of the sum of its losses.
        change: (m,) |values - values at eps / 10| / |values at eps / 10| over the queries: small where eps is in the
            range in which f is linear.
        residual: (m,) |grad PBO| / (eps |grad l|) where the optimiser stopped, the largest of those that the example's
            values are made of; 1 at theta_s.
        converged: (m,) whether it met the tolerance.
        eps: (m,)
        damping: lambda of each block of parameters, by name.
        steps: that the optimiser took.
    """

    values: Tensor
    change: Tensor
    residual: Tensor
    converged: Tensor
    eps: Tensor
    damping: dict[str, float]
    steps: int

    def __str__(self) -> str:
        """A line on the whole."""
        q, m = self.values.shape
        return (
            f"proximal Bregman response of {q} queries to {m} examples: {int(self.converged.sum())} of {m} converged "
            f"in {self.steps} steps, worst residual {float(self.residual.max()):.1e}; eps {float(self.eps.min()):.1e} "
            f"to {float(self.eps.max()):.1e}, a tenth of it changes values by at most {float(self.change.max()):.1e}"
        )


def pbrf(
    model: nn.Module,
    task: Task | object,
    train: Any,
    queries: Any,
    examples: Sequence[int] | Sequence[Sequence[int]],
    damping: float | Damping,
    eps: float | None = None,
    measurement: Measurement | None = None,
    parameters: Select = None,
    tolerance: float = 1e-6,
    steps: int = 50,
    batch_size: int | None = None,
    memory: float = 2**31,
    progress: bool | None = None,
) -> PBRF:
    """Move the weights of some training examples and see how the queries respond.

    Four models are optimised for each example, at eps, -eps and a tenth of both, all together; a step costs each of
    them a gradient on all the training data.

    Args:
        model: the trained model; a float64 copy of it is used.
        task: what was trained and what is measured; the loss must be convex in the outputs.
        train: N training examples: a tuple of tensors, a Dataset or a DataLoader.
        queries: Q queries, in the form of the training data.
        examples: m training examples by number, or groups of them.
        damping: lambda, a number or a `Damping`.
        eps: the weight that an example gains or loses, in a loss that is a mean; 1/N is its own. None takes for each
            what moves the parameters by 6e-6 of their length, where values are derivatives.
        measurement: f of a query, (outputs, batch) to (B,); None takes the task's.
        parameters: which trainable parameters move; see `Problem`.
        tolerance: of the residual.
        steps: that the optimiser may take.
        batch_size, memory: examples per pass, and bytes that may be taken; change speed only.
        progress: show a progress bar; None shows it on a terminal.

    Warns:
        ConvergenceWarning: naming the examples that missed the tolerance. PBO has no zero of the gradient to find where
            its minimum lies on a kink, as of ReLU; a smaller eps crosses fewer of them.

    Raises:
        InputError: for unknown examples, or as `Problem` does.
    """
    require_positive(eps=eps, tolerance=tolerance, steps=steps)
    twin = copy_model(prepare_model(model)).double()
    problem = Problem(twin, task, train, parameters, batch_size, memory, progress)
    members = _mark_members(examples, len(problem.train)).to(problem.device)  # (m, N)
    inverse = Auto(memory=memory).fit(GGN(problem), damping)

    loss_gradients = _sum_loss_gradients(problem, members)  # (m, ...)
    each_eps = _choose_eps(inverse, loss_gradients) if eps is None else torch.full_like(members[:, 0], eps)  # (m,)
    # Four objectives for each example: a central difference at eps, and one at a tenth of it that judges the first.
    factors = torch.tensor([1, -1, 0.1, -0.1], dtype=torch.float64, device=problem.device)
    scales = factors.outer(each_eps)  # (4, m)
    weights = scales.view(-1, 1) * members.repeat(4, 1)  # (4 m, N)
    initial_size = (scales.abs() * vectors.norm(loss_gradients)).flatten()  # of the gradients at theta_s, (4 m,)
    moves, residual, steps_taken = _minimise(inverse, weights, initial_size, tolerance, steps)

    f = _measure(problem, moves, Examples(queries, "queries", batch_size), measurement)  # (4 m, Q)
    plus, minus, plus_fine, minus_fine = f.view(4, len(members), -1)
    values = (minus - plus) / (2 * each_eps).unsqueeze(1)  # (m, Q)
    fine_values = (minus_fine - plus_fine) / (0.2 * each_eps).unsqueeze(1)
    change = (values - fine_values).norm(dim=1) / fine_values.norm(dim=1).clamp(min=1e-300)

    residual = residual.view(4, -1).amax(0)
    converged = residual <= tolerance
    if not converged.all():
        warnings.warn(_describe_unconverged(residual, converged, tolerance), ConvergenceWarning, stacklevel=2)
    return PBRF(values.T, change, residual, converged, each_eps, dict(inverse.damping), steps_taken)


def _describe_unconverged(residual: Tensor, converged: Tensor, tolerance: float) -> str:
    late = (~converged).nonzero().flatten().tolist()
    worst = ", ".join(f"{float(residual[i]):.0e} for examples[{i}]" for i in late[:10])
    more = ", ..." if len(late) > 10 else ""
    return (
        f"{len(late)} of {len(residual)} examples did not converge: |grad PBO| / (eps |grad l|) is {worst}{more}, "
        f"above {tolerance:g}. Take eps=None, which fits it to each, raise the damping, or allow more steps or a "
        "looser tolerance."
    )


def divergence(task: Task, outputs: Tensor, trained: Tensor, batch: Batch) -> Tensor:
    """Compute D(outputs, trained) of each example of a batch, (B,): not negative if the loss is convex in them."""
    slope = grad(lambda h: task.loss(h, batch).sum())(trained)
    linear = (slope * (outputs - trained)).flatten(1).sum(1)
    return task.loss(outputs, batch) - task.loss(trained, batch) - linear


def _mark_members(examples: Sequence[Any], n: int) -> Tensor:
    """Mark which of N examples belong to each group: (m, N), 1 where one does."""
    groups = [int_array(np.atleast_1d(group), f"examples[{i}]") for i, group in enumerate(examples)]
    if not groups:
        raise expected("examples", "numbers of one or more training examples", "none")
    members = torch.zeros(len(groups), n, dtype=torch.float64)
    for i, group in enumerate(groups):
        has_repeated = len(set(group.tolist())) != len(group)
        if has_repeated or group.min() < 0 or group.max() >= n:
            raise expected(f"examples[{i}]", f"different numbers in 0..{n - 1}", group.tolist())
        members[i, group] = 1
    return members


def _sum_loss_gradients(problem: Problem, members: Tensor) -> Vectors:
    """Sum grad l at theta_s over each group, (m, ...)."""
    total: Vectors = {}
    used = members.any(0).nonzero()[:, 0]
    for numbers in used.split(problem.train.batch_size):
        batch = problem.batch(numbers.cpu())
        part = problem.loss_gradients(batch).combine(members[:, numbers].unsqueeze(-1)).to_parameters()
        total = vectors.add_(total, part) if total else part
    return total


def _choose_eps(inverse: Inverse, loss_gradients: Vectors) -> Tensor:
    """Choose the eps that moves the parameters by a finite difference's length, for each example, (m,)."""
    theta = {name: p.detach().unsqueeze(0) for name, p in inverse.curvature.problem.parameters.items()}
    moved = vectors.norm(_apply(inverse, loss_gradients))
    return (STEP_LENGTH * vectors.norm(theta).clamp(min=1) / moved).where(moved > 0, 1.0)


def _compute_gradient(inverse: Inverse, moves: Vectors, weights: Tensor) -> Vectors:
    """Compute grad PBO at M points, (M, ...).

    Args:
        inverse: of the model at theta_s.
        moves: theta - theta_s, (M, ...).
        weights: eps of each training example at each point, (M, N).
    """
    problem, total = inverse.curvature.problem, vectors.scale(moves, _damping_by_parameter(inverse))
    task, N = problem.task, len(problem.train)
    with problem.observed(), math_attention():
        for index, batch in problem.batches():
            outputs, theta = problem.functional(batch)
            trained = outputs(theta)

            def part(move: Vectors, eps: Tensor, batch=batch, outputs=outputs, theta=theta, h=trained) -> Tensor:
                there = outputs({name: t + move[name] for name, t in theta.items()})
                return divergence(task, there, h, batch).sum() / N + eps @ task.loss(there, batch)

            together = rhs_at_once(problem, outputs, theta)
            pieces = zip(vectors.chunk(moves, together), weights[:, index].split(together), strict=True)
            vectors.add_(total, vectors.concatenate([gradients_at_points(part, *piece) for piece in pieces]))
    return total


def _minimise(
    inverse: Inverse, weights: Tensor, size: Tensor, tolerance: float, steps: int
) -> tuple[Vectors, Tensor, int]:
    """Find theta_eps - theta_s of M objectives.

    Returns:
        theta_eps - theta_s, (M, ...); the lengths of the gradients there over ``size``, (M,); and the steps taken.

    L-BFGS (Nocedal 1980) from (G + lambda)^-1. A step is shortened until the objective is no steeper along it at its
    end than at its start. Only slopes are compared, for values of PBO drown in rounding; and the iterates keep to the
    minimum next to theta_s, where for large -eps the loss would pull further without end.
    """
    problem = inverse.curvature.problem
    x: Vectors = {name: p.new_zeros(len(weights), *p.shape) for name, p in problem.parameters.items()}
    g = _compute_gradient(inverse, x, weights)  # (M, ...)
    step_length = torch.ones_like(size)  # (M,)
    pairs: list[tuple[Vectors, Vectors]] = []
    for step in track(range(steps), "proximal Bregman objective", enabled=problem.progress):
        residual = (vectors.norm(g) / size).where(size > 0, 0.0)
        active = (residual > tolerance).nonzero()[:, 0]  # those that have not converged, (A,)
        if not len(active):
            return x, residual, step

        g_here = vectors.select(g, active)
        active_pairs = [(vectors.select(s, active), vectors.select(y, active)) for s, y in pairs]
        direction = _apply_lbfgs(inverse, g_here, active_pairs)
        move = vectors.scale(direction, step_length[active])
        g_there = _compute_gradient(inverse, vectors.add(vectors.select(x, active), move), weights[active])
        slope_here, slope_there = vectors.dot(direction, g_here), vectors.dot(direction, g_there)  # (A,)
        is_taken = slope_there.abs() <= -slope_here

        # Objectives whose step is too long stay where they are; their pair is zero, and counts for nothing.
        s, y = vectors.zeros_like(x), vectors.zeros_like(x)
        taken = active[is_taken]
        for name in x:
            s[name][taken] = move[name][is_taken]
            y[name][taken] = g_there[name][is_taken] - g_here[name][is_taken]
        x, g = vectors.add(x, s), vectors.add(g, y)
        pairs = [*pairs, (s, y)][-MEMORY_PAIRS:]

        # A step that is too long is shortened to where the slope is zero if it changes linearly.
        zero_slope = (slope_here / (slope_here - slope_there)).clamp(0.1, 0.5)
        step_length[active] = torch.where(is_taken, 1.0, step_length[active] * zero_slope)
    return x, (vectors.norm(g) / size).where(size > 0, 0.0), steps


def _apply_lbfgs(inverse: Inverse, g: Vectors, pairs: list[tuple[Vectors, Vectors]]) -> Vectors:
    """Compute minus the approximate inverse Hessian times g; pairs (s, y) without curvature count nothing."""
    curved = [vectors.dot(s, y) for s, y in pairs]
    rho = [(1 / c).where(c > 0, 0.0) for c in curved]
    alpha = []
    for (s, y), r in zip(reversed(pairs), reversed(rho), strict=True):
        alpha.append(r * vectors.dot(s, g))
        g = vectors.add(g, y, -alpha[-1])
    g = _apply(inverse, g)
    for (s, y), r, a in zip(pairs, rho, reversed(alpha), strict=True):
        g = vectors.add(g, s, a - r * vectors.dot(y, g))
    return vectors.scale(g, -1.0)


def _apply(inverse: Inverse, v: Vectors) -> Vectors:
    """Apply an inverse to parameter-shaped tensors, in which the objective is differentiated."""
    return inverse.apply(Directions.from_parameters(inverse.curvature.problem.blocks, v)).to_parameters()


def _damping_by_parameter(inverse: Inverse) -> dict[str, float]:
    return {name: inverse.damping[b.name] for b in inverse.curvature.problem.blocks for name in b.shapes}


def _measure(problem: Problem, moves: Vectors, queries: Examples, measurement: Measurement | None) -> Tensor:
    """Measure f of the queries with the parameters moved, (M, Q)."""
    f, parts = measurement or problem.task.measurement, []
    with problem.observed(), torch.no_grad():
        for _, batch in problem.batches(queries):
            outputs, theta = problem.functional(batch)
            there = [outputs({n: t + moves[n][i] for n, t in theta.items()}) for i in range(vectors.count(moves))]
            parts.append(torch.stack([problem.per_example(f(h, batch), batch, "measurement") for h in there]))
    return torch.cat(parts, 1)
