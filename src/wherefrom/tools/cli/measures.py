"""What ``wherefrom evaluate`` measures: a function for each, and one that lays its result out as rows of one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom import Scores
from wherefrom.data.examples import Examples
from wherefrom.errors import expected
from wherefrom.model.observe import observe_model
from wherefrom.model.task import as_task
from wherefrom.tools.evaluate import (
    LDS,
    Agreement,
    MislabeledCurve,
    RemovalCurve,
    Truth,
    linear_datamodeling_score,
    mislabeled_curve,
    retrain,
)
from wherefrom.tools.loading import Target

Judged = Mapping[str, Scores]  # the scores to judge, by name
Retrain = Callable[[Tensor], Tensor]  # masks (M, N) to measurements (M, R, Q)
Rows = list[dict[str, Any]]


def measure_lds(judged: Judged, truth: Truth, seed: int) -> dict[str, LDS]:
    """Compute the linear datamodeling score of each."""
    return {
        name: linear_datamodeling_score(scores, truth.masks, truth.targets, seed=seed)
        for name, scores in judged.items()
    }


def tabulate_lds(measured: Mapping[str, LDS]) -> Rows:
    """Return a row for each linear datamodeling score."""
    return [make_row(name, "LDS", lds.mean, lds.interval, lds.ceiling) for name, lds in measured.items()]


def tabulate_removal(curve: RemovalCurve, first: str) -> Rows:
    """Return a row for each ranking and number of removed examples.

    Args:
        curve: of several rankings.
        first: the name of the scores that were also removed from their other end.
    """
    names = {"top": first, "bottom": f"{first}, opponents"}
    rows = []
    for ranking, changes in curve.changes.items():
        for count, change, interval in zip(curve.counts, changes, curve.intervals[ranking], strict=True):
            name = names.get(ranking, ranking)
            rows.append(make_row(name, f"change of f without {count}", change.mean(), interval))
    return rows


def measure_detection(judged: Judged, flipped: Tensor, seed: int) -> dict[str, MislabeledCurve]:
    """Measure how soon each finds the wrong labels: by self-influence, or by its mean score, the most harmful first.

    Args:
        judged: the scores.
        flipped: (N,) bool, which labels are wrong.
        seed: of the intervals.
    """
    curves = {}
    for name, scores in judged.items():
        has_self_influence = scores.self_values is not None
        values = scores.self_values if has_self_influence else scores.values.mean(0)
        curves[name] = mislabeled_curve(values, flipped, higher_is_suspicious=has_self_influence, seed=seed)
    return curves


def tabulate_detection(curves: Mapping[str, MislabeledCurve]) -> Rows:
    """Return two rows for each detection curve."""
    rows = []
    for name, curve in curves.items():
        rows.append(make_row(name, "AUC of wrong labels", curve.auc, curve.auc_interval))
        precision, interval = curve.average_precision, curve.average_precision_interval
        rows.append(make_row(name, "average precision of wrong labels", precision, interval))
    return rows


def tabulate_agreement(agreement: Agreement, k: int) -> Rows:
    """Return three rows for each pair of scores: rank correlation, and the examples shared among the k strongest."""
    rows = []
    for (name, other), pair in agreement.pairs.items():
        measures = {
            f"Spearman with {other}": pair.spearman,
            f"top {k} shared with {other}": pair.proponents,
            f"bottom {k} shared with {other}": pair.opponents,
        }
        rows.extend(make_row(name, measure, mean.mean, mean.interval) for measure, mean in measures.items())
    return rows


def retrain_with(target: Target, folder: Path, repeats: int, seed: int, paired: bool) -> Retrain:
    """Return a function of masks (M, N) to measurements (M, R, Q), by the target's ``retrain``.

    What is trained is kept in the folder. A function of masks gets the folder, and whether runs are paired, if it takes
    them and does not have its own; a function that trains one model at a time is called for each.

    Args:
        target: with ``retrain``.
        folder: for the measurements.
        repeats: models for each mask, where one is trained at a time.
        seed: of these.
        paired: whether runs of one repeat share their seed.
    """
    train = target.given("retrain")
    signature = inspect.signature(train)
    try:
        signature.bind(None, None)
    except TypeError:
        # It takes masks alone, not the numbers of some examples and a seed.
        own = getattr(train, "keywords", {})
        offered = {"folder": folder, "paired": paired}
        taken = {name: value for name, value in offered.items() if name in signature.parameters and name not in own}
        return partial(train, **taken)

    measure = partial(_measure_queries, target.task, target.given("queries"))
    return partial(retrain, train, measure, repeats=repeats, seed=seed, folder=folder, paired=paired)


def read_flags(table: Mapping[str, Sequence[Any]], column: str, path: str) -> Tensor:
    """Return a column of a table as (N,) bool.

    Raises:
        InputError: if it is missing or holds anything but true and false.
    """
    if column not in table:
        raise expected(path, f"a table with a column {column!r}", ", ".join(table), "Say which with --column.")
    meaning = {"true": True, "false": False, "1": True, "0": False}
    words = [str(value).strip().lower() for value in table[column]]
    for word in words:
        if word not in meaning:
            raise expected(f"{column} of {path}", "true or false in each row", repr(word))
    return torch.tensor([meaning[word] for word in words])


def make_row(
    scores: str, measure: str, value: float, interval: Sequence[float], ceiling: float | None = None
) -> dict[str, Any]:
    """Return a row of the table: a measure of some scores, with its interval and perhaps its ceiling."""
    low, high = map(float, interval)
    return {"scores": scores, "measure": measure, "value": float(value), "low": low, "high": high, "ceiling": ceiling}


def _measure_queries(task: object, queries: Any, model: nn.Module) -> Tensor:
    """Return f of the queries, (Q,)."""
    checked_task, first = as_task(task), next(model.parameters())
    batches = Examples(queries, "queries").batches(first.device, first.dtype)
    values = []
    with observe_model(model), torch.no_grad():
        for _, batch in batches:
            values.append(checked_task.measurement(checked_task.outputs(model, batch), batch))
    return torch.cat(values)
