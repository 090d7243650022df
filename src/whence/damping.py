"""Damping as a choice: absolute, relative to each block's mean eigenvalue, or the one that training implies.

An influence is taken with C + diag(lambda): one number for all parameters, or one per block. Too little damping
amplifies directions that training never settled; too much forgets the curvature. `Damping.from_training` needs no
sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from whence.curvature.base import Curvature
from whence.errors import expected

Shift = dict[str, float]  # parameter name -> lambda


@dataclass(frozen=True)
class Damping:
    """How lambda is found; build it with one of the three class methods.

    Args:
        value: lambda itself, or the factor of the blocks' mean eigenvalues.
        kind: "absolute", in the units of a mean over examples of summed losses, or "relative".
        origin: how the value came about, for the record.
    """

    value: float
    kind: Literal["absolute", "relative"] = "absolute"
    origin: str = "given"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise expected(
                "damping",
                "a positive finite number",
                self.value,
                "Take Damping.from_training(lr, steps, momentum) or Damping.relative(0.1) if unsure.",
            )

    def __str__(self) -> str:
        """The value, its unit, and where it came from."""
        unit = "" if self.kind == "absolute" else " x the mean eigenvalue of each block"
        return f"{self.value:.6g}{unit} ({self.origin})"

    @classmethod
    def absolute(cls, value: float) -> Damping:
        """The same lambda for all parameters."""
        return cls(float(value))

    @classmethod
    def relative(cls, factor: float = 0.1) -> Damping:
        """``factor`` times the mean eigenvalue of each block (Grosse et al. 2023 take 0.1)."""
        return cls(float(factor), "relative")

    @classmethod
    def from_training(cls, lr: float | Iterable[float], steps: int, momentum: float = 0.0) -> Damping:
        """The damping that stopping gradient descent after ``steps`` implies.

            lambda = 1 / (eta K),        eta = mean learning rate / (1 - momentum)        (SOURCE; ASTRA appendix B)

        Args:
            lr: learning rate, or the schedule's values, which are averaged.
            steps: number K of optimiser steps, K > 0.
            momentum: of SGD without dampening, in [0, 1).
        """
        if not 0 <= momentum < 1:
            raise expected("momentum", "in [0, 1)", momentum)
        if steps < 1:
            raise expected("steps", "a positive number of optimiser steps", steps)
        rates = [float(lr)] if isinstance(lr, (int, float)) else [float(r) for r in lr]
        mean = sum(rates) / max(1, len(rates))
        if not mean > 0:
            raise expected("lr", "a positive learning rate, or several", lr)
        return cls((1 - momentum) / (mean * steps), origin=f"from_training(lr={mean:g}, {steps=}, {momentum=})")

    @classmethod
    def of(cls, damping: float | Damping) -> Damping:
        """Itself, or the absolute damping of that number."""
        if isinstance(damping, Damping):
            return damping
        if isinstance(damping, bool) or not isinstance(damping, Real):
            raise expected("damping", "a positive number or a whence.Damping", repr(damping))
        return cls.absolute(float(damping))

    def resolve(self, curvature: Curvature) -> Shift:
        """Lambda of each parameter."""
        if self.kind == "absolute":
            return dict.fromkeys(curvature.problem.shapes, self.value)
        means = curvature.mean_eigenvalues()
        empty = [name for name, mean in means.items() if not mean > 0]
        floor = self.value * max(means.values()) * 1e-6
        if not floor > 0 or len(empty) == len(means):
            raise expected(
                "the curvature's mean eigenvalues", "positive for relative damping", 0.0, "Give an absolute one."
            )
        return {name: max(self.value * mean, floor) for name, mean in means.items()}
