"""Who answers for what the model does: top, explain, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

import wherefrom
from wherefrom import Scores, Solution
from wherefrom.data.examples import Examples
from wherefrom.errors import UnsupportedError, expected
from wherefrom.tools import act
from wherefrom.tools.cli.evaluate import read_scores
from wherefrom.tools.cli.options import Attributed, Flat
from wherefrom.tools.cli.results import Results, format_table, say
from wherefrom.tools.cli.run import Run
from wherefrom.tools.report import DampingSweep, Layers, Section, Split, Suspects

SHOWN = 12  # queries with a card in the report
SOLVES = ("residual", "converged")  # columns that are written, not printed


def top(
    scores: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]] = tyro.MISSING,
    *,
    config: str | None = None,  # noqa: ARG001
    k: int = 5,
    out: str | None = None,
) -> None:
    """List the strongest training examples of each query, from a file of scores.

    For example: wherefrom top wherefrom-run/scores.safetensors --k 3

    Proponents helped: removing one would raise the query's loss. Opponents hurt. Examples are given by their numbers in
    the training data; change is what is foretold for removing one, its score / N.

    Args:
        scores: a file ending in .safetensors, .npy, .npz, .csv or .parquet.
        config: a TOML file with options by these names; those of the command line go first.
        k: how many proponents, and how many opponents, of each query.
        out: a folder for the table; without it it is only shown.
    """
    columns = act.explain(read_scores(scores), k)
    rows = len(columns["query"])
    if out is None:
        say("\n".join(format_table(columns, rows, SOLVES)))
        return
    results = Results("top", out)
    results.lock()
    results.table("top", columns, rows, SOLVES)
    results.write_configuration({"scores": scores, "k": k, "out": out})


def explain(options: Flat[Attributed], *, k: int = 5, candidates: int | None = None, certify: bool = True) -> None:
    """Explain the queries by the training examples behind them: proponents, which helped, and opponents, which hurt.

    For example: wherefrom explain mine:problem --k 3 --out run

    Or a language model's completion: wherefrom explain --hf MODEL --dataset FILE --prompt "The capital of Peru is"
    --completion " Lima"

    Writes a table and a report that shows the examples. What an example looks like there can be set by the function,
    with wherefrom.tools.loading.Target(show=...). The tokens of a text are coloured by their parts of the score, and a
    bar below shows the parts of the model's layers.

    Args:
        k: how many proponents, and how many opponents, of each query.
        candidates: to save time, score only this many training examples for each query: those whose words are closest
            to its own, by TF-IDF. For examples that are shown as texts.
        certify: measure how exactly each query was solved for (its residual), at one more pass over the training data.
    """
    if k < 1:
        raise expected("k", "at least 1", k)
    run = Run("explain", options)
    train, queries = run.target.shown("train"), run.target.shown("queries")
    show = range(min(SHOWN, len(queries)))

    scores, split = compute_explanation(run, k, show, candidates, certify)

    table = act.explain(scores, k, {"shown": train.captions}, {"shown": queries.captions})
    run.table("explain", table, hidden=SOLVES)
    run.report(scores, train, queries, k=k, show=show, split=split)
    run.finish(k=k, candidates=candidates, certify=certify)


def compute_explanation(
    run: Run, k: int, show: Sequence[int], candidates: int | None, certify: bool
) -> tuple[Scores, Split | None]:
    """Compute all that is said of the queries: their scores, and for those with a card the parts of the scores.

    Args:
        run: the command.
        k: proponents and opponents of each query in the report.
        show: the numbers of the queries with a card.
        candidates: score only so many training examples for each query.
        certify: measure residuals.

    Returns:
        the scores of all queries; and the scores of the strongest examples of the shown ones, split over tokens and
        blocks of parameters, if the method has parts and the examples are shown as tokens.
    """
    train, asked = run.target.shown("train"), run.target.shown("queries")
    has_tokens = train[0].tokens is not None and asked[0].tokens is not None
    has_parts = run.kind.is_influence and has_tokens
    # The tokens' solutions sum to the queries', so that one solve serves all; where few of many queries have a card,
    # only theirs are solved for token by token.
    splits_queries = has_parts and len(show) == len(asked) and _has_token_measurements(run)
    if splits_queries:
        for fit in run.fits():
            run.solve(fit, certify, by_token=True)

    scores = run.scores(certify=certify) if candidates is None else run.shortlisted(candidates, certify)
    if not has_parts:
        return scores, None

    strongest = scores.top(min(k, scores.values.shape[1]))
    index = torch.cat([strongest.proponents[show], strongest.opponents[show]]).unique().tolist()
    solutions = [_solve_shown(run, fit, show, splits_queries) for fit in run.fits()]

    def average(part: Callable[[Solution], Tensor]) -> Tensor | None:
        """Return the mean over the models, as that of the scores is; None where the task has no such parts."""
        try:
            return torch.stack([part(solution) for solution in solutions]).mean(0)
        except UnsupportedError as error:
            say(f"Not in the report: {error}")
            return None

    of_each_model = [solution.by_block(index) for solution in solutions]
    blocks = {}
    for name in of_each_model[0]:
        blocks[name] = torch.stack([of_model[name] for of_model in of_each_model]).mean(0)
    tokens = average(lambda solution: solution.by_token(index))
    query_tokens = None
    if all(solution.tokens is not None for solution in solutions):
        query_tokens = average(lambda solution: solution.by_query_token(index))
    return scores, Split(show, index, tokens, query_tokens, blocks)


def _has_token_measurements(run: Run) -> bool:
    """Tell whether the task splits its measurement over tokens; if it does not, the report has no such part."""
    queries = Examples(run.target.queries, "queries").batch([0], run.problem.device, run.problem.dtype)
    try:
        with run.problem.observed() as model, torch.no_grad():
            run.problem.task.token_measurements(run.problem.outputs(model, queries), queries)
    except UnsupportedError as error:
        say(f"Not in the report: {error}")
        return False
    return True


def _solve_shown(run: Run, fit: wherefrom.FittedInfluence, show: Sequence[int], is_split: bool) -> Solution:
    """Return the solution for the queries that are shown: the one that the scores came out of, if it is of these."""
    if is_split or len(show) == len(run.target.shown("queries")):
        return run.solve(fit)
    queries = Examples(run.target.queries, "queries").batch(show, run.problem.device, run.problem.dtype)
    return fit.solve(queries, certify=False, by_token=_has_token_measurements(run))


def report(options: Flat[Attributed], *, k: int = 5, layers: bool = False, sweep: tuple[float, ...] = ()) -> None:
    """Write the full report on the queries' scores: examples, certificates, how influence is spread, costs.

    For example: wherefrom report mine:problem --layers --sweep 0.1 10 --out run

    Scores that are in the folder are taken from there, and so is the self-influence of the training examples, if
    ``wherefrom self-influence`` with the same --out has left it there.

    Args:
        k: proponents and opponents of each query.
        layers: also which layers the influence comes through.
        sweep: also the scores at these multiples of the damping.
    """
    run = Run("report", options)
    scores = run.scores()
    if layers or sweep:
        run.kind.require_influence("--layers and --sweep")
    train, queries = run.target.shown("train"), run.target.shown("queries")

    sections: list[Section] = []
    if sweep:
        sections.append(sweep_dampings(run, scores, sweep))
    if layers:
        strongest = scores.top(min(k, scores.values.shape[1]))
        examples = strongest.proponents.flatten().unique().tolist()
        contributions = run.solve(run.fits()[0]).by_block(examples)
        sections.append(Layers(contributions, range(min(SHOWN, len(queries)))))
    if (run.folder / "self-influence.safetensors").exists():
        suspects = Suspects(train, run.self_influence().self_influence)
        sections = [suspects, *sections]

    run.report(scores, train, queries, k=k, sections=sections)
    run.finish(k=k, layers=layers, sweep=sweep)


def sweep_dampings(run: Run, scores: Scores, factors: Sequence[float]) -> DampingSweep:
    """Score the queries at multiples of the damping; these scores are kept like those at the damping itself.

    Args:
        run: the command.
        scores: those at the damping itself.
        factors: the multiples.

    Raises:
        InputError: if a multiple is not positive.
    """
    if any(not factor > 0 for factor in factors):
        raise expected("sweep", "positive multiples of the damping", list(factors))
    queries = run.target.given("queries")
    dampings = run.fits()[0].inverse.damping  # one for each block of parameters
    # The page names a damping of several values by the largest of them.
    largest = max(dampings.values())

    swept = {largest: scores}
    for factor in factors:
        damping = wherefrom.Damping.by_block({name: factor * value for name, value in dampings.items()})

        def make(fit: Any, pieces: Path, damping: wherefrom.Damping = damping) -> Scores:
            return fit.at(damping).score(queries, folder=pieces)

        swept[factor * largest] = run.load_or_make(f"scores-{factor:g}", make, queries=queries, factor=str(factor))
    return DampingSweep(swept, largest)
