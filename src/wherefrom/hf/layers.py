"""Layers of transformers that are no torch modules: the transposed Conv1D of GPT-2, and mixtures of experts.

Importing this registers them. What else its models are made of is covered by the entries of
`wherefrom.persample.layers`: routers give their weight to F.linear, every RMSNorm and DoRA's magnitudes are vectors
that scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp, vmap

from wherefrom.errors import MissingExtraError
from wherefrom.persample.layers import FINDERS, Arguments, LinearKind, Unfactorable, columns, register
from wherefrom.persample.rows import Scattered

try:
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    message = 'This needs transformers, which is not installed. Run: pip install "wherefrom[hf]"'
    raise MissingExtraError(message) from error


class Conv1DKind(LinearKind):
    """y = x W + b, the weight kept as (I, O)."""

    transposed = True

    def matrix(self, layer: Any) -> tuple[int, int]:
        """See the weight as one group of all outputs."""
        return 1, layer.weight.shape[1]


class ExpertsKind:
    """Experts kept as one 3-D parameter for each of two layers: each expert is a group with the tokens routed to it.

        y[t] = sum_k w[t, k] (D_e phi(U_e x[t])),     e = index[t, k]

    Called as transformers calls them, with (x, index, w). The activations inside are computed again, so any
    implementation of the forward pass is covered.

    Args:
        up: whether this is the first layer, U, or the second, D.
        transposed: whether the weights are kept as (E, I, O).
    """

    whole = True

    def __init__(self, up: bool, transposed: bool):
        self.up, self.transposed = up, transposed

    def matrix(self, layer: Any) -> tuple[int, int]:
        """See the weights as a group for each expert."""
        first, second = _weight_names(layer)
        weight = getattr(layer, first if self.up else second)
        output_axis = 2 if self.transposed else 1
        return weight.shape[0], weight.shape[output_axis]

    def rows(
        self, layer: Any, x: Tensor, g: Tensor, parts: Sequence[str], arguments: Arguments | None = None
    ) -> Scattered:
        """Make an input and the cotangents of an output for each token and each expert that it is routed to."""
        routing = [*arguments[0], *arguments[1].values()][1:] if arguments else []
        if x.ndim != 2 or len(routing) != 2 or len(routing[0]) != len(x) or routing[0].shape != routing[1].shape:
            raise Unfactorable("", "is not called with tokens, the numbers of their experts, and weights")
        index, weights = (t.detach() for t in routing)  # (tokens, K) each

        # Every token is routed to K experts: P = tokens * K pairs, sorted by expert, so that each expert runs once.
        expert, order = index.flatten().sort(stable=True)  # (P,)
        token = order // index.shape[1]
        sizes = expert.bincount(minlength=layer.num_experts).tolist()
        # The output of a token is the weighted sum of its experts', so their cotangents are its own times the weights.
        g = g[:, token] * weights.flatten()[order].to(g.dtype).unsqueeze(1)  # (R, P, O), at the outputs of D

        inputs: list[Tensor] = []
        cotangents: list[Tensor] = []
        parts_of_experts = zip(x[token].split(sizes), g.split(sizes, 1), strict=True)
        for e, (own_x, own_g) in enumerate(parts_of_experts):
            activations, pull_back = self._run_expert(layer, e, own_x)
            if self.up:
                inputs.append(own_x)
                cotangents.append(pull_back(own_g))
            else:
                inputs.append(activations)
                cotangents.append(own_g)
        return Scattered(
            columns(torch.cat(inputs), parts), torch.cat(cotangents, 1), expert, token, layer.num_experts, len(index)
        )

    def _run_expert(self, layer: Any, e: int, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Compute phi(U_e x), and a function from cotangents (R, P, O) at the outputs of D_e to those of U_e."""
        first, second = _weight_names(layer)
        up, down = getattr(layer, first)[e].detach(), getattr(layer, second)[e].detach()
        if self.transposed:  # kept as (I, O)
            up, down = up.mT, down.mT
        bias = getattr(layer, f"{first}_bias")[e].detach() if layer.has_bias else None
        phi = layer._apply_gate if layer.has_gate else layer.act_fn
        activations, pull_back = vjp(phi, F.linear(x, up, bias))[:2]
        return activations, lambda g: vmap(pull_back)(g @ down)[0]


def _weight_names(layer: Any) -> tuple[str, str]:
    return "gate_up_proj" if layer.has_gate else "up_proj", "down_proj"


def _experts(layer: Any, part: str) -> ExpertsKind | None:
    """Find the rule of a layer of experts, known by what transformers gives to all of them."""
    attributes = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")
    is_layer_of_experts = all(hasattr(layer, name) for name in attributes)
    # A norm after each expert is no part of the formula above.
    if not is_layer_of_experts or getattr(layer, "has_post_expert_norm", False):
        return None
    first, second = _weight_names(layer)
    which = part.removesuffix("_bias")
    if which not in (first, second):
        return None
    return ExpertsKind(which == first, layer.is_transposed)


register(Conv1D, Conv1DKind())
FINDERS.append(_experts)
