"""Kinds of torch operation on a loose parameter, which no layer entry covers: rows against autograd by example.

Each is right in both precisions, for one and for several cotangents, or it is refused in words. What is refused is
listed with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from wherefrom import AttributionError, Problem, Task

pytestmark = pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
N = 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Kind:
    """One operation.

    Args:
        function: of a batch (N, ...) and the parameters, to outputs (N, ...).
        shapes: of the parameters.
        inputs: shape of one example's input.
        like: makes the parameters what the operation takes, such as positive definite.
        integers: inputs are drawn from 0 to this number, or normal if it is 0.
    """

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((4,),)
    inputs: tuple[int, ...] = (4,)
    like: Callable[[Tensor], Tensor] = lambda t: t
    integers: int = 0


class Loose(nn.Module):
    """Parameters that belong to no layer, and what is done with them."""

    def __init__(self, kind: Kind):
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(1)
        for i, shape in enumerate(kind.shapes):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{i}", nn.Parameter(kind.like(value).to(torch.get_default_dtype())))

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.function(x, *(getattr(self, f"p{i}") for i in range(len(self.kind.shapes))))


class Square(torch.autograd.Function):
    """A function of the new style, with a rule for vmap made by torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class OldSquare(torch.autograd.Function):
    """A function of the old style: its forward pass has the context, and functorch refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class ClippedGradient(torch.autograd.Function):
    """Straight through: the gradient is not that of the values."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def positive(t: Tensor) -> Tensor:
    return t.abs() + 0.3


def definite(t: Tensor) -> Tensor:
    return t @ t.mT + torch.eye(t.shape[-1]).to(t)


def regular(t: Tensor) -> Tensor:
    return t + 3 * torch.eye(t.shape[-1]).to(t)


def symmetric(p: Tensor, x: Tensor) -> Tensor:
    """A symmetric matrix for each example, of the parameter and its inputs."""
    m = p + x.unsqueeze(2) * x.unsqueeze(1)
    return (m + m.mT) / 2


def matrices(p: Tensor, x: Tensor) -> Tensor:
    return p + 0.3 * x.unsqueeze(2) * x.unsqueeze(1)


def looped(x: Tensor, p: Tensor) -> Tensor:
    """Control flow on values of the data, example by example."""
    rows = []
    for row in x:
        y = row
        while float(y.sum().detach()) < 3:
            y = y + p.abs() + 0.5
        rows.append(y * p if row[0] > 0 else y)
    return torch.stack(rows)


def bidirectional(x: Tensor, p: Tensor) -> Tensor:
    return torch.cat([x * p, x.flip(1) * p.flip(0)], 1)


def own_lengths(x: Tensor, p: Tensor) -> Tensor:
    """Padding that is cut off where .item() says, and masked."""
    real = x[:, :, 0] > -1
    longest = int((real * torch.arange(1, x.shape[1] + 1)).max().item())
    return ((x * p) * real.unsqueeze(2))[:, :longest].sum(1)


def attend(x: Tensor, p: Tensor, **options: Any) -> Tensor:
    q, k, v = (x @ w for w in p)
    return F.scaled_dot_product_attention(q, k, v, **options)


