"""Flipped SST-2 labels found by influence on the validation loss, groups left out, and data selection, with LoRA.

    rt(p) = share of the flipped labels among the p most harmful training examples             (figure 2 and table 5)
    LOGO  = rank correlation of five groups' mean scores and of what leaving each out does     (table 6, appendix D.2)
    selection of 5% and 20%: score after one epoch, train on with the best for five            (table 2)

The setting is in `experiments.hyperinf.sst2_setting`, tables and figure are in `experiments.hyperinf.sst2_tables`.
Every result is kept in ``out`` as soon as it is there; the same command goes on from there.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wherefrom
from experiments.hyperinf import sst2_setting as setting
from experiments.hyperinf.sst2_setting import OUT, TASK, Case
from wherefrom.tools.act import select
from wherefrom.tools.evaluate import leave_one_group_out, mislabeled_curve, retrain, run_seed

SHARES = (0.05, 0.2)
DRAWS = 3  # random selections of each size
PUBLISHED = wherefrom.Damping.relative(0.1)
FACTORS = (1.0, 10.0, 100.0, 1000.0)
FISHER = wherefrom.EmpiricalFisher
EXACT = wherefrom.CG(wherefrom.Dual(), tolerance=0.01)


def influence(solver: wherefrom.Solver, damping: wherefrom.Damping = PUBLISHED, curvature: Any = FISHER) -> Callable:
    """A maker of this `Influence`."""
    return functools.partial(wherefrom.Influence, solver, damping, curvature)


METHODS: dict[str, Callable[[], wherefrom.Influence]] = {
    "HyperINF": influence(wherefrom.HyperINF(side="larger")),
    "HyperINF, r × r side": influence(wherefrom.HyperINF()),
    "HyperINF, Fisher matrix": influence(wherefrom.HyperINF(matrix="fim", inverse="cholesky")),
    "DataInf": influence(wherefrom.DataInf()),
    "LiSSA, 10 steps": influence(wherefrom.Neumann(steps=10)),
    "LiSSA, planned, λ = tr C/N": influence(wherefrom.Neumann(), wherefrom.Damping.per_example()),
    "EKFAC": influence(wherefrom.EKFAC()),
    "CG, empirical Fisher": influence(EXACT),
    "CG, Gauss-Newton": influence(EXACT, curvature=wherefrom.GGN),
    "CG, Gauss-Newton, λ = tr C/N": influence(EXACT, wherefrom.Damping.per_example(), wherefrom.GGN),
    "gradient dot": influence(wherefrom.Identity()),
}
JUDGED = ("HyperINF", "DataInf", "LiSSA, 10 steps", "EKFAC", "CG, empirical Fisher", "CG, Gauss-Newton", "gradient dot")
SWEPT = ("HyperINF", "DataInf", "EKFAC", "CG, empirical Fisher")


@dataclass
class Kept:
    """What one rank and seed gave, by name, in a file that is written again after each new result."""

    case: Case
    rank: int

    def __post_init__(self) -> None:
        self.file = OUT / f"sst2-{self.rank}-{self.case.seed}.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"CPU seconds": 0.0}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name; made if it is not there yet."""
        if name not in self.found:
            begun = time.process_time()
            value = make()
            self.found |= {name: value, "CPU seconds": self.found["CPU seconds"] + time.process_time() - begun}
            self.file.with_suffix(".tmp").write_text(json.dumps(self.found) + "\n")
            self.file.with_suffix(".tmp").replace(self.file)
            print(f"rank {self.rank}, seed {self.case.seed}: {name}", flush=True)
        return self.found[name]


def tuned(case: Case, rank: int) -> tuple[nn.Module, wherefrom.Trajectory]:
    """The attributed model, whose adapters saw all examples, and its run, kept in ``out``."""
    kept, seed = OUT / f"sst2-run-{rank}-{case.seed}", run_seed(case.seed, 0, 0)
    model = setting.adapted(case, rank)
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=OUT) as folder:
            setting.tune(model, case.train, seed, record=Path(folder) / "run")
            (Path(folder) / "run").rename(kept)
    trajectory = wherefrom.Trajectory.load(kept)
    model.load_state_dict(trajectory.checkpoints[-1].state)
    return model.eval(), trajectory


def detection(kept: Kept) -> None:
    """Scores and CPU seconds of every method, and how well they find the flipped labels."""
    case, (model, trajectory) = kept.case, tuned(kept.case, kept.rank)

    def judge(method: Any) -> dict[str, Any]:
        begun = time.process_time()
        fitted = method.fit(model, TASK, case.train)
        values = scored(fitted, case).values.mean(0)
        seconds = time.process_time() - begun
        slow = isinstance(method, wherefrom.Influence) and isinstance(method.solver, (wherefrom.Neumann, wherefrom.CG))
        own = None if slow else _curve(-fitted.self_influence(), case)["auc"]  # slow: a solve for each example
        return _curve(values, case) | {"seconds": seconds, "scores": values.tolist(), "self-influence": own}

    def sweep(method: wherefrom.Influence) -> list[float]:
        fitted = method.fit(model, TASK, case.train)
        each = [fitted.at(wherefrom.Damping.relative(f)) for f in FACTORS]
        return [_curve(scored(m, case).values[0], case)["auc"] for m in each]

    kept.once("base", lambda: setting.judged(case.base, case.test))
    kept.once("tuned", lambda: setting.judged(model, case.test))
    for name, make in METHODS.items():
        if "Fisher matrix" not in name or kept.rank == 8:  # its inverse takes (r d)³ operations
            kept.once(f"detection|{name}", functools.partial(judge, make()))
        if name in SWEPT:
            kept.once(f"swept|{name}", functools.partial(sweep, make()))
    kept.once("detection|TracIn", functools.partial(judge, wherefrom.TracIn(trajectory, rates=False)))


