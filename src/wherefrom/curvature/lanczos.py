"""What a curvature's spectrum looks like, measured from products alone: trace, norm, extreme eigenvalues, sampling gap.

    tr C = E z.C z                                      z of random signs                                 (Hutchinson)
    |C|_F^2 = E (C_1 z).(C_2 z)                         C_1, C_2 on independent minibatches      (Klochkov & Liu, 4)
    tr E (C_b - C)^2 = E |C_1 z - C_2 z|^2 / 2          the sampling gap; condition C.1 bounds it by c tr(C) C / |B|
    lambda_max                                          by the Arnoldi process, and by a sketch Phi C Phi^T

The sketch takes an independent Gaussian Phi_l for each parameter (concatenated, which has the smaller variance), every
row regenerated from its own seed and never stored.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, probe_signs
from wherefrom.model.problem import Problem
from wherefrom.persample.directions import Directions, concatenate
from wherefrom.persample.vectors import Shapes
from wherefrom.progress import track
from wherefrom.surroundings import undisturbed

Product = Callable[[Directions], Directions]

SAMPLE = 10_000  # examples that the extreme eigenvalues are measured on, at most
GROUP = 16  # probes that share a pair of minibatches


@dataclass(frozen=True)
class Estimate:
    """A measured number and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """Both, in three digits."""
        return f"{self.value:.3g} ± {self.error:.1g}"


