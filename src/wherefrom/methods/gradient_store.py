"""A store of randomly projected gradients on disk: built in one pass over the training set, then asked in milliseconds.

    score(q, z) = x^T g ~ (S W x)^T (S W g),                                           S: a count sketch into k numbers

    EKFAC, KFAC   x, g = (Lambda + damping)^-1/2 Q^T (grad f, grad l)                  the same on both sides
    any other     x = (C + damping)^-1 grad f,  g = grad l,  W = I                     one store serves all of them

S adds each of the D coordinates, with a random sign, to one of k numbers (Charikar et al. 2002). Over seeds that has
the mean x^T W^2 g and, of u = W x and v = W g, the variance (|u|^2 |v|^2 + (u^T v)^2 - 2 sum_i u_i^2 v_i^2) / k. EKFAC
expects squared coordinates e = Lambda / (Lambda + damping) of x and of g: many, and seldom small. So W shrinks them,
and drops those that would add more noise than they tell; the expected squared error is least with

    W^2 = max(0, 1 - tau / e),        sum_i max(0, e_i - tau) = k tau,

and W -> I as k grows. Of b = S W g only the signs are kept, a bit a number, and their size |b|^2 / |b|_1, with which
they have no bias where b is normal. Against b in 8 bits, the variance is pi / 2 times and the bytes are an eighth.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wherefrom import records
from wherefrom.digest import digest
from wherefrom.methods.influence import GIVEN, FittedInfluence
from wherefrom.methods.stream import Measurement
from wherefrom.persample.factored import Written, slices
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.rows import Lookup, Rows, Several
from wherefrom.scores import Certificate, Scores
from wherefrom.solvers.base import Inverse, require_positive
from wherefrom.store import Shards
from wherefrom.surroundings import undisturbed

SHARD = 1024  # training examples in one file


@dataclass(frozen=True)
class Sketch:
    """S W, after a turn into an eigenbasis.

    Args:
        size: k.
        buckets: block name to the number that each coordinate is added to, (G O I,) int32.
        factors: block name to what each coordinate is multiplied with, (G O I,).
        root: whose eigenbasis the coordinates are in, and whose root is among their factors; None: gradients as they
            are.
    """

    size: int
    buckets: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    root: Inverse | None

    @classmethod
    def of(cls, inverse: Inverse, size: int, seed: int) -> Sketch:
        """Draw from a seed; with the root of the inverse where it has one."""
        problem = inverse.curvature.problem
        buckets, factors = {}, {}
        # An inverse that is a division in some basis has a root there, which both sides of a score can share.
        root = inverse if inverse.scoring_basis else None
        weights = _shrink(root, size) if root else {}
        for block in problem.blocks:
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{block.name}".encode()))
            # One draw gives both: its lowest bit the sign, the others the bucket.
            draw = torch.randint(2 * size, (block.size,), generator=rng, dtype=torch.int32).to(problem.device)
            sign = (draw % 2 * 2 - 1).to(problem.dtype)
            buckets[block.name] = draw // 2
            factors[block.name] = sign * weights.get(block.name, 1.0)
        return cls(size, buckets, factors, root)

    def __call__(self, gradients: Gradients) -> Tensor:
        """Sketch n gradients, R = 1: (n, k)."""
        basis = self.root.scoring_basis if self.root else {}
        rotated = gradients.map(lambda name, rows: basis[name].rotate_rows(rows) if name in basis else rows)
        out = next(iter(self.factors.values())).new_zeros(len(gradients), self.size)
        for name, rows in rotated.rows.items():
            self._add(out, rows, self.buckets[name].long(), self.factors[name])
        return out

    def _add(self, out: Tensor, rows: Rows, buckets: Tensor, factors: Tensor) -> None:
        """Add the coordinates of a block's rows to the buckets that they belong to."""
        if isinstance(rows, Several):
            for part in rows.parts:
                self._add(out, part, buckets, factors)
        elif isinstance(rows, Lookup):  # a table is never written out
            own_buckets = buckets.view(rows.size, -1)[rows.ids]  # (n, T, d), of the rows of the tokens
            own_factors = factors.view(rows.size, -1)[rows.ids]  # (n, T, d)
            out.scatter_add_(1, own_buckets.flatten(1), (own_factors * rows.g[:, 0]).flatten(1))
        else:
            for some in slices(len(out), len(buckets)):
                dense = rows[some].written().rows[:, 0]  # (m, G O I)
                out[some].scatter_add_(1, buckets.expand_as(dense), dense * factors)


