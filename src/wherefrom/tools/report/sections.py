"""What the sections that not every page has are made of: tables, layers, removal, a sweep of dampings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.scores import Scores
from wherefrom.tools.evaluate.arrays import float_array
from wherefrom.tools.evaluate.lds import LDS
from wherefrom.tools.evaluate.removal import RemovalCurve
from wherefrom.tools.evaluate.statistics import spearman
from wherefrom.tools.report.examples import Example
from wherefrom.tools.report.numbers import digits


@dataclass(frozen=True)
class Table:
    """Ranked rows, such as what to drop and why.

    Args:
        columns: name to one value per row: strings, numbers, bools or None; sequences, arrays or tensors.
        examples: shown in front of each row.
        lead: a paragraph above.

    Raises:
        InputError: if the columns or examples differ in length, or there is no column.
    """

    columns: Mapping[str, Any]
    examples: Sequence[Example] | None = None
    lead: str = ""

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if self.examples is not None:
            lengths["examples"] = len(self.examples)
        if not self.columns or len(set(lengths.values())) > 1:
            raise expected("A table of the report", "columns and examples of one length", lengths or "no column")


@dataclass(frozen=True)
class DampingSweep:
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

    def __post_init__(self) -> None:
        if not all(x > 0 for x in self.scores):
            raise expected("The dampings of a sweep", "positive", sorted(self.scores))
        unknown = {self.chosen, *self.lds} - set(self.scores)
        if unknown:
            raise expected("chosen and lds of a sweep", f"among its dampings {sorted(self.scores)}", sorted(unknown))
        shapes = {tuple(scores.values.shape) for scores in self.scores.values()}
        if len(shapes) > 1:
            raise expected("The scores of a sweep", "of one shape", sorted(shapes))


def ranked(title: str, table: Table) -> dict[str, Any]:
    """A table laid out: its columns' names and whether they hold numbers, and each row's example and cells."""
    columns = {name: [_cell(value) for value in values] for name, values in table.columns.items()}
    rows = list(zip(*columns.values(), strict=True))
    return {
        "title": title,
        "lead": table.lead,
        "heads": [
            (name, all(text == "–" or key is not None for text, key in cells)) for name, cells in columns.items()
        ],
        "shown": table.examples is not None,
        "rows": list(zip(table.examples or [None] * len(rows), rows, strict=True)),
    }


def sweep_rows(sweep: DampingSweep) -> list[dict[str, Any]]:
    """By damping: residual and agreement, of the median and of the worst query, and the LDS; None where unknown."""
    values = {x: float_array(scores, "scores", (2,)).T for x, scores in sorted(sweep.scores.items())}
    rows = []
    for x, value in values.items():
        residual, agreement = sweep.scores[x].residual, np.nan_to_num(spearman(values[sweep.chosen], value))
        rows.append(
            {
                "damping": x,
                "residual": None if residual is None else (float(residual.median()), float(residual.max())),
                "agreement": (float(np.median(agreement)), float(agreement.min())),
                "lds": sweep.lds.get(x),
            }
        )
    return rows


def layer_rows(layers: Mapping[str, Tensor], queries: int, shown: Sequence[int]) -> list[dict[str, Any]]:
    """Each block's share of the absolute contributions: the mean over all queries, and of each shown one.

    Args:
        layers: block name to (Q, n) contributions, in the order of the model.
        queries: Q.
        shown: numbers of the shown queries.

    Raises:
        InputError: if they are not all of one shape, with one row per query.
    """
    sizes = {name: np.abs(float_array(values, f"layers[{name!r}]", (2,))) for name, values in layers.items()}
    shapes = {size.shape for size in sizes.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] != queries:
        raise expected("layers", f"block name to contributions of one shape ({queries}, n)", sorted(shapes))
    sums = np.stack([size.sum(1) for size in sizes.values()])  # (blocks, Q)
    shares = sums / np.maximum(sums.sum(0), np.finfo(float).tiny)
    named = zip(sizes, shares, strict=True)
    return [
        {"name": name, "share": float(of.mean()), "of": of[list(shown)].tolist(), "largest": float(of.max())}
        for name, of in named
    ]


def removal_rows(curve: RemovalCurve) -> list[dict[str, Any]]:
    """Each ranking's mean changes and intervals by count, and in how many queries it is above random at the last."""
    return [
        {
            "name": name,
            "means": change.mean(1).tolist(),
            "intervals": curve.intervals[name].tolist(),
            "wins": None if name == "random" else int(curve.wins(name)[-1]),
        }
        for name, change in curve.changes.items()
    ]


def cost_rows(provenance: Mapping[str, Any], more: Mapping[str, float]) -> list[dict[str, Any]]:
    """Seconds of the attribution, of its parts, of what else there was, and of all."""
    parts = provenance.get("seconds", {})
    whole = ({"attribution": sum(parts.values())} if parts else {}) | dict(more)
    rows = [(name, seconds, "whole") for name, seconds in whole.items()]
    rows[1:1] = [(name, seconds, "part") for name, seconds in parts.items()]
    if len(whole) > 1:
        rows.append(("in all", sum(whole.values()), "all"))
    return [dict(zip(("name", "seconds", "kind"), row, strict=True)) for row in rows]


def _cell(value: Any) -> tuple[str, float | None]:
    """A cell's text, and what it is sorted by if it is a number."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value != value:  # NaN
        return "–", None
    if isinstance(value, bool):
        return "yes" if value else "no", None
    if isinstance(value, int):
        return str(value), value
    return (digits(value, 3), value) if isinstance(value, float) else (str(value), None)
