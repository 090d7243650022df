"""What is known about a problem's per-sample gradients, and what is done where they turn out wrong.

A layout says how the gradients of each block are captured. `examine` finds one that is right on a few examples, before
any gradient is used. From then on `compute_gradients` compares a drawn part of them with autograd while they stream. A
block whose rows differ falls back to a slower way that is exact, with a warning; what no way gets right is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wherefrom.data.batches import origin_of, take_rows
from wherefrom.data.examples import Batch
from wherefrom.errors import AttributionWarning
from wherefrom.model import contract
from wherefrom.model.capture import Capture, OutputCotangents, capture, run_observed
from wherefrom.model.check import (
    TOLERANCE,
    RowCheck,
    autograd_sums,
    cut_groups,
    outputs_with_gradients,
    relative_differences,
    row_errors,
    weighted_sums,
)
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.layers import Unfactorable
from wherefrom.persample.layout import Layout, fall_back_to_vmap, plan

if TYPE_CHECKING:
    from wherefrom.model.problem import Problem

EXAMINED = 3  # examples that a layout is tried on


@dataclass
class Verification:
    """What is known about the per-sample gradients of a problem. It changes while they stream.

    Attributes:
        row_check: which rows are compared with autograd, and the largest difference so far.
        layout: how each block is captured; None before `examine`.
        silent_blocks: blocks that had no gradient on any example so far, so that nothing is known of their rows.
        reported_blocks: those of them that a warning named.
        compared_functions: by id, the losses and measurements that were compared with those of an example alone. They
            are kept here so that no other function gets the same id.
    """

    row_check: RowCheck
    layout: Layout | None = None
    silent_blocks: set[str] = field(default_factory=set)
    reported_blocks: set[str] = field(default_factory=set)
    compared_functions: dict[int, object] = field(default_factory=dict)


# --- before any gradient is used: the layout ------------------------------------------------------------------------


def examine(problem: Problem) -> Layout:
    """Find out how each block's gradients are captured, by trying it on a few examples: once, then remembered.

    Raises:
        InputError: if the model has no per-sample gradients.
        UnsupportedError: if they differ from autograd in every way that they can be captured.
    """
    verification = problem.verification
    if verification.layout is not None:
        return verification.layout

    batch = problem.batch([i % len(problem.train) for i in range(EXAMINED)])
    with problem.observed() as model:
        # Planned in eval mode: reading a weight may run the power iteration of a spectral norm.
        layout = plan(model, problem.parameters)
        outputs = problem.outputs(model, batch).detach()
        layout = _find_broadcast_modules(problem, layout, batch, outputs)
        layout, silent_parameters = _find_right_layout(problem, layout, batch)
        _compare_losses_with_examples_alone(problem, batch, outputs)

    verification.silent_blocks = {b.name for b in layout.blocks if silent_parameters.issuperset(b.shapes)}
    if len(verification.silent_blocks) == len(layout.blocks):
        warnings.warn(
            "none of the selected parameters acts on the loss of the first training examples. Unmerge adapters "
            "that were merged into the weights.",
            AttributionWarning,
            stacklevel=3,
        )
    if layout.slow:
        names = [parameter for block in layout.slow for parameter in block.shapes]
        how = ", by a backward pass for each as vmap gives other numbers" if layout.without_vmap else ""
        warnings.warn(
            f"{len(names)} parameters are not covered by a layer entry and take the exact slow path (one gradient "
            f"per example{how}): {list_names(names)}. Leave them out with parameters=..., or register a LayerKind.",
            AttributionWarning,
            stacklevel=3,
        )
    verification.layout = layout
    return layout


def _find_broadcast_modules(problem: Problem, layout: Layout, batch: Batch, outputs: Tensor) -> Layout:
    """Find the modules whose single row serves all examples: given a row for each, the outputs do not change.

    A layer that got a single one of several examples, such as an expert, is told apart by that.

    Args:
        problem: the model, within ``problem.observed()``.
        layout: the blocks as planned.
        batch: a few examples.
        outputs: theirs, (n, ...).
    """
    while True:
        try:
            _, candidates = run_observed(problem, layout, batch)
            break
        except Unfactorable as error:
            layout = fall_back_to_vmap(layout, layout.parameters_using(error.module))

    def changes_nothing(paths: frozenset[str]) -> bool:
        try:
            with_rows_for_each, _ = run_observed(problem, replace(layout, broadcast=paths), batch)
        except (RuntimeError, LookupError, ValueError, NotImplementedError):
            return False
        if with_rows_for_each.shape != outputs.shape:
            return False
        return bool((with_rows_for_each - outputs).norm() <= 1e-5 * outputs.norm())

    # Usually all of them are right together; where they are not, each is tried beside those that were.
    if not candidates or changes_nothing(frozenset(candidates)):
        return replace(layout, broadcast=frozenset(candidates))
    broadcast = frozenset[str]()
    for path in candidates:
        if changes_nothing(broadcast | {path}):
            broadcast |= {path}
    return replace(layout, broadcast=broadcast)


def _find_right_layout(problem: Problem, layout: Layout, batch: Batch) -> tuple[Layout, frozenset[str]]:
    """Try a layout on a few examples, each of which autograd is given alone, with two cotangents at once.

    Args:
        problem: the model, within ``problem.observed()``.
        layout: the blocks as planned.
        batch: n examples.

    Returns:
        The layout, blocks that differ from autograd moved to the slow path; and those parameters whose gradients are 0
        on these examples, so that nothing is known of their rows yet.

    Raises:
        InputError: if an example's outputs depend on the others, or are random.
        UnsupportedError: if rows differ from autograd on the slow path too.
    """
    outputs = outputs_with_gradients(problem, batch).detach()
    n = len(outputs)
    cotangents = _random_cotangents(problem, outputs, batch)  # (2, n, ...)
    weights = RowCheck(0).draw_weights(n, len(cotangents))
    index = torch.arange(n, device="cpu")
    wanted = autograd_sums(problem, cut_groups(batch, outputs, cotangents, index.split(1), weights), batch)
    silent_parameters = frozenset(name for name, t in wanted.items() if not t.any())

    def find_wrong_parameters(layout: Layout) -> set[str]:
        captured = capture(problem, layout, batch, lambda *_: cotangents)
        sums = weighted_sums(captured, index, weights)
        # A layer whose weight is used without calling it has no rows, however small its gradient is here.
        missed = {name for name, t in sums.items() if not t.any() and wanted[name].any()}
        errors = relative_differences(sums, wanted)
        return missed | {name for name, error in errors.items() if not error <= TOLERANCE[problem.dtype]}

    # The blocks that layer rules cover. Those whose calls no rule describes fall back, one module at a time.
    while True:
        covered = frozenset(block.name for block in layout.blocks if layout.uses[block.name])
        try:
            wrong = find_wrong_parameters(layout.restrict_to(covered))
            break
        except Unfactorable as error:
            layout = fall_back_to_vmap(layout, layout.parameters_using(error.module))
    layout = fall_back_to_vmap(layout, wrong)

    # The others go through vmap, whose rules for some operations are wrong; then through plain backward passes.
    slow = frozenset(block.name for block in layout.slow)
    if slow and find_wrong_parameters(layout.restrict_to(slow)):
        layout = replace(layout, without_vmap=True)
        wrong = find_wrong_parameters(layout.restrict_to(slow))
        if wrong:
            raise Unfactorable(min(wrong), "differs from autograd even by a backward pass for each example")
    return layout, silent_parameters


def _random_cotangents(problem: Problem, outputs: Tensor, batch: Batch) -> Tensor:
    """Draw two random cotangents of each example's outputs, (2, n, ...); 0 where the loss has no slope.

    What a model puts out at padding may depend on the batch.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, *outputs.shape, generator=generator, dtype=torch.float64, device="cpu").to(outputs)
    matters = _loss_slope(problem, outputs, batch) != 0  # (n, ...)
    has_slope = matters.reshape(len(outputs), -1).any(1)  # an example without a slope is tried anyhow
    has_slope = has_slope.view(-1, *[1] * (outputs.ndim - 1))
    return random * (matters | ~has_slope)


