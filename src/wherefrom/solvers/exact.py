"""The dense damped solve: primal (D x D) or dual (rows x rows), whichever is smaller, decomposed in float64.

The primal matrix is decomposed once, C = V diag(sigma) V^T, so that another damping costs nothing; it also serves
indefinite Hessians. The dual is `wherefrom.solvers.gram.Dual` with every row that carries anything; its Gram matrix is
formed in the model's dtype, and the certificate says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.errors import DivergenceError, UnsupportedError, expected
from wherefrom.persample import vectors
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver, saved_tensor
from wherefrom.solvers.gram import Dual


class DenseInverse(Inverse):
    """Eigenvectors and eigenvalues of D^-1/2 C D^-1/2, D the damping over its geometric scale.

    Args:
        curvature, shift: the matrix and its damping.
        values, directions: (D,) and (D, D), float64.
        roots: square roots of each coordinate's damping over ``level``, (D,).
        level: the damping that ``roots`` leaves.
    """

    def __init__(
        self, curvature: Curvature, shift: Shift, values: Tensor, directions: Tensor, roots: Tensor, level: float
    ):
        super().__init__(curvature, shift)
        self.values, self.directions, self.roots, self.level = values, directions, roots, level
        smallest = (values + level).abs().min()
        if float(smallest) <= 1e-12 * float(values.abs().max()):
            raise DivergenceError(
                f"C + damping is singular: its smallest eigenvalue is {float(smallest):.1e} in absolute value. "
                "Raise the damping."
            )

    def apply(self, b: Vectors) -> Vectors:
        """Rotate, divide, rotate back, in float64."""
        flat = vectors.flatten({name: b[name] for name in self.curvature.problem.shapes}).double() / self.roots
        x = (flat @ self.directions / (self.values + self.level)) @ self.directions.T / self.roots
        return vectors.unflatten(x.to(self.curvature.problem.dtype), self.curvature.problem.shapes)

    def function(self, phi: Callable[[Tensor], Tensor], b: Vectors) -> Vectors:
        """phi(C) b in float64.

        Raises:
            UnsupportedError: if the damping differs between parameters, so that what was decomposed is not C.
        """
        if len(set(self.shift.values())) > 1:
            raise UnsupportedError("A function of C needs one damping for all parameters. Give it as a number.")
        shapes = self.curvature.problem.shapes
        flat = vectors.flatten({name: b[name] for name in shapes}).double()
        x = (flat @ self.directions * phi(self.values)) @ self.directions.T
        return vectors.unflatten(x.to(self.curvature.problem.dtype), shapes)

    def state(self) -> dict[str, Tensor]:
        """The decomposition."""
        return {"values": self.values, "directions": self.directions}


@dataclass(frozen=True)
class Exact(Solver):
    """Dense solve of (C + damping) x = b.

    Args:
        form: "primal", "dual", or "auto" for the smaller.
        memory: bytes that the matrices may take; more is refused with the number.
    """

    form: Literal["auto", "primal", "dual"] = "auto"
    memory: float = 12e9
    needs: ClassVar[Need] = Need.MATVEC

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Build and decompose the matrix.

        Raises:
            UnsupportedError: if the matrices would not fit into ``memory``.
        """
        if self._is_primal(curvature):
            return self._primal(curvature, Damping.of(damping).resolve(curvature))
        return self._dual().fit(curvature, damping)

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From the saved decomposition."""
        if "values" in state:
            D = sum(s.numel() for s in curvature.problem.shapes.values())
            values, directions = saved_tensor(state, "values", D), saved_tensor(state, "directions", D, D)
            return self._primal(curvature, shift, (values, directions))
        return self._dual().restore(curvature, shift, state)

    def _dual(self) -> Dual:
        return Dual(drop=1e-14, memory=self.memory)

    def _is_primal(self, curvature: Curvature) -> bool:
        if self.form not in ("auto", "primal", "dual"):
            raise expected("form", "'auto', 'primal' or 'dual'", repr(self.form))
        if self.form == "dual":
            self._dual().check(curvature)
        sizes = dimensions(curvature)
        form = self.form if self.form != "auto" else ("primal" if sizes["dual"] >= sizes["primal"] else "dual")
        needed = 3 * 8 * sizes[form] ** 2  # the matrix, its factor and one copy in between
        if needed > self.memory:
            raise UnsupportedError(
                f"Exact ({form}) needs {needed / 2**30:.1f} GiB for {sizes[form]:,.0f} x {sizes[form]:,.0f} "
                "matrices, allowed are "
                f"{self.memory / 2**30:.1f} GiB. Use CG(preconditioner=Dual()) for the same answer, or raise `memory`."
            )
        return form == "primal"

    def _primal(self, curvature: Curvature, shift: Shift, saved: tuple[Tensor, ...] = ()) -> Inverse:
        level = max(shift.values())
        shapes = curvature.problem.shapes
        roots = torch.cat(
            [torch.full((s.numel(),), (shift[p] / level) ** 0.5, dtype=torch.float64) for p, s in shapes.items()]
        )
        roots = roots.to(curvature.problem.device)
        key = ("dense", tuple(shift[p] / level for p in shapes) if len(set(shift.values())) > 1 else None)
        if not saved:
            matrix = curvature.remember("matrix", lambda: dense(curvature))
            saved = curvature.remember(key, lambda: _eigenpairs(matrix / roots / roots.unsqueeze(1)))
        return DenseInverse(curvature, shift, saved[0], saved[1], roots, level)


def dimensions(curvature: Curvature) -> dict[str, float]:
    """Sides of the two matrices that may be inverted: "primal" D, "dual" the rows of C, infinite if it has none."""
    rows = float("inf")
    if Need.GRADIENTS in curvature.offers:
        rows = next(curvature.gradients()).weights.shape[1] * len(curvature.problem.train)
    return {"primal": sum(s.numel() for s in curvature.problem.shapes.values()), "dual": rows}


def dense(curvature: Curvature) -> Tensor:
    """C written out, parameters in the model's order: (D, D) float64, symmetric."""
    shapes, dtype = curvature.problem.shapes, curvature.problem.dtype
    D = sum(s.numel() for s in shapes.values())
    if Need.GRADIENTS in curvature.offers:
        total = torch.zeros(D, D, dtype=torch.float64, device=curvature.problem.device)
        for rows in curvature.gradients():
            for i in range(0, len(rows), step := max(1, 2**24 // (D * rows.weights.shape[1]))):
                some = rows[i : i + step]
                written = some.dense()
                b = vectors.flatten({name: written[name] for name in shapes}).double()
                total += (b * some.weights.reshape(-1, 1)).T @ b
        return total / len(curvature.problem.train)
    eye = torch.eye(D, dtype=dtype, device=curvature.problem.device)
    columns = [curvature.product(vectors.unflatten(part, shapes)) for part in eye.split(256)]
    matrix = torch.cat([vectors.flatten({name: c[name] for name in shapes}) for c in columns]).double()
    return (matrix + matrix.T) / 2


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, ...]:
    """Eigenvalues and eigenvectors, in memory as a file gives them back: a restored fit rounds alike."""
    return tuple(t.contiguous() for t in torch.linalg.eigh(matrix))
