"""Suspicious training examples: those of the largest self-influence, and how well a ranking finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.tools.evaluate.mislabeled import MislabeledCurve
from wherefrom.tools.report.drawing import DASHED, DOTTED, MUTED, POSITIVE, draw_svg, format_percent
from wherefrom.tools.report.examples import Example
from wherefrom.tools.report.section import Section, Tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Suspects(Section):
    """The training examples of the largest self-influence, and how well a ranking finds mislabelled ones.

    Args:
        train_examples: how each of the N training examples is shown; only those on the page are looked up.
        self_influence: (N,), or None where only the detection curve is shown.
        detection: how well a ranking finds wrong labels, if it is known which are wrong.
        count: how many examples are shown.

    Raises:
        InputError: if there is not one example for each value.
    """

    train_examples: Sequence[Example] = ()
    self_influence: Tensor | None = None
    detection: MislabeledCurve | None = None
    count: int = 24

    template: ClassVar[str] = "suspects.html"
    anchor: ClassVar[str] = "suspects"
    link: ClassVar[str] = "Suspicious examples"

    def __post_init__(self) -> None:
        if self.self_influence is not None and len(self.train_examples) < len(self.self_influence):
            wanted = f"one for each of the {len(self.self_influence)} values of self-influence"
            raise expected("train_examples", wanted, len(self.train_examples))

    def content(self) -> dict[str, Any]:
        """Return the examples, and draw the detection curve."""
        return {
            "suspects": self._largest(),
            "detection": self.detection,
            "figure": None if self.detection is None else draw_detection(self.detection),
        }

    def tiles(self) -> list[Tile]:
        """Return the area under the detection curve."""
        if self.detection is None:
            return []
        low, high = self.detection.auc_interval
        name = f"AUC of finding wrong labels ({low:.3f} to {high:.3f}; chance 0.5)"
        return [Tile(f"{self.detection.auc:.3f}", name)]

    def _largest(self) -> list[dict[str, Any]]:
        if self.self_influence is None or self.count < 1:
            return []
        order = self.self_influence.argsort(descending=True, stable=True)[: self.count].tolist()
        return [{"number": j, "score": float(self.self_influence[j]), "example": self.train_examples[j]} for j in order]


def draw_detection(curve: MislabeledCurve) -> str:
    """Draw the share of the mislabelled examples found against the share of examples looked at."""

    def draw(axes: Axes) -> None:
        axes.plot(curve.fractions, curve.oracle, color=MUTED, lw=1.2, ls=DASHED)
        axes.plot(curve.fractions, curve.random, color=MUTED, lw=1.2, ls=DOTTED)
        axes.fill_between(curve.fractions, *curve.detection_interval.T, color=POSITIVE, alpha=0.14, lw=0)
        axes.plot(curve.fractions, curve.detection, color=POSITIVE, lw=2.2)

        axes.annotate("perfect order", (0.04, 1.045), color=MUTED)
        axes.annotate("random order", (0.60, 0.53), color=MUTED)
        # The name of the curve stands below it, a little to the right of where a perfect order has found all.
        at = int(np.searchsorted(curve.fractions, min(0.97, 1.6 * curve.base_rate + 0.05)))
        place = (float(curve.fractions[at]) + 0.03, float(curve.detection[at]) - 0.12)
        axes.annotate("this ranking", place, color=POSITIVE, weight="bold")

        axes.set(xlim=(0, 1), ylim=(0, 1.14), xlabel="examples looked at", ylabel="wrong labels found")
        axes.set_yticks(np.linspace(0, 1, 5))
        format_percent(axes.xaxis)
        format_percent(axes.yaxis)
        axes.grid(axis="y")

    share = np.interp(curve.base_rate, curve.fractions, curve.detection)
    first = f"the first {curve.base_rate:.0%} of the ranking hold {share:.0%} of the wrong labels"
    return draw_svg(draw, f"Detection curve: {first}.")
