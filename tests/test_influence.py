"""Attribution from end to end: scores against dense answers, data in every form, files, and bad input of every kind."""

import functools
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import wherefrom
from interrupting import stopped
from problems import IGNORE, NAMES, PAD, TinyProblem, problem
from solving import close, diagonal, solve
from wherefrom import (
    CG,
    EKFAC,
    GGN,
    KFAC,
    Arnoldi,
    ArtefactError,
    AttributionWarning,
    Auto,
    Certificate,
    Classification,
    Damping,
    Dual,
    EmpiricalFisher,
    Exact,
    Hessian,
    Identity,
    Influence,
    InputError,
    Neumann,
    Nystrom,
    Regression,
    Scores,
    UnsupportedError,
    attribute,
)
from wherefrom.model.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")


def scores_of(p: TinyProblem, solver=None, damping: float | Damping = 0.1, **options) -> Scores:
    return attribute(p.model, p.task, p.train, p.queries, solver=solver or Exact(), damping=damping, **options)


# --- the numbers ---


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_dense_ones(name):
    p = problem(name)
    damping = 1e-3 * float(p.ggn().diagonal().mean())
    scores = scores_of(p, damping=damping, batch_size=4)
    close(scores.values, p.exact_scores(p.ggn(), damping))
    assert scores.residual is not None and float(scores.residual.max()) < 1e-7 and scores.converged.all()


@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "masked_sequence", "cnn_groups"])
@pytest.mark.parametrize("kind", ["hessian", "empirical", "jvp"])
def test_scores_with_other_curvatures(name, kind):
    p = problem(name)
    curvature, matrix = {
        "hessian": (Hessian, p.hessian()),
        "empirical": (EmpiricalFisher, p.empirical_fisher()),
        "jvp": (functools.partial(GGN, product="jvp"), p.ggn()),
    }[kind]
    damping = 0.1 - min(0.0, 1.5 * float(torch.linalg.eigvalsh(matrix)[0]))
    close(scores_of(p, CG(tolerance=1e-10), damping, curvature=curvature).values, p.exact_scores(matrix, damping))


def test_a_positive_score_means_that_the_example_helped():
    """Gradient dot: a step down the example's loss lowers the query's measurement where the score is positive."""
    p = problem("mlp")
    values = scores_of(p, Identity()).values
    close(values, p.measurement_gradients() @ p.loss_gradients().T)
    step = 1e-6
    for i in range(p.n):
        moved = problem("mlp").model
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter -= step * p.loss_gradients()[i, p.slices[name]].view_as(parameter)
            change = p.measurement(moved(p.queries[0]), p.queries) - p.measurement(p.outputs(p.queries), p.queries)
        torch.testing.assert_close(-change / step, values[:, i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "odd_parameters"])
def test_the_default_is_the_exact_answer_to_a_certified_tolerance(name, large, monkeypatch):
    """Solver and damping are chosen; a problem that counts as large is solved iteratively."""
    if large:
        monkeypatch.setattr("wherefrom.solvers.auto.SMALL", 0)
    p = problem(name)
    scores = attribute(p.model, p.task, p.train, p.queries)
    assert scores.provenance["solver"] == repr(Auto()) and scores.provenance["tolerance"] == Auto().tolerance
    assert ("CG(" in scores.provenance["chosen"]["solver"]) == large
    damping = diagonal(Influence().fit(p.model, p.task, p.train).inverse)
    assert set(scores.provenance["damping by block"].values()) == set(damping.tolist())
    matrix, q = p.ggn() + torch.diag(damping), p.measurement_gradients()
    wanted = torch.linalg.solve(matrix, q.T).T
    close(damping, p.ggn().diagonal().sum().expand(p.dim) / p.n)
    if large:  # |x - x*| <= |(C + damping)^-1| |residual|
        assert float(scores.residual.max()) <= Auto().tolerance and scores.converged.all()
        reach = scores.residual * q.norm(dim=1) / damping[0]
        error = (scores.values - wanted @ p.loss_gradients().T).abs()
        assert (error <= reach.unsqueeze(1) * p.loss_gradients().norm(dim=1) + 1e-12).all()
        close(scores.values, wanted @ p.loss_gradients().T, 0.1)
    else:
        assert float(scores.residual.max()) <= 1e-9 and scores.converged.all()
        close(scores.values, wanted @ p.loss_gradients().T)


