"""``wherefrom explain --hf``: a language model of transformers, its training texts, prompts and completions."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wherefrom
from pages import CHROMIUM, Page, browse
from targets import placed, refused, run, stopped, table, whole
from wherefrom.solvers.kronecker import EigenInverse
from wherefrom.tools.cli import language
from wherefrom.tools.cli import main as cli

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from wherefrom.hf import CausalLM, completion_batch, pad, sequences  # noqa: E402

CITIES = {"france": "paris", "peru": "lima", "japan": "tokyo", "kenya": "nairobi"}
TEXTS = [form.format(*fact) for fact in CITIES.items() for form in ("the capital of {} is {}", "in {}\ngo to {} <b>")]
TEXTS += ["", "a", "the capital of " * 12]
ASK = ("--prompt", "the capital of peru is", "in kenya go", "--completion", " lima", " to nairobi")
LINE = "explain --hf model --dataset texts.jsonl --length 24 --out r"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny GPT-2 that knows the texts a little, its tokenizer, and the texts in a file."""
    folder = tmp_path_factory.mktemp("saved")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    train = pad(sequences(tokenizer, TEXTS, 24)[:])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        optimiser.zero_grad()
        model(**train).loss.backward()
        optimiser.step()
    model.save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"n": 1, "body": t}) + "\n" for t in TEXTS))
    return folder, model, tokenizer


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    folder, *rest = saved
    placed(tmp_path, monkeypatch)
    for name in ("model", "texts.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    return rest


def expected(model, tokenizer, pack: bool = False):
    """The library's own: influence functions, the queries."""
    train = pad(sequences(tokenizer, TEXTS, 24, pack)[:])
    influence = wherefrom.Influence(wherefrom.EKFAC(), wherefrom.Damping.relative(0.1), parameters="mlp")
    return influence.fit(model, CausalLM(), train), completion_batch(tokenizer, [ASK[1], ASK[2]], [ASK[4], ASK[5]])


def page(folder: str = "r") -> str:
    with open(f"{folder}/explain.html", encoding="utf-8") as file:
        return file.read()


def test_all_that_is_explained_comes_out_of_one_solve(here, monkeypatch):
    solves, applications = [], []
    solve, apply = wherefrom.FittedInfluence.solve, EigenInverse.apply
    monkeypatch.setattr(wherefrom.FittedInfluence, "solve", lambda *a, **o: solves.append(1) or solve(*a, **o))
    monkeypatch.setattr(EigenInverse, "apply", lambda *a: applications.append(1) or apply(*a))
    run(f"{LINE} --no-certify", *ASK)
    assert "<mark>" in page() and '<figure class="layers">' in page()  # tokens and layers are on the page
    assert len(solves) == len(applications) == 1


def test_scores_are_those_of_the_library(here, capsys):
    run(LINE, *ASK, "--k", "3")
    influence, queries = expected(*here)
    scores = influence.score(queries)
    found = wherefrom.Scores.load("r/scores.safetensors")
    torch.testing.assert_close(found.values, scores.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.residual, scores.residual, rtol=1e-3, atol=1e-5)
    columns = table("r/explain.csv")
    best = [int(j) for j in columns["example"]][:3]
    assert best == scores.top(3).proponents[0].tolist() and columns["query_shown"][0] == "lima"
    assert columns["example_shown"][:3] == [f"document {sequences(here[1], TEXTS, 24).starts[j][0]}" for j in best]
    said = capsys.readouterr().out
    size = sum(p.numel() for name, p in here[0].named_parameters() if "mlp" in name)
    assert f"Influence of model, attributing {size:,} of {here[0].num_parameters():,} trainable parameters" in said
    told = (
        "11 documents of texts.jsonl, column 'body', cut one by one into 10 sequences of at most 24 tokens, 119 in all."
    )
    assert f"{told} Dropped: documents without text (1), sequences of a single token (1). " in said
    assert "EKFAC(" in said and "0.1 x the mean eigenvalue" in said


def test_the_page_shows_the_parts_of_every_score(here, tmp_path):
    run(LINE, *ASK, "--k", "2")
    influence, queries = expected(*here)
    text = page()
    cut = sequences(here[1], TEXTS, 24)
    shown = re.findall(r'<span class="rank">(\d)</span>.*?<strong class="score">(\S+)</strong>.*?#(\d+)<', text, re.S)
    assert [int(rank) for rank, *_ in shown] == [1, 2] * 4
    pair = (
        r'<blockquote class="tokens" tabindex="0">((?:(?!</blockquote>).)*)</blockquote>\s*<p class="through">(.*?)</p>'
    )
    blocks = re.findall(pair, text, re.S)
    assert len(blocks) == len(shown)
    for at, ((_, score, number), found) in enumerate(zip(shown, blocks, strict=True)):
        n, query = int(number), 0 if at < len(shown) / 2 else 1
        tokens, through = (re.findall(r'<i[^>]* title="([^"]*)">', part) for part in found)
        assert len(tokens) == len(cut[n]["input_ids"])
        whole = float(score.replace("−", "-"))
        for parts in (tokens, through):
            values = torch.tensor([float(t.replace("−", "-")) for t in parts])
            assert values.sum() == pytest.approx(whole, abs=0.01 * (abs(whole) + values.abs().sum().item()))
        truth = influence.solve(queries).by_token([n])[query, 0, : len(tokens)]
        close = torch.tensor([float(t.replace("−", "-")) for t in tokens])
        torch.testing.assert_close(close, truth, rtol=0.01, atol=1e-3 * truth.abs().max().item())
    read = Page(text)
    assert "the capital of peru is lima" in "".join(read.words) and "<mark>" in text
    assert "in peru↵\ngo to lima <b>" in "".join(read.words)
    assert text.count('<figure class="layers">') == len(shown) + 2 and "layer 1, MLP" in text
    assert "11 documents of texts.jsonl" in text and "log-probability" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.slow
def test_the_page_in_a_browser(here, tmp_path):
    run(LINE, *ASK, "--k", "2")
    probe = """
      const tokens = [...document.querySelectorAll(".query.split li .tokens i")];
      const colour = (t) => getComputedStyle(t).backgroundColor;
      const strong = [...document.querySelectorAll(".p10, .n10")].filter((t) => t.closest("li"));
      const plain = tokens.filter((t) => !t.className);
      return {wide: document.documentElement.scrollWidth, tokens: tokens.length, strong: strong.map(colour),
        plain: plain.map(colour), titles: tokens.every((t) => t.title),
        bars: [...document.querySelectorAll(".layers rect")].filter((r) => r.getBBox().height > 0).length,
        breaks: document.querySelector(".query.split blockquote").textContent.includes("peru")};"""
    for width in (390, 1200):
        found = browse(tmp_path, page(), probe, width)
        assert found["loads"] == 0 and found["wide"] <= width and found["titles"] and found["breaks"]
        assert found["tokens"] > 50 and found["bars"] > 8
        assert found["strong"] and not set(found["strong"]) & set(found["plain"])


def test_other_ways_to_cut_to_choose_and_to_score(here, capsys):
    run("score --hf model --dataset texts.jsonl --length 24 --pack --no-certify --out p", *ASK)
    influence, queries = expected(*here, pack=True)
    values = influence.score(queries, certify=False).values
    torch.testing.assert_close(wherefrom.Scores.load("p/scores.safetensors").values, values, rtol=1e-4, atol=1e-5)
    assert "packed into" in capsys.readouterr().out
    run(LINE.replace("--out r", "--out w"), *ASK, "--method", "TFIDF()")
    assert "<mark>" not in page("w") and "the capital of peru is" in page("w")
    run("self-influence --hf model --dataset texts.jsonl --length 24 --out s --damping 0.5 --parameters attn --seed 1")
    said = capsys.readouterr().out
    assert "lambda     0.5" in said and "seed=1" in said and "self-influence" in said
    refused(capsys, "queries must be given, got none.* or with --hf give --prompt", LINE)


def test_a_shortlist_keeps_the_numbers(here, capsys):
    run(LINE, *ASK, "--candidates", "4", "--k", "2")
    influence, queries = expected(*here)
    full, found = influence.score(queries).values, wherefrom.Scores.load("r/scores-of-4.safetensors")
    assert 4 <= len(found.numbers) < full.shape[1]
    torch.testing.assert_close(found.values, full[:, found.numbers], rtol=1e-4, atol=1e-5)
    columns = table("r/explain.csv")
    assert columns["side"][0] == "proponent"
    assert (first := int(columns["example"][0])) == int(found.numbers[found.values[0].argmax()])
    assert float(columns["predicted_change"][0]) == pytest.approx(float(found.values[0].max()) / full.shape[1])
    assert f"#{first}</span>" in page() and "closest by TF-IDF" in page() and "closest by" in capsys.readouterr().out
    refused(capsys, "candidates must be at least 1", LINE, *ASK, "--candidates", "0")
    refused(capsys, "--candidates are for influence functions", LINE, *ASK, "--candidates", "4", "--method", "BM25()")


def test_adapters_are_attributed(here, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_pretrained("model")
        tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    tuned.save_pretrained("adapters")
    run("score --hf adapters --dataset texts.jsonl --length 24 --no-certify --out a", *ASK)
    size = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    said = capsys.readouterr().out
    assert f"attributing {size:,} of {size:,} trainable parameters (100.0%); 28 frozen parameters" in said
    method = wherefrom.Influence(wherefrom.EKFAC(), wherefrom.Damping.relative(0.1))
    influence = method.fit(tuned.eval(), CausalLM(), pad(sequences(here[1], TEXTS, 24)[:]))
    values = influence.score(completion_batch(here[1], [ASK[1], ASK[2]], [ASK[4], ASK[5]]), certify=False).values
    torch.testing.assert_close(wherefrom.Scores.load("a/scores.safetensors").values, values, rtol=1e-4, atol=1e-6)


def test_which_parameters_count():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, ffn_dim=8, word_embed_proj_dim=8, tie_word_embeddings=False)
    )
    chosen = re.compile(language.choose_parameters(opt))
    names = [name for name, _ in opt.named_parameters() if chosen.search(name)]
    linear = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")
    assert sorted(names) == sorted(f"model.decoder.layers.0.{'' if 'fc' in n else 'self_attn.'}{n}.{part}"
                                   for n in linear for part in ("weight", "bias"))  # fmt: skip


