"""The empirical Fisher: the second moment of the loss gradients with the true labels.

    E = (1/N) sum_n grad l_n grad l_n^T

It is not the Fisher: that takes labels drawn from the model, and equals the Gauss-Newton matrix for cross-entropy and
squared error. DataInf and HyperINF are defined on E; so is EKFAC with ``labels="true"``.
"""

from __future__ import annotations

from typing import Literal

from wherefrom.curvature.base import RowCurvature
from wherefrom.data.examples import Batch
from wherefrom.persample.gradients import Gradients


class EmpiricalFisher(RowCurvature):
    """Second moment of the loss gradients with the true labels."""

    @property
    def labels(self) -> Literal["true"]:
        """Its Kronecker factors are made from true labels too."""
        return "true"

    def terms(self, sample: int = 256) -> float:  # noqa: ARG002
        """One: an example's part is the outer product of one gradient."""
        return 1.0

    def rows(self, batch: Batch) -> Gradients:
        """Return one row for each example: its loss gradient."""
        return self.problem.loss_gradients(batch)
