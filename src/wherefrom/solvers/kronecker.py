"""KFAC and EKFAC: a diagonal in a Kronecker-factored eigenbasis, block by block.

    x = Q_S [ (Q_S^T V Q_A) / (Lambda + damping) ] Q_A^T                       (Grosse et al. 2023; ASTRA appendix B)

Lambda are KFAC's products of eigenvalues or EKFAC's corrected second moments; see `wherefrom.curvature.kronecker`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.curvature.kronecker import Basis, KroneckerBlock, Labels, fit
from wherefrom.errors import expected
from wherefrom.persample import lowrank
from wherefrom.persample.factored import Factored
from wherefrom.persample.gradients import Gradients, Packed
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Pairing, Solver, saved_tensor


class EigenInverse(Inverse):
    """Divides by eigenvalues + damping in the eigenbasis of each block."""

    approximate = True

    def __init__(self, curvature: Curvature, shift: Shift, factors: Mapping[str, KroneckerBlock], corrected: bool):
        super().__init__(curvature, shift)
        self.factors, self.corrected = factors, corrected

    def eigenvalues(self, name: str) -> Tensor:
        """Eigenvalues of a block, (G, O, I)."""
        return self.factors[name].ekfac if self.corrected else self.factors[name].kfac

    def denominators(self, name: str) -> Tensor:
        """Eigenvalues + damping of a block, (G, O, I)."""
        block = next(b for b in self.curvature.problem.blocks if b.name == name)
        return self.eigenvalues(name) + self.shift[next(iter(block.shapes))]

    def apply(self, b: Vectors) -> Vectors:
        """Rotate, divide, rotate back."""
        return self._scaled(b, lambda name: 1 / self.denominators(name))

    def function(self, phi: Callable[[Tensor], Tensor], b: Vectors) -> Vectors:
        """phi(C) b, phi of the eigenvalues alone."""
        return self._scaled(b, lambda name: phi(self.eigenvalues(name)))

    def _scaled(self, b: Vectors, by: Callable[[str], Tensor]) -> Vectors:
        x: Vectors = {}
        for block in self.curvature.problem.blocks:
            f = self.factors[block.name]
            x |= block.unpack(f.back(f.rotate(block.pack(b)) * by(block.name)))
        return x

    def turned(self, rows: Gradients) -> Gradients:
        """Rows in the eigenbases, still factored."""
        return rows.map(lambda name, r: self.factors[name].rotated(r))

    def within(self, rows: Gradients) -> Pairing:
        """Scores in the eigenbases."""
        packed: Packed = {}
        for block in rows.blocks:
            turned = self.factors[block.name].rotated(rows.rows[block.name]).written().rows
            packed[block.name] = turned.reshape(-1, *block.sides).div_(self.denominators(block.name))
        return Pairing(packed, self.factors)

    def pairing(self, rows: Gradients) -> Pairing:
        """Scores in the eigenbases, except of blocks where rotating Q solutions back costs less than N gradients."""
        packed = dict(self.within(rows).packed)
        bases: dict[str, KroneckerBlock] = {}
        for name, r in rows.rows.items():
            f = self.factors[name]
            turn, back = f.costs(r)
            if turn * len(self.curvature.problem.train) <= back * len(rows):
                bases[name] = f
            else:
                packed[name] = f.back(lowrank.written(packed[name]))
        return Pairing(packed, bases)

    def quadratic(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Self-influence of rows with R = 1 as sum (Q_S^T W Q_A)^2 / (Lambda + damping), (n,)."""
        total = torch.zeros(len(rows), dtype=torch.float32, device=rows.weights.device)
        for name, r in self.turned(rows).rows.items():
            weight = 1 / self.denominators(name)
            if isinstance(r, Factored) and r.sizes[3] == 1:  # a row is one outer product, never formed
                a, g = r.a[:, :, 0].square(), r.g[:, :, 0, 0].square()  # (G, n, I), (G, n, O)
                total = total + ((g @ weight) * a).sum((0, 2))
            else:
                flat = weight.flatten()
                parts = [r[i : i + 64].written().rows.square() @ flat for i in range(0, len(rows), 64)]
                total = total + torch.cat(parts).sum(1)
        return total, torch.ones_like(total, dtype=torch.bool)

    def state(self) -> dict[str, Tensor]:
        """Bases and both sets of eigenvalues."""
        out: dict[str, Tensor] = {}
        for name, f in self.factors.items():
            out |= {f"{name}|kfac": f.kfac, f"{name}|ekfac": f.ekfac}
            for side, basis in (("left", f.left), ("right", f.right)):
                out |= {f"{name}|{side}|{i}": q for i, q in enumerate(basis.pieces)}
        return out


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
        """Two passes over the training data (the factors of a curvature are kept: another damping costs nothing)."""
        self.check(curvature)
        labels = self.labels or curvature.labels
        kept = self._kept(curvature)
        factors = curvature.remember(kept, lambda: fit(curvature.statistics, labels, self.seed, self.limit))
        return EigenInverse(curvature, Damping.of(damping).resolve(curvature), factors, self.corrected)

    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """From saved bases and eigenvalues, which another damping takes as they are."""

        def basis(name: str, side: str, groups: int, size: int) -> Basis:
            count = sum(key.startswith(f"{name}|{side}|") for key in state)
            pieces = tuple(saved_tensor(state, f"{name}|{side}|{i}", None, None, None) for i in range(count))
            shapes = [(groups, q.shape[1], q.shape[1]) if len(q) else (0, q.shape[1], 0) for q in pieces]
            if [tuple(q.shape) for q in pieces] != shapes or sum(q.shape[1] for q in pieces) != size:
                wanted = f"a basis of {size} dimensions for each of {groups} groups"
                raise expected(f"{name}|{side} of a saved fit", wanted, [tuple(q.shape) for q in pieces])
            return Basis(pieces)

        factors: dict[str, KroneckerBlock] = {}
        for b in curvature.problem.blocks:
            G, O, I = b.sides
            eigenvalues = [saved_tensor(state, f"{b.name}|{kind}", G, O, I) for kind in ("kfac", "ekfac")]
            factors[b.name] = KroneckerBlock(basis(b.name, "left", G, O), basis(b.name, "right", G, I), *eigenvalues)
        curvature.remember(self._kept(curvature), lambda: factors)
        return EigenInverse(curvature, shift, factors, self.corrected)

    def _kept(self, curvature: Curvature) -> Hashable:
        """What the curvature remembers the factors by."""
        return "kronecker", self.labels or curvature.labels, self.seed, self.limit


@dataclass(frozen=True)
class KFAC(EKFAC):
    """KFAC without eigenvalue correction (Martens & Grosse 2015), with the number of positions T in its eigenvalues."""

    corrected: ClassVar[bool] = False
