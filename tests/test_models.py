"""Models as they come: 0-dim parameters, missing derivatives, wrappers, threads; all come back as they were."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import wherefrom
from wherefrom.errors import AttributionWarning, InputError, UnsupportedError
from wherefrom.model.observe import copy_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TASK = wherefrom.Classification()
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
    wherefrom.Exact(),
    wherefrom.Dual(),
    wherefrom.CG(),
    wherefrom.CG(preconditioner=wherefrom.EKFAC()),
    wherefrom.EKFAC(),
    wherefrom.KFAC(),
    wherefrom.Identity(),
    wherefrom.Nystrom(rank=6),
    wherefrom.Arnoldi(rank=4, steps=6),
    wherefrom.DataInf(),
    wherefrom.HyperINF(),
    wherefrom.Neumann(steps=20),
    wherefrom.RandProj(rank=4),
    wherefrom.RandSelect(rank=2),
    "auto",
]


@pytest.mark.parametrize("make", SCALARS)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_scalar_parameter_scores_as_a_vector_of_one(make: Callable[..., nn.Module], solver: Any) -> None:
    found = []
    for shape in ((), (1,)):
        model = seeded(lambda shape=shape: make(shape))
        curvature = (
            wherefrom.EmpiricalFisher if isinstance(solver, (wherefrom.DataInf, wherefrom.HyperINF)) else wherefrom.GGN
        )
        scores = wherefrom.attribute(model, TASK, data(), few(data()), solver=solver, damping=0.1, curvature=curvature)
        found.append(scores.values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", SCALARS)
@pytest.mark.parametrize("hessian", [False, True])
def test_a_scalar_parameter_scores_as_plain_autograd(make: Callable[..., nn.Module], hessian: bool) -> None:
    model = seeded(lambda: make(()))
    curvature = wherefrom.Hessian if hessian else wherefrom.GGN
    found = wherefrom.attribute(
        model, TASK, data(), few(data()), solver=wherefrom.Exact(), damping=2.0, curvature=curvature
    )
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
    return model, WrittenNorm(copy_model(model), dim)


TELLING = ["old function", "foreign backward", "weight norm"]  # the others take the same ways, and longer
EACH = [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in GAPS]
PRODUCTS = [("auto", 3), ("auto", 140), ("jvp", 3), ("finite-difference", 3)]
SLOW = [("jvp", 140), ("rows", 3), ("rows", 140), ("finite-difference", 140)]


@pytest.mark.parametrize(
    ("product", "classes"), [*PRODUCTS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
@pytest.mark.parametrize("name", EACH)
def test_gauss_newton_products_need_no_forward_mode(name: str, product: Any, classes: int) -> None:
    train = data(6, classes=classes)
    model, written = with_gap(name, classes)
    curvature = functools.partial(wherefrom.GGN, product=product)
    solver = wherefrom.CG(tolerance=1e-10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = wherefrom.attribute(model, TASK, train, few(train), solver=solver, damping=0.5, curvature=curvature)
    differs = name in APPROXIMATE and product in ("auto", "jvp") and (product, classes) != ("auto", 3)
    assert differs == any("central differences" in str(w.message) for w in caught)
    rough = differs or product == "finite-difference"
    wanted = dense_scores(written, train, few(train), 0.5)
    torch.testing.assert_close(found.values, wanted, rtol=1e-5 if rough else 1e-8, atol=1e-8 if rough else 1e-10)


@pytest.mark.parametrize("name", GAPS)
def test_hessian_products_need_no_forward_mode(name: str) -> None:
    train = data(6)
    model, written = with_gap(name, 3)
    solver = wherefrom.CG(tolerance=1e-9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = wherefrom.attribute(
            model, TASK, train, few(train), solver=solver, damping=3.0, curvature=wherefrom.Hessian
        )
    assert (name in NO_SECOND) == any("central differences" in str(w.message) for w in caught)
    wanted = dense_scores(written, train, few(train), 3.0, hessian=True)
    rough = name in NO_SECOND
    torch.testing.assert_close(found.values, wanted, rtol=1e-5 if rough else 1e-7, atol=1e-8 if rough else 1e-10)


def trained(model: nn.Module, train: Batch, folder: Path, forward: nn.Module | None = None) -> wherefrom.Trajectory:
    """A recorded run of a few steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = wherefrom.Recorder(folder, forward or model, optimiser, every=4)
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
@pytest.mark.parametrize("name", EACH)
def test_methods_of_training_need_no_forward_mode(name: str, method: str, tmp_path: Path) -> None:
    train = data(6)
    found = []
    for i, model in enumerate(with_gap(name, 3)):
        run = trained(model, train, tmp_path / str(i))
        fitted = getattr(wherefrom, method)(run, **({"dropped": 0} if method == "Unrolled" else {}))
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
    problem = wherefrom.Problem(model, TASK, data(6))
    v = {
        n: torch.randn(2, *s, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for n, s in problem.shapes.items()
    }
    batch = problem.batch(range(6))
    directions = wherefrom.Directions.from_parameters(problem.blocks, v)
    torch.testing.assert_close(problem.slopes(batch, directions), problem.loss_gradients(batch).dot(directions)[..., 0])


class SavedSlope(torch.autograd.Function):
    """Cross-entropy whose slope is computed in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(h.detach().softmax(1) - F.one_hot(y, h.shape[1]))
        return F.cross_entropy(h.detach(), y, reduction="none")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.unsqueeze(1) * ctx.saved_tensors[0], None


class FusedLoss(wherefrom.Classification):
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return SavedSlope.apply(outputs, batch[1])

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return TASK.measurement(outputs, batch)


@pytest.mark.parametrize("classes", [3, 140])
def test_a_loss_without_second_derivative_is_no_flat_one(classes: int) -> None:
    train = data(6, classes=classes)
    model = seeded(with_gelu(written_gelu, classes))
    for product in ("auto", "jvp", "finite-difference"):
        curvature = functools.partial(wherefrom.GGN, product=product)
        with pytest.raises(UnsupportedError, match="second derivative by the outputs"):
            wherefrom.attribute(
                model, FusedLoss(), train, few(train), solver=wherefrom.CG(), damping=1.0, curvature=curvature
            )
    found = wherefrom.attribute(
        model,
        FusedLoss(),
        train,
        few(train),
        solver=wherefrom.CG(tolerance=1e-9),
        damping=3.0,
        curvature=wherefrom.Hessian,
    )
    wanted = dense_scores(model, train, few(train), 3.0, hessian=True)
    torch.testing.assert_close(found.values, wanted, rtol=1e-5, atol=1e-8)


def test_memory_that_runs_out_is_no_missing_derivative() -> None:
    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    calls = []

    class Full(wherefrom.Classification):
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            calls.append(1)
            return full(outputs) if len(calls) > 4 else super().loss(outputs, batch)

    with pytest.raises(torch.OutOfMemoryError):
        wherefrom.attribute(
            seeded(with_gelu(written_gelu)),
            Full(),
            data(),
            few(data()),
            solver=wherefrom.CG(),
            curvature=wherefrom.Hessian,
        )


# --- copies -------------------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps what autograd computed: as an attribute, in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.seen: list[Tensor] = []
        self.last: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.fc(x).tanh()
        self.seen, self.last = [self.hidden], {"x": self.hidden * 2}
        return self.head(self.hidden)


class NormedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.utils.weight_norm(nn.LSTM(2, 3, batch_first=True), "weight_hh_l0")
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (2, 2)))[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def pruned() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def pruned_twice() -> nn.Module:
    model = pruned()
    prune.ln_structured(model[0], "weight", 0.3, n=2, dim=0)
    prune.random_unstructured(model[2], "bias", 0.4)
    return model


def spectral() -> nn.Module:
    model = mlp()
    nn.utils.spectral_norm(model[0])
    return model


COPIED = {
    "pruned": pruned,
    "pruned twice": pruned_twice,
    "old weight norm": weight_normed(old=True),
    "old spectral norm": spectral,
    "weight-normed LSTM": NormedLSTM,
    "attributes": Remembers,
}


@pytest.mark.parametrize("method", [*METHODS, "half", "at"])
@pytest.mark.parametrize("name", COPIED)
def test_attributes_of_autograd_do_not_stop_a_copy(name: str, method: str, tmp_path: Path) -> None:
    train = data(6)
    found = []
    for fresh in (False, True):
        model = seeded(COPIED[name])
        run = trained(model, train, tmp_path / str(fresh))
        if fresh:  # the same weights in a model that was never run with gradients
            state = model.state_dict()
            model = seeded(COPIED[name])
            model.load_state_dict(state)
            with torch.no_grad():
                model(train[0])
        else:
            model(train[0]).sum().backward()
        if method == "half":
            half = data(6, dtype=torch.bfloat16)
            scores = wherefrom.attribute(model.bfloat16(), TASK, half, few(half), damping=0.1)
        elif method == "at":
            problem = wherefrom.Problem(model, TASK, train).at(run.checkpoints[0].state)
            scores = wherefrom.attribute(problem.model, TASK, train, few(train), damping=0.1)
        else:
            options = {"dropped": 0} if method == "Unrolled" else {}
            scores = getattr(wherefrom, method)(run, **options).fit(model, TASK, train).score(few(train))
        found.append(scores.values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_a_copy_shares_no_memory_and_keeps_what_is_shared_within() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1].weight = model[0].weight
    model.extra = model[0](torch.ones(1, 4, dtype=torch.float64))  # no leaf
    model.again = [model.extra]
    twin = copy_model(model)
    assert twin[1].weight is twin[0].weight
    assert twin.again[0] is twin.extra
    assert twin.extra.grad_fn is None
    assert not {t.data_ptr() for t in twin.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}


# --- wrappers -----------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A module whose child is wrapped."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> None:
        super().__init__()
        self.body = wrap(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.body(x)) + self.shift


class Compiled(nn.Module):
    """A function of it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.ones(3))
        self.inner = torch.compile(self._inner, backend=refuse)

    def _inner(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.body(x)) + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def refuse(*_: object) -> Any:
    raise RuntimeError("nothing is to be compiled")


