"""Flipped SST-2 labels found by influence on the validation loss, groups left out, and data selection, with LoRA.

    rt(p) = share of the flipped labels among the p most harmful training examples             (figure 2 and table 5)
    LOGO  = rank correlation of five groups' mean scores and of what leaving each out does     (table 6, appendix D.2)
    selection of 5% and 20%: score after one epoch, train on with the best for five            (table 2)

The setting is in `experiments.hyperinf.sst2_setting`, tables and figure are in `experiments.hyperinf.sst2_tables`.
Each part of each rank and seed is kept in ``out`` as soon as it is done; the same command goes on from there.

    python -m experiments.hyperinf.sst2                        # ranks 8 and 16, three seeds
    python -m experiments.hyperinf.sst2_tables
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import whence
from experiments.hyperinf import sst2_setting as setting
from experiments.hyperinf.sst2_setting import OUT, TASK, Case
from whence.act import select
from whence.evaluate import leave_one_group_out, mislabeled_curve, retrain, run_seed

SHARES = (0.05, 0.2)
DRAWS = 3  # random selections of each size
PUBLISHED = whence.Damping.relative(0.1)
FACTORS = (1.0, 10.0, 100.0, 1000.0)
FISHER = whence.EmpiricalFisher
EXACT = whence.CG(whence.Dual(), tolerance=0.01)


def influence(solver: whence.Solver, damping: whence.Damping = PUBLISHED, curvature: Any = FISHER) -> Callable:
    """A maker of this `Influence`."""
    return functools.partial(whence.Influence, solver, damping, curvature)


METHODS: dict[str, Callable[[], whence.Influence]] = {
    "HyperINF": influence(whence.HyperINF(side="larger")),
    "HyperINF, r × r side": influence(whence.HyperINF()),
    "HyperINF, Fisher matrix": influence(whence.HyperINF(matrix="fim", inverse="cholesky")),
    "DataInf": influence(whence.DataInf()),
    "LiSSA, 10 steps": influence(whence.Neumann(steps=10)),
    "LiSSA, planned, λ = tr C/N": influence(whence.Neumann(), whence.Damping.per_example()),
    "EKFAC": influence(whence.EKFAC()),
    "CG, empirical Fisher": influence(EXACT),
    "CG, Gauss-Newton": influence(EXACT, curvature=whence.GGN),
    "CG, Gauss-Newton, λ = tr C/N": influence(EXACT, whence.Damping.per_example(), whence.GGN),
    "gradient dot": influence(whence.Identity()),
}
JUDGED = ("HyperINF", "DataInf", "LiSSA, 10 steps", "EKFAC", "CG, empirical Fisher", "CG, Gauss-Newton", "gradient dot")
SWEPT = ("HyperINF", "DataInf", "EKFAC", "CG, empirical Fisher")
SLOW = ("LiSSA", "CG")  # a solve for each example: no self-influence


def detection(case: Case, rank: int) -> dict[str, Any]:
    """Scores and CPU seconds of every method, and how well they find the flipped labels."""
    found: dict[str, Any] = {"base": setting.judged(case.base, case.test)}
    with tempfile.TemporaryDirectory() as folder:
        seed, record = run_seed(case.seed, 0, 0), Path(folder) / "run"
        model = setting.tune(setting.adapted(case, rank), case.train, seed, record=record)
        trajectory = whence.Trajectory.load(record)
        found["tuned"] = setting.judged(model, case.test)
        scores, itself, seconds, notes = {}, {}, {}, {}
        for name, make in METHODS.items():
            if "matrix='fim'" in repr(make) and rank > 8:  # 8 r³d³ operations
                continue
            begun = time.process_time()
            method = make().fit(model, TASK, case.train)
            scored = method.score(case.validation, TASK.loss, certify=False, mean=True)
            seconds[name], scores[name] = time.process_time() - begun, scored.values[0]
            if not name.startswith(SLOW):
                itself[name] = method.self_influence()
            notes[name] = {k: scored.provenance[k] for k in ("steps", "passes")}
            if name in SWEPT:
                swept = [method.at(whence.Damping.relative(f)) for f in FACTORS]
                each = [m.score(case.validation, TASK.loss, certify=False, mean=True).values[0] for m in swept]
                found.setdefault("swept", {})[name] = [_curve(s, case)["auc"] for s in each]
        begun = time.process_time()
        method = whence.TracIn(trajectory, rates=False).fit(model, TASK, case.train)
        scores["TracIn"] = method.score(case.validation, TASK.loss).values.mean(0)
        seconds["TracIn"] = time.process_time() - begun
        itself["TracIn"] = method.self_influence()
    curves = {
        name: _curve(s, case) | {"seconds": seconds[name], "notes": notes.get(name)} for name, s in scores.items()
    }
    own = {name: _curve(-s, case) for name, s in itself.items()}
    kept = {name: s.tolist() for name, s in scores.items()}
    return found | {"curves": curves, "self-influence": own, "scores": kept}


def _curve(scores: Tensor, case: Case) -> dict[str, Any]:
    """AUC and rt(p) at p = 0, 0.01, ..., 1 for scores that are lowest where an example harmed."""
    curve = mislabeled_curve(scores, case.flipped, higher_is_suspicious=False, bootstrap=1)
    return {"auc": curve.auc, "detection": curve.detection.tolist(), "oracle": curve.oracle.tolist()}


def left_out(case: Case, rank: int, scores: dict[str, Any]) -> dict[str, Any]:
    """LOGO: trained again without each fifth of each ranking, from the same adapters and in the same order."""

    def train(index: Tensor, seed: int) -> nn.Module:
        return setting.tune(setting.adapted(case, rank), case.train, seed, index)

    def measure(model: nn.Module) -> Tensor:
        return torch.tensor([setting.judged(model, case.validation)[0]])

    kept = OUT / f"sst2-logo-{rank}-{case.seed}"
    runs = functools.partial(
        retrain, train, measure, repeats=1, seed=case.seed, progress=False, folder=kept, paired=True
    )
    chance = torch.rand(len(case.flipped), generator=torch.Generator().manual_seed(case.seed))
    found = {}
    for name in (*JUDGED[:-1], "TracIn", "random"):
        tau = chance if name == "random" else torch.tensor(scores[name])
        logo = leave_one_group_out(tau[None], runs, bootstrap=1)
        flips = [int(case.flipped[torch.as_tensor(logo.groups == g)].sum()) for g in range(5)]
        found[name] = {"spearman": logo.spearman, "changes": logo.changes.tolist(), "flipped": flips}
    everything = torch.ones(1, len(chance), dtype=torch.bool)
    return found | {"noise": float(runs(everything, repeats=4).std())}


def selection(case: Case, rank: int) -> dict[str, Any]:
    """Table 2: (loss, accuracy) on the test phrases of training on from one epoch with what each method chooses."""
    warm = setting.tune(setting.adapted(case, rank), case.train, case.seed, epochs=1)
    N, rng = len(case.flipped), torch.Generator().manual_seed(case.seed)

    def trained(index: Tensor | None, epochs: int = 5) -> tuple[float, float]:
        model = setting.tune(copy.deepcopy(warm).train(), case.train, case.seed + 1, index, epochs)
        return setting.judged(model, case.test)

    def choices(scores: Any, share: float) -> dict[str, Tensor]:
        """The best of all, and the best of each label."""
        labels = case.train["labels"]
        each = [(labels == y).nonzero().flatten() for y in (0, 1)]
        best = [i[torch.as_tensor(select(scores.values[:, i], share).examples)] for i in each]
        return {"": torch.as_tensor(select(scores, share).examples), ", each label": torch.cat(best)}

    found: dict[str, Any] = {"warm": setting.judged(warm, case.test), "all, 1 epoch": trained(None, 1)}
    scored = {}
    for name in JUDGED:
        method = METHODS[name]().fit(warm, TASK, case.train)
        scored[name] = method.score(case.validation, TASK.loss, certify=False, mean=True)
    true = (~case.flipped).nonzero().flatten()
    for share in SHARES:
        k = round(share * N)
        for name in JUDGED:
            for how, chosen in choices(scored[name], share).items():
                shares = [float(t[chosen].double().mean()) for t in (case.flipped, case.train["labels"])]
                found[f"{name}{how}|{share}"] = [*trained(chosen), *shares]
        for name, pool in (("random", torch.arange(N)), ("random, true labels", true)):
            draws = [pool[torch.randperm(len(pool), generator=rng)[:k]] for _ in range(DRAWS)]
            found[f"{name}|{share}"] = torch.tensor([trained(d) for d in draws], dtype=torch.float64).mean(0).tolist()
    return found


def once(part: str, rank: int, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What lies in ``out``, or is made and put there, with its CPU seconds."""
    file = OUT / f"sst2-{part}-{rank}-{seed}.json"
    if not file.exists():
        begun = time.process_time()
        found = make() | {"CPU seconds": time.process_time() - begun}
        file.write_text(json.dumps(found) + "\n")
        print(f"rank {rank}, seed {seed}, {part}: {found['CPU seconds']:.0f} CPU s", flush=True)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore", whence.ConvergenceWarning)  # LiSSA cut short
    OUT.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        case = setting.load(seed)
        for rank in args.ranks:
            found = once("detection", rank, seed, functools.partial(detection, case, rank))
            once("selection", rank, seed, functools.partial(selection, case, rank))
            once("logo", rank, seed, functools.partial(left_out, case, rank, found["scores"]))


if __name__ == "__main__":
    main()
