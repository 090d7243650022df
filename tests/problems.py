"""Tiny float64 problems with dense answers: the reference that the tests compare the library with.

Nothing here uses the library's own algebra. Losses are written out again below; derivatives are loops of plain
``torch.autograd`` over a private copy of the model, one example at a time. Only the `Task` objects are the library's,
for the tests to pass on. Everything is over the trainable parameters in the order of ``named_parameters()``, flattened
to D numbers.

    p = problem("mlp")
    p.model, p.task, p.train, p.queries                     # what the library is given; the model is a fresh copy
    p.exact_scores(p.ggn(), damping=0.1)                    # what it should answer: (Q, N)
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization

from wherefrom.model.task import Classification, Regression

Data = tuple[Tensor, ...]
IGNORE = -100
PAD = 0


# --- losses and measurements, written independently of wherefrom.model.task: (B, ..., C) -> (B,) ---


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled positions of logsumexp(z) - z_y."""
    return _sum_labelled(lambda z, y: z.logsumexp(0) - z[y], outputs, labels)


def negative_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled positions of logsumexp(the other logits) - z_y."""
    return _sum_labelled(lambda z, y: torch.cat([z[:y], z[y + 1 :]]).logsumexp(0) - z[y], outputs, labels)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over outputs of (h - y)^2."""
    return torch.stack([((h.reshape(-1) - y.reshape(-1)) ** 2).sum() for h, y in zip(outputs, targets, strict=True)])


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over outputs of |h - y|."""
    return torch.stack([(h.reshape(-1) - y.reshape(-1)).abs().sum() for h, y in zip(outputs, targets, strict=True)])


def _sum_labelled(function: Callable[[Tensor, int], Tensor], outputs: Tensor, labels: Tensor) -> Tensor:
    """function(logits, label) summed over those of each example's positions that have a label: (B,)."""
    totals = []
    for example, marks in zip(outputs, labels, strict=True):
        total = 0 * example.sum()
        for z, y in zip(example.reshape(-1, example.shape[-1]), marks.reshape(-1).tolist(), strict=True):
            if y != IGNORE:
                total = total + function(z, y)
        totals.append(total)
    return torch.stack(totals)


# --- a problem and its dense answers ---


