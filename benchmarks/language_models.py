"""EKFAC of a language model side by side: whence, kronfluence, dattri-llm, bergson, and what none of them can avoid.

    python -m benchmarks.language_models --sequences 1000 --peers kronfluence dattri-llm bergson

A GPT-2 of 4 layers x 256 with 4,096 words, its MLP layers, the empirical Fisher, 50 queries, damping 0.1 x the mean
eigenvalue of each layer. Every measurement is a fresh process with one thread. The unavoidable parts are measured with
plain torch on the same shapes, each by the fastest way known to us.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import CACHE, phase

WIDTH, LAYERS, VOCABULARY, LENGTH = 256, 4, 4096, 128
QUERIES = 50
STEPS, BATCH, RATE = 120, 16, 1e-3  # of the training


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
    return (Path(os.environ["WHENCE_DATA"]) / "wikitext-2" / f"{name}.txt").read_text(encoding="utf-8")


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
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
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


def ours(count: int, batch_size: int = 8) -> dict[str, Any]:
    """EKFAC fit and scores by whence. Phases ``fit`` and ``scores``.

    Returns:
        ``scores``: (Q, N) float32.
    """
    import whence
    from whence.hf import CausalLM

    net, task = model(), CausalLM()
    influence = whence.Influence(
        whence.EKFAC(), whence.Damping.relative(0.1), whence.EmpiricalFisher, "mlp", batch_size=batch_size
    )
    train, queries = ({"input_ids": t, "labels": t} for t in (sequences("valid", count), sequences("test", QUERIES)))
    with phase("fit"):
        influence.fit(net, task, train)
    with phase("scores"):
        scores = influence.score(queries, measurement=task.loss, certify=False)
    return {"scores": scores.values.numpy().astype(np.float32)}
