"""What the tests of the report share: scores and examples to show, a page read back, and a page in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherefrom.methods import Scores
from wherefrom.tools.evaluate import LDS, MislabeledCurve, linear_datamodeling_score, mislabeled_curve, random_subsets
from wherefrom.tools.report import Example, Report, Retraining, Section, Suspects, usual_sections

Q, N = 3, 20
SCRIPT = "<script>alert('caught')</script>"


class Page(HTMLParser):
    """Every element with its attributes, and the text that is shown."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}  # id or class of a table -> cells of the rows of its body
        self.table: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs).get("id") or dict(attrs).get("class") or "", [])
        elif tag == "tr" and "tbody" in self.open:
            self.table.append([])
        elif tag in ("td", "th") and "tbody" in self.open:
            self.table[-1].append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
        if "tbody" in self.open and {"td", "th"} & set(self.open):
            self.table[-1][-1] += data

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


def rows(page: Page, table: str) -> list[list[str]]:
    """The cells of a table's body, by the table's id."""
    return page.tables[table]


def fact(page: Page, name: str) -> str | None:
    """The value beside a name in the table of the section on convergence."""
    return next((row[1] for row in page.tables["facts"] if row[0] == name), None)


def detection() -> MislabeledCurve:
    wrong = torch.zeros(N, dtype=torch.bool)
    wrong[:4] = True
    return mislabeled_curve(make_scores().self_influence, wrong)


def lds() -> LDS:
    masks = random_subsets(N, 8, 0.5, 0)
    targets = torch.randn(8, 2, Q, generator=torch.Generator().manual_seed(1))
    return linear_datamodeling_score(make_scores(), masks, targets)


def evidence(train_examples: list[Example]) -> list[Section]:
    """The sections on suspicious examples and on retraining."""
    suspects = Suspects(train_examples, make_scores().self_influence, detection())
    return [suspects, Retraining({f"mine {SCRIPT} $x": lds()})]


def render(
    scores: Scores,
    *,
    train_examples: list[Example],
    query_examples: list[Example],
    title: str = "Title",
    lead: str = "",
    **content: Any,
) -> str:
    """A page of the usual sections, as text."""
    return Report(title, usual_sections(scores, train_examples, query_examples, **content), lead).render()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src 'unsafe-inline'"><script>
let loads = 0;
addEventListener("securitypolicyviolation", () => { loads += 1; });
addEventListener("load", () => {
  const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent.trim());
  const result = (() => { PROBE })();
  parent.postMessage({loads: loads + performance.getEntriesByType("resource").length, ...result}, "*");
});
</script>"""
FRAME = """<body><iframe src="r.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe><p id="out"></p><script>
addEventListener("message", (event) => { document.getElementById("out").textContent = JSON.stringify(event.data); });
</script>"""


def browse(folder: Path, text: str, probe: str, width: int = 390) -> dict[str, Any]:
    """What a script returns in a page of some width; with it ``loads``: how often the page asked for anything else."""
    text = text.replace("<head>", "<head>" + POLICY.replace("PROBE", probe), 1)
    (folder / "r.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    quiet = "gpu quic background-networking component-update sync".split()
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in quiet)]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    command += [(folder / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<p id="out">(.*?)</p>', shown, re.S)
    return json.loads(unescape(found[1])) if found and found[1] else {"dom": shown}
