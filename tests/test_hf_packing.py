"""What a language model's outputs depend on: packed documents, later tokens, padding, other examples."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

import solving  # noqa: E402
import wherefrom  # noqa: E402
from small_models import MODELS, close, found, gpt2, llama, made, next_token_loss, products, texts  # noqa: E402
from wherefrom.errors import InputError, UnsupportedError  # noqa: E402
from wherefrom.hf import CausalLM, SequenceClassification, TokenClassification, pad  # noqa: E402

LENGTHS = ((4, 3, 5), (6, 2), (3, 3, 7, 2), (5, 7), (6,), (1, 4))  # ragged rows, one of a single document
PACKS = [texts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def rows(labels: bool = True, **more):
    """Packed rows as they are fed to a model, the first token of each document without a label."""
    return [
        {
            "input_ids": [token for document in pack for token in document],
            "position_ids": [at for document in pack for at in range(len(document))],
            **({"labels": [t for document in pack for t in (-100, *document[1:])]} if labels else {}),
            **{name: [value] * sum(map(len, pack)) for name, value in more.items()},
        }
        for pack in PACKS
    ]


def right(model):
    losses = [sum((next_token_loss(model, d) for d in pack), torch.zeros(())) for pack in PACKS]
    return products(model, losses)


def loader(data, size):
    return DataLoader(data, size, collate_fn=pad)


# transformers' own attention takes its softmax in float32 whatever the model's dtype, so that rounding depends on the
# shape of a row and on the processor; what leaks between documents is of the size of the scores.
TOLERANCE = {"sdpa": 1e-10, "eager": 1e-5}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_documents_stay_apart(model, attention, size):
    m = MODELS[model](attn_implementation=attention)
    close(found(m, CausalLM(), loader(rows(), size)), right(m), TOLERANCE[attention])


@pytest.mark.parametrize("model", ["MistralForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_packed_documents_stay_apart_in_windows_too(model):
    more = {"sliding_window": 3, "num_key_value_heads": 1}
    m = made(model, model.replace("ForCausalLM", "Config"), **more)
    attention = "eager" if model == "Gemma2ForCausalLM" else "sdpa"  # it caps its logits, which needs its own
    close(found(m, CausalLM(), loader(rows(), 3)), right(m), TOLERANCE[attention])


@pytest.mark.parametrize("model", MODELS)
def test_without_labels_nothing_predicts_the_first_token_of_a_document(model):
    m = MODELS[model]()
    close(found(m, CausalLM(), loader(rows(labels=False), 4)), right(m))
    same = [row for row in rows(labels=False) if len(row["input_ids"]) == 12]
    tensors = {name: torch.tensor([row[name] for row in same]) for name in same[0]}
    close(found(m, CausalLM(), tensors), found(m, CausalLM(), loader(same, 2)))


def test_masks_of_the_loss_hold_in_packed_rows():
    m = llama()
    losses = [sum((next_token_loss(m, d, range(2, len(d))) for d in p), torch.zeros(())) for p in PACKS]
    data = rows(labels=False)
    for row in data:
        row["completion_mask"] = [int(at > 1) for at in row["position_ids"]]
    close(found(m, CausalLM(), loader(data, 3)), products(m, losses))


def test_kronecker_factors_of_packed_rows_see_no_padding():
    m = llama()
    scores = [
        wherefrom.Influence(wherefrom.EKFAC(labels="true"), 0.1, parameters="mlp", progress=False)
        .fit(m, CausalLM(), loader(rows(), size))
        .score(loader(rows(), size))
        .values
        for size in (1, 6)
    ]
    close(scores[0], scores[1], 1e-9)


def test_accurate_scores_of_packed_rows_are_those_of_the_documents():
    """A Gauss-Newton matrix of the mean over rows: that of rows written out by hand, from documents alone."""
    m = gpt2()
    rng = torch.Generator().manual_seed(0)
    problem = wherefrom.Problem(m, CausalLM(), loader(rows(), 4), "h.1.mlp.c_proj.weight", progress=False)
    (name,) = problem.shapes
    weight, v = problem.parameters[name], torch.randn(problem.shapes[name], generator=rng, dtype=torch.float64)
    wanted = torch.zeros_like(v)
    for pack in PACKS:
        for document in pack:
            logits = m(input_ids=torch.tensor([document]), use_cache=False).logits[0, :-1]
            for h in logits:
                jacobian = torch.stack([torch.autograd.grad(x, weight, retain_graph=True)[0].flatten() for x in h])
                p = h.detach().softmax(0)
                wanted += (((p.diag() - p.outer(p)) @ (jacobian @ v.flatten())) @ jacobian).view_as(v) / len(PACKS)
    for product in ("jvp", "rows"):
        curvature = wherefrom.GGN(problem, product=product)
        close(solving.product(curvature, {name: v.unsqueeze(0)})[name][0], wanted)


def test_packed_documents_under_a_mask_are_refused():
    for data in (loader(rows(attention_mask=1), 2), loader(rows(attention_mask=1)[:1], 1)):
        with pytest.raises(InputError, match="position_ids start again inside a row that has an attention_mask"):
            found(llama(), CausalLM(), data)


def test_positions_that_rise_are_not_packed():
    m = llama()
    plain = [{"input_ids": t, "position_ids": list(range(2, 2 + len(t)))} for t in texts((5, 3, 6))]
    batch = pad(plain)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 6]
    bare = [{"input_ids": row["input_ids"]} for row in plain]
    close(found(m, CausalLM(), loader(plain, 3)), found(m, CausalLM(), loader(bare, 3)), 1e-6)  # rotations are relative
    packed = pad([{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [8], "position_ids": [0]}])
    assert "attention_mask" not in packed and packed["labels"].tolist() == [[-100, 6, -100], [-100] * 3]


MIXING = {
    "OPTForCausalLM": {"ffn_dim": 20, "word_embed_proj_dim": 16},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", [*MIXING, "Mixing"])
def test_a_model_that_does_not_keep_documents_apart_is_refused(name):
    m = made(name, name.replace("ForCausalLM", "Config"), **MIXING[name]) if name in MIXING else Mixing().eval()
    match = "fc" if name.startswith("OPT") else "feed_forward" if name in MIXING else "mlp"
    with pytest.raises(UnsupportedError, match=f"documents of a row read each other in {name}"):
        found(m, CausalLM(), loader(rows(), 2), match)


def test_a_model_without_positions_takes_no_packed_rows():
    m = made("BloomForCausalLM", "BloomConfig")
    with pytest.raises(InputError, match="got also position_ids"):
        found(m, CausalLM(), loader(rows(), 2))


class Mixing(torch.nn.Module):
    """A model that takes positions, and whose tokens read all that stand before."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids, position_ids=None, attention_mask=None, use_cache=False):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("task", [SequenceClassification(), TokenClassification()])
