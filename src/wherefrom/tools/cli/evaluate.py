"""Judge scores, ours or another library's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from wherefrom.data.tables import read_table
from wherefrom.errors import ArtefactError, expected
from wherefrom.methods import Scores
from wherefrom.scores import unsolved
from wherefrom.tools import loading
from wherefrom.tools.cli import judging
from wherefrom.tools.cli.results import RECORDED, Results
from wherefrom.tools.evaluate import Truth, load_matrix, random_subsets
from wherefrom.tools.report import Example, Table


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
    judged = named(scores)
    asked = {name: s for name, s in judged.items() if len(s.values)}  # those that are not self-influence alone
    found = loading.load(target) if target else None
    if (subsets or removal) and found is None:
        raise expected("target", "given to train again", "none", "Add --target module:function.")
    if subsets and truth:
        raise expected("truth and subsets", "one of them", "both")

    parts: list[judging.Found] = []
    if truth:
        parts.append(judging.against_retraining(asked, Truth.load(truth), seed))
    if subsets and found:
        masks = random_subsets(next(iter(asked.values())).values.shape[1], subsets, fraction, seed)
        targets = judging.retraining(found, results.folder / "runs", repeats, seed, paired=False)(masks)
        known = Truth(masks.numpy(), targets.double().numpy())
        known.save(results.path("truth.npz"))
        parts.append(judging.against_retraining(asked, known, seed))
    if removal and found:
        runs = judging.retraining(found, results.folder / "runs", repeats, seed, paired=True)
        parts.append(judging.against_removal(asked, runs, removal, seed))
    if flags:
        parts.append(judging.against_flags(judged, judging.flagged(read_table(flags), column, flags), seed))
    if len(asked) > 1:
        parts.append(judging.against_each_other(asked, k, seed))
    if not parts:
        advice = "Give --truth, --subsets, --removal, --flags, or several files."
        raise expected("what to judge by", "given", "nothing", advice)

    rows = [row for some, _ in parts for row in some]
    if not rows:
        raise expected("the files", "one or more with scores of queries", "none, or self-influence alone")
    table = {name: [row[name] for row in rows] for name in rows[0]}
    results.table("evaluation", table, len(rows))
    content: dict[str, Any] = {name: value for _, some in parts for name, value in some.items()}
    first = next(iter(asked.values()), next(iter(judged.values())))
    shown = {"title": "Are these scores right?", "tables": {"Measures": Table(table)}, "show": []}
    results.report(first, **content, **looks(found, first), **shown)
    results.done(own)


def named(files: tuple[str, ...]) -> dict[str, Scores]:
    """The scores by the names given to them, or else by those of their files or folders.

    Raises:
        InputError: if two have the same name. ArtefactError: if a file is not one of scores.
    """
    judged: dict[str, Scores] = {}
    for text in files:
        name, equals, path = text.partition("=")
        if not equals:
            path, name, folder = text, Path(text).stem, Path(text).resolve().parent.name
            name = {"scores": folder, "self-influence": f"{folder} self-influence"}.get(name, name)
        if name in judged:
            raise expected("the files' names", "different", f"{name} twice", "Write NAME=FILE.")
        judged[name] = read(path)
    return judged


def read(path: str) -> Scores:
    """Scores from a file, or from a matrix of another library's."""
    try:
        found = Scores.load(path)
    except ArtefactError:
        return unsolved(torch.from_numpy(load_matrix(path)))
    for name in RECORDED:
        found.provenance.pop(name, None)
    return found


def looks(target: loading.Target | None, scores: Scores) -> dict[str, Any]:
    """How the examples are shown in a report, by their numbers if nothing is known of them."""
    queries, examples = ([Example(f"example {i}") for i in range(size)] for size in scores.values.shape)
    if target:
        examples = target.shown("train")
        queries = target.shown("queries") if queries else queries
    return {"train_examples": examples, "query_examples": queries}
