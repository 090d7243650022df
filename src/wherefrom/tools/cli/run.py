"""A command at work: the target is loaded, results are kept in a folder and taken from there, the rest is refused."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import wherefrom
from wherefrom import store
from wherefrom.data.examples import Examples
from wherefrom.errors import ArtefactError, ConvergenceWarning, UnsupportedError, expected
from wherefrom.methods import Scores
from wherefrom.methods.candidates import rescored, shortlist
from wherefrom.methods.lexical import Lexical
from wherefrom.methods.training import OverTraining
from wherefrom.model.observe import fingerprint
from wherefrom.model.problem import Problem
from wherefrom.scores import unsolved
from wherefrom.tools.cli.options import Attributed
from wherefrom.tools.cli.results import Results, say
from wherefrom.tools.evaluate.ingredients import ingredients

INDIFFERENT = ("batch_size", "memory", "progress")  # settings of a method that change no result


class Run(Results):
    """One command on one target.

    Args:
        command: its name.
        options: what was asked.
    """

    def __init__(self, command: str, options: Attributed):
        super().__init__(command, options.out)
        options.chosen_method()  # what is wrong with it is told before anything is loaded
        self.lock()
        self.options, self.target = options.found()
        self.method: Any = self.options.chosen_method()
        self._fits = list[Any]()
        warnings.filterwarnings("always", category=ConvergenceWarning)  # it decides the exit code: not to be silenced
        if isinstance(self.method, OverTraining):
            self.method = dataclasses.replace(self.method, trajectory=self.target.run())
        model, task, train = self.target.model, self.target.task, self.target.train
        self.models: list[nn.Module] = list(model) if isinstance(model, (list, tuple)) else [model]
        self.problem = Problem(self.models[0], task, train, self.options.parameters, options.batch_size)
        say(f"{options.method or 'Influence'} of {options.name}, {self.problem.coverage()}")
        self.notes = list(self.target.page.get("notes", ()))
        for note in self.notes:
            say(note)

    def fits(self) -> list[Any]:
        """The method, fitted to each model; influence functions are kept in the folder, and taken from there."""
        if not self._fits:
            self._fits = self._fitted()
        return self._fits

    def _fitted(self) -> list[Any]:
        task, train = self.target.task, self.target.train
        if isinstance(self.method, wherefrom.TRAK):
            return [self.method.fit(self.models, task, train)]
        if isinstance(self.method, Lexical):
            return [self.method.fit(self.texts("train"))]
        if isinstance(self.method, wherefrom.Influence):
            return [self._kept(model, f"fit-{i}" if i > 1 else "fit") for i, model in enumerate(self.models, 1)]
        if isinstance(self.method, OverTraining) and len(self.models) > 1:
            raise expected("model", "the one that the recorded run ended with", f"{len(self.models)} models")
        return [dataclasses.replace(self.method).fit(model, task, train) for model in self.models]

    def _kept(self, model: nn.Module, name: str) -> wherefrom.Influence:
        method, task, train = dataclasses.replace(self.method), self.target.task, self.target.train
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with elsewhere():
                fitted = method.load(path, model, task, train)
            say(f"The fit is taken from {path}.")
            return fitted
        fitted = method.fit(model, task, train)
        fitted.save(self.path(path.name))
        for line in about(fitted.provenance()):
            say(line)
        return fitted

    @cached_property
    def made_of(self) -> dict[str, str]:
        """What results depend on, by name: the method's settings, the task, the models and the training data."""
        names = [f.name for f in dataclasses.fields(self.method) if f.name not in INDIFFERENT]
        settings = {name: getattr(self.method, name) for name in names}
        said = {n: str(v) for n, v in settings.items() if isinstance(v, (str, wherefrom.Solver, wherefrom.Damping))}
        rest = ingredients(**{n: v for n, v in settings.items() if n not in said}, task=self.target.task)
        more = {f"model {i}": fingerprint(model) for i, model in enumerate(self.models[1:], 2)}
        return said | rest | self.problem.fingerprint() | more

    def kept(self, name: str, make: Callable[[Any, Path], Scores], **data: Any) -> Scores:
        """Scores from the folder, or made by each fit and then kept there; of several models the mean.

        Args:
            name: of the file.
            make: from a fit, and a folder of its own for the pieces of a run that may be stopped, to scores.
            data: the data sets that they depend on besides the training data, and settings.

        Raises:
            ArtefactError: if those that are there were made of something else, by name of what differs.
        """
        path, pieces = self.folder / f"{name}.safetensors", self.folder / f"{name}.pieces"
        made_of = self.made_of | {what: _fingerprint(what, some) for what, some in data.items()}
        if path.exists():
            found = Scores.load(path)
            with elsewhere():
                store.same(path, found.provenance.pop("made of", {}), made_of)
            say(f"The scores are taken from {path}.")
            for message in found.provenance.pop("warned"):
                warnings.warn(message, ConvergenceWarning, stacklevel=2)
            return found
        with heard() as warned, elsewhere():
            scores = [make(fit, pieces / str(i)) for i, fit in enumerate(self.fits())]
        found = scores[0] if len(scores) == 1 else wherefrom.ensemble(scores)
        more = {"made of": made_of, "warned": warned}
        dataclasses.replace(found, provenance=found.provenance | more).save(self.path(path.name))
        shutil.rmtree(pieces, ignore_errors=True)
        return found

    def scores(self, asked: str = "queries", candidates: Any = None, certify: bool = True) -> Scores:
        """Those of the training examples, or of candidates.

        Args:
            asked: the field of the target with the queries.
            candidates: examples to score in place of the training examples.
            certify: measure residuals.
        """
        queries = self.target.given(asked)

        def make(fit: Any, pieces: Path) -> Scores:
            if isinstance(fit, wherefrom.Influence):
                return fit.score(queries, certify=certify, candidates=candidates, folder=pieces)
            if candidates is not None:
                raise UnsupportedError(f"{self.options.method} scores no candidates. Take influence functions.")
            return fit.score(self.texts(asked) if isinstance(fit, Lexical) else queries)

        data = {asked: queries, "certify": certify} | ({} if candidates is None else {"candidates": candidates})
        name = ("scores" if asked == "queries" else asked) if candidates is None else "candidates"
        return self.kept(name, make, **data)

    def shortlisted(self, count: int, certify: bool = True) -> Scores:
        """Those of the training examples whose words are closest to a query's, so many for each; no other is scored."""
        if not isinstance(self.method, wherefrom.Influence):
            raise UnsupportedError(
                f"--candidates are for influence functions, not {self.options.method}. Leave it out."
            )
        cheap, queries = wherefrom.TFIDF().fit(self.texts("train")).score(self.texts("queries")), self.target.queries
        everyone = cheap.values.shape[1]
        if count < 1:
            raise expected("candidates", "at least 1", count)
        index = shortlist(cheap, min(count, everyone))
        self.notes.append(
            f"{len(index):,} of {everyone:,} training examples are scored: for each query the {count:,} closest by "
            "TF-IDF. A strong one may be among the others."
        )
        say(self.notes[-1])

        def make(fit: Any, pieces: Path) -> Scores:
            return rescored(fit, queries, index, certify=certify, folder=pieces)

        return self.kept(f"scores-of-{count}", make, queries=queries, candidates=index, certify=certify)

    def self_influence(self) -> Scores:
        """That of the training examples, as scores of no query."""

        def make(fit: Any, pieces: Path) -> Scores:
            if not hasattr(fit, "self_influence"):
                advice = "Take influence functions, or TracIn()."
                raise UnsupportedError(f"{self.options.method} has no self-influence. {advice}")
            if isinstance(fit, wherefrom.Influence):
                values, provenance = fit.self_influence(folder=pieces), fit.provenance()
            else:
                values, provenance = fit.self_influence(), {"solver": str(fit)}
            return dataclasses.replace(unsolved(values.new_zeros(0, len(values)), **provenance), self_values=values)

        return self.kept("self-influence", make)

    def texts(self, name: str) -> list[str]:
        """The texts of a data set, as the target shows them.

        Raises:
            InputError: if they are not shown as text.
        """
        found = [example.text for example in self.target.shown(name)]
        if None in found:
            advice = "Let the target's show return wherefrom.tools.report.Example(caption, text=...)."
            got = f"no text of example {found.index(None)}"
            raise expected(f"{name} for {self.options.method}", "shown as texts", got, advice)
        return [str(text) for text in found]

    def report(self, scores: Scores, **content: Any) -> None:
        """Write the report, with what the target says of every page."""
        super().report(scores, **dict(self.target.page) | {"notes": self.notes} | content)

    def finish(self, **own: Any) -> None:
        """Write the configuration, with the command's own options, and say what was written."""
        self.done(dataclasses.asdict(self.options) | own, self.made_of)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Tell whoever meets results of something else that there may be several folders."""
    try:
        yield
    except ArtefactError as error:
        raise ArtefactError(f"{error} Or give another --out.") from error


@contextmanager
def heard() -> Iterator[list[str]]:
    """The messages of every ConvergenceWarning in the block; they are shown as well."""
    show, found = warnings.showwarning, list[str]()

    def listen(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, ConvergenceWarning):
            found.append(str(message))
        show(message, category, *rest)

    warnings.showwarning = listen
    try:
        yield found
    finally:
        warnings.showwarning = show


def _fingerprint(name: str, value: Any) -> str:
    return str(value) if isinstance(value, (bool, int, str)) else Examples(value, name).fingerprint()


def about(provenance: dict[str, Any]) -> list[str]:
    """Lines on what a fit was given and chose."""
    chosen = provenance.get("chosen", {})
    rows = {name: provenance[name] for name in ("solver", "damping", "curvature") if name in provenance}
    rows |= {f"chosen {name}": value for name, value in chosen.items()}
    shift = provenance.get("damping by parameter")
    if shift:
        low, high = min(shift.values()), max(shift.values())
        rows["lambda"] = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, by parameter"
    width = max(map(len, rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]
