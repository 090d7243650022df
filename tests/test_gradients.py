"""Per-example gradients of every problem against the autograd loop, and every contraction against dense rows."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from problems import NAMES, TinyProblem, problem
from solving import library
from wherefrom import AttributionWarning, Classification, Directions, InputError, Problem, Regression
from wherefrom.persample import factored, gradients
from wherefrom.persample.factored import Factored

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
# Blocks that no layer entry covers, by problem; in all other problems every block is factored.
SLOW = {
    "odd_parameters": {
        "offset",
        "scale",
        "form",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    },
    "subclassed": {"2.weight", "2.bias"},  # the scaled one; the inherited one is verified and kept
    "parametrized": {"0.parametrizations.weight.0.gain", "0.parametrizations.weight.original"},
    "positions": {"position.weight"},  # called once for the whole batch
    "time_first": {"first.weight", "first.bias", "second.weight"},
}


def cotangents(p: TinyProblem, R: int, seed: int = 0) -> torch.Tensor:
    """Random cotangents of the training examples' outputs: (R, N, ...)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(R, *p.outputs().shape, generator=rng, dtype=torch.float64)


def rows_of(p: TinyProblem, R: int, **options) -> tuple[gradients.Gradients, torch.Tensor]:
    """The library's rows and the dense ones in its order of blocks' parameters, for R random cotangents: (N, R, D)."""
    c, lib = cotangents(p, R), library(p, **options)
    found = lib.gradients(lib.batch(range(p.n)), lambda *_: c)
    return found, torch.einsum("rnk,nkd->nrd", c.flatten(2), p.jacobian())


