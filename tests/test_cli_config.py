"""Configuration files, and expressions in them."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Literal

import pytest

import wherefrom
from wherefrom.errors import InputError
from wherefrom.tools.cli import config
from wherefrom.tools.cli import main as cli
from wherefrom.tools.cli.expressions import NAMES, bind_arguments, read_expression
from wherefrom.tools.cli.options import Attributed
from wherefrom.tools.cli.registry import COMMANDS

# --- expressions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.01", 0.01),
        (" -2 ", -2),
        ("CG()", wherefrom.CG()),
        ("wherefrom.CG(preconditioner=wherefrom.EKFAC(), tolerance=0.01)", wherefrom.CG(wherefrom.EKFAC(), 0.01)),
        (
            "CG(Nystrom(rank=7, seed=3), tolerance=None, block=True)",
            wherefrom.CG(wherefrom.Nystrom(7, 3), None, block=True),
        ),
        ("ASTRA(momentum=.8, start='zero')", wherefrom.ASTRA(momentum=0.8, start="zero")),
        ("relative(0.2)", wherefrom.Damping.relative(0.2)),
        ("Damping.per_example()", wherefrom.Damping.per_example()),
        ("wherefrom.Damping.absolute(3)", wherefrom.Damping.absolute(3)),
        (
            "from_training(lr=[0.1, 0.3], steps=300, momentum=0.9)",
            wherefrom.Damping.from_training([0.1, 0.3], 300, 0.9),
        ),
        ("by_parameter({'w': 0.1})", wherefrom.Damping.by_parameter({"w": 0.1})),
        ("GGN", wherefrom.GGN),
    ],
)
def test_an_expression_is_what_python_makes_of_it(text, value):
    assert read_expression("solver", text, "CG()") == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CG(", r"solver must be written as in Python, such as CG\(\), got 'CG\('"),
        ("", "written as in Python"),
        ("CG()\nCG()", "written as in Python"),
        ("CGG()", "solver: there is no CGG. Do you mean CG?"),
        ("ekfac()", "Do you mean EKFAC?"),
        ("xyzzy()", "there is no xyzzy. There are: ASTRA, CG, "),
        ("CG(tolerence=0.1)", "CG has no argument tolerence. Do you mean tolerance?"),
        ("CG(qqq=1)", "CG has no argument qqq. There are: preconditioner, tolerance, "),
        ("CG(**{'steps': 3})", r"no argument \*\*"),
        ("CG(*[1])", "literals"),
        ("CG(1, 2, 3, 4, 5, 6, 7)", "one that CG accepts, got CG.1, 2, 3, 4, 5, 6, 7.. .*positional arguments"),
        ("CG(tolerance='x')", "one that CG accepts"),
        ("CG(EKFAC)", "preconditioner must be an instance"),
        ("relative('x')", "one that relative accepts"),
        ("relative(-1)", "damping must be a positive finite number, got -1.0"),
        ("__import__('os').system('touch x')", "there is no __import__"),
        ("os.system('touch x')", "there is no os.system"),
        ("CG.__class__()", "there is no CG.__class__"),
        ("[CG() for _ in range(3)]", "calls of the library's names and literals"),
        ("CG(tolerance=0.1 * 3)", "calls of the library's names and literals, got 0.1 . 3"),
        ("lambda: 1", "literals"),
        ("open", "there is no open"),
    ],
)
def test_anything_else_is_refused_and_not_run(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        read_expression("solver", text, "CG()")
    assert not list(tmp_path.iterdir())


def test_what_an_expression_leaves_out_can_be_given():
    names = bind_arguments(NAMES, seed=5)
    assert read_expression("solver", "CG(Nystrom(3))", "", names) == wherefrom.CG(wherefrom.Nystrom(3, seed=5))
    assert read_expression("solver", "Nystrom(3, seed=2)", "", names) == wherefrom.Nystrom(3, 2)


def test_options_become_a_method():
    found = Attributed("m:f", solver="CG()", damping="relative(0.5)", curvature="fisher", seed=3, batch_size=2)
    method = found.parse_method()
    assert isinstance(method, wherefrom.Influence)
    assert method.solver == wherefrom.CG() and method.damping == wherefrom.Damping.relative(0.5) and method.seed == 3
    assert method.curvature is wherefrom.EmpiricalFisher and method.batch_size == 2
    assert Attributed("m:f").parse_method().solver == "auto"
    found = Attributed("m:f", method="SOURCE(segments=2, solver=ASTRA())", parameters="w", seed=3).parse_method()
    assert (
        found.segments == 2
        and found.solver == wherefrom.ASTRA(wherefrom.EKFAC(seed=3), seed=3)
        and found.parameters == "w"
    )
    for more in ({"solver": "CG()"}, {"damping": 0.1}, {"curvature": "hessian"}):
        with pytest.raises(InputError, match=f"{next(iter(more))} must be left out where a method is given"):
            Attributed("m:f", method="TRAK()", **more).parse_method()
    with pytest.raises(InputError, match="method must be a method such as"):
        Attributed("m:f", method="CG()").parse_method()


# --- files ----------------------------------------------------------------------------------------------------------


def one(
    options: Annotated[Attributed, "flat"] = Attributed("none"),
    *,
    k: int = 5,
    kind: Literal["a", "b"] = "a",
    many: tuple[float, ...] = (),
    flag: bool = True,
) -> tuple:
    """One."""
    return options, k, kind, many, flag


def two(*, k: int = 7, size: float = 0.5, config: str | None = None) -> tuple:
    """Two."""
    return k, size


def configured(tmp_path, text: str):
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    commands = {"one": one, "two": two}
    return {name: config.configure(commands, name, tmp_path / "c.toml") for name in commands}


def test_a_file_gives_the_defaults_of_all_commands(tmp_path):
    commands = configured(
        tmp_path, 'k = 3\ndamping = 2\nkind = "b"\nmany = [1, 2.5]\nflag = false\ntarget = "m:f"\nsize = 4\n'
    )
    assert commands["one"]() == (Attributed("m:f", damping=2), 3, "b", (1, 2.5), False)
    assert commands["one"](k=9)[1] == 9
    assert commands["two"]() == (3, 4)
    assert commands["one"].__doc__ == "One."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tagret = 'm:f'", "c.toml: no command has an option 'tagret'. Do you mean target?"),
        ("batch-size = 3", "'batch-size'. Do you mean batch_size?"),
        ("zzz = 3", "no command has an option 'zzz'. There are: hf, dataset"),
        ("config = 'x'", "no command has an option 'config'"),
        ("k = 'x'", "c.toml: k must be int, got 'x'"),
        ("k = true", "k must be int, got True"),
        ("k = 1.5", "k must be int, got 1.5"),
        ("seed = []", r"seed must be int, got \[\]"),
        ("damping = true", "damping must be float or str, got True"),
        ("kind = 'c'", "kind must be a or b, got 'c'"),
        ("many = 3", "many must be a list of float, got 3"),
        ("prompt = 'x'", "prompt must be a list of str, got 'x'"),
        ("many = ['x']", "many must be a list of float"),
        ("flag = 1", "flag must be bool, got 1"),
        ("k = ", "c.toml must be a TOML file, got this: "),
        ("[k]\nx = 1", "k must be int, got {'x': 1}"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        configured(tmp_path, text)


def test_what_is_written_is_read(tmp_path):
    values = {
        "target": 'm:f"\\ \n\t\x7f ü 😀',
        "damping": 1e-05,
        "seed": -3,
        "flag": False,
        "many": (1.0, 1e300, 0.1),
        "names": ("a", "b"),
        "nothing": None,
    }
    config.write(tmp_path / "new" / "c.toml", values, {"command": "score", "a b.c": 'x"', "n": {"x": 1}})
    found = config.read(tmp_path / "new" / "c.toml")
    assert found == {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.toml"]


# --- every command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"For example: wherefrom {command} ", text)
    example = re.search(r"For example: wherefrom (.*)", COMMANDS[command].__doc__)[1]
    parsed = cli.parse_arguments(COMMANDS, shlex.split(example))
    assert parsed.func is COMMANDS[command]


def test_an_option_means_the_same_in_every_command():
    kinds: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for name, kind in config.list_options(command):
            kinds.setdefault(name, set()).add(getattr(kind, "__name__", str(kind)).removesuffix(" | None"))
    assert [name for name, found in kinds.items() if len(found) > 1] == ["scores"]  # of top, one file