def scored(fitted: Any, case: Case) -> wherefrom.Scores:
    """Scores of the mean validation loss, which is one right-hand side where something is solved; else of each."""
    if isinstance(fitted, wherefrom.FittedInfluence):
        return fitted.solve(case.validation, TASK.loss, certify=False, mean=True).score()
    return fitted.score(case.validation, TASK.loss)


def _curve(scores: Tensor, case: Case) -> dict[str, Any]:
    """AUC and rt(p) at p = 0, 0.01, ..., 1 for scores that are lowest where an example harmed."""
    curve = mislabeled_curve(scores, case.flipped, higher_is_suspicious=False, bootstrap=1)
    return {"auc": curve.auc, "detection": curve.detection.tolist(), "oracle": curve.oracle.tolist()}


def left_out(kept: Kept) -> None:
    """LOGO: trained again without each fifth of each ranking, from the same adapters and in the same order."""
    case, rank = kept.case, kept.rank

    def train(index: Tensor, seed: int) -> nn.Module:
        return setting.tune(setting.adapted(case, rank), case.train, seed, index)

    def measure(model: nn.Module) -> Tensor:
        return torch.tensor([setting.judged(model, case.validation)[0]])

    def judge(tau: Tensor) -> dict[str, Any]:
        logo = leave_one_group_out(tau[None], runs, bootstrap=1)
        flips = [int(case.flipped[torch.as_tensor(logo.groups == g)].sum()) for g in range(5)]
        return {"spearman": logo.spearman, "changes": logo.changes.tolist(), "flipped": flips}

    folder = OUT / f"sst2-logo-{rank}-{case.seed}"
    runs = functools.partial(
        retrain, train, measure, repeats=1, seed=case.seed, progress=False, folder=folder, paired=True
    )
    scores = {name: torch.tensor(kept.found[f"detection|{name}"]["scores"]) for name in (*JUDGED, "TracIn")}
    scores["random"] = torch.rand(len(case.flipped), generator=torch.Generator().manual_seed(_seed(case, 0)))
    for name, tau in scores.items():
        kept.once(f"logo|{name}", functools.partial(judge, tau))
    everything = torch.ones(1, len(case.flipped), dtype=torch.bool)
    kept.once("noise", lambda: float(runs(everything, repeats=4).std()))


def selection(kept: Kept) -> None:
    """Table 2: loss and accuracy on the test phrases of training on from one epoch with what each method chooses."""
    case, N = kept.case, len(kept.case.flipped)
    warm = setting.tune(setting.adapted(case, kept.rank), case.train, _seed(case, 1), epochs=1)
    labels, wrong = case.train["labels"], setting.logits(warm, case.train).argmax(1) != case.train["labels"]

    def trained(index: Tensor | None, epochs: int = 5) -> tuple[float, float]:
        model = setting.tune(copy.deepcopy(warm).train(), case.train, _seed(case, 2), index, epochs)
        return setting.judged(model, case.test)

    def values_of(make: Callable[[], wherefrom.Influence]) -> list[float]:
        return scored(make().fit(warm, TASK, case.train), case).values[0].tolist()

    def judge(chosen: Tensor) -> list[float]:
        """Loss and accuracy, and the shares that are flipped, that the warm model gets wrong, that are positive."""
        return [*trained(chosen), *(float(t[chosen].double().mean()) for t in (case.flipped, wrong, labels))]

    def by_chance(pool: Tensor, k: int) -> list[float]:
        rng = torch.Generator().manual_seed(_seed(case, 3))
        draws = [pool[torch.randperm(len(pool), generator=rng)[:k]] for _ in range(DRAWS)]
        return torch.tensor([judge(d) for d in draws], dtype=torch.float64).mean(0).tolist()

    kept.once("warm", lambda: setting.judged(warm, case.test))
    kept.once("one more epoch", lambda: trained(None, 1))
    for share in SHARES:
        for name, pool in (("random", torch.arange(N)), ("random, true labels", (~case.flipped).nonzero().flatten())):
            kept.once(f"selection|{name}|{share}", functools.partial(by_chance, pool, round(share * N)))
        for name in JUDGED:
            values = torch.tensor(kept.once(f"warm scores|{name}", functools.partial(values_of, METHODS[name])))[None]
            each = [(labels == y).nonzero().flatten() for y in (0, 1)]
            chosen = {name: torch.as_tensor(select(values, share).examples)}
            best = [i[torch.as_tensor(select(values[:, i], share).examples)] for i in each]
            chosen[f"{name}, each label"] = torch.cat(best)
            for what, index in chosen.items():
                kept.once(f"selection|{what}|{share}", functools.partial(judge, index))


def _seed(case: Case, what: int) -> int:
    """One of its own for each purpose: the case's seed itself draws the same permutation as the flips."""
    return run_seed(case.seed, 1, what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore", wherefrom.ConvergenceWarning)  # LiSSA cut short
    OUT.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        case = setting.load(seed)
        for rank in args.ranks:
            kept = Kept(case, rank)
            for part in (detection, left_out, selection):
                part(kept)


if __name__ == "__main__":
    main()