def compile_in_place() -> nn.Module:
    model = Nested()
    model.compile(backend=refuse)
    model.body.compile(backend=refuse)
    return model


compiled = functools.partial(torch.compile, backend=refuse)
WRAPPED = {
    "compiled": lambda: compiled(Nested()),
    "compiled child": lambda: Nested(compiled),
    "compiled both": lambda: compiled(Nested(compiled)),
    "compiled in place": compile_in_place,
    "compiled function": Compiled,
    "data parallel": lambda: nn.DataParallel(Nested()),
    "data parallel child": lambda: Nested(nn.DataParallel),
    "both": lambda: nn.DataParallel(compiled(Nested())),
}
PLAIN_NAMES = ["scale", "body.0.weight", "body.0.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_scores_as_the_plain_one(name: str) -> None:
    model, plain = seeded(WRAPPED[name]), seeded(Nested)
    before = traces(model)
    for solver in ("auto", wherefrom.EKFAC(), wherefrom.CG(tolerance=1e-10)):
        found, wanted = (
            wherefrom.attribute(m, TASK, data(), few(data()), solver=solver, damping=0.1) for m in (model, plain)
        )
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-9, atol=1e-12)
    assert traces(model) == before


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_has_the_names_of_the_plain_one(name: str) -> None:
    problem = wherefrom.Problem(seeded(WRAPPED[name]), TASK, data(), parameters="body")
    assert list(problem.parameters) == ["body.0.weight", "body.0.bias"]
    full = wherefrom.Problem(seeded(WRAPPED[name]), TASK, data())
    assert list(full.parameters) == PLAIN_NAMES
    assert full.fingerprint()["model"] == wherefrom.Problem(seeded(Nested), TASK, data()).fingerprint()["model"]


