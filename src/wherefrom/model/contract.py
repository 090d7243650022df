"""What a task's methods are held to: a failure of theirs is told with its reason and its remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from wherefrom.data.batches import Batch, shapes, tensors
from wherefrom.errors import AttributionError, InputError, expected

ALONE = 1e-2  # how much an example's loss may differ between batches by rounding, as a share of the largest
FAILURES = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


def call(what: str, function: Callable[..., Any], first: Any, batch: Batch, dtype: torch.dtype) -> Any:
    """Call a task's method.

    Args:
        what: who fails, such as "the model" or "task.loss".
        function: the method.
        first: its first argument, the model or its outputs.
        batch: its second.
        dtype: the model's.

    Raises:
        InputError: with the shapes of the batch and what may help, if it raises an error that is not the library's.
    """
    try:
        return function(first, batch)
    except FAILURES as error:
        if isinstance(error, (AttributionError, NotImplementedError, torch.OutOfMemoryError)):
            raise
        raise InputError(
            f"{what} failed on a batch of shapes {shapes(batch)}: {error}. {_remedy(what, error, batch, dtype)}"
        ) from error


def _remedy(what: str, error: Exception, batch: Batch, dtype: torch.dtype) -> str:
    """Say what may help, as far as the error and the batch tell."""
    has_doubles = any(t.dtype == torch.float64 for t in tensors(batch))
    if dtype == torch.float32 and has_doubles and "dtype" in str(error).replace("type", "dtype").lower():
        return (
            "The model is float32 and data are float64, as NumPy makes them: give them as x.float(), or "
            "x.astype('float32') in the data set or its collate_fn; or convert the model with model.double()."
        )
    if isinstance(batch, (tuple, list)) and any(map(_taken_apart, batch)):
        return TAKEN_APART
    if isinstance(batch, dict) and any(map(_taken_apart, batch.values())):
        return TAKEN_APART
    if what != "the model":
        return "It is called with the outputs (B, ...) and a batch of the same B examples."
    return (
        "Train and query batches must be what task.outputs(model, batch) accepts, in the model's dtype "
        f"({dtype}) or narrower."
    )


TAKEN_APART = (
    "PyTorch's default collation takes lists of numbers apart, into one tensor for each place: make tensors of them "
    "first (datasets.Dataset.with_format('torch'), torch.tensor), or pass a DataLoader with a collate_fn that does."
)


def _taken_apart(part: Any) -> bool:
    """Whether a part of a batch is a list of tensors of one number per example."""
    return isinstance(part, list) and len(part) > 1 and all(isinstance(t, Tensor) and t.ndim == 1 for t in part)


def check_outputs(outputs: Any, n: int) -> None:
    """Make sure that outputs are one tensor with the n examples of the batch first.

    Raises:
        InputError: otherwise.
    """
    wanted = f"a tensor with the {n} examples of the batch first"
    if isinstance(outputs, (tuple, list)):
        parts = [f"{tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in outputs[:4]]
        got = f"a {type(outputs).__name__} of {len(outputs)}: {', '.join(parts)}"
        raise expected("task.outputs", wanted, got, "Subclass the task, and return what its loss needs: model(x)[0].")
    if not isinstance(outputs, Tensor):
        do = "Subclass the task, and return the tensor that its loss needs, such as .logits."
        raise expected("task.outputs", wanted, type(outputs).__name__, do)
    if outputs.ndim and outputs.shape[0] == n:
        return
    do = "Each example of a batch must have its own row of outputs, whatever the rest of the batch."
    if n == 1:
        do = "A squeeze() in the forward pass loses the axis of a batch of one example: use squeeze(-1), or flatten(1)."
    raise expected("task.outputs", wanted, tuple(outputs.shape), do)


def check_values(value: Any, n: int, what: str) -> Tensor:
    """Make sure that a task's method gave one finite number per example, and give it back.

    Args:
        value: what it returned.
        n: examples in the batch.
        what: which method, "loss" or "measurement".

    Raises:
        InputError: otherwise.
    """
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


def check_slope(slope: Tensor, what: str, which: str = "derivative") -> None:
    """Make sure that derivatives by the outputs, (n, ...), are finite.

    Args:
        slope: the derivatives.
        what: of what, "loss" or "measurement".
        which: the first or the second.

    Raises:
        InputError: at the first example where they are not.
    """
    if slope.isfinite().all():
        return
    bad = int((~slope.isfinite()).reshape(len(slope), -1).any(1).nonzero()[0])
    raise InputError(
        f"the {which} of task.{what} by the outputs must be finite, got NaN or infinity for example {bad} of a batch, "
        "though its value is finite. Look for a root or a norm at zero, and for torch.where on the result of an "
        "operation on NaN: replace NaN in its input."
    )


def check_alone(together: Tensor, alone: Any, n: int, what: str) -> None:
    """Make sure that losses or measurements of examples in a batch of n are those of the examples alone.

    Args:
        together: (m,) in the batch.
        alone: (m,) each by itself.
        n: examples in the batch.
        what: of what, "loss" or "measurement".

    Raises:
        InputError: if they differ by more than rounding would explain.
    """
    if not isinstance(alone, Tensor) or alone.shape != together.shape:
        return  # told where it is used
    difference = (alone - together).abs()
    if not (difference > ALONE * together.abs().max()).any():
        return
    i = int(difference.argmax())
    raise InputError(
        f"task.{what} of an example must not depend on the other examples of its batch, but that of one is "
        f"{float(together[i]):.4g} in a batch of {n} and {float(alone[i]):.4g} alone. Do not divide by the size of the "
        "batch or by its number of tokens: sum over each example's own tokens. Or the model sees padding: mask it."
    )


def is_finite(outputs: Tensor, loss: Callable[[Tensor], Tensor], parameters: Iterable[Tensor]) -> bool:
    """Whether the outputs of a batch, its losses and their gradients are finite, whatever its data hold."""
    value = loss(outputs)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return False
    grads = torch.autograd.grad(value.sum(), [outputs, *parameters], allow_unused=True)
    everything = [t for t in (outputs, value, *grads) if t is not None]
    return all(bool(t.isfinite().all()) for t in everything)
