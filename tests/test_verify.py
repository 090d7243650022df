"""The certificate of rows: what is wrong is found out, put right where it can be, and refused where it cannot."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wherefrom.model.problem
from problems import NAMES, problem
from reference import exact_scores
from wherefrom import (
    CG,
    EKFAC,
    GGN,
    AttributionWarning,
    Classification,
    DataInf,
    Exact,
    Identity,
    InputError,
    Problem,
    UnsupportedError,
    attribute,
)
from wherefrom.model import check as row_check
from wherefrom.persample import layers
from wherefrom.persample.directions import Directions

DAMPING = 0.05
FLOAT64 = 1e-12


@pytest.fixture(autouse=True)
def _doubles():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def classes(*shape: int, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, *shape), torch.randint(3, (n,))


def score(model, train, task=None, solver=None, **options):
    queries = tuple(t[:3] for t in train)
    solver = solver or Exact()
    return attribute(model, task or Classification(), train, queries, solver=solver, damping=DAMPING, **options)


def check(model, train, task=None, tolerance: float = 1e-9, **options):
    """Scores are those of plain autograd, and the row error is that of rounding."""
    task = task or Classification()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttributionWarning)
        found = score(model, train, task, **options)
    queries = tuple(t[:3] for t in train)
    wanted = exact_scores(model, task, train, len(train[0]), queries, 3, DAMPING)
    assert float((found.values - wanted).norm() / wanted.norm()) < tolerance
    assert found.row_error is not None and found.row_error < FLOAT64
    return found


# --- models that are right ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
def test_the_row_error_of_a_right_model_is_rounding(name):
    p = problem(name)
    for solver in (Identity(), EKFAC(), CG(tolerance=0.1)):
        scores = attribute(p.model, p.task, p.train, p.queries, solver=solver, damping=DAMPING, batch_size=4)
        assert scores.row_error is not None and scores.row_error < FLOAT64
    train, queries = (tuple(t.float() if t.is_floating_point() else t for t in d) for d in (p.train, p.queries))
    single = attribute(p.model.float(), p.task, train, queries)
    assert single.row_error is not None and single.row_error < 1e-4
    assert f"row error {single.row_error:.1e}" in str(single)


def test_every_batch_shape_and_a_share_of_the_rest_is_checked(monkeypatch):
    monkeypatch.setattr(row_check, "FREE", 0)
    x, y = classes(4, n=2000)
    lib = Problem(nn.Linear(4, 3), Classification(), (x, y), batch_size=10)
    for _, batch in lib.batches():
        lib.loss_gradients(batch)
    first = lib.verification.row_check.checked
    assert 4 <= first <= 20  # one, and about eight of the others
    lib.loss_gradients((x[:7], y[:7]))
    assert lib.verification.row_check.checked == first + 1


def test_small_data_are_checked_as_a_whole():
    x, y = classes(4, n=40)
    lib = Problem(nn.Linear(4, 3), Classification(), (x, y), batch_size=10)
    for _, batch in lib.batches():
        lib.loss_gradients(batch)
    assert lib.verification.row_check.checked == 40


# --- planted bugs ---


def scaled(rows, n):
    return dataclass_with(rows, "g", lambda t: t * 1.01)


def exchanged(rows, n):
    return rows[torch.arange(n).roll(1)]


def dataclass_with(rows, name, change):
    values = {key: getattr(rows, key) for key in rows.__dataclass_fields__}
    key = name if name in values else "rows"
    return type(rows)(**values | {key: change(values[key])})


LAYERS = {
    nn.Linear: lambda: (nn.Sequential(nn.Linear(4, 3)), classes(4)),
    nn.Conv1d: lambda: (nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3)), classes(2, 4)),
    nn.Conv2d: lambda: (nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 3)), classes(1, 3, 3)),
    nn.Embedding: lambda: (
        nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)),
        (torch.randint(5, (12, 2)), torch.randint(3, (12,))),
    ),
    nn.LayerNorm: lambda: (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), classes(4)),
    nn.BatchNorm1d: lambda: (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), classes(4)),
}


@pytest.mark.parametrize("plant", [scaled, exchanged])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_planted_bug_in_a_layer_rule_is_put_right(layer, late, plant, monkeypatch):
    """One that shows at once, and one that shows in batches larger than those that a layout is tried on."""
    model, train = LAYERS[layer]()
    kind = (
        layers.registered(
            layer(1, 1)
            if layer in (nn.Conv1d, nn.Conv2d, nn.Linear)
            else next(m for m in model.modules() if type(m) is layer)
        )
        if layer not in (nn.Conv1d, nn.Conv2d)
        else layers.KINDS[layer]
    )
    right = type(kind).rows
    planted = []

    def wrong(self, module, x, g, parts, *more):
        found = right(self, module, x, g, parts, *more)
        if type(module) is not layer or (late and g.shape[1] <= 3):
            return found
        planted.append(module)
        return plant(found, g.shape[1])

    monkeypatch.setattr(type(kind), "rows", wrong)
    check(model, train, batch_size=5)
    assert planted


def test_a_bug_that_no_other_way_avoids_is_refused(monkeypatch):
    """A rule that goes wrong late, for a batch and for an example alone."""
    right = layers.LinearKind.rows
    seen = []

    def wrong(self, module, x, g, parts):
        seen.append(g.shape[1])
        found = right(self, module, x, g, parts)
        return scaled(found, 0) if 5 in seen else found

    monkeypatch.setattr(layers.LinearKind, "rows", wrong)
    with pytest.raises(UnsupportedError, match="has rows that differ from autograd by"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score(nn.Linear(4, 3), classes(4), batch_size=5)


# --- layers that see examples in no order ---


class Unpad(nn.Module):
    """Padding is dropped before a layer, and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, mask):
        z = x.new_zeros(*mask.shape, 5)
        z[mask] = torch.tanh(self.a(x[mask]))
        return self.h(z.sum(1) / mask.sum(1, keepdim=True))


