"""Retraining that is resumed, paired or refused, and what kept runs are known by."""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from wherefrom.errors import ArtefactError, DivergenceError
from wherefrom.model.task import Classification
from wherefrom.tools.evaluate import SGDRecipe, random_subsets, retrain, retrain_small, run_seed, train_small
from wherefrom.tools.evaluate.ingredients import ingredients

N, Q = 40, 7
DATA = torch.randn(N + Q, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TRAIN, QUERIES = (DATA[:N], DATA[:N, :3].argmax(1)), (DATA[N:], DATA[N:, :3].argmax(1))
RECIPE = SGDRecipe(lr=0.1, momentum=0.9, batch_size=8, epochs=2)
MASKS = random_subsets(N, 4, 0.5, 0)


def builder(width=6, activation=nn.Tanh, calls=None, stop=None):
    """A function that builds a model, and is interrupted at one of its calls."""

    def build():
        if calls is not None and next(calls) == stop:
            raise KeyboardInterrupt
        return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 3)).double()

    return build


def small(build, masks=MASKS, folder=None, recipe=RECIPE, task=None, train=TRAIN, queries=QUERIES, **options):
    settings = {"repeats": 3, "seed": 5, "chunk": 2} | options
    return retrain_small(
        build, task or Classification(), train, queries, masks, recipe=recipe, folder=folder, **settings
    )


# --- resuming ---


def test_a_killed_retraining_resumes_and_trains_nothing_twice(tmp_path):
    want = small(builder())
    calls = itertools.count()  # known by its type alone, so the function is the same whatever it has counted
    with pytest.raises(KeyboardInterrupt):
        small(builder(calls=calls, stop=7), folder=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3 and next(calls) == 8  # three chunks of two are done, the fourth was begun
    (tmp_path / f".{kept[0].name}.1.part").write_bytes(b"cut short")  # what a kill while writing leaves
    # The next counts begin at 9, so that nothing stops it; the functions differ in `stop`, which is refused.
    with pytest.raises(ArtefactError, match=r"model\.stop \(model\.stop: file '7', now 'None'\)"):
        small(builder(calls=calls), folder=tmp_path)
    again = small(builder(calls=calls, stop=7), folder=tmp_path)
    assert next(calls) == 9 + 6  # the six runs that were left
    assert torch.equal(again, want)
    for _ in range(2):  # all is there: nothing is trained
        assert torch.equal(small(builder(calls=calls, stop=7), folder=tmp_path), want)
    assert next(calls) == 16


def test_a_killed_retraining_by_the_users_function_resumes(tmp_path):
    calls, trained = itertools.count(), itertools.count()

    def train(rows, seed):
        if next(calls) == 5:
            raise KeyboardInterrupt
        next(trained)
        return train_small(builder(), Classification(), TRAIN, RECIPE, seed, mask(rows))[0]

    def measure(model):
        return Classification().measurement(model(QUERIES[0]), QUERIES)

    run = functools.partial(retrain, train, measure, repeats=3, seed=5)
    with pytest.raises(KeyboardInterrupt):
        run(MASKS, folder=tmp_path)
    got = run(MASKS, folder=tmp_path)
    assert next(trained) == 12  # four subsets with three repeats, each once
    torch.testing.assert_close(got, small(builder()), rtol=0, atol=1e-10)
    more = run(torch.cat([MASKS, random_subsets(N, 2, 0.3, 1)]), folder=tmp_path)
    assert next(trained) == 13 + 6 and torch.equal(more[:4], got)  # only the new subsets
    run(MASKS, folder=tmp_path, repeats=4)
    assert next(trained) == 20 + 4  # only the new repeats


def mask(rows):
    return torch.isin(torch.arange(N), rows)[None]


def test_a_folder_is_refused_by_name_of_what_differs(tmp_path):
    small(builder(), folder=tmp_path)
    shifted = (TRAIN[0] + 1, TRAIN[1])
    for name, change in {
        "recipe.lr": {"recipe": SGDRecipe(lr=0.2, momentum=0.9, batch_size=8, epochs=2)},
        "task.ignore_index": {"task": Classification(ignore_index=-1)},
        "train.0": {"train": shifted},
        "queries.1": {"queries": (QUERIES[0], QUERIES[1].flip(0))},
        "model.width": {"build": builder(width=7)},
        "model.activation": {"build": builder(activation=nn.GELU)},
    }.items():
        with pytest.raises(ArtefactError, match=f"was made for another {name} .*another folder"):
            small(**({"build": builder(), "folder": tmp_path} | change))
    with pytest.raises(ArtefactError, match="made for another model"):
        small(lambda: nn.Linear(4, 3).double(), folder=tmp_path)
    with pytest.raises(ArtefactError, match="made for another"):
        retrain(lambda rows, seed: nn.Linear(4, 3), lambda net: torch.zeros(Q), MASKS, 1, 0, folder=tmp_path)
    config = {"bias": True, "dtype": torch.float64}
    small(lambda: nn.Linear(4, 3, **config), folder=tmp_path / "other")
    del config["bias"]
    with pytest.raises(ArtefactError, match=r"another model\.config\.bias .*file 'True', now None"):
        small(lambda: nn.Linear(4, 3, **config), folder=tmp_path / "other")
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="cut short.*deleting a file only costs its runs"):
        small(builder(), folder=tmp_path)
    path.unlink()
    assert torch.equal(small(builder(), folder=tmp_path), small(builder()))


