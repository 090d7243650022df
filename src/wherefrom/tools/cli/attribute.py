"""From a model to scores: fit, score, self-influence."""

from __future__ import annotations

from typing import Any

from wherefrom.errors import UnsupportedError
from wherefrom.tools.cli.options import Attributed, Flat
from wherefrom.tools.cli.results import say
from wherefrom.tools.cli.run import Run


def fit(options: Flat[Attributed]) -> None:
    """Do the work that all queries share, the fit to the model and its training data, and keep the result.

    For example: wherefrom fit mine:problem --solver "CG(preconditioner=EKFAC())" --out run

    Other commands start from it if they have the same --out and the same settings. Only influence functions have a fit
    to keep: other methods (--method) are fitted when they score.
    """
    run = Run("fit", options)
    if not run.kind.is_influence:
        raise UnsupportedError(f"{run.kind.name} has no fit to keep. Leave this out: wherefrom score fits it.")
    run.fits()
    run.finish()


def score(options: Flat[Attributed], *, certify: bool = True) -> None:
    """Score all training examples on the queries.

    For example: wherefrom score mine:problem --damping 0.01 --out run

    Writes the scores (queries by training examples), and a table with each query's residual, strongest proponent and
    strongest opponent. A positive score means that the example helped: removing it would raise the query's loss, by
    about score / N.

    Args:
        certify: measure the residual of each query's solve, one more pass over the training data.
    """
    run = Run("score", options)
    scores = run.scores(certify=certify)
    say(str(scores))

    queries, top = len(scores.values), scores.top(1)
    columns: dict[str, Any] = {
        "query": list(range(queries)),
        "shown": list(run.target.shown("queries").captions),
        "residual": [None] * queries if scores.residual is None else scores.residual.tolist(),
        "converged": scores.converged.tolist(),
        "proponent": top.proponents[:, 0].tolist(),
        "proponent score": top.proponent_scores[:, 0].tolist(),
        "opponent": top.opponents[:, 0].tolist(),
        "opponent score": top.opponent_scores[:, 0].tolist(),
    }
    run.table("queries", columns)
    run.finish(certify=certify)


def self_influence(options: Flat[Attributed]) -> None:
    """Rank the training examples by their influence on themselves: what the model knows by heart comes first.

    For example: wherefrom self-influence mine:problem --solver "CG(tolerance=0.3)" --out run

    Wrong labels and outliers are found at the top.
    """
    run = Run("self-influence", options)
    values = run.self_influence().self_influence

    captions = run.target.shown("train").captions
    order = values.argsort(descending=True, stable=True).tolist()
    columns = {
        "rank": list(range(1, 1 + len(order))),
        "example": order,
        "shown": [captions[i] for i in order],
        "self-influence": values[order].tolist(),
    }
    run.table("self-influence", columns)
    run.finish()
