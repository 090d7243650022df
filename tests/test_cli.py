"""The command line, as a user meets it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

import wherefrom
from wherefrom.errors import DivergenceError, InputError
from wherefrom.methods import Scores
from wherefrom.persample import vectors
from wherefrom.solvers.neumann import corollary
from wherefrom.tools import demo, loading
from wherefrom.tools.cli import demo as demo_command
from wherefrom.tools.cli import main as cli
from wherefrom.tools.cli import spectrum


def small(monkeypatch):
    monkeypatch.setattr(demo, "QUERIES", 8)
    monkeypatch.setattr(demo_command, "SUBSETS", 6)


def test_the_demo(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    out = tmp_path / "new" / "out"
    line = ["demo", "--out", str(out), "--examples", "200", "--queries", "2"]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    for words in (
        "200 handwritten digits to train on, 20 of them given a wrong label",
        "attributing 17,226 of 17,226 trainable parameters (100.0%)",
        "(from_training(lr=0.03, steps=120, momentum=0.9, segments=3))",
        "lambda     0.08333",
        "8 of 8 converged",
        "average precision",
        "gradient dot",
        "in all",
        f"Report    {out / 'report.html'}",
    ):
        assert words in text
    assert len(re.findall(r"(?m)^  query \d+: a \d.*residual \d", text)) == 2
    assert len(re.findall(r"(?m)^    helped  (\d( \(really \d\))? \+\S+\s*){3}$", text)) == 2
    assert float(re.search(r"AUC of wrong labels +(\S+)", text)[1]) > 0.8
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="query-' in page and "data:image/png;base64," in page
    assert 'id="truth"' in page and 'id="suspects"' in page
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)

    monkeypatch.setattr(wherefrom.Influence, "score", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(wherefrom.Influence, "self_influence", lambda *_: pytest.fail("made again"))
    assert cli.main(line) == 0
    assert "The scores are taken from" in capsys.readouterr().out
    assert cli.main([*line, "--seed", "1"]) == 2
    assert "was made for another" in capsys.readouterr().err


def test_the_demo_is_reproducible_and_its_seed_matters(tmp_path, monkeypatch):
    small(monkeypatch)

    def once(seed: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        demo_command.demo(str(tmp_path / name), seed, 1, 100, lds=False)
        scores = Scores.load(tmp_path / name / "scores.safetensors")
        own = Scores.load(tmp_path / name / "self-influence" / "self-influence.safetensors")
        return scores.values, own.self_influence

    first, again, other = once(0, "first"), once(0, "again"), once(1, "other")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--queries", "0"], "wherefrom: queries must be in 1..40, got 0."),
        (["--examples", "5000"], "wherefrom: examples must be in 100..1300, got 5000."),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys):
    assert cli.main(["demo", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.err == said + "\n" and shown.out == ""


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "out must be a folder, got the file" in capsys.readouterr().err


def test_results_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    (tmp_path / "file").touch()
    argv = ["demo", "--out", str(tmp_path / "file" / "out"), "--examples", "100", "--no-lds"]
    assert cli.main(argv) == 2
    assert "Traceback" not in (shown := capsys.readouterr().err) and shown.startswith("wherefrom: ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["scor"], "scor"),
        (["demo", "--no-such"], "--no-such"),
        (["demo", "--seed", "x"], "Error parsing --seed: .*'x'"),
        (["score"], "what to look at must be MODULE:FUNCTION, or a language model with --hf, got neither"),
        (["spectrum", "a:b", "--hf", "m"], "with --hf, got a:b and m"),
        (["score", "a:b", "--out"], "--out"),
        (["score", "a:b", "--config"], "config"),
        (["score", "a:b", "--config", "absent.toml"], "absent.toml"),
        (["score", "a:b", "c:d"], "c:d"),
        (["spectrum", "a:b", "--curvature", "kfac"], "'kfac'"),
        (["spectrum", "a:b", "--damping", "x"], "damping: there is no x"),
    ],
)
def test_arguments_that_do_not_parse(argv, said, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert re.search(said, shown.err) and shown.err.startswith("wherefrom: ") and shown.err.count("\n") == 1
    assert not shown.out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("x must be\n1, got 2."), 2, "wherefrom: x must be 1, got 2.\n"),
        (DivergenceError("CG gave NaN."), 3, "wherefrom: CG gave NaN.\n"),
        (PermissionError(13, "Permission denied", "r.html"), 2, "wherefrom: [Errno 13] Permission denied: 'r.html'\n"),
        (KeyboardInterrupt(), 130, "wherefrom: interrupted\n"),
    ],
)
def test_exit_codes(error, code, said, capsys, monkeypatch):
    def run(*_):
        raise error

    monkeypatch.setattr(demo, "load_digits", run)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(demo, "load_digits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_no_convergence_has_its_own_code(tmp_path, monkeypatch, capsys):
    import warnings

    values = torch.zeros(2, 3)
    values[0, 0] = 1
    Scores(values, None, torch.ones(2, dtype=torch.bool)).save(tmp_path / "s.safetensors")

    def load(path):
        warnings.warn("1 of 2 queries did not converge", wherefrom.ConvergenceWarning, stacklevel=1)
        return load_scores(path)

    load_scores = Scores.load
    monkeypatch.setattr(Scores, "load", load)
    assert cli.main(["top", str(tmp_path / "s.safetensors")]) == 3
    assert capsys.readouterr().err == "wherefrom: warning: 1 of 2 queries did not converge\n"


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "wherefrom demo" in text and "Exit codes" in text
    assert "Judge one or more files of scores" in text and "For example" not in text
    assert cli.main([]) == 2
    assert capsys.readouterr().out == text
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--seed", "--queries", "--examples", "--no-lds"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wherefrom {wherefrom.__version__}\n"


def test_it_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "wherefrom.tools.cli.main", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"wherefrom {wherefrom.__version__}\n" and done.returncode == 0


def test_the_library_does_not_load_what_only_the_report_needs():
    code = (
        "import sys, wherefrom, wherefrom.tools.cli.main, wherefrom.tools.report; "
        "print({'jinja2', 'matplotlib', 'tyro'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout == "set()\n"


# --- spectrum -------------------------------------------------------------------------------------------------------

MINE = """
import torch
import wherefrom

