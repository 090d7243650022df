"""Scores split over tokens and layers, in a query's card."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pages import SCRIPT, N, Page, Q, examples, make_scores
from wherefrom.errors import InputError
from wherefrom.tools.report import Example, Overview, Queries, Report, Split
from wherefrom.tools.report.split import EDGE, WINDOW, draw_bar, fold_text, show_whitespace, split_card, sum_layers

TOKENS = ["The", " ca", "t\n", " ", SCRIPT, ""]
ASKED = Example("who?", text="the cat", tokens=["the", " c", "at"], marked=1)


def render(scores, **content) -> str:
    overview = Overview(scores, content["query_examples"])
    return Report("Title", [overview, Queries(scores, **content)]).render()


def shown(count: int) -> list[Example]:
    return [Example(f"text {i}", text="".join(TOKENS), tokens=TOKENS) for i in range(count)]


def parts(queries=range(Q), index=range(N), seed: int = 0) -> Split:
    """Random parts, of tokens and their padding."""
    rng = torch.Generator().manual_seed(seed)
    q, n = len(queries), len(index)
    tokens = torch.randn(q, n, len(TOKENS) + 2, generator=rng)
    asked = torch.randn(q, 4, n, generator=rng)
    names = ("wte", "h.0.attn.c_proj", "h.0.mlp.up", "h.0.ln_1", "h.10.attn.q", "h.10.mlp.experts.3", "h.10.mlp.up")
    return Split(queries, index, tokens, asked, {name: torch.randn(q, n, generator=rng) for name in names})


def test_the_shapes_are_checked():
    good = parts()
    for change, said in (
        ({"tokens": good.tokens[0]}, r"tokens of a split must be of shape \(3, 20, tokens\), got \(20, 8\)"),
        ({"tokens": good.tokens[:2]}, r"tokens of a split must be of shape \(3, 20, tokens\), got \(2, 20, 8\)"),
        ({"query_tokens": good.query_tokens.mT}, r"query_tokens .* \(3, tokens, 20\), got \(3, 20, 4\)"),
        ({"blocks": {"a": torch.zeros(3, 19)}}, r"blocks\['a'\] .* \(3, 20\), got \(3, 19\)"),
    ):
        with pytest.raises(InputError, match=said):
            Split(range(Q), range(N), **change)


def test_a_card_has_one_scale_for_its_examples_and_one_for_their_sum():
    split = parts(queries=[2, 5], index=[7, 3, 4])
    helped, others = {4: shown(1)[0], 7: shown(1)[0]}, {3: shown(1)[0]}
    found = split_card(split, 5, ASKED, helped, others)
    width = len(TOKENS)
    values = {7: split.tokens[1, 0], 3: split.tokens[1, 1], 4: split.tokens[1, 2]}
    assert found["scale"] == pytest.approx(float(split.tokens[1].abs().max()))
    for number, value in values.items():
        tokens = found["of"][number]["tokens"]["in"]
        assert [t["text"] for t in tokens] == ["The", " ca", "t↵\n", "␣", SCRIPT, "▫"]
        levels = (10 * value[:width] / found["scale"]).round().int().tolist()
        assert [t["level"] for t in tokens] == levels and len({level > 0 for level in levels}) == 2
    through = torch.stack([split.query_tokens[1, :3, j] for j in (2, 0, 1)])  # 4, 7, 3
    largest = float(split.query_tokens[1].abs().max())
    assert [t["level"] for t in found["of"][3]["through"]] == (10 * through[2, 1:] / largest).round().int().tolist()
    assert found["tokens"]["prompt"][0]["text"] == "the"
    whole = through[:2].sum(0)  # of its proponents
    assert [t["level"] for t in found["tokens"]["marked"]] == (
        10 * whole[1:] / whole.abs().max()
    ).round().int().tolist()
    with pytest.raises(InputError, match=r"a split must be one of query 5 and examples \[6\]"):
        split_card(split, 5, ASKED, {6: shown(1)[0]}, {})
    assert split_card(Split([0], [1]), 0, ASKED, {1: shown(1)[0]}, {})["of"] == {
        1: {"tokens": None, "through": None, "bar": None}
    }


def test_a_long_text_is_cut_around_its_strongest_stretch():
    size = 400
    tokens, values = [str(i) for i in range(size)], np.zeros(size + 5)
    for strong in (0, 150, size - 1):
        values[:] = 0
        values[strong], values[size] = -1, 9  # what is behind the tokens is padding
        found = fold_text(tokens, values, 1)
        assert [t["text"] for part in found.values() for t in part] == tokens
        assert str(strong) in [t["text"] for t in found["in"]] and WINDOW <= len(found["in"]) <= WINDOW + 2 * EDGE
        assert all(not part or len(part) > EDGE - 1 for part in (found["before"], found["after"]))
    short = fold_text(tokens[: WINDOW + 2 * EDGE], values, 1)
    assert len(short["in"]) == WINDOW + 2 * EDGE and not short["before"] and not short["after"]


def test_white_space_is_visible():
    assert [show_whitespace(t) for t in (" a", "  ", "\t", "\r\n", "")] == [" a", "␣␣", "⇥", "␍↵\n", "▫"]


def test_blocks_are_summed_by_layer_and_kind():
    values = {name: t[0].double().numpy() for name, t in parts().blocks.items()}
    columns, kinds, sums = sum_layers(values)
    assert columns == ["wte", "0", "10"] and kinds == ["attention", "MLP", "other"] and sums.shape == (3, 3, N)
    np.testing.assert_allclose(sums[2, 1], values["h.10.mlp.experts.3"] + values["h.10.mlp.up"])
    np.testing.assert_allclose(sums[1], [values["h.0.attn.c_proj"], values["h.0.mlp.up"], values["h.0.ln_1"]])
    np.testing.assert_allclose(sums[0, :2], 0)
    np.testing.assert_allclose(sums.sum((0, 1)), sum(values.values()))
    names = ["model.layers.3.post_attention_layernorm", "model.layers.3.self_attn.q_proj", "decoder.layers.3.fc1",
             "encoder.layer.3.attention.self.query", "encoder.layer.3.intermediate.dense", "2"]  # fmt: skip
    for name, kind in zip(names, ["other", "attention", "MLP", "attention", "other", "other"], strict=True):
        assert sum_layers({name: np.ones(1)})[:2] == ([name if name == "2" else "3"], [kind])


def test_a_bar_is_drawn_to_the_scale_of_all():
    values = np.array([[1.0, -0.5], [0.0, 2.0]])
    among = np.stack([values, np.array([[3.0, 0], [0, -1.0]])], 2)
    found = draw_bar(["0", "1"], ["attention", "MLP"], values, among)
    assert found["zero"] == 30 and found["width"] == 22 and found["ends"] == ("0", "1")
    assert [(r["x"], r["y"], r["height"], r["sign"]) for r in found["rows"]] == [
        (0, 20, 10, "positive"),
        (5, 30, 5, "negative"),
        (12, 30, 0, "negative"),
        (17, 10, 20, "positive"),
    ]
    assert found["rows"][1]["title"] == "layer 0, MLP: −0.500"


def test_the_page_shows_it_and_escapes_it():
    scores = make_scores()
    content = {"train_examples": shown(N), "query_examples": [ASKED] * Q}
    page = render(scores, **content, k=2, split=parts())
    read = Page(page)
    assert SCRIPT not in page and SCRIPT in "".join(read.words)
    assert page.count('class="query text split"') == Q and page.count("<mark>") == Q
    cards = [card for card in page.split("<article")[1:]]
    assert all(card.count('<figure class="layers">') == 1 + card.count('class="rank"') > 2 for card in cards)
    for words in ("All parts sum to the score", "Completion", "attention", "A query's examples share one scale"):
        assert words in page
    plain = render(scores, **content, k=2)
    assert 'class="rank"' not in plain and "<mark>" not in plain and 'class="legend"' not in plain
    only = render(scores, **examples("plain"), k=2, split=Split(range(Q), range(N), blocks=parts().blocks))
    assert '<figure class="layers">' in only and "All parts sum" not in only and "<mark>" not in only


def test_scores_of_a_few_have_the_numbers_and_the_share_of_all():
    import dataclasses

    scores = make_scores()
    numbers = torch.arange(100, 100 + N)
    few = dataclasses.replace(scores, numbers=numbers, provenance=scores.provenance | {"examples": 500})
    content = {"query_examples": [ASKED] * Q, "k": 1}
    page = render(few, train_examples=[Example(f"text {i}") for i in range(500)], **content)
    best = int(scores.values[0].argmax())
    assert f"text {100 + best}</span>" in page and f"#{100 + best}</span>" in page
    assert f"{float(scores.values[0, best]) / 500:+.3g}"[:5] in page and "training examples, 500, is" in page
    with pytest.raises(InputError, match="train_examples must be one for each of the 500"):
        render(few, train_examples=[Example("x")] * N, **content)
