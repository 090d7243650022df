"""The section on how influence is spread over the training examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from wherefrom.tools.evaluate.arrays import Floats
from wherefrom.tools.evaluate.tail import Tail, tail
from wherefrom.tools.report.drawing import (
    DASHED,
    DOTTED,
    INK,
    LINES,
    MUTED,
    NEGATIVE,
    POINTS,
    POSITIVE,
    logarithmic,
    percent,
    power,
    svg,
    thinned,
)

MEASURES: list[tuple[str, Callable[[Tail], float], str]] = [
    ("the strongest example holds", lambda t: float(t.covered[0]), ".1%"),
    ("the top 1% of the examples hold", lambda t: t.top, ".1%"),
    ("examples that hold half", lambda t: np.searchsorted(t.covered, 0.5) + 1, ",.0f"),
    ("Gini coefficient", lambda t: t.gini, ".2f"),
    ("exponent of the tail, Hill", lambda t: t.hill, ".2f"),
    ("exponent of the tail, line", lambda t: t.slope, ".2f"),
    ("R² of the line", lambda t: t.r2, ".3f"),
]


@dataclass(frozen=True)
class Spread:
    """The queries that have a positive score, from the most even to the most concentrated.

    Args:
        values: (measures, queries).
        drawn: at most so many of the queries as a figure shows.
        middle: the median query by the share of the top 1%; it is one of those drawn.
    """

    values: Floats
    drawn: list[Tail]
    middle: Tail

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """Each measure's median over the queries, and its range; dashes where it does not exist."""
        found = []
        for (name, _, form), row in zip(MEASURES, self.values, strict=True):
            ends = [np.median(row), row.min(), row.max()]
            found.append((name, ["–" if np.isnan(v) else format(v, form) for v in ends]))
        return found


def measure(scores: Floats) -> Spread | None:
    """How each query's positive scores are spread; None if nothing helps any query.

    Args:
        scores: (Q, N).
    """
    helped = [row for row in scores if (row > 0).any()]
    if not helped:
        return None
    values = np.array([[f(t) for _, f, _ in MEASURES] for t in map(tail, helped)])  # (queries, measures)
    order = np.argsort(values[:, 1], kind="stable")
    middle = len(order) // 2
    drawn = np.union1d(thinned(np.arange(len(order)), LINES), middle)
    tails = [tail(helped[q]) for q in order[drawn]]
    return Spread(values.T, tails, tails[int(np.searchsorted(drawn, middle))])


def tails(found: Spread) -> str:
    """The share of examples with a larger score against the score, on logarithmic axes, with the fitted line."""
    one = found.middle
    total = one.sizes.sum()

    def draw(axes: Axes) -> None:
        _lines(axes, found, lambda t: (t.sizes / t.sizes.sum(), t.ranks))
        if not np.isnan(one.slope):
            ends = np.array([one.sizes[one.length], one.sizes[0]]) * [0.7, 1.4]
            axes.plot(ends / total, one.line(ends), color=NEGATIVE, lw=1.6, ls=DASHED)
            place: dict[str, Any] = {"ha": "right", "xytext": (-8, -4), "textcoords": "offset points"}
            axes.annotate(slope, (ends[1] / total, one.line(ends)[1]), color=NEGATIVE, weight="bold", **place)
        left = min(t.sizes[len(t.sizes) // 2] / t.sizes.sum() for t in found.drawn)
        axes.set(xscale="log", yscale="log", ylabel="share of examples above")
        axes.set(xlim=(left, None), xlabel="share of the query's positive influence")
        logarithmic(axes.xaxis)
        logarithmic(axes.yaxis)
        axes.grid()

    slope = "no tail to fit" if np.isnan(one.slope) else f"slope −{one.slope:.2f}"
    return svg(draw, f"Share of examples above a score against the score, both logarithmic; the median query: {slope}.")


def covered(found: Spread) -> str:
    """The cumulative influence c(k) against the number of examples k, largest first."""
    n = found.middle.examples

    def draw(axes: Axes) -> None:
        _lines(axes, found, lambda t: (np.arange(len(t.sizes)) + 1, t.covered))
        k = np.geomspace(1, n, POINTS)
        axes.plot(k, k / n, color=MUTED, lw=1.2, ls=DOTTED)
        axes.axvline(max(1, n / 100), color=MUTED, lw=1.2, ls=DASHED)
        axes.set(xscale="log", xlabel="examples, the strongest first", ylabel="influence they hold")
        axes.set(xlim=(1, max(2, n)), ylim=(0, 1.02))
        logarithmic(axes.xaxis)
        percent(axes.yaxis)
        axes.grid(axis="y")

    said = f"in the median query the top 1% of the examples hold {found.middle.top:.0%}"
    return svg(draw, f"Cumulative influence; {said}.")


def _lines(axes: Axes, found: Spread, points: Callable[[Tail], tuple[NDArray, NDArray]]) -> None:
    """A thin line for each query, and a thick one for the median query, on top."""
    for one in [*found.drawn, found.middle]:
        x, y = points(one)
        at = np.unique(np.geomspace(1, len(x), POINTS // 2).astype(int)) - 1
        thick = one is found.middle
        axes.plot(x[at], y[at], color=INK if thick else POSITIVE, lw=1.8 if thick else 0.7, alpha=1 if thick else 0.4)


def distribution(scores: Floats) -> str:
    """A histogram of all predicted changes, linear near zero and logarithmic further out, harm and help apart."""
    flat = np.sort(scores.ravel())
    size = np.abs(flat)
    positive = size[size > 0]
    inner = 10.0 ** np.floor(np.log10(np.quantile(positive, 0.25))) if len(positive) else 1.0
    outer = 10.0 ** np.ceil(np.log10(max(float(size.max()), 10 * inner)))
    decades = round(np.log10(outer / inner))

    def place(v: Any) -> Any:  # 0 at zero, 1 at the end of the linear part, one more per decade
        return np.sign(v) * np.where(
            np.abs(v) <= inner, np.abs(v) / inner, 1 + np.log10(np.maximum(np.abs(v), inner) / inner)
        )

    def draw(axes: Axes) -> None:
        edges = np.linspace(-decades - 1, decades + 1, 12 * (decades + 1) + 1)
        counts, _ = np.histogram(place(flat), edges)
        middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        share = counts / len(flat)
        for side, color in ((middle < 0, NEGATIVE), (middle >= 0, POSITIVE)):
            axes.bar(middle[side], share[side], width=0.86 * width, color=color)
        reach = np.abs(place(flat[[0, -1]])).max() + 0.3
        axes.set(xlim=(-reach, reach), xlabel="predicted change of f on removal", ylabel="share of scores")
        every = 1 + int(reach > 4.5)
        ticks = [k for k in range(1, decades + 2, every) if k <= reach]
        axes.xaxis.set_major_locator(FixedLocator([-k for k in ticks[::-1]] + [0] + ticks))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda v, _: "0" if v == 0 else ("+" if v > 0 else "−") + power(inner * 10 ** (abs(v) - 1)))
        )
        percent(axes.yaxis)
        top = float(share.max()) * 1.25
        axes.set_ylim(0, top)
        axes.annotate("◀ f would fall: it hurt", (-0.95 * reach, 0.93 * top), color=NEGATIVE, weight="bold")
        axes.annotate(
            "f would rise: it helped ▶", (0.95 * reach, 0.93 * top), color=POSITIVE, weight="bold", ha="right"
        )
        axes.grid(axis="y")

    share = float((flat < 0).mean())
    return svg(draw, f"Histogram of {len(flat):,} predicted changes; {share:.0%} are negative.")
