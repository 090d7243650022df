"""The user's model: checked, converted where that is exact, observed without leaving a trace, and fingerprinted."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from wherefrom.digest import digest
from wherefrom.errors import AttributionWarning, InputError, UnsupportedError, expected
from wherefrom.surroundings import (
    Snapshot,
    alone,
    differentiable,
    eager,
    undisturbed,
    users_device,
    without_fastpath,
)

Select = str | Sequence[str] | Callable[[str], bool] | None
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
FEW = 5  # names that a message lists
BOUND = "wherefrom_row_bound"  # (max_norm, norm_type) of an embedding in a copy


_warned: WeakSet[nn.Module] = WeakSet()
_steady: WeakSet[nn.Module] = WeakSet()  # models whose passes were seen to leave the parameters alone


@contextmanager
def observe_model(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into eval mode without parameter gradients; all is put back afterwards, even after an error.

    Autocast, inference mode and compilers are off meanwhile. Other threads that want the same model, or one that shares
    a module with it, wait.

    Raises:
        UnsupportedError: if the forward pass has changed what cannot be put back.
    """
    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        first = stack.enter_context(alone(model))
        stack.enter_context(users_device())
        stack.enter_context(without_fastpath())
        stack.enter_context(eager())
        if not first:  # this thread observes it already
            yield model
            return
        stack.enter_context(differentiable(model))
        before = Snapshot(model, with_parameters=model not in _steady)
        try:
            model.eval()
            for module in model.modules():
                # Sparse gradients of embeddings lack derivatives that dense ones have.
                if getattr(module, "sparse", None) is True:
                    vars(module)["sparse"] = False
            model.requires_grad_(False)
            yield model
        finally:
            changed, lost, weights = before.restore()
        _report(model, changed, lost, weights)
        _steady.add(model)


def _report(model: nn.Module, changed: list[str], lost: list[str], weights: list[str]) -> None:
    """Say which buffers the forward pass changes.

    Raises:
        UnsupportedError: if one of them could not be put back, or if parameters were changed.
    """
    if weights:
        raise UnsupportedError(
            f"The model's forward pass changes its own parameters: {_names(weights)}. Make it leave them alone unless "
            "self.training."
        )
    if lost:
        raise UnsupportedError(
            f"The model's forward pass changes buffers in eval mode that are too large to be put back: {_names(lost)}. "
            "Make it leave them alone unless self.training."
        )
    if changed and model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"the model's forward pass changes buffers in eval mode ({_names(changed)}): they are put back after each "
            "pass.",
            AttributionWarning,
            stacklevel=4,
        )


def _names(names: Sequence[str]) -> str:
    """List the first few names, and say how many more there are."""
    more = [f"and {len(names) - FEW} more"] if len(names) > FEW else []
    return ", ".join([*names[:FEW], *more])


def fingerprint(model: nn.Module) -> str:
    """Hash the model's parameters and buffers, names and values."""
    with undisturbed(), alone(model):
        return digest(model.state_dict())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters that require gradients, by name; when no other thread observes the model."""
    with alone(model):
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


def in_training_with(model: nn.Module, kind: str) -> bool:
    """Whether a module with this word in its type's name is in training mode."""
    with alone(model):
        return any(m.training and kind in type(m).__name__ for m in model.modules())


def prepare_model(model: nn.Module) -> nn.Module:
    """Take the model itself out of its wrappers, or a copy where its own tensors cannot be used.

    Copies: of a half-precision model in float32; of one that was made in inference mode; of one whose embeddings
    renormalise themselves (``max_norm``), with that done once.

    Raises:
        InputError: no module, several devices or dtypes, non-finite or missing weights, a scripted module.
    """
    if not isinstance(model, nn.Module):
        raise expected("model", "a torch.nn.Module", type(model).__name__)
    with undisturbed(), alone(model):
        return _prepare_unwrapped(unwrap_model(model))


def _prepare_unwrapped(model: nn.Module) -> nn.Module:
    """Do what `prepare_model` does with a model that has no wrappers and that no other thread observes."""
    _refuse_scripts(model)
    _refuse_values(dict(model.named_parameters()))
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_inference() for t in tensors):
        _warn("the model was made in inference mode: a copy outside of it is used.")
        model = copy_model(model)

    embeddings = [module for module in model.modules() if isinstance(module, EMBEDDINGS)]
    if any(module.max_norm is not None for module in embeddings):
        _warn("embeddings with max_norm change their weights in every pass: a copy with all rows in bounds is used.")
        model = copy_model(model)
    _bound_rows(model)

    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes & {torch.float16, torch.bfloat16} and torch.float64 not in dtypes:
        _warn("the model is in half precision: a float32 copy is used (the conversion is exact).")
        return copy_model(model).float()
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise expected(
            "the model's parameters",
            "all float32 or all float64",
            sorted(map(str, dtypes)),
            "Convert it with model.float().",
        )
    return model


def _warn(message: str) -> None:
    warnings.warn(message, AttributionWarning, stacklevel=5)


