"""Rows of every form: factored, routed, written out, looked up in a table, or the sum of several uses of one weight.

`Factored` and `Written` rows are in `wherefrom.persample.factored`. Here are the others, and what is done with rows of
any form: joining batches, merging positions into examples and splitting them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.persample.factored import Factored, Form, Written, slices


@dataclass(frozen=True)
class Lookup:
    """Rows of an embedding table (V, d): position t adds its cotangent to the row of its token.

    A row written out has V d numbers, nearly all of them 0; so every contraction goes through the token numbers.

    Args:
        ids: token numbers, (n, T).
        g: cotangents of the embeddings, (n, R, T, d).
        size: number of rows V of the table.
    """

    ids: Tensor
    g: Tensor
    size: int

    def __getitem__(self, index: slice | Tensor) -> Lookup:
        """Take the rows of some examples."""
        return Lookup(self.ids[index], self.g[index], self.size)

    def pick(self, index: Tensor, r: Tensor) -> Lookup:
        """Take chosen rows (index, r) as examples of one row each."""
        return Lookup(self.ids[index], self.g[index, r].unsqueeze(1), self.size)

    def numbers(self) -> int:
        """Count the numbers that are stored."""
        return self.ids.numel() + self.g.numel()

    def written(self) -> Written:
        """Write the rows out: (n, R, V d)."""
        n, R, T, d = self.g.shape
        tables = self.g.new_zeros(n, R, self.size, d)
        index = self.ids.view(n, 1, T, 1).expand_as(self.g)
        # A token may stand at several positions: their cotangents are added.
        return Written(tables.scatter_add_(2, index, self.g).flatten(2), (1, self.size, d))

    def compact(self) -> Lookup:
        """Give back the rows themselves: tables are never written out."""
        return self

    def dot(self, v: Tensor) -> Tensor:
        """Multiply every row with Q tables: v (Q, 1, V, d) to (Q, n, R)."""
        n, R, T, d = self.g.shape
        Q = v.shape[0]
        out = v.new_empty(Q, n, R)
        for s in slices(n, Q * T * d):
            # Only the tables' rows of tokens that occur are read.
            looked_up = v[:, 0, self.ids[s].flatten()].view(Q, -1, T * d)  # (Q, m, T d)
            out[:, s] = torch.einsum("qmx,mrx->qmr", looked_up, self.g[s].flatten(2).to(v.dtype))
        return out

    def combine(self, w: Tensor) -> Tensor:
        """Sum the rows with weights w (Q, n, R): (Q, 1, V, d)."""
        n, R, T, d = self.g.shape
        Q = w.shape[0]
        out = self.g.new_zeros(Q, self.size, d)
        for s in slices(n, Q * T * d):
            # First over the R rows of an example, whose positions have the same tokens; then into the table.
            weighted = torch.einsum("qmr,mrx->qmx", w[:, s].to(self.g.dtype), self.g[s].flatten(2))  # (Q, m, T d)
            out.index_add_(1, self.ids[s].flatten(), weighted.reshape(Q, -1, d))
        return out.unsqueeze(1)

    def square_norms(self) -> Tensor:
        """Compute the squared norms of the rows, (n, R): two positions meet where their tokens are the same."""
        is_same = (self.ids.unsqueeze(1) == self.ids.unsqueeze(2)).unsqueeze(1)  # (n, 1, T, T)
        return ((self.g @ self.g.mT) * is_same).sum((2, 3))

    def gram(self, other: Form) -> Tensor:
        """Compute the inner products of all rows with all rows of another: (n, R, n', R')."""
        if not isinstance(other, Lookup):
            return self.written().gram(other)
        n, R, T, d = self.g.shape
        n2, R2, T2, _ = other.g.shape
        out = self.g.new_empty(n, R, n2, R2)
        for s in slices(n, R * T * n2 * R2 * T2):
            products = self.g[s].reshape(-1, d) @ other.g.reshape(-1, d).mT  # (m R T, n' R' T')
            products = products.view(-1, R, T, n2, R2, T2)
            is_same = self.ids[s].view(-1, 1, T, 1, 1, 1) == other.ids.view(1, 1, 1, n2, 1, T2)
            out[s] = (products * is_same).sum((2, 5))
        return out


@dataclass(frozen=True)
class Several:
    """Rows of a table used both as an embedding and as a matrix (tied weights): the sum of the uses.

    Linear contractions are sums over the uses, and inner products of rows sums over pairs of uses.
    """

    parts: tuple[Factored | Written | Lookup, ...]

    def __getitem__(self, index: slice | Tensor) -> Several:
        """Take the rows of some examples."""
        return Several(tuple(p[index] for p in self.parts))

    def pick(self, index: Tensor, r: Tensor) -> Several:
        """Take chosen rows (index, r) as examples of one row each."""
        return Several(tuple(p.pick(index, r) for p in self.parts))

    def numbers(self) -> int:
        """Count the numbers that are stored."""
        return sum(p.numbers() for p in self.parts)

    def written(self) -> Written:
        """Write the summed rows out."""
        written = [p.written() for p in self.parts]
        return Written(torch.stack([w.rows for w in written]).sum(0), written[0].sides)

    def compact(self) -> Several:
        """Give back the rows themselves."""
        return self

    def dot(self, v: Tensor) -> Tensor:
        """Multiply every row with Q matrices: v (Q, 1, O, I) to (Q, n, R)."""
        return torch.stack([p.dot(v) for p in self.parts]).sum(0)

    def combine(self, w: Tensor) -> Tensor:
        """Sum the rows with weights w (Q, n, R): (Q, 1, O, I)."""
        return torch.stack([p.combine(w) for p in self.parts]).sum(0)

    def square_norms(self) -> Tensor:
        """Compute the squared norms of the rows, (n, R).

        Of the usual two uses, |M + E|^2 = |M|^2 + 2 <M, E> + |E|^2 without writing out a table. With
        M = sum_t g_t a_t^T of the matrix, row v of which is sum_t g_t[v] a_t, and E of the table:

            <M, E> = sum_{s,t} g_t[id_s] (a_t . e_s)
        """
        matrix, table = self.parts[0], self.parts[-1]
        if len(self.parts) > 2 or not isinstance(matrix, Factored) or not isinstance(table, Lookup):
            return self.written().square_norms()
        inputs = table.g @ matrix.a[0].mT.unsqueeze(1)  # (n, R, S, T), e_s . a_t
        n, R, S, T = inputs.shape
        index = table.ids.view(n, 1, 1, S).expand(n, R, T, S)
        outputs = matrix.g[0].gather(3, index)  # (n, R, T, S), g_t[id_s]
        cross = (inputs.mT * outputs).sum((2, 3))
        return matrix.square_norms() + 2 * cross + table.square_norms()

    def gram(self, other: Form) -> Tensor:
        """Compute the inner products of all rows with all rows of another: (n, R, n', R')."""
        others = other.parts if isinstance(other, Several) else (other,)
        return torch.stack([_gram(p, q) for p in self.parts for q in others]).sum(0)


def _gram(p: Form, q: Form) -> Tensor:
    """Compute the inner products of rows of any two forms: (n, R, n', R')."""
    if isinstance(p, Lookup) and isinstance(q, Factored):
        return _gram(q, p).permute(2, 3, 0, 1)
    if isinstance(p, Factored) and isinstance(q, Lookup):
        return _gram_of_matrix_and_table(p, q)
    return p.gram(q)


def _gram_of_matrix_and_table(matrix: Factored, table: Lookup) -> Tensor:
    """Compute the inner products of factored rows with rows of a table: sum_{t,s} g_t[id_s] (a_t . e_s)."""
    n, R, T, _ = matrix.g.shape[1:]
    n2, R2, S, d = table.g.shape
    out = matrix.g.new_empty(n, R, n2, R2)
    for s in slices(n, R * T * n2 * R2 * S):
        inputs = matrix.a[0, s].reshape(-1, d) @ table.g.reshape(-1, d).mT  # (m T, n' R' S)
        inputs = inputs.view(-1, 1, T, n2, R2, S)
        outputs = matrix.g[0, s][..., table.ids].unsqueeze(4)  # (m, R, T, n', 1, S)
        out[s] = (inputs * outputs).sum((2, 5))
    return out


@dataclass(frozen=True)
class Routed(Factored):
    """Factored rows of groups that each see positions of their own, as the experts of a mixture do.

    Args:
        a, g: as in `Factored`; 0 where a group has fewer than T positions.
        positions: (G, n, T) int64, which of the example's positions each of them is; -1 for none.
    """

    positions: Tensor


@dataclass(frozen=True)
class Scattered:
    """Outer products of G groups, in no order: what the entry of a layer of experts returns.

    Args:
        a: inputs, (P, I).
        g: cotangents of the outputs, (R, P, O).
        group: (P,) which group each belongs to.
        item: (P,) its number on the leading axis of the layer's input, which has ``length`` entries.
        groups: the number G of groups.
        length: entries on the leading axis of the layer's input.
    """

    a: Tensor
    g: Tensor
    group: Tensor
    item: Tensor
    groups: int
    length: int

    def gather(self, n: int) -> Routed:
        """Gather the rows of n examples of length / n positions each; what has no cotangent is left out."""
        used = (self.g != 0).any(2).any(0)  # (P,) bool
        a, g, group, item = self.a[used], self.g[:, used], self.group[used], self.item[used]
        per_example = self.length // n
        example = item.div(per_example, rounding_mode="floor")
        position = item % per_example

        # Sorted by (group, example), the outer products of a pair stand together. The slot of each is its place among
        # them: its place in the whole order, less where its pair begins.
        key, order = (group * n + example).sort(stable=True)
        counts = key.bincount(minlength=self.groups * n)  # (G n,)
        begin = counts.cumsum(0) - counts
        slot = torch.arange(len(key), device=key.device) - begin[key]

        T = max(1, int(counts.max()))
        inputs = a.new_zeros(self.groups, n, T, a.shape[1])
        cotangents = g.new_zeros(self.groups, n, T, len(g), g.shape[2])
        positions = item.new_full((self.groups, n, T), -1)
        where = (group[order], example[order], slot)
        inputs[where] = a[order]
        cotangents[where] = g[:, order].transpose(0, 1)
        positions[where] = position[order]
        return Routed(inputs, cotangents.transpose(2, 3), positions)


Rows = Factored | Written | Lookup | Several


# --- uses, positions and examples -----------------------------------------------------------------------------------


def sum_uses(parts: Sequence[Factored | Written | Lookup]) -> Rows:
    """Sum the rows of a block whose weight is used several times.

    A row is a sum over positions, so further uses of the same form are further positions.
    """
    if len(parts) == 1:
        return parts[0]
    factored = [p for p in parts if isinstance(p, Factored)]
    lookups = [p for p in parts if isinstance(p, Lookup)]
    written = [p for p in parts if isinstance(p, Written)]

    sums: list[Factored | Written | Lookup] = []
    if factored:
        inputs = torch.cat([p.a for p in factored], 2)  # (G, n, T, I)
        cotangents = torch.cat([p.g for p in factored], 3)  # (G, n, R, T, O)
        sums.append(Factored(inputs, cotangents))
    if lookups:
        ids = torch.cat([p.ids for p in lookups], 1)  # (n, T)
        cotangents = torch.cat([p.g for p in lookups], 2)  # (n, R, T, d)
        sums.append(Lookup(ids, cotangents, lookups[0].size))
    if written:
        sums.append(Written(torch.stack([p.rows for p in written]).sum(0), written[0].sides))
    return sums[0] if len(sums) == 1 else Several(tuple(sums))


def merge_positions(rows: Factored | Written | Lookup, n: int) -> Factored | Written | Lookup:
    """Turn every m examples into m positions of one: the reverse of `split_positions`.

    A layer may see all tokens of a batch on one axis, so that its rule takes each for an example.

    Args:
        rows: of n m examples, those that belong together one after another.
        n: the number of examples.
    """
    if isinstance(rows, Lookup):
        return Lookup(rows.ids.reshape(n, -1), _merge_cotangents(rows.g, n, axis=0), rows.size)
    if isinstance(rows, Written):
        return Written(rows.rows.unflatten(0, (n, -1)).sum(1), rows.sides)
    inputs = rows.a.reshape(rows.a.shape[0], n, -1, rows.a.shape[-1])  # (G, n, m T, I)
    return Factored(inputs, _merge_cotangents(rows.g, n, axis=1))


def _merge_cotangents(g: Tensor, n: int, axis: int) -> Tensor:
    """Turn (..., n m, R, T, O) into (..., n, R, m T, O), with the examples at an axis."""
    g = g.unflatten(axis, (n, -1))  # (..., n, m, R, T, O)
    g = g.movedim(axis + 1, axis + 2)  # (..., n, R, m, T, O)
    return g.flatten(axis + 2, axis + 3)


def split_positions(rows: Factored | Written | Lookup, positions: int) -> Factored | Written | Lookup:
    """Turn each position of each example into an example of its own.

    Scores by token are ordinary scores of these n S examples: the gradient of a sequence is the sum of what its
    positions write, W[n] = sum_t g[n, t] a[n, t]^T, so its score is the sum over them.

    Args:
        rows: of n examples.
        positions: the length S of the padded sequences. A layer that sees one vector of a sequence, such as a pooler,
            has a single position, and rows that are written out have none: what they are is credited to the first.

    Returns:
        Rows of n S examples with one position each; those of padding are zero.
    """
    if isinstance(rows, Written):
        dense = _pad_axis(rows.rows.unsqueeze(1), axis=1, length=positions)  # (n, S, R, G O I)
        return Written(dense.flatten(0, 1), rows.sides)
    if isinstance(rows, Lookup):
        ids = _pad_axis(rows.ids, axis=1, length=positions)  # (n, S)
        cotangents = _pad_axis(rows.g, axis=2, length=positions)  # (n, R, S, d)
        cotangents = cotangents.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (n S, R, 1, d)
        return Lookup(ids.reshape(-1, 1), cotangents, rows.size)
    inputs = _pad_axis(rows.a, axis=2, length=positions)  # (G, n, S, I)
    cotangents = _pad_axis(rows.g, axis=3, length=positions)  # (G, n, R, S, O)

    # Examples and positions become one axis; each new example keeps a position axis of length 1.
    inputs = inputs.flatten(1, 2).unsqueeze(2)  # (G, n S, 1, I)
    cotangents = cotangents.transpose(2, 3).flatten(1, 2).unsqueeze(3)  # (G, n S, R, 1, O)
    return Factored(inputs, cotangents)


def _pad_axis(t: Tensor, axis: int, length: int) -> Tensor:
    """Pad one axis with zeros at its end."""
    missing = length - t.shape[axis]
    if not missing:
        return t
    later_axes = [0, 0] * (t.ndim - axis - 1)  # F.pad takes the last axis first
    return F.pad(t, [*later_axes, 0, missing])


# --- batches --------------------------------------------------------------------------------------------------------


def concatenate(batches: list[Rows]) -> Rows:
    """Join the rows of several batches, one after another; positions and rows are padded with zeros to the longest."""
    if len({type(b) for b in batches}) > 1:
        # Which form takes less memory depends on the number of positions, so a long batch may be written out.
        batches = [b.written() for b in batches]
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Several):
        uses = zip(*(b.parts for b in batches if isinstance(b, Several)), strict=True)
        return Several(tuple(concatenate(list(use)) for use in uses))  # type: ignore[arg-type]
    if isinstance(first, Written):
        return Written(join([b.rows for b in batches if isinstance(b, Written)], 0), first.sides)
    if isinstance(first, Lookup):
        lookups = [b for b in batches if isinstance(b, Lookup)]
        return Lookup(join([b.ids for b in lookups], 0), join([b.g for b in lookups], 0), first.size)
    factored = [b for b in batches if isinstance(b, Factored)]
    return Factored(join([b.a for b in factored], 1), join([b.g for b in factored], 1))


def gather(examples: Sequence[Rows]) -> Rows:
    """Join the rows of a batch's examples, which may see different numbers of positions, or none.

    Which positions are real is kept, so that no mean over positions counts the padding between examples.
    """
    used = [rows for rows in examples if not _vanishes(rows)]
    if not used:
        return concatenate(list(examples))
    if not all(isinstance(rows, Factored) for rows in used):
        like = used[0].written()
        zeros = Written(torch.zeros_like(like.rows), like.sides)
        return concatenate([zeros if _vanishes(rows) else rows for rows in examples])

    template = next(rows for rows in used if isinstance(rows, Factored))
    blank = Routed(
        torch.zeros_like(template.a[:, :, :1]),
        torch.zeros_like(template.g[:, :, :, :1]),
        torch.full((template.a.shape[0], 1, 1), -1, device=template.a.device),
    )
    routed = [_number_positions(r) if isinstance(r, Factored) and not _vanishes(r) else blank for r in examples]
    positions = join([r.positions + 1 for r in routed], 1) - 1  # padding, which is 0, becomes -1
    return Routed(join([r.a for r in routed], 1), join([r.g for r in routed], 1), positions)


def _vanishes(rows: Rows) -> bool:
    """Whether these are the zeros of a layer that was not called."""
    return isinstance(rows, Written) and rows.sides[2] > 1 and not rows.rows.any()


def _number_positions(rows: Factored) -> Routed:
    """Number the positions of factored rows."""
    if isinstance(rows, Routed):
        return rows
    G, n, T, _ = rows.a.shape
    return Routed(rows.a, rows.g, torch.arange(T, device=rows.a.device).expand(G, n, T))


def join(parts: Sequence[Tensor], along: int) -> Tensor:
    """Concatenate along one axis; every other axis is padded with zeros to the longest."""
    longest = [max(sizes) for sizes in zip(*(t.shape for t in parts), strict=True)]
    padded = []
    for t in parts:
        widths: list[int] = []
        for axis in reversed(range(t.ndim)):  # F.pad takes the last axis first
            widths += [0, 0 if axis == along else longest[axis] - t.shape[axis]]
        padded.append(F.pad(t, widths) if any(widths) else t)
    return torch.cat(padded, along)