def _loss_slope(problem: Problem, outputs: Tensor, batch: Batch) -> Tensor:
    """Differentiate the loss by the outputs; 0 where it has no slope, or is wrong, which is told where it is used."""
    leaf = outputs.detach().clone().requires_grad_()
    value = problem.loss(leaf, batch)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return torch.zeros_like(outputs)
    return torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)[0]


# --- while gradients stream -----------------------------------------------------------------------------------------


def compute_gradients(
    problem: Problem, batch: Batch, output_cotangents: OutputCotangents, positions: int | None = None
) -> Gradients:
    """Compute per-sample gradients, check some of them, and fall back to a slower way where they are wrong.

    Args:
        problem: the model and its task.
        batch: n examples.
        output_cotangents: makes the cotangents s (R, n, ...) of the outputs (n, ...).
        positions: the length S of the sequences, for n S rows: see `wherefrom.model.capture.capture`.

    Returns:
        Rows J_n^T s_{n,r} of n examples, or n S.

    Raises:
        InputError: if the model has no per-sample gradients.
        UnsupportedError: if they differ from autograd in every way that they can be captured.
    """
    layout = examine(problem)
    cotangents: list[Tensor] = []

    def same_cotangents(outputs: Tensor, batch: Batch) -> Tensor:
        # After a fallback the batch is captured again: what this function draws or notes must not be drawn twice.
        if not cotangents:
            cotangents.append(output_cotangents(outputs, batch))
        return cotangents[0]

    while True:
        with problem.observed():
            try:
                captured = capture(problem, layout, batch, same_cotangents, positions)
            except Unfactorable as error:
                if positions:  # one example at a time is no help to find positions
                    raise
                layout = _fall_back(problem, layout, layout.blocks_using(error.module), error)
                continue
            wrong = _find_wrong_rows(problem, layout, captured, batch)
        if not wrong:
            return captured.gradients
        worst = max(wrong, key=lambda name: wrong[name])
        error = Unfactorable(worst, f"has rows that differ from autograd by {wrong[worst]:.1e} of their size")
        blocks = frozenset(block.name for block in layout.blocks if wrong.keys() & block.shapes)
        layout = _fall_back(problem, layout, blocks, error)


