"""Which parameters form a block together, and how the rows of each block are captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from wherefrom.persample.blocks import Block
from wherefrom.persample.layers import kind_of, register_loaded, transposed


@dataclass(frozen=True)
class Use:
    """A module whose calls give rows to a block, and which of the module's own parameters these are rows of.

    Args:
        module: the path of the module in the model.
        parts: names of its parameters, in the order of the block's columns.
    """

    module: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The blocks, and how the rows of each are captured.

    Args:
        blocks: the blocks.
        uses: block name to the modules that use it. None of them: no layer rule covers the block, and it takes the
            slow path.
        one_by_one: blocks whose rows are captured one example at a time, as their layers do not see a batch example by
            example.
        broadcast: modules that are called with one row for the whole batch, such as a table of positions.
        without_vmap: make the rows of the slow path by a backward pass for each, as vmap gives others than autograd.
    """

    blocks: tuple[Block, ...]
    uses: dict[str, tuple[Use, ...]]
    one_by_one: frozenset[str] = frozenset()
    broadcast: frozenset[str] = frozenset()
    without_vmap: bool = False

    @property
    def slow(self) -> tuple[Block, ...]:
        """The blocks that no layer rule covers."""
        return tuple(b for b in self.blocks if not self.uses[b.name])

    def blocks_using(self, module: str) -> frozenset[str]:
        """Find the names of the blocks that a module's calls give rows to."""
        return frozenset(name for name, uses in self.uses.items() if any(use.module == module for use in uses))

    def parameters_using(self, module: str) -> set[str]:
        """Find the names of the parameters of those blocks."""
        using = self.blocks_using(module)
        return {parameter for b in self.blocks if b.name in using for parameter in b.shapes}

    def restrict_to(self, names: frozenset[str]) -> Layout:
        """Keep these blocks only, and capture them from a whole batch, which may be one of a single example."""
        blocks = tuple(b for b in self.blocks if b.name in names)
        return replace(self, blocks=blocks, uses={b.name: self.uses[b.name] for b in blocks}, one_by_one=frozenset())


def plan(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Layout:
    """Assign each parameter to a block: of one layer, of several that share it, or of its own.

    Nothing is run. Whether the rules describe what the layers do is not known yet.

    Args:
        model: the model.
        parameters: those to assign, by name.
    """
    register_loaded()
    modules = dict(model.named_modules())
    claims = _find_claims(modules, parameters)

    blocks: list[Block] = []
    uses: dict[str, tuple[Use, ...]] = {}
    assigned: set[str] = set()
    for name in parameters:
        if name in assigned:
            continue
        path, part = claims[name][0] if claims[name] else ("", "")
        is_shared = len(claims[name]) > 1

        # The bias of the same layer joins its weight, unless one of the two is shared with other layers.
        parts = {name: part}
        if len(claims[name]) == 1:
            bias = "bias" if part == "weight" else f"{part}_bias"
            for other, other_claims in claims.items():
                if other_claims == [(path, bias)] and other not in assigned:
                    parts[other] = bias

        is_whole_layer = len(parts) > 1 and part == "weight"
        shapes = {parameter: parameters[parameter].shape for parameter in parts}
        block = block_of(path if is_whole_layer else name, modules[path], part, shapes)
        blocks.append(block)
        uses[block.name] = tuple(
            Use(module, (module_part,) if is_shared else tuple(parts.values())) for module, module_part in claims[name]
        )
        assigned.update(parts)
    return Layout(tuple(blocks), uses)


def _find_claims(
    modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> dict[str, list[tuple[str, str]]]:
    """Find the modules that hold each parameter and have a rule for it: (path, name of the parameter in the module).

    A parameter that several modules share is one object with several claims.
    """
    names = {id(p): name for name, p in parameters.items()}
    claims: dict[str, list[tuple[str, str]]] = {name: [] for name in parameters}
    for path, module in modules.items():
        for part, p in module._parameters.items():
            if p is not None and id(p) in names and kind_of(module, part) is not None:
                claims[names[id(p)]].append((path, part))
    return claims


def block_of(name: str, layer: nn.Module, part: str, shapes: Mapping[str, torch.Size]) -> Block:
    """Make the block of a layer's part, with its bias; loose numbers if no entry covers it."""
    kind = kind_of(layer, part) if part else None
    matrix = kind.matrix(layer) if kind else None
    return Block(name, dict(shapes), matrix, matrix is not None and transposed(kind))


def fall_back_to_vmap(layout: Layout, wrong: set[str]) -> Layout:
    """Replace the blocks of wrong parameters by one block per parameter on the slow path.

    It is for layouts that no gradients were captured with: blocks change their shape.
    """
    blocks: list[Block] = []
    uses: dict[str, tuple[Use, ...]] = {}
    for block in layout.blocks:
        if wrong & set(block.shapes):
            for parameter, shape in block.shapes.items():
                blocks.append(Block(parameter, {parameter: shape}, None))
                uses[parameter] = ()
        else:
            blocks.append(block)
            uses[block.name] = layout.uses[block.name]
    return replace(layout, blocks=tuple(blocks), uses=uses)