def test_auto_is_a_name_for_the_solver_that_chooses(tmp_path):
    p = problem("mlp")
    named, given = (Influence(solver, 0.1, seed=5).fit(p.model, p.task, p.train) for solver in ("auto", Auto()))
    assert torch.equal(named.score(p.queries).values, given.score(p.queries).values)
    assert named.provenance()["solver"] == given.provenance()["solver"] == repr(Auto(seed=5))
    named.save(tmp_path / "fit")
    loaded = Influence(Auto(seed=5), 0.1).load(tmp_path / "fit", p.model, p.task, p.train)
    close(loaded.score(p.queries).values, p.exact_scores(p.ggn(), 0.1))
    close(named.at(0.01).score(p.queries).values, p.exact_scores(p.ggn(), 0.01))
    close(loaded.at(0.01).score(p.queries).values, p.exact_scores(p.ggn(), 0.01))


@pytest.mark.parametrize("solver", [EKFAC(labels="true"), KFAC(labels="true"), EKFAC()])
@pytest.mark.parametrize("name", NAMES)
def test_scores_without_a_certificate_are_the_same(name, solver):
    """They take the shorter way, in the eigenbases."""
    p = problem(name)
    influence = Influence(solver, 0.1, batch_size=4).fit(p.model, p.task, p.train)
    certified, short = influence.score(p.queries), influence.score(p.queries, certify=False)
    close(short.values, certified.values, 1e-10)
    assert short.residual is None and certified.residual is not None
    assert "residual not measured" in str(short) and "accurate" in str(certified)


@pytest.mark.parametrize(
    "solver",
    [Exact(), Exact(form="primal"), Dual(drop=0.0), EKFAC(), CG(tolerance=1e-10), Arnoldi(rank=10, steps=20), Auto()],
)
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "tied_embedding"])
def test_self_influence(name, solver):
    p = problem(name)
    influence = Influence(solver, 0.1, batch_size=4).fit(p.model, p.task, p.train)
    scores = influence.score(p.queries, self_influence=True)
    g = p.unflatten(p.loss_gradients())
    wanted = wherefrom.persample.vectors.dot(g, solve(influence.inverse, g, certify=False).x)
    close(scores.self_influence, wanted)
    close(influence.self_influence(), wanted)
    with pytest.raises(InputError, match="self-influence was not computed.*self_influence=True"):
        influence.score(p.queries).self_influence  # noqa: B018


# --- what must change nothing ---


@pytest.mark.parametrize(
    "solver",
    [
        Exact(),
        CG(preconditioner=Dual(drop=0.1), tolerance=1e-9),
        CG(preconditioner=Nystrom(rank=20), tolerance=1e-9),
        EKFAC(labels="true"),
        Neumann(step=0.05, batch=4, steps=9),
        Arnoldi(rank=10, steps=25),
        Auto(),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "mlp_regression_scalar", "masked_sequence", "cnn_groups"])
def test_how_the_work_is_cut_changes_nothing(name, solver):
    p = problem(name)
    whole = scores_of(p, solver).values
    for batch_size in (1, 3, 4):
        close(scores_of(p, solver, batch_size=batch_size).values, whole, 1e-9)
    influence = Influence(solver, 0.1, batch_size=3, memory=1.0).fit(p.model, p.task, p.train)
    close(influence.score(p.queries).values, whole, 1e-9)
    single = [influence.score(q).values for q in p.batches(1, p.queries)]
    close(torch.cat(single), whole, 1e-9)


@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "tied_embedding", "cnn_groups"])
def test_the_mean_of_the_queries_is_one_query(name):
    p = problem(name)
    influence = Influence(Exact(), 0.1, batch_size=3).fit(p.model, p.task, p.train)
    scores = influence.solve(p.queries, mean=True).score()
    close(scores.values, influence.score(p.queries).values.mean(0, keepdim=True), 1e-9)
    assert scores.residual is not None and scores.residual.shape == (1,)


@pytest.mark.parametrize("solver", [Exact(), EKFAC(labels="true")])
def test_scores_follow_the_examples_when_they_are_permuted(solver):
    p = problem("mlp")
    whole, order = scores_of(p, solver).values, torch.randperm(p.n, generator=torch.Generator().manual_seed(0))
    moved = attribute(p.model, p.task, tuple(t[order] for t in p.train), p.queries, solver=solver, damping=0.1)
    close(moved.values, whole[:, order], 1e-9)


class Pairs(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, i):
        return tuple(t[i] for t in self.data)


