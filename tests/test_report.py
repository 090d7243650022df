"""The report: it stands alone, escapes what it is given, and names the queries that did not converge."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

import wherefrom.tools.report
from pages import CHROMIUM, SCRIPT, N, Page, Q, browse, evidence, examples, fact, make_scores, of_kind, render, rows
from wherefrom.errors import InputError, MissingExtraError
from wherefrom.methods import Scores
from wherefrom.tools.report import Convergence, Example, Overview, Queries, Report, Spread, Suspects, write_report
from wherefrom.tools.report.numbers import short, signed


@pytest.mark.parametrize("kind", ["image", "colour", "text", "row", "plain"])
def test_the_page_stands_alone_whatever_the_examples(kind):
    text = render(make_scores(), **examples(kind), sections=evidence(of_kind(kind, N)))
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"data:[^\"]*", "", text))
    assert not re.search(r"@import|url\((?!#)", text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("#" if name.endswith("href") else "data:image/png;base64,"), (
                tag,
                value,
            )
    assert len(page.all("img")) == ((Q * 11 + N) if kind in ("image", "colour") else 0)
    assert ("sentence 1" in page.text) == (kind == "text")
    assert ("height" in page.text) == (kind == "row")


def test_it_is_accessible():
    page = Page(render(make_scores(), **examples("image"), sections=evidence(of_kind("image", N))))
    assert all(image["alt"] for image in page.all("img"))
    figures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(figures) == 6 and all(svg["aria-label"] for svg in figures)
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta"))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= set(ids)


@pytest.mark.parametrize("field", ["caption", "detail", "mark", "text", "row"])
def test_what_it_is_given_is_escaped(field):
    evil = {"caption": "c"} | {field: {SCRIPT: SCRIPT} if field == "row" else SCRIPT}
    content = {"train_examples": [Example(**evil)] * N, "query_examples": [Example(**evil)] * Q}
    sections = evidence([Example(**evil)] * N)
    words = {"title": SCRIPT, "lead": SCRIPT, "notes": [SCRIPT], "measurement": SCRIPT}
    text = render(make_scores(), **words, **content, sections=sections)
    assert text.count("<script") == 1  # the page's own
    assert SCRIPT in Page(text).text


def test_a_caption_cannot_leave_its_attribute():
    evil = Example('" onload="alert(1)', image=torch.zeros(4, 4))
    page = Page(render(make_scores(), train_examples=[evil] * N, query_examples=[evil] * Q))
    assert page.all("img") and not any("onload" in image for image in page.all("img"))


def test_scores_are_shown_with_their_sign_unit_and_number():
    scores = make_scores()
    page = Page(render(scores, **examples(), show=[1], k=2))
    top = scores.top(2)
    for j, value in zip(top.proponents[1].tolist(), top.proponent_scores[1].tolist(), strict=True):
        assert f"{signed(value)} Δf {signed(value / N)} label {j} #{j}" in page.text
    for j, value in zip(top.opponents[1].tolist(), top.opponent_scores[1].tolist(), strict=True):
        assert f"{signed(value)} Δf {signed(value / N)} label {j} #{j}" in page.text
    for words in ("7 of 9 trainable", "0.1 for all", "3.50 s", "Removing the example would raise f", "query 1"):
        assert words in page.text


def test_a_proponent_has_a_positive_score():
    page = Page(render(make_scores(values=-torch.ones(Q, N)), **examples(), show=[0]))
    assert "without them f rises none" in page.text


def test_a_query_that_did_not_converge_is_named():
    scores = make_scores(residual=torch.tensor([0.004, 0.5, 0.001]), converged=torch.tensor([True, False, True]))
    page = Page(render(scores, **examples(), show=[0]))
    assert "1 of 3 queries did not converge." in page.text and "query 1 (label 1)." in page.text
    assert sum(e.get("role") == "alert" for e in page.all("div")) == 1
    assert "1 of 3 queries did not converge to the tolerance, 0.01." in page.text
    assert rows(page, "residuals-worst")[0] == ["1", "label 1", "0.50", "no"]
    assert fact(page, "not converged") == "1 of 3"
    page = Page(render(make_scores(), **examples()))
    assert "did not converge" not in page.text and "All queries met the tolerance, 0.01." in page.text
    assert fact(page, "not converged") == "0 of 3"


def test_a_direct_method_is_not_called_converged():
    scores = make_scores(history=torch.empty(0, Q), residual=torch.tensor([3.0, 0.5, 0.001]))
    page = Page(render(scores, **examples()))
    assert "direct method residual 3.0" in page.text and "A direct method: it takes no steps" in page.text
    assert "The median residual of 3 queries is 0.50, the largest 3.0." in page.text
    assert rows(page, "residuals-worst") == [
        ["0", "label 0", "3.0", "–"],
        ["1", "label 1", "0.50", "–"],
        ["2", "label 2", "0.0010", "–"],
    ]
    assert fact(page, "steps") == "none" and fact(page, "not converged") is None
    assert not [svg for svg in page.all("svg") if "Relative residuals" in (svg.get("aria-label") or "")]
    assert "preconditioner of CG" in page.text
    page = Page(render(make_scores(residual=None, history=torch.empty(0, Q)), **examples()))
    assert "The residuals were not measured." in page.text and rows(page, "residuals-worst")[0][2] == "–"


def test_steps_without_a_tolerance_are_not_called_converged():
    provenance = make_scores().provenance | {"tolerance": None, "chosen": {"step": 0.25, "batch": 64, "steps": 3}}
    page = Page(render(make_scores(provenance=provenance), **examples()))
    assert "No tolerance was set" in page.text and "converged residual" not in page.text
    assert [row[3] for row in rows(page, "residuals-worst")] == ["–"] * 3
    assert fact(page, "found by the fit") == "step 0.25, batch 64"
    assert "on its minibatch" in page.text and "average more repeats" in page.text


def test_the_table_of_convergence():
    history = torch.tensor([1.0, 0.5, 0.02])[:, None].expand(3, Q)
    seconds = {"fit": 1.0, "solve": 2.5, "scores": 0.25}
    page = Page(render(make_scores(history=history, provenance={"solver": "CG()", "passes": 3.5, "seconds": seconds,
                                                               "tolerance": 0.01}), **examples()))  # fmt: skip
    found = {
        name: fact(page, name) for name in ("method", "steps", "passes over the data", "seconds", "worst residual")
    }
    assert found == {
        "method": "CG()",
        "steps": "2",
        "passes over the data": "3.5",
        "seconds": "fit 1.00, solve 2.50, scores 0.25",
        "worst residual": "0.0040 (query 0)",
    }
    assert fact(page, "median residual") == "0.0020" and "attribution 3.75 s" in page.text
    assert fact(page, "because") is None and "Nystrom() for any layers" in page.text


def test_what_was_chosen_and_why():
    chosen = {"solver": "CG(Nystrom())", "because": "it is large", "then": "Exact()", "rank": 7}
    page = Page(render(make_scores(provenance={"solver": "Auto()", "chosen": chosen, "tolerance": 0.03}), **examples()))
    names = ("asked for", "chosen", "because", "then also", "found by the fit")
    assert [fact(page, name) for name in names] == ["Auto()", "CG(Nystrom())", "it is large", "Exact()", "rank 7"]
    assert "Auto(memory=…" in page.text


def test_the_defaults_of_the_library_are_told(tmp_path):
    """What `attribute` returns, saved and loaded, has all that the section needs."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 3, generator=g), torch.randint(0, 2, (N,), generator=g)
    scores = wherefrom.attribute(torch.nn.Linear(3, 2), wherefrom.Classification(), (x, y), (x[:Q], y[:Q]))
    scores.save(tmp_path / "scores")
    page = Page(render(Scores.load(tmp_path / "scores"), **examples()))
    assert fact(page, "asked for") == repr(wherefrom.Auto()) and str(fact(page, "chosen")).startswith("Exact(")
    assert "decomposed in seconds" in str(fact(page, "because")) and fact(page, "steps") == "1"
    assert "All queries met the tolerance, 0.03." in page.text and "model.double()" in page.text


