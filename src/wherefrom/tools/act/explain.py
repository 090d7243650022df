"""Why a query came out as it did, as a flat table: a row for each strong proponent and opponent of each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wherefrom.data.tables import Table, as_table, joined
from wherefrom.errors import expected
from wherefrom.tools.act.ranking import example_numbers, rank_examples
from wherefrom.tools.evaluate.arrays import float_array

Columns = Mapping[str, Sequence[Any]]
COLUMNS = "query", "side", "rank", "example", "score", "predicted_change", "residual", "converged"


def explain(scores: object, k: int = 5, examples: Columns | None = None, queries: Columns | None = None) -> Table:
    """List the strongest proponents and opponents of each query.

    A proponent has a positive score (removing it would raise f), an opponent a negative one: a query may have fewer
    than k of either.

    Args:
        scores: (Q, N) tensor or array, or `Scores`.
        k: how many of each, at most; ties go by example number.
        examples: more columns about the examples, such as captions or labels: name -> N values.
        queries: more columns about the queries: name -> Q values.

    Returns:
        A table with the columns query, side ("proponent" or "opponent"), rank (from 1), example, score,
        predicted_change (of f on removal: score / N, where scores are influence), residual and converged (of the
        query's solve; gaps where there is none), then query_... and example_... of what was given.

    Raises:
        InputError: if scores are not finite, k is below 1, or columns do not fit.
    """
    values = float_array(scores, "scores", (2,))
    if k < 1:
        raise expected("k", "at least 1", k)
    n_columns = values.shape[1]
    n = getattr(scores, "provenance", {}).get("examples", n_columns)  # scored candidates may be fewer
    numbers = example_numbers(scores, n_columns).tolist()
    residual = _get_per_query(scores, "residual", len(values))
    converged = _get_per_query(scores, "converged", len(values))

    rows = []
    for q, row in enumerate(values):
        for side, sign in (("proponent", 1), ("opponent", -1)):
            strongest = rank_examples(sign * row)[:k]
            on_this_side = strongest[sign * row[strongest] > 0]
            for rank, z in enumerate(on_this_side, 1):
                cells = (q, side, rank, numbers[z], row[z], row[z] / n, residual[q], converged[q])
                rows.append(dict(zip(COLUMNS, cells, strict=True)))

    table = as_table(rows, COLUMNS)
    table = joined(table, "query", queries or {}, "query_")
    return joined(table, "example", examples or {}, "example_")


def _get_per_query(scores: object, name: str, n_queries: int) -> list[Any]:
    """Get a number for each query where scores have it, such as the residual; gaps where they do not."""
    values = getattr(scores, name, None)
    return [None] * n_queries if values is None else values.tolist()
