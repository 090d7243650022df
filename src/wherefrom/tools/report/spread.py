"""The section on how influence is spread over the training examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wherefrom import Scores
from wherefrom.tools.evaluate.arrays import Floats, float_array
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
    draw_svg,
    format_percent,
    format_powers,
    place_ticks,
    thin_out,
    write_power,
)
from wherefrom.tools.report.section import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES: list[tuple[str, Callable[[Tail], float], str]] = [  # name, value, and how it is written
    ("the strongest example holds", lambda t: float(t.covered[0]), ".1%"),
    ("the top 1% of the examples hold", lambda t: t.top, ".1%"),
    ("examples that hold half", lambda t: np.searchsorted(t.covered, 0.5) + 1, ",.0f"),
    ("Gini coefficient", lambda t: t.gini, ".2f"),
    ("exponent of the tail, Hill", lambda t: t.hill, ".2f"),
    ("exponent of the tail, line", lambda t: t.slope, ".2f"),
    ("R² of the line", lambda t: t.r2, ".3f"),
]
TOP = 1  # the measure by which queries are ordered, from the most even to the most concentrated


@dataclass(frozen=True)
class Spread(Section):
    """How influence is spread over the training examples: a histogram of all scores, and each query's upper tail.

    Args:
        scores: (Q, N) scores of at least one query.
    """

    scores: Scores

    template: ClassVar[str] = "spread.html"
    anchor: ClassVar[str] = "spread"
    link: ClassVar[str] = "Spread"

    def content(self) -> dict[str, Any]:
        """Measure the tails, and draw them and the histogram."""
        queries, examples = self.scores.values.shape
        total = self.scores.provenance.get("examples", examples)
        changes = float_array(self.scores, "scores", (2,)) / total  # (Q, N), the predicted changes of f
        tails = measure_tails(changes)
        return {
            "queries": queries,
            "count": queries * examples,
            "lines": LINES,
            "histogram": draw_histogram(changes),
            "tails": tails,
            "tail_figure": None if tails is None else draw_tails(tails),
            "covered_figure": None if tails is None else draw_covered(tails),
        }


@dataclass(frozen=True)
class Tails:
    """The tails of the queries that have a positive score, from the most even query to the most concentrated.

    Args:
        values: (measures, queries).
        drawn: at most so many of the queries as a figure shows.
        median: the median query by the share of the top 1%; it is one of those drawn.
    """

    values: Floats
    drawn: list[Tail]
    median: Tail

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """Each measure's name, and its median, least and largest value; dashes where it does not exist."""
        rows = []
        for (name, _, form), values in zip(MEASURES, self.values, strict=True):
            numbers = [np.median(values), values.min(), values.max()]
            words = ["–" if np.isnan(number) else format(number, form) for number in numbers]
            rows.append((name, words))
        return rows


def measure_tails(scores: Floats) -> Tails | None:
    """Measure how each query's positive scores are spread; None if nothing helps any query.

    Args:
        scores: (Q, N).
    """
    helped = [row for row in scores if (row > 0).any()]
    if not helped:
        return None

    values = []
    for row in helped:
        tail_of_row = tail(row)
        values.append([measure(tail_of_row) for _, measure, _ in MEASURES])
    values = np.array(values)  # (queries, measures)

    order = np.argsort(values[:, TOP], kind="stable")
    middle = len(order) // 2
    places = np.union1d(thin_out(np.arange(len(order)), LINES), middle)
    # Only the tails that are drawn are held: of many queries and examples all of them would not fit.
    drawn = [tail(helped[query]) for query in order[places]]
    return Tails(values.T, drawn, median=drawn[int(np.searchsorted(places, middle))])


