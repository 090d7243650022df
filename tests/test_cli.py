"""The command line, as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import whence
from whence import cli, demo
from whence.attribution import Scores
from whence.errors import DivergenceError, InputError


def small(monkeypatch):
    monkeypatch.setattr(demo, "ASKED", 8)
    monkeypatch.setattr(demo, "SUBSETS", 6)


def test_the_demo(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    out = tmp_path / "new" / "report.html"
    assert cli.main(["demo", "--out", str(out), "--examples", "200", "--queries", "2"]) == 0
    text = capsys.readouterr().out
    for words in (
        "200 handwritten digits to train on, 20 of them given a wrong label",
        "attributing 17,226 of 17,226 trainable parameters (100.0%)",
        "Damping   0.08333, from_training(lr=0.03, steps=120, momentum=0.9, segments=3)",
        "8 of 8 converged",
        "average precision",
        "gradient dot",
        "in all",
        f"Report    {out}",
    ):
        assert words in text
    assert len(re.findall(r"(?m)^  query \d+: a \d, the model says \d.*residual \d", text)) == 2
    assert len(re.findall(r"(?m)^    helped  (\d( \(really \d\))? \+\S+\s*){3}$", text)) == 2
    assert float(re.search(r"AUC (\S+)", text)[1]) > 0.8
    page = out.read_text(encoding="utf-8")
    assert 'id="query-' in page and "data:image/png;base64," in page
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_the_demo_is_reproducible_and_its_seed_matters(tmp_path, monkeypatch):
    small(monkeypatch)

    def once(seed):
        return demo.run(lambda _: None, tmp_path / "r.html", seed, 1, 100, lds=False)

    first = once(0)
    again, other = once(0), once(1)
    assert torch.equal(first.values, again.values) and torch.equal(first.self_influence, again.self_influence)
    assert not torch.equal(first.values, other.values)
    assert first.provenance["seed"] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--queries", "0"], "whence: queries must be in 1..40, got 0."),
        (["--examples", "5000"], "whence: examples must be in 100..1300, got 5000."),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys):
    assert cli.main(["demo", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.err == said + "\n" and shown.out == ""


def test_a_folder_is_no_report(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "out must be a file, got the folder" in capsys.readouterr().err


def test_a_report_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    (tmp_path / "file").touch()
    argv = ["demo", "--out", str(tmp_path / "file" / "r.html"), "--examples", "100", "--no-lds"]
    assert cli.main(argv) == 2
    assert "Traceback" not in (shown := capsys.readouterr().err) and shown.startswith("whence: ")


@pytest.mark.parametrize("argv", [["no-such"], ["demo", "--no-such"], ["demo", "--seed", "x"]])
def test_arguments_that_do_not_parse(argv, capsys):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("x must be\n1, got 2."), 2, "whence: x must be 1, got 2.\n"),
        (DivergenceError("CG gave NaN."), 3, "whence: CG gave NaN.\n"),
        (PermissionError(13, "Permission denied", "r.html"), 2, "whence: [Errno 13] Permission denied: 'r.html'\n"),
        (KeyboardInterrupt(), 130, "whence: interrupted\n"),
    ],
)
def test_exit_codes(error, code, said, capsys, monkeypatch):
    def run(*_):
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_no_convergence_has_its_own_code(monkeypatch, capsys):
    import warnings

    def run(*_):
        warnings.warn("1 of 2 queries did not converge", whence.ConvergenceWarning, stacklevel=1)
        return Scores(torch.zeros(2, 3), None, torch.tensor([True, False]))

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 3
    assert capsys.readouterr().err == "whence: warning: 1 of 2 queries did not converge\n"


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "whence demo" in text and "Exit codes" in text
    assert cli.main([]) == 2
    assert capsys.readouterr().out == text
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--seed", "--queries", "--examples", "--no-lds"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"whence {whence.__version__}\n"


def test_it_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "whence.cli", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"whence {whence.__version__}\n" and done.returncode == 0


def test_the_library_does_not_load_what_only_the_report_needs():
    code = "import sys, whence, whence.cli, whence.report; print({'jinja2', 'matplotlib', 'tyro'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout == "set()\n"
