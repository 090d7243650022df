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


def read(part: str) -> Found:
    """What a part gave, by rank."""
    found: Found = {}
    for file in sorted(OUT.glob(f"sst2-{part}-*-*.json")):
        found.setdefault(int(file.stem.split("-")[2]), []).append(json.loads(file.read_text()))
    return dict(sorted(found.items()))


def half(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half width of the 95% interval of the mean over the first axis."""
    n = len(values)
    return t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5 if n > 1 else np.full(values.shape[1:], np.nan)


def cell(values: list[float], scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """A mean and its interval."""
    array = scale * np.array(values)
    return f"{array.mean():{'+' if sign else ''}.{digits}f} ± {half(array):.{digits}f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def detection(runs: list[dict[str, Any]]) -> str:
    """AUC, rt(20%), rt(40%), the AUC of self-influence, and seconds."""
    rows = []
    for name in runs[0]["curves"]:
        curves = [r["curves"][name] for r in runs]
        own = [r["self-influence"][name]["auc"] for r in runs if name in r["self-influence"]]
        cells = [cell([c["auc"] for c in curves], 100)]
        cells += [cell([c["detection"][p] for c in curves], 100) for p in (20, 40)]
        cells += [cell(own, 100) if own else "", f"{np.mean([c['seconds'] for c in curves]):.1f}"]
        rows.append([name, *cells])
    return table(["method", "AUC", "rt(20%)", "rt(40%)", "AUC, self-influence", "CPU s"], rows)


def swept(runs: list[dict[str, Any]]) -> str:
    """AUC against the damping."""
    rows = [
        [name, *(cell([r["swept"][name][i] for r in runs], 100) for i in range(len(FACTORS)))]
        for name in runs[0]["swept"]
    ]
    return table(["AUC at damping", *(f"{f:g}" for f in FACTORS)], rows)


def left_out(runs: list[dict[str, Any]]) -> str:
    """Correlation, and the changes and flipped labels of each group."""
    rows = []
    for name in runs[0]:
        if name in ("noise", "CPU seconds"):
            continue
        changes = 1000 * np.array([r[name]["changes"] for r in runs]).mean(0)
        flips = np.array([r[name]["flipped"] for r in runs]).mean(0)
        each = ", ".join(f"{r[name]['spearman']:+.1f}" for r in runs)
        said = [", ".join(f"{c:+.1f}" for c in changes), ", ".join(f"{f:.0f}" for f in flips)]
        rows.append([name, cell([r[name]["spearman"] for r in runs], digits=2, sign=True), each, *said])
    heads = ["method", "Spearman", "each seed", "change of loss × 1000, most helpful group first", "flipped in it"]
    noise = np.mean([r["noise"] for r in runs])
    return table(heads, rows) + f"\n\nDeviation of the loss over orders: {1000 * noise:.1f} × 1/1000."


def selection(runs: list[dict[str, Any]]) -> str:
    """Test accuracy and loss minus those of random selections of the same size."""
    names = dict.fromkeys(key.split("|")[0] for key in runs[0] if "|" in key)
    rows = []
    for name in names:
        cells = []
        for share in SHARES:
            mine, other = ([r[f"{k}|{share}"] for r in runs] for k in (name, "random"))
            pairs = list(zip(mine, other, strict=True))
            if name == "random":
                cells += [cell([m[1] for m in mine], 100), cell([m[0] for m in mine], digits=3), ""]
                continue
            made_of = [f"{100 * np.mean([m[i] for m in mine]):.0f}" for i in (2, 3) if len(mine[0]) > 2]
            cells += [cell([m[1] - o[1] for m, o in pairs], 100, sign=True)]
            cells += [cell([m[0] - o[0] for m, o in pairs], digits=3, sign=True), " / ".join(made_of)]
        rows.append([name, *cells])
    heads = [
        "chosen by",
        *(f"{s:.0%}: {what}" for s in SHARES for what in ("accuracy", "loss", "% flipped / positive")),
    ]
    extra = {"after the warm-up epoch": "warm", "one more epoch on all": "all, 1 epoch"}
    said = [
        f"{what}: accuracy {cell([r[key][1] for r in runs], 100)}, loss {cell([r[key][0] for r in runs], digits=3)}"
        for what, key in extra.items()
    ]
    return table(heads, rows) + f"\n\n{DRAWS} random selections each; {'; '.join(said)}."


def draw(found: Found) -> None:
    """rt(p), a panel for each rank: means over seeds and 95% intervals."""
    style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 * len(found), 3.3), layout="constrained")
    p, first = np.linspace(0, 100, 101), None
    for i, (rank, runs) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), i + 1, sharey=first)
        first = first or axes
        axes.plot(
            p, 100 * np.array(runs[0]["curves"]["TracIn"]["oracle"]), color="black", lw=1, ls="--", label="oracle"
        )
        axes.plot(p, p, color="#999999", lw=1, ls=":", label="random")
        for name, colour in COLOURS.items():
            each = 100 * np.array([r["curves"][name]["detection"] for r in runs])
            mean, width = each.mean(0), half(each)
            axes.plot(p, mean, color=colour, label=name)
            axes.fill_between(p, (mean - width).clip(0), (mean + width).clip(max=100), color=colour, alpha=0.12, lw=0)
        axes.set(title=f"rank {rank}", xlabel="p, % inspected", xlim=(0, 100), ylim=(0, 100))
        if not i:
            axes.set_ylabel("rt(p), % of the flipped labels found")
            axes.legend(fontsize=7, loc="lower right")
    OUT.mkdir(exist_ok=True)
    figure.savefig(HERE / "sst2.svg", metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(OUT / "sst2.png", dpi=110, bbox_inches="tight")


def main() -> None:
    for part, said in (("detection", detection), ("logo", left_out), ("selection", selection)):
        for rank, runs in read(part).items():
            print(f"\n### {part}, rank {rank}, {len(runs)} seeds\n\n{said(runs)}")
            if part == "detection":
                print(f"\n{swept(runs)}\n")
                for what in ("base", "tuned"):
                    print(f"{what}: test accuracy {cell([r[what][1] for r in runs], 100)}")
            print(f"CPU seconds a seed: {np.mean([r['CPU seconds'] for r in runs]):.0f}")
    draw(read("detection"))


if __name__ == "__main__":
    main()
