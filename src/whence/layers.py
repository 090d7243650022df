"""One entry per layer type: how a layer looks as y[n, t] = W a[n, t], t running over the positions that share W.

An entry turns a layer's input and the cotangents of its output into the per-example gradients of its weight and bias,
kept factored. To support a new layer type, write one entry and `register` it; each use of an entry on a model is
verified against autograd before it is believed, so a layer that behaves otherwise (a subclass with its own
``forward``) is found out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whence.factored import Factored, Written
from whence.rows import Lookup


class LayerKind(Protocol):
    """How one type of layer is factored."""

    def matrix(self, layer: Any) -> tuple[int, int] | None:
        """(groups G, outputs O of one group) of the weight seen as G matrices; None for a block of loose numbers."""
        ...

    def rows(self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str]) -> Factored | Written | Lookup:
        """Per-example gradients.

        Args:
            layer: the module.
            x: its input for n examples, (n, ...).
            g: cotangents of its output, (R, n, ...).
            parts: which of its parameters are wanted, "weight" and/or "bias", in this order.
        """
        ...


class LinearKind:
    """nn.Linear on (n, ..., I): positions are the middle axes."""

    def matrix(self, layer: nn.Linear) -> tuple[int, int]:
        """One group of ``out_features``."""
        return 1, layer.out_features

    def rows(self, layer: nn.Linear, x: Tensor, g: Tensor, parts: Sequence[str]) -> Factored:
        """Inputs and output cotangents as they are."""
        R, n = g.shape[:2]
        a = _columns(x.reshape(1, n, -1, layer.in_features), parts)
        return Factored(a, g.reshape(R, n, -1, layer.out_features).transpose(0, 1).unsqueeze(0))


class ConvKind:
    """nn.Conv1d and nn.Conv2d: positions are output pixels, inputs are patches; groups are blocks."""

    def matrix(self, layer: nn.Conv1d | nn.Conv2d) -> tuple[int, int]:
        """``groups`` matrices of (out_channels / groups, patch)."""
        return layer.groups, layer.out_channels // layer.groups

    def rows(self, layer: nn.Conv1d | nn.Conv2d, x: Tensor, g: Tensor, parts: Sequence[str]) -> Factored:
        """Patches by unfolding, with the layer's stride, padding and its mode, dilation and groups."""
        G, O = self.matrix(layer)
        R, n = g.shape[:2]
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
        x = F.pad(x, _padding(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        if x.ndim == 3:  # one-dimensional: a picture of height 1
            x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
        patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (n, G I, T)
        a = patches.view(n, G, -1, patches.shape[-1]).permute(1, 0, 3, 2)  # (G, n, T, I), positions last in memory
        g = g.reshape(R, n, G, O, -1).permute(2, 1, 0, 4, 3)  # (G, n, R, T, O)
        return Factored(_columns(a, parts), g)


class EmbeddingKind:
    """nn.Embedding: gathered by token id, never one-hot."""

    def matrix(self, layer: nn.Embedding) -> tuple[int, int]:
        """One table with a row per token."""
        return 1, layer.num_embeddings

    def rows(self, layer: nn.Embedding, x: Tensor, g: Tensor, parts: Sequence[str]) -> Lookup:
        """Token numbers and cotangents; the padding token has no gradient."""
        del parts
        R, n = g.shape[:2]
        g = g.reshape(R, n, -1, layer.embedding_dim).transpose(0, 1)
        ids = x.reshape(n, -1)
        if layer.padding_idx is not None:
            g = g * (ids != layer.padding_idx).view(n, 1, -1, 1)
        return Lookup(ids, g, layer.num_embeddings)


class NormKind:
    """Scale and shift after a normalisation: LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode."""

    def matrix(self, layer: nn.Module) -> None:
        """Loose numbers."""
        del layer

    def rows(self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str]) -> Written:
        """Weight rows are sums of g times the normalised input, bias rows sums of g."""
        R, n = g.shape[:2]
        if isinstance(layer, nn.LayerNorm):
            unit, shape = F.layer_norm(x, layer.normalized_shape, eps=layer.eps), layer.normalized_shape
        elif isinstance(layer, nn.RMSNorm):
            unit, shape = F.rms_norm(x, layer.normalized_shape, eps=layer.eps), layer.normalized_shape
        elif isinstance(layer, nn.GroupNorm):
            unit, shape = F.group_norm(x, layer.num_groups, eps=layer.eps), (layer.num_channels,)
        else:
            unit = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
            shape = (layer.num_features,)
        size = math.prod(shape)
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):  # the normalised axes are last
            unit, g = unit.reshape(1, n, -1, size), g.reshape(R, n, -1, size)
        else:  # the channel axis follows the examples
            unit, g = unit.reshape(1, n, size, -1).mT, g.reshape(R, n, size, -1).mT
        sums = {"weight": lambda: (g * unit).sum(2), "bias": lambda: g.sum(2)}  # (R, n, size)
        rows = torch.cat([sums[p]() for p in parts], -1).transpose(0, 1)
        return Written(rows, (1, rows.shape[-1], 1))


KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LinearKind(),
    nn.Conv1d: ConvKind(),
    nn.Conv2d: ConvKind(),
    nn.Embedding: EmbeddingKind(),
    nn.LayerNorm: NormKind(),
    nn.RMSNorm: NormKind(),
    nn.GroupNorm: NormKind(),
    nn.BatchNorm1d: NormKind(),
    nn.BatchNorm2d: NormKind(),
    nn.BatchNorm3d: NormKind(),
}


def register(layer: type[nn.Module], kind: LayerKind) -> None:
    """Add or replace the entry of a layer type; its subclasses are covered too."""
    KINDS[layer] = kind


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The entry of a layer's type or of its nearest base class; None if there is none."""
    return next((KINDS[base] for base in type(layer).__mro__ if base in KINDS), None)


def _columns(a: Tensor, parts: Sequence[str]) -> Tensor:
    """The inputs that belong to the wanted parameters: a for the weight, a constant 1 for the bias."""
    columns = {"weight": lambda: a, "bias": lambda: a.new_ones(*a.shape[:-1], 1)}
    wanted = [columns[p]() for p in parts]
    return wanted[0] if len(wanted) == 1 else torch.cat(wanted, -1)


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Padding as F.pad takes it: (left, right) of the last axis first."""
    if isinstance(layer.padding, str):
        extra = [
            d * (k - 1) if layer.padding == "same" else 0
            for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        return [side for e in reversed(extra) for side in (e // 2, e - e // 2)]
    return [side for p in reversed(layer.padding) for side in (p, p)]
