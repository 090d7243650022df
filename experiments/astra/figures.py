"""Figures 3 and 4 of the paper on small problems: objective and LDS of SNI and ASTRA against iterations.

    python -m experiments.astra.figures digits concrete            # measures, then draws
    python -m experiments.astra.figures --redraw                   # draws what was measured

Figure 3: SNI (`Neumann`) and ASTRA without momentum, 200 iterations, batch 256, learning rates 1 to 1e-5 by tens; the
best has the lowest mean objective over the last ten iterations, as in the paper. Beside it the step from the spectrum,
without a sweep. Figure 4: damping 1e-4, iterates projected on EKFAC eigenvectors with eigenvalue above 10^-i.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import wherefrom
from experiments.astra import setting
from experiments.astra.setting import Setting, due
from wherefrom.errors import DivergenceError
from wherefrom.persample.directions import Directions
from wherefrom.persample.eigenbasis import KroneckerBlock
from wherefrom.solvers.neumann import ASTRA, Neumann

HERE = Path(__file__).resolve().parent
RATES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
STEPS, TAIL, SMALL = 200, 10, 1e-4
BINS = range(1, 6)


def sni(step: float | None, seed: int) -> Neumann:
    """SNI at a fixed learning rate from 0 (then the second iterate is step x b); without one, as `Neumann` starts."""
    return Neumann(step=step, batch=256, steps=STEPS, seed=seed, start="zero" if step else "preconditioned")


def astra(step: float | None, seed: int) -> ASTRA:
    """ASTRA as in figures 3 and 4: no momentum, no decay."""
    return ASTRA(step=step, batch=256, steps=STEPS, momentum=0.0, decay=1.0, seed=seed)


METHODS = {"SNI": sni, "ASTRA": astra}


def projected(s: Setting, factors: dict[str, KroneckerBlock], x: Directions, bin: int) -> Directions:
    """X projected on the span of the EKFAC eigenvectors with eigenvalues above 10^-bin."""
    inside = x.to_eigenbasis(factors).multiply(lambda name: factors[name].ekfac > 10.0**-bin)
    return inside.dense()


def curve(s: Setting, method: str, step: float | None, seed: int, every: int, bins: bool = False) -> dict[str, Any]:
    """Mean objective and LDS along a run; ``final`` is the mean objective of the last ten iterations, inf if lost."""
    inverse = METHODS[method](step, seed).fit(s.curvature, s.damping)
    factors = wherefrom.EKFAC().fit(s.curvature, s.damping).factors if bins else {}  # type: ignore[attr-defined]
    found: dict[str, Any] = {"step": inverse.plan.step, "at": [], "objective": [], "lds": [], "final": float("inf")}
    found |= {"bins": {i: {"objective": [], "lds": []} for i in BINS}} if bins else {}
    tail = []
    try:
        for k, (x, _) in enumerate(inverse.iterates(s.b), 1):
            if not due(k, STEPS, every, TAIL) and k > 2:
                continue
            h = float(s.objective(x).mean())
            tail += [h] if k > STEPS - TAIL else []
            if k % every and k > 2:
                continue
            found["at"].append(k)
            found["objective"].append(h)
            found["lds"].append(s.lds(x))
            for i in BINS if bins else ():
                p = projected(s, factors, x, i)
                found["bins"][i]["objective"].append(float(s.objective(p).mean()))
                found["bins"][i]["lds"].append(s.lds(p))
        found["final"] = float(np.mean(tail))
    except DivergenceError:
        found["diverged"] = True
    return found


def best(runs: dict[str, dict[str, Any]]) -> str:
    """The learning rate with the lowest mean objective of the last ten iterations."""
    return min(runs, key=lambda k: runs[k]["final"])


def measure(name: str, models: int, queries: int, damping: float | None, every: int, bins: bool) -> dict[str, Any]:
    """All runs of one problem: every learning rate on the first model, the best and our own step on all of them.

    With ``bins``, the best of the sweep alone, projected.
    """
    sweep: dict[str, dict[str, Any]] = {m: {} for m in METHODS}
    curves: dict[str, list[dict[str, Any]]] = {}
    exact, sizes, level = [], {}, 0.0
    for seed in range(models):
        s = setting.load(name, seed, queries, damping)
        level = s.damping
        x = wherefrom.CG(preconditioner=wherefrom.Dual(), tolerance=1e-3).fit(s.curvature, s.damping).apply(s.b)
        start = wherefrom.EKFAC().fit(s.curvature, s.damping)
        exact.append({"objective": float(s.objective(x).mean()), "lds": s.lds(x), "ekfac": s.lds(start.apply(s.b))})
        if bins:
            factors = start.factors  # type: ignore[attr-defined]
            exact[-1]["bins"] = {i: s.lds(projected(s, factors, x, i)) for i in BINS}
            sizes = {i: sum(int((f.ekfac > 10.0**-i).sum()) for f in factors.values()) for i in BINS}
        for method in METHODS:
            if seed == 0:
                for rate in RATES:
                    sweep[method][f"{rate:g}"] = curve(s, method, rate, seed, every if not bins else STEPS)
                    print(f"  {name} {method} {rate:g}: {sweep[method][f'{rate:g}']['final']:.5g}", flush=True)
            rate = float(best(sweep[method]))
            curves.setdefault(f"{method}, best of sweep", []).append(curve(s, method, rate, seed, every, bins))
            if not bins:
                curves.setdefault(f"{method}, no sweep", []).append(curve(s, method, None, seed, every))
    return {"sweep": sweep, "curves": curves, "exact": exact, "sizes": sizes, "damping": level}


# --- drawing ---


def band(axis: Any, at: list[int], values: np.ndarray, **style: Any) -> None:
    """Mean over models with one standard error."""
    mean = values.mean(0)
    (line,) = axis.plot(at, mean, **style)
    if len(values) > 1:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        axis.fill_between(at, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)


def gap(runs: list[dict[str, Any]], exact: list[dict[str, Any]]) -> np.ndarray:
    """(h - h*) / |h*| of the mean objective, (models, points)."""
    least = np.array([e["objective"] for e in exact[: len(runs)]])[:, None]
    return (np.array([r["objective"] for r in runs]) - least) / np.abs(least)


STYLE = {
    "SNI, best of sweep": {"color": "#c65d21", "linestyle": "--"},
    "SNI, no sweep": {"color": "#c65d21"},
    "ASTRA, best of sweep": {"color": "#1f5fa8", "linestyle": "--"},
    "ASTRA, no sweep": {"color": "#1f5fa8"},
}


def figure3(data: dict[str, Any], file: Path) -> None:
    """Relative objective gap (log) and LDS; thin: the other learning rates of the sweep."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, len(data), figsize=(4.6 * len(data), 6.2), sharex=True, squeeze=False)
    for column, (name, d) in enumerate(data.items()):
        top, bottom = axes[0, column], axes[1, column]
        for method, runs in d["sweep"].items():
            for rate, r in runs.items():
                if rate == best(runs):
                    continue
                thin = {"color": STYLE[f"{method}, no sweep"]["color"], "linewidth": 0.6, "alpha": 0.5}
                top.plot(r["at"], gap([r], d["exact"])[0], **thin)
                bottom.plot(r["at"], r["lds"], **thin)
        for label, runs in d["curves"].items():
            said = f"{label} ({np.mean([r['step'] for r in runs]):.2g})"
            band(top, runs[0]["at"], gap(runs, d["exact"]), label=said, **STYLE[label])
            band(bottom, runs[0]["at"], np.array([r["lds"] for r in runs]), **STYLE[label])
        bottom.axhline(np.mean([e["lds"] for e in d["exact"]]), color="black", linewidth=0.8, label="exact solve")
        ekfac = np.mean([e["ekfac"] for e in d["exact"]])
        bottom.axhline(ekfac, color="black", linewidth=0.8, linestyle=":", label="EKFAC")
        top.set(title=f"{name}, damping {d['damping']:g}", yscale="log", ylim=(3e-3, 30))
        bottom.set(xlabel="iteration, batch 256", ylim=(0, None))
        top.legend(fontsize=7.5, frameon=False)
        bottom.legend(fontsize=7.5, frameon=False, loc="lower right")
    axes[0, 0].set_ylabel("objective above its minimum, (h - h*) / |h*|")
    axes[1, 0].set_ylabel("LDS")
    _save(figure, file)


