"""Arnoldi: the top p eigenpairs of C from n products, and scores from p numbers per example.

    score(q, z) = sum_k (v_k . grad f(q)) (v_k . grad l(z)) / lambda_k                     (Schioppa et al. 2022, eq. 7)

The n-dimensional Krylov space of a random start is built with full re-orthogonalisation, and distilled to the p Ritz
pairs of largest |lambda|. Differs from the paper: 1 / (lambda_k + damping), which the certificate is measured with;
``damped=False`` is the paper's. What lies outside the p directions scores nothing, as published, so the residual of a
query is the share of it that they miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.curvature.lanczos import Krylov, arnoldi
from wherefrom.errors import UnsupportedError, expected
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver, positive, saved_tensor
from wherefrom.solvers.projection import ProjectedInverse, restored


class ArnoldiInverse(ProjectedInverse):
    """Ritz vectors over their damped Ritz values.

    Args:
        values: the p Ritz values, largest magnitude first.
        errors: bounds on their errors.
    """

    def __init__(
        self, curvature: Curvature, shift: Shift, directions: Vectors, weights: Tensor, values: Tensor, errors: Tensor
    ):
        super().__init__(curvature, shift, directions, weights)
        self.values, self.errors = values, errors

    def report(self) -> dict[str, float | str]:
        """The number of directions, the extreme Ritz values among them and the largest bound on their errors."""
        return {
            "directions": len(self.values),
            "largest eigenvalue": float(self.values[0]),
            "smallest kept": float(self.values[-1]),
            "error of the Ritz values": float(self.errors.max()),
        }

    def state(self) -> dict[str, Tensor]:
        """Ritz vectors, values and bounds."""
        return super().state() | {"values": self.values, "errors": self.errors}


@dataclass(frozen=True)
class Arnoldi(Solver):
    """Scores in the space of the top Ritz vectors.

    Args:
        rank: p, Ritz pairs kept, by absolute value.
        steps: n, products spent.
        sample: training examples that the products run over, drawn once; None: all.
        fresh: draw another sample for every product, as published.
        positive: keep eigenvalues above 0 only; self-influence is then not negative, also with the Hessian.
        damped: divide by lambda + damping; False divides by lambda, as published.
        seed: of the start and the samples.
    """

    rank: int = 100
    steps: int = 200
    sample: int | None = None
    fresh: bool = False
    positive: bool = False
    damped: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        positive(rank=self.rank, steps=self.steps, sample=self.sample)
        if self.rank > self.steps:
            raise expected("rank", f"at most the {self.steps} steps", self.rank)
        if self.fresh and self.sample is None:
            raise expected("sample", "given, as fresh=True draws one for every product", None)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """The n products, of C with each block divided by its damping over the largest.

        Raises:
            UnsupportedError: if no eigenvalue is left, or the damped ones are not away from 0.
        """
        self.check(curvature)
        shift = Damping.of(damping).resolve(curvature)
        level = max(shift.values()) if self.damped else 0.0
        roots = {name: (level / s) ** 0.5 if self.damped else 1.0 for name, s in shift.items()}
        even = tuple(roots[name] for name in curvature.problem.shapes) if len(set(roots.values())) > 1 else None
        krylov = curvature.remember(
            ("arnoldi", self.steps, self.sample, self.fresh, self.seed, even), lambda: self._krylov(curvature, roots)
        )
        values, coefficients, errors = krylov.ritz()
        order = values.abs().sort(descending=True).indices
        order = order[values[order] > 0] if self.positive else order
        noise = 1e-6 if curvature.problem.dtype == torch.float32 else 1e-12  # an eigenvalue of 0, as computed
        order = order[values[order].abs() > noise * float(values.abs().max())][: self.rank]
        values, errors = values[order], errors[order]
        if not len(order) or bool(((values + level).abs() <= 1e-9 * values.abs()).any()):
            raise UnsupportedError(
                f"{len(order)} eigenvalues were kept, and one of lambda + damping must not vanish: the curvature is "
                "indefinite. Take positive=True, another damping, or the GGN."
            )
        flat = coefficients[:, order].T.to(krylov.basis) @ krylov.basis  # (p, D)
        directions = vectors.scale(vectors.unflatten(flat, curvature.problem.shapes), roots)
        return ArnoldiInverse(curvature, shift, directions, 1 / (values + level), values, errors)

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the saved Ritz pairs."""
        inner = restored(curvature, shift, state)
        values, errors = (saved_tensor(state, name, len(inner.weights)) for name in ("values", "errors"))
        return ArnoldiInverse(curvature, shift, inner.directions, inner.weights, values, errors)

    def _krylov(self, curvature: Curvature, roots: dict[str, float]) -> Krylov:
        problem, rng = curvature.problem, torch.Generator().manual_seed(self.seed)
        start = {
            name: torch.randn(1, *s, generator=rng, dtype=torch.float64).to(problem.device, problem.dtype)
            for name, s in problem.shapes.items()
        }
        N = len(problem.train)
        draw = lambda: torch.randperm(N, generator=rng)[: self.sample] if self.sample else None  # noqa: E731
        once = draw()

        def product(v: Vectors) -> Vectors:
            index = draw() if self.fresh else once
            return vectors.scale(curvature.product(vectors.scale(v, roots), index), roots)

        return arnoldi(product, start, self.steps)
