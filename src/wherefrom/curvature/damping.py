"""Damping as a choice: absolute, a share of the curvature, or the one that training implies.

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

from wherefrom.curvature.base import Curvature
from wherefrom.errors import expected

Shift = dict[str, float]  # parameter name -> lambda


@dataclass(frozen=True)
class Damping:
    """How lambda is found; build it with one of the class methods.

    Args:
        value: lambda itself, or the factor of what ``kind`` names.
        kind: "absolute", in the units of a mean over examples of summed losses; "relative" to each block's mean
            eigenvalue; "per example", relative to tr(C) / N; or "by parameter", as ``each`` says.
        origin: how the value came about, for the record.
        each: (parameter name, lambda) pairs of the kind "by parameter", whose ``value`` is the largest.
    """

    value: float
    kind: Literal["absolute", "relative", "per example", "by parameter"] = "absolute"
    origin: str = "given"
    each: tuple[tuple[str, float], ...] = ()

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
        units = {
            "absolute": "",
            "relative": " x the mean eigenvalue of each block",
            "per example": " x tr(C) / N",
            "by parameter": " at most, by parameter",
        }
        unit = units[self.kind]
        return f"{self.value!r}{unit} ({self.origin})"

    @classmethod
    def absolute(cls, value: float) -> Damping:
        """The same lambda for all parameters."""
        return cls(float(value))

    @classmethod
    def relative(cls, factor: float = 0.1) -> Damping:
        """``factor`` times the mean eigenvalue of each block (Grosse et al. 2023 take 0.1)."""
        return cls(float(factor), "relative")

    @classmethod
    def per_example(cls, factor: float = 1.0) -> Damping:
        """``factor`` times tr(C) / N, what one average example adds to the trace: the default where nothing is known.

        An example alone in its direction then counts half. It needs no knowledge of the training run, and near-optimal
        linear datamodeling scores were measured at factor 1 with exact solves (``benchmarks/RESULTS.md``).
        """
        return cls(float(factor), "per example")

    @classmethod
    def by_parameter(cls, shift: Shift) -> Damping:
        """A lambda for each parameter, by name; the parameters of one layer must share theirs."""
        if not shift:
            raise expected("damping by parameter", "a positive number for each attributed parameter", shift)
        return cls(max(shift.values()), "by parameter", each=tuple(shift.items()))

    @classmethod
    def from_training(
        cls, lr: float | Iterable[float], steps: int, momentum: float = 0.0, segments: int = 3
    ) -> Damping:
        """The damping that stopping gradient descent after ``steps`` implies.

            lambda = 1 / (eta K),    eta = mean learning rate / (1 - momentum), K = steps / segments  (SOURCE; ASTRA)

        Args:
            lr: learning rate, or the schedule's values, which are averaged.
            steps: number of optimiser steps, positive.
            momentum: of SGD without dampening, in [0, 1).
            segments: stretches of training with a curvature of their own; SOURCE and ASTRA take 3.
        """
        if not 0 <= momentum < 1:
            raise expected("momentum", "in [0, 1)", momentum)
        if steps < 1:
            raise expected("steps", "a positive number of optimiser steps", steps)
        if segments < 1:
            raise expected("segments", "a positive integer", segments)
        rates = [float(lr)] if isinstance(lr, (int, float)) else [float(r) for r in lr]
        mean = sum(rates) / max(1, len(rates))
        if not mean > 0:
            raise expected("lr", "a positive learning rate, or several", lr)
        said = f"from_training(lr={mean:g}, {steps=}, {momentum=}, {segments=})"
        return cls(segments * (1 - momentum) / (mean * steps), origin=said)

    @classmethod
    def of(cls, damping: float | Damping) -> Damping:
        """Itself, or the absolute damping of that number."""
        if isinstance(damping, Damping):
            return damping
        if isinstance(damping, bool) or not isinstance(damping, Real):
            raise expected("damping", "a positive number or a wherefrom.Damping", repr(damping))
        return cls.absolute(float(damping))

    def resolve(self, curvature: Curvature) -> Shift:
        """Lambda of each parameter."""
        if self.kind == "absolute":
            return dict.fromkeys(curvature.problem.shapes, self.value)
        if self.kind == "by parameter":
            return self._checked(curvature)
        means = curvature.mean_eigenvalues()
        if not any(mean > 0 for mean in means.values()):
            kind = type(curvature).__name__
            raise expected(
                f"the trace of {kind} (damping {self.kind})",
                "positive",
                f"{max(means.values()):g}",
                "Losses such as absolute error or hinge have no second derivative in the outputs, and then only "
                "curvature=wherefrom.EmpiricalFisher says anything."
                if kind != "EmpiricalFisher"
                else "All training gradients vanish.",
            )
        if self.kind == "per example":
            shapes, n = curvature.problem.shapes, len(curvature.problem.train)
            share = sum(mean * shapes[name].numel() for name, mean in means.items()) / n
            if not share > 0:
                raise expected(
                    "the trace of the curvature",
                    "positive for a damping per example",
                    f"{share * n:g}",
                    "The loss is not convex in the outputs: take curvature=wherefrom.EmpiricalFisher, or an absolute "
                    "damping with solver=wherefrom.Exact().",
                )
            return Damping.absolute(self.value * share).resolve(curvature)
        floor = self.value * max(means.values()) * 1e-6
        return {name: max(self.value * mean, floor) for name, mean in means.items()}

    def _checked(self, curvature: Curvature) -> Shift:
        shift, blocks = dict(self.each), curvature.problem.blocks
        if set(shift) != set(curvature.problem.shapes) or any(not v > 0 for v in shift.values()):
            raise expected("damping by parameter", "a positive number for each attributed parameter", sorted(shift))
        if any(len({shift[p] for p in b.shapes}) > 1 for b in blocks):
            raise expected("damping by parameter", "one number for all parameters of a layer", self.each)
        return shift
