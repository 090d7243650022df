"""How numbers are written on the page."""

from __future__ import annotations

import math


def signed(value: float) -> str:
    """Three significant digits, always with a sign, and a minus as wide as the plus."""
    return ("+" if value > 0 else "") + digits(value, 3)


def short(value: float | None) -> str:
    """Two significant digits."""
    return "–" if value is None else digits(value, 2)


def digits(value: float, count: int) -> str:
    """So many significant digits, plainly written between a thousandth and a million, else as a power of ten."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{count - 1}e}")
    if rounded == 0 or not 1e-3 <= abs(rounded) < 1e6:
        return f"{value:.{count - 1}e}".replace("-", "−") if rounded else "0"
    after = max(0, count - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{after}f}".replace("-", "−")
