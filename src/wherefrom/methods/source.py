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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.ggn import GGN
from wherefrom.errors import expected
from wherefrom.methods.stream import Measurement, streamed
from wherefrom.methods.training import OverTraining
from wherefrom.model.problem import Problem
from wherefrom.solvers.base import Inverse, Pairing, Solver, instance
from wherefrom.solvers.exact import Exact
from wherefrom.solvers.kronecker import EKFAC
from wherefrom.training.trajectory import Segment


@dataclass(frozen=True)
class Fitted:
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
        """The eigenvalue of S_l to an eigenvalue of G_l."""
        return (-self.duration * s).exp()

    def response(self, s: Tensor) -> Tensor:
        """(1 - exp(-eta K s)) / s, which is eta K at 0."""
        x = self.duration * s.clamp(min=0)
        return self.duration * torch.where(x > 1e-12, -torch.expm1(-x) / x.clamp(min=1e-12), torch.ones_like(x))


@dataclass(kw_only=True)
class SOURCE(OverTraining):
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
        """The damping that these segments imply for influence at the final weights: L over the sum of all rates.

        That is 1 / (eta K) with the mean rate and the mean length of the segments, the same as
        `Damping.from_training` of the run's learning rates, whatever the schedule. Within SOURCE each segment has its
        own 1 / (eta_l K_l).
        """
        parts = self.trajectory.segments(self.segments)
        return len(parts) / sum(s.rate * s.steps for s in parts)

    def _fit(self) -> None:
        if self.average not in ("gradients", "weights"):
            raise expected("average", "'gradients' or 'weights'", repr(self.average))
        instance(basis=self.basis, **({"solver": self.solver} if self.solver else {}))
        self._segments = list(self._fitted())

    def _fitted(self) -> Iterator[Fitted]:
        for segment in self.trajectory.segments(self.segments):
            mean = self.problem.at(segment.mean())
            each = tuple(self.problem.at(c.state) for c in segment.checkpoints)
            places = each if self.average == "gradients" else (mean,)
            curvature = self.curvature(mean)
            curvature.statistics = places
            # A function of G needs all its eigenvectors: the dual form, where that is smaller, has none.
            basis = self.basis
            if isinstance(basis, Exact) and basis.form == "auto":
                basis = replace(basis, form="primal")
            solvers = [s for s in (basis, self.solver) if s is not None]
            for solver in solvers:
                solver.check(curvature)
            fitted, *inverse = (solver.fit(curvature, segment.damping) for solver in solvers)
            if type(fitted).function is Inverse.function:
                wanted = "a solver that holds the eigenvalues of G, such as EKFAC() or Exact()"
                raise expected("basis", wanted, repr(self.basis))
            yield Fitted(segment, places, fitted, inverse[0] if inverse else None)

    def _score(self, queries: Any, measurement: Measurement | None) -> tuple[Tensor, Tensor | None, Tensor]:
        w = self._query_vectors(self.problem, queries, measurement)
        values, residuals, converged = torch.zeros(()), [], []
        for part in reversed(self._segments):
            if part.inverse is None:
                x = part.basis.function(part.response, w)
            else:
                solution = part.inverse(w)
                x = solution.x
                residuals.append(solution.residual)
                converged.append(solution.converged)
            for place in part.places:
                values = values + streamed(place, Pairing.of(x, place.blocks)) / len(part.places)
            w = part.basis.function(part.remains, w)
        if not residuals:
            return values, None, torch.ones(len(values), dtype=torch.bool)
        return values, torch.stack(residuals).amax(0), torch.stack(converged).all(0)