@pytest.mark.parametrize("certified", [True, False])
def test_many_queries_are_ranked_and_thinned(certified):
    q, steps = 150, 1000
    final = torch.linspace(1e-4, 1e-3, q)[torch.randperm(q, generator=torch.Generator().manual_seed(0))]
    history = torch.logspace(0, -1, steps)[:, None] * 10 * final
    final[17], history[-1, 17] = 0.5, 0.5
    scores = make_scores(
        values=torch.randn(q, N),
        residual=final if certified else None,
        history=history,
        converged=final < 0.01,
    )
    text = render(scores, train_examples=of_kind("plain", N), query_examples=of_kind("plain", q))
    page = Page(text)
    worst, others = (rows(page, f"residuals-{part}") for part in ("worst", "others"))
    assert [int(row[0]) for row in worst + others] == final.argsort(descending=True, stable=True).tolist()
    assert len(worst) == 10 and worst[0][0] == "17" and worst[0][3] == "no"
    figure = text[text.index('aria-label="Relative residuals') :].split("</svg>")[0]
    assert "of 150 queries over 999 steps; 1 did not converge; the worst is query 17" in figure
    assert "query 17, the worst" in figure and "tolerance 0.01" in figure
    assert "60 of the 150 are drawn" in page.text
    assert len(figure) < 600_000


