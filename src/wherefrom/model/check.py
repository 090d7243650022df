"""The certificate of rows: they are compared with autograd, before any is used and while they stream.

For examples n of a batch, cotangents s_{n,r} of their outputs and random weights e_{n,r},

    sum_{n,r} e_{n,r} J_n^T s_{n,r}

is found twice: from the rows as they are used, and by one backward pass of plain autograd through those examples alone.
The two agree only if every row is right and belongs to its example. Their relative difference is the row error. The
outputs are compared too: those of an example alone are those in its batch, or it has no gradient of its own.

What happens where they differ is decided in `wherefrom.model.verification`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wherefrom.data.examples import Batch, take
from wherefrom.errors import InputError
from wherefrom.model.capture import Capture, InjectCotangent, crop_to_outputs

if TYPE_CHECKING:
    from wherefrom.model.problem import Problem

# Rounding stays well below, a wrong row is far above. Models of transformers compute norms and rotations in float32
# in float64 too: their backward passes round each cotangent by itself, so sums of several agree to 1e-7 only.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
FLOOR = 1e-2  # a parameter's gradient is measured against at least this share of all parameters'
SHAPES = 4  # new shapes that are always checked; of further ones as many as the budget allows
BUDGET = 0.04  # of a pass, for the checks of new shapes
SHARE = 1 / 48  # of the batches whose shapes were checked before
FREE = 2**20  # parameters times examples up to which a check costs nothing to speak of
ALONE = 16  # so many examples of a small model are given to it by themselves, others in groups


# --- which rows are compared ----------------------------------------------------------------------------------------


@dataclass
class RowCheck:
    """Draws the examples whose rows are compared with autograd, and keeps the largest difference so far.

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

    def draw(self, captured: Capture, uses_vmap: bool = False, first_users: Tensor | None = None) -> list[Tensor]:
        """Draw the examples of a batch whose rows are checked now, in groups that the model is given by themselves.

        Args:
            captured: the batch's rows.
            uses_vmap: whether some of them come from vmap.
            first_users: (n,) bool, examples that use a block which no example before used: a check is due.

        Returns:
            Places in the batch, (m,) for each group; no group for no check. No group is the whole batch, so that what
            depends on the rest of it shows.
        """
        n = len(captured.outputs)
        is_new = captured.signature not in self._seen
        self._seen.add(captured.signature)
        # Drawn for every batch, needed or not, so that the draws after it are the same whatever this batch is.
        chance = float(torch.rand((), generator=self._rng, dtype=torch.float32, device="cpu"))

        whole_batch = self._is_free(n) or (uses_vmap and is_new)
        if whole_batch:
            count = n
        elif first_users is not None or captured.has_guessed_owners:
            count = max(2, n // 16)
        elif is_new and (len(self._seen) <= SHAPES or chance < BUDGET * min(n, 32)):
            count = max(1, n // 32)
        elif not is_new and chance < SHARE:
            count = max(1, n // 64)
        else:
            return []

        # Without a cotangent every row of an example is 0, and comparing it would say nothing.
        candidates = captured.cotangents.reshape(len(captured.cotangents), n, -1).any(2).any(0).cpu()  # (n,) bool
        if first_users is not None and not whole_batch:
            candidates = candidates & first_users.cpu()
        index = candidates.nonzero()[:, 0]
        drawn = index[torch.randperm(len(index), generator=self._rng, device="cpu")[:count]]

        groups = (drawn,)
        if self._is_free(n) and self.checked + len(drawn) <= ALONE:
            # The examples of a group may share what their outputs depend on; an example alone cannot.
            groups = drawn.split(1)
        elif len(drawn) == n:
            groups = drawn.tensor_split(2)
        return [group for group in groups if len(group)]

    def draw_some(self, n: int) -> Tensor:
        """Draw places of a batch of n for another comparison: all where the model is small, else one, (m,)."""
        order = torch.randperm(n, generator=self._rng, device="cpu")
        return order if self._is_free(n) else order[:1]

    def draw_weights(self, m: int, R: int) -> Tensor:
        """Draw random signs of different sizes, (m, R): rows that are exchanged must show too."""
        signs = torch.randint(0, 2, (m, R), generator=self._rng, device="cpu") * 2 - 1
        return signs * (0.5 + torch.rand(m, R, generator=self._rng, dtype=torch.float32, device="cpu"))

    def record(self, errors: Mapping[str, float], m: int) -> None:
        """Keep the largest of the errors of m examples."""
        self.error = max(self.error, *errors.values())
        self.checked += m

    def _is_free(self, n: int) -> bool:
        """Whether checking n more examples costs nothing to speak of."""
        return self.size * (self.checked + n) < FREE


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some examples of a batch, with what they were in the whole of it.

    Args:
        batch: the m examples by themselves.
        outputs: theirs in the whole batch, (m, ...).
        cotangents: at these outputs, (R, m, ...).
        weights: of their rows in the sum, (m, R).
    """

    batch: Batch
    outputs: Tensor
    cotangents: Tensor
    weights: Tensor


def cut_groups(
    batch: Batch, outputs: Tensor, cotangents: Tensor, groups: Sequence[Tensor], weights: Tensor
) -> list[Group]:
    """Cut groups of examples out of a batch.

    Args:
        batch: n examples.
        outputs: of the model, (n, ...).
        cotangents: at the outputs, (R, n, ...).
        groups: places of m of the examples, those of each group.
        weights: of their rows, (m, R), in the order of the groups.
    """
    cut = []
    for group, own_weights in zip(groups, weights.split([len(group) for group in groups]), strict=True):
        index = group.to(outputs.device)
        cut.append(Group(take(batch, group), outputs[index], cotangents[:, index], own_weights))
    return cut


def row_errors(
    problem: Problem, captured: Capture, batch: Batch, groups: Sequence[Tensor], weights: Tensor
) -> dict[str, float]:
    """Compare the rows of some examples of a batch with autograd.

    Args:
        problem: the model, within ``problem.observed()``.
        captured: the rows of the batch's n examples.
        batch: the batch.
        groups: places of m of its examples, which the model is given a group at a time.
        weights: of their rows, (m, R).

    Returns:
        The relative difference of each parameter's weighted sum.

    Raises:
        InputError: if the examples' outputs depend on the rest of the batch, or are random.
    """
    by_themselves = cut_groups(batch, captured.outputs, captured.cotangents, groups, weights)
    wanted = autograd_sums(problem, by_themselves, batch)
    return relative_differences(weighted_sums(captured, torch.cat(list(groups)).cpu(), weights), wanted)


def relative_differences(sums: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative differences of sums of rows from what is wanted, by parameter; inf where something is not finite."""
    sizes = {name: float(t.norm()) for name, t in wanted.items()}
    size_of_all = sum(size**2 for size in sizes.values()) ** 0.5
    errors = {}
    for name, t in sums.items():
        difference = float((t - wanted[name]).norm())
        # A gradient that is almost 0 beside the others is rounding, however large its relative difference.
        size = sizes[name] + FLOOR * size_of_all
        error = difference / max(size, 1e-300)
        is_nan = error != error
        errors[name] = float("inf") if is_nan else error
    return errors


def weighted_sums(captured: Capture, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Sum the rows of some examples with weights, by parameter.

    Args:
        captured: rows of n examples, or of n S where positions have rows of their own, which are then summed over.
        index: places of m examples, (m,) on the CPU.
        weights: of their rows, (m, R).

    Returns:
        A tensor of each parameter's shape.
    """
    positions = len(captured.gradients) // len(captured.outputs)  # S, or 1
    index = (index.unsqueeze(1) * positions + torch.arange(positions, device="cpu")).flatten()  # (m S,)
    rows = captured.gradients[index.to(captured.outputs.device)]
    row_weights = weights.repeat_interleave(positions, 0).to(captured.outputs)  # (m S, R)
    return {name: t[0] for name, t in rows.combine(row_weights.unsqueeze(0)).to_parameters().items()}


def autograd_sums(problem: Problem, groups: Iterable[Group], whole: Batch) -> dict[str, Tensor]:
    """Sum the same gradients by plain autograd, by a forward and a backward pass for each group.

    Args:
        problem: the model, within ``problem.observed()``; its parameters require gradients afterwards.
        groups: examples of a batch.
        whole: the batch.

    Raises:
        InputError: if the examples' outputs depend on the rest of the batch, or are random; if the model's backward
            pass fails.
    """
    sums: dict[str, Tensor] = {}
    for group in groups:
        outputs = _run_group(problem, group.batch)  # (m, ...)
        cotangents = crop_to_outputs(group.cotangents, outputs)  # (R, m, ...)
        _compare_outputs(problem, group, outputs.detach(), cotangents, whole)
        if not outputs.requires_grad:
            continue
        # All rows of the group in one backward pass: their weighted sum is J^T of the weighted sum of cotangents.
        weights = group.weights.T.to(cotangents)  # (R, m)
        weights = weights.reshape(*weights.shape, *[1] * (cotangents.ndim - 2))
        scalar = InjectCotangent.apply(outputs, (weights * cotangents).sum(0))
        grads = _differentiate(problem, scalar)
        for name, grad in zip(problem.parameters, grads, strict=True):
            sums[name] = sums[name] + grad if name in sums else grad
    return sums or {name: torch.zeros_like(p) for name, p in problem.parameters.items()}


def outputs_with_gradients(problem: Problem, batch: Batch) -> Tensor:
    """Compute the outputs (n, ...), differentiable in the attributed parameters."""
    for p in problem.parameters.values():
        p.requires_grad_()
    return problem.outputs(problem.model, batch)


def _differentiate(problem: Problem, scalar: Tensor) -> tuple[Tensor, ...]:
    """Differentiate by the attributed parameters; 0 for those without influence.

    Raises:
        InputError: if the model's backward pass fails.
    """
    parameters = list(problem.parameters.values())
    try:
        return torch.autograd.grad(scalar, parameters, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        raise InputError(
            f"The model's backward pass must work with torch.autograd.grad, but it failed: {error} "
            "Compute outputs out of place, and checkpoint with use_reentrant=False."
        ) from error


def _run_group(problem: Problem, batch: Batch) -> Tensor:
    """Run some examples of a batch that the model takes as a whole.

    Raises:
        InputError: if it does not take them by themselves.
    """
    try:
        return outputs_with_gradients(problem, batch)
    except InputError as error:
        raise InputError(
            "An example's output must not depend on the other examples of its batch, but the model takes the batch and "
            f"not some of it by themselves: {error} Batch norm without running statistics is a usual reason."
        ) from error


def _compare_outputs(problem: Problem, group: Group, alone: Tensor, cotangents: Tensor, whole: Batch) -> None:
    """Refuse a model whose outputs for an example change with the rest of its batch, where they matter to the rows.

    What it puts out elsewhere, such as at padding, may depend on the batch.

    Args:
        problem: the model.
        group: the examples, with their outputs in the whole batch.
        alone: their outputs by themselves, (m, ...), perhaps shorter.
        cotangents: at these outputs, (R, m, ...).
        whole: the whole batch.

    Raises:
        InputError: telling a random forward pass from one that looks at the batch.
    """
    together = group.outputs[(slice(None), *map(slice, alone.shape[1:]))]
    matters = (cotangents != 0).any(0)  # (m, ...)
    size = together[matters].norm()
    difference = (alone - together)[matters].norm()
    tolerance = TOLERANCE.get(alone.dtype, TOLERANCE[torch.float32])
    if difference <= tolerance * size:
        return

    # Twice the same batch: outputs that differ now are random, and no matter of the rest of the batch.
    first, second = (outputs_with_gradients(problem, whole).detach() for _ in range(2))
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
