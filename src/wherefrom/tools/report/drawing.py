"""How every figure of the page is drawn: inline SVG in colours that the page sets, so that it follows light and dark.

Colours come from the Okabe-Ito palette, which is safe for colour-blind readers; no figure tells its story by hue alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from numpy.typing import NDArray

DASHED, DOTTED = (0, (5, 2)), (0, (1, 2))
LINES, POINTS = 60, 200  # of a figure, at most; more queries are thinned by rank, more points evenly

# Stand-ins that no figure uses otherwise; `svg` puts the page's own colours in their place.
INK, MUTED, GRID, POSITIVE, NEGATIVE, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", POSITIVE: "positive", NEGATIVE: "negative", PAPER: "paper"}

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


def thinned(order: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of an order, evenly from its first to its last."""
    return order[np.unique(np.linspace(0, len(order) - 1, min(len(order), most)).round().astype(int))]


def power(value: float) -> str:
    """A power of ten as an axis names it."""
    exponent = round(float(np.log10(value)))
    raised = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}" if -3 <= exponent <= 3 else raised


def svg(draw: Callable[..., None], description: str, height: float = 2.7, rows: int = 1) -> str:
    """A figure as an <svg> element of the page.

    Args:
        draw: fills the axes that it is given, as many as there are rows; they share their x axis.
        description: for those who do not see it.
        height: in inches; the width is 4.5.
    """
    style: Any = STYLE | {"svg.hashsalt": description}
    with rc_context(style):
        figure = Figure(figsize=(4.5, height), layout="constrained")
        draw(*figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)  # HTML knows both
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r'#([^")]+)[")]', text))  # the salt makes these differ between figures, the others do not
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def logarithmic(axis: Axis) -> None:
    """Ticks of an axis that is already logarithmic, at powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: power(v)))
    axis.set_minor_locator(NullLocator())


def percent(axis: Axis) -> None:
    """Ticks of an axis of shares."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
