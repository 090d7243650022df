"""The contract of a curvature matrix C, a mean over training examples, and the part that all curvatures share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from enum import Enum
from typing import Any, Literal, Protocol

import torch

from wherefrom.data.examples import Batch
from wherefrom.errors import UnsupportedError
from wherefrom.model.problem import Problem
from wherefrom.persample import gradients, vectors
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import math_attention, undisturb, undisturbed


class Need(Enum):
    """What a solver asks of a curvature."""

    MATVEC = "matrix-vector products"
    KRONECKER = "Kronecker factors"
    GRADIENTS = "per-example rows"


class Operator(Protocol):
    """A symmetric linear map on Vectors."""

    shapes: Mapping[str, torch.Size]

    @property
    def psd(self) -> bool:
        """Whether the map is known to be positive semi-definite."""
        ...

    def __call__(self, v: Vectors) -> Vectors:
        """C v for all Q right-hand sides in one pass over the data."""
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
        self.shapes = curvature.problem.shapes

    @property
    def psd(self) -> bool:
        """Whether C is known to be positive semi-definite."""
        return self.curvature.psd

    def __call__(self, v: Vectors) -> Vectors:
        """C v, or an unbiased estimate of it."""
        if self.batch_size is None:
            return self.curvature.product(v)
        index = torch.randint(len(self.curvature.problem.train), (self.batch_size,), generator=self.rng)
        return self.curvature.product(v, index)


class Curvature(ABC):
    """A symmetric matrix C, the mean over training examples of one matrix per example. Lazy; what it computes it keeps.

    Args:
        problem: the model, task, training data and parameters.

    Attributes:
        statistics: where Kronecker factors are measured, averaged over several weights of the model; ``problem`` alone
            unless somebody sets it before the first fit.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "product", "rows")

    def __init__(self, problem: Problem):
        self.problem = problem
        self.statistics: tuple[Problem, ...] = (problem,)
        self._memory: dict[Hashable, Any] = {}

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when this key was first asked for: fits are shared by solvers and dampings."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

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
    def product(self, v: Vectors, index: torch.Tensor | None = None) -> Vectors:
        """C v over all training examples, or over those of the given numbers."""

    def streamed(self, part: Callable[[Batch], Vectors], index: torch.Tensor | None) -> Vectors:
        """The mean over all training examples, or those of the given numbers, of what ``part`` sums over a batch."""
        problem = self.problem
        if index is None:
            batches, n = (b for _, b in problem.batches()), len(problem.train)
        else:
            batches, n = (problem.batch(i) for i in index.split(problem.train.batch_size)), len(index)
        total: Vectors = {}
        with problem.observed(), math_attention():
            for batch in batches:
                found = {name: t.contiguous() for name, t in part(batch).items()}  # autograd's zeros share one number
                total = vectors.add_(total, found) if total else found
        return vectors.scale(total, 1 / n)

    def gradients(self) -> Iterator[Gradients]:
        """Weighted rows b with C = (1/N) sum_n sum_r w[n, r] b[n, r] b[n, r]^T, in order.

        Raises:
            UnsupportedError: if C has no such form.
        """
        raise UnsupportedError(f"{type(self).__name__} is not a sum over per-example rows. Use GGN or EmpiricalFisher.")

    def operator(self, rng: torch.Generator | None = None, batch_size: int = 256) -> Product:
        """C as a linear map: on all the data, or with a generator on a fresh minibatch at every call."""
        return Product(self, None if rng is None else batch_size, rng)

    @undisturbed()
    def mean_eigenvalues(self) -> dict[str, float]:
        """Trace over dimension of each block, by parameter name: what relative dampings are relative to.

        One definition for each curvature, whatever else was fitted: exact from its rows where it offers them; else of
        the GGN by gradients of labels drawn with seed 0, and of others by 64 random probes with seed 0.
        """
        return self.remember("mean eigenvalues", self._mean_eigenvalues)

    def terms(self, sample: int = 256) -> float:
        """How many independent terms an example's part of C is a sum of, about: the mean number of its positions.

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
        N, problem = len(self.problem.train), self.problem
        if Need.GRADIENTS in self.offers:
            sums = dict.fromkeys((b.name for b in problem.blocks), 0.0)
            for rows in self.gradients():
                for name, r in rows.rows.items():
                    sums[name] += float((r.square_norms().double() * rows.weights).sum()) / N
        else:
            z = vectors.random_signs(problem.shapes, 64, torch.Generator().manual_seed(0), problem.dtype)
            z = {name: t.to(problem.device) for name, t in z.items()}
            cz = self.product(z)
            sums = {b.name: sum(float((z[p] * cz[p]).double().sum()) / 64 for p in b.shapes) for b in problem.blocks}
        return {p: sums[b.name] / b.size for b in problem.blocks for p in b.shapes}


class RowCurvature(Curvature):
    """C = (1/N) B^T W B with factored rows B; kept in memory when they fit, else recomputed batch by batch."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self._kept: Gradients | None = None
        self._fits = True

    @abstractmethod
    def rows(self, batch: Batch) -> Gradients:
        """The weighted rows of one batch."""

    def gradients(self) -> Iterator[Gradients]:
        """Weighted rows: all in one piece when they fit into the problem's memory, else a piece per batch."""
        if self._kept is None:
            held: list[Gradients] = []
            free = self.problem.memory / 4 if self._fits else -1.0
            for _, batch in self.problem.batches(what="rows of the curvature"):
                held.append(self.rows(batch).compact())
                free -= held[-1].numbers() * self.problem.dtype.itemsize
                if free < 0:
                    self._fits = False
                    yield from held
                    held = []
            if not self._fits:
                return
            self._kept = gradients.concatenate(held)
        yield self._kept

    def product(self, v: Vectors, index: torch.Tensor | None = None) -> Vectors:
        """C v = (1/n) sum_n sum_r w (b . v) b."""
        if index is None:
            pieces, n = self.gradients(), len(self.problem.train)
        elif self._kept is not None:
            pieces, n = iter([self._kept[index]]), len(index)
        else:
            size = self.problem.train.batch_size
            pieces, n = (self.rows(self.problem.batch(i)) for i in index.split(size)), len(index)
        out: Vectors = {}
        packed = gradients.pack(self.problem.blocks, v)
        for rows in pieces:
            t = rows.dot(packed=packed)
            part = rows.combine(t * (rows.weights / n).to(t.dtype))
            out = vectors.add_(out, part) if out else part
        return out
