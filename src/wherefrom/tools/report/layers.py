"""The section on layers: which blocks of parameters the influence comes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import float_array
from wherefrom.tools.report.section import Section


@dataclass(frozen=True)
class Layers(Section):
    """The share of each block of parameters in the absolute contributions to some scores.

    Args:
        contributions: block name to (Q, n) contributions of n training examples, in the order of the model, as
            `Solution.by_block` returns them.
        show: the numbers of the queries that have a column; all have a part in the mean.

    Raises:
        InputError: if the contributions are not all of one shape, or there is no query of a number.
    """

    contributions: Mapping[str, Tensor]
    show: Sequence[int] = ()

    template: ClassVar[str] = "layers.html"
    anchor: ClassVar[str] = "layers"
    link: ClassVar[str] = "Layers"

    def __post_init__(self) -> None:
        shapes = {tuple(values.shape) for values in self.contributions.values()}
        queries = 1 + max(self.show, default=0)
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[0] < queries:
            wanted = f"block name to contributions of one shape (Q, n), with a query {queries - 1}"
            raise expected("layers", wanted, sorted(shapes))

    def content(self) -> dict[str, Any]:
        """Compute each block's share of the contributions: the mean over all queries, and of each shown one."""
        sums = []
        for name, values in self.contributions.items():
            contributions = float_array(values, f"layers[{name!r}]", (2,))  # (Q, n)
            sums.append(np.abs(contributions).sum(1))
        totals = np.sum(sums, 0)
        # A query that nothing contributes to has shares of zero.
        shares = np.stack(sums) / np.maximum(totals, np.finfo(float).tiny)  # (blocks, Q)

        shown = list(self.show)
        rows = []
        for name, share in zip(self.contributions, shares, strict=True):
            row = {"name": name, "mean": float(share.mean()), "shares": share[shown].tolist()}
            rows.append(row)
        return {"shown": shown, "rows": rows, "largest": float(shares.max())}
