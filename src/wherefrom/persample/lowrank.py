"""Directions as products of two thin matrices: what many queries need little memory for (Grosse et al. 2023, 3.2.2).

    V ~ L R,    L (O, r), R (r, I):    <V, sum_t g_t a_t^T> = sum_t (L^T g_t) . (R a_t)

r (O + I) numbers instead of O I for each query and block. The best L R is what the singular value decomposition keeps,
found here by a randomised one with power iterations (Halko et al. 2011, algorithm 4.4); the error left is measured. A
contraction with rows goes through the thin matrices, or writes V out for some queries at a time, whichever is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.persample.factored import CHUNK, MEMORY_COST, ROWS, Factored
from wherefrom.persample.rows import Lookup, Rows, Several, join

LIMIT = 32  # highest rank that a share of the energy asks for
OVERSAMPLED, POWERS = 8, 2
TILE = 2**25  # numbers of matrices written out at a time


@dataclass(frozen=True)
class LowRank:
    """Q directions of a block.

    Args:
        left: L, (Q, G, O, r).
        right: R, (Q, G, r, I).
    """

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        """Count the directions, Q."""
        return len(self.left)

    def __getitem__(self, index: slice) -> LowRank:
        """Take some of the directions."""
        return LowRank(self.left[index], self.right[index])

    def numbers(self) -> int:
        """Count the numbers that are stored."""
        return self.left.numel() + self.right.numel()

    def write(self) -> Tensor:
        """Write the matrices V out, (Q, G, O, I)."""
        return self.left @ self.right

    def dot(self, rows: Rows) -> Tensor:
        """Compute inner products with every row: (Q, n, R)."""
        if isinstance(rows, Several):
            return torch.stack([self.dot(part) for part in rows.parts]).sum(0)
        Q, G, O, r = self.left.shape
        if isinstance(rows, Lookup) or (isinstance(rows, Factored) and self._is_cheaper_thin(rows)):
            R, T = rows.g.shape[-3:-1]
            m = max(1, ROWS // T)
            k = max(1, CHUNK // (G * m * T * r * (1 + R)))
            products = [self[j : j + k]._contract_thin(rows, m) for j in range(0, Q, k)]
        else:
            k = max(1, TILE // (G * O * self.right.shape[3]))
            products = [rows.dot(self[j : j + k].write()) for j in range(0, Q, k)]
        return torch.cat(products)

    def _is_cheaper_thin(self, rows: Factored) -> bool:
        """Whether the thin matrices cost less than V written out for this batch, per example and direction."""
        _, n, R, T, O, I = rows.sizes
        Q, r = len(self), self.left.shape[3]
        thin = T * r * (I + R * O) + MEMORY_COST * T * r * (1 + R)
        matrix = O * I * (min(T, 1 + (T + MEMORY_COST) / Q) * R + (r + MEMORY_COST) / n)
        return thin < matrix

    def _contract_thin(self, rows: Factored | Lookup, m: int) -> Tensor:
        """Contract by L^T g and R a, m examples at a time: (Q, n, R)."""
        if isinstance(rows, Lookup):
            return torch.cat([self._contract_lookup(rows[i : i + m]) for i in range(0, len(rows.ids), m)], 1)
        return torch.cat([self._contract_factored(rows[i : i + m]) for i in range(0, rows.a.shape[1], m)], 1)

    def _contract_factored(self, rows: Factored) -> Tensor:
        G, n, R, T, O, I = rows.sizes
        Q, r = len(self), self.left.shape[3]
        left, right = (t.transpose(0, 1).reshape(G, Q * r, -1).mT for t in (self.left.mT, self.right))
        a = (rows.a.reshape(G, n * T, I) @ right.to(rows.a.dtype)).view(G, n, 1, T, Q, r)
        g = (rows.g.reshape(G, n * R * T, O) @ left.to(rows.g.dtype)).view(G, n, R, T, Q, r)
        return (g * a).sum((0, 3, 5)).permute(2, 0, 1)

    def _contract_lookup(self, rows: Lookup) -> Tensor:
        n, R, T, d = rows.g.shape
        Q, r = len(self), self.left.shape[3]
        g = (rows.g.reshape(n * R * T, d) @ self.right.reshape(Q * r, d).mT.to(rows.g.dtype)).view(n, R, T, Q, r)
        a = self.left[:, 0, rows.ids.flatten()].view(Q, n, T, r).permute(1, 2, 0, 3)  # the rows of the tokens
        return (g * a.unsqueeze(1)).sum((2, 4)).permute(2, 0, 1)


Form = Tensor | LowRank  # Q matrices (Q, G, O, I), or as products


def write(v: Form) -> Tensor:
    """Write Q matrices out, (Q, G, O, I)."""
    return v.write() if isinstance(v, LowRank) else v


def check_rank(rank: float) -> None:
    """Refuse what is no rank.

    Raises:
        InputError: if it is neither a positive integer nor a share of the energy between 0 and 1.
    """
    whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool)
    if not (rank >= 1 if whole else isinstance(rank, float) and 0 < rank < 1):
        raise expected("rank", "a positive integer, or a share of the energy between 0 and 1", repr(rank))


def truncate(v: Tensor, rank: float) -> tuple[Form, Tensor]:
    """Cut each matrix to a low rank, and say how much of it was dropped.

    Args:
        v: (Q, G, O, I).
        rank: an integer; or in (0, 1) the share of each matrix's energy (squared norm) to keep, by rank 32 at most.

    Returns:
        The directions, v itself where products would take no fewer numbers; |V - L R|^2 of each query, (Q,) float64.
    """
    share, most = (None, int(rank)) if rank >= 1 else (rank, LIMIT)
    Q, _, O, I = v.shape
    if most * (O + I) >= O * I:
        return v, torch.zeros(Q, dtype=torch.float64, device=v.device)
    u, s, w = _leading_singular(v, most + OVERSAMPLED)
    u, s, w = u[..., :most], s[..., :most], w[..., :most, :]
    if share is not None:
        energy = s.double().square().cumsum(-1)  # (Q, G, r), of the first 1..r values
        enough = energy >= share * v.double().square().sum((2, 3)).unsqueeze(-1)  # (Q, G, r)
        ranks = (~enough).sum(-1, keepdim=True) + 1  # most + 1 if even that is too little
        s = s.where(torch.arange(most, device=s.device) < ranks, 0.0)
        most = min(most, int(ranks.max()))
    low = LowRank((u * s.unsqueeze(-2))[..., :most].contiguous(), w[..., :most, :].contiguous())
    return low, torch.stack([_square_norm(v[q] - low[q : q + 1].write()[0]) for q in range(Q)])


def concatenate(parts: Sequence[Form]) -> Form:
    """Put the matrices of all parts one after another; ranks are padded with zeros to the highest."""
    low = [p for p in parts if isinstance(p, LowRank)]
    if len(low) < len(parts):
        return torch.cat([write(p) for p in parts])
    return LowRank(join([p.left for p in low], 0), join([p.right for p in low], 0))


def _leading_singular(v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the leading singular vectors and values of matrices (..., O, I): nearly; exactly at the rank of a side."""
    rank = min(rank, *v.shape[-2:])
    rng = torch.Generator().manual_seed(0)
    test = torch.randn(v.shape[-1], rank, generator=rng, dtype=torch.float64).to(v)
    q = torch.linalg.qr(v @ test).Q
    for _ in range(POWERS):
        q = torch.linalg.qr(v @ torch.linalg.qr(v.mT @ q).Q).Q
    u, s, w = torch.linalg.svd(q.mT @ v, full_matrices=False)
    return q @ u, s, w


def _square_norm(v: Tensor) -> Tensor:
    return v.double().square().sum()
