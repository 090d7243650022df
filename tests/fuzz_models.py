"""Random small models, losses and data, and what every solver should say of them.

A seed is a case: a model drawn from a grammar of pieces, a task, training examples and queries in some form, and an
exact answer by loops of plain autograd over examples that are alone in their batch. A case is right, or refused with
one of the library's own errors. Anything else is a bug:

    python tests/fuzz_models.py 2000 [first seed]
"""

from __future__ import annotations

import collections
import copy
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import solving
from wherefrom import (
    ASTRA,
    CG,
    EKFAC,
    GGN,
    KFAC,
    Arnoldi,
    AttributionError,
    DataInf,
    Directions,
    Dual,
    EmpiricalFisher,
    Exact,
    Hessian,
    HyperINF,
    Identity,
    Influence,
    Inverse,
    Neumann,
    Nystrom,
    RandProj,
    RandSelect,
    Task,
)
from wherefrom.model.check import TOLERANCE as ROW_TOLERANCE

IGNORE = -100
NO_AXES = True  # draw parameters of shape () too
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-2}


class Draw(random.Random):
    """Random choices of a case."""

    def chance(self, p: float) -> bool:
        return self.random() < p

    def normal(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- pieces of models: forward(x, mask) of (n, d), or of (n, T, d) with a mask (n, T) of real positions ---


class Plain(nn.Module):
    """A module that looks at each vector by itself, and an activation."""

    def __init__(self, net: nn.Module, activation: Callable[[Tensor], Tensor] = torch.tanh):
        super().__init__()
        self.net, self.activation = net, activation

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.activation(self.net(x))


class Residual(nn.Module):
    """x + f(x), with or without a gate."""

    def __init__(self, d: int, h: int, gated: bool):
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d, bias=False)
        self.gate = nn.Linear(d, d) if gated else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return x + y if self.gate is None else x * self.gate(x).sigmoid() + y


class Reused(nn.Module):
    """One layer used twice or three times, or under two names."""

    def __init__(self, d: int, times: int, names: bool):
        super().__init__()
        self.net = nn.Linear(d, d)
        self.again = self.net if names else None
        self.times = times

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for t in range(self.times):
            net = self.again if self.again is not None and t else self.net
            x = net(x).tanh()
        return x


class TiedTranspose(nn.Module):
    """An encoder whose weight, transposed, decodes; a layer entry sees one of its two uses."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.net = nn.Linear(d, h)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return F.linear(self.net(x).tanh(), self.net.weight.T)


class Affine(nn.Module):
    """Scales and shifts as loose parameters, of full width, of one number, or of none."""

    def __init__(self, d: int, shape: tuple[int, ...]):
        super().__init__()
        self.scale, self.shift = nn.Parameter(1 + 0.3 * torch.randn(shape)), nn.Parameter(0.3 * torch.randn(d))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x * self.scale + self.shift


class Matrix(nn.Module):
    """x W with W of shape (I, O), in one of several ways to write it."""

    def __init__(self, d: int, o: int, how: str):
        super().__init__()
        self.matrix, self.how = nn.Parameter(torch.randn(d, o) / d**0.5), how

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.how == "matmul":
            return (x @ self.matrix).tanh()
        if self.how == "einsum":
            return torch.einsum("...i,io->...o", x, self.matrix).sin()
        return F.linear(x, self.matrix.T).tanh()


class Form(nn.Module):
    """A bilinear form."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.form = nn.Parameter(0.3 * torch.randn(o, d, d))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.einsum("...i,oij,...j->...o", x, self.form, x).tanh()


class Prototypes(nn.Module):
    """Distances from points."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.points = nn.Parameter(torch.randn(o, d))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return (-torch.cdist(x.flatten(0, -2), self.points)).exp().view(*x.shape[:-1], -1)


class LowRank(nn.Module):
    """A frozen layer with an adapter."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(d, o), nn.Linear(d, 1, bias=False), nn.Linear(1, o, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return (self.base(x) + 2 * self.up(self.down(x))).tanh()


class Scaled(nn.Linear):
    """A subclass that computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.7 * self.weight, self.bias)


class SoftExperts(nn.Module):
    """Experts that all see everything."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.gate, self.experts = nn.Linear(d, 2), nn.ModuleList(nn.Linear(d, o) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x).tanh() for i, expert in enumerate(self.experts))


class HardExperts(SoftExperts):
    """Experts that see the vectors that are sent to them, some or none."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        flat = x.flatten(0, -2)
        weights = self.gate(flat).softmax(-1)
        out = x.new_zeros(len(flat), self.experts[0].out_features)
        for i, expert in enumerate(self.experts):
            where = (weights.argmax(-1) == i).nonzero()[:, 0]
            if len(where):
                out = out.index_add(0, where, expert(flat[where]).tanh() * weights[where, i : i + 1])
        return out.view(*x.shape[:-1], -1)


class Branches(nn.Module):
    """Another layer for some examples, chosen by looking at them."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.a, self.b = nn.Linear(d, o), nn.Linear(d, o)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows = []
        for i, row in enumerate(x):
            seen = row if mask is None else row[mask[i]]
            rows.append(self.a(row) if float(seen.sum()) > 0 else self.b(row).tanh())
        return torch.stack(rows)


class InPlace(nn.Module):
    """Sums and activations that overwrite."""

    def __init__(self, d: int):
        super().__init__()
        self.net, self.relu = nn.Linear(d, d), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.net(x)
        y += 0.5 * x
        return self.relu(y.mul_(0.8).add_(0.1))


class Checkpointed(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d, o), nn.Tanh())

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


