"""A command at work on a target: results are kept in a folder and taken from there; what differs is refused."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import wherefrom
from wherefrom import Scores, store
from wherefrom.data.examples import Examples
from wherefrom.errors import ArtefactError, ConvergenceWarning, expected
from wherefrom.model.observe import fingerprint
from wherefrom.tools.cli.kinds import kind_of
from wherefrom.tools.cli.options import Attributed
from wherefrom.tools.cli.results import Results, say
from wherefrom.tools.evaluate.ingredients import ingredients
from wherefrom.tools.loading import Target
from wherefrom.tools.report import Example, usual_sections
from wherefrom.tools.report.report import TITLE, Report

INDIFFERENT = ("batch_size", "memory", "progress")  # settings of a method that change no result


class Run(Results):
    """One command on one target.

    Args:
        command: its name.
        options: what was asked.
        target: what is attributed; None: what the options name.

    Attributes:
        models: the attributed one first; most targets have a single one.
        method: as the options and the target together say it.
        kind: how commands treat a method of its kind.
        notes: what the reader of the report should know.
    """

    def __init__(self, command: str, options: Attributed, target: Target | None = None):
        super().__init__(command, options.out)
        # What is wrong with the method is told before anything is loaded, which may take long.
        options.parse_method()
        self.lock()
        self.target = options.load_target() if target is None else target
        self.options = options.complete(self.target)

        self.kind = kind_of(self.options.parse_method(), options.method or "Influence")
        self.method = self.kind.complete(self.target)
        model = self.target.model
        self.models: list[nn.Module] = list(model) if isinstance(model, (list, tuple)) else [model]
        self.problem = wherefrom.Problem(
            self.models[0], self.target.task, self.target.train, self.options.parameters, options.batch_size
        )
        self._fits: list[Any] = []
        self._solutions: dict[int, wherefrom.Solution] = {}  # of the queries, by the identity of a fit

        # These decide the exit code: a module of the user's that silences warnings does not silence them.
        warnings.filterwarnings("always", category=ConvergenceWarning)
        say(f"{self.kind.name} of {options.name}, {self.problem.coverage()}")
        self.notes = list(self.target.page.get("notes", ()))
        for note in self.notes:
            say(note)

    # --- fits -------------------------------------------------------------------------------------------------------

    def fits(self) -> list[Any]:
        """Return the method, fitted to each model; that is done once."""
        if not self._fits:
            self._fits = self.kind.fit(self)
        return self._fits

    def load_or_fit(self, model: nn.Module, name: str) -> wherefrom.FittedInfluence:
        """Fit influence functions to a model and keep them in the folder, or take them from there.

        Args:
            model: one of the target's.
            name: of the file.

        Raises:
            ArtefactError: if those that are there were fitted to something else, by name of what differs.
        """
        method: wherefrom.Influence = self.method
        task, train = self.target.task, self.target.train
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with suggest_other_output_folder():
                fit = method.load(path, model, task, train)
            say(f"The fit is taken from {path}.")
            return fit

        fit = method.fit(model, task, train)
        fit.save(self.path(path.name))
        for line in describe_fit(fit.provenance()):
            say(line)
        return fit

    def solve(
        self, fit: wherefrom.FittedInfluence, certify: bool = True, pieces: Path | None = None, by_token: bool = False
    ) -> wherefrom.Solution:
        """Solve for the queries with a fit, once: all that is asked of them comes out of the same solution.

        Args:
            fit: one of the fits.
            certify: measure residuals.
            pieces: a folder where solutions are kept until the scores are complete.
            by_token: solve for each token of the queries.
        """
        if id(fit) not in self._solutions:
            queries = self.target.given("queries")
            folder = None if by_token else pieces
            self._solutions[id(fit)] = fit.solve(queries, certify=certify, by_token=by_token, folder=folder)
        return self._solutions[id(fit)]

    # --- scores -----------------------------------------------------------------------------------------------------

    def scores(self, asked: str = "queries", candidates: Any = None, certify: bool = True) -> Scores:
        """Return the scores of the training examples, or of candidates.

        Args:
            asked: the field of the target with the queries.
            candidates: examples to score in place of the training examples.
            certify: measure residuals.
        """

        def make(fit: Any, pieces: Path) -> Scores:
            return self.kind.score(self, fit, asked, candidates, certify, pieces)

        data = {asked: self.target.given(asked), "certify": certify}
        name = "scores" if asked == "queries" else asked
        if candidates is not None:
            data["candidates"] = candidates
            name = "candidates"
        return self.load_or_make(name, make, **data)

    def shortlisted(self, count: int, certify: bool = True) -> Scores:
        """Return the scores of those training examples whose words are closest to a query's; no other is scored.

        Args:
            count: so many for each query.
            certify: measure residuals.
        """
        self.kind.require_influence("--candidates")
        if count < 1:
            raise expected("candidates", "at least 1", count)
        queries = self.target.queries
        by_words = wherefrom.TFIDF().fit(self.read_texts("train")).score(self.read_texts("queries"))
        everyone = by_words.values.shape[1]
        index = wherefrom.shortlist(by_words, min(count, everyone))

        note = (
            f"{len(index):,} of {everyone:,} training examples are scored: for each query the {count:,} closest by "
            "TF-IDF. A strong one may be among the others."
        )
        self.notes.append(note)
        say(note)

        def make(fit: Any, pieces: Path) -> Scores:
            return wherefrom.rescored(fit, queries, index, certify=certify, folder=pieces)

        return self.load_or_make(f"scores-of-{count}", make, queries=queries, candidates=index, certify=certify)

    def self_influence(self) -> Scores:
        """Return the self-influence of the training examples, as scores of no query."""
        return self.load_or_make("self-influence", self.kind.self_influence)

    def load_or_make(self, name: str, make: Callable[[Any, Path], Scores], **data: Any) -> Scores:
        """Take scores from the folder, or make them with each fit and keep them there; of several models the mean.

        Args:
            name: of the file.
            make: from a fit, and a folder of its own for the pieces of a run that may be stopped, to scores.
            data: the data sets that they depend on besides the training data, and settings.

        Raises:
            ArtefactError: if those that are there were made of something else, by name of what differs.
        """
        path, pieces = self.folder / f"{name}.safetensors", self.folder / f"{name}.pieces"
        cache_key = self.cache_key | {what: _fingerprint(what, value) for what, value in data.items()}
        if path.exists():
            return _load_same(path, cache_key)

        with record_warnings() as messages, suggest_other_output_folder():
            of_each_model = [make(fit, pieces / str(i)) for i, fit in enumerate(self.fits())]
        scores = of_each_model[0] if len(of_each_model) == 1 else wherefrom.ensemble(of_each_model)

        provenance = scores.provenance | {"made of": cache_key, "warned": messages}
        dataclasses.replace(scores, provenance=provenance).save(self.path(path.name))
        shutil.rmtree(pieces, ignore_errors=True)
        return scores

    @cached_property
    def cache_key(self) -> dict[str, str]:
        """What results depend on, by name: the method's settings, the task, the models and the training data."""
        settings = {}
        for field in dataclasses.fields(self.method):
            if field.name not in INDIFFERENT:
                settings[field.name] = getattr(self.method, field.name)
        # A message on what differs shows these as they are written.
        in_words = (str, wherefrom.Solver, wherefrom.Damping)
        words = {name: str(value) for name, value in settings.items() if isinstance(value, in_words)}
        others = {name: value for name, value in settings.items() if name not in words}
        more_models = {f"model {i}": fingerprint(model) for i, model in enumerate(self.models[1:], 2)}
        return words | ingredients(**others, task=self.target.task) | self.problem.fingerprint() | more_models

    # --- what is shown ----------------------------------------------------------------------------------------------

    def read_texts(self, name: str) -> list[str]:
        """Return the texts of a data set, as the target shows them.

        Args:
            name: of the field of the target.

        Raises:
            InputError: if they are not shown as text.
        """
        texts = []
        for number, example in enumerate(self.target.shown(name)):
            if example.text is None:
                advice = "Let the target's show return wherefrom.tools.report.Example(caption, text=...)."
                got = f"no text of example {number}"
                raise expected(f"{name} for {self.kind.name}", "shown as texts", got, advice)
            texts.append(example.text)
        return texts

    def report(
        self, scores: Scores, train_examples: Sequence[Example], query_examples: Sequence[Example], **page: Any
    ) -> None:
        """Write a report of the usual sections, with what the target says of every page.

        Args:
            scores: what is reported.
            train_examples, query_examples: how its examples are shown.
            page: the title, the lead, and arguments of `usual_sections`; these go before what the target says.
        """
        content: dict[str, Any] = {**self.target.page, "notes": self.notes, **page}
        title, lead = content.pop("title", TITLE), content.pop("lead", "")
        sections = usual_sections(scores, train_examples, query_examples, **content)
        self.write_report(Report(title, sections, lead))

    def finish(self, **own: Any) -> None:
        """Write the configuration, with the command's own options, and say what was written."""
        self.write_configuration(dataclasses.asdict(self.options) | own, self.cache_key)


