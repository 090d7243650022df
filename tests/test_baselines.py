"""Ensembles, relative influence and the baselines, against dense answers."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import solving
import wherefrom
from problems import PAD, TinyProblem, problem
from wherefrom import (
    CG,
    Certificate,
    Classification,
    Embeddings,
    Exact,
    GradCos,
    Identity,
    Influence,
    InputError,
    Random,
    Scores,
    ensemble,
    response_norms,
)


def close(found, wanted, tolerance: float = 1e-09) -> None:
    solving.close(found, wanted, tolerance)


DAMPING = 0.05


def scored(p: TinyProblem, solver=None, **options) -> Scores:
    return Influence(solver or Exact(), DAMPING).fit(p.model, p.task, p.train).score(p.queries, **options)


# --- ensembles ------------------------------------------------------------------------------------------------------


def member(values, residual=None, converged=(True, True), own=None, **provenance) -> Scores:
    tensors = [None if t is None else torch.tensor(t) for t in (residual, own)]
    certificate = Certificate(tensors[0], torch.tensor(converged), history=torch.ones(3, 2))
    return Scores(torch.tensor(values), certificate, provenance, tensors[1])


def test_an_ensemble_is_the_mean_and_as_sure_as_its_worst_member(tmp_path):
    one = member([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]], [0.1, 0.4], (True, False), [1.0, 2.0, 3.0], solver="A", seed=1)
    two = member([[3.0, 0.0, 3.0], [2.0, 0.0, 0.0]], [0.3, 0.2], (True, True), [3.0, 4.0, 5.0], solver="A", seed=2)
    found = ensemble([one, two])
    assert found.values.tolist() == [[2, 1, 3], [1, 0, 3]] and found.self_influence.tolist() == [2, 3, 4]
    assert found.residual is not None and found.residual.tolist() == pytest.approx([0.3, 0.4])
    assert found.converged.tolist() == [True, False] and not len(found.history)
    assert found.provenance == {"solver": "A", "members": [one.provenance, two.provenance]}
    found.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").provenance == found.provenance


def test_what_one_member_lacks_the_ensemble_lacks():
    one, two = member([[1.0], [2.0]], [0.1, 0.4], own=[1.0]), member([[1.0], [2.0]])
    for found in (ensemble([one, two]), ensemble([two, one])):
        assert found.residual is None and found.self_values is None
    assert ensemble([one]).residual is not None


def test_members_must_be_of_the_same_queries_and_examples():
    with pytest.raises(InputError, match=r"scores must be several of one shape \(Q, N\), got none"):
        ensemble([])
    with pytest.raises(InputError, match=r"got \[\(2, 1\), \(2, 2\)\]"):
        ensemble([member([[1.0], [2.0]]), member([[1.0, 2.0], [2.0, 3.0]])])


# --- relative influence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Exact(), CG(tolerance=1e-11, steps=2000)])
@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "cnn_groups"])
def test_relative_influence(name, solver):
    p = problem(name)
    q, g = p.measurement_gradients(), p.loss_gradients()
    A = torch.linalg.inv(p.ggn() + DAMPING * torch.eye(p.dim).double())
    influence = Influence(solver, DAMPING, batch_size=4).fit(p.model, p.task, p.train)
    scores = influence.score(p.queries, self_influence=True)
    plain = q @ A @ g.T
    close(scores.relative().values, plain / torch.einsum("nd,de,ne->n", g, A, g).sqrt(), 1e-8)
    close(response_norms(influence), (g @ A).norm(dim=1), 1e-8)
    theta = scores.relative(response_norms(influence))
    close(theta.values, plain / (g @ A).norm(dim=1), 1e-8)
    assert theta.residual is scores.residual and torch.equal(theta.self_influence, scores.self_influence)
    assert theta.provenance == scores.provenance | {"relative to": "lengths"}
    assert scores.relative().provenance["relative to"] == "self-influence"


def test_relative_influence_needs_positive_lengths():
    p = problem("mlp")
    plain = scored(p)
    with pytest.raises(InputError, match="self-influence was not computed"):
        plain.relative()
    with pytest.raises(InputError, match=r"lengths must be one per training example, \(11,\), got \(3,\)"):
        plain.relative(torch.ones(3))
    lengths = torch.ones(p.n)
    lengths[4], lengths[7] = -2.0, float("nan")
    with pytest.raises(InputError, match=r"lengths must be positive to divide by, got -2 for example 4 \(2 in all\)"):
        plain.relative(lengths)
    unlabelled = problem("masked_sequence")
    with pytest.raises(InputError, match=r"self-influence must be positive.*got 0 for example 1 \(1 in all\)"):
        scored(unlabelled, self_influence=True).relative()


def test_solves_that_fall_short_are_named_by_their_number():
    p = problem("mlp")
    influence = Influence(CG(tolerance=1e-9, steps=2), DAMPING, batch_size=4).fit(p.model, p.task, p.train)
    with pytest.warns(wherefrom.ConvergenceWarning, match=r"11 of 11 training examples .* \[0, 1, 2, 3, 4, 5") as said:
        response_norms(influence)
    assert len(said) == 1


# --- gradient cosines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "tied_embedding", "cnn_groups"])
def test_gradient_cosines(name):
    p = problem(name)
    q, g = (nn.functional.normalize(rows, dim=1) for rows in (p.measurement_gradients(), p.loss_gradients()))
    for size in (None, 1, 4):
        scores = GradCos(batch_size=size).fit(p.model, p.task, p.train).score(p.queries)
        close(scores.values, q @ g.T)
    assert scores.provenance["solver"] == "GradCos()" and "coverage" in scores.provenance
    other = GradCos().fit(p.model, p.task, p.train).score(p.queries, p.task.loss)
    close(other.values, nn.functional.normalize(p.loss_gradients(p.queries), dim=1) @ g.T)


def test_gradient_cosines_are_relative_dot_products():
    p = problem("mlp")
    found = GradCos().fit(p.model, p.task, p.train).score(p.queries).values
    dots = scored(p, Identity(), self_influence=True).relative().values
    close(nn.functional.normalize(dots, dim=1), nn.functional.normalize(found, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_zero_has_the_cosine_zero(dtype):
    p = problem("masked_sequence")
    method = GradCos().fit(p.model.to(dtype), p.task, p.train)
    values = method.score(p.queries).values
    assert values.dtype == dtype and (values[:, 1] == 0).all() and values.isfinite().all() and values.abs().max() <= 1
    nothing = method.score(p.queries, lambda outputs, batch: 0 * outputs.flatten(1).sum(1)).values
    assert (nothing == 0).all()


# --- representations ------------------------------------------------------------------------------------------------


def similar(train: Tensor, queries: Tensor, cosine: bool) -> Tensor:
    if cosine:
        train, queries = (nn.functional.normalize(t, dim=1) for t in (train, queries))
    return queries @ train.T


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("size", [None, 1, 4])
def test_representations_are_the_output_of_a_layer(cosine, size):
    p = problem("mlp")
    scores = Embeddings("2", cosine, size).fit(p.model, p.task, p.train).score(p.queries)
    with torch.no_grad():
        close(scores.values, similar(p.reference[:3](p.train[0]), p.reference[:3](p.queries[0]), cosine))
    assert scores.residual is None and scores.provenance["solver"].startswith("Embeddings(layer='2', ")
    assert not any(m._forward_hooks for m in p.model.modules())


def test_representations_by_a_function():
    p = problem("mlp")
    found = Embeddings(lambda model, batch: model(batch[0]).softmax(1)).fit(p.model, p.task, p.train).score(p.queries)
    close(found.values, similar(p.outputs().softmax(1), p.outputs(p.queries).softmax(1), True))


def test_representations_of_images_are_flattened():
    p = problem("cnn_groups")
    with torch.no_grad():
        train, queries = (p.reference[:2](data[0]).flatten(1) for data in (p.train, p.queries))
    found = Embeddings("1", batch_size=3).fit(p.model, p.task, p.train).score(p.queries)
    close(found.values, similar(train, queries, True))


def pad(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pads to the longest of the batch."""
    x, y = zip(*rows, strict=True)
    return (
        nn.utils.rnn.pad_sequence(list(x), batch_first=True, padding_value=PAD),
        nn.utils.rnn.pad_sequence(list(y), batch_first=True, padding_value=-100),
    )


