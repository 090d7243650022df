"""The figures on how far to trust the scores: residuals, retraining, removal, detection, and other dampings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from wherefrom.tools.evaluate.arrays import Floats
from wherefrom.tools.evaluate.lds import LDS
from wherefrom.tools.evaluate.mislabeled import MislabeledCurve
from wherefrom.tools.evaluate.removal import OURS, RemovalCurve
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
    svg,
    thinned,
)

LOOKS = [
    (POSITIVE, "-", "o"),
    (NEGATIVE, "-", "s"),
    (MUTED, DOTTED, "^"),
    (INK, "-", "D"),
    (NEGATIVE, DASHED, "v"),
    (POSITIVE, DASHED, "P"),
    (INK, DASHED, "X"),
]
LONGEST = 50  # letters of a name in a legend


def detection(curve: MislabeledCurve) -> str:
    """The share of the mislabelled examples found against the share of examples looked at, most suspicious first."""

    def draw(axes: Axes) -> None:
        axes.plot(curve.fractions, curve.oracle, color=MUTED, lw=1.2, ls=DASHED)
        axes.plot(curve.fractions, curve.random, color=MUTED, lw=1.2, ls=DOTTED)
        axes.fill_between(curve.fractions, *curve.detection_interval.T, color=POSITIVE, alpha=0.14, lw=0)
        axes.plot(curve.fractions, curve.detection, color=POSITIVE, lw=2.2)
        axes.annotate("perfect order", (0.04, 1.045), color=MUTED)
        axes.annotate("random order", (0.60, 0.53), color=MUTED)
        at = int(np.searchsorted(curve.fractions, min(0.97, 1.6 * curve.base_rate + 0.05)))
        height = float(curve.detection[at])
        axes.annotate("this ranking", (float(curve.fractions[at]) + 0.03, height - 0.12), color=POSITIVE, weight="bold")
        axes.set(xlim=(0, 1), ylim=(0, 1.14), xlabel="examples looked at", ylabel="wrong labels found")
        axes.set_yticks(np.linspace(0, 1, 5))
        percent(axes.xaxis)
        percent(axes.yaxis)
        axes.grid(axis="y")

    found = np.interp(curve.base_rate, curve.fractions, curve.detection)
    return svg(
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
    drawn = thinned(order, LINES)
    worst, late, positive = int(order[0]), int((~converged).sum()), values[values > 0]

    def draw(axes: Axes) -> None:
        for q in drawn[::-1]:  # the worst last, on top
            steps, missed, first = _moving(values[:, q]), not bool(converged[q]), q == worst
            at = thinned(np.arange(steps), POINTS)
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
            axes.axhline(tolerance, color=MUTED, lw=1.2, ls=DASHED)
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(f"tolerance {tolerance:g}", (0.02, tolerance), (0, -11), color=MUTED, **place)
        axes.set_ylim(bottom=min(low, default=0.1) / 2.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        logarithmic(axes.yaxis)
        axes.grid(axis="y")

    said = f"Relative residuals of {len(order)} queries over {len(values) - 1} steps; {late} did not converge; "
    return svg(draw, said + f"the worst is query {worst}, which ends at {values[-1, worst]:.1e}.")


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
            axes.axvline(ceiling, color=MUTED, lw=1.2, ls=DASHED)
            axes.annotate("ceiling", (ceiling, len(names) - 0.32), color=MUTED, ha="right", va="bottom", xytext=(-4, 0),
                          textcoords="offset points")  # fmt: skip
        low = min([0.0, *(score.interval[0] for score in scores if not np.isnan(score.mean))])
        axes.set(xlim=(1.1 * low, 1), ylim=(-0.55, len(names) - 0.05), xlabel="rank correlation with retraining (LDS)")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.grid(axis="x")

    words = "; ".join(f"{name} {score.mean:.2f}" for name, score in found.items())
    return svg(draw, f"Linear datamodeling scores: {words}.", height=max(1.9, 0.9 + 0.6 * len(names)))


def removal(curve: RemovalCurve) -> str:
    """The mean change of f against the number of examples removed before retraining, for each ranking."""
    counts = np.append(0, curve.counts)
    named = {name: look for name, look in zip(OURS, LOOKS, strict=False) if name in curve.changes}
    others = cycle([look for look in LOOKS if look not in named.values()])

    def draw(axes: Axes) -> None:
        for name, change in curve.changes.items():
            color, dash, mark = named.get(name) or next(others)
            low, high = np.vstack([(0, 0), curve.intervals[name]]).T
            axes.fill_between(counts, low, high, color=color, alpha=0.14, lw=0)
            mean = np.append(0, change.mean(1))
            axes.plot(counts, mean, color=color, ls=dash, marker=mark, ms=3.5, lw=1.6, label=name)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set(xlim=(0, 1.02 * counts[-1]), xlabel="examples removed", ylabel="mean change of f")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        legend(axes)

    rows = -(-len(curve.changes) // _columns(curve.changes))
    words = "; ".join(f"{name} {change[-1].mean():+.3g}" for name, change in curve.changes.items())
    return svg(
        draw, f"Change of f after {counts[-1]} examples were removed, by ranking: {words}.", height=2.6 + 0.2 * rows
    )


def sweep(rows: Sequence[Mapping[str, Any]], chosen: float) -> str:
    """Residual, rank agreement and LDS against the damping, one panel each, for what was measured."""
    names = {"residual": "residual", "agreement": "rank agreement", "lds": "LDS"}
    there = {key: [row for row in rows if row[key] is not None] for key in names}
    keys = [key for key in names if there[key]]

    def draw(*panels: Axes) -> None:
        for axes, key in zip(panels, keys, strict=True):
            x = [row["damping"] for row in there[key]]
            if key == "lds":
                mean = np.array([row[key].mean for row in there[key]])
                low, high = np.array([row[key].interval for row in there[key]]).T
                axes.errorbar(x, mean, (mean - low, high - mean), color=POSITIVE, marker="o", ms=3.5, capsize=3)
            else:
                middle, worst = zip(*(row[key] for row in there[key]), strict=True)
                axes.plot(x, middle, color=POSITIVE, marker="o", ms=3.5, label="median query")
                axes.plot(x, worst, color=NEGATIVE, ls=DASHED, marker="s", ms=3.5, lw=1.2, label="worst query")
            axes.axvline(chosen, color=MUTED, lw=1.2, ls=DOTTED)
            axes.set(xscale="log", ylabel=names[key])
            axes.grid(axis="y")
            if key == "residual":
                axes.set_yscale("log")
                logarithmic(axes.yaxis)
        ticks = thinned(np.array([row["damping"] for row in rows]), 7)
        logarithmic(panels[-1].xaxis)
        panels[-1].set_xticks(ticks, [f"{x:g}" for x in ticks])
        panels[-1].set_xlabel("damping λ")
        legend(panels[0])

    said = ", ".join(names[key] for key in keys)
    ends = f"{rows[0]['damping']:g} to {rows[-1]['damping']:g}"
    return svg(draw, f"{said} against dampings of {ends}.", height=0.7 + 1.2 * len(keys), rows=len(keys))


def legend(axes: Axes) -> None:
    """What the lines are, above them, in as many columns as fit."""
    lines, names = axes.get_legend_handles_labels()
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in names]
    axes.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=_columns(names), frameon=False)


def _columns(names: Iterable[str]) -> int:
    return max(1, min(3, 66 // (8 + max(map(len, names)))))


def _moving(history: Floats) -> int:
    """How many of a query's residuals there are before it was frozen."""
    last = len(history)
    while last > 2 and history[last - 2] == history[-1]:
        last -= 1
    return last
