"""The certificate of rows: they are compared with autograd, before any is used and while they stream.

For examples n of a batch, cotangents s_{n,r} of their outputs and random weights e_{n,r},

    sum_{n,r} e_{n,r} J_n^T s_{n,r}

is found twice: from the rows as they are used, and by one backward pass of plain autograd through those examples alone.
The two agree only if every row is right and belongs to its example. Their relative difference is the row error. The
outputs are compared too: those of an example alone are those in its batch, or it has no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from wherefrom.data.examples import Batch, batch_length, take
from wherefrom.errors import InputError
from wherefrom.model.capture import InjectCotangent, Traced, fit_to
from wherefrom.persample.layers import Unfactorable
from wherefrom.persample.layout import Layout, demoted

Outputs = Callable[[Batch], Tensor]  # (n, ...) of a batch
Parameters = Mapping[str, nn.Parameter]

# Rounding stays well below, a wrong row is far above. Models of transformers compute norms and rotations in float32
# in float64 too: their backward passes round each cotangent by itself, so sums of several agree to 1e-7 only.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
FLOOR = 1e-2  # a parameter's gradient is measured against at least this share of all parameters'
SHAPES = 4  # new shapes that are always checked; of further ones as many as the budget allows
BUDGET = 0.04  # of a pass, for the checks of new shapes
SHARE = 1 / 48  # of the batches whose shapes were checked before
FREE = 2**20  # parameters times examples up to which a check costs nothing to speak of
ALONE = 16  # so many examples of a small model are given to it by themselves, others in groups


@dataclass
class RowCheck:
    """Which examples' rows are compared with autograd, and the largest difference so far.

    The first batch of every shape that the layers see is checked, a drawn share of the others, and every batch in which
    a layer does not see the examples on an axis of their own. A check takes a small part of the batch, so that all of
    them together cost less than a twentieth of a pass. The whole batch is checked where the model is small, and where
    rows come from vmap in a shape that is new: a batching rule may be wrong where two sizes happen to agree.

    Args:
        size: the number D of parameters.

    Attributes:
        error: the largest relative difference of a parameter's sum of rows from autograd's, 0 before the first check.
        checked: how many examples were compared.
    """

    size: int
    error: float = 0.0
    checked: int = 0
    _seen: set[tuple[object, ...]] = field(default_factory=set)
    _rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def draw(self, traced: Traced, vmapped: bool = False, interesting: Tensor | None = None) -> list[Tensor]:
        """Choose the examples of a batch whose rows are checked now, in groups that the model is given by themselves.

        Args:
            traced: the batch's rows.
            vmapped: whether some of them come from vmap.
            interesting: (n,) bool, examples that use a block which no example before used: a check is due.

        Returns:
            Places in the batch, (m,) for each group; no group for no check. No group is the whole batch, so that what
            depends on the rest of it shows.
        """
        n = len(traced.outputs)
        new = traced.signature not in self._seen
        self._seen.add(traced.signature)
        chance = float(torch.rand((), generator=self._rng, dtype=torch.float32, device="cpu"))
        whole = self._is_free(n) or (vmapped and new)
        if whole:
            count = n
        elif interesting is not None or traced.merged:
            count = max(2, n // 16)
        elif new and (len(self._seen) <= SHAPES or chance < BUDGET * min(n, 32)):
            count = max(1, n // 32)
        elif not new and chance < SHARE:
            count = max(1, n // 64)
        else:
            return []
        # Without a cotangent every row of an example is 0, and comparing it would say nothing.
        active = traced.cotangents.reshape(len(traced.cotangents), n, -1).any(2).any(0).cpu()
        if interesting is not None and not whole:
            active = active & interesting.cpu()
        candidates = active.nonzero()[:, 0]
        drawn = candidates[torch.randperm(len(candidates), generator=self._rng, device="cpu")[:count]]
        groups = (drawn,)
        # A group may share what its outputs depend on; an example alone cannot.
        if self._is_free(n) and self.checked + len(drawn) <= ALONE:
            groups = drawn.split(1)
        elif len(drawn) == n:
            groups = drawn.tensor_split(2)
        return [group for group in groups if len(group)]

    def draw_some(self, n: int) -> Tensor:
        """Choose places of a batch of n for another comparison: all where the model is small, else one, (m,)."""
        order = torch.randperm(n, generator=self._rng, device="cpu")
        return order if self._is_free(n) else order[:1]

    def _is_free(self, n: int) -> bool:
        """Whether checking n more examples costs nothing to speak of."""
        return self.size * (self.checked + n) < FREE

    def weights(self, m: int, R: int) -> Tensor:
        """Draw random signs of different sizes, (m, R): rows that are exchanged must show too."""
        signs = torch.randint(0, 2, (m, R), generator=self._rng, device="cpu") * 2 - 1
        return signs * (0.5 + torch.rand(m, R, generator=self._rng, dtype=torch.float32, device="cpu"))

    def note(self, errors: Mapping[str, float], m: int) -> None:
        """Keep the largest of the errors of m examples."""
        self.error = max(self.error, *errors.values())
        self.checked += m


def row_errors(
    traced: Traced,
    batch: Batch,
    groups: Sequence[Tensor],
    weights: Tensor,
    outputs: Outputs,
    parameters: Parameters,
) -> dict[str, float]:
    """Compare the rows of some examples of a batch with autograd.

    Args:
        traced: the rows of the batch's n examples.
        batch: the batch.
        groups: places of m of its examples, which the model is given a group at a time.
        weights: of their rows, (m, R).
        outputs: of the model on a batch, the parameters requiring gradients.
        parameters: the attributed ones, by name.

    Returns:
        The relative difference of each parameter's weighted sum.

    Raises:
        InputError: if the examples' outputs depend on the rest of the batch, or are random.
    """
    pieces = []
    for group, own in zip(groups, weights.split([len(group) for group in groups]), strict=True):
        place = group.to(traced.outputs.device)
        pieces.append((take(batch, group), traced.outputs[place], traced.cotangents[:, place], own))
    sums = _autograd_sums(pieces, outputs, parameters, batch)
    return differences(_weighted_sums(traced, torch.cat(list(groups)).cpu(), weights), sums)


def examine(
    layout: Layout,
    batch: Batch,
    outputs: Outputs,
    loss: Callable[[Tensor, Batch], Tensor],
    parameters: Parameters,
    trace_rows: Callable[[Layout, Tensor], Traced],
    dtype: torch.dtype,
) -> tuple[Layout, frozenset[str]]:
    """Try a layout on a few examples, each of which autograd is given alone, with two cotangents at once.

    Args:
        layout: the blocks as planned.
        batch: a few examples.
        outputs: of the model on a batch, the parameters requiring gradients.
        loss: of outputs; what is wrong with it is told when it is used in earnest.
        parameters: the attributed ones, by name.
        trace_rows: the rows of a layout for given cotangents.
        dtype: of the model.

    Returns:
        The layout, blocks that differ from autograd moved to the slow path; and those parameters whose gradients are 0
        on these examples, so that nothing is known of their rows yet.

    Raises:
        InputError: if an example's outputs depend on the others, or are random.
        UnsupportedError: if rows differ from autograd on the slow path too.
    """
    n = batch_length(batch)
    together = outputs(batch).detach()
    cotangents = _random_cotangents(together, loss, batch)
    weights = RowCheck(0).weights(n, len(cotangents))
    each = torch.arange(n, device="cpu").split(1)
    singles = [(take(batch, i), together[i], cotangents[:, i], weights[i]) for i in each]
    sums = _autograd_sums(singles, outputs, parameters, batch)
    unseen = frozenset(name for name, t in sums.items() if not t.any())

    def wrong(layout: Layout) -> set[str]:
        """Find the parameters of a layout whose rows differ from autograd."""
        found = _weighted_sums(trace_rows(layout, cotangents), torch.arange(n, device="cpu"), weights)
        # A layer whose weight is used without calling it has no rows, however small its gradient is here.
        missed = {name for name, t in found.items() if not t.any() and sums[name].any()}
        return missed | {name for name, error in differences(found, sums).items() if not error <= TOLERANCE[dtype]}

    while True:
        fast = layout.only(frozenset(b.name for b in layout.blocks if layout.uses[b.name]))
        try:
            differing = wrong(fast)
            break
        except Unfactorable as error:
            layout = _demote_users(layout, error.module)
    layout = demoted(layout, differing)
    slow = frozenset(b.name for b in layout.slow)
    if slow and wrong(layout.only(slow)):
        layout = replace(layout, looped=True)
        if differing := wrong(layout.only(slow)):
            raise Unfactorable(min(differing), "differs from autograd even by a backward pass for each example")
    return layout, unseen


def find_shared(watch: Callable[[Layout], tuple[Tensor, list[str]]], layout: Layout, plain: Tensor) -> Layout:
    """Find the modules whose single row serves all examples: given a row for each, the outputs do not change.

    A layer that got a single one of several examples, such as an expert, is told apart by that.

    Args:
        watch: the outputs on a few examples while a layout is observed, and the modules called with a single row.
        layout: the blocks.
        plain: the outputs (n, ...).
    """
    while True:
        try:
            candidates = watch(layout)[1]
            break
        except Unfactorable as error:
            layout = _demote_users(layout, error.module)

    def works(paths: frozenset[str]) -> bool:
        try:
            found = watch(replace(layout, shared=paths))[0]
        except (RuntimeError, LookupError, ValueError, NotImplementedError):
            return False
        return found.shape == plain.shape and bool((found - plain).norm() <= 1e-5 * plain.norm())

    shared = frozenset(candidates)
    if shared and not works(shared):
        shared = frozenset[str]()
        for path in candidates:
            if works(shared | {path}):
                shared |= {path}
    return replace(layout, shared=shared)


def _demote_users(layout: Layout, module: str) -> Layout:
    """Move the blocks that use a module to the slow path."""
    using = layout.using(module)
    return demoted(layout, {p for b in layout.blocks if b.name in using for p in b.shapes})


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative differences of sums of rows, by parameter; inf where something is not finite."""
    sizes = {name: float(t.norm()) for name, t in wanted.items()}
    whole = sum(size**2 for size in sizes.values()) ** 0.5
    errors = {}
    for name, t in found.items():
        difference = float((t - wanted[name]).norm())
        error = difference / max(sizes[name] + FLOOR * whole, 1e-300)
        errors[name] = error if error == error else float("inf")
    return errors


