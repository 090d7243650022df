"""The logits of a model of transformers or peft, computed so that all derivatives exist."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from whence.errors import expected


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logits on everything in a batch but its labels.

    No cache is kept. Experts and attention run in plain torch operations, since flash attention and grouped products of
    matrices lack derivatives, and outputs are not made to require gradients, as checkpointing wants in training.

    Args:
        model: of transformers, or of peft around one.
        batch: what its ``forward`` takes, by name.

    Raises:
        InputError: if the model returns no logits.
    """
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    if "use_cache" in inspect.signature(type(base).forward).parameters:
        inputs["use_cache"] = False
    with ExitStack() as stack:
        stack.enter_context(_plain(base))
        stack.enter_context(_fused(base))
        stack.enter_context(_unhooked(base))
        found = model(**inputs)
    found = found.get("logits") if isinstance(found, Mapping) else found
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, Tensor):
        raise expected(
            "the model", "one that returns logits", type(found).__name__, "Load it with its head, AutoModelFor..."
        )
    return found


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Choose experts and attention in plain torch operations; what was chosen is restored afterwards."""
    attention = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    plain = {"_experts_implementation": ("eager", None), "_attn_implementation": (attention, "eager", "sdpa", None)}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(config, name, getattr(config, name, None)) for config in configs for name in plain]
    try:
        for config, name, value in before:
            if value not in plain[name]:
                setattr(config, name, plain[name][0])
        yield
    finally:
        for config, name, value in before:
            if getattr(config, name, None) != value:  # a config hands on to those it contains
                setattr(config, name, value)


@contextmanager
def _fused(model: nn.Module) -> Iterator[None]:
    """Let the activation that GPT-2 spells out in nine operations be torch's own; the modules are as before afterwards.

    It is the same function; spelled out, it takes a sixth of the time of the two passes through a model.
    """
    spelled = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation" and "forward" not in vars(m)]
    try:
        for module in spelled:
            module.forward = partial(F.gelu, approximate="tanh")
        yield
    finally:
        for module in spelled:
            del module.forward


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that make embeddings require gradients; functional derivatives refuse them."""
    all_hooks = [module._forward_hooks for module in model.modules()]
    before = [(hooks, dict(hooks)) for hooks in all_hooks if any(map(_asks, hooks.values()))]
    try:
        for hooks, held in before:
            for key in [key for key, hook in held.items() if _asks(hook)]:
                del hooks[key]
        yield
    finally:
        for hooks, held in before:
            hooks.clear()
            hooks.update(held)


def _asks(hook: Any) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")  # of transformers, and of peft
