"""Texts read from every kind of file, and cut into sequences."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from wherefrom.errors import InputError  # noqa: E402
from wherefrom.hf import Documents, Pieces, documents, pad, sequences  # noqa: E402

TEXTS = ["a b c", "d", "", "e, f\ng"]


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def written(folder, name: str, texts: list[str | None] = TEXTS, column: str = "text") -> str:
    """The texts in a file of the kind that its name says, beside a column of numbers."""
    path = folder / name
    data = datasets.Dataset.from_dict({"n": range(len(texts)), column: texts})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(data)), encoding="utf-8")
    elif path.suffix == ".csv":
        data.to_csv(path)
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "saved"])
def test_rows_of_every_form(tmp_path, name):
    found = documents(written(tmp_path, name))
    assert found.texts == TEXTS and found.origin == f"{tmp_path / name}, column 'text'"
    source = written(tmp_path, f"other-{name}", ["x", None, "z"], "body")
    assert documents(source).texts == documents(source, column="body").texts == ["x", "", "z"]
    with pytest.raises(InputError, match="column must be one of n, body, got 'text'"):
        documents(source, column="text")
    with pytest.raises(InputError, match=r"'n' of .* must be one of texts, .* got 0"):
        documents(source, column="n")


def test_json_holds_texts_or_objects(tmp_path):
    (tmp_path / "t.json").write_text('["x", "y z"]')
    assert documents(tmp_path / "t.json") == Documents(["x", "y z"], str(tmp_path / "t.json"))
    (tmp_path / "t.jsonl").write_text('"x"\n\n"y"\n')
    assert documents(tmp_path / "t.jsonl").texts == ["x", "y"]
    (tmp_path / "gaps.jsonl").write_text('{"a": "x"}\n{"b": "y"}\n')
    assert documents(tmp_path / "gaps.jsonl", column="b").texts == ["", "y"]
    with pytest.raises(InputError, match="column must be one of a, b, got none"):
        documents(tmp_path / "gaps.jsonl")
    for bad, said in (("{", "a json file, got this"), ('["x", 1]', "a list of texts or of objects")):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(InputError, match=said):
            documents(tmp_path / "bad.json")


def test_a_text_file_is_separated_by_blank_lines_or_by_line_ends(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n\none\ntwo\n \t\n\nthree\n\n", encoding="utf-8")
    assert documents(path) == Documents(["one\ntwo", "three"], f"{path}, separated by blank lines")
    path.write_text("one\ntwo\n\n", encoding="utf-8")
    assert documents(path) == Documents(["one", "two"], f"{path}, separated by line ends")
    with pytest.raises(InputError, match=r"column must be left out for a \.txt, got x"):
        documents(path, column="x")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="in UTF-8"):
        documents(path)
    path.write_text(" \n")
    with pytest.raises(InputError, match="at least one text, got none"):
        documents(path)


def test_saved_folders_have_splits(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert documents(tmp_path / "both", "test") == Documents(["test"], f"{tmp_path / 'both'}, test, column 'text'")
    for split in (None, "dev"):
        with pytest.raises(
            InputError, match=f"split must be one of train, test, got {(split and repr(split)) or 'none'}"
        ):
            documents(tmp_path / "both", split)
    datasets.DatasetDict(train=parts["train"]).save_to_disk(tmp_path / "one")
    assert documents(tmp_path / "one").texts == ["train"]
    parts["train"].save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="split must be left out"):
        documents(tmp_path / "none", "train")
    with pytest.raises(InputError, match="split must be left out for a file"):
        documents(written(tmp_path, "t.csv"), "train")


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"dataset must be a file that is there, got absent\.csv"):
        documents("absent.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"dataset must be a file ending in .*, got '.*empty'"):
        documents(tmp_path / "empty")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"dataset must be .* on the hub, got 'some/name'\. .*[Oo]ffline"):
        documents("some/name")
    (tmp_path / "t.parquet").write_text("x")
    with pytest.raises(InputError, match="a parquet file, got this"):
        documents(tmp_path / "t.parquet")


def test_the_hub_is_asked_for_the_configuration_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_dict(
        {"text": ["x"]}))  # fmt: skip
    assert documents("some/name:raw", "train[:1]").origin == "some/name:raw, train[:1], column 'text'"
    documents("some/name")
    assert asked == [(("some/name", "raw"), {"split": "train[:1]"}), (("some/name", None), {"split": None})]


# --- sequences ------------------------------------------------------------------------------------------------------


def joined(found) -> list[str]:
    return ["".join(map(chr, row["input_ids"].tolist())) for row in found]


def test_documents_are_cut_one_by_one():
    found = sequences(letters, ["abcdefg", "", "hi", " \n", "jklmn", "o"], 3)
    assert joined(found) == ["abc", "def", "hi", "jkl", "mn"]
    assert found.starts == [(0, 0), (0, 3), (2, 0), (4, 0), (4, 3)]
    assert found.dropped == {"documents without text": 2, "sequences of a single token": 2}
    assert sequences(letters, ["abc"], 3).dropped == {}
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in found)
    assert joined(found[1:3]) == ["def", "hi"] and joined([found[-1]]) == ["mn"]
    batch = pad(found[2:4])
    assert batch["labels"].tolist() == [[*letters("hi"), -100], letters("jkl")]


def test_packed_documents_follow_one_another():
    class WithEnd:
        eos_token_id = ord(".")

        def __call__(self, text):
            return letters(text)

    found = sequences(WithEnd(), ["abcde", "", "f", "g."], 4, pack=True)
    assert joined(found) == ["abcd", "e.f.", "g."]
    assert found.starts == [(0, 0), (0, 4), (3, 0)] and found.dropped == {"documents without text": 1}
    assert joined(sequences(letters, ["abcde", "f", "gh"], 3, pack=True)) == ["abc", "def", "gh"]
    assert sequences(letters, ["abcd"], 3, pack=True).dropped == {"sequences of a single token": 1}


def test_sequences_need_two_tokens():
    with pytest.raises(InputError, match="length must be at least 2 tokens, got 1"):
        sequences(letters, ["abc"], 1)
    for pack in (False, True):
        for texts in (["a"], [""]):
            with pytest.raises(InputError, match="long enough for a sequence of two tokens, got 1 without one"):
                sequences(letters, texts, 4, pack)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.txt"])
def test_only_line_ends_end_a_line_and_a_byte_order_mark_is_no_text(tmp_path, name):
    texts = ["a\u2028b", "c\x85d\x0ce", "f"]
    rows = [json.dumps(text, ensure_ascii=False) for text in texts]
    forms = {"t.jsonl": "\n".join(rows), "t.json": f"[{', '.join(rows)}]", "t.txt": "\r\n".join(texts)}
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + forms[name].encode())
    assert documents(tmp_path / name).texts == texts


def test_a_cell_of_a_csv_may_be_a_book(tmp_path):
    book = "all work and no play\n" * 200_000
    assert documents(written(tmp_path, "t.csv", [book, "b"])).texts == [book, "b"]


def test_one_text_is_no_list_of_texts():
    with pytest.raises(InputError, match="texts must be a list of documents, got one text"):
        sequences(letters, "a single text", 4)


# --- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_pieces_join_to_the_text(kind):
    text = "the cat sat\non the  mat, naïvely 😀 the end"
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:  # as sentencepiece does it: a first token loses its space when it is decoded alone
        inner = Tokenizer(models.BPE(unk_token="?"))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["?"])
    inner.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    found = Pieces(tokenizer, ids)
    assert len(found) == len(ids) > 8 and "".join(found) == found.text() == text
    assert " the" in found[4:]
    if kind == "bytes":
        at = found[:].index("😀")
        assert found[at - 3 : at] == ["", "", ""] or found[at - 3 : at] == ["", "", " "]
        assert "\ufffd" not in "".join(found)
        cut = Pieces(tokenizer, ids[:at])  # ends inside a character: that is shown
        assert len(cut) == at and cut[-1].endswith("\ufffd")
