"""The eigenbasis of a block with Kronecker factors: Q_S on the side of the outputs, Q_A on the side of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.rows import Lookup, Rows, Several


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of one side of a block, cut into consecutive pieces.

    Args:
        pieces: (G, w, w) eigenvectors in columns, or (0, w, 0) for a piece that stays as it is.
    """

    pieces: tuple[Tensor, ...]

    def to_basis(self, x: Tensor) -> Tensor:
        """Give vectors by their coordinates in the basis: x (G, ..., d) to the same shape."""
        return self._apply(x, transposed=False)

    def from_basis(self, x: Tensor) -> Tensor:
        """Give vectors from their coordinates: the inverse of `to_basis`."""
        return self._apply(x, transposed=True)

    def rotate_columns(self, v: Tensor, back: bool = False) -> Tensor:
        """Apply `to_basis`, or `from_basis`, to the columns of matrices v (Q, G, d, other)."""
        parts = []
        for q, part in zip(self.pieces, v.split([q.shape[1] for q in self.pieces], 2), strict=True):
            rotation = q if back else q.mT
            # A piece without eigenvectors is its own eigenbasis and stays as it is.
            parts.append(rotation.to(v.dtype) @ part if len(q) else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @property
    def cost(self) -> int:
        """Count the multiply-adds to rotate a vector of every group."""
        return sum(q.numel() for q in self.pieces)

    def _apply(self, x: Tensor, transposed: bool) -> Tensor:
        parts = []
        for q, part in zip(self.pieces, x.split([q.shape[1] for q in self.pieces], -1), strict=True):
            if len(q):
                q = (q.mT if transposed else q).to(x.dtype)
                part = (part.reshape(len(q), -1, q.shape[1]) @ q).view(part.shape)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@dataclass(frozen=True)
class KroneckerBlock:
    """Eigenvectors and eigenvalues of one block.

    Args:
        left, right: bases of the O side and of the I side.
        kfac: eigenvalues T d_S d_A^T, (G, O, I).
        ekfac: corrected eigenvalues, (G, O, I).
    """

    left: Basis
    right: Basis
    kfac: Tensor
    ekfac: Tensor

    def roots(self) -> tuple[Tensor, Tensor]:
        """Two sides (G, O, 1) and (G, 1, I) with squares whose product is KFAC's eigenvalues, none of them 0.

        Each is raised by a hundredth of its mean, so that what few gradients have is not taken for nothing.
        """
        kfac = self.kfac.double()
        total = kfac.sum((1, 2), keepdim=True)
        left, right = kfac.sum(2, keepdim=True), kfac.sum(1, keepdim=True) / total.where(total > 0, 1.0)
        raised = (t + 0.01 * t.mean((1, 2), keepdim=True) for t in (left, right))
        left, right = (t.where(total > 0, 1.0).sqrt() for t in raised)
        return left, right

    def to_eigenbasis(self, v: Tensor) -> Tensor:
        """Rotate matrices into the basis, Q_S^T V Q_A: (Q, G, O, I) to the same shape."""
        return self.left.rotate_columns(self.right.to_basis(v.transpose(0, 1)).transpose(0, 1))

    def from_eigenbasis(self, v: Tensor) -> Tensor:
        """Rotate matrices back, Q_S V Q_A^T: the inverse of `to_eigenbasis`."""
        return self.left.rotate_columns(self.right.from_basis(v.transpose(0, 1)).transpose(0, 1), back=True)

    def rotation_costs(self, rows: Rows) -> tuple[int, int]:
        """Count the multiply-adds of `rotate_rows` for an example like these, and of `from_eigenbasis` for a matrix."""
        _, O, I = self.kfac.shape
        left, right = self.left.cost, self.right.cost
        written = O * right + I * left
        if isinstance(rows, Factored):
            return rows.sizes[3] * (left + right), written
        if isinstance(rows, Lookup) and not left:
            return rows.ids.shape[1] * right, written
        return written, written

    def rotate_rows(self, rows: Rows) -> Rows:
        """Rotate per-sample gradients into the basis; factored rows stay factored, one rotation for each position."""
        if isinstance(rows, Factored):
            return Factored(self.right.to_basis(rows.a), self.left.to_basis(rows.g))
        if isinstance(rows, Lookup) and not any(len(q) for q in self.left.pieces):
            # The side of the tokens is an eigenbasis already, so that the table stays a table.
            return Lookup(rows.ids, self.right.to_basis(rows.g.unsqueeze(0))[0], rows.size)
        if isinstance(rows, Several):
            return Several(tuple(self.rotate_rows(part) for part in rows.parts))  # type: ignore[arg-type]
        written = rows.written()
        n, R, _ = written.rows.shape
        v = self.to_eigenbasis(written.rows.reshape(n * R, *written.sides))
        return Written(v.reshape(n, R, -1), written.sides)
