"""A fuzzer of all that is read: artefacts, matrices, ground truth, tables, texts, configurations and command lines.

    python tests/fuzz_files.py 10000 [SEED]

Valid files are damaged at random: bits flipped, pieces cut out, doubled, swapped, filled up, numbers in headers made
huge; headers and numbers of artefacts are also changed under a checksum that fits. Whatever is read then is either
refused by one of the library's own errors, or, where the file has a checksum, it is what was written. Address space is
limited, so that room made for what a header merely claims is a failure too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import wherefrom
from wherefrom import store
from wherefrom.data.tables import read_table, write_table
from wherefrom.errors import AttributionError
from wherefrom.store import Shards
from wherefrom.tools.cli import config
from wherefrom.tools.cli import main as cli
from wherefrom.tools.cli.options import Attributed
from wherefrom.tools.cli.registry import COMMANDS
from wherefrom.tools.evaluate import Truth, load_matrix
from wherefrom.tools.evaluate.finished_runs import read_runs, write_runs
from wherefrom.training.trajectory import LOG, Recorder, Trajectory

ROOM = 6 * 2**30  # bytes of address space beyond those that are in use
SOLVERS = {
    "exact": wherefrom.Exact("primal"),
    "dual": wherefrom.Dual(drop=0.0),
    "ekfac": wherefrom.EKFAC(),
    "cg": wherefrom.CG(wherefrom.Nystrom(3)),
    "neumann": wherefrom.ASTRA(steps=2),
    "arnoldi": wherefrom.Arnoldi(rank=3, steps=5),
    "hyperinf": wherefrom.HyperINF(),
    "proj": wherefrom.RandProj(3),
    "select": wherefrom.RandSelect(3),
    "auto": "auto",
}


@dataclass
class Kind:
    """A kind of file.

    Args:
        content: a valid file.
        name: where it lies, below the folder of the case.
        read: reads what lies in a folder; it may return anything that `same` compares.
        sealed: whether every byte is under a checksum: then a changed file must be refused.
        kept: whether the contents are under a checksum: then what is read must be what was written.
    """

    content: bytes
    name: str
    read: Callable[[Path], Any]
    sealed: bool = False
    kept: bool = False


def tiny() -> tuple[nn.Module, Any, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    x = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    return model, wherefrom.Classification(), (x, torch.randint(3, (7,), generator=rng))


def artefacts(folder: Path) -> dict[str, Kind]:
    """One of each kind that the library writes with a checksum."""
    model, task, train = tiny()
    kinds: dict[str, Kind] = {}
    for name, solver in SOLVERS.items():
        path = folder / f"{name}.safetensors"
        wherefrom.Influence(solver, 0.1).fit(model, task, train).save(path)

        def load(at: Path, solver: Any = solver) -> Any:
            return wherefrom.Influence(solver, 0.1).load(at / "fit", model, task, train).inverse.damping

        kinds[f"fit of {name}"] = Kind(path.read_bytes(), "fit", load, sealed=True)

    fitted = wherefrom.Influence(wherefrom.CG(), 0.1).fit(model, task, train)
    fitted.score(train, self_influence=True, folder=folder / "pieces").save(folder / "scores")
    kinds["scores"] = Kind(
        (folder / "scores").read_bytes(), "scores", lambda at: wherefrom.Scores.load(at / "scores"), True
    )
    for path in (folder / "pieces").iterdir():
        kinds[f"piece {path.name}"] = Kind(
            path.read_bytes(), path.name, lambda at: fitted.score(train, folder=at).values, True
        )

    trained = tiny()[0]  # another, which training changes
    with Recorder(folder / "run", trained, torch.optim.SGD(trained.parameters(), lr=0.1), every=1) as recorder:
        for i in range(2):
            recorder.saw([i, i + 1])
            recorder.optimiser.zero_grad()
            nn.functional.cross_entropy(trained(train[0]), train[1]).backward()
            recorder.optimiser.step()
    run = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}

    def load_run(at: Path) -> Any:
        for name, content in run.items():
            if not (at / name).exists():
                (at / name).write_bytes(content)
        return Trajectory.load(at).segments(1)[0].mean()

    for name in (LOG, "step-00000001.safetensors"):
        kinds[f"run {name}"] = Kind(run[name], name, load_run, True)

    again = wherefrom.Influence(wherefrom.EKFAC(), 0.1).fit(*tiny())
    wherefrom.GradientStore.build(again, folder / "store", size=16)
    (path,) = (folder / "store").iterdir()
    kinds["gradient store"] = Kind(
        path.read_bytes(), path.name, lambda at: wherefrom.GradientStore.build(again, at, size=16).score(train), True
    )

    pieces = Shards(folder / "runs", "runs", {"made of": "this"})
    write_runs(pieces, {"00" * 16: torch.ones(3), "01" * 16: torch.zeros(3)})
    (path,) = (folder / "runs").iterdir()
    made_of = pieces.header
    kinds["runs of retraining"] = Kind(
        path.read_bytes(), path.name, lambda at: read_runs(Shards(at, "runs", made_of)), True
    )

    rng = np.random.default_rng(0)
    Truth(rng.random((4, 9)) < 0.5, rng.normal(size=(4, 2, 3))).save(folder / "truth.npz")
    kinds["ground truth"] = Kind(
        (folder / "truth.npz").read_bytes(), "truth.npz", lambda at: Truth.load(at / "truth.npz"), True
    )
    return kinds


def others(folder: Path) -> dict[str, Kind]:
    """Files without a checksum over every byte."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(3, 5))
    table = {
        "example": [1, 2, 2**60],
        "x": [0.5, None, -1e300],
        "flipped": [True, False, None],
        "text": ["é,", '"\n', "7"],
    }
    np.save(folder / "m.npy", matrix)
    np.savez_compressed(folder / "m.npz", a=matrix)
    np.savetxt(folder / "m.csv", matrix, delimiter=",")
    save_file({"a": torch.from_numpy(matrix)}, folder / "m.safetensors")
    for name in ("t.csv", "t.parquet"):
        write_table(folder / name, table)
    write_table(folder / "m.parquet", {f"c{i}": column for i, column in enumerate(matrix.T)})
    kinds = {
        f"matrix {name}": Kind((folder / name).read_bytes(), name, lambda at, name=name: load_matrix(at / name))
        for name in ("m.npy", "m.npz", "m.csv", "m.parquet", "m.safetensors")
    }
    for name, kept in (("t.csv", False), ("t.parquet", True)):
        kinds[f"table {name}"] = Kind(
            (folder / name).read_bytes(), name, lambda at, n=name: read_table(at / n), kept=kept
        )
    rows = [{"text": "Lima is a capital.", "n": 3}, {"text": "\U0001f600", "n": [1, {"a": None}]}]
    lines = "\n".join(json.dumps(row) for row in rows[:1] * 3).encode()
    try:
        from wherefrom.hf.text import documents
    except ImportError:
        return kinds
    texts = {
        "d.jsonl": lines,
        "d.json": json.dumps(rows).encode(),
        "d.txt": "one\n\ntwo é".encode(),
        "d.csv": b"text,n\na,1\n",
    }
    for name, content in (texts | {"d.parquet": (folder / "t.parquet").read_bytes()}).items():
        kinds[f"texts {name}"] = Kind(content, name, lambda at, n=name: documents(at / n))
    return kinds


