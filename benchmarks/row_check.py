"""What the certificate of rows costs: passes of per-example gradients with it and without it, and plain passes.

    python -m benchmarks.row_check

The models are those of the other benchmarks with random weights and inputs, as the cost does not depend on the values:
MNIST's multilayer perceptron, the convolutional network of `benchmarks.ggn_product`, and the GPT-2 of
`benchmarks.language_models`. Each is tried on its layout first; then rounds of a pass with the certificate, one without
it and a plain forward and backward pass are taken in turn, in one process with one thread. The first pass after the
layout is the dearest, as every shape is new, so each round begins with a new certificate. The share is the difference
over the plain pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import machine

ROUNDS = 3


def mnist_mlp() -> tuple[Any, Any, Any, int]:
    """784-512-256-128-10 on 6,144 images."""
    import torch

    import wherefrom
    from benchmarks.problems import mlp

    x, y = torch.rand(6144, 784), torch.randint(10, (6144,))
    return mlp((784, 512, 256, 128, 10)), wherefrom.Classification(), (x, y), 256


def small_cnn() -> tuple[Any, Any, Any, int]:
    """Two convolutions and two linear layers on 2,048 images."""
    import torch

    import wherefrom
    from benchmarks.ggn_product import cnn

    x, y = torch.rand(2048, 1, 28, 28), torch.randint(10, (2048,))
    return cnn(), wherefrom.Classification(), (x, y), 256


def gpt2() -> tuple[Any, Any, Any, int]:
    """4 layers x 256, 4,096 words, 128 sequences of 128 tokens, all parameters of the MLP layers."""
    import torch
    import transformers

    from benchmarks.language_models import LAYERS, LENGTH, POSITIONS, VOCABULARY, WIDTH
    from wherefrom.hf import CausalLM

    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    ids = torch.randint(VOCABULARY, (128, LENGTH))
    return net.eval(), CausalLM(), {"input_ids": ids, "labels": ids}, 16


PROBLEMS: dict[str, Callable[[], tuple[Any, Any, Any, int]]] = {"mlp": mnist_mlp, "cnn": small_cnn, "gpt2": gpt2}


def measure(name: str) -> str:
    """A row of the table."""
    import torch

    import wherefrom
    from wherefrom.model.check import RowCheck

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, task, train, batch_size = PROBLEMS[name]()
    parameters = "mlp" if name == "gpt2" else None
    problem = wherefrom.Problem(model, task, train, parameters, batch_size, progress=False)
    problem.examine()
    checked, size = 0, sum(p.numel() for p in problem.parameters.values())

    def rows(check: bool) -> None:
        nonlocal checked
        problem.verification.row_check = RowCheck(size) if check else _no_check()
        for _, batch in problem.batches():
            problem.loss_gradients(batch)
        checked = problem.verification.row_check.checked or checked

    def plain() -> None:
        for _, batch in problem.batches():
            task.loss(task.outputs(model, batch), batch).sum().backward()
            model.zero_grad()

    parts = {"with": lambda: rows(True), "without": lambda: rows(False), "plain": plain}
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(ROUNDS + 1):  # the first fills caches
        for part, run in parts.items():
            start = time.process_time()
            run()
            seconds[part].append(time.process_time() - start)
    shares = [
        (a - b) / c for a, b, c in zip(*(seconds[part][1:] for part in ("with", "without", "plain")), strict=True)
    ]
    middle = {part: statistics.median(values[1:]) for part, values in seconds.items()}
    return (
        f"| {name} | {len(problem.train):,} | {checked} | {middle['plain']:.2f} | {middle['without']:.2f} | "
        f"{middle['with']:.2f} | {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) |"
    )


def _no_check() -> Any:
    """A certificate that never checks."""
    from wherefrom.model.check import RowCheck

    class Never(RowCheck):
        def draw(self, *_: Any, **__: Any) -> list[Any]:
            return []

    return Never(0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), help=", ".join(PROBLEMS))
    print(machine())
    print("| problem | N | examples checked | plain pass, CPU s | rows | rows, certified | certificate / plain pass |")
    print("|---|---|---|---|---|---|---|")
    for name in parser.parse_args().problems:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