class Buckets(nn.Module):
    """An embedding of which side of zero the numbers lie on."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.table = nn.Embedding(3, o)
        self.net = nn.Linear(d, o)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        index = (x[..., :2] > 0).sum(-1)
        return self.net(x) + self.table(index)


class Turned(nn.Module):
    """A layer that sees the vectors on other axes, or the examples in another order, or in several calls."""

    def __init__(self, d: int, o: int, how: str):
        super().__init__()
        self.net, self.how = nn.Linear(d, o), how

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        net = lambda t: self.net(t).tanh()  # noqa: E731
        if self.how == "flat":
            return net(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        if self.how == "one":
            return net(x.unsqueeze(0)).squeeze(0)
        if self.how == "middle":
            return net(x.unsqueeze(1)).squeeze(1)
        if self.how == "time first":
            return net(x.transpose(0, -2)).transpose(0, -2)
        if self.how == "backwards":
            return net(x.flip(0)).flip(0)
        if self.how == "sorted":
            order = x.flatten(1).sum(1).argsort()
            return net(x[order])[order.argsort()]
        if self.how == "halves":
            return torch.cat([net(part) for part in x.split(max(1, len(x) // 2))])
        if self.how == "siamese":
            a, b = net(torch.cat([x, x.flip(-1)])).chunk(2)
            return a * b
        if self.how == "pairs":
            pairs = net(torch.stack([x, x.flip(-1)], 1).flatten(0, 1))
            return pairs.view(len(x), 2, *pairs.shape[1:]).sum(1)
        return torch.stack([net(row) for row in x])  # "each"


class Convolved(nn.Module):
    """A layer on vectors that is a convolution with one pixel, or one whose axis of length is the examples'."""

    def __init__(self, d: int, o: int, batch_is_length: bool):
        super().__init__()
        self.net, self.batch_is_length = nn.Conv1d(d, o, 1), batch_is_length

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.ndim == 2:
            x = self.net(x.T.unsqueeze(0))[0].T if self.batch_is_length else self.net(x.unsqueeze(2)).squeeze(2)
            return x.tanh()
        return self.net(x.mT).mT.tanh()


class Normed(nn.Module):
    """A norm with statistics of its own, on channels first where it wants that."""

    def __init__(self, net: nn.Module, channels_first: bool):
        super().__init__()
        self.net, self.channels_first = net, channels_first

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.net(x.mT).mT if self.channels_first and x.ndim == 3 else self.net(x)


