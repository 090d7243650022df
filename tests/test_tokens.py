"""Scores split over the tokens of training sequences and of queries, against weights copied for each position."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import wherefrom  # noqa: E402
from test_hf_models import IGNORE, Case, case, double, padded  # noqa: E402
from wherefrom.errors import AttributionWarning, InputError, UnsupportedError  # noqa: E402
from wherefrom.hf import (  # noqa: E402
    CausalLM,
    SequenceClassification,
    TokenClassification,
    completion_batch,
    pad,
)

__all__ = ["double"]  # the fixture that keeps models in float64

MODELS = ["gpt2", "llama", "mixtral", "gpt2+lora", "llama+dora", "qwen3", "qwen2_moe", "bert_tokens"]
USUAL = ["gpt2", "llama", "mixtral", "gpt2+lora"]
SOLVERS = {
    "identity": wherefrom.Identity(),
    "ekfac": wherefrom.EKFAC(),
    "exact": wherefrom.Exact(),
    "projection": wherefrom.RandProj(rank=20),
}
INDEX = [3, 0, 4, 2]
QUERIES = completion_batch(None, [[5, 6, 7], [8, 3]], [[9, 4], [10, 11, 12]])


def fitted(c: Case, solver="identity", size=2, damping=0.05, **options) -> wherefrom.FittedInfluence:
    chosen = SOLVERS[solver] if isinstance(solver, str) else solver
    influence = wherefrom.Influence(chosen, damping, batch_size=size, progress=False, **options)
    return influence.fit(c.model, c.task, c.train)


def by_token(influence: wherefrom.FittedInfluence, asked, index, measurement=None) -> Tensor:
    return influence.solve(asked, measurement, certify=False).by_token(index)


def by_block(influence: wherefrom.FittedInfluence, asked, index) -> dict[str, Tensor]:
    return influence.solve(asked, certify=False).by_block(index)


def by_query_token(influence: wherefrom.FittedInfluence, asked, index, parts=True) -> Tensor:
    return influence.solve(asked, certify=False, by_token=parts).by_query_token(index)


def queries(c: Case) -> dict[str, Tensor]:
    return QUERIES if isinstance(c.task, CausalLM) else {k: t[:2] for k, t in c.train.items()}


# --- an independent computation ---


@contextlib.contextmanager
def copied(model: nn.Module, S: int):
    """A copy of every trainable parameter for each of S positions of one sequence; layers run on one at a time."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    copies = {name: p.detach().expand(S, *p.shape).clone().requires_grad_() for name, p in model.named_parameters()}
    now: list[int] = []  # the position at hand, inside a layer that calls others

    def position(value, t):
        if isinstance(value, Tensor) and value.shape[:2] == (1, S):
            return value[:, t : t + 1]
        return value[t : t + 1] if isinstance(value, Tensor) and value.shape[:1] == (S,) else value

    def patch(module: nn.Module) -> None:
        own = {part: names[id(p)] for part, p in module._parameters.items() if id(p) in names}

        def at(t, args, kwargs):
            held = {part: copies[name][t] for part, name in own.items()}
            del module.forward
            try:
                return torch.func.functional_call(module, held, args, kwargs, tie_weights=False)
            finally:
                module.forward = forward

        def forward(*args, **kwargs):
            if now:
                return at(now[0], args, kwargs)
            found = []
            for t in range(S):
                now.append(t)
                found.append(at(t, tuple(position(a, t) for a in args), {k: position(a, t) for k, a in kwargs.items()}))
                now.pop()
            if isinstance(found[0], tuple):
                return tuple(torch.cat(some) for some in zip(*found, strict=True))
            return torch.cat(found, int(found[0].ndim > 2))

        module.forward = forward

    patched = [module for module in model.modules() if any(id(p) in names for p in module._parameters.values())]
    try:
        for module in patched:
            patch(module)
        yield {name: copies[name] for name in names.values()}
    finally:
        for module in patched:
            module.__dict__.pop("forward", None)