# --- damage ---------------------------------------------------------------------------------------------------------

TOKENS = [
    b"\xff",
    b"\0",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 30,
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b'"',
    b"null",
    b"true",
    b"0",
    b"\n",
    b",",
    b";",
    b"''",
    b"(2**63)",
    b"18446744073709551616",
    b"(1000000000000, 1000000)",
]


def damage(content: bytes, rng: random.Random) -> bytes:
    """The content with one or a few changes; never the same."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, end = (rng.randrange(len(found) + 1) for _ in range(2))
        low, high = min(at, end), max(at, end)
        how = rng.randrange(9)
        if how <= 2 and found:
            found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
        elif how == 3:
            found = found[:at]
        elif how == 4:
            del found[low : low + rng.randrange(1, 20)]
        elif how == 5:
            found[at:at] = rng.choice(TOKENS)
        elif how == 6:
            found[at:at] = found[low:high][:200]
        elif how == 7:
            found[at : at + 8] = rng.choice((2**64 - 1, 2**40, 2**31, 10**8, 0)).to_bytes(8, "little")
        else:
            digits = [i for i, byte in enumerate(found) if chr(byte).isdigit()]
            if digits:
                where = rng.choice(digits)
                found[where : where + 1] = rng.choice((b"0", b"-1", b"9" * 25, b"99999999", b"1e400"))
    return bytes(found) if bytes(found) != content else damage(content, rng)


VALUES = [
    None,
    True,
    -1,
    0,
    2**70,
    1e999,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    -0.5,
    10**400,
    [[[]]],
]


def meddle(value: Any, rng: random.Random) -> Any:
    """A JSON value with something else in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = {k: meddle(v, rng) if k == key else v for k, v in value.items()}
        if rng.random() < 0.2:
            changed.pop(key)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [meddle(v, rng) if i == at else v for i, v in enumerate(value)]
    return rng.choice(VALUES)


