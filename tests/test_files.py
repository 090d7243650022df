"""Files are whole or refused, folders have one writer, and a command ends in one line whatever stops it."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fuzz_files
import wherefrom
from targets import MINE, placed, refused, run
from wherefrom import disk, store
from wherefrom.data.tables import read_table, write_table
from wherefrom.errors import ArtefactError, AttributionError, AttributionWarning, InputError
from wherefrom.hf.text import documents
from wherefrom.tools import loading
from wherefrom.tools.cli import config
from wherefrom.tools.cli import main as cli
from wherefrom.tools.evaluate import Truth, load_matrix
from wherefrom.training.trajectory import LOG, Recorder, Trajectory

# --- one checksum over every byte -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One artefact of each kind, with its reader."""
    return fuzz_files.artefacts(tmp_path_factory.mktemp("made"))


NAMES = [f"fit of {name}" for name in fuzz_files.SOLVERS]
NAMES += ["scores", "piece solution-all.safetensors", "piece scores-00000000.safetensors", f"run {LOG}"]
NAMES += ["run step-00000001.safetensors", "gradient store", "runs of retraining", "ground truth"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_anywhere_is_refused(kinds, name, tmp_path):
    kind, rng = kinds[name], random.Random(name)
    path = tmp_path / kind.name
    path.write_bytes(kind.content)
    kind.read(tmp_path)  # it is read as it was written
    size = len(kind.content)
    count = 60 if name.startswith("fit") and "ekfac" not in name else 500  # a fit is one kind, whatever the solver
    places = {*range(40), *rng.sample(range(size), count - 40)} if size > count else range(size)
    for place in places:
        damaged = bytearray(kind.content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError):
            kind.read(tmp_path)


def test_the_kinds_are_all_that_are_made(kinds):
    assert set(kinds) == set(NAMES)


def test_each_bit_of_a_header_and_of_the_end_is_covered(kinds, tmp_path):
    for name in ("scores", "ground truth"):
        content, path = kinds[name].content, tmp_path / kinds[name].name
        for place in (*range(20), *range(60, 90), *range(len(content) - 80, len(content))):
            for bit in range(8):
                damaged = bytearray(content)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                with pytest.raises(ArtefactError):
                    kinds[name].read(tmp_path)


@pytest.mark.parametrize("field", ["damping", "examples", "name", "shape", "dtype", "padding"])
def test_a_header_that_was_changed_is_refused(tmp_path, field):
    """What a flipped bit may turn into something else that is valid: lambda, N, names, shapes, types, blanks."""
    model, task, train = fuzz_files.tiny()
    path = tmp_path / "file"
    fitted = wherefrom.Influence(wherefrom.EKFAC(), 0.01).fit(model, task, train)
    if field == "examples":
        fitted.score(train).save(path)
    else:
        fitted.save(path)
    content = path.read_bytes()
    before, after = {
        "damping": (b'\\"0\\": 0.01', b'\\"0\\": 0.11'),
        "examples": (b'\\"examples\\": 7', b'\\"examples\\": 6'),
        "name": (b'"factors|0|kfac"', b'"factors|0|kfad"'),
        "shape": (b'"shape":[1,2,4]', b'"shape":[1,4,2]'),
        "dtype": (b'"dtype":"F64"', b'"dtype":"I64"'),
        "padding": (b"} ", b"}\t") if b"} " in content else (b"}}", b"}}"),
    }[field]
    if before == after:
        pytest.skip("this header needs no padding")
    assert content.count(before) >= 1
    path.write_bytes(content.replace(before, after, 1))
    with pytest.raises(ArtefactError, match="checksum differs"):
        if field == "examples":
            wherefrom.Scores.load(path)
        else:
            wherefrom.Influence(wherefrom.EKFAC(), 0.01).load(path, model, task, train)


def test_another_version_says_so(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1)}, tmp_path / "old", {"wherefrom": json.dumps({"kind": "scores", "version": 1})})
    with pytest.raises(ArtefactError, match="must have version 2, got 1. Write it again with this version."):
        wherefrom.Scores.load(tmp_path / "old")
    with monkeypatch.context() as patch:
        patch.setattr(store, "VERSION", 3)
        patch.setattr(store, "__version__", "2.0.1")
        store.save(tmp_path / "new", "scores", {"a": torch.ones(1)}, {})
    with pytest.raises(ArtefactError, match=r"must have version 2, got 3 \(by wherefrom '2.0.1', this is 0.1.0\)"):
        wherefrom.Scores.load(tmp_path / "new")