def heads(x: Tensor, into: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    found = F.multi_head_attention_forward(
        x, x, x, 4, 2, into, bias, None, None, False, 0.0, out, None, training=False, need_weights=False
    )
    return found[0].transpose(0, 1)


def segments(x: Tensor, p: Tensor) -> Tensor:
    lengths = torch.tensor([[1, 3]]).expand(len(x), 2)
    return torch.segment_reduce((x * p).contiguous(), "sum", lengths=lengths.contiguous(), axis=1)


def ctc(x: Tensor, p: Tensor) -> Tensor:
    n = len(x)
    logs = (x * p).log_softmax(-1).transpose(0, 1)  # (T, n, C)
    full, half = torch.full((n,), 5), torch.full((n,), 2)
    return F.ctc_loss(logs, torch.tensor([[1, 2]]).expand(n, 2), full, half, reduction="none").unsqueeze(1)


def nested(x: Tensor, p: Tensor) -> Tensor:
    """A gradient within the forward pass."""
    with torch.enable_grad():
        y = x if x.requires_grad else x.clone().requires_grad_()
        energy = ((y @ p).tanh() ** 2).sum()
        return torch.autograd.grad(energy, y, create_graph=True)[0]


MATRIX = ((4, 4),)
IMAGE = (2, 5, 5)
SOME = torch.tensor([2, 0, 3])

KINDS: dict[str, Kind] = {
    # elementwise
    "mul add": Kind(lambda x, p, q: x * p + q, ((4,), (4,))),
    "scalar": Kind(lambda x, p: x * p, ((1,),)),
    "division": Kind(lambda x, p: x / p, like=positive),
    "pow": Kind(lambda x, p: positive(x) ** p),
    "exp log": Kind(lambda x, p: (x * p).exp().log1p()),
    "sin cos": Kind(lambda x, p: (x * p).sin() + (x + p).cos()),
    "tan tanh": Kind(lambda x, p: (x * p).tanh() + (0.1 * x + 0.1 * p).tan()),
    "sigmoid gates": Kind(lambda x, p: x * (x * p).sigmoid()),
    "softplus": Kind(lambda x, p: F.softplus(x * p, 2.0)),
    "gelu silu mish": Kind(lambda x, p: F.gelu(x * p) + F.silu(x + p) + F.mish(x - p)),
    "relu6 hardtanh": Kind(lambda x, p: F.relu6(x + p) + F.hardtanh(x * p)),
    "celu elu selu": Kind(lambda x, p: F.celu(x * p, 0.7) + F.elu(x + p) + F.selu(x - p)),
    "hardswish": Kind(lambda x, p: F.hardswish(x * p) + F.hardsigmoid(x + p)),
    "prelu, one slope": Kind(lambda x, p: F.prelu(x, p), ((1,),)),
    "prelu, by channel": Kind(lambda x, p: F.prelu(x, p), ((3,),), (3, 4)),
    "prelu, by channel, of images": Kind(lambda x, p: F.prelu(x, p), ((2,),), IMAGE),
    "rrelu in eval mode": Kind(lambda x, p: F.rrelu(x * p, training=False)),
    "glu": Kind(lambda x, p: F.glu(x * p, 1)),
    "abs sign": Kind(lambda x, p: (x - p).abs() * x.sign()),
    "clamp": Kind(lambda x, p: (x * p).clamp(-0.5, 0.5) + torch.clamp(x, min=p)),
    "maximum minimum": Kind(lambda x, p: torch.maximum(x, p) + torch.minimum(2 * x, p)),
    "lerp": Kind(lambda x, p, q: torch.lerp(x, p, q), ((4,), (4,))),
    "addcmul addcdiv": Kind(lambda x, p: torch.addcmul(x, p, x) + torch.addcdiv(x, p, x.square() + 1)),
    "atan2 hypot": Kind(lambda x, p: torch.atan2(x, p) + torch.hypot(x, p)),
    "erf erfinv": Kind(lambda x, p: torch.erf(x * p) + torch.erfinv((x + p).tanh() * 0.9)),
    "lgamma digamma": Kind(lambda x, p: torch.lgamma(positive(x) + p) + torch.digamma(positive(x) + p), like=positive),
    "polygamma": Kind(lambda x, p: torch.polygamma(1, positive(x) + p), like=positive),
    "bessel i0": Kind(lambda x, p: torch.special.i0e(x * p)),
    "xlogy logaddexp": Kind(lambda x, p: torch.xlogy(x, p) + torch.logaddexp(x, p), like=positive),
    "sinc remainder": Kind(lambda x, p: torch.sinc(x * p) + torch.remainder(x, p), like=positive),
    # products
    "matmul": Kind(lambda x, p: x @ p, ((4, 3),)),
    "matmul of sequences": Kind(lambda x, p: x @ p, ((4, 3),), (2, 4)),
    "mv": Kind(lambda x, p, q: x @ (p @ q).unsqueeze(1), ((4, 4), (4,))),
    "addmm": Kind(lambda x, p, q: torch.addmm(q, x, p, beta=0.5), ((4, 3), (3,))),
    "bmm": Kind(lambda x, p: torch.bmm(x.unsqueeze(1), p.expand(len(x), 4, 3)).squeeze(1), ((4, 3),)),
    "baddbmm": Kind(
        lambda x, p, q: torch.baddbmm(q.expand(len(x), 2, 3), x, p.expand(len(x), 4, 3)), ((4, 3), (2, 3)), (2, 4)
    ),
    "einsum": Kind(lambda x, p: torch.einsum("ni,cij,nj->nc", x, p, x), ((3, 4, 4),)),
    "tensordot": Kind(lambda x, p: torch.tensordot(x, p, ([2, 1], [0, 1])), ((3, 2, 5),), (2, 3)),
    "outer kron": Kind(lambda x, p: torch.kron(x.unsqueeze(1), p.unsqueeze(0)).flatten(1), ((2, 2),)),
    "linear": Kind(lambda x, p, q: F.linear(x, p, q), ((3, 4), (3,))),
    "bilinear": Kind(lambda x, p, q: F.bilinear(x, x.flip(1), p, q), ((3, 4, 4), (3,))),
    "cross": Kind(lambda x, p: torch.linalg.cross(x, p.expand(len(x), 3)), ((3,),), (3,)),
    "cumsum cumprod": Kind(lambda x, p: (x * p).cumsum(1) + (x + p).cumprod(1)),
    "logcumsumexp": Kind(lambda x, p: (x * p).logcumsumexp(1)),
    "cummax cummin": Kind(lambda x, p: (x * p).cummax(1)[0] + (x + p).cummin(1)[0]),
    # distances
    "cdist, p = 2": Kind(lambda x, p: torch.cdist(x, p), ((3, 4),)),
    "cdist, p = 1": Kind(lambda x, p: torch.cdist(x, p, p=1.0), ((3, 4),)),
    "cdist, p = 3": Kind(lambda x, p: torch.cdist(x, p, p=3.0), ((3, 4),)),
    "cdist of sequences": Kind(lambda x, p: torch.cdist(x, p.expand(len(x), 3, 4)), ((3, 4),), (2, 4)),
    "pdist": Kind(lambda x, p: torch.stack([F.pdist(row * p) for row in x]), inputs=(3, 4)),
    "cosine similarity": Kind(lambda x, p: F.cosine_similarity(x.unsqueeze(1), p, dim=2), ((3, 4),)),
    "pairwise distance": Kind(lambda x, p: F.pairwise_distance(x, p.expand_as(x)).unsqueeze(1)),
    "normalize": Kind(lambda x, p: F.normalize(x, dim=1) @ F.normalize(p, dim=0), ((4, 3),)),
    # convolutions
    "conv1d": Kind(lambda x, p, q: F.conv1d(x, p, q, padding=1), ((3, 2, 3), (3,)), (2, 5)),
    "conv2d": Kind(lambda x, p, q: F.conv2d(x, p, q, stride=2, padding=1), ((3, 2, 3, 3), (3,)), IMAGE),
    "conv2d, groups": Kind(lambda x, p: F.conv2d(x, p, groups=2, dilation=2), ((4, 1, 2, 2),), IMAGE),
    "conv3d": Kind(lambda x, p: F.conv3d(x, p), ((2, 1, 2, 2, 2),), (1, 3, 3, 3)),
    "conv_transpose1d": Kind(lambda x, p: F.conv_transpose1d(x, p, stride=2), ((2, 3, 3),), (2, 4)),
    "conv_transpose2d": Kind(lambda x, p, q: F.conv_transpose2d(x, p, q, padding=1), ((2, 3, 3, 3), (3,)), IMAGE),
    # pictures
    "grid_sample": Kind(
        lambda x, p: F.grid_sample(x, p.tanh().expand(len(x), 3, 3, 2), align_corners=False), ((3, 3, 2),), IMAGE
    ),
    "affine_grid": Kind(
        lambda x, p: F.grid_sample(
            x, F.affine_grid(p.expand(len(x), 2, 3), list(x.shape), align_corners=False), align_corners=False
        ),
        ((2, 3),),
        IMAGE,
    ),
    "interpolate": Kind(
        lambda x, p: F.interpolate(x * p, size=(7, 3), mode="bilinear", align_corners=False), (IMAGE,), IMAGE
    ),
    "interpolate nearest": Kind(lambda x, p: F.interpolate(x * p, scale_factor=2.0), (IMAGE,), IMAGE),
    "bicubic": Kind(lambda x, p: F.interpolate(x + p, size=(4, 6), mode="bicubic"), (IMAGE,), IMAGE),
    "unfold fold": Kind(lambda x, p: F.fold(F.unfold(x * p, 3).tanh(), (5, 5), 3), (IMAGE,), IMAGE),
    "max_pool": Kind(lambda x, p: F.max_pool2d(x * p, 2), (IMAGE,), IMAGE),
    "avg_pool lp_pool": Kind(lambda x, p: F.avg_pool2d(x * p, 2) + F.lp_pool2d((x + p).abs(), 2.0, 2), (IMAGE,), IMAGE),
    "adaptive pools": Kind(
        lambda x, p: F.adaptive_avg_pool2d(x * p, 2) + F.adaptive_max_pool2d(x + p, 2), (IMAGE,), IMAGE
    ),
    "pixel_shuffle": Kind(lambda x, p: F.pixel_shuffle(x * p, 2), ((4, 2, 2),), (4, 2, 2)),
    "pad, all modes": Kind(
        lambda x, p: (
            sum(F.pad(x * p, (1, 2), mode=m) for m in ("reflect", "replicate", "circular"))
            + F.pad(x + p, (1, 2), value=0.5)
        ),
        ((2, 5),),
        (2, 5),
    ),
    "roll flip rot90": Kind(
        lambda x, p: (x * p).roll(1, 2) + (x + p).flip(1) + (x - p).rot90(1, (2, 3)), (IMAGE,), IMAGE
    ),
    "local response norm": Kind(lambda x, p: F.local_response_norm(x * p, 2), (IMAGE,), IMAGE),
    # tables and indices
    "embedding": Kind(lambda x, p: F.embedding(x, p), ((6, 3),), (4,), integers=6),
    "embedding, padding": Kind(lambda x, p: F.embedding(x, p * 2, padding_idx=0), ((6, 3),), (4,), integers=6),
    "embedding_bag": Kind(lambda x, p: F.embedding_bag(x, p, mode="mean"), ((6, 3),), (4,), integers=6),
    "embedding_bag, max": Kind(lambda x, p: F.embedding_bag(x, p, mode="max"), ((6, 3),), (4,), integers=6),
    "indexing": Kind(lambda x, p: p[x], ((6, 3),), (4,), integers=6),
    "one_hot": Kind(lambda x, p: F.one_hot(x, 6).to(p) @ p, ((6, 3),), (4,), integers=6),
    "index_select": Kind(lambda x, p: x[:, :3] * p.index_select(0, SOME)),
    "gather": Kind(lambda x, p: p.gather(0, x), ((6, 4),), (4,), integers=6),
    "take_along_dim": Kind(lambda x, p: torch.take_along_dim(p.expand(len(x), 6), x, dim=1), ((6,),), (4,), integers=6),
    "take": Kind(lambda x, p: torch.take(p, x), ((6,),), (4,), integers=6),
    "scatter": Kind(lambda x, p: x.scatter(1, SOME[:2].expand(len(x), 2), (x[:, :2] * p[:2]))),
    "scatter_add": Kind(lambda x, p: x.scatter_add(1, torch.zeros_like(x).long(), x * p)),
    "scatter_reduce": Kind(
        lambda x, p: x.scatter_reduce(1, torch.tensor([[0, 0, 1, 1]]).expand(len(x), 4), x * p, "amax")
    ),
    "scatter_reduce, mean": Kind(
        lambda x, p: x.scatter_reduce(1, torch.tensor([[0, 0, 1, 1]]).expand(len(x), 4), x * p, "mean")
    ),
    "index_add": Kind(lambda x, p: x.index_add(1, SOME, x[:, :3] * p[:3])),
    "index_put": Kind(lambda x, p: x.index_put((torch.arange(len(x)), SOME[:1].expand(len(x))), p[:1] * x[:, 0])),
    "index_copy index_fill": Kind(lambda x, p: (x * p).index_copy(1, SOME, x[:, :3]) + (x * p).index_fill(1, SOME, 0)),
    "where": Kind(lambda x, p: torch.where(x > 0, x * p, p)),
    "masked_fill": Kind(lambda x, p: (x * p).masked_fill(x < 0, 0.0)),
    "masked_scatter": Kind(lambda x, p: x.masked_scatter(torch.ones_like(x).bool(), x * p)),
    "boolean mask, put back": Kind(lambda x, p: torch.zeros_like(x).masked_scatter(x > 0, (x * p)[x > 0])),
    "slices written in place": Kind(lambda x, p: x.clone().index_fill_(1, SOME[:1], 0).mul_(p)),
    "repeat_interleave tile": Kind(lambda x, p: x.repeat_interleave(2, 1) * p.tile(2)),
    "tril diagonal": Kind(lambda x, p: (matrices(p, x).tril()).diagonal(dim1=1, dim2=2), MATRIX),
    "stack cat split": Kind(lambda x, p: torch.cat([a * b for a, b in zip(x.split(2, 1), p.split(2), strict=True)], 1)),
    # orders and reductions
    "sort": Kind(lambda x, p: (x * p).sort(1)[0] * torch.arange(4)),
    "topk": Kind(lambda x, p: (x * p).topk(2, 1)[0]),
    "median mode": Kind(lambda x, p: (x * p).median(1, keepdim=True)[0]),
    "quantile": Kind(lambda x, p: (x * p).quantile(0.3, 1, keepdim=True)),
    "kthvalue": Kind(lambda x, p: (x * p).kthvalue(2, 1, keepdim=True)[0]),
    "max amax": Kind(lambda x, p: (x * p).amax(1, keepdim=True) + (x + p).max(1, keepdim=True)[0]),
    "amin aminmax": Kind(lambda x, p: (x * p).amin(1, keepdim=True) + (x + p).aminmax(dim=1, keepdim=True)[1]),
    "prod": Kind(lambda x, p: (x * p).prod(1, keepdim=True)),
    "std var": Kind(lambda x, p: (x * p).std(1, keepdim=True) + (x + p).var(1, keepdim=True)),
    "norms": Kind(lambda x, p: (x * p).norm(dim=1, keepdim=True) + (x + p).norm(p=1, dim=1, keepdim=True)),
    "vector_norm": Kind(lambda x, p: torch.linalg.vector_norm(x * p, 3, 1, keepdim=True)),
    "matrix_norm": Kind(lambda x, p: torch.linalg.matrix_norm(matrices(p, x), "nuc").unsqueeze(1), MATRIX),
    "renorm": Kind(lambda x, p: x @ torch.renorm(p, 2, 0, 1.0), MATRIX),
    "logsumexp": Kind(lambda x, p: (x * p).logsumexp(1, keepdim=True)),
    "segment_reduce": Kind(segments),
    # linear algebra
    "inv": Kind(lambda x, p: torch.linalg.inv(matrices(p, x)), MATRIX, like=regular),
    "solve": Kind(lambda x, p: torch.linalg.solve(p, x.T).T, MATRIX, like=regular),
    "solve_triangular": Kind(
        lambda x, p: torch.linalg.solve_triangular(p.tril(), x.unsqueeze(2), upper=False).squeeze(2),
        MATRIX,
        like=regular,
    ),
    "lstsq": Kind(lambda x, p: torch.linalg.lstsq(p.expand(len(x), 4, 2), x.unsqueeze(2))[0], ((4, 2),)),
    "cholesky": Kind(lambda x, p: torch.linalg.cholesky(symmetric(p, x)), MATRIX, like=definite),
    "cholesky_solve": Kind(
        lambda x, p: torch.cholesky_solve(x.unsqueeze(2), torch.linalg.cholesky(p).expand(len(x), 4, 4)).squeeze(2),
        MATRIX,
        like=definite,
    ),
    "det": Kind(lambda x, p: torch.linalg.det(matrices(p, x)).unsqueeze(1), MATRIX, like=regular),
    "slogdet": Kind(lambda x, p: torch.linalg.slogdet(matrices(p, x))[1].unsqueeze(1), MATRIX, like=regular),
    "eigh": Kind(lambda x, p: torch.linalg.eigh(symmetric(p, x))[0], MATRIX),
    "eigvalsh": Kind(lambda x, p: torch.linalg.eigvalsh(symmetric(p, x)), MATRIX),
    "eigvals": Kind(lambda x, p: torch.linalg.eigvals(matrices(p, x)).abs().sort(1)[0], MATRIX),
    "svd": Kind(lambda x, p: torch.linalg.svd(matrices(p, x), full_matrices=False)[1], MATRIX),
    "pinv": Kind(lambda x, p: torch.linalg.pinv(matrices(p, x)), MATRIX, like=regular),
    "matrix_exp": Kind(lambda x, p: torch.linalg.matrix_exp(0.1 * matrices(p, x)), MATRIX),
    "matrix_power": Kind(lambda x, p: torch.linalg.matrix_power(matrices(p, x), 3), MATRIX),
    "qr": Kind(lambda x, p: torch.linalg.qr(matrices(p, x))[1].abs(), MATRIX, like=regular),
    "lu": Kind(lambda x, p: torch.linalg.lu(matrices(p, x))[2], MATRIX, like=regular),
    "householder": Kind(
        lambda x, p, q: x @ torch.linalg.householder_product(p.tril(-1) + torch.eye(4).to(p), q), ((4, 4), (4,))
    ),
    "multi_dot": Kind(lambda x, p, q: torch.linalg.multi_dot([x, p, q]), ((4, 3), (3, 4))),
    "vander trace": Kind(lambda x, p: torch.linalg.vander(x * p, N=3)),
    # normalisation, softmax, attention
    "softmax": Kind(lambda x, p: (x * p).softmax(1)),
    "log_softmax": Kind(lambda x, p: (x * p).log_softmax(1)),
    "softmin gumbel-free": Kind(lambda x, p: F.softmin(x + p, 1) * p),
    "layer_norm": Kind(lambda x, p, q: F.layer_norm(x, (4,), p, q), ((4,), (4,))),
    "layer_norm, two axes": Kind(lambda x, p: F.layer_norm(x, (3, 4), p), ((3, 4),), (3, 4)),
    "rms_norm": Kind(lambda x, p: F.rms_norm(x, (4,), p), inputs=(2, 4)),
    "group_norm": Kind(lambda x, p, q: F.group_norm(x, 2, p, q), ((4,), (4,)), (4, 3)),
    "instance_norm": Kind(lambda x, p, q: F.instance_norm(x, weight=p, bias=q), ((2,), (2,)), IMAGE),
    "batch_norm in eval mode": Kind(
        lambda x, p, q: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x), p, q), ((4,), (4,))
    ),
    "attention": Kind(attend, ((3, 4, 4),), (3, 4)),
    "attention, causal": Kind(lambda x, p: attend(x, p, is_causal=True), ((3, 4, 4),), (3, 4)),
    "attention, biased": Kind(
        lambda x, p, b: F.scaled_dot_product_attention(x, x @ p, x, attn_mask=b), ((4, 4), (3, 3)), (3, 4)
    ),
    "multi_head_attention_forward": Kind(heads, ((12, 4), (12,), (4, 4)), (3, 4)),
    # losses as outputs
    "kl_div": Kind(lambda x, p: F.kl_div((x * p).log_softmax(1), x.softmax(1), reduction="none")),
    "cross_entropy": Kind(
        lambda x, p: F.cross_entropy(x @ p, (x[:, 0] > 0).long(), reduction="none").unsqueeze(1), MATRIX
    ),
    "bce huber": Kind(
        lambda x, p: (
            F.binary_cross_entropy_with_logits(x * p, x.sigmoid(), reduction="none")
            + F.huber_loss(x * p, x, reduction="none")
        )
    ),
    "ctc_loss": Kind(ctc, ((4,),), (5, 4)),
    "triplet margin": Kind(
        lambda x, p: F.triplet_margin_loss(x, p.expand_as(x), x.flip(1), reduction="none").unsqueeze(1)
    ),
    # spectra and complex numbers
    "fft": Kind(lambda x, p: torch.fft.fft(x * p).abs()),
    "rfft irfft": Kind(lambda x, p: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(p), n=4)),
    "stft": Kind(lambda x, p: torch.stft(x, 4, 2, window=p, return_complex=True).abs(), ((4,),), (8,)),
    "complex rotation": Kind(lambda x, p: (torch.polar(torch.ones_like(p), p) * x).real),
    "view_as_complex": Kind(
        lambda x, p: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(p)), ((2, 2),), (2, 2)
    ),
    # functions of one's own, and control flow
    "autograd.Function, new style": Kind(lambda x, p: Square.apply(x * p)),
    "autograd.Function, old style": Kind(lambda x, p: OldSquare.apply(x * p)),
    "straight through": Kind(lambda x, p: ClippedGradient.apply(3 * x * p)),
    "checkpoint": Kind(lambda x, p: checkpoint(lambda z: (z * p).tanh(), x, use_reentrant=False)),
    "checkpoint, reentrant": Kind(lambda x, p: checkpoint(lambda z, w: (z * w).tanh(), x, p, use_reentrant=True)),
    "detach": Kind(lambda x, p: x * p * p.detach() + (x * p).detach()),
    "control flow": Kind(looped),
    "item": Kind(own_lengths, inputs=(3, 4)),
    "both directions": Kind(bidirectional),
    "gradient in the forward pass": Kind(nested, MATRIX),
    "numpy constants": Kind(lambda x, p: x * p * torch.from_numpy(torch.arange(4.0).numpy()).to(x)),
}


