"""The demo: ordinary commands on the target `wherefrom.tools.demo`, one after the other, and a report on all of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import wherefrom
from wherefrom import Scores
from wherefrom.errors import expected
from wherefrom.tools import demo as target_of_demo
from wherefrom.tools.cli import measures
from wherefrom.tools.cli.options import Attributed
from wherefrom.tools.cli.results import say
from wherefrom.tools.cli.run import Run
from wherefrom.tools.demo import Digits, use_one_thread
from wherefrom.tools.evaluate import LDS, Truth, mislabeled_curve, random_subsets
from wherefrom.tools.loading import Target
from wherefrom.tools.report import (
    Convergence,
    Overview,
    Provenance,
    Queries,
    Report,
    Retraining,
    Section,
    Spread,
    Suspects,
)

NAME = "wherefrom.tools.demo:problem"
TITLE = "Where did the model learn its digits?"
SOLVER = "CG(preconditioner=EKFAC(), tolerance=0.01, steps=200)"  # for the queries
ROUGH_TOLERANCE = 0.3  # enough for a ranking of the training examples
ROUGH_SOLVER = f"CG(preconditioner=EKFAC(), tolerance={ROUGH_TOLERANCE}, steps=200)"
RIVALS = {"EKFAC, direct": "EKFAC()", "gradient dot": "Identity()"}  # what the scores are compared with
SUBSETS = 30  # random halves of the training examples to train on


def demo(out: str = "wherefrom-demo", seed: int = 0, queries: int = 6, examples: int = 1000, lds: bool = True) -> None:
    """Find the training digits behind a network's answers, and the wrong labels among them.

    For example: wherefrom demo --out digits

    Trains a small network on handwritten digits, a tenth of them with a wrong label, and runs other commands on it:
    attributes its answers to the training examples (score), ranks these by self-influence, checks the scores by
    retraining (evaluate), and writes one HTML report on all of it. Results that are in the folder are taken from there.

    Args:
        out: the folder of the results; the report in it is report.html.
        seed: of the data, the training and everything else.
        queries: held-out digits to show, at most 40.
        examples: digits to train on, 100 to 1300; time grows with the square.
        lds: check against retraining.
    """
    if not 1 <= queries <= target_of_demo.QUERIES:
        raise expected("queries", f"in 1..{target_of_demo.QUERIES}", queries)
    if not 100 <= examples <= target_of_demo.POOL:
        raise expected("examples", f"in 100..{target_of_demo.POOL}", examples)
    seconds: dict[str, float] = {}
    with use_one_thread():
        with _time(seconds, "training"):
            digits = target_of_demo.load_digits(examples, seed)
            target = target_of_demo.make_target(digits, seed)
        _say_data(digits, target)

        damping = target_of_demo.damping_of(examples)
        options = Attributed(NAME, out=out, solver=SOLVER, damping=damping.origin, seed=seed)
        _say_command("score", options)
        run = Run("report", options, target)
        scores = run.scores()
        shown = choose_queries(target, queries)
        _say_queries(scores, target, shown)

        rough = dataclasses.replace(options, solver=ROUGH_SOLVER, out=str(run.folder / "self-influence"))
        _say_command("self-influence", rough)
        with _time(seconds, "self-influence"):
            ranking = Run("self-influence", rough, target)
            values = ranking.self_influence().self_influence
        detection = mislabeled_curve(values, digits.flipped)
        _say_suspects(values, digits)

        measured: dict[str, LDS] = {}
        if lds:
            say(f"\nThe network is trained again on {SUBSETS} random halves of the digits, as with: wherefrom evaluate")
            with _time(seconds, "retraining"):
                measured = compare_with_retraining(run, scores, seed)
        rows = measures.tabulate_detection({"self-influence": detection}) + measures.tabulate_lds(measured)
        run.table("evaluation", {name: [row[name] for row in rows] for name in rows[0]}, len(rows))
        say("AUC: 1 perfect, 0.5 chance. LDS, against retraining: 1 perfect, 0 chance. It judges the formula and its")
        say("solver together; a small residual vouches for the solver alone.")

        configuration = {
            "seed": seed,
            "self-influence": ranking.method.solver,
            "training": target_of_demo.RECIPE,
            "wherefrom": wherefrom.__version__,
        }
        evidence: list[Section] = [Suspects(target.shown("train"), values, detection)]
        if measured:
            evidence.append(Retraining(measured))
        page = compose_report(scores, target, shown, evidence, Provenance(scores, configuration, dict(seconds)))
        with _time(seconds, "report"):
            run.write_report(page)

    parts = scores.provenance["seconds"] | seconds
    words = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
    say(f"\nSeconds   {words}: {sum(parts.values()):.1f} in all")
    say(f"Report    {run.folder / 'report.html'}")


def compose_report(
    scores: Scores, target: Target, shown: Sequence[int], evidence: Sequence[Section], provenance: Provenance
) -> Report:
    """Return the page on all that the demo did.

    Args:
        scores: of the queries.
        target: what they are of.
        shown: the queries that get a card.
        evidence: the sections on how good the scores are.
        provenance: the last section.
    """
    train_examples, query_examples = target.shown("train"), target.shown("queries")
    note = (
        f"Half of the digits shown below are those of {len(query_examples)} that the model finds hardest; the others "
        "are simply the first. Self-influence was solved less exactly than the queries, to a residual of "
        f"{ROUGH_TOLERANCE:g}: enough for a ranking."
    )
    sections = [
        Overview(scores, query_examples, target.page["measurement"]),
        Queries(scores, train_examples, query_examples, shown, notes=[note]),
        *evidence,
        Spread(scores),
        Convergence(scores, query_examples),
        provenance,
    ]
    return Report(TITLE, sections, target.page["lead"])


def compare_with_retraining(run: Run, scores: Scores, seed: int) -> dict[str, LDS]:
    """Compute linear datamodeling scores of the solved influence, of EKFAC alone and of plain gradient products.

    Args:
        run: whose target is trained again, and whose folder keeps what that gave.
        scores: the solved influence.
        seed: of the subsets.
    """
    judged = {"CG, solved": scores}
    for name, solver in RIVALS.items():
        folder = run.folder / name.partition(",")[0].replace(" ", "-")
        options = dataclasses.replace(run.options, solver=solver, out=str(folder))
        judged[name] = Run("score", options, run.target).scores(certify=False)

    masks = random_subsets(scores.values.shape[1], SUBSETS, 0.5, seed + 1)
    retrain = measures.retrain_with(run.target, run.folder / "runs", target_of_demo.REPEATS, seed, paired=False)
    truth = Truth(masks.numpy(), retrain(masks).double().numpy())
    truth.save(run.path("truth.npz"))
    return measures.measure_lds(judged, truth, seed=0)


@torch.no_grad()
def choose_queries(target: Target, count: int) -> list[int]:
    """Return the queries to show: half of them have the largest losses, the others come as they are."""
    x, y = target.queries
    losses = torch.nn.functional.cross_entropy(target.model(x), y, reduction="none")
    hardest = losses.argsort(descending=True, stable=True)[: (count + 1) // 2].tolist()
    others = [i for i in range(len(losses)) if i not in hardest]
    return hardest + others[: count - len(hardest)]


@contextmanager
def _time(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Enter the seconds that a block takes."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


# --- the account ----------------------------------------------------------------------------------------------------


def _say_data(digits: Digits, target: Target) -> None:
    examples, wrong = len(digits.labels), int(digits.flipped.sum())
    right = target_of_demo.measure_accuracy(target.model, digits.held_out)
    fitted = target_of_demo.measure_accuracy(target.model, digits.train)
    steps = f"{target_of_demo.RECIPE.steps(examples)} steps of SGD"
    say(f"Data      {examples:,} handwritten digits to train on, {wrong} of them given a wrong label on purpose")
    say(f"Model     64-128-64-10 network, {steps}: {right:.1%} of {len(digits.held_out[1])} held-out digits right,")
    say(f"          {fitted:.1%} of the training labels fitted, the wrong ones included")


def _say_command(command: str, options: Attributed) -> None:
    """Say which command does the same to a target of the user's."""
    arguments = f'--solver "{options.solver}" --damping "{options.damping}" --seed {options.seed} --out {options.out}'
    say(f"\nAs with: wherefrom {command} {options.name} {arguments}")


