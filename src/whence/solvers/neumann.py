"""Stochastic Neumann iterations, plain (LiSSA) or preconditioned (ASTRA).

    x <- x - a P^-1 ((C_k + damping) x - b),        C_k on a fresh minibatch                              (ASTRA eq. 5)

With P = I this is LiSSA (Agarwal et al. 2017; Klochkov & Liu 2024), with P = EKFAC it is ASTRA (Wang et al. 2025). The
step that needs no sweep follows from the spectrum of A = P^-1 (C + damping): mean squares are stable below
2 / (nu + c d / |B|), and

    a = (1 - momentum) / (nu + c d / |B|),   nu = the largest eigenvalue of A,  d = tr P^-1 C,  c = 2.

Differs from the papers: all right-hand sides share each minibatch; the residual returned is measured on all the data.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from whence import vectors
from whence.curvature.base import Curvature
from whence.damping import Damping, Shift
from whence.errors import DivergenceError, expected
from whence.progress import track
from whence.solvers.base import Inverse, Solution, Solver, instance, positive, relative
from whence.solvers.identity import Identity
from whence.solvers.kronecker import EKFAC
from whence.vectors import Vectors


@dataclass(frozen=True)
class Plan:
    """The step size, batch and number of steps of a run, and the spectrum they come from (0 where they were given)."""

    step: float
    batch: int
    steps: int
    nu: float = 0.0
    effective_dimension: float = 0.0


class StochasticNeumann(Inverse):
    """Runs the iteration for each set of right-hand sides, always on the same minibatches."""

    def __init__(self, curvature: Curvature, shift: Shift, solver: Neumann, preconditioner: Inverse, plan: Plan):
        super().__init__(curvature, shift)
        self.solver, self.preconditioner, self.plan = solver, preconditioner, plan

    def apply(self, b: Vectors) -> Vectors:
        """x alone."""
        return self._iterate(b)[0]

    def __call__(self, b: Vectors, certify: bool = True) -> Solution:
        """Solve for Q right-hand sides together.

        Raises:
            DivergenceError: if the iterates grow without bound, with the step size that was used.
        """
        x, history = self._iterate(b)
        passes = self.plan.steps * self.plan.batch / len(self.curvature.problem.train)
        return self.certified(x, b, certify, history, passes)

    def _iterate(self, b: Vectors) -> tuple[Vectors, Tensor]:
        solver, plan = self.solver, self.plan
        A = self.curvature.operator(torch.Generator().manual_seed(solver.seed), plan.batch)
        x, m = self._start(b), vectors.zeros_like(b)
        history = []
        for k in track(range(plan.steps), "stochastic Neumann", enabled=self.curvature.problem.progress):
            r = vectors.add(vectors.add(b, A(x), -1.0), x, {p: -s for p, s in self.shift.items()})
            history.append(relative(r, b))
            if not bool((history[-1] < 1e6).all()):
                raise DivergenceError(
                    f"the iteration diverged at step {k + 1} of {plan.steps} (step size {plan.step:.2e}, batch "
                    f"{plan.batch}). Lower "
                    "the step size, raise the batch size or the damping, or leave `step` to be chosen from the "
                    "spectrum."
                )
            m = vectors.add_(vectors.scale(m, solver.momentum), self.preconditioner.apply(r))
            vectors.add_(x, m, plan.step * solver.decay ** (k // solver.decay_every))
        return x, torch.stack([*history, history[-1]])

    def _start(self, b: Vectors) -> Vectors:
        if self.solver.start == "zero":
            return vectors.zeros_like(b)
        if isinstance(self.solver.preconditioner, Identity):  # exact where C vanishes
            return {name: t / self.shift[name] for name, t in b.items()}
        return self.preconditioner.apply(b)

    def report(self) -> dict[str, float]:
        """The plan."""
        return self.preconditioner.report() | asdict(self.plan)

    def state(self) -> dict[str, Tensor]:
        """The preconditioner's, and the plan."""
        p = self.plan
        plan = torch.tensor([p.step, p.batch, p.steps, p.nu, p.effective_dimension], dtype=torch.float64)
        return self.preconditioner.state() | {"neumann|plan": plan}