class Masked(Classification):
    def outputs(self, model, batch):
        return model(batch[0], batch[2])


@pytest.mark.parametrize("solver", [Exact(), CG(EKFAC(), tolerance=1e-11, steps=2000)])
@pytest.mark.parametrize(
    "lengths",
    [
        [4, 4, 4, 1, 3, 1, 1, 1, 1, 1, 2, 1],  # twice as many rows as examples
        [4, 4, 4, 2, 1, 3, 1, 2, 3, 1, 2, 1],
        [2, 4, 4, 1, 3, 1, 1, 1, 2, 1, 3, 1],
        [1, 1, 1, 4, 2, 3, 4, 1, 4, 2, 1, 3],
    ],
)
def test_layers_that_see_the_real_tokens_alone(lengths, solver):
    lengths = torch.tensor(lengths)
    mask = torch.arange(4) < lengths[:, None]
    check(Unpad(), (torch.randn(12, 4, 4), torch.randint(3, (12,)), mask), Masked(), solver=solver, tolerance=1e-8)


class Experts(nn.Module):
    """Experts that each get those examples that the gate sends them, in a loop."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        experts = (
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)) if hidden else nn.Linear(4, 3) for _ in range(3)
        )
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(experts)

    def forward(self, x):
        g, out = self.gate(x).softmax(1), x.new_zeros(len(x), 3)
        for j, expert in enumerate(self.experts):
            index = (g.argmax(1) == j).nonzero()[:, 0]
            if len(index):
                out = out.index_add(0, index, expert(x[index]) * g[index, j, None])
        return out


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_experts_that_get_some_or_none_of_the_examples(seed, hidden):
    torch.manual_seed(seed)
    check(Experts(hidden), classes(4), batch_size=5)


class Sorted(nn.Module):
    """Examples are sorted before a layer and put back in order afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.h(torch.tanh(self.a(x[order]))[order.argsort()])


class HalfOfThem(nn.Module):
    """A layer for the examples of one sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        positive = x[:, 0] > 0
        return self.h(torch.where(positive[:, None], x.masked_scatter(positive[:, None], self.a(x[positive])), x))


class Segments(nn.Module):
    """Pixels of all images as one list, of which some are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(1, 5), nn.Linear(5, 3)

    def forward(self, x):
        keep = (x > 0).flatten().nonzero()[:, 0]
        z = torch.tanh(self.a(x.reshape(-1, 1)[keep]))
        return self.h(x.new_zeros(len(x), 5).index_add(0, keep // x.shape[1], z))


@pytest.mark.parametrize("module", [Sorted, HalfOfThem, Segments])
@pytest.mark.parametrize("batch_size", [3, 5, 12])
def test_other_orders_and_selections_of_examples(module, batch_size):
    check(module(), classes(4), batch_size=batch_size)


def test_kronecker_factors_of_ragged_layers_do_not_depend_on_batches():
    mask = torch.arange(4) < torch.tensor([4, 4, 4, 1, 3, 1, 1, 1, 1, 1, 2, 1])[:, None]
    train = torch.randn(12, 4, 4), torch.randint(3, (12,)), mask
    model = Unpad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttributionWarning)
        found = [score(model, train, Masked(), EKFAC(labels="true"), batch_size=size).values for size in (2, 5, 12)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=1e-12)


# --- the slow path ---


class Prototypes(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.features, self.prototypes, self.p = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5)), p

    def forward(self, x):
        return -torch.cdist(self.features(x), self.prototypes, p=self.p)