def test_classifiers_take_no_packed_rows(task):
    batch = pad(rows()[:2])
    with pytest.raises(InputError, match="position_ids must be rising .* packed into rows for CausalLM"):
        task.outputs(llama(), batch)


# --- later tokens -----------------------------------------------------------------------------------------------------


ENCODERS = {
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "bert_head": ("BertLMHeadModel", "BertConfig", {"is_decoder": False}),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", {"is_decoder": False}),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"dim": 16, "hidden_dim": 20, "n_layers": 2}),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [1, 3])
def test_an_encoder_is_no_causal_model(name, size):
    model, config, more = ENCODERS[name]
    m = made(model, config, **more)
    with pytest.raises(UnsupportedError, match=f"do not see later ones, but {model} reads both ways"):
        found(m, CausalLM(), loader([{"input_ids": t} for t in texts((6, 4, 7, 5))], size), "layer")


def test_a_decoder_without_a_causal_mask_is_no_causal_model():
    m = llama(is_causal=False)
    m.config.is_causal = False
    with pytest.raises(UnsupportedError, match="do not see later ones, but LlamaForCausalLM reads both ways"):
        found(m, CausalLM(), loader([{"input_ids": t} for t in texts((6, 4))], 2))


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_the_same_as_decoders_are_taken(name):
    m = made(name, f"{name[:-11] if name.endswith('Model') else 'Roberta'}Config", is_decoder=True)
    some = texts((6, 4, 7, 5))
    losses = [next_token_loss(m, t) for t in some]
    close(found(m, CausalLM(), loader([{"input_ids": t} for t in some], 3), "layer"), products(m, losses, "layer"))


@pytest.mark.parametrize("model", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_models_with_an_encoder_and_a_decoder_are_refused(model):
    sizes = {"T5": {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": 23}}
    sizes["Bart"] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 23}
    kind = model.removesuffix("ForConditionalGeneration")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2} if kind == "Bart" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes[kind], **heads, decoder_start_token_id=0)
    m = getattr(transformers, model)(config).double().eval()
    with pytest.raises(UnsupportedError, match=f"CausalLM is for decoders, but {model} has an encoder and a decoder"):
        found(m, CausalLM(), loader([{"input_ids": t} for t in texts((6, 4))], 2), "layer")


def test_the_check_leaves_no_trace_and_is_made_once():
    m = gpt2()
    calls = []
    handle = m.register_forward_hook(lambda *_: calls.append(1))
    data = {"input_ids": torch.tensor(texts((6, 6, 6)))}
    task = CausalLM()
    with torch.no_grad():
        first = task.outputs(m, data)
        assert len(calls) == 1 and len(m._forward_hooks) == 1  # the passes of the check are hidden from hooks
        assert torch.equal(task.outputs(m, data), first) and len(calls) == 2
    handle.remove()

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func) if func is torch.nn.functional.linear else None
            return func(*args, **(kwargs or {}))

    calls.clear()
    other = llama()
    with torch.no_grad(), Counting():
        task.outputs(other, data)
        once = len(calls)
        task.outputs(other, data)
    assert once == len(calls) - once > 0  # nor do function modes see them
    repeated = {"input_ids": torch.full((2, 6), 5)}  # all tokens alike: no other half could be written
    bert = made("BertForMaskedLM", "BertConfig")
    task.outputs(bert, repeated)
    with pytest.raises(UnsupportedError):
        task.outputs(bert, data)
