"""The user's model: checked, converted where that is exact, observed without leaving a trace, and fingerprinted."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from whence.data import digest
from whence.errors import InputError, WhenceWarning, expected

Select = str | Sequence[str] | Callable[[str], bool] | None


@contextmanager
def observed(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without parameter gradients; everything is restored afterwards, even after an error."""
    modes = {m: m.training for m in model.modules()}
    grads = {p: p.requires_grad for p in model.parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        model.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.enable_grad():
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, mode in modes.items():
            m.training = mode
        for p, needed in grads.items():
            p.requires_grad_(needed)


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's parameters and buffers, names and values."""
    return digest(model.state_dict())


def ready(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy of a half-precision one.

    Raises:
        InputError: no module, several devices or dtypes, non-finite weights.
    """
    if not isinstance(model, nn.Module):
        raise expected("model", "a torch.nn.Module", type(model).__name__)
    named = dict(model.named_parameters())
    devices = {p.device for p in named.values()}
    if len(devices) > 1:
        raise expected(
            "the model's parameters", "on one device", sorted(map(str, devices)), "Move it with model.to(device)."
        )
    bad = [name for name, p in named.items() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        raise InputError(
            f"the model's weights must be finite, got NaN or infinity in {', '.join(bad[:5])}. Train it again."
        )
    dtypes = {p.dtype for p in named.values() if p.is_floating_point()}
    if dtypes & {torch.float16, torch.bfloat16} and torch.float64 not in dtypes:
        warnings.warn(
            "the model is in half precision: a float32 copy is used (the conversion is exact).",
            WhenceWarning,
            stacklevel=4,
        )
        copied = copy.deepcopy(model)
        return copied.float()
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise expected(
            "the model's parameters",
            "all float32 or all float64",
            sorted(map(str, dtypes)),
            "Convert it with model.float().",
        )
    return model


def chosen(select: Select) -> Callable[[str], bool]:
    """The selection as a predicate on parameter names."""
    if select is None:
        return lambda name: True
    if callable(select):
        return select
    patterns = [re.compile(p) for p in ([select] if isinstance(select, str) else select)]
    return lambda name: any(p.search(name) for p in patterns)
