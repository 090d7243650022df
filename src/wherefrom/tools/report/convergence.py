"""The section on convergence: how exactly each query was solved for, by what, and which knob to turn if not enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wherefrom.scores import Scores
from wherefrom.tools.report.numbers import short

WORST = 10  # queries in the open table; the others are folded away

KNOBS = {
    "direct": {
        "Solver": "a direct method answers for an approximation of C, and no knob of its own makes that exact. Take it "
        'as the preconditioner of CG, as in CG(preconditioner=EKFAC()), or leave the choice to solver="auto".',
    },
    "exact": {
        "Precision": "a dense solve leaves rounding alone. Put the model into float64 with model.double().",
    },
    "chosen": {
        "Tolerance": "Auto(tolerance=…) is where each query stops. Lower it for smaller residuals.",
        "Budget": "where a query missed it, allow more: Auto(memory=…, seconds=…).",
    },
    "iterative": {
        "Steps": "allow more where the curves still fall at their ends.",
        "Preconditioner": "a better one needs fewer steps: Nystrom() for any layers, Dual() for a classifier of few "
        'classes; solver="auto" chooses one.',
        "Tolerance": "lower it for smaller residuals; raise it if a residual above it is good enough for you.",
    },
    "stochastic": {
        "Batch": "minibatches leave an error that more steps do not remove. Where the curves have levelled off, raise "
        "batch, or average more repeats.",
        "Steps": "allow more where they still fall.",
        "Solver": "CG works on all the data and has no such floor.",
    },
}
DAMPING = "more of it makes every system easier to solve, but it asks another question: less of the curvature counts."


def convergence(scores: Scores, captions: Sequence[str], shown: Sequence[int]) -> dict[str, Any]:
    """What the section says.

    Args:
        scores: (Q, N) scores with residuals, history and provenance.
        captions: of the Q queries.
        shown: numbers of the queries that have a card to link to.

    Returns:
        the kind of method, a verdict, rows on the whole, the queries from the worst on, and the knobs.
    """
    kind, residual = kind_of(scores), final(scores)
    size = torch.zeros(len(captions)) if residual is None else residual.nan_to_num(torch.inf)
    order = size.argsort(descending=True, stable=True).tolist()
    queries = [
        certificate(scores, i) | {"number": i, "caption": captions[i], "met": _met(scores, i), "shown": i in shown}
        for i in order
    ]
    return {
        "kind": kind,
        "worst": None if residual is None else order[0],
        "verdict": _verdict(scores),
        "facts": _facts(scores),
        "first": queries[:WORST],
        "others": queries[WORST:],
        "knobs": KNOBS[kind] | {"Damping": DAMPING},
    }


def certificate(scores: Scores, i: int) -> dict[str, object]:
    """How a query's solve went: its residual, one word, and the class of its colour."""
    residual = None if scores.residual is None else float(scores.residual[i])
    if not bool(scores.converged[i]):
        return {"residual": residual, "status": "did not converge", "state": "bad"}
    if residual is None:
        return {"residual": None, "status": "not measured", "state": "unknown"}
    status = standing(scores)
    good = status == "converged" or residual < 0.01
    return {"residual": residual, "status": status, "state": "good" if good else "unknown"}


def standing(scores: Scores) -> str:
    """What may be said of queries that were not found wanting: some methods have no tolerance that could be missed."""
    if scores.agreement is not None:
        return "approximate"
    if not scores.history.numel():
        return "direct method"
    return "no tolerance" if scores.provenance.get("tolerance") is None else "converged"


def kind_of(scores: Scores) -> str:
    """Which knobs the method has: "direct", "exact", "chosen", "iterative" or "stochastic"."""
    chosen, steps = _chosen(scores), len(scores.history) - 1
    if steps < 2 and str(chosen.get("solver", scores.provenance.get("solver"))).startswith("Exact("):
        return "exact"
    if not scores.history.numel():
        return "direct"
    if "because" in chosen:
        return "chosen"
    return "stochastic" if chosen.get("batch") else "iterative"


def final(scores: Scores) -> Tensor | None:
    """What queries are ranked by, (Q,): measured residuals, else the last that the solver saw, else None."""
    if scores.residual is not None:
        return scores.residual
    return scores.history[-1] if scores.history.numel() else None


def _chosen(scores: Scores) -> Mapping[str, Any]:
    found = scores.provenance.get("chosen")
    return found if isinstance(found, Mapping) else {}