def figure4(data: dict[str, Any], file: Path) -> None:
    """Minus the objective (log) and LDS in each subspace, a column a problem and method; at the right the exact LDS."""
    plt = _pyplot()
    columns = [(name, label) for name, d in data.items() for label in d["curves"]]
    figure, axes = plt.subplots(2, len(columns), figsize=(3.1 * len(columns), 6.2), sharex=True, squeeze=False)
    colours = plt.get_cmap("viridis_r")(np.linspace(0.1, 0.95, len(BINS)))
    for column, (name, label) in enumerate(columns):
        d, top, bottom = data[name], axes[0, column], axes[1, column]
        runs = d["curves"][label]
        for i, colour in zip(BINS, colours, strict=True):
            key = str(i)
            h = -np.array([r["bins"][key]["objective"] for r in runs])
            band(top, runs[0]["at"], np.where(h > 0, h, np.nan), color=colour, label=f"eigenvalues > 1e-{i}")
            band(bottom, runs[0]["at"], np.array([r["bins"][key]["lds"] for r in runs]), color=colour)
            bottom.plot(STEPS + 6, np.mean([e["bins"][key] for e in d["exact"]]), "_", color=colour, markersize=9)
        every = {"color": "black", "linewidth": 1.0, "linestyle": "--", "label": "all"}
        h = -np.array([r["objective"] for r in runs])
        band(top, runs[0]["at"], np.where(h > 0, h, np.nan), **every)
        band(bottom, runs[0]["at"], np.array([r["lds"] for r in runs]), **every)
        top.set(title=f"{name}, {label.split(',')[0]} ({runs[0]['step']:g})", yscale="log")
        bottom.set(xlabel="iteration, batch 256")
        bottom.plot(STEPS + 6, np.mean([e["lds"] for e in d["exact"]]), "_", color="black", markersize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=min(6, 2 * len(columns)), frameon=False
    )
    for name in data:  # the same axes for both methods of a problem
        same = [i for i, (n, _) in enumerate(columns) if n == name]
        for r in range(2):
            limits = [axes[r, i].get_ylim() for i in same]
            for i in same:
                axes[r, i].set_ylim(min(a for a, _ in limits), max(b for _, b in limits))
    axes[0, 0].set_ylabel("-h, mean over queries (higher is further)")
    axes[1, 0].set_ylabel("LDS")
    _save(figure, file, bottom=0.06)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "wherefrom", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, file: Path, bottom: float = 0.0) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(file, metadata={"Date": None})
    figure.savefig(file.parent / "out" / f"{file.stem}.png", dpi=110)