def draw_tails(tails: Tails) -> str:
    """Draw the share of examples with a larger score against the score, on logarithmic axes, with the fitted line."""
    median = tails.median
    total = median.sizes.sum()
    has_line = not np.isnan(median.slope)
    slope = f"slope −{median.slope:.2f}" if has_line else "no tail to fit"

    def draw(axes: Axes) -> None:
        _draw_lines(axes, tails, lambda t: (t.sizes / t.sizes.sum(), t.ranks))
        if has_line:
            ends = np.array([median.sizes[median.length], median.sizes[0]]) * [0.7, 1.4]
            axes.plot(ends / total, median.line(ends), color=NEGATIVE, lw=1.6, ls=DASHED)
            place: dict[str, Any] = {"ha": "right", "xytext": (-8, -4), "textcoords": "offset points"}
            end = (ends[1] / total, median.line(ends)[1])
            axes.annotate(slope, end, color=NEGATIVE, weight="bold", **place)

        # The lower half of the scores, near zero, would take up most of a logarithmic axis.
        left = min(t.sizes[len(t.sizes) // 2] / t.sizes.sum() for t in tails.drawn)
        axes.set(xscale="log", yscale="log", ylabel="share of examples above")
        axes.set(xlim=(left, None), xlabel="share of the query's positive influence")
        format_powers(axes.xaxis)
        format_powers(axes.yaxis)
        axes.grid()

    axes_named = "Share of examples above a score against the score, both logarithmic"
    return draw_svg(draw, f"{axes_named}; the median query: {slope}.")


def draw_covered(tails: Tails) -> str:
    """Draw the cumulative influence c(k) against the number of examples k, largest first."""
    n = tails.median.examples

    def draw(axes: Axes) -> None:
        _draw_lines(axes, tails, lambda t: (np.arange(len(t.sizes)) + 1, t.covered))
        k = np.geomspace(1, n, POINTS)
        axes.plot(k, k / n, color=MUTED, lw=1.2, ls=DOTTED)
        axes.axvline(max(1, n / 100), color=MUTED, lw=1.2, ls=DASHED)
        axes.set(xscale="log", xlabel="examples, the strongest first", ylabel="influence they hold")
        axes.set(xlim=(1, max(2, n)), ylim=(0, 1.02))
        format_powers(axes.xaxis)
        format_percent(axes.yaxis)
        axes.grid(axis="y")

    share = f"in the median query the top 1% of the examples hold {tails.median.top:.0%}"
    return draw_svg(draw, f"Cumulative influence; {share}.")


def _draw_lines(axes: Axes, tails: Tails, points: Callable[[Tail], tuple[NDArray, NDArray]]) -> None:
    """Draw a thin line for each query, and a thick one for the median query, on top."""
    for each in [*tails.drawn, tails.median]:
        x, y = points(each)
        places = np.unique(np.geomspace(1, len(x), POINTS // 2).astype(int)) - 1
        is_median = each is tails.median
        color, width, alpha = (INK, 1.8, 1) if is_median else (POSITIVE, 0.7, 0.4)
        axes.plot(x[places], y[places], color=color, lw=width, alpha=alpha)


def draw_histogram(scores: Floats) -> str:
    """Draw a histogram of all predicted changes, linear near zero and logarithmic further out, on both sides."""
    ordered = np.sort(scores.ravel())
    size = np.abs(ordered)
    nonzero = size[size > 0]
    # Both ends of the logarithmic part are powers of ten: the inner one is below three quarters of the sizes.
    inner = 10.0 ** np.floor(np.log10(np.quantile(nonzero, 0.25))) if len(nonzero) else 1.0
    outer = 10.0 ** np.ceil(np.log10(max(float(size.max()), 10 * inner)))
    decades = round(np.log10(outer / inner))

    def place(value: Any) -> Any:
        """Return where a change stands: 0 at zero, 1 at the end of the linear part, and one more per decade."""
        size = np.abs(value)
        logarithmic = 1 + np.log10(np.maximum(size, inner) / inner)
        return np.sign(value) * np.where(size <= inner, size / inner, logarithmic)

    def write_place(place: float) -> str:
        if place == 0:
            return "0"
        sign = "+" if place > 0 else "−"
        return sign + write_power(inner * 10 ** (abs(place) - 1))

    def draw(axes: Axes) -> None:
        edges = np.linspace(-decades - 1, decades + 1, 12 * (decades + 1) + 1)
        counts, _ = np.histogram(place(ordered), edges)
        share = counts / len(ordered)
        middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        for side, color in ((middle < 0, NEGATIVE), (middle >= 0, POSITIVE)):
            axes.bar(middle[side], share[side], width=0.86 * width, color=color)

        reach = np.abs(place(ordered[[0, -1]])).max() + 0.3
        axes.set(xlim=(-reach, reach), xlabel="predicted change of f on removal", ylabel="share of scores")
        # The names of more than nine ticks would run into each other.
        every = 2 if reach > 4.5 else 1
        ticks = [k for k in range(1, decades + 2, every) if k <= reach]
        place_ticks(axes.xaxis, [-k for k in ticks[::-1]] + [0] + ticks, write_place)
        format_percent(axes.yaxis)

        top = float(share.max()) * 1.25
        axes.set_ylim(0, top)
        axes.annotate("◀ f would fall: it hurt", (-0.95 * reach, 0.93 * top), color=NEGATIVE, weight="bold")
        right: dict[str, Any] = {"color": POSITIVE, "weight": "bold", "ha": "right"}
        axes.annotate("f would rise: it helped ▶", (0.95 * reach, 0.93 * top), **right)
        axes.grid(axis="y")

    negative = float((ordered < 0).mean())
    return draw_svg(draw, f"Histogram of {len(ordered):,} predicted changes; {negative:.0%} are negative.")
