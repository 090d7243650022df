"""The contract of a curvature matrix C, a mean over training examples, and the part that all curvatures share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Protocol

import torch

from wherefrom.curvature import kronecker
from wherefrom.data.examples import Batch
from wherefrom.errors import UnsupportedError
from wherefrom.model.problem import Problem
from wherefrom.persample import gradients
from wherefrom.persample.blocks import Block
from wherefrom.persample.directions import Directions
from wherefrom.persample.eigenbasis import KroneckerBlock
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import random_signs
from wherefrom.surroundings import math_attention, undisturb, undisturbed

PROBES = 64  # random directions that a trace is estimated with


class Need(Enum):
    """What a solver asks of a curvature."""

    MATVEC = "matrix-vector products"
    KRONECKER = "Kronecker factors"
    GRADIENTS = "per-example rows"


class Operator(Protocol):
    """A symmetric linear map on `Directions`."""

    blocks: tuple[Block, ...]

    @property
    def psd(self) -> bool:
        """Whether the map is known to be positive semi-definite."""
        ...

    def __call__(self, v: Directions) -> Directions:
        """Multiply all Q directions in one pass over the data."""
        ...


class Product:
    """An `Operator` made of a curvature: over all the data, or over a fresh minibatch at every call.

    Args:
        curvature: the matrix.
        batch_size: examples drawn with replacement at every call; None for all the data, in order.
        rng: the generator that draws them.
    """

    def __init__(self, curvature: Curvature, batch_size: int | None = None, rng: torch.Generator | None = None):
        self.curvature, self.batch_size, self.rng = curvature, batch_size, rng
        self.blocks = curvature.problem.blocks

    @property
    def psd(self) -> bool:
        """Whether C is known to be positive semi-definite."""
        return self.curvature.psd

    def __call__(self, v: Directions) -> Directions:
        """Return C v, or an unbiased estimate of it."""
        if self.batch_size is None:
            return self.curvature.product(v)
        index = torch.randint(len(self.curvature.problem.train), (self.batch_size,), generator=self.rng)
        return self.curvature.product(v, index)


class Curvature(ABC):
    """A symmetric matrix C, the mean over training examples of one matrix per example. Lazy; what it computes it keeps.

    Args:
        problem: the model, task, training data and parameters.

    Attributes:
        statistics: where Kronecker factors are measured: the model at several weights, whose statistics are averaged;
            ``problem`` alone unless `with_statistics` says otherwise.
    """

    statistics: tuple[Problem, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "product", "rows")

    def __init__(self, problem: Problem):
        self.problem = problem
        self.statistics = (problem,)
        self._cache: dict[Hashable, Any] = {}

    def with_statistics(self, places: Sequence[Problem]) -> Curvature:
        """Return the same matrix with Kronecker factors averaged over these weights of the model (SOURCE)."""
        other = copy.copy(self)
        other.statistics = tuple(places)
        other._cache = {}  # factors of other statistics are other factors
        return other

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gave when this key was first asked for.

        Solvers and dampings share what does not depend on them. The key must name all that the result depends on
        besides this curvature, so that no answer depends on what was fitted before.
        """
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @property
    def psd(self) -> bool:
        """Whether C is known to be positive semi-definite."""
        return True

    @property
    def labels(self) -> Literal["sampled", "true"]:
        """Which labels the Kronecker factors of this curvature are made from."""
        return "sampled"

    @property
    def offers(self) -> frozenset[Need]:
        """What a solver may ask for."""
        return frozenset(Need)

    @abstractmethod
    def product(self, v: Directions, index: torch.Tensor | None = None) -> Directions:
        """Return C v over all training examples, or over those of the given numbers."""

    def kronecker(self, labels: kronecker.Labels, seed: int, limit: int) -> Mapping[str, KroneckerBlock]:
        """Return the Kronecker factors of every block, by block name; see `wherefrom.curvature.kronecker.fit`."""
        key = ("kronecker factors", labels, seed, limit)
        return self.cached(key, lambda: kronecker.fit(self.statistics, labels, seed, limit))

    def share_kronecker(
        self, factors: Mapping[str, KroneckerBlock], labels: kronecker.Labels, seed: int, limit: int
    ) -> None:
        """Take the Kronecker factors of a restored fit for those that `kronecker` would compute."""
        self.cached(("kronecker factors", labels, seed, limit), lambda: factors)

    def mean_over_batches(self, sum_over: Callable[[Batch], Directions], index: torch.Tensor | None) -> Directions:
        """Average over all training examples, or those of the given numbers, what a function sums over a batch."""
        problem = self.problem
        if index is None:
            batches, n = (batch for _, batch in problem.batches()), len(problem.train)
        else:
            batches, n = (problem.batch(some) for some in index.split(problem.train.batch_size)), len(index)

        total: Directions | None = None
        with problem.observed(), math_attention():
            for batch in batches:
                part = sum_over(batch)
                # The first is copied: zeros that autograd returns may share one number in memory.
                total = part.clone() if total is None else total.add_(1.0, part)
        if total is None:
            raise ValueError("a mean over no examples")
        return total.scale(1 / n)

    def gradients(self) -> Iterator[Gradients]:
        """Yield weighted rows b with C = (1/N) sum_n sum_r w[n, r] b[n, r] b[n, r]^T, in order.

        Raises:
            UnsupportedError: if C has no such form.
        """
        raise UnsupportedError(f"{type(self).__name__} is not a sum over per-example rows. Use GGN or EmpiricalFisher.")

    def operator(self, rng: torch.Generator | None = None, batch_size: int = 256) -> Product:
        """Return C as a linear map: on all the data, or with a generator on a fresh minibatch at every call."""
        return Product(self, None if rng is None else batch_size, rng)

    @undisturbed()
    def mean_eigenvalues(self) -> dict[str, float]:
        """Return trace over dimension of each block, by block name: what relative dampings are relative to.

        One definition for each curvature, whatever else was fitted: exact from its rows where it offers them; else of
        the GGN by gradients of labels drawn with seed 0, and of others by 64 random probes with seed 0.
        """
        return self.cached("mean eigenvalues", self._mean_eigenvalues)

    def terms(self, sample: int = 256) -> float:
        """Tell how many independent terms an example's part of C is a sum of, about: the mean number of its positions.

        A loss over a sequence is a sum over its tokens, and C over their outer products. Positions are the middle axes
        of outputs (n, ..., outputs); those without a gradient, such as padding and prompts, do not count.

        Args:
            sample: examples to look at, evenly spaced.
        """
        problem = self.problem
        chosen = torch.linspace(0, len(problem.train) - 1, min(sample, len(problem.train))).long().unique()
        slopes, total = problem.output_cotangents("loss"), 0
        with problem.observed() as model:
            for index in chosen.split(problem.train.batch_size):
                batch = problem.batch(index)
                with torch.no_grad():
                    outputs = problem.outputs(model, batch)
                slope = slopes(outputs, batch)[0]  # (n, ..., outputs)
                total += int(slope.any(-1).sum()) if slope.ndim > 2 else len(index)
        return max(1.0, total / len(chosen))

    def _mean_eigenvalues(self) -> dict[str, float]:
        traces = self._traces_of_rows() if Need.GRADIENTS in self.offers else self._traces_by_probes()
        return {block.name: traces[block.name] / block.size for block in self.problem.blocks}

    def _traces_of_rows(self) -> dict[str, float]:
        """Return the trace of each block: the weighted squared norms of its rows."""
        traces = dict.fromkeys((block.name for block in self.problem.blocks), 0.0)
        N = len(self.problem.train)
        for piece in self.gradients():
            for name, rows in piece.rows.items():
                traces[name] += float((rows.square_norms().double() * piece.weights).sum()) / N
        return traces

    def _traces_by_probes(self) -> dict[str, float]:
        """Estimate the trace of each block by random signs z: tr C_b = E z_b . (C z)_b (Hutchinson)."""
        problem = self.problem
        z = probe_signs(problem, PROBES, torch.Generator().manual_seed(0))
        cz = self.product(z).tensors()
        products = {name: (v * cz[name]).double().sum() for name, v in z.tensors().items()}
        return {name: float(product) / PROBES for name, product in products.items()}