class Named(nn.Module):
    """Takes its input from a dict, as transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch["x"])


class NamedTask(Classification):
    def outputs(self, model, batch):
        return model(batch)

    def loss(self, outputs, batch):
        return super().loss(outputs, (None, batch["y"]))

    def measurement(self, outputs, batch):
        return super().measurement(outputs, (None, batch["y"]))


def test_data_may_come_in_any_form():
    p = problem("mlp")
    whole = scores_of(p).values
    (x, y), (xq, yq) = p.train, p.queries
    forms = {
        "dataset": (Pairs(p.train), Pairs(p.queries)),
        "tensor dataset": (torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(xq, yq)),
        "list of pairs": (list(zip(x, y, strict=True)), list(zip(xq, yq, strict=True))),
        "shuffling loader": (DataLoader(Pairs(p.train), batch_size=4, shuffle=True), DataLoader(Pairs(p.queries))),
        "dropping loader": (DataLoader(Pairs(p.train), batch_size=4, drop_last=True, shuffle=True), Pairs(p.queries)),
        "arrays": ((x.numpy(), y.numpy()), (xq.numpy(), yq.numpy())),
    }
    for name, (train, queries) in forms.items():
        found = attribute(p.model, p.task, train, queries, solver=Exact(), damping=0.1)
        assert torch.allclose(found.values, whole, rtol=1e-9, atol=1e-12), name
    named = [{"x": x, "y": y}, {"x": xq, "y": yq}]
    found = attribute(Named(p.model), NamedTask(), *named, solver=Exact(), damping=0.1)
    close(found.values, whole, 1e-9)
    rows = [[{"x": a, "y": b} for a, b in zip(*data, strict=True)] for data in (p.train, p.queries)]
    close(attribute(Named(p.model), NamedTask(), *rows, solver=Exact(), damping=0.1).values, whole, 1e-9)


class Texts(Pairs):
    """Examples without their padding."""

    def __getitem__(self, i):
        tokens, labels = super().__getitem__(i)
        length = max(2, int((tokens != PAD).sum()))
        return tokens[:length], labels[:length]


def collate(items):
    """Pads to the longest example of the batch."""
    width = max(len(tokens) for tokens, _ in items)
    return tuple(
        torch.stack([nn.functional.pad(item[k], (0, width - len(item[k])), value=value) for item in items])
        for k, value in ((0, PAD), (1, IGNORE))
    )


@pytest.mark.parametrize(
    "solver", [Exact(form="primal"), Exact(form="dual"), CG(tolerance=1e-10), EKFAC(labels="true"), EKFAC()]
)
@pytest.mark.parametrize("name", ["masked_sequence", "tied_embedding"])
def test_ragged_data_are_padded_batch_by_batch(name, solver):
    p = problem(name)
    whole = scores_of(p, solver).values
    for size in (1, 2, 4):
        loaders = [
            DataLoader(Texts(d), batch_size=size, shuffle=True, collate_fn=collate) for d in (p.train, p.queries)
        ]
        close(attribute(p.model, p.task, *loaders, solver=solver, damping=0.1).values, whole)


# --- tasks, measurements and parameters ---


class Duck:
    """A task that inherits from nothing, with what is needed and no more."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")


def test_any_object_with_outputs_and_a_loss_is_a_task():
    p = problem("mlp")
    found = attribute(p.model, Duck(), p.train, p.queries, solver=Exact(), damping=0.1).values
    wanted = p.loss_gradients(p.queries) @ torch.linalg.solve(
        p.ggn() + 0.1 * torch.eye(p.dim).double(), p.loss_gradients().T
    )
    close(found, wanted)  # the measurement defaults to the loss
    with pytest.raises(UnsupportedError, match="does not say how to draw labels.*labels='true'"):
        attribute(p.model, Duck(), p.train, p.queries, solver=EKFAC(), damping=0.1)
    attribute(p.model, Duck(), p.train, p.queries, solver=EKFAC(labels="true"), damping=0.1)


def test_a_measurement_of_ones_own():
    p = problem("mlp")
    found = scores_of(p, measurement=lambda outputs, batch: outputs[:, 2] * 3).values
    rows = torch.stack([p._gradient(3 * p.reference(q[0])[0, 2]) for q in p.batches(1, p.queries)])
    close(found, rows @ torch.linalg.solve(p.ggn() + 0.1 * torch.eye(p.dim).double(), p.loss_gradients().T))