def _met(scores: Scores, i: int) -> str:
    """Converged or not; a dash where there is no tolerance."""
    if not bool(scores.converged[i]):
        return "no"
    return "yes" if standing(scores) == "converged" else "–"


def _verdict(scores: Scores) -> str:
    """The section in a sentence or two."""
    q, late, residual = len(scores.converged), int((~scores.converged).sum()), scores.residual
    if residual is None:
        size = "The residuals were not measured."
    elif q == 1:
        size = f"The residual is {short(float(residual[0]))}."
    else:
        middle, most = short(float(residual.median())), short(float(residual.max()))
        size = f"The median residual of {q} queries is {middle}, the largest {most}."
    goal = scores.provenance.get("tolerance")
    said = {
        "direct method": "A direct method: it takes no steps, so its residual is all there is to judge it by.",
        "approximate": _agreement_sentence(scores),
        "no tolerance": "No tolerance was set, so the residuals are all there is to judge by.",
        "converged": f"All queries met the tolerance, {goal}.",
    }[standing(scores)]
    if late:
        said = f"{late} of {q} queries did not converge" + ("." if goal is None else f" to the tolerance, {goal}.")
    return f"{said} {size}"


def _agreement_sentence(scores: Scores) -> str:
    """How the scores of a method for an approximate C agree with accurate ones."""
    found = scores.agreement or {}
    said = "The method answers for an approximation of the curvature."
    if "not checked" in found:
        return f"{said} Its scores were not checked against accurate ones: {found['not checked']}."
    if not found:
        return said
    return (
        f"{said} On {_count(len(found['queries']))}, drawn at random and solved accurately, it ranks as the accurate "
        f"answer does: {found['rank correlation']:.2f} (rank correlation, 1 is the same order), and shares "
        f"{found['shared']} of the {found['top']} strongest proponents."
    )


def _count(queries: int) -> str:
    return "one query" if queries == 1 else f"{queries} queries, the worse of them"


def _checked_queries(agreement: Mapping[str, Any]) -> str:
    """The numbers of the queries that were solved accurately, and to which residual."""
    if "not checked" in agreement:
        return "none"
    return f"{', '.join(map(str, agreement['queries']))} (to a residual of {agreement['tolerance']:g})"


def _facts(scores: Scores) -> list[tuple[str, str, bool]]:
    """(name, value, whether it is code) on the method, its cost and its residuals."""
    provenance, chosen, steps = scores.provenance, dict(_chosen(scores)), len(scores.history) - 1
    rows: list[tuple[str, object, bool]] = []
    if "because" in chosen:
        rows += [
            ("asked for", provenance.get("solver"), True),
            ("chosen", chosen.pop("solver", None), True),
            ("because", chosen.pop("because"), False),
            ("then also", chosen.pop("then", None), True),
        ]
    else:
        rows.append(("method", provenance.get("solver"), True))
    if chosen.get("batch") == 0:
        chosen["batch"] = "all the data"
    found = [(name, value) for name, value in chosen.items() if name != "steps"]  # of a plan; those made are below
    seconds, late = provenance.get("seconds", {}), int((~scores.converged).sum())
    rows += [
        ("found by the fit", _listed(found), False),
        ("tolerance", provenance.get("tolerance"), False),
        ("steps", f"{steps:,}" if steps > 0 else "none", False),
        ("passes over the data", _plain(provenance.get("passes")), False),
        ("seconds", ", ".join(f"{part} {value:.2f}" for part, value in seconds.items()) or None, False),
    ]
    if scores.agreement is not None:
        rows.append(("checked queries", _checked_queries(scores.agreement), False))
    if scores.row_error is not None:
        rows.append(("row error", short(scores.row_error), False))
    if scores.residual is not None:
        at = int(scores.residual.nan_to_num(torch.inf).argmax())
        rows.append(("median residual", short(float(scores.residual.median())), False))
        rows.append(("worst residual", f"{short(float(scores.residual[at]))} (query {at})", False))
    if late or standing(scores) == "converged":
        rows.append(("not converged", f"{late} of {len(scores.converged)}", False))
    return [(name, str(value), code) for name, value, code in rows if value is not None]


def _listed(found: Sequence[tuple[str, Any]]) -> str | None:
    words = [f"{name.replace('_', ' ')} {short(v) if isinstance(v, float) else v}" for name, v in found]
    return ", ".join(words) or None


def _plain(value: float | None) -> str | None:
    return None if value is None else f"{value:,.1f}".removesuffix(".0")
