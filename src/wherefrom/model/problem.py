"""Problem: a trained model, its task and its training data, and the way to the gradients of the chosen parameters.

The problem is a record that never changes. What runs the model is written elsewhere: `wherefrom.model.capture` turns
one pass over a batch into per-sample gradients, `wherefrom.model.check` compares some of them with autograd, and
`wherefrom.model.verification` decides what happens if they differ, and remembers it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from wherefrom.data.examples import Batch, Examples, batch_length, take
from wherefrom.errors import AttributionWarning, InputError
from wherefrom.model import contract, verification
from wherefrom.model.capture import OutputCotangents
from wherefrom.model.check import FLOOR, TOLERANCE, RowCheck
from wherefrom.model.observe import (
    Select,
    copy_model,
    fingerprint,
    in_training_with,
    observe_model,
    parameter_filter,
    plain_names,
    prepare_model,
    trainable,
)
from wherefrom.model.task import Task, as_task
from wherefrom.model.verification import Verification, list_names
from wherefrom.persample.blocks import Block
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.layout import Layout
from wherefrom.persample.vectors import Vectors
from wherefrom.progress import track
from wherefrom.store import COMPUTED
from wherefrom.surroundings import jvp, math_attention, substituted, undisturbed


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Problem:
    """What is attributed: a trained model, its task, its training examples and the parameters that count.

    Args:
        model: the trained model. Parameters and inputs on one device; float32 or float64 (half precision is converted
            to float32, which is exact). Evaluated in eval mode.
        task: a `Task`, or an object with its methods.
        train: see `wherefrom.data.examples.Examples`.
        parameters: which trainable parameters to attribute: None for all, a regular expression (searched in the name),
            several of them, or a predicate on the name.
        batch_size: examples per pass of the model.
        memory: bytes that cached factors and intermediate results may take; decides what is cached and how many
            right-hand sides go together, never the result.
        progress: show progress bars; None shows them on a terminal.

    Attributes:
        parameters: the attributed parameters by name, in the model's order.
        trainable: number of trainable parameters of the model, attributed or not.
        verification: what is known about the per-sample gradients so far. It is the one part that changes.

    Raises:
        InputError: an untrainable, non-finite, half-converted or scattered model; a selection that matches nothing.
    """

    model: nn.Module
    task: Task
    train: Examples
    parameters: Mapping[str, nn.Parameter]
    trainable: int
    memory: float
    progress: bool | None
    device: torch.device
    dtype: torch.dtype
    verification: Verification

    def __init__(
        self,
        model: nn.Module,
        task: Task | object,
        train: Any,
        parameters: Select = None,
        batch_size: int | None = None,
        memory: float = 2**31,
        progress: bool | None = None,
    ):
        task = as_task(task)
        model = prepare_model(model)
        train = train if isinstance(train, Examples) else Examples(train, "train", batch_size)

        trained = trainable(model)
        is_chosen = parameter_filter(parameters)
        chosen = {name: p for name, p in trained.items() if is_chosen(name)}
        if not chosen:
            raise InputError(
                f"parameters={parameters!r} selects none of the {len(trained)} trainable parameters "
                f"({', '.join(list(trained)[:5])}, ...). Check the pattern, and that requires_grad is True."
            )
        if in_training_with(model, "Dropout"):
            warnings.warn(
                "the model is in training mode with dropout: it is evaluated in eval mode.",
                AttributionWarning,
                stacklevel=2,
            )

        first = next(iter(chosen.values()))
        # The fields of a frozen dataclass can be set only this way.
        vars(self).update(
            model=model,
            task=task,
            train=train,
            parameters=chosen,
            trainable=_count(trained),
            memory=memory,
            progress=progress,
            device=first.device,
            dtype=first.dtype,
            verification=Verification(RowCheck(_count(chosen))),
        )

    # --- other weights ------------------------------------------------------------------------------------------------

    def at(self, state: Mapping[str, Tensor]) -> Problem:
        """Build the same problem with a copy of the model at other weights, such as a checkpoint's.

        Args:
            state: a ``state_dict`` of the model, of any float dtype.

        Raises:
            InputError: if it does not fit the model.
        """
        model = copy_model(self.model)
        try:
            model.load_state_dict(plain_names(state))
        except (RuntimeError, KeyError) as error:
            raise InputError(f"The weights must be a state_dict of the model, got: {error}") from error
        return self.with_model(model, set(self.parameters).__contains__)

    def with_model(self, model: nn.Module, parameters: Select = None) -> Problem:
        """Build the same problem for another model; the row errors of both are counted together.

        Args:
            model: a model for the same task and the same data.
            parameters: which of its trainable parameters to attribute, as for `Problem`.
        """
        other = Problem(model, self.task, self.train, parameters, None, self.memory, self.progress)
        # The gradients of both go into the same scores, so one row error speaks for them.
        other.verification.row_check = self.verification.row_check
        return other

    def with_train(self, train: Examples) -> Problem:
        """Build the same problem with other training examples; what is known about its gradients is shared."""
        other = copy.copy(self)
        vars(other).update(train=train)
        return other

    # --- what it says about itself ------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Parameter name to shape, in the model's order."""
        return {name: p.shape for name, p in self.parameters.items()}

    @property
    def layout(self) -> Layout:
        """How each block's gradients are captured; `examine` finds it out."""
        return self.examine()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the layout."""
        return self.examine().blocks

    @property
    def row_error(self) -> float | None:
        """The largest relative difference from autograd of the rows that were checked, here and `at` other weights."""
        row_check = self.verification.row_check
        return row_check.error if row_check.checked else None

    def coverage(self) -> str:
        """Say in one sentence which share of the trainable parameters is attributed, and what is left out."""
        size = _count(self.parameters)
        trained = trainable(self.model)
        left_out = [name for name in trained if name not in self.parameters]
        frozen = sum(1 for _ in self.model.parameters()) - len(trained)

        text = f"attributing {size:,} of {self.trainable:,} trainable parameters ({size / self.trainable:.1%})"
        if left_out:
            text += f"; left out by the selection: {list_names(left_out)}"
        if frozen:
            text += f"; {frozen} frozen parameters"
        return text

    def fingerprint(self) -> dict[str, Any]:
        """Hash the model, the selection and the training data; with the task's name and first losses."""
        return {
            "task": self.task.name(),
            COMPUTED: self._first_losses(),
            "model": fingerprint(self.model),
            "parameters": ", ".join(self.parameters),
            "train": self.train.fingerprint(),
        }

    def _first_losses(self) -> list[float]:
        """Compute the losses of the first examples: a task's name does not tell what its methods do."""
        batch = self.batch(range(min(8, len(self.train))))
        with self.observed() as model, torch.no_grad():
            return self.task.loss(self.outputs(model, batch), batch).tolist()

    # --- passes over data ---------------------------------------------------------------------------------------------

    def batch(self, index: Sequence[int] | Tensor) -> Batch:
        """Collate training examples by number."""
        return self.train.batch(index, self.device, self.dtype)

    def batches(self, examples: Examples | None = None, what: str | None = None) -> Iterator[tuple[range, Batch]]:
        """Iterate over all training examples, or those given, in order.

        Args:
            examples: others than the training examples.
            what: what is done with them, for a progress bar; None shows none.

        Yields:
            The numbers of a batch's examples, and the batch.
        """
        examples = examples or self.train
        batches = examples.batches(self.device, self.dtype, self._is_finite)
        if what is None:
            return batches
        total = -(-len(examples) // examples.batch_size)
        return track(batches, what, total=total, enabled=self.progress)

    def _is_finite(self, batch: Batch) -> bool:
        """Whether outputs, losses and gradients are, as with missing labels that the loss leaves out."""
        with self.observed() as model:
            for p in self.parameters.values():
                p.requires_grad_()
            outputs = self.outputs(model, batch)
            return contract.is_finite(outputs, lambda h: self.loss(h, batch), self.parameters.values())

    def observed(self) -> AbstractContextManager[nn.Module]:
        """Enter the model's eval mode without parameter gradients; it is put back afterwards, even after an error."""
        return observe_model(self.model)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the task's outputs (n, ...) on a batch.

        Raises:
            InputError: if the model fails on the batch, or its outputs do not have the examples first.
        """
        outputs = contract.call("the model", self.task.outputs, model, batch, self.dtype)
        contract.check_outputs(outputs, batch_length(batch))
        return outputs

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the training loss of each example from the outputs, as the task returns it; see `per_example`.

        Raises:
            InputError: if the task fails on the batch.
        """
        return contract.call("task.loss", self.task.loss, outputs, batch, self.dtype)

    def per_example(self, value: Tensor, batch: Batch, what: str) -> Tensor:
        """Give back the value itself if it is one finite number per example.

        Args:
            value: what a method of the task returned.
            batch: n examples.
            what: the name of the method, "loss" or "measurement".

        Raises:
            InputError: otherwise.
        """
        return contract.check_values(value, batch_length(batch), what)

    def functional(self, batch: Batch) -> tuple[Callable[[Vectors], Tensor], dict[str, Tensor]]:
        """Make the outputs on a batch a function of the selected parameters; with the parameters' values."""

        def outputs(parameters: Vectors) -> Tensor:
            swaps = [(self.parameters[name], value) for name, value in parameters.items()]
            with substituted(self.model, swaps):
                return self.outputs(self.model, batch)

        return outputs, {name: p.detach() for name, p in self.parameters.items()}

    # --- per-sample gradients -----------------------------------------------------------------------------------------

    def examine(self) -> Layout:
        """Find out how each block's gradients are captured, by trying it on a few examples: once, then remembered.

        Raises:
            InputError: if the model has no per-sample gradients.
            UnsupportedError: if they differ from autograd in every way that they can be captured.
        """
        return verification.examine(self)

    def name_unseen(self) -> None:
        """Warn of parameters that had no gradient on any example so far: to be called after a pass over all of them."""
        verification.warn_of_silent_blocks(self)

    def gradients(self, batch: Batch, output_cotangents: OutputCotangents, positions: int | None = None) -> Gradients:
        """Compute the per-sample gradients J_n^T s_{n,r}, factored, and check some of them against autograd.

        Args:
            batch: n examples.
            output_cotangents: makes s (R, n, ...) of the outputs (n, ...).
            positions: the length S of the sequences, for n S rows: see `wherefrom.model.capture.capture`.

        Returns:
            n examples (or n S) of R rows each.
        """
        return verification.compute_gradients(self, batch, output_cotangents, positions)

    def loss_gradients(self, batch: Batch) -> Gradients:
        """Compute the gradient of each example's training loss, R = 1."""
        return self.gradients(batch, self.output_cotangents("loss"))

    def measurement_gradients(self, batch: Batch) -> Gradients:
        """Compute the gradient of each query's measurement, R = 1."""
        return self.gradients(batch, self.output_cotangents("measurement"))

    def sampled_gradients(self, batch: Batch, rng: torch.Generator) -> Gradients:
        """Compute gradients of the loss with labels drawn from the model, R = 1."""
        loss_slope = self.output_cotangents("loss")

        def slope_of_drawn_labels(outputs: Tensor, batch: Batch) -> Tensor:
            return loss_slope(outputs, self.task.resample(outputs.detach(), batch, rng))

        return self.gradients(batch, slope_of_drawn_labels)

    def output_cotangents(
        self, what: str, value_of: Callable[[Tensor, Batch], Tensor] | None = None
    ) -> OutputCotangents:
        """Make the derivative, by the outputs, of each example's loss or measurement.

        Args:
            what: "loss" or "measurement": the task's method, and its name in errors.
            value_of: another function of (outputs, batch) in its place.

        Returns:
            A function of outputs (n, ...) and their batch that gives (1, n, ...).
        """
        function = value_of or getattr(self.task, what)

        def slope(outputs: Tensor, batch: Batch) -> Tensor:
            leaf = outputs.detach().requires_grad_()
            with torch.enable_grad():
                value = contract.call(f"task.{what}", function, leaf, batch, self.dtype)
                value = self.per_example(value, batch, what)  # (n,)
            verification.compare_largest_with_its_rows_alone(self, function, what, value.detach(), leaf.detach(), batch)
            (cotangent,) = torch.autograd.grad(value.sum(), leaf)  # (n, ...)
            contract.check_slope(cotangent, what)
            return cotangent.unsqueeze(0)

        return slope

    @undisturbed()
    def slopes(self, batch: Batch, directions: Directions) -> Tensor:
        """Compute derivatives of each example's training loss along Q directions, by forward mode, or by rows: (Q, n).

        Forward mode needs no gradient of its own for each example, which parameters on the slow path would have to be
        given in full.
        """
        outputs, theta = self.functional(batch)
        v = directions.to_parameters()

        def along(w: Vectors) -> Tensor:
            return jvp(lambda p: self.task.loss(outputs(p), batch), (theta,), (w,))[1]

        with self.observed(), math_attention():
            try:
                slopes = vmap(along)(v)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
                # Some operation has no derivative in forward mode.
                return self.loss_gradients(batch).dot(directions)[..., 0]
        if self._agrees_with_rows(slopes, batch, directions):
            return slopes
        return self.loss_gradients(batch).dot(directions)[..., 0]

    def _agrees_with_rows(self, slopes: Tensor, batch: Batch, directions: Directions) -> bool:
        """Compare the slopes (Q, n) of drawn examples with their gradients, which are certified as all rows are.

        Some operations have forward-mode derivatives that are wrong under vmap.
        """
        index = self.verification.row_check.draw_some(slopes.shape[1])  # (m,)
        rows = self.loss_gradients(take(batch, index))
        wanted = rows.dot(directions)[..., 0]  # (Q, m)
        difference = (slopes[:, index.to(slopes.device)] - wanted).abs()
        # A direction may be orthogonal to a gradient: their lengths give the rounding that is to be expected then.
        lengths = rows.square_norms().sqrt().T * directions.norm().unsqueeze(1).to(wanted)
        return bool((difference <= TOLERANCE[self.dtype] * (wanted.abs() + FLOOR * lengths)).all())


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    """How many numbers the parameters hold together."""
    return sum(p.numel() for p in parameters.values())