@pytest.mark.parametrize("name", ["__version__", "torch"])
def test_another_major_version_of_the_library_or_of_torch_is_named(tmp_path, monkeypatch, name):
    scores = wherefrom.Scores(torch.ones(1, 2), wherefrom.Certificate.of_nothing_solved(1))
    with monkeypatch.context() as patch:
        if name == "torch":
            patch.setattr(store.torch, "__version__", "7.1.0")
        else:
            patch.setattr(store, "__version__", "7.1.0")
        scores.save(tmp_path / "s")
    said = rf"were written with {'torch' if name == 'torch' else 'wherefrom'} 7.1.0, this is .* write them again"
    with pytest.warns(AttributionWarning, match=said):
        wherefrom.Scores.load(tmp_path / "s")
    scores.save(tmp_path / "s")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wherefrom.Scores.load(tmp_path / "s")


# --- contents that make no sense, under a checksum that fits ---------------------------------------------------------


def forged(path, kind, change):
    tensors, header = store.load(path, kind)
    change(tensors, header)
    store.save(path, kind, tensors, header)


KFAC_0, RIGHT_2 = "factors|0|kfac", "factors|2|right|pieces|0"
FITS = {
    "negative damping": (lambda t, h: h["damping"].update({"0": -0.1}), "positive finite dampings, got -0.1"),
    "zero damping": (lambda t, h: h["damping"].update({"0": 0}), "positive finite dampings, got 0 for 0"),
    "infinite damping": (lambda t, h: h["damping"].update({"0": float("inf")}), "positive finite"),
    "damping of NaN": (lambda t, h: h["damping"].update({"0": float("nan")}), "positive finite"),
    "no damping": (lambda t, h: h.pop("damping"), "a damping for each block"),
    "one damping less": (lambda t, h: h["damping"].pop("2"), "a damping for each block"),
    "a damping in words": (lambda t, h: h["damping"].update({"0": "0.1"}), "a damping for each block"),
    "dampings in a list": (lambda t, h: h.update(damping=[0.1] * 2), "a damping for each block"),
    "no fingerprint": (lambda t, h: h.pop("fingerprint"), "made for another"),
    "a number that is none": (lambda t, h: t[KFAC_0].view(-1)[3].fill_(float("nan")), f"finite numbers in {KFAC_0}"),
    "an infinite number": (lambda t, h: t[RIGHT_2].view(-1)[0].fill_(float("inf")), f"finite numbers in {RIGHT_2}"),
    "a missing tensor": (lambda t, h: t.pop(KFAC_0), f"one with the tensor {KFAC_0}"),
    "another tensor": (lambda t, h: t.update(extra=torch.ones(1)), "also extra"),
    "another shape": (lambda t, h: t.update({KFAC_0: torch.ones(1, 4, 2).double()}), "0|kfac .*shape .1, 2, 4."),
    "a basis of another size": (lambda t, h: t.update({RIGHT_2: torch.eye(9)[None].double()}), "a basis of . dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", FITS)
def test_a_fit_that_makes_no_sense_is_refused(tmp_path, case):
    model, task, train = fuzz_files.tiny()
    path, (change, said) = tmp_path / "fit", FITS[case]
    wherefrom.Influence(wherefrom.EKFAC(), 0.1).fit(model, task, train).save(path)
    forged(path, "influence", change)
    with pytest.raises(ArtefactError, match=said.replace("|", r"\|")):
        wherefrom.Influence(wherefrom.EKFAC(), 0.1).load(path, model, task, train)


@pytest.mark.parametrize("name", [name for name in fuzz_files.SOLVERS if name != "auto"])
def test_a_tensor_of_another_size_is_refused_in_every_solver(tmp_path, name):
    model, task, train = fuzz_files.tiny()
    solver, path = fuzz_files.SOLVERS[name], tmp_path / "fit"
    wherefrom.Influence(solver, 0.1).fit(model, task, train).save(path)
    tensors, header = store.load(path, "influence")
    for key, t in tensors.items():
        for wrong in (t.new_ones(*t.shape, 2), t.new_ones(*(n + 1 for n in t.shape)) if t.ndim else t.new_ones(2)):
            store.save(path, "influence", tensors | {key: wrong}, header)
            with pytest.raises(ArtefactError):
                wherefrom.Influence(solver, 0.1).load(path, model, task, train)
        store.save(path, "influence", {k: v for k, v in tensors.items() if k != key}, header)
        with pytest.raises(ArtefactError):
            wherefrom.Influence(solver, 0.1).load(path, model, task, train)


SCORES = {
    "NaN": (lambda t, h: t["values"][0].fill_(float("nan")), "finite numbers in values"),
    "other queries": (lambda t, h: t.update(converged=torch.ones(5, dtype=torch.bool)), "converged of shape"),
    "words for truth": (lambda t, h: t.update(converged=torch.ones(2)), "converged of torch.bool"),
    "a negative residual": (lambda t, h: t.update(residual=torch.tensor([0.1, -0.1])), "residuals of 0 or more"),
    "a residual of NaN": (lambda t, h: t.update(residual=torch.tensor([0.1, float("nan")])), "residuals of 0 or more"),
    "self-influence of others": (lambda t, h: t.update(self_values=torch.ones(4)), "self_values of shape"),
    "numbers of no example": (lambda t, h: t.update(numbers=torch.tensor([0, 1, 9])), "3 of 3 training examples"),
    "a number twice": (lambda t, h: t.update(numbers=torch.tensor([0, 1, 1])), "3 of 3 training examples"),
    "no examples": (lambda t, h: h.update(examples=0), "a number of training examples"),
    "examples in words": (lambda t, h: h.update(examples="3"), "a number of training examples"),
    "examples without end": (lambda t, h: h.update(examples=10**30), "a number of training examples"),
    "steps in words": (lambda t, h: h["certificate"].update(steps="3"), "the numbers of a certificate, got steps '3'"),
    "an unknown number": (lambda t, h: h["certificate"].update(more=1), "the numbers of a certificate, got more 1"),
    "a certificate in words": (lambda t, h: h.update(certificate="good"), "the numbers of a certificate"),
    "no values": (lambda t, h: t.pop("values"), "a matrix of scores"),
    "whole numbers": (lambda t, h: t.update(values=torch.ones(2, 3, dtype=torch.int64)), "a matrix of scores"),
    "an unknown tensor": (lambda t, h: t.update(more=torch.ones(1)), "also 'more'"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_make_no_sense_are_refused(tmp_path, case):
    path, (change, said) = tmp_path / "s", SCORES[case]
    wherefrom.Scores(torch.ones(2, 3), wherefrom.Certificate.of_nothing_solved(2), {"examples": 3}).save(path)
    forged(path, "scores", change)
    with pytest.raises(ArtefactError, match=said):
        wherefrom.Scores.load(path)


RUNS = {
    "no order": (lambda t, h: t.pop("order"), "order and sizes together"),
    "sizes of another order": (lambda t, h: t["sizes"].add_(1), "numbers of the examples of each step"),
    "numbers below 0": (lambda t, h: t["order"].sub_(5), "numbers of the examples of each step"),
    "rates of NaN": (lambda t, h: t["rates"].fill_(float("nan")), "finite numbers in rates"),
    "negative rates": (lambda t, h: t["rates"].neg_(), "does not hold what it should"),
    "checkpoints out of order": (lambda t, h: h["kept"].reverse(), "does not hold what it should"),
    "no groups": (lambda t, h: h.pop("groups"), "does not hold what it should"),
    "a parameter that is not there": (lambda t, h: h["groups"][0]["parameters"].append("x"), "parameters of its check"),
    "a momentum of 1": (lambda t, h: h["groups"][0].update(momentum=1), "momentum of the optimiser must be a number"),
    "steps in words": (lambda t, h: h.update(kept=["a"]), "does not hold what it should"),
}  # fmt: skip


def recorded(folder: Path) -> None:
    model, _, (x, y) = fuzz_files.tiny()
    with Recorder(folder, model, torch.optim.SGD(model.parameters(), lr=0.1), every=1) as recorder:
        for i in range(2):
            recorder.saw([i, i + 1])
            recorder.optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            recorder.optimiser.step()


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_makes_no_sense_is_refused(tmp_path, case):
    recorded(tmp_path)
    change, said = RUNS[case]
    forged(tmp_path / LOG, "trajectory", change)
    with pytest.raises(ArtefactError, match=said):
        Trajectory.load(tmp_path)


def test_checkpoints_of_another_model_step_or_of_no_number_are_refused(tmp_path):
    recorded(tmp_path)
    path = tmp_path / "step-00000001.safetensors"
    good = path.read_bytes()
    for change, said in (
        (lambda t, h: t.update({"0.weight": torch.ones(5)}), "checkpoints of one model"),
        (
            lambda t, h: t["0.weight"].fill_(float("nan")),
            "finite weights, got others in 0.weight: the training diverged",
        ),
        (lambda t, h: h.update(step=2), "the checkpoint of step 1, got that of 2"),
    ):
        path.write_bytes(good)
        forged(path, "checkpoint", change)
        with pytest.raises(ArtefactError, match=said):
            Trajectory.load(tmp_path)


@pytest.mark.parametrize("piece", ["solution-all", "scores-00000000"])
def test_pieces_that_make_no_sense_are_refused(tmp_path, piece):
    model, task, train = fuzz_files.tiny()
    fitted = wherefrom.Influence(wherefrom.CG(), 0.1).fit(model, task, train)
    fitted.score(train, folder=tmp_path)
    path = tmp_path / f"{piece}.safetensors"
    good = path.read_bytes()
    kind = piece.split("-")[0]
    tensors, _ = store.load(path, kind)
    for name, t in tensors.items():
        path.write_bytes(good)
        forged(path, kind, lambda found, _, name=name, t=t: found.update({name: t.new_ones(*t.shape, 3)}))
        with pytest.raises(ArtefactError, match=re.escape(piece)):
            fitted.score(train, folder=tmp_path)
    path.write_bytes(good)
    one = next(name for name in tensors if name in ("values", "x|0"))
    forged(path, kind, lambda found, _: found.update({one: found[one][:1]}))  # would be spread over all queries
    with pytest.raises(ArtefactError, match=f"{re.escape(one)} of shape"):
        fitted.score(train, folder=tmp_path)


# --- sizes that lie, numbers without end, halves of characters -------------------------------------------------------


def lying(name: str, tmp_path: Path) -> Path:
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, np.zeros((2, 3)))
        path.write_bytes(path.read_bytes().replace(b"(2, 3), }      ", b"(20000000, 300000), }"[:15].ljust(15)))
        header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
        text = "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000, 1000000), }".ljust(117) + "\n"
        path.write_bytes(header + text.encode() + b"\0" * 48)
    elif name == "members.npz":
        inner = lying("a.npy", tmp_path)
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, "a.npy")
    elif name == "masks.npz":
        np.savez(path, masks=np.zeros((2, 1), np.uint8), n=10**12, targets=np.zeros((2, 1, 1)))
    elif name == "header.safetensors":
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    elif name == "tensor.safetensors":
        text = json.dumps({"a": {"dtype": "F64", "shape": [10**7, 10**6], "data_offsets": [0, 8 * 10**13]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    elif name == "rows.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"a": pa.nulls(400_000_000)}), path, row_group_size=400_000_000)
    return path


LYING = ("a.npy", "members.npz", "masks.npz", "header.safetensors", "tensor.safetensors", "rows.parquet")
READ = """
import resource, sys
from wherefrom.errors import AttributionError
from wherefrom.tools.evaluate import Truth, load_matrix
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        (Truth.load if "masks" in path else load_matrix)(path)
    except AttributionError as error:
        room = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print("llocat" in str(error), room < 2**17)
"""


def test_what_claims_to_be_huge_is_refused_before_room_is_made(tmp_path):
    paths = [str(lying(name, tmp_path)) for name in LYING]
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == ["False True"] * len(LYING), done.stderr[-2000:]


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"__metadata__": []}', b"[" * 5000, b"9" * 5000,
     b'{"__metadata__": {"wherefrom": "{"}}',
     b'{"__metadata__": {"wherefrom": "[1]"}}', b'{"__metadata__": {"wherefrom": "{}"}}',
     b'{"__metadata__": {"wherefrom": 3}}',
     b'{"__metadata__": {"wherefrom": "{\\"version\\": 2, \\"kind\\": \\"scores\\"}"}}'],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / "s.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    for read in (wherefrom.Scores.load, load_matrix):
        with pytest.raises(ArtefactError) as caught:
            read(path)
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_halves_of_characters_in_a_table_are_refused(tmp_path, suffix):
    for data in ({"a": ["x", "\ud83d"]}, {"a": ["\udcff"]}, {"\ud800": [1]}):
        with pytest.raises(InputError, match="of Unicode text"):
            write_table(tmp_path / f"t.{suffix}", data)
    write_table(tmp_path / f"t.{suffix}", {"a": ["\U0001f600"]})
    assert read_table(tmp_path / f"t.{suffix}") == {"a": ["\U0001f600"]}


def test_whole_numbers_of_any_size_are_kept_or_refused(tmp_path):
    large = {"n": [2**63, -(2**200), None]}
    write_table(tmp_path / "t.csv", large)
    assert read_table(tmp_path / "t.csv") == large
    with pytest.raises(InputError, match="of whole numbers in 64 bits, got one of 64 bits"):
        write_table(tmp_path / "t.parquet", large)
    write_table(tmp_path / "t.parquet", {"n": [2**63 - 1, -(2**63)]})
    assert read_table(tmp_path / "t.parquet") == {"n": [2**63 - 1, -(2**63)]}
    for mixed in ([0.5, 2**53 + 1], [0.5, 10**400]):
        with pytest.raises(InputError, match="a whole number among floats that none of them equals|large whole number"):
            write_table(tmp_path / "t.csv", {"n": mixed})
    (tmp_path / "t.csv").write_text("n\n" + "9" * 5000 + "\n")  # Python reads no such number: it stays a text
    assert read_table(tmp_path / "t.csv") == {"n": ["9" * 5000]}
    (tmp_path / "t.csv").write_text("n\n1e999\ninf\n")
    assert read_table(tmp_path / "t.csv") == {"n": ["1e999", "inf"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '{"text": "a \\ud83d b"}'),
        ("d.jsonl", '["\\uDC00"]'),
        ("d.json", '[{"text": "\\ud800"}]'),
        ("d.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}"),
        ("d.json", "[" * 100_000),
        ("d.jsonl", '{"a":' * 100_000),
        ("d.csv", "text\n\ud800"),
        ("d.parquet", "PAR1"),
    ],
)
def test_texts_that_are_none_are_refused(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(AttributionError) as caught:
        documents(tmp_path / name)
    assert len(str(caught.value)) < 2000
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert documents(tmp_path / "d.jsonl").texts == ["\U0001f600"]


def test_a_parquet_table_of_ours_with_other_cells_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, {"flipped": [True, False] * 20, "n": list(range(40))})
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)  # another program keeps what is written beside the cells
    with pytest.raises(ArtefactError, match="its checksum differs"):
        read_table(path)
    pq.write_table(table.replace_schema_metadata(None).slice(1), path)
    assert len(read_table(path)["n"]) == 39


