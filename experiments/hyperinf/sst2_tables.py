"""The tables and the figure of what `experiments.hyperinf.sst2` kept.

    python -m experiments.hyperinf.sst2_tables

Every number is a mean over seeds with the half width of its 95% interval (Student's t).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from experiments.hyperinf.sst2 import DRAWS, FACTORS, SHARES
from experiments.hyperinf.sst2_setting import HERE, OUT
from experiments.lissa.problems import style

COLOURS = {
    "HyperINF": "#d55e00",
    "DataInf": "#0072b2",
    "TracIn": "#56b4e9",
    "EKFAC": "#009e73",
    "CG, Gauss-Newton": "#cc79a7",
    "CG, empirical Fisher": "#8c564b",
    "LiSSA, 10 steps": "#e69f00",
}
Found = dict[int, list[dict[str, Any]]]  # rank -> a record for each seed


def read() -> Found:
    """The records, by rank."""
    found: Found = {}
    for file in sorted(OUT.glob("sst2-*-*.json")):
        found.setdefault(int(file.stem.split("-")[1]), []).append(json.loads(file.read_text()))
    return dict(sorted(found.items()))


def each(runs: list[dict[str, Any]], part: str) -> dict[str, list[Any]]:
    """The results of a part by what comes after its name, one for each seed; only what all seeds have."""
    names = [key.removeprefix(f"{part}|") for key in runs[0] if key.startswith(f"{part}|")]
    return {n: [r[f"{part}|{n}"] for r in runs] for n in names if all(f"{part}|{n}" in r for r in runs)}


def half(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half width of the 95% interval of the mean over the first axis."""
    n = len(values)
    return t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5 if n > 1 else np.full(values.shape[1:], np.nan)


def cell(values: Any, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """A mean and its interval."""
    array = scale * np.array(values)
    return f"{array.mean():{'+' if sign else ''}.{digits}f} ± {half(array):.{digits}f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def detection(runs: list[dict[str, Any]]) -> str:
    """AUC, and less that of HyperINF; rt(20%), rt(40%); AUC of self-influence; seconds; AUC against the damping."""
    rows, first = [], [r["detection|HyperINF"]["auc"] for r in runs]
    for name, found in each(runs, "detection").items():
        own = [f["self-influence"] for f in found]
        cells = [cell([f["auc"] for f in found], 100)]
        cells += [cell([f["auc"] - h for f, h in zip(found, first, strict=True)], 100, sign=True)]
        cells += [cell([f["detection"][p] for f in found], 100) for p in (20, 40)]
        cells += ["" if None in own else cell(own, 100), f"{np.mean([f['seconds'] for f in found]):.1f}"]
        rows.append([name, *cells])
    heads = ["method", "AUC", "less HyperINF's", "rt(20%)", "rt(40%)", "AUC, self-influence", "CPU s"]
    swept = [[name, *(cell(list(v), 100) for v in zip(*f, strict=True))] for name, f in each(runs, "swept").items()]
    said = table(["AUC at damping", *(f"{f:g}" for f in FACTORS)], swept)
    judged = [f"{what} {cell([r[what][1] for r in runs], 100)}" for what in ("base", "tuned")]
    return f"{table(heads, rows)}\n\n{said}\n\nTest accuracy: {', '.join(judged)}."


def left_out(runs: list[dict[str, Any]]) -> str:
    """Correlation, and the changes and flipped labels of each group."""
    rows = []
    for name, found in each(runs, "logo").items():
        changes, flips = (np.array([f[key] for f in found]).mean(0) for key in ("changes", "flipped"))
        seeds = ", ".join(f"{f['spearman']:+.1f}" for f in found)
        said = [", ".join(f"{1000 * c:+.0f}" for c in changes), ", ".join(f"{f:.0f}" for f in flips)]
        rows.append([name, cell([f["spearman"] for f in found], digits=2, sign=True), seeds, *said])
    heads = ["method", "Spearman", "each seed", "change of loss × 1000, most helpful group first", "flipped in it"]
    noise = np.mean([r["noise"] for r in runs if "noise" in r])
    return f"{table(heads, rows)}\n\nDeviation of the loss over orders: {1000 * noise:.1f} / 1000."


def selection(runs: list[dict[str, Any]]) -> str:
    """Test accuracy and loss minus those of random selections of the same size."""
    found = each(runs, "selection")
    rows = []
    for name in dict.fromkeys(key.split("|")[0] for key in found):
        cells = []
        for share in SHARES:
            mine, other = np.array(found[f"{name}|{share}"]), np.array(found[f"random|{share}"])
            gain = mine if name == "random" else mine[:, :2] - other[:, :2]
            cells += [cell(gain[:, 1], 100, sign=name != "random"), cell(gain[:, 0], digits=3, sign=name != "random")]
            cells.append(" / ".join(f"{100 * v:.0f}" for v in mine[:, 2:].mean(0)))
        rows.append([name, *cells])
    heads = [
        "chosen by",
        *(f"{s:.0%}: {w}" for s in SHARES for w in ("accuracy", "loss", "% flipped / wrong / positive")),
    ]
    said = [
        f"{what}: accuracy {cell([r[what][1] for r in runs], 100)}, loss {cell([r[what][0] for r in runs], digits=3)}"
        for what in ("warm", "one more epoch")
    ]
    return f"{table(heads, rows)}\n\n{DRAWS} random selections each; {'; '.join(said)}."


def draw(found: Found) -> None:
    """rt(p), a panel for each rank: means over seeds and 95% intervals."""
    style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 * len(found), 3.3), layout="constrained")
    p, first = np.linspace(0, 100, 101), None
    for i, (rank, runs) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), i + 1, sharey=first)
        first, curves = first or axes, each(runs, "detection")
        axes.plot(p, 100 * np.array(curves["HyperINF"][0]["oracle"]), color="black", lw=1, ls="--", label="oracle")
        axes.plot(p, p, color="#999999", lw=1, ls=":", label="random")
        for name, colour in COLOURS.items():
            values = 100 * np.array([c["detection"] for c in curves[name]])
            mean, width = values.mean(0), half(values)
            axes.plot(p, mean, color=colour, label=name)
            axes.fill_between(p, (mean - width).clip(0), (mean + width).clip(max=100), color=colour, alpha=0.12, lw=0)
        axes.set(title=f"rank {rank}", xlabel="p, % inspected", xlim=(0, 100), ylim=(0, 100))
        if not i:
            axes.set_ylabel("rt(p), % of the flipped labels found")
            axes.legend(fontsize=7, loc="lower right")
    figure.savefig(HERE / "sst2.svg", metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(OUT / "sst2.png", dpi=110, bbox_inches="tight")


def main() -> None:
    found = read()
    for part in (detection, left_out, selection):
        for rank, runs in found.items():
            print(f"\n### {part.__name__}, rank {rank}, {len(runs)} seeds\n\n{part(runs)}")
    for rank, runs in found.items():
        print(f"\nrank {rank}: {np.mean([r['CPU seconds'] for r in runs]):.0f} CPU s a seed")
    draw(found)


if __name__ == "__main__":
    main()
