"""The contract of a solver, of the inverse it fits, and of a solution with its certificate."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import Damping, Shift
from wherefrom.curvature.kronecker import KroneckerBlock
from wherefrom.errors import ConvergenceWarning, DivergenceError, UnsupportedError, expected
from wherefrom.persample import lowrank, vectors
from wherefrom.persample.gradients import Block, Gradients, pack
from wherefrom.persample.lowrank import Directions, LowRank
from wherefrom.persample.rows import Rows
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import undisturb, undisturbed


@dataclass(frozen=True)
class Solution:
    """x with (C + damping) x ~ b, and how good it is.

    Args:
        x: the solution, (Q, ...) per parameter.
        residual: |(C + damping) x - b| / |b| per query, with the true operator on all the data, (Q,); None if not
            certified.
        converged: whether a query met the solver's tolerance, (Q,); True where the method has none.
        steps: iterations made.
        history: relative residuals as the method saw them, (steps + 1, Q); empty for methods that do not iterate.
        passes: passes over the training data spent, certificate included.
        seconds: wall time of the solve, certificate included.
        predicted: the error |x - x*| / |x| that the method's own theory expects, (Q,); None where it has none.
    """

    x: Vectors
    residual: Tensor | None
    converged: Tensor
    steps: int = 0
    history: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    passes: float = 0.0
    seconds: float = 0.0
    predicted: Tensor | None = None

    def __str__(self) -> str:
        """A short table: a line on the whole, and one for each of the ten worst queries."""
        residual = self.residual if self.residual is not None else torch.full(self.converged.shape, float("nan"))
        lines = [
            f"{len(residual)} right-hand sides, {self.steps} steps, {self.passes:.1f} passes, {self.seconds:.1f} s, "
            + ("not certified, " if self.residual is None else f"worst residual {float(residual.max()):.1e}, ")
            + f"{int(self.converged.sum())} converged",
            "query   residual  converged" + ("  predicted error" if self.predicted is not None else ""),
        ]
        for q in residual.nan_to_num(0.0).sort(descending=True, stable=True).indices[:10].tolist():
            found = "        -" if self.residual is None else f"{float(residual[q]):9.1e}"
            said = f"  {float(self.predicted[q]):15.1e}" if self.predicted is not None else ""
            lines.append(f"{q:5d}  {found}  {'yes' if self.converged[q] else 'no':>9}{said}")
        return "\n".join(lines + (["..."] if len(residual) > 10 else []))


@dataclass(frozen=True)
class Pairing:
    """Scores without solutions: ``mix @`` the inner products of p directions with training gradients.

    Args:
        packed: p directions as matrices, block name to (p, G, O, I), or to their products of low rank.
        bases: block name to the eigenbasis that its directions are in; blocks without one are as the parameters are.
        mix: (Q, p), if scores are combinations of what the p directions give; None: p = Q and they are the scores.
        unit: divide by the lengths of the training gradients.
    """

    packed: Mapping[str, Directions]
    bases: Mapping[str, KroneckerBlock] = field(default_factory=dict)
    mix: Tensor | None = None
    unit: bool = False

    @classmethod
    def of(cls, x: Vectors, blocks: Sequence[Block], unit: bool = False) -> Pairing:
        """From Q solutions as parameter-shaped vectors."""
        return cls(pack(blocks, x), unit=unit)

    @classmethod
    def joined(cls, parts: Sequence[Pairing]) -> Pairing:
        """Those of several sets of queries as one; mix and unit are taken from the first."""
        if len(parts) == 1:  # nothing is copied
            return parts[0]
        bases = {name: b for name, b in parts[0].bases.items() if all(name in p.bases for p in parts)}
        packed = {
            name: lowrank.concatenate([p.packed[name] if name in bases else p._out(name) for p in parts])
            for name in parts[0].packed
        }
        return replace(parts[0], packed=packed, bases=bases)

    def __call__(self, g: Gradients) -> Tensor:
        """Scores of n examples' gradients, R = 1: (Q, n)."""
        first, *others = (self._part(name, rows) for name, rows in g.rows.items())
        found = self._mixed(sum(others, first))
        return found / g.square_norms().sum(1).sqrt().clamp(min=1e-30) if self.unit else found

    def by_block(self, g: Gradients) -> dict[str, Tensor]:
        """The same, block by block: they sum to the scores."""
        return {name: self._mixed(self._part(name, rows)) for name, rows in g.rows.items()}

    def truncated(self, rank: float, factors: Mapping[str, KroneckerBlock]) -> tuple[Pairing, Tensor]:
        """The same by one direction of low rank for each query, out of its basis: that costs less than turning rows.

        What is kept is what matters to scores: V_r minimises the mean square of <V - V_r, W> over rows W whose second
        moment is that of KFAC, S x A, so that S^1/2 (V - V_r) A^1/2 is what a singular value decomposition makes small.

        Args:
            rank: see `wherefrom.persample.lowrank.truncated`.
            factors: block name to the Kronecker factors of the gradients that will be scored, in the same bases.

        Returns:
            The pairing; energies |S^1/2 V A^1/2|^2 over all blocks of what is dropped and of all, (2, Q) float64.
        """
        packed, energies = {}, []
        for name, v in self.packed.items():
            f, v = factors[name], lowrank.written(v)
            v = v if self.mix is None else torch.tensordot(self.mix.to(v), v, 1)
            v = v if name in self.bases else f.rotate(v)
            left, right = (t.to(v) for t in f.roots())
            low, dropped = lowrank.truncated(left * v * right, rank)
            energies.append(torch.stack([dropped, (left * v * right).flatten(1).norm(dim=1, dtype=torch.float64) ** 2]))
            if isinstance(low, LowRank):
                packed[name] = _back(LowRank(low.left / left, low.right / right), f)
            else:
                packed[name] = f.back(v)
        return replace(self, packed=packed, bases={}, mix=None), torch.stack(energies).sum(0)

    def _out(self, name: str) -> Directions:
        """A block's directions as the parameters are."""
        v = self.packed[name]
        return self.bases[name].back(lowrank.written(v)) if name in self.bases else v

    def _part(self, name: str, rows: Rows) -> Tensor:
        rows = self.bases[name].rotated(rows) if name in self.bases else rows
        return lowrank.dot(self.packed[name], rows)[..., 0]

    def _mixed(self, found: Tensor) -> Tensor:
        return found if self.mix is None else self.mix.to(found) @ found


