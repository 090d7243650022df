"""The report: it stands alone, escapes what it is given, and names the queries that did not converge."""

from __future__ import annotations

import builtins
import dataclasses
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import whence.report
from whence.attribution import Scores
from whence.errors import InputError, MissingExtraError
from whence.evaluate import linear_datamodeling_score, mislabeled_curve, random_subsets
from whence.report import Example, render, write_report
from whence.report.page import short, signed

Q, N = 3, 20
SCRIPT = "<script>alert('caught')</script>"


class Page(HTMLParser):
    """Every element with its attributes, and the text that is shown."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_scores(**changes) -> Scores:
    g = torch.Generator().manual_seed(0)
    steps = torch.tensor([1.0, 0.3, 0.05, 0.004])
    scores = Scores(
        values=torch.randn(Q, N, generator=g, dtype=torch.float64) * 10,
        residual=torch.tensor([0.004, 0.002, 0.001]),
        converged=torch.ones(Q, dtype=torch.bool),
        history=steps[:, None] * torch.tensor([1.0, 0.5, 0.25]),
        provenance={
            "solver": "CG()",
            "damping by parameter": {"a": 0.1, "b": 0.1},
            "coverage": "attributing 7 of 9 trainable parameters",
            "seconds": {"fit": 1.0, "solve": 2.5},
            "passes": 4.0,
            "tolerance": 0.01,
        },
        self_values=torch.rand(N, generator=g),
    )
    return dataclasses.replace(scores, **changes)


def of_kind(kind: str, count: int) -> list[Example]:
    made = {
        "image": lambda i: Example(f"label {i}", image=torch.rand(8, 8)),
        "colour": lambda i: Example(f"label {i}", image=np.full((40, 30, 3), 3 * i, dtype=np.uint8)),
        "text": lambda i: Example(f"label {i}", text=f"sentence {i}, long enough to read"),
        "row": lambda i: Example(f"label {i}", row={"age": i, "height": 1.5}),
        "plain": lambda i: Example(f"label {i}"),
    }[kind]
    return [made(i) for i in range(count)]


def examples(kind: str = "plain") -> dict:
    return {"train_examples": of_kind(kind, N), "query_examples": of_kind(kind, Q)}


def extras() -> dict:
    scores, wrong = make_scores(), torch.zeros(N, dtype=torch.bool)
    wrong[:4] = True
    masks = random_subsets(N, 8, 0.5, 0)
    targets = torch.randn(8, 2, Q, generator=torch.Generator().manual_seed(1))
    return {
        "detection": mislabeled_curve(scores.self_influence, wrong),
        "lds": {f"mine {SCRIPT} $x": linear_datamodeling_score(scores, masks, targets)},
    }


@pytest.mark.parametrize("kind", ["image", "colour", "text", "row", "plain"])
def test_the_page_stands_alone_whatever_the_examples(kind):
    text = render(make_scores(), **examples(kind), **extras())
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
    page = Page(render(make_scores(), **examples("image"), **extras()))
    assert all(image["alt"] for image in page.all("img"))
    figures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(figures) == 4 and all(svg["aria-label"] for svg in figures)
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
    text = render(make_scores(), title=SCRIPT, lead=SCRIPT, notes=[SCRIPT], measurement=SCRIPT, **content, **extras())
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
    assert page.all("details")[0].keys() == {"open"}
    assert "did not converge" not in Page(render(make_scores(), **examples())).text


def test_a_direct_method_is_not_called_converged():
    scores = make_scores(history=torch.empty(0, Q), residual=torch.tensor([3.0, 0.5, 0.001]))
    page = Page(render(scores, **examples()))
    assert "direct method residual 3.0" in page.text and "converged" not in page.text
    assert "not measured" in Page(render(make_scores(residual=None, history=torch.empty(0, Q)), **examples())).text


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
    assert path.read_text(encoding="utf-8") == render(make_scores(), **examples())
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]
    with pytest.raises(InputError, match="must be a file"):
        write_report(tmp_path, make_scores(), **examples())


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(package, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "whence.report.figures", raising=False)
    monkeypatch.delattr(whence.report, "figures", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf'{package}.*pip install "whence\[report\]"'):
        render(make_scores(), **examples())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#trust tbody tr")];
  const column = () => rows().map((row) => row.cells[0].textContent).join("");
  const before = column();
  document.querySelectorAll("#trust thead button")[2].click();
  const page = document.documentElement;
  const result = {wide: page.scrollWidth - page.clientWidth, order: before + ">" + column()};
  parent.postMessage(result, "*");
});
</script>"""
FRAME = """<body><iframe src="r.html" style="width: 390px; height: 900px; border: 0"></iframe><p id="out"></p><script>
addEventListener("message", (event) => { document.getElementById("out").textContent = JSON.stringify(event.data); });
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("kind", ["image", "text", "row"])
def test_in_a_browser_of_phone_width(tmp_path, kind):
    write_report(tmp_path / "r.html", make_scores(), **examples(kind), **extras())
    with open(tmp_path / "r.html", "a", encoding="utf-8") as file:
        file.write(PROBE)
    (tmp_path / "frame.html").write_text(FRAME)
    quiet = "gpu quic background-networking component-update sync".split()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in quiet)]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    command += [(tmp_path / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert '<p id="out">{"wide":0,"order":"012&gt;210"}</p>' in shown