@dataclass
class TinyProblem:
    """A trained model, its task and data, and dense reference answers (float64, computed once, shared by copies)."""

    name: str
    model: nn.Module  # what the library is given
    task: Classification | Regression
    train: Data  # N examples
    queries: Data  # Q examples
    reference: nn.Module = field(repr=False)  # a private copy that the library never sees
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the trainable parameters, by name, in order."""
        return {name: p.shape for name, p in self.reference.named_parameters() if p.requires_grad}

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in the flat D."""
        ends = torch.tensor([0, *(s.numel() for s in self.shapes.values())]).cumsum(0).tolist()
        return {name: slice(a, b) for name, a, b in zip(self.shapes, ends, ends[1:], strict=False)}

    @property
    def dim(self) -> int:
        """D, the number of trainable parameters."""
        return sum(s.numel() for s in self.shapes.values())

    @property
    def n(self) -> int:
        """N, the number of training examples."""
        return len(self.train[0])

    def batches(self, size: int, data: Data | None = None) -> list[Data]:
        """The data cut into batches of ``size``; the last one may be smaller."""
        data = self.train if data is None else data
        return list(zip(*(t.split(size) for t in data), strict=True))

    def flatten(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Name -> (Q, *shape) to (Q, D), whatever the order of the mapping."""
        return torch.cat([vectors[name].reshape(-1, shape.numel()) for name, shape in self.shapes.items()], dim=1)

    def unflatten(self, matrix: Tensor) -> dict[str, Tensor]:
        """(Q, D) to name -> (Q, *shape)."""
        return {name: matrix[:, s].reshape(-1, *self.shapes[name]) for name, s in self.slices.items()}

    def loss(self, outputs: Tensor, data: Data) -> Tensor:
        """Reference training loss per example: (B,)."""
        return (cross_entropy if isinstance(self.task, Classification) else squared_error)(outputs, data[1])

    def measurement(self, outputs: Tensor, data: Data) -> Tensor:
        """Reference measurement per query: (B,)."""
        return (negative_margin if isinstance(self.task, Classification) else absolute_error)(outputs, data[1])

    def outputs(self, data: Data | None = None) -> Tensor:
        """Model outputs, one example at a time, no gradient: (N, ..., C)."""
        with torch.no_grad():
            return torch.cat([self.reference(x[0]) for x in self.batches(1, data)])

    def jacobian(self) -> Tensor:
        """d outputs / d parameters of the training examples, outputs flattened: (N, K, D)."""

        def one(data: Data) -> Tensor:
            return torch.stack([self._gradient(h) for h in self.reference(data[0]).reshape(-1)])

        return self._cached("jacobian", lambda: torch.stack([one(z) for z in self.batches(1)]))

    def output_hessians(self) -> Tensor:
        """d^2 loss / d outputs^2 of the training examples, outputs flattened: (N, K, K)."""

        def one(h: Tensor, data: Data) -> Tensor:
            hessian = torch.autograd.functional.hessian(lambda t: self.loss(t.reshape(h.shape), data)[0], h.reshape(-1))
            return hessian if isinstance(hessian, Tensor) else hessian[0]

        singles = zip(self.outputs().split(1), self.batches(1), strict=True)
        return self._cached("output_hessians", lambda: torch.stack([one(h, z) for h, z in singles]))

    def loss_gradients(self, data: Data | None = None) -> Tensor:
        """Gradients of the loss, of the training examples unless others are given: (N, D)."""
        if data is None:
            return self._cached("loss_gradients", lambda: self.loss_gradients(self.train))
        return self._gradients(self.loss, data)

    def measurement_gradients(self, queries: Data | None = None) -> Tensor:
        """Gradients of the measurement, of the problem's queries unless others are given: (Q, D)."""
        if queries is None:
            return self._cached("measurement_gradients", lambda: self.measurement_gradients(self.queries))
        return self._gradients(self.measurement, queries)

    def ggn(self) -> Tensor:
        """Gauss-Newton matrix, mean over examples of J^T H_out J: (D, D)."""

        def dense() -> Tensor:
            total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
            for jacobian, hessian in zip(self.jacobian(), self.output_hessians(), strict=True):
                total += jacobian.T @ hessian @ jacobian
            return total / self.n

        return self._cached("ggn", dense)

    def hessian(self) -> Tensor:
        """Hessian of the mean training loss: (D, D)."""

        def dense() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivatives
                loss = self.loss(self.reference(self.train[0]), self.train).mean()
                gradient = self._gradient(loss, create_graph=True)
                return torch.stack([self._gradient(g) for g in gradient])

        return self._cached("hessian", dense)

    def empirical_fisher(self) -> Tensor:
        """Mean over examples of g g^T with the true labels: (D, D)."""
        return self._cached("empirical_fisher", lambda: self.loss_gradients().T @ self.loss_gradients() / self.n)

    def exact_scores(self, curvature: Tensor, damping: float) -> Tensor:
        """q^T (C + damping I)^-1 g, positive where the example helped: (Q, N)."""
        matrix = curvature + damping * torch.eye(self.dim, dtype=torch.float64)
        return self.measurement_gradients() @ torch.linalg.solve(matrix, self.loss_gradients().T)

    def _gradients(self, function: Callable[[Tensor, Data], Tensor], data: Data) -> Tensor:
        """Gradients of a function of the outputs, one example at a time: (B, D)."""
        return torch.stack([self._gradient(function(self.reference(z[0]), z)[0]) for z in self.batches(1, data)])

    def _gradient(self, scalar: Tensor, create_graph: bool = False) -> Tensor:
        """d scalar / d parameters: (D,)."""
        params = [p for p in self.reference.parameters() if p.requires_grad]
        if not scalar.requires_grad:
            return torch.zeros(self.dim, dtype=torch.float64)
        grads = torch.autograd.grad(
            scalar, params, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.reshape(-1) for g in grads])

    def _cached(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self.cache:
            self.cache[key] = compute().detach()
        return self.cache[key].clone()


# --- modules ---


class Reused(nn.Module):
    """One convolution and one linear layer, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.enter = nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv(self.conv(x).tanh()).tanh(), 2)  # (B, 2, 2, 2)
        x = self.enter(x.flatten(1)).tanh()
        return self.head(self.twice(F.gelu(self.twice(x))))


class Tied(nn.Module):
    """An embedding that is also the output head; positions see the mean of the past."""

    def __init__(self, vocabulary: int = 7, d: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d, padding_idx=PAD)
        self.mix = nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, T, d)
        real = (tokens != PAD).unsqueeze(-1).to(x)
        mean = (x * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return self.head(x + F.gelu(self.mix(mean)))  # (B, T, vocabulary)


class Transformer(nn.Module):
    """Causal attention (one head) and an MLP over padded tokens; padding is found from the tokens, on either side."""

    def __init__(self, vocabulary: int = 6, d: int = 4, fused: bool = True, positions: int = 0) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Embedding(vocabulary, d)
        self.position = nn.Embedding(positions, d) if positions else None
        self.qkv = nn.Linear(d, 3 * d)
        self.project = nn.Linear(d, d)
        self.up = nn.Linear(d, 2 * d)
        self.down = nn.Linear(2 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1])
        causal = steps[:, None] >= steps  # (T, T)
        allowed = causal & ((tokens != PAD).unsqueeze(1) | (steps[:, None] == steps))  # (B, T, T)
        x = self.embed(tokens)  # (B, T, d)
        if self.position is not None:
            x = x + self.position(steps)  # (T, d): no batch dimension, as in GPT-2
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        else:
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf).softmax(-1)
            mixed = weights @ v
        x = x + self.project(mixed)
        return self.head(x + self.down(F.gelu(self.up(x))))  # (B, T, vocabulary)


class Odd(nn.Module):
    """Parameters of no ordinary layer: an offset, a scale, a bilinear form, and packed attention weights."""

    def __init__(self, steps: int = 3, d: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.offset = nn.Parameter(0.3 * torch.randn(steps, d))
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(d))
        self.form = nn.Parameter(0.3 * torch.randn(classes, d, d))
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.linear = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x + self.offset).tanh()  # (B, T, d)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = (x * self.scale).mean(1)  # (B, d)
        return torch.einsum("bi,cij,bj->bc", x, self.form, x)


class InheritedLinear(nn.Linear):
    """A subclass that computes what its parent does."""


class ScaledLinear(nn.Linear):
    """A subclass that does not: its weight is scaled on the way."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 0.7 * self.weight, self.bias)


class Normalised(nn.Module):
    """A parametrisation with a parameter of its own: rows of unit length times a gain (weight normalisation).

    Not ``weight_norm``, whose fused kernel has a wrong second derivative (torch 2.13).
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(rows))

    def forward(self, direction: Tensor) -> Tensor:
        return direction * (self.gain / direction.norm(dim=1)).unsqueeze(1)


class InPlace(nn.Module):
    """Activations and residual sums that overwrite their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.enter(x))
        y = self.middle(x)
        y += x
        y = self.relu(y.mul_(0.8))
        return self.head(y).add_(0.1)


