"""The house rules that a machine can check, read from the source; each check is tried on a bad snippet too."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# An import may only point to a room further up this list. "" is whence/__init__.py: what stands above it is the
# library, what stands below uses it as a user would.
ROOMS = (
    "errors",
    "version",
    "vectors",
    "parallel",
    "progress",
    "disk",
    "surroundings",
    "batches",
    "columns",
    "samplers",
    "collation",
    "data",
    "contract",
    "store",
    "tables",
    "models",
    "trajectory",
    "task",
    "factored",
    "rows",
    "layers",
    "gradients",
    "lowrank",
    "layout",
    "trace",
    "verify",
    "problem",
    "curvature",
    "damping",
    "solvers",
    "attribution",
    "evaluate",
    "act",
    "report",
    "hf",
    "",
    "demo",
    "loading",
    "commands",
    "cli",
    "testing",
)


@dataclass(frozen=True)
class Source:
    """One module: its dotted name under whence ("solvers.cg"; a package's own file is "solvers", the top one "")."""

    path: str
    module: str
    package: bool
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.module.split(".")[0]

    def at(self, line: int, message: str) -> str:
        return f"{self.path}:{line}: {message}"


def source(path: str, text: str) -> Source:
    parts = Path(path).relative_to("src/whence").with_suffix("").parts
    package = parts[-1] == "__init__"
    return Source(path, ".".join(parts[:-1] if package else parts), package, text, ast.parse(text))


def sources() -> list[Source]:
    paths = sorted((ROOT / "src" / "whence").rglob("*.py"))
    return [source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


# --- checks over all modules ----------------------------------------------------------------------------------------


def imports(module: Source, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module under whence) of each import of whence, wherever it stands in the file."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["whence", *filter(None, module.module.split("."))]
            kept = here[: len(here) + module.package - node.level] if node.level else []
            base = ".".join([*kept, *filter(None, [node.module])])
            dotted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            if name != "whence" and not name.startswith("whence."):
                continue
            inner = name.removeprefix("whence").removeprefix(".")
            while inner and inner not in known:  # `from whence.curvature import GGN` names the package, not a module
                inner = inner.rpartition(".")[0]
            yield node.lineno, inner


def check_imports(modules: Iterable[Source]) -> Iterator[str]:
    modules = list(modules)
    known = {module.module for module in modules}
    graph: dict[str, dict[str, int]] = {}  # within one room: module -> what it imports, and where
    for module in modules:
        if module.room not in ROOMS:
            yield module.at(1, f"room {module.room!r} is not in ROOMS of tests/test_style.py; put it where it belongs.")
            continue
        for line, target in imports(module, known):
            room = target.split(".")[0]
            if target == module.module:
                continue
            if room == module.room:
                graph.setdefault(module.module, {}).setdefault(target, line)
                if module.module.endswith(".base"):
                    yield module.at(line, f"base imports its sibling {target}; move what is shared into base.")
            elif room in ROOMS and ROOMS.index(room) > ROOMS.index(module.room):
                yield module.at(
                    line,
                    f"{module.module or 'whence'} imports {target or 'whence'}, a room further down; "
                    "move the shared part up, or pass it in as an argument.",
                )
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1][::-1]  # each module imports the next
        first = next(module for module in modules if module.module == cycle[0])
        yield first.at(graph[cycle[0]][cycle[1]], f"import cycle {' -> '.join(cycle)}; move the shared part into base.")


def is_contract(node: ast.ClassDef) -> bool:
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return any(ast.unparse(base).rpartition(".")[2] in ("Protocol", "ABC") for base in bases)


def check_docstrings(modules: Iterable[Source]) -> Iterator[str]:
    """Public functions, classes and methods; a method of a contract is documented once, there."""
    modules = list(modules)
    classes = [node for module in modules for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    contract = {
        method.name
        for node in filter(is_contract, classes)
        for method in functions(node.body)
        if ast.get_docstring(method)
    }
    for module in modules:
        for node in module.tree.body:
            if not isinstance(node, Definition) or node.name.startswith("_"):
                continue
            inner = functions(node.body) if isinstance(node, ast.ClassDef) else []
            methods = [method for method in inner if not method.name.startswith("_") and method.name not in contract]
            for item in (node, *methods):
                if not ast.get_docstring(item) and not decorated(item, "overload", "setter", "deleter"):
                    yield module.at(item.lineno, f"public {item.name} has no docstring; give shapes, units and errors.")


# --- checks of one module -------------------------------------------------------------------------------------------

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = (*Function, ast.ClassDef)


def functions(body: Iterable[ast.stmt]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in body if isinstance(node, Function)]


def decorated(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, *names: str) -> bool:
    return any(ast.unparse(item).rpartition(".")[2] in names for item in node.decorator_list)


def check_reexports(module: Source) -> Iterator[str]:
    if not module.package:
        return
    for node in module.tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(ast.unparse(target).startswith("__") for target in node.targets)
        if not (docstring or dunder or isinstance(node, (ast.Import, ast.ImportFrom))):
            yield module.at(node.lineno, "an __init__.py only re-exports; move this into a module of its own.")


def check_prints(module: Source) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and module.module != "cli":
            yield module.at(node.lineno, "print outside the command line; return the text, or warn.")


def check_asserts(module: Source) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert):
            yield module.at(node.lineno, "assert vanishes under python -O; raise an error of whence.errors.")


def check_exceptions(module: Source) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(item is None or ast.unparse(item) in ("Exception", "BaseException") for item in caught):
                yield module.at(node.lineno, "a bare except hides bugs; name the exceptions, or use try ... finally.")
        elif isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) in ("Exception", "BaseException"):
                yield module.at(node.lineno, "raise of a bare Exception; raise an error of whence.errors.")