def test_a_query_of_zero_gradient_can_be_drawn():
    history = make_scores().history.clone()
    history[:, 2] = 0
    figure = render(make_scores(history=history, residual=history[-1]), **examples()).split("Relative residuals")[1]
    assert "1e-300" not in figure and "10⁻³⁰⁰" not in figure


def test_scores_that_are_all_zero_can_be_shown():
    assert "none" in Page(render(make_scores(values=torch.zeros(Q, N), self_values=None), **examples())).text


@pytest.mark.parametrize(
    ("value", "three", "two"),
    [
        (0.0, "0", "0"),
        (12.345, "+12.3", "12"),
        (-0.14, "−0.140", "−0.14"),
        (1234.5, "+1,230", "1,200"),
        (999.9, "+1,000", "1,000"),
        (2e-7, "+2.00e−07", "2.0e−07"),
        (-3e9, "−3.00e+09", "−3.0e+09"),
        (0.0999999, "+0.100", "0.10"),
    ],
)
def test_numbers(value, three, two):
    assert (signed(value), short(value)) == (three, two)


def test_input_errors():
    with pytest.raises(InputError, match="train_examples must be one for each of the 20"):
        render(make_scores(), train_examples=of_kind("plain", 3), query_examples=of_kind("plain", Q))
    with pytest.raises(InputError, match="show must be query numbers in 0..2"):
        render(make_scores(), **examples(), show=[3])
    with pytest.raises(InputError, match="image and text"):
        Example("x", image=torch.zeros(2, 2), text="y")
    for image in (
        torch.zeros(3, 8, 8),
        torch.full((8, 8), 2.0),
        torch.zeros(8, 8).long(),
        torch.full((2, 2), torch.nan),
    ):
        with pytest.raises(InputError, match="An example's image must be"):
            Example("x", image=image).picture()


def test_large_pictures_are_made_smaller():
    picture = Example("x", image=np.zeros((900, 300), dtype=np.uint8)).picture()
    assert picture is not None and (picture["width"], picture["height"]) == (107, 320)


def test_writing(tmp_path):
    path = write_report(tmp_path / "new" / "r.html", make_scores(), **examples())
    assert path.read_text(encoding="utf-8") == render(
        make_scores(), **examples(), title="Where did the model learn this?"
    )
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]
    with pytest.raises(InputError, match="must be a file"):
        write_report(tmp_path, make_scores(), **examples())


def test_a_page_holds_the_sections_it_is_given_in_their_order():
    scores, shown = make_scores(), of_kind("plain", Q)
    page = Page(Report("Mine", [Spread(scores), Overview(scores, shown), Spread(scores)]).render())
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["spread", "reading", "spread-2"]
    assert [link["href"] for link in page.all("a")] == ["#spread", "#spread-2"]
    assert [table["id"] for table in page.all("table")] == ["tail", "tail-2"]
    assert "What it means, and what to do about a large one" in page.text  # without the section, no link to it


def test_examples_are_counted():
    scores, shown = make_scores(), of_kind("plain", N)
    for make in (Overview, Convergence):
        with pytest.raises(InputError, match="query_examples must be one for each of the 3"):
            make(scores, shown)
    with pytest.raises(InputError, match="query_examples must be one for each of the 3"):
        Queries(scores, shown, shown)
    with pytest.raises(InputError, match="train_examples must be one for each of the 20 values"):
        Suspects(shown[1:], scores.self_influence)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package}.*pip install "wherefrom\[report\]"'):
        render(make_scores(), **examples())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("kind", ["image", "text", "row"])
def test_in_a_browser_of_phone_width(tmp_path, kind):
    probe = """
    const table = document.querySelector("#residuals-worst"), before = column(table, 0).join("");
    table.querySelectorAll("thead button")[2].click();
    const page = document.documentElement;
    return {wide: page.scrollWidth - page.clientWidth, order: before + ">" + column(table, 0).join("")};"""
    text = render(make_scores(), **examples(kind), sections=evidence(of_kind(kind, N)))
    assert browse(tmp_path, text, probe) == {"loads": 0, "wide": 0, "order": "012>210"}