@pytest.mark.slow
def test_the_page_on_language_models_is_true(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / "docs" / "language-models.md").read_text(encoding="utf-8")
    code, *_ = text.partition("```text\n$ wherefrom")
    names = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", code, re.DOTALL | re.MULTILINE):
        exec(block, names)
    command = re.search(r"^\$ wherefrom (.*)$", text, re.MULTILINE)[1]
    assert cli.main(shlex.split(command)) == 0
    first = int(table("run/explain.csv")["example"][0])
    assert "peru" in names["texts"][first] and "18 documents of facts.txt" in capsys.readouterr().out


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("texts.jsonl", "absent.jsonl"), "dataset must be a file that is there, got absent.jsonl"),
        (("--dataset texts.jsonl", ""), "dataset must be given with --hf, got none. Give the training texts"),
        (("--length 24", "--length 33"), "length must be at most the 32 tokens that the model takes, got 33"),
        (("--length 24", "--column text"), "column must be one of n, body, got 'text'"),
        (("--length 24", "--split train"), "split must be left out for a file"),
        (("--hf model", "mine:problem --hf model"), "what to look at must be .*, got mine:problem and model"),
        (("--hf model", "--hf bare"), "the tokenizer of bare must be saved with the model, got none"),
        (("--hf model", "--hf texts.jsonl"), "hf must be a language model's folder or its name on the hub"),
        (("--hf model", "--hf headless"), "the weights in headless must be those of a causal language model, got no "),
        (("--length 24", "--length 24 --k 0"), "k must be at least 1, got 0"),
        (("--length 24", "--length 24 --batch-size 0"), "batch_size must be a positive integer, got 0"),
        (("--hf model", "--hf small"), "the tokenizer must be that of the model, with token numbers below 280, got "),
        (("explain", "explain --solver EKFA()"), "solver: there is no EKFA. Do you mean EKFAC"),
    ],
)
def test_bad_input_is_told_in_one_line(here, tmp_path, capsys, change, said):
    model, tokenizer = here
    if "bare" in change[1]:
        model.save_pretrained("bare")
    if "headless" in change[1]:
        transformers.GPT2ForSequenceClassification(model.config).save_pretrained("headless")
        config = json.loads(Path("headless/config.json").read_text())
        Path("headless/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        tokenizer.save_pretrained("headless")
    if "small" in change[1]:
        config = transformers.GPT2Config(**{**model.config.to_diff_dict(), "vocab_size": 280})
        transformers.GPT2LMHeadModel(config).save_pretrained("small")
        tokenizer.save_pretrained("small")
    refused(capsys, said, LINE.replace(*change), *ASK)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ("--prompt", "the", "--completion", ""),
            "prompt and completion 0 must be at least one token each, got 1 and 0",
        ),
        (("--prompt", "the", "of", "--completion", " is"), "completions must be one for each of the 2 prompts, got 1"),
        (("--prompt", "the"), "completions must be one for each of the 1 prompts, got 0"),
        (("--completion", " is"), "completions must be one for each of the 0 prompts, got 1"),
        (("--prompt", "the" * 40, "--completion", " is"), "at most the 32 tokens that the model takes, got "),
    ],
)
def test_bad_queries_are_told_in_one_line(here, capsys, asked, said):
    refused(capsys, said, LINE, *asked)


