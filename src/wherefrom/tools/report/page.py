"""The report: everything a reader needs to use scores and to judge them, in one file that needs nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wherefrom.disk import whole
from wherefrom.errors import expected
from wherefrom.scores import Scores
from wherefrom.tools.evaluate.arrays import float_array
from wherefrom.tools.evaluate.lds import LDS
from wherefrom.tools.evaluate.mislabeled import MislabeledCurve
from wherefrom.tools.evaluate.removal import RemovalCurve
from wherefrom.tools.report.convergence import certificate, convergence, final, standing
from wherefrom.tools.report.examples import Example, missing
from wherefrom.tools.report.numbers import short, signed
from wherefrom.tools.report.sections import DampingSweep, Table, cost_rows, layer_rows, ranked, removal_rows, sweep_rows
from wherefrom.tools.report.split import Split, card


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
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(
    scores: Scores,
    *,
    train_examples: Sequence[Example],
    query_examples: Sequence[Example],
    title: str = "Where did the model learn this?",
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
    tables: Mapping[str, Table] | None = None,
    removal: RemovalCurve | None = None,
    sweep: DampingSweep | None = None,
    layers: Mapping[str, Tensor] | None = None,
    split: Split | None = None,
) -> str:
    """The page as HTML. What is not given leaves no trace on it.

    Args:
        scores: (Q, N) scores with their residuals and provenance; with ``self_values``, suspicious examples are shown.
            Q may be 0: a page on the training examples alone.
        train_examples, query_examples: how each of the N and Q examples is shown, also of those training examples
            without a score; only those on the page are looked up.
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
        tables: heading of a section to the ranked rows in it.
        removal: what retraining without the highest-ranked examples did, for several rankings.
        sweep: the same queries at other dampings.
        layers: block name to (Q, n) contributions of some training examples, as `Influence.by_block` returns them.
        split: the scores of all examples in the cards, over tokens and layers; the queries' cards then show it.

    Raises:
        InputError: if the examples do not fit the scores, or a number is out of range.
        MissingExtraError: if jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise missing(package) from error
    import jinja2

    from wherefrom.tools.report import figures, spread

    q, n = scores.values.shape
    total = scores.provenance.get("examples", n)  # N: scored were perhaps fewer of them, or candidates
    sizes = {"train_examples": n if scores.numbers is None else total, "query_examples": q}
    for what, examples in (("train_examples", train_examples), ("query_examples", query_examples)):
        if len(examples) != sizes[what]:
            raise expected(what, f"one for each of the {sizes[what]} of the scores {(q, n)}", len(examples))
    shown = list(range(min(q, 12))) if show is None else list(show)
    if any(not 0 <= i < q for i in shown):
        raise expected("show", f"query numbers in 0..{q - 1}", shown)
    changes = float_array(scores, "scores", (2,)) / total if q else np.empty((0, n))
    swept = sweep_rows(sweep) if sweep else []
    spreading = spread.measure(changes)
    tolerance = scores.provenance.get("tolerance")
    late = [i for i in range(q) if not bool(scores.converged[i])]
    page = {
        "title": title,
        "lead": lead,
        "measurement": measurement,
        "notes": notes,
        "n": n,
        "total": total,
        "q": q,
        "k": k,
        "coverage": scores.provenance.get("coverage"),
        "row_error": scores.row_error,
        "late": [{"number": i, "caption": query_examples[i].caption, "shown": i in shown} for i in late],
        "tiles": _tiles(scores, detection, lds or {}),
        "queries": _cards(scores, shown, min(k, n), total, train_examples, query_examples, split),
        "suspects": _suspects(scores.self_values, min(suspects, n), train_examples),
        "detection": detection,
        "lds": lds or {},
        "tables": [ranked(heading, table) for heading, table in (tables or {}).items()],
        "removal": removal,
        "removed": removal_rows(removal) if removal else [],
        "sweep": sweep,
        "swept": swept,
        "layers": layer_rows(layers, q, shown) if layers else [],
        "shown": shown,
        "spread": spreading,
        "convergence": convergence(scores, [e.caption for e in query_examples], shown) if q else None,
        "configuration": _configuration(scores.provenance, q)
        | {name: str(v) for name, v in (configuration or {}).items()},
        "cost": cost_rows(scores.provenance, cost or {}),
        "figures": {
            "distribution": spread.distribution(changes) if q else None,
            "tails": spread.tails(spreading) if spreading else None,
            "covered": spread.covered(spreading) if spreading else None,
            "residuals": figures.residuals(scores.history, scores.converged, tolerance, final(scores))
            if len(scores.history) > 2 and q
            else None,
            "detection": figures.detection(detection) if detection else None,
            "lds": figures.lds_bars(lds) if lds else None,
            "removal": figures.removal(removal) if removal else None,
            "sweep": figures.sweep(swept, sweep.chosen) if sweep else None,
        },
        "lines": spread.LINES,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wherefrom.tools.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"signed": signed, "short": short}
    return environment.get_template("page.html").render(page)


