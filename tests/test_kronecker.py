"""What KFAC and EKFAC must fulfil exactly: traces, optimality, cases in which they are the Fisher itself."""

import pytest
import torch
from torch import nn

import solving
from problems import IGNORE, NAMES, PAD, TinyProblem, problem
from solving import library
from wherefrom import (
    EKFAC,
    GGN,
    KFAC,
    Classification,
    Damping,
    EmpiricalFisher,
    Hessian,
    InputError,
    Problem,
    Regression,
)
from wherefrom.curvature import kronecker
from wherefrom.methods.solution import _choose_bases
from wherefrom.persample import factored
from wherefrom.persample.directions import concatenate
from wherefrom.persample.eigenbasis import KroneckerBlock


def close(found, wanted, tolerance: float = 1e-10) -> None:
    solving.close(found, wanted, tolerance)


pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
SEQUENCES = ("masked_sequence", "masked_sequence_left", "tied_embedding", "positions")


def dense_blocks(p: TinyProblem, lib: Problem) -> dict[str, torch.Tensor]:
    """The empirical Fisher of each block, its coordinates in the order of the block's matrices: (P, P)."""
    gradients = p.unflatten(p.loss_gradients())
    rows = {block.name: block.pack(gradients).reshape(p.n, -1) for block in lib.blocks}
    return {name: r.T @ r / p.n for name, r in rows.items()}


def basis(block: KroneckerBlock) -> torch.Tensor:
    """The eigenvectors as columns: (P, P), in the order of `dense_blocks`."""
    sides = block.ekfac.shape
    eye = torch.eye(sides.numel(), dtype=torch.float64).view(-1, *sides)
    return block.to_eigenbasis(eye).reshape(len(eye), -1)  # row i: coordinates of e_i


