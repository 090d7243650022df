"""The examples in docs/ do what they say, and each writes its report."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples"
pytestmark = pytest.mark.slow


def run(name: str, out: Path, page: str = ""):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        return module.main(str(out)), (out / page).read_text(encoding="utf-8")
    finally:
        del sys.modules[name]


def test_the_table(tmp_path):
    scores, page = run("tabular", tmp_path / "report.html")
    assert scores.values.shape == (42, 400) and bool(scores.converged.all())
    assert "progression" in page and "removed" in page


def test_the_pictures(tmp_path):
    (before, after), page = run("image", tmp_path / "report.html")
    assert after > before + 0.01  # 0.857 and 0.877
    assert "The first proposals" in page and "relabel" in page


def test_the_text(tmp_path):
    scores, page = run("text", tmp_path / "report.html")
    assert bool(scores.converged.all()) and "TF-IDF" in page and "typesseq" in page


def test_the_language_model(tmp_path):
    code, page = run("language", tmp_path / "folder", "explain.html")
    assert code == 0 and page.count("<mark>") == 2
    first = page[page.index('class="rank">1<') :].partition("</blockquote>")[0]
    assert "Assert statements are a convenient way" in re.sub(r"<[^>]*>", "", first)


def test_every_example_is_tested_and_named_in_the_guide():
    guide = (FOLDER.parent / "guide.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    names = [path.stem for path in FOLDER.glob("*.py")]
    assert len(names) >= 3 and all(f'run("{name}"' in here and f"examples/{name}.py" in guide for name in names)
