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
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.errors import UnsupportedError
from wherefrom.persample import gradients
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.rows import join
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver, positive, saved_tensor


class DualInverse(Inverse):
    """A Cholesky factor of the kept rows' Gram matrix.

    Args:
        curvature, shift: the matrix and its damping.
        kept: (n, R) True for the rows that are kept.
        factor: lower Cholesky factor of N I + B D^-1 B^T, float64.
        dropped: trace of the dropped part of C, in units of the damping.
    """

    def __init__(self, curvature: Curvature, shift: Shift, kept: Tensor, factor: Tensor, dropped: float):
        super().__init__(curvature, shift)
        self.kept, self.factor, self.dropped = kept, factor.contiguous(), dropped  # as a file gives them back

    def apply(self, b: Vectors) -> Vectors:
        """Two contractions with the rows and one triangular solve each way."""
        scaled = {name: t / self.shift[name] for name, t in b.items()}
        packed = gradients.pack(self.curvature.problem.blocks, scaled)
        parts = [(rows.dot(packed=packed).double() * root)[:, kept] for rows, root, kept in self._pieces()]
        y = torch.cholesky_solve(torch.cat(parts, 1).mT, self.factor).mT  # (Q, kept rows)
        x, start = scaled, 0
        for (rows, root, kept), part in zip(self._pieces(), parts, strict=True):
            w = torch.zeros(len(y), *kept.shape, dtype=y.dtype, device=y.device)
            w[:, kept] = y[:, start : start + part.shape[1]]
            start += part.shape[1]
            found = rows.combine(w * root)
            x = {name: t - found[name] / self.shift[name] for name, t in x.items()}
        return x

    def quadratic(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """g D^-1 g - k^T (N I + B D^-1 B^T)^-1 k with k = B D^-1 g, from Gram matrices alone, (n,)."""
        by = block_inverses(self.curvature, self.shift)
        k = torch.cat(
            [(piece.gram(rows, by)[..., 0].double() * root.unsqueeze(-1))[kept] for piece, root, kept in self._pieces()]
        )
        half = torch.linalg.solve_triangular(self.factor, k, upper=False)
        values = rows.square_norms(by)[:, 0].double() - half.square().sum(0)
        return values, torch.ones_like(values, dtype=torch.bool)

    def _pieces(self) -> Iterator[tuple[Gradients, Tensor, Tensor]]:
        """Examples with a kept row: rows b, roots of their weights (b times root is a row of B), and which are kept."""
        start = 0
        for rows in self.curvature.gradients():
            kept = self.kept[start : start + len(rows), : rows.weights.shape[1]]
            start += len(rows)
            some = kept.any(1)
            if not some.all():
                rows, kept = rows[some.nonzero()[:, 0]], kept[some]
            yield rows, rows.weights.clamp(min=0).sqrt(), kept

    def report(self) -> dict[str, float | str]:
        """How many rows were kept of how many, and the trace of the rest in units of the damping."""
        return {"kept rows": int(self.kept.sum()), "rows": self.kept.numel(), "dropped trace": self.dropped}

    def state(self) -> dict[str, Tensor]:
        """Kept rows and the factor."""
        return {"kept": self.kept, "factor": self.factor, "dropped": torch.tensor(self.dropped)}


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
        """One pass for the rows, their Gram matrix and its Cholesky factor."""
        self.check(curvature)
        positive(memory=self.memory)
        shift = Damping.of(damping).resolve(curvature)
        by, N = block_inverses(curvature, shift), len(curvature.problem.train)
        # in units of the damping: the trace of D^-1/2 b b^T D^-1/2 / N
        shares = join([rows.square_norms(by).double() * rows.weights / N for rows in curvature.gradients()], 0)
        if not curvature.psd:  # known once the rows have been seen
            raise UnsupportedError(
                "Dual needs a positive semi-definite curvature; the loss is not convex in the outputs. "
                "Take curvature=EmpiricalFisher, or Exact(form='primal')."
            )
        ordered, order = shares.clamp(min=0).flatten().sort()
        room = int((self.memory / 8) ** 0.5)
        droppable = min(int((ordered.cumsum(0) <= self.drop).sum()), len(ordered) - 1)
        first = max(droppable, len(ordered) - room)
        kept = torch.zeros(shares.numel(), dtype=torch.bool, device=shares.device)
        kept[order[first:]] = True
        kept = kept.view(shares.shape)
        rows = gradients.concatenate(list(_select(curvature, kept)))
        root = rows.weights.clamp(min=0).sqrt().flatten()
        m = (rows.gram(rows, by).view(len(root), -1).double() * root).mul_(root.unsqueeze(1))
        m.diagonal().add_(N)
        factor, info = torch.linalg.cholesky_ex(m)
        if int(info):
            raise UnsupportedError("the Gram matrix is not positive definite in this precision. Raise the damping.")
        return DualInverse(curvature, shift, kept, factor, float(ordered[:first].sum()))

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the saved factor."""
        kept = saved_tensor(state, "kept", len(curvature.problem.train), None, dtype=torch.bool)
        size = int(kept.sum())
        factor, dropped = saved_tensor(state, "factor", size, size), float(saved_tensor(state, "dropped"))
        return DualInverse(curvature, shift, kept, factor, dropped)


def block_inverses(curvature: Curvature, shift: Shift) -> dict[str, float]:
    """1 / damping of each block."""
    return {b.name: 1 / shift[next(iter(b.shapes))] for b in curvature.problem.blocks}


def _select(curvature: Curvature, kept: Tensor) -> Iterator[Gradients]:
    """The kept rows as examples of one row each."""
    start = 0
    for rows in curvature.gradients():
        n = len(rows)
        index, direction = kept[start : start + n, : rows.weights.shape[1]].nonzero(as_tuple=True)
        yield rows.pick(index, direction)
        start += n