def _find_wrong_rows(problem: Problem, layout: Layout, captured: Capture, batch: Batch) -> dict[str, float]:
    """Compare some of a batch's rows with autograd, if a check is due: relative errors of parameters that differ.

    Raises:
        InputError: if there is no per-sample gradient.
    """
    verification = problem.verification
    row_check = verification.row_check
    spoken, first_users = _find_first_users(verification, captured)
    uses_vmap = bool(layout.slow) and not layout.without_vmap
    groups = row_check.draw(captured, uses_vmap, first_users)
    if not groups:
        return {}

    count = sum(len(group) for group in groups)
    weights = row_check.draw_weights(count, len(captured.cotangents))
    errors = row_errors(problem, captured, batch, groups, weights)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[problem.dtype]}
    if not wrong:
        row_check.record(errors, count)
        verification.silent_blocks -= spoken
    return wrong


def _find_first_users(verification: Verification, captured: Capture) -> tuple[set[str], Tensor | None]:
    """Find the silent blocks that have a gradient in this batch, and which of its examples use one.

    Returns:
        The names of the blocks, and the examples that use one, (n,) bool; None for no such.
    """
    spoken: set[str] = set()
    users: Tensor | None = None
    for name in verification.silent_blocks:
        norms = captured.gradients.rows[name].square_norms()  # (n, R), or (n S, R)
        if not norms.any():
            continue
        spoken.add(name)
        uses_block = norms.reshape(len(captured.outputs), -1).any(1)  # (n,)
        users = uses_block if users is None else users | uses_block
    return spoken, users