def _weighted_sums(traced: Traced, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Weighted sums of the rows of some examples, by parameter; where positions have rows of their own, of them all."""
    positions = len(traced.gradients) // len(traced.outputs)
    places = (index.unsqueeze(1) * positions + torch.arange(positions, device="cpu")).flatten()
    rows = traced.gradients[places.to(traced.outputs.device)]
    each = weights.repeat_interleave(positions, 0).to(traced.outputs)  # (m S, R)
    return {name: t[0] for name, t in rows.combine(each.unsqueeze(0)).to_parameters().items()}


Piece = tuple[Batch, Tensor, Tensor, Tensor]  # m examples, their outputs in the whole batch, cotangents, weights (m, R)


def _autograd_sums(
    pieces: Iterable[Piece], outputs: Outputs, parameters: Parameters, whole: Batch
) -> dict[str, Tensor]:
    """Weighted sums of gradients by plain autograd, a backward pass for each piece of the batch."""
    sums: dict[str, Tensor] = {}
    for few, together, cotangents, weights in pieces:
        alone = _run_alone(few, outputs)
        own = fit_to(cotangents, alone)  # (R, m, ...)
        _compare_outputs(alone.detach(), together, own, outputs, whole)
        if not alone.requires_grad:
            continue
        signed = weights.T.to(own).reshape(*own.shape[:2], *[1] * (own.ndim - 2)) * own
        pulled = InjectCotangent.apply(alone, signed.sum(0))
        try:
            grads = torch.autograd.grad(pulled, list(parameters.values()), allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            raise InputError(
                f"The model's backward pass must work with torch.autograd.grad, but it failed: {error} "
                "Compute outputs out of place, and checkpoint with use_reentrant=False."
            ) from error
        for name, grad in zip(parameters, grads, strict=True):
            sums[name] = sums[name] + grad if name in sums else grad
    return sums or {name: torch.zeros_like(p) for name, p in parameters.items()}


def _run_alone(few: Batch, outputs: Outputs) -> Tensor:
    """The outputs of some examples of a batch that the model takes as a whole.

    Raises:
        InputError: if it does not take them by themselves.
    """
    try:
        return outputs(few)
    except InputError as error:
        raise InputError(
            "An example's output must not depend on the other examples of its batch, but the model takes the batch and "
            f"not some of it by themselves: {error} Batch norm without running statistics is a usual reason."
        ) from error


def _compare_outputs(alone: Tensor, together: Tensor, cotangents: Tensor, outputs: Outputs, whole: Batch) -> None:
    """Refuse a model whose outputs for an example change with the rest of its batch, where they matter to the rows.

    What it puts out elsewhere, such as at padding, may depend on the batch.

    Raises:
        InputError: telling a random forward pass from one that looks at the batch.
    """
    together = together[(slice(None), *map(slice, alone.shape[1:]))]
    matters = (cotangents != 0).any(0)
    size = together[matters].norm()
    difference = (alone - together)[matters].norm()
    tolerance = TOLERANCE[alone.dtype] if alone.dtype in TOLERANCE else TOLERANCE[torch.float32]
    if difference <= tolerance * size:
        return
    first, second = (outputs(whole).detach() for _ in range(2))
    if (first - second).norm() > tolerance * first.norm():
        raise InputError(
            "The model's forward pass must give the same outputs each time, but two passes over the same examples "
            f"differ by {float((first - second).norm() / first.norm()):.1e} of their size. Switch off what is random "
            "in eval mode: F.dropout without training=self.training, sampling, noise."
        )
    raise InputError(
        "An example's output must not depend on the other examples of its batch, but alone or in a smaller batch it "
        f"differs by {float(difference / size):.1e} of its size: there is no per-example gradient then. Look for batch "
        "norm without running statistics, centring or control flow over the batch, a sort, or padding that the model "
        "does not mask."
    )


def _random_cotangents(outputs: Tensor, loss: Callable[[Tensor, Batch], Tensor], batch: Batch) -> Tensor:
    """Two random cotangents of each example's outputs, (2, n, ...); 0 where the loss has no slope.

    What a model puts out at padding may depend on the batch.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, *outputs.shape, generator=generator, dtype=torch.float64, device="cpu").to(outputs)
    matters = _slope(loss, outputs, batch) != 0
    some = matters.reshape(len(outputs), -1).any(1)  # an example without a slope is tried anyhow
    some = some.view(-1, *[1] * (outputs.ndim - 1))
    return random * (matters | ~some)


def _slope(loss: Callable[[Tensor, Batch], Tensor], outputs: Tensor, batch: Batch) -> Tensor:
    """The slope of the loss in the outputs; 0 where it has none."""
    h = outputs.detach().clone().requires_grad_()
    value = loss(h, batch)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return torch.zeros_like(outputs)
    return torch.autograd.grad(value.sum(), h, allow_unused=True, materialize_grads=True)[0]
