"""Directions: Q vectors in parameter space, block by block. Right-hand sides and solutions are directions.

A block is a matrix of G groups of shape (O, I), see `Block`, and each block of a direction is held in the form that
takes least memory and work:

    a tensor (Q, G, O, I)            the numbers themselves
    per-sample gradients             sum_t g_t a_t^T, as they were captured: queries before they are solved for
    a product of two thin matrices   what is left of a solution that was cut to a low rank

A block may also be given by its coordinates in an eigenbasis, Q_S^T V Q_A, where inner products are the same and
solving with Kronecker factors is a division. And Q directions may be combinations of p common ones, which is how
methods that project onto p directions keep p of them instead of Q.

Parameter-shaped tensors appear only where autograd needs them: `from_parameters` and `to_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from wherefrom.persample import lowrank
from wherefrom.persample.blocks import Block, ByParameter
from wherefrom.persample.eigenbasis import KroneckerBlock
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.lowrank import LowRank
from wherefrom.persample.rows import Lookup, Rows, Several

Form = Tensor | LowRank | Rows
Scalar = float | Tensor  # one number, or one for each direction, (Q,)


@dataclass(frozen=True, eq=False)
class Directions:
    """Q vectors in parameter space.

    Args:
        blocks: the layout.
        forms: block name to its Q matrices, in any of the forms above.
        bases: block name to the eigenbasis that its coordinates are in; blocks without one are as the parameters are.
        mix: (Q, p), if the forms hold p directions and the Q are these combinations of them; None: they hold the Q.
    """

    blocks: tuple[Block, ...]
    forms: Mapping[str, Form]
    bases: Mapping[str, KroneckerBlock] = field(default_factory=dict)
    mix: Tensor | None = None

    # making and reading them ------------------------------------------------------------------------------------------

    @classmethod
    def from_parameters(cls, blocks: Sequence[Block], v: Mapping[str, Tensor]) -> Directions:
        """Make directions of parameter-shaped tensors, (Q, *shape) each."""
        return cls(tuple(blocks), {block.name: block.pack(v) for block in blocks})

    @classmethod
    def zeros(cls, blocks: Sequence[Block], count: int, like: Tensor) -> Directions:
        """Make ``count`` directions of zeros, of the dtype and on the device of ``like``."""
        return cls(tuple(blocks), {b.name: like.new_zeros(count, *b.sides) for b in blocks})

    def to_parameters(self) -> ByParameter:
        """Give the directions as parameter-shaped tensors, (Q, *shape) each; views where possible."""
        tensors: ByParameter = {}
        for block in self.blocks:
            tensors |= block.unpack(self.matrices(block.name))
        return tensors

    def __len__(self) -> int:
        """Count the directions, Q."""
        if self.mix is not None:
            return len(self.mix)
        return _count(next(iter(self.forms.values())))

    def __getitem__(self, index: slice | Tensor) -> Directions:
        """Take some of the directions, in their forms."""
        if self.mix is not None:
            return replace(self, mix=self.mix[index])
        return replace(self, forms={name: _take(form, index) for name, form in self.forms.items()})

    def chunk(self, size: int) -> Iterator[Directions]:
        """Cut into pieces of at most ``size`` directions, in order; tensors become views."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def matrices(self, name: str) -> Tensor:
        """Write a block out as the parameters are: (Q, G, O, I)."""
        written = self._write(name)
        if self.mix is not None:
            written = torch.tensordot(self.mix.to(written), written, 1)
        return self.bases[name].from_eigenbasis(written) if name in self.bases else written

    def dense(self) -> Directions:
        """Write every block out as the parameters are; itself where that is so already."""
        if self._is_dense:
            return self
        return Directions(self.blocks, {block.name: self.matrices(block.name) for block in self.blocks})

    @cached_property
    def _is_dense(self) -> bool:
        forms = [form for form in self.forms.values() if not isinstance(form, Tensor)]
        return self.mix is None and not self.bases and not forms

    def numbers(self) -> int:
        """Count the numbers that are stored."""
        return sum(f.numel() if isinstance(f, Tensor) else f.numbers() for f in self.forms.values())

    @property
    def device(self) -> torch.device:
        """Where the first block lies."""
        form = next(iter(self.forms.values()))
        while isinstance(form, Several):
            form = form.parts[0]
        if isinstance(form, Tensor):
            return form.device
        if isinstance(form, LowRank):
            return form.left.device
        return form.rows.device if isinstance(form, Written) else form.g.device

    # algebra: what solvers do with right-hand sides and solutions -----------------------------------------------------

    def dot(self, other: Directions) -> Tensor:
        """Take the inner product of each direction with the same one of ``other``: (Q,) float64.

        Sums accumulate in float32 or better, and over blocks in float64.
        """
        theirs = other.dense().tensors()
        total = torch.zeros((), dtype=torch.float64)
        for name, form in self.dense().tensors().items():
            a, b = form.flatten(1), theirs[name].flatten(1)  # (Q, G O I)
            total = total.to(a.device) + torch.linalg.vecdot(_widen(a), _widen(b)).double()
        return total

    def norm(self) -> Tensor:
        """Take the Euclidean norms, (Q,) float64."""
        return self.dot(self).sqrt()

    def inner_products(self, others: Directions) -> Tensor:
        """Take the inner product of every direction with every other one: (p, Q)."""
        total = None
        mine, theirs = self.dense(), others
        for name, form in mine.tensors().items():
            other = theirs.forms[name]
            if theirs.mix is not None or name in theirs.bases or isinstance(other, (Tensor, LowRank)):
                part = form.flatten(1) @ theirs.matrices(name).flatten(1).to(form.dtype).T
            else:  # per-sample gradients, which are not written out for this
                part = other.dot(form)[..., 0]
            total = part if total is None else total + part
        if total is None:
            raise ValueError("directions without a block")
        return total

    def is_finite(self) -> Tensor:
        """Tell which directions are finite, (Q,) bool; nothing that is factored is written out."""
        if self.mix is not None:
            return self.mix.isfinite().all(1)
        total = torch.zeros((), dtype=torch.float64)
        for form in self.forms.values():
            if isinstance(form, Tensor):
                # A sum that is finite has finite terms; it is the cheapest pass over them, and copies nothing.
                sizes = _widen(form.flatten(1)).sum(1)
            elif isinstance(form, LowRank):
                sizes = (form.left.square().sum((2, 1)) * form.right.square().sum((3, 1))).sum(1)
            else:
                sizes = form.square_norms()[:, 0]
            total = total.to(sizes.device) + sizes.double()
        return total.isfinite()

    def scale(self, by: Scalar | Mapping[str, float]) -> Directions:
        """Multiply by a number, by one for each direction (Q,), or by one for each block."""
        return self.map(lambda name, v: v * _factor(by, name, v))

    def multiply(self, factor_of: Callable[[str], Tensor]) -> Directions:
        """Multiply the coordinates of each block, in the basis it is in, by a tensor (G, O, I)."""
        return replace(self, forms={name: _multiply(form, factor_of(name)) for name, form in self.forms.items()})

    def axpy(self, scale: Scalar | Mapping[str, float], other: Directions) -> Directions:
        """Return ``self + scale * other``; ``scale`` as for `scale`."""
        theirs = other.dense().tensors()
        return self.map(lambda name, v: v + theirs[name] * _factor(scale, name, v))

    def add_(self, scale: Scalar | Mapping[str, float], other: Directions) -> Directions:
        """Add ``scale * other`` in place, to directions that are dense."""
        theirs = other.dense().tensors()
        for name, v in self.tensors().items():
            factor = _factor(scale, name, v)
            if isinstance(factor, Tensor):
                v.addcmul_(theirs[name], factor.expand_as(v))
            else:
                v.add_(theirs[name], alpha=factor)
        return self

    def add_to_(self, index: Tensor, scale: Scalar, other: Directions) -> Directions:
        """Add ``scale * other`` in place to the directions of these numbers alone."""
        theirs = other.dense().tensors()
        for name, v in self.tensors().items():
            v.index_add_(0, index, theirs[name] * _factor(scale, name, v))
        return self

    def set_(self, index: Tensor, values: Directions | float) -> Directions:
        """Replace the directions of these numbers, in place, by others or by a number."""
        others = values.tensors() if isinstance(values, Directions) else None
        for name, v in self.tensors().items():
            v[index] = values if others is None else others[name]  # type: ignore[assignment]
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrices (Q, G, O, I) of directions that are dense, to be read or changed in place.

        Raises:
            TypeError: if they are not dense.
        """
        if not self._is_dense:
            raise TypeError("These directions are not written out. Call dense() first.")
        return dict(self.forms)  # type: ignore[arg-type]

    def clone(self) -> Directions:
        """Copy, dense, sharing no memory."""
        return self.map(lambda _, v: v.clone())

    def zeros_like(self) -> Directions:
        """Return as many directions of zeros."""
        return self.map(lambda _, v: torch.zeros_like(v))

    def sum_by(self, groups: Tensor, count: int) -> Directions:
        """Sum directions group by group, each in the basis it is in.

        Args:
            groups: the group of each direction, (Q,).
            count: of groups; one that is empty sums to zero.
        """
        if self.mix is not None:
            return replace(self, mix=self.mix.new_zeros(count, self.mix.shape[1]).index_add_(0, groups, self.mix))
        sums: dict[str, Form] = {}
        for name in self.forms:
            written = self._write(name)
            sums[name] = written.new_zeros(count, *written.shape[1:]).index_add_(0, groups, written)
        return replace(self, forms=sums)

    def add(self, other: Directions) -> Directions:
        """Return the sum with directions that are in the same bases, or combinations of the same ones."""
        if self.mix is not None and other.mix is not None:
            return replace(self, mix=self.mix + other.mix)
        forms: dict[str, Form] = {name: self._write(name) + other._write(name) for name in self.forms}
        return replace(self, forms=forms)

    def mean(self) -> Directions:
        """Return the mean of the Q directions, as one."""
        if self.mix is not None:
            return replace(self, mix=self.mix.mean(0, keepdim=True))
        return replace(self, forms={name: self._write(name).mean(0, keepdim=True) for name in self.forms})

    def flatten(self) -> Tensor:
        """Write each direction as one row, block after block: (Q, D)."""
        tensors = self.dense().tensors()
        # In the order of the layout: an operator may return its blocks in another one.
        return torch.cat([tensors[block.name].flatten(1) for block in self.blocks], 1)

    @classmethod
    def unflatten(cls, blocks: Sequence[Block], rows: Tensor) -> Directions:
        """Read rows (Q, D) as directions: the inverse of `flatten`."""
        pieces = rows.split([block.size for block in blocks], 1)
        forms = {b.name: piece.reshape(-1, *b.sides) for b, piece in zip(blocks, pieces, strict=True)}
        return cls(tuple(blocks), forms)

    # eigenbases and low rank ------------------------------------------------------------------------------------------

    def to_eigenbasis(self, bases: Mapping[str, KroneckerBlock]) -> Directions:
        """Give these blocks by their coordinates in an eigenbasis; what is factored stays so where it can."""
        forms = dict(self.forms)
        for name, basis in bases.items():
            if name not in self.bases:
                forms[name] = _rotate(forms[name], basis)
        return replace(self, forms=forms, bases={**self.bases, **bases})

    def from_eigenbasis(self, names: Sequence[str]) -> Directions:
        """Give these blocks as the parameters are again."""
        forms = dict(self.forms)
        for name in names:
            if name in self.bases:
                forms[name] = self.bases[name].from_eigenbasis(self._write(name))
        return replace(self, forms=forms, bases={k: b for k, b in self.bases.items() if k not in names})

    def multiply_in_eigenbasis(
        self, bases: Mapping[str, KroneckerBlock], factor_of: Callable[[str], Tensor]
    ) -> Directions:
        """Multiply the coordinates of each block in an eigenbasis by a tensor (G, O, I).

        Blocks come back as they were given: by their coordinates, or as the parameters are. The latter are rotated
        there and back one after another, so that no more than one block is held twice.
        """
        forms: dict[str, Form] = {}
        for name, form in self.forms.items():
            if name in self.bases:
                forms[name] = _multiply(form, factor_of(name))
            else:
                basis = bases[name]
                forms[name] = basis.from_eigenbasis(_multiply(_rotate(form, basis), factor_of(name)))
        return replace(self, forms=forms)

    def truncate(self, rank: float, factors: Mapping[str, KroneckerBlock]) -> tuple[Directions, Tensor]:
        """Cut each block of each direction to a low rank, out of its basis: that costs less than rotating rows.

        What is kept is what matters to scores: V_r minimises the mean square of <V - V_r, W> over rows W whose second
        moment is that of KFAC, S x A, so that S^1/2 (V - V_r) A^1/2 is what a singular value decomposition makes small.

        Args:
            rank: see `wherefrom.persample.lowrank.truncate`.
            factors: block name to the Kronecker factors of the gradients that will be scored, in the same bases.

        Returns:
            The directions; energies |S^1/2 V A^1/2|^2 over all blocks of what is dropped and of all, (2, Q) float64.
        """
        forms: dict[str, Form] = {}
        energies = []
        for name in self.forms:
            basis = factors[name]
            if name in self.bases and self.mix is None:
                v = self._write(name)
            else:
                v = basis.to_eigenbasis(self.matrices(name))
            left, right = (root.to(v) for root in basis.roots())  # (G, O, 1), (G, 1, I)
            weighted = left * v * right
            low, dropped = lowrank.truncate(weighted, rank)
            energies.append(torch.stack([dropped, weighted.flatten(1).norm(dim=1, dtype=torch.float64) ** 2]))
            if isinstance(low, LowRank):
                forms[name] = _rotate_back(LowRank(low.left / left, low.right / right), basis)
            else:
                forms[name] = basis.from_eigenbasis(v)
        return Directions(self.blocks, forms), torch.stack(energies).sum(0)

    # inside -----------------------------------------------------------------------------------------------------------

    def _write(self, name: str) -> Tensor:
        """Write a form out, in its own basis and before it is mixed: (Q or p, G, O, I)."""
        return _write_out(self.forms[name])

    def map(self, f: Callable[[str, Tensor], Tensor]) -> Directions:
        """Apply a function of the block's name and its matrices (Q, G, O, I) to every block."""
        return Directions(self.blocks, {name: f(name, v) for name, v in self.dense().tensors().items()})