def dense(p: TinyProblem, g: gradients.Gradients) -> torch.Tensor:
    return p.flatten(g.dense().to_parameters()).view(*g.weights.shape, p.dim)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_autograd_loop_for_any_batch_size(name):
    p = problem(name)
    for size in (3, 4, 5, p.n):
        lib = library(p, batch_size=size)
        loss = torch.cat([dense(p, lib.loss_gradients(batch)) for _, batch in lib.batches()])
        torch.testing.assert_close(loss[:, 0], p.loss_gradients(), **TIGHT)
        asked = torch.cat([dense(p, lib.measurement_gradients(batch)) for batch in p.batches(size, p.queries)])
        torch.testing.assert_close(asked[:, 0], p.measurement_gradients(), **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_one_example_is_a_batch_too(name):
    p = problem(name)
    single = tuple(t[:1] for t in p.train)
    lib = Problem(p.model, p.task, single)
    torch.testing.assert_close(dense(p, lib.loss_gradients(single))[:, 0], p.loss_gradients()[:1], **TIGHT)
    for count in (2, len(p.queries[0])):  # more than the layout was verified on
        asked = lib.measurement_gradients(tuple(t[:count] for t in p.queries))
        torch.testing.assert_close(dense(p, asked)[:, 0], p.measurement_gradients()[:count], **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_which_parameters_take_the_slow_path(name):
    p = problem(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layout = library(p).layout
    slow = {parameter for block in layout.slow for parameter in block.shapes}
    assert slow == SLOW.get(name, set())
    said = [str(w.message) for w in caught if issubclass(w.category, AttributionWarning)]
    assert len(said) == bool(slow)
    assert all(parameter in said[0] for parameter in sorted(slow)[:1])
    assert {q for block in layout.blocks for q in block.shapes} == set(p.shapes)


@pytest.mark.parametrize("order", ["chosen", "outer", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_contractions_equal_dense_ones(name, order, monkeypatch):
    p = problem(name)
    if order != "chosen":
        monkeypatch.setattr(Factored, "_order", lambda self, Q: order)
        monkeypatch.setattr(factored, "CHUNK", 150)  # several tiles of examples and of right-hand sides
        monkeypatch.setattr(factored, "ROWS", 4)
    rng = torch.Generator().manual_seed(1)
    for R in (1, 3):
        g, truth = rows_of(p, R)
        torch.testing.assert_close(dense(p, g), truth, **TIGHT)
        for some, wanted in ((g, truth), (g.compact(), truth), (g[2:5], truth[2:5])):
            n = len(some)
            for Q in (1, 5):
                v = torch.randn(Q, p.dim, generator=rng, dtype=torch.float64)
                w = torch.randn(Q, n, R, generator=rng, dtype=torch.float64)
                expected = torch.einsum("qd,nrd->qnr", v, wanted)
                directions = Directions.from_parameters(some.blocks, p.unflatten(v))
                torch.testing.assert_close(some.dot(directions), expected, **TIGHT)
                by_block = some.dot_by_block(directions)
                torch.testing.assert_close(sum(by_block.values()), expected, **TIGHT)
                expected = torch.einsum("qnr,nrd->qd", w, wanted)
                torch.testing.assert_close(p.flatten(some.combine(w).to_parameters()), expected, **TIGHT)
                apart = {k: t for b in some.blocks for k, t in b.unpack(some.rows[b.name].combine(w)).items()}
                torch.testing.assert_close(p.flatten(apart), expected, **TIGHT)
                weighted = dataclasses.replace(some, weights=torch.rand(n, R, generator=rng, dtype=torch.float64))
                expected = torch.einsum("qd,nrd,nr,nre->qe", v, wanted, weighted.weights / 11, wanted)
                product = p.flatten(weighted.product(directions, 11).to_parameters())
                torch.testing.assert_close(product, expected, **TIGHT)
            torch.testing.assert_close(some.square_norms(), wanted.square().sum(2), **TIGHT)
            torch.testing.assert_close(some.gram(g), torch.einsum("nrd,msd->nrms", wanted, truth), **TIGHT)
            torch.testing.assert_close(g.gram(some), torch.einsum("nrd,msd->nrms", truth, wanted), **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_scaled_norms_and_grams(name):
    """``by`` scales each block, as the inverse of a damping of its own does."""
    p = problem(name)
    g, truth = rows_of(p, 2)
    by = {block.name: 0.5 + i for i, block in enumerate(g.blocks)}
    scales = torch.cat([torch.full((p.shapes[q].numel(),), by[b]) for q in p.shapes for b in [owner(g, q)]]).double()
    torch.testing.assert_close(g.square_norms(by), (truth.square() * scales).sum(2), **TIGHT)
    torch.testing.assert_close(g.gram(g, by), torch.einsum("nrd,msd->nrms", truth * scales, truth), **TIGHT)


def owner(g: gradients.Gradients, parameter: str) -> str:
    return next(block.name for block in g.blocks if parameter in block.shapes)


@pytest.mark.parametrize("name", NAMES)
def test_examples_can_be_picked_and_joined(name):
    p = problem(name)
    g, truth = rows_of(p, 3)
    g.weights.copy_(torch.arange(p.n * 3).view(p.n, 3))
    index, r = torch.tensor([4, 0, 4]), torch.tensor([2, 0, 1])
    picked = g.pick(index, r)
    torch.testing.assert_close(dense(p, picked)[:, 0], truth[index, r], **TIGHT)
    assert torch.equal(picked.weights[:, 0], g.weights[index, r])
    assert torch.equal(g[index].weights, g.weights[index])
    torch.testing.assert_close(dense(p, g[index]), truth[index], **TIGHT)
    joined = gradients.concatenate([g[:2], g[2:3], g[3:]])
    assert torch.equal(joined.weights, g.weights)
    torch.testing.assert_close(dense(p, joined), truth, **TIGHT)
    mixed = gradients.concatenate([g[:2].compact(), g[2:]])  # whatever form each piece is in
    torch.testing.assert_close(dense(p, mixed), truth, **TIGHT)


@pytest.mark.parametrize("name", ["masked_sequence", "masked_sequence_left", "tied_embedding"])
def test_pieces_of_different_lengths_can_be_joined(name):
    """Batches padded to their own longest example, some of them better written out than factored."""
    p = problem(name)
    lib = library(p)
    longer = tuple(torch.cat([t, torch.full((p.n, 40), fill)], 1) for t, fill in zip(p.train, (0, -100), strict=True))
    pieces = [lib.loss_gradients(tuple(t[:4] for t in p.train)), lib.loss_gradients(tuple(t[4:] for t in longer))]
    for some in (pieces, [piece.compact() for piece in pieces], pieces[::-1]):
        expected = p.loss_gradients() if some[0] is not pieces[1] else p.loss_gradients().roll(-4, 0)
        joined = gradients.concatenate(some)
        torch.testing.assert_close(dense(p, joined)[:, 0], expected, **TIGHT)
        torch.testing.assert_close(joined.gram(joined)[:, 0, :, 0], expected @ expected.T, **TIGHT)


def test_each_order_of_a_contraction_is_chosen_where_it_is_cheapest(monkeypatch):
    chosen = set()
    for T, O, I, Q, R in ((1, 9, 9, 1, 1), (1, 9, 9, 40, 1), (30, 2, 90, 3, 2), (1, 90, 2, 1, 1), (50, 4, 4, 40, 1)):
        rng = torch.Generator().manual_seed(T)
        rows = Factored(
            torch.randn(2, 5, T, I, generator=rng, dtype=torch.float64),
            torch.randn(2, 5, R, T, O, generator=rng, dtype=torch.float64),
        )
        dense_rows = torch.einsum("gnrto,gnti->nrgoi", rows.g, rows.a)
        v = torch.randn(Q, 2, O, I, generator=rng, dtype=torch.float64)
        w = torch.randn(Q, 5, R, generator=rng, dtype=torch.float64)
        for move in (0.0, 32.0, 1e9):
            monkeypatch.setattr(factored, "MEMORY_COST", move)
            chosen.add(rows._order(Q))
            torch.testing.assert_close(rows.dot(v), torch.einsum("qgoi,nrgoi->qnr", v, dense_rows), **TIGHT)
            torch.testing.assert_close(rows.combine(w), torch.einsum("qnr,nrgoi->qgoi", w, dense_rows), **TIGHT)
            gram = torch.einsum("nrgoi,msgoi->nrms", dense_rows, dense_rows)
            torch.testing.assert_close(rows.gram(rows), gram, **TIGHT)
            torch.testing.assert_close(rows.square_norms(), dense_rows.square().sum((2, 3, 4)), **TIGHT)
    assert chosen == {"outer", "left", "right"}


@pytest.mark.parametrize("name", NAMES)
def test_pack_and_unpack_are_inverse(name):
    p = problem(name)
    v = torch.arange(2.0 * p.dim, dtype=torch.float64).view(2, p.dim)
    blocks = library(p).blocks
    back = {}
    for block in blocks:
        packed = block.pack(p.unflatten(v))
        assert packed.shape == (2, *block.sides)
        back |= block.unpack(packed)
    assert torch.equal(p.flatten(back), v)
    directions = Directions.from_parameters(blocks, p.unflatten(v))
    assert torch.equal(p.flatten(directions.to_parameters()), v)
    again = Directions.unflatten(blocks, directions.flatten())
    assert torch.equal(p.flatten(again.to_parameters()), v)


# --- the model comes back as it was ---


def traces(model: nn.Module) -> list:
    return [
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        [(name, t.requires_grad, t.grad is None, t.clone()) for name, t in model.named_parameters()],
        [(name, t.clone()) for name, t in model.named_buffers()],
        torch.backends.mha.get_fastpath_enabled(),
    ]


def unchanged(before: list, after: list) -> bool:
    return str(before) == str(after)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_comes_back_as_it_was(name):
    p = problem(name)
    first = next(p.model.children(), p.model)
    p.model.train()
    first.eval()
    before = traces(p.model)
    lib = library(p)
    lib.loss_gradients(lib.batch(range(p.n)))
    assert unchanged(before, traces(p.model))


class Broken(Classification):
    def loss(self, outputs, batch):
        raise RuntimeError("broken loss")


def test_the_model_comes_back_after_an_error_in_the_loss():
    p = problem("mlp")
    p.model.train()
    before = traces(p.model)
    lib = Problem(p.model, Broken(), p.train)
    with pytest.raises(InputError, match="task.loss failed on a batch of shapes .* broken loss"):
        lib.loss_gradients(lib.batch(range(3)))
    assert unchanged(before, traces(p.model))


def test_the_model_comes_back_after_an_error_in_the_model():
    p = problem("mlp")
    before = traces(p.model)
    lib = library(p)
    with pytest.raises(InputError, match="the model failed on a batch of shapes"):
        lib.loss_gradients((torch.zeros(2, 9, dtype=torch.float64), torch.zeros(2, dtype=torch.long)))
    assert unchanged(before, traces(p.model))


def test_it_works_where_gradients_are_switched_off():
    p = problem("mlp")
    with torch.no_grad():
        lib = library(p)
        torch.testing.assert_close(dense(p, lib.loss_gradients(p.train))[:, 0], p.loss_gradients(), **TIGHT)
        assert not torch.is_grad_enabled()


# --- modules of no registered type ---


class Scale(nn.Module):
    """An RMSNorm of its own kind: y = (1 + w) x / |x|, and a shift by another name."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(0.3 * torch.randn(d)), nn.Parameter(0.3 * torch.randn(d))

    def forward(self, scale, x):
        return scale * (1 + self.weight) * x / x.norm(dim=-1, keepdim=True) + self.shift


class Router(nn.Module):
    """A matrix given to F.linear; the output is no tensor."""

    def __init__(self, d: int, choices: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(choices, d)), nn.Parameter(torch.randn(choices))

    def forward(self, x):
        return {"logits": nn.functional.linear(x, self.weight, self.bias)}


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 1.7 * super().forward(ids)


class Recognised(nn.Module):
    """The above, and tied to each other; a layer that is checkpointed; one whose call does not reach the outputs."""

    def __init__(self, vocabulary: int = 6, d: int = 5, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed, self.norm, self.router = ScaledEmbedding(vocabulary, d), Scale(d), Router(d, d)
        self.enter, self.head = nn.Linear(d, d), nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def body(self, x):
        self.enter(x.new_ones(7, x.shape[-1]))  # not the examples
        return self.enter(self.norm(x=self.router(x)["logits"], scale=0.6).tanh())

    def forward(self, ids):
        x = self.embed(ids)
        if self.checkpointed:
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


def autograd_rows(model: nn.Module, lib: Problem, train) -> dict[str, torch.Tensor]:
    rows = {name: [] for name in lib.shapes}
    for i in range(len(train[0])):
        single = tuple(t[i : i + 1] for t in train)
        loss = lib.task.loss(model(single[0]), single).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(rows, grads, strict=True):
            rows[name].append(grad)
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_modules_of_no_registered_type_are_recognised(checkpointed):
    torch.manual_seed(0)
    model = Recognised(checkpointed=checkpointed).double()
    train = torch.randint(6, (7, 4)), torch.randint(6, (7, 4))
    lib = Problem(model, Classification(), train)
    assert not lib.layout.slow
    assert {b.name for b in lib.blocks} == {"embed.weight", "norm.weight", "norm.shift", "router", "enter"}
    found, truth = lib.loss_gradients(train).dense().to_parameters(), autograd_rows(model, lib, train)
    for name, rows in truth.items():
        torch.testing.assert_close(found[name], rows, **TIGHT)


class Padded(nn.Module):
    """What it puts out at padding depends on the other examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 5), nn.Linear(5, 6)

    def forward(self, ids):
        y = self.head(self.embed(ids))
        return y + (ids == 0).unsqueeze(-1) * y.sum(0, keepdim=True)


def test_what_a_model_puts_out_at_padding_is_no_reason_for_the_slow_path():
    torch.manual_seed(0)
    ids = torch.randint(6, (7, 4))
    train = ids, torch.randint(6, (7, 4)).where(ids != 0, -100)
    lib = Problem(model := Padded().double(), Classification(), train)
    assert not lib.layout.slow
    found, truth = lib.loss_gradients(train).dense().to_parameters(), autograd_rows(model, lib, train)
    for name, rows in truth.items():
        torch.testing.assert_close(found[name], rows, **TIGHT)


class Looking(nn.Module):
    """It looks at its data, which vmap does not allow, and has a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x):
        y = torch.einsum("bi,cij,bj->bc", x, self.form, x)
        return y if (y > 0).any() else 2 * y


def test_the_slow_path_takes_models_that_vmap_does_not():
    torch.manual_seed(0)
    train = torch.randn(5, 5, dtype=torch.float64), torch.arange(5) % 3
    lib = Problem(model := Looking().double(), Classification(), train)
    c = torch.randn(2, 5, 3, dtype=torch.float64)
    found = lib.gradients(train, lambda *_: c).dense().to_parameters()["form"].view(5, 2, 3, 5, 5)
    for i in range(5):
        for r in range(2):
            (row,) = torch.autograd.grad((model(train[0][i : i + 1]) * c[r, i]).sum(), model.form)
            torch.testing.assert_close(found[i, r], row, **TIGHT)


class Routed(nn.Module):
    """A linear layer that only some examples go through; what it sees is not the batch, or is."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.whole = whole

    def forward(self, x):
        some = x[:, 0] > 0
        if not some.any():
            return self.second(x)
        if self.whole:
            return self.second(x + some.unsqueeze(1) * self.first(x))
        order = some.long().argsort(descending=True)
        return self.second(x.index_add(0, order, some[order].unsqueeze(1) * self.first(x[order])))


@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_that_the_first_examples_do_not_use_is_verified_where_it_is_used(whole):
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0, -1, -1, -1, -1, 1, 1, -1])
    train = x, torch.arange(8) % 3
    lib = Problem(model := Routed(whole).double(), Classification(), train)
    assert not lib.layout.slow
    lib.loss_gradients(tuple(t[:5] for t in train))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = lib.loss_gradients(train).dense().to_parameters()
    assert [str(w.message)[:6] for w in said] == ([] if whole else ["first:"])
    torch.testing.assert_close(found["first.weight"], autograd_rows(model, lib, train)["first.weight"], **TIGHT)


# --- models that ask for care ---


class Scalar(nn.Module):
    """A regression whose output has no axis of its own: (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()

    def forward(self, x):
        return self.linear(x).squeeze(-1)


def test_outputs_without_an_axis_of_their_own():
    x, y = problem("mlp_regression_scalar").train
    model = Scalar()
    lib = Problem(model, Regression(), (x, y))
    found = lib.loss_gradients((x, y)).dense().to_parameters()
    residual = 2 * (model(x) - y).detach()
    torch.testing.assert_close(found["linear.weight"][:, 0], residual[:, None] * x, **TIGHT)
    torch.testing.assert_close(found["linear.bias"][:, 0], residual, **TIGHT)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_is_never_called_has_zero_gradients():
    p = problem("mlp")
    lib = Problem(Unused().double(), p.task, p.train)
    found = lib.loss_gradients(p.train).dense().to_parameters()
    assert found["used.weight"].abs().max() > 0
    assert found["unused.weight"].shape == (p.n, 4, 5)
    assert found["unused.weight"].abs().max() == 0 and found["unused.bias"].abs().max() == 0


class Discarded(Unused):
    def forward(self, x):
        self.unused(x)
        return self.used(x)


def test_a_layer_whose_output_is_not_used_has_zero_gradients():
    p = problem("mlp")
    lib = Problem(Discarded().double(), p.task, p.train)
    c = torch.randn(3, p.n, 4, dtype=torch.float64)
    junk = [torch.full((p.n, 3, 4), float("nan"), dtype=torch.float64) for _ in range(20)]
    del junk  # memory that is not zero
    found = lib.gradients(p.train, lambda *_: c).dense().to_parameters()
    torch.testing.assert_close(found["used.bias"], c.transpose(0, 1).reshape(-1, 4), **TIGHT)
    assert found["unused.weight"].abs().max() == 0 and found["unused.bias"].abs().max() == 0


def test_rows_are_written_out_beforehand_where_that_serves_both_contractions(monkeypatch):
    """A convolution with many positions: for many right-hand sides its rows are summed over positions once."""
    p = problem("cnn_groups")
    g, truth = rows_of(p, 3)
    v = torch.randn(60, p.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.einsum("qd,nrd,nre->qe", v, truth, truth)
    monkeypatch.setattr(factored, "MEMORY_COST", 0.0)
    written = []
    made = Factored.written
    monkeypatch.setattr(Factored, "written", lambda self: written.append(self.sizes) or made(self))
    product = g.product(Directions.from_parameters(g.blocks, p.unflatten(v)), 1)
    torch.testing.assert_close(p.flatten(product.to_parameters()), expected, **TIGHT)
    spacious = {r.sizes for r in g.rows.values() if isinstance(r, Factored) and r.sizes[3] > 1}
    assert set(written) & spacious, "no convolution was written out"
    assert len(written) == len(set(written)), "rows were written out twice"


def test_coverage_says_what_is_attributed_and_what_is_not():
    p = problem("frozen")
    trainable = sum(t.numel() for t in p.model.parameters() if t.requires_grad)
    text = library(p).coverage()
    assert f"{trainable} of {trainable} trainable parameters (100.0%)" in text
    assert "4 frozen parameters" in text and "left out" not in text
    text = library(p, parameters=r"6\.").coverage()
    assert f"24 of {trainable} trainable parameters ({24 / trainable:.1%})" in text
    assert "left out by the selection: 2.bias, 4.weight" in text


def test_float32_is_as_good_as_float32_can_be():
    p = problem("mlp")
    lib = Problem(p.model.float(), p.task, (p.train[0].float(), p.train[1]))
    found = dense(p, lib.loss_gradients(lib.batch(range(p.n))))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0].double(), p.loss_gradients(), rtol=1e-4, atol=1e-5)
