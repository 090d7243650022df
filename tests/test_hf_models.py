"""Models of transformers and peft, tiny and in float64, against plain autograd one unpadded example at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import wherefrom.model.task  # noqa: E402
from problems import cross_entropy, negative_margin  # noqa: E402
from solving import apply, product  # noqa: E402
from wherefrom import EKFAC, GGN, KFAC, AttributionWarning, EmpiricalFisher, Problem  # noqa: E402
from wherefrom.data.examples import Examples  # noqa: E402
from wherefrom.errors import InputError  # noqa: E402
from wherefrom.hf import (  # noqa: E402
    CausalLM,
    Conv1DKind,
    SequenceClassification,
    TokenClassification,
    completion_batch,
    pad,
)
from wherefrom.persample import vectors  # noqa: E402
from wherefrom.persample.rows import Routed  # noqa: E402
from wherefrom.testing import check_layer  # noqa: E402

TIGHT = {"rtol": 1e-8, "atol": 1e-10}
SAME = {"rtol": 1e-10, "atol": 1e-12}
VOCABULARY, STEPS, IGNORE = 13, 6, -100
Batch = dict[str, Tensor]


class Double(TorchFunctionMode):
    """What models compute in float32 whatever their own type (norms, softmax, rotations) is computed in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def double(request) -> Iterator[None]:
    with contextlib.nullcontext() if "float32" in request.node.name else Double():
        yield


# --- models ---

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 4}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
MOE = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
CLASSES = {"num_labels": 3}
MODELS: dict[str, tuple[str, str, dict]] = {  # name of the config and of the model, and what differs
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GROUPED | MOE | {"num_local_experts": 3}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        GROUPED | MOE | {"num_experts": 4, "moe_intermediate_size": 5, "shared_expert_intermediate_size": 6},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        GROUPED | MOE | {"num_local_experts": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", CLASSES),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", CLASSES),
    "bert_tokens": ("BertConfig", "BertForTokenClassification", CLASSES),
    "bert_decoder": ("BertConfig", "BertLMHeadModel", {"is_decoder": True}),
    "gpt2_sequences": ("GPT2Config", "GPT2ForSequenceClassification", GPT2 | CLASSES),
}
ADAPTERS: dict[str, tuple[str, dict]] = {
    "gpt2+lora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "roberta+lora": ("roberta", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "llama+rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama+dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "gpt2+dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "mixtral+lora": ("mixtral", {"target_modules": ["v_proj", "o_proj"]}),
}
SLOW = {"gpt_oss": {"model.layers.0.self_attn.sinks", "model.layers.1.self_attn.sinks"}}
NAMES = [*MODELS, *ADAPTERS]
USUAL = ["gpt2", "llama", "mixtral", "roberta", "gpt2+lora", "llama+dora"]