def _back(v: LowRank, basis: KroneckerBlock) -> LowRank:
    """Directions of low rank out of an eigenbasis."""
    left = basis.left.back(v.left.mT.transpose(0, 1)).transpose(0, 1).mT
    return LowRank(left, basis.right.back(v.right.transpose(0, 1)).transpose(0, 1))


class Inverse(ABC):
    """(C + damping I)^-1, or an approximation of it, ready for any right-hand side."""

    tolerance: float | None = None
    approximate: bool = False  # whether it answers for an approximation of C, so that its residual says little

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "apply", "solve", "function", "quadratic", "pairing")

    def __init__(self, curvature: Curvature, shift: Shift):
        self.curvature, self.shift = curvature, shift

    @abstractmethod
    def apply(self, b: Vectors) -> Vectors:
        """x for all Q right-hand sides, without a certificate; linear in b for direct methods."""

    def solve(self, b: Vectors) -> tuple[Vectors, Tensor, float]:
        """x, its history (steps + 1, Q) and the passes spent; methods that iterate define this one."""
        return self.apply(b), torch.empty(0, vectors.count(b)), 0.0

    @undisturbed()
    def __call__(self, b: Vectors, certify: bool = True) -> Solution:
        """Solve for Q right-hand sides together; queries that miss the tolerance are named in a warning.

        Args:
            b: (Q, *param.shape) per parameter.
            certify: measure the residual with the true operator, one pass over the training data.

        Raises:
            DivergenceError: if x is not finite, or the method meets what it cannot invert.
        """
        start = time.perf_counter()
        x, history, passes = self.solve(b)
        size = vectors.norm(x) + vectors.norm(b)  # a query of NaN, and those that some methods leave at 0 then
        if not size.isfinite().all():
            bad = (~size.isfinite()).nonzero().flatten().tolist()
            raise DivergenceError(
                f"{type(self).__name__} gave NaN or infinity for queries {bad[:10]}. Expected finite solutions: "
                "raise the "
                "damping, or lower the step size of a stochastic solver."
            )
        residual, converged = None, torch.ones(len(size), dtype=torch.bool, device=size.device)
        if certify:
            residual, passes = relative(self.residual_vector(x, b), b), passes + 1
        final = residual if residual is not None else (history[-1] if len(history) else None)
        if self.tolerance is not None and final is not None:
            converged = final <= self.tolerance
            warn_unconverged(converged, "queries", self.tolerance)
        seconds = time.perf_counter() - start
        return Solution(x, residual, converged, max(0, len(history) - 1), history, passes, seconds)

    def function(self, phi: Callable[[Tensor], Tensor], b: Vectors) -> Vectors:  # noqa: ARG002
        """phi(C) b for a function phi of the eigenvalues of C, without damping: x of the shapes of b.

        Raises:
            UnsupportedError: by methods that hold no eigenvalues of C in every direction.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has no eigenvalues to apply a function to. Take EKFAC() or Exact()."
        )

    def residual_vector(self, x: Vectors, b: Vectors) -> Vectors:
        """b - (C + damping) x with the true operator on all the data."""
        cx = self.curvature.product(x)
        return {name: b[name] - cx[name] - self.shift[name] * x[name] for name in b}

    def quadratic(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Self-influence g^T (C + damping)^-1 g of each of n gradients, and which solves converged: (n,), (n,)."""
        g = rows.dense()
        with warnings.catch_warnings():  # the caller knows the examples' numbers
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = self(g, certify=False)
        return vectors.dot(g, solution.x), solution.converged

    def pairing(self, rows: Gradients) -> Pairing | None:  # noqa: ARG002
        """A shorter way to the scores of Q queries' rows, which needs no x; None where there is none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What is saved; `Solver.restore` takes it back."""
        return {}

    def report(self) -> dict[str, float | str]:
        """What the fit chose for the user, by name: step sizes, ranks, what was dropped."""
        return {}


