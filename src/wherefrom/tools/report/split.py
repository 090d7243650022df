"""Scores in parts, as a query's card shows them: over the tokens of its examples, its own tokens, and layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.tools.evaluate.arrays import float_array
from wherefrom.tools.report.examples import Example
from wherefrom.tools.report.numbers import signed

LEVELS = 10  # of a token's color
# Of a long text so many tokens are shown, around the strongest; what lies outside is folded away if it is more than an
# edge.
WINDOW, EDGE = 96, 24
# Patterns in the names of blocks of parameters; what matches none is "other".
KINDS = {"attention": r"attn|attention", "MLP": r"mlp|ffn|fc\d|feed_?forward|expert|moe"}
NORM = r"norm|ln_|ln\d"
HEIGHT = 40  # of a bar, in units of the picture
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Scores of n training examples on q queries, split over what is given; each kind of part sums to the scores.

    Args:
        queries, examples: their numbers.
        tokens: (q, n, T) over the tokens of the examples, as `Solution.by_token` gives them.
        query_tokens: (q, S, n) over the tokens of the queries, as `Solution.by_query_token` gives them.
        blocks: block of parameters to (q, n), as `Solution.by_block` gives them.

    Raises:
        InputError: if a shape is another.
    """

    queries: Sequence[int]
    examples: Sequence[int]
    tokens: Tensor | None = None
    query_tokens: Tensor | None = None
    blocks: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        q, n = len(self.queries), len(self.examples)
        _check_shape("tokens", self.tokens, (q, n, None))
        _check_shape("query_tokens", self.query_tokens, (q, None, n))
        for name, block in (self.blocks or {}).items():
            _check_shape(f"blocks[{name!r}]", block, (q, n))


def split_card(
    split: Split, query: int, shown: Example, helpful: Mapping[int, Example], harmful: Mapping[int, Example]
) -> dict[str, Any]:
    """Lay out a query and its examples in parts, on one scale for all examples and one for their sum.

    Args:
        split: the parts.
        query: its number.
        shown: how it is shown.
        helpful, harmful: its proponents and its opponents: number to how it is shown.

    Returns:
        "tokens" and "bar" of the query, summed over its proponents, and "of" each example: number to its "tokens",
        the query's tokens that it acts "through", and "bar"; None where there is nothing of the kind. Then the
        "scale" of the colors of the examples' tokens.

    Raises:
        InputError: if it is not split, or one of its examples is not.
    """
    examples = {**helpful, **harmful}
    numbers = list(examples)
    if query not in split.queries or not examples.keys() <= set(split.examples):
        raise expected("a split", f"one of query {query} and examples {numbers}", "one of others")
    row = list(split.queries).index(query)
    columns = [list(split.examples).index(number) for number in numbers]
    proponents = columns[: len(helpful)]

    card: dict[str, Any] = {"tokens": None, "bar": None, "scale": None}
    of: dict[int, dict[str, Any]] = {number: {"tokens": None, "through": None, "bar": None} for number in numbers}

    if split.tokens is not None:
        parts = [float_array(split.tokens[row, column], "tokens", (1,)) for column in columns]
        card["scale"] = scale = _largest(parts)
        for number, part in zip(numbers, parts, strict=True):
            tokens = examples[number].tokens
            if tokens is not None:
                of[number]["tokens"] = fold_text(tokens, part, scale)

    if split.query_tokens is not None and shown.tokens is not None:
        parts = [float_array(split.query_tokens[row, :, column], "query_tokens", (1,)) for column in columns]
        scale, first = _largest(parts), shown.marked or 0
        for number, part in zip(numbers, parts, strict=True):
            of[number]["through"] = color_tokens(shown.tokens[first:], part[first:], scale)
        together = np.sum(parts[: len(proponents)], 0) if proponents else np.zeros(len(shown.tokens))
        tokens = color_tokens(shown.tokens, together, _largest([together]))
        card["tokens"] = {"prompt": tokens[:first], "marked": tokens[first:]}

    if split.blocks:
        blocks = {name: float_array(block, name, (2,))[row] for name, block in split.blocks.items()}
        layers, kinds, sums = sum_layers(blocks)  # sums: (layers, kinds, n)
        for number, column in zip(numbers, columns, strict=True):
            of[number]["bar"] = draw_bar(layers, kinds, sums[:, :, column], among=sums[:, :, columns])
        together = sums[:, :, proponents].sum(2)
        card["bar"] = draw_bar(layers, kinds, together, among=together[:, :, None])

    return card | {"of": of}


