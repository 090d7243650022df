"""Damping as a choice: absolute, a share of the curvature, or the one that training implies.

An influence is taken with C + diag(lambda), one number for each block of parameters, which may be the same for all.
Damping decides which directions of parameter space count. Directions whose curvature is well above lambda are treated
as determined by the training data; those well below it are ignored. With too little damping, directions that training
never explored dominate the scores; with too much, the scores become plain gradient dot products.
`Damping.from_training` needs no sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from wherefrom.curvature.base import Curvature
from wherefrom.errors import expected

ByBlock = Mapping[str, float]  # block name -> lambda


@dataclass(frozen=True)
class Damping:
    """How lambda is found; build it with one of the class methods.

    Args:
        value: lambda itself, or the factor of what ``kind`` names.
        kind: "absolute", in the units of a mean over examples of summed losses; "relative" to each block's mean
            eigenvalue; "per example", relative to tr(C) / N; or "by block", as ``each`` says.
        origin: how the value came about, for the record.
        each: (block name, lambda) pairs of the kind "by block", whose ``value`` is the largest.
    """

    value: float
    kind: Literal["absolute", "relative", "per example", "by block"] = "absolute"
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
        """Say the value, its unit, and where it came from."""
        units = {
            "absolute": "",
            "relative": " x the mean eigenvalue of each block",
            "per example": " x tr(C) / N",
            "by block": " at most, by block",
        }
        unit = units[self.kind]
        return f"{self.value!r}{unit} ({self.origin})"

    @classmethod
    def absolute(cls, value: float) -> Damping:
        """Take the same lambda for all parameters."""
        return cls(float(value))

    @classmethod
    def relative(cls, factor: float = 0.1) -> Damping:
        """Take ``factor`` times the mean eigenvalue of each block (Grosse et al. 2023 take 0.1)."""
        return cls(float(factor), "relative")

    @classmethod
    def per_example(cls, factor: float = 1.0) -> Damping:
        """Take ``factor`` times tr(C) / N, what one average example adds to the trace: the default.

        An example alone in its direction then counts half. It needs no knowledge of the training run, and near-optimal
        linear datamodeling scores were measured at factor 1 with exact solves (``benchmarks/RESULTS.md``).
        """
        return cls(float(factor), "per example")

    @classmethod
    def by_block(cls, damping: Mapping[str, float]) -> Damping:
        """Take a lambda for each block of parameters, by its name: ``[b.name for b in problem.blocks]``."""
        if not damping:
            raise expected("damping by block", "a positive number for each block of parameters", dict(damping))
        return cls(max(damping.values()), "by block", each=tuple(damping.items()))

    @classmethod
    def from_training(
        cls, lr: float | Iterable[float], steps: int, momentum: float = 0.0, segments: int = 3
    ) -> Damping:
        """Take the damping that stopping gradient descent after ``steps`` implies.

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
        """Read a number as an absolute damping; a `Damping` is returned as it is."""
        if isinstance(damping, Damping):
            return damping
        if isinstance(damping, bool) or not isinstance(damping, Real):
            raise expected("damping", "a positive number or a wherefrom.Damping", repr(damping))
        return cls.absolute(float(damping))

    def resolve(self, curvature: Curvature) -> ByBlock:
        """Return lambda of each block, by its name. It depends on the curvature alone.

        Raises:
            InputError: if the trace that lambda is relative to is not positive, or a block has no lambda.
        """
        names = [block.name for block in curvature.problem.blocks]
        if self.kind == "absolute":
            return dict.fromkeys(names, self.value)
        if self.kind == "by block":
            return self._check_blocks(names)

        means = curvature.mean_eigenvalues()
        if not any(mean > 0 for mean in means.values()):
            raise expected(
                f"the trace of {type(curvature).__name__} (damping {self.kind})",
                "positive",
                f"{max(means.values()):g}",
                _explain_no_trace(curvature),
            )
        if self.kind == "relative":
            # A block without curvature gets a millionth of the largest: an inverse needs some damping everywhere.
            floor = self.value * max(means.values()) * 1e-6
            return {name: max(self.value * mean, floor) for name, mean in means.items()}
        return dict.fromkeys(names, self.value * self._trace_per_example(curvature, means))

    @staticmethod
    def _trace_per_example(curvature: Curvature, means: Mapping[str, float]) -> float:
        """Return tr(C) / N."""
        problem = curvature.problem
        trace = sum(means[block.name] * block.size for block in problem.blocks)
        if not trace > 0:
            raise expected(
                "the trace of the curvature",
                "positive for a damping per example",
                f"{trace:g}",
                "The loss is not convex in the outputs: take curvature=wherefrom.EmpiricalFisher, or an absolute "
                "damping with solver=wherefrom.Exact().",
            )
        return trace / len(problem.train)

    def _check_blocks(self, names: list[str]) -> ByBlock:
        given = dict(self.each)
        if set(given) != set(names) or any(not value > 0 for value in given.values()):
            wanted = f"a positive number for each block of parameters ({', '.join(names)})"
            raise expected("damping by block", wanted, given)
        return {name: float(given[name]) for name in names}


def _explain_no_trace(curvature: Curvature) -> str:
    """Say why a curvature may have no trace, and what to do."""
    if type(curvature).__name__ == "EmpiricalFisher":
        return "All training gradients vanish."
    return (
        "Losses such as absolute error or hinge have no second derivative in the outputs, and then only "
        "curvature=wherefrom.EmpiricalFisher says anything."
    )
