"""Inverses and curvatures asked by parameter: tests know the dense answer by parameter name, the library by block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from problems import TinyProblem
from wherefrom import Certificate, Curvature, Directions, Inverse, Problem, records
from wherefrom.methods.influence import GIVEN, saved_classes

ByParameter = dict[str, Tensor]  # parameter name -> (Q, *shape)


@dataclass(frozen=True)
class Solved:
    """Solutions by parameter, with the fields of their certificate beside them."""

    x: ByParameter
    certificate: Certificate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.certificate, name)


def directions(of: Inverse | Curvature, v: Mapping[str, Tensor]) -> Directions:
    """Parameter-shaped tensors as directions of the blocks of an inverse or a curvature."""
    curvature = of.curvature if isinstance(of, Inverse) else of
    return Directions.from_parameters(curvature.problem.blocks, v)


def solve(inverse: Inverse, b: Mapping[str, Tensor], certify: bool = True) -> Solved:
    x, certificate = inverse.solve(directions(inverse, b), certify)
    return Solved(x.to_parameters(), certificate)


def apply(inverse: Inverse, b: Mapping[str, Tensor]) -> ByParameter:
    return inverse.apply(directions(inverse, b)).to_parameters()


def product(curvature: Curvature, v: Mapping[str, Tensor], index: Tensor | None = None) -> ByParameter:
    return curvature.product(directions(curvature, v), index).to_parameters()


def by_block(inverse_or_curvature: Inverse | Curvature, by_parameter: Mapping[str, float]) -> dict[str, float]:
    """A number for each block from one for each parameter; parameters of one block share theirs."""
    of = inverse_or_curvature
    curvature = of.curvature if isinstance(of, Inverse) else of
    return {block.name: by_parameter[next(iter(block.shapes))] for block in curvature.problem.blocks}


def diagonal(inverse: Inverse) -> Tensor:
    """The damping of each coordinate, parameters in the model's order: (D,)."""
    problem = inverse.curvature.problem
    of = {name: inverse.damping[block.name] for block in problem.blocks for name in block.shapes}
    return torch.cat(
        [torch.full((shape.numel(),), of[name], dtype=torch.float64) for name, shape in problem.shapes.items()]
    )


def restore(inverse: Inverse, curvature: Curvature | None = None) -> Any:
    """The inverse as a file gives it back, for a curvature that has fitted nothing yet, or for its own."""
    tensors, description = records.describe(inverse, GIVEN)
    saved = {path: t.clone() for path, t in tensors.items()}
    given = {"curvature": inverse.curvature if curvature is None else curvature, "damping": dict(inverse.damping)}
    return records.rebuild(json.loads(json.dumps(description)), saved, given, saved_classes())


# dense answers --------------------------------------------------------------------------------------------------------


def library(p: TinyProblem, train: object = None, **options: Any) -> Problem:
    """The tiny problem as the library takes it."""
    return Problem(p.model, p.task, p.train if train is None else train, progress=False, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right_hand_sides(p: TinyProblem, Q: int = 3, seed: int = 0) -> Tensor:
    return normal(Q, p.dim, seed=seed)


def dense(matrix: Tensor, damping: float | Tensor, b: Tensor) -> Tensor:
    """(C + diag(damping))^-1 b, for rows b (Q, D)."""
    diagonal = torch.as_tensor(damping, dtype=torch.float64).expand(len(matrix))
    return torch.linalg.solve(matrix + torch.diag(diagonal), b.T).T


def each_ggn(p: TinyProblem) -> Tensor:
    """The GGN of every example alone: (N, D, D)."""
    return torch.einsum("nkd,nkl,nle->nde", p.jacobian(), p.output_hessians(), p.jacobian())


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    """Equal, to a tolerance relative to the length of what is wanted."""
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())