def concatenate(parts: Sequence[Directions]) -> Directions:
    """Put several sets of directions one after another; blocks whose bases differ are written out.

    Directions that are combinations must be of the same common ones, those of the first set.
    """
    if len(parts) == 1:  # nothing is copied
        return parts[0]
    first = parts[0]
    if first.mix is not None:
        return replace(first, mix=torch.cat([part.mix for part in parts if part.mix is not None]))

    forms: dict[str, Form] = {}
    bases = {name: b for name, b in first.bases.items() if all(name in part.bases for part in parts)}
    for block in first.blocks:
        name = block.name
        pieces = []
        for part in parts:
            form = part.forms[name] if name in bases or name not in part.bases else part.matrices(name)
            if not isinstance(form, (Tensor, LowRank)):
                form = part._write(name)
            pieces.append(form)
        forms[name] = lowrank.concatenate(pieces)
    return Directions(first.blocks, forms, bases)


def _count(form: Form) -> int:
    """Count the directions of a form."""
    if isinstance(form, (Tensor, LowRank)):
        return len(form)
    if isinstance(form, Several):
        return _count(form.parts[0])
    if isinstance(form, Factored):
        return form.a.shape[1]
    return len(form.ids) if isinstance(form, Lookup) else len(form.rows)


def _write_out(form: Form) -> Tensor:
    """Write one block's form out, in the basis that it is in: (Q, G, O, I)."""
    if isinstance(form, Tensor):
        return form
    if isinstance(form, LowRank):
        return form.write()
    written = form.written()
    return written.rows.reshape(-1, *written.sides)