@dataclass(frozen=True)
class Solver(ABC):
    """A frozen record of hyper-parameters that fits an `Inverse` to a curvature. Solvers nest."""

    needs: ClassVar[Need] = Need.MATVEC

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        undisturb(cls, "fit", "restore")

    @abstractmethod
    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """The work that needs no right-hand side."""

    @abstractmethod
    def restore(self, curvature: Curvature, shift: Shift, state: dict[str, Tensor]) -> Inverse:
        """The inverse from its resolved damping and what `Inverse.state` saved."""

    def check(self, curvature: Curvature) -> None:
        """Raise UnsupportedError, before any pass over the data, if the curvature cannot give what the solver needs."""
        if self.needs not in curvature.offers:
            kind = type(curvature).__name__
            others = " or ".join(name for name in ("GGN", "EmpiricalFisher") if name != kind)
            raise UnsupportedError(
                f"{type(self).__name__} needs {self.needs.value}, which {kind} cannot give "
                f"(it offers {', '.join(sorted(n.value for n in curvature.offers))}). Take {others}, or CG."
            )


def saved_tensor(
    state: Mapping[str, Tensor], name: str, *shape: int | None, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of a saved state.

    Args:
        state: what `Inverse.state` gave.
        name: of the tensor.
        shape: its shape; None stands for any size.
        dtype: of its numbers; None: floats of any kind.

    Raises:
        InputError: if it is missing, or of another shape or dtype.
    """
    if name not in state:
        raise expected("a saved fit", f"one with {name}", "none")
    t = state[name]
    if t.ndim != len(shape) or any(size not in (None, found) for size, found in zip(shape, t.shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise expected(f"{name} of a saved fit", f"of shape ({sizes})", tuple(t.shape))
    if t.dtype != dtype if dtype is not None else not t.is_floating_point():
        raise expected(f"{name} of a saved fit", f"of {dtype or 'floats'}", t.dtype)
    return t


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


def relative(r: Vectors, b: Vectors) -> Tensor:
    """|r| / |b| per right-hand side; 0 where both vanish."""
    return vectors.norm(r) / vectors.norm(b).clamp(min=1e-300)


def seeded(solver: Solver, seed: int) -> Solver:
    """The same solver, and those nested in it, with this seed."""
    changes: dict[str, Any] = {}
    for f in fields(solver):
        value = getattr(solver, f.name)
        if f.name == "seed":
            changes["seed"] = seed
        elif isinstance(value, Solver):
            changes[f.name] = seeded(value, seed)
    return replace(solver, **changes)


def instance(**solvers: object) -> None:
    """Raise InputError for a nested solver that is not an instance of one."""
    for name, solver in solvers.items():
        if not isinstance(solver, Solver):
            raise expected(name, "an instance such as wherefrom.EKFAC()", repr(solver))


def positive(**values: float | None) -> None:
    """Raise InputError for a hyper-parameter that is given but not positive."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise expected(name, "positive", value)
