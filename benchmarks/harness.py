"""Run one function in a fresh Python process with a fixed number of threads, and measure it.

The function is named ``"package.module:function"``, takes JSON keyword arguments and returns a dict of numpy arrays and
JSON values. A fresh process makes the peak memory its own. A function may time its parts with `phase`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(__file__).resolve().parent / "cache"
RESULTS = Path(__file__).resolve().parent / "results"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

_phases: dict[str, dict[str, float]] = {}


def cpu_seconds() -> float:
    """User plus system seconds of this process, all its threads and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes).

    Linux's VmHWM, which starts afresh at exec. ``ru_maxrss``, the fallback, there also counts the parent at the fork.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Measure a part of the running function: CPU and wall seconds, added up over uses of the same name."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    try:
        yield
    finally:
        spent = _phases.setdefault(name, {"cpu_s": 0.0, "wall_s": 0.0})
        spent["cpu_s"] += cpu_seconds() - cpu
        spent["wall_s"] += time.perf_counter() - wall
        spent["peak_mb"] = peak_mb()


@dataclass
class Run:
    """What one measured process gave: the function's result and its costs."""

    result: dict[str, Any]  # arrays and JSON values
    cpu_s: float
    wall_s: float
    peak_mb: float
    base_mb: float  # resident before the function was called: Python, torch and the imports
    phases: dict[str, dict[str, float]]  # name -> cpu_s, wall_s, peak_mb (of the process so far)
    threads: int
    machine: dict[str, Any] = field(default_factory=dict)

    def save(self, stem: Path) -> None:
        """Write ``stem.npz`` (arrays) and ``stem.json`` (all the rest)."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        arrays = {k: v for k, v in self.result.items() if isinstance(v, np.ndarray)}
        rest = {k: v for k, v in self.result.items() if k not in arrays}
        np.savez(f"{stem}.npz", **arrays)
        Path(f"{stem}.json").write_text(json.dumps({**vars(self), "result": rest}, indent=1))

    @classmethod
    def load(cls, stem: Path) -> Run:
        """Read what `save` wrote."""
        record = json.loads(Path(f"{stem}.json").read_text())
        with np.load(f"{stem}.npz") as arrays:
            record["result"].update({k: arrays[k] for k in arrays})
        return cls(**record)


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, versions, and the load at this moment."""
    import torch

    model = platform.processor()
    memory = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (OSError, ValueError):
        pass
    return {
        "cpu": model,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gb": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def run(
    function: str,
    kwargs: Mapping[str, Any] | None = None,
    threads: int = 1,
    timeout: float | None = None,
    path: str | None = None,
) -> Run:
    """Call ``"module:function"(**kwargs)`` in a fresh process and return its result and costs.

    ``path`` is a folder of packages that only this process sees.

    Raises:
        RuntimeError: if the process failed, with the end of what it wrote.
    """
    environment = dict(os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    paths = [str(ROOT), str(ROOT / "src"), path, environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "run"
        job = {"function": function, "kwargs": dict(kwargs or {}), "threads": threads, "stem": str(stem)}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.harness", "--job", json.dumps(job)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if done.returncode or not Path(f"{stem}.json").exists():
            raise RuntimeError(f"{function} failed (exit {done.returncode}):\n{done.stdout[-4000:]}")
        return Run.load(stem)


def _child(job: Mapping[str, Any]) -> None:
    import torch

    from benchmarks import harness  # this module under its own name, so that `phase` there is the one functions import

    torch.set_num_threads(job["threads"])
    module, name = job["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    before = machine()
    base = peak_mb()
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = function(**job["kwargs"])
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    done = Run(result, cpu, wall, peak_mb(), base, harness._phases, job["threads"], before)
    done.save(Path(job["stem"]))


def main() -> None:
    """Child side: run the job given as JSON."""
    parser = argparse.ArgumentParser(description="Internal: the measured process. Use harness.run from Python.")
    parser.add_argument("--job", required=True, type=json.loads)
    _child(parser.parse_args().job)


if __name__ == "__main__":
    main()
