"""Products of every curvature with dense matrices; data cut, permuted, padded or drawn in other ways."""

import dataclasses
import gc

import pytest
import torch
from torch.utils.data import DataLoader

import solving
from problems import IGNORE, NAMES, PAD, TinyProblem, problem
from solving import library, right_hand_sides
from wherefrom import GGN, Classification, EmpiricalFisher, Hessian, InputError, Problem, Task, UnsupportedError
from wherefrom.persample import vectors


def close(found, wanted, tolerance: float = 1e-10) -> None:
    solving.close(found, wanted, tolerance)


pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
KINDS = {
    "auto": (GGN, TinyProblem.ggn, 1e-10),
    "rows": (lambda lib: GGN(lib, "rows"), TinyProblem.ggn, 1e-10),
    "jvp": (lambda lib: GGN(lib, "jvp"), TinyProblem.ggn, 1e-10),
    "finite-difference": (lambda lib: GGN(lib, "finite-difference"), TinyProblem.ggn, 1e-6),
    "hessian": (Hessian, TinyProblem.hessian, 1e-10),
    "empirical": (EmpiricalFisher, TinyProblem.empirical_fisher, 1e-10),
}
SOME = ("mlp", "mlp_regression", "masked_sequence", "tied_embedding", "odd_parameters", "cnn_groups")


def product(p: TinyProblem, curvature, v: torch.Tensor, index=None) -> torch.Tensor:
    return p.flatten(solving.product(curvature, p.unflatten(v), index))


