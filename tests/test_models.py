"""Models as they come: 0-dim parameters, missing derivatives, wrappers, threads; all come back as they were."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import whence
from whence.errors import UnsupportedError
from whence.models import copied

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TASK = whence.Classification()
Build = Callable[[], nn.Module]
Batch = tuple[Tensor, Tensor]


def seeded(build: Build, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return build().to(dtype).eval()


def data(n: int = 12, width: int = 4, classes: int = 3, dtype: torch.dtype = torch.float64) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=rng, dtype=torch.float64).to(dtype), torch.arange(n) % classes


def few(batch: Batch, count: int = 2) -> Batch:
    return batch[0][:count], batch[1][:count]


def dense_scores(model: nn.Module, train: Batch, queries: Batch, damping: float, hessian: bool = False) -> Tensor:
    """q^T (C + damping)^-1 g of a classifier, C the Gauss-Newton matrix or the Hessian, by plain autograd."""
    ps = [p for p in model.parameters() if p.requires_grad]

    def gradient(value: Tensor, **options: bool) -> Tensor:
        found = torch.autograd.grad(value, ps, retain_graph=True, allow_unused=True, materialize_grads=True, **options)
        return torch.cat([t.flatten() for t in found])

    def single(batch: Batch, i: int) -> Batch:
        return batch[0][i : i + 1], batch[1][i : i + 1]

    examples = [single(train, i) for i in range(len(train[0]))]
    asked = [single(queries, i) for i in range(len(queries[0]))]
    g = torch.stack([gradient(F.cross_entropy(model(z[0]), z[1])) for z in examples])
    q = torch.stack([gradient(TASK.measurement(model(z[0]), z).sum()) for z in asked])
    if hessian:
        slope = gradient(F.cross_entropy(model(train[0]), train[1]), create_graph=True)
        C = torch.stack([gradient(t) for t in slope])
    else:
        C = torch.zeros(g.shape[1], g.shape[1], dtype=torch.float64)
        for x, _ in examples:
            h = model(x)[0]
            p, J = h.softmax(0).detach(), torch.stack([gradient(t) for t in h])
            C += J.T @ (p.diag() - p.outer(p)) @ J / len(examples)
    return q @ torch.linalg.solve(C + damping * torch.eye(len(C), dtype=torch.float64), g.T)


# --- 0-dim parameters ---------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A loose scale, as CLIP's logit_scale."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.full(shape, 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.logit_scale.exp()


class Gain(nn.Module):
    """A scale and a shift in a leaf module."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full(shape, 1.3))
        self.bias = nn.Parameter(torch.full(shape, 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.g * x + self.bias


class ReZero(nn.Module):
    """A residual branch with a scale that begins at 0."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.alpha = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.alpha * self.inner(x).tanh())


class OnlyScalars(nn.Module):
    """No parameter has an axis."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.full(shape, 0.7)), nn.Parameter(torch.full(shape, -0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.slope * x[:, 0], self.shift + x[:, 1], x[:, 2]], 1)


def gained(shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), Gain(shape), nn.Tanh(), nn.Linear(5, 3))


SCALARS = [Scaled, gained, ReZero, OnlyScalars]
SOLVERS = [
    whence.Exact(),
    whence.Dual(),
    whence.CG(),
    whence.CG(preconditioner=whence.EKFAC()),
    whence.EKFAC(),
    whence.KFAC(),
    whence.Identity(),
    whence.Nystrom(rank=6),
    whence.Arnoldi(rank=4, steps=6),
    whence.DataInf(),
    whence.HyperINF(),
    whence.Neumann(steps=20),
    whence.RandProj(rank=4),
    whence.RandSelect(rank=2),
    "auto",
]


@pytest.mark.parametrize("make", SCALARS)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_scalar_parameter_scores_as_a_vector_of_one(make: Callable[..., nn.Module], solver: Any) -> None:
    found = []
    for shape in ((), (1,)):
        model = seeded(lambda shape=shape: make(shape))
        curvature = whence.EmpiricalFisher if isinstance(solver, (whence.DataInf, whence.HyperINF)) else whence.GGN
        scores = whence.attribute(model, TASK, data(), few(data()), solver=solver, damping=0.1, curvature=curvature)
        found.append(scores.values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", SCALARS)
@pytest.mark.parametrize("hessian", [False, True])
def test_a_scalar_parameter_scores_as_plain_autograd(make: Callable[..., nn.Module], hessian: bool) -> None:
    model = seeded(lambda: make(()))
    curvature = whence.Hessian if hessian else whence.GGN
    found = whence.attribute(model, TASK, data(), few(data()), solver=whence.Exact(), damping=2.0, curvature=curvature)
    wanted = dense_scores(model, data(), few(data()), 2.0, hessian)
    torch.testing.assert_close(found.values, wanted, rtol=1e-9, atol=1e-12)


# --- operations without derivatives -------------------------------------------------------------------------------


def written_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    inner = 0.7978845608028654 * (x + 0.044715 * x**3)
    t = inner.tanh()
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)


class OldGelu(torch.autograd.Function):
    """Of the old style, as Bloom's: one forward with the context, no setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return written_gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * gelu_slope(ctx.saved_tensors[0])


class OnceGelu(OldGelu):
    """Its backward refuses to be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * gelu_slope(ctx.saved_tensors[0])


class ForeignGelu(OldGelu):
    """Its backward is a kernel that autograd does not see."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope = gelu_slope(ctx.saved_tensors[0].detach())
        return torch.from_numpy(g.detach().numpy() * slope.numpy())


class ForeignSlope(OldGelu):
    """Its backward is linear in what autograd sees, but its slope is a constant to autograd."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * gelu_slope(ctx.saved_tensors[0].detach()).detach()


class Act(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(x)  # a way around it, so that a lost part is no error


def with_gelu(function: Callable[[Tensor], Tensor], classes: int = 3) -> Build:
    return lambda: nn.Sequential(nn.Linear(4, 5), Act(function), nn.Linear(5, classes, bias=False))


def weight_normed(classes: int = 3, dim: int | None = 0, old: bool = False) -> Build:
    def build() -> nn.Module:
        normed = nn.utils.weight_norm if old else parametrizations.weight_norm
        return nn.Sequential(normed(nn.Linear(4, 5), dim=dim), nn.Tanh(), nn.Linear(5, classes))

    return build


class Sparse(nn.Module):
    """Token numbers are made from the inputs."""

    def __init__(self, classes: int = 3, sparse: bool = True, functional: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, classes)
        self.sparse, self.functional = sparse, functional

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 3).long().clamp(max=5)
        e = F.embedding(ids, self.embed.weight * 1.0, sparse=self.sparse) if self.functional else self.embed(ids)
        return self.head(e.tanh().sum(1))


GAPS = {  # name: the model for a number of classes, and the same one written out
    "old function": (lambda k: with_gelu(OldGelu.apply, k), lambda k: with_gelu(written_gelu, k)),
    "once differentiable": (lambda k: with_gelu(OnceGelu.apply, k), lambda k: with_gelu(written_gelu, k)),
    "foreign backward": (lambda k: with_gelu(ForeignGelu.apply, k), lambda k: with_gelu(written_gelu, k)),
    "foreign slope": (lambda k: with_gelu(ForeignSlope.apply, k), lambda k: with_gelu(written_gelu, k)),
    "weight norm": (lambda k: weight_normed(k), None),
    "weight norm by column": (lambda k: weight_normed(k, 1), None),
    "weight norm of all": (lambda k: weight_normed(k, None), None),
    "old weight norm": (lambda k: weight_normed(k, 0, True), None),
    "sparse embedding": (lambda k: lambda: Sparse(k), lambda k: lambda: Sparse(k, False)),
    "sparse function": (lambda k: lambda: Sparse(k, functional=True), lambda k: lambda: Sparse(k, False, True)),
}
APPROXIMATE = {"once differentiable", "foreign backward"}  # J v has no exact form
NO_SECOND = APPROXIMATE | {"foreign slope"}


class WrittenNorm(nn.Module):
    """Weight normalisation in elementary operations, with the values of a model of `weight_normed`."""

    def __init__(self, model: nn.Module, dim: int | None) -> None:
        super().__init__()
        named = {name.split(".")[-1]: p for name, p in model[0].named_parameters()}  # pyright: ignore
        self.g = nn.Parameter(named.get("original0", named.get("weight_g")).detach().clone())
        self.v = nn.Parameter(named.get("original1", named.get("weight_v")).detach().clone())
        self.bias, self.head, self.dim = nn.Parameter(named["bias"].detach().clone()), model[2], dim

    def forward(self, x: Tensor) -> Tensor:
        size = self.v.norm() if self.dim is None else self.v.norm(dim=1 - self.dim, keepdim=True)
        return self.head((x @ (self.g * self.v / size).T + self.bias).tanh())


def with_gap(name: str, classes: int) -> tuple[nn.Module, nn.Module]:
    """The model, and the same one written out."""
    build, written = GAPS[name]
    model = seeded(build(classes))
    if written is not None:
        return model, seeded(written(classes))
    dim = {"weight norm by column": 1, "weight norm of all": None}.get(name, 0)
    return model, WrittenNorm(copied(model), dim)


@pytest.mark.parametrize("classes", [3, 140])
@pytest.mark.parametrize("product", ["auto", "jvp", "rows", "finite-difference"])
@pytest.mark.parametrize("name", GAPS)
def test_gauss_newton_products_need_no_forward_mode(name: str, product: Any, classes: int) -> None:
    train = data(6, classes=classes)
    model, written = with_gap(name, classes)
    curvature = functools.partial(whence.GGN, product=product)
    solver = whence.CG(tolerance=1e-10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = whence.attribute(model, TASK, train, few(train), solver=solver, damping=0.5, curvature=curvature)
    differs = name in APPROXIMATE and product in ("auto", "jvp") and (product, classes) != ("auto", 3)
    assert differs == any("central differences" in str(w.message) for w in caught)
    rough = differs or product == "finite-difference"
    wanted = dense_scores(written, train, few(train), 0.5)
    torch.testing.assert_close(found.values, wanted, rtol=1e-5 if rough else 1e-8, atol=1e-8 if rough else 1e-10)


@pytest.mark.parametrize("name", GAPS)
def test_hessian_products_need_no_forward_mode(name: str) -> None:
    train = data(6)
    model, written = with_gap(name, 3)
    solver = whence.CG(tolerance=1e-9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = whence.attribute(model, TASK, train, few(train), solver=solver, damping=3.0, curvature=whence.Hessian)
    assert (name in NO_SECOND) == any("central differences" in str(w.message) for w in caught)
    wanted = dense_scores(written, train, few(train), 3.0, hessian=True)
    rough = name in NO_SECOND
    torch.testing.assert_close(found.values, wanted, rtol=1e-5 if rough else 1e-7, atol=1e-8 if rough else 1e-10)


def trained(model: nn.Module, train: Batch, folder: Path, forward: nn.Module | None = None) -> whence.Trajectory:
    """A recorded run of a few steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = whence.Recorder(folder, forward or model, optimiser, every=4)
    rng = torch.Generator().manual_seed(0)
    for _ in range(8):
        index = torch.randint(len(train[0]), (3,), generator=rng)
        recorder.saw(index)
        optimiser.zero_grad()
        F.cross_entropy((forward or model)(train[0][index]), train[1][index]).backward()
        optimiser.step()
    return recorder.close()


METHODS = ["TracIn", "SOURCE", "Unrolled"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GAPS)
def test_methods_of_training_need_no_forward_mode(name: str, method: str, tmp_path: Path) -> None:
    train = data(6)
    found = []
    for i, model in enumerate(with_gap(name, 3)):
        run = trained(model, train, tmp_path / str(i))
        fitted = getattr(whence, method)(run, **({"dropped": 0} if method == "Unrolled" else {}))
        if i == 0 and method == "Unrolled" and name in NO_SECOND:
            with pytest.raises(UnsupportedError, match="second derivatives"):
                fitted.fit(model, TASK, train).score(few(train))
            return
        found.append(fitted.fit(model, TASK, train).score(few(train)).values)
    rough = name in NO_SECOND
    torch.testing.assert_close(found[0], found[1], rtol=1e-5 if rough else 1e-8, atol=1e-10)


@pytest.mark.parametrize("name", GAPS)
def test_slopes_need_no_forward_mode(name: str) -> None:
    model, _ = with_gap(name, 3)
    problem = whence.Problem(model, TASK, data(6))
    v = {
        n: torch.randn(2, *s, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for n, s in problem.shapes.items()
    }
    batch = problem.batch(range(6))
    torch.testing.assert_close(problem.slopes(batch, v), problem.loss_gradients(batch).dot(v)[..., 0])


class SavedSlope(torch.autograd.Function):
    """Cross-entropy whose slope is computed in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(h.detach().softmax(1) - F.one_hot(y, h.shape[1]))
        return F.cross_entropy(h.detach(), y, reduction="none")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.unsqueeze(1) * ctx.saved_tensors[0], None


class FusedLoss(whence.Classification):
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return SavedSlope.apply(outputs, batch[1])

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return TASK.measurement(outputs, batch)


@pytest.mark.parametrize("classes", [3, 140])
def test_a_loss_without_second_derivative_is_no_flat_one(classes: int) -> None:
    train = data(6, classes=classes)
    model = seeded(with_gelu(written_gelu, classes))
    for product in ("auto", "jvp", "finite-difference"):
        curvature = functools.partial(whence.GGN, product=product)
        with pytest.raises(UnsupportedError, match="second derivative by the outputs"):
            whence.attribute(
                model, FusedLoss(), train, few(train), solver=whence.CG(), damping=1.0, curvature=curvature
            )
    found = whence.attribute(
        model, FusedLoss(), train, few(train), solver=whence.CG(tolerance=1e-9), damping=3.0, curvature=whence.Hessian
    )
    wanted = dense_scores(model, train, few(train), 3.0, hessian=True)
    torch.testing.assert_close(found.values, wanted, rtol=1e-5, atol=1e-8)


def test_memory_that_runs_out_is_no_missing_derivative() -> None:
    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    calls = []

    class Full(whence.Classification):
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            calls.append(1)
            return full(outputs) if len(calls) > 4 else super().loss(outputs, batch)

    with pytest.raises(torch.OutOfMemoryError):
        whence.attribute(
            seeded(with_gelu(written_gelu)), Full(), data(), few(data()), solver=whence.CG(), curvature=whence.Hessian
        )
