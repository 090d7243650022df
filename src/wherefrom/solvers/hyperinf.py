"""HyperINF: the inverse of a small matrix for each layer, the generalised Fisher information, by Schulz's iteration.

    G_l = (1/n) sum_i M_i^T M_i   (or M_i M_i^T),      x_l = b_l (G_l + lambda_l)^-1   (or (G_l + lambda_l)^-1 b_l)

where M_i is the gradient of example i as the matrix that the layer's weight is (HyperINF eqs. 4, 5 and algorithm 2).
If the r lines of M that are summed over were independent, alike and of mean zero, G_l / r would be each one's Fisher
matrix. The paper drops the r, so that its damping acts as lambda / r and its solutions are r times smaller;
``drop_r=False`` keeps it. With r = 1, and with ``matrix="fim"``, the Fisher block itself is inverted.

Differs from the paper: scores are positive where the example helped; the shorter side of the matrix is taken unless
told; a bias is one more input of its layer; loose numbers, a 1 x d matrix, take its shorter side too: one number, the
mean of |g|^2, except for ``side="larger"`` and the Fisher matrix. The published curvature is the empirical Fisher and
the published damping ``Damping.relative(0.1)``; rows of other curvatures enter with their weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping
from wherefrom.errors import ConvergenceWarning, DivergenceError, UnsupportedError, expected
from wherefrom.persample.blocks import Block
from wherefrom.persample.directions import Directions
from wherefrom.persample.factored import Factored, slices
from wherefrom.persample.rows import Lookup, Rows
from wherefrom.solvers.base import Inverse, Solver, require_positive, require_tensor
from wherefrom.solvers.datainf import root_weights
from wherefrom.solvers.schulz import Schulz, cholesky, schulz

Side = Literal["input", "output", "all"]


@dataclass(frozen=True, eq=False)
class SideInverse(Inverse):
    """Multiplies each block by an inverse from one of its sides.

    Args:
        sides: block name to the side whose matrix was inverted; "all" for the flattened block.
        inverses: block name to (G, d, d) float64, G = 1 for "all".
        inverse_residual: the largest |I - A X|_F of them.
        inverse_steps: the most iterations that one took.
    """

    sides: Mapping[str, Side]
    inverses: Mapping[str, Tensor]
    inverse_residual: float
    inverse_steps: int

    is_approximate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for block in self.curvature.problem.blocks:
            side = self.sides.get(block.name)
            if side not in ("input", "output", "all"):
                raise expected(f"the side of block {block.name} of a fit", "'input', 'output' or 'all'", repr(side))
            d = width(block, side)
            require_tensor(f"inverse|{block.name}", self.inverses.get(block.name), groups(block, side), d, d)

    def apply(self, b: Directions) -> Directions:
        """Make one matrix product for each block."""
        return b.dense().map(self._multiply)

    def _multiply(self, name: str, v: Tensor) -> Tensor:
        side, inverse = self.sides[name], self.inverses[name].to(v.dtype)
        if side == "output":
            return inverse @ v
        if side == "input":
            return v @ inverse.mT
        return (v.flatten(1) @ inverse[0].mT).view_as(v)

    def report(self) -> dict[str, float | str]:
        """Return the largest |I - A X|_F of the inverses, and the most iterations that one took."""
        return {"inverse residual": self.inverse_residual, "inverse iterations": self.inverse_steps}


@dataclass(frozen=True)
class HyperINF(Solver):
    """The generalised Fisher information of each block, inverted.

    Args:
        matrix: "gfim", or "fim" for the Fisher matrix of each flattened block, feasible for small ones.
        side: which products of M are summed: "input" for M^T M, as wide as the layer's input; "output" for M M^T;
            "auto" the smaller of the two; "larger" the larger, which is the paper's for both factors of LoRA.
        drop_r: leave the length of the other side out, as published; False divides the matrix by it.
        inverse: "schulz" (published), matrix products alone, or "cholesky": the same inverse by fewer operations.
        tolerance: Frobenius norm of I - A X at which Schulz's iteration stops.
        memory: bytes that the matrices may take; more is refused with the number.
    """

    matrix: Literal["gfim", "fim"] = "gfim"
    side: Literal["auto", "larger", "input", "output"] = "auto"
    drop_r: bool = True
    inverse: Literal["schulz", "cholesky"] = "schulz"
    tolerance: float = 1e-10
    memory: float = 2**32
    needs: ClassVar[Need] = Need.GRADIENTS

    def __post_init__(self) -> None:
        for name, allowed in (
            ("matrix", ("gfim", "fim")),
            ("side", ("auto", "larger", "input", "output")),
            ("inverse", ("schulz", "cholesky")),
        ):
            if getattr(self, name) not in allowed:
                raise expected(name, f"one of {', '.join(map(repr, allowed))}", repr(getattr(self, name)))
        require_positive(tolerance=self.tolerance, memory=self.memory)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Make one pass over the rows (none for another damping of the same curvature), and invert.

        Raises:
            UnsupportedError: if the matrices would not fit into ``memory``, or the curvature is not positive
                semi-definite.
            DivergenceError: if a matrix cannot be inverted at this damping.
        """
        self.check(curvature)
        sides = self._choose_sides(curvature)
        self._check_memory(curvature, sides)
        resolved = Damping.of(damping).resolve(curvature)
        key = ("second moments", tuple(sides.items()))
        moments = curvature.cached(key, lambda: second_moments(curvature, sides))

        inverses, residual, steps = {}, 0.0, 0
        for block in curvature.problem.blocks:
            _, O, I = block.sides
            lines = {"input": O, "output": I, "all": 1}[sides[block.name]]  # r of the paper
            damped = moments[block.name] / (1 if self.drop_r else lines)
            damped.diagonal(dim1=-2, dim2=-1).add_(resolved[block.name])
            inverse = self._invert(damped, resolved[block.name], block)
            inverses[block.name] = inverse.x
            residual = max(residual, float(inverse.residuals[-1].max()))
            steps = max(steps, inverse.steps)
        return SideInverse(curvature, resolved, sides, inverses, residual, steps)

    def _invert(self, A: Tensor, lower: float, block: Block) -> Schulz:
        try:
            result = cholesky(A) if self.inverse == "cholesky" else schulz(A, lower, self.tolerance)
        except DivergenceError as error:
            raise DivergenceError(f"block {block.name}, damping {lower:.1e}: {error}") from None
        residual = float(result.residuals[-1].max())
        if residual > max(self.tolerance, 1e-6):
            warnings.warn(
                f"the inverse for block {block.name} has |I - A X| = {residual:.1e}: its condition number is too much "
                f"for float64 at damping {lower:.1e}. Raise the damping.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return result

    def _choose_sides(self, curvature: Curvature) -> dict[str, Side]:
        """Choose the side of each block."""
        out: dict[str, Side] = {}
        for block in curvature.problem.blocks:
            _, O, I = block.sides
            smaller, larger = ("input", "output") if I <= O else ("output", "input")
            if self.matrix == "fim":
                out[block.name] = "all"
            elif self.side == "larger":
                out[block.name] = larger
            elif self.side == "auto" or block.matrix is None:
                out[block.name] = smaller
            else:
                out[block.name] = self.side
        return out

    def _check_memory(self, curvature: Curvature, sides: dict[str, Side]) -> None:
        sizes = {
            b.name: 8.0 * width(b, sides[b.name]) ** 2 * groups(b, sides[b.name]) for b in curvature.problem.blocks
        }
        worst = max(sizes, key=lambda name: sizes[name])
        needed = 2 * sum(sizes.values()) + 6 * sizes[worst]  # matrices and inverses, and what one inversion works with
        if needed > self.memory:
            raise UnsupportedError(
                f"HyperINF (matrix={self.matrix!r}, side={self.side!r}) needs {needed:,.0f} bytes, of which block "
                f"{worst} takes {8 * sizes[worst]:,.0f}; allowed are {self.memory:,.0f}. Take matrix='gfim' with "
                "side='auto', leave that block out with parameters=..., or raise `memory`."
            )


def width(block: Block, side: Side) -> int:
    """Rows of the matrix of a block's side."""
    _, O, I = block.sides
    return {"input": I, "output": O, "all": block.size}[side]


def groups(block: Block, side: Side) -> int:
    """How many matrices a block has."""
    return 1 if side == "all" else block.sides[0]


def second_moments(curvature: Curvature, sides: dict[str, Side]) -> dict[str, Tensor]:
    """(1/N) sum of w M^T M, w M M^T, or w m m^T with m = vec M, over all weighted rows: (G, d, d) float64 each."""
    problem, total = curvature.problem, {}
    for b in problem.blocks:
        d = width(b, sides[b.name])
        total[b.name] = torch.zeros(groups(b, sides[b.name]), d, d, dtype=torch.float64, device=problem.device)
    for piece in curvature.gradients():
        roots = root_weights(piece, curvature).to(problem.dtype)  # (n, R)
        for b in problem.blocks:
            rows, side = piece.rows[b.name], sides[b.name]
            n, R = roots.shape
            ghost = _ghost(rows, R, b, side)
            for s in slices(n, rows.numbers() // n if ghost else R * b.size):
                left, right = _factors(rows[s], roots[s], b, side, ghost)  # (G, lines, d) each
                total[b.name] += (left.mT @ right).double()
    return {name: t.div_(len(problem.train)) for name, t in total.items()}


def _factors(rows: Rows, roots: Tensor, block: Block, side: Side, ghost: bool) -> tuple[Tensor, Tensor]:
    """Two factors (G, lines, d) of a sum over rows of w M^T M, w M M^T or w m m^T; roots of the weights are (n, R).

    With M = sum_t g_t a_t^T, the product M^T M = sum_ts a_t (g_t . g_s) a_s^T needs no M, which pays where there are
    fewer positions than outputs; so do M M^T and tables, where a_t . a_s is 1 for two uses of a token.
    """
    n, R = roots.shape
    if ghost and isinstance(rows, (Factored, Lookup)):
        if isinstance(rows, Lookup):
            left = (rows.g * roots.view(n, R, 1, 1)).unsqueeze(0)  # (1, n, R, T, d)
            between = (rows.ids.unsqueeze(1) == rows.ids.unsqueeze(2)).to(left).unsqueeze(1)  # (n, 1, T, T)
        else:
            g = rows.g * roots.view(1, n, R, 1, 1)
            if side == "input":
                flat = g.transpose(2, 3).flatten(3)  # (G, n, T, R O)
                left, between = rows.a, flat @ flat.mT
            else:
                left, between = g, (rows.a @ rows.a.mT).unsqueeze(2)
        right = between * left if left.shape[-2] == 1 else between @ left
        return left.flatten(1, -2), right.flatten(1, -2)
    m = (rows.written().rows * roots.unsqueeze(2)).reshape(n * R, *block.sides)  # rows may be views of any order
    if side == "all":
        m = m.flatten(1).unsqueeze(0)  # (1, n R, G O I)
    else:
        m = (m.transpose(0, 1) if side == "input" else m.permute(1, 0, 3, 2)).flatten(1, 2)  # (G, n R O, I)
    return m, m


def _ghost(rows: Rows, R: int, block: Block, side: Side) -> bool:
    """Whether the sum is cheaper without writing the rows out."""
    _, O, I = block.sides
    if isinstance(rows, Factored):
        return side != "all" and rows.a.shape[2] <= (R * O if side == "input" else I)
    return isinstance(rows, Lookup) and side == "input"