class Recurrent(nn.Module):
    """A recurrent module of torch, whose weights belong to no layer."""

    def __init__(self, kind: type[nn.Module], **options: Any):
        super().__init__()
        self.net = kind(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


class Packed(Recurrent):
    """The same on packed sequences."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = 2 + (x[:, 0, 0] > 0).long()
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.net(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Cell(nn.Module):
    """A cell that is stepped by hand."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell = kind(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    """Packed attention weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x, x, average_attn_weights=False)[0]


class Branch(nn.Module):
    """Another way through the model for some examples, and a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row @ (self.a if row.sum() > 0 else self.b.tanh()) for row in x]) * self.scale


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "RNN": (lambda: Recurrent(nn.RNN), (3, 3)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (3, 3)),
    "GRU, both ways": (lambda: Recurrent(nn.GRU, bidirectional=True), (3, 3)),
    "LSTM, two layers, projected": (lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=2), (3, 3)),
    "GRU, packed": (lambda: Packed(nn.GRU), (3, 3)),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), (3, 3)),
    "GRUCell": (lambda: Cell(nn.GRUCell), (3, 3)),
    "MultiheadAttention": (Attention, (3, 4)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (3, 4)),
    "TransformerDecoderLayer": (lambda: Decoder(), (3, 4)),
    "branches": (Branch, (4,)),
    "Bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), (4,)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), (4,)),
    "PReLU of sequences": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.PReLU(3)), (2, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), IMAGE),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 4)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(2, affine=True), IMAGE),
    "InstanceNorm with statistics": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGE),
    "EmbeddingBag": (lambda: Tokens(nn.EmbeddingBag(6, 3, mode="sum")), (4,)),
    "AdaptiveLogSoftmax": (lambda: Adaptive(), (6,)),
}


class Twice(nn.Module):
    """A module of two arguments."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.flip(1).tanh())


