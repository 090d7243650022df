"""What surrounds a pass of the model: the modes of torch, and the model's state. Both are put back afterwards.

A pass may be disturbed from outside (an active autocast, inference mode, a compiler, another thread at work on the same
modules), and it may itself leave traces in the model (buffers that count, cached activations, swapped parameters).
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")  # that autocast may be active for
KEPT = 2**26  # bytes of buffers that are copied before a pass; larger ones are only watched
KEPT_WEIGHTS = 2**31  # bytes of parameters that are copied before the first pass


# --- modes of torch -----------------------------------------------------------------------------------------------


def jvp(*arguments: Any, **options: Any) -> Any:
    """Do what `torch.func.jvp` does, and keep quiet about what PyTorch loads for the first of them in a process."""
    _load_forward_mode()
    return torch.func.jvp(*arguments, **options)


@functools.cache
def _load_forward_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch scripts functions there
        importlib.import_module("torch._decomp.decompositions_for_jvp")


class _Default(threading.local):
    """The default device that the user's own code expects, while the library's arithmetic has none."""

    device: torch.device | None = None


_users = _Default()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Do arithmetic as it is written: no autocast, no inference mode, gradients on, new tensors on the CPU.

    Also a decorator of functions, ``@undisturbed()``.
    """
    active = [device_type for device_type in DEVICE_TYPES if torch.is_autocast_enabled(device_type)]
    default = torch.get_default_device()
    if not active and default.type == "cpu" and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    before = _users.device
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in active:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if default.type != "cpu":
            _users.device = default
            stack.enter_context(torch.device("cpu"))
        try:
            yield
        finally:
            _users.device = before


def undisturb(cls: type, *names: str) -> None:
    """Let methods of a class run `undisturbed`, those of these names that it defines itself."""
    for name in names:
        if name in vars(cls):
            setattr(cls, name, undisturbed()(vars(cls)[name]))


@contextmanager
def users_device() -> Iterator[None]:
    """Make new tensors where the user wants them, for the time that the model and the task run."""
    if _users.device is None:
        yield
        return
    with _users.device:
        yield


class Switch:
    """A setting of the whole process that several threads may need at once: the first sets it, the last puts it back.

    Args:
        setting: makes the context manager that sets it and puts it back.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]):
        self._setting = setting
        self._lock = threading.Lock()
        self._holders = 0
        self._stack = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the setting."""
        with self._lock:
            if not self._holders:
                self._stack.enter_context(self._setting())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._stack.close()


@contextmanager
def _without_fastpath() -> Iterator[None]:
    """Run transformer layers as they are written: their fast path calls no submodule, so that no hook would see it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


math_attention = Switch(lambda: sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivatives
without_fastpath = Switch(_without_fastpath)
_eager = Switch(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def eager() -> Iterator[None]:
    """Run what the user compiled as it was written: hooks are seen, and nothing is compiled for our passes."""
    if "torch._dynamo" not in sys.modules:  # then nothing was compiled, and importing it takes a second
        yield
        return
    with _eager():
        yield


class _WrittenOut(TorchFunctionMode):
    """Weight normalisation by elementary operations.

    The fused kernel has no forward-mode derivative, and its second derivative is wrong (PyTorch 2.13).
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute g v / |v|, the norm over all axes but one."""
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    size = v.square().sum(axes, keepdim=True).sqrt() if axes and dim != -1 else v.square().sum().sqrt()
    return v * (g / size)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Run the model's operations in a form that has all derivatives."""
    if any(_is_weight_norm(m) for m in model.modules()):
        with _WrittenOut():
            yield
    else:
        yield


def _is_weight_norm(module: nn.Module) -> bool:
    new = type(module).__name__ == "_WeightNorm"
    return new or any(type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values())


# --- one thread at a time -----------------------------------------------------------------------------------------

_changed = threading.Condition()
_owners: dict[int, int] = {}  # id of a module or parameter in use -> the thread that uses it


@contextmanager
def alone(model: nn.Module) -> Iterator[bool]:
    """Wait until no other thread is at work on the model or on a part of it. True unless this thread had it already."""
    me = threading.get_ident()
    if _owners.get(id(model)) == me:
        yield False
        return
    parts = {id(m) for m in model.modules()} | {id(p) for p in model.parameters()}
    with _changed:
        _changed.wait_for(lambda: all(_owners.get(part, me) == me for part in parts))
        taken = [part for part in parts if part not in _owners]
        _owners.update(dict.fromkeys(taken, me))
    try:
        yield True
    finally:
        with _changed:
            for part in taken:
                del _owners[part]
            _changed.notify_all()


