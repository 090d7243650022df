"""Replay: a recorded training run taken again, step by step, with a weight on each training example.

    L_t = (1 / |B_t|) sum_{i in B_t} w_i l_i(theta_t),        theta_{t+1}: one step of the run's own optimiser on L_t

w = 1 is the run itself. With w_z = 0 it is the run without z: the initial weights, the minibatches and their sizes stay
as they were. Several runs are taken at once, as stacked models.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wherefrom.curvature.plain import gradients_at_points
from wherefrom.data.examples import Examples
from wherefrom.errors import AttributionWarning, DivergenceError, InputError, UnsupportedError, expected
from wherefrom.methods.optimisers import Jacobian, Optimiser, Rows, jacobian, optimiser
from wherefrom.methods.stream import Measurement
from wherefrom.model.observe import trainable
from wherefrom.model.problem import Problem
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.progress import track
from wherefrom.surroundings import math_attention, undisturbed
from wherefrom.training.trajectory import Trajectory

State = dict[str, Rows]  # parameter name -> itself and the optimiser's state of it, (K, *shape) each
DRIFT = 1e-3  # error of a replay that is warned of
LOST = 0.1  # and one that is refused: another run
STACKED = 2**23  # bytes of parameters that a CPU trains at once; more are slower


class Replay:
    """A run that can be taken again.

    Args:
        problem: the model, task and training data of the run. Its parameters must be those that the run trained.
        trajectory: with the initial and the final weights, and the order of the examples. The loss of a step is taken
            for the mean over its minibatch, without clipping, augmentation or noise.
        segment: steps between the states that are kept; None: the square root of their number, for which memory is
            least. Changes speed and memory only.

    Raises:
        InputError: if the trajectory lacks something, or is of other parameters or other data.
        UnsupportedError: an optimiser, or a module such as dropout, that cannot be taken again.
    """

    def __init__(self, problem: Problem, trajectory: Trajectory, segment: int | None = None):
        self.trajectory = trajectory
        self.order = _order(trajectory, len(problem.train))
        self.segment = segment or math.ceil(math.sqrt(trajectory.steps))
        if self.segment < 1:
            raise expected("segment", "a positive number of steps", segment)
        _refuse_random_training(problem.model)
        # Parameter name -> the number of its group, and the group's optimiser.
        self._optimisers: dict[str, tuple[int, Optimiser]] = {}
        for number, group in enumerate(trajectory.groups):
            update = optimiser(trajectory.optimiser, group)
            self._optimisers |= {name: (number, update) for name in group["parameters"]}

        recorded = set(self._optimisers)
        all_names = {name for name, _ in problem.model.named_parameters()}
        # Of what the run recorded, parameters that are frozen now need not be selected: they did not move.
        differing = sorted(set(problem.parameters) ^ (recorded & set(trainable(problem.model))))
        if differing or not recorded <= all_names:
            advice = "Select them with parameters=..., and pass the model of the run."
            raise expected("parameters", "those that the run trained", f"others: {', '.join(differing[:5])}", advice)
        self.problem = problem.at(trajectory.checkpoints[0].state)

    def start(self, count: int = 1) -> State:
        """Make the state before the first step, of as many runs."""
        state: State = {}
        for name, p in self.problem.parameters.items():
            theta = p.detach().expand(count, *p.shape).clone()  # (count, *shape)
            _, update = self._optimisers[name]
            state[name] = (theta, *[torch.zeros_like(theta) for _ in range(update.state_size)])
        return state

    @undisturbed()
    def step(self, state: State, step: int, weights: Tensor | None = None) -> tuple[State, Vectors]:
        """Take one step of K runs.

        Args:
            state: before it.
            step: its number.
            weights: (K, N); None: all 1.

        Returns:
            The state after it, and the loss's gradients (K, *shape).
        """
        index = self.order[step]
        batch = self.problem.batch(index)
        outputs, _ = self.problem.functional(batch)
        theta = {name: rows[0] for name, rows in state.items()}
        count = vectors.count(theta)
        w = torch.ones(count, len(index)) if weights is None else weights[:, index]

        def loss(theta: Vectors, w: Tensor) -> Tensor:
            return (w * self.problem.task.loss(outputs(theta), batch)).sum() / len(index)

        with self.open_model():
            g = gradients_at_points(loss, theta, w.to(self.problem.device, self.problem.dtype))
        return {name: self._update(name, step)(rows, g[name]) for name, rows in state.items()}, g

    def slopes(self, state: State, g: Vectors, step: int) -> dict[str, Jacobian]:
        """Compute the Jacobian of the optimiser's step number ``step``, from this state with this gradient."""
        return {name: jacobian(self._update(name, step), rows, g[name]) for name, rows in state.items()}

    @cached_property
    def states(self) -> list[State]:
        """The run's states before step 0, before every ``segment`` steps, and after the last.

        Raises:
            InputError: if the task's loss is not one finite number per example.
        """
        states = [self.start()]
        state, steps = states[0], self.trajectory.steps
        batch = self.problem.batch(self.order[0])
        outputs, theta = self.problem.functional(batch)
        with self.open_model():
            self.problem.per_example(self.problem.task.loss(outputs(theta), batch), batch, "loss")
        for step in track(range(steps), "replaying", enabled=self.problem.progress):
            state, _ = self.step(state, step)
            if (step + 1) % self.segment == 0 or step + 1 == steps:
                states.append(state)
        return states

    @property
    def trained(self) -> Problem:
        """The model where the replay of the run ends."""
        problem = self.problem.at(self.trajectory.checkpoints[0].state)
        with torch.no_grad():
            for name, p in problem.parameters.items():
                p.copy_(self.states[-1][name][0][0])
        return problem

    @cached_property
    def error(self) -> float:
        """How far from the recorded run's last weights the replay ends, relative to the way from its first.

        Raises:
            InputError: if it is another run.
        """
        first, last = (self.trajectory.checkpoints[i].state for i in (0, -1))
        recorded = {name: last[name].to(rows[0]).unsqueeze(0) for name, rows in self.states[-1].items()}
        way = {name: t - first[name].to(t) for name, t in recorded.items()}
        deviation = {name: t - self.states[-1][name][0] for name, t in recorded.items()}
        error = float(vectors.norm(deviation) / vectors.norm(way).clamp(min=1e-300))

        message = (
            f"The replay must end at the run's last weights, got {error:.1e} of the way from its first beside them. "
            "Check the data and their order, and that the loss was the mean over a minibatch, without augmentation, "
            "clipping or noise."
        )
        if not error <= LOST:  # NaN, too
            raise InputError(message)
        if error > DRIFT:
            warnings.warn(message, AttributionWarning, stacklevel=3)
        return error

    def backwards(self) -> Iterator[tuple[int, State, Vectors]]:
        """Iterate over the run's steps from the last to the first: number, state before it, gradient."""
        segments = list(enumerate(self.states[:-1]))
        for number, state in reversed(segments):
            begin = number * self.segment
            end = min(begin + self.segment, self.trajectory.steps)
            # Only the state at the beginning of a segment was kept: the steps within it are taken again.
            steps = []
            for step in range(begin, end):
                after, g = self.step(state, step)
                steps.append((step, state, g))
                state = after
            while steps:  # popped, so that the memory of a state is free once it was used
                yield steps.pop()

    @undisturbed()
    def final(self, weights: Tensor) -> Vectors:
        """Compute the weights of the model after training with M sets of weights on the examples.

        Args:
            weights: (M, N), or (M, N) bool: True where an example is kept.

        Returns:
            (M, *shape).

        Raises:
            DivergenceError: if a run does not stay finite.
        """
        n = len(self.problem.train)
        if not isinstance(weights, Tensor) or weights.ndim != 2 or weights.shape[1] != n or not len(weights):
            raise expected("weights", f"(M, {n}), one for each training example", getattr(weights, "shape", weights))
        _ = self.error  # a run that is not reproduced is refused
        size = sum(p.numel() * p.element_size() for p in self.problem.parameters.values())
        room = STACKED if self.problem.device.type == "cpu" else 32 * STACKED
        together = max(1, room // size)
        parts = []
        for some in weights.to(self.problem.device).split(together):
            state = self.start(len(some))
            for step in track(range(self.trajectory.steps), "retraining", enabled=self.problem.progress):
                state, _ = self.step(state, step, some)
            parts.append({name: rows[0] for name, rows in state.items()})
        weights_after = vectors.concatenate(parts)
        finite = vectors.norm(weights_after).isfinite()
        if not finite.all():
            diverged = int((~finite).nonzero()[0])
            raise DivergenceError(f"Training with weights {diverged} does not stay finite. Lower the learning rate.")
        return weights_after

    @undisturbed()
    def measure(self, weights: Tensor, queries: Any, measurement: Measurement | None = None) -> Tensor:
        """Measure f of the queries after training with M sets of weights on the examples.

        Args:
            weights: (M, N), such as masks of subsets; see `final`.
            queries: Q, in the form of the training data.
            measurement: (outputs, batch) to (B,); None takes the task's.

        Returns:
            (M, 1, Q), with the axis of repeats that `linear_datamodeling_score` expects.
        """
        theta, problem = self.final(weights), self.problem
        examples = Examples(queries, "queries", problem.train.batch_size)
        f = measurement or problem.task.measurement
        parts = []
        for _, batch in problem.batches(examples):
            outputs, _ = problem.functional(batch)
            with self.open_model(), torch.no_grad():
                rows = []
                for m in range(len(weights)):
                    own = {name: t[m] for name, t in theta.items()}
                    rows.append(problem.per_example(f(outputs(own), batch), batch, "measurement"))
                parts.append(torch.stack(rows))  # (M, B)
        return torch.cat(parts, 1).unsqueeze(1)

    @undisturbed()
    def metasmoothness(self, fraction: float = 0.05, directions: int = 4, seed: int = 0) -> Tensor:
        """Measure how far a first step towards dropping examples foretells the next one.

        This is definition 1 of Engstrom et al. (2025):

            S = sign(D(w))^T diag(|D(w)| / |D(w)|_1) sign(D(w + h v)),        D(w) = (theta(w + h v) - theta(w)) / h

        theta(w) is the model trained with weights w. Here w = 1, v drops a random set, and h = 1/2: half-way, and all
        the way. 1: weights go on as they began; 0: the derivative at w = 1 says nothing of removal.

        Args:
            fraction: of the examples, dropped together.
            directions: how many such sets.
            seed: of the sets.

        Returns:
            S of each direction, float64, (directions,).
        """
        n = len(self.problem.train)
        size = round(fraction * n)
        if directions < 1 or not 0 < size <= n:
            raise expected(
                "directions and fraction", f">= 1 and one that drops 1..{n} examples", (directions, fraction)
            )
        rng = torch.Generator().manual_seed(seed)
        dropped = (torch.rand(directions, n, generator=rng).argsort(1) < size).double()
        weights = torch.cat([1 - dropped / 2, 1 - dropped])  # (2 directions, N)
        half_way, all_the_way = vectors.chunk(self.final(weights), directions)
        # D(w) and D(w + h v), but for 1 / h, which cancels.
        first = {name: t - self.states[-1][name][0] for name, t in half_way.items()}
        second = {name: t - half_way[name] for name, t in all_the_way.items()}

        signs = {name: t.sign() for name, t in second.items()}
        own_signs = {name: t.sign() for name, t in first.items()}
        return vectors.dot(first, signs) / vectors.dot(first, own_signs).clamp(min=1e-300)

    def open_model(self) -> ExitStack:
        """Enter the model as it is differentiated: in eval mode, attention by the kernel that has all derivatives."""
        stack = ExitStack()
        stack.enter_context(self.problem.observed())
        stack.enter_context(math_attention())
        return stack

    def _update(self, name: str, step: int) -> partial[Rows]:
        group, update = self._optimisers[name]
        return partial(update.update, rate=float(self.trajectory.rates[step, group]), step=step)


def _order(trajectory: Trajectory, examples: int) -> tuple[Tensor, ...]:
    """Return the minibatches, if they and the checkpoints suffice to take the run again.

    Raises:
        InputError: if the run cannot be taken again from what was kept.
    """
    if trajectory.order is None:
        advice = "Call Recorder.saw(index) before each step."
        raise expected("trajectory", "one with the order of the examples", repr(trajectory), advice)

    steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
    if steps[0] != 0 or steps[-1] != trajectory.steps:
        wanted = f"one with the weights at step 0 and at step {trajectory.steps}"
        raise expected("trajectory", wanted, f"checkpoints {steps}", "A Recorder that is closed keeps both.")

    if not all(map(len, trajectory.order)) or not _are_within(torch.cat(trajectory.order), examples):
        seen = torch.cat(trajectory.order)
        wanted = f"minibatches of numbers in 0..{examples - 1}"
        got = f"{int(seen.min())}..{int(seen.max())} in batches of {min(map(len, trajectory.order))} or more"
        raise expected("trajectory.order", wanted, got, "Pass the training set of the run.")
    return trajectory.order


def _are_within(numbers: Tensor, examples: int) -> bool:
    return int(numbers.min()) >= 0 and int(numbers.max()) < examples


def _refuse_random_training(model: nn.Module) -> None:
    """Refuse a model whose training is random or couples the examples of a minibatch.

    Raises:
        UnsupportedError: naming the module.
    """
    for name, module in model.named_modules():
        # Attention and recurrent layers keep their own share of dropout under its name.
        attribute = "p" if "Dropout" in type(module).__name__ else "dropout"
        share = getattr(module, attribute, 0.0)
        if isinstance(module, _BatchNorm) or (isinstance(share, float) and share > 0):
            what = f"{name or 'model'} ({type(module).__name__})"
            raise UnsupportedError(
                f"A run can be replayed only without dropout and batch normalisation, got {what}. Train with p=0, or "
                "with LayerNorm or GroupNorm; or take SOURCE, TracIn or Influence."
            )