def test_what_diverged_is_not_kept(tmp_path):
    outcomes = itertools.cycle([torch.zeros(2), torch.full((2,), torch.inf)])

    def measure(model):
        return next(outcomes)

    with pytest.raises(DivergenceError, match="subset 0, repeat 1"):
        retrain(lambda rows, seed: nn.Linear(1, 1), measure, MASKS, 2, seed=0, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


# --- pairing ---


def test_paired_runs_share_seeds_and_equal_ones_are_trained_once():
    seeds = []

    def train(rows, seed):
        seeds.append(seed)
        model = nn.Linear(1, 1).double()
        nn.init.constant_(model.bias, len(rows))
        return model

    def measure(model):
        return torch.cat([model.weight.flatten(), model.bias])

    masks = torch.cat([MASKS[:2], MASKS[:1]])
    got = retrain(train, measure, masks, 2, seed=3, paired=True)
    assert seeds == [run_seed(3, 0, r) for _ in range(2) for r in range(2)]  # the third subset is the first
    assert torch.equal(got[0], got[2]) and torch.equal(got[0, :, 0], got[1, :, 0])  # equal initial weights
    assert got[0, 0, 0] != got[0, 1, 0]
    retrain(train, measure, masks, 2, seed=3)
    assert len(set(seeds[4:])) == 6  # not paired: all are different


def test_pairing_keeps_the_order_of_shared_examples_and_takes_noise_out_of_differences():
    masks = torch.ones(7, N, dtype=torch.bool)
    masks[torch.arange(1, 7), torch.arange(6)] = False  # leave out one example at a time
    recipe, spread = SGDRecipe(lr=0.1, momentum=0.9, batch_size=8, epochs=4, drop_last=False), {}
    for paired in (True, False):
        f = small(builder(), masks, repeats=8, paired=paired, chunk=28, recipe=recipe)
        spread[paired] = (f[1:] - f[:1]).std(1).mean()
    assert spread[True] < spread[False] / 6


# --- what things are made of ---

RATE = 0.1


@dataclass
class Settings:
    lr: float = 0.1


class Net:
    def __init__(self, depth=2):
        self.depth = depth

    def forward(self, x):
        return x * self.depth


def uses_rate(x):
    """A docstring."""
    return [RATE * y for y in x]


def same_code(x):
    """Another docstring."""  # and a comment

    return [RATE * y for y in x]


def other_code(x):
    return [2 * RATE * y for y in x]


def test_ingredients_of_functions(monkeypatch):
    made = ingredients(f=uses_rate)
    assert made["f.RATE"] == "0.1" and ingredients(f=same_code) == made
    assert ingredients(f=other_code) != made
    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.2)  # read within a comprehension
    changed = ingredients(f=uses_rate)
    assert {k for k in made if made[k] != changed[k]} == {"f.RATE"}
    partial = ingredients(f=functools.partial(uses_rate, x=[1.0]))
    assert partial["f.func.RATE"] == "0.2" and partial["f.x.0"] == "1.0"
    assert ingredients(f=lambda x, k=3: x)["f.0"] == "3"
    assert ingredients(f=torch.optim.SGD) == {"f": "torch.optim.sgd.SGD"}
    calls_method = ingredients(f=Net().forward)
    assert calls_method["f.self.depth"] == "2" and "f.func.0" not in calls_method


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(3), torch.zeros(3, 1)),
        (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-30])),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
        (np.arange(3), np.arange(3.0)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        ({"lr": 0.1}, {"lr": 0.1, "wd": 0.0}),
        ({"lr": 0.1, "wd": 0.0}, {"lr": 0.1}),
        ([1, 2], [2, 1]),
        (list(range(100)), [*range(99), 0]),
        ({"a", "b"}, {"a", "c"}),
        ("x" * 100, "x" * 99 + "y"),
        (Settings(), Settings(0.2)),
        (Settings, Net),
        (argparse.Namespace(lr=1), argparse.Namespace(lr=2)),
        (Net(2), Net(3)),
        (nn.Dropout(0.1), nn.Dropout(0.2)),
        (TensorDataset(torch.zeros(2)), TensorDataset(torch.ones(2))),
        (uses_rate, other_code),
        (lambda: Net(2), lambda: Net(3)),
    ],
)
def test_ingredients_tell_things_apart(one, other):
    def differing(a, b):
        a, b = ingredients(a=a), ingredients(a=b)
        return {key for key in {**a, **b} if a.get(key) != b.get(key)}

    assert differing(one, other) and not differing(one, one)
    assert all(len(text) < 100 for text in ingredients(a=one).values()) and len(ingredients(a=one)) < 40


def test_ingredients_of_what_refers_to_itself():
    loop = [1]
    loop.append(loop)
    assert ingredients(a=loop) == {"a": "builtins.list", "a.0": "1"}


@pytest.mark.slow
def test_ingredients_are_the_same_in_another_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import functools, torch
        from torch import nn
        import helper
        class Task:
            names = {"a", "b", "c"}
            def loss(self, x):
                return x in {"p", "q", "r"} or [y for y in x if helper.factor(y)]
        def build(width=3):
            return nn.Linear(width, len(Task.names))
        def report():
            from wherefrom.tools.evaluate.ingredients import ingredients
            for scale in (1, 2):
                helper.SCALE = scale
                print(sorted(ingredients(task=Task(), build=functools.partial(build, width=4)).items()))
        """)
    )
    (tmp_path / "helper.py").write_text("SCALE = 1\ndef factor(y):\n    return SCALE * y\n")
    command, found = [sys.executable, "-B", "-c", "import mine; mine.report()"], []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.splitlines())
    assert found[0] == found[1] and found[0][0] != found[0][1] and "helper.factor.SCALE" in found[0][0]
