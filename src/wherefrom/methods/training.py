"""What the methods that look at training itself share: a recorded run."""

from __future__ import annotations

from dataclasses import dataclass, field

from wherefrom.methods.base import Method
from wherefrom.training.trajectory import Trajectory


@dataclass(kw_only=True)
class OverTraining(Method):
    """A method that scores by a recorded run.

    Args:
        trajectory: the run that the model came out of.
        parameters, batch_size, memory, progress: see `Method`.
    """

    trajectory: Trajectory = field(kw_only=False)
