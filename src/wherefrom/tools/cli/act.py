"""What to do with the answer: clean the training data, select more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from wherefrom import Scores
from wherefrom.tools import act
from wherefrom.tools.cli.options import Attributed, Flat
from wherefrom.tools.cli.results import say
from wherefrom.tools.cli.run import Run
from wherefrom.tools.report import Table

MOST = 200  # rows in a report; the tables have all
NOT_IN_REPORT = ("rank", "place", "distance", "shown")  # the order and the example itself say these


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
    if rank_by is None:
        rank_by = "self-influence" if trusted is None else "harm"

    if rank_by == "harm":
        scores = ranking = run.scores("trusted")
    else:
        scores = run.self_influence()
        ranking = scores.self_influence

    # Another label is tried by its influence on the trusted examples.
    tries_labels = relabel and run.kind.is_influence
    cleaning = act.clean(
        ranking,
        run.fits()[0] if tries_labels else None,
        trusted if tries_labels else None,
        share,
        count,
        int(labels_at) if labels_at.isdecimal() else labels_at,
        options.seed or 0,
    )

    table = cleaning.table(shown=run.target.shown("train").captions)
    say(str(cleaning).partition("\n")[0])
    run.table("clean", table, hidden=("distance", "reason"))
    _write_report(run, scores, "trusted", "train", table, "What to drop or relabel", cleaning.rule)
    run.finish(rank_by=rank_by, share=share, count=count, relabel=relabel, labels_at=labels_at)


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
    if by == "cleanest":
        pool = "train"
        scores = run.self_influence()
        selection = act.cleanest(scores.self_influence, share, count, options.seed or 0)
        summary = f"{len(selection.examples)} of {selection.examples_in_all} examples by {by}"
    else:
        pool = "train" if run.target.candidates is None else "candidates"
        scores = run.scores(candidates=run.target.candidates)
        selection = act.select(scores, share, count, by, seed=options.seed or 0)
        summary = str(selection)

    table = selection.table(shown=run.target.shown(pool).captions)
    say(summary)
    run.table("select", table)
    _write_report(run, scores, "queries", pool, table, "Chosen examples", summary)
    run.finish(by=by, share=share, count=count)


def _write_report(
    run: Run, scores: Scores, asked: str, pool: str, table: Mapping[str, Sequence[Any]], heading: str, lead: str
) -> None:
    """Write a report on the first rows of a table.

    Args:
        run: the command.
        scores: what the table was made from.
        asked, pool: the fields of the target with the queries and with the examples that were ranked.
        table: with the numbers of the examples in a column.
        heading, lead: of the section with the table.
    """
    examples = run.target.shown(pool)
    queries = run.target.shown(asked) if len(scores.values) else []
    first = {name: cells[:MOST] for name, cells in table.items()}
    columns = {name: cells for name, cells in first.items() if name not in NOT_IN_REPORT}
    ranked = [examples[int(number)] for number in first["example"]]
    section = Table(heading, columns, ranked, lead)
    run.report(scores, examples, queries, title=heading, sections=[section], show=[])
