"""How numbers are written on the page."""

from __future__ import annotations

import math


def signed(value: float) -> str:
    """Write three significant digits, always with a sign, and a minus as wide as the plus."""
    plus = "+" if value > 0 else ""
    return plus + format_digits(value, 3)


def short(value: float | None) -> str:
    """Write two significant digits."""
    return "–" if value is None else format_digits(value, 2)


def format_digits(value: float, count: int) -> str:
    """Write so many significant digits, plainly between a thousandth and a million, else as a power of ten."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{count - 1}e}")
    if rounded == 0:
        return "0"
    if not 1e-3 <= abs(rounded) < 1e6:
        return f"{value:.{count - 1}e}".replace("-", "−")

    # Of 12.34 with three digits one stands after the point: as many as remain after those before it.
    before = 1 + math.floor(math.log10(abs(rounded)))
    after = max(0, count - before)
    return f"{rounded:,.{after}f}".replace("-", "−")
