"""How the commands treat each kind of method: what it is fitted to, what it can be asked, and what is kept of it.

A command asks a kind and never the class of a method: `kind_of` is the one place that looks at classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import wherefrom
from wherefrom import Scores
from wherefrom.errors import UnsupportedError, expected
from wherefrom.tools.loading import Target

if TYPE_CHECKING:
    from wherefrom.tools.cli.run import Run

TEXT_METHODS = (wherefrom.TFIDF, wherefrom.BM25)
RUN_METHODS = (wherefrom.TracIn, wherefrom.SOURCE, wherefrom.Unrolled)


class Kind:
    """A method that is fitted to each model by itself; the other kinds say where they differ.

    Args:
        method: with its settings.
        name: as the user wrote it, for messages.

    Attributes:
        is_influence: whether these are influence functions, which have a fit to keep, other dampings, scores in parts,
            and exact scores of any candidates.
    """

    is_influence = False

    def __init__(self, method: Any, name: str):
        self.method, self.name = method, name

    def complete(self, target: Target) -> Any:  # noqa: ARG002
        """Return the method with what the target knows and the command line does not."""
        return self.method

    def fit(self, run: Run) -> list[Any]:
        """Fit the method to each of the models."""
        task, train = run.target.task, run.target.train
        return [run.method.fit(model, task, train) for model in run.models]

    def score(self, run: Run, fit: Any, asked: str, candidates: Any, certify: bool, pieces: Path) -> Scores:  # noqa: ARG002
        """Score the training examples, or the candidates, on the queries.

        Args:
            run: whose target has the queries.
            fit: one of those that `fit` returned.
            asked: the field of the target with the queries.
            candidates: examples to score in place of the training examples; None for these.
            certify: measure residuals, where there is a system to solve.
            pieces: a folder for the parts of a run that may be stopped, where the method can go on from them.

        Raises:
            UnsupportedError: if the method scores no candidates.
        """
        if candidates is not None:
            raise UnsupportedError(f"{self.name} scores no candidates. Take influence functions.")
        return fit.score(run.target.given(asked))

    def self_influence(self, fit: Any, pieces: Path) -> Scores:  # noqa: ARG002
        """Return the self-influence of the training examples, as scores of no query.

        Raises:
            UnsupportedError: if the method has none.
        """
        if not hasattr(fit, "self_influence"):
            raise UnsupportedError(f"{self.name} has no self-influence. Take influence functions, or TracIn().")
        return _scores_of_no_query(fit.self_influence(), {"solver": str(fit.method)})

    def require_influence(self, what: str) -> None:
        """Refuse what only influence functions can do.

        Raises:
            UnsupportedError: if these are none.
        """
        if not self.is_influence:
            raise UnsupportedError(f"{what} are for influence functions, not {self.name}. Leave them out.")


class InfluenceKind(Kind):
    """Influence functions: their fit is kept in the folder, and scoring goes on where it was stopped."""

    is_influence = True

    def fit(self, run: Run) -> list[Any]:
        """Fit influence functions to each model, or take the fits from the folder."""
        return [run.load_or_fit(model, f"fit-{i}" if i > 1 else "fit") for i, model in enumerate(run.models, 1)]

    def score(self, run: Run, fit: Any, asked: str, candidates: Any, certify: bool, pieces: Path) -> Scores:
        """Score the training examples, or the candidates, on the queries."""
        if asked == "queries" and candidates is None:
            return run.solve(fit, certify, pieces).score(folder=pieces)
        return fit.score(run.target.given(asked), certify=certify, examples=candidates, folder=pieces)

    def self_influence(self, fit: Any, pieces: Path) -> Scores:
        """Return the self-influence of the training examples, as scores of no query."""
        return _scores_of_no_query(fit.self_influence(folder=pieces), fit.provenance())


class EnsembleKind(Kind):
    """A method that takes all models at once, as TRAK does."""

    def fit(self, run: Run) -> list[Any]:
        """Fit the method to all models together."""
        return [run.method.fit(run.models, run.target.task, run.target.train)]


class TextKind(Kind):
    """A method that compares words and asks no model."""

    def fit(self, run: Run) -> list[Any]:
        """Fit the method to the training texts, as the target shows them."""
        return [run.method.fit(run.read_texts("train"))]

    def score(self, run: Run, fit: Any, asked: str, candidates: Any, certify: bool, pieces: Path) -> Scores:  # noqa: ARG002
        """Score the training texts on the texts of the queries."""
        if candidates is not None:
            raise UnsupportedError(f"{self.name} scores no candidates. Take influence functions.")
        return fit.score(run.read_texts(asked))


class TrajectoryKind(Kind):
    """A method that looks at training: it needs the recorded run, which ended with one model."""

    def complete(self, target: Target) -> Any:
        """Return the method with the target's recorded run."""
        return dataclasses.replace(self.method, trajectory=target.run())

    def fit(self, run: Run) -> list[Any]:
        """Fit the method to the one model."""
        if len(run.models) > 1:
            raise expected("model", "the one that the recorded run ended with", f"{len(run.models)} models")
        return super().fit(run)


def kind_of(method: Any, name: str) -> Kind:
    """Return how the commands treat a method.

    Args:
        method: with its settings.
        name: as the user wrote it, for messages.
    """
    if isinstance(method, wherefrom.Influence):
        return InfluenceKind(method, name)
    if isinstance(method, wherefrom.TRAK):
        return EnsembleKind(method, name)
    if isinstance(method, TEXT_METHODS):
        return TextKind(method, name)
    if isinstance(method, RUN_METHODS):
        return TrajectoryKind(method, name)
    return Kind(method, name)


def _scores_of_no_query(values: torch.Tensor, provenance: dict[str, Any]) -> Scores:
    nothing = wherefrom.Certificate.of_nothing_solved(0)
    return Scores(values.new_zeros(0, len(values)), nothing, provenance, values)