@pytest.mark.parametrize("name", ["compiled", "compiled child", "data parallel", "both"])
def test_a_run_of_a_wrapped_model_is_one_of_the_plain_one(name: str, tmp_path: Path) -> None:
    found = []
    for i, build in enumerate((WRAPPED[name], Nested)):
        model = seeded(build)
        with torch.compiler.set_stance("force_eager"):
            run = trained(model, data(6), tmp_path / str(i))
        assert set(run.checkpoints[0].state) == {*PLAIN_NAMES, "shift"}
        found.append(wherefrom.Unrolled(run, dropped=0).fit(model, TASK, data(6)).score(few(data())).values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["compiled", "compiled child", "data parallel", "both"])
def test_weights_of_a_wrapped_model_fit_the_plain_one(name: str) -> None:
    problem = wherefrom.Problem(seeded(Nested), TASK, data())
    other = seeded(WRAPPED[name]).state_dict()
    torch.testing.assert_close(dict(problem.at(other).model.state_dict()), dict(problem.model.state_dict()))


def test_embeddings_of_a_wrapped_model_are_those_of_the_plain_one() -> None:
    found = [
        wherefrom.Embeddings("body").fit(seeded(build), TASK, data()).score(few(data())).values
        for build in (Nested, WRAPPED["both"], WRAPPED["compiled child"])
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_wrapper_with_hooks_of_its_own_is_refused() -> None:
    model = nn.DataParallel(seeded(Nested))
    model.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with pytest.raises(UnsupportedError, match="forward hooks of its own"):
        wherefrom.Problem(model, TASK, data())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_scripted_and_traced_models_are_refused_in_one_line(nested: bool, traced: bool) -> None:
    make = (lambda m: torch.jit.trace(m, data()[0])) if traced else torch.jit.script
    model = seeded(mlp)
    model = nn.Sequential(make(model), nn.Identity()) if nested else make(model)
    with pytest.raises(InputError, match="scripted or traced") as caught:
        wherefrom.attribute(model, TASK, data(), few(data()))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_frozen_scripted_part_is_taken() -> None:
    model = seeded(lambda: nn.Sequential(mlp(), nn.Linear(3, 3)))
    model[0].requires_grad_(False)
    wanted = wherefrom.attribute(model, TASK, data(), few(data()), damping=0.1).values
    model[0] = torch.jit.script(model[0])
    torch.testing.assert_close(wherefrom.attribute(model, TASK, data(), few(data()), damping=0.1).values, wanted)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "none yet"),
        (lambda: nn.Linear(4, 3, device="meta"), "none yet"),
        (lambda: nn.Linear(4, 3, dtype=torch.complex64), "complex"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(build: Build, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wherefrom.Problem(build(), TASK, data())


# --- the model comes back as it was -------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that must be the same afterwards, by identity and by value."""
    places = {
        f"{path}|{name}": (id(p), None if p is None else (p.requires_grad, p.detach().cpu().numpy().tobytes()))
        for path, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, p in table.items()
    }
    modules = {
        path: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), sorted(vars(m)))
        for path, m in model.named_modules(remove_duplicate=False)
    }
    return {"places": places, "modules": modules}