class Tokens(nn.Module):
    """Per-token layers on tokens laid out other than (B, T, d): flattened to (B*T, d), or time first (T, B, d)."""

    def __init__(self, layout: str, d: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.layout = layout
        self.first, self.second, self.head = nn.Linear(d, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        if self.layout == "flat":
            x = self.second(F.gelu(self.first(x.reshape(b * t, d)))).tanh().reshape(b, t, -1)
        else:
            x = self.second(F.gelu(self.first(x.transpose(0, 1)))).tanh().transpose(0, 1)
        return self.head(x[:, 0] * x.mean(1))


# --- the problems ---

_Recipe = Callable[[torch.Generator], tuple[nn.Module, Classification | Regression, Data, Data]]
_recipes: dict[str, _Recipe] = {}
_built: dict[str, TinyProblem] = {}


def _recipe(function: _Recipe) -> _Recipe:
    _recipes[function.__name__] = function
    return function


def _classes(rng: torch.Generator, shape: tuple[int, ...], classes: int, n: int = 11, q: int = 3) -> tuple[Data, Data]:
    """Gaussian inputs, labels that follow them loosely: train (N, *shape), (N,) and queries (Q, *shape), (Q,)."""
    x = torch.randn(n + q, *shape, generator=rng, dtype=torch.float64)
    teacher = torch.randn(math.prod(shape), classes, generator=rng, dtype=torch.float64)
    noise = torch.randn(n + q, classes, generator=rng, dtype=torch.float64)
    y = (x.flatten(1) @ teacher / math.sqrt(len(teacher)) + noise).argmax(1)
    return (x[:n], y[:n]), (x[n:], y[n:])


def _targets(rng: torch.Generator, shape: tuple[int, ...], outputs: tuple[int, ...], n: int = 11, q: int = 3):
    """Gaussian inputs and noisy linear targets: train (N, *shape), (N, *outputs) and queries likewise."""
    x = torch.randn(n + q, *shape, generator=rng, dtype=torch.float64)
    teacher = torch.randn(math.prod(shape), math.prod(outputs), generator=rng, dtype=torch.float64)
    y = x.flatten(1) @ teacher / math.sqrt(len(teacher))
    y = (y + 0.5 * torch.randn(y.shape, generator=rng, dtype=torch.float64)).reshape(n + q, *outputs)
    return (x[:n], y[:n]), (x[n:], y[n:])


def _text(rng: torch.Generator, vocabulary: int, steps: int, prompt: int, n: int = 9, q: int = 3, left: bool = False):
    """Padded token sequences and next-token labels; positions inside the prompt and at padding have label -100.

    The second training example has no label at all, the third is not padded. With ``left`` every other one is padded on
    the left.
    """
    tokens = torch.randint(PAD + 1, vocabulary, (n + q, steps + 1), generator=rng)
    lengths = torch.randint(prompt + 1, steps + 1, (n + q,), generator=rng)
    lengths[2] = steps
    x, y = torch.full((n + q, steps), PAD), torch.full((n + q, steps), IGNORE)
    for i, length in enumerate(lengths.tolist()):
        start = steps - length if left and i % 2 else 0
        x[i, start : start + length] = tokens[i, :length]
        y[i, start + prompt : start + length] = tokens[i, prompt + 1 : length + 1]
    y[1] = IGNORE
    return (x[:n], y[:n]), (x[n:], y[n:])


@_recipe
def mlp(rng):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    return model, Classification(), *_classes(rng, (5,), 4)


@_recipe
def mlp_no_bias(rng):
    layers = nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)
    return nn.Sequential(*layers), Classification(), *_classes(rng, (6,), 3, n=13)


@_recipe
def mlp_regression(rng):
    """Three outputs, targets (N, 3)."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    return model, Regression(), *_targets(rng, (5,), (3,))


@_recipe
def mlp_regression_scalar(rng):
    """One output (N, 1), targets (N,)."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, Regression(), *_targets(rng, (4,), ())


@_recipe
def linear_regression(rng):
    return nn.Linear(6, 3), Regression(), *_targets(rng, (6,), (3,), n=13)


@_recipe
def logistic(rng):
    return nn.Linear(6, 4), Classification(), *_classes(rng, (6,), 4, n=13, q=4)


@_recipe
def cnn_groups(rng):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # 9 x 7 -> 5 x 4
        nn.Tanh(),
        nn.Conv2d(4, 4, (3, 2), padding=(1, 1), padding_mode="circular", groups=2),  # -> 5 x 5
        nn.GELU(),
        nn.Conv2d(4, 8, 2, padding=1, padding_mode="reflect", groups=4, bias=False),  # depthwise, two each -> 6 x 6
        nn.Tanh(),
        nn.Conv2d(8, 2, (2, 3), padding="same", dilation=(1, 2), padding_mode="replicate", groups=2),  # -> 6 x 6
        nn.Tanh(),
        nn.Conv2d(2, 3, 2, padding="same"),  # an even kernel: one more row and column after than before
        nn.Tanh(),
        nn.Conv2d(3, 3, 3, stride=(1, 2), padding=(0, 2), dilation=2, groups=3),  # -> 2 x 3
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    return model, Classification(), *_classes(rng, (2, 9, 7), 3, n=8, q=2)


@_recipe
def conv1d(rng):
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, stride=2, padding=1),  # 8 -> 4
        nn.Tanh(),
        nn.Conv1d(4, 6, 3, padding="same", dilation=2, groups=2, padding_mode="circular"),
        nn.GELU(),
        nn.Conv1d(6, 6, 2, padding=1, groups=6, bias=False),  # depthwise -> 5
        nn.Flatten(),
        nn.Linear(30, 3),
    )
    return model, Regression(), *_targets(rng, (3, 8), (3,), n=8, q=2)