@dataclass
class Case:
    """A model, its task and ragged training examples, and how its losses are written without the library."""

    model: nn.Module
    task: CausalLM | SequenceClassification | TokenClassification
    train: Batch

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def problem(self, **options) -> Problem:
        return Problem(self.model, self.task, self.train, progress=False, **options)

    def alone(self, i: int) -> Batch:
        """Example i without its padding."""
        real = self.train["attention_mask"][i].bool()
        return {k: t[i : i + 1] if t.ndim == 1 else t[i : i + 1, real] for k, t in self.train.items()}

    def logits(self, i: int) -> tuple[Tensor, Tensor]:
        """Logits of example i and its labels, those of next tokens where they are predicted: (1, ..., C), (1, ...)."""
        batch = self.alone(i)
        h = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return (h[:, :-1], batch["labels"][:, 1:]) if isinstance(self.task, CausalLM) else (h, batch["labels"])

    def loss(self, i: int) -> Tensor:
        return cross_entropy(*self.logits(i))[0]

    def measurement(self, i: int) -> Tensor:
        if isinstance(self.task, CausalLM):
            return self.loss(i) / max(1, int((self.alone(i)["labels"][0, 1:] != IGNORE).sum()))
        return negative_margin(*self.logits(i))[0]

    def gradients(self, value: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """Gradients of value(i), example by example: name to (n, *shape)."""
        rows = [self.gradient(value(i)) for i in range(len(self.train["input_ids"]))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.parameters}

    def gradient(self, scalar: Tensor, **options) -> dict[str, Tensor]:
        leaves = list(self.parameters.values())
        grads = torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True, **options)
        return dict(zip(self.parameters, grads, strict=True))

    def ggn(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """G v from dense Jacobians and output Hessians."""
        out, n = {name: torch.zeros_like(t) for name, t in v.items()}, len(self.train["input_ids"])
        for i in range(n):
            h, labels = (t[0] for t in self.logits(i))
            h = h[labels != IGNORE] if isinstance(self.task, CausalLM | TokenClassification) else h.unsqueeze(0)
            for row in h:
                jacobian = [self.gradient(x, retain_graph=True) for x in row]
                J = {name: torch.stack([j[name] for j in jacobian]).flatten(1) for name in v}  # (C, D)
                p = row.softmax(0).detach()
                Jv = sum(t.flatten(1) @ J[name].T for name, t in v.items())
                u = Jv @ (p.diag() - p.outer(p)) / n
                for name, t in out.items():
                    t += (u @ J[name]).view_as(t)
        return out


def build(name: str, seed: int = 0, **options) -> nn.Module:
    if name in ADAPTERS:
        base, adapter = ADAPTERS[name]
        torch.manual_seed(seed + 1)
        config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **adapter)
        model = peft.get_peft_model(build(base, seed, **options), config)
    else:
        config_name, model_name, extra = MODELS[name]
        torch.manual_seed(seed)
        config = getattr(transformers, config_name)(**SIZES | extra | options)
        model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for p in model.parameters():  # biases away from 0, scales away from 1
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def sequences(kind: str, n: int = 5, seed: int = 0, steps: int = STEPS) -> Batch:
    """Ragged sequences, every other one padded on the left; the second has no label, the third no padding."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (n, steps), generator=rng)
    mask = torch.zeros_like(tokens)
    for i, length in enumerate(torch.randint(3, steps, (n,), generator=rng).tolist()):
        length = steps if i == 2 else length
        start = steps - length if i % 2 else 0
        mask[i, start : start + length] = 1
    kept = mask.bool() & (torch.rand(tokens.shape, generator=rng) < 0.7)
    kept[1] = False
    labels = tokens if kind == "next" else torch.randint(3, tokens.shape, generator=rng)
    labels = labels[:, 0].clone() if kind == "sequence" else labels.where(kept, IGNORE)
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def case(name: str, **options) -> Case:
    model = build(name, **options)
    kind = type(model.get_base_model() if name in ADAPTERS else model).__name__
    if kind.endswith("SequenceClassification"):
        return Case(model, SequenceClassification(), sequences("sequence"))
    if kind.endswith("TokenClassification"):
        return Case(model, TokenClassification(), sequences("token"))
    return Case(model, CausalLM(), sequences("next"))


def padded(batch: Batch, left: int, right: int) -> Batch:
    """The same sequences with more padding."""
    more = {"labels": IGNORE}
    wider = {k: nn.functional.pad(t, (left, right), value=more.get(k, 0)) for k, t in batch.items() if t.ndim > 1}
    return batch | wider


def directions(problem: Problem, count: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {k: torch.randn(count, *s, generator=rng, dtype=torch.float64) for k, s in problem.shapes.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance) -> None:
    assert set(found) == set(wanted)
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, msg=lambda said, name=name: f"{name}: {said}", **tolerance)


# --- gradients ---


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_autograd_on_unpadded_examples(name):
    c = case(name)
    wanted, asked = c.gradients(c.loss), c.gradients(c.measurement)
    for size in (2, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttributionWarning)
            p = c.problem(batch_size=size)
            found = [p.loss_gradients(batch).dense().to_parameters() for _, batch in p.batches()]
            same(vectors.concatenate(found), wanted, **TIGHT)
            found = [p.measurement_gradients(batch).dense().to_parameters() for _, batch in p.batches()]
            same(vectors.concatenate(found), asked, **TIGHT)
    for name, t in wanted.items():  # softmax takes no notice of a bias on all keys
        assert t.abs().max() > 1e-6 or name.endswith("key.bias")


@pytest.mark.parametrize("name", NAMES)
def test_which_parameters_take_the_slow_path(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttributionWarning)
        layout = case(name).problem().layout
    slow = {parameter for block in layout.slow for parameter in block.shapes}
    assert slow == SLOW.get(name, set())
    assert bool(slow) == any("slow path" in str(w.message) for w in caught)


@pytest.mark.parametrize("name", USUAL)
def test_padding_order_and_company_of_an_example_change_nothing(name):
    c = case(name)
    p = c.problem()
    wanted = p.loss_gradients(c.train).dense().to_parameters()
    order = torch.tensor([3, 0, 2, 4, 1])
    for left, right in ((0, 4), (3, 0), (2, 2)):
        same(p.loss_gradients(padded(c.train, left, right)).dense().to_parameters(), wanted, **SAME)
    shuffled = p.loss_gradients({k: t[order] for k, t in c.train.items()}).dense().to_parameters()
    same(shuffled, {k: t[order] for k, t in wanted.items()}, **SAME)
    for i in range(5):
        same(p.loss_gradients(c.alone(i)).dense().to_parameters(), {k: t[i : i + 1] for k, t in wanted.items()}, **SAME)


# --- curvature ---


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
@pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
def test_products_equal_those_of_a_dense_gauss_newton_matrix(name):
    c = case(name)
    c.train = {k: t[:4] for k, t in c.train.items()}
    p = c.problem(batch_size=3)
    v = directions(p, 2)
    wanted = c.ggn(v)
    same(product(GGN(p, product="jvp"), v), wanted, **TIGHT)
    if name in ("mixtral", "gpt2+lora", "llama+dora", "roberta"):
        same(product(GGN(p, product="rows"), v), wanted, **TIGHT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
def test_corrected_eigenvalues_sum_to_the_mean_squared_gradient(name):
    c = case(name)
    p = c.problem(batch_size=2)
    inverse = EKFAC(labels="true").fit(EmpiricalFisher(p), 0.1)
    wanted = c.gradients(c.loss)
    for block in p.blocks:
        norm = sum(wanted[q].square().sum() for q in block.shapes) / 5
        torch.testing.assert_close(inverse.eigenvalues(block.name).sum(), norm, **TIGHT)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert_tokens"])
@pytest.mark.parametrize("solver", [KFAC(labels="true"), EKFAC(labels="true")])
def test_kronecker_factors_do_not_see_padding(name, solver):
    c = case(name)
    v = directions(c.problem(), 2)
    short = apply(solver.fit(EmpiricalFisher(c.problem(batch_size=5)), 0.1), v)
    c.train = padded(c.train, 1, 4)
    same(apply(solver.fit(EmpiricalFisher(c.problem(batch_size=2)), 0.1), v), short, **TIGHT)


def test_the_kronecker_factors_of_an_expert_are_those_of_its_tokens():
    """A and S of each expert, and KFAC's eigenvalues, from the inputs of the experts of one unpadded example each."""
    c = case("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    inverse = KFAC(labels="true").fit(EmpiricalFisher(c.problem(batch_size=2)), 0.1)
    experts = c.model.get_submodule("model.layers.1.mlp.experts")
    inputs: list[list[Tensor]] = [[], [], []]
    cotangents: list[list[Tensor]] = [[], [], []]
    for i in range(5):
        seen = {}
        with experts.register_forward_hook(lambda m, args, out, seen=seen: seen.update(args=args, out=out)):
            loss = c.loss(i)
        if not loss.requires_grad or not (c.alone(i)["labels"][0, 1:] != IGNORE).any():
            continue
        x, index, weights = seen["args"]
        (g,) = torch.autograd.grad(loss, seen["out"], retain_graph=True)
        for t in range(len(x)):
            for k in range(2):
                e = int(index[t, k])
                z = (experts.gate_up_proj[e] @ x[t]).detach().requires_grad_()
                gate, up = z.chunk(2)
                y = weights[t, k].detach() * experts.down_proj[e].detach() @ (nn.functional.silu(gate) * up)
                if g[t].any():
                    inputs[e].append(x[t].detach())
                    cotangents[e].append(torch.autograd.grad(y @ g[t], z)[0])
    for e in range(3):
        a, s = torch.stack(inputs[e]), torch.stack(cotangents[e])
        da, ds = (torch.linalg.eigvalsh(m.T @ m / len(m)).clamp(min=0) for m in (a, s))
        wanted = len(a) / 5 * ds.unsqueeze(1) * da
        torch.testing.assert_close(inverse.factors[name].kfac[e], wanted, rtol=1e-7, atol=1e-9)


def test_experts_keep_the_positions_of_their_tokens():
    c = case("mixtral")
    p = c.problem()
    rows = p.loss_gradients(c.train).rows["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(rows, Routed)
    real = c.task.padding(c.train)
    for n in range(5):
        each = [sorted(set(rows.positions[e, n].tolist()) - {-1}) for e in range(3)]
        assert sorted(t for some in each for t in some) == sorted(2 * real[n].nonzero()[:, 0].tolist())


# --- labels ---


def test_ignored_positions_draw_no_labels():
    for name in ("llama", "bert_tokens"):
        c = case(name)
        logits = c.task.outputs(c.model, c.train)
        drawn = c.task.resample(logits, c.train, torch.Generator().manual_seed(0))
        before, after = c.task.labels(c.train), c.task.labels(drawn)
        assert torch.equal(before == IGNORE, after == IGNORE)
        assert (after != before).any()
        longer = padded(c.train, 0, 3)
        again = c.task.resample(c.task.outputs(c.model, longer), longer, torch.Generator().manual_seed(0))
        assert torch.equal(c.task.labels(again)[:, :STEPS], after)
        loss = c.task.loss(logits, drawn)
        assert loss[1] == 0 and torch.equal(drawn["input_ids"] != 0, drawn["attention_mask"] != 0)


def test_how_many_labels_are_drawn_together_changes_none(monkeypatch):
    c = case("gpt2")
    logits = c.task.outputs(c.model, c.train)
    whole = c.task.resample(logits, c.train, torch.Generator().manual_seed(0))
    monkeypatch.setattr(wherefrom.model.task, "CHUNK", 3 * VOCABULARY)
    assert torch.equal(c.task.resample(logits, c.train, torch.Generator().manual_seed(0))["labels"], whole["labels"])


def test_batches_of_long_sequences_have_few():
    few = [{"input_ids": torch.ones(512, dtype=torch.long)}] * 20
    assert Examples(few).batch_size == 8
    assert Examples(few, batch_size=3).batch_size == 3
    assert Examples([{"input_ids": torch.ones(9999, dtype=torch.long)}]).batch_size == 1
    assert Examples((torch.zeros(9, 512), torch.zeros(9, dtype=torch.long))).batch_size == 256


def test_labels_are_drawn_from_the_model():
    c = case("gpt2")
    one = {k: t[2:3].expand(4000, -1) for k, t in c.train.items()}
    logits = c.task.outputs(c.model, {k: t[:1] for k, t in one.items()}).expand(4000, -1, -1)
    drawn = c.task.labels(c.task.resample(logits, one, torch.Generator().manual_seed(0)))
    for t in (c.task.labels(one)[0] != IGNORE).nonzero()[:, 0].tolist():
        frequency = drawn[:, t].bincount(minlength=VOCABULARY) / 4000
        torch.testing.assert_close(frequency.double(), logits[0, t].softmax(0), rtol=0, atol=0.04)


def test_the_loss_is_the_one_of_transformers_and_the_measurement_is_per_token():
    c = case("gpt2")
    right = {k: t[[0, 2, 4]] for k, t in c.train.items()}  # their own loss takes no batch padded on the left
    logits = c.task.outputs(c.model, right)
    count = (right["labels"][:, 1:] != IGNORE).sum(1)
    theirs = c.model(**right).loss
    torch.testing.assert_close(c.task.loss(logits, right).sum() / count.sum(), theirs, **SAME)
    torch.testing.assert_close(c.task.measurement(logits, right) * count, c.task.loss(logits, right), **SAME)


def test_without_labels_every_token_but_the_first_has_one():
    c = case("llama")
    plain = {k: t for k, t in c.train.items() if k != "labels"}
    labelled = plain | {"labels": plain["input_ids"].where(plain["attention_mask"].bool(), IGNORE)}
    logits = c.task.outputs(c.model, plain)
    assert torch.equal(c.task.loss(logits, plain), c.task.loss(logits, labelled))
    assert torch.equal(c.task.padding(plain).sum(1), plain["attention_mask"].sum(1) - 1)
    bare = {"input_ids": plain["input_ids"][2:3]}
    torch.testing.assert_close(c.task.outputs(c.model, bare), logits[2:3], **SAME)
    assert c.task.padding(bare).sum() == STEPS - 1


def test_padding_ends_with_the_last_position_that_predicts_a_label():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [0, 0, 5, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]),
        "labels": torch.tensor([[IGNORE, IGNORE, 7, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE, IGNORE, 7]]),
    }
    assert CausalLM().labels(batch).tolist() == [
        [IGNORE, 7, IGNORE, IGNORE, IGNORE],
        [IGNORE, 7, IGNORE, IGNORE, IGNORE],
    ]
    assert CausalLM().padding(batch).tolist() == [[True, True, False, False, False]] * 2