def _cards(
    scores: Scores,
    shown: Sequence[int],
    k: int,
    total: int,
    train: Sequence[Example],
    queries: Sequence[Example],
    split: Split | None,
) -> list[dict[str, Any]]:
    """The shown queries, each with its proponents and opponents."""
    top = scores.top(k)

    def ranked(index: Tensor, values: Tensor, sign: int) -> list[dict[str, Any]]:
        found = [(int(j), float(v)) for j, v in zip(index, values, strict=True) if sign * float(v) > 0]
        return [{"number": j, "score": v, "change": v / total, "example": train[j]} for j, v in found]

    cards = []
    for i in shown:
        found: dict[str, Any] = {"number": i, "example": queries[i], "certificate": certificate(scores, i)}
        found["proponents"] = ranked(top.proponents[i], top.proponent_scores[i], 1)
        found["opponents"] = ranked(top.opponents[i], top.opponent_scores[i], -1)
        helped, others = ({item["number"]: item["example"] for item in found[s]} for s in ("proponents", "opponents"))
        found["split"] = split and card(split, i, queries[i], helped, others)
        cards.append(found)
    return cards


def _suspects(values: Tensor | None, count: int, train: Sequence[Example]) -> list[dict[str, object]]:
    if values is None or count < 1:
        return []
    order = values.argsort(descending=True, stable=True)[:count].tolist()
    return [{"number": j, "score": float(values[j]), "example": train[j]} for j in order]


def _tiles(scores: Scores, detection: MislabeledCurve | None, lds: Mapping[str, LDS]) -> list[dict[str, str]]:
    """The numbers to see first."""
    q, n = scores.values.shape
    good = int(scores.converged.sum())
    asked, of = (f"{q:,} × ", "queries × ") if q else ("", "")
    tiles = [{"value": f"{asked}{n:,}", "name": f"{of}training examples"}]
    if scores.agreement is not None and q:
        tiles.append(_agreement_tile(scores.agreement))
    elif scores.residual is not None and q:
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


def _agreement_tile(agreement: Mapping[str, Any]) -> dict[str, str]:
    """How an approximate method ranks beside accurate scores, in a number and words."""
    if "not checked" in agreement:
        return {"value": "–", "name": "not checked against accurate scores"}
    words = f"ranks as the accurate answer does; {agreement['shared']} of the {agreement['top']} strongest shared"
    return {"value": f"{agreement['rank correlation']:.2f}", "name": words}


def _configuration(provenance: Mapping[str, Any], queries: int) -> dict[str, str]:
    """The provenance as rows of words; what has a section of its own is left out."""
    elsewhere = (
        "seconds",
        *(("solver", "chosen", "tolerance", "steps", "passes", "coverage", "agreement") if queries else ()),
    )
    rows: dict[str, str] = {}
    for name, value in provenance.items():
        if name in elsewhere or value is None:
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