# --- one writer, and what a kill leaves ------------------------------------------------------------------------------

HOLD = """
import sys, time
from wherefrom.disk import Lock
lock = Lock(sys.argv[1])
print("held", flush=True)
time.sleep(120)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_and_a_dead_one_makes_way(tmp_path):
    folder = tmp_path / "a" / "run"
    process = holder(folder)
    try:
        with pytest.raises(InputError, match=rf"Process {process.pid} on .* is writing to .*run. Wait for it, or give"):
            disk.Lock(folder)
    finally:
        process.kill()
        process.wait()
    assert (folder / disk.LOCK).exists()
    lock = disk.Lock(folder)
    with pytest.raises(InputError, match=f"Process {os.getpid()} on"):
        disk.Lock(folder)
    lock.release()
    assert list(folder.iterdir()) == []
    disk.Lock(folder).release()  # what was there stays
    assert folder.is_dir()
    disk.Lock(tmp_path / "b" / "c").release()  # what was made for nothing goes
    assert not (tmp_path / "b").exists()


def test_a_lock_that_was_let_go_of_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    first = disk.Lock(tmp_path)
    flock, calls = disk.fcntl.flock, []

    def slow(file, how):
        if not calls:
            calls.append(1)
            first.release()  # after the file was opened here, before it is locked
        flock(file, how)

    monkeypatch.setattr(disk.fcntl, "flock", slow)
    second = disk.Lock(tmp_path)
    assert (tmp_path / disk.LOCK).exists()
    with pytest.raises(InputError):
        disk.Lock(tmp_path)
    second.release()


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", unsupported)
    with pytest.warns(AttributionWarning, match="cannot be locked .No locks available.: let no other"):
        disk.Lock(tmp_path).release()


def test_two_recorders_are_not_mixed(tmp_path):
    process = holder(tmp_path / "run")
    model, _, _ = fuzz_files.tiny()
    try:
        with pytest.raises(InputError, match=f"Process {process.pid} on .*Record in one process"):
            Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    finally:
        process.kill()
        process.wait()
    recorded(tmp_path / "run")
    assert disk.LOCK not in os.listdir(tmp_path / "run")


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


WRITERS = {
    "scores": lambda at: wherefrom.Scores(torch.ones(1, 2), wherefrom.Certificate.of_nothing_solved(1)).save(at / "s"),
    "table": lambda at: write_table(at / "t.csv", {"a": [1]}),
    "truth": lambda at: Truth(np.ones((1, 2), dtype=bool), np.ones((1, 1, 1))).save(at / "t.npz"),
    "configuration": lambda at: config.write(at / "c.toml", {"k": 1}, {}),
    "pieces": lambda at: store.Shards(at, "scores", {}).put(0, {"values": torch.ones(1)}),
    "recorder": recorded,
    "lock": lambda at: disk.Lock(at).release(),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_the_dead_left_is_swept_and_what_the_living_write_is_not(tmp_path, writer):
    gone = dead()
    left = [f".fit.safetensors.{gone}.part", f".a b.csv.on-{disk.HOST}.{gone}.part", ".x." + "9" * 17 + ".part"]
    kept = [
        f".fit.safetensors.{os.getppid()}.part",
        f".other.on-{disk.HOST}.{os.getpid()}.part",
        "mine.part",
        ".1.parts",
    ]
    kept += [f".fit.safetensors.on-elsewhere.{gone}.part", f"fit.{gone}.part"]
    for name in left + kept:
        (tmp_path / name).write_text("")
    WRITERS[writer](tmp_path)
    assert not set(left) & set(os.listdir(tmp_path)) and set(kept) <= set(os.listdir(tmp_path))


def test_a_killed_writer_leaves_nothing_for_long(tmp_path):
    lines = ["import os", "from wherefrom.disk import write_atomically", "with write_atomically('file.txt') as at:"]
    lines += ["    at.write_text('half')", "    os.kill(os.getpid(), 9)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert re.fullmatch(r"\.file\.txt\..*\.\d+\.part", left)
    with disk.write_atomically(tmp_path / "other.txt") as at:
        at.write_text("whole")
    assert os.listdir(tmp_path) == ["other.txt"]


# --- a full disk, and other places that take nothing ------------------------------------------------------------------

FULL = """
import resource, signal, sys
import torch, wherefrom, numpy as np
from wherefrom.tools.evaluate import Truth
from wherefrom.data.tables import write_table
from wherefrom.tools.report import write_report
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
rng = np.random.default_rng(0)
scores = wherefrom.Scores(torch.randn(9, 999), wherefrom.Certificate.of_nothing_solved(9))
write = {
    "s": lambda: scores.save("s"),
    "t.npz": lambda: Truth(rng.random((99, 999)) < .5, rng.normal(size=(99, 9, 9))).save("t.npz"),
    "t.csv": lambda: write_table("t.csv", {"a": torch.randn(5000)}),
    "t.parquet": lambda: write_table("t.parquet", {"a": torch.randn(5000)}),
}
for name, f in write.items():
    try:
        f()
    except wherefrom.ArtefactError as error:
        print(error)
