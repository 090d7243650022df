"""Kronecker factors of the Fisher matrix: KFAC's eigenvalues and EKFAC's corrected ones.

Per block, with rows W_n = sum_t g_nt a_nt^T of sampled or true labels (Grosse et al. 2023; George et al. 2018),

    A = mean a a^T = Q_A D_A Q_A^T,    S = mean g g^T = Q_S D_S Q_S^T                (means over the real positions t)
    KFAC:   Lambda = T d_S d_A^T,                                                    T: mean positions per example
    EKFAC:  Lambda = mean_n (Q_S^T W_n Q_A)^2                                        (ASTRA eq. 28)

Differs from the papers: groups of a convolution are exact blocks; a side wider than a limit is split into blocks or
left diagonal; parameters without a Kronecker form are one side alone, so that their block is the Fisher itself up to
that limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.model.problem import Problem
from wherefrom.persample.eigenbasis import Basis, KroneckerBlock
from wherefrom.persample.factored import Factored, Written, slices
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.rows import Lookup, Routed, Rows

Labels = Literal["sampled", "true"]
CHUNK = 2**18  # numbers in an intermediate result, so that it stays in cache
STRIPE = 256  # columns of a covariance made at a time: what is above the diagonal is left out
POSITIONS = 2**13  # positions that are summed in the model's own dtype
LONG = 64  # positions of a sequence that is worth a matrix product of its own


def fit(
    problems: Problem | Sequence[Problem], labels: Labels = "sampled", seed: int = 0, limit: int = 4096
) -> dict[str, KroneckerBlock]:
    """Two passes over the training data: covariances, then corrected eigenvalues with fresh labels.

    Args:
        problems: the model, task, training data and parameters; of one model at several weights, all statistics are
            means over these (SOURCE: the checkpoints of a segment).
        labels: "sampled" from the model (the Fisher) or "true" (the empirical Fisher).
        seed: of the label draws.
        limit: widest eigenbasis; a wider side is split into blocks of this width, one wider than 8 blocks is left
            diagonal.

    With true labels, rows of the first pass are kept for the second as far as they fit into half the memory.

    Returns:
        Block name to factors, float32 or the model's wider dtype. Covariances and eigendecompositions are in float64.
    """
    if labels not in ("sampled", "true"):
        raise expected("labels", "'sampled' or 'true'", repr(labels))
    problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
    problem = problems[0]
    if any(p.blocks != problem.blocks for p in problems):
        raise expected(
            "the model at its several weights", "cut into the same blocks", [len(p.blocks) for p in problems]
        )
    rng = torch.Generator().manual_seed(seed)
    kept: list[Gradients] = []
    free = problem.memory / 2 if labels == "true" else 0.0
    sides: dict[str, tuple[_Side, _Side]] = {}
    shapes = {b.name: b.sides for b in problem.blocks}
    for rows, real in _passes(problems, labels, rng):
        free -= rows.numbers() * problem.dtype.itemsize
        if free > 0:
            kept.append(rows)
        for name, r in rows.rows.items():
            if isinstance(r, Written) and r.sides[2] > 1 and not r.rows.any():
                continue  # a layer that this batch does not use
            if name not in sides:
                sides[name] = _sides(r, shapes[name], limit, problem.device)
            _accumulate(*sides[name], r, real, len(rows))
        rows = r = None  # before the next ones are made
    for name in shapes.keys() - sides.keys():
        G, O, I = shapes[name]
        sides[name] = _Side(G, O, 0, problem.device), _Side(G, I, 0, problem.device)
    n = sum(len(p.train) for p in problems)
    bases = {name: (left.eigen(problem.dtype), right.eigen(problem.dtype)) for name, (left, right) in sides.items()}
    blocks, sums = {}, {}
    for name, ((left, ds), (right, da)) in bases.items():
        positions = (sides[name][0].count / n).view(-1, 1, 1)
        if sides[name][0].table:
            ds = ds / ds.sum().clamp(min=1e-300)
        kfac = positions * ds.unsqueeze(-1) * da.unsqueeze(-2)
        sums[name] = torch.zeros_like(kfac)
        blocks[name] = KroneckerBlock(left, right, kfac.to(problem.dtype), sums[name])
    rest = map(itemgetter(0), _passes(problems, labels, rng, skip=len(kept)))
    for rows in chain((kept.pop(0) for _ in range(len(kept))), rest):
        for name, r in rows.rows.items():
            sums[name] += _squares(blocks[name], r, len(rows))
        rows = r = None
    for name, ((left, ds), (right, da)) in bases.items():
        _settle(sums[name], left, ds)
        _settle(sums[name].mT, right, da)
    return {
        name: KroneckerBlock(b.left, b.right, b.kfac, (sums[name] / n).to(problem.dtype)) for name, b in blocks.items()
    }


def _settle(values: Tensor, basis: Basis, eigenvalues: Tensor) -> None:
    """Where eigenvalues vanish any basis serves: the corrected ones are averaged over it. values (G, d, other)."""
    start = 0
    for q in basis.pieces:
        for g in range(len(q)):
            d = eigenvalues[g, start : start + q.shape[1]]
            null = (d <= 1e-10 * eigenvalues.max()).nonzero()[:, 0] + start
            if len(null) > 1:
                values[g, null] = values[g, null].mean(0)
        start += q.shape[1]


class _Side:
    """The covariance of one side of a block, in diagonal pieces; their lower triangles."""

    def __init__(self, groups: int, width: int, limit: int, device: torch.device):
        self.count = torch.zeros(groups, dtype=torch.float64, device=device)
        self.table = False
        self.width = width
        whole = width <= 8 * limit
        widths = [min(limit, width - i) for i in range(0, width, limit)] if whole else []
        self.covariances = [torch.zeros(groups, w, w, dtype=torch.float64, device=device) for w in widths]
        self.diagonal = torch.zeros(groups, width, dtype=torch.float64, device=device)
        self._recent: list[Tensor] = []
        self._positions = 0

    def add(self, x: Tensor) -> None:
        """Add vectors x (G, m, d)."""
        if not self.covariances:
            self.diagonal += x.square().sum(1)
            return
        if not self._recent:
            self._recent = [c.new_zeros(c.shape, dtype=x.dtype) for c in self.covariances]
        for c, part in zip(self._recent, x.split([c.shape[1] for c in self.covariances], -1), strict=True):
            if c.shape[1] <= 2 * STRIPE:
                c.baddbmm_(part.mT, part)
                continue
            for one, p in zip(c, part, strict=True):
                for i in range(0, len(one), STRIPE):
                    one[i : i + STRIPE, : i + STRIPE].addmm_(p[:, i : i + STRIPE].T, p[:, : i + STRIPE])
        self._positions += x.shape[1]
        if self._positions >= POSITIONS:
            self._flush()

    def _flush(self) -> None:
        for c, recent in zip(self.covariances, self._recent, strict=False):
            c += recent
            recent.zero_()
        self._positions = 0

    def eigen(self, dtype: torch.dtype) -> tuple[Basis, Tensor]:
        """The basis and the eigenvalues of the mean, (G, d), not negative."""
        count = self.count.clamp(min=1).unsqueeze(1)
        if not self.covariances:
            empty = self.diagonal.new_zeros(0, self.width, 0, dtype=dtype)
            return Basis((empty,)), self.diagonal / count
        self._flush()
        found = [torch.linalg.eigh(c / count.unsqueeze(2)) for c in self.covariances]  # reads the lower triangle
        # Rows first in memory, as a file gives them back: a restored fit rounds alike.
        return Basis(tuple(q.to(dtype).contiguous() for _, q in found)), torch.cat([d for d, _ in found], -1).clamp(
            min=0
        )


def _passes(
    problems: Sequence[Problem], labels: Labels, rng: torch.Generator, skip: int = 0
) -> Iterator[tuple[Gradients, Tensor | None]]:
    """Rows of each batch and which positions are real, without the first few batches."""
    for problem in problems:
        for _, batch in problem.batches(what="Kronecker factors"):
            if skip > 0:
                skip -= 1
                continue
            real = problem.task.padding(batch)
            yield problem.loss_gradients(batch) if labels == "true" else problem.sampled_gradients(batch, rng), real


def _sides(rows: Rows, sides: tuple[int, int, int], limit: int, device: torch.device) -> tuple[_Side, _Side]:
    G, O, I = sides
    one_hot = not isinstance(rows, Factored) and I > 1  # a table: its rows are tokens, already an eigenbasis
    left = _Side(G, O, 0 if one_hot else limit, device)
    left.table = one_hot
    return left, _Side(G, I, limit, device)


def _accumulate(left: _Side, right: _Side, rows: Rows, real: Tensor | None, n: int) -> None:
    """Add a batch of n examples to the covariances of both sides, real positions only."""
    if isinstance(rows, Routed):  # 0 where there is no position
        G, _, _, _, O, I = rows.sizes
        left.add(rows.g.reshape(G, -1, O))
        right.add(rows.a.reshape(G, -1, I))
        count = (rows.positions >= 0).sum((1, 2))
    elif isinstance(rows, Factored):
        G, n, R, T, O, I = rows.sizes
        mask = _mask(real, n, T)
        g = rows.g.transpose(2, 3)  # (G, n, T, R, O)
        for some in _stretches(mask):
            left.add(g[some].reshape(G, -1, O))
            right.add(rows.a[some].reshape(G, -1, I))
        count = int(mask.sum())
    elif isinstance(rows, Lookup):
        mask = _mask(real, *rows.ids.shape)
        ids, g = rows.ids[mask], rows.g.transpose(0, 1)[:, mask]
        left.diagonal[0].index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))
        right.add(g.reshape(1, -1, g.shape[-1]))
        count = len(ids)
    else:
        for some in slices(n, left.width * right.width):
            written = rows[some].written()
            w = written.rows.view(-1, *written.sides)  # (n R, 1, O, I)
            if written.sides[2] == 1:
                left.add(w[:, 0, :, 0].unsqueeze(0))
                right.add(torch.ones_like(w[:, 0, :1]).view(1, -1, 1))
            else:
                left.diagonal[0] += w[:, 0].square().sum((0, 2))
                right.add(w.reshape(1, -1, w.shape[-1]))
        count = n
    left.count += count
    right.count += count


def _mask(real: Tensor | None, n: int, T: int) -> Tensor:
    """Which of the T positions of n examples are real; all of them where the task's positions are not these."""
    if real is None or T % real.shape[1]:
        return torch.ones(n, T, dtype=torch.bool, device=None if real is None else real.device)
    return real.repeat(1, T // real.shape[1])


def _stretches(mask: Tensor) -> Iterator[tuple[slice | Tensor, ...]]:
    """Indices of the real positions (n, T), for the axes (G, n, T).

    Long sequences padded on the right are taken one by one, as far as they go, so that nothing is copied.
    """
    T, every = mask.shape[1], slice(None)
    lengths = mask.sum(1, keepdim=True)
    if mask.all():
        yield every, every, every
    elif T < LONG or (mask != (torch.arange(T, device=mask.device) < lengths)).any():
        yield every, mask
    else:
        yield from ((every, slice(i, i + 1), slice(length)) for i, length in enumerate(lengths.flatten().tolist()))


def _squares(block: KroneckerBlock, rows: Rows, n: int) -> Tensor:
    """Sum over examples of the squared rows in the eigenbasis, (G, O, I), by the cheapest order for these shapes."""
    if isinstance(rows, Factored):
        G, n, R, T, O, I = rows.sizes
        if T == 1:
            r = block.rotate_rows(rows)
            a, g = r.a.reshape(G, n, I).square(), r.g.square().sum(2).view(G, n, O)  # type: ignore[union-attr]
            return (g.mT @ a).double()
        tokens = T * (O * O + I * I) < O * I * (O + I)
        if tokens:
            rows = Factored(block.right.to_basis(rows.a), block.left.to_basis(rows.g))
        step = min(n, max(1, CHUNK // (G * R * O * I)))
        total = rows.a.new_zeros(G, step, R, I, O)
        for i in range(0, n, step):
            w = rows.a[:, i : i + step].mT.unsqueeze(2) @ rows.g[:, i : i + step]  # (G, m, R, I, O)
            if not tokens:
                w = block.to_eigenbasis(w.permute(1, 2, 0, 4, 3).reshape(-1, G, O, I))
                w = w.reshape(-1, R, G, O, I).permute(2, 0, 1, 4, 3)
            total[:, : w.shape[1]].addcmul_(w, w)
        return total.sum((1, 2)).mT.double()
    if isinstance(rows, Lookup):  # uses of one token within an example are summed before squaring
        r = block.rotate_rows(rows)
        n, R, T, d = r.g.shape  # type: ignore[union-attr]
        key = rows.ids + torch.arange(n, device=rows.ids.device).unsqueeze(1) * rows.size
        uses, where = key.flatten().unique(return_inverse=True)
        sums = r.g.new_zeros(R, len(uses), d).index_add_(1, where, r.g.transpose(0, 1).reshape(R, n * T, d))  # type: ignore[union-attr]
        total = sums.new_zeros(rows.size, d, dtype=torch.float64)
        return total.index_add_(0, uses % rows.size, sums.square().sum(0).double()).unsqueeze(0)
    total = torch.zeros_like(block.ekfac)
    for some in slices(n, total.numel()):
        written = rows[some].written()
        total += block.to_eigenbasis(written.rows.reshape(-1, *written.sides)).square().sum(0)
    return total
