"""The logits of a model of transformers or peft, computed so that all derivatives exist."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.errors import expected

# What tokenizers return beside the model's inputs. It says how a text was cut; no loss is made of it.
BESIDE = ("token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping")


def base_of(model: nn.Module) -> Any:
    """Take the model of transformers out of adapters of peft, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


def logits(model: nn.Module, batch: Mapping[str, Any], meant: Collection[str] = ("labels",)) -> Tensor:
    """Compute the logits on everything in a batch but what is meant for the loss.

    No cache is kept. Experts and attention run in plain torch operations, since flash attention and grouped products of
    matrices lack derivatives, and outputs are not made to require gradients, as checkpointing wants in training.

    Args:
        model: of transformers, or of peft around one.
        batch: what its ``forward`` takes, by name.
        meant: the columns that the task's loss is made of.

    Raises:
        InputError: if the model returns no logits, or a column is neither the model's nor meant for the loss.
    """
    inputs = {name: t for name, t in batch.items() if name not in meant}
    base = base_of(model)
    parameters = inspect.signature(type(base).forward).parameters
    known = inputs_of(base)
    if known is not None:
        inputs = {name: t for name, t in inputs.items() if name in known or name not in BESIDE}
        takes_any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if takes_any_name:  # the mask is read by the task too
            known |= {"attention_mask"}
        if unknown := [name for name in inputs if name not in known]:
            refuse_columns(base, unknown)
    if "use_cache" in parameters:
        inputs["use_cache"] = False

    with ExitStack() as stack:
        stack.enter_context(_choose_plain_operations(base))
        stack.enter_context(_fuse_activations(base))
        stack.enter_context(_remove_gradient_hooks(base))
        outputs = model(**inputs)
    # Models of transformers return a mapping, or with return_dict=False a tuple with the logits first.
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits")
    if isinstance(outputs, tuple):
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise expected(
            "the model", "one that returns logits", type(outputs).__name__, "Load it with its head, AutoModelFor..."
        )
    return outputs


def inputs_of(model: nn.Module) -> frozenset[str] | None:
    """Find the names that a model's ``forward`` takes; None where it takes all and no module inside says which.

    Models of transformers take any further name too and pass it by, so a column that should weigh or mask the loss
    would change nothing, in silence.
    """
    for module in model.modules():
        parameters = inspect.signature(type(module).forward).parameters
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = {name for name, p in parameters.items() if p.kind not in several}
        if "input_ids" in named or (module is model and named == parameters.keys()):
            return frozenset(named)
    return None


def refuse_columns(model: nn.Module, names: Sequence[str]) -> None:
    """Raise the error for columns that would be passed by.

    Raises:
        InputError: always.
    """
    listed = ", ".join(names[:8]) + (" and others" if len(names) > 8 else "")
    advice = "Rename a column of labels to 'labels'. " if {"label", "label_ids"} & set(names) else ""
    raise expected(
        "the columns of a batch",
        f"those that {type(model).__name__} or the task's loss is made of",
        f"also {listed}",
        f"{advice}Remove what the loss does not use, with dataset.remove_columns; if it does, write a Task for it.",
    )


@contextmanager
def _choose_plain_operations(model: nn.Module) -> Iterator[None]:
    """Choose experts and attention in plain torch operations; the choice of before is restored afterwards."""
    attention = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    plain = {"_experts_implementation": ("eager", None), "_attn_implementation": (attention, "eager", "sdpa", None)}
    configs: dict[int, Any] = {}  # each once, though many modules share one
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            configs[id(config)] = config
    before = [(config, name, getattr(config, name, None)) for config in configs.values() for name in plain]
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
def _fuse_activations(model: nn.Module) -> Iterator[None]:
    """Let the activation that GPT-2 spells out in nine operations be torch's own; the modules are as before afterwards.

    It is the same function; spelled out, it takes a sixth of the time of the two passes through a model.
    """
    activations = [module for module in model.modules() if type(module).__name__ == "NewGELUActivation"]
    activations = [module for module in activations if "forward" not in vars(module)]
    try:
        for module in activations:
            module.forward = partial(F.gelu, approximate="tanh")
        yield
    finally:
        for module in activations:
            del module.forward


@contextmanager
def _remove_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that make embeddings require gradients; functional derivatives refuse them."""
    all_hooks = [module._forward_hooks for module in model.modules()]
    before = [(hooks, dict(hooks)) for hooks in all_hooks if any(map(_requires_gradients, hooks.values()))]
    try:
        for hooks, original in before:
            for key, hook in original.items():
                if _requires_gradients(hook):
                    del hooks[key]
        yield
    finally:
        for hooks, original in before:
            hooks.clear()
            hooks.update(original)


def _requires_gradients(hook: Any) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")  # of transformers, and of peft


@contextmanager
def marked_padding(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Make a classifier that looks for the end of a sequence find it, whatever padding the batch was given.

    Decoders pool at the last token that is not ``config.pad_token_id``: a batch that is padded with another token is
    pooled at its padding. Without such a token they pool at the last position and take one example at a time; then a
    token that ends no sequence of the batch serves as one meanwhile.

    Args:
        model: of transformers.
        batch: padded on the right.

    Yields:
        The batch with the model's padding token after the end of each sequence.

    Raises:
        InputError: if there is none, and every token of the vocabulary ends a sequence of the batch.
    """
    tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if tokens is None or not hasattr(config, "pad_token_id"):
        yield dict(batch)
        return

    mask = mask if mask is not None and mask.ndim == 2 else torch.ones_like(tokens)
    steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    lengths = (mask.bool() * steps).amax(1, keepdim=True)  # (B, 1)
    before = config.pad_token_id
    try:
        if before is None:
            ends = set(tokens.gather(1, (lengths - 1).clamp(min=0)).flatten().tolist())
            vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
            free = next((token for token in range(vocabulary) if token not in ends), None)
            if free is None:
                raise expected("the model", "one with config.pad_token_id", "none", "Set it, or make batches smaller.")
            config.pad_token_id = free
        yield dict(batch) | {"input_ids": tokens.masked_fill(steps > lengths, config.pad_token_id)}
    finally:
        config.pad_token_id = before
