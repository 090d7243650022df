"""How exactly each query was solved for, by what, and what to do if that is not enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from wherefrom import Scores
from wherefrom.tools.evaluate.arrays import Floats
from wherefrom.tools.report.drawing import (
    DASHED,
    INK,
    LINES,
    MUTED,
    NEGATIVE,
    POINTS,
    POSITIVE,
    draw_svg,
    format_powers,
    place_whole_numbers,
    thin_out,
)
from wherefrom.tools.report.examples import Example, check_count
from wherefrom.tools.report.numbers import short
from wherefrom.tools.report.section import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = 10  # queries in the open table; the others are folded away
EXACT = 0.01  # a residual below it is as good as none

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


@dataclass(frozen=True)
class Convergence(Section):
    """How exactly each query was solved for.

    Args:
        scores: (Q, N) scores with their residuals, history and provenance.
        query_examples: how each of the Q queries is shown; the table has the captions.

    Raises:
        InputError: if there is not one example for each query.
    """

    scores: Scores
    query_examples: Sequence[Example]

    template: ClassVar[str] = "convergence.html"
    anchor: ClassVar[str] = "trust"
    link: ClassVar[str] = "Convergence"

    def __post_init__(self) -> None:
        check_count("query_examples", self.query_examples, len(self.scores.values), self.scores)

    def content(self) -> dict[str, Any]:
        """Describe the method and its solves, and draw the residuals where there are enough steps to see."""
        scores, queries = self.scores, len(self.scores.values)
        rows = self._rank_queries()
        kind = classify_method(scores)
        # Two residuals, before and after, make no curve.
        has_curve = len(scores.history) > 2
        return {
            "kind": kind,
            "queries": queries,
            "late": count_late(scores),
            "verdict": write_verdict(scores),
            "facts": list_facts(scores),
            "worst": rows[:WORST],
            "others": rows[WORST:],
            "knobs": KNOBS[kind] | {"Damping": DAMPING},
            "row_error": scores.row_error,
            "figure": draw_residuals(scores) if has_curve else None,
            "lines": LINES,
        }

    def _rank_queries(self) -> list[dict[str, Any]]:
        """Return a row for each query, the worst first."""
        residual = final_residual(self.scores)
        if residual is None:
            residual = torch.zeros(len(self.scores.values))
        order = residual.nan_to_num(torch.inf).argsort(descending=True, stable=True).tolist()

        rows = []
        for i in order:
            row = describe_certificate(self.scores, i)
            row |= {"number": i, "caption": self.query_examples[i].caption, "met": _met_tolerance(self.scores, i)}
            rows.append(row)
        return rows


def describe_certificate(scores: Scores, i: int) -> dict[str, Any]:
    """Return how the solve of query i went: its residual, its status in words, and the class of its color."""
    residual = None if scores.residual is None else float(scores.residual[i])
    if not bool(scores.converged[i]):
        return {"residual": residual, "status": "did not converge", "state": "bad"}
    if residual is None:
        return {"residual": None, "status": "not measured", "state": "unknown"}
    status = classify_solves(scores)
    is_good = status == "converged" or residual < EXACT
    return {"residual": residual, "status": status, "state": "good" if is_good else "unknown"}


def classify_solves(scores: Scores) -> str:
    """Return what can be said of the queries that did not miss a tolerance; some methods have none to miss."""
    if scores.agreement is not None:
        return "approximate"
    if not scores.history.numel():
        return "direct method"
    if scores.provenance.get("tolerance") is None:
        return "no tolerance"
    return "converged"


def classify_method(scores: Scores) -> str:
    """Return which knobs the method has: "direct", "exact", "chosen", "iterative" or "stochastic"."""
    choice = _choice_of(scores)
    solver = str(choice.get("solver", scores.provenance.get("solver")))
    steps = len(scores.history) - 1
    if solver.startswith("Exact(") and steps < 2:
        return "exact"
    if not scores.history.numel():
        return "direct"
    if "because" in choice:
        return "chosen"
    if choice.get("batch"):
        return "stochastic"
    return "iterative"


def final_residual(scores: Scores) -> Tensor | None:
    """Return what queries are ranked by, (Q,): measured residuals, else the last that the solver saw, else None."""
    if scores.residual is not None:
        return scores.residual
    if scores.history.numel():
        return scores.history[-1]
    return None


def count_late(scores: Scores) -> int:
    """Return how many queries did not converge."""
    return int((~scores.converged).sum())


def write_verdict(scores: Scores) -> str:
    """Return the section in a sentence or two."""
    return f"{_describe_convergence(scores)} {_describe_residuals(scores)}"


def _describe_convergence(scores: Scores) -> str:
    late, tolerance = count_late(scores), scores.provenance.get("tolerance")
    if late:
        words = f"{late} of {len(scores.converged)} queries did not converge"
        return f"{words}." if tolerance is None else f"{words} to the tolerance, {tolerance}."
    status = classify_solves(scores)
    if status == "approximate":
        return _describe_agreement(scores.agreement or {})
    if status == "direct method":
        return "A direct method: it takes no steps, so its residual is all there is to judge it by."
    if status == "no tolerance":
        return "No tolerance was set, so the residuals are all there is to judge by."
    return f"All queries met the tolerance, {tolerance}."


def _describe_residuals(scores: Scores) -> str:
    residual = scores.residual
    if residual is None:
        return "The residuals were not measured."
    if len(residual) == 1:
        return f"The residual is {short(float(residual[0]))}."
    median, largest = short(float(residual.median())), short(float(residual.max()))
    return f"The median residual of {len(residual)} queries is {median}, the largest {largest}."


def _describe_agreement(agreement: Mapping[str, Any]) -> str:
    """Say how the scores of a method for an approximate C agree with accurate ones."""
    words = "The method answers for an approximation of the curvature."
    if "not checked" in agreement:
        return f"{words} Its scores were not checked against accurate ones: {agreement['not checked']}."
    if not agreement:
        return words
    checked = len(agreement["queries"])
    count = "one query" if checked == 1 else f"{checked} queries, the worse of them"
    return (
        f"{words} On {count}, drawn at random and solved accurately, it ranks as the accurate "
        f"answer does: {agreement['rank correlation']:.2f} (rank correlation, 1 is the same order), and shares "
        f"{agreement['shared']} of the {agreement['top']} strongest proponents."
    )


def list_facts(scores: Scores) -> list[tuple[str, str, bool]]:
    """Return (name, value, whether it is code) on the method, its cost and its residuals."""
    facts: list[tuple[str, object, bool]] = [
        *_facts_of_method(scores),
        *_facts_of_cost(scores),
        *_facts_of_certificate(scores),
    ]
    return [(name, str(value), is_code) for name, value, is_code in facts if value is not None]


def _facts_of_method(scores: Scores) -> list[tuple[str, object, bool]]:
    provenance, choice = scores.provenance, _choice_of(scores)
    if "because" not in choice:
        facts = [("method", provenance.get("solver"), True)]
    else:
        facts = [
            ("asked for", provenance.get("solver"), True),
            ("chosen", choice.get("solver"), True),
            ("because", choice["because"], False),
            ("then also", choice.get("then"), True),
        ]
        choice = {name: value for name, value in choice.items() if name not in ("solver", "because", "then")}

    if choice.get("batch") == 0:
        choice["batch"] = "all the data"
    # Its steps are those of a plan; the steps that were taken have a row of their own.
    choice.pop("steps", None)
    words = []
    for name, value in choice.items():
        value = short(value) if isinstance(value, float) else value
        words.append(f"{name.replace('_', ' ')} {value}")
    return [*facts, ("found by the fit", ", ".join(words) or None, False)]


def _facts_of_cost(scores: Scores) -> list[tuple[str, object, bool]]:
    provenance, steps = scores.provenance, len(scores.history) - 1
    passes = provenance.get("passes")
    seconds = ", ".join(f"{part} {value:.2f}" for part, value in provenance.get("seconds", {}).items())
    return [
        ("tolerance", provenance.get("tolerance"), False),
        ("steps", f"{steps:,}" if steps > 0 else "none", False),
        ("passes over the data", None if passes is None else f"{passes:,.1f}".removesuffix(".0"), False),
        ("seconds", seconds or None, False),
    ]


def _facts_of_certificate(scores: Scores) -> list[tuple[str, object, bool]]:
    facts: list[tuple[str, object, bool]] = []
    if scores.agreement is not None:
        facts.append(("checked queries", _name_checked_queries(scores.agreement), False))
    if scores.row_error is not None:
        facts.append(("row error", short(scores.row_error), False))
    if scores.residual is not None:
        worst = int(scores.residual.nan_to_num(torch.inf).argmax())
        facts.append(("median residual", short(float(scores.residual.median())), False))
        facts.append(("worst residual", f"{short(float(scores.residual[worst]))} (query {worst})", False))
    late = count_late(scores)
    if late or classify_solves(scores) == "converged":
        facts.append(("not converged", f"{late} of {len(scores.converged)}", False))
    return facts


def _name_checked_queries(agreement: Mapping[str, Any]) -> str:
    """Return the numbers of the queries that were solved accurately, and to which residual."""
    if "not checked" in agreement:
        return "none"
    return f"{', '.join(map(str, agreement['queries']))} (to a residual of {agreement['tolerance']:g})"


def _choice_of(scores: Scores) -> dict[str, Any]:
    """Return what the fit chose by itself, such as a solver or a batch size."""
    choice = scores.provenance.get("chosen")
    return dict(choice) if isinstance(choice, Mapping) else {}


def _met_tolerance(scores: Scores, i: int) -> str:
    """Return whether query i converged, and a dash where there is no tolerance to meet."""
    if not bool(scores.converged[i]):
        return "no"
    return "yes" if classify_solves(scores) == "converged" else "–"


def draw_residuals(scores: Scores) -> str:
    """Draw each query's relative residual over the solver's steps, as the solver saw it, with the worst set apart.

    A query that did not converge ends in a cross. The tolerance, if there is one, is a dashed line.
    """
    history = scores.history.detach().double().cpu().numpy()  # (steps + 1, Q)
    residual = final_residual(scores)
    ends = history[-1] if residual is None else residual.detach().double().cpu().numpy()
    order = np.argsort(-np.nan_to_num(ends, nan=np.inf), kind="stable")
    worst, tolerance = int(order[0]), scores.provenance.get("tolerance")

    def draw(axes: Axes) -> None:
        # The worst query is drawn last, on top of the others.
        for query in thin_out(order, LINES)[::-1]:
            draw_query(axes, query)
        axes.set(yscale="log", xlim=(0, None), xlabel="step", ylabel="relative residual")

        positive = history[history > 0]
        lows = [float(positive.min())] if len(positive) else []
        if tolerance is not None:
            lows.append(tolerance)
            axes.axhline(tolerance, color=MUTED, lw=1.2, ls=DASHED)
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(f"tolerance {tolerance:g}", (0.02, tolerance), (0, -11), color=MUTED, **place)
        axes.set_ylim(bottom=min(lows, default=0.1) / 2.2)
        place_whole_numbers(axes.xaxis)
        format_powers(axes.yaxis)
        axes.grid(axis="y")

    def draw_query(axes: Axes, query: int) -> None:
        is_late, is_worst = not bool(scores.converged[query]), query == worst
        color = INK if is_worst else POSITIVE
        if is_late:
            color = NEGATIVE
        steps = thin_out(np.arange(_count_steps(history[:, query])), POINTS)
        # A residual of zero has no place on a logarithmic axis: it falls off its lower end.
        line = history[steps, query].clip(1e-300)
        axes.plot(steps, line, color=color, lw=1.7 if is_worst else 0.7, alpha=1 if is_worst else 0.5)
        axes.plot(steps[-1], line[-1], "x" if is_late else "o", ms=4.5 if is_late else 2.5, c=color)
        if is_worst:
            name = f"query {query}" + (", the worst" if len(order) > 1 else "")
            place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top"}
            axes.annotate(name, (0.99, 0.99), color=color, weight="bold", **place)

    counted = f"Relative residuals of {len(order)} queries over {len(history) - 1} steps"
    late = f"{count_late(scores)} did not converge"
    end = f"the worst is query {worst}, which ends at {history[-1, worst]:.1e}"
    return draw_svg(draw, f"{counted}; {late}; {end}.")


def _count_steps(history: Floats) -> int:
    """Return how many of a query's residuals there are before it was frozen, from where on they repeat."""
    last = len(history)
    while last > 2 and history[last - 2] == history[-1]:
        last -= 1
    return last
