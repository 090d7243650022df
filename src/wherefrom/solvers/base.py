"""The contract of a solver and of the inverse it fits.

A `Solver` is a frozen record of hyper-parameters under the paper's symbols. Its ``fit`` does all the work that needs no
right-hand side and returns an `Inverse`, a frozen record too: a curvature, the damping of each block, and tensors. Two
inverses of the same fields give the same answers, whatever was fitted before, and an inverse is saved and restored by
its fields alone (`wherefrom.records`).
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping
from wherefrom.errors import ConvergenceWarning, DivergenceError, UnsupportedError, expected
from wherefrom.persample.directions import Directions
from wherefrom.persample.eigenbasis import KroneckerBlock
from wherefrom.persample.gradients import Gradients
from wherefrom.scores import Certificate
from wherefrom.surroundings import undisturb, undisturbed


@dataclass(frozen=True, eq=False)
class Iterates:
    """What an iteration found.

    Args:
        x: the solutions.
        history: relative residuals as the method saw them, (steps + 1, Q); None for methods that do not iterate.
        passes: passes over the training data spent.
    """

    x: Directions
    history: Tensor | None = None
    passes: float = 0.0


@dataclass(frozen=True, eq=False)
class Inverse(ABC):
    """(C + damping)^-1, or an approximation of it, ready for any right-hand side.

    Args:
        curvature: C.
        damping: lambda of each block, by its name.
    """

    curvature: Curvature
    damping: Mapping[str, float]

    # Whether it answers for an approximation of C, so that its residual with the true C says little.
    is_approximate: ClassVar[bool] = False
    # Whether it is symmetric positive definite, so that it may precondition conjugate gradients.
    is_positive_definite: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "apply", "iterate", "solve", "apply_function", "self_influence")

    @property
    def tolerance(self) -> float | None:
        """The relative residual at which a query has converged; None for methods that have none."""
        return None

    @abstractmethod
    def apply(self, b: Directions) -> Directions:
        """Return x for all Q right-hand sides, without a certificate; linear in b for direct methods."""

    def iterate(self, b: Directions) -> Iterates:
        """Return x with its history and cost; methods that iterate define this one."""
        return Iterates(self.apply(b))

    @undisturbed()
    def solve(self, b: Directions, certify: bool = True) -> tuple[Directions, Certificate]:
        """Solve for Q right-hand sides together, and say how good the solutions are.

        Queries that miss the tolerance are named in a `ConvergenceWarning`.

        Args:
            b: Q right-hand sides.
            certify: measure the residual with the true operator, one pass over the training data.

        Returns:
            x with (C + damping) x ~ b, and its certificate.

        Raises:
            DivergenceError: if x is not finite, or the method meets what it cannot invert.
        """
        start = time.perf_counter()
        b = b.dense() if certify else b  # the residual needs it written out in any case
        iterates = self.iterate(b)
        x, history, passes = iterates.x, iterates.history, iterates.passes
        # An iteration may leave a query at 0 whose right-hand side is not finite.
        self._check_finite(x.is_finite() if history is None else x.is_finite() & b.is_finite())

        residual = None
        if certify:
            x = x.dense()
            residual, passes = relative_norm(self.residual_vector(x, b), b), passes + 1
        reached = residual
        if reached is None and history is not None:
            reached = history[-1]

        converged = torch.ones(len(b), dtype=torch.bool, device=b.device)
        if self.tolerance is not None and reached is not None:
            converged = reached <= self.tolerance
            warn_unconverged(converged, "queries", self.tolerance)
        certificate = Certificate(
            residual,
            converged,
            0 if history is None else len(history) - 1,
            torch.empty(0, len(b)) if history is None else history,
            passes,
            time.perf_counter() - start,
        )
        return x, certificate

    def _check_finite(self, finite: Tensor) -> None:
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise DivergenceError(
                f"{type(self).__name__} gave NaN or infinity for queries {bad[:10]}. Expected finite solutions: "
                "raise the damping, or lower the step size of a stochastic solver."
            )

    def apply_function(self, phi: Callable[[Tensor], Tensor], b: Directions) -> Directions:  # noqa: ARG002
        """Return phi(C) b for a function phi of the eigenvalues of C, without damping.

        Raises:
            UnsupportedError: by methods that hold no eigenvalues of C in every direction.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has no eigenvalues to apply a function to. Take EKFAC() or Exact()."
        )

    def residual_vector(self, x: Directions, b: Directions) -> Directions:
        """Return b - (C + damping) x with the true operator on all the data."""
        x = x.dense()
        image = self.curvature.product(x).axpy(self.damping, x)
        return b.axpy(-1.0, image)

    def self_influence(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return g^T (C + damping)^-1 g of each of n gradients, and which solves converged: (n,), (n,)."""
        g = rows.dense()
        with warnings.catch_warnings():  # the caller knows the examples' numbers
            warnings.simplefilter("ignore", ConvergenceWarning)
            x, certificate = self.solve(g, certify=False)
        return g.dot(x), certificate.converged

    @property
    def has_functions(self) -> bool:
        """Whether `apply_function` can be asked: whether there is an eigenvalue of C for every direction."""
        return type(self).apply_function is not Inverse.apply_function

    @property
    def scoring_basis(self) -> Mapping[str, KroneckerBlock]:
        """The eigenbases in which this inverse is a division, by block; there right-hand sides are best given to it."""
        return {}

    def eigenvalues(self, name: str) -> Tensor:
        """Return the eigenvalues of C that stand for a block in its scoring basis, (G, O, I)."""
        raise KeyError(name)

    def report(self) -> dict[str, float | str]:
        """Return what the fit chose for the user, by name: step sizes, ranks, what was dropped."""
        return {}


@dataclass(frozen=True)
class Solver(ABC):
    """A frozen record of hyper-parameters that fits an `Inverse` to a curvature. Solvers nest."""

    needs: ClassVar[Need] = Need.MATVEC

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "fit")

    @abstractmethod
    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Do the work that needs no right-hand side."""

    def share(self, inverse: Inverse) -> None:  # noqa: B027
        """Put what a restored inverse knows of its curvature where fits at other dampings look for it."""

    def check(self, curvature: Curvature) -> None:
        """Raise UnsupportedError, before any pass over the data, if the curvature cannot give what the solver needs."""
        if self.needs not in curvature.offers:
            kind = type(curvature).__name__
            others = " or ".join(name for name in ("GGN", "EmpiricalFisher") if name != kind)
            raise UnsupportedError(
                f"{type(self).__name__} needs {self.needs.value}, which {kind} cannot give "
                f"(it offers {', '.join(sorted(n.value for n in curvature.offers))}). Take {others}, or CG."
            )


def warn_unconverged(converged: Tensor, what: str, tolerance: float) -> None:
    """Name what did not reach the tolerance, and the knobs to turn, in one `ConvergenceWarning`."""
    late = (~converged).nonzero().flatten().tolist()
    if late:
        warnings.warn(
            f"{len(late)} of {len(converged)} {what} did not converge: residual above {tolerance:g} for {what} "
            f"{late[:10]}{'...' if len(late) > 10 else ''}. Allow more steps, take a better "
            "preconditioner, loosen the tolerance or raise the damping.",
            ConvergenceWarning,
            stacklevel=4,
        )


def relative_norm(r: Directions, b: Directions) -> Tensor:
    """Return |r| / |b| of each right-hand side, (Q,); 0 where both vanish."""
    return r.norm() / b.norm().clamp(min=1e-300)


def with_seed(solver: Solver, seed: int) -> Solver:
    """Return the same solver, and those nested in it, with this seed."""
    changes: dict[str, Any] = {}
    for f in fields(solver):
        value = getattr(solver, f.name)
        if f.name == "seed":
            changes["seed"] = seed
        elif isinstance(value, Solver):
            changes[f.name] = with_seed(value, seed)
    return replace(solver, **changes)


def require_solvers(**solvers: object) -> None:
    """Raise InputError for a nested solver that is not an instance of one."""
    for name, solver in solvers.items():
        if not isinstance(solver, Solver):
            raise expected(name, "an instance such as wherefrom.EKFAC()", repr(solver))


def require_positive(**values: float | None) -> None:
    """Raise InputError for a hyper-parameter that is given but not positive."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise expected(name, "positive", value)


def require_tensor(name: str, t: object, *shape: int | None, dtype: torch.dtype | None = None) -> None:
    """Raise InputError for a field of an inverse that is no tensor of this shape and kind.

    Args:
        name: of the field.
        t: the field.
        shape: its shape; None stands for any size.
        dtype: of its numbers; None: floats of any kind.
    """
    if not isinstance(t, Tensor):
        raise expected(f"{name} of a fit", "a tensor", type(t).__name__)
    sizes_fit = len(shape) == t.ndim and all(want in (None, size) for want, size in zip(shape, t.shape, strict=True))
    if not sizes_fit:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise expected(f"{name} of a fit", f"of shape ({sizes})", tuple(t.shape))
    if t.dtype != dtype if dtype is not None else not t.is_floating_point():
        raise expected(f"{name} of a fit", f"of {dtype or 'floats'}", t.dtype)


def parameter_count(curvature: Curvature) -> int:
    """Count the attributed parameters, D."""
    return sum(block.size for block in curvature.problem.blocks)