@contextmanager
def suggest_other_output_folder() -> Iterator[None]:
    """Tell whoever meets results of something else that there may be several folders."""
    try:
        yield
    except ArtefactError as error:
        raise ArtefactError(f"{error} Or give another --out.") from error


@contextmanager
def record_warnings() -> Iterator[list[str]]:
    """Collect the messages of every ConvergenceWarning in the block; they are shown as well."""
    show, messages = warnings.showwarning, list[str]()

    def listen(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, ConvergenceWarning):
            messages.append(str(message))
        show(message, category, *rest)

    warnings.showwarning = listen
    try:
        yield messages
    finally:
        warnings.showwarning = show


def describe_fit(provenance: Mapping[str, Any]) -> list[str]:
    """Return lines on what a fit was given and chose."""
    rows = {name: provenance[name] for name in ("solver", "damping", "curvature") if name in provenance}
    for name, value in provenance.get("chosen", {}).items():
        rows[f"chosen {name}"] = value

    dampings = provenance.get("damping by block", {}).values()
    if dampings:
        low, high = min(dampings), max(dampings)
        rows["lambda"] = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, by parameter"

    width = max(map(len, rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def _load_same(path: Path, cache_key: Mapping[str, str]) -> Scores:
    """Load scores that were made of the same things, with the warnings that came with them."""
    scores = Scores.load(path)
    with suggest_other_output_folder():
        store.same(path, scores.provenance.pop("made of", {}), dict(cache_key))
    say(f"The scores are taken from {path}.")
    for message in scores.provenance.pop("warned"):
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return scores


def _fingerprint(name: str, value: Any) -> str:
    if isinstance(value, (bool, int, str)):
        return str(value)
    return Examples(value, name).fingerprint()
