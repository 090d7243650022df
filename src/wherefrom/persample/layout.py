"""Which parameters form a block together, and which modules its rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from wherefrom.persample.blocks import Block
from wherefrom.persample.layers import kind_of, register_loaded, transposed


@dataclass(frozen=True)
class Use:
    """A block's rows come from these parameters of this module; None stands for the slow path."""

    module: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The blocks, and where the rows of each come from.

    Args:
        blocks: the blocks.
        uses: block name to the modules that use it; none: the slow path.
        alone: blocks whose rows are made one example at a time, as their layers do not see a batch example by example.
        shared: modules that are called with one row for the whole batch, such as a table of positions.
        looped: make the rows of the slow path by a backward pass for each, as vmap gives others than autograd.
    """

    blocks: tuple[Block, ...]
    uses: dict[str, tuple[Use, ...]]
    alone: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    looped: bool = False

    @property
    def slow(self) -> tuple[Block, ...]:
        """The blocks that no layer entry covers."""
        return tuple(b for b in self.blocks if not self.uses[b.name])

    def using(self, module: str) -> frozenset[str]:
        """The names of the blocks that a module's calls give rows to."""
        return frozenset(name for name, uses in self.uses.items() if any(use.module == module for use in uses))

    def only(self, names: frozenset[str]) -> Layout:
        """The layout of these blocks, from a batch that holds one example."""
        blocks = tuple(b for b in self.blocks if b.name in names)
        return replace(self, blocks=blocks, uses={b.name: self.uses[b.name] for b in blocks}, alone=frozenset())


def plan(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Layout:
    """Assign each selected parameter to a block: of one layer, of several that share it, or of its own."""
    register_loaded()
    names = {id(p): name for name, p in parameters.items()}
    modules = dict(model.named_modules())
    claims: dict[str, list[tuple[str, str]]] = {name: [] for name in parameters}  # parameter -> (module, part)
    for path, module in modules.items():
        for part, p in module._parameters.items():
            if p is not None and id(p) in names and kind_of(module, part) is not None:
                claims[names[id(p)]].append((path, part))
    blocks: list[Block] = []
    uses: dict[str, tuple[Use, ...]] = {}
    done: set[str] = set()
    for name in parameters:
        if name in done:
            continue
        path, part = claims[name][0] if claims[name] else ("", "")
        parts = {name: part}
        if len(claims[name]) == 1:  # the bias of the same layer joins, unless it is shared too
            bias = "bias" if part == "weight" else f"{part}_bias"
            parts |= {p: bias for p, c in claims.items() if c == [(path, bias)] and p not in done}
        shapes = {p: parameters[p].shape for p in parts}
        block = block_of(path if len(parts) > 1 and part == "weight" else name, modules[path], part, shapes)
        blocks.append(block)
        uses[block.name] = tuple(
            Use(module, tuple(parts.values()) if len(claims[name]) == 1 else (q,)) for module, q in claims[name]
        )
        done.update(parts)
    return Layout(tuple(blocks), uses)


def block_of(name: str, layer: nn.Module, part: str, shapes: Mapping[str, torch.Size]) -> Block:
    """The block of a layer's part, with its bias; loose numbers if no entry covers it."""
    kind = kind_of(layer, part) if part else None
    matrix = kind.matrix(layer) if kind else None
    return Block(name, dict(shapes), matrix, matrix is not None and transposed(kind))


def demoted(layout: Layout, wrong: set[str]) -> Layout:
    """The layout with the blocks of wrong parameters replaced by one slow block per parameter."""
    blocks, uses = [], {}
    for b in layout.blocks:
        slow = bool(wrong & set(b.shapes))
        for piece in [Block(p, {p: s}, None) for p, s in b.shapes.items()] if slow else [b]:
            blocks.append(piece)
            uses[piece.name] = () if slow else layout.uses[b.name]
    return replace(layout, blocks=tuple(blocks), uses=uses)
