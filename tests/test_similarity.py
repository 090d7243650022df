"""Influence similarity against dense matrices, its invariants, and the TF-IDF identity of Klochkov & Liu (2024)."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import problem
from test_candidates import language
from wherefrom import CG, EKFAC, GGN, Exact, Identity, Influence, InputError, Neumann, Task, similarity
from wherefrom.hf import CausalLM

NAMES = ["mlp", "norms", "mlp_regression"]


def cosines(a: Tensor, b: Tensor, inverse: Tensor) -> Tensor:
    """Entry by entry: (n, m)."""
    pairs = [(x @ inverse @ y) / ((x @ inverse @ x) * (y @ inverse @ y)).sqrt() for x in a for y in b]
    return torch.stack(pairs).view(len(a), len(b))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_similarities_equal_the_dense_ones(name, damping):
    p = problem(name)
    A = torch.linalg.inv(p.ggn() + damping * torch.eye(p.dim).double())
    influence = Influence(Exact(), damping, batch_size=4).fit(p.model, p.task, p.train)
    asked, train = p.loss_gradients(p.queries), p.loss_gradients()
    found = similarity(influence, p.queries)
    torch.testing.assert_close(found.values, cosines(asked, asked, A), rtol=1e-8, atol=1e-10)
    found = similarity(influence, p.queries, p.train)
    torch.testing.assert_close(found.values, cosines(asked, train, A), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [Exact(), CG(tolerance=1e-6), EKFAC(), CG(EKFAC(), tolerance=1e-6)], ids=repr)
def test_unit_diagonal_at_most_one_and_symmetric(solver):
    p = problem("mlp")
    influence = Influence(solver, 1e-3).fit(p.model, p.task, p.train)
    found = similarity(influence, p.train)
    assert found.values.shape == (p.n, p.n)
    torch.testing.assert_close(found.values.diagonal(), torch.ones(p.n).double(), rtol=1e-14, atol=0)
    gap = found.provenance["measured"]["asymmetry"]
    assert gap == float((found.values - found.values.T).abs().max()) and gap < 1e-4
    assert found.values.abs().max() <= 1 + gap + 1e-14
    assert found.values.fill_diagonal_(0).abs().max() < 1 and f"asymmetry {gap:.2g}" in str(found)
    across = similarity(influence, p.train, p.train)  # solved apart
    torch.testing.assert_close(across.values.diagonal(), torch.ones(p.n).double(), rtol=1e-4, atol=0)


def test_much_damping_leaves_the_cosines_of_gradients():
    p = problem("mlp")
    g = p.loss_gradients(p.queries)
    wanted = F.normalize(g) @ F.normalize(g).T
    found = similarity(Influence(Identity()).fit(p.model, p.task, p.train), p.queries).values
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for solver in (Exact(), EKFAC()):
        gaps = []
        for damping in (1e3, 1e5):
            influence = Influence(solver, damping).fit(p.model, p.task, p.train)
            gaps.append(float((similarity(influence, p.queries).values - wanted).abs().max()))
        assert gaps[1] < 1e-4 and gaps[1] == pytest.approx(gaps[0] / 100, rel=0.05)


def test_the_loss_is_on_both_sides_and_its_scale_drops_out():
    """The measurement of a language model is the mean over tokens, its loss the sum: both give the same cosines."""
    model, train, _ = language()
    influence = Influence(EKFAC(), 0.1, parameters="mlp").fit(model, CausalLM(), train)
    found = similarity(influence, train, certify=False)

    class Mean(CausalLM):
        def loss(self, outputs, batch):
            return self.measurement(outputs, batch)

        def measurement(self, outputs, batch):
            return CausalLM.loss(self, outputs, batch) / (self.labels(batch) != -100).sum(1)

    mean = Influence(EKFAC(), 0.1, parameters="mlp").fit(model, CausalLM(), train)
    vars(mean.problem)["task"] = Mean()
    torch.testing.assert_close(similarity(mean, train, certify=False).values, found.values, rtol=1e-9, atol=1e-11)
    assert found.residual is None


def test_an_example_without_a_gradient_is_named():
    p = problem("masked_sequence")
    influence = Influence(Exact(), 0.1).fit(p.model, p.task, p.train)
    for asked in ((p.train,), (p.train, p.queries), (p.queries, p.train)):
        with pytest.raises(InputError, match=r"self-influence must be positive to divide by, got 0 for example 1 "):
            similarity(influence, *asked)


# --- a bag of words (appendix D of the paper) ----------------------------------------------------------------------


class Bag(nn.Module):
    """One logit per word, whatever the document."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.words = nn.Linear(1, len(logits), bias=False, dtype=torch.float64)
        self.words.weight = nn.Parameter(logits.unsqueeze(1))

    def forward(self, frequencies: Tensor) -> Tensor:
        return self.words(torch.ones_like(frequencies[:, :1]))


