"""Exact unrolled differentiation: does it foretell retraining, and what does it cost?

    python -m benchmarks.unrolled fixed halves steps        # or some of them; digits needs WHEREFROM_GROUNDTRUTH

fixed    initial weights and order as they were, 1% or 5% of the data dropped at random; beside it other methods
halves   half of the data dropped, and the mean over new weights and orders: the targets of the tables of `lds`
steps    peak memory and time against the number of steps; the figure ``unrolled.svg``

All on digits in float64: an MLP 64-128-64-10, SGD with momentum 0.9, rate 0.03, decay 1e-3, minibatches of 32, 20
epochs. Each measurement is a process of its own, with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks import problems
from benchmarks.harness import RESULTS, machine, phase, run

if TYPE_CHECKING:
    from wherefrom.training.trajectory import Trajectory

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
SHARES = (0.01, 0.05)
STEPS = (125, 250, 500, 1000, 2000)
HERE = Path(__file__).resolve().parent
Data = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Data, Data]:
    """Training examples and queries, in float64."""
    p = problems.load("digits")
    return (p.x.double(), p.y), (p.xq.double(), p.yq)


def trained(
    activation: str, seed: int, train: Data, steps: int = 1000, widths: tuple[int, ...] = (64, 128, 64, 10)
) -> tuple[nn.Module, Trajectory]:
    """A recorded training run of the recipe."""
    import wherefrom

    torch.manual_seed(seed)
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), ACTIVATIONS[activation]())]
    model = nn.Sequential(*layers[:-1]).double()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
    x, y = train
    with tempfile.TemporaryDirectory() as folder:
        recorder = wherefrom.Recorder(Path(folder) / "run", model, optimiser, every=max(1, steps // 6))
        done = 0
        while done < steps:
            for index in torch.randperm(len(x)).split(32)[: steps - done]:
                recorder.saw(index)
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[index]), y[index]).backward()
                optimiser.step()
                done += 1
        return model, recorder.close()


def fixed(activation: str, subsets: int, seed: int = 0) -> dict[str, Any]:
    """Scores of each method, and measurements after dropping shares of the data from the same run."""
    import wherefrom
    from wherefrom.tools.evaluate import random_subsets

    train, queries = digits()
    model, trajectory = trained(activation, seed, train)
    task, n = wherefrom.Classification(), len(train[0])
    methods = {
        "Unrolled": wherefrom.Unrolled(trajectory, dropped=0),
        "SOURCE": wherefrom.SOURCE(trajectory, segments=3),
        "SOURCE, CG": wherefrom.SOURCE(trajectory, segments=3, solver=wherefrom.CG(wherefrom.EKFAC(), tolerance=0.01)),
        "Influence, CG(Nystrom)": wherefrom.Influence(wherefrom.CG(wherefrom.Nystrom(), tolerance=0.03), 0.01),
        "Influence, EKFAC": wherefrom.Influence(wherefrom.EKFAC(), wherefrom.Damping.relative(0.1)),
        "TracIn": wherefrom.TracIn(trajectory),
    }
    found: dict[str, Any] = {"accuracy": float((model(queries[0]).argmax(1) == queries[1]).double().mean())}
    fits: dict[str, Any] = {}
    for name, method in methods.items():
        with phase(f"fit {name}"):
            fits[name] = method.fit(model, task, train)
        with phase(f"score {name}"):
            found[f"scores {name}"] = fits[name].score(queries).values.numpy()
    replay = fits["Unrolled"].replay
    found["replay error"] = replay.error
    for share in SHARES:
        masks = random_subsets(n, subsets, 1 - share, seed=1)
        with phase(f"retrain {share:g}"):
            found[f"targets {share:g}"] = replay.measure(masks, queries).numpy()
        found[f"masks {share:g}"] = masks.numpy()
        found[f"smooth {share:g}"] = float(replay.metasmoothness(share).mean())
    return found


def halves(seed: int) -> dict[str, Any]:
    """Scores of one model of the recipe, with ReLU as in the ground truth."""
    import wherefrom

    train, queries = digits()
    model, trajectory = trained("relu", seed, train)
    with phase("all"):
        fitted = wherefrom.Unrolled(trajectory, dropped=0.5 if not seed else 0).fit(
            model, wherefrom.Classification(), train
        )
        values = fitted.score(queries).values.numpy()
    return {"scores": values, "smooth": fitted.measured.get("metasmoothness")}


def cost(steps: int, segment: int | None, queries: int) -> dict[str, Any]:
    """One fit and score of a larger model, 64-256-128-10, without metasmoothness."""
    import wherefrom

    train, asked = digits()
    model, trajectory = trained("gelu", 0, train, steps, (64, 256, 128, 10))
    asked = (asked[0][:queries], asked[1][:queries])
    short = trained("gelu", 0, train, 4, (64, 256, 128, 10))  # everything is loaded and warm before memory is counted
    wherefrom.Unrolled(short[1], dropped=0).fit(short[0], wherefrom.Classification(), train).score(asked)
    with phase("before"):
        pass
    with phase("all"):
        method = wherefrom.Unrolled(trajectory, dropped=0, segment=segment).fit(
            model, wherefrom.Classification(), train
        )
        method.score(asked)
    return {}


def lds(scores: np.ndarray, masks: np.ndarray, targets: np.ndarray) -> str:
    """Mean and interval."""
    from wherefrom.tools.evaluate import linear_datamodeling_score

    found = linear_datamodeling_score(scores, masks, targets)
    return f"{found.mean:.3f} ({found.interval[0]:.3f} to {found.interval[1]:.3f})"


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over queries of Spearman's correlation of the scores."""
    from scipy.stats import spearmanr

    return float(np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]))


