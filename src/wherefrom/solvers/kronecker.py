"""KFAC and EKFAC: a diagonal in a Kronecker-factored eigenbasis, block by block.

    x = Q_S [ (Q_S^T V Q_A) / (Lambda + damping) ] Q_A^T                       (Grosse et al. 2023; ASTRA appendix B)

Lambda are KFAC's products of eigenvalues or EKFAC's corrected second moments; see `wherefrom.curvature.kronecker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping
from wherefrom.curvature.kronecker import Labels
from wherefrom.errors import expected
from wherefrom.persample.directions import Directions
from wherefrom.persample.eigenbasis import Basis, KroneckerBlock
from wherefrom.persample.factored import Factored
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.rows import Rows
from wherefrom.solvers.base import Inverse, Solver, require_tensor

WRITTEN = 64  # examples whose rows are written out at a time


@dataclass(frozen=True, eq=False)
class EigenInverse(Inverse):
    """Divides by eigenvalues + damping in the eigenbasis of each block.

    Args:
        factors: block name to its eigenbasis and eigenvalues.
        corrected: take EKFAC's eigenvalues; False takes KFAC's.
    """

    factors: Mapping[str, KroneckerBlock]
    corrected: bool

    is_approximate: ClassVar[bool] = True
    is_positive_definite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for block in self.curvature.problem.blocks:
            G, O, I = block.sides
            factors = self.factors.get(block.name)
            if not isinstance(factors, KroneckerBlock):
                raise expected("the Kronecker factors of a fit", f"those of block {block.name} too", [*self.factors])
            require_tensor(f"{block.name}|kfac", factors.kfac, G, O, I)
            require_tensor(f"{block.name}|ekfac", factors.ekfac, G, O, I)
            _require_basis(f"{block.name}|left", factors.left, G, O)
            _require_basis(f"{block.name}|right", factors.right, G, I)

    @property
    def scoring_basis(self) -> Mapping[str, KroneckerBlock]:
        """The eigenbasis of every block."""
        return self.factors

    def eigenvalues(self, name: str) -> Tensor:
        """Return the eigenvalues of a block, (G, O, I)."""
        return self.factors[name].ekfac if self.corrected else self.factors[name].kfac

    def damped_eigenvalues(self, name: str) -> Tensor:
        """Return eigenvalues + damping of a block, (G, O, I)."""
        return self.eigenvalues(name) + self.damping[name]

    def apply(self, b: Directions) -> Directions:
        """Divide in the eigenbasis; the solutions come in the bases that the right-hand sides are in."""
        return self._multiply(b, lambda name: 1 / self.damped_eigenvalues(name))

    def apply_function(self, phi: Callable[[Tensor], Tensor], b: Directions) -> Directions:
        """Return phi(C) b, phi of the eigenvalues alone."""
        return self._multiply(b, lambda name: phi(self.eigenvalues(name)))

    def _multiply(self, b: Directions, factor_of: Callable[[str], Tensor]) -> Directions:
        """Multiply the coordinates in every block's eigenbasis."""
        return b.multiply_in_eigenbasis(self.factors, factor_of)

    def self_influence(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return sum (Q_S^T W Q_A)^2 / (Lambda + damping) of each row W, R = 1: (n,)."""
        total = torch.zeros(len(rows), dtype=torch.float32, device=rows.weights.device)
        for name, r in rows.rows.items():
            rotated = self.factors[name].rotate_rows(r)
            total = total + _sum_weighted_squares(rotated, 1 / self.damped_eigenvalues(name), len(rows))
        return total, torch.ones_like(total, dtype=torch.bool)


def _sum_weighted_squares(rows: Rows, weight: Tensor, n: int) -> Tensor:
    """Sum the squares of each row's coordinates with weights (G, O, I): (n,)."""
    if isinstance(rows, Factored) and rows.sizes[3] == 1:
        # A row of one position is one outer product. Its squares are the outer product of squares: it is never formed.
        a, g = rows.a[:, :, 0].square(), rows.g[:, :, 0, 0].square()  # (G, n, I), (G, n, O)
        return ((g @ weight) * a).sum((0, 2))
    flat = weight.flatten()
    pieces = [rows[i : i + WRITTEN].written().rows.square() @ flat for i in range(0, n, WRITTEN)]
    return torch.cat(pieces).sum(1)


def _require_basis(name: str, basis: Basis, groups: int, size: int) -> None:
    """Raise InputError for what is no basis of so many dimensions, in pieces."""
    for i, q in enumerate(basis.pieces):
        require_tensor(f"{name}|{i}", q, None, None, None)
    shapes = [tuple(q.shape) for q in basis.pieces]
    # A piece without eigenvectors stays as it is.
    fits = all(shape in ((groups, shape[1], shape[1]), (0, shape[1], 0)) for shape in shapes)
    if not fits or sum(shape[1] for shape in shapes) != size:
        raise expected(f"{name} of a fit", f"a basis of {size} dimensions for each of {groups} groups", shapes)


@dataclass(frozen=True)
class EKFAC(Solver):
    """Eigenvalue-corrected KFAC (George et al. 2018; Grosse et al. 2023).

    Args:
        labels: "sampled" from the model (the Fisher, as published) or "true" (the empirical Fisher); None takes what
            belongs to the curvature: "true" for EmpiricalFisher, else "sampled".
        seed: of the label draws.
        limit: widest eigenbasis; wider sides become block-diagonal, very wide ones diagonal.
    """

    labels: Labels | None = None
    seed: int = 0
    limit: int = 4096
    needs: ClassVar[Need] = Need.KRONECKER
    corrected: ClassVar[bool] = True

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Make two passes over the training data; another damping of the same curvature costs none."""
        self.check(curvature)
        factors = curvature.kronecker(self.labels or curvature.labels, self.seed, self.limit)
        return EigenInverse(curvature, Damping.of(damping).resolve(curvature), factors, self.corrected)

    def share(self, inverse: Inverse) -> None:
        """Give the curvature the factors of a restored fit."""
        if isinstance(inverse, EigenInverse):
            curvature = inverse.curvature
            curvature.share_kronecker(inverse.factors, self.labels or curvature.labels, self.seed, self.limit)


@dataclass(frozen=True)
class KFAC(EKFAC):
    """KFAC without eigenvalue correction (Martens & Grosse 2015), with the number of positions T in its eigenvalues."""

    corrected: ClassVar[bool] = False
