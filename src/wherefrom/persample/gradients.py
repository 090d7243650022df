"""Per-example gradients of all selected parameters, kept factored, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.persample import rows as forms
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.rows import Rows
from wherefrom.persample.vectors import Vectors, count


@dataclass(frozen=True)
class Block:
    """Parameters that share one matrix: a layer's weight with its bias as a last column, or loose numbers.

    Args:
        name: the layer's or parameter's name.
        shapes: parameter name to shape.
        matrix: (G, O) if the block is G matrices of O rows; None for loose numbers, one column of them.
        transposed: whether the parameters are kept as (..., I, O).
    """

    name: str
    shapes: Mapping[str, torch.Size]
    matrix: tuple[int, int] | None
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(s) for s in self.shapes.values())

    @property
    def sides(self) -> tuple[int, int, int]:
        """(G, O, I)."""
        G, O = self.matrix or (1, self.size)
        return G, O, self.size // (G * O)

    @property
    def widths(self) -> list[int]:
        """Columns of each parameter in the matrix; of loose numbers, rows."""
        G, O = self.matrix or (1, 1)
        return [math.prod(s) // (G * O) for s in self.shapes.values()]

    def pieces(self, v: Vectors) -> list[Tensor]:
        """The block of Q parameter-shaped vectors, a matrix for each parameter, side by side those of `pack`: views."""
        if self.matrix is None:
            return [v[p].reshape(len(v[p]), 1, -1, 1) for p in self.shapes]
        G, O = self.matrix
        if self.transposed:
            return [v[p].reshape(len(v[p]), G, -1, O).mT for p in self.shapes]
        return [v[p].reshape(len(v[p]), G, O, -1) for p in self.shapes]

    def pack(self, v: Vectors) -> Tensor:
        """The block of Q parameter-shaped vectors as matrices: (Q, G, O, I)."""
        parts = self.pieces(v)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 3 if self.matrix else 2)

    def unpack(self, m: Tensor) -> Vectors:
        """The inverse of `pack`."""
        return self.shaped(m.split(self.widths, 3 if self.matrix else 2))

    def shaped(self, pieces: Sequence[Tensor]) -> Vectors:
        """The inverse of `pieces`."""
        turned = [t.mT for t in pieces] if self.transposed else pieces
        return {p: t.reshape(len(t), *s) for (p, s), t in zip(self.shapes.items(), turned, strict=True)}


Packed = dict[str, Tensor]  # block name -> (Q, G, O, I)


def pack(blocks: Sequence[Block], v: Vectors) -> Packed:
    """All blocks of Q vectors as matrices."""
    return {b.name: b.pack(v) for b in blocks}


@dataclass(frozen=True)
class Gradients:
    """Rows J_n^T s_{n,r} of n examples, R a piece, over all blocks.

    Args:
        blocks: the layout.
        rows: block name to factored rows.
        weights: (n, R) float64, the weight of each row in a curvature; 1 for plain gradients.
    """

    blocks: tuple[Block, ...]
    rows: Mapping[str, Rows]
    weights: Tensor

    def __getitem__(self, index: slice | Tensor) -> Gradients:
        """The gradients of some examples."""
        return Gradients(self.blocks, {k: r[index] for k, r in self.rows.items()}, self.weights[index])

    def __len__(self) -> int:
        """Number of examples n."""
        return len(self.weights)

    def pick(self, index: Tensor, r: Tensor) -> Gradients:
        """Chosen rows (index, r) as examples of one row each."""
        rows = {k: found.pick(index, r) for k, found in self.rows.items()}
        return Gradients(self.blocks, rows, self.weights[index, r].unsqueeze(1))

    def map(self, f: Callable[[str, Rows], Rows]) -> Gradients:
        """The same examples with each block's rows, given with its name, replaced."""
        return Gradients(self.blocks, {k: f(k, r) for k, r in self.rows.items()}, self.weights)

    def compact(self) -> Gradients:
        """The same rows, each block in the form that takes less memory."""
        return self.map(lambda _, r: r.compact())

    def numbers(self) -> int:
        """How many numbers are stored."""
        return sum(r.numbers() for r in self.rows.values())

    def dot(self, v: Vectors | None = None, *, packed: Packed | None = None) -> Tensor:
        """Inner products of Q vectors with every row: (Q, n, R). Give matrices if they are `pack`-ed already."""
        out = None
        for b in self.blocks:
            rows = self.rows[b.name]
            if v is None:
                part = rows.dot((packed or {})[b.name])
            elif isinstance(rows, Factored) and b.matrix:  # as they are: nothing is copied
                part = rows.dot(b.pieces(v))
            else:
                part = rows.dot(b.pack(v))
            out = part if out is None else out.add_(part)
        if out is None:
            raise KeyError("no block")
        return out

    def combine(self, w: Tensor) -> Vectors:
        """Weighted sums of rows: w (Q, n, R) to Vectors (Q, ...)."""
        out: Vectors = {}
        for b in self.blocks:
            rows = self.rows[b.name]
            if isinstance(rows, Factored) and b.matrix:
                out |= b.shaped(rows.columns(w, b.widths))
            else:
                out |= b.unpack(rows.combine(w))
        return out

    def product(self, v: Vectors, n: int) -> Vectors:
        """These rows' part in the product with a curvature of n examples: sum_{n,r} (w / n) (b . v) b."""
        rows = self.map(lambda _, r: r.ready(count(v)) if isinstance(r, Factored) else r)
        t = rows.dot(v)
        return rows.combine(t.mul_((self.weights / n).to(t)))

    def dense(self) -> Vectors:
        """Every row written out, example by example: Vectors of n R."""
        out: Vectors = {}
        for b in self.blocks:
            out |= b.unpack(self.rows[b.name].written().rows.reshape(-1, *b.sides))
        return out

    def mean(self) -> Gradients:
        """The mean of n examples' rows, R = 1, as one example."""
        total = self.combine(self.weights.new_full((1, len(self), 1), 1 / len(self)))
        rows = {b.name: Written(b.pack(total).reshape(1, 1, -1), b.sides) for b in self.blocks}
        return Gradients(self.blocks, rows, self.weights[:1])

    def square_norms(self, by: Mapping[str, float] | None = None) -> Tensor:
        """Squared norms of the rows (n, R); ``by`` scales each block."""
        return torch.stack([r.square_norms() * (by[k] if by else 1.0) for k, r in self.rows.items()]).sum(0)

    def gram(self, other: Gradients, by: Mapping[str, float] | None = None) -> Tensor:
        """Inner products of all rows with all rows of another (n, R, n', R'); ``by`` scales each block."""
        out = None
        for name, rows in self.rows.items():
            part = rows.gram(other.rows[name])
            part = part.mul_(by[name]) if by else part
            out = part if out is None else out.add_(part)
        if out is None:
            raise KeyError("no block")
        return out


def concatenate(batches: Sequence[Gradients]) -> Gradients:
    """The gradients of several batches, one after another."""
    first = batches[0]
    if len(batches) == 1:
        return first
    rows = {name: forms.concatenate([b.rows[name] for b in batches]) for name in first.rows}
    return Gradients(first.blocks, rows, forms.join([b.weights for b in batches], 0))
