"""What the methods that look at training itself share: a recorded run."""

from __future__ import annotations

from dataclasses import dataclass, field

from whence import gradients
from whence.attribution.method import Method
from whence.problem import Problem
from whence.trajectory import Trajectory
from whence.vectors import Vectors


@dataclass(kw_only=True)
class OverTraining(Method):
    """A method that scores by a recorded run.

    Args:
        trajectory: the run that the model came out of.
        parameters, batch_size, memory, progress: see `Method`.
    """

    trajectory: Trajectory = field(kw_only=False)


def packed(problem: Problem, x: Vectors) -> gradients.Packed:
    """Vectors as the matrices that are paired with training gradients."""
    return gradients.pack(problem.blocks, x)
