"""Columns of a batch: those that make the loss are honoured, others are refused by name, none is passed over."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

from small_models import MODELS, close, found, gpt2, llama, made, next_token_loss, products, texts  # noqa: E402
from wherefrom.errors import InputError  # noqa: E402
from wherefrom.hf import CausalLM, SequenceClassification, TokenClassification, pad  # noqa: E402

TEXTS = texts((9, 7, 9, 8, 6))
PROMPT = 4


def loader(rows, size=2):
    return DataLoader(rows, size, collate_fn=pad)


def right(model, start=PROMPT):
    return products(model, [next_token_loss(model, t, range(start, len(t))) for t in TEXTS])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("column", ["completion_mask", "assistant_masks"])
def test_masks_of_the_loss_are_honoured(model, column):
    m = MODELS[model]()
    masks = [[0] * PROMPT + [1] * (len(t) - PROMPT) for t in TEXTS]
    rows = [{"input_ids": t, column: mask} for t, mask in zip(TEXTS, masks, strict=True)]
    close(found(m, CausalLM(), loader(rows)), right(m))
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    close(found(m, CausalLM(), loader(labelled, 5)), right(m))


def test_masks_and_labels_are_intersected():
    m = llama()
    rows = [
        {
            "input_ids": t,
            "labels": [-100] * 2 + t[2:],
            "completion_mask": [False] * 3 + [True] * (len(t) - 3),
            "assistant_masks": [1] * 5 + [0] * (len(t) - 5),
        }
        for t in TEXTS
    ]
    close(found(m, CausalLM(), loader(rows)), products(m, [next_token_loss(m, t, (3, 4)) for t in TEXTS]))


def test_masks_move_with_padding_on_the_left():
    m = llama()
    width = max(map(len, TEXTS))
    left = [width - len(t) for t in TEXTS]
    batch = {
        "input_ids": torch.tensor([[0] * n + t for n, t in zip(left, TEXTS, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(t) for n, t in zip(left, TEXTS, strict=True)]),
        "completion_mask": torch.tensor([[0] * (n + PROMPT) + [1] * (len(t) - PROMPT)
                                         for n, t in zip(left, TEXTS, strict=True)]),
    }  # fmt: skip
    close(found(m, CausalLM(), batch), right(m))


def test_a_mask_of_another_shape_is_refused():
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "completion_mask": torch.ones(2, 4)}
    with pytest.raises(InputError, match=r"completion_mask must be of the labels' shape \(2, 5\), got \(2, 4\)"):
        CausalLM().labels(batch)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", 1),
        ("label_ids", [1, 2, 3]),
        ("loss_mask", [0, 1, 1]),
        ("loss_weights", [0.0, 1.0, 0.5]),
        ("weights", 2.0),
        ("seq_lengths", [2, 1]),
        ("idx", 7),
        ("cu_seq_lens_q", [0, 2]),
        ("prompt_mask", [1, 0, 0]),
    ],
)
@pytest.mark.parametrize("model", [llama, gpt2])
def test_other_columns_are_refused_by_name(model, column, value):
    m = model()
    with pytest.raises(InputError, match=f"those that {type(m).__name__} or .* got also {column}\\. .*") as caught:
        found(m, CausalLM(), loader([{"input_ids": t, column: value} for t in TEXTS]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert ("Rename" in str(caught.value)) == column.startswith("label")


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_masks_of_language_models_mean_nothing_to_a_classifier(task):
    kinds = {"sequence": ("Sequence", SequenceClassification(), 1), "token": ("Token", TokenClassification(), [1] * 4)}
    kind, task, labels = kinds[task]
    m = made(f"BertFor{kind}Classification", "BertConfig", num_labels=3)
    rows = [{"input_ids": t[:4], "labels": labels, "completion_mask": [0, 0, 1, 1]} for t in TEXTS]
    with pytest.raises(InputError, match=f"BertFor{kind}Classification .* got also completion_mask"):
        found(m, task, loader(rows), "layer")


@pytest.mark.parametrize("column", ["labels", "label", "label_ids"])
def test_a_classifier_takes_labels_as_collators_name_them(column):
    m = made("BertForSequenceClassification", "BertConfig", num_labels=3)
    losses = [-m(input_ids=torch.tensor([t])).logits[0].log_softmax(0)[i % 3] for i, t in enumerate(TEXTS)]
    rows = [{"input_ids": t, column: i % 3} for i, t in enumerate(TEXTS)]
    close(found(m, SequenceClassification(), loader(rows), "layer"), products(m, losses, "layer"))
    both = [row | {"labels": 1, "label": 2} for row in rows]
    with pytest.raises(InputError, match="got also label"):
        found(m, SequenceClassification(), loader(both), "layer")


def test_what_a_tokenizer_returns_besides_is_taken_and_texts_are_left_out():
    m = llama()
    rows = [
        {
            "input_ids": t,
            "token_type_ids": [0] * len(t),
            "special_tokens_mask": [1] + [0] * (len(t) - 1),
            "length": len(t),
            "text": "a text",
            "words": ["a", "text"],
            "messages": [{"role": "user", "content": "a text"}],
        }
        for t in TEXTS
    ]
    close(found(m, CausalLM(), loader(rows)), right(m, 1))


def test_columns_are_looked_up_inside_wrappers_too():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, **batch):
            return self.inner(**batch)

    m = Wrapped().eval()
    rows = [{"input_ids": t} for t in TEXTS]
    close(found(m, CausalLM(), loader(rows)), right(m.inner, 1))
    with pytest.raises(InputError, match="got also loss_mask"):
        found(m, CausalLM(), loader([row | {"loss_mask": [1]} for row in rows]))


def test_columns_are_looked_up_under_adapters_too():
    peft = pytest.importorskip("peft")
    m = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).double()
    with pytest.raises(InputError, match="those that LlamaForCausalLM or .* got also loss_mask"):
        found(m.eval(), CausalLM(), loader([{"input_ids": t, "loss_mask": [1]} for t in TEXTS]), "lora")


@pytest.mark.parametrize("task", [CausalLM(), TokenClassification(), SequenceClassification()])
def test_labels_with_fractions_are_no_classes(task):
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([[0.9, 1.9, 2.9]] * 2)}
    with pytest.raises(InputError, match="labels must be whole numbers, the numbers of classes, got torch.float32"):
        task.labels(batch)


def test_labels_of_a_language_model_are_one_for_each_token():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([1, 0])}
    with pytest.raises(InputError, match=re.escape("labels must be one for each token, (B, S), got (2,)")):
        CausalLM().labels(batch)
    with pytest.raises(InputError, match="a batch must be one with 'labels' or 'input_ids', got"):
        CausalLM().labels({"inputs_embeds": torch.ones(2, 3, 4)})
