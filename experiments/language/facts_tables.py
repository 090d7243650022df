"""What `facts` measured, in tables and two figures.

    python -m experiments.language.facts_tables --seeds 0 1 2

A rank is the number of sequences that score at least as high, so that ties count against. "Without lures" leaves out
the fifty planted sequences that only share words.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.language.facts import FORMS, Run
from experiments.language.facts_text import FACTS
from wherefrom.tools.evaluate import tail

HERE = Path(__file__).resolve().parent
FIRST = 10
ROWS = {  # name: what was scored, and whether over the root of self-influence
    "TF-IDF, words": ("tfidf", False),
    "TF-IDF, tokens": ("tfidf tokens", False),
    "BM25, words": ("bm25", False),
    "BM25, tokens": ("bm25 tokens", False),
    "gradient dot": ("gradients", False),
    "gradient cosine": ("gradients", True),
    "TracIn, 2 checkpoints": ("tracin", False),
    "EKFAC, 0.1 x mean eigenvalue": ("ekfac", False),
    "the same, over √self-influence": ("ekfac", True),
    "EKFAC, per example": ("ekfac per example", False),
    "the same, over √self-influence ": ("ekfac per example", True),
    "ASTRA, per example": ("astra", False),
}


@dataclass(frozen=True)
class Found:
    """How one method ranks the stating sequences.

    Args:
        ranks: (10, 3).
    """

    ranks: Tensor

    @property
    def hits(self) -> Tensor:
        """How many of the three are in the top ten, (10,)."""
        return (self.ranks <= FIRST).sum(1)

    @property
    def first(self) -> float:
        """Mean reciprocal rank of the first that states the fact."""
        return float((1 / self.ranks.amin(1)).mean())

    @property
    def precision(self) -> float:
        """Mean average precision over the ten facts: 1 if the three come first."""
        order = self.ranks.sort(1).values
        return float((torch.arange(1, 4) / order).mean())


def values(run: Run, row: str) -> Tensor:
    """The scores of a row of the table, (10, N)."""
    name, relative = ROWS[row]
    scores = run.scores(name)
    return (scores.relative() if relative else scores).values


def found(run: Run, row: str, lures: bool) -> Found:
    """Ranks, with or without the lures in the list."""
    scores = values(run, row).double()
    if not lures:
        scores = scores.index_fill(1, run.planted.lures.flatten(), -torch.inf)
    own = scores.gather(1, run.planted.stated)
    return Found((scores.unsqueeze(1) >= own.unsqueeze(2)).sum(2))


def known(run: Run) -> str:
    """What the model makes of the completions."""
    losses = run.losses()
    own = losses.diagonal()
    ranks = (losses < own.unsqueeze(1)).sum(1) + 1
    pair = torch.arange(len(FACTS)) ^ 1
    right = int((own < losses.gather(1, pair.unsqueeze(1))[:, 0]).sum())
    each = "; ".join(f"{f.name} {float(-v):.2f} ({int(r)})" for f, v, r in zip(FACTS, own, ranks, strict=True))
    return (
        f"seed {run.seed}: the answer is the first of all ten for {int((ranks == 1).sum())} facts, before the other of "
        f"its kind for {right}; log p per token (rank): {each}"
    )


def summary(runs: Sequence[Run], lures: bool) -> list[str]:
    """One row for each method: means over seeds."""
    lines = ["| method | facts with 2 of 3 in the top 10 | sequences in the top 10, of 30 | MRR, first | mean AP |"]
    lines += ["|---|---|---|---|---|"]
    for row in ROWS:
        each = [found(run, row, lures) for run in runs]
        cells = [
            ", ".join(str(int((f.hits >= 2).sum())) for f in each),
            ", ".join(str(int(f.hits.sum())) for f in each),
            f"{np.mean([f.first for f in each]):.3f}" + _spread([f.first for f in each]),
            f"{np.mean([f.precision for f in each]):.3f}" + _spread([f.precision for f in each]),
        ]
        lines.append(f"| {row.strip()} | {' | '.join(cells)} |")
    return lines


def by_fact(run: Run) -> list[str]:
    """Ranks of the three sequences of each fact."""
    rows = ["TF-IDF, words", "BM25, words", "gradient cosine", *[r for r in ROWS if "EKFAC" in r or "same" in r]]
    ranks = {row: found(run, row, True).ranks.sort(1).values.tolist() for row in rows}
    lines = ["| fact | " + " | ".join(r.strip() for r in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for i, fact in enumerate(FACTS):
        lines.append(f"| {fact.name} | " + " | ".join(", ".join(map(str, ranks[row][i])) for row in rows) + " |")
    return lines


def tails(run: Run) -> list[str]:
    """How the influence on each completion is spread."""
    lines = ["| scores | top 1% hold | largest one holds | exponent (Hill) | R² of the line | Gini |", "|---" * 6 + "|"]
    for row in ("EKFAC, 0.1 x mean eigenvalue", "EKFAC, per example", "gradient dot"):
        each = [tail(v) for v in values(run, row).double().numpy()]
        numbers = [[t.top for t in each], [t.covered[0] for t in each], [t.hill for t in each], [t.r2 for t in each]]
        cells = [f"{np.mean(n):.3f} ({min(n):.3f} to {max(n):.3f})" for n in [*numbers, [t.gini for t in each]]]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def groups() -> dict[str, Tensor]:
    """Pairs of the 40 sentences: (pairs, 2)."""
    fact = torch.arange(len(FACTS)).repeat_interleave(len(FORMS[0]))
    pairs = torch.tensor(list(combinations(range(len(fact)), 2)))
    a, b = fact[pairs].T
    return {"paraphrases": pairs[a == b], "same relation": pairs[a ^ 1 == b], "unrelated": pairs[a // 2 != b // 2]}


def similar(run: Run) -> list[str]:
    """Means over pairs of sentences, and how often a paraphrase is nearer than an unrelated sentence."""
    both = {k: run.scores(n).values for k, n in (("gradient", "similarity of gradients"), ("influence", "similarity"))}
    lines = ["| similarity | " + " | ".join(f"{k} ({len(v)})" for k, v in groups().items()) + " | P(order right) |"]
    lines += ["|---" * (len(groups()) + 2) + "|"]
    for name, matrix in both.items():
        parts = {k: matrix[tuple(pairs.T)] for k, pairs in groups().items()}
        cells = [f"{float(v.mean()):.3f} ± {float(v.std()):.3f}" for v in parts.values()]
        right = (parts["paraphrases"].unsqueeze(1) > parts["unrelated"]).double().mean()
        lines.append(f"| {name} | {' | '.join(cells)} | {float(right):.3f} |")
    pairs = groups()["unrelated"]
    less = (both["gradient"] > both["influence"])[tuple(pairs.T)].double().mean()
    return [*lines, "", f"Of the unrelated pairs {float(less):.1%} have a higher gradient than influence similarity."]


def places(run: Run) -> dict[str, Tensor]:
    """Positions of the stating sequences, (10, 3, T) boolean.

    "answer": those that predict its tokens; "subject": tokens of the subject's name; "statement": the rest of it;
    "around": the other text.
    """
    shape = (*run.planted.stated.shape, run.planted.ids.shape[1])
    found = {name: torch.zeros(shape, dtype=torch.bool) for name in ("answer", "subject", "statement", "around")}
    for i, fact in enumerate(FACTS):
        for j, (start, end) in enumerate(run.planted.spans[i].tolist()):
            ids = run.planted.ids[run.planted.stated[i, j]].tolist()
            found["statement"][i, j, start:end] = True
            first, last = _within(ids, run.encode(f" {fact.name.split(':')[0]}"), start, end)
            found["subject"][i, j, first:last] = True
            first, last = _within(ids, run.encode(f" {fact.answer}"), start, end)
            found["answer"][i, j, first - 1 : last - 1] = True
    found["subject"] &= ~found["answer"]
    found["statement"] &= ~(found["answer"] | found["subject"])
    found["around"] = ~(found["answer"] | found["subject"] | found["statement"])
    return found


def parts(run: Run) -> list[str]:
    """Where in the sequences and in the model the influence of a fact's own three statements lies."""
    kept, index = run.parts(), torch.arange(30).view(10, 3)
    tokens = kept.pop("token")[torch.arange(10).unsqueeze(1), index]  # (10, 3, T)
    lines = ["| positions | share of them | share of the influence | share of its absolute value |", "|---" * 4 + "|"]
    for name, mask in places(run).items():
        shares = mask.double().mean(), (tokens * mask).sum() / tokens.sum()
        absolute = (tokens * mask).abs().sum() / tokens.abs().sum()
        lines.append(f"| {name} | {' | '.join(f'{float(s):.1%}' for s in (*shares, absolute))} |")
    own = {name: v[torch.arange(10).unsqueeze(1), index].sum() for name, v in kept.items()}
    other = {name: v.sum() - own[name] for name, v in kept.items()}
    lines += ["", "| MLP of layer | of the fact's own statements | of those of other facts |", "|---" * 3 + "|"]
    for layer in range(run.setting.sizes.layers):
        mine = [name for name in kept if f".h.{layer}." in name]
        cells = [float(sum(v[n] for n in mine) / sum(v.values())) for v in (own, other)]
        lines.append(f"| {layer + 1} | {' | '.join(f'{c:.1%}' for c in cells)} |")
    return lines


