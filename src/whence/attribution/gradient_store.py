"""A store of randomly projected gradients on disk: built in one pass over the training set, then asked in milliseconds.

    score(q, z) = x^T g ~ (S x)^T (S g),      S a count sketch into k numbers, E[S^T S] = I    (Charikar et al. 2002)

    EKFAC, KFAC   x, g = (Lambda + damping)^-1/2 Q^T (grad f, grad l)       the same root of the inverse on both sides
    any other     x = (C + damping)^-1 grad f,  g = grad l                  so that one store serves all of them

Each of the D coordinates is added, with a random sign, to one of k numbers. Over seeds the estimate has no bias and

    variance = (|x|^2 |g|^2 + (x^T g)^2 - 2 sum_i x_i^2 g_i^2) / k,

so that the root on both sides, which makes |x| |g| least on average, is worth much. What is stored is rounded to a byte
a number, with a scale for each example: an error of 1% of the sketch's own where k << D.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.attribution.influence import Influence
from whence.attribution.scores import Scores
from whence.attribution.stream import Measurement
from whence.data import digest
from whence.factored import Written, slices
from whence.gradients import Gradients
from whence.rows import Lookup, Rows, Several
from whence.solvers.base import Inverse, positive
from whence.solvers.kronecker import EigenInverse
from whence.store import Shards

SHARD = 1024  # training examples in one file


@dataclass(frozen=True)
class Sketch:
    """S, after a turn of the coordinates and a factor on each.

    Args:
        size: k.
        buckets: block name to the number that each coordinate is added to, (G O I,) int32.
        factors: block name to the sign of each coordinate times its scale, (G O I,).
        root: whose eigenbasis the coordinates are in, with the root of its inverse as their scale; None: gradients
            as they are.
    """

    size: int
    buckets: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    root: EigenInverse | None

    @classmethod
    def of(cls, inverse: Inverse, size: int, seed: int) -> Sketch:
        """Drawn from a seed; with the root of the inverse where it has one."""
        root = inverse if isinstance(inverse, EigenInverse) else None
        problem, buckets, factors = inverse.curvature.problem, {}, {}
        for block in problem.blocks:
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{block.name}".encode()))
            drawn = torch.randint(2 * size, (block.size,), generator=rng, dtype=torch.int32).to(problem.device)
            sign = (drawn % 2 * 2 - 1).to(problem.dtype)
            buckets[block.name] = drawn // 2
            factors[block.name] = sign if root is None else sign * root.denominators(block.name).rsqrt().flatten()
        return cls(size, buckets, factors, root)

    def __call__(self, gradients: Gradients) -> Tensor:
        """The sketches of n gradients, R = 1: (n, k)."""
        turned = gradients if self.root is None else self.root.turned(gradients)
        out = next(iter(self.factors.values())).new_zeros(len(gradients), self.size)
        for name, rows in turned.rows.items():
            self._add(out, rows, self.buckets[name].long(), self.factors[name])
        return out

    def _add(self, out: Tensor, rows: Rows, buckets: Tensor, factors: Tensor) -> None:
        if isinstance(rows, Several):
            for part in rows.parts:
                self._add(out, part, buckets, factors)
        elif isinstance(rows, Lookup):  # a table is never written out
            at, by = (t.view(rows.size, -1)[rows.ids] for t in (buckets, factors))  # (n, T, d)
            out.scatter_add_(1, at.flatten(1), (by * rows.g[:, 0]).flatten(1))
        else:
            for some in slices(len(out), len(buckets)):
                w = rows[some].written().rows[:, 0]
                out[some].scatter_add_(1, buckets.expand_as(w), w * factors)


@dataclass(frozen=True)
class GradientStore:
    """Approximate scores of all training examples in milliseconds; made by `build`, which also opens a built one.

    Args:
        influence: what is approximated.
        sketch: the projection.
        pieces: the training examples' sketches, in order: "rows" (n, k) int8, and "scale" and "norms" (n,).
    """

    influence: Influence
    sketch: Sketch
    pieces: tuple[dict[str, Tensor], ...]

    @classmethod
    def build(cls, influence: Influence, folder: str | Path, size: int = 4096, seed: int = 0) -> GradientStore:
        """Sketch every training example in one pass, or read what lies in the folder; a killed call goes on.

        Args:
            influence: fitted. With EKFAC or KFAC the store is of this fit alone; with any other solver it is of the
                model, the data and the parameters, and serves every solver and damping.
            folder: where N (k + 8) bytes are kept, in files of 1,024 examples.
            size: k, numbers kept of each example.
            seed: of the projection.

        Raises:
            ArtefactError: if a file is damaged, or the folder was filled for another model, data set, fit, size or
                seed, by name of what differs.
        """
        positive(size=size)
        problem, inverse = influence.problem, influence.inverse
        sketch = Sketch.of(inverse, size, seed)
        root = {"root": digest(inverse.state()), "lambda": inverse.shift} if sketch.root else {"root": None}
        shards = Shards(folder, "gradients", problem.fingerprint() | root | {"size": size, "seed": seed})

        def made(start: int) -> dict[str, Tensor]:
            some = problem.train.subset(torch.arange(start, min(start + SHARD, len(problem.train))))
            batches = problem.batches(some, f"gradient store, from example {start}")
            rows = torch.cat([sketch(problem.loss_gradients(batch)) for _, batch in batches])
            scale = rows.abs().amax(1).clamp(min=1e-30) / 127
            return {
                "rows": (rows / scale.unsqueeze(1)).round().to(torch.int8),
                "scale": scale,
                "norms": rows.norm(dim=1),
            }

        starts = range(0, len(problem.train), SHARD)
        return cls(influence, sketch, tuple(shards.made(start, lambda s=start: made(s)) for start in starts))

    def score(self, queries: Any, measurement: Measurement | None = None) -> Scores:
        """Approximate scores of all N training examples on Q queries; no example is looked at.

        Args:
            queries, measurement: as for `Influence.score`.

        Returns:
            `Scores` (Q, N) without a residual. ``provenance["measured"]["sketch noise"]`` is the share of their
            variance over the examples that the projection adds, the median over queries: near 1 they say nothing.
        """
        start = time.perf_counter()
        asked, converged = self._asked(self.influence.query_gradients(queries, measurement))
        asking = time.perf_counter()
        values = torch.cat([asked @ p["rows"].to(asked).T * p["scale"].to(asked) for p in self.pieces], 1)
        spent = {"queries": asking - start, "scores": time.perf_counter() - asking}
        square = torch.cat([p["norms"].to(asked) for p in self.pieces]).square().mean()
        noise = asked.square().sum(1) * square / self.sketch.size / values.var(1)
        about = {
            "projected to": self.sketch.size,
            "seconds": spent,
            "measured": {"sketch noise": float(noise.median())},
        }
        return Scores(values, None, converged, provenance=self.influence.provenance() | about)

    def _asked(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """The sketches of Q queries, (Q, k), and which of their solves converged."""
        if self.sketch.root is not None:
            return self.sketch(rows), torch.ones(len(rows), dtype=torch.bool)
        solution = self.influence.inverse(rows.dense(), certify=False)
        found = {b.name: Written(b.pack(solution.x).flatten(1).unsqueeze(1), b.sides) for b in rows.blocks}
        return self.sketch(rows.map(lambda name, _: found[name])), solution.converged