def _say_queries(scores: Scores, target: Target, shown: Sequence[int]) -> None:
    """Say how the queries were solved, and which training digits helped and hurt the shown ones most."""
    say(str(scores))
    train, queries, top = target.shown("train"), target.shown("queries"), scores.top(3)

    def name(number: int, score: float) -> str:
        example = train[number]
        mark = "" if example.mark is None else f" ({example.mark})"
        return f"{example.caption.removeprefix('label ')}{mark} {score:+.3g}"

    say("\nWhere does the model know it from? Labels of the three training digits that helped and that hurt most:")
    for i in shown:
        query = queries[i]
        mark = "" if query.mark is None else f", {query.mark}"
        residual = "" if scores.residual is None else f"; residual {float(scores.residual[i]):.1e}"
        late = "" if bool(scores.converged[i]) else ", DID NOT CONVERGE"
        say(f"  query {i}: {query.caption.lower()}{mark}{residual}{late}")
        for side, numbers, values in (
            ("helped", top.proponents[i], top.proponent_scores[i]),
            ("hurt  ", top.opponents[i], top.opponent_scores[i]),
        ):
            words = [name(j, score) for j, score in zip(numbers.tolist(), values.tolist(), strict=True)]
            say(f"    {side}  " + "   ".join(words))
    say("  Sign: positive, and removing that digit would raise f, the negative margin: it helped; negative, it hurt.")
    say(f"  Unit: score / {len(train)} is the predicted change of f. Residual: how exactly it was solved for.")


def _say_suspects(values: torch.Tensor, digits: Digits) -> None:
    """Say how many of the most suspicious digits do have a wrong label."""
    wrong = int(digits.flipped.sum())
    first = values.argsort(descending=True)[:wrong]
    hits = int(digits.flipped[first].sum())
    say(f"Of the {wrong} digits of the largest self-influence {hits} do have a wrong label.")