@_recipe
def reused_layer(rng):
    return Reused(), Classification(), *_classes(rng, (2, 4, 4), 3, n=10)


@_recipe
def tied_embedding(rng):
    return Tied(), Classification(), *_text(rng, 7, 6, prompt=0)


@_recipe
def masked_sequence(rng):
    """Fused attention, right padding; the first two real tokens (a prompt) have no label but matter to the rest."""
    return Transformer(), Classification(), *_text(rng, 6, 5, prompt=2)


@_recipe
def masked_sequence_left(rng):
    """Attention written as matrix products, padding on both sides, a prompt of one token."""
    return Transformer(fused=False), Classification(), *_text(rng, 6, 5, prompt=1, left=True)


@_recipe
def positions(rng):
    """An embedding of positions that is called without a batch dimension."""
    return Transformer(vocabulary=5, positions=4), Classification(), *_text(rng, 5, 4, prompt=0, n=7)


@_recipe
def norms(rng):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),  # 4 x 4 -> 2 x 2
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([2, 2]),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.BatchNorm1d(6),
        nn.Linear(6, 5, bias=False),
        nn.RMSNorm(5, eps=1e-6),
        nn.GELU(),
        nn.LayerNorm(5, bias=False),
        nn.Linear(5, 3),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = 0.3 * torch.randn(module.num_features, generator=rng)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=rng)
    return model, Classification(), *_classes(rng, (2, 4, 4), 3, n=10)