def equal_factors(first: dict[str, KroneckerBlock], second: dict[str, KroneckerBlock], tolerance: float = 1e-9) -> None:
    """As matrices: eigenvectors are determined up to their signs only."""
    for name, block in first.items():
        for what in ("kfac", "ekfac"):
            matrices = []
            for b in (block, second[name]):
                Q = basis(b)
                matrices.append((Q * getattr(b, what).flatten()) @ Q.T)
            close(*matrices, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalues_are_the_diagonal_of_the_fisher_in_an_orthonormal_basis(name):
    p = problem(name)
    lib = library(p, batch_size=4)
    fisher = dense_blocks(p, lib)
    for block, f in kronecker.fit(lib, "true").items():
        Q = basis(f)
        close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64))
        close(f.ekfac.flatten(), (Q.T @ fisher[block] @ Q).diagonal())
        v = torch.randn(3, *f.ekfac.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        close(f.from_eigenbasis(f.to_eigenbasis(v)), v)


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_is_the_mean_squared_gradient_norm(name):
    p = problem(name)
    lib = library(p, batch_size=4)
    truth = p.unflatten(p.loss_gradients().square().mean(0, keepdim=True))
    for block, f in kronecker.fit(lib, "true").items():
        wanted = sum(float(truth[q].sum()) for b in lib.blocks if b.name == block for q in b.shapes)
        assert float(f.ekfac.sum()) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_with_sampled_labels_is_the_one_of_the_second_pass(name, monkeypatch):
    p = problem(name)
    lib = library(p, batch_size=4)
    drawn = []
    made = lib.sampled_gradients
    monkeypatch.setitem(vars(lib), "sampled_gradients", lambda *a: drawn.append(made(*a)) or drawn[-1])
    factors = kronecker.fit(lib, "sampled")
    second = drawn[len(drawn) // 2 :]
    assert sum(len(g) for g in second) == p.n
    for block, f in factors.items():
        total = sum(float(g.rows[block].square_norms().sum()) for g in second)
        assert float(f.ekfac.sum()) == pytest.approx(total / p.n, rel=1e-10)


def test_relative_damping_of_a_model_with_many_outputs_costs_no_product(monkeypatch):
    """Labels drawn from the model have the trace of Gauss-Newton: no probe is needed."""
    p = problem("masked_sequence")
    monkeypatch.setattr(GGN, "product", lambda *_: pytest.fail("a product with the curvature"))
    curvature = GGN(library(p), "jvp")
    inverse = EKFAC().fit(curvature, Damping.relative(0.1))
    assert inverse.damping == {name: pytest.approx(0.1 * m) for name, m in curvature.mean_eigenvalues().items()}


def test_a_restored_fit_takes_another_damping_without_another_pass(monkeypatch):
    p = problem("mlp")
    first, again = EKFAC().fit(GGN(library(p)), 0.1), GGN(library(p))
    EKFAC().share(solving.restore(first, again))
    monkeypatch.setattr(kronecker, "fit", lambda *_: pytest.fail("the factors are there"))
    assert (EKFAC().fit(again, 0.2).factors["0"].ekfac == first.factors["0"].ekfac).all()


@pytest.mark.parametrize("name", NAMES)
def test_ekfac_is_the_best_diagonal_in_its_basis(name):
    p = problem(name)
    lib = library(p)
    fisher = dense_blocks(p, lib)
    better = 0.0
    for block, f in kronecker.fit(lib, "true").items():
        Q = basis(f)
        error = {}
        for what in ("kfac", "ekfac"):
            values = getattr(f, what).flatten()
            assert (values >= 0).all()
            error[what] = float((fisher[block] - (Q * values) @ Q.T).norm())
        assert error["ekfac"] <= error["kfac"] + 1e-10 * float(fisher[block].norm())
        better += error["kfac"] - error["ekfac"]
    assert better > 1e-3


def test_a_table_used_in_two_ways_keeps_its_trace():
    """Its rows are dense, one matrix an example, so that KFAC's eigenvalues have the Fisher's trace as well."""
    p = problem("tied_embedding")
    f = kronecker.fit(library(p, batch_size=4), "true")["embed.weight"]
    assert float(f.kfac.sum()) == pytest.approx(float(f.ekfac.sum()), rel=1e-9)


def test_kfac_is_the_kronecker_product_times_the_number_of_positions():
    """A linear layer on tokens, written out by hand: T S (x) A with means over examples and real positions."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(0, 6, (5, 3), generator=rng)
    y[0, 1:] = y[3, :2] = IGNORE
    model = nn.Linear(4, 6).double()
    factors = next(iter(kronecker.fit(Problem(model, Classification(), (x, y), batch_size=2), "true").values()))
    S, A, count = torch.zeros(6, 6).double(), torch.zeros(5, 5).double(), 0
    for i in range(5):
        for t in range(3):
            if y[i, t] != IGNORE:
                s = model(x[i, t]).softmax(0).detach() - torch.eye(6).double()[y[i, t]]
                a = torch.cat([x[i, t], torch.ones(1).double()])
                S, A, count = S + torch.outer(s, s), A + torch.outer(a, a), count + 1
    Q = basis(factors)
    found = (Q * factors.kfac.flatten()) @ Q.T
    close(found, count / 5 * torch.kron(S / count, A / count))


@pytest.mark.parametrize("solver", [KFAC(labels="true"), EKFAC(labels="true")])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_linear_regression_is_solved_exactly(solver, outputs):
    """Residuals sqrt(K / 2) e_k, once in each direction for each input, make the Fisher of the labels the GGN."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=rng, dtype=torch.float64).repeat_interleave(outputs, 0)
    model = nn.Linear(5, outputs).double()
    y = model(x).detach() - (outputs / 2) ** 0.5 * torch.eye(outputs, dtype=torch.float64).repeat(9, 1)
    lib = Problem(model, Regression(), (x, y))
    a = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    ggn = torch.kron(2 * torch.eye(outputs).double(), a.T @ a / len(x))
    b = torch.randn(4, outputs, 6, generator=rng, dtype=torch.float64)
    for damping in (1e-4 * float(ggn.diagonal().mean()), 0.3):
        inverse = solver.fit(GGN(lib), damping)
        solution = solving.solve(inverse, {"weight": b[..., :5], "bias": b[..., 5]})
        found = torch.cat([solution.x["weight"], solution.x["bias"].unsqueeze(-1)], 2).flatten(1)
        close(found.T, torch.linalg.solve(ggn + damping * torch.eye(len(ggn)).double(), b.flatten(1).T), 1e-8)
        assert solution.residual is not None and float(solution.residual.max()) < 1e-8


@pytest.mark.parametrize("solver", [KFAC(labels="true"), EKFAC(labels="true")])
def test_true_labels_on_one_example_give_the_exact_blocks(solver):
    p = problem("mlp")
    lib = library(p, tuple(t[:1] for t in p.train))
    g = p.unflatten(p.loss_gradients()[:1])
    b = torch.randn(3, p.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = solving.solve(solver.fit(GGN(lib), 0.01), p.unflatten(b), certify=False).x
    for block in lib.blocks:
        row, rhs, found = (block.pack(v).flatten(1) for v in (g, p.unflatten(b), x))
        matrix = row.T @ row + 0.01 * torch.eye(row.shape[1]).double()
        close(found.T, torch.linalg.solve(matrix, rhs.T), 1e-8)


# --- one layer seen as another ---


def solved(solver, model: nn.Module, task, data, right_hand_sides):
    return solving.solve(
        solver.fit(GGN(Problem(model, task, data, batch_size=4)), 0.05), right_hand_sides, certify=False
    ).x


@pytest.mark.parametrize("solver", [KFAC(labels="true"), EKFAC(labels="true"), KFAC(), EKFAC()])
def test_a_convolution_of_one_pixel_is_a_linear_layer(solver):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=rng, dtype=torch.float64), torch.randint(0, 4, (40,), generator=rng)
    linear, conv = nn.Linear(3, 4).double(), nn.Conv2d(3, 4, 1).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.view(4, 3, 1, 1))
        conv.bias.copy_(linear.bias)
    w, b = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    first = solved(solver, linear, Classification(), (x, y), {"weight": w, "bias": b})
    model = nn.Sequential(conv, nn.Flatten())
    rhs = {"0.weight": w.view(2, 4, 3, 1, 1), "0.bias": b}
    second = solved(solver, model, Classification(), (x.view(40, 3, 1, 1), y), rhs)
    close(second["0.weight"].view(2, 4, 3), first["weight"])
    close(second["0.bias"], first["bias"])


@pytest.mark.parametrize("solver", [KFAC(labels="true"), EKFAC(labels="true")])
@pytest.mark.parametrize("positions", [1, 3])
def test_an_embedding_is_a_linear_layer_on_one_hot_tokens(solver, positions):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (12, positions), generator=rng)
    y = torch.randn(12, positions, 3, generator=rng, dtype=torch.float64)
    embedding, linear = nn.Embedding(5, 3).double(), nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(embedding.weight.T)
    v = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
    first = solved(solver, embedding, Regression(), (tokens, y), {"weight": v})
    one_hot = nn.functional.one_hot(tokens, 5).double()
    second = solved(solver, linear, Regression(), (one_hot, y), {"weight": v.mT.contiguous()})
    close(second["weight"].mT, first["weight"])


