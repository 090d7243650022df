"""One entry per layer type: how a layer looks as y[n, t] = W a[n, t], t running over the positions that share W.

An entry turns a layer's input and the cotangents of its output into the per-example gradients of its weight and bias,
kept factored. To support a new layer type, write one entry and `register` it. Modules of no registered type are
recognised by their parameters: vectors that scale and shift, and a matrix that is given to F.linear. Each use of an
entry on a model is verified against autograd before it is believed, so a layer that behaves otherwise is found out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from wherefrom.errors import UnsupportedError
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.rows import Lookup, Scattered

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]  # of a call: by position and by name
Found = Factored | Written | Lookup | Scattered
CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.GroupNorm, _BatchNorm)  # the axis after the examples is no position


class Unfactorable(UnsupportedError):
    """A call of a module that its entry does not describe."""

    def __init__(self, module: str, why: str):
        super().__init__(f"{module} {why}. Leave its parameters out with parameters=...")
        self.module, self.why = module, why


class LayerKind(Protocol):
    """How one type of layer is factored.

    An entry may have two attributes: ``transposed = True`` says that the weight is kept as (..., I, O), and ``whole =
    True`` that ``rows`` takes all `Arguments` of the call too, as its last argument.
    """

    def matrix(self, layer: Any) -> tuple[int, int] | None:
        """(groups G, outputs O of one group) of the weight seen as G matrices; None for a block of loose numbers."""
        ...

    def rows(self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str]) -> Found:
        """Per-example gradients.

        Args:
            layer: the module.
            x: its input for n examples, (n, ...).
            g: cotangents of its output, (R, n, ...).
            parts: which of its parameters are wanted, "weight" and/or "bias", in this order.
        """
        ...


class LinearKind:
    """nn.Linear on (n, ..., I), and any module that gives its weight to F.linear: positions are the middle axes."""

    def matrix(self, layer: Any) -> tuple[int, int]:
        """One group of all outputs."""
        return 1, layer.weight.shape[0]

    def rows(self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str]) -> Factored:
        """Inputs and output cotangents as they are."""
        del layer
        R, n = g.shape[:2]
        a = columns(x.reshape(1, n, -1, x.shape[-1]), parts)
        return Factored(a, g.reshape(R, n, -1, g.shape[-1]).transpose(0, 1).unsqueeze(0))


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
        return Factored(columns(a, parts), g)


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
    """Vectors that scale and shift, y = w u(x) + b: LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode, and others.

    The output is affine in each vector, so u is its difference between two values of w.
    """

    whole = True

    def matrix(self, layer: nn.Module) -> None:
        """Loose numbers."""
        del layer

    def rows(
        self, layer: nn.Module, x: Tensor, g: Tensor, parts: Sequence[str], arguments: Arguments | None = None
    ) -> Written:
        """Weight rows are sums of g times u, bias rows sums of g."""
        R, n = g.shape[:2]
        sums = []
        for part in parts:
            p = layer._parameters[part]
            shape, size = p.shape, p.numel()  # pyright: ignore[reportOptionalMemberAccess]
            term = g if part == "bias" else g * self._slope(layer, part, arguments or ((x,), {}))
            if isinstance(layer, CHANNELS_FIRST):  # the channel axis follows the examples
                term = term.reshape(R, n, size, -1).mT
            elif size == 1 or term.shape[term.ndim - len(shape) :] == shape:  # the scaled axes are last
                term = term.reshape(R, n, -1, size)
            else:
                raise Unfactorable(type(layer).__name__, f"does not scale its last axes by {part}")
            sums.append(term.sum(2))
        rows = torch.cat(sums, -1).transpose(0, 1)  # (n, R, size)
        return Written(rows, (1, rows.shape[-1], 1))

    @staticmethod
    def _slope(layer: nn.Module, part: str, arguments: Arguments) -> Tensor:
        def at(value: float) -> Tensor:
            vector = torch.full_like(layer._parameters[part], value)  # pyright: ignore[reportArgumentType]
            return functional_call(layer, {part: vector}, arguments[0], dict(arguments[1]))

        with torch.no_grad():
            return at(1.0) - at(0.0)


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


Finder = Callable[[nn.Module, str], LayerKind | None]


def _by_parameters(layer: nn.Module, part: str) -> LayerKind | None:
    """The entry of a module of unknown type: its own parameters are vectors, or its weight is a matrix."""
    own = {name: p for name, p in layer._parameters.items() if p is not None}
    if all(p.ndim < 2 for p in own.values()):
        return NormKind() if not layer._modules else None
    weight, p = own.get("weight"), own[part]
    if weight is None or weight.ndim != 2 or part not in ("weight", "bias"):
        return None
    return LinearKind() if p is weight or p.shape == weight.shape[:1] else None


FINDERS: list[Finder] = [_by_parameters]  # asked last to first about modules of no registered type

# Modules of other packages that define layers, and the module of this library that registers entries for them. It is
# imported when a layout is planned while the other is loaded, and never before: a model of GPT-2 with a task of the
# user's own needs the entry of its Conv1D too, and nothing here is slowed down where transformers is not in use.
ENTRIES_FOR = {"transformers.pytorch_utils": "wherefrom.hf.layers"}
INSIDE = {LinearKind: (nn.Linear.forward, F.linear), EmbeddingKind: (nn.Embedding.forward, F.embedding)}


def register(layer: type[nn.Module], kind: LayerKind) -> None:
    """Add or replace the entry of a layer type; its subclasses are covered too."""
    KINDS[layer] = kind


def register_loaded() -> None:
    """Register the entries for layers of packages that are loaded in this process, see `ENTRIES_FOR`."""
    for package, entries in ENTRIES_FOR.items():
        if package in sys.modules and entries not in sys.modules:
            importlib.import_module(entries)


def registered(layer: nn.Module) -> LayerKind | None:
    """The entry of a layer's type or of its nearest base class; None if there is none."""
    return next((KINDS[base] for base in type(layer).__mro__ if base in KINDS), None)


def kind_of(layer: nn.Module, part: str = "weight") -> LayerKind | None:
    """The entry that covers one of a layer's own parameters; None if there is none."""
    if (kind := registered(layer)) is not None:
        return kind if part in ("weight", "bias") else None
    return next((kind for find in reversed(FINDERS) if (kind := find(layer, part)) is not None), None)


def transposed(kind: LayerKind | None) -> bool:
    """Whether an entry says that its weight is kept as (..., I, O)."""
    return getattr(kind, "transposed", False)


def inside(layer: nn.Module, part: str) -> Callable[..., Tensor] | None:
    """The function that is to be observed when it takes the layer's weight; None: the layer itself is to be."""
    forward, function = INSIDE.get(type(kind_of(layer, part)), (None, None))
    return None if type(layer).forward is forward else function


def columns(a: Tensor, parts: Sequence[str]) -> Tensor:
    """The inputs that belong to the wanted parameters: a for the weight, a constant 1 for the bias."""
    wanted = [a.new_ones(*a.shape[:-1], 1) if part.endswith("bias") else a for part in parts]
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
