"""Rows of every form: factored, routed, written out, looked up in a table, or the sum of several uses of one weight."""

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

    Args:
        ids: token numbers, (n, T).
        g: cotangents of the embeddings, (n, R, T, d).
        size: number of rows V of the table.
    """

    ids: Tensor
    g: Tensor
    size: int

    def __getitem__(self, index: slice | Tensor) -> Lookup:
        """The rows of some examples."""
        return Lookup(self.ids[index], self.g[index], self.size)

    def pick(self, index: Tensor, r: Tensor) -> Lookup:
        """Chosen rows (index, r) as examples of one row each."""
        return Lookup(self.ids[index], self.g[index, r].unsqueeze(1), self.size)

    def numbers(self) -> int:
        """How many numbers are stored."""
        return self.ids.numel() + self.g.numel()

    def written(self) -> Written:
        """The rows in dense form."""
        n, R, T, d = self.g.shape
        out = self.g.new_zeros(n, R, self.size, d)
        index = self.ids.view(n, 1, T, 1).expand_as(self.g)
        return Written(out.scatter_add_(2, index, self.g).flatten(2), (1, self.size, d))

    def compact(self) -> Lookup:
        """Itself: tables are never written out."""
        return self

    def dot(self, v: Tensor) -> Tensor:
        """Inner products with Q tables: v (Q, 1, V, d) to (Q, n, R)."""
        n, R, T, d = self.g.shape
        out = v.new_empty(v.shape[0], n, R)
        for s in slices(n, v.shape[0] * T * d):
            rows = v[:, 0, self.ids[s].flatten()].view(v.shape[0], -1, T * d)  # (Q, m, T d)
            out[:, s] = torch.einsum("qmx,mrx->qmr", rows, self.g[s].flatten(2).to(v.dtype))
        return out

    def combine(self, w: Tensor) -> Tensor:
        """Weighted sums of rows: w (Q, n, R) to (Q, 1, V, d)."""
        n, R, T, d = self.g.shape
        out = self.g.new_zeros(w.shape[0], self.size, d)
        for s in slices(n, w.shape[0] * T * d):
            wg = torch.einsum("qmr,mrx->qmx", w[:, s].to(self.g.dtype), self.g[s].flatten(2))
            out.index_add_(1, self.ids[s].flatten(), wg.reshape(w.shape[0], -1, d))
        return out.unsqueeze(1)

    def square_norms(self) -> Tensor:
        """Squared norms of the rows, (n, R)."""
        same = (self.ids.unsqueeze(1) == self.ids.unsqueeze(2)).unsqueeze(1)  # (n, 1, T, T)
        return ((self.g @ self.g.mT) * same).sum((2, 3))

    def gram(self, other: Form) -> Tensor:
        """Inner products of all rows with all rows of another: (n, R, n', R')."""
        if not isinstance(other, Lookup):
            return self.written().gram(other)
        n, R, T, d = self.g.shape
        m, P, S, _ = other.g.shape
        out = self.g.new_empty(n, R, m, P)
        for s in slices(n, R * T * m * P * S):
            both = (self.g[s].reshape(-1, d) @ other.g.reshape(-1, d).mT).view(-1, R, T, m, P, S)
            same = self.ids[s].view(-1, 1, T, 1, 1, 1) == other.ids.view(1, 1, 1, m, 1, S)
            out[s] = (both * same).sum((2, 5))
        return out


@dataclass(frozen=True)
class Several:
    """Rows of a table used both as an embedding and as a matrix (tied weights): the sum of the uses.

    Linear contractions are sums over the uses, and inner products of rows sums over pairs of uses.
    """

    parts: tuple[Factored | Written | Lookup, ...]

    def __getitem__(self, index: slice | Tensor) -> Several:
        """The rows of some examples."""
        return Several(tuple(p[index] for p in self.parts))

    def pick(self, index: Tensor, r: Tensor) -> Several:
        """Chosen rows (index, r) as examples of one row each."""
        return Several(tuple(p.pick(index, r) for p in self.parts))

    def numbers(self) -> int:
        """How many numbers are stored."""
        return sum(p.numbers() for p in self.parts)

    def written(self) -> Written:
        """The summed rows in dense form."""
        written = [p.written() for p in self.parts]
        return Written(torch.stack([w.rows for w in written]).sum(0), written[0].sides)

    def compact(self) -> Several:
        """Itself."""
        return self

    def dot(self, v: Tensor) -> Tensor:
        """Inner products with Q matrices: v (Q, 1, O, I) to (Q, n, R)."""
        return torch.stack([p.dot(v) for p in self.parts]).sum(0)

    def combine(self, w: Tensor) -> Tensor:
        """Weighted sums of rows: w (Q, n, R) to (Q, 1, O, I)."""
        return torch.stack([p.combine(w) for p in self.parts]).sum(0)

    def square_norms(self) -> Tensor:
        """Squared norms of the rows, (n, R)."""
        matrix, table = self.parts[0], self.parts[-1]
        if len(self.parts) > 2 or not isinstance(matrix, Factored) or not isinstance(table, Lookup):
            return self.written().square_norms()
        both = table.g @ matrix.a[0].mT.unsqueeze(1)  # (n, R, S, T)
        index = table.ids.view(len(both), 1, 1, -1).expand(*both.shape[:2], both.shape[3], -1)
        cross = (both.mT * matrix.g[0].gather(3, index)).sum((2, 3))
        return matrix.square_norms() + 2 * cross + table.square_norms()

    def gram(self, other: Form) -> Tensor:
        """Inner products of all rows with all rows of another: (n, R, n', R')."""
        others = other.parts if isinstance(other, Several) else (other,)
        return torch.stack([_gram(p, q) for p in self.parts for q in others]).sum(0)


def _gram(p: Form, q: Form) -> Tensor:
    """Inner products of rows of any two forms: (n, R, n', R')."""
    if isinstance(p, Lookup) and isinstance(q, Factored):
        return _gram(q, p).permute(2, 3, 0, 1)
    if not (isinstance(p, Factored) and isinstance(q, Lookup)):
        return p.gram(q)
    n, R, T, _ = p.g.shape[1:]
    m, P, S, d = q.g.shape
    out = p.g.new_empty(n, R, m, P)
    for s in slices(n, R * T * m * P * S):
        both = (p.a[0, s].reshape(-1, d) @ q.g.reshape(-1, d).mT).view(-1, 1, T, m, P, S)
        outputs = p.g[0, s][..., q.ids].unsqueeze(4)  # (k, R, T, m, 1, S)
        out[s] = (both * outputs).sum((2, 5))
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
    """

    a: Tensor
    g: Tensor
    group: Tensor
    item: Tensor
    groups: int
    length: int

    def gathered(self, n: int) -> Routed:
        """The rows of n examples of length / n positions each; what has no cotangent is left out."""
        used = (self.g != 0).any(2).any(0)
        a, g, group, item = self.a[used], self.g[:, used], self.group[used], self.item[used]
        example, position = item.div(self.length // n, rounding_mode="floor"), item % (self.length // n)
        key, order = (group * n + example).sort(stable=True)
        counts = key.bincount(minlength=self.groups * n)
        slot = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[key]
        where = (group[order], example[order], slot)
        T = max(1, int(counts.max()))
        inputs = a.new_zeros(self.groups, n, T, a.shape[1])
        cotangents = g.new_zeros(self.groups, n, T, len(g), g.shape[2])
        positions = item.new_full((self.groups, n, T), -1)
        inputs[where], cotangents[where], positions[where] = a[order], g[:, order].transpose(0, 1), position[order]
        return Routed(inputs, cotangents.transpose(2, 3), positions)


Rows = Factored | Written | Lookup | Several


def total(parts: Sequence[Factored | Written | Lookup]) -> Rows:
    """The rows of a block whose weight is used several times: its uses are further positions of one sum."""
    if len(parts) == 1:
        return parts[0]
    factored = [p for p in parts if isinstance(p, Factored)]
    lookups = [p for p in parts if isinstance(p, Lookup)]
    written = [p for p in parts if isinstance(p, Written)]
    merged: list[Factored | Written | Lookup] = []
    if factored:
        merged.append(Factored(torch.cat([p.a for p in factored], 2), torch.cat([p.g for p in factored], 3)))
    if lookups:
        size = lookups[0].size
        merged.append(Lookup(torch.cat([p.ids for p in lookups], 1), torch.cat([p.g for p in lookups], 2), size))
    if written:
        merged.append(Written(torch.stack([p.rows for p in written]).sum(0), written[0].sides))
    return merged[0] if len(merged) == 1 else Several(tuple(merged))


def apart(rows: Factored | Written | Lookup, S: int) -> Factored | Written | Lookup:
    """Rows of n S examples of one position each, from n with S positions, or with one that becomes the first."""

    def padded(t: Tensor, dim: int) -> Tensor:  # the positions, at dim, follow the examples
        missing = S - t.shape[dim]
        return F.pad(t, [0, 0] * (t.ndim - dim - 1) + [0, missing]) if missing else t

    if isinstance(rows, Written):
        return Written(padded(rows.rows.unsqueeze(1), 1).flatten(0, 1), rows.sides)
    if isinstance(rows, Lookup):
        g = padded(rows.g, 2).transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return Lookup(padded(rows.ids, 1).reshape(-1, 1), g, rows.size)
    a, g = padded(rows.a, 2).flatten(1, 2).unsqueeze(2), padded(rows.g, 3).transpose(2, 3).flatten(1, 2).unsqueeze(3)
    return Factored(a, g)


def concatenate(batches: list[Rows]) -> Rows:
    """The rows of several batches, one after another; positions and rows are padded with zeros to the longest."""
    if len({type(b) for b in batches}) > 1:  # their forms differ with their lengths
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
    """The rows of a batch from those of its examples, which may see different numbers of positions, or none.

    Which positions are real is kept, so that no mean over positions counts the padding between examples.
    """
    used = [r for r in examples if not _vanishes(r)]
    if not used:
        return concatenate(list(examples))
    if not all(isinstance(r, Factored) for r in used):
        blank = used[0]
        empty = Written(torch.zeros_like(blank.written().rows), blank.written().sides)
        return concatenate([empty if _vanishes(r) else r for r in examples])
    template = next(r for r in used if isinstance(r, Factored))
    blank = Routed(
        torch.zeros_like(template.a[:, :, :1]),
        torch.zeros_like(template.g[:, :, :, :1]),
        torch.full((template.a.shape[0], 1, 1), -1, device=template.a.device),
    )
    routed = [_routed(r) if isinstance(r, Factored) and not _vanishes(r) else blank for r in examples]
    positions = join([r.positions + 1 for r in routed], 1) - 1  # padding becomes -1
    return Routed(join([r.a for r in routed], 1), join([r.g for r in routed], 1), positions)


def _vanishes(rows: Rows) -> bool:
    """Whether these are the zeros of a layer that was not called."""
    return isinstance(rows, Written) and rows.sides[2] > 1 and not rows.rows.any()


def _routed(rows: Factored) -> Routed:
    """Factored rows with the numbers of their positions."""
    if isinstance(rows, Routed):
        return rows
    G, n, T, _ = rows.a.shape
    return Routed(rows.a, rows.g, torch.arange(T, device=rows.a.device).expand(G, n, T))


def join(parts: Sequence[Tensor], along: int) -> Tensor:
    """Concatenate along one axis; every other axis is padded with zeros to the longest."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in parts), strict=True)]
    padded = []
    for t in parts:
        missing = [0 if d == along else size - t.shape[d] for d, size in enumerate(shape)]
        padded.append(F.pad(t, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else t)
    return torch.cat(padded, along)
