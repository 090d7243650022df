"""Each command on real files, as a user runs it: right numbers, bad input, interruption, resumption."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import wherefrom
from targets import MINE, load, placed, refused, run, stopped, table, whole


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return placed(tmp_path, monkeypatch)


# --- fit, score, top, self-influence --------------------------------------------------------------------------------


def test_scores_are_those_of_the_library(mine, capsys):
    run("score mine:problem --damping 0.05 --out r", "--solver", "CG(preconditioner=EKFAC(), tolerance=1e-9)")
    target = load()
    influence = wherefrom.Influence(wherefrom.CG(wherefrom.EKFAC(), tolerance=1e-9), 0.05)
    expected = influence.fit(target.model, target.task, target.train).score(target.queries)
    found = wherefrom.Scores.load("r/scores.safetensors")
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-3, atol=1e-12)
    queries = table("r/queries.csv")
    assert [int(j) for j in queries["proponent"]] == expected.values.argmax(1).tolist()
    assert [float(v) for v in queries["opponent score"]] == pytest.approx(expected.values.amin(1).tolist())
    assert queries["shown"] == [f"label {int(y)}" for y in target.queries[1]]
    said = capsys.readouterr().out
    assert "attributing 43 of 43 trainable parameters" in said and "4 of 4 converged" in said
    assert whole(mine / "r") == [
        "fit.safetensors",
        "queries.csv",
        "queries.parquet",
        "score.toml",
        "scores.safetensors",
    ]


def test_a_fit_is_made_once(mine, capsys, monkeypatch):
    run("fit mine:problem --damping 0.05 --out r --solver EKFAC()")
    assert "lambda" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(wherefrom.EKFAC, "fit", lambda *_: pytest.fail("fitted again"))
        run("score mine:problem --damping 0.05 --out r --solver EKFAC()")
        assert "The fit is taken from r/fit.safetensors." in capsys.readouterr().out
        run("self-influence mine:problem --damping 0.05 --out r --solver EKFAC() --batch-size 7")
    target = load()
    fitted = wherefrom.Influence(wherefrom.EKFAC(), 0.05).fit(target.model, target.task, target.train)
    expected = fitted.self_influence()
    found = table("r/self-influence.csv")
    assert [int(j) for j in found["example"]] == expected.argsort(descending=True).tolist()
    assert [float(v) for v in found["self-influence"]] == pytest.approx(expected.sort(descending=True).values.tolist())
    assert found["rank"] == [str(i + 1) for i in range(30)]
    monkeypatch.setattr(wherefrom.FittedInfluence, "self_influence", lambda *_: pytest.fail("made again"))
    run("self-influence mine:problem --damping 0.05 --out r --solver EKFAC()")


def test_top_reads_any_scores(mine, capsys):
    values = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.save("foreign.npy", values.numpy())
    run("top foreign.npy --k 3 --out t")
    found, best = table("t/top.csv"), wherefrom.Scores(values, wherefrom.Certificate.of_nothing_solved(2)).top(3)
    assert [int(j) for j in found["example"]] == torch.cat([best.proponents, best.opponents], 1).flatten().tolist()
    assert found["side"] == 2 * (3 * ["proponent"] + 3 * ["opponent"]) and found["rank"] == 4 * ["1", "2", "3"]
    assert [float(v) * 7 for v in found["predicted_change"]] == pytest.approx([float(v) for v in found["score"]])
    capsys.readouterr()
    run("top foreign.npy --k 1")
    assert len(capsys.readouterr().out.splitlines()) == 5
    refused(capsys, "k must be at least 1, got 0", "top foreign.npy --k 0")
    refused(capsys, "absent.npy must be a file with a score matrix", "top absent.npy")


@pytest.mark.parametrize(
    ("method", "target", "like"),
    [
        ("TracIn(checkpoints=2)", "recorded", lambda t: wherefrom.TracIn(t.run(), checkpoints=2)),
        ("SOURCE(segments=1, solver=CG(tolerance=1e-6))", "recorded",
         lambda t: wherefrom.SOURCE(t.run(), segments=1, solver=wherefrom.CG(tolerance=1e-6))),
        ("TRAK(size=20)", "several", lambda t: wherefrom.TRAK(size=20, seed=4)),
        ("GradCos()", "problem", lambda t: wherefrom.GradCos()),
        ("Embeddings('1')", "problem", lambda t: wherefrom.Embeddings("1")),
        ("Random()", "problem", lambda t: wherefrom.Random(seed=4)),
    ],
)  # fmt: skip
def test_methods_are_those_of_the_library(mine, method, target, like):
    run(f"score mine:{target} --out r --seed 4", "--method", method)
    t = load(target)
    expected = like(t).fit(t.model, t.task, t.train).score(t.queries)
    torch.testing.assert_close(wherefrom.Scores.load("r/scores.safetensors").values, expected.values)


def test_words_come_from_how_examples_are_shown(mine, capsys):
    run("score mine:full --out r --method BM25()")
    t = load("full")
    texts, asked = ([e.text for e in t.shown(name)] for name in ("train", "queries"))
    assert torch.equal(
        wherefrom.Scores.load("r/scores.safetensors").values, wherefrom.BM25().fit(texts).score(asked).values
    )
    refused(capsys, r"train for BM25\(\) must be shown as texts, got no text of example 0",
            "score mine:problem --out s --method BM25()")  # fmt: skip


def test_several_models_are_averaged(mine):
    run("score mine:several --out r --solver EKFAC() --damping 0.1")
    t = load("several")
    each = [wherefrom.Influence(wherefrom.EKFAC(), 0.1).fit(m, t.task, t.train).score(t.queries) for m in t.model]
    torch.testing.assert_close(wherefrom.Scores.load("r/scores.safetensors").values, wherefrom.ensemble(each).values)
    fits = [name for name in whole(mine / "r") if name.startswith("fit")]
    assert fits == ["fit-2.safetensors", "fit-3.safetensors", "fit.safetensors"]


def test_self_influence_of_tracin(mine, capsys):
    run("self-influence mine:recorded --out r --method TracIn()")
    t = load("recorded")
    expected = wherefrom.TracIn(t.run()).fit(t.model, t.task, t.train).self_influence()
    found = wherefrom.Scores.load("r/self-influence.safetensors")
    torch.testing.assert_close(found.self_influence, expected)
    refused(capsys, "GradCos.. has no self-influence", "self-influence mine:problem --out s --method GradCos()")


def test_what_did_not_converge_has_its_own_code_also_when_resumed(mine, capsys):
    solver = ("--solver", "CG(steps=1, tolerance=1e-8)")
    for command in ("score", "self-influence"):
        for _ in range(2):
            run(f"{command} mine:problem --out r", *solver, code=3)
            assert "did not converge" in capsys.readouterr().err


def test_a_module_that_silences_warnings_does_not_silence_the_exit_code(mine):
    (mine / "mine.py").write_text("import warnings\nwarnings.filterwarnings('ignore')\n" + MINE)
    for _ in range(2):
        run("score mine:problem --out r", "--solver", "CG(steps=1, tolerance=1e-8)", code=3)


def test_out_is_a_folder(mine, capsys):
    (mine / "r").touch()
    refused(capsys, "out must be a folder, got the file r", "score mine:problem --out r")
    refused(capsys, "queries must be given, got none. .*Target", "score mine:unasked --out s --solver EKFAC()")
    refused(capsys, "TRAK.. has no fit to keep", "fit mine:problem --out s --method TRAK()")
    refused(capsys, "trajectory must be given, got none", "score mine:problem --out s --method TracIn()")
    assert not (mine / "s").exists()


# --- what was made for something else, damaged or interrupted -------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        ("--damping 0.06 --solver EKFAC()", None, "another damping .*0.05 .given.*0.06 .*another --out"),
        ("--damping 0.05 --solver KFAC()", None, "another solver .*EKFAC.*KFAC"),
        ("--damping 0.05 --solver EKFAC() --no-certify", None, "another certify .*True.*False"),
        ("--damping 0.05 --solver EKFAC() --parameters 0", None, "another parameters .*0.weight, 0.bias, 2.weight"),
        (
            "--damping 0.05 --solver EKFAC()",
            ("[30:34], labels[30:34]", "[30:33], labels[30:33]"),
            "queries",
        ),
        ("--damping 0.05 --solver EKFAC()", ("epochs=4", "epochs=5"), "another model "),
        ("--damping 0.05 --solver EKFAC()", ("inputs[:30], labels[:30]", "inputs[:29], labels[:29]"), "model, train "),
        ("--damping 0.05 --solver EKFAC()", ("wherefrom.Classification()", "Flat()"), "another task"),
    ],
)
def test_results_of_something_else_are_refused_by_name(mine, capsys, options, change, said):
    run("score mine:problem --damping 0.05 --out r --solver EKFAC()")
    before = {path: path.read_bytes() for path in (mine / "r").iterdir()}
    if change:
        (mine / "mine.py").write_text(
            MINE.replace(*change).replace("task, recipe", "class Flat(wherefrom.Classification): pass\ntask, recipe")
        )
        sys.modules.pop("mine")
    refused(capsys, f"r/scores.safetensors was made for .*{said}", f"score mine:problem --out r {options}")
    assert {path: path.read_bytes() for path in (mine / "r").iterdir()} == before


def test_a_measurement_that_was_edited_is_another(mine, capsys):
    own = """class Own(wherefrom.Classification):
    def measurement(self, outputs, batch):
        return outputs.square().sum(1) * 1