def _multiply(form: Form, factor: Tensor) -> Tensor:
    """Write one block's form out and multiply it by (G, O, I)."""
    written = _write_out(form)
    # What factored rows were written out to is nobody else's, so that it is multiplied in place.
    in_place = not isinstance(form, (Tensor, LowRank, Written))
    return written.mul_(factor) if in_place else written * factor


def _take(form: Form, index: slice | Tensor) -> Form:
    """Take some of one block's directions."""
    if isinstance(form, LowRank):
        return LowRank(form.left[index], form.right[index])
    return form[index]


def _rotate(form: Form, basis: KroneckerBlock) -> Form:
    """Give one block's form in an eigenbasis."""
    if isinstance(form, Tensor):
        return basis.to_eigenbasis(form)
    if isinstance(form, LowRank):
        return basis.to_eigenbasis(form.write())
    return basis.rotate_rows(form)


def _rotate_back(v: LowRank, basis: KroneckerBlock) -> LowRank:
    """Give directions of low rank out of an eigenbasis."""
    left = basis.left.from_basis(v.left.mT.transpose(0, 1)).transpose(0, 1).mT
    return LowRank(left, basis.right.from_basis(v.right.transpose(0, 1)).transpose(0, 1))


def _widen(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _factor(by: Scalar | Mapping[str, float], name: str, v: Tensor) -> Scalar:
    """The factor of one block, shaped to multiply its matrices (Q, G, O, I)."""
    if isinstance(by, Mapping):
        by = by[name]
    if isinstance(by, Tensor) and by.ndim:
        return by.to(v).view(-1, *[1] * (v.ndim - 1))
    return float(by)
