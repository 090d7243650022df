"""The pruned dual: (C + damping)^-1 through the Gram matrix of the rows that matter.

With scaled rows B (one per example and output direction), C = B^T B / N and D = diag(damping),

    (C + D)^-1 v = D^-1 ( v - B^T (N I + B D^-1 B^T)^-1 B D^-1 v )                                      (Woodbury)

Most rows of a trained classifier carry nothing: the output Hessian of a confident example is nearly 0. Rows are
dropped from the smallest up while their share of the trace stays below ``drop`` times the damping, so that with the
dropped part E of C

    0 <= E <= drop x damping,   and CG preconditioned with it has a condition number of at most 1 + drop.

The Gram matrix is a sum over layers of (a a'^T) * (g g'^T): no gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import ByBlock, Damping
from wherefrom.errors import UnsupportedError
from wherefrom.persample import gradients
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.rows import join
from wherefrom.solvers.base import Inverse, Solver, require_positive, require_tensor


@dataclass(frozen=True, eq=False)
class DualInverse(Inverse):
    """A Cholesky factor of the kept rows' Gram matrix.

    Args:
        kept: (N, R) True for the rows that are kept.
        factor: lower Cholesky factor of N I + B D^-1 B^T, float64.
        dropped: trace of the dropped part of C, in units of the damping.
    """

    kept: Tensor
    factor: Tensor
    dropped: float

    is_positive_definite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_tensor("kept", self.kept, len(self.curvature.problem.train), None, dtype=torch.bool)
        size = int(self.kept.sum())
        require_tensor("factor", self.factor, size, size)

    def apply(self, b: Directions) -> Directions:
        """Contract twice with the rows, with one triangular solve each way in between."""
        inverse_damping = invert(self.damping)
        scaled = b.dense().scale(inverse_damping)  # D^-1 b

        parts = []
        for rows, roots, kept in self._kept_rows():
            parts.append((rows.dot(scaled).double() * roots)[:, kept])  # B D^-1 b, (Q, kept here)
        y = torch.cholesky_solve(torch.cat(parts, 1).mT, self.factor).mT  # (Q, kept)

        x, start = scaled.clone(), 0
        for (rows, roots, kept), part in zip(self._kept_rows(), parts, strict=True):
            weights = y.new_zeros(len(y), *kept.shape)  # (Q, n, R)
            weights[:, kept] = y[:, start : start + part.shape[1]]
            start += part.shape[1]
            x.add_(-1.0, rows.combine(weights * roots).scale(inverse_damping))
        return x

    def self_influence(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return g D^-1 g - k^T (N I + B D^-1 B^T)^-1 k with k = B D^-1 g, from Gram matrices alone: (n,)."""
        inverse_damping = invert(self.damping)
        parts = []
        for piece, roots, kept in self._kept_rows():
            gram = piece.gram(rows, inverse_damping)[..., 0].double()  # (m, R, n)
            parts.append((gram * roots.unsqueeze(-1))[kept])
        half = torch.linalg.solve_triangular(self.factor, torch.cat(parts), upper=False)
        values = rows.square_norms(inverse_damping)[:, 0].double() - half.square().sum(0)
        return values, torch.ones_like(values, dtype=torch.bool)

    def _kept_rows(self) -> Iterator[tuple[Gradients, Tensor, Tensor]]:
        """Yield the examples with a kept row.

        Yields:
            rows b; the roots of their weights (n, R), as b times its root is a row of B; and which rows are kept.
        """
        start = 0
        for rows in self.curvature.gradients():
            kept = self.kept[start : start + len(rows), : rows.weights.shape[1]]
            start += len(rows)
            some = kept.any(1)
            if not some.all():
                rows, kept = rows[some.nonzero()[:, 0]], kept[some]
            yield rows, rows.weights.clamp(min=0).sqrt(), kept

    def report(self) -> dict[str, float | str]:
        """Return how many rows were kept of how many, and the trace of the rest in units of the damping."""
        return {"kept rows": int(self.kept.sum()), "rows": self.kept.numel(), "dropped trace": self.dropped}


@dataclass(frozen=True)
class Dual(Solver):
    """The pruned dual solve, alone or as a preconditioner.

    Args:
        drop: bound on the trace of what is dropped, in units of the damping; 0 keeps every row (then it is exact).
        memory: bytes for the Gram matrix; the largest rows that fit are kept.
    """

    drop: float = 10.0
    memory: float = 2**29
    needs: ClassVar[Need] = Need.GRADIENTS

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Make one pass for the rows, their Gram matrix and its Cholesky factor."""
        self.check(curvature)
        require_positive(memory=self.memory)
        resolved = Damping.of(damping).resolve(curvature)
        inverse_damping, N = invert(resolved), len(curvature.problem.train)

        # Each row's share of the trace in units of the damping, that of D^-1/2 b b^T D^-1/2 / N.
        pieces = [rows.square_norms(inverse_damping).double() * rows.weights / N for rows in curvature.gradients()]
        shares = join(pieces, 0)  # (N, R)
        if not curvature.psd:  # known once the rows have been seen
            raise UnsupportedError(
                "Dual needs a positive semi-definite curvature; the loss is not convex in the outputs. "
                "Take curvature=EmpiricalFisher, or Exact(form='primal')."
            )

        kept, dropped = self._choose_rows(shares)
        rows = gradients.concatenate(list(_pick_rows(curvature, kept)))
        roots = rows.weights.clamp(min=0).sqrt().flatten()
        gram = (rows.gram(rows, inverse_damping).view(len(roots), -1).double() * roots).mul_(roots.unsqueeze(1))
        gram.diagonal().add_(N)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info):
            raise UnsupportedError("the Gram matrix is not positive definite in this precision. Raise the damping.")
        # In memory as a file gives it back: a restored fit rounds alike.
        return DualInverse(curvature, resolved, kept, factor.contiguous(), dropped)

    def _choose_rows(self, shares: Tensor) -> tuple[Tensor, float]:
        """Choose the rows to keep by their shares of the trace (N, R): which, and the share of the others."""
        ordered, order = shares.clamp(min=0).flatten().sort()
        droppable = min(int((ordered.cumsum(0) <= self.drop).sum()), len(ordered) - 1)
        room = int((self.memory / 8) ** 0.5)
        first = max(droppable, len(ordered) - room)
        kept = torch.zeros(shares.numel(), dtype=torch.bool, device=shares.device)
        kept[order[first:]] = True
        return kept.view(shares.shape), float(ordered[:first].sum())


def invert(damping: ByBlock) -> ByBlock:
    """Return 1 / damping of each block."""
    return {name: 1 / value for name, value in damping.items()}


def _pick_rows(curvature: Curvature, kept: Tensor) -> Iterator[Gradients]:
    """Yield the kept rows as examples of one row each."""
    start = 0
    for rows in curvature.gradients():
        n = len(rows)
        index, direction = kept[start : start + n, : rows.weights.shape[1]].nonzero(as_tuple=True)
        yield rows.pick(index, direction)
        start += n
