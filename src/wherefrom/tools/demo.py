"""The demo: handwritten digits with wrong labels among them, attributed, checked, and reported on one page.

It needs no download and about half a minute on one core. It does what a user would do, with public names only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import wherefrom
from wherefrom.errors import MissingExtraError, expected
from wherefrom.tools.evaluate import (
    LDS,
    MislabeledCurve,
    SGDRecipe,
    flip_labels,
    linear_datamodeling_score,
    mislabeled_curve,
    random_subsets,
    retrain_small,
    train_small,
)
from wherefrom.tools.report import Example, write_report

Say = Callable[[str], None]
RECIPE = SGDRecipe(lr=3e-2, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=20)
SOLVED = wherefrom.CG(preconditioner=wherefrom.EKFAC(), tolerance=1e-2, steps=200)  # the queries
ROUGHLY = wherefrom.CG(preconditioner=wherefrom.EKFAC(), tolerance=0.3, steps=200)  # a ranking of the training examples
ASKED, SUBSETS, REPEATS = 40, 30, 2
POOL = 1300  # of the 1,797 digits; the others are never trained on


@dataclass(frozen=True)
class Digits:
    """N training digits, some with a wrong label, and held-out ones."""

    x: Tensor  # (N, 64) in [0, 1]
    y: Tensor  # (N,) as trained
    true: Tensor  # (N,)
    flipped: Tensor  # (N,) bool
    held_out: tuple[Tensor, Tensor]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """What the model is trained on."""
        return self.x, self.y


def run(
    say: Say, out: str | Path, seed: int = 0, queries: int = 6, examples: int = 1000, lds: bool = True
) -> wherefrom.Scores:
    """Train, attribute, check and report.

    Args:
        say: takes each line of the account.
        out: the HTML file to write.
        seed: of everything.
        queries: how many held-out digits are shown.
        examples: how many digits are trained on.
        lds: retrain on random halves and compare.

    Returns:
        the scores of the held-out digits, with the training examples' self-influence.

    Raises:
        InputError: for numbers out of range.
        MissingExtraError: if scikit-learn, jinja2 or matplotlib is not installed.
    """
    if not 1 <= queries <= ASKED:
        raise expected("queries", f"in 1..{ASKED}", queries)
    if not 100 <= examples <= POOL:
        raise expected("examples", f"in 100..{POOL}", examples)
    if Path(out).is_dir():
        raise expected("out", "a file", f"the folder {out}", f"Give {Path(out) / 'report.html'}.")
    seconds: dict[str, float] = {}
    with one_thread():
        data = load(examples, seed)
        task, damping = wherefrom.Classification(), damping_of(examples)
        with timed(seconds, "training"):
            model = train_small(build, task, data.train, RECIPE, seed)[0]
        right, fooled = accuracy(model, *data.held_out), accuracy(model, *data.train)
        wrong = int(data.flipped.sum())
        say(f"Data      {examples:,} handwritten digits to train on, {wrong} of them given a wrong label on purpose")
        steps = f"{RECIPE.steps(examples)} steps of SGD"
        say(f"Model     64-128-64-10 network, {steps}: {right:.1%} of {len(data.held_out[0])} held-out digits right,")
        say(f"          {fooled:.1%} of the training labels fitted, the wrong ones included")

        asked = tuple(part[:ASKED] for part in data.held_out)
        influence = wherefrom.Influence(SOLVED, damping, seed=seed).fit(model, task, data.train)
        say(f"\nCoverage  {influence.problem.coverage()}")
        say(f"Damping   {damping.value:.4g}, {damping.origin}: what stopping the training there implies")
        scores = influence.score(asked)
        say(f"Solver    {SOLVED}")
        say(f"Queries   {certificate(scores)}")
        shown = choose(model, asked, queries)
        say_queries(say, scores, data, asked, predictions(model, asked[0]), shown)

        with timed(seconds, "self-influence"):
            values = wherefrom.Influence(ROUGHLY, damping, seed=seed).fit(model, task, data.train).self_influence()
        curve = mislabeled_curve(values, data.flipped)
        say_detection(say, curve, values, data)
        with timed(seconds, "retraining"):
            found = retrained(model, data, asked, scores, seed) if lds else {}
        say_lds(say, found)

    provenance = scores.provenance | {"tolerance": SOLVED.tolerance, "seed": seed}
    scores = dataclasses.replace(scores, self_values=values, provenance=provenance)
    with timed(seconds, "report"):
        write(out, scores, data, asked, model, shown, curve, found, seconds)
    seconds = scores.provenance["seconds"] | seconds
    parts = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
    say(f"\nSeconds   {parts}: {sum(seconds.values()):.1f} in all")
    say(f"Report    {out}")
    return scores


def problem() -> tuple[nn.Module, wherefrom.Classification, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """The demo's trained network, its task, training digits and queries, for ``wherefrom.tools.demo:problem``."""
    data, task = load(1000, 0), wherefrom.Classification()
    with one_thread():
        model = train_small(build, task, data.train, RECIPE, 0)[0]
    return model, task, data.train, tuple(part[:ASKED] for part in data.held_out)