def check_length(module: Source) -> Iterator[str]:
    lines = module.text.count("\n")
    if lines > MAX_LINES:
        yield module.at(lines, f"{lines} lines, more than {MAX_LINES}; is it still one idea? Split it.")


def is_stub(body: list[ast.stmt]) -> bool:
    """Whether a function only declares: a docstring, ``...``, ``pass`` or a raise."""
    return all(
        isinstance(node, (ast.Pass, ast.Raise)) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in body
    )


def check_arguments(module: Source) -> Iterator[str]:
    """A signature that a contract imposes says so on the argument's line: ``# unused: name, name``."""
    lines = module.text.splitlines()
    for node in ast.walk(module.tree):
        if not isinstance(node, Function) or is_stub(node.body) or decorated(node, "overload", "abstractmethod"):
            continue
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
        used = {
            name.id
            for statement in node.body
            for name in ast.walk(statement)
            if isinstance(name, ast.Name) and not isinstance(name.ctx, ast.Store)
        }
        for line in lines[node.lineno - 1 : node.body[0].lineno]:
            used.update(re.findall(r"\w+", line.partition("# unused:")[2]))
        for argument in arguments:
            name = argument.arg
            if name not in used and name not in ("self", "cls") and not name.startswith("_"):
                yield module.at(
                    argument.lineno,
                    f"{node.name} accepts {name} and never uses it; drop it, use it, or, where a contract wants it, "
                    f"say '# unused: {name}' on this line.",
                )


EACH = (check_reexports, check_prints, check_asserts, check_exceptions, check_length, check_arguments)
ALL = (check_imports, check_docstrings)


# --- checks of every tracked file -----------------------------------------------------------------------------------

# Written so that this file does not match itself.
MACHINE = re.compile(r"(?<![\w.~$})<>-])/(?:" + "|".join(("work", "home", "root", "tmp", "mnt", "Users")) + r")/\w")