class Decoder(nn.Module):
    """A decoder that looks at its own inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.flip(1))


class Tokens(nn.Module):
    """A module of tokens, which are made of numbers."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.abs() * 3).long().clamp(max=5))


class Adaptive(nn.Module):
    """A softmax whose rare classes share an output."""

    def __init__(self):
        super().__init__()
        self.net = nn.AdaptiveLogSoftmaxWithLoss(6, 8, cutoffs=[3, 5], div_value=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.log_prob(x)


class Summed(Task):
    """A loss of any outputs."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return outputs.flatten(1).square().sum(1)


# Refused, and what is said.
REFUSED = {"checkpoint, reentrant": "backward pass .* use_reentrant=False"}  # torch takes it in .backward() alone


def model_and_inputs(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model of an operation, and N examples."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    if name in KINDS:
        kind = KINDS[name]
        model, shape = Loose(kind), kind.inputs
        if kind.integers:
            return model.to(dtype), torch.randint(kind.integers, (N, *shape), generator=generator)
    else:
        make, shape = MODULES[name]
        model = make()
        with torch.no_grad():
            for p in model.parameters():  # also those that begin at 0 or 1
                p.add_(0.3 * torch.randn(p.shape))
    x = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
    return model.to(dtype).eval(), x.to(dtype)


def loop(model: nn.Module, x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """Rows (N, R, ...) by plain autograd, one example and one cotangent at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(N):
        outputs = model(x[i : i + 1])
        for own in cotangents[:, i : i + 1]:
            grads = torch.autograd.grad(
                (outputs * own).sum(),
                list(model.parameters()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for name, grad in zip(rows, grads, strict=True):
                rows[name].append(grad)
    return {name: torch.stack(found).unflatten(0, (N, -1)) for name, found in rows.items()}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's rows."""
    return max(float((found[p] - t).norm() / t.norm().clamp(min=1e-30)) for p, t in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*KINDS, *MODULES])
def test_rows_are_those_of_autograd(name, dtype):
    model, x = model_and_inputs(name, dtype)
    if name in REFUSED:
        with pytest.raises(AttributionError, match=REFUSED[name]):
            lib = Problem(model, Summed(), (x,), progress=False)
            lib.loss_gradients(lib.batch(range(N)))
        return
    lib = Problem(model, Summed(), (x,), progress=False)
    outputs = model(x).detach()
    for R in (1, 3):
        generator = torch.Generator().manual_seed(R)
        cotangents = torch.randn(R, *outputs.shape, generator=generator, dtype=torch.float64).to(dtype)
        found = lib.gradients((x,), lambda *_, c=cotangents: c).dense().to_parameters()
        rows = {p: t.unflatten(0, (N, R)) for p, t in found.items()}
        assert difference(rows, loop(model, x, cotangents)) < TOLERANCE[dtype], R
    found = {p: t.unsqueeze(1) for p, t in lib.loss_gradients((x,)).dense().to_parameters().items()}
    assert difference(found, loop(model, x, 2 * outputs.unsqueeze(0))) < TOLERANCE[dtype]
    assert lib.row_error < TOLERANCE[dtype]


def test_there_are_more_than_seventy_kinds():
    assert len(KINDS) >= 70