# --- settings of the model ---


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "bert_tokens"])
@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_attention_and_checkpointing_change_nothing(name):
    wanted = None
    for attention in ("sdpa", "eager"):
        for checkpointing in (False, True):
            c = case(name, attn_implementation=attention)
            if checkpointing:
                c.model.gradient_checkpointing_enable()
                c.model.enable_input_require_grads()
            hooks = str([m._forward_hooks for m in c.model.modules()])
            p = c.problem()
            v = directions(p, 1)
            found = p.loss_gradients(c.train).dense().to_parameters() | {
                f"Gv {k}": t for k, t in product(GGN(p, "jvp"), v).items()
            }
            wanted = wanted or found
            same(found, wanted, rtol=1e-9, atol=1e-11)
            assert str([m._forward_hooks for m in c.model.modules()]) == hooks


@pytest.mark.parametrize("setting", ["_attn_implementation", "_experts_implementation"])
def test_settings_without_all_derivatives_are_replaced_and_come_back(setting, monkeypatch):
    c = case("mixtral")
    wanted = c.problem().loss_gradients(c.train).dense().to_parameters()
    setattr(c.model.config, setting, "flash_attention_2" if "attn" in setting else "grouped_mm")
    before = getattr(c.model.config, setting)
    same(c.problem().loss_gradients(c.train).dense().to_parameters(), wanted, **TIGHT)
    assert getattr(c.model.config, setting) == before