class Slopes(nn.Module):
    """A parameter for each channel, that is not the last axis."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 3), nn.Linear(8, 3)
        self.act = nn.PReLU(4)
        self.own = own

    def forward(self, x):
        z = self.conv(x)
        return self.head((F.prelu(z, self.act.weight) if self.own else self.act(z)).flatten(1))


@pytest.mark.parametrize("solver", [Exact(), CG(tolerance=1e-11, steps=3000)])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_operations_with_a_wrong_batching_rule(p, solver):
    check(Prototypes(p), classes(4), solver=solver, tolerance=1e-8)


@pytest.mark.parametrize("own", [False, True])
def test_a_slope_for_each_channel(own):
    check(Slopes(own), classes(1, 4))


@pytest.mark.parametrize("seed", range(4))
def test_a_batching_rule_that_is_wrong_where_two_sizes_agree(seed):
    """PReLU's, where there are as many examples as cotangents: in the last batch, and for one of its two examples."""
    torch.manual_seed(seed)
    convolutions = nn.Conv1d(2, 4, 2, padding=2), nn.Tanh(), nn.ConvTranspose1d(4, 4, 2)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.PReLU(32), nn.Linear(32, 2))
    check(model, (torch.randn(8, 2, 4), torch.randint(2, (8,))), batch_size=6)


class OneByOne(nn.Module):
    """Calls a layer with single vectors, as many as there are examples or not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        rows = [self.a(row) if float(row.detach().sum()) > 0 else self.b(row).tanh() for row in x]
        return self.head(torch.stack(rows))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12])
def test_layers_that_are_called_with_single_vectors(batch_size):
    check(OneByOne(), classes(3), batch_size=batch_size)


def test_a_spectral_norm_in_training_mode_stays_as_it_was():
    """Its power iteration goes on whenever the weight is read in that mode."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = classes(4)
    copy_in_eval = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttributionWarning)
        found = score(model.train(), (x, y))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    wanted = exact_scores(copy_in_eval, Classification(), (x, y), 12, (x[:3], y[:3]), 3, DAMPING)
    torch.testing.assert_close(found.values, wanted, rtol=1e-9, atol=1e-10)


def test_products_of_parameters_that_do_not_act():
    """Autograd's zeros are one number that is shared; sums over batches must not be made in place of it."""
    model = Prototypes(2.0)
    model.unused = nn.Parameter(torch.randn(3))
    check(model, classes(4), batch_size=5, curvature=partial(GGN, product="jvp"), tolerance=1e-8)


def test_scores_by_forward_mode_derivatives_are_those_of_rows():
    """DataInf on a model with a slow path scores by derivatives along few directions."""
    model, train = Prototypes(2.0), classes(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttributionWarning)
        found = score(model, train, solver=DataInf(), batch_size=5)
        other = score(model, train, solver=DataInf(), batch_size=12)
    torch.testing.assert_close(found.values, other.values, rtol=1e-9, atol=1e-10)


def test_wrong_derivatives_in_forward_mode_are_found_out(monkeypatch):
    lib = Problem(Prototypes(2.0), Classification(), train := classes(4))
    drawn = {name: torch.randn(3, *shape) for name, shape in lib.shapes.items()}
    v = Directions.from_parameters(lib.blocks, drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttributionWarning)
        wanted = lib.loss_gradients(train).dot(v)[..., 0]
    torch.testing.assert_close(lib.slopes(train, v), wanted, rtol=1e-9, atol=1e-10)
    right = torch.func.jvp

    def wrong(*arguments):
        value, slope = right(*arguments)
        return value, 1.01 * slope

    monkeypatch.setattr(wherefrom.model.problem, "jvp", wrong)
    torch.testing.assert_close(lib.slopes(train, v), wanted, rtol=1e-9, atol=1e-10)