class OldFunction(torch.autograd.Function):
    """A square in the old style, without rules for vmap and forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0].abs() * grad


def old_function(x: Tensor) -> Tensor:
    return OldFunction.apply(x)


# --- pieces for sequences ---


class Attention(nn.Module):
    """Masked attention by one of three ways."""

    def __init__(self, d: int, how: str, causal: bool):
        super().__init__()
        self.how, self.causal = how, causal
        self.net = nn.MultiheadAttention(d, 1, batch_first=True) if how == "module" else nn.Linear(d, 3 * d)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        T = x.shape[1]
        eye = torch.eye(T, dtype=torch.bool)
        allowed = mask.unsqueeze(1) | eye  # (n, T, T)
        if self.causal:
            allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril()
        if self.how == "module":
            return x + self.net(x, x, x, attn_mask=~allowed, need_weights=False)[0]
        q, k, v = self.net(x).chunk(3, -1)
        if self.how == "fused":
            return x + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        weights = (q @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1)
        return x + weights @ v


class Encoder(nn.Module):
    """A layer of torch's own transformer."""

    def __init__(self, d: int, norm_first: bool):
        super().__init__()
        self.net = nn.TransformerEncoderLayer(d, 1, d + 1, dropout=0.3, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.net(x, src_key_padding_mask=~mask)


class OverTime(nn.Module):
    """A convolution over time that sees zeros at padding."""

    def __init__(self, d: int, o: int, groups: int):
        super().__init__()
        self.net = nn.Conv1d(d, o, 3, padding=1, groups=groups)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.net((x * mask.unsqueeze(2)).mT).mT.tanh()


class RunningMean(nn.Module):
    """The mean of the past, mixed in."""

    def __init__(self, d: int):
        super().__init__()
        self.mix = nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        real = mask.unsqueeze(2).to(x)
        return x + self.mix((x * real).cumsum(1) / real.cumsum(1).clamp(min=1)).tanh()


class Recurrent(nn.Module):
    """A recurrent module on packed sequences, sorted and unsorted by torch, or on what is padded on the right."""

    def __init__(self, d: int, o: int, kind: type[nn.Module], packed: bool):
        super().__init__()
        self.net, self.packed = kind(d, o, batch_first=True), packed

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if not self.packed:
            return self.net(x)[0]
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.net(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Unpadded(nn.Module):
    """Layers that see the real tokens of a batch alone."""

    def __init__(self, d: int, o: int):
        super().__init__()
        self.net, self.norm, self.o = nn.Linear(d, o), nn.LayerNorm(o), o

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out = x.new_zeros(*mask.shape, self.o)
        out[mask] = self.norm(self.net(x[mask]).tanh())
        return out


class Positions(nn.Module):
    """A table of positions, called once for the batch or for each example, or a loose one."""

    def __init__(self, d: int, length: int, how: str):
        super().__init__()
        self.how = how
        self.table = nn.Parameter(0.5 * torch.randn(length, d)) if how == "loose" else nn.Embedding(length, d)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        steps = torch.arange(x.shape[1])
        if self.how == "loose":
            return x + self.table[steps]
        if self.how == "one row":
            return x + self.table(steps.unsqueeze(0))
        if self.how == "no row":
            return x + self.table(steps)
        return x + self.table((mask.cumsum(1) - 1).clamp(min=0))  # "each", whatever side the padding is on


class Pool(nn.Module):
    """A vector of a sequence."""

    def __init__(self, d: int, how: str):
        super().__init__()
        self.how = how
        self.query = nn.Parameter(torch.randn(d)) if how == "attend" else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        real = mask.unsqueeze(2)
        if self.how == "mean":
            return (x * real).sum(1) / real.sum(1)
        if self.how == "sum":
            return (x * real).sum(1)
        if self.how == "max":
            return x.masked_fill(~real, -torch.inf).amax(1)
        if self.how == "attend":
            weights = (x @ self.query).masked_fill(~mask, -torch.inf).softmax(1)
            return (weights.unsqueeze(2) * x).sum(1)
        last = (mask * torch.arange(1, 1 + mask.shape[1])).argmax(1)
        return x[torch.arange(len(x)), last]


# --- pieces for pictures and signals: (n, c, h, w) or (n, c, t) ---


def picture_pieces(draw: Draw, dims: int) -> tuple[nn.Module, int]:
    """A stack of layers on (n, 2, 4, ...), and the length of its flattened output."""
    Conv, Norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
    Up, Instance = (nn.ConvTranspose1d, nn.InstanceNorm1d) if dims == 1 else (nn.ConvTranspose2d, nn.InstanceNorm2d)
    c = draw.choice([2, 4])
    layers: list[nn.Module] = [
        Conv(
            2,
            c,
            draw.choice([2, 3]),
            stride=draw.choice([1, 2]),
            padding=draw.choice([1, 2]),
            groups=draw.choice([1, 2]),
            bias=draw.chance(0.7),
            padding_mode=draw.choice(["zeros", "circular", "replicate"]),
        ),
        draw.choice([nn.Tanh(), nn.GELU(), nn.ReLU(inplace=True), nn.PReLU(c)]),
    ]
    more = {
        "norm": lambda: Norm(c),
        "group": lambda: nn.GroupNorm(2, c),
        "instance": lambda: Instance(c, affine=True, track_running_stats=True),
        "up": lambda: Up(c, c, 2),
        "same": lambda: Conv(c, c, 3, padding="same", dilation=draw.choice([1, 2])),
        "depthwise": lambda: Conv(c, c, 2, groups=c, bias=False),
        "pool": lambda: (nn.AvgPool1d if dims == 1 else nn.AvgPool2d)(2),
        "dropout": lambda: nn.Dropout(0.5),
    }
    layers += [more[name]() for name in draw.sample(list(more), draw.randint(0, 2))]
    features = nn.Sequential(*layers).double().eval()(torch.zeros(1, 2, *[4] * dims, dtype=torch.float64))
    if features.numel() > 40 or draw.chance(0.4):  # not so wide that the dense Hessian of a case takes long
        layers.append((nn.AdaptiveAvgPool1d if dims == 1 else nn.AdaptiveAvgPool2d)(1))
    net = nn.Sequential(*layers, nn.Flatten()).double().eval()
    return net, net(torch.zeros(1, 2, *[4] * dims, dtype=torch.float64)).shape[1]


# --- models whose outputs depend on the batch, or on chance ---


class Spoiled(nn.Module):
    """What a per-example gradient cannot be taken of."""

    def __init__(self, d: int, how: str):
        super().__init__()
        self.how, self.calls = how, 0
        self.net = nn.BatchNorm1d(d, track_running_stats=False) if how == "batch norm" else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.how == "batch norm":
            return self.net(x) if len(x) > 1 else x
        if self.how == "dropout":
            return F.dropout(x, 0.4)
        if self.how == "noise":
            return x + 0.2 * torch.randn_like(x)
        if self.how == "calls":
            self.calls += 1
            return x * (1 + 0.1 * (self.calls % 7))
        if self.how == "centred":
            return x - 0.5 * x.mean(0)
        if self.how == "branch":
            return x * 1.5 if float(x.mean()) > 0 else x * 0.7
        if self.how == "attend":
            return x + torch.tensordot((x.flatten(1) @ x.flatten(1).T).softmax(1), x, 1)
        if self.how == "largest":
            return x / x.abs().max()
        if self.how == "sorted":
            return x.sort(0)[0]
        if self.how == "rolled":
            return x.roll(1, 0)
        if self.how == "first":
            return torch.cat([1.5 * x[:1], x[1:]])
        return x * (1 + 0.1 * len(x))  # "count"


RANDOM = ("dropout", "noise", "calls")
SPOILED = (*RANDOM, "batch norm", "centred", "branch", "attend", "largest", "sorted", "rolled", "first", "count")


class Net(nn.Module):
    """A stem, pieces on sequences, a pool, pieces on vectors and a head, all but the last of which may be missing."""

    def __init__(self, stem: nn.Module | None, over: Sequence[nn.Module], pool: nn.Module | None, more: Any, head: Any):
        super().__init__()
        self.stem, self.pool, self.head = stem, pool, head
        self.over, self.more = nn.ModuleList(over), nn.ModuleList(more)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x if self.stem is None else self.stem(x)
        for piece in self.over:
            x = piece(x, mask)
        if self.pool is not None:
            x, mask = self.pool(x, mask), None
        for piece in self.more:
            x = piece(x, mask)
        return self.head(x)


class TiedHead(nn.Module):
    """Logits by an embedding that the model begins with."""

    def __init__(self, table: nn.Embedding, d: int, module: bool):
        super().__init__()
        self.enter = nn.Linear(d, table.embedding_dim) if d != table.embedding_dim else nn.Identity()
        if module:
            self.head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False)
            self.head.weight = table.weight
        else:
            self.table = table
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x) if self.module else x @ self.table.weight.T


class Squeezed(nn.Module):
    """One number an example, without an axis for it."""

    def __init__(self, d: int):
        super().__init__()
        self.net = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


def pointwise(draw: Draw, d: int, sequence: bool, odd: bool = True) -> tuple[nn.Module, int]:
    """A piece that looks at each vector by itself, and its width."""
    o = draw.randint(2, 4)
    activation = draw.choice([torch.tanh, F.gelu, F.silu, torch.sin, old_function if draw.chance(0.3) else torch.tanh])
    orders = ["flat", "one", "middle", "backwards", "sorted", "halves", "siamese", "pairs", "each"]
    orders = [h for h in orders if h != "sorted" or not sequence] + (["time first"] if sequence else [])
    makers: list[Callable[[], tuple[nn.Module, int]]] = [
        lambda: (Plain(nn.Linear(d, o, bias=draw.chance(0.7)), activation), o),
        lambda: (Plain(nn.Linear(d, o), activation), o),
        lambda: (Residual(d, draw.randint(2, 4), draw.chance(0.5)), d),
        lambda: (Reused(d, draw.choice([2, 3]), draw.chance(0.5)), d),
        lambda: (TiedTranspose(d, o), d),
        lambda: (Affine(d, draw.choice([(d,), (1,), () if NO_AXES else (1,)])), d),
        lambda: (Matrix(d, o, draw.choice(["matmul", "einsum", "linear"])), o),
        lambda: (Form(d, 2), 2),
        lambda: (Prototypes(d, o), o),
        lambda: (LowRank(d, o), o),
        lambda: (Plain(Scaled(d, o), activation), o),
        lambda: (SoftExperts(d, o), o),
        lambda: (HardExperts(d, o), o),
        lambda: (Branches(d, o), o),
        lambda: (InPlace(d), d),
        lambda: (Checkpointed(d, o), o),
        lambda: (Buckets(d, o), o),
        lambda: (Turned(d, o, draw.choice(orders)), o),
        lambda: (Turned(d, o, draw.choice(orders)), o),
        lambda: (Convolved(d, o, draw.chance(0.4) and not sequence), o),
        lambda: (Normed(nn.LayerNorm(d, bias=draw.chance(0.5)), False), d),
        lambda: (Normed(nn.RMSNorm(d), False), d),
        lambda: (Normed(nn.BatchNorm1d(d), True), d),
        lambda: (Plain(nn.PReLU(), activation), d),
        lambda: (Plain(parametrizations.weight_norm(nn.Linear(d, o)), activation), o),
        lambda: (Plain(parametrizations.spectral_norm(nn.Linear(d, o)), activation), o),
        lambda: (Plain(nn.Sequential(nn.Linear(d, o), nn.Dropout(0.5)), activation), o),
    ]
    if not sequence:
        makers.append(lambda: (Normed(nn.GroupNorm(1, d), False), d))
        makers.append(lambda: (Plain(nn.PReLU(d), activation), d))
    return draw.choice(makers)()