class Adapter(nn.Module):
    """Wraps a layer that another place holds too, as peft does with tied embeddings: one module, two paths."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta


class SharedModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(5, 5)
        self.enter, self.first = nn.Linear(4, 5), Adapter(inner)
        self.second = Adapter(inner)
        self.second.delta = self.first.delta
        self.again = self.first
        self.loose = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(self.enter(x)).tanh()).tanh()) @ self.loose


class TiedLoose(nn.Module):
    """One parameter of several names in modules that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.w = nn.Parameter(torch.randn(4, 3))
        self.b.w = self.a.w
        self.b.other = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.a.w).tanh() @ self.b.other + x @ self.b.w


class Counts(nn.Module):
    """Buffers that every forward pass changes: in place, behind autograd's back, and by another object."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.full((2,), float("nan")))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.data.lerp_(x.detach().mean(0), 0.1)
        self.last = x.detach().sum().expand(2) * 1.0
        self.seen += 1
        return self.fc(x)


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=0.5), nn.Dropout(0.5), nn.Linear(5, 3))
    model(torch.randn(8, 4))
    return model


RETURNED = {
    "shared modules": SharedModules,
    "tied loose": TiedLoose,
    "counts": Counts,
    "batch norm": normed,
    "spectral norm": spectral,
    "new spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))),
    "lstm": NormedLSTM,
    "scalar": lambda: Scaled(()),
    "attributes": Remembers,
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.Linear(2, 4),
        nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    ),
}


def partly(model: nn.Module) -> nn.Module:
    """In training mode but for its first child, one parameter frozen."""
    model.train()
    next(model.children(), nn.Identity()).eval()
    list(model.parameters())[-1].requires_grad_(False)
    return model


def everything(model: nn.Module, task: Any, folder: Path) -> Iterator[Callable[[], object]]:
    """Public calls that run the model."""
    train, asked = data(8), few(data())
    settings = {"damping": 1.0, "progress": False}
    for solver in (wherefrom.CG(steps=3), wherefrom.EKFAC(), wherefrom.Dual()):
        yield lambda solver=solver: wherefrom.attribute(model, task, train, asked, solver=solver, **settings)
    yield lambda: wherefrom.attribute(
        model, task, train, asked, solver=wherefrom.CG(steps=2), curvature=wherefrom.Hessian, **settings
    )
    wide = functools.partial(wherefrom.GGN, product="jvp")
    yield lambda: wherefrom.attribute(
        model, task, train, asked, solver=wherefrom.CG(steps=2), curvature=wide, **settings
    )
    influence = wherefrom.Influence(wherefrom.EKFAC(), damping=1.0, progress=False)

    def calls() -> None:
        influence.fit(model, task, train).save(folder / "fit.wherefrom")
        fitted = influence.load(folder / "fit.wherefrom", model, task, train)
        fitted.solve(asked).by_block([0, 1])
        fitted.self_influence()
        wherefrom.similarity(fitted, asked)
        wherefrom.response_norms(fitted)
        wherefrom.spectrum(fitted.inverse.curvature)

    yield calls
    yield lambda: wherefrom.TRAK(size=2).fit(model, task, train).score(asked)
    yield lambda: wherefrom.GradCos().fit(model, task, train).score(asked)


@pytest.mark.parametrize("name", RETURNED)
def test_the_model_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = partly(seeded(RETURNED[name]))
    before = traces(model)
    for call in everything(model, TASK, tmp_path):
        try:
            call()
        except wherefrom.AttributionError:
            pass
        assert traces(model) == before


class Failing(wherefrom.Classification):
    """Fails at a given call of the loss."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("stop")
        return super().loss(outputs, batch)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("name", ["shared modules", "counts", "tied loose"])