def _refuse_values(named: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that are missing, scattered, complex or not finite."""
    missing = [name for name, p in named.items() if isinstance(p, UninitializedParameter) or p.is_meta]
    if missing:
        raise expected("the model's weights", "there", f"none yet in {_names(missing)}", "Run the model, or load them.")

    devices = {p.device for p in named.values()}
    if len(devices) > 1:
        raise expected(
            "the model's parameters", "on one device", sorted(map(str, devices)), "Move it with model.to(device)."
        )

    complex_names = [name for name, p in named.items() if p.is_complex() and p.requires_grad]
    if complex_names:
        raise expected(
            "the model's parameters", "real numbers", f"complex ones in {_names(complex_names)}", "Freeze them."
        )

    real = {name: p.detach() for name, p in named.items() if p.is_floating_point()}
    not_finite = [name for name, p in real.items() if not p.isfinite().all()]
    if not_finite:
        raise InputError(
            f"the model's weights must be finite, got NaN or infinity in {', '.join(not_finite[:FEW])}. Train it again."
        )


def _refuse_scripts(model: nn.Module) -> None:
    """Refuse scripted and traced modules: they call no hooks, and take no other tensors for their parameters."""
    for name, module in model.named_modules():
        trains = any(p.requires_grad for p in module.parameters())
        if isinstance(module, torch.jit.ScriptModule) and (trains or module is model):
            raise expected(
                "model",
                "a module in Python",
                f"a scripted or traced one ({name or 'the model itself'})",
                "Build the module that it was made from, and load its weights: "
                "module.load_state_dict(scripted.state_dict()).",
            )


def unwrap_model(model: nn.Module) -> nn.Module:
    """Take the model as it was written: without the wrappers of `torch.compile` and of data parallelism.

    Its parameters have the names of the plain model, and are the same objects. A module that holds wrapped ones is a
    copy of its outermost layer only: parameters and buffers are shared.
    """
    return _unwrap(model, {})


def _unwrap(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    # A module may be shared: all its places get the same one.
    if id(module) not in known:
        inner = _wrapped_module(module)
        if inner is not None:
            if module._forward_hooks or module._forward_pre_hooks:
                raise UnsupportedError(
                    f"The model is taken out of its wrapper ({type(module).__name__}), which has forward hooks of its "
                    "own. Register them on the module inside."
                )
            known[id(module)] = _unwrap(inner, known)
        else:
            children = {name: child and _unwrap(child, known) for name, child in module._modules.items()}
            holds_no_wrapper = all(child is module._modules[name] for name, child in children.items())
            known[id(module)] = module if holds_no_wrapper else _with_children(module, children)
    return known[id(module)]


def _wrapped_module(module: nn.Module) -> nn.Module | None:
    """Find what a wrapper holds; None of any other module."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    if type(module).__name__ == "OptimizedModule":  # of torch.compile, which is not imported for this
        return module._modules.get("_orig_mod")
    return None


def _with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """Make a module of the same type with the same attributes, parameters and buffers, and other children."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["_modules"] = dict(children)
    return twin


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a state_dict the names of the plain model, where it is one of a compiled or data-parallel model."""
    plain = {name.replace("_orig_mod.", ""): t for name, t in state.items()}
    if plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): t for name, t in plain.items()}
    return plain


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model so that no memory is shared.

    Attributes that autograd has computed, such as the weight of a pruned or old-style weight-normed layer, are copied
    as plain tensors: the layer computes them again in its next forward pass. `copy.deepcopy` refuses them.
    """
    memo: dict[int, Any] = {}
    with undisturbed(), alone(model):
        for module in model.modules():
            for t in _find_tensors(list(vars(module).values())):
                if not t.is_leaf or t.is_inference():
                    memo[id(t)] = _copy_leaf(t)
        return copy.deepcopy(model, memo)


def _find_tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors in an attribute of a module, also in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        parts = value.values() if isinstance(value, Mapping) else value
        for part in parts:
            yield from _find_tensors(part)


def _copy_leaf(t: Tensor) -> Tensor:
    """Copy a tensor outside of autograd and of inference mode; a parameter stays one."""
    fresh = t.detach().clone()
    return nn.Parameter(fresh, t.requires_grad) if isinstance(t, nn.Parameter) else fresh


def _bound_rows(model: nn.Module) -> None:
    """Do once what embeddings with max_norm do in every pass: bound the length of each row.

    The bound is kept beside the layer, for weights that are loaded into a copy later.
    """
    for module in model.modules():
        if not isinstance(module, EMBEDDINGS):
            continue
        if module.max_norm is not None:
            vars(module)[BOUND] = (module.max_norm, module.norm_type)
            module.max_norm = None
        if BOUND in vars(module):
            all_rows = torch.arange(len(module.weight), device=module.weight.device)
            max_norm, norm_type = vars(module)[BOUND]
            with torch.no_grad():
                torch.embedding_renorm_(module.weight.detach(), all_rows, max_norm, norm_type)


def parameter_filter(select: Select) -> Callable[[str], bool]:
    """Turn the selection into a predicate on parameter names."""
    if select is None:
        return lambda _: True
    if callable(select):
        return select
    expressions = [select] if isinstance(select, str) else select
    patterns = [re.compile(expression) for expression in expressions]
    return lambda name: any(p.search(name) for p in patterns)