def test_a_linear_measurement_of_a_frozen_query_has_no_influence():
    p = problem("mlp")
    scores = scores_of(p, measurement=lambda outputs, batch: 0 * outputs.sum(1))
    assert scores.values.abs().max() == 0 and scores.residual.max() == 0


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (r"^4\.", ["4.weight", "4.bias"]),
        (["0", r"bias$"], ["0.weight", "0.bias", "2.bias", "4.bias"]),
        (lambda name: name.endswith("weight"), ["0.weight", "2.weight", "4.weight"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_parameters_can_be_selected(select, names):
    p = problem("mlp")
    keep = torch.cat([torch.arange(p.dim)[p.slices[name]] for name in names])
    q, g, matrix = p.measurement_gradients()[:, keep], p.loss_gradients()[:, keep], p.ggn()[keep][:, keep]
    found = scores_of(p, parameters=select)
    close(found.values, q @ torch.linalg.solve(matrix + 0.1 * torch.eye(len(keep)).double(), g.T))
    assert f"{len(keep)} of {p.dim} trainable parameters" in found.provenance["coverage"]


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(
        InputError, match=r"parameters='nothing' selects none of the 6 trainable parameters \(0.weight, "
    ):
        scores_of(problem("mlp"), parameters="nothing")


# --- scores ---


def test_top_names_the_strongest_examples_strongest_first():
    values = torch.tensor([[1.0, -3.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, -1.0, 5.0]])
    scores = Scores(values, Certificate.of_nothing_solved(2))
    top = scores.top(3)
    assert top.proponents.tolist() == [[2, 3, 0], [4, 0, 1]] and top.opponents.tolist() == [[1, 4, 0], [3, 0, 1]]
    assert top.proponent_scores.tolist() == [[2, 2, 1], [5, 0, 0]]
    assert top.opponent_scores.tolist() == [[-3, 0, 1], [-1, 0, 0]]
    for k in (0, 6):
        with pytest.raises(InputError, match=f"k must be between 1 and the 5 training examples, got {k}"):
            scores.top(k)


def test_scores_say_where_they_come_from():
    p = problem("mlp")
    found = scores_of(p, EKFAC(seed=1), seed=7).provenance
    json.dumps(found)
    assert "EKFAC(labels=None, seed=7" in found["solver"] and found["curvature"] == "GGN"
    assert found["examples"] == p.n and set(found["damping by block"]) == {"0", "2", "4"}
    assert found["torch"] == torch.__version__ and set(found["seconds"]) >= {"fit", "solve", "scores"}


def test_one_seed_replaces_the_seed_of_every_nested_solver():
    p = problem("mlp")
    solver = CG(preconditioner=EKFAC(seed=1), steps=2, tolerance=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again, other = (scores_of(p, solver, seed=s).values for s in (3, 3, 4))
        plain = scores_of(p, CG(preconditioner=EKFAC(seed=3), steps=2, tolerance=1e-12)).values
    assert torch.equal(first, again) and torch.equal(first, plain) and not torch.equal(first, other)


# --- files ---

SOLVERS = {
    "ekfac": EKFAC(),
    "primal": Exact(form="primal"),
    "dual": Exact(form="dual"),
    "pruned": Dual(),
    "cg": CG(preconditioner=EKFAC(), tolerance=1e-11, steps=2000),
    "astra": wherefrom.ASTRA(batch=4, steps=5),
    "dot": Identity(),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "cnn_groups"])
def test_a_fit_can_be_saved_and_loaded(name, solver, tmp_path):
    p = problem(name)
    influence = Influence(SOLVERS[solver], Damping.relative(0.3)).fit(p.model, p.task, p.train)
    influence.save(tmp_path / "deep" / "fit.wherefrom")
    again = problem(name)
    loaded = Influence(SOLVERS[solver], Damping.relative(0.3), batch_size=3)
    loaded = loaded.load(tmp_path / "deep" / "fit.wherefrom", again.model, again.task, again.train)
    close(loaded.score(p.queries).values, influence.score(p.queries).values, 1e-9)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["fit.wherefrom"], "nothing temporary is left"


def test_a_fit_made_for_something_else_is_refused_by_name(tmp_path):
    p, path = problem("mlp"), tmp_path / "fit"
    Influence(EKFAC(), 0.1).fit(p.model, p.task, p.train).save(path)

    def load(influence=None, **changes):
        given = {"model": p.model, "task": p.task, "train": p.train} | changes
        (influence or Influence(EKFAC(), 0.1)).load(path, **given)

    load()
    moved = problem("mlp").model
    with torch.no_grad():
        moved[2].bias[1] += 1e-9
    with pytest.raises(ArtefactError, match="was made for another model .*Fit again"):
        load(model=moved)
    with pytest.raises(ArtefactError, match="was made for another train "):
        load(train=(p.train[0], p.train[1].roll(1)))
    with pytest.raises(ArtefactError, match="was made for another parameters "):
        load(Influence(EKFAC(), 0.1, parameters="weight"))
    for other in (Influence(EKFAC(seed=1), 0.1), Influence(KFAC(), 0.1), Influence(EKFAC(), 0.1, seed=5)):
        with pytest.raises(ArtefactError, match=r"was made for another solver \(solver: file .EKFAC\("):
            load(other)
    for damping in (0.2, 0.1 + 1e-9, Damping.relative(0.1)):
        with pytest.raises(ArtefactError, match="was made for another damping "):
            load(Influence(EKFAC(), damping))
    with pytest.raises(ArtefactError, match="was made for another curvature .*EmpiricalFisher"):
        load(Influence(EKFAC(), 0.1, curvature=EmpiricalFisher))
    with pytest.raises(ArtefactError, match="was made for another task"):
        load(task=Duck())
    with pytest.raises(ArtefactError, match="was made for another first losses"):
        load(task=Scaled(2.0))
    load(task=Scaled(1 + 1e-5))  # as another machine may compute it


class Scaled(Classification):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def loss(self, outputs, batch):
        return self.factor * super().loss(outputs, batch)

    def name(self):
        return "Classification"


def test_scores_of_another_loss_by_the_same_name_are_refused(tmp_path):
    p = problem("mlp")
    plain = lambda outputs, batch: Classification().loss(outputs, batch)  # noqa: E731
    first, other = (Influence(Identity(), 0.1).fit(p.model, Scaled(f), p.train) for f in (1.0, -3.0))
    first.score(p.queries, plain, folder=tmp_path)
    with pytest.raises(ArtefactError, match="was made for another first losses"):
        other.score(p.queries, plain, folder=tmp_path)
    store = wherefrom.GradientStore.build(first, tmp_path / "store", size=32)
    assert store.influence is first
    with pytest.raises(ArtefactError, match="was made for another first losses"):
        wherefrom.GradientStore.build(other, tmp_path / "store", size=32)


def test_texts_that_a_loader_turns_into_tensors_count_as_data(tmp_path):
    """Rows of strings have no tensors of their own; another text must still be another data set."""

    class Strings(Dataset):
        def __init__(self, *rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return self.rows[i]

    def encode(rows):
        x = torch.tensor([[float(ord(c)) / 128 for c in row] for row in rows]).double()
        return x, torch.tensor([len(set(row)) % 4 for row in rows])

    p, path = problem("mlp"), tmp_path / "fit"
    first, second = (DataLoader(Strings(*rows), collate_fn=encode) for rows in (("abcde", "fghij"), ("abcde", "fghik")))
    Influence(Identity(), 0.1).fit(p.model, p.task, first).save(path)
    Influence(Identity(), 0.1).load(path, p.model, p.task, first)
    with pytest.raises(ArtefactError, match="was made for another train"):
        Influence(Identity(), 0.1).load(path, p.model, p.task, second)


def test_scores_can_be_saved_and_loaded(tmp_path):
    p = problem("mlp")
    for i, options in enumerate(({}, {"self_influence": True})):
        scores = scores_of(p, CG(), **options)
        scores.save(tmp_path / f"s{i}")
        loaded = Scores.load(tmp_path / f"s{i}")
        for field in ("values", "residual", "converged", "history"):
            assert torch.equal(getattr(loaded, field), getattr(scores, field))
        assert loaded.provenance == json.loads(json.dumps(scores.provenance))
        assert (loaded.self_values is None) == (not options)
    bare = Influence(EKFAC(), 0.1).fit(p.model, p.task, p.train).score(p.queries, certify=False)
    bare.save(tmp_path / "bare")
    assert Scores.load(tmp_path / "bare").residual is None


def test_damaged_and_foreign_files_are_refused(tmp_path):
    p, good = problem("mlp"), tmp_path / "scores"
    scores_of(p, EKFAC()).save(good)
    data = good.read_bytes()

    def refuse(content: bytes, message: str):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ArtefactError, match=message):
            Scores.load(tmp_path / "bad")

    refuse(data[: len(data) // 2], "damaged or cut short")
    refuse(data[:20], "damaged or cut short")
    refuse(b"", "damaged or cut short")
    refuse(b"not ours at all", "damaged or cut short")
    refuse(data[:-3] + bytes(b ^ 255 for b in data[-3:]), "damaged or cut short .its checksum differs")
    with pytest.raises(ArtefactError, match="got nothing there"):
        Scores.load(tmp_path / "missing")
    save_file({"values": torch.zeros(2)}, tmp_path / "bad")
    with pytest.raises(ArtefactError, match="was not written by wherefrom"):
        Scores.load(tmp_path / "bad")
    with safe_open(good, framework="pt") as file:
        meta, tensors = json.loads(file.metadata()["wherefrom"]), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, tmp_path / "bad", {"wherefrom": json.dumps(meta | {"version": 99})})
    with pytest.raises(ArtefactError, match="must have version 2, got 99 .by wherefrom "):
        Scores.load(tmp_path / "bad")
    Influence(EKFAC(), 0.1).fit(p.model, p.task, p.train).save(tmp_path / "fit")
    with pytest.raises(ArtefactError, match="must have kind 'scores', got 'influence'"):
        Scores.load(tmp_path / "fit")
    with pytest.raises(ArtefactError, match="must have kind 'influence', got 'scores'"):
        Influence(EKFAC(), 0.1).load(good, p.model, p.task, p.train)


# --- bad input ---


def refused(message: str, kind=InputError, **changes):
    """attribute() on the first problem with some arguments replaced must raise with this message."""
    p = problem("mlp")
    given = {
        "model": p.model,
        "task": p.task,
        "train": p.train,
        "queries": p.queries,
        "solver": Exact(),
        "damping": 0.1,
    }
    with pytest.raises(kind, match=message) as caught:
        attribute(**(given | changes))
    assert not isinstance(caught.value.__cause__, InputError)


def test_empty_data():
    empty = (torch.zeros(0, 5).double(), torch.zeros(0).long())
    refused("train must hold at least one example, got none", train=empty)
    refused("queries must hold at least one example, got none", queries=empty)
    refused("train must hold at least one example", train=[])


def test_tensors_of_different_lengths():
    x, y = problem("mlp").train
    refused(r"train tensors must have the same number of examples, got \[11, 10\]", train=(x, y[:10]))


def test_losses_that_are_not_per_example():
    class Mean(Classification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch).mean()

    class Wide(Classification):
        def loss(self, outputs, batch):
            return outputs.square()

    class Number(Classification):
        def loss(self, outputs, batch):
            return 1.0

    shape = r"task.loss must be one number per example, shape \(11,\), got "
    refused(shape + r"\(\).*reduction='none'", task=Mean())
    refused(shape + r"\(11, 4\)", task=Wide())
    refused(shape + "float", task=Number())
    refused(
        r"task.measurement must be one number per example, shape \(3,\), got \(\)", measurement=lambda h, b: h.sum()
    )


def test_losses_that_are_not_finite():
    class Log(Classification):
        def loss(self, outputs, batch):
            return (outputs[:, 0] * torch.where(torch.arange(len(outputs)) == 2, torch.nan, 1.0)).square()

    refused("task.loss must be finite, got nan for example 2 of a batch", task=Log())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_data_that_are_not_finite(bad, batch_size):
    x, y = problem("mlp").train
    x[6, 2] = bad
    refused("train data must be finite, got NaN or infinity in example 6", train=(x, y), batch_size=batch_size)
    x, y = problem("mlp").queries
    x[1, 0] = bad
    refused("queries data must be finite, got NaN or infinity in example 1", queries=(x, y))


def test_weights_that_are_not_finite():
    model = problem("mlp").model
    model[2].bias.data[0] = torch.nan
    refused("the model's weights must be finite, got NaN or infinity in 2.bias", model=model)


def test_queries_of_another_shape():
    _, y = problem("mlp").queries
    refused(
        r"the model failed on a batch of shapes \['\(3, 7\) torch.float64'", queries=(torch.zeros(3, 7).double(), y)
    )
    x, _ = problem("mlp").queries
    refused("Classification expects logits .* and labels", queries=(x, torch.zeros(3, 2).long()))
    refused(r"Class labels must lie in 0..3 .*got 0..9", queries=(x, torch.tensor([0, 9, 1])))
    refused("integer class labels, got torch.float64", queries=(x, torch.zeros(3).double()))
    refused("Regression expects one target per output", task=Regression())


@pytest.mark.parametrize("damping", [0, -0.1, float("nan"), float("inf")])
def test_a_damping_that_is_not_positive(damping):
    refused("damping must be a positive finite number", damping=damping)


def test_a_solver_that_needs_more_than_the_curvature_gives():
    refused("Dual needs per-example rows, which Hessian", UnsupportedError, solver=Dual(), curvature=Hessian)


def test_a_solver_that_is_no_instance():
    refused("solver must be an instance such as wherefrom.EKFAC", solver=EKFAC)
    refused("solver must be an instance such as wherefrom.EKFAC\\(\\), got 'ekfac'", solver="ekfac")


def test_a_model_that_is_none():
    refused("model must be a torch.nn.Module, got function", model=lambda x: x)


def test_a_task_that_is_none():
    refused("task must be an instance.*got the class Classification", task=Classification)
    refused("task must be an instance.*without outputs and loss", task=object())


def test_a_model_without_all_of_its_weights():
    model = problem("mlp").model
    model[4].to("meta")
    refused(r"the model's weights must be there, got none yet in 4.weight, 4.bias", model=model)


def test_a_model_of_two_dtypes():
    model = problem("mlp").model
    model[4].float()
    refused(r"must be all float32 or all float64, got \['torch.float32', 'torch.float64'\]", model=model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_converted_and_left_alone(dtype):
    p = problem("mlp")
    model = p.model.to(dtype)
    train, queries = ((x.to(dtype), y) for x, y in (p.train, p.queries))
    with pytest.warns(AttributionWarning, match="half precision: a float32 copy is used"):
        found = attribute(model, p.task, train, queries, solver=Exact(), damping=0.1)
    assert found.values.dtype == torch.float32 and all(t.dtype == dtype for t in model.parameters())
    wide = problem("mlp").model
    wide.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    data = [(x.double(), y) for x, y in (train, queries)]
    close(found.values.double(), attribute(wide, p.task, *data, solver=Exact(), damping=0.1).values, 1e-4)


def test_data_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    refused("train must be .* got Stream, which has no length and no index. Collect it", train=Stream())
    refused("train must be .* got Stream, which has no length", train=DataLoader(Stream()))
    refused("train must be .* got generator", train=(i for i in range(3)))


def test_dropout_in_training_mode_is_warned_of_and_switched_off():
    p = problem("mlp")
    model = nn.Sequential(p.model, nn.Dropout(0.9)).train()
    with pytest.warns(AttributionWarning, match="training mode with dropout: it is evaluated in eval mode"):
        found = attribute(model, p.task, p.train, p.queries, solver=Exact(), damping=0.1)
    close(found.values, scores_of(problem("mlp")).values)
    assert all(m.training for m in model.modules())


def test_data_that_change_between_two_passes():
    class Augmented(Pairs):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + 0.1 * torch.randn_like(x), y

    p = problem("mlp")
    refused(r"train data must be the same in every pass, but examples 0\.\.(2|10) changed", train=Augmented(p.train))


def test_a_batch_size_of_nothing():
    refused("batch_size must be a positive integer, got 0", batch_size=0)


def test_nothing_is_done_before_bad_arguments_are_found(monkeypatch):
    """The solver, the damping and what the solver needs are checked before any pass over the data."""
    for changes in ({"solver": EKFAC}, {"damping": -1.0}, {"solver": Dual(), "curvature": Hessian}):
        p = problem("mlp")
        p.model.forward = lambda *_: pytest.fail("the model was run")
        with pytest.raises(wherefrom.AttributionError):
            attribute(p.model, p.task, p.train, p.queries, **({"solver": Exact(), "damping": 0.1} | changes))


# --- candidates, blocks, and scores that go on where they stopped ----------------------------------------------------


@pytest.mark.parametrize(
    "solver", [wherefrom.CG(tolerance=1e-12, steps=2000), wherefrom.EKFAC(), wherefrom.RandProj(rank=7)]
)
def test_candidates_are_scored_as_if_they_had_been_trained_on(solver):
    p = problem("mlp")
    influence = wherefrom.Influence(solver, 0.05, batch_size=4).fit(p.model, p.task, p.train)
    for certify in (True, False):
        whole = influence.score(p.queries, certify=certify)
        some = tuple(t[[7, 2, 2, 9, 0]] for t in p.train)
        found = influence.score(p.queries, certify=certify, examples=some, self_influence=True)
        torch.testing.assert_close(found.values, whole.values[:, [7, 2, 2, 9, 0]], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.self_influence, influence.self_influence()[[7, 2, 2, 9, 0]])


def test_candidates_that_are_new_match_a_dense_solve():
    p = problem("mlp_regression")
    influence = wherefrom.Influence(wherefrom.Exact(), 0.05).fit(p.model, p.task, p.train)
    matrix = p.ggn() + 0.05 * torch.eye(p.dim, dtype=torch.float64)
    expected = p.measurement_gradients() @ torch.linalg.solve(matrix, p.loss_gradients(p.queries).T)
    torch.testing.assert_close(influence.score(p.queries, examples=p.queries).values, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "solver", [wherefrom.CG(tolerance=1e-12, steps=2000), wherefrom.EKFAC(), wherefrom.RandProj(rank=7)]
)
def test_scores_by_block_sum_to_the_scores(solver):
    p = problem("norms")
    influence = wherefrom.Influence(solver, 0.05, batch_size=3).fit(p.model, p.task, p.train)
    index = [4, 0, 8, 9]
    parts = influence.solve(p.queries).by_block(index)
    assert list(parts) == [b.name for b in influence.problem.blocks]
    whole = influence.score(p.queries, certify=False).values[:, index]
    torch.testing.assert_close(sum(parts.values()), whole, rtol=1e-9, atol=1e-11)
    if isinstance(solver, wherefrom.CG):
        x = torch.linalg.solve(p.ggn() + 0.05 * torch.eye(p.dim, dtype=torch.float64), p.measurement_gradients().T).T
        for b in influence.problem.blocks:
            own = torch.cat([torch.arange(p.dim)[p.slices[name]] for name in b.shapes])
            expected = x[:, own] @ p.loss_gradients()[index][:, own].T
            torch.testing.assert_close(parts[b.name], expected, rtol=1e-7, atol=1e-9)


def test_scores_go_on_where_a_killed_run_stopped(tmp_path, monkeypatch):
    p = problem("mlp")
    solver = wherefrom.CG(tolerance=1e-10, steps=500)
    influence = wherefrom.Influence(solver, 0.05, batch_size=3).fit(p.model, p.task, p.train)
    whole = influence.score(p.queries)
    original, passes = Problem.loss_gradients, []
    with stopped(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        influence.score(p.queries, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # the solution and two batches
    products = []
    monkeypatch.setattr(Problem, "loss_gradients", lambda self, batch: passes.append(batch) or original(self, batch))
    monkeypatch.setattr(wherefrom.GGN, "product", lambda *_: products.append(1))
    found = influence.score(p.queries, folder=tmp_path)
    assert not products and len(passes) == 2  # no solve, and the gradients of the two batches that were missing
    assert torch.equal(found.values, whole.values)
    assert found.residual is not None and torch.equal(found.residual, whole.residual)
    assert torch.equal(found.history, whole.history) and found.provenance["steps"] == whole.provenance["steps"]


def test_scores_of_something_else_are_refused_by_name(tmp_path):
    p = problem("mlp")
    wherefrom.Influence(wherefrom.EKFAC(), 0.05).fit(p.model, p.task, p.train).score(p.queries, folder=tmp_path)
    other = wherefrom.Influence(wherefrom.EKFAC(), 0.06).fit(p.model, p.task, p.train)
    with pytest.raises(ArtefactError, match="made for another damping, lambda"):
        other.score(p.queries, folder=tmp_path)
    same = wherefrom.Influence(wherefrom.EKFAC(), 0.05).fit(p.model, p.task, p.train)
    with pytest.raises(ArtefactError, match="another queries"):
        same.score(tuple(t[:1] for t in p.queries), folder=tmp_path)
    with pytest.raises(ArtefactError, match="another queries"):
        same.score(p.queries, lambda outputs, _: outputs[:, 0], folder=tmp_path)
    with pytest.raises(ArtefactError, match="another examples"):
        same.score(p.queries, examples=p.queries, folder=tmp_path)


def test_self_influence_goes_on_where_a_killed_run_stopped(tmp_path, monkeypatch):
    p = problem("mlp")
    influence = wherefrom.Influence(wherefrom.CG(tolerance=1e-9, steps=500), 0.05, batch_size=3).fit(
        p.model, p.task, p.train
    )
    whole = influence.self_influence()
    original, passes = Problem.loss_gradients, []
    with stopped(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        influence.self_influence(folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(Problem, "loss_gradients", lambda self, batch: passes.append(batch) or original(self, batch))
    assert torch.equal(influence.self_influence(folder=tmp_path), whole) and len(passes) == 2
    other = wherefrom.Influence(wherefrom.CG(tolerance=1e-9, steps=500), 0.06, batch_size=3).fit(
        p.model, p.task, p.train
    )
    with pytest.raises(ArtefactError, match="made for another damping"):
        other.self_influence(folder=tmp_path)


def test_a_resumed_run_warns_as_the_first_did(tmp_path):
    p = problem("mlp")
    influence = wherefrom.Influence(wherefrom.CG(tolerance=1e-9, steps=1), 0.05).fit(p.model, p.task, p.train)
    for _ in range(2):
        with pytest.warns(wherefrom.ConvergenceWarning, match="queries did not converge"):
            influence.score(p.queries, folder=tmp_path)
    for _ in range(2):
        with pytest.warns(wherefrom.ConvergenceWarning, match="training examples did not converge"):
            influence.self_influence(folder=tmp_path)
