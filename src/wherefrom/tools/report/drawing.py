"""How every figure of the page is drawn: inline SVG in colours that the page sets, so that it follows light and dark.

Colours come from the Okabe-Ito palette, which is safe for colour-blind readers; no figure tells its story by hue alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # what the report alone needs is imported when a report is made
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

DASHED, DOTTED = (0, (5, 2)), (0, (1, 2))
LINES, POINTS = 60, 200  # of a figure, at most; more queries are thinned out by rank, more points evenly
LONGEST = 50  # letters of a name in a legend

# Stand-ins that no figure uses otherwise; `draw_svg` puts the page's own colours in their place.
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


def thin_out(order: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of an order, evenly from its first to its last."""
    places = np.linspace(0, len(order) - 1, min(len(order), most))
    return order[np.unique(places.round().astype(int))]


def write_power(value: float) -> str:
    """Write a power of ten as an axis names it."""
    exponent = round(float(np.log10(value)))
    if -3 <= exponent <= 3:
        return f"{value:g}"
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}"


def draw_svg(draw: Callable[..., None], description: str, height: float = 2.7, panels: int = 1) -> str:
    """Draw a figure as an <svg> element of the page.

    Args:
        draw: fills the axes that it is given, as many as there are panels; these lie below each other and share their
            x axis.
        description: for those who do not see it.
        height: in inches; the width is 4.5.
        panels: how many.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes the ids within a figure the same in every run, and different from those of other figures.
    style: Any = STYLE | {"svg.hashsalt": description}
    with rc_context(style):
        figure = Figure(figsize=(4.5, height), layout="constrained")
        draw(*figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})

    text = file.getvalue()
    text = text[text.index("<svg") :]
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return _label(_strip_document(text), description).strip()


def _strip_document(text: str) -> str:
    """Remove from an <svg> what only a file of its own needs."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # HTML knows the two name spaces.
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)

    # Ids that are referred to hold the salt. The others, such as "axes_1", would be on the page once for each figure.
    used = set(re.findall(r'#([^")]+)[")]', text))
    return re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)


def _label(text: str, description: str) -> str:
    """Put the description of an <svg> where a screen reader finds it."""
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def format_powers(axis: Axis) -> None:
    """Name the ticks of an axis that is already logarithmic, at powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_major_formatter(FuncFormatter(lambda value, _: write_power(value)))
    axis.set_minor_locator(NullLocator())


def format_percent(axis: Axis) -> None:
    """Name the ticks of an axis of shares."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def place_whole_numbers(axis: Axis, most: int = 10) -> None:
    """Put ticks at whole numbers, with at most so many steps between them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True))


def place_ticks(axis: Axis, places: Sequence[int], write: Callable[[float], str]) -> None:
    """Put ticks at these places, named by a function of the place."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def add_legend(axes: Axes) -> None:
    """Say above the lines what they are, in as many columns as fit."""
    lines, names = axes.get_legend_handles_labels()
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in names]
    axes.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=count_columns(names), frameon=False)


def count_columns(names: Collection[str]) -> int:
    """Return in how many columns a legend of these names fits above a figure."""
    longest = max(map(len, names))
    return max(1, min(3, 66 // (8 + longest)))
