"""The Hessian of the mean training loss; it may be indefinite.

H v = d/de grad L(theta + e v),        forward mode over reverse mode              (Schioppa et al. 2022, sec. 3)

A model without forward-mode derivatives takes double backward, checked against central differences.
"""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad, vmap

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.ggn import rhs_at_once
from wherefrom.curvature.plain import (
    GAPS,
    Function,
    Linearised,
    differentiate_by_differences,
    has_second_derivatives,
    hessian_products,
    is_gap,
)
from wherefrom.data.examples import Batch
from wherefrom.errors import AttributionWarning
from wherefrom.persample import vectors
from wherefrom.persample.directions import Directions
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import jvp


class Hessian(Curvature):
    """The second derivative of the mean training loss in the selected parameters."""

    @property
    def psd(self) -> bool:
        """It may have negative eigenvalues."""
        return False

    @property
    def offers(self) -> frozenset[Need]:
        """No rows."""
        return frozenset({Need.MATVEC, Need.KRONECKER})

    def product(self, v: Directions, index: Tensor | None = None) -> Directions:
        """Return H v over all training examples, or over those of the given numbers."""
        tangents = {name: t.contiguous() for name, t in v.to_parameters().items()}

        def sum_over(batch: Batch) -> Directions:
            return Directions.from_parameters(self.problem.blocks, self._sum_over(batch, tangents))

        return self.mean_over_batches(sum_over, index)

    def _sum_over(self, batch: Batch, v: Vectors) -> Vectors:
        """Sum H v over a batch: by forward mode where the model has it, else by double backward."""
        if self._forward:
            try:
                return self._by_jvp(batch, v)
            except GAPS as error:
                if not is_gap(error):
                    raise
        total = self._by_plain(batch, v)
        self._forward = False
        return total

    _forward = True  # whether the model is not known to lack forward mode

    def _by_jvp(self, batch: Batch, v: Vectors) -> Vectors:
        """Sum H v over a batch, as many right-hand sides as fit in memory together."""
        outputs, theta = self.problem.functional(batch)
        slope = grad(lambda p: self.problem.task.loss(outputs(p), batch).sum())
        pieces = vectors.chunk(v, rhs_at_once(self.problem, outputs, theta))
        return vectors.concatenate([vmap(lambda w: jvp(slope, (theta,), (w,))[1])(some) for some in pieces])

    def _by_plain(self, batch: Batch, v: Vectors) -> Vectors:
        """Do the same by double backward, or by differences of the gradient where that is not right."""
        outputs, theta = self.problem.functional(batch)
        each: Function = lambda p: self.problem.task.loss(outputs(p), batch)  # noqa: E731
        singles = ({name: t[0] for name, t in one.items()} for one in vectors.chunk(v, 1))
        if self._is_twice_differentiable:
            return hessian_products(each, theta, singles)[0]

        def slope(p: Vectors) -> Tensor:
            at = Linearised(each, p)
            return vectors.flatten({k: t.unsqueeze(0) for k, t in at.pull(torch.ones_like(at.value)).items()})

        rows = [differentiate_by_differences(slope, theta, one, None) for one in singles]
        return vectors.unflatten(torch.cat(rows), self.problem.shapes)

    @cached_property
    def _is_twice_differentiable(self) -> bool:
        """Whether the model's backward pass can be differentiated, and rightly."""
        right = has_second_derivatives(self.problem)
        if not right:
            warnings.warn(
                "the model has operations whose second derivative is missing or wrong: products with the Hessian take "
                "central differences of the gradient, whose relative error is about "
                f"{torch.finfo(self.problem.dtype).eps ** (2 / 3):.0e}.",
                AttributionWarning,
                stacklevel=2,
            )
        return right
