"""What a machine can check of the files themselves, beyond what ruff, pyright and import-linter do."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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


def test_no_path_of_one_machine():
    files = tracked()
    assert ROOT / "pyproject.toml" in files or ROOT / "src/wherefrom/__init__.py" in files
    failures = [
        failure for path in files for failure in check_paths(path.relative_to(ROOT).as_posix(), path.read_bytes())
    ]
    assert not failures, "\n" + "\n".join(failures)


def test_paths_of_one_machine_fail():
    for top in ("work", "home", "tmp"):
        (failure,) = check_paths("a.md", f"fine\nsee {'/'.join(('', top, 'x.txt'))}".encode())
        assert failure.startswith("a.md:2: ")
    for fine in ("https://x.org/" + "home/x", "docs/" + "work/x", "./" + "tmp/x", "$ROOT/" + "tmp/x", "/usr/bin/env x"):
        assert not list(check_paths("a.md", fine.encode()))
