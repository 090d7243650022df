"""Which parameters form a block together, and which modules its rows come from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from whence.gradients import Block
from whence.layers import kind_of


@dataclass(frozen=True)
class Use:
    """A block's rows come from these parameters of this module; None stands for the slow path."""

    module: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The blocks, and where the rows of each come from."""

    blocks: tuple[Block, ...]
    uses: dict[str, tuple[Use, ...]]  # block name -> modules; empty: the slow path

    @property
    def slow(self) -> tuple[Block, ...]:
        """The blocks that no layer entry covers."""
        return tuple(b for b in self.blocks if not self.uses[b.name])


def plan(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Layout:
    """Assign each selected parameter to a block: of one layer, of several that share it, or of its own."""
    names = {id(p): name for name, p in parameters.items()}
    claims: dict[str, list[tuple[str, str]]] = {name: [] for name in parameters}  # parameter -> (module, part)
    for path, module in model.named_modules():
        if kind_of(module) is not None:
            for part in ("weight", "bias"):
                p = module._parameters.get(part)
                if p is not None and id(p) in names:
                    claims[names[id(p)]].append((path, part))
    modules = dict(model.named_modules())
    blocks: list[Block] = []
    uses: dict[str, tuple[Use, ...]] = {}
    done: set[str] = set()
    for name in parameters:
        if name in done:
            continue
        path, part = claims[name][0] if claims[name] else ("", "")
        partners = [name]
        if len(claims[name]) == 1 and part == "weight":  # the bias of the same layer joins, unless it is shared too
            partners += [b for b, c in claims.items() if c == [(path, "bias")]]
        matrix, sources = None, ()
        if claims[name]:
            parts = tuple("weight" if p == name and part == "weight" else "bias" for p in partners)
            sources = tuple(Use(module, parts if len(claims[name]) == 1 else (q,)) for module, q in claims[name])
            kind = kind_of(modules[path])
            matrix = kind.matrix(modules[path]) if kind else None
        block = Block(path if len(partners) > 1 else name, {p: parameters[p].shape for p in partners}, matrix)
        blocks.append(block)
        uses[block.name] = sources
        done.update(partners)
    return Layout(tuple(blocks), uses)


def demoted(layout: Layout, wrong: set[str]) -> Layout:
    """The layout with the blocks of wrong parameters replaced by one slow block per parameter."""
    blocks, uses = [], {}
    for b in layout.blocks:
        slow = bool(wrong & set(b.shapes))
        for piece in [Block(p, {p: s}, None) for p, s in b.shapes.items()] if slow else [b]:
            blocks.append(piece)
            uses[piece.name] = () if slow else layout.uses[b.name]
    return Layout(tuple(blocks), uses)