@dataclass(frozen=True)
class Neumann(Solver):
    """Stochastic Neumann iterations (LiSSA), preconditioned if asked.

    Args:
        preconditioner: P; Identity() is LiSSA, EKFAC() is ASTRA.
        step: a; None takes the largest stable one, from the measured spectrum (see the module).
        batch: examples drawn with replacement at each step.
        steps: K; None takes 2 / (a damping) without preconditioner, 200 with one.
        momentum: of heavy-ball form, x <- x + a m, m <- momentum m + P^-1 r.
        decay, decay_every: the step is multiplied by ``decay`` every so many steps.
        start: from P^-1 b (b / damping without preconditioner), or from zero.
        seed: of the minibatches.
    """

    preconditioner: Solver = field(default_factory=Identity)
    step: float | None = None
    batch: int = 256
    steps: int | None = None
    momentum: float = 0.0
    decay: float = 1.0
    decay_every: int = 50
    start: Literal["preconditioned", "zero"] = "preconditioned"
    seed: int = 0

    def __post_init__(self) -> None:
        instance(preconditioner=self.preconditioner)
        positive(step=self.step, batch=self.batch, steps=self.steps, decay=self.decay, decay_every=self.decay_every)
        if not 0 <= self.momentum < 1:
            raise expected("momentum", "in [0, 1)", self.momentum)
        if self.start not in ("preconditioned", "zero"):
            raise expected("start", "'preconditioned' or 'zero'", repr(self.start))

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Fits the preconditioner and, where the step is not given, measures the spectrum."""
        self.check(curvature)
        inner = self.preconditioner.fit(curvature, damping)
        return StochasticNeumann(curvature, inner.shift, self, inner, self.plan(inner))

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """Restores the preconditioner and the plan."""
        inner = self.preconditioner.restore(curvature, shift, state)
        step, batch, steps, nu, dimension = state["neumann|plan"].tolist()
        return StochasticNeumann(curvature, inner.shift, self, inner, Plan(step, int(batch), int(steps), nu, dimension))

    def plan(self, inner: Inverse) -> Plan:
        """Step size, batch and steps; the step size from the spectrum unless it is given."""
        step, nu, dimension = self.step, 0.0, 0.0
        if step is None:
            nu, dimension = spectrum(inner, self.seed)
            step = (1 - self.momentum) / (1.1 * nu + 2 * dimension / self.batch)
        steps = self.steps
        if steps is None:
            slowest = min(inner.shift.values()) * step / (1 - self.momentum)
            steps = math.ceil(2 / slowest) if isinstance(self.preconditioner, Identity) else 200
        return Plan(step, self.batch, steps, nu, dimension)


@dataclass(frozen=True)
class ASTRA(Neumann):
    """Neumann with EKFAC, on the published schedule: 200 steps, batch 256, momentum 0.9, step halved every 50.

    The published step is 0.1 x damping for multilayer perceptrons (table 3): ``ASTRA(step=0.1 * damping)``. None, the
    default, takes the one from the spectrum.
    """

    preconditioner: Solver = field(default_factory=EKFAC)
    steps: int | None = 200
    momentum: float = 0.9
    decay: float = 0.5


def spectrum(inner: Inverse, seed: int = 0, iterations: int = 15, probes: int = 8) -> tuple[float, float]:
    """(largest eigenvalue of P^-1 (C + damping), trace of P^-1 C) by power iteration and by random probes."""
    problem, shift = inner.curvature.problem, inner.shift
    rng = torch.Generator().manual_seed(seed)
    z = {
        name: t.to(problem.device)
        for name, t in vectors.random_signs(problem.shapes, probes, rng, problem.dtype).items()
    }
    dimension = float(vectors.dot(z, inner.apply(inner.curvature.product(z))).mean())
    x, nu = {name: t[:1] for name, t in z.items()}, 0.0
    for _ in range(iterations):
        x = vectors.scale(x, 1 / vectors.norm(x))
        x = inner.apply(vectors.add(inner.curvature.product(x), x, shift))
        nu = float(vectors.norm(x))
    return nu, max(dimension, 0.0)
