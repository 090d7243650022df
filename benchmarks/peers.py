"""kronfluence 1.0.1 on the benchmark problems: EKFAC fit and pairwise scores, CPU, float32.

What it is given: all Linear layers, the summed training loss, batch sizes chosen by a sweep to be the fastest for it,
eigendecompositions in float64 (its default). Its scores have our sign and no 1/N: positive means that z helped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import problems
from benchmarks.harness import CACHE, Run, phase, run

# Batch sizes found by `tune`: covariance pass, eigenvalue ("Lambda") pass, training side of the scores; and whether
# the eigenvalue pass loops over the examples of a batch. They change its time and memory, not its result.
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"covariance": 512, "eigenvalues": 256, "scores": 256, "iterative": True},
    "concrete": {"covariance": 256, "eigenvalues": 256, "scores": 256, "iterative": True},
    "mnist": {"covariance": 512, "eigenvalues": 128, "scores": 256, "iterative": True},
}


def kronfluence(
    problem: str,
    labels: str = "true",
    dampings: Sequence[float | None] = (None,),
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    examples: int | None = None,
    sampling_seed: int = 0,
) -> dict[str, Any]:
    """Fit EKFAC once and score with each damping; None is its heuristic, 0.1 x the mean eigenvalue of each layer.

    Phases: ``covariance``, ``eigenbasis``, ``eigenvalues`` (together the fit) and ``scores 0``, ``scores 1``, ... one
    per damping.

    Args:
        problem: name of a benchmark problem.
        labels: "true" (its ``use_empirical_fisher=True``) or "sampled" (its default).
        dampings: absolute, or None for the heuristic.
        seed: which trained model.
        settings: batch sizes in place of `SETTINGS`.
        examples: use only the first so many training examples (for `tune`).
        sampling_seed: of the global generator, from which kronfluence tasks sample labels.

    Returns:
        ``scores``: (len(dampings), Q, N) float32; ``dampings``; ``settings``; ``version``.
    """
    import logging

    import torch
    import torch.nn.functional as F
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.version import __version__
    from torch.utils.data import TensorDataset

    p = problems.load(problem)
    n = examples or len(p.x)
    chosen = {**SETTINGS[problem], **(settings or {})}
    classify = p.kind == "classification"

    class PeerTask(Task):
        def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
            x, y = batch
            h = model(x)
            if classify:
                if sample:
                    y = torch.multinomial(h.detach().softmax(-1), 1).squeeze(-1)
                return F.cross_entropy(h, y, reduction="sum")
            h = h.squeeze(-1)
            if sample:
                y = h.detach() + torch.randn_like(h) * 0.5**0.5
            return (h - y).square().sum()

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
            x, y = batch
            h = model(x)
            if not classify:
                return (h.squeeze(-1) - y).abs().sum()
            right = h.gather(-1, y[:, None])
            others = h.scatter(-1, y[:, None], -torch.inf).logsumexp(-1, keepdim=True)
            return -(right - others).sum()

    torch.manual_seed(sampling_seed)
    data, queries = TensorDataset(p.x[:n], p.y[:n]), TensorDataset(p.xq, p.yq)
    task = PeerTask()
    model = prepare_model(p.model(seed), task)
    matrices = []
    with tempfile.TemporaryDirectory() as output:
        analyzer = Analyzer("run", model, task, cpu=True, disable_tqdm=True, output_dir=output, log_level=logging.ERROR)
        factor_args = FactorArguments(
            strategy="ekfac",
            use_empirical_fisher=labels == "true",
            use_iterative_lambda_aggregation=chosen["iterative"],
            covariance_max_examples=None,
            lambda_max_examples=None,
        )
        common = {"factors_name": "ekfac", "factor_args": factor_args}
        with phase("covariance"):
            analyzer.fit_covariance_matrices(dataset=data, per_device_batch_size=min(chosen["covariance"], n), **common)
        with phase("eigenbasis"):
            analyzer.perform_eigendecomposition(**common)
        with phase("eigenvalues"):
            analyzer.fit_lambda_matrices(dataset=data, per_device_batch_size=min(chosen["eigenvalues"], n), **common)
        for i, damping in enumerate(dampings):
            with phase(f"scores {i}"):
                analyzer.compute_pairwise_scores(
                    scores_name=f"scores{i}",
                    factors_name="ekfac",
                    query_dataset=queries,
                    train_dataset=data,
                    per_device_query_batch_size=len(p.xq),
                    per_device_train_batch_size=min(chosen["scores"], n),
                    score_args=ScoreArguments(damping_factor=damping),
                )
                matrices.append(analyzer.load_pairwise_scores(f"scores{i}")["all_modules"].numpy())
    return {
        "scores": np.stack(matrices).astype(np.float32),
        "dampings": list(dampings),
        "labels": labels,
        "settings": chosen,
        "version": __version__,
    }


FIT = ("covariance", "eigenbasis", "eigenvalues")


def fit_seconds(done: Run) -> float:
    """CPU seconds of the fit."""
    return sum(done.phases[k]["cpu_s"] for k in FIT)


def score_seconds(done: Run, index: int = 0) -> float:
    """CPU seconds of the scores of one damping."""
    return done.phases[f"scores {index}"]["cpu_s"]


def cached(
    problem: str,
    labels: str = "true",
    dampings: Sequence[float | None] = (None,),
    seed: int = 0,
    threads: int = 1,
    fresh: bool = False,
) -> Run:
    """`kronfluence` in its own process, kept in ``benchmarks/cache/kronfluence``; ``fresh`` measures it again."""
    name = "-".join("heuristic" if d is None else f"{d:g}" for d in dampings)
    stem = CACHE / "kronfluence" / f"{problem}_{labels}_{name}_seed{seed}_threads{threads}"
    if fresh or not Path(f"{stem}.json").exists():
        arguments = {"problem": problem, "labels": labels, "dampings": list(dampings), "seed": seed}
        run("benchmarks.peers:kronfluence", arguments, threads=threads).save(stem)
    return Run.load(stem)


def tune(problem: str, examples: int, threads: int = 1) -> list[dict[str, Any]]:
    """CPU seconds of each phase and peak memory over batch sizes, on the first so many examples."""
    rows = []
    for batch in (16, 64, 128, 256, 512, 1024):
        for iterative in (False, True):
            if batch > examples:
                continue
            settings = {"covariance": batch, "eigenvalues": batch, "scores": batch, "iterative": iterative}
            arguments = {"problem": problem, "settings": settings, "examples": examples}
            done = run("benchmarks.peers:kronfluence", arguments, threads=threads)
            spent = {k: round(v["cpu_s"], 3) for k, v in done.phases.items()}
            rows.append({"batch": batch, "iterative": iterative, **spent, "peak_mb": round(done.peak_mb)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run it by itself and print its costs."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("problems", nargs="*", default=["digits", "concrete"], help="any of digits concrete mnist")
    parser.add_argument("--labels", choices=("true", "sampled"), default="true")
    parser.add_argument("--seeds", type=int, default=1, help="how many of the trained models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure again even if kept")
    parser.add_argument(
        "--tune", type=int, metavar="EXAMPLES", help="sweep its batch sizes on so many examples instead"
    )
    args = parser.parse_args()
    for name in args.problems:
        if args.tune:
            tune(name, args.tune, args.threads)
            continue
        p = problems.load(name)
        for seed in range(min(args.seeds, len(p.states))):
            done = cached(name, args.labels, (p.damping, None), seed, args.threads, args.fresh)
            spent = ", ".join(f"{k} {v['cpu_s']:.2f}" for k, v in done.phases.items())
            fit = fit_seconds(done)
            print(f"{name} seed {seed}: fit {fit:.2f} CPU s ({spent}), wall {done.wall_s:.1f}, {done.peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
