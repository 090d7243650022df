"""``wherefrom explain``, ``report``, ``clean`` and ``select`` on real files: tables, pages, choices."""

from __future__ import annotations

import re

import pytest
import torch

import wherefrom
from targets import MINE, load, placed, refused, run, whole
from wherefrom.data.tables import read_table
from wherefrom.tools.act import clean, cleanest, explain, select


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return placed(tmp_path, monkeypatch)


@pytest.fixture
def fitted():
    """The target, and influence functions on it."""

    def make(name: str = "full", options: str = ""):
        t, seed = load(name), int(options.partition("--seed ")[2] or 0)
        return t, wherefrom.Influence(wherefrom.EKFAC(), 0.05, seed=seed).fit(t.model, t.task, t.train)

    return make


LIKE = "--damping 0.05 --solver EKFAC() --out r"


def page(name: str) -> str:
    with open(f"r/{name}.html", encoding="utf-8") as file:
        return file.read()


def same(name: str, expected: dict) -> None:
    """Both files of a table hold what is expected."""
    for suffix in ("csv", "parquet"):
        found = read_table(f"r/{name}.{suffix}")
        assert list(found) == list(expected)
        for column, cells in expected.items():
            if any(isinstance(cell, float) for cell in cells):
                assert found[column] == pytest.approx(cells, rel=1e-9, nan_ok=True)
            else:
                assert found[column] == cells


def test_explain(mine, fitted, capsys):
    run(f"explain mine:full {LIKE} --k 2")
    t, influence = fitted()
    train, queries = ([e.caption for e in t.shown(name)] for name in ("train", "queries"))
    same("explain", explain(influence.score(t.queries), 2, {"shown": train}, {"shown": queries}))
    text = page("explain")
    assert text.count('id="query-') == 4 and "word0 and" in text
    assert "proponent" in capsys.readouterr().out
    run("explain --config r/explain.toml --out again")
    assert (mine / "again" / "explain.csv").read_bytes() == (mine / "r" / "explain.csv").read_bytes()
    assert (mine / "again" / "explain.toml").read_text() == (mine / "r" / "explain.toml").read_text().replace(
        '"r"', '"again"'
    )


def test_a_target_proposes_options_and_words(mine, fitted, capsys):
    proposed = """
def proposed():
    return full(defaults={"damping": 0.05, "solver": "EKFAC()", "seed": 3}, page={"title": "Mine", "notes": ["Noted."]})
"""
    (mine / "mine.py").write_text(MINE + proposed)
    run("explain mine:proposed --out r --seed 0")
    expected = fitted()[1].score(load().queries).values
    torch.testing.assert_close(wherefrom.Scores.load("r/scores.safetensors").values, expected)
    assert "<h1>Mine</h1>" in page("explain") and "Noted." in page("explain")
    said, written = capsys.readouterr().out, (mine / "r" / "explain.toml").read_text()
    assert "\nNoted.\n" in said and "damping = 0.05" in written and 'solver = "EKFAC()"' in written
    assert "seed = 0" in written
    run("score mine:proposed --out s --method GradCos()")  # has no damping


def test_parts_that_a_task_does_not_have_are_named(mine, capsys):
    shown = """
def worded():
    return full(show=lambda data, number: Example("x", tokens=["one", " two"]))
"""
    (mine / "mine.py").write_text(MINE + shown)
    run(f"explain mine:worded {LIKE}")
    said = capsys.readouterr().out
    assert re.search(r"Not in the report: .*positions", said) and re.search(r"Not in the report: .*each token", said)
    assert '<figure class="layers">' in page("explain") and "<mark>" not in page("explain")


def test_the_full_report(mine, fitted, capsys, monkeypatch):
    run(f"self-influence mine:full {LIKE}")
    run(f"report mine:full {LIKE} --layers --sweep 0.1 10")
    t, influence = fitted()
    for factor in (0.1, 10):
        expected = influence.at(0.05 * factor).score(t.queries).values
        torch.testing.assert_close(wherefrom.Scores.load(f"r/scores-{factor:g}.safetensors").values, expected)
    text = page("report")
    assert "0.weight" in text or "layer" in text.lower()
    assert "self-influence" in text.lower() and "damping" in text.lower()
    monkeypatch.setattr(wherefrom.Solution, "score", lambda *_, **__: pytest.fail("scored again"))
    run(f"report mine:full {LIKE} --sweep 0.1 10")
    refused(capsys, "sweep must be positive multiples", f"report mine:full {LIKE} --sweep -1")
    refused(capsys, "--layers and --sweep are for influence functions",
            "report mine:problem --out s --layers --method GradCos()")  # fmt: skip


@pytest.mark.parametrize(
    ("target", "options", "like"),
    [
        ("full", "", lambda t, i: clean(i.score(t.trusted), i, t.trusted)),
        ("full", "--count 5", lambda t, i: clean(i.score(t.trusted), i, t.trusted, count=5)),
        ("full", "--share 0.2 --no-relabel", lambda t, i: clean(i.score(t.trusted), share=0.2)),
        ("full", "--rank-by self-influence --count 3", lambda t, i: clean(i.self_influence(), i, t.trusted, count=3)),
        ("problem", "--count 3 --seed 7", lambda t, i: clean(i.self_influence(), i, count=3, seed=7)),
    ],
)
def test_clean(mine, fitted, capsys, target, options, like):
    run(f"clean mine:{target} {LIKE} {options}")
    t, influence = fitted(target, options)
    found = like(t, influence)
    same("clean", found.table(shown=[e.caption for e in t.shown("train")]))
    assert str(found).splitlines()[0] in capsys.readouterr().out
    assert "What to drop or relabel" in page("clean")


def test_clean_needs_what_it_ranks_by(mine, capsys):
    refused(capsys, "trusted must be given, got none", f"clean mine:problem {LIKE} --rank-by harm")
    refused(
        capsys,
        "labels at 'y' of a batch must be one whole number",
        f"clean mine:full {LIKE} --count 2 --labels-at y",
    )
    refused(capsys, "share.*count", f"clean mine:full {LIKE} --count 2 --share 0.1")
    refused(capsys, "count must be a whole number from 1 to the 30", f"clean mine:full {LIKE} --count 31")


@pytest.mark.parametrize(
    ("target", "options", "like"),
    [
        ("full", "--count 3", lambda t, i: select(i.score(t.queries, examples=t.candidates), count=3)),
        ("full", "--share 0.5 --by coverage --seed 2",
         lambda t, i: select(i.score(t.queries, examples=t.candidates), 0.5, by="coverage", seed=2)),
        ("problem", "--count 3 --by max", lambda t, i: select(i.score(t.queries), count=3, by="max")),
        ("full", "--count 3 --by cleanest", lambda t, i: cleanest(i.self_influence(), count=3)),
    ],
)  # fmt: skip
def test_select(mine, fitted, target, options, like):
    run(f"select mine:{target} {LIKE} {options}")
    t, influence = fitted(target, options)
    pool = "candidates" if target == "full" and "cleanest" not in options else "train"
    same("select", like(t, influence).table(shown=[e.caption for e in t.shown(pool)]))
    assert "Chosen examples" in page("select")
    assert whole(mine / "r")


def test_select_needs_a_size_and_a_method_that_scores_candidates(mine, capsys):
    refused(capsys, "the size must be a share or a count, got neither", f"select mine:full {LIKE}")
    refused(capsys, r"GradCos.. scores no candidates", "select mine:full --out s --count 2 --method GradCos()")
