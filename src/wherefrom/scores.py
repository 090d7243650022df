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

CERTIFICATE = "certificate"  # where the header of a file of scores has the numbers of their certificate


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far the answers of a solve can be trusted, query by query, and what they cost.

    Args:
        residual: |(C + damping) x - b| / |b| with the true operator on all the data, (Q,); None if not measured.
        converged: whether a query met the solver's tolerance, (Q,); True where the method has none.
        steps: iterations made.
        history: relative residuals as the method saw them, (steps + 1, Q); empty for methods that do not iterate.
        passes: passes over the training data spent, on this certificate too.
        seconds: wall time, that of this certificate included.
        predicted: the error |x - x*| / |x| that the method's own theory expects, (Q,); None where it has none.
        row_error: the largest relative difference of the per-sample gradients that were used from autograd's, measured
            on a drawn part of the batches while they stream (`wherefrom.model.check`); None if none were used. What
            differs by more than rounding is refused.
        agreement: how the scores of an approximate inverse agree with accurate ones on a few queries; None for other
            methods. Either ``queries`` (their numbers), ``rank correlation`` and ``shared`` (the worst of them:
            Spearman's, and how many of the ``top`` strongest proponents are the same) and the ``tolerance`` of the
            accurate solve; or ``not checked``, the reason.
    """

    residual: Tensor | None
    converged: Tensor
    steps: int = 0
    history: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    passes: float = 0.0
    seconds: float = 0.0
    predicted: Tensor | None = None
    row_error: float | None = None
    agreement: dict[str, Any] | None = None

    @classmethod
    def of_nothing_solved(cls, count: int) -> Certificate:
        """Make the certificate of ``count`` queries for which nothing was solved: no residual, nothing to converge."""
        return cls(None, torch.ones(count, dtype=torch.bool))

    @classmethod
    def join(cls, parts: Sequence[Certificate]) -> Certificate:
        """Make one certificate of those of several solves, for all of their queries together."""
        if len(parts) == 1:
            return parts[0]

        steps = max(len(part.history) for part in parts)
        histories = []
        for part in parts:  # a shorter history goes on with its last residuals
            missing = steps - len(part.history)
            goes_on = [part.history[-1:].expand(missing, -1)] if len(part.history) else []
            histories.append(torch.cat([part.history, *goes_on]))

        residuals = [part.residual for part in parts if part.residual is not None]
        predicted = [part.predicted for part in parts if part.predicted is not None]
        return cls(
            torch.cat(residuals) if len(residuals) == len(parts) else None,
            torch.cat([part.converged for part in parts]),
            max(part.steps for part in parts),
            torch.cat(histories, 1),
            sum(part.passes for part in parts),
            sum(part.seconds for part in parts),
            torch.cat(predicted) if len(predicted) == len(parts) else None,
        )

    def __str__(self) -> str:
        """Make a short table: a line on the whole, and one for each of the ten worst queries."""
        count = len(self.converged)
        certified = "not certified"
        order = torch.arange(count)
        if self.residual is not None:
            certified = f"worst residual {float(self.residual.max()):.1e}"
            order = self.residual.nan_to_num(0.0).sort(descending=True, stable=True).indices

        lines = [
            f"{count} right-hand sides, {self.steps} steps, {self.passes:.1f} passes, {self.seconds:.1f} s, "
            f"{certified}, {int(self.converged.sum())} converged",
            "query   residual  converged" + ("  predicted error" if self.predicted is not None else ""),
        ]
        for q in order[:10].tolist():
            residual = "        -" if self.residual is None else f"{float(self.residual[q]):9.1e}"
            predicted = "" if self.predicted is None else f"  {float(self.predicted[q]):15.1e}"
            lines.append(f"{q:5d}  {residual}  {'yes' if self.converged[q] else 'no':>9}{predicted}")
        return "\n".join(lines + (["..."] if count > 10 else []))

    def numbers(self) -> dict[str, Any]:
        """Return what is no tensor, in a form that JSON can hold."""
        return {name: getattr(self, name) for name in NUMBERS}


# What is no tensor in a certificate, and the types it may have in a file.
NUMBERS: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "passes": (int, float),
    "seconds": (int, float),
    "row_error": (int, float, type(None)),
    "agreement": (dict, type(None)),
}


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


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of N training examples on Q queries.

    A positive score means that removing the example would raise the query's measurement f (lower f is better): it
    helped. ``values / N`` is the predicted change of f on removal.

    Args:
        values: (Q, N), in units of f times N.
        certificate: how far each query's scores can be trusted.
        provenance: configuration, seeds, versions, coverage and cost.
        self_values: self-influence of each training example, (N,), if it was asked for.
        numbers: (N,) int64, where the columns are some of the training examples: which; None: all, in order.
    """

    values: Tensor
    certificate: Certificate
    provenance: dict[str, Any] = field(default_factory=dict)
    self_values: Tensor | None = None
    numbers: Tensor | None = None

    @property
    def residual(self) -> Tensor | None:
        """The relative residual of each query's solve with the true operator, (Q,); None if it was not measured."""
        return self.certificate.residual

    @property
    def converged(self) -> Tensor:
        """Whether each query met the solver's tolerance, (Q,)."""
        return self.certificate.converged

    @property
    def history(self) -> Tensor:
        """Relative residuals over the solver's steps, (steps + 1, Q); empty for direct methods."""
        return self.certificate.history

    @property
    def row_error(self) -> float | None:
        """The largest relative difference of the per-sample gradients from autograd's; see `Certificate`."""
        return self.certificate.row_error

    @property
    def agreement(self) -> dict[str, Any] | None:
        """How the scores of an approximate inverse agree with accurate ones on a few queries; see `Certificate`."""
        return self.certificate.agreement

    @property
    def self_influence(self) -> Tensor:
        """g^T (C + damping)^-1 g of each training example, (N,); large for examples learnt by heart.

        Raises:
            InputError: if it was not computed.
        """
        if self.self_values is None:
            raise InputError(
                "self-influence was not computed with these scores. Pass self_influence=True, or call "
                "self_influence() of the fit."
            )
        return self.self_values

    def top(self, k: int = 5) -> Top:
        """Find the k strongest proponents (largest scores) and opponents (smallest), ties in the order of columns."""
        if not 1 <= k <= self.values.shape[1]:
            raise expected("k", f"between 1 and the {self.values.shape[1]} training examples", k)
        high = torch.sort(self.values, dim=1, descending=True, stable=True)
        low = torch.sort(self.values, dim=1, descending=False, stable=True)
        best, worst = high.indices[:, :k], low.indices[:, :k]
        if self.numbers is not None:
            best, worst = (self.numbers.to(columns.device)[columns] for columns in (best, worst))
        return Top(best, high.values[:, :k], worst, low.values[:, :k])

    def relative(self, lengths: Tensor | None = None) -> Scores:
        """Divide by how much each example moves the model, whatever the query (RelatIF; Barshan et al. 2020).

        Examples that move it a lot lead the plain ranking of every query. These scores rank by the change of f among
        removals that change as much elsewhere; they no longer predict a change.

        Args:
            lengths: what to divide by, (N,), positive. None takes the root of the self-influence, for the change of
                the example's own loss (l-RelatIF); `response_norms` has that of the parameters (theta-RelatIF).

        Raises:
            InputError: if self-influence is needed and was not computed, or some of them are not positive.
        """
        what = "self-influence" if lengths is None else "lengths"
        given = self.self_influence if lengths is None else lengths
        if given.shape != self.values.shape[1:]:
            raise expected(what, f"one per training example, ({self.values.shape[1]},)", tuple(given.shape))
        if bad := (~(given > 0)).nonzero().flatten().tolist():
            raise expected(
                what,
                "positive to divide by",
                f"{float(given[bad[0]]):g} for example {bad[0]} ({len(bad)} in all)",
                "Leave out examples without a gradient, take a positive semi-definite C, or solve more accurately.",
            )
        by = given.sqrt() if lengths is None else given
        return dataclasses.replace(self, values=self.values / by, provenance=self.provenance | {"relative to": what})

    def __str__(self) -> str:
        """Say on one line what these are and how far they can be trusted."""
        q, n = self.values.shape
        said = [f"scores of {n} training examples on {q} queries", self._certified()]
        if self.row_error is not None:
            said.append(f"row error {self.row_error:.1e}")
        if len(self.history):
            said.append(f"{int(self.converged.sum())} of {q} converged")
        said += [f"{name} {value:.2g}" for name, value in self.provenance.get("measured", {}).items()]
        if cut := self.provenance.get("truncation"):
            how = f"rank {cut['rank']}" if cut["rank"] >= 1 else f"{cut['rank']:.4g} of their energy"
            said.append(f"queries cut to {how} (error at most {cut['error']:.2g})")
        return ", ".join(said)

    def _certified(self) -> str:
        # The residual of an approximate method says little: it answers for another matrix than the true one.
        if self.agreement is not None:
            return describe_agreement(self.agreement)
        if self.residual is None:
            return "residual not measured"
        return f"worst residual {float(self.residual.max()):.1e}"

    def save(self, path: str | Path) -> None:
        """Write to a file, complete or not at all."""
        certificate = self.certificate
        tensors = {"values": self.values, "converged": certificate.converged, "history": certificate.history}
        optional = {
            "residual": certificate.residual,
            "predicted": certificate.predicted,
            "self_values": self.self_values,
            "numbers": self.numbers,
        }
        tensors |= {name: t for name, t in optional.items() if t is not None}
        store.save(path, "scores", tensors, self.provenance | {CERTIFICATE: certificate.numbers()})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            ArtefactError: if the file is damaged, of another kind or version, or holds no scores that make sense.
        """
        t, provenance = store.load(path, "scores")
        numbers = _read_numbers(path, provenance.pop(CERTIFICATE, {}))
        _check(path, t, provenance)
        certificate = Certificate(
            t.get("residual"), t["converged"], history=t["history"], predicted=t.get("predicted"), **numbers
        )
        return cls(t["values"], certificate, provenance, t.get("self_values"), t.get("numbers"))


def describe_agreement(agreement: dict[str, Any]) -> str:
    """Say how the scores of an approximate method agree with accurate ones."""
    if "not checked" in agreement:
        return "not checked against accurate scores"
    return (
        f"ranks as the accurate answer does: {agreement['rank correlation']:.2f} "
        f"({agreement['shared']} of the {agreement['top']} strongest shared)"
    )


def _read_numbers(path: str | Path, saved: Any) -> dict[str, Any]:
    """Read the numbers of a certificate, those that are there.

    Raises:
        ArtefactError: if they are of other types.
    """
    if not isinstance(saved, dict):
        raise store.wrong(path, "the numbers of a certificate", saved)
    for name, value in saved.items():
        if name not in NUMBERS or isinstance(value, bool) or not isinstance(value, NUMBERS[name]):
            raise store.wrong(path, "the numbers of a certificate", f"{name} {value!r}")
    return saved


def _check(path: str | Path, t: dict[str, Tensor], provenance: dict[str, Any]) -> None:
    """Refuse what is in a file of scores and cannot be.

    Raises:
        ArtefactError: for shapes that do not belong together, values that are not finite, numbers of no example.
    """
    if "values" not in t or t["values"].ndim != 2 or not t["values"].is_floating_point():
        raise store.wrong(path, "a matrix of scores, values", f"no such one among {', '.join(t) or 'no tensors'}")
    q, n = t["values"].shape
    optional = {"residual": [q], "predicted": [q], "self_values": [n], "numbers": [n]}
    history = [None, q] if t.get("history", torch.empty(0)).numel() else [0, None]
    shapes = {"values": [q, n], "converged": [q], "history": history} | optional
    dtypes = {"converged": torch.bool, "numbers": torch.int64}
    store.check_tensors(path, t, shapes, list(optional), dtypes, unbounded=("residual", "history", "predicted"))
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
    """Make scores (Q, N) of a method that solves nothing: there is no residual and nothing to converge."""
    return Scores(values, Certificate.of_nothing_solved(len(values)), provenance)


def ensemble(scores: Sequence[Scores]) -> Scores:
    """Take the mean over models that were trained independently, each scored by a fit of its own (ASTRA eq. 11).

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
    row_errors = [s.row_error for s in scores if s.row_error is not None]
    certificate = Certificate(
        torch.stack(residuals).amax(0) if len(residuals) == len(scores) else None,
        torch.stack([s.converged for s in scores]).all(0),
        row_error=max(row_errors, default=None),
    )
    return Scores(
        torch.stack([s.values for s in scores]).mean(0),
        certificate,
        shared | {"members": [s.provenance for s in scores]},
        torch.stack(own).mean(0) if len(own) == len(scores) else None,
        first.numbers,
    )