def gradients_by_position(c: Case, i: int) -> dict[str, Tensor]:
    """The gradient of the loss of example i in each position's own copy of a parameter: name to (T, *shape)."""
    S = int(c.train["attention_mask"][i].sum())
    with copied(c.model, S) as copies:
        grads = torch.autograd.grad(c.loss(i), list(copies.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(copies, grads, strict=True))


def test_the_copies_are_used_one_at_each_position():
    c = case("llama")
    grads = gradients_by_position(c, 2)
    for name, g in c.gradient(c.loss(2)).items():
        torch.testing.assert_close(grads[name].sum(0), g, rtol=1e-9, atol=1e-12)
    assert not grads["model.layers.0.mlp.up_proj.weight"][-1].any()  # the last position predicts nothing


# --- tokens of training sequences ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("solver", ["identity", "ekfac"])
def test_parts_equal_those_of_weights_copied_for_each_position(name, solver):
    c = case(name)
    influence = fitted(c, solver)
    x = influence.inverse.apply(influence.query_gradients(queries(c)).dense()).to_parameters()
    found = by_token(influence, queries(c), INDEX)
    assert found.shape == (2, 4, 6) and (found != 0).sum() > 14
    for n, i in enumerate(INDEX):
        g = gradients_by_position(c, i)
        wanted = sum(x[k].flatten(1) @ g[k].flatten(1).T for k in x)
        T = wanted.shape[1]
        torch.testing.assert_close(found[:, n, :T], wanted, rtol=1e-8, atol=1e-9)
        assert not found[:, n, T:].any()


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("solver", SOLVERS)
def test_parts_sum_to_the_scores(name, solver):
    c = case(name)
    influence = fitted(c, solver, size=3)
    whole = influence.score(queries(c), certify=False).values[:, INDEX]
    close = {"rtol": 1e-10, "atol": 1e-10 * float(whole.abs().max())}
    torch.testing.assert_close(by_token(influence, queries(c), INDEX).sum(2), whole, **close)
    torch.testing.assert_close(sum(by_block(influence, queries(c), INDEX).values()), whole, **close)


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("solver", ["identity", "ekfac"])
def test_parts_of_float32_models_sum_to_the_scores(name, solver):
    c = case(name)
    c.model.float()
    influence = fitted(c, solver)
    whole = influence.score(queries(c), certify=False).values[:, INDEX]
    assert whole.dtype == torch.float32
    tokens, blocks = by_token(influence, queries(c), INDEX).sum(2), sum(by_block(influence, queries(c), INDEX).values())
    for found in (tokens, blocks, by_query_token(influence, queries(c), INDEX).sum(1)):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert_tokens"])
def test_padding_company_and_order_change_no_part(name):
    c = case(name)
    solver = wherefrom.EKFAC(labels="true")
    influence = fitted(c, solver, size=5, curvature=wherefrom.EmpiricalFisher)
    index = list(range(5))
    wanted = by_token(influence, queries(c), index)
    close = {"rtol": 1e-8, "atol": 1e-9 * float(wanted.abs().max())}
    order = [3, 0, 2, 4, 1]
    torch.testing.assert_close(by_token(influence, queries(c), order), wanted[:, order], **close)
    torch.testing.assert_close(by_token(influence, queries(c), [2]), wanted[:, [2]], **close)
    for left, right, size in ((3, 0, 2), (0, 4, 5), (2, 2, 1)):
        longer = Case(c.model, c.task, padded(c.train, left, right))
        found = by_token(fitted(longer, solver, size, curvature=wherefrom.EmpiricalFisher), queries(c), index)
        torch.testing.assert_close(found[..., :6], wanted, **close)
        assert found.shape == (2, 5, 6 + left + right) and not found[..., 6:].any()


def test_sequences_of_different_lengths_are_as_long_as_the_longest_asked_for():
    c = case("gpt2")
    examples = [{k: t[0] for k, t in c.alone(i).items()} for i in range(5)]
    lengths = [len(e["input_ids"]) for e in examples]
    loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=pad)
    ragged = fitted(Case(c.model, c.task, loader), size=None)
    wanted = by_token(fitted(c), QUERIES, [0, 1, 3, 4])
    longest = max(lengths[i] for i in (0, 1, 3, 4))
    for order in ([0, 1, 2, 3], [1, 2, 0, 3]):
        found = by_token(ragged, QUERIES, [(0, 1, 3, 4)[i] for i in order])
        assert found.shape[2] == longest < 6
        torch.testing.assert_close(found, wanted[:, order, :longest], rtol=1e-9, atol=1e-11)


