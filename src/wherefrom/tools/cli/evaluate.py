"""Judge scores, ours or another library's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro

from wherefrom import Certificate, Scores
from wherefrom.data.tables import read_table
from wherefrom.errors import ArtefactError, expected
from wherefrom.tools import loading
from wherefrom.tools.cli import measures
from wherefrom.tools.cli.results import RECORDED, Results
from wherefrom.tools.evaluate import (
    LDS,
    MislabeledCurve,
    RemovalCurve,
    Truth,
    agreement,
    load_matrix,
    random_subsets,
    removal_curve,
)
from wherefrom.tools.report import Example, Report, Retraining, Section, Suspects, Table, usual_sections


def evaluate(
    scores: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]FILE ...")]] = tyro.MISSING,
    *,
    target: str | None = None,
    config: str | None = None,
    out: str = "wherefrom-run",
    truth: str | None = None,
    subsets: int | None = None,
    fraction: float = 0.5,
    repeats: int = 2,
    removal: tuple[int, ...] = (),
    flags: str | None = None,
    column: str = "flipped",
    k: int = 10,
    seed: int = 0,
) -> None:
    """Judge one or more files of scores, ours or another library's.

    For example: wherefrom evaluate run/scores.safetensors trak=other.npy --truth lds.npz --out judged

    Against models trained on random subsets (LDS) with --truth or --subsets; against training without the strongest
    examples with --removal; as a detector of wrong labels with --flags; and against each other if there are several
    files. A positive score must mean that the example helped. What trains again needs a --target whose function returns
    a wherefrom.tools.loading.Target with retrain.

    Args:
        scores: files ending in .safetensors, .npy, .npz, .csv or .parquet, with a name if that of the file will not do.
        target: module:function.
        config: a TOML file with options by these names; those of the command line go first.
        out: the folder of the results, and of what training again gave, which is done once.
        truth: an .npz with masks (subsets, examples) and targets (subsets, repeats, queries).
        subsets: train on so many random subsets; what that gives is written as truth.npz.
        fraction: the share of the examples in a random subset.
        repeats: models for each subset, where the target's retrain trains one at a time.
        removal: numbers of examples to remove, increasing.
        flags: a table (.csv or .parquet) with a row for each training example.
        column: of that table, which says whether the label is wrong.
        k: how many of the strongest examples are compared between files.
        seed: of the subsets, the training and the intervals.
    """
    own = {name: value for name, value in locals().items() if name != "config"}
    results = Results("evaluate", out)
    results.lock()
    judged = read_named_scores(scores)
    # A file may hold self-influence alone, which only flags can judge.
    with_queries = {name: each for name, each in judged.items() if len(each.values)}
    loaded = loading.load(target) if target else None
    if (subsets or removal) and loaded is None:
        raise expected("target", "given to train again", "none", "Add --target module:function.")
    if subsets and truth:
        raise expected("truth and subsets", "one of them", "both")
    if (subsets or removal) and not with_queries:
        raise expected("the files", "one or more with scores of queries", "none, or self-influence alone")
    if not (truth or subsets or removal or flags or len(with_queries) > 1):
        advice = "Give --truth, --subsets, --removal, --flags, or several files."
        raise expected("what to judge by", "given", "nothing", advice)

    rows: measures.Rows = []
    lds: dict[str, LDS] = {}
    curve: RemovalCurve | None = None
    curves: dict[str, MislabeledCurve] = {}
    known = Truth.load(truth) if truth else None

    if subsets and loaded:
        first = next(iter(with_queries.values()))
        masks = random_subsets(first.values.shape[1], subsets, fraction, seed)
        retrain = measures.retrain_with(loaded, results.folder / "runs", repeats, seed, paired=False)
        known = Truth(masks.numpy(), retrain(masks).double().numpy())
        known.save(results.path("truth.npz"))
    if known is not None:
        lds = measures.measure_lds(with_queries, known, seed)
        rows += measures.tabulate_lds(lds)

    if removal and loaded:
        # The first also loses its opponents, and as many examples at random.
        (name, first), *others = with_queries.items()
        retrain = measures.retrain_with(loaded, results.folder / "runs", repeats, seed, paired=True)
        curve = removal_curve(first, retrain, removal, dict(others), seed=seed)
        rows += measures.tabulate_removal(curve, name)

    if flags:
        flipped = measures.read_flags(read_table(flags), column, flags)
        curves = measures.measure_detection(judged, flipped, seed)
        rows += measures.tabulate_detection(curves)

    if len(with_queries) > 1:
        rows += measures.tabulate_agreement(agreement(with_queries, k, seed=seed), k)

    if not rows:
        raise expected("the files", "one or more with scores of queries", "none, or self-influence alone")
    table = {name: [row[name] for row in rows] for name in rows[0]}
    results.table("evaluation", table, len(rows))

    shown = next(iter(with_queries.values()), next(iter(judged.values())))
    train_examples, query_examples = show_examples(loaded, shown)
    sections: list[Section] = [Table("Measures", table)]
    notes = []
    if curves:
        name, detection = next(iter(curves.items()))
        sections.append(Suspects(train_examples, shown.self_values, detection))
        notes.append(f"Wrong labels: the curve is that of {name}.")
    if lds or curve is not None:
        sections.append(Retraining(lds, curve))
    page = usual_sections(shown, train_examples, query_examples, show=[], notes=notes, sections=sections)
    results.write_report(Report("Are these scores right?", page))
    results.write_configuration(own)


def read_named_scores(files: tuple[str, ...]) -> dict[str, Scores]:
    """Read the scores, by the names given to them, or else by those of their files or folders.

    Raises:
        InputError: if two have the same name. ArtefactError: if a file is not one of scores.
    """
    judged: dict[str, Scores] = {}
    for text in files:
        name, equals, path = text.partition("=")
        if not equals:
            path, name = text, _name_of_file(Path(text))
        if name in judged:
            raise expected("the files' names", "different", f"{name} twice", "Write NAME=FILE.")
        judged[name] = read_scores(path)
    return judged


def _name_of_file(path: Path) -> str:
    """Return the name of a file, or that of its folder where the commands give all files the same name."""
    folder = path.resolve().parent.name
    if path.stem == "scores":
        return folder
    if path.stem == "self-influence":
        return f"{folder} self-influence"
    return path.stem


def read_scores(path: str) -> Scores:
    """Read scores from a file of ours, or from a matrix of another library's.

    Raises:
        ArtefactError: if the file is neither.
    """
    try:
        scores = Scores.load(path)
    except ArtefactError:
        values = torch.from_numpy(load_matrix(path))
        # Nothing is known of a solve, so there is nothing that did not converge.
        return Scores(values, Certificate.of_nothing_solved(len(values)))
    for name in RECORDED:
        scores.provenance.pop(name, None)
    return scores


def show_examples(target: loading.Target | None, scores: Scores) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return how the training examples and the queries are shown: by their numbers, if nothing is known of them."""
    queries, examples = scores.values.shape
    if target is None:
        return _number(examples), _number(queries)
    return target.shown("train"), target.shown("queries") if queries else []


def _number(count: int) -> list[Example]:
    return [Example(f"example {i}") for i in range(count)]