@pytest.mark.parametrize("cosine", [True, False])
def test_representations_of_sequences_are_means_over_real_positions(cosine):
    p = problem("tied_embedding")
    with torch.no_grad():
        means = []
        for x, y in (p.train, p.queries):
            h = p.reference.mix(mixed(p.reference, x))
            means.append(
                torch.stack([t[real].mean(0) if real.any() else 0 * t[0] for t, real in zip(h, y >= 0, strict=True)])
            )
    found = Embeddings("mix", cosine, batch_size=4).fit(p.model, p.task, p.train).score(p.queries)
    close(found.values, similar(*means, cosine))
    assert (found.values[:, 1] == 0).all()  # no labelled position
    lengths = [[max(1, int((x != PAD).sum())) for x in data[0]] for data in (p.train, p.queries)]
    loaders = [
        DataLoader([(x[:n], y[:n]) for x, y, n in zip(*data, some, strict=True)], batch_size=2, collate_fn=pad)
        for data, some in zip((p.train, p.queries), lengths, strict=True)
    ]
    close(Embeddings("mix", cosine).fit(p.model, p.task, loaders[0]).score(loaders[1]).values, found.values)


def mixed(model: nn.Module, tokens: Tensor) -> Tensor:
    x, real = model.embed(tokens), (tokens != PAD).unsqueeze(-1)
    return (x * real).cumsum(1) / real.cumsum(1).clamp(min=1)