def test_the_model_comes_back_after_an_error(name: str, error: type[BaseException], tmp_path: Path) -> None:
    model = partly(seeded(RETURNED[name]))
    before = traces(model)
    for at in (1, 4, 7):
        for call in everything(model, Failing(at, error), tmp_path):
            try:
                call()
            except (wherefrom.AttributionError, RuntimeError, KeyboardInterrupt):
                pass
            assert traces(model) == before
            assert torch.backends.mha.get_fastpath_enabled()
            assert torch.backends.cuda.flash_sdp_enabled()


def test_an_optimiser_made_before_still_moves_the_model() -> None:
    model = seeded(SharedModules)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    wherefrom.attribute(model, TASK, data(), few(data()), solver=wherefrom.CG(), damping=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimiser.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("name", ["shared modules", "tied loose"])
def test_shared_parameters_score_as_plain_autograd(name: str) -> None:
    model = seeded(RETURNED[name])
    for solver in (wherefrom.Exact(), wherefrom.CG(tolerance=1e-10)):
        found = wherefrom.attribute(model, TASK, data(), few(data()), solver=solver, damping=0.5)
        torch.testing.assert_close(found.values, dense_scores(model, data(), few(data()), 0.5), rtol=1e-8, atol=1e-10)


def test_buffers_that_a_pass_changes_are_named_once() -> None:
    model = seeded(Counts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wherefrom.attribute(model, TASK, data(), few(data()), damping=1.0)
    said = [str(w.message) for w in caught if "changes buffers" in str(w.message)]
    assert len(said) == 1
    assert all(name in said[0] for name in ("calls", "mean", "last"))


class Clamped(nn.Module):
    """A weight that its own forward pass keeps in bounds."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.fc, self.behind = nn.Linear(4, 3), behind

    def forward(self, x: Tensor) -> Tensor:
        if self.behind:
            self.fc.weight.data.clamp_(-0.1, 0.1)
        else:
            with torch.no_grad():
                self.fc.weight.clamp_(-0.1, 0.1)
        return self.fc(x)


@pytest.mark.parametrize("behind", [False, True])
def test_a_forward_pass_that_changes_its_weights_is_refused(behind: bool) -> None:
    model = seeded(lambda: Clamped(behind))
    before = traces(model)
    with pytest.raises(UnsupportedError, match=r"changes its own parameters: fc\.weight"):
        wherefrom.attribute(model, TASK, data(), few(data()), damping=1.0)
    assert traces(model) == before


class Bounded(nn.Module):
    """An embedding with max_norm, and some rows beyond it."""

    def __init__(self, bag: bool, norm: float = 2.0, bound: float | None = 0.8) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.embed, self.head = kind(6, 4, max_norm=bound, norm_type=norm), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed((x.abs() * 3).long().clamp(max=5))
        return self.head((e if e.ndim == 2 else e.sum(1)).tanh())


@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("bag", [False, True])
def test_embeddings_with_max_norm_keep_their_weights(bag: bool, norm: float) -> None:
    model, reference = (seeded(lambda: Bounded(bag, norm)) for _ in range(2))
    before = traces(model)
    reference(data(300)[0])  # changes its rows, as the user's model does in use
    every = torch.arange(6).unsqueeze(1)
    reference.embed(every if bag else every[:, 0])
    plain = seeded(lambda: Bounded(bag, norm, None))
    plain.load_state_dict(reference.state_dict())
    assert not torch.equal(plain.embed.weight, model.embed.weight)
    with pytest.warns(AttributionWarning, match="max_norm"):
        found = wherefrom.attribute(model, TASK, data(), few(data()), solver=wherefrom.CG(tolerance=1e-10), damping=0.5)
    assert traces(model) == before
    torch.testing.assert_close(found.values, dense_scores(plain, data(), few(data()), 0.5), rtol=1e-7, atol=1e-9)


def test_max_norm_holds_at_other_weights_too(tmp_path: Path) -> None:
    model, plain = seeded(lambda: Bounded(False)), seeded(lambda: Bounded(False, bound=None))
    run = trained(model, data(6), tmp_path / "run")
    problem = wherefrom.Problem(model, TASK, data())
    state = {**run.checkpoints[0].state, "embed.weight": 3 * run.checkpoints[0].state["embed.weight"]}
    found = problem.at(state).loss_gradients(problem.batch(range(6))).dense().to_parameters()
    plain.load_state_dict(state)
    with torch.no_grad():
        size = plain.embed.weight.norm(dim=1, keepdim=True)
        plain.embed.weight.mul_((0.8 / (size + 1e-7)).clamp(max=1))
    wanted = wherefrom.Problem(plain, TASK, data()).loss_gradients(problem.batch(range(6))).dense().to_parameters()
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


# --- threads ------------------------------------------------------------------------------------------------------


def together(*calls: Callable[[], object]) -> list[Any]:
    """What the calls give, each in a thread of its own; their errors are raised."""
    found: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:  # noqa: BLE001
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


SETTINGS = ["auto", wherefrom.EKFAC(), wherefrom.CG(tolerance=1e-10)]


@pytest.mark.parametrize("name", ["batch norm", "shared modules", "transformer", "counts"])
def test_threads_on_one_model_give_what_one_gives(name: str) -> None:
    model = partly(seeded(RETURNED[name]))
    before = traces(model)
    call = lambda s: wherefrom.attribute(model, TASK, data(), few(data()), solver=s, damping=1.0, progress=False)  # noqa: E731
    wanted = [call(s).values for s in SETTINGS]
    for _ in range(3):
        found = together(*(functools.partial(call, s) for s in SETTINGS * 2))
        for one, right in zip(found, wanted * 2, strict=True):
            torch.testing.assert_close(one.values, right)
        assert traces(model) == before
        assert torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()


def test_threads_on_models_that_share_a_part() -> None:
    shared = seeded(lambda: nn.Linear(4, 5))
    models = [nn.Sequential(shared, nn.Tanh(), seeded(lambda: nn.Linear(5, 3))).train() for _ in range(3)]
    before = [traces(m) for m in models]
    call = lambda m: wherefrom.attribute(m, TASK, data(), few(data()), damping=1.0, progress=False).values  # noqa: E731
    wanted = [call(m) for m in models]
    for found, right in zip(together(*(functools.partial(call, m) for m in models)), wanted, strict=True):
        torch.testing.assert_close(found, right)
    assert [traces(m) for m in models] == before


def test_threads_on_one_fit() -> None:
    influence = wherefrom.Influence(wherefrom.CG(tolerance=1e-10), damping=1.0, progress=False)
    fitted = influence.fit(seeded(SharedModules), TASK, data())
    wanted = fitted.score(few(data())).values
    for found in together(*[lambda: fitted.score(few(data())).values] * 4):
        torch.testing.assert_close(found, wanted)


def test_half_a_model_is_copied_whole_beside_a_thread() -> None:
    model = seeded(mlp, torch.bfloat16)
    train = data(dtype=torch.bfloat16)
    call = lambda: wherefrom.attribute(model, TASK, train, few(train), damping=1.0, progress=False).values  # noqa: E731
    wanted = call()
    for found in together(*[call] * 4):
        torch.testing.assert_close(found, wanted)


# --- modes of torch -----------------------------------------------------------------------------------------------


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "float64": lambda: default(torch.float64),
    "float16": lambda: default(torch.float16),
    "bfloat16": lambda: default(torch.bfloat16),
    "meta": lambda: default_device("meta"),
}


def mixed() -> nn.Module:
    """Layers with rules, and a parameter without."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), Gain(()), Act(torch.tanh), nn.Linear(5, 3))


QUICK = ["auto", wherefrom.EKFAC(), wherefrom.CG(preconditioner=wherefrom.EKFAC())]
EVERY = [
    pytest.param(solver, dtype, id=f"{solver}-{dtype}", marks=[] if quick else pytest.mark.slow)
    for solver in SOLVERS
    for dtype in (torch.float32, torch.float64)
    for quick in [solver in QUICK and dtype == torch.float32]
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("solver", "dtype"), EVERY)
def test_modes_of_torch_change_no_score(solver: Any, mode: str, dtype: torch.dtype) -> None:
    train, queries, model = data(dtype=dtype), few(data(dtype=dtype)), seeded(mixed, dtype)
    curvature = (
        wherefrom.EmpiricalFisher if isinstance(solver, (wherefrom.DataInf, wherefrom.HyperINF)) else wherefrom.GGN
    )
    call = lambda: wherefrom.attribute(  # noqa: E731
        model, TASK, train, queries, solver=solver, damping=0.1, curvature=curvature, self_influence=True
    )
    wanted = call()
    with MODES[mode]():
        found = call()
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=0)
    torch.testing.assert_close(found.self_influence, wanted.self_influence, rtol=0, atol=0)
    if wanted.residual is not None:
        torch.testing.assert_close(found.residual, wanted.residual, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_change_no_method(mode: str, tmp_path: Path) -> None:
    train, model = data(6), seeded(mixed)
    run = trained(model, train, tmp_path / "run")

    def call(folder: Path) -> list[Tensor]:
        found = [
            method.fit(model, TASK, train).score(few(train)).values
            for method in (
                wherefrom.TracIn(run),
                wherefrom.SOURCE(run),
                wherefrom.Unrolled(run, dropped=0.5),
                wherefrom.TRAK(size=3),
                wherefrom.GradCos(),
            )
        ]
        fitted = wherefrom.Influence(wherefrom.EKFAC(), damping=0.1).fit(model, TASK, train)
        found += [fitted.solve(few(train)).by_block([0, 1])["0"], wherefrom.similarity(fitted, few(train)).values]
        found.append(wherefrom.GradientStore.build(fitted, folder, size=64).score(few(train)).values)
        found.append(wherefrom.TracIn(run).fit(model, TASK, train).self_influence())
        hessian = wherefrom.attribute(
            model, TASK, train, few(train), solver=wherefrom.CG(), damping=3.0, curvature=wherefrom.Hessian
        )
        return [*found, hessian.values]

    wanted = call(tmp_path / "one")
    with MODES[mode]():
        found = call(tmp_path / "two")
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["autocast", "no_grad", "inference_mode", "meta"])
def test_modes_of_torch_change_no_part_used_by_itself(mode: str) -> None:
    model = seeded(mixed, torch.float32)
    train = data(dtype=torch.float32)

    def call() -> list[Tensor]:
        problem = wherefrom.Problem(model, TASK, train)
        curvature = wherefrom.GGN(problem)
        b = problem.loss_gradients(problem.batch([0, 1])).dense()
        inverse = wherefrom.EKFAC().fit(curvature, 0.1)
        directions = curvature.product(b), inverse.solve(b)[0], inverse.apply(b)
        found = [t for v in directions for t in v.dense().tensors().values()]
        return [*found, problem.slopes(problem.batch([0, 1, 2]), b)]

    wanted = call()
    with MODES[mode]():
        found = call()
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=0)


