"""The page on the command line is true: its commands run, and print what it says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from wherefrom.tools.cli import config
from wherefrom.tools.cli import main as cli
from wherefrom.tools.cli.registry import COMMANDS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def masked(text: str) -> list[str]:
    """Lines without what differs from machine to machine: numbers, and the spaces that go with them."""
    return [" ".join(re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", line).split()) for line in text.splitlines()]


@pytest.mark.slow
def test_the_commands_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(blocks("python")[0], encoding="utf-8")
    Path("wherefrom.toml").write_text(blocks("toml")[0], encoding="utf-8")
    exec(compile(blocks("python")[0], "mine.py", "exec"), {"__name__": "mine"})  # flags.csv
    run = [block.partition("\n") for block in blocks("text") if "demo:problem" not in block]
    assert len(run) == 10
    for command, _, said in run:
        assert cli.main(shlex.split(command.removeprefix("$ wherefrom "))) == 0, command
        assert masked(capsys.readouterr().out) == masked(said), command


def test_the_page_knows_every_command_and_no_other_option():
    assert re.findall(r"^## `wherefrom (.*)`$", PAGE, re.MULTILINE) == list(COMMANDS)
    known = {f"--{name.replace('_', '-')}" for command in COMMANDS.values() for name, _ in config.list_options(command)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    assert named - known == {"--help", "--no-certify", "--no-relabel"}