def tracked() -> list[Path]:
    """Every file that is, or could be, committed. Outside a git checkout: those of the package and its tests."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        warnings.warn("not a git checkout: only src, tests and docs are read", stacklevel=2)
        return [path for top in ("src", "tests", "docs") for path in (ROOT / top).rglob("*.*") if path.is_file()]
    return [ROOT / name for name in sorted(set(listed)) if name and (ROOT / name).is_file()]


def check_paths(path: str, content: bytes) -> Iterator[str]:
    if b"\0" in content:
        return
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        if found := MACHINE.search(line):
            text = line[found.start() :].split()[0][:60]
            yield f"{path}:{number}: {text} is a path of one machine; make it relative, or an argument."


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", EACH)
def test_every_module(check):
    modules = sources()
    assert modules, "no source found under src/whence"
    failures = [failure for module in modules for failure in check(module)]
    assert not failures, "\n" + "\n".join(failures)


@pytest.mark.parametrize("check", ALL)
def test_the_modules_together(check):
    failures = list(check(sources()))
    assert not failures, "\n" + "\n".join(failures)


def test_no_path_of_one_machine():
    files = tracked()
    assert ROOT / "pyproject.toml" in files or ROOT / "src/whence/__init__.py" in files
    failures = [
        failure for path in files for failure in check_paths(path.relative_to(ROOT).as_posix(), path.read_bytes())
    ]
    assert not failures, "\n" + "\n".join(failures)


BAD = [
    (check_reexports, "__init__.py", "from whence.task import Task\ndef attribute():\n    'A.'", 2),
    (check_reexports, "solvers/__init__.py", "class CG:\n    'A.'", 1),
    (check_prints, "demo.py", "def f():\n    print(1)", 2),
    (check_asserts, "task.py", "x = 1\nassert x", 2),
    (check_exceptions, "task.py", "try:\n    pass\nexcept:\n    pass", 3),
    (check_exceptions, "task.py", "try:\n    pass\nexcept Exception as e:\n    raise", 3),
    (check_exceptions, "task.py", "try:\n    pass\nexcept (ValueError, BaseException):\n    pass", 3),
    (check_exceptions, "task.py", "raise Exception('no')", 1),
    (check_length, "task.py", "x = 1\n" * (MAX_LINES + 1), MAX_LINES + 1),
    (check_arguments, "task.py", "def f(x, y):\n    return x", 1),
    (check_arguments, "task.py", "def f(x, **options):\n    return x", 1),
    (check_arguments, "task.py", "class A:\n    def f(self, *, rng=None):\n        rng = 1", 2),
    (check_arguments, "task.py", "def f(x):\n    def g(y):\n        return x\n    return g", 2),
]
GOOD = [
    (check_reexports, "__init__.py", "'A.'\nfrom whence.task import Task\n__all__ = ['Task']\n__version__ = '1'"),
    (check_reexports, "task.py", "def f():\n    'A.'"),
    (check_prints, "cli.py", "print(1)"),
    (check_prints, "task.py", "pprint(1); table.print()"),
    (check_exceptions, "task.py", "try:\n    pass\nexcept (OSError, ValueError):\n    raise\nraise WhenceError('no')"),
    (check_length, "task.py", "x = 1\n" * MAX_LINES),
    (check_arguments, "task.py", "class A:\n    def f(self, x, _y):\n        return lambda: x"),
    (check_arguments, "task.py", "def f(x):\n    'A.'\n    ...\ndef g(x):\n    raise NotImplementedError(1)"),
    (check_arguments, "task.py", "def f(x, y):  # unused: y\n    return x\ndef g(\n    x,  # unused: x\n): return 1"),
]


@pytest.mark.parametrize(("check", "path", "text", "line"), BAD)
def test_a_check_of_one_module_fails_on_bad_code(check, path, text, line):
    (failure, *_) = check(source(f"src/whence/{path}", text))
    assert failure.startswith(f"src/whence/{path}:{line}: ")


@pytest.mark.parametrize(("check", "path", "text"), GOOD)
def test_a_check_of_one_module_passes_good_code(check, path, text):
    assert not list(check(source(f"src/whence/{path}", text)))


def house(files: dict[str, str]) -> list[Source]:
    """Modules from their text, with the __init__.py of every package."""
    packages = {f"{path.rpartition('/')[0]}/__init__".removeprefix("/"): "" for path in files}
    return [source(f"src/whence/{path}.py", text) for path, text in (packages | files).items()]


@pytest.mark.parametrize(
    ("files", "where", "what"),
    [
        ({"task": "", "data": "\nfrom whence.task import Task"}, "data.py:2", "further down"),
        ({"solvers/cg": "", "curvature/ggn": "from whence.solvers import CG"}, "curvature/ggn.py:1", "further down"),
        ({"solvers/cg": "", "task": "def f():\n    import whence.solvers"}, "task.py:2", "further down"),
        ({"data": "from . import layers", "layers": ""}, "data.py:1", "imports layers"),
        ({"curvature/ggn": "from ..solvers.cg import CG", "solvers/cg": ""}, "curvature/ggn.py:1", "solvers.cg"),
        ({"task": "import whence"}, "task.py:1", "imports whence"),
        ({"__init__": "from whence.cli import main", "cli": ""}, "__init__.py:1", "imports cli"),
        ({"solvers/base": "from whence.solvers.cg import CG", "solvers/cg": ""}, "base.py:1", "base imports"),
        ({"solvers/cg": "from .dual import D", "solvers/dual": "from .cg import C"}, ".py:1", "import cycle"),
        ({"solvers/__init__": "from .cg import C", "solvers/cg": "from whence.solvers import D"}, ".py:1", "cycle"),
        ({"misc": ""}, "misc.py:1", "not in ROOMS"),
    ],
)
def test_imports_that_point_down_fail(files, where, what):
    (failure,) = check_imports(house(files))
    assert where in failure and what in failure


def test_imports_that_point_up_pass():
    files = {
        "errors": "import torch",
        "task": "from whence.errors import WhenceError\nimport whencever",
        "curvature/base": "from whence import task",
        "curvature/ggn": "from .base import Curvature\nfrom ..task import Task",
        "solvers/cg": "from whence.curvature import GGN\nfrom whence.curvature.base import Curvature",
        "solvers/__init__": "from whence.solvers.cg import CG",
        "__init__": "from whence.solvers import CG",
        "demo": "import whence",
    }
    assert not list(check_imports(house(files)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def f():\n    return 1", 1),
        ("@dataclass\nclass A:\n    x: int", 2),
        ("class A:\n    'A.'\n    @property\n    def x(self):\n        return 1", 4),
        ("class A(Protocol):\n    'A.'\n    def fit(self): ...", 3),
    ],
)
def test_missing_docstrings_fail(text, line):
    (failure,) = check_docstrings([source("src/whence/task.py", text)])
    assert failure.startswith(f"src/whence/task.py:{line}: ")


def test_a_contract_documents_the_methods_of_all_who_follow_it():
    contract = source(
        "src/whence/solvers/base.py", "class Solver(Protocol[T]):\n    'A.'\n    def fit(self):\n        'B.'"
    )
    method = source(
        "src/whence/solvers/cg.py", "class CG:\n    'A.'\n    def fit(self):\n        return 1\ndef _f(): pass"
    )
    assert not list(check_docstrings([contract, method]))
    assert len(list(check_docstrings([method]))) == 1


def test_paths_of_one_machine_fail():
    for top in ("work", "home", "tmp"):
        (failure,) = check_paths("a.md", f"fine\nsee {'/'.join(('', top, 'x.txt'))}".encode())
        assert failure.startswith("a.md:2: ")
    for fine in ("https://x.org/" + "home/x", "docs/" + "work/x", "./" + "tmp/x", "$ROOT/" + "tmp/x", "/usr/bin/env x"):
        assert not list(check_paths("a.md", fine.encode()))
