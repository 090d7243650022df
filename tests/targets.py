"""A user's module for the command line, and how tests run commands on it."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from interrupting import stopped as stopped
from wherefrom import store
from wherefrom.tools import loading
from wherefrom.tools.cli import main as cli

MINE = """
import functools
import torch
from torch import nn
import wherefrom
from wherefrom.tools.evaluate import SGDRecipe, retrain_small, train_small
from wherefrom.tools.loading import Target
from wherefrom.tools.report import Example

g = torch.Generator().manual_seed(1)
centres = torch.randn(3, 4, generator=g, dtype=torch.float64)
labels = torch.randint(3, (48,), generator=g)
inputs = centres[labels] + torch.randn(48, 4, generator=g, dtype=torch.float64)
x, y, xq, yq = inputs[:30], labels[:30], inputs[30:34], labels[30:34]
task, recipe = wherefrom.Classification(), SGDRecipe(lr=0.1, batch_size=10, epochs=4)

def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

def trained(seed=0):
    return train_small(build, task, (x, y), recipe, seed)[0]

def problem():
    return trained(), task, (x, y), (xq, yq)

def train(index, seed):
    torch.manual_seed(seed)
    model = build()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimiser.step()
    return model

def show(data, number):
    return Example(f"a {int(data[1][number])}", text=f"word{int(data[1][number])} and {number % 4}")

retrain = functools.partial(retrain_small, build, task, (x, y), (xq, yq), repeats=2, recipe=recipe, seed=0, paired=True)

def full(**more):
    rest = {"trusted": (inputs[34:40], labels[34:40]), "candidates": (inputs[40:], labels[40:]), "show": show}
    return Target(*problem(), **{**rest, "retrain": retrain, **more})

def one_at_a_time():
    return full(retrain=train)

def recorded():
    torch.manual_seed(0)
    model = build()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    import tempfile
    folder = tempfile.mkdtemp(dir=".")  # its checkpoints are read when they are needed
    with wherefrom.Recorder(folder, model, optimiser, every=2) as recorder:
        for _ in range(6):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    return Target(model, task, (x, y), (xq, yq), trajectory=folder)

def several():
    return [trained(seed) for seed in range(3)], task, (x, y), (xq, yq)

def unasked():
    return problem()[:3]
"""


def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module in the current directory."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file edited within a second would look unchanged
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def load(name: str = "problem") -> loading.Target:
    with loading.import_from_here():
        return loading.load(f"mine:{name}")


def run(line: str, *more: str, code: int = 0) -> None:
    assert cli.main([*line.split(), *more]) == code


def refused(capsys, said: str, line: str, *more: str) -> None:
    capsys.readouterr()
    assert cli.main([*line.split(), *more]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.startswith("wherefrom: ") and err.count("\n") == 1


def table(path: str) -> dict[str, list[str]]:
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    return {name: [row[i] for row in rows] for i, name in enumerate(head)}


def whole(folder: Path) -> list[str]:
    """The names of all files below, every one of which is complete."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in found:
        assert ".part" not in path.name
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kind = json.loads(file.metadata()["wherefrom"])["kind"]
            store.load(path, kind)
    return [path.relative_to(folder).as_posix() for path in found]