g = torch.Generator().manual_seed(1)
x, y = torch.randn(60, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (60,), generator=g)

def problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    return model, wherefrom.Classification(), (x, y)

def asked(count=2):
    return [*problem(), (x[:count], y[:count])]

def two():
    return problem()[:2]

def nothing():
    pass

def needy(count, *rest, flag=True):
    return problem()

def wrong_model():
    return "model", wherefrom.Classification(), (x, y)

def unpaired():
    return *problem()[:2], (x, y[:-1])

def gone():
    raise FileNotFoundError("no weights.pt")

def _hidden():
    pass

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # "" would be the current directory
    return tmp_path


def measure(argv, capsys) -> str:
    assert cli.main(["spectrum", *argv]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def curvature(kind=wherefrom.GGN, parameters=None):
    with loading.import_from_here():
        target = loading.load("mine:problem")
    return kind(wherefrom.Problem(target.model, target.task, target.train, parameters))


def row(text: str) -> dict[str, str]:
    """The table of the plan: names and values, which end in the same column."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "step size" in line)
    ends = [m.end() for m in re.finditer(r"\S+(?: \S+)*", lines[at])]
    starts = [0, *ends[:-1]]
    return {lines[at][s:e].strip(): lines[at + 1][s:e].strip() for s, e in zip(starts, ends, strict=True)}


@pytest.mark.parametrize(
    ("argv", "kind", "parameters", "seed"),
    [
        (["mine:problem"], wherefrom.GGN, None, 0),
        (["mine:asked", "--batch-size", "7"], wherefrom.GGN, None, 0),
        (["mine:problem", "--curvature", "fisher", "--seed", "3"], wherefrom.EmpiricalFisher, None, 3),
        (["--parameters", "^2", "mine:problem"], wherefrom.GGN, "^2", 0),
    ],
)
def test_the_spectrum_is_the_one_measured(mine, capsys, argv, kind, parameters, seed):
    text = measure(argv, capsys)
    c = curvature(kind, parameters)
    measured = wherefrom.spectrum(c, seed=seed)
    assert str(measured) in text
    assert f"{kind.__name__} of {next(a for a in argv if a.startswith('mine'))}, {c.problem.coverage()}" in text
    damping = min(wherefrom.Damping.per_example().resolve(c).values())
    plan = corollary(measured, damping)
    found = row(text)
    assert found.pop("sampling error / |x|") == f"at most {spectrum.bound_sampling_error(plan, damping):.3g}"
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {
            "damping": damping,
            "step size": plan.step,
            "batch size": plan.batch or 60,
            "steps": plan.steps,
            "passes": plan.steps * (plan.batch or 60) / 60,
        },
        rel=5e-3,
    )
    assert repr(wherefrom.Auto().choices(c)[0].solver) in " ".join(text.split())


def test_the_damping_can_be_given_and_the_seed_matters(mine, capsys):
    first = measure(["mine:problem", "--damping", "0.5"], capsys)
    measured = wherefrom.spectrum(curvature())
    assert row(first)["damping"] == "0.5"
    assert int(row(first)["steps"].replace(",", "")) == corollary(measured, 0.5).steps
    assert measure(["mine:problem", "--damping", "0.5"], capsys) == first
    assert measure(["mine:problem", "--damping", "0.5", "--seed", "1"], capsys) != first


def test_an_indefinite_hessian_is_told(mine, capsys):
    smallest = wherefrom.spectrum(curvature(wherefrom.Hessian)).smallest
    assert smallest < -1e-3
    text = measure(["mine:problem", "--curvature", "hessian", "--damping", f"{-smallest / 2:.6f}"], capsys)
    assert "No plan" in text and "step size" not in text
    assert f"a damping above {-smallest:.3g}, or --curvature ggn" in " ".join(text.split())
    text = measure(["mine:problem", "--curvature", "hessian", "--damping", f"{-3 * smallest:.6f}"], capsys)
    assert "step size" in text and "is about" in text and "auto" not in text
    assert row(text)["sampling error / |x|"] == "no bound"


def dense(c: wherefrom.Curvature) -> torch.Tensor:
    shapes = c.problem.shapes
    eye = torch.eye(sum(s.numel() for s in shapes.values()), dtype=torch.float64)
    return vectors.flatten(c.product(vectors.unflatten(eye, shapes)))


@pytest.mark.parametrize("damping", [0.3, 0.01, 1e-4])
def test_what_is_said_of_cg_is_true(mine, capsys, damping):
    text = " ".join(measure(["mine:problem", "--damping", str(damping)], capsys).split())
    steps = int(re.search(r"CG\(\) needs at most (\d+) steps", text)[1])
    c = curvature()
    C = dense(c)
    A = C + damping * torch.eye(len(C), dtype=torch.float64)
    condition = float(re.search(r"condition number of C \+ damping is at most (\S+)\. ", text)[1].replace(",", ""))
    assert float(torch.linalg.cond(A)) <= condition * 1.005
    b = torch.randn(4, len(C), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = wherefrom.CG(tolerance=None, steps=steps).fit(c, damping)(vectors.unflatten(b, c.problem.shapes))
    exact = torch.linalg.solve(A, b.T).T
    off = vectors.flatten({name: solution.x[name] for name in c.problem.shapes}) - exact
    assert bool((((off @ A) * off).sum(1) <= 1e-4 * ((exact @ A) * exact).sum(1)).all())


@pytest.mark.usefixtures("mine")
def test_the_sampling_error_is_that_of_the_worst_query():
    c = curvature()
    C, shapes = dense(c), c.problem.shapes
    damping = 0.05
    inverse = wherefrom.Neumann(batch=5).fit(c, damping)
    plan, bound = inverse.plan, spectrum.bound_sampling_error(inverse.plan, damping)
    values, directions = torch.linalg.eigh(C)
    b = torch.cat([directions.T, torch.randn(20, len(C), generator=torch.Generator().manual_seed(0)).double()])
    x = torch.linalg.solve(C + damping * torch.eye(len(C), dtype=torch.float64), b.T).T
    first = (1 - plan.step * damping) ** plan.steps * (b / damping - x).norm(dim=1) / x.norm(dim=1)
    noise = inverse.predicted(vectors.unflatten(b, shapes), vectors.unflatten(x, shapes)) - first
    assert bool((noise <= bound).all())
    top = float(values[-1])
    assert float(noise[len(C) - 1]) == pytest.approx(bound * (top / (plan.nu - damping)) ** 0.5, rel=1e-6)
    assert spectrum.bound_sampling_error(dataclasses.replace(plan, batch=0), damping) == 0


def made(largest: float, trace: float, constant: float = 1.0, examples: int = 100) -> wherefrom.Spectrum:
    e = wherefrom.curvature.lanczos.Estimate
    return wherefrom.Spectrum(
        e(trace, 0.0), e(1.0, 0.0), e(largest, 0.0), 0.0, largest, e(1.0, 0.0), e(constant, 0.1), examples, 50, 32
    )


def test_the_readings_follow_the_spectrum():
    few = " ".join(spectrum.interpret(made(1.0, 4.0), 0.1, True))
    assert "the sampling error of its minibatches" in few and "usual 2" not in few and "accepts" not in few
    noisy = made(1.0, 4.0, constant=5.0)
    assert "c = 5, was measured to need c = 5 ± 0.1" in " ".join(spectrum.interpret(noisy, 0.1, True))
    assert "more than the usual 2" in " ".join(spectrum.interpret(noisy, 0.1, True))
    flat = made(1.0, 90.0)
    assert "takes all of it at every step" in " ".join(spectrum.interpret(flat, 0.1, True))
    assert row("\n".join(spectrum.tabulate_plan(flat, 0.1, True)))["batch size"] == "100"
    assert row("\n".join(spectrum.tabulate_plan(flat, 0.1, True)))["sampling error / |x|"] == "at most 0"
    assert "more than the 50,000 steps that Neumann() accepts" in " ".join(
        spectrum.interpret(made(1e5, 1e6), 0.1, True)
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["mine"], "the target must be module:function, got 'mine'. .*For example: wherefrom.tools.demo:problem."),
        (["mine.py:problem"], "mine.py cannot be imported. ModuleNotFoundError: No module named 'mine.py'"),
        (["./mine:problem"], "the target must be module:function"),
        (["mine:"], "the target must be module:function"),
        (
            ["missing:problem"],
            "ModuleNotFoundError: No module named 'missing'. Run wherefrom in the folder that holds miss",
        ),
        (
            ["broken:problem"],
            "ModuleNotFoundError: No module named 'not_there'. python -c \"import broken\" shows where",
        ),
        (["unclosed:problem"], r"unclosed cannot be imported. SyntaxError: .*unclosed.py, line 1"),
        (["mine:nope"], "a function of mine, got 'nope'. The functions there: problem, asked, two, .*, gone.$"),
        (["mine:number"], "a function of mine, got 'number'"),
        (["mine:needy"], r"mine:needy must be callable without arguments, got needy\(count, \*rest, flag=True\). Give"),
        (
            ["mine:two"],
            r"What mine:two returns must be \(model, task, train\), .*, got \(Sequential, Classification\).",
        ),
        (["mine:nothing"], r"What mine:nothing returns must be .*, got NoneType."),
        (["mine:wrong_model"], "model must be a torch.nn.Module, got str"),
        (["mine:unpaired"], "60.*59|59.*60"),
        (["mine:gone"], "no weights.pt"),
        (["mine:problem", "--damping", "0"], "damping must be a positive finite number, got 0.0."),
        (["mine:problem", "--parameters", "("], r"parameters must be a regular expression, got '\('"),
        (["mine:problem", "--parameters", "xyz"], "parameters='xyz' selects none of the 4 trainable parameters"),
        (["mine:problem", "--batch-size", "0"], "batch_size must be a positive integer, got 0"),
    ],
)
def test_a_bad_target_is_one_line(mine, capsys, argv, said):
    (mine / "broken.py").write_text("import not_there\n")
    (mine / "unclosed.py").write_text("x = (\n")
    before = list(sys.path)
    assert cli.main(["spectrum", *argv]) == 2
    shown = capsys.readouterr()
    assert re.search(said, shown.err) and shown.err.startswith("wherefrom: ") and shown.err.count("\n") == 1
    assert "step size" not in shown.out and sys.path == before


@pytest.mark.parametrize("command", ["spectrum", "score"])
def test_a_bug_of_the_users_is_not_hidden(mine, command):
    (mine / "mine.py").write_text("def problem():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        cli.main([command, "mine:problem"])


def test_spectrum_as_a_program(mine, capsys):
    """With a script that lies elsewhere, as an installed one does: the current directory is not on its path."""
    (mine / "bin").mkdir()
    (mine / "bin" / "program.py").write_text(
        "import sys\nfrom wherefrom.tools.cli.main import main\nsys.exit(main())\n"
    )

    def program(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "bin/program.py", "spectrum", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = program("mine:problem", "--damping", "0.1")
    assert done.returncode == 0
    assert row(done.stdout) == row(measure(["mine:problem", "--damping", "0.1"], capsys))
    done = program("absent:problem")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("wherefrom: absent cannot be imported.") and done.stderr.count("\n") == 1


def test_spectrum_help_has_an_example(capsys):
    assert cli.main(["spectrum", "--help"]) == 0
    text = capsys.readouterr().out
    assert "wherefrom spectrum wherefrom.tools.demo:problem" in text and "(model, task, train)" in text
    options = ("--damping", "--curvature {ggn,hessian,fisher}", "--parameters", "--batch-size", "--seed")
    assert all(option in text for option in options)


def test_the_demo_gives_a_target(monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", dataclasses.replace(demo.RECIPE, epochs=1))
    target = loading.load("wherefrom.tools.demo:problem")
    assert isinstance(target.task, wherefrom.Classification)
    assert len(target.train[0]) == len(target.train[1]) == 1000 and len(target.queries[0]) == demo.QUERIES
    assert demo.measure_accuracy(target.model, target.queries) > 0.5
    assert target.shown("train")[0].kind == target.shown("queries")[0].kind == "image"


@pytest.mark.slow
def test_a_newcomer_can_measure_the_demo(capsys):
    text = measure(["wherefrom.tools.demo:problem"], capsys)
    assert "parameters D, examples N                   17,226, 1,000" in text
    assert row(text)["steps"] and 'solver="auto" would start with' in text