def example(run: Run, i: int = 6) -> str:
    """One statement with the influence of each token in percent of the sequence's."""
    tokens = run.parts()["token"][i, 3 * i]
    ids = run.planted.ids[run.planted.stated[i, 0]].tolist()
    words = [run.setting.tokenizer.decode([t]) for t in ids]
    return " ".join(
        f"{w.strip() or '·'}({100 * float(v / tokens.sum()):.0f})" for w, v in zip(words, tokens, strict=True)
    )


def _within(ids: list[int], part: list[int], start: int, end: int) -> tuple[int, int]:
    """Where a run of tokens stands between two positions; without its first token, whose space may be missing."""
    for rest in (part, part[1:]):
        for i in range(start, end - len(rest) + 1):
            if ids[i : i + len(rest)] == rest:
                return i, i + len(rest)
    raise ValueError(f"{part} is not between {start} and {end}")


def _spread(numbers: Sequence[float]) -> str:
    return f" ({min(numbers):.2f} to {max(numbers):.2f})" if len(numbers) > 1 else ""


# --- drawing ---


def draw(run: Run) -> None:
    """``facts.svg``: coverage and tail of the completions' influence, and the two similarity matrices."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "wherefrom", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14.5, 3.6), gridspec_kw={"width_ratios": [1.1, 1.1, 1, 1]})
    for colour, row in (("#1f5fa8", "EKFAC, 0.1 x mean eigenvalue"), ("#999999", "gradient dot")):
        for q, v in enumerate(values(run, row).double().numpy()):
            t: Any = tail(v)
            style = {"color": colour, "linewidth": 0.8, "label": row.split(",")[0] if q == 0 else None}
            axes[0].plot(np.arange(1, len(t.sizes) + 1) / t.examples, t.covered, **style)
            axes[1].plot(t.sizes / t.sizes[0], t.ranks, **style)
    axes[0].set(title="influence that the largest hold", xlabel="share of the training sequences", ylabel="share of it")
    axes[1].set(title="sequences with more influence", xscale="log", yscale="log", xlim=(1e-4, 1.2))
    axes[1].set(xlabel="influence, of the largest", ylabel="share of the training sequences")
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, (title, name) in zip(
        axes[2:],
        (("gradient similarity", "similarity of gradients"), ("influence similarity", "similarity")),
        strict=True,
    ):
        image = axis.imshow(run.scores(name).values, vmin=-0.5, vmax=0.5, cmap="RdBu_r", interpolation="nearest")
        axis.set(title=title, xticks=np.arange(1.5, 40, 4), yticks=np.arange(1.5, 40, 4))
        names = [fact.name.split(":")[0] for fact in FACTS]
        axis.set_xticklabels(names, rotation=90, fontsize=7)
        axis.set_yticklabels(names, fontsize=7)
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.tight_layout()
    figure.savefig(HERE / "facts.svg", metadata={"Date": None})


def main() -> None:
    """Print the tables and draw the figure of the first seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    runs = [Run(seed) for seed in args.seeds]
    lines = [known(run) for run in runs]
    for title, lures in (("All sequences", True), ("Without lures", False)):
        lines += ["", title, "", *summary(runs, lures)]
    for table in (by_fact, tails, similar, parts):
        lines += ["", *table(runs[0])]
    print("\n".join([*lines, "", example(runs[0])]))
    draw(runs[0])


if __name__ == "__main__":
    main()
