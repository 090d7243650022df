"""SOURCE: training unrolled in a few segments, each taken as stationary (Bae et al. 2024; Wang et al. 2025, ASTRA).

    score(q, z) = grad f(q) . sum_l S_L ... S_{l+1} r_l(z)                                        (ASTRA eq. 16)

    S_l = exp(-eta_l K_l G_l)                                            what segment l leaves of a change before it
    r_l = (I - exp(-eta_l K_l G_l)) G_l^-1 g_l(z)                        the change that z makes in segment l (SOURCE)
    r_l = (G_l + 1 / (eta_l K_l))^-1 g_l(z)                              nearly the same, by any solver (ASTRA-SOURCE)

g_l(z) is the mean gradient of z over the segment's checkpoints, G_l the curvature, with Kronecker statistics averaged
over the same checkpoints. grad f is taken at the final weights and carried back through the segments, so everything is
applied on the queries' side. Eq. 16 as printed has a minus sign that its derivation does not give.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.ggn import GGN
from wherefrom.errors import expected
from wherefrom.methods.base import FittedMethod, TrajectoryMethod
from wherefrom.methods.stream import Measurement, score_stream
from wherefrom.model.problem import Problem
from wherefrom.model.task import Task
from wherefrom.scores import Certificate
from wherefrom.solvers.base import Inverse, Solver, require_solvers
from wherefrom.solvers.kronecker import EKFAC
from wherefrom.solvers.spectral import Exact
from wherefrom.training.trajectory import Segment


@dataclass(frozen=True, eq=False)
class FittedSegment:
    """One segment.

    Args:
        segment: its steps, rate and checkpoints.
        places: the model at the weights where gradients are taken.
        basis: what applies functions of G_l.
        inverse: (G_l + 1 / (eta_l K_l))^-1; None: by a function of G_l.
    """

    segment: Segment
    places: tuple[Problem, ...]
    basis: Inverse
    inverse: Inverse | None

    @property
    def duration(self) -> float:
        """eta_l K_l."""
        return self.segment.rate * self.segment.steps

    def remains(self, s: Tensor) -> Tensor:
        """Return the eigenvalue of S_l to an eigenvalue of G_l."""
        return (-self.duration * s).exp()

    def response(self, s: Tensor) -> Tensor:
        """Return (1 - exp(-eta K s)) / s, which is eta K at 0."""
        x = self.duration * s.clamp(min=0)
        return self.duration * torch.where(x > 1e-12, -torch.expm1(-x) / x.clamp(min=1e-12), torch.ones_like(x))


@dataclass(frozen=True, kw_only=True)
class SOURCE(TrajectoryMethod):
    """Segmented stationary unrolling for SGD; as it stands EKFAC-SOURCE, with ``solver=ASTRA()`` ASTRA-SOURCE.

    Args:
        segments: L, of equal numbers of steps; each needs a checkpoint.
        solver: applies (G_l + 1 / (eta_l K_l))^-1, certified; None takes the function of G_l that SOURCE has there.
        basis: the eigenvectors that functions of G_l are applied in: `EKFAC` as published, or `Exact`.
        average: "gradients" of the checkpoints, or their "weights" (FAST-SOURCE: one fit and one pass a segment).
        curvature: G, a function of the `Problem`; its products are at the checkpoints' mean weights (ASTRA, option 3).
    """

    segments: int = 3
    solver: Solver | None = None
    basis: Solver = field(default_factory=EKFAC)
    average: Literal["gradients", "weights"] = "gradients"
    curvature: Callable[[Problem], Curvature] = GGN

    def damping(self) -> float:
        """Return the damping that these segments imply for influence at the final weights: L over the sum of all rates.

        That is 1 / (eta K) with the mean rate and the mean length of the segments, the same as
        `Damping.from_training` of the run's learning rates, whatever the schedule. Within SOURCE each segment has its
        own 1 / (eta_l K_l).
        """
        parts = self.trajectory.segments(self.segments)
        return len(parts) / sum(s.rate * s.steps for s in parts)

    def fit(self, model: nn.Module, task: Task | object, train: Any) -> FittedSOURCE:
        """Fit every segment.

        Raises:
            InputError: if the average is of nothing known, or the basis holds no eigenvalues.
        """
        start = time.perf_counter()
        if self.average not in ("gradients", "weights"):
            raise expected("average", "'gradients' or 'weights'", repr(self.average))
        require_solvers(basis=self.basis)
        if self.solver is not None:
            require_solvers(solver=self.solver)
        problem = self.read_problem(model, task, train)
        segments = tuple(self._fit_segments(problem))
        return FittedSOURCE(self, problem, time.perf_counter() - start, segments)

    def _fit_segments(self, problem: Problem) -> Iterator[FittedSegment]:
        basis = self.basis
        # A function of G needs all its eigenvectors: the dual form, where that is smaller, has none.
        if isinstance(basis, Exact) and basis.form == "auto":
            basis = replace(basis, form="primal")

        for segment in self.trajectory.segments(self.segments):
            mean = problem.at(segment.mean())
            places = (mean,)
            if self.average == "gradients":
                places = tuple(problem.at(checkpoint.state) for checkpoint in segment.checkpoints)
            curvature = self.curvature(mean).with_statistics(places)

            basis.check(curvature)
            functions = basis.fit(curvature, segment.damping)
            if not functions.has_functions:
                wanted = "a solver that holds the eigenvalues of G, such as EKFAC() or Exact()"
                raise expected("basis", wanted, repr(self.basis))
            inverse = None
            if self.solver is not None:
                self.solver.check(curvature)
                inverse = self.solver.fit(curvature, segment.damping)
            yield FittedSegment(segment, places, functions, inverse)


@dataclass(frozen=True, eq=False)
class FittedSOURCE(FittedMethod):
    """SOURCE, ready for queries.

    Args:
        segments: of the run, in order.
    """

    method: SOURCE
    segments: tuple[FittedSegment, ...]

    def score_values(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Certificate]:
        """Carry the queries' gradients back through the segments, from the last to the first."""
        w = self.query_directions(self.problem, queries, measurement)
        values, certificates = torch.zeros(()), []
        for part in reversed(self.segments):
            if part.inverse is None:
                x = part.basis.apply_function(part.response, w)
            else:
                x, certificate = part.inverse.solve(w)
                certificates.append(certificate)
            for place in part.places:
                values = values + score_stream(place, x) / len(part.places)
            w = part.basis.apply_function(part.remains, w)

        row_error = self.problem.row_error
        if not certificates:
            return values, self.certificate(len(values))
        # A query is as good as the worst of its solves.
        residual = torch.stack([c.residual for c in certificates if c.residual is not None]).amax(0)
        converged = torch.stack([c.converged for c in certificates]).all(0)
        return values, Certificate(residual, converged, row_error=row_error)