@_recipe
def odd_parameters(rng):
    return Odd(), Classification(), *_classes(rng, (3, 4), 3, n=10)


@_recipe
def subclassed(rng):
    model = nn.Sequential(InheritedLinear(5, 8), nn.Tanh(), ScaledLinear(8, 6), nn.GELU(), nn.Linear(6, 3))
    return model, Classification(), *_classes(rng, (5,), 3)


@_recipe
def parametrized(rng):
    """A linear layer whose weight is computed from other parameters."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    register_parametrization(model[0], "weight", Normalised(8))
    return model, Classification(), *_classes(rng, (5,), 3)


@_recipe
def frozen(rng):
    """A frozen layer, a layer of which only the bias is trained, one of which only the weight is, and a whole one."""
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3)
    for parameter in (layers[0].weight, layers[0].bias, layers[2].weight, layers[4].bias):
        parameter.requires_grad_(False)
    return nn.Sequential(*layers), Regression(), *_targets(rng, (5,), (3,))


@_recipe
def inplace(rng):
    return InPlace(), Classification(), *_classes(rng, (5,), 3)


@_recipe
def flattened_tokens(rng):
    return Tokens("flat"), Classification(), *_classes(rng, (3, 4), 3, n=10)


@_recipe
def time_first(rng):
    """Layers that see (T, B, d), with T = 4: a batch of four must not be mistaken for it."""
    return Tokens("time"), Regression(), *_targets(rng, (4, 4), (3,), n=11)


NAMES = tuple(_recipes)


def problem(name: str) -> TinyProblem:
    """The named problem with a model of its own; dense answers are shared between calls."""
    if name not in _built:
        _built[name] = _build(name)
    made = _built[name]
    data = [tuple(t.clone() for t in d) for d in (made.train, made.queries)]
    return TinyProblem(name, copy.deepcopy(made.model), copy.copy(made.task), *data, made.reference, made.cache)


def problems() -> list[TinyProblem]:
    """Every problem, in the order of `NAMES`."""
    return [problem(name) for name in NAMES]


def _build(name: str, steps: int = 40) -> TinyProblem:
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, task, train, queries = _recipes[name](torch.Generator().manual_seed(seed + 1))
        model = model.double().eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.mul_(0.7)
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and scales away from 0 and 1
                    parameter.add_(0.2 * torch.randn_like(parameter))
    made = TinyProblem(name, model, task, train, queries, copy.deepcopy(model))
    _fit(made, steps)
    made.model.load_state_dict(made.reference.state_dict())
    return made


def _fit(made: TinyProblem, steps: int, lr: float = 0.02) -> None:
    """A few steps of Adam on the reference copy, until a third of the loss is left: trained, far from interpolating."""
    parameters: list[Any] = [p for p in made.reference.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    first = None
    for _ in range(steps):
        loss = made.loss(made.reference(made.train[0]), made.train).mean()
        first = first or loss.item()
        if loss.item() < first / 3:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
