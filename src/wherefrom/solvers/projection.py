"""Scores from p numbers for each example: gradients along p directions, and the two baselines with random ones.

    score(q, z) = sum_k w_k (v_k . grad f(q)) (v_k . grad l(z)),        x = V^T diag(w) V b

`wherefrom.solvers.spectral` takes eigenvectors for V and 1 / eigenvalues for w. RandProj takes Gaussian rows and
RandSelect p coordinates (Schioppa et al. 2022, section 5), both with w = 1 and unbiased for the gradient dot product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature
from wherefrom.curvature.damping import Damping
from wherefrom.curvature.lanczos import embedding
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import unflatten
from wherefrom.solvers.base import Inverse, Solver, parameter_count, require_positive, require_tensor


def project(directions: Directions, weights: Tensor, b: Directions) -> Directions:
    """Return x = V^T diag(w) V b as combinations of the p directions V, which are not written out for each query."""
    along = directions.inner_products(b).T  # (Q, p)
    return replace(directions, mix=along * weights.to(along))


def project_self_influence(directions: Directions, weights: Tensor, rows: Gradients) -> tuple[Tensor, Tensor]:
    """Return sum_k w_k (v_k . g)^2 of each of n gradients, and that all converged: (n,), (n,). None is written out."""
    along = rows.dot(directions)[..., 0].double()  # (p, n)
    values = weights.to(along) @ along.square()
    return values, torch.ones_like(values, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class ProjectedInverse(Inverse):
    """x = V^T V b.

    Args:
        vectors: V, (p, D), coordinates block after block.
    """

    vectors: Tensor

    is_approximate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_tensor("vectors", self.vectors, None, parameter_count(self.curvature))

    def apply(self, b: Directions) -> Directions:
        """Combine the p directions."""
        return project(self._directions, self.vectors.new_ones(len(self.vectors)), b)

    def self_influence(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return |V g|^2 of each of n gradients, (n,)."""
        return project_self_influence(self._directions, self.vectors.new_ones(len(self.vectors)), rows)

    @cached_property
    def _directions(self) -> Directions:
        return Directions.unflatten(self.curvature.problem.blocks, self.vectors)

    def report(self) -> dict[str, float | str]:
        """Return the number of directions."""
        return {"directions": len(self.vectors)}


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
        require_positive(rank=self.rank)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Draw the projection; there is no pass over the data but what a relative damping needs."""
        self.check(curvature)
        problem = curvature.problem
        like = next(iter(problem.parameters.values())).detach()
        rows = {
            name: embedding(problem.shapes, name, range(self.rank), self.rank, self.seed, like)
            for name in problem.shapes
        }
        vectors = Directions.from_parameters(problem.blocks, rows).flatten()
        return ProjectedInverse(curvature, Damping.of(damping).resolve(curvature), vectors)


@dataclass(frozen=True, eq=False)
class SelectedInverse(Inverse):
    """Keeps some coordinates, scaled, and drops the others.

    Args:
        mask: what each coordinate is multiplied with, (1, D), block after block.
    """

    mask: Tensor

    is_approximate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_tensor("mask", self.mask, 1, parameter_count(self.curvature))

    def apply(self, b: Directions) -> Directions:
        """Multiply by the mask."""
        mask = Directions.unflatten(b.blocks, self.mask).tensors()
        return b.dense().multiply(lambda name: mask[name][0])


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
        require_positive(rank=self.rank)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Draw the coordinates."""
        self.check(curvature)
        problem = curvature.problem
        D = parameter_count(curvature)
        p = min(self.rank, D)
        flat = torch.zeros(1, D, dtype=problem.dtype, device=problem.device)
        flat[0, torch.randperm(D, generator=torch.Generator().manual_seed(self.seed))[:p]] = D / p
        # Drawn in the order of the parameters, which does not depend on how they are cut into blocks.
        mask = Directions.from_parameters(problem.blocks, unflatten(flat, problem.shapes)).flatten()
        return SelectedInverse(curvature, Damping.of(damping).resolve(curvature), mask)
