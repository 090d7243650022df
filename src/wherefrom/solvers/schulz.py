"""Schulz's iteration for the inverse of a symmetric positive definite matrix, with a start that always converges.

    X <- X (I + R),    R = I - A X,    so that R <- R^2                              (HyperINF eq. 7, theorem C.1)

If all eigenvalues of A lie between ``lower`` (the damping) and U, the start X_0 = 2 / (lower + U) I puts those of R_0
between -rho and rho, rho = (U - lower) / (U + lower) < 1, and the number of steps is known before the first one:

    |R_t|_F <= sqrt(d) rho^(2^t) <= tolerance    from    t = ceil(log2(ln(tolerance / sqrt(d)) / ln(rho))).

U is the least of the largest row sum, the Frobenius norm and the trace. Differs from the paper, which starts from
5e-4 I whatever the matrix is: that explodes beyond an eigenvalue of 4000, and is slow below.

In floating point |R| ends at about eps times the condition number of A, as with Cholesky's factorisation. X is left as
it comes, symmetric but for rounding: making it exactly so after each step spoils R <- R^2, and |R| then ends at eps
times the square of the condition number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.errors import DivergenceError, expected

CERTAIN = 0.5  # residual below which convergence is certain, rounding included
MAX_STEPS = 100  # steps, where none are given: it stops by itself long before
GROWTH = 1.01  # a residual that grows by more than this in a step does not come back: some eigenvalue of R exceeds 1


@dataclass(frozen=True)
class Schulz:
    """An inverse and how it was reached.

    Args:
        x: the inverse, (..., d, d) float64, symmetric but for rounding; ``x @ b`` has the small residual.
        residuals: Frobenius norms of I - A X before each step and after the last, (steps + 1, ...) float64; those of
            steps in float32 are measured in float32.
    """

    x: Tensor
    residuals: Tensor

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.residuals) - 1


def schulz(
    A: Tensor,
    lower: float,
    tolerance: float = 1e-10,
    start: float | Tensor | None = None,
    steps: int | None = None,
    order: int = 2,
    mixed: bool = True,
) -> Schulz:
    """Invert symmetric positive definite matrices by matrix products alone.

    Args:
        A: (..., d, d), any floating dtype; worked on in float64.
        lower: positive lower bound of all eigenvalues, such as the damping. One that is too large costs steps, not
            convergence.
        tolerance: Frobenius norm of I - A X at which to stop. Float64 may not reach it, see the module: the iteration
            then stops where rounding ends it, and the residuals say where.
        start: X_0: a tensor, a number c for c I, or None for the one that always converges. It converges if all
            eigenvalues of I - A X_0 are below 1 in size, so c must be below 2 / (largest eigenvalue of A).
        steps: most steps; None stops at the tolerance, or where rounding lets the residual shrink no further.
        order: p of the hyperpower family, X (I + R + ... + R^(p-1)): p matrix products a step, R <- R^p (eq. 6).
        mixed: without a start of one's own, make all but the last steps in float32, at half the cost. As R is squared
            in each step, one to three steps in float64 then suffice; where float32 cannot follow, all are in float64.

    Raises:
        DivergenceError: if the residual grows.
        InputError: if A is not square and symmetric, or a bound, order or number of steps is out of range.
    """
    A = _to_symmetric(A)
    for name, value in (("lower", lower), ("tolerance", tolerance)):
        if not value > 0:
            raise expected(name, "positive", value)
    if order < 2 or (steps is not None and steps < 1):
        raise expected("order and steps", "at least 2 and 1", f"{order} and {steps}")
    max_steps = MAX_STEPS if steps is None else steps
    upper = upper_bound(A)
    largest = float(upper.max())

    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    residuals: list[Tensor] = []  # of steps in float32
    if isinstance(start, Tensor):
        first = start.to(A).expand_as(A)
    elif start is not None:
        first = (start * eye).expand_as(A)
    else:
        first = (2 / (lower + upper))[..., None, None] * eye
        # Where eps times the condition number nears 1, float32 cannot tell the matrix from a singular one.
        if mixed and torch.finfo(torch.float32).eps * largest < 0.3 * lower:
            max_early = min(max_steps, predict_steps(lower, largest, tolerance, A.shape[-1], order))
            # Each step takes the residual to its power of `order`: from here, two steps in float64 reach the tolerance.
            first, residuals = _iterate_in_float32(A, first, max_early, tolerance ** (1 / order**2), order)

    try:
        x, later = _iterate(A, first, max_steps - len(residuals), tolerance, order)
    except _ResidualGrows as growing:
        step, before, after = growing.args
        if start is None:
            do = "The matrix is not positive definite, or singular in float64: raise the damping."
        else:
            do = f"A start of c I needs c below 2 / (the largest eigenvalue), which {2 / largest:.1e} is; or give none."
        raise DivergenceError(
            f"Schulz's iteration diverged: |I - A X| grew from {before:.1e} to {after:.1e} at step {step}. Expected "
            f"eigenvalues of I - A X_0 below 1 in size; those of A may reach {largest:.1e}. {do}"
        ) from None
    return Schulz(x, torch.stack([s.double() for s in [*residuals, *later]]))


def upper_bound(A: Tensor) -> Tensor:
    """Bound the eigenvalues of symmetric positive definite A from above by U, (...,)."""
    largest_row = A.abs().sum(-1).amax(-1)
    frobenius = A.norm(dim=(-2, -1))
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(torch.minimum(largest_row, frobenius), trace)


def predict_steps(lower: float, upper: float, tolerance: float, d: int, order: int = 2) -> int:
    """Predict the number of steps to |I - A X|_F <= tolerance, for d eigenvalues from ``lower`` to ``upper``."""
    gap = min(2 * lower / (upper + lower), 1 - 1e-15)  # 1 - rho
    return max(0, math.ceil(math.log(math.log(tolerance / math.sqrt(d)) / math.log1p(-gap), order)))


def cholesky(A: Tensor) -> Schulz:
    """Invert by a Cholesky factorisation, and measure the residual.

    Raises:
        DivergenceError: if A is not positive definite.
    """
    A = _to_symmetric(A)
    factor, info = torch.linalg.cholesky_ex(A)
    if bool(info.any()):
        raise DivergenceError(
            "Cholesky's factorisation met a pivot that is not positive. Expected a matrix that is positive definite in "
            "float64: raise the damping."
        )
    x = torch.cholesky_inverse(factor)
    return Schulz(x, _residual(A, x)[1].unsqueeze(0))


class _ResidualGrows(ArithmeticError):
    """(step, residual before, residual after)."""


def _iterate_in_float32(
    A: Tensor, start: Tensor, steps: int, tolerance: float, order: int
) -> tuple[Tensor, list[Tensor]]:
    """Return X from float32 and the residuals before it; the start itself if float32 does not come near the inverse."""
    try:
        x, sizes = _iterate(A.float(), start.float(), steps, tolerance, order)
    except _ResidualGrows:
        return start, []
    x = x.double()
    near = bool((_residual(A, x)[1] < CERTAIN).all())
    return (x, sizes[:-1]) if near else (start, [])


def _iterate(A: Tensor, x: Tensor, steps: int, tolerance: float, order: int) -> tuple[Tensor, list[Tensor]]:
    """Return X after at most so many steps, and the residual before each step and after the last."""
    r, size = _residual(A, x)
    sizes = [size]
    ended = size <= tolerance  # which matrices of the batch are done
    for step in range(1, steps + 1):
        if bool(ended.all()):
            break
        term = new = x
        for _ in range(order - 1):
            term = term @ r
            new = new + term
        r_new, after = _residual(A, new)
        grew = ~(after <= GROWTH * size.clamp(min=CERTAIN)) & ~ended
        if bool(grew.any()):
            worst = int(grew.flatten().nonzero()[0])
            raise _ResidualGrows(step, float(size.flatten()[worst]), float(after.flatten()[worst]))

        # Far from the inverse a residual may grow for a while, as the largest eigenvalues of R are still near 1. Close
        # to it each step should at least halve it: where it does not, rounding rules, and the matrix is done.
        better = ~ended & ((after < size) | (size >= CERTAIN))
        ruled_by_rounding = (size < CERTAIN) & (after > size / 2)
        ended = ended | (after <= tolerance) | ruled_by_rounding

        better_matrix = better[..., None, None]
        x = torch.where(better_matrix, new, x)
        r = torch.where(better_matrix, r_new, r)
        size = torch.where(better, after, size)
        sizes.append(size)
    return x, sizes


def _residual(A: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute R = I - A X, and its Frobenius norm, (...,)."""
    r = -(A @ x)
    r.diagonal(dim1=-2, dim2=-1).add_(1)
    return r, r.norm(dim=(-2, -1))


def _to_symmetric(A: Tensor) -> Tensor:
    """Convert A to float64, exactly symmetric.

    Raises:
        InputError: if it is not square, or not symmetric but for rounding.
    """
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or not A.shape[-1] or not A.is_floating_point():
        raise expected("A", "square floating-point matrices (..., d, d)", f"{tuple(A.shape)}, {A.dtype}")
    A = A.double()
    asymmetry = float((A - A.mT).norm())
    if not asymmetry <= 1e-5 * float(A.norm()):  # NaN, too
        raise expected("A", "symmetric and finite", f"|A - A^T| = {asymmetry:.1e}")
    return (A + A.mT) / 2
