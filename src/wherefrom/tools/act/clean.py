"""Which training examples to drop or to relabel, and why.

Examples are ranked by how suspicious they are, largest first:

    self-influence      g(z)^T (C + damping I)^-1 g(z): learnt by heart, not from others       (Schioppa et al. 2022)
    harm                -mean_q s(q, z) over trusted queries                               (HyperINF, section 4)

Those beyond Tukey's (1977) outer fence are looked at unless a number is given: three interquartile ranges above the
upper quartile. With an `Influence` three ways are weighed for each, by the predicted change of the mean f of trusted
queries:

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

from wherefrom.data.tables import Table, as_table, joined
from wherefrom.errors import InputError, expected
from wherefrom.methods.influence import Influence
from wherefrom.tools.act.ranking import Numbers, how_many, ranked
from wherefrom.tools.act.relabel import given_labels, stand_ins, tried
from wherefrom.tools.evaluate.arrays import Floats, float_array

FENCE = 3.0  # interquartile ranges above the upper quartile
STAND_INS = 100  # training examples that are trusted where nothing else is
COLUMNS = "rank", "example", "action", "given_label", "new_label", "score", "distance", "predicted_change", "reason"

Action = Literal["drop", "relabel", "keep"]
Weighed = tuple[Action, int | None, int | None, float | None]  # with the given label, a new one, the predicted change


@dataclass(frozen=True)
class Proposal:
    """What to do with one training example.

    Attributes:
        example: its number.
        action: "drop" or "relabel"; or "keep", where the trusted queries would miss it.
        given: its label, where an `Influence` tells it.
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
        """A row for each proposal: rank (from 1), example, action, labels, score, distance, predicted change, reason.

        Args:
            columns: more columns, by name, such as captions; each has a value for every one of the N examples.
        """
        rows = [
            (
                r,
                p.example,
                p.action,
                p.given,
                p.label,
                self.scores[p.example],
                self.distances[p.example],
                p.change,
                p.reason,
            )
            for r, p in enumerate(self.proposals, 1)
        ]
        return joined(as_table([dict(zip(COLUMNS, row, strict=True)) for row in rows], COLUMNS), "example", columns)

    def __str__(self) -> str:
        actions = [p.action for p in self.proposals]
        counts = ", ".join(f"{actions.count(a)} to {a}" for a in ("drop", "relabel", "keep") if a in actions)
        first = [f"{p.action} {p.example}: {p.reason}" for p in self.proposals[:5]]
        return "\n".join([f"{len(self.scores)} examples by {self.by}: {counts or 'none to act on'}", self.rule, *first])


def clean(
    scores: object,
    influence: Influence | None = None,
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
        influence: a fitted `Influence` of a classifier, to try other labels with. None: all are proposed to drop.
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
    if getattr(scores, "numbers", None) is not None:
        raise expected("scores", "of all training examples, of which outliers are sought", "those of a shortlist")
    by, suspicion = ("self-influence", values) if values.ndim == 1 else ("harm", -values.mean(0))
    ranking, (distances, fence) = ranked(suspicion), _fence(suspicion)
    if share is None and count is None:
        size = int((suspicion > max(fence, 0.0)).sum())
        rule = f"beyond the outer fence of {fence:.3g}, {FENCE:g} interquartile ranges above the upper quartile: {size}"
    else:
        size = how_many(len(suspicion), share, count)
        rule = f"looked at: the first {size}, as asked"
    suspects = ranking[:size]
    if influence is None:
        if trusted is not None:
            raise expected("influence", "given with trusted queries, to try labels", None, "Pass influence.")
        n = len(suspicion)
        changes = [-float(suspicion[z]) / n if by == "harm" else None for z in suspects]
        found: list[Weighed] = [("drop", None, None, change) for change in changes]
    else:
        found, said = _weighed(influence, trusted, ranking, size, labels_at, seed)
        rule += said
    proposals = []
    for rank, (z, (action, given, label, change)) in enumerate(zip(suspects.tolist(), found, strict=True), 1):
        reason = (
            f"rank {rank} of {len(suspicion)} by {by}, {suspicion[z]:.3g}, {distances[z]:.1f} interquartile ranges "
            f"above the upper quartile; {_why(action, given, label, change)}"
        )
        proposals.append(Proposal(z, action, given, label, change, reason))
    return Cleaning(suspicion, ranking, distances, tuple(proposals), by, rule)


def _fence(values: Floats) -> tuple[Floats, float]:
    """How far each value is above the upper quartile, in interquartile ranges, and the outer fence."""
    low, high = np.quantile(values, [0.25, 0.75])
    above, spread = values - high, high - low
    far = above / spread if spread else np.where(above > 0, np.inf, 0.0)
    return far, float(high + FENCE * spread)


def _weighed(
    influence: Influence, trusted: Any, ranking: Numbers, size: int, place: int | str, seed: int
) -> tuple[list[Weighed], str]:
    """(action, given label, new label, predicted change) of the first in the ranking, and what was trusted."""
    problem, n = influence.problem, len(ranking)
    if n != len(problem.train):
        raise expected("scores", f"of the {len(problem.train)} examples that influence was fitted to", f"{n}")
    if not size:
        return [], ""
    labels, said = given_labels(problem, place), "; labels tried against the trusted queries"
    if trusted is None:
        if size == n:
            raise InputError("no training example is left to trust. Look at fewer, or pass trusted queries.")
        trusted, numbers = stand_ins(problem, labels, ranking[size:][::-1], STAND_INS, seed)
        said = f"; labels tried against {len(numbers)} unsuspicious training examples"
    kinds = np.unique(labels)
    found: list[Weighed] = []
    s, losses = tried(influence, trusted, ranking[:size].tolist(), kinds.tolist(), place)  # (S, C)
    for given, helps, loss in zip(labels[ranking[:size]].tolist(), s, losses, strict=True):
        own, best = float(helps[kinds == given][0]), int(helps.argmax())
        gain = float(helps[best]) if loss.argmin() == best else -np.inf
        if gain > max(own, 0.0):
            found.append(("relabel", given, int(kinds[best]), (own - gain) / n))
        else:
            found.append(("drop", given, None, own / n) if own < 0 else ("keep", given, None, 0.0))
    return found, said


def _why(action: Action, given: int | None, label: int | None, change: float | None) -> str:
    """The end of a reason."""
    if action == "keep":
        return f"with its label {given} it helps the trusted queries: rare rather than wrong"
    if change is None:
        return "learnt by heart, not from others"
    what = "without it" if action == "drop" else f"with label {label} in place of {given}"
    return f"{what}, the mean f of the trusted queries is predicted to change by {change:.3g}"