def test_representations_of_a_task_without_padding_are_means_over_all_positions():
    p = problem("time_first")
    with torch.no_grad():
        train, queries = (p.reference.first(data[0]).mean(1) for data in (p.train, p.queries))

    def layer(model, batch):
        return model.first(batch[0])

    close(Embeddings(layer).fit(p.model, p.task, p.train).score(p.queries).values, similar(train, queries, True))


def test_representations_are_those_of_the_model_in_eval_mode():
    model, x = nn.Sequential(nn.Linear(3, 50), nn.Dropout(), nn.Linear(50, 2)).train(), torch.randn(6, 3)
    task, y = Classification(), torch.zeros(6, dtype=torch.long)
    found = Embeddings("1", cosine=False).fit(model, task, (x, y)).score((x, y)).values
    assert model.training and model[1].training
    with torch.no_grad():
        close(found, similar(model[0](x), model[0](x), False), 1e-6)


class Pair(nn.Module):
    """A layer of two outputs, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head, self.idle = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_layers_that_give_no_representation_are_refused():
    train = torch.randn(5, 6, 3), torch.zeros(5, dtype=torch.long)
    model, task = Pair().train(), Classification()
    with pytest.raises(InputError, match=r"layer must be a module of the model \(lstm, head, idle\), got 'nothing'"):
        Embeddings("nothing").fit(model, task, train)
    for layer, got in (("lstm", "tuple"), ("idle", "NoneType"), (lambda m, b: m(b[0])[:2], r"\(2, 2\)")):
        with pytest.raises(InputError, match=f"output must be a tensor with the 5 examples first, got {got}"):
            Embeddings(layer).fit(model, task, train)
    assert model.training and not any(m._forward_hooks for m in model.modules())


# --- chance ---------------------------------------------------------------------------------------------------------


def test_random_scores():
    p = problem("mlp")
    one, again, other = (Random(seed).fit(p.model, p.task, p.train).score(p.queries) for seed in (3, 3, 4))
    assert one.values.shape == (3, 11) and torch.equal(one.values, again.values)
    assert not torch.equal(one.values, other.values) and one.provenance == {"solver": "Random(seed=3)"}
    many = Random().fit(p.model, p.task, (torch.zeros(2000),)).score((torch.zeros(100),)).values
    assert abs(float(many.mean())) < 0.01 and float(many.std()) == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(many[0], many[1])[0, 1]) < 0.1


def test_provenance_can_be_written():
    p = problem("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (GradCos(), Embeddings("2"), Random()):
            json.dumps(method.fit(p.model, p.task, p.train).score(p.queries).provenance)