def test_a_name_on_the_hub_while_offline(here, capsys, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(capsys, "hf must be a language model's folder or its name on the hub, got 'some/model'. ",
            LINE.replace("--hf model", "--hf some/model"), *ASK)  # fmt: skip
    refused(capsys, "dataset must be a file ending in .*, got 'some/texts'. .*[Oo]ffline",
            LINE.replace("texts.jsonl", "some/texts"), *ASK)  # fmt: skip


@pytest.mark.parametrize("package", ["transformers", "datasets"])
def test_what_is_not_installed_is_named(here, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(capsys, f'--hf needs {package}, which is not installed. Run: pip install "wherefrom.hf."', LINE, *ASK)


@pytest.mark.slow
def test_without_transformers_the_other_commands_work():
    code = "import sys; sys.modules['transformers'] = None; from wherefrom.tools.cli.registry import COMMANDS"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interrupted_run_goes_on(here, tmp_path, capsys, monkeypatch):
    line = f"{LINE} --batch-size 3 --no-certify"
    run(line.replace("--out r", "--out whole"), *ASK)
    with stopped(monkeypatch, 2):
        run(line, *ASK, code=130)
    left = whole(tmp_path / "r")
    assert "fit.safetensors" in left and "explain.html" not in left and len([n for n in left if ".pieces" in n]) == 2
    monkeypatch.setattr(wherefrom.EKFAC, "fit", lambda *_: pytest.fail("fitted again"))
    run(line, *ASK)
    assert "The fit is taken from r/fit.safetensors." in capsys.readouterr().out
    same = [wherefrom.Scores.load(f"{folder}/scores.safetensors").values for folder in ("r", "whole")]
    assert torch.equal(*same)
    monkeypatch.setattr(wherefrom.Solution, "score", lambda *_, **__: pytest.fail("scored again"))
    run("explain --config r/explain.toml --out r")
    assert [n for n in whole(tmp_path / "r") if "pieces" in n] == []
    refused(capsys, "r/scores.safetensors was made for another queries", line, "--prompt", "in peru", *ASK[3:5])


# --- conversations --------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWERS = [
    [{"role": "user", "content": f"the capital of {country} is"}, {"role": "assistant", "content": f" {city}"}]
    for country, city in CITIES.items()
]


def chatting(tmp_path, tokenizer, template=TEMPLATE) -> None:
    """The model beside a tokenizer with a chat template."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    for file in (tmp_path / "model").iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["messages", "pairs", "texts"])
def test_only_answers_count_in_data_sets_of_conversations(here, tmp_path, capsys, kind):
    model, tokenizer = here
    chatting(tmp_path, tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained("chatty")
    user, end = "<|user|>the capital of peru is<|end|><|assistant|>", tokenizer("<|end|>")["input_ids"]
    if kind == "messages":
        rows = [{"messages": messages, "id": "a"} for messages in ANSWERS]
    elif kind == "pairs":
        rows = [{"prompt": messages[:1], "completion": messages[1:]} for messages in ANSWERS]
    else:
        rows = [{"prompt": user.replace("peru", country), "completion": f" {city}<|end|>"}
                for country, city in CITIES.items()]  # fmt: skip
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = "the capital of peru is" if kind != "texts" else user
    run("score --hf chatty --dataset chats.jsonl --no-certify --out c", "--prompt", asked, "--completion", " lima")
    train = []
    for country, city in CITIES.items():
        start = tokenizer(user.replace("peru", country))["input_ids"]
        answer = [*tokenizer(f" {city}")["input_ids"], *end]
        train.append({"input_ids": start + answer, "labels": [-100] * len(start) + answer})
    method = wherefrom.Influence(wherefrom.EKFAC(), wherefrom.Damping.relative(0.1), parameters="mlp")
    influence = method.fit(model, CausalLM(), pad(train))
    queries = completion_batch(None, tokenizer(user)["input_ids"], tokenizer(" lima")["input_ids"])
    values = influence.score(queries, certify=False).values
    torch.testing.assert_close(wherefrom.Scores.load("c/scores.safetensors").values, values, rtol=1e-4, atol=1e-5)
    counted = sum(int(t != -100) for row in train for t in row["labels"])
    assert f"taken to be that of the {counted} tokens of answers alone" in capsys.readouterr().out
    if kind == "messages":
        line = "score --hf chatty --dataset chats.jsonl --no-certify --rendered --out d"
        run(line, "--prompt", user, "--completion", " lima")
        assert torch.equal(*(wherefrom.Scores.load(f"{f}/scores.safetensors").values for f in "cd"))


def test_conversations_without_a_template_are_told_in_one_line(here, capsys):
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in ANSWERS))
    said = "messages must be what the tokenizer's chat template takes, got those of user, assistant: Cannot use chat"
    refused(capsys, said, "score --hf model --dataset chats.jsonl --out c", *ASK)
    refused(
        capsys, "pack must be False for conversations", "score --hf model --dataset chats.jsonl --pack --out c", *ASK
    )