def test_the_activation_of_gpt2_is_one_operation_while_the_library_looks():
    c = case("gpt2", activation_function="gelu_new")
    spelled = [m for m in c.model.modules() if type(m).__name__ == "NewGELUActivation"]
    inside = []
    spelled[0].register_forward_hook(lambda module, *_: inside.append(module.forward))
    p = c.problem()
    same(p.loss_gradients(c.train).dense().to_parameters(), c.gradients(c.loss), **TIGHT)
    v = directions(p, 1)
    same(product(GGN(p, "jvp"), v), product(GGN(p, "finite-difference"), v), rtol=1e-4, atol=1e-6)
    assert inside and all(getattr(f, "func", None) is nn.functional.gelu for f in inside[:2])
    assert not any("forward" in vars(m) for m in spelled)


def test_bfloat16_models_are_converted_to_float32_exactly():
    half = case("llama").model.to(torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in half.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=rng))
    c = Case(half, CausalLM(), sequences("next"))
    with pytest.warns(AttributionWarning, match="half precision"):
        p = c.problem()
    found = p.loss_gradients(c.train).dense().to_parameters()
    assert next(iter(found.values())).dtype == torch.float32 and half.dtype == torch.bfloat16
    c.model = half.double()
    for name, t in c.gradients(c.loss).items():
        torch.testing.assert_close(found[name].double(), t, rtol=1e-3, atol=1e-4 * float(t.abs().max()))


