"""The path of one `attribute` call with EKFAC on a tiny problem: how many files, frames and levels of depth it enters.

    python -m benchmarks.call_path

Somebody who follows the call has to open that many files. Frames are calls of the package's functions, comprehensions
and generators included, each time that they are resumed; depth counts the package's own frames on the stack.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import wherefrom


def trace_call() -> tuple[Counter[str], int, int]:
    """Run the call twice and trace the second: frames by file, all frames, and the deepest level."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    root = str(Path(wherefrom.__file__).parent) + "/"
    files: Counter[str] = Counter()
    depth, deepest = 0, 0

    def follow(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth, deepest
        if not frame.f_code.co_filename.startswith(root):
            return
        if event == "call":
            files[frame.f_code.co_filename.removeprefix(root)] += 1
            depth += 1
            deepest = max(deepest, depth)
        elif event == "return":
            depth -= 1

    def attribute() -> None:
        solver = wherefrom.EKFAC()
        task, train, queries = wherefrom.Classification(), (x, y), (x[:2], y[:2])
        wherefrom.attribute(model, task, train, queries, solver=solver, damping=0.1, progress=False)

    attribute()  # what is loaded and compiled the first time
    sys.setprofile(follow)
    attribute()
    sys.setprofile(None)
    return files, sum(files.values()), deepest


def main() -> None:
    """Print the measures."""
    files, frames, deepest = trace_call()
    print(f"{len(files)} files, {frames:,} frames, {deepest} levels")
    for name, count in files.most_common():
        print(f"{count:7,}  {name}")


if __name__ == "__main__":
    main()