def subspaces(data: dict[str, Any]) -> str:
    """Figure 4 in numbers: directions in each subspace, and LDS of the projected exact solve and of both methods."""
    lines = ["| problem | eigenvalues above | directions | LDS, exact | SNI at 50, 200 | ASTRA at 50, 200 |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, d in data.items():
        for i in map(str, BINS):
            cells = []
            for runs in d["curves"].values():
                lds = np.mean([r["bins"][i]["lds"] for r in runs], axis=0)
                cells.append(", ".join(f"{lds[runs[0]['at'].index(k)]:.3f}" for k in (50, 200)))
            exact = np.mean([e["bins"][i] for e in d["exact"]])
            lines.append(f"| {name} | 1e-{i} | {d['sizes'][i]:,} | {exact:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(data: dict[str, Any]) -> str:
    """What the curves end at: learning rates, objectives above the minimum, LDS."""
    lines = ["| figure | problem | curve | step | objective above its minimum at 50, 200 | LDS at 50, 200 | exact |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for number, of in data.items():
        for name, d in of.items():
            for label, runs in d["curves"].items():
                g, lds = gap(runs, d["exact"]).mean(0), np.mean([r["lds"] for r in runs], axis=0)
                at = [runs[0]["at"].index(k) for k in (50, 200) if k in runs[0]["at"]]
                cells = ", ".join(f"{g[i]:.3g}" for i in at), ", ".join(f"{lds[i]:.3f}" for i in at)
                end, step = np.mean([e["lds"] for e in d["exact"]]), np.mean([r["step"] for r in runs])
                lines.append(f"| {number} | {name} | {label} | {step:.2g} | {cells[0]} | {cells[1]} | {end:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, draw ``figure3.svg`` and ``figure4.svg``, and print what they end at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"])
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--figures", nargs="+", default=["3", "4"], choices=["3", "4"], help="which to measure")
    parser.add_argument("--keep", action="store_true", help="keep what else was measured before")
    parser.add_argument("--redraw", action="store_true", help="draw out/figures.json again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", wherefrom.AttributionWarning)
    kept = HERE / "out" / "figures.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = json.loads(kept.read_text()) if args.keep or args.redraw else {"3": {}, "4": {}}
    start = time.process_time()
    for name in () if args.redraw else args.problems:
        for number in args.figures:
            small = number == "4"
            data[number][name] = measure(name, args.models, args.queries, SMALL if small else None, 10, small)
            kept.write_text(json.dumps(data))
    data = json.loads(kept.read_text())  # keys are text from here on
    print(f"{time.process_time() - start:.0f} CPU seconds; {setting.where()}")
    figure3(data["3"], HERE / "figure3.svg")
    figure4(data["4"], HERE / "figure4.svg")
    print(summary(data))
    print(subspaces(data["4"]))


if __name__ == "__main__":
    main()