def color_tokens(tokens: Sequence[str], values: Array, scale: float) -> list[dict[str, Any]]:
    """Return each token's text with its white space made visible, its part, and its color: -10, hurt, to 10, helped.

    Args:
        tokens: the texts.
        values: their parts; there may be more of them, of padding.
        scale: the part that has the full color.
    """
    colored = []
    for token, value in zip(tokens, values.tolist(), strict=False):
        level = round(LEVELS * value / (scale or 1))
        colored.append({"text": show_whitespace(token), "title": signed(value), "level": level})
    return colored


def fold_text(tokens: Sequence[str], values: Array, scale: float) -> dict[str, list[dict[str, Any]]]:
    """Return tokens "before", "in" and "after" the window that is shown.

    It holds all of a short text, and the strongest stretch of a long one.
    """
    colored, size = color_tokens(tokens, values, scale), len(tokens)
    start, end = 0, size
    if size > WINDOW + 2 * EDGE:
        # sums[i + WINDOW] - sums[i] is the strength of the window that begins at i.
        sums = np.concatenate([[0.0], np.abs(values[:size]).cumsum()])
        start = int((sums[WINDOW:] - sums[:-WINDOW]).argmax())
        end = start + WINDOW
        # A short rest is not worth folding away.
        if size - end <= EDGE:
            end = size
        if start <= EDGE:
            start = 0
    return {"before": colored[:start], "in": colored[start:end], "after": colored[end:]}


def show_whitespace(token: str) -> str:
    """Return a token's text with marks for line ends, tabs, and spaces that would not be seen."""
    if not token:
        return "▫"  # a part of a character
    shown = token.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥")
    is_blank = not token.strip(" ")
    return shown.replace(" ", "␣") if is_blank else shown


def sum_layers(blocks: Mapping[str, Array]) -> tuple[list[str], list[str], Array]:
    """Sum blocks by layer, whose number is in their names, and by attention, MLP and the rest.

    Args:
        blocks: name to (n,).

    Returns:
        names of the L layers, and of the blocks outside of any; names of the K kinds that there are; sums (L, K, n).
    """
    sums: dict[str, dict[str, Array]] = {}
    for name, values in blocks.items():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        layer = sums.setdefault(number[1] if number else name, {})
        kind = _kind_of(name)
        layer[kind] = layer.get(kind, 0) + values

    kinds = [kind for kind in (*KINDS, "other") if any(kind in layer for layer in sums.values())]
    zero = np.zeros_like(next(iter(blocks.values())))
    array = np.array([[layer.get(kind, zero) for kind in kinds] for layer in sums.values()])
    return list(sums), kinds, array


def _kind_of(name: str) -> str:
    """Return whether a block of parameters belongs to attention, an MLP or neither."""
    name = name.lower()
    # The norm after attention has attention in its name.
    if re.search(NORM, name):
        return "other"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def draw_bar(layers: Sequence[str], kinds: Sequence[str], values: Array, among: Array) -> dict[str, Any]:
    """Return columns for each layer, in units of the picture: up where it helped, down where it hurt.

    Args:
        layers, kinds: names, L and K.
        values: (L, K).
        among: those that share the scale, (L, K, n).
    """
    highest, lowest = max(float(among.max()), 0.0), min(float(among.min()), 0.0)
    unit = HEIGHT / ((highest - lowest) or 1)
    zero, width = highest * unit, 10 / len(kinds)

    rows = []
    for i, (layer, row) in enumerate(zip(layers, values.tolist(), strict=True)):
        name = f"layer {layer}" if layer.isdecimal() else layer
        for k, (kind, value) in enumerate(zip(kinds, row, strict=True)):
            rectangle = {
                "x": 12 * i + width * k,
                "y": zero - max(value, 0) * unit,
                "width": width,
                "height": abs(value) * unit,
                "sign": "positive" if value > 0 else "negative",
                "kind": kind,
                "title": f"{name}, {kind}: {signed(value)}",
            }
            rows.append(rectangle)

    numbered = [layer for layer in layers if layer.isdecimal()]
    ends = (numbered[0], numbered[-1]) if numbered else ("", "")
    return {"width": 12 * len(layers) - 2, "zero": zero, "rows": rows, "ends": ends, "kinds": list(kinds)}


def _check_shape(name: str, values: Tensor | None, wanted: tuple[int | None, ...]) -> None:
    """Refuse parts of another shape; None stands for any number of tokens."""
    if values is None:
        return
    shape = tuple(values.shape)
    fits = len(shape) == len(wanted)
    fits = fits and all(size in (None, actual) for size, actual in zip(wanted, shape, strict=True))
    if not fits:
        words = str(wanted).replace("None", "tokens")
        raise expected(f"{name} of a split", f"of shape {words}", shape)


def _largest(parts: Sequence[Array]) -> float:
    return max((float(np.abs(part).max(initial=0)) for part in parts), default=0.0)