def over_time(draw: Draw, d: int, left: bool) -> tuple[nn.Module, int]:
    """A piece that mixes positions, and its width."""
    o = draw.randint(2, 4)
    sides = ["each"] if left else ["each", "one row", "no row", "loose"]
    makers: list[Callable[[], tuple[nn.Module, int]]] = [
        lambda: (Attention(d, draw.choice(["module", "fused", "written"]), draw.chance(0.5)), d),
        lambda: (Attention(d, draw.choice(["fused", "written"]), draw.chance(0.5)), d),
        lambda: (Encoder(d, draw.chance(0.5)), d),
        lambda: (OverTime(d, o, 1), o),
        lambda: (OverTime(d, d, d), d),
        lambda: (RunningMean(d), d),
        lambda: (Unpadded(d, o), o),
        lambda: (Positions(d, LENGTH, draw.choice(sides)), d),
        lambda: (Positions(d, LENGTH, draw.choice(sides)), d),
    ]
    if not left:
        makers.append(lambda: (Recurrent(d, 2, draw.choice([nn.RNN, nn.GRU, nn.LSTM]), draw.chance(0.5)), 2))
    return draw.choice(makers)()


# --- losses: (outputs, y, mask) -> (n,) ---


def cross_entropy(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    flat = F.cross_entropy(h.flatten(0, -2), y.flatten(), reduction="none", ignore_index=IGNORE)
    return flat.view(len(h), -1).sum(1)


def mean_cross_entropy(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    return cross_entropy(h, y, mask) / (y != IGNORE).view(len(h), -1).sum(1).clamp(min=1)


def focal(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    logp = h.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    terms = -((1 - logp.exp()) ** 2) * logp * (y != IGNORE)
    return terms.reshape(len(h), -1).sum(1)


def elementwise(function: Callable[[Tensor, Tensor], Tensor], h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    terms = function(h, y)
    if mask is not None and terms.ndim == 3:
        terms = terms * mask.unsqueeze(2)
    return terms.reshape(len(h), -1).sum(1)


def gaussian(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    mean, log = h.chunk(2, -1)
    terms = (mean - y.chunk(2, -1)[0]).square() * (-log).exp() + log
    return elementwise(lambda a, b: a, terms, y, mask)


squared = partial(elementwise, lambda h, y: (h - y).square())
huber = partial(elementwise, lambda h, y: F.huber_loss(h, y, reduction="none", delta=0.7))
logcosh = partial(elementwise, lambda h, y: torch.log(torch.cosh(h - y)))
absolute = partial(elementwise, lambda h, y: (h - y).abs())
poisson = partial(elementwise, lambda h, y: h.exp() - y.abs() * h)
binary = partial(elementwise, lambda h, y: F.binary_cross_entropy_with_logits(h, (y > 0).to(h), reduction="none"))
CLASSES = {"ce": cross_entropy, "mean ce": mean_cross_entropy, "focal": focal}
NUMBERS = {
    "squared": squared,
    "huber": huber,
    "logcosh": logcosh,
    "l1": absolute,
    "poisson": poisson,
    "bce": binary,
    "gaussian": gaussian,
}
NOT_CONVEX = ("focal", "gaussian")


def linear_measurement(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    weights = torch.linspace(-1, 1, h.shape[-1] if h.ndim > 1 else 1).to(h)
    return elementwise(lambda a, b: a, h * weights if h.ndim > 1 else h, y, mask)


def entropy_measurement(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    p = h.softmax(-1) if h.ndim > 1 else h.sigmoid()
    terms = -(p * p.log())
    return elementwise(lambda a, b: a, terms, y, mask)


class FuzzTask(Task):
    """Losses on batches of some form."""

    def __init__(self, unpack: Callable[[Any], dict[str, Tensor]], loss: Any, measure: Any):
        self.unpack, self._loss, self._measure = unpack, loss, measure

    def outputs(self, model, batch):
        found = self.unpack(batch)
        return model(found["x"], found["mask"]) if "mask" in found else model(found["x"])

    def loss(self, outputs, batch):
        found = self.unpack(batch)
        return self._loss(outputs, found["y"], found.get("mask"))

    def measurement(self, outputs, batch):
        found = self.unpack(batch)
        return self._measure(outputs, found["y"], found.get("mask"))

    def padding(self, batch):
        return self.unpack(batch).get("mask")


# --- forms of data ---

Example = dict[str, Tensor]
PACK: dict[str, Callable[[Example], Any]] = {
    "tuple": lambda e: tuple(e.values()),
    "dict": lambda e: dict(e),
    "nested": lambda e: ({k: v for k, v in e.items() if k != "y"}, e["y"]),
    "lists": lambda e: {"inputs": [v for k, v in e.items() if k != "y"], "labels": {"y": e["y"]}},
}


def unpacked(form: str, names: tuple[str, ...], batch: Any) -> Example:
    """The columns of a batch by name."""
    if form == "tuple":
        return dict(zip(names, batch, strict=True))
    if form == "dict":
        return batch
    if form == "nested":
        return batch[0] | {"y": batch[1]}
    return dict(zip([n for n in names if n != "y"], batch["inputs"], strict=True)) | batch["labels"]


def collated(examples: Sequence[Example], ragged: frozenset[str], left: bool, length: int | None) -> Example:
    """Examples as one batch; ragged columns are padded to the longest, or to a fixed length."""
    batch = {}
    for name in examples[0]:
        parts = [e[name] for e in examples]
        fill = IGNORE if name == "y" and not parts[0].is_floating_point() else 0
        batch[name] = padded(parts, left, length, fill) if name in ragged else torch.stack(parts)
    return batch


def padded(parts: Sequence[Tensor], left: bool, length: int | None, fill: float) -> Tensor:
    """Sequences (T_i, ...) as (n, T, ...)."""
    T = length or max(len(p) for p in parts)
    out = torch.full((len(parts), T, *parts[0].shape[1:]), fill, dtype=parts[0].dtype)
    for row, part in zip(out, parts, strict=True):
        row[T - len(part) if left else 0 : T if left else len(part)] = part
    return out


# --- a case ---


@dataclass
class Case:
    """A model, data and settings; and what it should come to."""

    seed: int
    model: nn.Module
    task: FuzzTask
    train: Any
    queries: Any
    singles: list[Any]  # batches of one example, unpadded
    asked: list[Any]  # the same of the queries
    batch_size: int | None
    curvature: str
    share: float  # damping over the mean eigenvalue of C
    select: list[str] | None
    solvers: list[str]
    random: bool  # whether no answer can be right
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


CURVATURES = {
    "ggn": GGN,
    "jvp": partial(GGN, product="jvp"),
    "hessian": Hessian,
    "fisher": EmpiricalFisher,
}
LENGTH = 5  # of the longest sequences
FORWARD_MODE_LACKS = (Prototypes, Recurrent, Encoder)  # pieces whose operations have no forward-mode derivatives
FORWARD_MODE_OPTIONAL = True


def make(seed: int) -> Case:
    """The case of a seed."""
    draw = Draw(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return _make(draw, seed)
        finally:
            torch.set_default_dtype(default)


@dataclass
class Shape:
    """What the examples of a case look like."""

    kind: str  # of inputs
    width: int  # of a vector of the input
    vocabulary: int
    by_token: bool  # whether there is an output for each position
    left: bool  # whether padding is on the left
    loss: str
    C: int  # outputs of a position; 0: one without an axis of its own

    @property
    def sequence(self) -> bool:
        return self.kind in ("tokens", "features")


def _make(draw: Draw, seed: int) -> Case:
    kind = draw.choice(["vectors", "vectors", "tokens", "tokens", "features", "signal", "picture"])
    sequence = kind in ("tokens", "features")
    by_token = sequence and draw.chance(0.4)
    loss = draw.choice([*CLASSES, "ce", "ce", *NUMBERS, "squared"])
    shape = Shape(kind, draw.randint(2, 4), draw.randint(4, 6), by_token, draw.chance(0.3), loss, draw.choice([2, 3]))
    model, notes = _model(draw, shape)
    _settle(model, draw)
    examples = [_example(draw, shape) for _ in range(draw.randint(4, 8) + 3)]
    queries, train = examples[: draw.randint(1, 3)], examples[3:]

    form = draw.choice(list(PACK))
    names = tuple(examples[0])
    ragged = frozenset(names if by_token else ("x", "mask")) if sequence else frozenset[str]()
    fixed = LENGTH if draw.chance(0.4) else None
    pack = lambda some, length: PACK[form](collated(some, ragged, shape.left, length))  # noqa: E731
    batch_size = draw.choice([None, *range(1, len(train) + 4)])
    whole = form in ("tuple", "dict") and fixed is not None and draw.chance(0.6)

    def given(some: list[Example]) -> Any:
        if whole or (not ragged and form in ("tuple", "dict") and draw.chance(0.5)):
            return pack(some, fixed)
        return DataLoader(some, batch_size or 4, collate_fn=lambda batch: pack(batch, fixed))  # type: ignore[arg-type]

    losses = CLASSES | NUMBERS
    measure = draw.choice([losses[loss], linear_measurement, entropy_measurement])
    task = FuzzTask(partial(unpacked, form, names), losses[loss], measure)
    curvature = draw.choice(["ggn"] * 6 + ["fisher"] * 2 + ["jvp", "hessian"])
    lacking = loss == "huber" or any(isinstance(m, FORWARD_MODE_LACKS) for m in model.modules())
    if curvature in ("jvp", "hessian") and lacking and not FORWARD_MODE_OPTIONAL:
        curvature = "ggn"
    without = any("_WeightNorm" in type(m).__name__ or isinstance(m, Prototypes) for m in model.modules())
    if curvature == "hessian" and without:  # torch has a wrong second derivative, or none: no reference
        curvature = "ggn"
    names_of = [name for name, p in model.named_parameters() if p.requires_grad]
    select = draw.sample(names_of, draw.randint(1, len(names_of))) if draw.chance(0.15) else None
    share = 10 ** draw.uniform(-2, 1)
    solvers = ["exact", *draw.sample(list(SOLVERS), draw.randint(1, 2))]
    case = Case(
        seed,
        model,
        task,
        given(train),
        given(queries),
        [pack([e], None) for e in train],
        [pack([e], None) for e in queries],
        batch_size,
        curvature,
        share,
        select,
        solvers,
        any(how in RANDOM for how in notes),
        notes,
    )
    if draw.chance(0.08):
        _to_float32(case)
    return case


def _model(draw: Draw, shape: Shape) -> tuple[Net, list[str]]:
    """A model, and what is wrong with it."""
    stem, table, pool, over, more = None, None, None, [], []
    d = shape.width
    if shape.kind == "tokens":
        stem = table = nn.Embedding(shape.vocabulary, d, padding_idx=0 if draw.chance(0.4) else None)
    elif not shape.sequence and shape.kind != "vectors":
        stem, d = picture_pieces(draw, 1 if shape.kind == "signal" else 2)
    if shape.sequence:
        for _ in range(draw.randint(1, 2)):
            piece, d = over_time(draw, d, shape.left) if draw.chance(0.6) else pointwise(draw, d, True)
            over.append(piece)
        if not shape.by_token:
            pool = Pool(d, draw.choice(["mean", "sum", "max", "attend", "last"]))
    for _ in range(draw.randint(1, 3) if shape.kind == "vectors" else draw.randint(0, 1)):
        piece, d = pointwise(draw, d, shape.by_token)
        more.append(piece)
    notes = []
    if not shape.by_token and draw.chance(0.1):
        notes.append(draw.choice(SPOILED))
        more.append(Spoiled(d, notes[0]))
    if shape.loss == "gaussian":
        shape.C = 2
    if table is not None and shape.by_token and shape.loss in CLASSES and draw.chance(0.6):
        shape.C = shape.vocabulary
        head: nn.Module = TiedHead(table, d, draw.chance(0.7))
    elif shape.loss in ("squared", "huber", "bce", "poisson") and not shape.by_token and draw.chance(0.2):
        shape.C = 0
        head = Squeezed(d)
    else:
        head = nn.Linear(d, shape.C, bias=draw.chance(0.8))
    return Net(stem, over, pool, more, head), notes


def _settle(model: Net, draw: Draw) -> None:
    """Weights away from 0 and 1, statistics of batch norms, some frozen parameters, now and then training mode."""
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(0.3 * draw.normal(module.num_features))
                module.running_var.copy_(0.5 + draw.normal(module.num_features).square())
            if isinstance(module, nn.Embedding):
                module.weight.mul_(0.7)
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.2 * draw.normal(*p.shape))
    model.train(draw.chance(0.2))
    for p in model.parameters():
        if draw.chance(0.05):
            p.requires_grad_(False)
    model.head.requires_grad_(True)


def _example(draw: Draw, shape: Shape) -> Example:
    """One example, unpadded."""
    T = draw.randint(1, LENGTH)
    example: Example = {}
    if shape.kind == "tokens":
        example["x"] = torch.tensor([draw.randrange(1, shape.vocabulary) for _ in range(T)])
    elif shape.kind == "features":
        example["x"] = draw.normal(T, shape.width)
    elif shape.kind == "vectors":
        example["x"] = draw.normal(shape.width)
    else:
        example["x"] = draw.normal(2, *[4] * (1 if shape.kind == "signal" else 2))
    if shape.sequence:
        example["mask"] = torch.ones(T, dtype=torch.bool)
    leading = (T,) if shape.by_token else ()
    if shape.loss in CLASSES:
        labels = [IGNORE if shape.by_token and draw.chance(0.25) else draw.randrange(shape.C) for _ in range(T)]
        example["y"] = torch.tensor(labels if shape.by_token else labels[0])
    else:
        example["y"] = draw.normal(*leading, *([shape.C] if shape.C else []))
    return example


def _to_float32(case: Case) -> None:
    """Take the model in single precision, and the exact solver alone; data are given as they are."""
    case.model.float()
    narrow = lambda t: t.float() if t.is_floating_point() else t  # noqa: E731
    unpack = case.task.unpack
    case.task.unpack = lambda batch: {name: narrow(t) for name, t in unpack(batch).items()}
    case.solvers, case.share = ["exact"], max(case.share, 0.3)


# --- the exact answer, by plain autograd ---


class Dense:
    """What one example alone says, written out in float64.

    Args:
        case: with its model as it was before the library saw it.
    """

    def __init__(self, case: Case):
        self.case, self.model = case, copy.deepcopy(case.model).double().eval()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = {name: p for name, p in named.items() if case.select is None or name in case.select}
        self.D = sum(p.numel() for p in self.parameters.values())
        unpack = case.task.unpack
        wide = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
        self.task = copy.copy(case.task)
        self.task.unpack = lambda batch: {name: wide(t) for name, t in unpack(batch).items()}
        self.gradients = torch.stack([self._gradient(self._value(self.task.loss, b)) for b in case.singles])
        self.asked = torch.stack([self._gradient(self._value(self.task.measurement, b)) for b in case.asked])

    def flat(self, vectors: dict[str, Tensor]) -> Tensor:
        """Name -> (Q, *shape) to (Q, D)."""
        return torch.cat([vectors[name].reshape(len(vectors[name]), -1) for name in self.parameters], 1)

    def named(self, matrix: Tensor) -> dict[str, Tensor]:
        """(Q, D) to name -> (Q, *shape)."""
        parts = matrix.split([p.numel() for p in self.parameters.values()], 1)
        return {name: t.reshape(-1, *p.shape) for (name, p), t in zip(self.parameters.items(), parts, strict=True)}

    def weighted_rows(self) -> list[Tensor]:
        """Of each example, rows (K, D) whose squares sum to its part of the matrix, if that is not negative."""
        if self.case.curvature == "fisher":
            return [g.unsqueeze(0) for g in self.gradients]
        rows = []
        for jacobian, hessian in self._parts:
            values, u = torch.linalg.eigh(hessian)
            rows.append((values.clamp(min=0).sqrt() * u).T @ jacobian)
        return rows

    @property
    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Of each example, d outputs / d parameters (K, D) and the Hessian of its loss in the outputs (K, K)."""
        if not hasattr(self, "_made"):
            self._made = []
            for batch in self.case.singles:
                h = self.task.outputs(self.model, batch)
                jacobian = torch.stack([self._gradient(one, keep=True) for one in h.flatten()])
                loss = lambda t, h=h, batch=batch: self.task.loss(t.view_as(h), batch).sum()  # noqa: E731
                hessian = torch.autograd.functional.hessian(loss, h.detach().flatten())
                self._made.append((jacobian, hessian))
        return self._made

    def matrix(self) -> Tensor:
        """C, (D, D)."""
        n = len(self.case.singles)
        if self.case.curvature == "fisher":
            return self.gradients.T @ self.gradients / n
        if self.case.curvature != "hessian":
            return sum(J.T @ H @ J for J, H in self._parts) / n
        total = torch.zeros(self.D, self.D, dtype=torch.float64)
        for batch in self.case.singles:
            slope = self._gradient(self._value(self.task.loss, batch), create_graph=True)
            total += torch.stack([self._gradient(s, keep=True) for s in slope]) / n
        return total

    def _value(self, function: Any, batch: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return function(self.task.outputs(self.model, batch), batch).sum()

    def _gradient(self, value: Tensor, keep: bool = False, create_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros(self.D, dtype=torch.float64)
        leaves = list(self.parameters.values())
        grads = torch.autograd.grad(
            value,
            leaves,
            retain_graph=keep or create_graph,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([g.flatten() for g in grads])


# --- solvers: what is fitted, and what it should apply to right-hand sides, written out: (D, D) ---

Reference = Callable[[Dense, Tensor, float, Inverse], Tensor]


def exactly(dense: Dense, C: Tensor, damping: float, inverse: Inverse) -> Tensor:
    return torch.linalg.inv(C + damping * torch.eye(len(C)).double())


def identity(dense: Dense, C: Tensor, damping: float, inverse: Inverse) -> Tensor:
    return torch.eye(len(C)).double()


def blockwise(dense: Dense, inverse: Inverse, apply: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """A matrix from what is done to each block's matrices (Q, G, O, I)."""
    eye = dense.named(torch.eye(dense.D).double())
    out: dict[str, Tensor] = {}
    for block in inverse.curvature.problem.blocks:
        out |= block.unpack(apply(block, block.pack(eye)))
    return dense.flat(out)


def eigenbasis(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    """EKFAC or KFAC in the basis that was found, whose eigenvalues are the Fisher's there."""
    grads, size = dense.named(dense.gradients), dense.gradients.square().sum()

    def apply(block: Any, v: Tensor) -> Tensor:
        f = inverse.factors[block.name]
        eye = torch.eye(block.size).double().view(-1, *block.sides)
        Q = f.to_eigenbasis(eye).flatten(1)
        assert (Q @ Q.T - torch.eye(block.size)).norm() < 1e-8, "the basis is not orthonormal"
        squares = f.to_eigenbasis(block.pack(grads)).square().mean(0)
        if inverse.corrected:
            error = (squares - f.ekfac).norm() / (squares.norm() + 1e-15 * size)
            assert error < 1e-7, f"EKFAC's eigenvalues are off by {error:.1e}"
            values = squares
        else:
            values = f.kfac
        return f.from_eigenbasis(f.to_eigenbasis(v) / (values + damping))

    return blockwise(dense, inverse, apply)


def datainf(dense: Dense, C: Tensor, damping: float, inverse: Inverse) -> Tensor:
    rows = dense.weighted_rows()

    def apply(block: Any, v: Tensor) -> Tensor:
        total = torch.zeros(block.size, block.size).double()
        for b in rows:
            mine = block.pack(dense.named(b)).flatten(1)
            total += torch.linalg.inv(mine.T @ mine + damping * torch.eye(block.size).double()) / len(rows)
        return (v.flatten(1) @ total).view_as(v)

    return blockwise(dense, inverse, apply)


def hyperinf(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    rows = dense.weighted_rows()

    def apply(block: Any, v: Tensor) -> Tensor:
        G, O, I = block.sides
        m = block.pack(dense.named(torch.cat(rows)))  # (N K, G, O, I)
        out = torch.empty_like(v)
        for g in range(G):
            one = m[:, g] if I <= O else m[:, g].mT
            A = (one.mT @ one).sum(0) / len(rows)
            X = torch.linalg.inv(A + damping * torch.eye(len(A)).double())
            out[:, g] = v[:, g] @ X if I <= O else X @ v[:, g]
        return out

    return blockwise(dense, inverse, apply)


def directions(dense: Dense, inverse: Any) -> Tensor:
    """The directions that an inverse holds, in the order of the parameters: (p, D)."""
    blocks = inverse.curvature.problem.blocks
    return dense.flat(Directions.unflatten(blocks, inverse.vectors).to_parameters())


def projected(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    V = directions(dense, inverse)
    return V.T @ V


def ritz(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    """Each direction is an eigenvector to within its bound."""
    V = directions(dense, inverse)
    off = (V @ C - inverse.values.unsqueeze(1) * V).norm(dim=1)
    size = C.norm()
    assert (off <= inverse.errors + 1e-6 * size).all(), "a Ritz pair is not one of the true matrix"
    return (V.T / (inverse.values + damping)) @ V


def selected(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    D = dense.D
    weights = torch.zeros(D).double()
    p = min(7, D)
    weights[torch.randperm(D, generator=torch.Generator().manual_seed(0))[:p]] = D / p
    return weights.diag()


def nystrom(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    D = dense.D
    omega = torch.randn(min(2, D), D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    omega = torch.linalg.qr(omega.T)[0]  # (D, r)
    image = C @ omega
    approximation = image @ torch.linalg.pinv(omega.T @ image, hermitian=True, rtol=1e-12) @ image.T
    values, u = torch.linalg.eigh((approximation + approximation.T) / 2)
    values, u = values[-min(2, D) :], u[:, -min(2, D) :]
    rest = float(values[0].clamp(min=0)) + damping
    eye = torch.eye(D).double()
    return (u / (values.clamp(min=0) + damping)) @ u.T + (eye - u @ u.T) / rest


def iterated(dense: Dense, C: Tensor, damping: float, inverse: Any) -> Tensor:
    """Steps on all the data, with the step that was chosen."""
    solver, plan = inverse.solver, inverse.plan
    eye = torch.eye(dense.D).double()
    A = C + damping * eye
    P = eye if inverse.is_plain else eigenbasis(dense, C, damping, inverse.preconditioner)
    x = eye / damping if inverse.is_plain else P
    m = torch.zeros_like(x)
    for k in range(plan.steps):
        m = solver.momentum * m + (eye - x @ A) @ P
        x = x + plan.step * solver.decay ** (k // solver.decay_every) * m
    return x


SOLVERS: dict[str, tuple[Any, Reference]] = {
    "primal": (Exact(form="primal"), exactly),
    "dual": (Exact(form="dual"), exactly),
    "unpruned": (Dual(drop=0.0), exactly),
    "cg": (CG(tolerance=1e-11, steps=2000), exactly),
    "cg block": (CG(tolerance=1e-10, steps=500, block=True), exactly),
    "cg ekfac": (CG(EKFAC(labels="true"), tolerance=1e-11, steps=2000), exactly),
    "cg dual": (CG(Dual(), tolerance=1e-11, steps=500), exactly),
    "cg nystrom": (CG(Nystrom(rank=5), tolerance=1e-11, steps=2000), exactly),
    "identity": (Identity(), identity),
    "ekfac": (EKFAC(labels="true"), eigenbasis),
    "kfac": (KFAC(labels="true"), eigenbasis),
    "datainf": (DataInf(), datainf),
    "hyperinf": (HyperINF(), hyperinf),
    "arnoldi": (Arnoldi(rank=4, steps=25), ritz),
    "nystrom": (Nystrom(rank=2), nystrom),
    "projection": (RandProj(rank=6), projected),
    "selection": (RandSelect(rank=7), selected),
    "neumann": (Neumann(steps=12), iterated),
    "astra": (ASTRA(preconditioner=EKFAC(labels="true"), steps=12, decay_every=5), iterated),
}


# --- a case against the library ---


@dataclass
class Outcome:
    """What became of a case: "right", "refused", "wrong" or "crashed", and a word on why."""

    seed: int
    what: str
    why: str = ""
    detail: str = ""
    sound: bool = True  # whether the model has gradients for each example


def compare(case: Case, dense: Dense | None = None) -> Outcome:
    """Run every solver of a case, and hold its scores against the dense ones."""
    refusals = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = dense or Dense(case)
        C = dense.matrix()
        damping = case.share * float(C.diagonal().abs().mean()) or 0.1
        for name in case.solvers:
            solver, reference = SOLVERS.get(name, (Exact(), exactly))
            try:
                problem = _score(case, dense, C, damping, name, solver, reference)
            except AttributionError as error:
                refusals.append(f"{name}: {_kind(error)}")
                continue
            except Exception as error:  # noqa: BLE001
                return Outcome(case.seed, "crashed", f"{name}: {_kind(error)}", traceback.format_exc(limit=-6))
            if problem:
                return Outcome(case.seed, "wrong", f"{name}: {problem}")
    if not refusals:
        return Outcome(case.seed, "right")
    return Outcome(case.seed, "refused", refusals[0], sound=not case.notes)


def _score(case: Case, dense: Dense, C: Tensor, damping: float, name: str, solver: Any, reference: Reference) -> str:
    """What is wrong with one solver's scores; nothing if they are right."""
    chosen = None if case.select is None else (lambda p: p in case.select)
    curvature = CURVATURES[case.curvature]
    method = Influence(solver, damping, curvature, chosen, case.batch_size, progress=False)  # type: ignore[arg-type]
    fitted = method.fit(case.model, case.task, case.train)
    scores = fitted.score(case.queries, certify=not fitted.inverse.is_approximate)
    if case.random:
        return "an answer, though the model is random"
    found = scores.values.double()
    if found.shape != (len(case.asked), len(case.singles)):
        return f"shape {tuple(found.shape)}"
    inverse = fitted.inverse
    wrong = []
    if (
        name in ("neumann", "astra") and inverse.plan.batch
    ):  # minibatches are drawn: its own solutions, and their scores
        reference = lambda *_: dense.flat(solving.apply(inverse, dense.named(torch.eye(dense.D).double())))  # noqa: E731
    try:
        M = reference(dense, C, damping, inverse)
    except AssertionError as error:
        return str(error)
    wanted = dense.asked @ M @ dense.gradients.T
    error = _error(found, wanted, dense.asked, dense.gradients, M)
    # A dependence on the batch that is smaller than what rows are certified to is seen in the row error alone.
    if not error <= (10 * ROW_TOLERANCE[case.dtype] if case.notes else TOLERANCE[case.dtype]):
        wrong.append(f"scores off by {error:.1e}")
    if case.dtype == torch.float64 and name not in ("arnoldi", "projection"):
        x = dense.asked @ M
        residual = (x @ C + damping * x - dense.asked).norm(dim=1) / dense.asked.norm(dim=1).clamp(min=1e-300)
        if scores.residual is not None and not ((scores.residual - residual).abs() <= 1e-6 * (1 + residual)).all():
            wrong.append(f"residual {float(scores.residual.max()):.1e} for {float(residual.max()):.1e}")
    return ", ".join(wrong)


def _error(found: Tensor, wanted: Tensor, q: Tensor, g: Tensor, M: Tensor) -> float:
    """The largest difference over the largest score, or over what rounding leaves of larger terms that cancel."""
    size = wanted.abs().max() + 1e-6 * q.norm(dim=1).max() * g.norm(dim=1).max() * torch.linalg.matrix_norm(M, 2)
    error = float((found - wanted).abs().max() / size.clamp(min=1e-300))
    return error if error == error else float("inf")


def _kind(error: Exception) -> str:
    """The class of an error, and its words without numbers."""
    said = re.sub(r"[0-9][0-9.,e+-]*", "#", str(error).split("\n")[0])
    return f"{type(error).__name__}: {said[:90]}"


def run(seed: int) -> Outcome:
    """Make a case and compare it."""
    return compare(make(seed))


def main(count: int, first: int) -> int:
    """Run many cases and say what became of them; the number of bad ones."""
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    bad: list[Outcome] = []
    start = time.time()
    for seed in range(first, first + count):
        outcome = run(seed)
        counts[outcome.what] += 1
        if outcome.what == "refused":
            reasons[("" if outcome.sound else "no gradients: ") + outcome.why] += 1
        elif outcome.what != "right":
            bad.append(outcome)
            print(f"seed {seed} {outcome.what}: {outcome.why}\n{outcome.detail}", flush=True)
        if (seed + 1 - first) % 100 == 0:
            print(f"{seed + 1 - first} models: {dict(counts)}", flush=True)
    for reason, times in reasons.most_common():
        print(f"{times:5d} refused, {reason}")
    said = ", ".join(f"{counts[what]} {what}" for what in ("right", "refused", "wrong", "crashed"))
    print(f"{count} models in {time.time() - start:.0f} s: {said}; seeds of the bad ones: {[o.seed for o in bad]}")
    return len(bad)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(1 if main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) else 0)