"""
    text = MINE.replace("task, recipe", own + "task, recipe").replace("wherefrom.Classification(), SGD", "Own(), SGD")
    (mine / "mine.py").write_text(text)
    run("score mine:problem --out r --solver EKFAC()")
    (mine / "mine.py").write_text(text.replace("* 1", "* 2"))
    sys.modules.pop("mine")
    refused(
        capsys,
        "r/scores.safetensors was made for another task.*measurement",
        "score mine:problem --out r --solver EKFAC()",
    )


@pytest.mark.parametrize("name", ["fit", "scores"])
@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damaged_files_are_refused(mine, capsys, name, damage):
    run("score mine:problem --out r --solver EKFAC()")
    path = mine / "r" / f"{name}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    command = "score" if name == "scores" else "self-influence"
    refused(capsys, f"r/{name}.safetensors is damaged", f"{command} mine:problem --out r --solver EKFAC()")


@pytest.mark.parametrize("after", [0, 2, 5])
@pytest.mark.parametrize("command", ["score", "self-influence"])
def test_an_interrupted_run_goes_on(mine, capsys, monkeypatch, command, after):
    line = f"{command} mine:problem --out r --batch-size 4 --solver EKFAC()"
    line += " --no-certify" if command == "score" else ""
    run(line.replace("--out r", "--out whole"))
    capsys.readouterr()
    with stopped(monkeypatch, after):
        run(line, code=130)
        assert capsys.readouterr().err == "wherefrom: interrupted\n"
    left = whole(mine / "r")
    assert "fit.safetensors" in left and f"{command}.toml" not in left
    assert len([name for name in left if ".pieces" in name]) == after  # EKFAC's solution is made anew
    with stopped(monkeypatch, 100) as passes:
        run(line)
    assert len(passes) == 8 - after
    file = "scores" if command == "score" else command
    resumed, uninterrupted = (wherefrom.Scores.load(f"{folder}/{file}.safetensors") for folder in ("r", "whole"))
    assert torch.equal(resumed.values, uninterrupted.values)
    if command == "self-influence":
        assert torch.equal(resumed.self_influence, uninterrupted.self_influence)
    assert [n for n in whole(mine / "r") if "pieces" in n] == []


SLOW = (
    MINE
    + """
class Slow(nn.Sequential):
    def forward(self, x):
        import time
        from pathlib import Path
        if len(list(Path("r").rglob("scores-0*"))) >= 3 and not Path("again").exists():
            time.sleep(120)
        return super().forward(x)

def slow():
    model = trained()
    return Slow(*model), task, (x, y), (xq, yq)
"""
)


def test_ctrl_c_in_a_real_process(mine):
    (mine / "mine.py").write_text(SLOW)
    command = [
        sys.executable,
        "-m",
        "wherefrom.tools.cli.main",
        "score",
        "mine:slow",
        "--batch-size",
        "1",
        "--solver",
        "Identity()",
    ]
    command += ["--damping", "1", "--no-certify"]
    process = subprocess.Popen([*command, "--out", "r"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list((mine / "r").rglob("scores-0*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == "wherefrom: interrupted\n"
    left = whole(mine / "r")
    assert "scores.safetensors" not in left and len(left) > 3
    (mine / "again").touch()
    done = subprocess.run([*command, "--out", "r"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "The fit is taken from" in done.stdout
    run("score mine:problem --solver Identity() --damping 1 --out s")
    found, expected = (wherefrom.Scores.load(f"{folder}/scores.safetensors").values for folder in "rs")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
