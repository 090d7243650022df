"""Stochastic Neumann iterations, plain (LiSSA) or preconditioned (ASTRA).

    x <- x - a P^-1 ((C_k + damping) x - b),        C_k on a fresh minibatch                              (ASTRA eq. 5)

With P = I this is LiSSA (Agarwal et al. 2017; Klochkov & Liu 2024), with P = EKFAC it is ASTRA (Wang et al. 2025).
Nothing needs a sweep. LiSSA's plan is Klochkov & Liu's Corollary 1, from the measured spectrum of C: with c of their
condition C.1 and t = c tr(C) / |B| (0 on all the data),

    |B| >= c tr(C) / nu,    1/a = damping + max(nu, (nu + t) / 2),    K = contraction / (a damping),
    |x_K - x*|  ~  (1 - a damping)^K |x_0 - x*|  +  sqrt(a t x*.C x* / (damping (2 - a damping)))           (eq. 10)

where nu is the largest eigenvalue of C. ASTRA's step follows from nu, the largest eigenvalue of P^-1 (C + damping), and
d = tr P^-1 C: mean squares are stable below 2 / (nu + c d / |B|), and a = (1 - momentum) / (nu + c d / |B|), c = 2.
Differs from the papers: all right-hand sides share each minibatch; the residual returned is measured on all the data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, probe_signs
from wherefrom.curvature.damping import Damping
from wherefrom.curvature.lanczos import Spectrum, arnoldi, spectrum
from wherefrom.errors import ConvergenceWarning, DivergenceError, UnsupportedError, expected
from wherefrom.persample.directions import Directions
from wherefrom.progress import track
from wherefrom.scores import Certificate
from wherefrom.solvers.base import Inverse, Iterates, Solver, relative_norm, require_positive, require_solvers
from wherefrom.solvers.identity import Identity
from wherefrom.solvers.kronecker import EKFAC

SAFETY = 1.1  # on the largest eigenvalue, which is measured from below
MOST = 50_000  # steps that a plan may ask for


@dataclass(frozen=True)
class Plan:
    """How an iteration runs, and the spectrum that it comes from.

    Args:
        step, batch, steps: a, |B| (0: all the data, in order) and K.
        nu: largest eigenvalue of C + damping, or of P^-1 (C + damping); 0 where it was not needed.
        effective_dimension: trace of C, or of P^-1 C; 0 where it was not needed.
        constant: c of condition C.1.
    """

    step: float
    batch: int
    steps: int
    nu: float = 0.0
    effective_dimension: float = 0.0
    constant: float = 2.0

    def __post_init__(self) -> None:
        if not (self.step > 0 and self.steps >= 0 and self.batch >= 0):
            got = (self.step, self.batch, self.steps)
            raise expected("the plan of an iteration", "a step above 0 and counts", got)


def corollary(measured: Spectrum, damping: float, contraction: float = 2.0, batch: int | None = None) -> Plan:
    """Plan by Klochkov & Liu's Corollary 1: step size, batch size and number of steps without preconditioner.

    Args:
        measured: the spectrum of C.
        damping: lambda, absolute.
        contraction: the slowest direction's error shrinks by exp(-contraction).
        batch: |B|, if it is given; the step is then the largest stable one for it.
    """
    top = max(measured.largest.value, 1e-300)
    # The published floor c >= 2 is for a batch that counts tokens; one of sequences has as many times more terms.
    largest, constant, trace = SAFETY * top, max(2 / measured.terms, measured.constant.value), measured.trace.value
    trace = max(trace, top)
    chosen = batch or math.ceil(constant * trace / largest)
    full = batch is None and chosen >= measured.examples
    t = 0.0 if full else constant * trace / chosen
    step = 1 / (damping + max(largest, (largest + t) / 2))
    steps = math.ceil(contraction / (step * damping))
    return Plan(step, 0 if full else chosen, steps, largest + damping, trace, constant)


@dataclass(frozen=True, eq=False)
class StochasticNeumann(Inverse):
    """Runs the iteration for each set of right-hand sides, always on the same minibatches.

    Args:
        solver: the hyper-parameters.
        preconditioner: P^-1.
        plan: what was made of them.
    """

    solver: Neumann
    preconditioner: Inverse
    plan: Plan

    @property
    def is_plain(self) -> bool:
        """Whether this is LiSSA, without preconditioner."""
        return isinstance(self.solver.preconditioner, Identity)

    def apply(self, b: Directions) -> Directions:
        """Return x alone."""
        return self.iterate(b).x

    def iterate(self, b: Directions) -> Iterates:
        """Return the mean of the repeats' last iterates, the first one's history, and the passes."""
        b = b.dense()
        last, history = [], []
        for repeat in range(self.solver.repeats):
            steps = list(self.iterates(b, repeat))  # the same x at every step, changed in place
            last.append(steps[-1][0])
            history = history or [relative for _, relative in steps]

        mean = last[0]
        for x in last[1:]:
            mean.add_(1.0, x)
        if len(last) > 1:
            mean = mean.scale(1 / len(last))

        N = len(self.curvature.problem.train)
        passes = self.solver.repeats * self.plan.steps * (self.plan.batch or N) / N
        return Iterates(mean, torch.stack([*history, history[-1]]), passes)

    def solve(self, b: Directions, certify: bool = True) -> tuple[Directions, Certificate]:
        """Solve for Q right-hand sides together.

        Without preconditioner a query counts as converged unless its residual proves an error above twice the
        predicted one.

        Raises:
            DivergenceError: if the iterates grow without bound, with the step size that was used.
        """
        x, certificate = super().solve(b, certify)
        plan = self.plan
        if certificate.residual is None or not plan.effective_dimension or not self.is_plain:
            return x, certificate

        predicted = self.predict_error(b, x)
        # |x - x*| is at least the residual over the largest eigenvalue.
        proven = certificate.residual * b.norm() / (plan.nu * x.norm().clamp(min=1e-300))
        allowed = 2 * predicted + 100 * torch.finfo(self.curvature.problem.dtype).eps
        late = (proven > allowed).nonzero().flatten().tolist()
        if late:
            warnings.warn(
                f"{len(late)} of {len(proven)} queries have an error above twice the one that the measured spectrum "
                f"predicts (queries {late[:10]}): condition C.1 fails for them. Raise the batch size, or take CG.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return x, replace(certificate, predicted=predicted, converged=proven <= allowed)

    def predict_error(self, b: Directions, x: Directions) -> Tensor:
        """Return equation 10 with x for x*: the expected |x - x*| / |x|, (Q,).

        Momentum counts as a step 1 / (1 - momentum) times as long; a decaying step shortens the first term alone.
        """
        plan, solver, damping = self.plan, self.solver, min(self.damping.values())
        step = plan.step / (1 - solver.momentum)
        norms = x.norm().clamp(min=1e-300)

        # What is left of the error at the start.
        rates = (abs(1 - step * damping * solver.decay ** (k // solver.decay_every)) for k in range(plan.steps))
        left = math.prod(rates) * self._start(b.dense()).axpy(-1.0, x).norm() / norms
        if not plan.batch:
            return left

        # What the noise of the minibatches adds.
        t = plan.constant * plan.effective_dimension / plan.batch / solver.repeats
        form = (x.dot(b) - x.dot(x.scale(self.damping))).clamp(min=0)  # x*.C x*
        return left + (step * t * form / (damping * max(2 - step * damping, 1e-300))).sqrt() / norms

    def iterates(self, b: Directions, repeat: int = 0) -> Iterator[tuple[Directions, Tensor]]:
        """Yield x_1, x_2, ... and the relative residuals that the steps saw on their minibatches, (Q,).

        x is the same object every time, changed in place.
        """
        solver, plan = self.solver, self.plan
        rng = torch.Generator().manual_seed(solver.seed + 7919 * repeat)
        draw = self.curvature.operator(rng, plan.batch) if plan.batch else self.curvature.operator()
        b = b.dense()
        x, momentum, limit = self._start(b).clone(), b.zeros_like(), torch.zeros(0)
        for k in track(range(plan.steps), "stochastic Neumann", enabled=self.curvature.problem.progress):
            residual = b.axpy(-1.0, draw(x).axpy(self.damping, x))
            relative = relative_norm(residual, b)

            # A stable iteration may grow a little at first; one that grows a million times does not come back.
            if k == 0:
                limit = 1e6 * relative.clamp(min=1.0)
            if not bool((relative < limit).all()):
                raise DivergenceError(
                    f"the iteration diverged at step {k + 1} of {plan.steps} (step size {plan.step:.2e}, batch "
                    f"{plan.batch or 'all'}). Lower the step size, raise the batch size or the damping, or leave "
                    "`step` and `batch` to be chosen from the spectrum."
                )

            momentum = momentum.scale(solver.momentum).add_(1.0, self.preconditioner.apply(residual))
            x.add_(plan.step * solver.decay ** (k // solver.decay_every), momentum)
            yield x, relative

    def _start(self, b: Directions) -> Directions:
        if self.solver.start == "zero":
            return b.zeros_like()
        if self.is_plain:  # exact where C vanishes
            return b.scale({name: 1 / damping for name, damping in self.damping.items()})
        return self.preconditioner.apply(b)

    def report(self) -> dict[str, float | str]:
        """Return the plan."""
        return self.preconditioner.report() | asdict(self.plan)


@dataclass(frozen=True)
class Neumann(Solver):
    """Stochastic Neumann iterations (LiSSA), preconditioned if asked.

    Args:
        preconditioner: P; Identity() is LiSSA, EKFAC() is ASTRA.
        step: a; None takes the largest stable one, from the measured spectrum (see the module).
        batch: examples drawn with replacement at each step; None takes Corollary 1 (all the data, in order, where that
            is no more) without preconditioner, 256 with one.
        steps: K; None takes ``contraction`` / (a damping) without preconditioner, 200 with one.
        contraction: of the slowest direction, as a power of 1/e; 2 as published.
        repeats: R, independent runs that are averaged: the sampling error shrinks by its root.
        momentum: of heavy-ball form, x <- x + a m, m <- momentum m + P^-1 r.
        decay, decay_every: the step is multiplied by ``decay`` every so many steps.
        start: from P^-1 b (b / damping without preconditioner), or from zero.
        seed: of the minibatches.
    """

    preconditioner: Solver = field(default_factory=Identity)
    step: float | None = None
    batch: int | None = None
    steps: int | None = None
    contraction: float = 2.0
    repeats: int = 1
    momentum: float = 0.0
    decay: float = 1.0
    decay_every: int = 50
    start: Literal["preconditioned", "zero"] = "preconditioned"
    seed: int = 0

    def __post_init__(self) -> None:
        require_solvers(preconditioner=self.preconditioner)
        require_positive(step=self.step, batch=self.batch, steps=self.steps)
        require_positive(
            decay=self.decay, decay_every=self.decay_every, contraction=self.contraction, repeats=self.repeats
        )
        if not 0 <= self.momentum < 1:
            raise expected("momentum", "in [0, 1)", self.momentum)
        if self.start not in ("preconditioned", "zero"):
            raise expected("start", "'preconditioned' or 'zero'", repr(self.start))

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Fit the preconditioner and, where the step, batch or number of steps is not given, measures the spectrum.

        Raises:
            UnsupportedError: if C + damping is not positive definite, or the plan asks for more than 50,000 steps.
        """
        self.check(curvature)
        inner = self.preconditioner.fit(curvature, damping)
        is_plain = isinstance(self.preconditioner, Identity)
        plan = self._plan_plain(inner) if is_plain else self._plan_preconditioned(inner)
        return StochasticNeumann(curvature, inner.damping, self, inner, plan)

    def share(self, inverse: Inverse) -> None:
        """Share what the preconditioner knows."""
        if isinstance(inverse, StochasticNeumann):
            self.preconditioner.share(inverse.preconditioner)

    def _plan_plain(self, inner: Inverse) -> Plan:
        """Plan by Corollary 1."""
        if self.step and self.batch and self.steps:
            return Plan(self.step, self.batch, self.steps)
        curvature, damping = inner.curvature, min(inner.damping.values())
        measured = curvature.cached(("spectrum", self.seed), lambda: spectrum(curvature, seed=self.seed))
        if measured.smallest + damping <= 0:
            raise UnsupportedError(
                f"C + damping has a negative eigenvalue ({measured.smallest:.2e} + {damping:.2e}): the iteration "
                f"would diverge. Raise the damping above {-measured.smallest:.2e}, or take the GGN."
            )
        plan = corollary(measured, damping, self.contraction, self.batch)
        spread = max(inner.damping.values()) - damping  # the other blocks' damping adds to their largest eigenvalues
        step = self.step or (1 - self.momentum) / (1 / plan.step + spread)
        steps = self.steps or math.ceil(self.contraction * (1 - self.momentum) / (step * damping))
        if self.steps is None and steps > MOST:
            raise UnsupportedError(
                f"{steps:,} steps would be needed: the largest eigenvalue, {measured.largest.value:.2e}, is "
                f"{measured.largest.value / damping:.1e} times the damping. Raise the damping, take a preconditioner "
                "(EKFAC()) or CG(), or give `steps`."
            )
        dimension = plan.effective_dimension
        return Plan(step, plan.batch, steps, plan.nu + spread, dimension, plan.constant)

    def _plan_preconditioned(self, inner: Inverse) -> Plan:
        """Take the step of ASTRA from the spectrum of P^-1 (C + damping)."""
        N = len(inner.curvature.problem.train)
        batch, steps = self.batch or (256 if N > 256 else 0), self.steps or 200
        if self.step:
            return Plan(self.step, batch, steps)
        nu, dimension = preconditioned_spectrum(inner, self.seed)
        step = (1 - self.momentum) / (SAFETY * nu + (2 * dimension / batch if batch else 0.0))
        return Plan(step, batch, steps, nu, dimension)


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


def preconditioned_spectrum(inner: Inverse, seed: int = 0, steps: int = 15, probes: int = 8) -> tuple[float, float]:
    """Measure P^-1 (C + damping): its largest eigenvalue by the Arnoldi process, and tr P^-1 C by random probes.

    Raises:
        UnsupportedError: if an eigenvalue is found to be negative.
    """
    problem = inner.curvature.problem
    z = probe_signs(problem, probes, torch.Generator().manual_seed(seed))
    dimension = float(z.dot(inner.apply(inner.curvature.product(z))).mean())

    def damped(v: Directions) -> Directions:
        return inner.curvature.product(v).axpy(inner.damping, v)

    values = arnoldi(damped, z[:1], steps, inner.apply).ritz()[0]
    noise = 1e3 * torch.finfo(problem.dtype).eps
    if not len(values) or float(values[0]) < -noise * abs(float(values[-1])):
        raise UnsupportedError(
            "P or C + damping has a negative eigenvalue: the iteration would diverge. Raise the damping, or take the "
            "GGN."
        )
    return float(values[-1]), max(dimension, 0.0)
