"""What shortlists of a language model's training sequences miss: words, and stores of projected gradients.

    python -m benchmarks.shortlists --sizes 4096 16384 65536 262144

The GPT-2 and the data of ``experiments.language.setting``, EKFAC of the MLP layers. Recall of the exact best 10 and 100
sequences of each query in a shortlist of its own of 1%, 5% and 10% of the training set; CPU seconds of the build, bytes
per sequence on the disk, CPU milliseconds per query, and how the exact scores are spread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiments.language.setting import Sizes, prepared

import wherefrom
from benchmarks.harness import machine
from wherefrom.hf import CausalLM
from wherefrom.tools.evaluate import tail

BEST, SHARES = (10, 100), (0.01, 0.05, 0.1)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def recalls(cheap: wherefrom.Scores, exact: wherefrom.Scores) -> str:
    """Mean recalls over the queries, as cells of a table."""
    n = exact.values.shape[1]
    lists = [cheap.top(round(share * n)).proponents for share in SHARES]
    return " | ".join(f"{float(wherefrom.recall(own, exact, k).mean()):.2f}" for k in BEST for own in lists)


def stored(influence: wherefrom.FittedInfluence, queries: Any, size: int) -> tuple[wherefrom.Scores, str]:
    """Scores by a store, and its costs as cells of a table."""
    with tempfile.TemporaryDirectory() as folder:
        store, build = timed(lambda: wherefrom.GradientStore.build(influence, folder, size))
        bytes_each = sum(f.stat().st_size for f in Path(folder).iterdir()) / len(influence.problem.train)
        scores, asking = timed(lambda: store.score(queries))
    noise = scores.provenance["measured"]["sketch noise"]
    return scores, f"{build:.0f} | {bytes_each:,.0f} | {1e3 * asking / len(scores.values):.0f} | {noise:.2f}"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 16384, 65536, 262144])
    parser.add_argument("--width", type=int, default=Sizes.width)
    parser.add_argument("--train", type=int, default=Sizes.train)
    parser.add_argument("--damping", type=float, default=0.1, help="over the mean eigenvalue of each layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = prepared(Sizes(width=args.width, train=args.train))
    model, train, queries = setting.tuned(), setting.train, setting.queries
    settings = wherefrom.Influence(wherefrom.EKFAC(), wherefrom.Damping.relative(args.damping), parameters="mlp")
    influence, fit = timed(lambda: settings.fit(model, CausalLM(), train))
    exact, full = timed(lambda: influence.score(queries, certify=False))
    q, n = exact.values.shape
    print(f"{q} queries, {n} sequences of {setting.sizes.length} tokens, {influence.problem.coverage()}.")
    print(f"EKFAC: fit {fit:.0f} CPU s, exact scores {full:.0f} CPU s.")
    spread = [tail(row) for row in exact.values]
    parts = (statistics.median(getattr(t, name) for t in spread) for name in ("hill", "slope", "r2", "top", "gini"))
    print("Medians: exponent {:.2f} (Hill), {:.2f} (line, R2 {:.3f}), top 1% {:.3f}, Gini {:.2f}.\n".format(*parts))
    shares = (f"{k} in {share:.0%}" for k in BEST for share in SHARES)
    print(f"| method | {' | '.join(shares)} | build, CPU s | bytes each | ms a query | sketch noise |")
    print("|---|" + "---|" * 10)
    texts, asked = [*train["input_ids"]], [*queries["input_ids"]]
    for words in (wherefrom.TFIDF(), wherefrom.BM25()):
        _, build = timed(lambda words=words: words.fit(texts))
        cheap, asking = timed(lambda words=words: words.score(asked))
        print(f"| {words} | {recalls(cheap, exact)} | {build:.1f} | | {1e3 * asking / q:.1f} | |", flush=True)
    plain = wherefrom.Influence(wherefrom.Identity(), parameters="mlp").fit(model, CausalLM(), train)
    for name, method in (("gradients", plain), ("whitened", influence)):
        if method is plain:
            print(
                f"| {name}, not projected | {recalls(plain.score(queries, certify=False), exact)} | | | | |", flush=True
            )
        for size in args.sizes:
            cheap, costs = stored(method, queries, size)
            print(f"| {name}, k = {size} | {recalls(cheap, exact)} | {costs} |", flush=True)
    one = {name: t[:1] for name, t in queries.items()}
    index = exact.top(n // 20).proponents[0].sort().values
    _, whole = timed(lambda: influence.score(one, certify=False))
    again, some = timed(lambda: wherefrom.rescored(influence, one, index, certify=False))
    gap = float((again.values[0] - exact.values[0, index]).abs().max() / exact.values[0].abs().max())
    print(f"\nOne query: {whole:.2f} CPU s for all sequences, {some:.2f} for {len(index)}, off by {gap:.0e}.")
    print("Machine: " + ", ".join(f"{k} {v}" for k, v in machine().items()))


if __name__ == "__main__":
    main()
