"""The section on retraining: linear datamodeling scores, and what training without the strongest examples did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from wherefrom.errors import expected
from wherefrom.tools.evaluate.lds import LDS
from wherefrom.tools.evaluate.removal import OURS, RemovalCurve
from wherefrom.tools.report.drawing import (
    DASHED,
    DOTTED,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    add_legend,
    count_columns,
    draw_svg,
    place_whole_numbers,
)
from wherefrom.tools.report.section import Section, Tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = [  # color, dashes and marker of each ranking
    (POSITIVE, "-", "o"),
    (NEGATIVE, "-", "s"),
    (MUTED, DOTTED, "^"),
    (INK, "-", "D"),
    (NEGATIVE, DASHED, "v"),
    (POSITIVE, DASHED, "P"),
    (INK, DASHED, "X"),
]


@dataclass(frozen=True)
class Retraining(Section):
    """How the scores compare with models that were trained again.

    Args:
        lds: name of a method to its linear datamodeling score; the first is the one that the page is about.
        removal: what retraining without the highest-ranked examples did, for several rankings.

    Raises:
        InputError: if neither is given.
    """

    lds: Mapping[str, LDS] = field(default_factory=dict)
    removal: RemovalCurve | None = None

    template: ClassVar[str] = "retraining.html"
    anchor: ClassVar[str] = "truth"
    link: ClassVar[str] = "Against retraining"

    def __post_init__(self) -> None:
        if not self.lds and self.removal is None:
            raise expected("The section on retraining", "given lds or removal", "neither")

    def content(self) -> dict[str, Any]:
        """Return the numbers of both, and draw them."""
        return {
            "lds": self.lds,
            "lds_figure": draw_lds(self.lds) if self.lds else None,
            "removal": self.removal,
            "rankings": [] if self.removal is None else tabulate_removal(self.removal),
            "removal_figure": None if self.removal is None else draw_removal(self.removal),
        }

    def tiles(self) -> list[Tile]:
        """Return the linear datamodeling score of the first method."""
        for name, score in self.lds.items():
            low, high = score.interval
            return [Tile(f"{score.mean:.2f}", f"LDS of {name} ({low:.2f} to {high:.2f})")]
        return []


def tabulate_removal(curve: RemovalCurve) -> list[dict[str, Any]]:
    """Return each ranking's mean changes and intervals by count.

    Its "wins" are the queries in which it is above random at the largest count, and None for random itself.
    """
    rankings = []
    for name, change in curve.changes.items():
        ranking = {
            "name": name,
            "means": change.mean(1).tolist(),
            "intervals": curve.intervals[name].tolist(),
            "wins": None if name == "random" else int(curve.wins(name)[-1]),
        }
        rankings.append(ranking)
    return rankings


def draw_lds(scores: Mapping[str, LDS]) -> str:
    """Draw linear datamodeling scores with their intervals, and the ceiling that the noise of retraining sets."""
    ceiling = next((score.ceiling for score in scores.values() if score.ceiling is not None), None)

    def draw(axes: Axes) -> None:
        heights = np.arange(len(scores))[::-1]
        for height, (name, score) in zip(heights, scores.items(), strict=True):
            mean = 0.0 if np.isnan(score.mean) else score.mean
            color = POSITIVE if height == heights[0] else MUTED
            axes.barh(height, mean, height=0.42, color=color, alpha=0.85)
            axes.plot(score.interval, [height, height], color=INK, lw=1.3)
            axes.plot(score.interval, [height, height], "|", color=INK, ms=7, mew=1.3)
            place = {"va": "bottom", "xytext": (2, 1), "textcoords": "offset points"}
            axes.annotate(f"{name}: {score.mean:.2f}", (0, height + 0.3), color=INK, **place)

        if ceiling is not None:
            axes.axvline(ceiling, color=MUTED, lw=1.2, ls=DASHED)
            place = {"ha": "right", "va": "bottom", "xytext": (-4, 0), "textcoords": "offset points"}
            axes.annotate("ceiling", (ceiling, len(scores) - 0.32), color=MUTED, **place)

        lows = [score.interval[0] for score in scores.values() if not np.isnan(score.mean)]
        left = 1.1 * min([0.0, *lows])
        axes.set(xlim=(left, 1), ylim=(-0.55, len(scores) - 0.05), xlabel="rank correlation with retraining (LDS)")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.grid(axis="x")

    words = "; ".join(f"{name} {score.mean:.2f}" for name, score in scores.items())
    return draw_svg(draw, f"Linear datamodeling scores: {words}.", height=max(1.9, 0.9 + 0.6 * len(scores)))


def draw_removal(curve: RemovalCurve) -> str:
    """Draw the mean change of f against the number of examples removed before retraining, for each ranking."""
    counts = np.append(0, curve.counts)
    looks = _choose_looks(curve.changes)

    def draw(axes: Axes) -> None:
        for name, change in curve.changes.items():
            color, dash, marker = looks[name]
            low, high = np.vstack([(0, 0), curve.intervals[name]]).T
            axes.fill_between(counts, low, high, color=color, alpha=0.14, lw=0)
            mean = np.append(0, change.mean(1))
            axes.plot(counts, mean, color=color, ls=dash, marker=marker, ms=3.5, lw=1.6, label=name)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set(xlim=(0, 1.02 * counts[-1]), xlabel="examples removed", ylabel="mean change of f")
        place_whole_numbers(axes.xaxis, most=6)
        axes.grid(axis="y")
        add_legend(axes)

    legend_rows = -(-len(curve.changes) // count_columns(curve.changes))
    words = "; ".join(f"{name} {change[-1].mean():+.3g}" for name, change in curve.changes.items())
    description = f"Change of f after {counts[-1]} examples were removed, by ranking: {words}."
    return draw_svg(draw, description, height=2.6 + 0.2 * legend_rows)


def _choose_looks(names: Iterable[str]) -> dict[str, tuple[Any, Any, str]]:
    """Return a look for each ranking: our own have the first ones on every page, the others take turns at the rest."""
    own = dict(zip(OURS, LOOKS, strict=False))
    looks = {name: own[name] for name in names if name in own}
    others = cycle([look for look in LOOKS if look not in looks.values()])
    return looks | {name: next(others) for name in names if name not in own}
