"""The report: everything a reader needs to use scores and to judge them, in one HTML file that needs nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherefrom import Scores
from wherefrom.disk import whole
from wherefrom.errors import expected
from wherefrom.tools.report.convergence import Convergence
from wherefrom.tools.report.examples import Example, missing_package
from wherefrom.tools.report.numbers import short, signed
from wherefrom.tools.report.overview import MEASUREMENT, Notes, Overview
from wherefrom.tools.report.provenance import Provenance
from wherefrom.tools.report.queries import Queries
from wherefrom.tools.report.section import Section, number_sections
from wherefrom.tools.report.split import Split
from wherefrom.tools.report.spread import Spread
from wherefrom.tools.report.suspects import Suspects

TITLE = "Where did the model learn this?"


@dataclass(frozen=True)
class Report:
    """A page made of sections, shown in the order given.

    Each section knows its own data and its own template, so a page holds exactly the sections that it is given:

        Report("Where from?", [Overview(scores, queries), Queries(scores, train, queries), Spread(scores)]).write(path)

    Args:
        title: the heading of the page.
        sections: what the page shows. A section may link to another one; where the other is not on the page, the link
            is plain text.
        lead: the first paragraph.
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""

    def render(self) -> str:
        """Return the page as HTML.

        Raises:
            InputError: if the data of a section are out of range.
            MissingExtraError: if jinja2 or matplotlib is not installed.
        """
        for package in ("jinja2", "matplotlib"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise missing_package(package) from error

        suffixes = number_sections(self.sections)
        anchors: set[str] = set()
        for section, suffix in zip(self.sections, suffixes, strict=True):
            anchors.update(section.anchors(suffix))
        environment = _make_environment(anchors)

        tiles, links, alerts, bodies = [], [], [], []
        for section, suffix in zip(self.sections, suffixes, strict=True):
            content = section.content() | {"suffix": suffix}
            bodies.append(environment.get_template(section.template).render(content))
            tiles.extend(section.tiles())
            if section.alert_template:
                alerts.append(environment.get_template(section.alert_template).render(content))
            if text := section.link_text():
                links.append((section.anchor + suffix, text))

        page = {
            "title": self.title,
            "lead": self.lead,
            "tiles": tiles,
            "links": links,
            "alerts": alerts,
            "bodies": bodies,
        }
        return environment.get_template("page.html").render(page)

    def write(self, path: str | Path) -> Path:
        """Write the page, complete or not at all.

        Args:
            path: the HTML file; its folder is made if need be.

        Returns:
            the path.

        Raises:
            InputError, MissingExtraError: as `render`; InputError also if the path is a folder.
        """
        path = Path(path)
        if path.is_dir():
            raise expected("The report's path", "a file", f"the folder {path}", f"Give {path / 'report.html'}.")

        text = self.render()
        with whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path


def usual_sections(
    scores: Scores,
    train_examples: Sequence[Example],
    query_examples: Sequence[Example],
    *,
    measurement: str = MEASUREMENT,
    show: Sequence[int] | None = None,
    k: int = 5,
    split: Split | None = None,
    notes: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> list[Section]:
    """Return the sections that most pages have, with more of them where they belong.

    These are an overview, the queries with the examples behind them, the examples of largest self-influence if the
    scores hold it, how influence is spread, convergence, and the configuration. Scores of no query have no section on
    queries, spread or convergence.

    Args:
        scores: (Q, N) scores. Q may be 0: a page on the training examples alone.
        train_examples: how each of the training examples is shown, also of those that have no score.
        query_examples: how each of the Q queries is shown.
        measurement: what f is, in words.
        show: the numbers of the queries that get a card; None: the first twelve.
        k: proponents and opponents of each query.
        split: the scores of all examples in the cards, split over tokens and layers.
        notes: paragraphs on what the reader should know.
        sections: more sections, which come after the queries. If there is one on suspicious examples among them, it
            stands in place of the usual one.

    Raises:
        InputError: if the examples do not fit the scores, or a number is out of range.
    """
    overview = Overview(scores, query_examples, measurement)
    queries = Queries(scores, train_examples, query_examples, show, k, split, notes)

    page: list[Section] = [overview, queries] if queries.shown else [Notes(notes), overview]
    page.extend(sections)
    has_suspects = any(isinstance(section, Suspects) for section in sections)
    if scores.self_values is not None and not has_suspects:
        page.append(Suspects(train_examples, scores.self_values))
    if len(scores.values):
        page.extend([Spread(scores), Convergence(scores, query_examples)])
    page.append(Provenance(scores))
    return page


def write_report(
    path: str | Path,
    scores: Scores,
    *,
    train_examples: Sequence[Example],
    query_examples: Sequence[Example],
    title: str = TITLE,
    lead: str = "",
    **content: Any,
) -> Path:
    """Write a page of the usual sections; compose a `Report` for any other page.

    Args:
        path: the HTML file; its folder is made if need be.
        scores, train_examples, query_examples: as for `usual_sections`.
        title, lead: the heading and the first paragraph.
        content: the other arguments of `usual_sections`.

    Returns:
        the path.

    Raises:
        InputError, MissingExtraError: as `Report.write`.
    """
    sections = usual_sections(scores, train_examples, query_examples, **content)
    return Report(title, sections, lead).write(path)


def _make_environment(anchors: set[str]) -> Any:
    """Return the environment that renders the templates of this folder, in which all text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wherefrom.tools.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(signed=signed, short=short)
    environment.globals["anchors"] = anchors
    return environment
