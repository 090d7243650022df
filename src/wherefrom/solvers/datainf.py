"""DataInf: the mean of inverses in place of the inverse of the mean, in closed form (Kwon et al. 2024; HyperINF eq. 2).

    x_l = 1 / (n lambda_l) sum_i [ b_l - <b_l, g_il> / (lambda_l + |g_il|^2) g_il ]             block by block l

is 1/n sum_i (g_il g_il^T + lambda_l)^-1 b_l by Sherman and Morrison, on the empirical Fisher. As the inverse is convex,
this is never below (C_l + lambda_l)^-1: self-influence comes out too large, and is exact for n = 1. The published
damping, 0.1 / (n d_l) sum_i |g_il|^2 with d_l the number of parameters of block l, is ``Damping.relative(0.1)``.
Differs from the paper: a curvature of several rows an example, such as the GGN, takes the inverse of each example's
own matrix, which is a solve as small as its rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping
from wherefrom.errors import UnsupportedError
from wherefrom.persample.directions import Directions
from wherefrom.persample.factored import Factored
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.rows import Rows
from wherefrom.solvers.base import Inverse, Solver


@dataclass(frozen=True, eq=False)
class MeanInverse(Inverse):
    """The mean over examples of (B_n^T B_n + lambda)^-1, where B_n are the weighted rows of an example in a block."""

    is_approximate: ClassVar[bool] = True

    def apply(self, b: Directions) -> Directions:
        """Make one pass over the rows: (b - mean_n B_n^T (lambda + B_n B_n^T)^-1 B_n b) / lambda."""
        N = len(self.curvature.problem.train)
        x = b.dense().clone()
        directions, solutions = b.dense().tensors(), x.tensors()  # (Q, G, O, I) each
        for piece in self.curvature.gradients():
            roots = root_weights(piece, self.curvature)  # (n, R)
            for block in piece.blocks:
                rows = piece.rows[block.name]
                along = rows.dot(directions[block.name]).double() * roots  # B_n b, (Q, n, R)
                small = solve_each(rows, roots, self.damping[block.name], along)
                solutions[block.name] -= rows.combine(small * roots / N)
        return x.scale({name: 1 / damping for name, damping in self.damping.items()})


def solve_each(rows: Rows, roots: Tensor, damping: float, t: Tensor) -> Tensor:
    """Return (damping + B_n B_n^T)^-1 t_n for every example: rows, roots of their weights (n, R), t (Q, n, R)."""
    n, R = roots.shape
    if R == 1:
        return t / (damping + rows.square_norms().double() * roots.square())
    if isinstance(rows, Factored) and rows.sizes[3] == 1:  # each row is one outer product
        g = rows.g[:, :, :, 0]  # (G, n, R, O)
        gram = (g @ g.mT * rows.a.square().sum((2, 3))[..., None, None]).sum(0)
    else:
        gram = torch.cat([rows[i : i + 1].gram(rows[i : i + 1])[:, :, 0] for i in range(n)])
    gram = gram.double() * roots.unsqueeze(1) * roots.unsqueeze(2)
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    return torch.linalg.solve(gram, t.permute(1, 2, 0)).permute(2, 0, 1)


def root_weights(rows: Gradients, curvature: Curvature) -> Tensor:
    """Return the square roots of the weights of rows of a curvature, (n, R).

    Raises:
        UnsupportedError: if one is negative beyond rounding, which the curvature found when it made them.
    """
    if not curvature.psd:
        raise UnsupportedError(
            f"rows of the curvature must have weights of at least 0, got {float(rows.weights.min()):.1e}: the loss is "
            "not convex in the outputs. Take curvature=EmpiricalFisher, or Exact(form='primal')."
        )
    return rows.weights.clamp(min=0).sqrt()


@dataclass(frozen=True)
class DataInf(Solver):
    """The closed form of Kwon et al. (2024); ``curvature=EmpiricalFisher`` is the published one.

    Scores are positive where the example helped; the paper's have the other sign. With ``Damping.relative(0.1)``, the
    published damping, scores do not change if all losses are multiplied by a number.
    """

    needs: ClassVar[Need] = Need.GRADIENTS

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Resolve the damping; each solve is one pass over the rows."""
        self.check(curvature)
        return MeanInverse(curvature, Damping.of(damping).resolve(curvature))