def forge(content: bytes, path: Path, rng: random.Random) -> None:
    """An artefact with other contents under a checksum that fits, as another program may write it."""
    path.write_bytes(content)
    with open(path, "rb") as file:
        meta = store._parse_header(path, store._read_header(file, path))
    kind = meta["kind"]
    tensors, header = store.load(path, kind)
    if rng.random() < 0.5 and tensors:
        name = rng.choice(list(tensors))
        t = tensors[name]
        how = rng.randrange(6)
        if how == 0:
            tensors[name] = t.new_zeros(rng.choice(([], [0], [3], [2, 2], [1] * 5)))
        elif how == 1:
            tensors[name] = t.to(rng.choice((torch.float16, torch.int8, torch.complex64, torch.bool, torch.int64)))
        elif how == 2 and t.is_floating_point():
            tensors[name] = t * float("nan")
        elif how == 3:
            del tensors[name]
        elif how == 4:
            tensors["another"] = t.clone()
        else:
            tensors[name] = -t if t.dtype != torch.bool else ~t
    else:
        header = meddle(header, rng)
    store.save(path, kind, tensors, header)


# --- cases ----------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """What the fuzzer looks for."""


def check(kind: Kind, folder: Path, how: str, rng: random.Random) -> str:
    """Damage a file, read it, and say what came of it: refused or taken."""
    path = folder / kind.name
    if how == "forged":
        try:
            forge(kind.content, path, rng)
        except AttributionError:
            return "not written"
    else:
        path.write_bytes(damage(kind.content, rng))
    try:
        found = kind.read(folder)
    except AttributionError as error:
        if len(str(error)) > 2500 or "\n" in str(error).strip():
            raise Wrong(f"no single line: {str(error)[:3000]}") from error
        return "refused"
    if how == "damaged" and kind.sealed:
        raise Wrong("taken in spite of its checksum")
    if how == "damaged" and kind.kept:
        path.write_bytes(kind.content)
        if repr(kind.read(folder)) != repr(found):
            raise Wrong("taken with other contents")
    return "taken"


CONFIG = """\
target = "tiny:problem"
solver = "CG(preconditioner=EKFAC(limit=100), tolerance=0.01)"
damping = "relative(0.1)"
curvature = "ggn"
parameters = "weight"
batch_size = 3
seed = 1
k = 4
share = 0.5
removal = [1, 2]
layers = true
out = "run"
[record]
command = "fit"
"""
EXPRESSIONS = {
    "solver": ["CG(preconditioner=EKFAC(limit=100), tolerance=0.01)", "Neumann(batch=3)", "Arnoldi(rank=3, steps=5)"],
    "damping": [
        "relative(0.1)",
        "0.01",
        "from_training(lr=[0.1, 0.2], steps=3, momentum=0.9)",
        "by_parameter({'w': 1})",
    ],
    "method": [
        "SOURCE(segments=3, solver=ASTRA())",
        "TRAK(size=3)",
        "TracIn()",
        "Unrolled()",
        "BM25()",
        "Random(seed=3)",
    ],
}


def configuration(folder: Path, rng: random.Random) -> str:
    """A damaged TOML file, as the options of a command, and the method that they say."""
    path = folder / "c.toml"
    path.write_bytes(damage(CONFIG.encode(), rng) if rng.random() < 0.9 else CONFIG.encode())
    try:
        name = rng.choice(["fit", "score", "select", "evaluate", "clean", "report"])
        command = config.configure(COMMANDS, name, path)
        config.check_values([v for v in getattr(command, "keywords", {}).values()])
        options = getattr(command, "keywords", {}).get("options")
        if isinstance(options, Attributed):
            options.parse_method()
    except AttributionError:
        return "refused"
    return "taken"


def expression(rng: random.Random) -> str:
    """A damaged expression."""
    slot = rng.choice(list(EXPRESSIONS))
    text = damage(rng.choice(EXPRESSIONS[slot]).encode(), rng).decode("utf-8", "surrogateescape")
    try:
        Attributed("m:f", **{slot: text}).parse_method()
    except AttributionError:
        return "refused"
    return "taken"


