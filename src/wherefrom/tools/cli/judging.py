"""What ``wherefrom evaluate`` measures, a function for each; all give rows of one table, and parts of the report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.data.examples import Examples
from wherefrom.errors import expected
from wherefrom.methods import Scores
from wherefrom.model.observe import observed
from wherefrom.model.task import as_task
from wherefrom.tools.evaluate import (
    Truth,
    agreement,
    linear_datamodeling_score,
    mislabeled_curve,
    removal_curve,
    retrain,
)
from wherefrom.tools.loading import Target

Judged = Mapping[str, Scores]
Runs = Callable[[Tensor], Tensor]
Rows = list[dict[str, Any]]
Found = tuple[Rows, dict[str, Any]]  # rows of the table, arguments of the report


def against_retraining(judged: Judged, truth: Truth, seed: int) -> Found:
    """The linear datamodeling score of each."""
    found = {name: linear_datamodeling_score(s, truth.masks, truth.targets, seed=seed) for name, s in judged.items()}
    return [_row(name, "LDS", lds.mean, lds.interval, lds.ceiling) for name, lds in found.items()], {"lds": found}


def against_removal(judged: Judged, runs: Runs, counts: Sequence[int], seed: int) -> Found:
    """What removing the strongest examples does to the queries; the first also without its opponents, and at random."""
    (first, scores), *others = judged.items()
    curve = removal_curve(scores, runs, counts, dict(others), seed=seed)
    names = {"top": first, "bottom": f"{first}, opponents"}
    rows = [
        _row(names.get(ranking, ranking), f"change of f without {count}", change.mean(), interval)
        for ranking, changes in curve.changes.items()
        for count, change, interval in zip(curve.counts, changes, curve.intervals[ranking], strict=True)
    ]
    return rows, {"removal": curve}


def against_flags(judged: Judged, flipped: Tensor, seed: int) -> Found:
    """How soon each finds the wrong labels: by self-influence, or by its mean score, the most harmful first."""
    curves = {}
    for name, scores in judged.items():
        own = scores.self_values is not None
        values = scores.self_values if own else scores.values.mean(0)
        curves[name] = mislabeled_curve(values, flipped, higher_is_suspicious=own, seed=seed)
    rows = []
    for name, c in curves.items():
        rows.append(_row(name, "AUC of wrong labels", c.auc, c.auc_interval))
        interval = c.average_precision_interval
        rows.append(_row(name, "average precision of wrong labels", c.average_precision, interval))
    first, curve = next(iter(curves.items()))
    return rows, {"detection": curve, "notes": [f"Wrong labels: the curve is that of {first}."]}


def against_each_other(judged: Judged, k: int, seed: int) -> Found:
    """Rank correlation and shared examples of each two."""
    rows = []
    for (a, b), pair in agreement(judged, k, seed=seed).pairs.items():
        for measure, mean in (
            (f"Spearman with {b}", pair.spearman),
            (f"top {k} shared with {b}", pair.proponents),
            (f"bottom {k} shared with {b}", pair.opponents),
        ):
            rows.append(_row(a, measure, mean.mean, mean.interval))
    return rows, {}


def retraining(target: Target, folder: Path, repeats: int, seed: int, paired: bool) -> Runs:
    """Masks (M, N) to measurements (M, R, Q), by the target's ``retrain``; what is trained is kept in the folder.

    A function of masks gets the folder, and whether runs are paired, if it takes them and does not have its own.
    """
    train = target.given("retrain")
    takes = inspect.signature(train)
    try:
        takes.bind(None, None)
    except TypeError:  # it takes masks alone
        has = getattr(train, "keywords", {})
        more = {"folder": folder, "paired": paired}
        return partial(train, **{name: value for name, value in more.items() if name in takes.parameters.keys() - has})
    measure = partial(_measured, target.task, target.given("queries"))
    return partial(retrain, train, measure, repeats=repeats, seed=seed, folder=folder, paired=paired)


def flagged(table: Mapping[str, Sequence[Any]], column: str, path: str) -> Tensor:
    """A column of a table as (N,) bool.

    Raises:
        InputError: if it is missing or holds anything but true and false.
    """
    if column not in table:
        advice = "Say which with --column."
        raise expected(path, f"a table with a column {column!r}", ", ".join(table), advice)
    known = {"true": True, "false": False, "1": True, "0": False}
    words = [str(value).strip().lower() for value in table[column]]
    if unknown := [word for word in words if word not in known]:
        raise expected(f"{column} of {path}", "true or false in each row", repr(unknown[0]))
    return torch.tensor([known[word] for word in words])


def _measured(task: object, queries: Any, model: nn.Module) -> Tensor:
    """f of the queries, (Q,)."""
    used, first = as_task(task), next(model.parameters())
    batches = Examples(queries, "queries").batches(first.device, first.dtype)
    with observed(model), torch.no_grad():
        return torch.cat([used.measurement(used.outputs(model, batch), batch) for _, batch in batches])


def _row(
    scores: str, measure: str, value: float, interval: Sequence[float], ceiling: float | None = None
) -> dict[str, Any]:
    low, high = map(float, interval)
    return {"scores": scores, "measure": measure, "value": float(value), "low": low, "high": high, "ceiling": ceiling}