class Placed(nn.Module):
    """Positions of a table that is used once for the whole batch, and normed before they meet the tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(13, 4), nn.Embedding(6, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 13)

    def forward(self, input_ids, **_):
        x = self.tokens(input_ids) + self.norm(self.places(torch.arange(input_ids.shape[1]).unsqueeze(0)))
        return {"logits": self.head((x.cumsum(1) / 3).tanh())}


def test_a_table_of_positions_may_be_used_once_for_the_whole_batch():
    torch.manual_seed(0)
    c = Case(Placed().double(), CausalLM(), case("gpt2").train)
    for chosen in (None, "norm"):
        influence = fitted(c, parameters=chosen)
        x = influence.query_gradients(c.train).dense().to_parameters()
        found = by_token(influence, c.train, [0, 2, 3])
        for n, i in enumerate([0, 2, 3]):
            S = int(c.train["attention_mask"][i].sum())
            batch = c.alone(i)
            with copied(c.model, S) as copies:
                loss = c.task.loss(c.task.outputs(c.model, batch), batch).sum()
                grads = torch.autograd.grad(loss, [copies[k] for k in x])
            wanted = sum(t.flatten(1) @ g.flatten(1).T for t, g in zip(x.values(), grads, strict=True))
            torch.testing.assert_close(found[:, n, :S], wanted, rtol=1e-9, atol=1e-11)


def test_another_measurement_is_split_too():
    c = case("gpt2")
    influence = fitted(c)
    whole = influence.score(QUERIES, c.task.loss).values[:, INDEX]
    torch.testing.assert_close(by_token(influence, QUERIES, INDEX, c.task.loss).sum(2), whole, rtol=1e-9, atol=1e-9)


class Convolved(nn.Module):
    """A convolution over tokens between an embedding and a head; its padding decides how many positions it sees."""

    def __init__(self, padding):
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.mix = nn.Conv1d(6, 6, 3, padding=padding)
        self.head = nn.Linear(6, 13)

    def forward(self, input_ids, attention_mask):
        x = self.mix(self.table(input_ids).mT)[..., : input_ids.shape[1]].mT.tanh()
        return self.head(x) * attention_mask.unsqueeze(2)


def convolved(padding) -> Case:
    torch.manual_seed(0)
    c = case("gpt2")  # for its data
    tokens = {k: t[[0, 2, 4]] for k, t in c.train.items()}
    mask = torch.ones_like(tokens["labels"])  # no causal task: it sees the tokens on both sides
    return Case(Convolved(padding).double(), TokenClassification(), tokens | {"attention_mask": mask})


def test_convolutions_are_split_where_they_see_the_positions_of_the_sequence():
    c = convolved(1)
    influence = fitted(c, parameters="mix")
    x = influence.query_gradients(c.train).dense().to_parameters()["mix.weight"]
    shift = torch.zeros(6, 6, 6, 3, dtype=torch.float64, requires_grad=True)  # a change of the kernel at each position

    def changed(module, args, out):
        patches = nn.functional.unfold(nn.functional.pad(args[0], (1, 1)).unsqueeze(2), (1, 3)).view(1, 6, 3, 6)
        return out + torch.einsum("nckt,tock->not", patches, shift)

    found = by_token(influence, c.train, [0, 1, 2])
    for i in range(3):
        batch = {k: t[i : i + 1] for k, t in c.train.items()}
        with c.model.mix.register_forward_hook(changed):
            loss = c.task.loss(c.task.outputs(c.model, batch), batch)
        (g,) = torch.autograd.grad(loss.sum(), shift)
        bias = influence.query_gradients(c.train).dense().to_parameters()["mix.bias"]
        wanted = torch.einsum("qock,tock->qt", x, g)
        rest = found[:, i] - wanted
        torch.testing.assert_close(rest.sum(1), bias @ c.gradient(loss_of(c, batch))["mix.bias"], rtol=1e-8, atol=1e-10)


def loss_of(c: Case, batch) -> Tensor:
    return c.task.loss(c.task.outputs(c.model, batch), batch).sum()


def test_layers_with_other_positions_are_refused_by_name():
    influence = fitted(convolved(2))
    with pytest.raises(UnsupportedError, match="mix does not see the 6 positions of a sequence one by one"):
        by_token(influence, QUERIES, [0])
    assert by_token(fitted(convolved(2), parameters="head|table"), QUERIES, [0]).shape == (2, 1, 6)


@pytest.mark.filterwarnings("ignore:.*slow path:wherefrom.errors.AttributionWarning")
def test_parameters_without_positions_are_refused_by_name():
    c = case("gpt_oss")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.sinks takes the slow path"):
        by_token(fitted(c), QUERIES, [0])
    assert by_token(fitted(c, parameters="experts"), QUERIES, [0]).shape == (2, 1, 6)


def test_tasks_without_positions_are_refused():
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    influence = wherefrom.Influence(wherefrom.Identity()).fit(nn.Linear(4, 3), wherefrom.Classification(), (x, y))
    with pytest.raises(UnsupportedError, match="does not say which positions"):
        by_token(influence, (x, y), [0])
    with pytest.raises(UnsupportedError, match="token_measurements"):
        by_query_token(influence, (x, y), [0])


@pytest.mark.parametrize("index", [[], [5], [-1], 3, [0.5], [[0, 1]]])
def test_what_is_no_number_of_a_training_example_is_refused_before_anything_is_computed(index, monkeypatch):
    influence = fitted(case("gpt2"))
    solution = influence.solve(QUERIES, by_token=True)
    monkeypatch.setattr(type(influence.inverse), "apply", None)
    monkeypatch.setattr(type(influence.problem), "loss_gradients", None)
    for ask in (solution.by_token, solution.by_block, solution.by_query_token):
        with pytest.raises(InputError, match=r"index must be numbers of train examples, 0\.\.4, got"):
            ask(index)


def test_parts_that_the_outputs_do_not_move_are_refused():
    with pytest.raises(InputError, match="the parts of a measurement must be computed from the outputs"):
        by_query_token(fitted(case("gpt2")), QUERIES, [0], lambda outputs, _: torch.ones(outputs.shape[:2]))


def test_a_head_as_wide_as_the_sequence_is_long_is_no_sequence():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).double().eval()
    train = {"input_ids": torch.randint(9, (4, 16)), "labels": torch.tensor([0, 2, 1, 1])}
    influence = wherefrom.Influence(wherefrom.Identity(), progress=False).fit(model, SequenceClassification(), train)
    with pytest.warns(AttributionWarning, match="sees one vector of each sequence"):
        parts = by_token(influence, train, [0, 1, 2])
    wanted = influence.score(train).values[:, :3]
    torch.testing.assert_close(parts.sum(2), wanted, rtol=1e-10, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["bert", "roberta+lora"])
def test_a_head_on_one_vector_of_each_sequence_stands_at_the_first_position(name):
    c = case(name)
    c.train = {k: t[[0, 2, 4]] for k, t in c.train.items()}
    asked = {k: t[:2] for k, t in c.train.items()}
    with pytest.warns(AttributionWarning, match="sees one vector of each sequence"):
        found = by_token(fitted(c, "ekfac"), asked, [0, 1, 2])
    whole = fitted(c, "ekfac").score(asked, certify=False).values
    torch.testing.assert_close(found.sum(2), whole, rtol=1e-9, atol=1e-10 * float(whole.abs().max()))
    head = fitted(c, "ekfac", parameters="classifier")
    with pytest.warns(AttributionWarning, match="sees one vector of each sequence"):
        parts = by_token(head, asked, [0, 1, 2])
    assert parts[..., 0].all() and not parts[..., 1:].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttributionWarning)
        rest = by_token(fitted(c, parameters="lora" if "lora" in name else "layer"), asked, [0, 1, 2])
    assert (rest != 0).sum() > 10


class Pooled(nn.Module):
    """The mean of embeddings, with a norm of their channels if asked for, and a norm of the mean."""

    def __init__(self, channels: bool):
        super().__init__()
        self.table = nn.Embedding(13, 4)
        self.channels = nn.GroupNorm(2, 4) if channels else nn.Identity()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, **_):
        return self.head(self.norm(self.channels(self.table(input_ids).mT).tanh().mean(2)))


def test_a_norm_of_one_vector_has_one_part_and_a_norm_of_channels_is_refused():
    torch.manual_seed(0)
    tokens = case("bert").train
    tokens = {k: t[2:].clone() for k, t in tokens.items()} | {"attention_mask": torch.ones(3, 6, dtype=torch.long)}
    c = Case(Pooled(False).double(), SequenceClassification(), tokens)
    with pytest.warns(AttributionWarning, match="norm sees one vector"):
        parts = by_token(fitted(c, parameters="norm"), tokens, [0, 2])
    torch.testing.assert_close(parts[..., 0], fitted(c, parameters="norm").score(tokens).values[:, [0, 2]])
    assert not parts[..., 1:].any()
    c = Case(Pooled(True).double(), SequenceClassification(), tokens)
    with pytest.raises(UnsupportedError, match="channels does not see the 6 positions"):
        by_token(fitted(c, parameters="channels"), tokens, [0])


def test_sequences_without_a_mask_are_all_tokens():
    c = case("gpt2_sequences")
    bare = {k: t[[2, 2]] for k, t in c.train.items() if k != "attention_mask"}
    assert SequenceClassification().padding(bare).tolist() == [[True] * 6] * 2
    c.train = {k: t[[2, 2]] for k, t in c.train.items()}
    wanted = by_token(fitted(c), c.train, [0])
    torch.testing.assert_close(by_token(fitted(Case(c.model, c.task, bare)), bare, [0]), wanted)


# --- tokens of queries ---


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2+lora", "bert_tokens"])
@pytest.mark.parametrize(("solver", "memory"), [("identity", 2**31), ("ekfac", 2**31), ("ekfac", 1), ("exact", 2**31)])
def test_each_token_of_a_query_is_solved_by_itself(name, solver, memory):
    c = case(name)
    influence, asked = fitted(c, solver, memory=2**31), queries(c)
    found = by_query_token(fitted(c, solver, memory=memory), asked, INDEX)
    T = asked["input_ids"].shape[1]
    assert found.shape == (2, T, 4)
    close = {"rtol": 1e-7, "atol": 1e-9 * float(found.abs().max())}
    for t in range(T):
        one = influence.score(asked, lambda h, b, t=t: c.task.token_measurements(h, b)[:, t], certify=False)
        torch.testing.assert_close(found[:, t], one.values[:, INDEX], **close)
    whole = influence.score(asked, certify=False).values[:, INDEX]
    torch.testing.assert_close(found.sum(1), whole, **close)


def test_parts_of_a_measurement_stand_at_the_labelled_token():
    c = case("gpt2")
    h = c.task.outputs(c.model, QUERIES)
    parts = c.task.token_measurements(h, QUERIES)
    assert torch.equal(parts != 0, QUERIES["labels"] != IGNORE)
    torch.testing.assert_close(parts[0, 3], -h[0, 2].log_softmax(0)[9] / 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(parts.sum(1), c.task.measurement(h, QUERIES), rtol=1e-12, atol=0)
    shifted = padded(QUERIES, 3, 0)
    again = c.task.token_measurements(c.task.outputs(c.model, shifted), shifted)
    torch.testing.assert_close(again[:, :5], parts, rtol=1e-10, atol=1e-12)
    found = by_query_token(fitted(c), QUERIES, INDEX)
    assert torch.equal(found.any(2), QUERIES["labels"] != IGNORE)


def test_tokens_are_classified_where_they_stand():
    c = case("bert_tokens")
    h = c.task.outputs(c.model, c.train)
    parts = c.task.token_measurements(h, c.train)
    assert torch.equal(parts != 0, c.task.labels(c.train) != IGNORE)
    torch.testing.assert_close(parts.sum(1), c.task.measurement(h, c.train), rtol=1e-12, atol=1e-14)


def test_parts_of_ones_own_and_queries_without_labels():
    c = case("gpt2")
    influence = fitted(c)
    halves = lambda h, b: torch.stack([c.task.measurement(h, b) / 4, c.task.measurement(h, b) * 3 / 4], 1)  # noqa: E731
    found, whole = by_query_token(influence, QUERIES, INDEX, halves), influence.score(QUERIES).values[:, INDEX]
    torch.testing.assert_close(found, torch.stack([whole / 4, whole * 3 / 4], 1), rtol=1e-9, atol=1e-11)
    silent = QUERIES | {"labels": torch.full_like(QUERIES["labels"], IGNORE)}
    assert not by_query_token(influence, silent, INDEX).any()
    with pytest.raises(InputError, match=r"finite numbers of shape \(1, T\), got \(1,\)"):
        by_query_token(influence, QUERIES, INDEX, c.task.measurement)
    with pytest.raises(InputError, match="with NaN"):
        by_query_token(influence, QUERIES, INDEX, lambda h, b: h[..., 0] * float("nan"))
