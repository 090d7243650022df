"""Which training examples to drop or to relabel, and why.

Examples are ranked by how suspicious they are, largest first:

    self-influence      g(z)^T (C + damping I)^-1 g(z): learnt by heart, not from others       (Schioppa et al. 2022)
    harm                -mean_q s(q, z) over trusted queries                               (HyperINF, section 4)

Those beyond Tukey's (1977) outer fence are looked at unless a number is given: three interquartile ranges above the
upper quartile. With a `FittedInfluence` three ways are weighed for each, by the predicted change of the mean f of
trusted queries:

    keep it: 0,         drop it: s(y) / N,         label it y': (s(y) - s(y')) / N         s(y) = mean_q s(q, (x, y))

and the lowest is proposed. A new label y' must have two witnesses: the trusted queries, whom no other helps as much,
and the model, which has no lower loss on x with any other. The first alone is not enough: under cross-entropy the s of
all labels, weighed by the model's probabilities, sum to zero, so that some label always helps, by merit or by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from wherefrom import FittedInfluence
from wherefrom.data.tables import Table, as_table, joined
from wherefrom.errors import InputError, expected
from wherefrom.tools.act.ranking import Numbers, rank_examples, resolve_count
from wherefrom.tools.act.relabel import draw_stand_ins, read_labels, try_labels
from wherefrom.tools.evaluate.arrays import Floats, float_array

OUTER_FENCE = 3.0  # interquartile ranges above the upper quartile
STAND_INS = 100  # training examples that are trusted where nothing else is
COLUMNS = "rank", "example", "action", "given_label", "new_label", "score", "distance", "predicted_change", "reason"

Action = Literal["drop", "relabel", "keep"]


@dataclass(frozen=True)
class Decision:
    """What to do with an example: its given label, a new one, and the predicted change, as in `Proposal`."""

    action: Action
    given: int | None = None
    label: int | None = None
    change: float | None = None


@dataclass(frozen=True)
class Proposal:
    """What to do with one training example.

    Attributes:
        example: its number.
        action: "drop" or "relabel"; or "keep", where the trusted queries would miss it.
        given: its label, where a `FittedInfluence` tells it.
        label: the new one, to relabel.
        change: predicted change of the trusted queries' mean f (lower is better); None without any.
        reason: in words.
    """

    example: int
    action: Action
    given: int | None
    label: int | None
    change: float | None
    reason: str


@dataclass(frozen=True)
class Cleaning:
    """Training examples by how suspicious they are, and what to do with the first of them.

    Attributes:
        scores: (N,) larger is more suspicious.
        ranking: (N,) example numbers, most suspicious first, ties by number.
        distances: (N,) how far above the rest: interquartile ranges above the upper quartile.
        proposals: what to do with the first of the ranking, in its order.
        by: "self-influence" or "harm".
        rule: how many were looked at, and what was trusted.
    """

    scores: Floats
    ranking: Numbers
    distances: Floats
    proposals: tuple[Proposal, ...]
    by: str
    rule: str

    def table(self, **columns: Sequence[Any]) -> Table:
        """Make a row for each proposal: rank (from 1), example, action, labels, score, distance, change, reason.

        Args:
            columns: more columns, by name, such as captions; each has a value for every one of the N examples.
        """
        rows = []
        for rank, p in enumerate(self.proposals, 1):
            score, distance = self.scores[p.example], self.distances[p.example]
            cells = (rank, p.example, p.action, p.given, p.label, score, distance, p.change, p.reason)
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
        return joined(as_table(rows, COLUMNS), "example", columns)

    def __str__(self) -> str:
        actions = [p.action for p in self.proposals]
        counts = ", ".join(f"{actions.count(a)} to {a}" for a in ("drop", "relabel", "keep") if a in actions)
        first = [f"{p.action} {p.example}: {p.reason}" for p in self.proposals[:5]]
        return "\n".join([f"{len(self.scores)} examples by {self.by}: {counts or 'none to act on'}", self.rule, *first])


def clean(
    scores: object,
    influence: FittedInfluence | None = None,
    trusted: Any = None,
    share: float | None = None,
    count: int | None = None,
    labels_at: int | str = 1,
    seed: int = 0,
) -> Cleaning:
    """Rank training examples by how suspicious they are, and propose what to do with the first.

    Args:
        scores: (N,) self-influence, such as ``influence.self_influence()``; or (Q, N) scores on trusted queries, such
            as ``influence.score(trusted)``. Tensors, arrays, or an object whose ``values`` is one.
        influence: a `FittedInfluence` of a classifier, to try other labels with. None: all are proposed to drop.
        trusted: queries whose labels are right, in the form of the training data, to try labels against. None: 100
            training examples, as many of each label, drawn from the less suspicious half of those that have it.
        share, count: how many to look at. Neither: those beyond the outer fence, if above zero.
        labels_at: where a batch has its labels: 1 in ``(x, y)``, or the key in a dict.
        seed: of the draw of training examples to trust.

    Raises:
        InputError: if scores are not finite, of a shortlist or not of the examples of ``influence``, the size is out of
            range, trusted is given without influence, or labels are not one whole number per example.
    """
    values = float_array(scores, "scores", (1, 2))
    _refuse_shortlist(scores, values.shape[-1])
    if values.ndim == 1:
        by, suspicion = "self-influence", values
    else:
        by, suspicion = "harm", -values.mean(0)
    ranking = rank_examples(suspicion)
    distances, fence = _measure_distances(suspicion)

    if share is None and count is None:
        size = int((suspicion > max(fence, 0.0)).sum())
        rule = f"beyond the outer fence of {fence:.3g}, {OUTER_FENCE:g} interquartile ranges above the upper quartile"
        rule = f"{rule}: {size}"
    else:
        size = resolve_count(len(suspicion), share, count)
        rule = f"looked at: the first {size}, as asked"
    suspects = ranking[:size]

    if influence is None:
        if trusted is not None:
            raise expected("influence", "given with trusted queries, to try labels", None, "Pass influence.")
        # Without a model all are dropped. Only harm is a change of the trusted queries' f.
        changes = [-float(suspicion[z]) / len(suspicion) if by == "harm" else None for z in suspects]
        decisions = [Decision("drop", change=change) for change in changes]
    else:
        decisions, what_was_trusted = _decide(influence, trusted, ranking, size, labels_at, seed)
        rule += what_was_trusted

    proposals = []
    for rank, (z, decision) in enumerate(zip(suspects.tolist(), decisions, strict=True), 1):
        reason = (
            f"rank {rank} of {len(suspicion)} by {by}, {suspicion[z]:.3g}, {distances[z]:.1f} interquartile ranges "
            f"above the upper quartile; {_explain(decision)}"
        )
        proposals.append(Proposal(z, decision.action, decision.given, decision.label, decision.change, reason))
    return Cleaning(suspicion, ranking, distances, tuple(proposals), by, rule)


def _refuse_shortlist(scores: object, n_columns: int) -> None:
    """Refuse scores of some of the examples, among which outliers cannot be told."""
    numbers = getattr(scores, "numbers", None)
    if numbers is None:
        return
    n_examples = getattr(scores, "provenance", {}).get("examples")
    count = "" if n_examples is None else f"{n_examples:,} "
    raise InputError(
        f"Outlier detection needs the scores of all {count}training examples, but these scores cover a shortlist of "
        f"{n_columns:,}. Score without examples=, or rank the shortlist with top()."
    )


def _measure_distances(values: Floats) -> tuple[Floats, float]:
    """Measure how far each value is above the upper quartile, in interquartile ranges; and find the outer fence."""
    low, high = np.quantile(values, [0.25, 0.75])
    above, spread = values - high, high - low
    distances = above / spread if spread else np.where(above > 0, np.inf, 0.0)
    return distances, float(high + OUTER_FENCE * spread)


def _decide(
    influence: FittedInfluence, trusted: Any, ranking: Numbers, size: int, place: int | str, seed: int
) -> tuple[list[Decision], str]:
    """Decide about the first in the ranking, and say what was trusted."""
    problem, n = influence.problem, len(ranking)
    if n != len(problem.train):
        raise expected("scores", f"of the {len(problem.train)} examples that influence was fitted to", f"{n}")
    if not size:
        return [], ""

    labels = read_labels(problem, place)  # (N,)
    what_was_trusted = "; labels tried against the trusted queries"
    if trusted is None:
        if size == n:
            raise InputError("no training example is left to trust. Look at fewer, or pass trusted queries.")
        least_suspicious = ranking[size:][::-1]
        trusted, numbers = draw_stand_ins(problem, labels, least_suspicious, STAND_INS, seed)
        what_was_trusted = f"; labels tried against {len(numbers)} unsuspicious training examples"

    classes = np.unique(labels)  # (C,)
    suspects = ranking[:size]
    helpfulness, losses = try_labels(influence, trusted, suspects.tolist(), classes.tolist(), place)  # (S, C)
    decisions = []
    for given, helps, loss in zip(labels[suspects].tolist(), helpfulness, losses, strict=True):
        as_given = float(helps[classes == given][0])
        best = int(helps.argmax())
        # The model is the second witness: a label that it does not hold for the likeliest is no candidate.
        as_best = float(helps[best]) if loss.argmin() == best else -np.inf
        if as_best > max(as_given, 0.0):
            decisions.append(Decision("relabel", given, int(classes[best]), (as_given - as_best) / n))
        elif as_given < 0:
            decisions.append(Decision("drop", given, change=as_given / n))
        else:
            decisions.append(Decision("keep", given, change=0.0))
    return decisions, what_was_trusted


def _explain(decision: Decision) -> str:
    """Give the reason of a decision, as the end of a sentence."""
    if decision.action == "keep":
        return f"with its label {decision.given} it helps the trusted queries: rare rather than wrong"
    if decision.change is None:
        return "learnt by heart, not from others"
    what = "without it" if decision.action == "drop" else f"with label {decision.label} in place of {decision.given}"
    return f"{what}, the mean f of the trusted queries is predicted to change by {decision.change:.3g}"