def part_fixed(args: argparse.Namespace) -> list[str]:
    """The table with everything but the data as it was."""
    lines = [
        "| activation | method | LDS, 1% dropped | LDS, 5% dropped | Spearman with unrolled | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for activation in ACTIVATIONS:
        done = run("benchmarks.unrolled:fixed", {"activation": activation, "subsets": args.subsets})
        found, spent = done.result, {name: p["cpu_s"] for name, p in done.phases.items()}
        for name in (k.removeprefix("scores ") for k in found if k.startswith("scores ")):
            scores = found[f"scores {name}"]
            each = [lds(scores, found[f"masks {s:g}"], found[f"targets {s:g}"]) for s in SHARES]
            same = agreement(scores, found["scores Unrolled"])
            seconds = spent[f"fit {name}"] + spent[f"score {name}"]
            lines.append(f"| {activation} | {name} | {' | '.join(each)} | {same:.2f} | {seconds:.1f} |")
        smooth = ", ".join(f"{found[f'smooth {s:g}']:.3f} at {s:.0%}" for s in SHARES)
        notes.append(
            f"{activation}: metasmoothness {smooth} dropped; replay error {found['replay error']:.1e}; accuracy on the "
            f"queries {found['accuracy']:.2f}; unrolling {spent['fit Unrolled']:.1f} s and "
            f"{spent['score Unrolled'] / 100:.2f} s a query; {args.subsets} retrainings "
            f"{spent['retrain 0.01']:.0f} s; peak {done.peak_mb:.0f} MB"
        )
    return [*lines, "", *notes]


def part_halves(args: argparse.Namespace) -> list[str]:
    """The row for the table of `lds`."""
    p = problems.load("digits")
    assert p.masks is not None and p.targets is not None
    runs = [run("benchmarks.unrolled:halves", {"seed": s}) for s in range(args.seeds)]
    each = [r.result["scores"] for r in runs]
    from wherefrom.tools.evaluate import linear_datamodeling_score

    single = [linear_datamodeling_score(s, p.masks, p.targets, bootstrap=1).mean for s in each]
    spread = f" ± {np.std(single, ddof=1):.3f}" if len(single) > 1 else ""
    seconds = np.mean([r.phases["all"]["cpu_s"] for r in runs])
    together = f"{lds(np.mean(each, axis=0), p.masks, p.targets)}, {len(each)} models"
    return [
        "| problem | method | LDS, one model (± over seeds) | LDS, ensemble (95% interval) | CPU s | peak MB |",
        "|---|---|---|---|---|---|",
        f"| digits | unrolled | {np.mean(single):.3f}{spread} | {together} | {seconds:.1f} "
        f"| {max(r.peak_mb for r in runs):.0f} |",
        "",
        f"metasmoothness with half of the data dropped {runs[0].result['smooth']:.3f}",
    ]


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Processes in which glibc gives tensors back to the system when they die: what is resident is what is in use."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def part_steps(args: argparse.Namespace) -> list[str]:
    """Cost against the number of steps, and the figure."""
    lines = ["| steps | states kept every | memory, MB | CPU s |", "|---|---|---|---|"]
    points: dict[str, list[tuple[int, float, float]]] = {"square root": [], "every state": []}
    for steps in STEPS:
        for name, segment in (("square root", None), ("every state", steps)):
            if name == "every state" and steps > 1000:
                continue
            job = {"steps": steps, "segment": segment, "queries": args.cost_queries}
            seconds = run("benchmarks.unrolled:cost", job).phases["all"]["cpu_s"]
            with freed_at_once():
                done = run("benchmarks.unrolled:cost", job)
            memory = done.peak_mb - done.phases["before"]["peak_mb"]
            points[name].append((steps, memory, seconds))
            said = "one segment" if segment else f"{int(np.ceil(np.sqrt(steps)))}"
            lines.append(f"| {steps} | {said} | {memory:.0f} | {seconds:.1f} |")
            print(lines[-1], flush=True)
    t, memory, seconds = (np.array(column) for column in zip(*points["square root"], strict=True))
    draw(points, HERE / "unrolled.svg")
    a, b = np.polyfit(np.sqrt(t), memory, 1)
    worst = np.abs(a * np.sqrt(t) + b - memory).max()
    power = np.polyfit(np.log(t), np.log(seconds), 1)[0]
    return [*lines, "", f"memory = {a:.2f} sqrt(steps) {b:+.1f} MB, to within {worst:.1f} MB; time ~ steps^{power:.2f}"]


def draw(points: dict[str, list[tuple[int, float, float]]], file: Path) -> None:
    """Memory and time against steps; memory with the square root that fits it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "wherefrom",
        "svg.fonttype": "none",
        "font.size": 9,
        "legend.frameon": False,
    }
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9))
    colours = {"square root": "C0", "every state": "C1"}
    labels = {"square root": "a state every √steps", "every state": "every state kept"}
    for axis, column, title in zip(axes, (1, 2), ("memory, MB", "CPU seconds"), strict=True):
        for name, rows in points.items():
            t, v = np.array([r[0] for r in rows]), np.array([r[column] for r in rows])
            axis.plot(t, v, "o-", color=colours[name], label=labels[name], ms=4)
        t, v = (np.array([r[c] for r in points["square root"]]) for c in (0, column))
        if column == 1:
            a, b = np.polyfit(np.sqrt(t), v, 1)
            axis.plot(t, a * np.sqrt(t) + b, "k:", lw=1.5, label=f"{a:.1f} √steps − {-b:.0f}")
        axis.set(xscale="log", yscale="log", xlabel="training steps", ylabel=title, xticks=t, xticklabels=t)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    figure.savefig(RESULTS / f"{file.stem}.png", dpi=110)


PARTS = {"fixed": part_fixed, "halves": part_halves, "steps": part_steps}


def main() -> None:
    """Print the tables and write them to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--subsets", type=int, default=100, help="retrainings for each share dropped")
    parser.add_argument("--seeds", type=int, default=5, help="models of `halves`")
    parser.add_argument("--cost-queries", type=int, default=4, help="queries of `steps`")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    texts = []
    for name in args.parts:
        texts.append("\n".join(PARTS[name](args)))
        print(texts[-1], flush=True)
    facts = machine()
    where = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "load")
    stem = RESULTS / f"unrolled_{time.strftime('%Y%m%d-%H%M%S')}"
    Path(f"{stem}.md").write_text("\n\n".join(texts) + f"\n\nMachine: {where}; one thread.\n")
    Path(f"{stem}.json").write_text(json.dumps({"arguments": vars(args), "machine": facts}, indent=1))
    print(f"\nwritten: {stem}.md", flush=True)


if __name__ == "__main__":
    main()