def test_float32_models_with_their_usual_kernels_are_as_good_as_float32_can_be():
    c = case("mixtral", intermediate_size=12)
    c.model.float()
    c.model.set_experts_implementation("grouped_mm")
    found = c.problem().loss_gradients(c.train).dense().to_parameters()
    for name, t in c.gradients(c.loss).items():
        torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-4 * float(t.abs().max()))


def test_a_model_without_logits_is_refused():
    c = case("llama")
    with pytest.raises(InputError, match="one that returns logits"):
        Problem(c.model.model, c.task, c.train).loss_gradients(c.train)


# --- which parameters ---


def test_parameters_are_chosen_by_pattern_and_their_share_is_told():
    c = case("llama")
    p = c.problem(parameters="mlp")
    assert set(p.shapes) == {name for name in c.parameters if ".mlp." in name}
    size, whole = 2 * 3 * 8 * 10, sum(t.numel() for t in c.parameters.values())
    assert f"attributing {size} of {whole:,} trainable parameters ({size / whole:.1%})" in p.coverage()
    assert "left out by the selection: model.embed_tokens.weight" in p.coverage() and "and 9 more" in p.coverage()
    wanted = c.gradients(c.loss)
    same(p.loss_gradients(c.train).dense().to_parameters(), {name: wanted[name] for name in p.shapes}, **TIGHT)
    c = case("gpt2+lora")
    assert set(c.problem(parameters="lora_A").shapes) == {name for name in c.parameters if "lora_A" in name}
    assert set(c.problem().shapes) == {name for name in c.parameters if "lora" in name}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_wide_head_is_cut_into_blocks_or_left_diagonal(name):
    """With a limit of 4, a vocabulary of 13 is cut into 4, 4, 4 and 1; with a limit of 1 it is diagonal."""
    c = case(name)
    head = "lm_head.weight" if name == "llama" else "model.embed_tokens.weight"
    p = c.problem(parameters=head)
    norm = c.gradients(c.loss)[head].square().sum() / 5
    for limit, widths in ((4, [4, 4, 4, 1]), (1, [13])):
        inverse = EKFAC(labels="true", limit=limit).fit(EmpiricalFisher(p), 0.1)
        pieces = inverse.factors[head].left.pieces
        assert [q.shape[1] for q in pieces] == (widths if name == "llama" else [13])
        torch.testing.assert_close(inverse.eigenvalues(head).sum(), norm, **TIGHT)


