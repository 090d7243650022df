"""Per-example gradients of one block of parameters, kept factored, and the contractions over them.

A block is a matrix of G groups of shape (O, I). A row (n, r) is the gradient J_n^T s_r of one scalar of example n,

    W[n, r] = sum_t g[n, r, t] a[n, t]^T                  t: the positions (tokens, pixels) that share the weight,

so all layers look alike: T = 1 for a linear layer on vectors, tokens for one on sequences, output pixels for a
convolution. The contractions form W only where that is cheaper: each picks its order by floating-point operations and
by numbers moved to and from memory. Loose parameters have their rows written out; embeddings are looked up, see
`wherefrom.persample.rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# One number moved to and from memory costs about as much as this many multiply-adds of a matrix product.
MEMORY_COST = 32.0
CHUNK = 2**21  # numbers in an intermediate result, so that it stays in cache
ROWS = 1024  # positions in one matrix product


class Form(Protocol):
    """Any form of rows: they can be written out."""

    def written(self) -> Written:
        """The rows in dense form."""
        ...

    def gram(self, other: Form) -> Tensor:
        """Inner products of all rows with all rows of another: (n, R, n', R')."""
        ...


@dataclass(frozen=True)
class Factored:
    """Rows as outer products.

    Args:
        a: inputs, (G, n, T, I).
        g: cotangents of the outputs, (G, n, R, T, O).
    """

    a: Tensor
    g: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """(G, n, R, T, O, I)."""
        G, n, R, T, O = self.g.shape
        return G, n, R, T, O, self.a.shape[-1]

    def __getitem__(self, index: slice | Tensor) -> Factored:
        """The rows of some examples."""
        return Factored(self.a[:, index], self.g[:, index])

    def pick(self, index: Tensor, r: Tensor) -> Factored:
        """Chosen rows (index, r) as examples of one row each."""
        return Factored(self.a[:, index], self.g[:, index, r].unsqueeze(2))

    def numbers(self) -> int:
        """How many numbers are stored."""
        return self.a.numel() + self.g.numel()

    def written(self) -> Written:
        """The rows W in dense form."""
        G, n, R, T, O, I = self.sizes
        if T == 1:
            w = self.g.mT * self.a.unsqueeze(2)  # (G, n, R, O, I)
        else:  # one product for all R of an example, so that its inputs are read once
            w = (self.g.mT.reshape(G, n, R * O, T) @ self.a).view(G, n, R, O, I)
        return Written(w.permute(1, 2, 0, 3, 4).reshape(n, R, -1), (G, O, I))

    def compact(self) -> Factored | Written:
        """The same rows in whichever form takes less memory."""
        _, _, R, T, O, I = self.sizes
        return self.written() if R * O * I < T * (I + R * O) else self.contiguous()

    def ready(self, Q: int) -> Factored | Written:
        """The same rows in the form in which several contractions with Q matrices cost least, in no more memory."""
        return self.compact() if self._order(Q) == "outer" else self.contiguous()

    def contiguous(self) -> Factored:
        """The same rows with positions next to each other in memory, as products over many examples want them."""
        return Factored(self.a.contiguous(), self.g.contiguous())

    def dot(self, v: Tensor) -> Tensor:
        """Take the inner products of every row with Q matrices: v (Q, G, O, I) to (Q, n, R).

            <V, sum_t g_t a_t^T> = sum_t g_t^T V a_t

        Written out, rows are compared with V as they are ("outer"); else V a ("left") or g^T V ("right") is made first.
        """
        G, n, R, T, O, I = self.sizes
        v = v.transpose(0, 1).to(self.a.dtype)  # (G, Q, O, I)
        order = self._order(v.shape[1])
        if order == "outer":
            return self._dot_written(v)

        Q = v.shape[1]
        out = self.a.new_empty(Q, n, R)
        whole = self.contiguous()
        width = O if order == "left" else R * I
        # A tile of examples x matrices whose intermediate result stays in cache.
        for s, q in _tiles(n, Q, G * T * width, T):
            contract = whole[s]._dot_left if order == "left" else whole[s]._dot_right
            out[q, s] = contract(v[:, q])
        return out

    def _dot_written(self, v: Tensor) -> Tensor:
        """Write rows out, a stripe of outputs for many examples at a time, so that v (G, Q, O, I) is seldom read."""
        G, n, R, _, O, I = self.sizes
        out = self.a.new_zeros(v.shape[1], n, R)
        for s in slices(n, 16 * G * R * I):
            rows = self[s]
            for o in slices(O, G * rows.g.shape[1] * R * I):
                stripe = Factored(rows.a, rows.g[..., o]).written()
                out[:, s] += stripe.dot(v[:, :, o].transpose(0, 1))
        return out

    def _dot_left(self, v: Tensor) -> Tensor:
        """Multiply inputs by the matrices first: v (G, k, O, I) to (k, m, R)."""
        G, m, R, T, O, I = self.sizes
        k = v.shape[1]
        va = self.a.reshape(G, m * T, I) @ v.reshape(G, k * O, I).mT  # (G, m T, k O)
        if T == 1:
            va, g = va.view(G, m, k, O), self.g.reshape(G, m, R, O)
        else:  # positions and outputs are one axis, which a single matrix product sums over
            va, g = va.view(G, m, T, k, O).transpose(2, 3).flatten(3), self.g.reshape(G, m, R, T * O)
        return (va @ g.mT).sum(0).transpose(0, 1)

    def _dot_right(self, v: Tensor) -> Tensor:
        """Multiply cotangents by the matrices first: v (G, k, O, I) to (k, m, R)."""
        G, m, R, T, O, I = self.sizes
        gv = self.g.reshape(G, 1, m * R * T, O) @ v  # (G, k, m R T, I)
        gv = gv.view(G, -1, m, R, T, I).mul_(self.a.view(G, 1, m, 1, T, I))
        return gv.sum((0, 4, 5))

    def combine(self, w: Tensor) -> Tensor:
        """Sum rows with weights, sum_{n,r} w[q, n, r] W[n, r]: w (Q, n, R) to (Q, G, O, I)."""
        G, n, R, T, O, I = self.sizes
        Q, w = w.shape[0], w.to(self.a.dtype)
        order = self._order(Q)
        out = w.new_zeros(G, Q, O, I)
        if order == "outer":
            for s in slices(n, G * R * O * I):
                out += self[s].written().combine(w[:, s]).transpose(0, 1)
            return out.transpose(0, 1)

        whole = self.contiguous()
        width = O if order == "left" else R * I
        for s, q in _tiles(n, Q, G * T * width, T):
            add = whole[s]._add_left if order == "left" else whole[s]._add_right
            add(w[q, s], out[:, q])
        return out.transpose(0, 1)

    def _add_left(self, w: Tensor, out: Tensor) -> None:
        """Weigh the cotangents, then multiply by the inputs: w (k, m, R), added to out (G, k, O, I)."""
        G, m, R, T, O, I = self.sizes
        k = len(w)
        if R == 1 and T == 1:
            weighted = self.g.reshape(G, m, 1, O) * w.reshape(k, m).T.reshape(1, m, k, 1)
        else:
            weighted = w.transpose(0, 1) @ self.g.reshape(G, m, R, T * O)  # (G, m, k, T O)
            weighted = weighted.view(G, m, k, T, O).transpose(2, 3)
        weighted = weighted.reshape(G, m * T, k * O).mT
        out.view(G, k * O, I).baddbmm_(weighted, self.a.reshape(G, m * T, I))

    def _add_right(self, w: Tensor, out: Tensor) -> None:
        """Weigh the inputs, then multiply by the cotangents: w (k, m, R), added to out (G, k, O, I)."""
        G, m, R, T, O, I = self.sizes
        k = len(w)
        weighted = w.reshape(1, k, m, R, 1, 1) * self.a.view(G, 1, m, 1, T, I)
        cotangents = self.g.reshape(G, 1, m * R * T, O).mT.expand(G, k, -1, -1)
        out += cotangents @ weighted.reshape(G, k, m * R * T, I)

    def _order(self, Q: int) -> str:
        """The cheapest order of a contraction with Q matrices: rows written out, or V a or g V first."""
        _, _, R, T, O, I = self.sizes
        costs = {
            "outer": R * T * O * I + R * Q * O * I + MEMORY_COST * R * O * I,
            "left": T * O * I * Q + R * T * O * Q + MEMORY_COST * T * O * Q,
            "right": R * T * O * I * Q + R * T * I * Q + MEMORY_COST * R * T * I * Q,
        }
        return min(costs, key=lambda order: costs[order])

    def square_norms(self) -> Tensor:
        """Squared norms of the rows, (n, R), by the ghost product where that is cheaper."""
        G, n, R, T, O, I = self.sizes
        if T == 1:
            return (self.a.square().sum(-1).unsqueeze(2) * self.g.square().sum(-1)).sum((0, 3))
        out = self.a.new_empty(n, R)
        ghost = T * (I + R * O) < R * O * I
        for s in slices(n, G * (T * T * (R + 1) if ghost else R * O * I)):
            rows = self[s]
            if ghost:
                inputs = rows.a @ rows.a.mT  # (G, m, T, T)
                out[s] = ((rows.g @ rows.g.mT) * inputs.unsqueeze(2)).sum((0, 3, 4))
            else:
                out[s] = rows.written().square_norms()
        return out

    def gram(self, other: Form) -> Tensor:
        """Inner products of all rows with all rows of another: (n, R, n', R')."""
        if not isinstance(other, Factored):
            return self.written().gram(other)
        G, n, R, T, O, I = self.sizes
        _, m, P, S, _, _ = other.sizes
        out = self.a.new_empty(n, R, m, P)
        ghost = n * m * T * S * (I + R * P * O + MEMORY_COST * (1 + R * P))
        outer = (n * R * T + m * P * S + n * R * m * P) * O * I + MEMORY_COST * (n * R + m * P) * O * I
        if ghost <= outer:
            for s in slices(n, G * m * T * S * (1 + R * P)):
                rows, k = self[s], len(range(*s.indices(n)))
                inputs = rows.a.reshape(G, k * T, I) @ other.a.reshape(G, m * S, I).mT
                cotangents = rows.g.reshape(G, k * R * T, O) @ other.g.reshape(G, m * P * S, O).mT
                both = cotangents.view(G, k, R, T, m, P, S) * inputs.view(G, k, 1, T, m, 1, S)
                out[s] = both.sum((0, 3, 6))
            return out
        written = other.written()
        for s in slices(n, G * R * O * I):
            out[s] = self[s].written().gram(written)
        return out


@dataclass(frozen=True)
class Written:
    """Rows in dense form.

    Args:
        rows: (n, R, G O I).
        sides: (G, O, I).
    """

    rows: Tensor
    sides: tuple[int, int, int]

    def __getitem__(self, index: slice | Tensor) -> Written:
        """The rows of some examples."""
        return Written(self.rows[index], self.sides)

    def pick(self, index: Tensor, r: Tensor) -> Written:
        """Chosen rows (index, r) as examples of one row each."""
        return Written(self.rows[index, r].unsqueeze(1), self.sides)

    def numbers(self) -> int:
        """How many numbers are stored."""
        return self.rows.numel()

    def written(self) -> Written:
        """Itself."""
        return self

    def compact(self) -> Written:
        """Itself."""
        return self

    def dot(self, v: Tensor) -> Tensor:
        """Inner products with Q matrices: v (Q, G, O, I) to (Q, n, R)."""
        n, R, _ = self.rows.shape
        return (v.reshape(len(v), -1).to(self.rows.dtype) @ self.rows.flatten(0, 1).mT).view(-1, n, R)

    def combine(self, w: Tensor) -> Tensor:
        """Weighted sums of rows: w (Q, n, R) to (Q, G, O, I)."""
        return (w.flatten(1).to(self.rows.dtype) @ self.rows.flatten(0, 1)).view(-1, *self.sides)

    def square_norms(self) -> Tensor:
        """Squared norms of the rows, (n, R)."""
        return self.rows.square().sum(2)

    def gram(self, other: Form) -> Tensor:
        """Inner products of all rows with all rows of another: (n, R, n', R')."""
        rows = other.written().rows
        product = self.rows.flatten(0, 1) @ rows.flatten(0, 1).mT
        return product.view(*self.rows.shape[:2], *rows.shape[:2])


def slices(n: int, width: int) -> Iterator[slice]:
    """Pieces of n examples whose intermediate result, ``width`` numbers each, stays small."""
    step = max(1, CHUNK // max(1, width))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _tiles(n: int, Q: int, width: int, positions: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of examples x right-hand sides: positions enough to multiply fast, numbers few enough for the cache."""
    m = min(n, max(1, ROWS // positions))
    k = max(1, CHUNK // max(1, m * width))
    return ((slice(i, min(i + m, n)), slice(j, min(j + k, Q))) for j in range(0, Q, k) for i in range(0, n, m))
