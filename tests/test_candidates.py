"""Shortlists: what they hold, what they miss, and that scores of their examples are those of the full scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

import wherefrom
from problems import problem
from wherefrom import (
    BM25,
    CG,
    EKFAC,
    TFIDF,
    Certificate,
    Exact,
    Influence,
    InputError,
    Scores,
    recall,
    rescored,
    shortlist,
)
from wherefrom.data.examples import Examples
from wherefrom.hf import CausalLM, pad

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def scores(values: list[list[float]]) -> Scores:
    found = torch.tensor(values, dtype=torch.float64)
    return Scores(found, Certificate.of_nothing_solved(len(found)))


CHEAP = scores([[5, 1, 3, 3, -9], [0, 0, 0, 2, 1], [1, 2, 3, 4, 5]])
FULL = scores([[9, 8, 7, 1, 0], [0, 1, 2, 3, 4], [5, 1, 4, 2, 3]])


def test_a_shortlist_holds_the_best_of_each_query_once():
    assert shortlist(CHEAP, 1).tolist() == [0, 3, 4]
    assert shortlist(CHEAP, 2).tolist() == [0, 2, 3, 4]  # 2 and 3 tie for the first query: the lower number
    assert shortlist(CHEAP, 5).tolist() == [0, 1, 2, 3, 4]
    assert shortlist(scores([[1, 7, 7]]), 1).tolist() == [1]


def test_recall_by_hand():
    """The two best are {0, 1}, {3, 4} and {0, 2}."""
    assert recall(torch.tensor([0, 3, 4]), FULL, 2).tolist() == [0.5, 1.0, 0.5]
    assert recall(torch.tensor([1]), FULL, 2).tolist() == [0.5, 0.0, 0.0]
    assert recall(torch.arange(5), FULL, 3).tolist() == [1, 1, 1]
    own = torch.tensor([[0, 1], [0, 1], [2, 4]])  # a shortlist for each query
    assert recall(own, FULL, 2).tolist() == [1.0, 0.0, 0.5]
    found = recall(CHEAP.top(2).proponents, FULL, 2)  # {0, 2}, {3, 4}, {4, 3}
    assert found.tolist() == [0.5, 1.0, 0.0] and found.dtype == torch.float64


@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "tied_embedding"])
@pytest.mark.parametrize("solver", [Exact(), EKFAC(), CG(tolerance=1e-12)], ids=lambda s: type(s).__name__)
def test_rescored_are_the_columns_of_the_full_scores(name, solver):
    p = problem(name)
    damping = 1e-2 * float(p.ggn().diagonal().mean())
    influence = Influence(solver, damping, batch_size=4).fit(p.model, p.task, p.train)
    full = influence.score(p.queries, self_influence=True)
    index = torch.tensor([7, 0, 8, 3, 4, 1])
    found = rescored(influence, p.queries, index, self_influence=True)
    torch.testing.assert_close(found.values, full.values[:, index], **EXACT)
    torch.testing.assert_close(found.self_influence, full.self_influence[index], **EXACT)
    assert found.residual is not None and full.residual is not None
    torch.testing.assert_close(found.residual, full.residual, rtol=1e-6, atol=1e-14)
    assert found.provenance["examples"] == p.n  # scores / N is still the change of f
    inside = full.values[:, index].argsort(dim=1, descending=True)
    assert torch.equal(found.top(3).proponents, index[inside[:, :3]])
    assert torch.equal(found.top(3).opponents, index[inside.flip(1)[:, :3]])
    torch.testing.assert_close(found.top(2).proponent_scores, full.values.gather(1, found.top(2).proponents), **EXACT)


def language() -> tuple:
    """A tiny GPT-2, ragged sequences as a DataLoader that pads, and the texts."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, n_positions=9, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()
    texts = [torch.randint(13, (3 + i % 6,)).tolist() for i in range(17)]
    train = DataLoader([{"input_ids": t, "labels": t} for t in texts], batch_size=4, collate_fn=pad)
    return model, train, texts


@pytest.mark.parametrize("method", [TFIDF(), BM25()], ids=repr)
def test_words_shorten_the_list_for_a_language_model(method):
    model, train, texts = language()
    influence = Influence(EKFAC(), 0.1, parameters="mlp").fit(model, CausalLM(), train)
    asked = [texts[5], texts[11]]
    queries = pad([{"input_ids": t, "labels": t} for t in asked])
    index = shortlist(method.fit(texts).score(asked), 4)
    assert {5, 11} <= set(index.tolist()) and len(index) <= 8
    full = influence.score(queries)
    found = rescored(influence, queries, index, certify=False)
    torch.testing.assert_close(found.values, full.values[:, index], **EXACT)
    assert found.top(1).proponents[:, 0].tolist() == [5, 11]
    assert recall(index, full, 1).tolist() == [1, 1]


def test_the_numbers_are_kept(tmp_path):
    p = problem("mlp")
    influence = Influence(Exact(), 0.1).fit(p.model, p.task, p.train)
    found = rescored(influence, p.queries, [8, 2, 5], self_influence=True, folder=tmp_path / "run")
    again = rescored(influence, p.queries, [8, 2, 5], self_influence=True, folder=tmp_path / "run")
    assert torch.equal(found.values, again.values)
    found.save(tmp_path / "scores")
    for kept in (Scores.load(tmp_path / "scores"), found.relative(), wherefrom.ensemble([found, found])):
        assert kept.numbers is not None and kept.numbers.tolist() == [8, 2, 5]
    loaded = Scores.load(tmp_path / "scores")
    for one, other in ((found, loaded), (found.certificate, loaded.certificate)):
        for f in dataclasses.fields(one):
            a, b = getattr(one, f.name), getattr(other, f.name)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else f.name == "certificate" or a == b
            assert same, f.name
    with pytest.raises(InputError, match="of the same training examples"):
        wherefrom.ensemble([found, dataclasses.replace(found, numbers=torch.tensor([8, 2, 6]))])
    with pytest.raises(InputError, match="of the same training examples"):
        wherefrom.ensemble([found, dataclasses.replace(found, numbers=None)])


@pytest.mark.parametrize("index", [[11], [-1], [0.5], [True, False], [[0, 1]], []])
def test_what_is_no_number_of_a_training_example_is_refused(index):
    p = problem("mlp")
    influence = Influence(Exact(), 0.1).fit(p.model, p.task, p.train)
    with pytest.raises(InputError, match=r"index must be numbers of train examples, 0\.\.10"):
        rescored(influence, p.queries, index)


def test_a_subset_is_the_same_examples_in_every_form_of_data():
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7)
    index = torch.tensor([6, 0, 3])

    class Rows:
        def __len__(self) -> int:
            return 7

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return x[i], y[i]

    def turned(rows: list) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([y for _, y in rows]), torch.stack([x for x, _ in rows])

    reverse = DataLoader(Rows(), batch_size=2, collate_fn=turned)
    for data in ((x, y), [x, y], {"x": x, "y": y}, x, Rows(), DataLoader(Rows(), batch_size=2), reverse):
        whole = Examples(data)
        some = whole.subset(index)
        assert len(some) == 3 and some.batch_size == whole.batch_size
        batches = [batch for _, batch in some.batches(x.device, x.dtype)]
        wanted = [whole.batch(part, x.device, x.dtype) for part in index.split(whole.batch_size)]
        assert str(batches) == str(wanted)
        assert some.fingerprint() != whole.fingerprint()
    assert Examples((x, y)).subset(index).fingerprint() == Examples((x[index], y[index])).fingerprint()
