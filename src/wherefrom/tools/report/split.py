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

LEVELS = 10  # of a token's colour
WINDOW, EDGE = 96, 24  # tokens that are shown of a long text, around the strongest; more than an edge is folded away
KINDS = {"attention": r"attn|attention", "MLP": r"mlp|ffn|fc\d|feed_?forward|expert|moe"}  # in the names of blocks
NORM = r"norm|ln_|ln\d"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Scores of n training examples on q queries, split over what is given; each kind of part sums to the scores.

    Args:
        queries, examples: their numbers.
        tokens: (q, n, T) over the tokens of the examples, as `Influence.by_token` gives them.
        query_tokens: (q, S, n) over the tokens of the queries, as `Influence.by_query_token` gives them.
        blocks: block of parameters to (q, n), as `Influence.by_block` gives them.

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
        wanted = {"tokens": (q, n, None), "query_tokens": (q, None, n)}
        given = {name: getattr(self, name) for name in wanted}
        for name, block in (self.blocks or {}).items():
            given[f"blocks[{name!r}]"], wanted[f"blocks[{name!r}]"] = block, (q, n)
        for name, value in given.items():
            if value is None:
                continue
            if len(value.shape) != len(wanted[name]) or any(
                w not in (None, s) for w, s in zip(wanted[name], value.shape, strict=True)
            ):
                shape = str(wanted[name]).replace("None", "tokens")
                raise expected(f"{name} of a split", f"of shape {shape}", tuple(value.shape))


def card(
    split: Split, query: int, shown: Example, helped: Mapping[int, Example], others: Mapping[int, Example]
) -> dict[str, Any]:
    """A query and its examples in parts, on one scale for all its examples, and one for what they come to.

    Args:
        split: the parts.
        query: its number.
        shown: how it is shown.
        helped, others: its proponents and its other examples: number to how it is shown.

    Returns:
        "tokens" and "bar" of the query, summed over its proponents, and "of" each example: number to its "tokens",
        the query's tokens that it acts "through", and "bar"; None where there is nothing of the kind. Then the
        "scale" of the colours of the examples' tokens.

    Raises:
        InputError: if it is not split, or one of its examples is not.
    """
    examples = {**helped, **others}
    numbers = list(examples)
    if query not in split.queries or not examples.keys() <= set(split.examples):
        raise expected("a split", f"one of query {query} and examples {numbers}", "one of others")
    i, at = list(split.queries).index(query), [list(split.examples).index(number) for number in numbers]
    best = at[: len(helped)]
    found: dict[str, Any] = {"tokens": None, "bar": None, "scale": None}
    of: dict[int, dict[str, Any]] = {number: dict.fromkeys(("tokens", "through", "bar")) for number in numbers}
    if split.tokens is not None:
        values = [float_array(split.tokens[i, j], "tokens", (1,)) for j in at]
        found["scale"] = scale = _largest(values)
        for number, value in zip(numbers, values, strict=True):
            if (tokens := examples[number].tokens) is not None:
                of[number]["tokens"] = text(tokens, value, scale)
    if split.query_tokens is not None and shown.tokens is not None:
        values = [float_array(split.query_tokens[i, :, j], "query_tokens", (1,)) for j in at]
        scale, first = _largest(values), shown.marked or 0
        for number, value in zip(numbers, values, strict=True):
            of[number]["through"] = coloured(shown.tokens[first:], value[first:], scale)
        whole = np.sum(values[: len(best)], 0) if best else np.zeros(len(shown.tokens))
        tokens = coloured(shown.tokens, whole, _largest([whole]))
        found["tokens"] = {"prompt": tokens[:first], "marked": tokens[first:]}
    if split.blocks:
        columns, kinds, sums = layers({name: float_array(b, name, (2,))[i] for name, b in split.blocks.items()})
        for number, j in zip(numbers, at, strict=True):
            of[number]["bar"] = bar(columns, kinds, sums[:, :, j], sums[:, :, at])
        whole = sums[:, :, best].sum(2)
        found["bar"] = bar(columns, kinds, whole, whole[:, :, None])
    return found | {"of": of}


