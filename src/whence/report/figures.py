"""The page's figures as inline SVG, in colours that the page sets, so that they follow light and dark and print well.

Colours come from the Okabe-Ito palette, which is safe for colour-blind readers; no figure tells its story by hue alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from whence.evaluate.lds import LDS, Floats
from whence.evaluate.mislabeled import MislabeledCurve
from whence.report.examples import missing

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
except ImportError as error:
    raise missing("matplotlib") from error

# Stand-ins that no figure uses otherwise; `_svg` puts the page's own colours in their place.
INK, MUTED, GRID, POSITIVE, NEGATIVE, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", POSITIVE: "positive", NEGATIVE: "negative", PAPER: "paper"}

LINES, POINTS = 60, 200  # of a figure, at most; more queries are thinned by rank, more steps evenly

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def detection(curve: MislabeledCurve) -> str:
    """The share of the mislabelled examples found against the share of examples looked at, most suspicious first."""

    def draw(axes: Axes) -> None:
        axes.plot(curve.fractions, curve.oracle, color=MUTED, lw=1.2, ls=(0, (5, 2)))
        axes.plot(curve.fractions, curve.random, color=MUTED, lw=1.2, ls=(0, (1, 2)))
        axes.plot(curve.fractions, curve.detection, color=POSITIVE, lw=2.2)
        axes.annotate("perfect order", (0.04, 1.045), color=MUTED)
        axes.annotate("random order", (0.60, 0.53), color=MUTED)
        at = int(np.searchsorted(curve.fractions, min(0.97, 1.6 * curve.base_rate + 0.05)))
        height = float(curve.detection[at])
        axes.annotate("this ranking", (float(curve.fractions[at]) + 0.03, height - 0.12), color=POSITIVE, weight="bold")
        axes.set(xlim=(0, 1), ylim=(0, 1.14), xlabel="examples looked at", ylabel="wrong labels found")
        axes.set_yticks(np.linspace(0, 1, 5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")

    found = np.interp(curve.base_rate, curve.fractions, curve.detection)
    return _svg(
        draw, f"Detection curve: the first {curve.base_rate:.0%} of the ranking hold {found:.0%} of the wrong labels."
    )


def residuals(history: Tensor, converged: Tensor, tolerance: float | None, final: Tensor | None) -> str:
    """Each query's relative residual over the solver's steps, (steps + 1, Q), the worst of them set apart.

    Args:
        history: relative residuals as the solver saw them.
        converged: whether each query did, (Q,); those that did not end in a cross.
        tolerance: drawn as a dashed line.
        final: what the worst query is told by, (Q,); None: the last of the history.
    """
    values = history.detach().double().cpu().numpy()
    ends = values[-1] if final is None else final.detach().double().cpu().numpy()
    order = np.argsort(-np.nan_to_num(ends, nan=np.inf), kind="stable")
    drawn = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), LINES)).round().astype(int))]
    worst, late, positive = int(order[0]), int((~converged).sum()), values[values > 0]

    def draw(axes: Axes) -> None:
        for q in drawn[::-1]:  # the worst last, on top
            steps, missed, first = _moving(values[:, q]), not bool(converged[q]), q == worst
            at = np.unique(np.linspace(0, steps - 1, min(steps, POINTS)).round().astype(int))
            color = NEGATIVE if missed else INK if first else POSITIVE
            line = values[at, q].clip(1e-300)
            axes.plot(at, line, color=color, lw=1.7 if first else 0.7, alpha=1 if first else 0.5)
            axes.plot(at[-1], line[-1], "x" if missed else "o", ms=4.5 if missed else 2.5, c=color)
            if first:
                name, place = f"query {q}" + (", the worst" if len(order) > 1 else ""), {"ha": "right", "va": "top"}
                axes.annotate(name, (0.99, 0.99), xycoords="axes fraction", color=color, weight="bold", **place)
        axes.set(yscale="log", xlim=(0, None), xlabel="step", ylabel="relative residual")
        low = [float(positive.min())] if len(positive) else []
        if tolerance is not None:
            low.append(tolerance)
            axes.axhline(tolerance, color=MUTED, lw=1.2, ls=(0, (5, 2)))
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(f"tolerance {tolerance:g}", (0.02, tolerance), (0, -11), color=MUTED, **place)
        axes.set_ylim(bottom=min(low, default=0.1) / 2.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _power(v)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y")

    said = f"Relative residuals of {len(order)} queries over {len(values) - 1} steps; {late} did not converge; "
    return _svg(draw, said + f"the worst is query {worst}, which ends at {values[-1, worst]:.1e}.")


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
        reach = np.abs(place(flat)).max() + 0.3
        axes.set(xlim=(-reach, reach), xlabel="predicted change of f on removal", ylabel="share of scores")
        every = 1 + int(reach > 4.5)
        ticks = [k for k in range(1, decades + 2, every) if k <= reach]
        axes.xaxis.set_major_locator(FixedLocator([-k for k in ticks[::-1]] + [0] + ticks))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda v, _: "0" if v == 0 else ("+" if v > 0 else "−") + _power(inner * 10 ** (abs(v) - 1)))
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        top = float(share.max()) * 1.25
        axes.set_ylim(0, top)
        axes.annotate("◀ f would fall: it hurt", (-0.95 * reach, 0.93 * top), color=NEGATIVE, weight="bold")
        axes.annotate(
            "f would rise: it helped ▶", (0.95 * reach, 0.93 * top), color=POSITIVE, weight="bold", ha="right"
        )
        axes.grid(axis="y")

    share = float((flat < 0).mean())
    return _svg(draw, f"Histogram of {len(flat):,} predicted changes; {share:.0%} are negative.")


def lds_bars(found: Mapping[str, LDS]) -> str:
    """Linear datamodeling scores with their intervals, and the ceiling that the noise of retraining sets."""
    names, scores = list(found), list(found.values())
    ceiling = next((score.ceiling for score in scores if score.ceiling is not None), None)

    def draw(axes: Axes) -> None:
        heights = np.arange(len(names))[::-1]
        for height, name, score in zip(heights, names, scores, strict=True):
            mean = 0.0 if np.isnan(score.mean) else score.mean
            axes.barh(height, mean, height=0.42, color=POSITIVE if height == heights[0] else MUTED, alpha=0.85)
            axes.plot(score.interval, [height, height], color=INK, lw=1.3)
            axes.plot(score.interval, [height, height], "|", color=INK, ms=7, mew=1.3)
            axes.annotate(f"{name}: {score.mean:.2f}", (0, height + 0.3), color=INK, va="bottom", xytext=(2, 1),
                          textcoords="offset points")  # fmt: skip
        if ceiling is not None:
            axes.axvline(ceiling, color=MUTED, lw=1.2, ls=(0, (5, 2)))
            axes.annotate("ceiling", (ceiling, len(names) - 0.32), color=MUTED, ha="right", va="bottom", xytext=(-4, 0),
                          textcoords="offset points")  # fmt: skip
        low = min([0.0, *(score.interval[0] for score in scores if not np.isnan(score.mean))])
        axes.set(xlim=(1.1 * low, 1), ylim=(-0.55, len(names) - 0.05), xlabel="rank correlation with retraining (LDS)")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.grid(axis="x")

    words = "; ".join(f"{name} {score.mean:.2f}" for name, score in found.items())
    return _svg(draw, f"Linear datamodeling scores: {words}.", height=max(1.9, 0.9 + 0.6 * len(names)))


def _moving(history: Floats) -> int:
    """How many of a query's residuals there are before it was frozen."""
    last = len(history)
    while last > 2 and history[last - 2] == history[-1]:
        last -= 1
    return last


def _power(value: float) -> str:
    exponent = round(float(np.log10(value)))
    return (
        f"{value:g}"
        if -3 <= exponent <= 3
        else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def _svg(draw: Any, description: str, height: float = 2.7) -> str:
    """The figure as an <svg> element of the page, with a description for those who do not see it."""
    style: Any = STYLE | {"svg.hashsalt": description}
    with rc_context(style):
        figure = Figure(figsize=(4.5, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)  # HTML knows both
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    used = set(re.findall(r'#([^")]+)[")]', text))  # the salt makes these differ between figures, the others do not
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