# --- the model's state --------------------------------------------------------------------------------------------


class Snapshot:
    """A model's modules with their attributes, parameters and buffers, as objects; the buffers' values too.

    Args:
        model: what will be put back.
        with_parameters: keep the parameters' values too, if they are not too large.
    """

    def __init__(self, model: nn.Module, with_parameters: bool = False):
        self.modules = [(m, m.training, dict(vars(m)), _containers(m)) for m in model.modules()]
        self.needed = [(p, p.requires_grad) for p in model.parameters()]
        self.buffers = _keep(model.named_buffers(), KEPT)
        self.parameters = _keep(model.named_parameters(), KEPT_WEIGHTS if with_parameters else 0)

    def restore(self) -> tuple[list[str], list[str], list[str]]:
        """Put everything back.

        Returns:
            The names of buffers that had changed, of buffers that could not be put back, and of parameters whose values
            had changed.
        """
        replaced = self._replaced_buffers()
        for module, training, attributes, containers in self.modules:
            for container, content in containers:
                _refill(container, content)
            own = vars(module)
            own.update(attributes)
            for name in own.keys() - attributes.keys():
                del own[name]
            if module.training != training:  # a scripted module keeps it elsewhere
                module.training = training
        for p, needed in self.needed:
            if p.requires_grad != needed:
                p.requires_grad_(needed)

        buffers, lost = _put_back(self.buffers)
        weights = [name for names in _put_back(self.parameters) for name in names]
        return [*replaced, *buffers], lost, weights

    def _replaced_buffers(self) -> list[str]:
        """Name the buffers that another tensor has taken the place of."""
        names = {id(kept.tensor): kept.name for kept in self.buffers}
        now = {id(b) for module, *_ in self.modules for b in module._buffers.values() if b is not None}
        return [name for i, name in names.items() if i not in now]


@dataclass(frozen=True)
class _Kept:
    """A tensor of the model before a pass, with a copy if it is not too large."""

    name: str
    tensor: Tensor
    version: int
    copied: Tensor | None


def _keep(named: Iterable[tuple[str, Tensor]], room: int) -> list[_Kept]:
    kept = []
    for name, t in named:
        if t.layout != torch.strided or t.is_meta or t.is_inference():
            continue
        room -= t.numel() * t.element_size()
        kept.append(_Kept(name, t, t._version, t.detach().clone() if room >= 0 else None))
    return kept


def _put_back(held: Iterable[_Kept]) -> tuple[list[str], list[str]]:
    """Give tensors their values again; the names of those that had changed, and of those whose value is lost."""
    changed, lost = [], []
    for kept in held:
        if kept.copied is None:
            if kept.tensor._version != kept.version:
                lost.append(kept.name)
        elif not _identical(kept.tensor, kept.copied):
            with torch.no_grad():
                kept.tensor.detach().copy_(kept.copied)
            changed.append(kept.name)
    return changed, lost


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """List a module's lists, sets and dicts (of parameters, buffers, children and hooks too), each with a copy."""
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, (list, set, dict))]


def _refill(container: Any, content: Any) -> None:
    """Give a list, set or dict the same objects again, in the same order."""
    now, before = (c.items() if isinstance(c, dict) else c for c in (container, content))
    same = len(now) == len(before) and all(_is_same(a, b) for a, b in zip(now, before, strict=True))
    if same:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two are the same object, or pairs of the same."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(x is y for x, y in zip(a, b, strict=True))
    return a is b


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, so that NaN equals itself."""
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def substituted(model: nn.Module, swaps: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put other tensors in place of the model's parameters, wherever these stand.

    Unlike `torch.func.functional_call` it leaves the same parameters behind where modules are shared.

    Args:
        model: it must hold the parameters as objects.
        swaps: (parameter, tensor) pairs.
    """
    new = {id(old): value for old, value in swaps}
    places = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if id(p) in new
    ]
    try:
        for table, name, p in places:
            table[name] = new[id(p)]  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for table, name, p in places:
            table[name] = p
