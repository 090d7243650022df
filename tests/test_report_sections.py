"""The sections that not every page has: what they say, and that what is not given leaves no trace."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from pages import CHROMIUM, SCRIPT, N, Page, Q, browse, detection, evidence, examples, lds, make_scores, of_kind, render
from wherefrom.errors import InputError
from wherefrom.tools.evaluate import RemovalCurve, tail
from wherefrom.tools.report import (
    DampingSweep,
    Example,
    Layers,
    Provenance,
    Report,
    Retraining,
    Section,
    Suspects,
    Table,
)

DAMPINGS = (0.001, 0.1, 10.0)


def removal(**others: float) -> RemovalCurve:
    """Changes in three queries after 2, 4 and 8 examples were removed: each is ``size * count`` plus 0, 1 and 2."""
    counts = np.array([2, 4, 8])
    sizes = {"top": 1.0, "bottom": -1.0, "random": 0.0} | others
    changes = {name: size * counts[:, None] + np.arange(3.0) for name, size in sizes.items()}
    intervals = {name: np.stack([v.mean(1) - 0.25, v.mean(1) + 0.5], 1) for name, v in changes.items()}
    return RemovalCurve(counts=counts, changes=changes, intervals=intervals, level=0.9)


def sweep(known: bool = False, **changes) -> DampingSweep:
    g = torch.Generator().manual_seed(3)
    scores = {}
    for x in DAMPINGS:
        noise = torch.randn(Q, N, generator=g, dtype=torch.float64)
        scores[x] = make_scores(values=make_scores().values + 5 * noise, residual=x * torch.tensor([3.0, 1.0, 2.0]))
    scored = {0.1: lds()} if known else {}
    return DampingSweep(**{"scores": scores, "chosen": 0.1, "lds": scored} | changes)


def layers() -> dict[str, torch.Tensor]:
    a = torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.0, 0.0]])
    return {"first": a, "second <b>": torch.tensor([[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]])}


def tables() -> list[Table]:
    columns = {"rank": range(1, N + 1), "word": [f"x{i % 4}" for i in range(N)], "score": torch.linspace(-9, 2, N)}
    return [
        Table("What to drop", columns | {SCRIPT: [SCRIPT] * N}, of_kind("image", N), "The worst."),
        Table("Words", {"n": [10, 9, 100], "word": ["b", "a", "c"]}),
    ]


def everything(kind: str = "plain") -> list[Section]:
    suspects, retraining = evidence(of_kind(kind, N))
    curve = removal(**{"a method of a rather long name": 0.5})
    retraining = dataclasses.replace(retraining, removal=curve)
    return [*tables(), suspects, retraining, sweep(known=True), Layers(layers(), range(Q))]


def page_of(*sections: Section) -> str:
    """A page of these sections alone."""
    return Report("Title", sections).render()


def drawn(text: str) -> list[str]:
    """The descriptions of the figures."""
    return [str(svg["aria-label"]) for svg in Page(text).all("svg") if svg.get("role") == "img"]


def test_what_is_not_given_leaves_no_trace():
    bare, full = render(make_scores(), **examples()), render(make_scores(), **examples(), sections=everything())
    new = ("truth", "damping", "layers", "table-1", "table-2", "removal", "dampings", "shares", "rows-1")
    for name in new:
        assert f'id="{name}"' in full and f'id="{name}"' not in bare
        assert f'href="#{name}"' not in bare
    for name in new[:5]:
        assert f'href="#{name}"' in full
    assert len(drawn(bare)) == 4 and len(drawn(full)) == 8
    page = Page(full)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)) and {a["href"].removeprefix("#") for a in page.all("a")} <= set(ids)
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert full.count("<script") == 1


# --- spread ---------------------------------------------------------------------------------------------------------


def test_the_spread_of_each_query():
    values = torch.randn(Q, 300, generator=torch.Generator().manual_seed(1)) ** 3
    values[2, 0] = values[2].max() + 5
    scores = make_scores(values=values, self_values=None)
    text = render(scores, train_examples=of_kind("plain", 300), query_examples=of_kind("plain", Q))
    found = [tail(row) for row in scores.values]
    assert np.argsort([t.top for t in found])[1] != np.argsort([t.covered[0] for t in found])[1]
    expected = {
        "the strongest example holds": [f"{t.covered[0]:.1%}" for t in found],
        "the top 1% of the examples hold": [f"{t.top:.1%}" for t in found],
        "examples that hold half": [str(int((t.covered < 0.5).sum()) + 1) for t in found],
        "Gini coefficient": [f"{t.gini:.2f}" for t in found],
        "exponent of the tail, Hill": [f"{t.hill:.2f}" for t in found],
        "exponent of the tail, line": [f"{t.slope:.2f}" for t in found],
        "R² of the line": [f"{t.r2:.3f}" for t in found],
    }
    rows = {name: words for name, *words in Page(text).tables["tail"]}
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        low, middle, high = sorted(values, key=lambda word: float(word.rstrip("%")))
        assert rows[name] == [middle, low, high], name
    middle = sorted(found, key=lambda t: t.top)[1]
    assert f"slope −{middle.slope:.2f}" in text  # on the figure and in its description
    assert f"in the median query the top 1% of the examples hold {middle.top:.0%}" in text


def test_the_spread_of_one_query_has_no_range():
    scores = make_scores(
        values=make_scores().values[:1], residual=None, converged=torch.ones(1) > 0, history=torch.empty(0, 1)
    )
    page = Page(render(scores, train_examples=of_kind("plain", N), query_examples=of_kind("plain", 1)))
    assert all(len(row) == 2 for row in page.tables["tail"]) and "median query is" not in page.text


def test_queries_that_nothing_helps_have_no_tail():
    values = make_scores().values
    values[0] = -values[0].abs()
    assert "tail" in Page(render(make_scores(values=values), **examples())).tables
    page = Page(render(make_scores(values=-values.abs()), **examples()))
    assert "tail" not in page.tables and "All 60 scores" in page.text


def test_many_queries_and_examples_leave_the_page_small():
    values = torch.randn(150, 3000, generator=torch.Generator().manual_seed(0)) ** 3
    scores = make_scores(values=values, residual=None, converged=torch.ones(150) > 0, history=torch.empty(0, 150))
    names = {"train_examples": of_kind("plain", 3000), "query_examples": of_kind("plain", 150)}
    text = render(scores, **names)
    assert len(text) < 400_000 and "60 of the 150" in Page(text).text


# --- detection ------------------------------------------------------------------------------------------------------


def test_detection_is_shown_with_its_intervals():
    curve = detection()
    text = page_of(Suspects(detection=curve))
    (low, high), (least, most) = curve.auc_interval, curve.average_precision_interval
    said = f"AUC {curve.auc:.3f} (95% interval {low:.3f} to {high:.3f}; chance 0.5), average precision "
    said += f"{curve.average_precision:.3f} ({least:.3f} to {most:.3f}; chance 0.200). The band is"
    assert said in Page(text).text
    figure = text[text.index('aria-label="Detection') :].split("</svg>")[0]
    assert figure.count("fill-opacity: 0.14") == 1


# --- removal --------------------------------------------------------------------------------------------------------


def test_removal_is_shown_with_intervals_and_wins():
    text = page_of(Retraining(removal=removal(other=0.5)))
    page = Page(text)
    assert [" ".join(" ".join(row).split()) for row in page.tables["removal"]] == [
        "2 +3.00 2.8 to 3.5 −1.00 −1.2 to −0.50 +1.00 0.75 to 1.5 +2.00 1.8 to 2.5",
        "4 +5.00 4.8 to 5.5 −3.00 −3.2 to −2.5 +1.00 0.75 to 1.5 +3.00 2.8 to 3.5",
        "8 +9.00 8.8 to 9.5 −7.00 −7.2 to −6.5 +1.00 0.75 to 1.5 +5.00 4.8 to 5.5",
    ]
    assert "above random 3 of 3 0 of 3 – 3 of 3" in page.text and "bands are 90% intervals" in page.text
    (said,) = [words for words in drawn(text) if words.startswith("Change of f")]
    assert said == "Change of f after 8 examples were removed, by ranking: top +9; bottom -7; random +1; other +5."
    assert "linear datamodeling score" not in page.text and "Against retraining" in page.text


def test_every_ranking_has_a_look_of_its_own():
    def looks(text: str) -> set[tuple[str, str, str]]:
        figure = text[text.index('aria-label="Change of f') :].split("</svg>")[0]
        legend = figure[figure.index('<g id="legend') if '<g id="legend' in figure else 0 :]
        lines = re.findall(r'<path d="[^"]*" style="fill: none;([^"]*)"', legend)
        return set(lines)

    few = page_of(Retraining(removal=removal()))
    more = page_of(Retraining(removal=removal(a=0.2, b=0.3, c=0.4)))
    assert len(looks(more)) - len(looks(few)) == 3


# --- damping --------------------------------------------------------------------------------------------------------


def test_a_sweep_of_dampings():
    found = sweep(known=True)
    text = page_of(found)
    reference = found.scores[0.1].values
    scored = found.lds[0.1]
    for x, row in zip(DAMPINGS, Page(text).tables["dampings"], strict=True):
        rho = sorted(spearmanr(a, b).statistic for a, b in zip(found.scores[x].values, reference, strict=True))
        assert row[0] == f"{x:g}"
        assert row[2].split() == [f"{rho[1]:.2f}", "worst", f"{rho[0]:.2f}"]
        interval = f"{scored.mean:.2f} {scored.interval[0]:.2f} to {scored.interval[1]:.2f}"
        assert " ".join(row[3].split()) == (interval if x == 0.1 else "–")
    residuals = [row[1].split() for row in Page(text).tables["dampings"]]
    assert residuals == [["0.0020", "worst", "0.0030"], ["0.20", "worst", "0.30"], ["20", "worst", "30"]]
    assert "residual, rank agreement, LDS against dampings of 0.001 to 10." in drawn(text)


def test_a_sweep_shows_what_was_measured():
    scores = {x: make_scores(residual=None) for x in DAMPINGS}
    text = page_of(sweep(scores=scores))
    assert "rank agreement against dampings of 0.001 to 10." in drawn(text)
    assert [row[1:] for row in Page(text).tables["dampings"]] == [["–", "1.00 worst 1.00"]] * 3
    assert "foretells retraining" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": 0.2}, "chosen and lds"),
        ({"lds": {0.3: None}}, "chosen and lds"),
        ({"scores": {0.0: make_scores(), 0.1: make_scores()}}, "positive"),
        ({"scores": {0.1: make_scores(), 1.0: make_scores(values=torch.ones(2, N))}}, "one shape"),
    ],
)
def test_a_sweep_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        sweep(**changes)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_the_share_of_each_layer():
    """Absolute contributions of 2 and 6, then 2 and 0, then none."""
    text = page_of(Layers(layers(), show=[1, 0]))
    assert Page(text).tables["shares"] == [
        ["first", "41.7%", "100.0%", "25.0%"],  # (1/4 + 1 + 0) / 3
        ["second <b>", "25.0%", "0.0%", "75.0%"],
    ]
    bars = re.findall(
        r'--share: ([\d.]+)%" data-value="([\d.]+)"', text[text.index('id="shares"') :].split("</table>")[0]
    )
    assert [(float(a), round(float(b), 4)) for a, b in bars[:3]] == [(41.67, 0.4167), (100.0, 1.0), (25.0, 0.25)]


def test_layers_that_do_not_fit():
    with pytest.raises(InputError, match="of one shape"):
        Layers({"a": torch.ones(Q, 2), "b": torch.ones(Q, 3)})
    with pytest.raises(InputError, match=r"of one shape \(Q, n\), with a query 2"):
        Layers({"a": torch.ones(2, 2)}, show=[2])


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_shows_values_of_every_type():
    columns = {
        "whole": torch.tensor([1, 20000]),
        "real": np.array([-0.123456, np.nan]),
        "truth": [True, np.bool_(False)],
        "words": ["plain", SCRIPT],
        "nothing": [None, 3],
    }
    text = page_of(Table("Any", columns, lead="Read this."))
    assert Page(text).tables["rows-1"] == [
        ["1", "−0.123", "yes", "plain", "–"],
        ["20000", "–", "no", SCRIPT, "3"],
    ]
    table = text[text.index('id="rows-1"') :].split("</table>")[0]
    assert table.count('<th scope="col" class="num">') == 3  # whole, real, nothing
    assert 'data-value="-0.123456"' in table and "Read this." in text


def test_a_table_shows_examples():
    page = Page(page_of(*tables()))
    assert len(page.all("img")) == N and page.tables["rows-1"][1][0].split() == ["label", "1"]
    assert page.tables["rows-1"][1][1:3] == ["2", "x1"]
    texts = Table("T", {"n": [1]}, [Example("c", text="a long text")])
    assert "a long text" in Page(page_of(texts)).tables["rows-1"][0][0]
    assert "none" in Page(page_of(Table("T", {"n": []}))).text


@pytest.mark.parametrize(
    "make", [partial(Table, "T", {}), partial(Table, "T", {"a": [1], "b": [1, 2]}), partial(Table, "T", {"a": [1]}, [])]
)
def test_a_table_that_cannot_be(make):
    with pytest.raises(InputError, match="columns and examples of one length"):
        make()


# --- the page -------------------------------------------------------------------------------------------------------


def test_cost_by_part():
    text = page_of(Provenance(make_scores(), cost={"training": 10.5}))
    assert Page(text).tables["cost"] == [
        ["attribution", "3.50 s"],
        ["fit", "1.00 s"],
        ["solve", "2.50 s"],
        ["training", "10.50 s"],
        ["in all", "14.00 s"],
    ]
    bars = re.findall(r"--share: ([\d.]+)%", text[text.index('id="cost"') :])
    assert [float(b) for b in bars] == [25.0, 7.14, 17.86, 75.0, 100.0]
    assert Page(page_of(Provenance(make_scores()))).tables["cost"][-1] == ["solve", "2.50 s"]
    assert "cost" not in Page(page_of(Provenance(make_scores(provenance={})))).tables


def test_a_page_without_queries():
    scores = make_scores(
        values=torch.empty(0, N), residual=None, converged=torch.empty(0) > 0, history=torch.empty(0, 0)
    )
    text = render(
        scores,
        train_examples=of_kind("image", N),
        query_examples=[],
        notes=["Note this."],
        sections=[*tables(), Suspects(of_kind("image", N), scores.self_values, detection())],
    )
    page = Page(text)
    for name in ("reading", "queries", "spread", "trust"):
        assert f'id="{name}"' not in text and f'href="#{name}"' not in text
    assert "20 training examples" in page.text and "Note this." in page.text and "Suspicious" in page.text
    assert "attributing 7 of 9 trainable parameters" in page.text and "CG()" in page.text


PROBE = """
const sorted = (id, i) => {
  const table = document.getElementById(id), press = () => table.querySelectorAll("thead button")[i].click();
  press();
  const up = column(table, table.tHead.rows[0].cells.length - table.querySelectorAll("thead button").length + i);
  press();
  return [up.slice(0, 3), table.querySelector("[aria-sort]").getAttribute("aria-sort")];
};
const page = document.documentElement;
const right = (box) => box.getBoundingClientRect().right > page.clientWidth + 1;
const all = [...document.querySelectorAll("main *:not(svg *)")];
const loose = all.filter((box) => right(box) && !box.closest(".scroll"));
return {
  wide: page.scrollWidth - page.clientWidth,
  loose: loose.map((box) => box.outerHTML.slice(0, 80)),
  scores: sorted("rows-1", 2), words: sorted("rows-1", 1), whole: sorted("rows-2", 0), shares: sorted("shares", 1),
  removal: sorted("removal", 2), dampings: sorted("dampings", 0),
  regions: [...document.querySelectorAll(".scroll")].every((box) => box.tabIndex === 0 && box.ariaLabel),
};"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(tmp_path, width):
    """Nothing is loaded, nothing sticks out, and every table is sorted by what its cells mean."""
    text = render(make_scores(), **examples("image"), sections=everything("image"))
    found = browse(tmp_path, text, PROBE, width)
    assert found == {
        "loads": 0,
        "wide": 0,
        "loose": [],
        "scores": [["−9.00", "−8.42", "−7.84"], "descending"],
        "words": [["x0"] * 3, "descending"],
        "whole": [["9", "10", "100"], "descending"],
        "shares": [["25.0%", "41.7%"], "descending"],
        "removal": [[f"−{v}" for v in ("7.00 −7.2 to −6.5", "3.00 −3.2 to −2.5", "1.00 −1.2 to −0.50")], "descending"],
        "dampings": [["0.001", "0.1", "10"], "descending"],
        "regions": True,
    }


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_browser_notices_what_is_loaded_and_what_sticks_out(tmp_path):
    text = render(make_scores(), **examples("image"), sections=everything("image"))
    text = text.replace("<main>", '<main><img src="x.png" style="width: 900px">')
    found = browse(tmp_path, text, PROBE)
    assert found["loads"] > 0 and found["wide"] > 0 and found["loose"]