LINES = [
    "top scores.safetensors --k 2",
    "top m.csv --k 1 --out o",
    "evaluate scores.safetensors a=m.npy --k 2 --out o",
    "evaluate scores.safetensors --truth truth.npz --out o",
    "evaluate scores.safetensors --flags t.csv --column flipped --out o",
    "top --config c.toml",
    "fit tiny:nothing --solver EKFAC() --damping 0.1 --out o",
    "score --config c.toml --seed 3",
    "spectrum tiny:nothing --curvature hessian --batch-size 2",
    "--version",
    "select --help",
    "clean tiny:nothing --count 3",
]
WORDS = [
    "--k",
    "99999999999999999999999",
    "-1",
    "nan",
    "--out",
    "scores.safetensors",
    "",
    "a\0b",
    "\udcff",
    "--config",
    "c.toml",
    "os:getcwd",
    "tiny:nothing",
    "--target",
    "--seed",
    "1e9",
    "--help",
    "m.csv",
    "x=m.npy",
    "--removal",
    "é",
    "(",
    "--truth",
]


def line(folder: Path, kinds: dict[str, Kind], rng: random.Random) -> str:
    """A damaged command line over files of which one may be damaged, run as the program runs it."""
    for name in ("scores", "ground truth", "matrix m.csv", "matrix m.npy", "table t.csv"):
        kind = kinds[name]
        file = folder / (kind.name + (".safetensors" if name == "scores" else ""))
        file.write_bytes(damage(kind.content, rng) if rng.random() < 0.3 else kind.content)
    (folder / "c.toml").write_bytes(
        damage(CONFIG.encode(), rng) if rng.random() < 0.5 else b'scores = "scores.safetensors"\n'
    )
    (folder / "tiny.py").write_text("def nothing():\n    return 1, 2\n")
    words = rng.choice(LINES).split()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randrange(len(words) + 1)
        words[at : at + rng.randrange(2)] = [rng.choice(WORDS)]
    before = os.getcwd()
    said = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(words)
    except Exception as error:
        raise Wrong(f"wherefrom {words}: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(before)
    lines = [text for text in said.getvalue().splitlines() if not text.startswith("wherefrom: warning:")]
    if code not in (0, 2, 3) or (code == 2 and len(lines) != 1 and words):
        raise Wrong(f"wherefrom {words}: code {code}, {len(lines)} lines: {said.getvalue()[:1000]}")
    return "refused" if code else "taken"


def run(count: int, seed: int = 0, stop: bool = True) -> tuple[Counter[str], list[str]]:
    """So many cases: how many of each kind were refused and taken, and what went wrong."""
    told: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as top, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(top) / "made").mkdir()
        sealed = artefacts(Path(top) / "made")
        kinds = sealed | others(Path(top) / "made")
        for case in range(count):
            rng = random.Random(f"{seed} {case}")
            folder = Path(top) / "case"
            with cleaned(folder):
                how = rng.choices(("damaged", "forged", "configuration", "expression", "line"), (50, 15, 12, 15, 8))[0]
                name = rng.choice(list(sealed if how == "forged" else kinds))
                if name == "ground truth" and how == "forged":
                    how = "damaged"
                label = f"{how} {name}" if how in ("damaged", "forged") else how
                try:
                    if how == "configuration":
                        came = configuration(folder, rng)
                    elif how == "expression":
                        came = expression(rng)
                    elif how == "line":
                        came = line(folder, kinds, rng)
                    else:
                        came = check(kinds[name], folder, how, rng)
                except Exception as error:  # noqa: BLE001
                    said = f"{type(error).__name__}: {str(error)[:600]}"
                    trace = traceback.format_exc(limit=-4)[-1500:]
                    failures.append(f"case {case} of seed {seed}, {label}: {said}\n{trace}")
                    came = "wrong"
                    if stop and len(failures) > 20:
                        return told, failures
            told[f"{label}: {came}"] += 1
    return told, failures


@contextlib.contextmanager
def cleaned(folder: Path) -> Iterator[None]:
    """An empty folder, removed afterwards with all in it."""
    with contextlib.ExitStack() as stack:
        folder.mkdir()
        stack.callback(remove, folder)
        yield


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    start = time.perf_counter()
    told, failures = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for label, number in sorted(told.items()):
        print(f"{number:6,d}  {label}")
    for failure in failures:
        print(failure)
    print(f"{sum(told.values()):,} cases, {len(failures)} failures, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(failures))