def test_models_and_data_of_inference_mode_are_copied() -> None:
    train, plain = data(), seeded(normed)
    with torch.inference_mode():
        model = seeded(normed)
        model.load_state_dict(plain.state_dict())
        made = train[0].clone(), train[1].clone()
    wanted = wherefrom.attribute(plain, TASK, train, few(train), damping=0.1).values
    with pytest.warns(AttributionWarning, match="inference mode"):
        found = wherefrom.attribute(model, TASK, made, few(made), damping=0.1).values
    torch.testing.assert_close(found, wanted)
    examples = [(made[0][i], made[1][i]) for i in range(len(made[0]))]
    torch.testing.assert_close(wherefrom.attribute(plain, TASK, examples, few(made), damping=0.1).values, wanted)


def test_a_model_that_relies_on_a_default_device_keeps_it() -> None:
    seen = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.empty(1).device.type)
            return self.fc(x)

    model, train = seeded(Looks), data()
    with default_device("meta"):
        wherefrom.attribute(model, TASK, train, few(train), damping=1.0)
    assert set(seen) == {"meta"}


# --- parameters without a gradient --------------------------------------------------------------------------------


class CutOff(nn.Module):
    """Parts that the outputs do not depend on as autograd sees it: detached, unused, behind a kernel, dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.loose, self.unused = nn.Parameter(torch.ones(5)), nn.Linear(2, 2)
        self.rare = nn.Embedding(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.from_numpy((self.first(x) * self.loose).detach().numpy()).tanh()
        rare = self.rare((x[:, 0] > 1e9).long())
        return self.head(self.second(hidden) + rare)


def test_parameters_that_never_had_a_gradient_are_named_once() -> None:
    names = {"first.weight", "first.bias", "loose", "unused.weight", "unused.bias"}
    for solver in (wherefrom.EKFAC(), wherefrom.CG(), wherefrom.Identity()):
        fitted = wherefrom.Influence(solver, damping=1.0).fit(seeded(CutOff), TASK, data())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted.score(few(data()))
            fitted.score(few(data()))
        said = [str(w.message) for w in caught if "no gradient on any training example" in str(w.message)]
        assert len(said) == 1
        assert said[0].startswith(f"{len(names)} parameters")
        assert all(name in said[0] for name in names)
        assert not any(name in said[0] for name in ("second", "head", "rare"))


def test_a_parameter_that_one_late_example_uses_is_not_named() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.late = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
            self.loose = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            gate = (x[:, :1] > 5).to(x)
            return self.head(x) + gate * self.late(x) * self.loose

    train = data()
    train[0][-1, 0] = 6.0
    model = seeded(Late)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = wherefrom.attribute(model, TASK, train, few(train), solver=wherefrom.Exact(), damping=0.5, batch_size=4)
    assert not [w for w in caught if "no gradient on any" in str(w.message)]
    torch.testing.assert_close(found.values, dense_scores(model, train, few(train), 0.5), rtol=1e-8, atol=1e-10)


# --- the models that these were found on --------------------------------------------------------------------------


def test_bloom_whose_gelu_is_an_old_function_scores_as_plain_autograd() -> None:
    transformers = pytest.importorskip("transformers")
    from wherefrom.hf import CausalLM

    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2, pad_token_id=0)
    model = transformers.BloomForCausalLM(config).double().eval()
    ids = torch.randint(3, 50, (4, 4))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    task, chosen = CausalLM(), r"mlp.*bias|ln_f"
    ps = [p for name, p in model.named_parameters() if ("mlp" in name and "bias" in name) or "ln_f" in name]

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in torch.autograd.grad(value, ps, retain_graph=True)])

    g, C = [], torch.zeros(sum(p.numel() for p in ps), sum(p.numel() for p in ps), dtype=torch.float64)
    for i in range(4):
        one = {name: t[i : i + 1] for name, t in batch.items()}
        h = task.outputs(model, one)
        g.append(gradient(task.loss(h, one).sum()))
        loss = lambda z, one=one: task.loss(z, one).sum()  # noqa: E731
        H = torch.autograd.functional.hessian(loss, h.detach()).reshape(h.numel(), h.numel())  # pyright: ignore
        J = torch.stack([gradient(t) for t in h.flatten()])
        C += J.T @ H @ J / 4
    rows = torch.stack(g)
    wanted = rows @ torch.linalg.solve(C + 0.1 * torch.eye(len(C), dtype=torch.float64), rows.T)
    for solver in (
        "auto",
        wherefrom.CG(tolerance=1e-10),
        wherefrom.CG(preconditioner=wherefrom.EKFAC(), tolerance=1e-10),
    ):
        influence = wherefrom.Influence(solver, damping=0.1, parameters=chosen, progress=False)
        found = influence.fit(model, task, batch).score(batch, measurement=task.loss)
        torch.testing.assert_close(found.values, wanted, rtol=1e-7, atol=1e-9)


def test_tied_embeddings_with_trainable_tokens_keep_their_parameters() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from wherefrom.hf import CausalLM

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    ids = torch.randint(3, 23, (4, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = traces(model)
    for solver in (wherefrom.CG(steps=3), wherefrom.EKFAC()):
        wherefrom.attribute(model, CausalLM(), batch, batch, solver=solver, damping=1.0)
        assert traces(model) == before