class BagOfWords(Task):
    """The mean loss of a document's tokens; a batch is its term frequencies, (B, V)."""

    def outputs(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor]) -> Tensor:
        return -(batch[0] * outputs.log_softmax(1)).sum(1)

    def resample(self, outputs: Tensor, batch: tuple[Tensor], rng: torch.Generator) -> tuple[Tensor]:
        drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=rng)
        return (F.one_hot(drawn[:, 0], outputs.shape[1]).double(),)


@functools.cache
def bag() -> tuple[Bag, Tensor, Tensor]:
    """The model at its optimum, where p is the mean term frequency; TF (40, V) and p (V,)."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.multinomial(1 / torch.arange(1.0, 15), 40 * 30, True, generator=rng).view(40, 30)
    tf = F.one_hot(counts, 14).double().mean(1)
    p = tf.mean(0)
    assert (p > 0).all()
    return Bag(p.log()), tf, p


def kernel(tf: Tensor, p: Tensor, damping: float) -> Tensor:
    """The inverse of diag(p) - p p^T + damping by Sherman and Morrison, for any damping."""
    g = p - tf
    shared = g @ (p / (p + damping))
    return (g / (p + damping)) @ g.T + torch.outer(shared, shared) / (1 - (p * p / (p + damping)).sum())


SOLVERS = {
    "exact": (Exact(), 1e-10),
    "cg": (CG(tolerance=1e-12), 1e-10),
    "ekfac-cg": (CG(EKFAC(), tolerance=1e-12), 1e-10),
    "lissa": (Neumann(step=3.0, batch=8, steps=800), 1e-8),  # every minibatch has the same curvature
    "astra": (Neumann(EKFAC(), step=0.5, batch=8, steps=300), 1e-8),
}


@pytest.mark.parametrize("damping", [0.1, 1e-2])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_bag_of_words_has_its_kernel_at_every_damping(name, damping):
    model, tf, p = bag()
    solver, tolerance = SOLVERS[name]
    influence = Influence(solver, damping, GGN).fit(model, BagOfWords(), (tf,))
    found, wanted = influence.score((tf,)).values, kernel(tf, p, damping)
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["exact", "cg", "ekfac-cg", "astra"])
def test_without_damping_the_kernel_is_an_inner_product_of_weighted_term_frequencies(name):
    """sum_t TF(t, d) TF(t, d') / p_t - 1: p^-1/2 plays the part of an IDF. The error is O(damping / min p)."""
    model, tf, p = bag()
    wanted = (tf / p) @ tf.T - 1
    gaps = []
    for damping in (1e-5, 1e-6):
        influence = Influence(SOLVERS[name][0], damping).fit(model, BagOfWords(), (tf,))
        gaps.append(float((influence.score((tf,)).values - wanted).abs().max() / wanted.abs().max()))
    assert gaps[1] < 1e-6 / float(p.min()) and gaps[1] == pytest.approx(gaps[0] / 10, rel=0.05)