class Split(nn.Module):
    """A grouped convolution written as separate ones."""

    def __init__(self, grouped: nn.Conv2d):
        super().__init__()
        out, into = grouped.out_channels // grouped.groups, grouped.in_channels // grouped.groups
        self.parts = nn.ModuleList(nn.Conv2d(into, out, grouped.kernel_size, padding=1) for _ in range(grouped.groups))
        for g, part in enumerate(self.parts):
            part.weight.data = grouped.weight.data[g * out : (g + 1) * out].clone()
            part.bias.data = grouped.bias.data[g * out : (g + 1) * out].clone()

    def forward(self, x):
        pieces = x.chunk(len(self.parts), 1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1)


@pytest.mark.parametrize("solver", [KFAC(labels="true"), EKFAC(labels="true")])
def test_groups_of_a_convolution_are_blocks_of_their_own(solver):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, 3, 3, generator=rng, dtype=torch.float64)
    grouped = nn.Conv2d(4, 6, 2, padding=1, groups=2).double()
    y = torch.randn(12, *grouped(x).shape[1:], generator=rng, dtype=torch.float64)
    split = Split(grouped)
    w = torch.randn(2, *grouped.weight.shape, generator=rng, dtype=torch.float64)
    b = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    first = solved(solver, grouped, Regression(), (x, y), {"weight": w, "bias": b})
    rhs = {}
    for g in range(2):
        rhs |= {f"parts.{g}.weight": w[:, 3 * g : 3 * g + 3], f"parts.{g}.bias": b[:, 3 * g : 3 * g + 3]}
    second = solved(solver, split, Regression(), (x, y), rhs)
    close(torch.cat([second[f"parts.{g}.weight"] for g in range(2)], 1), first["weight"])
    close(torch.cat([second[f"parts.{g}.bias"] for g in range(2)], 1), first["bias"])


