"""What to do with the answer: clean the training data, select more."""

from __future__ import annotations

from typing import Literal

import wherefrom
from wherefrom.data.tables import Table
from wherefrom.methods import Scores
from wherefrom.tools import act
from wherefrom.tools.cli.options import Attributed, Flat
from wherefrom.tools.cli.results import say
from wherefrom.tools.cli.run import Run
from wherefrom.tools.report import Table as Rows

MOST = 200  # rows in a report; the tables have all


def clean(
    options: Flat[Attributed],
    *,
    rank_by: Literal["self-influence", "harm"] | None = None,
    share: float | None = None,
    count: int | None = None,
    relabel: bool = True,
    labels_at: str = "1",
) -> None:
    """Find the training examples to drop or to relabel, with the reasons.

    For example: wherefrom clean mine:problem --share 0.05 --out run

    Ranks the examples by self-influence, or by how much they harm trusted examples: a set whose labels are right, which
    the target's function gives in a wherefrom.tools.loading.Target with trusted. Then tries other labels for the first
    of them. Nothing is changed: the table says what is proposed.

    Args:
        rank_by: without it harm if there are trusted examples, else self-influence.
        share: of the examples to look at; with neither share nor count those that stand out.
        count: how many to look at.
        relabel: try other labels, with influence functions; else all that is proposed is to drop.
        labels_at: where a batch has its labels: 1 in (x, y), or the key in a dict.
    """
    run = Run("clean", options)
    trusted = run.target.trusted
    by = rank_by or ("self-influence" if trusted is None else "harm")
    if by == "harm":
        scores = run.scores("trusted")
    else:
        scores = run.self_influence()
    tries = relabel and isinstance(run.method, wherefrom.Influence)
    found = act.clean(
        scores.self_influence if by == "self-influence" else scores,
        run.fits()[0] if tries else None,
        trusted if tries else None,
        share,
        count,
        int(labels_at) if labels_at.isdecimal() else labels_at,
        options.seed or 0,
    )
    train = run.target.shown("train")
    table = found.table(shown=train.captions)
    say(str(found).partition("\n")[0])
    run.table("clean", table, hidden=("distance", "reason"))
    _report(run, scores, "trusted", "train", table, "What to drop or relabel", found.rule)
    run.finish(rank_by=by, share=share, count=count, relabel=relabel, labels_at=labels_at)


def select(
    options: Flat[Attributed],
    *,
    by: Literal["mean", "max", "coverage", "cleanest"] = "mean",
    share: float | None = None,
    count: int | None = None,
) -> None:
    """Choose the examples that help the queries most, to train on.

    For example: wherefrom select mine:problem --share 0.05 --by coverage --out run

    Chooses among candidates, examples that might be trained on, if the target's function gives them in a
    wherefrom.tools.loading.Target; else among the training examples.

    Args:
        by: the mean over the queries, the query that an example helps most (max), all queries in turn, for a diverse
            choice (coverage), or the lowest self-influence, whatever the queries (cleanest).
        share: of the examples to choose.
        count: how many to choose.
    """
    run = Run("select", options)
    pool = "train" if run.target.candidates is None else "candidates"
    if by == "cleanest":
        scores, pool = run.self_influence(), "train"
        found = act.cleanest(scores.self_influence, share, count, options.seed or 0)
    else:
        scores = run.scores(candidates=run.target.candidates)
        found = act.select(scores, share, count, by, seed=options.seed or 0)
    table = found.table(shown=run.target.shown(pool).captions)
    said = str(found) if by != "cleanest" else f"{len(found.examples)} of {found.examples_in_all} examples by {by}"
    say(said)
    run.table("select", table)
    _report(run, scores, "queries", pool, table, "Chosen examples", said)
    run.finish(by=by, share=share, count=count)


def _report(run: Run, scores: Scores, asked: str, pool: str, table: Table, heading: str, lead: str) -> None:
    """The report, with the first rows of the table."""
    train = run.target.shown(pool)
    first = {name: cells[:MOST] for name, cells in table.items()}
    shown = {name: cells for name, cells in first.items() if name not in ("rank", "place", "distance", "shown")}
    rows = Rows(shown, [train[int(number or 0)] for number in first["example"]], lead)
    queries = run.target.shown(asked) if len(scores.values) else []
    content = {"title": heading, "tables": {heading: rows}, "show": []}
    run.report(scores, train_examples=train, query_examples=queries, **content)
