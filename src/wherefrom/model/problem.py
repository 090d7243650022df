"""Problem: a model, its task and its training data, and the way to per-example gradients of the chosen parameters.

The model is observed by hooks only while a pass runs and comes back as it was. How each layer's gradient is factored is
verified once against autograd on a few examples; what cannot be factored is computed the slow and exact way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from wherefrom.data.batches import origin_of, take_rows
from wherefrom.data.examples import Batch, Examples, batch_length, take
from wherefrom.errors import AttributionWarning, InputError, expected
from wherefrom.model import contract
from wherefrom.model.capture import Seeds, Traced, trace, watch_layers
from wherefrom.model.check import FLOOR, TOLERANCE, RowCheck, examine, find_shared, row_errors
from wherefrom.model.observe import (
    Select,
    chosen,
    copied,
    fingerprint,
    in_training_with,
    observed,
    plain_names,
    ready,
    trainable,
)
from wherefrom.model.task import Task, as_task
from wherefrom.persample.blocks import Block
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.layers import Unfactorable
from wherefrom.persample.layout import Layout, plan
from wherefrom.persample.vectors import Vectors, norm
from wherefrom.progress import track
from wherefrom.store import COMPUTED
from wherefrom.surroundings import jvp, math_attention, substituted, undisturbed


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

    Raises:
        InputError: an untrainable, non-finite, half-converted or scattered model; a selection that matches nothing.
    """

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
        self.task = as_task(task)
        self.model = ready(model)
        self.train = train if isinstance(train, Examples) else Examples(train, "train", batch_size)
        self.memory, self.progress = memory, progress
        trained = trainable(self.model)
        keep = chosen(parameters)
        self.parameters = {name: p for name, p in trained.items() if keep(name)}
        self.trainable = sum(p.numel() for p in trained.values())
        if not self.parameters:
            raise InputError(
                f"parameters={parameters!r} selects none of the {len(trained)} trainable parameters "
                f"({', '.join(list(trained)[:5])}, ...). Check the pattern, and that requires_grad is True."
            )
        if in_training_with(self.model, "Dropout"):
            warnings.warn(
                "the model is in training mode with dropout: it is evaluated in eval mode.",
                AttributionWarning,
                stacklevel=2,
            )
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self.row_check = RowCheck(sum(p.numel() for p in self.parameters.values()))
        self._layout: Layout | None = None
        self._unseen: set[str] = set()  # blocks without a gradient so far
        self._named: set[str] = set()  # those of them that a warning named
        self._tried: dict[int, object] = {}  # losses and measurements that were held against those of rows alone

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Parameter name to shape, in the model's order."""
        return {name: p.shape for name, p in self.parameters.items()}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the layout."""
        return self.layout.blocks

    @property
    def layout(self) -> Layout:
        """How each parameter's gradient is found; it is tried on a few examples first."""
        return self._layout or self.examine()

    def examine(self) -> Layout:
        """Try the model on a few examples, once: the layout, checked against autograd.

        Raises:
            InputError: if the model has no per-example gradients.
        """
        if self._layout is None:
            self._layout = self._examined_layout()
        return self._layout

    def _examined_layout(self) -> Layout:
        """Plan the layout and hold it against autograd; name what takes the slow path or has no gradient."""
        batch = self.batch([i % len(self.train) for i in range(3)])
        with self.observed() as model:
            layout = plan(model, self.parameters)  # in eval mode: reading a weight may change a spectral norm's buffers
            forward = self._forward(model)
            plain = forward(batch).detach()
            layout = find_shared(lambda some: watch_layers(forward, model, batch, some), layout, plain)
            trace_rows = lambda some, cotangents: self._trace(model, batch, lambda *_: cotangents, some)  # noqa: E731
            layout, unseen = examine(
                layout, batch, self._with_gradients(model), self._loss, self.parameters, trace_rows, self.dtype
            )
            self._try_examples(model, batch, plain)
        self._unseen = {b.name for b in layout.blocks if unseen.issuperset(b.shapes)}
        if self._unseen == {b.name for b in layout.blocks}:
            warnings.warn(
                "none of the selected parameters acts on the loss of the first training examples. Unmerge adapters "
                "that were merged into the weights.",
                AttributionWarning,
                stacklevel=2,
            )
        if layout.slow:
            names = [p for b in layout.slow for p in b.shapes]
            how = ", by a backward pass for each as vmap gives other numbers" if layout.looped else ""
            warnings.warn(
                f"{len(names)} parameters are not covered by a layer entry and take the exact slow path (one gradient "
                f"per example{how}): {_some(names)}. Leave them out with parameters=..., or register a LayerKind.",
                AttributionWarning,
                stacklevel=2,
            )
        return layout

    def at(self, state: Mapping[str, Tensor]) -> Problem:
        """The same problem with a copy of the model at other weights, such as a checkpoint's.

        Args:
            state: a ``state_dict`` of the model, of any float dtype.

        Raises:
            InputError: if it does not fit the model.
        """
        model = copied(self.model)
        try:
            model.load_state_dict(plain_names(state))
        except (RuntimeError, KeyError) as error:
            raise InputError(f"The weights must be a state_dict of the model, got: {error}") from error
        keep = set(self.parameters)
        there = Problem(model, self.task, self.train, lambda n: n in keep, None, self.memory, self.progress)
        there.row_check = self.row_check
        return there

    def coverage(self) -> str:
        """One sentence: the share of trainable parameters attributed, and what is left out."""
        size = sum(p.numel() for p in self.parameters.values())
        trained = trainable(self.model)
        left = [name for name in trained if name not in self.parameters]
        frozen = sum(1 for _ in self.model.parameters()) - len(trained)
        text = f"attributing {size:,} of {self.trainable:,} trainable parameters ({size / self.trainable:.1%})"
        text += f"; left out by the selection: {_some(left)}" if left else ""
        return text + (f"; {frozen} frozen parameters" if frozen else "")

    # passes over data -------------------------------------------------------------------------------------------------

    def batch(self, index: Sequence[int] | Tensor) -> Batch:
        """Training examples by number."""
        return self.train.batch(index, self.device, self.dtype)

    def batches(self, examples: Examples | None = None, what: str | None = None) -> Iterator[tuple[range, Batch]]:
        """All training examples, or those given, in order; with a progress bar if ``what`` says what is done."""
        examples = examples or self.train
        batches = examples.batches(self.device, self.dtype, self._is_finite)
        if what is None:
            return batches
        return track(batches, what, total=-(-len(examples) // examples.batch_size), enabled=self.progress)

    @property
    def row_error(self) -> float | None:
        """The largest relative difference from autograd of the rows that were checked, here and `at` other weights."""
        return self.row_check.error if self.row_check.checked else None

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the model, the selection and the training data; the task's name and first losses."""
        return {
            "task": self.task.name(),
            COMPUTED: self._first_losses(),
            "model": fingerprint(self.model),
            "parameters": ", ".join(self.parameters),
            "train": self.train.fingerprint(),
        }

    def gradients(self, batch: Batch, seeds: Seeds, positions: int | None = None) -> Gradients:
        """Rows J_n^T s_{n,r} for the cotangents that ``seeds`` makes of the outputs; ``positions`` as for `trace`."""
        layout = self.layout
        made: list[Tensor] = []

        def seeds_once(outputs: Tensor, batch: Batch) -> Tensor:  # what they draw or note must not be drawn twice
            if not made:
                made.append(seeds(outputs, batch))
            return made[0]

        while True:
            with self.observed() as model:
                try:
                    traced = self._trace(model, batch, seeds_once, layout, positions)
                except Unfactorable as error:
                    if positions:
                        raise
                    layout = self._fall_back(layout.using(error.module), error)
                    continue
                wrong = self._check_rows(model, traced, batch)
            if not wrong:
                return traced.gradients
            worst = max(wrong, key=lambda name: wrong[name])
            error = Unfactorable(worst, f"has rows that differ from autograd by {wrong[worst]:.1e} of their size")
            layout = self._fall_back(frozenset(b.name for b in layout.blocks if wrong.keys() & b.shapes), error)

    def loss_gradients(self, batch: Batch) -> Gradients:
        """Gradients of each example's training loss, R = 1."""
        return self.gradients(batch, self.seeds_of("loss"))

    def measurement_gradients(self, batch: Batch) -> Gradients:
        """Gradients of each query's measurement, R = 1."""
        return self.gradients(batch, self.seeds_of("measurement"))

    def seeds_of(self, what: str, value_of: Callable[[Tensor, Batch], Tensor] | None = None) -> Seeds:
        """The cotangent of the outputs that belongs to the task's loss or measurement, or to another function given."""
        function = value_of or getattr(self.task, what)

        def seeds(outputs: Tensor, batch: Batch) -> Tensor:
            h = outputs.detach().requires_grad_()
            with torch.enable_grad():
                value = contract.call(f"task.{what}", function, h, batch, self.dtype)
                value = self.per_example(value, batch, what)
            self._try_alone(function, value.detach(), h.detach(), batch, what)
            (s,) = torch.autograd.grad(value.sum(), h)
            contract.check_slope(s, what)
            return s.unsqueeze(0)

        return seeds

    def sampled_gradients(self, batch: Batch, rng: torch.Generator) -> Gradients:
        """Loss gradients with labels drawn from the model, R = 1."""
        loss = self.seeds_of("loss")
        return self.gradients(batch, lambda h, b: loss(h, self.task.resample(h.detach(), b, rng)))

    @undisturbed()
    def slopes(self, batch: Batch, v: Vectors) -> Tensor:
        """Derivatives of each example's training loss along Q directions, by forward mode, or by rows: (Q, n)."""
        outputs, theta = self.functional(batch)

        def along(w: Vectors) -> Tensor:
            return jvp(lambda p: self.task.loss(outputs(p), batch), (theta,), (w,))[1]

        with self.observed(), math_attention():
            try:
                found = vmap(along)(v)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # no forward mode: rows
                return self.loss_gradients(batch).dot(Directions.from_parameters(self.blocks, v))[..., 0]
        if self._agrees(found, batch, v):
            return found
        return self.loss_gradients(batch).dot(Directions.from_parameters(self.blocks, v))[..., 0]

    def _agrees(self, slopes: Tensor, batch: Batch, v: Vectors) -> bool:
        """Compare the slopes (Q, n) of drawn examples with their gradients, which are certified as all rows are.

        Some operations have forward-mode derivatives that are wrong under vmap.
        """
        place = self.row_check.draw_some(slopes.shape[1])
        rows = self.loss_gradients(take(batch, place))
        wanted = rows.dot(Directions.from_parameters(self.blocks, v))[..., 0]  # (Q, m)
        difference = (slopes[:, place.to(slopes.device)] - wanted).abs()
        size = wanted.abs() + FLOOR * rows.square_norms().sqrt().T * norm(v).unsqueeze(1).to(wanted)
        return bool((difference <= TOLERANCE[self.dtype] * size).all())

    def per_example(self, value: Tensor, batch: Batch, what: str) -> Tensor:
        """The value itself if it is one finite number per example.

        Raises:
            InputError: otherwise.
        """
        n = batch_length(batch)
        if not isinstance(value, Tensor) or value.shape != (n,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise expected(
                f"task.{what}",
                f"one number per example, shape ({n},)",
                got,
                "Use reduction='none' and sum over each example's own tokens.",
            )
        if not value.isfinite().all():
            bad = int((~value.isfinite()).nonzero()[0])
            raise InputError(
                f"task.{what} must be finite, got {value[bad].item()} for example {bad} of a batch. "
                "Look for overflow in the loss (use logsumexp), or drop the example."
            )
        return value

    def _try_alone(
        self, function: Callable[[Tensor, Batch], Tensor], value: Tensor, outputs: Tensor, batch: Batch, what: str
    ) -> None:
        """Hold the largest of a batch's losses or measurements against that of its rows alone, once for a function."""
        key = getattr(function, "__func__", function)
        if len(value) < 2 or id(key) in self._tried:
            return
        self._tried[id(key)] = key
        i = value.abs().argmax().view(1)
        if (rows := take_rows(batch, i)) is not None:
            alone = contract.call(f"task.{what}", function, outputs[i], rows, self.dtype)
            contract.check_alone(value[i], alone, len(value), what)

    def _try_examples(self, model: nn.Module, batch: Batch, outputs: Tensor) -> None:
        """Hold the losses of a few examples in a batch against those of each example collated by itself."""
        together, origin = self._loss(outputs, batch), origin_of(batch)
        if origin is None or not isinstance(together, Tensor) or together.shape != (len(outputs),):
            return  # told where it is used
        singles = (self.train.single(number, self.device, self.dtype) for number in origin.numbers)
        alone = [self._loss(self.outputs(model, single).detach(), single).detach().flatten() for single in singles]
        contract.check_alone(together.detach(), torch.cat(alone), len(together), "loss")

    def _is_finite(self, batch: Batch) -> bool:
        """Whether outputs, losses and gradients are, as with missing labels that the loss leaves out."""
        with self.observed() as model:
            for p in self.parameters.values():
                p.requires_grad_()
            outputs = self.outputs(model, batch)
            return contract.is_finite(outputs, lambda h: self._loss(h, batch), self.parameters.values())

    def _first_losses(self) -> list[float]:
        batch = self.batch(range(min(8, len(self.train))))
        with self.observed() as model, torch.no_grad():
            return self.task.loss(self.outputs(model, batch), batch).tolist()

    def _loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return contract.call("task.loss", self.task.loss, outputs, batch, self.dtype)

    def observed(self) -> AbstractContextManager[nn.Module]:
        """The model in eval mode without parameter gradients; it is put back afterwards, even after an error."""
        return observed(self.model)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's outputs, with a clear error where the model rejects the batch."""
        outputs = contract.call("the model", self.task.outputs, model, batch, self.dtype)
        contract.check_outputs(outputs, batch_length(batch))
        return outputs

    def functional(self, batch: Batch) -> tuple[Callable[[Vectors], Tensor], dict[str, Tensor]]:
        """The outputs on a batch as a function of the selected parameters, and the parameters' values."""

        def outputs(parameters: Vectors) -> Tensor:
            swaps = [(self.parameters[name], value) for name, value in parameters.items()]
            with substituted(self.model, swaps):
                return self.outputs(self.model, batch)

        return outputs, {name: p.detach() for name, p in self.parameters.items()}

    def _check_rows(self, model: nn.Module, traced: Traced, batch: Batch) -> dict[str, float]:
        """Compare some of a batch's rows with autograd, if a check is due: relative errors of parameters that differ.

        Raises:
            InputError: if there is no per-example gradient.
        """
        used, first_users = self._first_users(traced)
        vmapped = bool(self.layout.slow) and not self.layout.looped
        groups = self.row_check.draw(traced, vmapped, first_users)
        if not groups:
            return {}
        count = sum(map(len, groups))
        weights = self.row_check.weights(count, len(traced.cotangents))
        errors = row_errors(traced, batch, groups, weights, self._with_gradients(model), self.parameters)
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[self.dtype]}
        if not wrong:
            self.row_check.note(errors, count)
            self._unseen -= used
        return wrong

    def name_unseen(self) -> None:
        """Say which parameters had no gradient on any example so far: to be called after a pass over all of them."""
        named = [p for b in self.layout.blocks if b.name in self._unseen - self._named for p in b.shapes]
        self._named |= self._unseen
        if named:
            warnings.warn(
                f"{len(named)} parameters had no gradient on any training example, so that they add nothing to the "
                f"scores: {_some(named)}. Look for what cuts them off (a detached or merged part, a kernel without a "
                "backward pass), or leave them out with parameters=....",
                AttributionWarning,
                stacklevel=3,
            )

    def _first_users(self, traced: Traced) -> tuple[set[str], Tensor | None]:
        """Blocks that had no gradient before this batch, and which of its examples (n,) use one; None for no such."""
        users, used = None, set()
        for name in self._unseen:
            norms = traced.gradients.rows[name].square_norms()
            if norms.any():
                used.add(name)
                mine = norms.reshape(len(traced.outputs), -1).any(1)
                users = mine if users is None else users | mine
        return used, users

    def _fall_back(self, names: frozenset[str], error: Unfactorable) -> Layout:
        """Make the rows of some blocks one example at a time from now on, and say so.

        Blocks keep their shape, so that what was made of earlier batches, which were right, goes together with it.

        Raises:
            UnsupportedError: if they are made so already.
        """
        layout = self.layout
        fast = {name for name in names if layout.uses[name]} - layout.alone
        slow = any(not layout.uses[name] for name in names)
        if fast:
            layout = replace(layout, alone=layout.alone | fast)
        elif slow and not layout.looped:
            layout = replace(layout, looped=True)
        else:
            raise error
        self._layout = layout
        warnings.warn(
            f"{_some(sorted(names))}: {error.why}. From here on these gradients are computed one example at a time, "
            "which is exact and slow.",
            AttributionWarning,
            stacklevel=3,
        )
        return layout

    def _trace(
        self, model: nn.Module, batch: Batch, seeds: Seeds, layout: Layout, positions: int | None = None
    ) -> Traced:
        for p in self.parameters.values():  # a check may have asked for gradients
            p.requires_grad_(False)
        return trace(self._forward(model), model, batch, seeds, layout, self.functional, positions)

    def _forward(self, model: nn.Module) -> Callable[[Batch], Tensor]:
        """The outputs of the model on a batch."""
        return lambda batch: self.outputs(model, batch)

    def _with_gradients(self, model: nn.Module) -> Callable[[Batch], Tensor]:
        """The same, differentiable in the attributed parameters."""

        def outputs(batch: Batch) -> Tensor:
            for p in self.parameters.values():
                p.requires_grad_()
            return self.outputs(model, batch)

        return outputs


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join([*names[:6], *([f"and {len(names) - 6} more"] if len(names) > 6 else [])])