# --- limits of width ---


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["mlp", "cnn_groups", "masked_sequence", "norms", "tied_embedding"])
def test_wide_sides_become_blocks_or_stay_diagonal(name, limit):
    p = problem(name)
    lib = library(p, batch_size=4)
    fisher = dense_blocks(p, lib)
    for block, f in kronecker.fit(lib, "true", limit=limit).items():
        for side in (f.left, f.right):
            assert all(q.shape[2] <= limit for q in side.pieces)
            width = sum(q.shape[1] for q in side.pieces)
            assert any(len(q) for q in side.pieces) or width > 8 * limit or "embed" in block or "position" in block
        Q = basis(f)
        close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64))
        close(f.ekfac.flatten(), (Q.T @ fisher[block] @ Q).diagonal())
        if limit == 1:
            close(f.ekfac.flatten(), fisher[block].diagonal())


def test_pieces_of_a_split_side_are_eigenvectors_of_its_diagonal_blocks():
    p = problem("mlp_no_bias")
    f = kronecker.fit(library(p), "true", limit=4)["0.weight"]  # 8 x 6: inputs in pieces of 4 and 2
    x = p.train[0]
    assert [tuple(q.shape) for q in f.right.pieces] == [(1, 4, 4), (1, 2, 2)]
    for q, part in zip(f.right.pieces, x.split([4, 2], 1), strict=True):
        rotated = q[0].T @ (part.T @ part / p.n) @ q[0]
        assert float((rotated - torch.diag(rotated.diagonal())).abs().max()) < 1e-12


# --- what must change nothing ---


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_batch_size_changes_nothing(name, labels):
    p = problem(name)
    whole = kronecker.fit(library(p), labels)
    for options in ({"batch_size": 3}, {"batch_size": 4, "memory": 1.0}):
        equal_factors(kronecker.fit(library(p, **options), labels), whole)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_labels_do_not_depend_on_the_batch_size(name):
    p = problem(name)
    drawn = []
    for size, seed in ((1, 3), (3, 3), (p.n, 3), (p.n, 5)):
        lib, rng = library(p, batch_size=size), torch.Generator().manual_seed(seed)
        outputs = p.outputs().split(size)
        labels = [lib.task.resample(h, b, rng)[1] for h, (_, b) in zip(outputs, lib.batches(), strict=True)]
        drawn.append(torch.cat(labels))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])


def test_the_seed_draws_the_labels():
    lib = library(problem("mlp"))
    first, again, other = (kronecker.fit(lib, "sampled", seed=s) for s in (1, 1, 2))
    equal_factors(first, again, 1e-12)
    assert float((first["0"].ekfac - other["0"].ekfac).norm()) > 1e-3


def padded(data, more: int = 3):
    tokens, labels = data
    fill = [torch.full((len(t), more), value) for t, value in ((tokens, PAD), (labels, IGNORE))]
    return torch.cat([tokens, fill[0]], 1), torch.cat([labels, fill[1]], 1)


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("name", ["masked_sequence", "masked_sequence_left", "tied_embedding"])
def test_more_padding_changes_nothing(name, labels):
    p = problem(name)
    equal_factors(kronecker.fit(library(p, padded(p.train)), labels), kronecker.fit(library(p), labels))


@pytest.mark.parametrize("chunk", [1, 50])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_work_change_nothing(name, chunk, monkeypatch):
    p = problem(name)
    whole = kronecker.fit(library(p), "true")
    monkeypatch.setattr(kronecker, "CHUNK", chunk)
    monkeypatch.setattr(factored, "CHUNK", chunk)
    for number in ("STRIPE", "LONG", "POSITIONS"):
        monkeypatch.setattr(kronecker, number, 1)
    equal_factors(kronecker.fit(library(p, batch_size=4), "true"), whole)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 5, 1), (3, 0, 1)])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("long", [1, 6])
def test_real_positions_are_each_taken_once(lengths, holes, long, monkeypatch):
    monkeypatch.setattr(kronecker, "LONG", long)
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    mask[0, 1] &= not holes
    x = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)
    found = [x[some].reshape(2, -1, 4) for some in kronecker._stretches(mask)]
    assert torch.equal(torch.cat(found, 1), x[:, mask])
    assert len(found) == (3 if long == 1 and not holes and min(lengths) < 5 else 1)