class RowCurvature(Curvature):
    """C = (1/N) B^T W B with factored rows B; kept in memory when they fit, else recomputed batch by batch."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self._all_rows: Gradients | None = None
        self._fits = True

    @abstractmethod
    def rows(self, batch: Batch) -> Gradients:
        """Return the weighted rows of one batch."""

    def gradients(self) -> Iterator[Gradients]:
        """Yield weighted rows: all in one piece when they fit into the problem's memory, else piece by piece."""
        if self._all_rows is None:
            held: list[Gradients] = []
            free = self.problem.memory / 4 if self._fits else -1.0
            for _, batch in self.problem.batches(what="rows of the curvature"):
                held.append(self.rows(batch).compact())
                free -= held[-1].numbers() * self.problem.dtype.itemsize
                if free < 0:  # what was held so far is given out, and nothing is held from here on
                    self._fits = False
                    yield from held
                    held = []
            if not self._fits:
                return
            self._all_rows = gradients.concatenate(held)
        yield self._all_rows

    def product(self, v: Directions, index: torch.Tensor | None = None) -> Directions:
        """Return C v = (1/n) sum_n sum_r w (b . v) b."""
        if index is None:
            pieces, n = self.gradients(), len(self.problem.train)
        elif self._all_rows is not None:
            pieces, n = iter([self._all_rows[index]]), len(index)
        else:
            size = self.problem.train.batch_size
            pieces, n = (self.rows(self.problem.batch(some)) for some in index.split(size)), len(index)

        v = v.dense()
        total: Directions | None = None
        for rows in pieces:
            along = rows.dot(v)  # b . v, (Q, n, R)
            part = rows.combine(along * (rows.weights / n).to(along.dtype))
            total = part if total is None else total.add_(1.0, part)
        if total is None:
            raise ValueError("a product over no examples")
        return total


def probe_signs(problem: Problem, count: int, rng: torch.Generator) -> Directions:
    """Draw independent +1 or -1 entries, parameter by parameter: ``count`` directions."""
    signs = random_signs(problem.shapes, count, rng, problem.dtype)
    on_device = {name: t.to(problem.device) for name, t in signs.items()}
    return Directions.from_parameters(problem.blocks, on_device)