# --- batches ---


def test_completions_are_labelled_and_prompts_are_not():
    batch = completion_batch(None, [[5, 6, 7], [8]], [[9], [10, 11]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, IGNORE, 9], [IGNORE, 10, 11, IGNORE]]
    c = case("gpt2")
    f = c.task.measurement(c.task.outputs(c.model, batch), batch)
    p = c.model(input_ids=torch.tensor([[8, 10, 11]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(f[1], -(p[0, 10] + p[1, 11]) / 2, **SAME)
    single = completion_batch(None, torch.tensor([8]), torch.tensor([10, 11]))
    assert single["labels"].tolist() == [[IGNORE, 10, 11]]


def test_texts_are_tokenized_apart_and_only_the_prompt_begins_with_special_tokens():
    def letters(text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    batch = completion_batch(letters, ["ab", "c"], ["d", "ef"])
    assert batch["input_ids"].tolist() == [[1, 2, 4], [3, 5, 6]]
    assert torch.equal(completion_batch(letters, "ab", "d")["input_ids"], batch["input_ids"][:1])
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    batch = completion_batch(fast, "a b", "b a")
    assert batch["input_ids"].tolist() == [[0, 1, 2, 2, 1]] and batch["labels"].tolist() == [[IGNORE] * 3 + [2, 1]]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "completion", "message"),
    [
        (None, [[1]], [[2], [3]], "one for each of the 1 prompts"),
        (None, [1, 2], [], "at least one token each"),
        (None, "a", "b", "a tokenizer, since texts are given"),
    ],
)
def test_what_is_no_query_is_refused(tokenizer, prompt, completion, message):
    with pytest.raises(InputError, match=message):
        completion_batch(tokenizer, prompt, completion)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda rows: [np.array(row) for row in rows]])
def test_numbers_of_queries_may_be_tensors_and_arrays(kind):
    wanted = completion_batch(None, [[1, 2], [3, 4]], [[5], [6]])
    found = completion_batch(None, kind([[1, 2], [3, 4]]), kind([[5], [6]]))
    single = completion_batch(None, kind([[1, 2]])[0], kind([[5]])[0])
    for name, t in wanted.items():
        assert torch.equal(found[name], t) and torch.equal(single[name], t[:1])


def test_a_tokenizer_without_numbers_for_a_word_is_named():
    with pytest.raises(InputError, match="tokens must be whole numbers, got .*None.* may not know a word"):
        completion_batch(lambda text: [None], "a", "b")


