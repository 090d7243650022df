"""Per-sample gradients of all selected parameters, kept factored, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from wherefrom.persample import rows as forms
from wherefrom.persample.blocks import Block
from wherefrom.persample.directions import Directions
from wherefrom.persample.factored import Factored, Written
from wherefrom.persample.lowrank import LowRank
from wherefrom.persample.rows import Rows


@dataclass(frozen=True, eq=False)
class Gradients:
    """Rows J_n^T s_{n,r} of n examples, R for each, over all blocks.

    Args:
        blocks: the layout.
        rows: block name to factored rows.
        weights: (n, R) float64, the weight of each row in a curvature; 1 for plain gradients.
    """

    blocks: tuple[Block, ...]
    rows: Mapping[str, Rows]
    weights: Tensor

    def __getitem__(self, index: slice | Tensor) -> Gradients:
        """Take the gradients of some examples."""
        return Gradients(self.blocks, {name: rows[index] for name, rows in self.rows.items()}, self.weights[index])

    def __len__(self) -> int:
        """Count the examples, n."""
        return len(self.weights)

    def pick(self, index: Tensor, r: Tensor) -> Gradients:
        """Take chosen rows (index, r) as examples of one row each."""
        rows = {name: some.pick(index, r) for name, some in self.rows.items()}
        return Gradients(self.blocks, rows, self.weights[index, r].unsqueeze(1))

    def map(self, f: Callable[[str, Rows], Rows]) -> Gradients:
        """Replace each block's rows by a function of the block's name and of them."""
        return Gradients(self.blocks, {name: f(name, rows) for name, rows in self.rows.items()}, self.weights)

    def compact(self) -> Gradients:
        """Return the same rows, each block in the form that takes less memory."""
        return self.map(lambda _, rows: rows.compact())

    def numbers(self) -> int:
        """Count the numbers that are stored."""
        return sum(rows.numbers() for rows in self.rows.values())

    # as directions ----------------------------------------------------------------------------------------------------

    def to_directions(self) -> Directions:
        """Take the gradients of n examples, one row each, for n directions; nothing is written out."""
        if self.weights.shape[1] != 1:
            raise ValueError(f"Directions are one row for each example, got {self.weights.shape[1]}. Call dense().")
        return Directions(self.blocks, dict(self.rows))

    def dense(self) -> Directions:
        """Write every row out, example by example: n R directions."""
        written = {b.name: self.rows[b.name].written().rows.reshape(-1, *b.sides) for b in self.blocks}
        return Directions(self.blocks, written)

    def mean(self) -> Gradients:
        """Take the mean of n examples' rows, R = 1, as one example."""
        total = self.combine(self.weights.new_full((1, len(self), 1), 1 / len(self))).tensors()
        rows = {b.name: Written(total[b.name].reshape(1, 1, -1), b.sides) for b in self.blocks}
        return Gradients(self.blocks, rows, self.weights[:1])

    # contractions -----------------------------------------------------------------------------------------------------

    def dot(self, v: Directions) -> Tensor:
        """Take the inner products of Q directions with every row: (Q, n, R).

        Blocks that the directions give in an eigenbasis have their rows rotated into it.
        """
        first, *others = self._products(v).values()
        for part in others:
            first = first.add_(part)
        return first if v.mix is None else _mix(v.mix, first)

    def dot_by_block(self, v: Directions) -> dict[str, Tensor]:
        """Take the same inner products block by block: block name to (Q, n, R). They sum to `dot`."""
        products = self._products(v)
        return products if v.mix is None else {name: _mix(v.mix, part) for name, part in products.items()}

    def _products(self, v: Directions) -> dict[str, Tensor]:
        """Take the products with the directions as they are held, before any are mixed: (Q or p, n, R)."""
        products: dict[str, Tensor] = {}
        for block in self.blocks:
            rows = self.rows[block.name]
            if block.name in v.bases:
                rows = v.bases[block.name].rotate_rows(rows)
            products[block.name] = _dot(v.forms[block.name], rows)
        return products

    def combine(self, w: Tensor) -> Directions:
        """Sum rows with weights w (Q, n, R): Q directions."""
        return Directions(self.blocks, {b.name: self.rows[b.name].combine(w) for b in self.blocks})

    def product(self, v: Directions, n: int) -> Directions:
        """Return these rows' part in the product with a curvature of n examples: sum_{n,r} (w / n) (b . v) b."""
        count = len(v)
        # Two contractions follow: rows that are cheaper to contract when written out are written out once.
        rows = self.map(lambda _, r: r.ready(count) if isinstance(r, Factored) else r)
        along = rows.dot(v)
        return rows.combine(along.mul_((self.weights / n).to(along)))

    def square_norms(self, by: Mapping[str, float] | None = None) -> Tensor:
        """Return the squared norms of the rows, (n, R); ``by`` scales each block."""
        first, *others = (r.square_norms() * (by[name] if by else 1.0) for name, r in self.rows.items())
        for part in others:
            first = first.add_(part)
        return first

    def gram(self, other: Gradients, by: Mapping[str, float] | None = None) -> Tensor:
        """Return the inner products of all rows with all rows of another (n, R, n', R'); ``by`` scales each block."""
        total = None
        for name, rows in self.rows.items():
            part = rows.gram(other.rows[name])
            part = part.mul_(by[name]) if by else part
            total = part if total is None else total.add_(part)
        if total is None:
            raise KeyError("no block")
        return total


def concatenate(batches: Sequence[Gradients]) -> Gradients:
    """Put the gradients of several batches one after another."""
    first = batches[0]
    if len(batches) == 1:
        return first
    rows = {name: forms.concatenate([b.rows[name] for b in batches]) for name in first.rows}
    return Gradients(first.blocks, rows, forms.join([b.weights for b in batches], 0))


def _dot(form: Tensor | LowRank | Rows, rows: Rows) -> Tensor:
    """Take the inner products of one block's directions, in whichever form, with rows: (Q, n, R)."""
    if isinstance(form, Tensor):
        return rows.dot(form)
    if isinstance(form, LowRank):
        return form.dot(rows)
    # Directions that are per-sample gradients themselves: neither side is written out.
    return rows.gram(form)[..., 0].permute(2, 0, 1)


def _mix(mix: Tensor, product: Tensor) -> Tensor:
    """Combine the products of p directions, (p, n, R), into those of Q: (Q, n, R)."""
    return (mix.to(product) @ product.flatten(1)).view(len(mix), *product.shape[1:])