@dataclass(frozen=True)
class GradientStore:
    """Approximate scores of all training examples in milliseconds; made by `build`, which also opens a built one.

    Args:
        influence: what is approximated.
        sketch: the projection.
        pieces: the training examples' sketches, in order, as `pack_signs` packs them.
    """

    influence: FittedInfluence
    sketch: Sketch
    pieces: tuple[dict[str, Tensor], ...]

    @classmethod
    @undisturbed()
    def build(cls, influence: FittedInfluence, folder: str | Path, size: int = 16384, seed: int = 0) -> GradientStore:
        """Sketch every training example in one pass, or read what lies in the folder; a killed call goes on.

        Args:
            influence: fitted. With EKFAC or KFAC the store is of this fit alone; with any other solver it is of the
                model, the data and the parameters, and serves every solver and damping.
            folder: where about N k / 8 bytes are kept, in files of 1,024 examples.
            size: k, bits kept of each example.
            seed: of the projection.

        Raises:
            ArtefactError: if a file is damaged, or the folder was filled for another model, data set, fit, size or
                seed, by name of what differs.
        """
        require_positive(size=size)
        problem, inverse = influence.problem, influence.inverse
        sketch = Sketch.of(inverse, size, seed)
        root: dict[str, Any] = {"root": None}
        if sketch.root:
            root = {"root": digest(records.describe(inverse, GIVEN)[0]), "lambda": dict(inverse.damping)}
        shards = Shards(folder, "gradients", problem.fingerprint() | root | {"size": size, "seed": seed})

        def sketch_shard(start: int) -> dict[str, Tensor]:
            some = problem.train.subset(torch.arange(start, min(start + SHARD, len(problem.train))))
            batches = problem.batches(some, f"gradient store, from example {start}")
            parts = [pack_signs(sketch(problem.loss_gradients(batch))) for _, batch in batches]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        pieces: list[dict[str, Tensor]] = []
        for start in range(0, len(problem.train), SHARD):
            count = min(SHARD, len(problem.train) - start)
            shapes = {"signs": (count, (size + 7) // 8), "sizes": (count,)}
            pieces.append(shards.made(start, lambda s=start: sketch_shard(s), shapes, {"signs": torch.uint8}))
        return cls(influence, sketch, tuple(pieces))

    @undisturbed()
    def score(self, queries: Any, measurement: Measurement | None = None) -> Scores:
        """Approximate scores of all N training examples on Q queries; no example is looked at.

        Args:
            queries, measurement: as for `Influence.score`.

        Returns:
            `Scores` (Q, N) without a residual. ``provenance["measured"]["sketch noise"]`` is the share of their
            variance over the examples that the projection adds, the median over queries: near 1 they say nothing.
        """
        start = time.perf_counter()
        asked, converged = self._sketch_queries(self.influence.query_gradients(queries, measurement))
        asking = time.perf_counter()
        sizes = torch.cat([piece["sizes"] for piece in self.pieces]).to(asked)
        values = torch.cat([multiply_signs(asked, piece["signs"]) for piece in self.pieces], 1) * sizes
        spent = {"queries": asking - start, "scores": time.perf_counter() - asking}
        noise = asked.square().sum(1) * sizes.square().mean() / values.var(1)
        measured = {"sketch noise": float(noise.nanmedian())}
        about = {"bits": self.sketch.size, "seconds": spent, "measured": measured}
        certificate = Certificate(None, converged, row_error=self.influence.problem.row_error)
        return Scores(values, certificate, self.influence.provenance() | about)

    def _sketch_queries(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return the sketches of Q queries, (Q, k), and which of their solves converged."""
        if self.sketch.root:
            return self.sketch(rows), torch.ones(len(rows), dtype=torch.bool)
        x, certificate = self.influence.inverse.solve(rows.to_directions(), certify=False)
        solutions = x.dense().tensors()
        written = {b.name: Written(solutions[b.name].flatten(1).unsqueeze(1), b.sides) for b in rows.blocks}
        return self.sketch(rows.map(lambda name, _: written[name])), certificate.converged


def pack_signs(rows: Tensor) -> dict[str, Tensor]:
    """Pack n sketches b, (n, k): "signs" (n, k / 8) uint8, a bit each, and "sizes" |b|^2 / |b|_1, (n,)."""
    rows = rows.cpu()
    signs = torch.from_numpy(np.packbits((rows > 0).numpy(), axis=1))
    return {"signs": signs, "sizes": rows.square().sum(1) / rows.abs().sum(1).clamp(min=1e-30)}


def multiply_signs(asked: Tensor, signs: Tensor) -> Tensor:
    """Compute the inner products of Q sketches (Q, k) with the packed signs of n examples: (Q, n)."""
    k = asked.shape[1]
    parts = []
    for some in slices(len(signs), k):
        bits = torch.from_numpy(np.unpackbits(signs[some].numpy(), axis=1, count=k))
        # A sign is 2 bit - 1, so the product with signs is twice that with bits, less the sum.
        parts.append(2 * asked @ bits.to(asked).T - asked.sum(1, keepdim=True))
    return torch.cat(parts, 1)


def _shrink(inverse: Inverse, size: int) -> dict[str, Tensor]:
    """Return W (Lambda + damping)^-1/2 of each block, (G O I,)."""
    damped = {name: (inverse.eigenvalues(name) + inverse.damping[name]).flatten() for name in inverse.scoring_basis}
    shares = {name: inverse.scoring_basis[name].ekfac.flatten() / d for name, d in damped.items()}
    tau = _find_threshold([*shares.values()], size)

    factors = {}
    for name, e in shares.items():
        squared = (e - tau).clamp(min=0) / e.clamp(min=1e-30)  # W^2
        factors[name] = (squared / damped[name]).sqrt()
    return factors


def _find_threshold(shares: Sequence[Tensor], size: int) -> float:
    """Find tau with sum_i max(0, e_i - tau) = k tau, by bisection, to 1e-9 of the largest e."""
    low, high = 0.0, max(float(e.max()) for e in shares)
    for _ in range(30):
        tau = (low + high) / 2
        above = sum(float((e - tau).clamp(min=0).sum(dtype=torch.float64)) for e in shares)
        low, high = (tau, high) if above > size * tau else (low, tau)
    return high