# --- no per-example gradient exists ---


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Switched(nn.Module):
    """Control flow on the mean of the batch."""

    def forward(self, x):
        return x if x.mean() > x[0].mean() else 2 * x


class OverBatch(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


BATCHED = {
    "batch norm": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "centring": Centred,
    "standardising": lambda: OverBatch(lambda x: x / x.std(0)),
    "softmax over the batch": lambda: OverBatch(lambda x: x * x.softmax(0)),
    "cumulative sum": lambda: OverBatch(lambda x: x.cumsum(0)),
    "the largest of the batch": lambda: OverBatch(lambda x: x / x.abs().max()),
    "attention over the batch": lambda: OverBatch(lambda x: (x @ x.T).softmax(1) @ x),
    "control flow": Switched,
    "a sort": lambda: OverBatch(lambda x: x.sort(0).values),
}


@pytest.mark.parametrize("what", BATCHED)
@pytest.mark.parametrize("solver", [Exact(), EKFAC(), "auto"])
def test_outputs_that_depend_on_the_rest_of_the_batch_are_refused(what, solver):
    model = nn.Sequential(nn.Linear(4, 5), BATCHED[what](), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(InputError, match="must not depend on the other examples of its batch"):
        score(model, classes(4), solver=solver, batch_size=6)


def test_a_dependence_that_the_first_examples_do_not_show_is_refused():
    class Late(nn.Module):
        def forward(self, x):
            return x - x.mean(0) if len(x) > 3 else x

    model = nn.Sequential(nn.Linear(4, 5), Late(), nn.Linear(5, 3))
    with pytest.raises(InputError, match="must not depend on the other examples of its batch"):
        score(model, classes(4), batch_size=6)


class Pairs(nn.Module):
    """All pairs of a batch, as in contrastive learning."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)

    def forward(self, x):
        z = F.normalize(self.embed(x))
        return z @ z.T / 0.1


class InBatch(Classification):
    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, torch.arange(len(outputs)), reduction="none")

    measurement = loss


def test_a_loss_over_all_pairs_is_refused():
    with pytest.raises(InputError, match=r"its shape does: \(1,\) alone .* contrastive"):
        score(Pairs(), classes(4), InBatch())


RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "feature dropout": lambda x: F.feature_alpha_dropout(x.unsqueeze(-1), 0.5, training=True).squeeze(-1),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "sampling": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "Gumbel softmax": lambda x: F.gumbel_softmax(x, dim=1),
    "random order": lambda x: x[:, torch.randperm(x.shape[1])],
}


@pytest.mark.parametrize("what", RANDOM)
@pytest.mark.parametrize("solver", [Exact(), CG(EKFAC()), EKFAC()])
def test_a_random_forward_pass_is_refused(what, solver):
    model = nn.Sequential(nn.Linear(4, 16), OverBatch(RANDOM[what]), nn.Linear(16, 3))
    with pytest.raises(InputError, match="must give the same outputs each time"):
        score(model, classes(4), solver=solver)


def test_what_is_put_out_at_padding_may_depend_on_the_batch():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x, mask):
            h = self.a(x)
            return torch.where(mask[..., None], h, h.mean())  # of all examples

    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 3, 1, 1, 4, 1, 1, 2, 1])[:, None]
    labels = torch.randint(3, (12, 4)).where(mask, -100)
    check(Padded(), (torch.randn(12, 4, 4), labels, mask), Masked(), batch_size=5)


class Branching(nn.Module):
    """Control flow on the sign of the batch."""

    def forward(self, x):
        return x if float(x.detach().mean()) > 0 else 2 * x


@pytest.mark.parametrize("seed", range(4))
def test_small_groups_do_not_hide_what_depends_on_them(seed):
    """Most groups take the branch of the batch; an example alone does not."""
    torch.manual_seed(seed)
    x = torch.cat([torch.rand(4, 4) + 1, -0.1 * torch.rand(1, 4), torch.rand(3, 4) + 1])
    model = nn.Sequential(nn.Linear(4, 3), Branching())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    with pytest.raises(InputError, match="must not depend on the other examples"):
        score(model, (x, torch.randint(3, (8,))), batch_size=8)
