"""EKFAC of a language model side by side: wherefrom, kronfluence, dattri-llm, bergson, and what none of them can avoid.

    python -m benchmarks.language_models --sequences 1000 --peers kronfluence dattri_llm bergson --path FOLDER

A GPT-2 of 4 layers x 256 with 4,096 words, its MLP layers, the empirical Fisher, 50 queries, damping 0.1 x the mean
eigenvalue of each layer. Every measurement is a fresh process with one thread. The unavoidable parts are measured with
plain torch on the same shapes, each by the fastest way known to us.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import CACHE, RESULTS, Run, machine, phase, run

WIDTH, LAYERS, VOCABULARY, LENGTH, POSITIONS = 256, 4, 4096, 128, 1024
QUERIES = 50
STEPS, BATCH, RATE = 120, 16, 1e-3  # of the training
MEMORY = 1.5 * 2**30  # bytes that wherefrom may cache
AMPLE = 14 * 2**30  # bytes with which all of its rows are kept


@functools.cache
def tokenizer() -> Any:
    """Byte-level BPE of the training text, kept."""
    import tokenizers

    path = CACHE / "language" / f"bpe{VOCABULARY}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator([_text("valid")], VOCABULARY, show_progress=False)
        made.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


def _text(name: str) -> str:
    return (Path(os.environ["WHEREFROM_DATA"]) / "wikitext-2" / f"{name}.txt").read_text(encoding="utf-8")


def sequences(name: str, count: int) -> Any:
    """The first so many sequences of LENGTH tokens of a text, (count, LENGTH) int64; kept."""
    import torch

    path = CACHE / "language" / f"{name}{VOCABULARY}.npy"
    if not path.exists():
        np.save(path, np.array(tokenizer().encode(_text(name)).ids))
    ids = torch.from_numpy(np.load(path))
    return ids[: count * LENGTH].view(count, LENGTH)


def model() -> Any:
    """The trained GPT-2 in eval mode; trained once with a fixed seed, and kept."""
    import torch
    import transformers

    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    path = CACHE / "language" / "gpt2.pt"
    if not path.exists():
        _train(net, sequences("valid", 1000))
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path))
    return net.eval()


def _train(net: Any, x: Any) -> None:
    import torch

    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE)
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        some = x[torch.randint(len(x), (BATCH,), generator=rng)]
        optimiser.zero_grad()
        net(input_ids=some, labels=some).loss.backward()
        optimiser.step()


def ours(count: int, batch_size: int = 16, memory: float = MEMORY) -> dict[str, Any]:
    """EKFAC fit and scores by wherefrom. Phases ``fit`` and ``scores``.

    Args:
        memory: bytes; the rows of the first sweep are kept as far as half of it holds them.

    Returns:
        ``scores``: (Q, N) float32.
    """
    import wherefrom
    from wherefrom.hf import CausalLM

    net, task = model(), CausalLM()
    influence = wherefrom.Influence(
        wherefrom.EKFAC(), wherefrom.Damping.relative(0.1), wherefrom.EmpiricalFisher, "mlp", batch_size, memory=memory
    )
    train, queries = ({"input_ids": t, "labels": t} for t in (sequences("valid", count), sequences("test", QUERIES)))
    with phase("fit"):
        fitted = influence.fit(net, task, train)
    with phase("scores"):
        scores = fitted.score(queries, measurement=task.loss, certify=False)
    return {"scores": scores.values.numpy().astype(np.float32)}


def unavoidable(count: int, batch_size: int = 8) -> dict[str, Any]:
    """The parts that an EKFAC fit and its scores are made of, in plain torch on the same shapes, one phase each.

    ``sweep``: forward and backward of the model as it is, without weight gradients, down to the first MLP.
    ``sweep, fused``: the same with GPT-2's activation in one operation. ``covariances``: half of a a^T and g g^T, in
    stripes. ``rotations`` and ``terms``: tokens into the eigenbases; per-example gradients there, squared and summed.
    ``gradients``: per-example gradients. ``queries``: their products with QUERIES matrices, 32 examples at a time.
    ``eigenvectors``: of all covariances, in float64.
    """
    import torch
    import torch.nn.functional as F
    from transformers.activations import NewGELUActivation

    net, x = model().requires_grad_(False), sequences("valid", count)
    net.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _module, _inputs, y: y.detach().requires_grad_())

    def sweep() -> None:
        for some in x.split(batch_size):
            logits = net(input_ids=some, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), some[:, 1:].flatten(), reduction="sum").backward()

    net(input_ids=x[:batch_size], use_cache=False)
    with phase("sweep"):
        sweep()
    for module in net.modules():
        if isinstance(module, NewGELUActivation):
            module.forward = functools.partial(F.gelu, approximate="tanh")
    with phase("sweep, fused"):
        sweep()
    torch.set_grad_enabled(False)
    m, repeats = 32, LAYERS * count // 32
    a, g = torch.randn(m, LENGTH, 4 * WIDTH + 1), torch.randn(m, LENGTH, WIDTH)  # the second layer of an MLP
    b, h = torch.randn(m, LENGTH, WIDTH + 1), torch.randn(m, LENGTH, 4 * WIDTH)  # the first

    def covariance(t: Any, stripe: int = 256) -> None:
        flat, out = t.flatten(0, 1), torch.zeros(t.shape[2], t.shape[2])
        for _ in range(repeats):
            for i in range(0, len(out), stripe):
                out[i : i + stripe, : i + stripe].addmm_(flat[:, i : i + stripe].T, flat[:, : i + stripe])

    def rotation(t: Any) -> None:
        q, out = torch.randn(t.shape[2], t.shape[2]), torch.empty(t.shape[0] * LENGTH, t.shape[2])
        for _ in range(repeats):
            torch.mm(t.flatten(0, 1), q, out=out)

    def terms(left: Any, right: Any, square: bool) -> None:
        out = torch.empty(left.shape[2], right.shape[2])
        total = torch.zeros_like(out)
        for _ in range(repeats):
            for p, q in zip(left, right, strict=True):
                torch.mm(p.T, q, out=out)
                if square:
                    total.addcmul_(out, out)

    def products() -> None:
        for left, right in ((a, g), (b, h)):
            rows, v = left.mT @ right, torch.randn(QUERIES, left.shape[2] * right.shape[2])
            with phase("queries"):
                for _ in range(repeats):
                    torch.mm(v, rows.flatten(1).T)

    for name, part in (("covariances", covariance), ("rotations", rotation)):
        with phase(name):
            for t in (a, g, b, h):
                part(t)
    for name, square in (("terms", True), ("gradients", False)):
        with phase(name):
            terms(a, g, square)
            terms(b, h, square)
    products()
    with phase("eigenvectors"):
        for t in (a, g, b, h):
            for _ in range(LAYERS):
                torch.linalg.eigh((t.flatten(0, 1).T @ t.flatten(0, 1)).double())
    return {}


def floors(parts: Sequence[Run], count: int) -> list[str]:
    """What fit and scores cannot cost less than, in words, one line each; the mean of several runs."""
    spent = {name: float(np.mean([r.phases[name]["cpu_s"] for r in parts])) for name in parts[0].phases}
    size = 4 * LENGTH * LAYERS * 2 * (5 * WIDTH + 1)  # bytes of a sequence's inputs and cotangents
    again = max(0.0, 1 - MEMORY / 2 / (size * count))  # what an EKFAC fit keeps of its rows is half of the memory
    lines = [
        "",
        f"| floor | fit | with covariances | with a second sweep of {again:.0%}, which do not fit | scores |",
        "|---|---|---|---|---|",
    ]
    for name in ("sweep", "sweep, fused"):
        fit = spent[name] + spent["rotations"] + spent["terms"]
        full = fit + spent["covariances"]
        scores = spent[name] + spent["gradients"] + spent["queries"]
        lines.append(f"| {name} | {fit:.1f} | {full:.1f} | {full + again * spent[name]:.1f} | {scores:.1f} |")
    return [*lines, "", "Parts, CPU s: " + ", ".join(f"{name} {s:.1f}" for name, s in spent.items()) + "."]


def row(name: str, done: Run, reference: np.ndarray) -> str:
    """One line of the table: costs, and how far the scores are from the reference."""
    spent = {k: found["cpu_s"] for k, found in done.phases.items()}
    fit, scores = spent["fit"], spent["scores"] if "scores" in spent else spent["all"] - spent["fit"]
    a, b = done.result["scores"].ravel().astype(np.float64), reference.ravel().astype(np.float64)
    agreement = f"{np.corrcoef(a, b)[0, 1]:.6f} | {(a @ b) / (b @ b):.4f}"
    return f"| {name} | {fit:.1f} | {scores:.1f} | {done.wall_s:.0f} | {done.peak_mb:.0f} | {agreement} |"


def main() -> None:
    """Measure, print the table, and write it to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--peers", nargs="*", default=[], help="any of kronfluence dattri_llm bergson")
    parser.add_argument("--path", help="a folder with their packages, seen by their processes alone")
    args = parser.parse_args()
    model()  # trained and kept before anything is measured
    lines = [
        f"# EKFAC of a language model, {args.sequences} sequences of {LENGTH} tokens, {QUERIES} queries, 1 thread",
        "",
        "| library | fit, CPU s | scores, CPU s | wall s | peak MB | Pearson with wherefrom | scale |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)

    def tell(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    count = {"count": args.sequences}
    parts = [run("benchmarks.language_models:unavoidable", count)]  # once more afterwards: the machine is noisy
    own = run("benchmarks.language_models:ours", count)
    tell(row("wherefrom", own, own.result["scores"]))
    kept = run("benchmarks.language_models:ours", count | {"memory": AMPLE})
    tell(row("wherefrom, all rows kept", kept, own.result["scores"]))
    parts.append(run("benchmarks.language_models:unavoidable", count))
    for name in args.peers:
        tell(row(name, run(f"benchmarks.language_peers:{name}", count, path=args.path), own.result["scores"]))
    tell(*floors(parts, args.sequences))
    facts = machine()
    tell("", f"Machine: {', '.join(f'{k} {v}' for k, v in facts.items())}.")
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"language_{args.sequences}_{time.strftime('%Y%m%d-%H%M%S')}"
    Path(f"{stem}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
