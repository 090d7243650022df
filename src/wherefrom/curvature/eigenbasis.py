"""The eigenbasis of a block with Kronecker factors: Q_S on the side of the outputs, Q_A on the side of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.persample.factored import Factored
from wherefrom.persample.rows import Lookup, Rows, Several


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of one side of a block, cut into consecutive pieces.

    Args:
        pieces: (G, w, w) eigenvectors in columns, or (0, w, 0) for a piece that stays as it is.
    """

    pieces: tuple[Tensor, ...]

    def rotate(self, x: Tensor) -> Tensor:
        """Coordinates in the basis: x (G, ..., d) to the same shape."""
        return self._apply(x, transposed=False)

    def back(self, x: Tensor) -> Tensor:
        """From coordinates in the basis: the inverse of `rotate`."""
        return self._apply(x, transposed=True)

    def across(self, v: Tensor, back: bool = False) -> Tensor:
        """`rotate`, or `back`, of the columns of matrices v (Q, G, d, other)."""
        parts = []
        for q, part in zip(self.pieces, v.split([q.shape[1] for q in self.pieces], 2), strict=True):
            parts.append((q if back else q.mT).to(v.dtype) @ part if len(q) else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @property
    def cost(self) -> int:
        """Multiply-adds to rotate a vector of every group."""
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

    def rotate(self, v: Tensor) -> Tensor:
        """Q_S^T V Q_A: (Q, G, O, I) to the same shape."""
        return self.left.across(self.right.rotate(v.transpose(0, 1)).transpose(0, 1))

    def back(self, v: Tensor) -> Tensor:
        """Q_S V Q_A^T: the inverse of `rotate`."""
        return self.left.across(self.right.back(v.transpose(0, 1)).transpose(0, 1), back=True)

    def costs(self, rows: Rows) -> tuple[int, int]:
        """Multiply-adds per example of `rotated` for rows like these, and of `back` for one matrix."""
        _, O, I = self.kfac.shape
        left, right = self.left.cost, self.right.cost
        written = O * right + I * left
        if isinstance(rows, Factored):
            return rows.sizes[3] * (left + right), written
        return rows.ids.shape[1] * right if isinstance(rows, Lookup) and not left else written, written

    def rotated(self, rows: Rows) -> Rows:
        """Rows in the eigenbasis; factored rows stay factored, one rotation per position."""
        if isinstance(rows, Factored):
            return Factored(self.right.rotate(rows.a), self.left.rotate(rows.g))
        if isinstance(rows, Lookup) and not any(len(q) for q in self.left.pieces):
            return Lookup(rows.ids, self.right.rotate(rows.g.unsqueeze(0))[0], rows.size)
        if isinstance(rows, Several):
            return Several(tuple(self.rotated(part) for part in rows.parts))  # type: ignore[arg-type]
        written = rows.written()
        n, R, _ = written.rows.shape
        v = self.rotate(written.rows.reshape(n * R, *written.sides))
        return type(written)(v.reshape(n, R, -1), written.sides)
