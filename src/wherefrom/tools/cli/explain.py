"""Who answers for what the model does: top, explain, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

import wherefrom
from wherefrom.data.examples import Examples
from wherefrom.errors import UnsupportedError, expected
from wherefrom.methods import Scores
from wherefrom.tools import act
from wherefrom.tools.cli.evaluate import read
from wherefrom.tools.cli.options import Attributed, Flat
from wherefrom.tools.cli.results import Results, say, tabulated
from wherefrom.tools.cli.run import Run
from wherefrom.tools.report import DampingSweep, Split

SHOWN = 12  # queries with a card in the report
SOLVES = ("residual", "converged")  # columns that are written, not printed


def top(
    scores: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]] = tyro.MISSING,
    *,
    config: str | None = None,  # noqa: ARG001
    k: int = 5,
    out: str | None = None,
) -> None:
    """The strongest training examples of each query, from a file of scores.

    For example: wherefrom top wherefrom-run/scores.safetensors --k 3

    Proponents helped: removing one would raise the query's loss. Opponents hurt. Examples are given by their numbers in
    the training data; change is what is foretold for removing one, its score / N.

    Args:
        scores: a file ending in .safetensors, .npy, .npz, .csv or .parquet.
        config: a TOML file with options by these names; those of the command line go first.
        k: how many of each.
        out: a folder for the table; without it it is only shown.
    """
    columns = act.explain(read(scores), k)
    rows = len(columns["query"])
    if out is None:
        say("\n".join(tabulated(columns, rows, SOLVES)))
        return
    results = Results("top", out)
    results.lock()
    results.table("top", columns, rows, SOLVES)
    results.done({"scores": scores, "k": k, "out": out})


def explain(options: Flat[Attributed], *, k: int = 5, candidates: int | None = None, certify: bool = True) -> None:
    """Explain the queries by the training examples behind them: proponents, which helped, and opponents, which hurt.

    For example: wherefrom explain mine:problem --k 3 --out run

    Or a language model's completion: wherefrom explain --hf MODEL --dataset FILE --prompt "The capital of Peru is"
    --completion " Lima"

    Writes a table and a report that shows the examples. How they are shown can be said in the target. Texts are shown
    with the parts that their tokens and the model's layers have in a score.

    Args:
        k: how many of each.
        candidates: score only so many training examples for each query, those whose words are closest to its own by
            TF-IDF, if they are shown as texts.
        certify: measure the residual of each query's solve, one more pass over the training data.
    """
    if k < 1:
        raise expected("k", "at least 1", k)
    run = Run("explain", options)
    train, queries = run.target.shown("train"), run.target.shown("queries")
    scores = run.scores(certify=certify) if candidates is None else run.shortlisted(candidates, certify)
    run.table("explain", act.explain(scores, k, {"shown": train.captions}, {"shown": queries.captions}), hidden=SOLVES)
    show = range(min(SHOWN, len(queries)))
    run.report(scores, train_examples=train, query_examples=queries, k=k, show=show, split=split(run, scores, k, show))
    run.finish(k=k, candidates=candidates, certify=certify)


def split(run: Run, scores: Scores, k: int, show: Sequence[int]) -> Split | None:
    """The parts of the scores that the report shows, if the method has any and the examples are shown as tokens."""
    train, asked = run.target.shown("train"), run.target.shown("queries")
    if not isinstance(run.method, wherefrom.Influence) or train[0].tokens is None or asked[0].tokens is None:
        return None
    best = scores.top(min(k, scores.values.shape[1]))
    index = torch.cat([best.proponents[show], best.opponents[show]]).unique().tolist()
    queries = Examples(run.target.queries, "queries").batch(show, run.problem.device, run.problem.dtype)
    blocks = [fit.by_block(queries, index) for fit in run.fits()]

    def over(part: Callable[[wherefrom.Influence], Tensor]) -> Tensor | None:
        try:
            return torch.stack([part(fit) for fit in run.fits()]).mean(0)
        except UnsupportedError as error:
            say(f"Not in the report: {error}")
            return None

    return Split(
        show,
        index,
        over(lambda fit: fit.by_token(queries, index)),
        over(lambda fit: fit.by_query_token(queries, index)),
        {name: torch.stack([block[name] for block in blocks]).mean(0) for name in blocks[0]},
    )


def report(options: Flat[Attributed], *, k: int = 5, layers: bool = False, sweep: tuple[float, ...] = ()) -> None:
    """Write the full report on the queries' scores: examples, certificates, how influence is spread, costs.

    For example: wherefrom report mine:problem --layers --sweep 0.1 10 --out run

    Scores that are in the folder are taken from there, and so is the self-influence of the training examples, if
    ``wherefrom self-influence`` with the same --out has left it there.

    Args:
        k: proponents and opponents of each query.
        layers: also which layers the influence comes through, by one more solve.
        sweep: also the scores at these multiples of the damping.
    """
    run = Run("report", options)
    scores, queries = run.scores(), run.target.given("queries")
    if (layers or sweep) and not isinstance(run.method, wherefrom.Influence):
        raise UnsupportedError(
            f"--layers and --sweep are for influence functions, not {options.method}. Leave them out."
        )
    content: dict[str, Any] = {}
    if sweep:
        content["sweep"] = swept(run, scores, sweep)
    if layers:
        best = scores.top(min(k, scores.values.shape[1]))
        examples = best.proponents.flatten().unique().tolist()
        content["layers"] = run.fits()[0].by_block(queries, examples)
    if (run.folder / "self-influence.safetensors").exists():
        scores = dataclasses.replace(scores, self_values=run.self_influence().self_values)
    train, asked = run.target.shown("train"), run.target.shown("queries")
    run.report(scores, train_examples=train, query_examples=asked, k=k, **content)
    run.finish(k=k, layers=layers, sweep=sweep)


def swept(run: Run, scores: Scores, factors: Sequence[float]) -> DampingSweep:
    """The scores at multiples of the damping, kept like those at the damping itself."""
    if any(not f > 0 for f in factors):
        raise expected("sweep", "positive multiples of the damping", list(factors))
    queries, found = run.target.given("queries"), {}
    shift = run.fits()[0].inverse.shift
    largest = max(shift.values())
    for factor in factors:
        damping = wherefrom.Damping.by_parameter({name: factor * value for name, value in shift.items()})

        def make(fit: Any, pieces: Any, damping: wherefrom.Damping = damping) -> Scores:
            return fit.at(damping).score(queries, folder=pieces)

        found[factor * largest] = run.kept(f"scores-{factor:g}", make, queries=queries, factor=str(factor))
    return DampingSweep({largest: scores} | found, largest)
