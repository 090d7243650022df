"""Scores: influence of every training example on every query, with the certificate of each query's solve."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence import store
from whence.errors import InputError, expected


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
    """

    values: Tensor
    residual: Tensor | None
    converged: Tensor
    history: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    provenance: dict[str, Any] = field(default_factory=dict)
    self_values: Tensor | None = None

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

    def top(self, k: int = 5) -> Top:
        """The k strongest proponents (largest scores) and opponents (smallest), ties by example number."""
        if not 1 <= k <= self.values.shape[1]:
            raise expected("k", f"between 1 and the {self.values.shape[1]} training examples", k)
        high, low = (torch.sort(self.values, dim=1, descending=d, stable=True) for d in (True, False))
        return Top(high.indices[:, :k], high.values[:, :k], low.indices[:, :k], low.values[:, :k])

    def __str__(self) -> str:
        """A line on the whole."""
        q, n = self.values.shape
        worst = "residual not measured" if self.residual is None else f"worst residual {float(self.residual.max()):.1e}"
        solved = f", {int(self.converged.sum())} of {q} converged" if len(self.history) else ""
        return f"scores of {n} training examples on {q} queries, {worst}{solved}"

    def save(self, path: str | Path) -> None:
        """Write to a file, complete or not at all."""
        tensors = {"values": self.values, "converged": self.converged, "history": self.history}
        if self.residual is not None:
            tensors["residual"] = self.residual
        if self.self_values is not None:
            tensors["self_values"] = self.self_values
        store.save(path, "scores", tensors, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            ArtefactError: if the file is damaged or of another kind or version.
        """
        t, provenance = store.load(path, "scores")
        return cls(t["values"], t.get("residual"), t["converged"], t["history"], provenance, t.get("self_values"))
