"""One rule per layer type: how a layer looks as y[n, t] = W a[n, t], t running over the positions that share W.

A rule turns a layer's input and the cotangents of its output into the per-example gradients of its weight and bias,
kept factored. To support a new layer type, write one rule, a `LayerKind`, and `register` it: messages call that the
entry of the type. Modules of no registered type are recognised by their parameters: vectors that scale and shift, and a
matrix that is given to F.linear. Each use of a rule on a model is compared with autograd before it is believed, so a
layer that behaves otherwise is found out.
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
RuleRows = Factored | Written | Lookup | Scattered  # what a rule may return
CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.GroupNorm, _BatchNorm)  # the axis after the examples is no position


class Unfactorable(UnsupportedError):
    """A call of a module that its rule does not describe."""

    def __init__(self, module: str, why: str):
        super().__init__(f"{module} {why}. Leave its parameters out with parameters=...")
        self.module, self.why = module, why


class LayerKind(Protocol):
    """How one type of layer is factored.

    A rule may have two attributes: ``transposed = True`` says that the weight is kept as (..., I, O), and ``whole =
    True`` that ``rows`` takes all `Arguments` of the call too, as its last argument.
    """

    def matrix(self, layer: Any) -> tuple[int, int] | None:
        """Say how the weight is seen as matrices.

        Returns:
            (G, O): G matrices, one for each group, of O outputs each; None for a block of loose numbers.
        """
        ...

    def rows(self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str]) -> RuleRows:
        """Make the per-example gradients of a call.

        Args:
            layer: the module.
            x: its input for n examples, (n, ...).
            g: cotangents of its output, (R, n, ...).
            parts: which of its parameters are wanted, "weight" and/or "bias", in this order.

        Returns:
            Rows of n examples, R each. Those of a bias are further columns after the weight's, as of inputs that are 1.
        """
        ...


class LinearKind:
    """nn.Linear on (n, ..., I), and any module that gives its weight to F.linear: positions are the middle axes."""

    def matrix(self, layer: Any) -> tuple[int, int]:
        """See the weight as one group of all outputs."""
        return 1, layer.weight.shape[0]

    def rows(self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str]) -> Factored:
        """Take inputs and output cotangents as they are."""
        del layer
        R, n = g.shape[:2]
        inputs = x.reshape(1, n, -1, x.shape[-1])  # (G = 1, n, T, I)
        cotangents = g.reshape(R, n, -1, g.shape[-1])  # (R, n, T, O)
        return Factored(columns(inputs, parts), cotangents.transpose(0, 1).unsqueeze(0))


class ConvKind:
    """nn.Conv1d and nn.Conv2d: positions are output pixels, inputs are patches; groups are blocks."""

    def matrix(self, layer: nn.Conv1d | nn.Conv2d) -> tuple[int, int]:
        """See the weight as ``groups`` matrices of (out_channels / groups, patch)."""
        return layer.groups, layer.out_channels // layer.groups

    def rows(self, layer: nn.Conv1d | nn.Conv2d, x: Tensor, g: Tensor, parts: Sequence[str]) -> Factored:
        """Cut the input into patches, with the layer's stride, padding and its mode, dilation and groups.

        An output pixel is the product of the kernel, as a matrix, with the patch of the input that it sees. So the
        layer is linear on patches, with output pixels for positions.
        """
        G, O = self.matrix(layer)
        R, n = g.shape[:2]
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
        # F.unfold pads with zeros only; the layer may reflect or wrap around.
        x = F.pad(x, _padding(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        if x.ndim == 3:  # one-dimensional: a picture of height 1, as F.unfold wants pictures
            x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)

        patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (n, G I, T)
        # A view: positions stay last in memory, and no patch is copied.
        inputs = patches.view(n, G, -1, patches.shape[-1]).permute(1, 0, 3, 2)  # (G, n, T, I)
        cotangents = g.reshape(R, n, G, O, -1).permute(2, 1, 0, 4, 3)  # (G, n, R, T, O)
        return Factored(columns(inputs, parts), cotangents)


class EmbeddingKind:
    """nn.Embedding: a table whose rows are read by token id.

    It is linear on one-hot vectors, which would take V numbers a token; `Lookup` keeps the ids.
    """

    def matrix(self, layer: nn.Embedding) -> tuple[int, int]:
        """See the weight as one table with a row per token."""
        return 1, layer.num_embeddings

    def rows(self, layer: nn.Embedding, x: Tensor, g: Tensor, parts: Sequence[str]) -> Lookup:
        """Keep token numbers and cotangents."""
        del parts
        R, n = g.shape[:2]
        cotangents = g.reshape(R, n, -1, layer.embedding_dim).transpose(0, 1)  # (n, R, T, d)
        ids = x.reshape(n, -1)  # (n, T)
        if layer.padding_idx is not None:  # autograd gives the padding token no gradient
            cotangents = cotangents * (ids != layer.padding_idx).view(n, 1, -1, 1)
        return Lookup(ids, cotangents, layer.num_embeddings)


class NormKind:
    """Vectors that scale and shift, y = w u(x) + b: LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode, and others.

    The output is affine in each vector, so u is its difference between two values of w: that needs no knowledge of how
    the layer normalises. The rows are written out, as a vector has no factors.
    """

    whole = True

    def matrix(self, layer: nn.Module) -> None:
        """See the vectors as loose numbers."""
        del layer

    def rows(
        self, layer: nn.Module, x: Tensor, g: Tensor, parts: Sequence[str], arguments: Arguments | None = None
    ) -> Written:
        """Sum g times u over positions for the weight, and g for the bias."""
        R, n = g.shape[:2]
        sums = []
        for part in parts:
            p = layer._parameters[part]
            shape, size = p.shape, p.numel()  # pyright: ignore[reportOptionalMemberAccess]
            products = g if part == "bias" else g * self._slope(layer, part, arguments or ((x,), {}))
            if isinstance(layer, CHANNELS_FIRST):  # the channel axis follows the examples
                products = products.reshape(R, n, size, -1).mT
            elif size == 1 or products.shape[products.ndim - len(shape) :] == shape:  # the scaled axes are last
                products = products.reshape(R, n, -1, size)
            else:
                raise Unfactorable(type(layer).__name__, f"does not scale its last axes by {part}")
            sums.append(products.sum(2))  # (R, n, size)
        rows = torch.cat(sums, -1).transpose(0, 1)  # (n, R, size of all parts)
        return Written(rows, (1, rows.shape[-1], 1))

    @staticmethod
    def _slope(layer: nn.Module, part: str, arguments: Arguments) -> Tensor:
        """Compute u, of the output's shape: the output at w = 1 less that at w = 0."""

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
    """Find a rule for a module of unknown type: its own parameters are vectors, or its weight is a matrix."""
    own = {name: p for name, p in layer._parameters.items() if p is not None}
    if all(p.ndim < 2 for p in own.values()):
        # With modules inside, the output need not be affine in the vectors.
        return NormKind() if not layer._modules else None

    weight, p = own.get("weight"), own[part]
    if weight is None or weight.ndim != 2 or part not in ("weight", "bias"):
        return None
    is_weight_or_its_bias = p is weight or p.shape == weight.shape[:1]
    return LinearKind() if is_weight_or_its_bias else None


