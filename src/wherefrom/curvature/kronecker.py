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
from dataclasses import dataclass
from itertools import chain
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
WIDEST = 8  # blocks that a side may be split into; a wider one is left diagonal
VANISHING = 1e-10  # an eigenvalue, relative to the largest, below which any basis serves


def fit(
    problems: Problem | Sequence[Problem], labels: Labels = "sampled", seed: int = 0, limit: int = 4096
) -> dict[str, KroneckerBlock]:
    """Make two passes over the training data: covariances, then corrected eigenvalues with fresh labels.

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
        counts = [len(p.blocks) for p in problems]
        raise expected("the model at its several weights", "cut into the same blocks", counts)

    rng = torch.Generator().manual_seed(seed)
    sides, reused = _accumulate_covariances(problems, labels, rng, limit)
    examples = sum(len(p.train) for p in problems)
    bases = {name: _decompose(*pair, examples, problem.dtype) for name, pair in sides.items()}

    # The second pass sees labels of its own: eigenvalues corrected on the draw that made the basis would be too large.
    later = (rows for rows, _ in _make_rows(problems, labels, rng, skip=len(reused)))
    sums = {name: torch.zeros_like(basis.kfac, dtype=torch.float64) for name, basis in bases.items()}
    for rows in chain(_drain(reused), later):
        for name, r in rows.rows.items():
            sums[name] += _sum_squares(bases[name], r, len(rows))
        rows = r = None  # frees them before the next ones are made

    factors = {}
    for name, basis in bases.items():
        _average_over_null_space(sums[name], basis.left, basis.output_eigenvalues)
        _average_over_null_space(sums[name].mT, basis.right, basis.input_eigenvalues)
        corrected = (sums[name] / examples).to(problem.dtype)
        factors[name] = KroneckerBlock(basis.left, basis.right, basis.kfac, corrected)
    return factors


@dataclass(frozen=True, eq=False)
class _BlockBasis(KroneckerBlock):
    """A block's eigenbasis before its eigenvalues are corrected; ``ekfac`` stands for nothing yet.

    Args:
        output_eigenvalues: of S, (G, O) float64.
        input_eigenvalues: of A, (G, I) float64.
    """

    output_eigenvalues: Tensor
    input_eigenvalues: Tensor


def _accumulate_covariances(
    problems: Sequence[Problem], labels: Labels, rng: torch.Generator, limit: int
) -> tuple[dict[str, tuple[_Side, _Side]], list[Gradients]]:
    """Make the first pass.

    Returns:
        The covariances of both sides of every block; and the rows of the first batches, where the second pass may use
        them again.
    """
    problem = problems[0]
    shapes = {block.name: block.sides for block in problem.blocks}
    sides: dict[str, tuple[_Side, _Side]] = {}
    reused: list[Gradients] = []
    # With sampled labels the second pass draws fresh ones, and no row can be used twice.
    free = problem.memory / 2 if labels == "true" else 0.0
    for rows, real in _make_rows(problems, labels, rng):
        free -= rows.numbers() * problem.dtype.itemsize
        if free > 0:
            reused.append(rows)
        for name, r in rows.rows.items():
            if isinstance(r, Written) and r.sides[2] > 1 and not r.rows.any():
                continue  # a layer that this batch does not use
            if name not in sides:
                sides[name] = _start_sides(r, shapes[name], limit, problem.device)
            _accumulate(*sides[name], r, real, len(rows))
        rows = r = None  # frees them before the next ones are made

    for name in shapes.keys() - sides.keys():  # layers that no batch used
        G, O, I = shapes[name]
        sides[name] = _Side(G, O, 0, problem.device), _Side(G, I, 0, problem.device)
    return {name: sides[name] for name in shapes}, reused


def _decompose(left: _Side, right: _Side, examples: int, dtype: torch.dtype) -> _BlockBasis:
    """Decompose both covariances of a block, and multiply their eigenvalues as KFAC does."""
    output_basis, output_eigenvalues = left.decompose(dtype)
    input_basis, input_eigenvalues = right.decompose(dtype)
    if left.is_table:  # how often each token occurs; of one position, some token's share is 1
        output_eigenvalues = output_eigenvalues / output_eigenvalues.sum().clamp(min=1e-300)
    positions = (left.count / examples).view(-1, 1, 1)  # T, the mean for each example
    kfac = positions * output_eigenvalues.unsqueeze(-1) * input_eigenvalues.unsqueeze(-2)
    kfac = kfac.to(dtype)
    return _BlockBasis(output_basis, input_basis, kfac, kfac, output_eigenvalues, input_eigenvalues)


def _average_over_null_space(values: Tensor, basis: Basis, eigenvalues: Tensor) -> None:
    """Average corrected eigenvalues, in place, where the eigenvalues of a side vanish: there any basis serves.

    Args:
        values: (G, d, other), d the side.
        basis: of the side.
        eigenvalues: of its covariance, (G, d).
    """
    start = 0
    for q in basis.pieces:
        for g in range(len(q)):
            mine = eigenvalues[g, start : start + q.shape[1]]
            null = (mine <= VANISHING * eigenvalues.max()).nonzero()[:, 0] + start
            if len(null) > 1:
                values[g, null] = values[g, null].mean(0)
        start += q.shape[1]


class _Side:
    """The covariance of one side of a block, in diagonal pieces, of which the lower triangles are filled.

    Args:
        groups: G.
        width: d.
        limit: of a piece; 0 keeps the diagonal alone.
        device: where it is kept.
    """

    def __init__(self, groups: int, width: int, limit: int, device: torch.device):
        self.count = torch.zeros(groups, dtype=torch.float64, device=device)
        self.is_table = False
        self.width = width
        widths = []
        if width <= WIDEST * limit:
            widths = [min(limit, width - i) for i in range(0, width, limit)]
        self.covariances = [torch.zeros(groups, w, w, dtype=torch.float64, device=device) for w in widths]
        self.diagonal = torch.zeros(groups, width, dtype=torch.float64, device=device)
        # Products are summed in the model's dtype for some positions, and these sums in float64.
        self._recent: list[Tensor] = []
        self._positions = 0

    def add(self, x: Tensor) -> None:
        """Add vectors x (G, m, d)."""
        if not self.covariances:
            self.diagonal += x.square().sum(1)
            return
        if not self._recent:
            self._recent = [c.new_zeros(c.shape, dtype=x.dtype) for c in self.covariances]

        parts = x.split([c.shape[1] for c in self.covariances], -1)
        for recent, part in zip(self._recent, parts, strict=True):
            if recent.shape[1] <= 2 * STRIPE:
                recent.baddbmm_(part.mT, part)
            else:
                for matrix, vectors in zip(recent, part, strict=True):
                    _add_lower_triangle(matrix, vectors)

        self._positions += x.shape[1]
        if self._positions >= POSITIONS:
            self._flush()

    def _flush(self) -> None:
        for covariance, recent in zip(self.covariances, self._recent, strict=False):
            covariance += recent
            recent.zero_()
        self._positions = 0

    def decompose(self, dtype: torch.dtype) -> tuple[Basis, Tensor]:
        """Return the eigenbasis, and the eigenvalues of the mean, (G, d), not negative."""
        count = self.count.clamp(min=1).unsqueeze(1)
        if not self.covariances:
            nothing = self.diagonal.new_zeros(0, self.width, 0, dtype=dtype)
            return Basis((nothing,)), self.diagonal / count

        self._flush()
        values, vectors = [], []
        for covariance in self.covariances:
            piece_values, piece_vectors = torch.linalg.eigh(covariance / count.unsqueeze(2))  # reads the lower triangle
            values.append(piece_values)
            # Rows first in memory, as a file gives them back: a restored fit rounds alike.
            vectors.append(piece_vectors.to(dtype).contiguous())
        return Basis(tuple(vectors)), torch.cat(values, -1).clamp(min=0)


def _add_lower_triangle(matrix: Tensor, x: Tensor) -> None:
    """Add x^T x, x (m, d), to a matrix (d, d), stripe by stripe, without most of what is above the diagonal."""
    for i in range(0, len(matrix), STRIPE):
        matrix[i : i + STRIPE, : i + STRIPE].addmm_(x[:, i : i + STRIPE].T, x[:, : i + STRIPE])


def _drain(rows: list[Gradients]) -> Iterator[Gradients]:
    """Yield what a list holds and forget it, so that it is freed one by one."""
    while rows:
        yield rows.pop(0)


def _make_rows(
    problems: Sequence[Problem], labels: Labels, rng: torch.Generator, skip: int = 0
) -> Iterator[tuple[Gradients, Tensor | None]]:
    """Yield the rows of each batch and which of its positions are real, without the first few batches."""
    for problem in problems:
        for _, batch in problem.batches(what="Kronecker factors"):
            if skip > 0:
                skip -= 1
                continue
            rows = problem.loss_gradients(batch) if labels == "true" else problem.sampled_gradients(batch, rng)
            yield rows, problem.task.padding(batch)


def _start_sides(rows: Rows, sides: tuple[int, int, int], limit: int, device: torch.device) -> tuple[_Side, _Side]:
    G, O, I = sides
    # A table: its rows are tokens, which are an eigenbasis already.
    is_table = not isinstance(rows, Factored) and I > 1
    left = _Side(G, O, 0 if is_table else limit, device)
    left.is_table = is_table
    return left, _Side(G, I, limit, device)


def _accumulate(left: _Side, right: _Side, rows: Rows, real: Tensor | None, n: int) -> None:
    """Add a batch of n examples to the covariances of both sides, real positions only."""
    if isinstance(rows, Routed):
        G, _, _, _, O, I = rows.sizes
        # Vectors are 0 where a group has no position, and add nothing.
        left.add(rows.g.reshape(G, -1, O))
        right.add(rows.a.reshape(G, -1, I))
        count = (rows.positions >= 0).sum((1, 2))
    elif isinstance(rows, Factored):
        count = _accumulate_factored(left, right, rows, real)
    elif isinstance(rows, Lookup):
        mask = _mask(real, *rows.ids.shape)
        ids, g = rows.ids[mask], rows.g.transpose(0, 1)[:, mask]
        # The inputs of a table are tokens, one-hot: their covariance counts how often each occurs.
        left.diagonal[0].index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))
        right.add(g.reshape(1, -1, g.shape[-1]))
        count = len(ids)
    else:
        for some in slices(n, left.width * right.width):
            _accumulate_written(left, right, rows[some].written())
        count = n
    left.count += count
    right.count += count


def _accumulate_factored(left: _Side, right: _Side, rows: Factored, real: Tensor | None) -> int:
    """Add the cotangents and inputs of every real position; return how many positions there are."""
    G, n, _, T, O, I = rows.sizes
    mask = _mask(real, n, T)
    g = rows.g.transpose(2, 3)  # (G, n, T, R, O)
    for some in _stretches(mask):
        left.add(g[some].reshape(G, -1, O))
        right.add(rows.a[some].reshape(G, -1, I))
    return int(mask.sum())


def _accumulate_written(left: _Side, right: _Side, written: Written) -> None:
    """Add rows without a Kronecker form."""
    w = written.rows.view(-1, *written.sides)  # (n R, 1, O, I)
    if written.sides[2] == 1:  # loose numbers: one side is all there is
        left.add(w[:, 0, :, 0].unsqueeze(0))
        right.add(torch.ones_like(w[:, 0, :1]).view(1, -1, 1))
    else:
        left.diagonal[0] += w[:, 0].square().sum((0, 2))
        right.add(w.reshape(1, -1, w.shape[-1]))


def _mask(real: Tensor | None, n: int, T: int) -> Tensor:
    """Tell which of the T positions of n examples are real; all of them where the task's positions are not these."""
    if real is None or T % real.shape[1]:
        return torch.ones(n, T, dtype=torch.bool, device=None if real is None else real.device)
    return real.repeat(1, T // real.shape[1])


def _stretches(mask: Tensor) -> Iterator[tuple[slice | Tensor, ...]]:
    """Yield indices of the real positions (n, T), for the axes (G, n, T).

    Long sequences padded on the right are taken one by one, as far as they go, so that nothing is copied.
    """
    T, every = mask.shape[1], slice(None)
    lengths = mask.sum(1, keepdim=True)
    if mask.all():
        yield every, every, every
    elif T < LONG or (mask != (torch.arange(T, device=mask.device) < lengths)).any():
        yield every, mask
    else:
        for i, length in enumerate(lengths.flatten().tolist()):
            yield every, slice(i, i + 1), slice(length)


def _sum_squares(block: KroneckerBlock, rows: Rows, n: int) -> Tensor:
    """Sum over examples the squared rows in the eigenbasis: (G, O, I) float64."""
    if isinstance(rows, Factored):
        return _sum_squares_factored(block, rows)
    if isinstance(rows, Lookup):
        return _sum_squares_lookup(block, rows)
    total = torch.zeros_like(block.kfac, dtype=torch.float64)
    for some in slices(n, total.numel()):
        written = rows[some].written()
        total += block.to_eigenbasis(written.rows.reshape(-1, *written.sides)).square().sum(0)
    return total


def _sum_squares_factored(block: KroneckerBlock, rows: Factored) -> Tensor:
    """Sum the squares by the order of operations that is cheapest for these shapes."""
    G, n, R, T, O, I = rows.sizes
    if T == 1:
        # A row is one outer product, whose squares are the outer product of squares: it is never formed.
        inputs = block.right.to_basis(rows.a).reshape(G, n, I).square()
        cotangents = block.left.to_basis(rows.g).square().sum(2).view(G, n, O)
        return (cotangents.mT @ inputs).double()

    # Either every position is rotated before the row is formed, or the row after it.
    rotate_positions = T * (O * O + I * I) < O * I * (O + I)
    if rotate_positions:
        rows = Factored(block.right.to_basis(rows.a), block.left.to_basis(rows.g))
    step = min(n, max(1, CHUNK // (G * R * O * I)))
    total = rows.a.new_zeros(G, step, R, I, O)
    for i in range(0, n, step):
        w = rows.a[:, i : i + step].mT.unsqueeze(2) @ rows.g[:, i : i + step]  # (G, m, R, I, O)
        if not rotate_positions:
            w = block.to_eigenbasis(w.permute(1, 2, 0, 4, 3).reshape(-1, G, O, I))
            w = w.reshape(-1, R, G, O, I).permute(2, 0, 1, 4, 3)
        total[:, : w.shape[1]].addcmul_(w, w)
    return total.sum((1, 2)).mT.double()


def _sum_squares_lookup(block: KroneckerBlock, rows: Lookup) -> Tensor:
    """Sum the squares of a table's rows; uses of one token within an example are summed before squaring."""
    n, R, T, d = rows.g.shape
    g = block.right.to_basis(rows.g.unsqueeze(0))[0]
    example = torch.arange(n, device=rows.ids.device).unsqueeze(1)
    keys = (rows.ids + example * rows.size).flatten()  # one for each pair of an example and a token
    used, place = keys.unique(return_inverse=True)
    sums = g.new_zeros(R, len(used), d).index_add_(1, place, g.transpose(0, 1).reshape(R, n * T, d))
    total = sums.new_zeros(rows.size, d, dtype=torch.float64)
    return total.index_add_(0, used % rows.size, sums.square().sum(0).double()).unsqueeze(0)
