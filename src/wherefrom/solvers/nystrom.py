"""Randomised Nystrom approximation: the top of the spectrum of any positive semi-definite C, from products alone.

With D = diag(damping) / level, M = D^-1/2 C D^-1/2, and an orthonormal random test matrix Omega of r columns,

    C_nys = (M Omega) (Omega^T M Omega)^-1 (M Omega)^T = U Lambda U^T                        (Frangella et al. 2023)
    x = U (Lambda + level)^-1 U^T b + (I - U U^T) b / (Lambda_r + level)

where the last, the smallest kept eigenvalue, stands for what is not kept. One pass over the data with r right-hand
sides. As a preconditioner of CG it serves where Kronecker factors and rows do not: layers without an entry, many
outputs, many examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.errors import UnsupportedError, expected
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver, positive, saved_tensor


class LowRankInverse(Inverse):
    """Eigenpairs of D^-1/2 C D^-1/2, and a constant for the rest.

    Args:
        curvature, shift: the matrix and its damping.
        values, directions: (r,) float64 and orthonormal rows (r, D).
    """

    approximate = True

    def __init__(self, curvature: Curvature, shift: Shift, values: Tensor, directions: Tensor):
        super().__init__(curvature, shift)
        self.values, self.directions = values, directions.contiguous()  # as a file gives them back
        self.level = max(shift.values())
        self.roots = {name: (self.level / s) ** 0.5 for name, s in shift.items()}

    def apply(self, b: Vectors) -> Vectors:
        """Two products with (r, D) matrices."""
        rest = float(self.values[-1]) + self.level
        shapes = self.curvature.problem.shapes
        scaled = vectors.scale(b, self.roots)
        flat = vectors.flatten({name: scaled[name] for name in shapes})  # (Q, D)
        weight = (1 / (self.values + self.level) - 1 / rest).to(flat)
        x = torch.addmm(flat / rest, (flat @ self.directions.T) * weight, self.directions)
        return vectors.scale(vectors.unflatten(x, shapes), self.roots)

    def report(self) -> dict[str, float | str]:
        """The rank, and the smallest eigenvalue kept in units of the damping."""
        return {"rank": len(self.values), "smallest kept / damping": float(self.values[-1]) / self.level}

    def state(self) -> dict[str, Tensor]:
        """The eigenpairs."""
        return {"values": self.values, "directions": self.directions}


@dataclass(frozen=True)
class Nystrom(Solver):
    """Low-rank approximation of the inverse, meant as a preconditioner: ``CG(preconditioner=Nystrom())``.

    Args:
        rank: r, right-hand sides of the one pass; memory is 3 r D numbers.
        seed: of the test matrix.
    """

    rank: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        positive(rank=self.rank)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """One pass over the training data with ``rank`` right-hand sides.

        Raises:
            UnsupportedError: if C is not positive semi-definite on the test matrix.
        """
        self.check(curvature)
        shift = Damping.of(damping).resolve(curvature)
        level = max(shift.values())
        back = {name: (level / s) ** 0.5 for name, s in shift.items()}
        even = tuple(back[name] for name in curvature.problem.shapes) if len(set(back.values())) > 1 else None
        values, directions = curvature.remember(
            ("nystrom", self.rank, self.seed, even), lambda: _eigenpairs(curvature, back, self.rank, self.seed)
        )
        return LowRankInverse(curvature, shift, values, directions)

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the saved eigenpairs."""
        sizes = [s.numel() for s in curvature.problem.shapes.values()]
        values = saved_tensor(state, "values", None)
        if not len(values):
            raise expected("a saved fit", "of one eigenvalue or more", "none")
        return LowRankInverse(curvature, shift, values, saved_tensor(state, "directions", len(values), sum(sizes)))


def _eigenpairs(curvature: Curvature, roots: dict[str, float], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,), largest first, and orthonormal rows (r, D) of the Nystrom approximation."""
    problem = curvature.problem
    shapes = problem.shapes
    D = sum(s.numel() for s in shapes.values())
    rng = torch.Generator().manual_seed(seed)
    omega = torch.randn(min(rank, D), D, generator=rng, dtype=problem.dtype).to(problem.device)
    omega = torch.linalg.qr(omega.T)[0].T.contiguous()  # (r, D)
    image = curvature.product(vectors.scale(vectors.unflatten(omega, shapes), roots))
    y = vectors.flatten(vectors.scale({name: image[name] for name in shapes}, roots))
    small = (omega @ y.T).double()
    # keeps the small matrix definite, also where products are inexact; taken off again
    nudge = max(torch.finfo(y.dtype).eps * float(y.norm()), float((small - small.T).norm()))
    y.add_(omega, alpha=nudge)
    small.diagonal().add_(nudge)
    factor, info = torch.linalg.cholesky_ex((small + small.T) / 2)
    if int(info):
        raise UnsupportedError(
            "Nystrom needs a positive semi-definite curvature, and this one has a negative direction. Take the GGN "
            "instead of the Hessian, or Exact()."
        )
    b = torch.linalg.solve_triangular(factor.to(y), y, upper=False)  # (r, D): b^T b = C_nys + nudge
    _, sigma, directions = torch.linalg.svd(b, full_matrices=False)
    return (sigma.double().square() - nudge).clamp(min=0), directions