def coloured(tokens: Sequence[str], values: Array, scale: float) -> list[dict[str, Any]]:
    """Each token's text with its white space made visible, its part, and its colour: -10, hurt, to 10, helped.

    Args:
        tokens: the texts.
        values: their parts; there may be more of them, of padding.
        scale: the part that has the full colour.
    """
    return [
        {"text": visible(token), "title": signed(float(value)), "level": round(LEVELS * float(value) / (scale or 1))}
        for token, value in zip(tokens, values, strict=False)
    ]


def text(tokens: Sequence[str], values: Array, scale: float) -> dict[str, list[dict[str, Any]]]:
    """Tokens "before", "in" and "after" the window that is shown: all of a short text, else the strongest stretch."""
    found, size, start, end = coloured(tokens, values, scale), len(tokens), 0, len(tokens)
    if size > WINDOW + 2 * EDGE:
        sums = np.concatenate([[0.0], np.abs(values[:size]).cumsum()])
        start = int((sums[WINDOW:] - sums[:-WINDOW]).argmax())
        end = start + WINDOW if start + WINDOW + EDGE < size else size
        start = start if start > EDGE else 0
    return {"before": found[:start], "in": found[start:end], "after": found[end:]}


def visible(token: str) -> str:
    """A token's text with marks for line ends, tabs, and spaces that would not be seen."""
    if not token:
        return "▫"  # a part of a character
    shown = token.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥")
    return shown.replace(" ", "␣") if not token.strip(" ") else shown


def layers(blocks: Mapping[str, Array]) -> tuple[list[str], list[str], Array]:
    """Sums of blocks by layer, its number in their names, and by attention, MLP and the rest.

    Args:
        blocks: name to (n,).

    Returns:
        names of the L layers, and of the blocks outside of any; names of the K kinds that there are; sums (L, K, n).
    """
    sums: dict[str, dict[str, Array]] = {}
    for name, values in blocks.items():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        norm = re.search(NORM, name.lower())
        kind = next((k for k, mark in KINDS.items() if not norm and re.search(mark, name.lower())), "other")
        of = sums.setdefault(number[1] if number else name, {})
        of[kind] = of.get(kind, 0) + values
    kinds = [kind for kind in (*KINDS, "other") if any(kind in of for of in sums.values())]
    zero = np.zeros_like(next(iter(blocks.values())))
    return list(sums), kinds, np.array([[of.get(kind, zero) for kind in kinds] for of in sums.values()])


def bar(columns: Sequence[str], kinds: Sequence[str], values: Array, among: Array) -> dict[str, Any]:
    """A column for each layer, in units of the picture: up where it helped, down where it hurt.

    Args:
        columns, kinds: names, L and K.
        values: (L, K).
        among: those that share the scale, (L, K, n).
    """
    high, low = max(float(among.max()), 0.0), max(-float(among.min()), 0.0)
    unit, width = 40 / ((high + low) or 1), 10 / len(kinds)
    zero = high * unit
    rows = [
        {
            "x": 12 * at + width * k,
            "y": zero - max(float(value), 0) * unit,
            "width": width,
            "height": abs(float(value)) * unit,
            "sign": "positive" if value > 0 else "negative",
            "kind": kind,
            "title": f"{'layer ' if name.isdecimal() else ''}{name}, {kind}: {signed(float(value))}",
        }
        for at, (name, row) in enumerate(zip(columns, values, strict=True))
        for k, (kind, value) in enumerate(zip(kinds, row, strict=True))
    ]
    numbered = [name for name in columns if name.isdecimal()]
    ends = (numbered[0], numbered[-1]) if numbered else ("", "")
    return {"width": 12 * len(columns) - 2, "zero": zero, "rows": rows, "ends": ends, "kinds": list(kinds)}


def _largest(values: Sequence[Array]) -> float:
    return max((float(np.abs(value).max(initial=0)) for value in values), default=0.0)