def test_rows_are_kept_for_the_second_pass_as_far_as_they_fit(monkeypatch):
    p = problem("masked_sequence")
    whole, passes = kronecker.fit(library(p), "true"), {}
    for batches in (0, 1, 2, 99):
        lib = library(p, batch_size=3)
        size = 8 * lib.loss_gradients(lib.batch(range(3))).numbers()
        vars(lib)["memory"] = 2 * (batches + 0.5) * size
        made, seen = lib.loss_gradients, []
        monkeypatch.setitem(vars(lib), "loss_gradients", lambda b, made=made, seen=seen: seen.append(b) or made(b))
        equal_factors(kronecker.fit(lib, "true"), whole)
        passes[batches] = len(seen)
    n = -(-p.n // 3)
    assert n > 2 and passes == {0: 2 * n, 1: 2 * n - 1, 2: 2 * n - 2, 99: n}


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_basis_that_they_are_made_in(name, monkeypatch):
    p = problem(name)
    lib = library(p)
    inverse = EKFAC(labels="true").fit(GGN(lib), 0.01)
    g = lib.loss_gradients(lib.batch(range(p.n)))
    wanted = g.dot(inverse.apply(g.dense()))[..., 0]
    both = []
    for turn, back in ((0, 1), (1, 0)):
        monkeypatch.setattr(KroneckerBlock, "rotation_costs", lambda *_, costs=(turn, back): costs)
        both.append(inverse.apply(g.to_directions().to_eigenbasis(_choose_bases(inverse, g))))
        assert set(both[-1].bases) == (set(inverse.factors) if back else set())
        close(g.dot(both[-1])[..., 0], wanted, 1e-8)
    for parts in (both, both[::-1], both[:1] * 2):
        close(g.dot(concatenate(parts))[..., 0], torch.cat([wanted, wanted]), 1e-8)


# --- sampled labels and their limit ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic", "linear_regression"])
def test_many_draws_of_sampled_labels_mean_the_gauss_newton_matrix(name):
    """In the basis of the factors the corrected eigenvalues are unbiased for the diagonal of the GGN."""
    p = problem(name)
    copies = tuple(t.repeat(2000, *[1] * (t.ndim - 1)) for t in p.train)
    f = next(iter(kronecker.fit(library(p, copies, batch_size=5000), "sampled").values()))
    lib = library(p)
    Q = basis(f)
    block = lib.blocks[0]
    ggn = p.ggn()
    packed = block.pack(p.unflatten(ggn)).flatten(1)  # rows in the library's order
    matrix = block.pack(p.unflatten(packed.T.contiguous())).flatten(1)
    found, wanted = f.ekfac.flatten(), (Q.T @ matrix @ Q).diagonal()
    assert float((found - wanted).norm()) < 0.03 * float(wanted.norm())


@pytest.mark.parametrize("solver", [EKFAC, KFAC])
def test_labels_follow_the_curvature_unless_they_are_given(solver):
    lib = library(problem("mlp"))
    for curvature, labels in ((GGN, "sampled"), (Hessian, "sampled"), (EmpiricalFisher, "true")):
        own, given = (s.fit(curvature(lib), 0.1).factors for s in (solver(), solver(labels=labels)))
        assert set(own) == set(given)
        for name, factors in own.items():
            assert torch.equal(factors.kfac, given[name].kfac) and torch.equal(factors.ekfac, given[name].ekfac)
            for side in ("left", "right"):
                pieces = (getattr(f, side).pieces for f in (factors, given[name]))
                assert all(torch.equal(a, b) for a, b in zip(*pieces, strict=True))


def test_unknown_labels_are_refused():
    with pytest.raises(InputError, match="labels must be 'sampled' or 'true', got 'fake'"):
        EKFAC(labels="fake").fit(GGN(library(problem("mlp"))), 0.1)  # type: ignore[arg-type]


class Rare(nn.Module):
    """A layer for the examples that ask for it, which is called only if the batch has one."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare, self.never = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.always(x).tanh()
        asks = x[:, :1] > 0
        return h + self.rare(h) * asks if bool(asks.any()) else h


def test_a_layer_that_some_batches_do_not_use():
    """The first batches do not use it: that must not make a table of it, whose one side has no covariance."""
    torch.manual_seed(0)
    model, x, y = Rare().double(), torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    x[:, 0] = torch.tensor([-1.0, -1, 1, 1, 1, -1])
    lib = Problem(model, Classification(), (x, y), batch_size=1, progress=False)
    found = kronecker.fit(lib, "true")
    g = lib.loss_gradients((x[2:5], y[2:5])).rows["rare"]
    cotangents, inputs = g.g[0, :, 0, 0], g.a[0, :, 0]
    A, S = inputs.T @ inputs / 3, cotangents.T @ cotangents / 3
    wanted = torch.kron(S, A) * 3 / 6  # of three of the six examples
    block = found["rare"]
    Q = basis(block)
    close((Q * block.kfac.flatten()) @ Q.T, wanted)
    assert not found["never"].ekfac.any() and not found["never"].kfac.any()