FINDERS: list[Finder] = [_by_parameters]  # asked last to first about modules of no registered type

# Modules of other packages that define layers, and the module of this library that registers rules for them. It is
# imported when a layout is planned while the other is loaded, and never before: a model of GPT-2 with a task of the
# user's own needs the rule of its Conv1D too, and nothing here is slowed down where transformers is not in use.
ENTRIES_FOR = {"transformers.pytorch_utils": "wherefrom.hf.layers"}
# Rules that describe a function, and the forward method that does nothing else than call it. A layer with another
# forward method is observed where it gives its weight to the function.
INSIDE = {LinearKind: (nn.Linear.forward, F.linear), EmbeddingKind: (nn.Embedding.forward, F.embedding)}


def register(layer: type[nn.Module], kind: LayerKind) -> None:
    """Add or replace the rule of a layer type; its subclasses are covered too."""
    KINDS[layer] = kind


def register_loaded() -> None:
    """Register the rules for layers of packages that are loaded in this process, see `ENTRIES_FOR`."""
    for package, entries in ENTRIES_FOR.items():
        if package in sys.modules and entries not in sys.modules:
            importlib.import_module(entries)


def registered(layer: nn.Module) -> LayerKind | None:
    """Find the rule of a layer's type or of its nearest base class; None if there is none."""
    return next((KINDS[base] for base in type(layer).__mro__ if base in KINDS), None)


def kind_of(layer: nn.Module, part: str = "weight") -> LayerKind | None:
    """Find the rule that covers one of a layer's own parameters; None if there is none."""
    kind = registered(layer)
    if kind is not None:
        return kind if part in ("weight", "bias") else None
    for find in reversed(FINDERS):
        kind = find(layer, part)
        if kind is not None:
            return kind
    return None


def transposed(kind: LayerKind | None) -> bool:
    """Whether a rule says that its weight is kept as (..., I, O)."""
    return getattr(kind, "transposed", False)


def function_inside(layer: nn.Module, part: str) -> Callable[..., Tensor] | None:
    """Find the function that is to be observed when it takes the layer's weight; None: the layer itself is to be."""
    forward, function = INSIDE.get(type(kind_of(layer, part)), (None, None))
    return None if type(layer).forward is forward else function


def columns(a: Tensor, parts: Sequence[str]) -> Tensor:
    """Put the inputs of the wanted parameters side by side: a for the weight, a constant 1 for the bias.

    W a + b = [W b] [a 1]: with the bias as a last column of the weight, both are one matrix.

    Args:
        a: inputs, (G, n, T, I).
        parts: the wanted parameters, in the order of their columns.
    """
    inputs = []
    for part in parts:
        is_bias = part.endswith("bias")  # experts have a "gate_up_proj_bias"
        inputs.append(a.new_ones(*a.shape[:-1], 1) if is_bias else a)
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Give the padding as F.pad takes it: (left, right) of the last axis first."""
    sides: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "valid":
            left = right = 0
        elif layer.padding == "same":
            both = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            left = both // 2
            right = both - left  # an odd number of pixels has the one more at the end, as torch has it
        else:
            left = right = int(layer.padding[axis])
        sides += [left, right]
    return sides
