"""The documentation is true: its examples run, its names and signatures exist, its links resolve."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import wherefrom

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """(line number of the first line, code) of each fenced block in these languages, those in HTML comments too."""
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] in languages]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_examples_run_without_a_warning(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, code in blocks(page.read_text(encoding="utf-8"), "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", wherefrom.AttributionWarning)
            warnings.simplefilter("error", wherefrom.ConvergenceWarning)
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_examples_are_formatted(page):
    for line, code in blocks(page.read_text(encoding="utf-8"), "python"):
        command = [sys.executable, "-m", "ruff", "format", "--line-length", "120", "-"]
        done = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
        assert done.stdout == code, f"{name(page)}:{line + 1} is not as ruff would format it"


# --- the API page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["wherefrom", "wherefrom.tools.evaluate", "wherefrom.tools.act", "wherefrom.hf", "wherefrom.tools.report"]
)
def test_the_api_page_has_every_public_name_and_no_other(module):
    names = re.findall(rf"^::: {re.escape(module)}\.([A-Za-z_]\w*)$", API, re.MULTILINE)
    assert sorted(names) == sorted(importlib.import_module(module).__all__)


# --- links and the README -------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_links_within_the_repository_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken


def test_a_newcomer_needs_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Set up\n")[1].split("\n## ")[0]
    lines = [
        line.split("#")[0].strip()
        for _, code in blocks(section, "bash", "sh", "shell", "")
        for line in code.split("\n")
    ]
    assert [line for line in lines if line] == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
