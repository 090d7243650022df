"""Scores from p numbers per example: gradients along p directions, and the two baselines with random ones.

    score(q, z) = sum_k w_k (v_k . grad f(q)) (v_k . grad l(z)),        x = V^T diag(w) V b

`wherefrom.solvers.arnoldi` takes eigenvectors for V and 1 / eigenvalues for w. RandProj takes Gaussian rows and
RandSelect p coordinates (Schioppa et al. 2022, section 5), both with w = 1 and unbiased for the gradient dot product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.curvature.lanczos import embedding
from wherefrom.persample import gradients, vectors
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Pairing, Solver, positive, saved_tensor


class ProjectedInverse(Inverse):
    """x = V^T diag(w) V b.

    Args:
        curvature, shift: the matrix and its damping.
        directions: V, (p, ...) per parameter.
        weights: w, (p,).
    """

    approximate = True

    def __init__(self, curvature: Curvature, shift: Shift, directions: Vectors, weights: Tensor):
        super().__init__(curvature, shift)
        self.directions, self.weights = directions, weights
        self._packed = gradients.pack(curvature.problem.blocks, directions)

    def apply(self, b: Vectors) -> Vectors:
        """Two products with (p, D) matrices."""
        v = {name: t.reshape(len(t), -1) for name, t in self.directions.items()}
        c = torch.stack([b[name].reshape(len(b[name]), -1) @ t.T for name, t in v.items()]).sum(0) * self.weights.to(
            next(iter(v.values()))
        )
        return {name: (c @ t).reshape(b[name].shape) for name, t in v.items()}

    def quadratic(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """sum_k w_k (v_k . g)^2 of each of n gradients, (n,); none is written out."""
        along = rows.dot(packed=self._packed)[..., 0].double()  # (p, n)
        values = self.weights.to(along) @ along.square()
        return values, torch.ones_like(values, dtype=torch.bool)

    def pairing(self, rows: Gradients) -> Pairing:
        """Each training example's p numbers, combined for each query."""
        along = rows.dot(packed=self._packed)[..., 0].T  # (Q, p)
        return Pairing(self._packed, mix=along * self.weights.to(along))

    def report(self) -> dict[str, float | str]:
        """The number of directions."""
        return {"directions": len(self.weights)}

    def state(self) -> dict[str, Tensor]:
        """Directions and weights."""
        return {"weights": self.weights} | {f"direction|{name}": t for name, t in self.directions.items()}


def restored(curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> ProjectedInverse:
    """From what `ProjectedInverse.state` saved."""
    weights = saved_tensor(state, "weights", None)
    shapes = curvature.problem.shapes.items()
    directions = {name: saved_tensor(state, f"direction|{name}", len(weights), *shape) for name, shape in shapes}
    return ProjectedInverse(curvature, shift, directions, weights)


@dataclass(frozen=True)
class RandProj(Solver):
    """Gradient dot products after a random Gaussian projection; curvature and damping play no part.

    Args:
        rank: p, number of directions, entries N(0, 1 / p).
        seed: of the projection.
    """

    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        positive(rank=self.rank)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Draws the projection; no pass over the data but what a relative damping needs."""
        self.check(curvature)
        problem = curvature.problem
        like = next(iter(problem.parameters.values())).detach()
        directions = {
            name: embedding(problem.shapes, name, range(self.rank), self.rank, self.seed, like)
            for name in problem.shapes
        }
        shift = Damping.of(damping).resolve(curvature)
        return ProjectedInverse(curvature, shift, directions, torch.ones(self.rank, device=like.device))

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the saved projection."""
        return restored(curvature, shift, state)


class SelectedInverse(Inverse):
    """Keeps some coordinates, scaled, and drops the others."""

    approximate = True

    def __init__(self, curvature: Curvature, shift: Shift, mask: Vectors):
        super().__init__(curvature, shift)
        self.mask = mask

    def apply(self, b: Vectors) -> Vectors:
        """A product with the mask."""
        return {name: t * self.mask[name] for name, t in b.items()}

    def state(self) -> dict[str, Tensor]:
        """The mask."""
        return {f"mask|{name}": t for name, t in self.mask.items()}


@dataclass(frozen=True)
class RandSelect(Solver):
    """Gradient dot products over p coordinates drawn without replacement, times D / p.

    Args:
        rank: p, number of coordinates.
        seed: of the draw.
    """

    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        positive(rank=self.rank)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Draws the coordinates."""
        self.check(curvature)
        problem = curvature.problem
        D = sum(s.numel() for s in problem.shapes.values())
        p = min(self.rank, D)
        flat = torch.zeros(1, D, dtype=problem.dtype, device=problem.device)
        flat[0, torch.randperm(D, generator=torch.Generator().manual_seed(self.seed))[:p]] = D / p
        return SelectedInverse(
            curvature, Damping.of(damping).resolve(curvature), vectors.unflatten(flat, problem.shapes)
        )

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the saved mask."""
        shapes = curvature.problem.shapes.items()
        mask = {name: saved_tensor(state, f"mask|{name}", 1, *shape) for name, shape in shapes}
        return SelectedInverse(curvature, shift, mask)
