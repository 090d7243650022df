"""The shipped conformance suite over everything the library has, and over things broken on purpose."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from problems import TinyProblem, problem
from solving import normal
from wherefrom import (
    ASTRA,
    CG,
    EKFAC,
    GGN,
    KFAC,
    Arnoldi,
    AttributionError,
    Auto,
    Damping,
    Directions,
    Dual,
    EmpiricalFisher,
    Exact,
    Hessian,
    Identity,
    Inverse,
    Neumann,
    Nystrom,
    Problem,
    RandProj,
    RandSelect,
    Solver,
)
from wherefrom.curvature import Need
from wherefrom.persample import layers
from wherefrom.persample.blocks import Block
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.layers import LinearKind, NormKind, kind_of
from wherefrom.solvers.auto import Choice
from wherefrom.solvers.identity import IdentityInverse
from wherefrom.testing import ConformanceError, check_layer, check_operator, check_solver

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")


def library(p: TinyProblem, **options) -> Problem:
    return Problem(p.model, p.task, p.train, batch_size=4, progress=False, **options)


# --- everything the library has ---

CURVATURES = {
    "rows": (lambda lib: GGN(lib, "rows"), None),
    "jvp": (lambda lib: GGN(lib, "jvp"), None),
    "finite-difference": (lambda lib: GGN(lib, "finite-difference"), 1e-6),
    "hessian": (Hessian, None),
    "empirical": (EmpiricalFisher, None),
}
SOLVERS = [
    Identity(),
    Exact(form="primal"),
    Exact(form="dual"),
    Dual(),
    Dual(drop=0.1),
    CG(tolerance=1e-9, steps=1000),
    CG(preconditioner=EKFAC(), tolerance=1e-9, steps=1000),
    CG(preconditioner=KFAC(labels="true"), tolerance=1e-9, steps=1000),
    CG(preconditioner=Dual(), tolerance=1e-9),
    CG(preconditioner=Exact(), tolerance=1e-9),
    CG(steps=2),
    KFAC(),
    KFAC(labels="true"),
    EKFAC(),
    EKFAC(labels="true"),
    EKFAC(limit=3),
    Neumann(batch=4, steps=8),
    Neumann(EKFAC(), batch=4, steps=8, momentum=0.5),
    ASTRA(batch=4, steps=8),
    pytest.param(Neumann(), marks=pytest.mark.slow),
]
LOW_RANK = [
    Arnoldi(rank=15, steps=30),
    Arnoldi(rank=15, steps=30, damped=False),
    Arnoldi(rank=15, steps=30, positive=True),
    Arnoldi(rank=10, steps=20, sample=5),
    Arnoldi(rank=10, steps=20, sample=5, fresh=True, positive=True),
    RandProj(rank=20),
    RandSelect(rank=20),
    Nystrom(rank=15),
    Nystrom(rank=1000),
    CG(preconditioner=Nystrom(rank=15), tolerance=1e-9, steps=1000),
    CG(tolerance=1e-9, steps=1000, block=True),
    CG(preconditioner=EKFAC(), tolerance=1e-9, steps=1000, block=True),
    CG(preconditioner=Dual(), tolerance=1e-9, block=True),
    CG(preconditioner=Nystrom(rank=15), tolerance=1e-9, steps=1000, block=True),
    Auto(),
    Auto(tolerance=1e-9),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mlp", kind) for kind in CURVATURES]
    + [(name, kind) for name in ("tied_embedding", "odd_parameters") for kind in ("rows", "hessian", "empirical")],
)
def test_every_curvature_conforms(name, kind):
    make, tolerance = CURVATURES[kind]
    check_operator(make(library(problem(name))), tolerance=tolerance)


def test_the_operator_of_a_curvature_conforms():
    check_operator(GGN(library(problem("mlp"))).operator())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", ["mlp", "masked_sequence"])
def test_every_solver_conforms(name, solver):
    check_solver(solver, GGN(library(problem(name))), damping=0.5)


@pytest.mark.parametrize("solver", LOW_RANK, ids=repr)
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "odd_parameters", "linear_regression"])
def test_every_low_rank_and_block_solver_conforms(name, solver):
    check_solver(solver, GGN(library(problem(name))), damping=0.5)


@pytest.mark.parametrize("preconditioner", [Identity(), EKFAC(), Dual(), Nystrom(rank=15)], ids=repr)
def test_auto_conforms_whatever_it_chooses(preconditioner, monkeypatch):
    choice = CG(preconditioner, tolerance=1e-9, steps=1000)
    monkeypatch.setattr(Auto, "choices", lambda self, curvature: [Choice(choice, "the test says so")])
    check_solver(Auto(tolerance=1e-9), GGN(library(problem("mlp"))), damping=0.5)


@pytest.mark.parametrize(
    "solver",
    [
        Arnoldi(rank=15, steps=30),
        Arnoldi(rank=10, steps=20, sample=5, positive=True, damped=False),
        RandProj(rank=20),
        RandSelect(rank=20),
        CG(tolerance=1e-9, block=True),
        CG(preconditioner=EKFAC(), tolerance=1e-9, block=True),
        Auto(tolerance=1e-9),
    ],
    ids=repr,
)
def test_low_rank_and_block_solvers_conform_on_other_curvatures(solver):
    p = problem("mlp")
    check_solver(solver, EmpiricalFisher(library(p)), damping=0.5)
    check_solver(solver, Hessian(library(p)), damping=1.0)


def test_nystrom_conforms_on_the_empirical_fisher():
    check_solver(Nystrom(rank=5), EmpiricalFisher(library(problem("mlp"))), damping=0.5)


@pytest.mark.parametrize(
    "solver",
    [
        Exact(form="primal"),
        CG(tolerance=1e-9),
        EKFAC(),
        Neumann(step=0.05, batch=4, steps=8),
        pytest.param(Neumann(batch=4, steps=8), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_solvers_conform_on_other_curvatures(solver):
    p = problem("mlp")
    check_solver(solver, EmpiricalFisher(library(p)), damping=0.5)
    check_solver(solver, Hessian(library(p)), damping=1.0)


@pytest.mark.parametrize(
    "solver",
    [
        Exact(),
        Dual(),
        EKFAC(),
        KFAC(),
        CG(),
        Neumann(batch=4, steps=8),
        Arnoldi(rank=15, steps=30),
        Arnoldi(rank=15, steps=30, damped=False),
        RandProj(rank=20),
        RandSelect(rank=20),
        Nystrom(rank=15),
        CG(preconditioner=Nystrom(rank=15)),
        CG(block=True),
        CG(preconditioner=Nystrom(rank=15), block=True),
        Auto(),
    ],
    ids=repr,
)
def test_solvers_conform_in_float32(solver):
    p = problem("mlp")
    lib = Problem(p.model.float(), p.task, (p.train[0].float(), p.train[1]), batch_size=4)
    check_solver(solver, GGN(lib), damping=0.1)
    check_operator(GGN(lib))


LAYERS = {
    "linear": (nn.Linear(4, 3), normal(5, 4)),
    "linear, no bias": (nn.Linear(4, 3, bias=False), normal(5, 4)),
    "linear on tokens": (nn.Linear(4, 3), normal(5, 6, 4)),
    "linear on a grid": (nn.Linear(4, 3), normal(5, 2, 3, 4)),
    "wide linear on few tokens": (nn.Linear(40, 30), normal(3, 2, 40)),
    "conv2d": (nn.Conv2d(2, 4, 3, padding=1), normal(3, 2, 5, 4)),
    "conv2d, strided": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), normal(3, 2, 5, 4)),
    "conv2d, dilated": (nn.Conv2d(2, 4, 3, dilation=2, padding=2), normal(3, 2, 5, 5)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), normal(3, 4, 4, 4)),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 2, groups=4, padding="same"), normal(3, 4, 4, 5)),
    "conv2d, circular": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), normal(3, 2, 4, 5)),
    "conv2d, reflect": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), normal(3, 2, 4, 5)),
    "conv2d, valid": (nn.Conv2d(2, 3, 2, padding="valid"), normal(3, 2, 4, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), normal(4, 3, 8)),
    "conv1d, groups": (nn.Conv1d(4, 4, 2, groups=2, dilation=2, padding="same"), normal(4, 4, 7)),
    "embedding": (nn.Embedding(6, 3), torch.tensor([[1, 2, 1], [0, 0, 0], [5, 4, 1], [3, 3, 2]])),
    "embedding, one token": (nn.Embedding(6, 3), torch.tensor([1, 2, 5])),
    "embedding, padding": (nn.Embedding(6, 3, padding_idx=0), torch.tensor([[1, 0, 1], [0, 0, 0], [5, 4, 0]])),
    "layer norm": (nn.LayerNorm(4), normal(5, 4)),
    "layer norm on tokens": (nn.LayerNorm(4), normal(5, 3, 4)),
    "layer norm of two axes": (nn.LayerNorm([3, 4]), normal(5, 2, 3, 4)),
    "layer norm, no bias": (nn.LayerNorm(4, bias=False), normal(5, 3, 4)),
    "rms norm": (nn.RMSNorm(4, eps=1e-6), normal(5, 3, 4)),
    "rms norm, default eps": (nn.RMSNorm(4), normal(5, 4)),
    "group norm": (nn.GroupNorm(2, 4), normal(5, 4, 3, 2)),
    "group norm on vectors": (nn.GroupNorm(2, 4), normal(5, 4)),
    "batch norm 1d": (nn.BatchNorm1d(4), normal(5, 4)),
    "batch norm on sequences": (nn.BatchNorm1d(4), normal(5, 4, 6)),
    "batch norm 2d": (nn.BatchNorm2d(4), normal(5, 4, 3, 2)),
    "batch norm 3d": (nn.BatchNorm3d(4), normal(5, 4, 3, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_entry_conforms(name):
    layer, x = LAYERS[name]
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * normal(*parameter.shape, seed=1)
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer += 0.3 * normal(*buffer.shape, seed=2).abs()
    kind = kind_of(layer)
    assert kind is not None
    check_layer(kind, layer, x)


def test_every_registered_entry_is_checked():
    ours = {layer for layer in layers.KINDS if layer.__module__.startswith("torch.")}  # not those that others register
    assert {type(layer) for layer, _ in LAYERS.values()} == ours


def test_layers_conform_in_float32():
    check_layer(LinearKind(), nn.Linear(4, 3), normal(5, 6, 4).float())


# --- operators broken on purpose ---


class Matrix:
    """A dense operator on one block of 4 numbers and one of 2 x 3."""

    def __init__(self, matrix: torch.Tensor, psd: bool = True):
        self.matrix, self.psd = matrix, psd
        self.blocks = (
            Block("a", {"a": torch.Size([4])}, None),
            Block("b", {"b": torch.Size([2, 3])}, (1, 2)),
        )

    def __call__(self, v):
        flat = v.flatten()
        return Directions.unflatten(v.blocks, flat @ self.matrix.T.to(flat))


def spectrum(*values: float) -> torch.Tensor:
    q = torch.linalg.qr(normal(10, 10)).Q
    return (q * torch.tensor(values + (1.0,) * (10 - len(values))).double()) @ q.T


class Affine(Matrix):
    def __call__(self, v):
        return super().__call__(v).map(lambda _, t: t + 1)


class Meddling(Matrix):
    def __call__(self, v):
        out = super().__call__(v)
        v.tensors()["a"].add_(1)
        return out


class Mixing(Matrix):
    """Right-hand sides leak into each other."""

    def __call__(self, v):
        return super().__call__(v).map(lambda _, t: t + 0.1 * t.mean(0))


class Transposed(Matrix):
    def __call__(self, v):
        return super().__call__(v).map(lambda name, t: t.mT if name == "b" else t)


class Narrow(Matrix):
    def __call__(self, v):
        return super().__call__(v).map(lambda _, t: t.float())


class Partial(Matrix):
    def __call__(self, v):
        return Directions(v.blocks, {"a": super().__call__(v).forms["a"]})


class Named(Matrix):
    """A plain dict, not directions."""

    def __call__(self, v):
        return super().__call__(v).to_parameters()


class Square(Matrix):
    def __call__(self, v):
        return super().__call__(v).map(lambda _, t: t * t.abs())


def test_a_good_operator_passes():
    check_operator(Matrix(spectrum(0.0, 3.0)))
    check_operator(Matrix(spectrum(-1.0), psd=False))
    check_operator(Matrix(torch.zeros(10, 10).double()))
    check_operator(Matrix(spectrum(2.0)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Matrix(spectrum(-0.01)), "claims psd, but has an eigenvalue below 0.*1.0e-02"),
        (Matrix(spectrum() + 1e-3 * torch.triu(normal(10, 10))), "symmetry"),
        (Affine(spectrum()), "linearity"),
        (Square(spectrum()), "linearity"),
        (Meddling(spectrum()), "the input v after C v"),
        (Mixing(spectrum()), "one at a time"),
        (Transposed(spectrum()), "blocks and shapes must be.*'b': .3, 1, 2, 3.*got.*'b': .3, 1, 3, 2."),
        (Narrow(spectrum()), "dtype must be torch.float64, got torch.float32"),
        (Partial(spectrum()), "blocks and shapes must be"),
        (Named(spectrum()), "C v must be wherefrom.Directions, got dict"),
    ],
)
def test_a_bad_operator_fails(operator, message):
    with pytest.raises(ConformanceError, match=message):
        check_operator(operator)


def test_an_operator_that_draws_minibatches_fails():
    operator = GGN(library(problem("mlp"))).operator(torch.Generator(), batch_size=2)
    with pytest.raises(ConformanceError, match="repeated C v .an operator that draws minibatches"):
        check_operator(operator)


# --- solvers broken on purpose ---


@dataclass(frozen=True)
class Scaled(Solver):
    """b / damping: conforms. The broken ones below are its children."""

    def fit(self, curvature, damping):
        self.check(curvature)
        return self.invert(curvature, Damping.of(damping).resolve(curvature))

    def invert(self, curvature, damping) -> Inverse:
        return Over(curvature, damping)


class Over(Inverse):
    def apply(self, b):
        return b.dense().map(lambda name, t: t / self.damping[name])


def broken(inverse: type[Inverse]) -> Solver:
    @dataclass(frozen=True)
    class Broken(Scaled):
        def invert(self, curvature, damping):
            return inverse(curvature, damping)

    return Broken()


class Bent(Over):
    def apply(self, b):
        return b.map(lambda _, t: t * t.abs())


class Joined(Over):
    def apply(self, b):
        return b.map(lambda name, t: t / self.damping[name] + t.sum(0))


class Shifted(Over):
    def apply(self, b):
        return b.map(lambda name, t: t / self.damping[name] + 1)


class Spoiling(Over):
    def apply(self, b):
        return b.map(lambda _, t: t.mul_(2))


class Short(Over):
    def apply(self, b):
        x = super().apply(b)
        return Directions(x.blocks, dict(list(x.forms.items())[1:]))


class Named(Over):
    """A plain dict, not directions."""

    def apply(self, b):
        return super().apply(b).to_parameters()


class Wide(Over):
    def apply(self, b):
        return super().apply(b).map(lambda _, t: t.float())


class Random(Over):
    def apply(self, b):
        return b.map(lambda _, t: t * torch.rand(()))


class Flattering(Over):
    """Its certificate is better than the truth."""

    def residual_vector(self, x, b):
        return super().residual_vector(x, b).scale(0.5)


class Uncertain(Over):
    def solve(self, b, certify=True):
        x, certificate = super().solve(b, certify)
        return x, dataclasses.replace(certificate, residual=None)


class Certain(Over):
    """Measures a residual that nobody asked for."""

    def solve(self, b, certify=True):
        return super().solve(b, certify=True)


class WrongSelf(Over):
    def self_influence(self, rows):
        values = rows.square_norms().sum(1)
        return values, torch.ones_like(values, dtype=torch.bool)


class WrongFactored(Over):
    """Right for what is written out, and takes a shorter way for what is not."""

    def apply(self, b):
        is_dense = all(isinstance(form, torch.Tensor) for form in b.forms.values())
        return super().apply(b) if is_dense else b


class Hiding(Over):
    """Keeps what it needs beside its fields."""

    factor = 1.0

    def apply(self, b):
        return super().apply(b).scale(self.factor)


@dataclass(frozen=True, eq=False)
class Unsaved(Over):
    """Has a field that no file can hold."""

    scale: object = len


class Unbuildable(Over):
    """Is not made of its fields."""

    def __init__(self, curvature, damping, more):
        super().__init__(curvature, damping)


@pytest.mark.parametrize(
    ("inverse", "message"),
    [
        (Bent, "linearity"),
        (Joined, "one by one"),
        (Shifted, "one by one|zero right-hand side"),
        (Spoiling, "the right-hand side after solving"),
        (Short, "blocks and shapes must be"),
        (Named, "apply must be wherefrom.Directions, got dict"),
        (Wide, "dtype must be torch.float64"),
        (Random, "solving again"),
        (Flattering, "the certificate against"),
        (Uncertain, "residual must be measured if certify=True"),
        (Certain, "residual must be measured if certify=True, and be None"),
        (WrongSelf, "self-influence"),
        (WrongFactored, "scores by factored right-hand sides"),
        (Unsaved, "cannot be restored by its fields: the field scale of a record must be a tensor, a number"),
    ],
)
def test_a_bad_inverse_fails(inverse, message):
    curvature = GGN(library(problem("mlp")))
    check_solver(broken(Over), curvature, 0.1)
    with pytest.raises(ConformanceError, match=message):
        check_solver(broken(inverse), curvature, 0.1)


@dataclass(frozen=True)
class Careless(Scaled):
    """Takes any curvature, although it says what it needs."""

    needs = Need.KRONECKER

    def check(self, curvature):
        pass


@dataclass(frozen=True)
class Nameless(Scaled):
    inner: object = dataclasses.field(default_factory=object)


@dataclass(frozen=True)
class Forgetful(Scaled):
    """What it tells its inverse is not saved with it."""

    def invert(self, curvature, damping):
        inverse = Hiding(curvature, damping)
        object.__setattr__(inverse, "factor", 2.0)
        return inverse


@dataclass(frozen=True)
class Unrestored(Scaled):
    def invert(self, curvature, damping):
        return Unbuildable(curvature, damping, "more")


@dataclass(frozen=True)
class Needless(Scaled):
    needs = "everything"  # type: ignore[assignment]

    def check(self, curvature):
        pass


class Undecorated(Scaled):
    extra: float = 1.0


@dataclass(frozen=True, eq=False)
class Unequal(Scaled):
    def __eq__(self, other):
        return False

    def __hash__(self):
        return 0


@dataclass(frozen=True)
class Unhashable(Scaled):
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Careless, "Careless must refuse, with UnsupportedError, a curvature that offers no Kronecker factors"),
        (Nameless, "its repr must depend on its fields alone"),
        (Unequal, "its repr must depend on its fields alone"),
        (Forgetful, "solutions after saving and restoring"),
        (Unrestored, "cannot be restored by its fields: .*Unbuildable must be one with its fields"),
        (Needless, "Needless.needs must be a wherefrom.Need, got 'everything'"),
        (Undecorated, "must be decorated with @dataclass.frozen=True."),
        (Unhashable, "must be hashable"),
    ],
)
def test_a_bad_solver_fails(solver, message):
    with pytest.raises(ConformanceError, match=message):
        check_solver(solver(), GGN(library(problem("mlp"))), 0.1)


def test_a_solver_that_repeats_what_nobody_solved_is_not_the_identity():
    """The identity conforms too: its residual says what it is worth."""
    assert isinstance(Identity().fit(GGN(library(problem("mlp"))), 0.1), IdentityInverse)


# --- layer entries broken on purpose ---


class Halved(LinearKind):
    def rows(self, layer, x, g, parts):
        found = super().rows(layer, x, g, parts)
        return Factored(found.a, found.g / 2)


class Biasless(LinearKind):
    """Forgets the constant input of the bias."""

    def rows(self, layer, x, g, parts):
        found = super().rows(layer, x, g, parts)
        if "bias" not in parts:
            return found
        return Factored(torch.cat([found.a[..., :-1], torch.zeros_like(found.a[..., -1:])], -1), found.g)


class Narrowed(LinearKind):
    def rows(self, layer, x, g, parts):
        found = super().rows(layer, x, g, parts)
        return Factored(found.a[..., 1:], found.g)


class Reversed(LinearKind):
    """Cotangents in another order, right for one of them alone."""

    def rows(self, layer, x, g, parts):
        return super().rows(layer, x, g.flip(0), parts)


class Swapped(NormKind):
    """Scale and shift in the wrong order."""

    def rows(self, layer, x, g, parts, arguments=None):
        found = super().rows(layer, x, g, parts, arguments)
        return Written(found.rows.flip(-1), found.sides)


class Careful(Factored):
    def dot(self, v):
        return 1.001 * super().dot(v)


class Combining(Factored):
    def combine(self, w):
        return 1.001 * super().combine(w)


class Gram(Factored):
    def gram(self, other):
        return 1.001 * super().gram(other)


class Norms(Factored):
    def square_norms(self):
        return 1.001 * super().square_norms()


def with_rows(rows: type[Factored]) -> LinearKind:
    class Kind(LinearKind):
        def rows(self, layer, x, g, parts):
            found = super().rows(layer, x, g, parts)
            return rows(found.a, found.g)

    return Kind()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Halved(), "Halved for Linear, weight and bias, R = 1: rows: relative difference 5.0e-01"),
        (Biasless(), "Biasless for Linear, weight and bias, R = 1: rows"),
        (Narrowed(), "shape of the rows"),
        (Reversed(), "R = 3: rows"),
        (with_rows(Careful), "dot: relative difference 1.0e-03"),
        (with_rows(Combining), "combine: relative difference 1.0e-03"),
        (with_rows(Gram), "gram: relative difference 1.0e-03"),
        (with_rows(Norms), "square_norms: relative difference 1.0e-03"),
    ],
)
def test_a_bad_layer_entry_fails(kind, message):
    with pytest.raises(ConformanceError, match=message):
        check_layer(kind, nn.Linear(4, 3).double(), normal(5, 2, 4))


def test_a_norm_with_its_parameters_swapped_fails():
    check_layer(NormKind(), nn.LayerNorm(4).double(), normal(5, 4))
    with pytest.raises(ConformanceError, match="Swapped for LayerNorm"):
        check_layer(Swapped(), nn.LayerNorm(4).double(), normal(5, 4))


def test_a_layer_without_parameters_or_with_one_example_is_refused():
    for layer, x in ((nn.ReLU(), normal(5, 4)), (nn.Linear(4, 3).double(), normal(1, 4))):
        with pytest.raises(ConformanceError, match="check_layer needs a weight or a bias and 2 examples"):
            check_layer(LinearKind(), layer, x)


def test_what_fails_is_an_error_of_ours_and_an_assertion():
    assert issubclass(ConformanceError, AttributionError) and issubclass(ConformanceError, AssertionError)