"""


def test_a_full_disk_is_told_and_nothing_half_is_left(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert [line.partition(" could not be written: ")[0] for line in lines] == ["s", "t.npz", "t.csv", "t.parquet"]
    assert all("File too large" in line and line.endswith("Free some space, or give another folder.") for line in lines)
    assert os.listdir(tmp_path) == []


def test_no_space_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "m.npy", np.eye(3))
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
    said = "explain|top.csv could not be written: No space left on device. Free some space, or give another folder."
    refused(capsys, said, "top m.npy --k 1 --out r")
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_takes_nothing_is_told(tmp_path):
    np.save(tmp_path / "m.npy", np.eye(3))
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "wherefrom.tools.cli.main", "top", "m.npy", "--k", "1"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "wherefrom: [Errno 28] No space left on device\n"


def test_a_terminal_without_these_letters(tmp_path):
    write_table(tmp_path / "m.csv", {"a": [1.0]})
    (tmp_path / "mine.py").write_text(MINE + "\ndef odd():\n    return full(show=lambda data, i: 'é\\ud83d')\n")
    command = [sys.executable, "-m", "wherefrom.tools.cli.main", "self-influence", "mine:odd", "--damping", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "of Unicode text" in done.stderr
    assert r"\xe9\ud83d" in done.stdout  # shown as far as it goes


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return placed(tmp_path, monkeypatch)


@pytest.mark.parametrize("command", ["score mine:problem", "evaluate a.npy b.npy", "top a.npy"])
def test_a_folder_in_use_is_refused_in_one_line(mine, capsys, command):
    for name in "ab":
        np.save(f"{name}.npy", np.random.default_rng(ord(name)).normal(size=(4, 30)))
    process = holder(mine / "r")
    try:
        refused(
            capsys,
            f"Process {process.pid} on .* is writing to r. Wait for it, or give another --out",
            f"{command} --out r",
        )
        assert os.listdir("r") == [disk.LOCK]
    finally:
        process.kill()
        process.wait()
    run(f"{command} --out r{' --damping 1' if 'mine' in command else ' --k 2'}")
    assert disk.LOCK not in os.listdir("r")


SLOW = """
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGTERM, 143, "wherefrom: terminated\n"), (signal.SIGKILL, -9, "")]
)
def test_a_terminated_run_keeps_its_results_and_goes_on(mine, sent, code, said):
    (mine / "mine.py").write_text(MINE + SLOW)
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
    command += ["--damping", "1", "--no-certify", "--out", "r"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list((mine / "r").rglob("scores-0*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert second.returncode == 2 and second.stderr.count("\n") == 1 and f"Process {process.pid} on" in second.stderr
    process.send_signal(sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code and err == said
    names = [path.name for path in (mine / "r").rglob("*")]
    assert len([name for name in names if name.startswith("scores-0")]) == 3
    assert (disk.LOCK in names) == (sent == signal.SIGKILL)
    (mine / "again").touch()
    (mine / "r" / "scores.pieces" / "0" / f".scores-00000007.safetensors.{process.pid}.part").touch()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "The fit is taken from" in done.stdout
    assert not [path for path in (mine / "r").rglob(".*")]


@pytest.mark.parametrize(
    "line",
    ["top a.npy --k 1", "demo --examples 5000", "report --hf nowhere --dataset d.txt", "spectrum --help", "--version"],
)
def test_the_current_folder_is_not_searched_without_a_target(mine, monkeypatch, line):
    np.save("a.npy", np.eye(3))
    seen = []
    monkeypatch.setattr(cli.loading, "import_from_here", lambda: seen.append(1))
    cli.main(line.split())
    assert not seen and str(mine) not in sys.path


SHADOWS = ("torch", "json", "numpy", "tyro", "safetensors", "wherefrom", "math", "typing")


@pytest.mark.slow
def test_a_file_named_like_a_package_does_not_take_its_place(mine):
    for name in SHADOWS:
        (mine / f"{name}.py").write_text(f"open('taken-{name}', 'w')\nraise SystemExit(77)\n")
    (mine / "bin").mkdir()
    (mine / "bin" / "program.py").write_text(
        "import sys\nfrom wherefrom.tools.cli.main import main\nsys.exit(main())\n"
    )
    (mine / "mine.py").write_text(MINE.replace("import torch\n", "import torch, json, numpy, tyro, statistics\n"))
    for line in ("fit mine:problem --damping 1 --out r", "top r/none.npy"):
        done = subprocess.run(
            [sys.executable, "bin/program.py", *line.split()], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == (0 if line.startswith("fit") else 2), done.stderr
    assert not list(mine.glob("taken-*"))


def test_a_module_of_ones_own_with_a_taken_name_is_told(mine, capsys):
    (mine / "scipy.py").write_text(MINE)
    refused(
        capsys,
        r"scipy.__init__.py was imported, an installed package of the same name. Rename your file",
        "fit scipy:problem",
    )
    (mine / "queue.py").write_text(MINE)
    refused(capsys, "a function of yours, got one of Python's own module queue. Rename", "fit queue:problem")


@pytest.mark.parametrize(
    "target",
    ["os:getcwd", "os:abort", "shutil:get_archive_formats", "antigravity:x", "pdb:set_trace", "os.path:x",
     "builtins:input", "mine:getcwd", "mine:Folder", "mine:dump", "mine:__doc__", "mine:x"],
)  # fmt: skip
def test_what_is_no_target_is_not_called(mine, capsys, target):
    more = [
        "from os import getcwd",
        "from pathlib import Path as Folder",
        "from faulthandler import dump_traceback as dump",
    ]
    (mine / "mine.py").write_text("\n".join([MINE, *more, ""]))
    (mine / "c.toml").write_text(f'target = "{target}"\n')
    modules = set(sys.modules)
    refused(capsys, "target", "fit --config c.toml --out r")
    refused(capsys, "target", f"fit {target} --out r")
    assert not (set(sys.modules) - modules) & {"antigravity"}


def test_a_file_from_elsewhere_names_no_function_but_targets(mine, capsys, tmp_path_factory):
    (mine / "mine.py").write_text(
        MINE
        + """
def harm():
    open("harm", "w")

def declared() -> Target:
    return full()

def quoted() -> "wherefrom.tools.loading.Target":
    return full()
"""
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "c.toml"

    def said(target: str) -> None:
        elsewhere.write_text(f'target = "{target}"\nout = "r"\ndamping = 1\n')

    for target in (
        "mine:harm",
        "mine:problem",
        "wherefrom.tools.cli.main:main",
        "pip:main",
        "torch.utils.collect_env:main",
        "mine:gone",
    ):
        said(target)
        refused(
            capsys,
            f"c.toml: target must be a function of a module in the current directory.*got {target}. Give it on",
            f"fit --config {elsewhere}",
        )
    assert not Path("harm").exists()
    for target in ("mine:declared", "mine:quoted"):
        said(target)
        run(f"fit --config {elsewhere}")
    said("mine:problem")
    run(f"fit mine:problem --config {elsewhere}")  # who types it means it
    run("fit --config r/fit.toml")  # one's own
    Path("c.toml").write_text('target = "pip:main"\n')
    refused(capsys, "c.toml: target must be a function of a module in the current directory", "fit --config c.toml")


def test_source_is_read_for_a_target_and_nothing_is_imported(mine):
    (mine / "pack").mkdir()
    (mine / "pack" / "__init__.py").write_text("open('imported', 'w')\n")
    (mine / "pack" / "inner.py").write_text("def a() -> Target: ...\ndef b(): ...\nx: Target = 1\nclass c: ...\n")
    (mine / "broken.py").write_text("def a() -> Target: (\n")
    with loading.import_from_here():
        assert loading.says_target("pack.inner:a") and loading.is_own("pack.inner") and not loading.is_own("numpy")
        for other in (
            "pack.inner:b",
            "pack.inner:x",
            "pack.inner:c",
            "pack:a",
            "pack.gone:a",
            "gone:a",
            "broken:a",
            "math:a",
        ):
            assert not loading.says_target(other)
    assert not Path("imported").exists()


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 99999999999999999999", "seed must be a whole number of 64 bits, got one of 67 bits"),
        (f"k = {LONG}", "c.toml must be a TOML file"),
        ("batch_size = 0x" + "f" * 5000, "batch_size must be a whole number of 64 bits, got one of 20000 bits"),
        ("damping = [0x" + "f" * 5000 + "]", "damping must be a whole number of 64 bits"),
        ("k = " + "[" * 5000, "c.toml must be a TOML file"),
        ('out = "a\\u0000b"', "out must be text without nulls"),
        ('solver = "' + "(" * 5000 + '"', "solver must be written as in Python"),
        ('solver = "' + "-" * 50000 + '1"', "solver must be "),
        ('solver = "CG(tolerance=' + LONG + ')"', "solver"),
        ('solver = "CG(tolerance=1e999)"', ""),
        ('parameters = "a{99999999999999}"', "parameters must be a regular expression"),
        ('parameters = "' + "(" * 5000 + '"', "parameters must be a regular expression"),
        ("\ud800 = 1", "c.toml must be a TOML file"),
    ],
)
def test_a_configuration_without_measure_is_one_line(mine, capsys, text, said):
    (mine / "c.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    if said:
        refused(capsys, said, "select mine:problem --config c.toml")
        assert not Path("wherefrom-run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["top", "a.npy", "--k", "9" * 30],
        ["select", "mine:problem", "--seed", "-" + "9" * 30],
        ["top", "a\0b.npy"],
        ["top", "\udcff.npy"],
        ["top", "a.npy", "--out", "\ud800"],
        ["fit", "mine:problem", "--parameters", "\0"],
    ],
)
def test_arguments_without_measure_are_one_line(mine, capsys, words):
    np.save("a.npy", np.eye(3))
    refused(capsys, "must be", words[0], *words[1:])


# --- at random --------------------------------------------------------------------------------------------------------


def test_fuzzed_files_tables_and_configurations():
    count = int(os.environ.get("WHEREFROM_FUZZ", "300"))
    told, failures = fuzz_files.run(count, seed=int(os.environ.get("WHEREFROM_FUZZ_SEED", "1")))
    assert not failures, "\n".join(failures)
    assert sum(told.values()) == count


def test_the_fuzzer_finds_what_it_looks_for(monkeypatch):
    """Without the checksum it fails."""

    def stored(file):
        file.seek(8 + len(store.HEADER_START))
        return file.read(len(store.BLANK_CHECKSUM)).decode()

    monkeypatch.setattr(store, "_hash_file", stored)
    _, failures = fuzz_files.run(150, seed=3)
    assert any("taken in spite of its checksum" in failure for failure in failures)