def part(p: TinyProblem, index: torch.Tensor) -> TinyProblem:
    """The problem with these training examples only."""
    return dataclasses.replace(p, train=tuple(t[index] for t in p.train), cache={})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_products_equal_dense_ones(name, kind):
    make, dense, tolerance = KINDS[kind]
    p = problem(name)
    curvature = make(library(p, batch_size=4))
    v = right_hand_sides(p, 3)
    close(product(p, curvature, v), v @ dense(p), tolerance)
    close(product(p, curvature, v[1:2]), v[1:2] @ dense(p), tolerance)  # from what the first pass may have kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_a_minibatch_is_the_dense_matrix_of_its_examples(name, kind):
    make, dense, tolerance = KINDS[kind]
    p = problem(name)
    index = torch.tensor([5, 0, 5, 6, 2])  # one of them twice
    curvature, v = make(library(p, batch_size=3)), right_hand_sides(p, 2)
    wanted = v @ dense(part(p, index))
    close(product(p, curvature, v, index), wanted, tolerance)
    product(p, curvature, v)
    close(product(p, curvature, v, index), wanted, tolerance)  # from cached rows, where there are any


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_draws_examples_uniformly_and_means_over_them(kind):
    """It is the product over the generator's numbers, and the mean of all one-example products is the whole."""
    make, _, tolerance = KINDS[kind]
    p = problem("mlp")
    curvature, v = make(library(p)), right_hand_sides(p, 2)
    drawn = torch.Generator().manual_seed(7)
    operator = curvature.operator(torch.Generator().manual_seed(7), batch_size=5)
    for _ in range(3):  # fresh examples at every call
        index = torch.randint(p.n, (5,), generator=drawn)
        found = operator(solving.directions(curvature, p.unflatten(v)))
        close(p.flatten(found.to_parameters()), product(p, curvature, v, index), 1e-10)
    single = [product(p, curvature, v, torch.tensor([i])) for i in range(p.n)]
    close(torch.stack(single).mean(0), product(p, curvature, v), tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_how_the_work_is_cut_changes_nothing(name, kind):
    make, _, tolerance = KINDS[kind]
    p = problem(name)
    v = right_hand_sides(p, 3)
    whole = product(p, make(library(p)), v)
    for options in ({"batch_size": 4}, {"batch_size": 3, "memory": 1.0}):
        curvature = make(library(p, **options))
        together = product(p, curvature, v)
        close(together, whole)
        close(torch.cat([product(p, curvature, one) for one in v.split(1)]), together)
    order = torch.randperm(p.n, generator=torch.Generator().manual_seed(0))
    close(product(p, make(library(p, tuple(t[order] for t in p.train), batch_size=4)), v), whole)


@pytest.mark.parametrize("name", SOME)
def test_rows_are_kept_when_they_fit_and_streamed_when_not(name):
    p = problem(name)
    calls = {}
    for memory in (1.0, 2.0**31):
        curvature = GGN(library(p, batch_size=4, memory=memory), "rows")
        seen = []
        made = curvature.rows
        curvature.rows = lambda batch, made=made, seen=seen: seen.append(1) or made(batch)
        v = right_hand_sides(p, 2)
        for _ in range(3):
            close(product(p, curvature, v), v @ p.ggn())
        calls[memory] = len(seen)
    batches = -(-p.n // 4)
    assert calls == {1.0: 3 * batches, 2.0**31: batches}


@pytest.mark.parametrize("kind", ["rows", "empirical"])
@pytest.mark.parametrize("name", SOME)
def test_weighted_rows_make_up_the_matrix(name, kind):
    make, dense, _ = KINDS[kind]
    p = problem(name)
    total = torch.zeros(p.dim, p.dim, dtype=torch.float64)
    for rows in make(library(p, batch_size=4, memory=1.0)).gradients():
        b = p.flatten(rows.dense().to_parameters())
        total += (b * rows.weights.reshape(-1, 1)).T @ b / p.n
    close(total, dense(p))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_eigenvalues_are_traces_over_dimensions(kind):
    make, dense, _ = KINDS[kind]
    p = problem("mlp")
    curvature = make(library(p))
    diagonal = dense(p).diagonal()
    means = curvature.mean_eigenvalues()
    for layer in ("0", "2", "4"):
        mean = torch.cat([diagonal[p.slices[f"{layer}.{part}"]] for part in ("weight", "bias")]).mean()
        assert means[layer] == pytest.approx(float(mean), rel=1e-10 if kind in ("rows", "empirical") else 0.5)


def test_mean_eigenvalues_need_no_row_per_output_where_there_are_many():
    """A language model has tens of thousands of outputs an example; a trace must not cost a backward pass for each."""
    p = problem("masked_sequence")
    curvature = GGN(library(p), "jvp")
    curvature.rows = lambda batch: pytest.fail("one backward pass for every output")  # type: ignore[method-assign]
    means = curvature.mean_eigenvalues()
    trace = sum(means[block.name] * block.size for block in curvature.problem.blocks)
    assert trace == pytest.approx(float(p.ggn().trace()), rel=0.3)


def test_drawn_labels_give_the_mean_eigenvalue_of_every_block(monkeypatch):
    monkeypatch.setattr("wherefrom.curvature.ggn.DRAWS", 400)
    p = problem("masked_sequence")
    curvature, diagonal = GGN(library(p), "jvp"), p.ggn().diagonal()
    monkeypatch.setattr(curvature, "product", lambda v: pytest.fail("a product for every probe"))
    means = curvature.mean_eigenvalues()
    for block in curvature.problem.blocks:
        trace = sum(float(diagonal[p.slices[name]].sum()) for name in block.shapes)
        assert means[block.name] * block.size == pytest.approx(trace, rel=0.1)


# --- padding ---


def padded(data, more: int = 3):
    tokens, labels = data
    fill = [torch.full((len(t), more), value) for t, value in ((tokens, PAD), (labels, IGNORE))]
    return torch.cat([tokens, fill[0]], 1), torch.cat([labels, fill[1]], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["masked_sequence", "masked_sequence_left", "tied_embedding"])
def test_more_padding_changes_nothing(name, kind):
    make, dense, tolerance = KINDS[kind]
    p = problem(name)
    v = right_hand_sides(p, 2)
    curvature = make(library(p, padded(p.train), batch_size=4))
    close(product(p, curvature, v), v @ dense(p), tolerance)


class Texts(torch.utils.data.Dataset):
    """Examples without their right padding, as a user has them."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, i):
        tokens, labels = (t[i] for t in self.data)
        length = max(2, int((tokens != PAD).sum()))
        return tokens[:length], labels[:length]


def collate(items):
    """Pads to the longest example of the batch."""
    width = max(len(tokens) for tokens, _ in items)
    return tuple(
        torch.stack([torch.nn.functional.pad(item[k], (0, width - len(item[k])), value=value) for item in items])
        for k, value in ((0, PAD), (1, IGNORE))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["masked_sequence", "tied_embedding"])
def test_batches_padded_to_their_own_length(name, kind):
    make, dense, tolerance = KINDS[kind]
    p = problem(name)
    v = right_hand_sides(p, 2)
    for size in (1, 2, 4):
        curvature = make(library(p, DataLoader(Texts(p.train), batch_size=size, collate_fn=collate)))
        for _ in range(2):  # streamed, then from what was kept
            close(product(p, curvature, v), v @ dense(p), tolerance)
    index = torch.tensor([3, 0, 2, 2])
    close(product(p, curvature, v, index), v @ dense(part(p, index)), tolerance)


# --- what is not positive, and what is refused ---


class Signed(Task):
    """A quadratic loss that is concave in the outputs for half of the examples."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        signs = 1.0 - 2.0 * (batch[1] % 2)
        return signs * outputs.square().sum(1) + outputs.sum(1)


def test_a_loss_that_is_not_convex_is_not_called_positive():
    p = problem("mlp")
    curvature = GGN(Problem(p.model, Signed(), p.train), "rows")
    assert GGN(library(p)).psd and GGN(library(p)).operator().psd
    operator = curvature.operator()
    found = product(p, curvature, torch.eye(p.dim, dtype=torch.float64))
    signs = 2 * (1.0 - 2.0 * (p.train[1] % 2)).double()
    close(found, torch.einsum("n,nkd,nke->de", signs, p.jacobian(), p.jacobian()) / p.n)
    assert float(torch.linalg.eigvalsh(found)[0]) < -0.01
    assert not curvature.psd
    assert not curvature.operator().psd
    assert not operator.psd, "an operator made before the first pass must learn of it"


def test_the_hessian_is_never_called_positive_and_has_no_rows():
    curvature = Hessian(library(problem("mlp")))
    assert not curvature.psd and not curvature.operator().psd
    with pytest.raises(UnsupportedError, match="Hessian is not a sum over per-example rows. Use GGN"):
        next(iter(curvature.gradients()))


def test_an_unknown_product_is_refused():
    with pytest.raises(InputError, match="product must be 'auto'.*got 'dense'"):
        GGN(library(problem("mlp")), "dense")  # type: ignore[arg-type]


def test_many_outputs_take_the_product_without_rows(monkeypatch):
    p = problem("mlp")
    v = right_hand_sides(p, 2)
    from wherefrom.curvature import ggn

    monkeypatch.setattr(ggn, "LIMIT", 3)  # the problem has 4 outputs
    curvature = GGN(library(p))
    monkeypatch.setattr(curvature, "rows", lambda batch: pytest.fail("rows"))
    close(product(p, curvature, v), v @ p.ggn())


def forbid(monkeypatch, curvature, *methods):
    for method in methods:
        monkeypatch.setattr(curvature, method, lambda *_, method=method: pytest.fail(method))


@pytest.mark.parametrize("name", ["mlp", "cnn_groups"])
def test_a_minibatch_takes_jvp_for_few_right_hand_sides_and_rows_for_many(name, monkeypatch):
    p = problem(name)
    index = torch.tensor([5, 0, 5, 6, 2])
    K = p.outputs()[0].numel()
    wanted = part(p, index).ggn()
    for Q, never in ((1, "rows"), (K // 2, "rows"), (K // 2 + 1, "_by_jvp"), (5 * K, "_by_jvp")):
        curvature, v = GGN(library(p, batch_size=3)), right_hand_sides(p, Q)
        with monkeypatch.context() as patch:
            forbid(patch, curvature, never)
            close(product(p, curvature, v, index), v @ wanted)


def test_rows_that_last_are_made_and_used_for_any_number_of_right_hand_sides(monkeypatch):
    p = problem("mlp")
    curvature, v, index = GGN(library(p, batch_size=4)), right_hand_sides(p, 1), torch.tensor([5, 0, 5])
    forbid(monkeypatch, curvature, "_by_jvp")
    close(product(p, curvature, v), v @ p.ggn())
    forbid(monkeypatch, curvature, "rows")
    close(product(p, curvature, v, index), v @ part(p, index).ggn())
    close(product(p, curvature, v), v @ p.ggn())


def test_rows_that_do_not_fit_are_not_made_again_for_few_right_hand_sides(monkeypatch):
    p = problem("mlp")
    curvature, v = GGN(library(p, batch_size=4, memory=1.0)), right_hand_sides(p, 1)
    close(product(p, curvature, v), v @ p.ggn())
    forbid(monkeypatch, curvature, "rows")
    close(product(p, curvature, v), v @ p.ggn())


class Backward(torch.autograd.Function):
    """tanh with a backward pass and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)


class Tanh(torch.nn.Module):
    def __init__(self, own: bool):
        super().__init__()
        self.first, self.last, self.own = torch.nn.Linear(5, 6).double(), torch.nn.Linear(6, 4).double(), own

    def forward(self, x):
        h = self.first(x)
        return self.last(Backward.apply(h) if self.own else h.tanh())


def test_a_model_without_forward_mode_takes_rows(monkeypatch):
    p = problem("mlp")
    usual = Tanh(own=False)
    model = Tanh(own=True)
    model.load_state_dict(usual.state_dict())
    curvature, index = GGN(Problem(model, p.task, p.train)), torch.tensor([5, 0, 2])
    v = {name: torch.randn(1, *t.shape, dtype=torch.float64) for name, t in usual.named_parameters()}
    wanted = solving.product(GGN(Problem(usual, p.task, p.train), "jvp"), v, index)
    tried = []
    by_jvp = curvature._by_jvp
    monkeypatch.setattr(curvature, "_by_jvp", lambda *args: tried.append(1) or by_jvp(*args))
    for _ in range(2):
        close(vectors.flatten(solving.product(curvature, v, index)), vectors.flatten(wanted))
    assert len(tried) == 1


def test_a_task_that_fails_says_so_for_few_right_hand_sides_too():
    p = problem("mlp")
    curvature = GGN(library(p, (p.train[0][:, :-1], p.train[1])))
    with pytest.raises(InputError, match="the model failed on a batch of shapes"):
        product(p, curvature, right_hand_sides(p, 1), torch.tensor([0, 1]))


def test_a_loss_that_is_not_convex_is_found_out_from_one_minibatch():
    p = problem("mlp")
    curvature = GGN(Problem(p.model, Signed(), p.train))
    assert curvature.psd
    product(p, curvature, right_hand_sides(p, 1), torch.arange(p.n))
    assert not curvature.psd


def test_a_zero_right_hand_side_has_a_zero_product():
    p = problem("mlp")
    v = torch.cat([torch.zeros(1, p.dim, dtype=torch.float64), right_hand_sides(p, 1)])
    for make, dense, tolerance in KINDS.values():
        found = product(p, make(library(p)), v)
        assert found[0].abs().max() == 0
        close(found, v @ dense(p), tolerance)


class Scalar(torch.nn.Module):
    """A regression whose output has no axis of its own: (B,)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).squeeze(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_without_an_axis_of_their_own(kind):
    make, dense, tolerance = KINDS[kind]
    p = problem("mlp_regression_scalar")
    v = right_hand_sides(p, 2)
    curvature = make(Problem(Scalar(p.model), p.task, p.train, batch_size=4))
    found = solving.product(curvature, {f"model.{name}": t for name, t in p.unflatten(v).items()})
    close(p.flatten({name.removeprefix("model."): t for name, t in found.items()}), v @ dense(p), tolerance)


@pytest.mark.parametrize("memory", [1.0, 3e5, 2.0**31])
def test_right_hand_sides_that_do_not_fit_together_go_in_groups(memory):
    p = problem("masked_sequence")
    v = right_hand_sides(p, 7)
    for kind in ("jvp", "hessian"):
        make, dense, tolerance = KINDS[kind]
        close(product(p, make(library(p, memory=memory)), v), v @ dense(p), tolerance)


def test_float32_products_are_as_good_as_float32_can_be():
    p = problem("mlp")
    lib = Problem(p.model.float(), Classification(), (p.train[0].float(), p.train[1]))
    v = right_hand_sides(p, 2)
    for kind, tolerance in (("rows", 1e-5), ("jvp", 1e-5), ("finite-difference", 1e-2), ("hessian", 1e-5)):
        make, dense, _ = KINDS[kind]
        found = solving.product(make(lib), {k: t.float() for k, t in p.unflatten(v).items()})
        assert vectors.flatten(found).dtype == torch.float32
        close(p.flatten(found).double(), v @ dense(p), tolerance)


def test_a_product_leaves_nothing_behind():
    def held() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    p = problem("masked_sequence")
    curvature, v = GGN(library(p), "jvp"), right_hand_sides(p, 3)
    product(p, curvature, v)
    before = held()
    product(p, curvature, v)
    assert held() <= before
