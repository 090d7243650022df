"""Choosing training data for a target: the examples that help its queries most.

    mean       mean_q s(q, z)                      the average over the target set (HyperINF, section 5.2)
    max        max_g mean_{q in g} s(q, z)         whichever group z helps most (LESS; Xia et al. 2024)
    coverage   sum_g sqrt(sum_{z in S} max(s, 0))  no group is served alone; greedy, see `wherefrom.tools.act.coverage`

`cleanest` is the other filter: the examples of the lowest self-influence (Schioppa et al. 2022, section 5.2). Judge
either by training on the choice and on random examples of the same number, for the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from wherefrom.data.tables import Table, as_table, joined
from wherefrom.errors import expected
from wherefrom.tools.act.coverage import greedy
from wherefrom.tools.act.ranking import Numbers, example_numbers, rank_examples, resolve_count
from wherefrom.tools.evaluate.arrays import Floats, float_array

By = Literal["mean", "max", "coverage"]
RULES = {"mean": lambda by_group: by_group.mean(0), "max": lambda by_group: by_group.max(0)}  # of (G, N): (N,)


@dataclass(frozen=True)
class Selection:
    """Examples that were chosen, and as many at random to compare with.

    Attributes:
        examples: (k,) numbers of the chosen examples, best first; for coverage in the order of the greedy choice.
        scores: (k,) their scores by the rule; for coverage their mean.
        random: (k,) numbers of as many random examples, from all N.
        served: (G,) what the chosen examples give each group of queries (each query without groups): the sum of their
            scores. Divided by N it predicts how much f rises if they are removed.
        served_by_random: (G,) the same of the random ones.
        by: the rule.
        examples_in_all: N.
        seed: of the random examples.
    """

    examples: Numbers
    scores: Floats
    random: Numbers
    served: Floats
    served_by_random: Floats
    by: str
    examples_in_all: int
    seed: int

    def table(self, **columns: Sequence[Any]) -> Table:
        """Make a row for each chosen example: place (from 1), example, score.

        Args:
            columns: more columns, by name; each has a value for every one of the N examples.
        """
        places = list(range(1, len(self.examples) + 1))
        table = as_table({"place": places, "example": self.examples, "score": self.scores})
        return joined(table, "example", columns)

    def __str__(self) -> str:
        def describe(served: Floats) -> str:
            return f"{(served > 0).sum()} of {len(served)} helped, mean {served.mean():.3g}, worst {served.min():.3g}"

        return (
            f"{len(self.examples)} of {self.examples_in_all} examples by {self.by}: {describe(self.served)}\n"
            f"as many at random (seed {self.seed}): {describe(self.served_by_random)}"
        )


def select(
    scores: object,
    share: float | None = None,
    count: int | None = None,
    by: By = "mean",
    groups: Sequence[object] | None = None,
    seed: int = 0,
) -> Selection:
    """Choose the training examples that help target queries most.

    Args:
        scores: (Q, N) tensor or array, or an object whose ``values`` is one, of N examples on Q target queries;
            positive: z helps. Data that was not trained on is scored by ``fitted.score(queries, examples=...)``.
        share: of the N examples, in (0, 1].
        count: how many, in place of a share.
        by: the rule, see above: "mean", "max", or "coverage" for a diverse set.
        groups: (Q,) the group of each query, such as its task or class; queries of a group are averaged first. None:
            each query is a group of its own.
        seed: of the random examples. The choice itself has none: ties go by example number, for coverage by the mean
            score first.

    Raises:
        InputError: if scores are not finite, the size is out of range or not given once, the rule is unknown, or groups
            do not fit.
    """
    by_group = _average_groups(float_array(scores, "scores", (2,)), groups)  # (G, N)
    n = by_group.shape[1]
    k = resolve_count(n, share, count)
    if by == "coverage":
        values, chosen = by_group.mean(0), greedy(by_group, k)
    elif by in RULES:
        values = RULES[by](by_group)
        chosen = rank_examples(values)[:k]
    else:
        raise expected("by", f"one of {', '.join([*RULES, 'coverage'])}", by)

    random = np.random.default_rng(seed).choice(n, k, replace=False)
    # So far examples are numbered by column; scores of a shortlist say which they are.
    numbers = example_numbers(scores, n)
    return Selection(
        examples=numbers[chosen],
        scores=values[chosen],
        random=numbers[random],
        served=by_group[:, chosen].sum(1),
        served_by_random=by_group[:, random].sum(1),
        by=by,
        examples_in_all=n,
        seed=seed,
    )


def cleanest(self_influence: object, share: float | None = None, count: int | None = None, seed: int = 0) -> Selection:
    """Choose the training examples of the lowest self-influence: those that the others teach, too.

    Args:
        self_influence: (N,) tensor or array.
        share, count, seed: as for `select`.

    Returns:
        A `Selection` whose scores are minus the self-influence, for the one group "all".

    Raises:
        InputError: as `select`.
    """
    return select(-float_array(self_influence, "self_influence", (1,))[None], share, count, seed=seed)


def _average_groups(scores: Floats, groups: Sequence[object] | None) -> Floats:
    """Average over the queries of each group, groups in the order in which they are first met: (G, N)."""
    if groups is None:
        return scores
    if len(groups) != len(scores):
        raise expected("groups", f"one for each of the {len(scores)} queries", len(groups))
    names = np.asarray(groups).tolist()
    means = []
    for name in dict.fromkeys(names):
        is_member = [other == name for other in names]
        means.append(scores[is_member].mean(0))
    return np.stack(means)
