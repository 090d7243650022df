"""What surrounds a pass of the model: the modes of torch, and the model's state. Both are put back afterwards.

A pass may be disturbed from outside (an active autocast, inference mode, a compiler, another thread at work on the same
modules), and it may itself leave traces in the model (buffers that count, cached activations, swapped parameters).
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")  # that autocast may be active for
BUFFER_BYTES = 2**26  # of buffers that are copied before a pass; larger ones are only watched
WEIGHT_BYTES = 2**31  # of parameters that are copied before the first pass


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


class _ElementaryWeightNorm(TorchFunctionMode):
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
    # torch takes -1 for no axis at all: the norm then is one number.
    if axes and dim != -1:
        norm = v.square().sum(axes, keepdim=True).sqrt()
    else:
        norm = v.square().sum().sqrt()
    return v * (g / norm)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Run the model's operations in a form that has all derivatives."""
    if any(_is_weight_norm(m) for m in model.modules()):
        with _ElementaryWeightNorm():
            yield
    else:
        yield


def _is_weight_norm(module: nn.Module) -> bool:
    """Whether a module is weight normalisation, as a parametrization or as the hook of older PyTorch."""
    if type(module).__name__ == "_WeightNorm":
        return True
    hooks = module._forward_pre_hooks
    return bool(hooks) and any(type(hook).__name__ == "WeightNorm" for hook in hooks.values())


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
        # What this thread holds already, it gives back where it took it.
        newly_held = [part for part in parts if part not in _owners]
        _owners.update(dict.fromkeys(newly_held, me))
    try:
        yield True
    finally:
        with _changed:
            for part in newly_held:
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
        self.modules = [_ModuleState.of(module) for module in model.modules()]
        named = list(model.named_parameters())
        self.requires_grad = [(p, p.requires_grad) for _, p in named]
        self.parameters = _save_tensors(named, WEIGHT_BYTES if with_parameters else 0)
        self.buffers = _save_tensors(model.named_buffers(), BUFFER_BYTES)

    def restore(self) -> tuple[list[str], list[str], list[str]]:
        """Put everything back.

        Returns:
            The names of buffers that had changed, of buffers that could not be put back, and of parameters whose values
            had changed.
        """
        replaced = self._replaced_buffers()
        for state in self.modules:
            state.restore()
        for p, before in self.requires_grad:
            if p.requires_grad != before:
                p.requires_grad_(before)

        buffers, lost = _restore_tensors(self.buffers)
        weights = [*itertools.chain(*_restore_tensors(self.parameters))]
        return [*replaced, *buffers], lost, weights

    def _replaced_buffers(self) -> list[str]:
        """Name the buffers that another tensor has taken the place of."""
        if not self.buffers:
            return []
        present = {id(buffer) for state in self.modules for buffer in state.module._buffers.values()}
        return [saved.name for saved in self.buffers if id(saved.tensor) not in present]


class _ModuleState(NamedTuple):
    """A module's attributes before a pass, as objects.

    Args:
        module: the module itself.
        training: its mode, which a scripted module keeps elsewhere than among its attributes.
        attributes: name -> object.
        containers: its lists, sets and dicts (of parameters, buffers, children and hooks too), each with a copy.
    """

    module: nn.Module
    training: bool
    attributes: dict[str, Any]
    containers: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleState:
        """Note what a module holds now."""
        attributes = dict(vars(module))
        containers = [(value, value.copy()) for value in attributes.values() if isinstance(value, (list, set, dict))]
        return cls(module, module.training, attributes, containers)

    def restore(self) -> None:
        """Give the module the same objects again, and its containers the same content in the same order."""
        # This runs for every module before and after every pass of a model, and nearly always nothing has changed. So
        # containers are compared in one loop, entry by entry in C, and most of them, those of hooks, are empty.
        for container, content in self.containers:
            if not container and not content:
                continue
            same = len(container) == len(content) and all(map(is_, container, content))
            if same and isinstance(container, dict):
                same = all(map(is_, container.values(), content.values()))
            if not same:
                _refill(container, content)

        own = vars(self.module)
        own.update(self.attributes)
        for name in own.keys() - self.attributes.keys():
            del own[name]
        if self.module.training != self.training:
            self.module.training = self.training


def _refill(container: Any, content: Any) -> None:
    """Give a list, set or dict other content."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


class _SavedTensor(NamedTuple):
    """A tensor of the model before a pass, with a copy if it is not too large."""

    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None


def _save_tensors(named: Iterable[tuple[str, Tensor]], room: int) -> list[_SavedTensor]:
    """Copy tensors as long as there is room, in bytes; the versions of the others tell whether they were changed."""
    saved = []
    for name, t in named:
        # A version is what dense tensors have that hold values and were not made in inference mode.
        if t.layout != torch.strided or t.is_meta or t.is_inference():
            continue
        room -= t.numel() * t.element_size()
        copy = t.detach().clone() if room >= 0 else None
        saved.append(_SavedTensor(name, t, t._version, copy))
    return saved


def _restore_tensors(saved: Iterable[_SavedTensor]) -> tuple[list[str], list[str]]:
    """Give tensors their values again; the names of those that had changed, and of those whose value is lost."""
    changed, lost = [], []
    for name, tensor, version, copy in saved:
        if copy is None:
            if tensor._version != version:
                lost.append(name)
        elif not _identical(tensor, copy):
            with torch.no_grad():
                tensor.detach().copy_(copy)
            changed.append(name)
    return changed, lost


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
    places = []
    for module in model.modules():
        # A parameter may stand in several modules, or under several names of one.
        places += [(module._parameters, name, p) for name, p in module._parameters.items() if id(p) in new]
    try:
        for table, name, p in places:
            table[name] = new[id(p)]
        yield
    finally:
        for table, name, p in places:
            table[name] = p
