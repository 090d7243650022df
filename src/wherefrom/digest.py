"""Hashes of tensors, by which artefacts are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.errors import InputError


def raw(t: Tensor) -> memoryview:
    """Read a tensor's bytes, for hashing."""
    if t.layout != torch.strided or t.is_nested or t.is_quantized:
        raise InputError(
            f"data must be dense tensors, got a {'nested' if t.is_nested else str(t.layout)} one of shape "
            f"{list(t.shape) if not t.is_nested else '(nested)'}. Convert it with to_dense(), or pad it."
        )
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest(named: Mapping[str, Tensor]) -> str:
    """Hash tensors, their names, dtypes and shapes, in the order given."""
    state = hashlib.blake2b(digest_size=16)
    for name, t in named.items():
        state.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        state.update(raw(t))
    return state.hexdigest()
