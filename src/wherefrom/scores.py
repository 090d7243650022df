"""Scores: influence of every training example on every query, with the certificate of each query's solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wherefrom import store
from wherefrom.errors import InputError, expected


@dataclass(frozen=True)
class Top:
    """The strongest training examples of each query, strongest first.

    Args:
        proponents, opponents: example numbers, (Q, k).
        proponent_scores, opponent_scores: their scores, (Q, k).
    """

    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of N training examples on Q queries.

    A positive score means that removing the example would raise the query's measurement f (lower f is better): it
    helped. ``values / N`` is the predicted change of f on removal.

    Args:
        values: (Q, N), in units of f times N.
        residual: relative residual of each query's solve with the true operator, (Q,); None if it was not measured.
        converged: whether each query met the solver's tolerance, (Q,).
        history: relative residuals over the solver's steps, (steps + 1, Q); empty for direct methods.
        provenance: configuration, seeds, versions, coverage and cost.
        self_values: self-influence of each training example, (N,), if it was asked for.
        numbers: (N,) int64, where the columns are some of the training examples: which; None: all, in order.
    """

    values: Tensor
    residual: Tensor | None
    converged: Tensor
    history: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    provenance: dict[str, Any] = field(default_factory=dict)
    self_values: Tensor | None = None
    numbers: Tensor | None = None

    @property
    def self_influence(self) -> Tensor:
        """g^T (C + damping)^-1 g of each training example, (N,); large for examples learnt by heart.

        Raises:
            InputError: if it was not computed.
        """
        if self.self_values is None:
            raise InputError(
                "self-influence was not computed with these scores. Pass self_influence=True, or call "
                "Influence.self_influence()."
            )
        return self.self_values

    @property
    def row_error(self) -> float | None:
        """The largest relative difference of the per-example gradients that were used from autograd's.

        It is measured on a drawn part of the batches while they stream (`wherefrom.model.check`); None if no gradients
        of examples were used, or all scores came from the disk. What differs by more than rounding is refused.
        """
        return self.provenance.get("row error")

    @property
    def agreement(self) -> dict[str, Any] | None:
        """How the scores of an approximate inverse agree with accurate ones on a few queries; None for other methods.

        Either ``queries`` (their numbers), ``rank correlation`` and ``shared`` (the worst of them: Spearman's, and how
        many of the ``top`` strongest proponents are the same) and the ``tolerance`` of the accurate solve; or ``not
        checked``, the reason.
        """
        return self.provenance.get("agreement")

    def top(self, k: int = 5) -> Top:
        """The k strongest proponents (largest scores) and opponents (smallest), ties in the order of the columns."""
        if not 1 <= k <= self.values.shape[1]:
            raise expected("k", f"between 1 and the {self.values.shape[1]} training examples", k)
        high, low = (torch.sort(self.values, dim=1, descending=d, stable=True) for d in (True, False))
        best, worst = high.indices[:, :k], low.indices[:, :k]
        if self.numbers is not None:
            best, worst = (self.numbers.to(columns.device)[columns] for columns in (best, worst))
        return Top(best, high.values[:, :k], worst, low.values[:, :k])

    def relative(self, lengths: Tensor | None = None) -> Scores:
        """Scores over how much each example moves the model, whatever the query (RelatIF; Barshan et al. 2020).

        Examples that move it a lot lead the plain ranking of every query. These scores rank by the change of f among
        removals that change as much elsewhere; they no longer predict a change.

        Args:
            lengths: what to divide by, (N,), positive. None takes the root of the self-influence, for the change of
                the example's own loss (l-RelatIF); `response_norms` has that of the parameters (theta-RelatIF).

        Raises:
            InputError: if self-influence is needed and was not computed, or some of them are not positive.
        """
        what, found = ("self-influence", self.self_influence) if lengths is None else ("lengths", lengths)
        if found.shape != self.values.shape[1:]:
            raise expected(what, f"one per training example, ({self.values.shape[1]},)", tuple(found.shape))
        if bad := (~(found > 0)).nonzero().flatten().tolist():
            raise expected(
                what,
                "positive to divide by",
                f"{float(found[bad[0]]):g} for example {bad[0]} ({len(bad)} in all)",
                "Leave out examples without a gradient, take a positive semi-definite C, or solve more accurately.",
            )
        by = found.sqrt() if lengths is None else found
        return dataclasses.replace(self, values=self.values / by, provenance=self.provenance | {"relative to": what})

    def __str__(self) -> str:
        """A line on the whole."""
        q, n = self.values.shape
        if self.agreement is not None:  # the residual of an approximate method says little
            certified = agreement_in_words(self.agreement)
        elif self.residual is None:
            certified = "residual not measured"
        else:
            certified = f"worst residual {float(self.residual.max()):.1e}"
        solved = f", {int(self.converged.sum())} of {q} converged" if len(self.history) else ""
        measured = "".join(f", {name} {value:.2g}" for name, value in self.provenance.get("measured", {}).items())
        lost = ""
        if cut := self.provenance.get("truncation"):
            how = f"rank {cut['rank']}" if cut["rank"] >= 1 else f"{cut['rank']:.4g} of their energy"
            lost = f", queries cut to {how} (error at most {cut['error']:.2g})"
        checked = "" if self.row_error is None else f", row error {self.row_error:.1e}"
        return f"scores of {n} training examples on {q} queries, {certified}{checked}{solved}{measured}{lost}"

    def save(self, path: str | Path) -> None:
        """Write to a file, complete or not at all."""
        tensors = {"values": self.values, "converged": self.converged, "history": self.history}
        for name in ("residual", "self_values", "numbers"):
            if (t := getattr(self, name)) is not None:
                tensors[name] = t
        store.save(path, "scores", tensors, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            ArtefactError: if the file is damaged, of another kind or version, or holds no scores that make sense.
        """
        t, provenance = store.load(path, "scores")
        _check(path, t, provenance)
        return cls(provenance=provenance, **{"residual": None} | t)  # pyright: ignore[reportArgumentType]


def agreement_in_words(agreement: dict[str, Any]) -> str:
    """Say how the scores of an approximate method agree with accurate ones."""
    if "not checked" in agreement:
        return "not checked against accurate scores"
    return (
        f"ranks as the accurate answer does: {agreement['rank correlation']:.2f} "
        f"({agreement['shared']} of the {agreement['top']} strongest shared)"
    )


def _check(path: str | Path, t: dict[str, Tensor], provenance: dict[str, Any]) -> None:
    """Refuse what is in a file of scores and cannot be.

    Raises:
        ArtefactError: for shapes that do not belong together, values that are not finite, numbers of no example.
    """
    if "values" not in t or t["values"].ndim != 2 or not t["values"].is_floating_point():
        raise store.wrong(path, "a matrix of scores, values", f"no such one among {', '.join(t) or 'no tensors'}")
    q, n = t["values"].shape
    optional = {"residual": [q], "self_values": [n], "numbers": [n]}
    history = [None, q] if t.get("history", torch.empty(0)).numel() else [0, None]
    shapes = {"values": [q, n], "converged": [q], "history": history} | optional
    dtypes = {"converged": torch.bool, "numbers": torch.int64}
    store.check_tensors(path, t, shapes, list(optional), dtypes, unbounded=("residual", "history"))
    if "residual" in t and not bool((t["residual"] >= 0).all()):
        raise store.wrong(path, "residuals of 0 or more", float(t["residual"].min()))
    examples = provenance.get("examples", n)
    if type(examples) is not int or not 0 < examples < 2**63:
        raise store.wrong(path, "a number of training examples", examples)
    if (numbers := t.get("numbers")) is not None:
        known = bool(((numbers >= 0) & (numbers < examples)).all())
        if not known or len(numbers.unique()) < n:
            raise store.wrong(path, f"in numbers those of {n} of {examples} training examples", "others")


def unsolved(values: Tensor, **provenance: Any) -> Scores:
    """Scores (Q, N) of a method that solves nothing, so that there is no residual and nothing to converge."""
    return Scores(values, None, torch.ones(len(values), dtype=torch.bool), provenance=provenance)


def ensemble(scores: Sequence[Scores]) -> Scores:
    """The mean over models that were trained independently, each scored by a fit of its own (ASTRA eq. 11).

    Args:
        scores: one for each model, of the same queries and training examples, by any method.

    Returns:
        Means of the values and of the self-influence; for each query the worst residual, and whether it converged in
        all; None where one lacks it. The provenance is what all share, and that of each as ``members``.

    Raises:
        InputError: if there are none, or their shapes or the training examples of their columns differ.
    """
    scores = list(scores)
    if len(shapes := {tuple(s.values.shape) for s in scores}) != 1:
        raise expected("scores", "several of one shape (Q, N)", sorted(shapes) or "none")
    first, *others = scores
    if len({None if s.numbers is None else tuple(s.numbers.tolist()) for s in scores}) != 1:
        raise expected("scores", "of the same training examples", "those of different shortlists")
    residuals = [s.residual for s in scores if s.residual is not None]
    own = [s.self_values for s in scores if s.self_values is not None]
    shared = {k: v for k, v in first.provenance.items() if all(s.provenance.get(k) == v for s in others)}
    if checked := [s.row_error for s in scores if s.row_error is not None]:
        shared["row error"] = max(checked)
    return Scores(
        torch.stack([s.values for s in scores]).mean(0),
        torch.stack(residuals).amax(0) if len(residuals) == len(scores) else None,
        torch.stack([s.converged for s in scores]).all(0),
        provenance=shared | {"members": [s.provenance for s in scores]},
        self_values=torch.stack(own).mean(0) if len(own) == len(scores) else None,
        numbers=first.numbers,
    )
