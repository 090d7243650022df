"""Tiny models of transformers in float64, and scores of plain gradients by autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import wherefrom

SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def made(name: str, config: str, seed: int = 0, **more: Any) -> nn.Module:
    """A model by the names of its class and its configuration, in eval mode."""
    sizes = SIZES | more
    if config == "GPT2Config":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        sizes = {names.get(key, key): value for key, value in sizes.items() if key != "intermediate_size"}
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, name)(getattr(transformers, config)(**sizes)).double().eval()


def llama(**more: Any) -> nn.Module:
    return made("LlamaForCausalLM", "LlamaConfig", **{"num_key_value_heads": 1, **more})


def gpt2(**more: Any) -> nn.Module:
    return made("GPT2LMHeadModel", "GPT2Config", **more)


MODELS: dict[str, Callable[..., nn.Module]] = {"llama": llama, "gpt2": gpt2}


def texts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token numbers from 3 on."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def next_token_loss(model: nn.Module, tokens: Sequence[int], labelled: Sequence[int] | None = None) -> Tensor:
    """The summed loss of the tokens at the positions given, all but the first without them, of one text alone."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    positions = range(1, len(tokens)) if labelled is None else labelled
    return -sum((logits[t - 1, tokens[t]] for t in positions), logits.new_zeros(()))


def products(model: nn.Module, losses: Sequence[Tensor], match: str = "mlp") -> Tensor:
    """Dot products of the gradients of losses, (N, N)."""
    parameters = [p for name, p in model.named_parameters() if match in name]
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def found(model: nn.Module, task: wherefrom.Task, train: Any, match: str = "mlp", **options: Any) -> Tensor:
    """The same by the library: every training example is a query too, and its training loss is asked about."""
    influence = wherefrom.Influence(wherefrom.Identity(), damping=1.0, parameters=match, progress=False, **options)
    return influence.fit(model, task, train).score(train, measurement=task.loss).values


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert b.norm() > 1e-6
    assert float((a - b).norm() / b.norm()) < tolerance
