"""The section on damping: the same queries at several of it, and how much the choice matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from wherefrom import Scores
from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import float_array
from wherefrom.tools.evaluate.lds import LDS
from wherefrom.tools.evaluate.statistics import spearman
from wherefrom.tools.report.drawing import (
    DASHED,
    DOTTED,
    MUTED,
    NEGATIVE,
    POSITIVE,
    add_legend,
    draw_svg,
    format_powers,
    thin_out,
)
from wherefrom.tools.report.section import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"residual": "residual", "agreement": "rank agreement", "lds": "LDS"}  # key of a row -> label of its axis


@dataclass(frozen=True)
class DampingSweep(Section):
    """The same queries at several dampings.

    Args:
        scores: damping to its (Q, N) scores: ``{x: influence.at(x).score(queries) for x in dampings}``.
        chosen: the damping that the others are compared with, one of these.
        lds: damping to the linear datamodeling score there, for those where it is known.

    Raises:
        InputError: if a damping is not positive, ``chosen`` or one of ``lds`` is not among them, or shapes disagree.
    """

    scores: Mapping[float, Scores]
    chosen: float
    lds: Mapping[float, LDS] = field(default_factory=dict)

    template: ClassVar[str] = "damping.html"
    anchor: ClassVar[str] = "damping"
    link: ClassVar[str] = "Damping"

    def __post_init__(self) -> None:
        if not all(x > 0 for x in self.scores):
            raise expected("The dampings of a sweep", "positive", sorted(self.scores))
        unknown = {self.chosen, *self.lds} - set(self.scores)
        if unknown:
            raise expected("chosen and lds of a sweep", f"among its dampings {sorted(self.scores)}", sorted(unknown))
        shapes = {tuple(scores.values.shape) for scores in self.scores.values()}
        if len(shapes) > 1:
            raise expected("The scores of a sweep", "of one shape", sorted(shapes))

    def content(self) -> dict[str, Any]:
        """Compare the dampings, and draw the comparison."""
        rows = self.rows()
        return {
            "chosen": self.chosen,
            "has_lds": bool(self.lds),
            "rows": rows,
            "figure": draw_sweep(rows, self.chosen),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each damping, in increasing order; what was not measured is None.

        Its residual and its agreement with the chosen damping (Spearman's rank correlation over a query's scores) are
        pairs: of the median query and of the worst.
        """
        reference = float_array(self.scores[self.chosen], "scores", (2,)).T  # (N, Q)
        rows = []
        for damping, scores in sorted(self.scores.items()):
            residual = scores.residual
            correlations = spearman(reference, float_array(scores, "scores", (2,)).T)  # (Q,)
            # Scores that are all the same have no ranks to agree on.
            agreement = np.nan_to_num(correlations)
            row = {
                "damping": damping,
                "residual": None if residual is None else (float(residual.median()), float(residual.max())),
                "agreement": (float(np.median(agreement)), float(agreement.min())),
                "lds": self.lds.get(damping),
            }
            rows.append(row)
        return rows


def draw_sweep(rows: Sequence[Mapping[str, Any]], chosen: float) -> str:
    """Draw residual, rank agreement and LDS against the damping, one panel for each that was measured."""
    measured = {key: [row for row in rows if row[key] is not None] for key in PANELS}
    keys = [key for key in PANELS if measured[key]]

    def draw(*panels: Axes) -> None:
        for axes, key in zip(panels, keys, strict=True):
            dampings = [row["damping"] for row in measured[key]]
            if key == "lds":
                mean = np.array([row[key].mean for row in measured[key]])
                low, high = np.array([row[key].interval for row in measured[key]]).T
                axes.errorbar(dampings, mean, (mean - low, high - mean), color=POSITIVE, marker="o", ms=3.5, capsize=3)
            else:
                median, worst = zip(*(row[key] for row in measured[key]), strict=True)
                axes.plot(dampings, median, color=POSITIVE, marker="o", ms=3.5, label="median query")
                axes.plot(dampings, worst, color=NEGATIVE, ls=DASHED, marker="s", ms=3.5, lw=1.2, label="worst query")

            axes.axvline(chosen, color=MUTED, lw=1.2, ls=DOTTED)
            axes.set(xscale="log", ylabel=PANELS[key])
            axes.grid(axis="y")
            if key == "residual":
                axes.set_yscale("log")
                format_powers(axes.yaxis)

        # The panels share their x axis. More than seven names of dampings would run into each other.
        ticks = thin_out(np.array([row["damping"] for row in rows]), 7)
        format_powers(panels[-1].xaxis)
        panels[-1].set_xticks(ticks, [f"{x:g}" for x in ticks])
        panels[-1].set_xlabel("damping λ")
        add_legend(panels[0])

    names = ", ".join(PANELS[key] for key in keys)
    span = f"{rows[0]['damping']:g} to {rows[-1]['damping']:g}"
    return draw_svg(draw, f"{names} against dampings of {span}.", height=0.7 + 1.2 * len(keys), panels=len(keys))