def test_padding_examples_of_a_data_set():
    examples = [
        {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "text": "x", "n": 1},
        {"input_ids": [6], "labels": [6], "n": 2},
    ]
    batch = pad(examples, token=9)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 9, 9]]
    assert batch["labels"].tolist() == [[3, 4, 5], [6, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["n"].tolist() == [1, 2] and "text" not in batch


def test_padding_makes_whole_numbers_int64_and_keeps_empty_sequences():
    narrow = [{"input_ids": np.array([3, 4], dtype=t), "x": [0.5, 1.5]} for t in ("uint16", "int32")]
    batch = pad([*narrow, {"input_ids": [], "x": [2.5]}])
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[3, 4], [3, 4], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert batch["x"].tolist() == [[0.5, 1.5], [0.5, 1.5], [2.5, 0.0]]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "examples must be dicts with 'input_ids', got none"),
        (["a text"], "examples must be dicts with 'input_ids', got str"),
        ([{"labels": [1]}], "examples must be dicts with 'input_ids', got one without"),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [2]}],
            "field 'labels' must be in every .*none in example 1",
        ),
        ([{"input_ids": [1]}, {"input_ids": [2], "attention_mask": [1]}], "field 'attention_mask' .*none in example 0"),
        ([{"input_ids": [1], "n": None}], "field 'n' must be numbers or sequences of numbers, got None"),
        ([{"input_ids": [[1], [2, 3]]}], "field 'input_ids' must be numbers or sequences of numbers"),
    ],
)
def test_what_cannot_be_padded_is_refused(examples, said):
    with pytest.raises(InputError, match=said):
        pad(examples)


def test_what_a_tokenizer_gives_is_taken():
    c = case("gpt2")
    given = transformers.BatchEncoding(c.train)
    assert not isinstance(given, dict)
    a, b = (Problem(c.model, c.task, t, progress=False) for t in (given, c.train))
    assert a.fingerprint() == b.fingerprint()


def test_columns_that_are_no_tensors_are_named():
    c = case("gpt2")
    with pytest.raises(InputError, match=r"train\['input_ids'\] must be a list of N numbers"):
        Problem(c.model, c.task, {"input_ids": [[1, 2], [3]]})
    ragged = [{"input_ids": torch.tensor(ids)} for ids in ([1, 2], [3])]
    with pytest.raises(InputError, match="train examples must fit into one batch.*such as wherefrom.hf.pad"):
        next(iter(Problem(c.model, c.task, ragged).batches()))
    with pytest.raises(InputError, match="a batch must be (made|a dict) of tensors.*, got list"):
        Problem(c.model, c.task, ["a text"]).layout  # noqa: B018
    with pytest.raises(InputError, match="a batch must be a dict of tensors such as wherefrom.hf.pad makes, got tuple"):
        Problem(c.model, c.task, (torch.ones(2, 3, dtype=torch.int64),)).layout  # noqa: B018
    with pytest.raises(InputError, match="a batch must be one with 'labels'"):
        Problem(c.model, SequenceClassification(), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}).layout  # noqa: B018


def test_masks_of_pairs_of_tokens_are_the_models_own_affair():
    """A causal mask written out says what no mask says."""
    c = case("llama")
    ids = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    causal = torch.full((6, 6), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1).expand(3, 1, 6, 6)
    plain, masked = (
        wherefrom.Influence(wherefrom.EKFAC(labels="true"), 0.1, progress=False).fit(c.model, c.task, batch)
        for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": causal})
    )
    query = {"input_ids": ids[:2]}
    torch.testing.assert_close(masked.score(query).values, plain.score(query).values, rtol=1e-9, atol=1e-12)


def test_merged_adapters_have_no_gradient_and_a_warning_says_so():
    c = case("gpt2+lora")
    c.model.merge_adapter()
    with pytest.warns(AttributionWarning, match="none of the selected parameters acts on the loss .* merged"):
        assert not float(c.problem().loss_gradients(c.train).square_norms().sum())


# --- layers ---


def test_the_transposed_layer_of_gpt2_conforms():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(5, 3).double()
    with torch.no_grad():
        layer.bias.add_(0.3)
    for x in (torch.randn(4, 3), torch.randn(4, 2, 3)):
        check_layer(Conv1DKind(), layer, x.double())