# --- the work -------------------------------------------------------------------------------------------------------


def load(examples: int, seed: int) -> Digits:
    """Shuffled digits of scikit-learn, a tenth of the training labels wrong."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        advice = 'Run: pip install "wherefrom[demo]"'
        raise MissingExtraError(f"The demo needs scikit-learn, which is not installed. {advice}") from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(pixels).float()[order] / 16, torch.from_numpy(labels).long()[order]
    noisy, flipped = flip_labels(y[:examples], 0.1, 10, seed)
    return Digits(x[:examples], noisy, y[:examples], flipped, (x[POOL:], y[POOL:]))


def build() -> nn.Module:
    """The untrained network."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def damping_of(examples: int) -> wherefrom.Damping:
    """The damping that the training implies; no sweep."""
    return wherefrom.Damping.from_training(RECIPE.lr, RECIPE.steps(examples), RECIPE.momentum)


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """The predicted classes, (B,)."""
    return model(x).argmax(1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right predictions."""
    return float((predictions(model, x) == y).float().mean())


@torch.no_grad()
def choose(model: nn.Module, asked: tuple[Tensor, ...], count: int) -> list[int]:
    """Half of the shown queries have the largest losses, the others come as they are."""
    losses = nn.functional.cross_entropy(model(asked[0]), asked[1], reduction="none")
    hard = losses.argsort(descending=True, stable=True)[: (count + 1) // 2].tolist()
    return hard + [i for i in range(len(losses)) if i not in hard][: count - len(hard)]


def retrained(
    model: nn.Module, data: Digits, asked: tuple[Tensor, ...], scores: wherefrom.Scores, seed: int
) -> dict[str, LDS]:
    """Linear datamodeling scores of the solved influence, of EKFAC alone and of plain gradient products."""
    task = wherefrom.Classification()
    masks = random_subsets(len(data.x), SUBSETS, 0.5, seed + 1)
    targets = retrain_small(build, task, data.train, asked, masks, REPEATS, RECIPE, seed + 2)
    damping = damping_of(len(data.x))
    rivals = {"CG, solved": scores.values}
    for name, solver in (("EKFAC, direct", wherefrom.EKFAC()), ("gradient dot", wherefrom.Identity())):
        influence = wherefrom.Influence(solver, damping, seed=seed).fit(model, task, data.train)
        rivals[name] = influence.score(asked, certify=False).values
    return {name: linear_datamodeling_score(values, masks, targets) for name, values in rivals.items()}


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Enter the seconds that a block takes."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Work this small is fastest on one thread, much so if something else runs; the setting comes back as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the account ----------------------------------------------------------------------------------------------------


def certificate(scores: wherefrom.Scores) -> str:
    """How the solves of the queries went, in a line."""
    residual = scores.residual
    worst = "not measured" if residual is None else f"{float(residual.max()):.1e}"
    good, q = int(scores.converged.sum()), len(scores.converged)
    return f"{good} of {q} converged in {scores.provenance['steps']} steps; worst residual {worst} (0 is exact)"


def label(data: Digits, j: int) -> str:
    """A training digit's label, with the true one if it was flipped."""
    return f"{int(data.y[j])}" + (f" (really {int(data.true[j])})" if bool(data.flipped[j]) else "")


def say_queries(
    say: Say, scores: wherefrom.Scores, data: Digits, asked: tuple[Tensor, ...], predicted: Tensor, shown: Sequence[int]
) -> None:
    """Proponents and opponents of the shown queries."""
    n, top = len(data.x), scores.top(3)
    say("\nWhere does the model know it from? Labels of the three training digits that helped and that hurt most:")
    for i in shown:
        truth, guess = int(asked[1][i]), int(predicted[i])
        residual = "" if scores.residual is None else f"residual {float(scores.residual[i]):.1e}"
        state = "" if bool(scores.converged[i]) else ", DID NOT CONVERGE"
        say(f"  query {i}: a {truth}, the model says {guess}{'' if truth == guess else ' (wrong)'}; {residual}{state}")
        for sign, index, values in (
            ("helped", top.proponents[i], top.proponent_scores[i]),
            ("hurt  ", top.opponents[i], top.opponent_scores[i]),
        ):
            found = [f"{label(data, int(j))} {float(v):+.3g}" for j, v in zip(index, values, strict=True)]
            say(f"    {sign}  " + "   ".join(found))
    say("  Sign: positive, and removing that digit would raise f, the negative margin: it helped; negative, it hurt.")
    say(f"  Unit: score / {n} is the predicted change of f. Residual: how exactly it was solved for.")


def say_detection(say: Say, curve: MislabeledCurve, values: Tensor, data: Digits) -> None:
    """How soon self-influence finds the wrong labels."""
    wrong, (low, high) = int(data.flipped.sum()), curve.auc_interval
    hits = int(data.flipped[values.argsort(descending=True)[:wrong]].sum())
    say(f"\nWrong labels, found by self-influence (every example solved to a residual of {ROUGHLY.tolerance:g}):")
    say(f"  AUC {curve.auc:.3f} ({low:.3f} to {high:.3f}; chance 0.5), average precision {curve.average_precision:.3f}")
    say(f"  (chance {curve.base_rate:.3f}); of the {wrong} most suspicious digits {hits} do have a wrong label")


def say_lds(say: Say, found: dict[str, LDS]) -> None:
    """How well the scores foretell retraining."""
    if not found:
        return
    say(f"\nAgainst retraining on {SUBSETS} random halves, {REPEATS} times each (LDS: 1 perfect, 0 chance):")
    for name, score in found.items():
        low, high = score.interval
        ceiling = "" if score.ceiling is None else f", ceiling {score.ceiling:.2f}"
        say(f"  {name:14s} {score.mean:.3f} ({low:.3f} to {high:.3f}{ceiling})")
    say("  This judges the formula and its solver together; a small residual vouches for the solver alone.")


def write(
    out: str | Path,
    scores: wherefrom.Scores,
    data: Digits,
    asked: tuple[Tensor, ...],
    model: nn.Module,
    shown: Sequence[int],
    curve: MislabeledCurve,
    found: dict[str, LDS],
    seconds: dict[str, float],
) -> None:
    """The report."""
    n, wrong = len(data.x), int(data.flipped.sum())

    def training(j: int) -> Example:
        flipped = bool(data.flipped[j])
        mark = f"really {int(data.true[j])}" if flipped else None
        return Example(f"label {int(data.y[j])}", image=1 - data.x[j].view(8, 8), mark=mark)

    with torch.no_grad():
        outputs = model(asked[0]).softmax(1)

    def query(i: int) -> Example:
        truth, guess = int(asked[1][i]), int(outputs[i].argmax())
        mark = None if truth == guess else f"taken for {guess}"
        detail = f"{float(outputs[i, truth]):.1%} for {truth}, loss {-float(outputs[i, truth].log()):.2g}"
        return Example(f"A {truth}", image=1 - asked[0][i].view(8, 8), mark=mark, detail=detail)

    write_report(
        out,
        scores,
        title="Where did the model learn its digits?",
        lead=f"A small network was trained on {n:,} handwritten digits, {wrong} of which were given a wrong label on "
        "purpose. For each digit that it had not seen, these are the training examples behind its answer.",
        measurement="the negative margin of the right digit (log-odds against it)",
        train_examples=[training(j) for j in range(n)],
        query_examples=[query(i) for i in range(len(asked[0]))],
        show=shown,
        detection=curve,
        lds=found,
        notes=[
            f"Half of the digits shown below are those of {len(asked[0])} that the model finds hardest; the others are "
            "simply the first. Self-influence was solved less exactly than the queries, to a residual of "
            f"{ROUGHLY.tolerance:g}: enough for a ranking."
        ],
        configuration={"self-influence": ROUGHLY, "training": RECIPE, "wherefrom": wherefrom.__version__},
        cost=seconds,
    )