@dataclass(frozen=True)
class Spectrum:
    """Measured facts about C, a mean over examples.

    Args:
        trace: tr C.
        square: squared Frobenius norm, the sum of squared eigenvalues.
        largest: largest eigenvalue by Lanczos; its error is a bound (an eigenvalue lies that near), not a deviation.
        smallest: smallest eigenvalue found, by the same; negative for an indefinite matrix.
        sketched: largest eigenvalue by the sketch, corrected for its bias.
        gap: |B| tr(sampling gap) / tr(C)^2, the c that condition C.1 needs on average.
        constant: the c that it needs along the top eigenvectors; Corollary 1 takes at least 2 / ``terms``.
        examples, parameters: N and D.
        batch: examples of the minibatches that the gap was measured with.
        terms: of which an example's part of C is a sum, such as the tokens of a sequence.
    """

    trace: Estimate
    square: Estimate
    largest: Estimate
    smallest: float
    sketched: float
    gap: Estimate
    constant: Estimate
    examples: int
    parameters: int
    batch: int
    terms: float = 1.0

    def __str__(self) -> str:
        """A table, one fact a line."""
        rows = [
            ("parameters D, examples N", f"{self.parameters:,}, {self.examples:,}"),
            ("trace", str(self.trace)),
            ("Frobenius norm", f"{max(self.square.value, 0.0) ** 0.5:.3g}"),
            ("largest eigenvalue (Lanczos)", f"{self.largest.value:.4g} (within {self.largest.error:.1g})"),
            ("largest eigenvalue (sketch)", f"{self.sketched:.3g}"),
            ("smallest eigenvalue (Lanczos)", f"{self.smallest:.3g}"),
            ("effective rank tr C / largest", f"{self.trace.value / max(self.largest.value, 1e-300):.3g}"),
            (f"c of condition C.1, |B| = {self.batch}, on average", str(self.gap)),
            ("c of condition C.1, top eigenvectors", str(self.constant)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@dataclass(frozen=True)
class Krylov:
    """What n products found of a symmetric matrix A, or of P^-1 A.

    Args:
        projected: the matrix in the basis, tridiagonal, (n, n) float64.
        basis: orthonormal (in the inner product of P) rows, (n, D).
        beyond: norm of what the last product left outside the basis.
        asymmetry: |H - H^T| / |H| of the matrix as measured; above rounding only where products are noisy.
    """

    projected: Tensor
    basis: Tensor
    beyond: float
    asymmetry: float

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, ascending; their coefficients in the basis, a column each; bounds on their errors."""
        values, coefficients = torch.linalg.eigh(self.projected)
        return values, coefficients, (self.beyond * coefficients[-1]).abs()


def arnoldi(product: Product, start: Directions, steps: int, solve: Product | None = None) -> Krylov:
    """Run the Arnoldi process with full re-orthogonalisation (Schioppa et al. 2022, algorithm 1, indices put right).

    Args:
        product: v to A v, symmetric; one that draws minibatches does so at every call.
        start: one vector.
        steps: n, at most; fewer if the space is exhausted.
        solve: applies P^-1, symmetric positive definite: the spectrum is then that of P^-1 A.
    """
    blocks = start.blocks
    residual = start.flatten()[0]  # (D,)
    steps = min(steps, len(residual))
    dual = residual.new_empty(steps, len(residual))  # rows P q; the basis itself without P
    basis = residual.new_empty(steps, len(residual)) if solve else dual
    projected = torch.zeros(steps + 1, steps, dtype=torch.float64)

    n, size, floor = 0, 0.0, 0.0
    for j in track(range(steps + 1), "Arnoldi process", enabled=None if steps > 50 else False):
        solved = residual
        if solve:
            solved = solve(Directions.unflatten(blocks, residual.unsqueeze(0))).flatten()[0]
        size = float(torch.dot(residual.double(), solved.double()).clamp(min=0).sqrt())
        if j:
            projected[j, j - 1] = size
        if j == steps or size <= floor:
            break

        n, dual[j], basis[j] = j + 1, residual / size, solved / size
        residual = product(Directions.unflatten(blocks, basis[j : j + 1])).flatten()[0].clone()
        for _ in range(2):  # once is not enough: rounding leaves a component along what was subtracted
            along = basis[:n] @ residual
            residual = residual - along @ dual[:n]
            projected[:n, j] += along.cpu().double()
        # What is left below this is rounding of a space that is exhausted; in the norm of P^-1, as size is.
        floor = (1e-6 if residual.dtype == torch.float32 else 1e-12) * float(projected.norm())

    square = projected[:n, :n]
    asymmetry = float((square - square.T).norm() / square.norm().clamp(min=1e-300)) if n else 0.0
    tridiagonal = ((square + square.T) / 2).triu(-1).tril(1)
    return Krylov(tridiagonal, basis[:n], size if n == steps else 0.0, asymmetry)


def embedding(shapes: Shapes, name: str, rows: range, size: int, seed: int, like: Tensor) -> Tensor:
    """Draw rows of Phi for one parameter, entries N(0, 1 / size), each from its own seed: (rows, *shape)."""
    draws = []
    for row in rows:
        rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{name}|{row}".encode()) + (seed << 32))
        draws.append(torch.randn(shapes[name], generator=rng, dtype=torch.float64))
    return torch.stack(draws).to(like).mul_(size**-0.5)


def sketch(product: Product, problem: Problem, size: int = 40, seed: int = 0, corrected: bool = True) -> Tensor:
    """Sketch C with ``size`` rows for each of L parameters: eigenvalues of Phi C Phi^T, ascending, (L size,).

    Their error is additive, about |C|_F / sqrt(size); the bias tr(C_ll) / size of each diagonal block is taken off
    (``corrected``), without which the largest is too large.
    """
    shapes = problem.shapes
    like = next(iter(problem.parameters.values())).detach()
    m = torch.zeros(len(shapes) * size, len(shapes) * size, dtype=torch.float64)
    for i, name in enumerate(shapes):
        probe = {other: like.new_zeros(size, *shape) for other, shape in shapes.items()}
        probe[name] = embedding(shapes, name, range(size), size, seed, like)
        image = product(Directions.from_parameters(problem.blocks, probe)).to_parameters()
        for j, other in enumerate(shapes):
            phi = embedding(shapes, other, range(size), size, seed, like).reshape(size, -1)
            block = image[other].reshape(size, -1) @ phi.T  # (columns of i, rows of j)
            m[j * size : (j + 1) * size, i * size : (i + 1) * size] = block.T.cpu().double()

    if corrected:
        own = m.diagonal().view(len(shapes), size).mean(1)  # tr(C_ll) / size
        m = m - torch.diag(own.repeat_interleave(size))
    return torch.linalg.eigvalsh((m + m.T) / 2)


@undisturbed()
def spectrum(
    curvature: Curvature, probes: int = 1600, steps: int = 30, batch: int | None = None, seed: int = 0
) -> Spectrum:
    """Measure the spectrum of C by products alone.

    Args:
        curvature: the matrix.
        probes: most random probes; fewer once the trace is known to 1%.
        steps: products spent on the extreme eigenvalues.
        batch: examples of each minibatch; None takes an eighth of the training set, at least 32 and at most 256.
        seed: of probes, minibatches and sketch.
    """
    problem = curvature.problem
    N = len(problem.train)
    batch = batch or min(N, max(32, min(256, N // 8)))
    rng = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=rng)[:SAMPLE] if N > SAMPLE else None
    start = draw_normal(problem, rng)

    def fixed(v: Directions) -> Directions:
        return curvature.product(v, index)

    krylov = arnoldi(fixed, start, steps)
    values, coefficients, errors = krylov.ritz()
    top = Directions.unflatten(problem.blocks, coefficients[:, -5:].T.to(krylov.basis) @ krylov.basis)
    traces, squares, gaps, along = [], [], [], []
    draw = curvature.operator(rng, batch)
    forms = top.dot(fixed(top))
    for _ in range(-(-probes // GROUP)):
        both = concatenate([probe_signs(problem, GROUP, rng), top])
        one, two = draw(both), draw(both)
        form = (both.dot(one) + both.dot(two)) / 2
        gap = one.axpy(-1.0, two).norm().square() / 2
        traces.append(float(form[:GROUP].mean()))
        squares.append(float(one.dot(two)[:GROUP].mean()))
        gaps.append(float(gap[:GROUP].mean()))
        along.append(gap[GROUP:] / forms.clamp(min=1e-300))
        if len(traces) >= 20 and _estimate(traces).error < 0.01 * abs(_estimate(traces).value):
            break
    trace, gap = _estimate(traces), _estimate(gaps)
    scale = batch / max(trace.value, 1e-300)
    per = torch.stack(along)[:, forms > 1e-6 * float(forms.abs().max())]  # (groups, eigenvectors)
    estimates = [_estimate(column) for column in per.T.tolist()]
    # There are none where C has no positive direction.
    constant = max(estimates, key=lambda e: e.value, default=Estimate(0.0, 0.0))
    return Spectrum(
        trace,
        _estimate(squares),
        Estimate(float(values[-1]), max(float(errors[-1]), torch.finfo(problem.dtype).eps * abs(float(values[-1])))),
        float(values[0]),
        float(sketch(fixed, problem, seed=seed)[-1]),
        Estimate(scale * gap.value / max(trace.value, 1e-300), scale * gap.error / max(trace.value, 1e-300)),
        Estimate(scale * constant.value, scale * constant.error),
        N,
        krylov.basis.shape[1],
        batch,
        curvature.terms(),
    )


def draw_normal(problem: Problem, rng: torch.Generator) -> Directions:
    """Draw one direction of independent normal numbers, parameter by parameter."""
    draws = {
        name: torch.randn(1, *shape, generator=rng, dtype=torch.float64).to(problem.device, problem.dtype)
        for name, shape in problem.shapes.items()
    }
    return Directions.from_parameters(problem.blocks, draws)


def _estimate(samples: list[float]) -> Estimate:
    t = torch.tensor(samples, dtype=torch.float64)
    error = float(t.std() / len(samples) ** 0.5) if len(samples) > 1 else float("inf")
    return Estimate(float(t.mean()), error)