def _fall_back(problem: Problem, layout: Layout, blocks: frozenset[str], error: Unfactorable) -> Layout:
    """Capture the rows of some blocks one example at a time from now on, and warn.

    Blocks keep their shape, so that what was made of earlier batches, which were right, goes together with it.

    Raises:
        UnsupportedError: if they are captured so already.
    """
    with_rule = {name for name in blocks if layout.uses[name]} - layout.one_by_one
    has_slow = any(not layout.uses[name] for name in blocks)
    if with_rule:
        layout = replace(layout, one_by_one=layout.one_by_one | with_rule)
    elif has_slow and not layout.without_vmap:
        layout = replace(layout, without_vmap=True)
    else:
        raise error
    problem.verification.layout = layout
    warnings.warn(
        f"{list_names(sorted(blocks))}: {error.why}. From here on these gradients are computed one example at a time, "
        "which is exact and slow.",
        AttributionWarning,
        stacklevel=4,
    )
    return layout


def warn_of_silent_blocks(problem: Problem) -> None:
    """Warn of parameters that had no gradient on any example so far: to be called after a pass over all of them."""
    verification = problem.verification
    new = verification.silent_blocks - verification.reported_blocks
    names = [parameter for block in problem.blocks if block.name in new for parameter in block.shapes]
    verification.reported_blocks |= verification.silent_blocks
    if names:
        warnings.warn(
            f"{len(names)} parameters had no gradient on any training example, so that they add nothing to the "
            f"scores: {list_names(names)}. Look for what cuts them off (a detached or merged part, a kernel without a "
            "backward pass), or leave them out with parameters=....",
            AttributionWarning,
            stacklevel=4,
        )


# --- losses and measurements: those of an example do not depend on its batch ----------------------------------------


def compare_largest_with_its_rows_alone(
    problem: Problem,
    function: Callable[[Tensor, Batch], Tensor],
    what: str,
    value: Tensor,
    outputs: Tensor,
    batch: Batch,
) -> None:
    """Compare the largest of a batch's losses or measurements with that of its rows alone, once for a function.

    Args:
        problem: keeps which functions were compared.
        function: of (outputs, batch).
        what: its name, "loss" or "measurement".
        value: what it gave, (n,).
        outputs: what it was given, (n, ...).
        batch: n examples.

    Raises:
        InputError: if they differ.
    """
    key = getattr(function, "__func__", function)  # a bound method is a new object each time
    compared = problem.verification.compared_functions
    if len(value) < 2 or id(key) in compared:
        return
    compared[id(key)] = key
    largest = value.abs().argmax().view(1)
    rows = take_rows(batch, largest)
    if rows is not None:
        alone = contract.call(f"task.{what}", function, outputs[largest], rows, problem.dtype)
        contract.check_alone(value[largest], alone, len(value), what)


def _compare_losses_with_examples_alone(problem: Problem, batch: Batch, outputs: Tensor) -> None:
    """Compare the losses of a few examples in a batch with those of each example collated by itself.

    Raises:
        InputError: if they differ, as by padding that the model sees.
    """
    together, origin = problem.loss(outputs, batch), origin_of(batch)
    if origin is None or not isinstance(together, Tensor) or together.shape != (len(outputs),):
        return  # what is wrong with the loss is told where it is used
    alone = []
    for number in origin.numbers:
        single = problem.train.single(number, problem.device, problem.dtype)
        own_outputs = problem.outputs(problem.model, single).detach()
        alone.append(problem.loss(own_outputs, single).detach().flatten())
    contract.check_alone(together.detach(), torch.cat(alone), len(together), "loss")


def list_names(names: list[str]) -> str:
    """List the first few names, and say how many more there are."""
    more = [f"and {len(names) - 6} more"] if len(names) > 6 else []
    return ", ".join([*names[:6], *more])
