"""Texts and conversations become the one text that training saw, and only the answers count."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

from wherefrom.errors import InputError  # noqa: E402
from wherefrom.hf import completion_batch, documents, pad, sequences  # noqa: E402

IGNORE = -100
WORDS = "<pad> <s> </s> the capital of peru is lima , yes where ? Be brief".split()
WORDS += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TURNS = (
    "{{ bos_token }}{% for m in messages %} {{ '<|' + m['role'] + '|>' }} {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %} {{ '<|' + m['role'] + '|>' }} {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <|end|>{% endgeneration %}{% else %}{{ m['content'] }} <|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}"
)
LAST = (  # only the last answer is kept as it was, as templates of reasoning models do
    "{% for m in messages %} {{ '<|' + m['role'] + '|>' }} {{ m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %} yes{% endif %} <|end|>{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)
ASKED = [{"role": "user", "content": "the capital of peru is"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "lima"}]
TWICE = [
    {"role": "system", "content": "Be brief"},
    *ANSWERED,
    {"role": "user", "content": "where ?"},
    {"role": "assistant", "content": "peru , yes"},
]


def tokenizer(single: str = "<s> $A", template: str | None = None):
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = [(word, WORDS.index(word)) for word in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    found.chat_template = template
    return found


def told(batch, q=0):
    """The words of a query or sequence, and those with labels."""
    ids, labels = (torch.as_tensor(batch[name]) for name in ("input_ids", "labels"))
    ids, labels = (t[q] if t.ndim > 1 else t for t in (ids, labels))
    if "attention_mask" in batch:
        ids, labels = (t[batch["attention_mask"][q].bool()] for t in (ids, labels))
    assert ((labels == IGNORE) | (labels == ids)).all()
    words = [" ".join(WORDS[n] for n in some.tolist()) for some in (ids, ids[labels != IGNORE])]
    return words[0], words[1]


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("single", "whole"),
    [
        ("$A", "the capital of peru is lima"),
        ("<s> $A", "<s> the capital of peru is lima"),
        ("<s> $A </s>", "<s> the capital of peru is lima </s>"),
        ("$A </s>", "the capital of peru is lima </s>"),
        ("<s> <s> $A </s> </s>", "<s> <s> the capital of peru is lima </s> </s>"),
    ],
)
@pytest.mark.parametrize("completion", ["lima", " lima"])
def test_prompt_and_completion_are_one_text(single, whole, completion):
    t = tokenizer(single)
    assert told(completion_batch(t, "the capital of peru is", completion)) == (whole, "lima")
    assert (
        completion_batch(t, "the capital of peru is", completion)["input_ids"][0].tolist()
        == (t("the capital of peru is lima")["input_ids"])
    )
    row = {"prompt": "the capital of peru is", "completion": completion}
    cut = sequences(t, [row], 16)[0]
    assert told(cut) == (whole, " ".join(["lima", *["</s>"] * whole.count("</s>")]))  # training learns to end too


def test_an_end_token_that_is_asked_about_has_a_label_and_no_second_one():
    batch = completion_batch(tokenizer("<s> $A </s>"), "the capital of peru is", "lima </s>")
    assert told(batch) == ("<s> the capital of peru is lima </s>", "lima </s>")


def test_an_empty_prompt_is_the_start_token():
    assert told(completion_batch(tokenizer("<s> $A </s>"), "", "lima")) == ("<s> lima </s>", "lima")
    with pytest.raises(InputError, match="at least one token each, got 0 and 1"):
        completion_batch(tokenizer("$A"), "", "lima")


def test_tokenizers_that_put_a_space_in_front_see_the_completion_in_its_place():
    """As sentencepiece does it: " lima" alone is a space and the word."""
    inner = Tokenizer(models.BPE(unk_token="?"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["?"])
    inner.train_from_iterator(["the capital of peru is lima", "lima lima is is"], trainer)
    t = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    whole = t("the capital of peru is lima")["input_ids"]
    batch = completion_batch(t, "the capital of peru is", " lima")
    assert batch["input_ids"][0].tolist() == whole
    assert t.decode(batch["input_ids"][0][batch["labels"][0] != IGNORE]) == "lima"


def test_a_rendered_template_has_one_start_token():
    t = tokenizer("<s> $A </s>", TURNS)
    text = t.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    wanted = "<s> <|user|> the capital of peru is <|end|> <|assistant|> lima </s>"
    assert told(completion_batch(t, text, "lima")) == (wanted, "lima")
    trained = t.apply_chat_template(ANSWERED, tokenize=False) + " </s>"
    cut = sequences(t, [trained], 32)
    assert told(cut[0])[0] == "<s> <|user|> the capital of peru is <|end|> <|assistant|> lima <|end|> </s>"


def test_a_function_that_adds_special_tokens_is_refused():
    t = tokenizer("<s> $A </s>")
    with pytest.raises(InputError, match="function must be one that adds no special tokens, got 2 tokens for an empty"):
        completion_batch(lambda text: t(text)["input_ids"], "the capital of", "peru")
    plain = completion_batch(lambda text: t(text, add_special_tokens=False)["input_ids"], "the capital of", "peru")
    assert told(plain) == ("the capital of peru", "peru")


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_prompts_may_be_messages(template):
    t = tokenizer("<s> $A </s>", template)
    start = "<s> <|user|> the capital of peru is <|end|> <|assistant|>"
    assert told(completion_batch(t, ASKED, "lima")) == (f"{start} lima", "lima")
    assert told(completion_batch(t, ASKED, ANSWERED[1:])) == (f"{start} lima <|end|>", "lima <|end|>")
    several = completion_batch(t, [ASKED, TWICE[:4]], ["lima", " yes"])
    assert told(several)[0] == f"{start} lima" and told(several, 1)[1] == "yes"
    assert told(several, 1)[0].startswith("<s> <|system|> Be brief <|end|> <|user|>")
    begun = [*ASKED, {"role": "assistant", "content": "lima ,"}]
    assert told(completion_batch(t, begun, "yes"))[0] == f"{start} lima , yes"


def test_what_a_chat_template_returns_may_be_the_prompt():
    t = tokenizer(template=TURNS)
    wanted = told(completion_batch(t, ASKED, "lima"))
    one = t.apply_chat_template(ASKED, add_generation_prompt=True)
    assert "input_ids" in one and told(completion_batch(t, one, "lima")) == wanted
    t.pad_token = "<pad>"
    both = t.apply_chat_template([ASKED, TWICE[:4]], add_generation_prompt=True, padding=True, return_tensors="pt")
    batch = completion_batch(t, both, ["lima", "yes"])
    assert told(batch) == wanted and told(batch, 1) == told(completion_batch(t, TWICE[:4], "yes"))


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_only_the_assistants_tokens_have_labels(template):
    t = tokenizer("<s> $A </s>", template)
    forms = [TWICE, {"messages": TWICE}, {"messages": [m | {"tool_calls": None} for m in TWICE], "tools": None}]
    for form in forms:
        whole, labelled = told(sequences(t, [form], 64)[0])
        assert labelled == "lima <|end|> peru , yes <|end|>"
        assert whole == " ".join(
            f"<|{m['role']}|> {m['content']} <|end|>" if i else f"<s> <|{m['role']}|> {m['content']} <|end|>"
            for i, m in enumerate(TWICE)
        )
    pair = {"prompt": TWICE[:4], "completion": TWICE[4:]}
    assert told(sequences(t, [pair], 64)[0]) == (whole, "peru , yes <|end|>")
    mixed = {"prompt": TWICE[:4], "completion": "peru , yes"}
    assert told(sequences(t, [mixed], 64)[0]) == (whole, "peru , yes <|end|>")


def test_both_kinds_of_template_agree_with_their_own_mask():
    t = tokenizer(template=MARKED)
    cut = sequences(t, [TWICE, ANSWERED], 64)
    for row, messages in zip(cut, (TWICE, ANSWERED), strict=True):
        found = t.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert row["input_ids"].tolist() == found["input_ids"]
        assert (row["labels"] != IGNORE).long().tolist() == found["assistant_masks"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    t = tokenizer(template=LAST)
    assert told(sequences(t, [ANSWERED], 32)[0])[1] == "lima yes <|end|>"
    with pytest.raises(InputError, match="tokens of the assistant's message 2 cannot be told") as caught:
        sequences(t, [TWICE], 64)
    assert "{% generation %}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="completion cannot be told from the prompt|cannot be told"):
        completion_batch(t, TWICE[:3], TWICE[3:])
    inner = "{{ m['content'] }}"
    marks = "{% if m['role'] == 'assistant' %}{% generation %}" + inner + "{% endgeneration %}{% else %}" + inner
    t = tokenizer(template=LAST.replace(inner, marks + "{% endif %}"))
    assert told(sequences(t, [TWICE], 64)[0])[1] == "lima peru , yes"  # the template says what is the assistant's


def test_conversations_are_cut_at_the_length_and_what_is_left_out_is_counted():
    t = tokenizer(template=TURNS)
    nothing = ["", None, {"messages": None}, {"prompt": "a", "completion": ""}]
    cut = sequences(t, [TWICE, ASKED, ANSWERED, *nothing, TWICE[:2]], 14)
    assert [told(row)[1] for row in cut] == ["lima", "lima <|end|>"] and cut.starts == [(0, 0), (2, 0)]
    assert cut.dropped == {
        "documents without text": 4,
        "ends of documents beyond 14 tokens": 1,
        "documents without an answer": 2,
    }
    batch = pad(cut[:])
    assert batch["labels"].shape == (2, 14) and int((batch["labels"] != IGNORE).sum()) == 3


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            ["a text", ANSWERED],
            "texts must be all texts, or all conversations and completions, got 1 texts and 1 others",
        ),
        ([ASKED], "the documents must be some with an answer in their first tokens, got 1 without one"),
        (
            [{"messages": "a text"}],
            "messages of document 0 must be a list of dicts with 'role' and 'content', got 'a te",
        ),
        ([{"question": "a"}], r"document 0 must be a text, messages, or .*, got \['question'\]"),
        ([{"prompt": "a", "completion": ANSWERED}], "document 0 must be two texts, or two lists of messages, got str"),
        ([[{"role": "user"}]], "messages must be what the tokenizer's chat template takes, got those of user: "),
        ([ANSWERED[1:]], "messages must be what the tokenizer's chat template takes, got those of no message: "),
    ],
)
def test_other_documents_are_refused_in_one_line(texts, said):
    template = TURNS.replace("m['content'] }}", "m['content'] + '' }}")
    with pytest.raises(InputError, match=said) as caught:
        sequences(tokenizer(template=template), texts, 32)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_messages_need_a_template():
    with pytest.raises(InputError, match="what the tokenizer's chat template takes, got those of user: Cannot use"):
        completion_batch(tokenizer(), ASKED, "lima")
    with pytest.raises(InputError, match="tokenizer must be one of transformers with a chat template"):
        completion_batch(lambda text: [1], ASKED, "lima")
    with pytest.raises(InputError, match="prompt 0 must be messages, as the completion is, got a text"):
        completion_batch(tokenizer(template=TURNS), "where ?", ANSWERED[1:])
    with pytest.raises(InputError, match="pack must be False for conversations"):
        sequences(tokenizer(template=TURNS), [ANSWERED], 32, pack=True)
    with pytest.raises(InputError, match="a completion of messages must be one with the assistant's"):
        completion_batch(tokenizer(template=TURNS), ASKED, ASKED)


# --- files ------------------------------------------------------------------------------------------------------------


def stored(folder, form, columns):
    data = datasets.Dataset.from_dict(columns)
    path = folder / {"jsonl": "d.jsonl", "json": "d.json", "parquet": "d.parquet", "saved": "d"}[form]
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    elif form == "json":
        path.write_text(json.dumps(list(data)))
    elif form == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved"])
def test_chat_columns_are_read(tmp_path, form):
    t = tokenizer(template=TURNS)
    number = {"n": [1, 2, 3]}
    path = stored(tmp_path, form, {"messages": [TWICE, None, ANSWERED], "prompt_id": ["a", "b", "c"], **number})
    found = documents(path)
    assert found.origin.endswith("column 'messages'") and found.texts[1] == "" and len(found.texts) == 3
    cut = sequences(t, found.texts, 64)
    assert cut.starts == [(0, 0), (2, 0)]
    assert [told(row)[1] for row in cut] == ["lima <|end|> peru , yes <|end|>", "lima <|end|>"]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_prompts_and_completions_are_read(tmp_path, form):
    t = tokenizer("<s> $A </s>", TURNS)
    path = stored(tmp_path, form, {"prompt": ["the capital of peru is", None], "completion": [" lima", " yes"]})
    found = documents(path)
    assert found.origin.endswith("columns 'prompt' and 'completion'") and found.texts[1] == ""
    assert [told(row) for row in sequences(t, found.texts, 64)] == [
        ("<s> the capital of peru is lima </s>", "lima </s>")
    ]
    assert documents(path, column="completion").texts == [" lima", " yes"]
    (tmp_path / "chats").mkdir()
    path = stored(tmp_path / "chats", form, {"prompt": [ASKED], "completion": [ANSWERED[1:]]})
    cut = sequences(t, documents(path).texts, 64)
    assert told(cut[0]) == ("<s> <|user|> the capital of peru is <|end|> <|assistant|> lima <|end|>", "lima <|end|>")


def test_columns_by_other_names(tmp_path):
    path = stored(tmp_path, "jsonl", {"chat": [ANSWERED], "id": ["a"]})
    assert documents(path).origin.endswith("column 'chat'")
    path = stored(tmp_path, "json", {"chosen": [ANSWERED], "rejected": [ANSWERED], "id": ["a"], "name": ["b"]})
    with pytest.raises(InputError, match="column must be one of chosen, rejected, got none"):
        documents(path)
    assert documents(path, column="chosen").texts == [{"messages": ANSWERED}]
    path = stored(tmp_path, "parquet", {"conversations": [[{"from": "human", "value": "where ?"}]]})
    with pytest.raises(InputError, match="'conversations' of .* must be one of texts, or of messages with"):
        documents(path, column="conversations")
