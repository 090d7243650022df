"""The report: everything a reader needs to use scores and to judge them, in one file that needs nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from whence.attribution.scores import Scores
from whence.errors import expected
from whence.evaluate.lds import LDS, float_array
from whence.evaluate.mislabeled import MislabeledCurve
from whence.report.convergence import certificate, convergence, final, standing
from whence.report.examples import Example, missing
from whence.report.numbers import short, signed


def write_report(path: str | Path, scores: Scores, **content: Any) -> Path:
    """Write the page that `render` makes, complete or not at all.

    Args:
        path: the HTML file; its folder is made if need be.
        scores: what is reported.
        content: the arguments of `render`.

    Returns:
        the path.

    Raises:
        InputError, MissingExtraError: as `render`; InputError if the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise expected("The report's path", "a file", f"the folder {path}", f"Give {path / 'report.html'}.")
    text = render(scores, **content)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def render(
    scores: Scores,
    *,
    train_examples: Sequence[Example],
    query_examples: Sequence[Example],
    title: str = "Whence did the model learn this?",
    lead: str = "",
    measurement: str = "the query's measurement",
    show: Sequence[int] | None = None,
    k: int = 5,
    suspects: int = 24,
    detection: MislabeledCurve | None = None,
    lds: Mapping[str, LDS] | None = None,
    notes: Sequence[str] = (),
    configuration: Mapping[str, object] | None = None,
    cost: Mapping[str, float] | None = None,
) -> str:
    """The page as HTML.

    Args:
        scores: (Q, N) scores with their residuals and provenance; with ``self_values``, suspicious examples are shown.
        train_examples, query_examples: how each of the N and Q examples is shown; only those on the page are looked up.
        title, lead: heading and first paragraph.
        measurement: what f is, in words.
        show: the queries that get a card, by number; None: the first twelve. All are in the table of convergence.
        k: proponents and opponents per query.
        suspects: how many examples of the largest self-influence are shown.
        detection: how well a ranking finds mislabelled examples.
        lds: name of a method to its linear datamodeling score.
        notes: paragraphs on what the reader should know.
        configuration: more rows for the table of the configuration.
        cost: more rows, in seconds, for the table of costs.

    Raises:
        InputError: if the examples do not fit the scores, or a number is out of range.
        MissingExtraError: if jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing("jinja2") from error
    from whence.report import figures

    q, n = scores.values.shape
    for what, examples, size in (("train_examples", train_examples, n), ("query_examples", query_examples, q)):
        if len(examples) != size:
            raise expected(what, f"one for each of the {size} of the scores {(q, n)}", len(examples))
    shown = list(range(min(q, 12))) if show is None else list(show)
    if any(not 0 <= i < q for i in shown):
        raise expected("show", f"query numbers in 0..{q - 1}", shown)
    changes = float_array(scores, "scores", (2,)) / n
    tolerance = scores.provenance.get("tolerance")
    late = [i for i in range(q) if not bool(scores.converged[i])]
    page = {
        "title": title,
        "lead": lead,
        "measurement": measurement,
        "notes": notes,
        "n": n,
        "q": q,
        "k": k,
        "coverage": scores.provenance.get("coverage"),
        "late": [{"number": i, "caption": query_examples[i].caption, "shown": i in shown} for i in late],
        "tiles": _tiles(scores, detection, lds or {}),
        "queries": _cards(scores, shown, min(k, n), train_examples, query_examples),
        "suspects": _suspects(scores.self_values, min(suspects, n), train_examples),
        "detection": detection,
        "lds": lds or {},
        "convergence": convergence(scores, [example.caption for example in query_examples], shown),
        "configuration": _configuration(scores.provenance)
        | {name: str(v) for name, v in (configuration or {}).items()},
        "cost": _cost(scores.provenance, cost or {}),
        "figures": {
            "distribution": figures.distribution(changes),
            "residuals": figures.residuals(scores.history, scores.converged, tolerance, final(scores))
            if len(scores.history) > 2
            else None,
            "detection": figures.detection(detection) if detection else None,
            "lds": figures.lds_bars(lds) if lds else None,
        },
        "lines": figures.LINES,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("whence.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"signed": signed, "short": short}
    return environment.get_template("page.html").render(page)


def _cards(
    scores: Scores, shown: Sequence[int], k: int, train: Sequence[Example], queries: Sequence[Example]
) -> list[dict[str, object]]:
    """The shown queries, each with its proponents and opponents."""
    top = scores.top(k)
    n = scores.values.shape[1]

    def ranked(index: Tensor, values: Tensor, sign: int) -> list[dict[str, object]]:
        found = [(int(j), float(v)) for j, v in zip(index, values, strict=True) if sign * float(v) > 0]
        return [{"number": j, "score": v, "change": v / n, "example": train[j]} for j, v in found]

    return [
        {
            "number": i,
            "example": queries[i],
            "certificate": certificate(scores, i),
            "proponents": ranked(top.proponents[i], top.proponent_scores[i], 1),
            "opponents": ranked(top.opponents[i], top.opponent_scores[i], -1),
        }
        for i in shown
    ]


def _suspects(values: Tensor | None, count: int, train: Sequence[Example]) -> list[dict[str, object]]:
    if values is None or count < 1:
        return []
    order = values.argsort(descending=True, stable=True)[:count].tolist()
    return [{"number": j, "score": float(values[j]), "example": train[j]} for j in order]


def _tiles(scores: Scores, detection: MislabeledCurve | None, lds: Mapping[str, LDS]) -> list[dict[str, str]]:
    """The numbers to see first."""
    q, n = scores.values.shape
    good = int(scores.converged.sum())
    tiles = [{"value": f"{q:,} × {n:,}", "name": "queries × training examples"}]
    if scores.residual is not None:
        status = standing(scores)
        status = f"{good} of {q} converged" if good < q or status == "converged" else status
        tiles.append({"value": short(float(scores.residual.max())), "name": f"worst residual; {status}"})
    if detection is not None:
        low, high = detection.auc_interval
        tiles.append(
            {
                "value": f"{detection.auc:.3f}",
                "name": f"AUC of finding wrong labels ({low:.3f} to {high:.3f}; chance 0.5)",
            }
        )
    for name, score in list(lds.items())[:1]:
        low, high = score.interval
        tiles.append({"value": f"{score.mean:.2f}", "name": f"LDS of {name} ({low:.2f} to {high:.2f})"})
    return tiles


def _configuration(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The provenance as rows of words; what has a section of its own is left out."""
    rows: dict[str, str] = {}
    for name, value in provenance.items():
        if name in ("solver", "chosen", "tolerance", "steps", "passes", "seconds", "coverage"):
            continue
        if isinstance(value, Mapping):
            value = _agree(value)
        rows[name] = (
            f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        )
    return rows


def _agree(values: Mapping[str, Any]) -> str:
    words = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    if len(set(words.values())) == 1:
        return f"{next(iter(words.values()))} for all"
    return ", ".join(f"{name}: {word}" for name, word in words.items())


def _cost(provenance: Mapping[str, Any], more: Mapping[str, float]) -> dict[str, str]:
    """Seconds of the attribution, whose parts are with its convergence, and of what else there was."""
    parts = provenance.get("seconds", {})
    seconds = ({"attribution": sum(parts.values())} if parts else {}) | dict(more)
    rows = {name: f"{value:.2f} s" for name, value in seconds.items()}
    return rows | ({"in all": f"{sum(seconds.values()):.2f} s"} if len(rows) > 1 else {})
