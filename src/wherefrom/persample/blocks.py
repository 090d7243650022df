"""Blocks: the parameters of a layer as one matrix, which everything in this library is cut by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ByParameter = dict[str, Tensor]  # parameter name -> (Q, *shape of the parameter)


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
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def sides(self) -> tuple[int, int, int]:
        """(G, O, I)."""
        G, O = self.matrix or (1, self.size)
        return G, O, self.size // (G * O)

    def pack(self, v: Mapping[str, Tensor]) -> Tensor:
        """Put Q parameter-shaped tensors into matrices, (Q, G, O, I)."""
        if self.matrix is None:  # loose numbers, one below the other
            columns = [v[name].reshape(len(v[name]), 1, -1, 1) for name in self.shapes]
            return columns[0] if len(columns) == 1 else torch.cat(columns, 2)

        G, O = self.matrix
        if self.transposed:
            pieces = [v[name].reshape(len(v[name]), G, -1, O).mT for name in self.shapes]
        else:
            pieces = [v[name].reshape(len(v[name]), G, O, -1) for name in self.shapes]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 3)

    def unpack(self, matrices: Tensor) -> ByParameter:
        """Take the parameter-shaped tensors out of matrices (Q, G, O, I): the inverse of `pack`."""
        G, O = self.matrix or (1, 1)
        widths = [math.prod(shape) // (G * O) for shape in self.shapes.values()]
        pieces = matrices.split(widths, 3 if self.matrix else 2)
        if self.transposed:
            pieces = tuple(piece.mT for piece in pieces)
        return {
            name: piece.reshape(len(piece), *shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
