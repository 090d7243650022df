"""Inverses from eigenpairs of C: all of them (Exact, primal), those a sketch finds (Nystrom), the largest (Arnoldi).

With D = diag(damping) / level, level the largest damping, M = D^-1/2 C D^-1/2 and eigenpairs M U = U Lambda,

    (C + damping)^-1 = D^-1/2 (M + level)^-1 D^-1/2  ~  D^-1/2 [ U (Lambda + level)^-1 U^T + rest (I - U U^T) ] D^-1/2

so that blocks may have dampings of their own. The three methods differ in how they find U and in what they do with the
rest of the space, which U does not span:

    Exact, primal   U is complete, and nothing is left. One dense decomposition, in float64; indefinite C too.
    Nystrom         rest = 1 / (Lambda_r + level), Lambda_r the smallest eigenvalue kept     (Frangella et al. 2023)
    Arnoldi         rest = 0: what lies outside scores nothing, as published             (Schioppa et al. 2022, eq. 7)

Nystrom, from one product with an orthonormal random test matrix Omega of r columns:

    C_nys = (M Omega) (Omega^T M Omega)^-1 (M Omega)^T = U Lambda U^T

As a preconditioner of CG it serves where Kronecker factors and rows do not: layers without an entry, many outputs, many
examples. Arnoldi builds the n-dimensional Krylov space of a random start with full re-orthogonalisation, and keeps the
p Ritz pairs of largest |lambda|; scores then come from p numbers for each example. It differs from the paper by the
damping in 1 / (lambda_k + damping), which the certificate is measured with; ``damped=False`` is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wherefrom.curvature.base import Curvature, Need
from wherefrom.curvature.damping import ByBlock, Damping
from wherefrom.curvature.lanczos import Krylov, arnoldi, draw_normal
from wherefrom.errors import DivergenceError, UnsupportedError, expected
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import unflatten
from wherefrom.solvers.base import Inverse, Solver, parameter_count, require_positive, require_tensor
from wherefrom.solvers.gram import Dual
from wherefrom.solvers.projection import project, project_self_influence

COLUMNS = 256  # unit vectors that a matrix is written out with at a time
NUMBERS = 2**24  # of written rows that are multiplied at a time


@dataclass(frozen=True, eq=False)
class SpectralInverse(Inverse):
    """Divides by eigenvalues + damping along some eigenvectors, and multiplies by a constant outside of them.

    Args:
        values: Lambda, (r,) float64.
        vectors: U^T, orthonormal rows (r, D), in the dtype that products are made in; coordinates block after block.
        rest: what the part outside U is multiplied with, before the scaling by each block's damping.
        damped: divide by Lambda + level; False divides by Lambda.
        errors: bounds on the errors of Lambda, (r,), where the method has them.
    """

    values: Tensor
    vectors: Tensor
    rest: float = 0.0
    damped: bool = True
    errors: Tensor | None = None

    def __post_init__(self) -> None:
        D = parameter_count(self.curvature)
        require_tensor("values", self.values, None)
        if not len(self.values):
            raise expected("a fit", "of one eigenvalue or more", "none")
        require_tensor("vectors", self.vectors, len(self.values), D)
        if self.errors is not None:
            require_tensor("errors", self.errors, len(self.values))

        smallest = float((self.values + self.level).abs().min())
        if self.is_complete and smallest <= 1e-12 * float(self.values.abs().max()):
            raise DivergenceError(
                f"C + damping is singular: its smallest eigenvalue is {smallest:.1e} in absolute value. "
                "Raise the damping."
            )

    @property
    def is_approximate(self) -> bool:  # type: ignore[override]
        """Whether some eigenpairs are missing."""
        return not self.is_complete

    @property
    def is_positive_definite(self) -> bool:  # type: ignore[override]
        """Whether every direction is multiplied with something positive."""
        return (self.rest > 0 or self.is_complete) and bool((self.values + self.level > 0).all())

    @property
    def is_complete(self) -> bool:
        """Whether these are all eigenpairs."""
        return len(self.values) == self.vectors.shape[1] and self.damped

    @property
    def has_functions(self) -> bool:
        """Whether all eigenpairs are there."""
        return self.is_complete

    @property
    def level(self) -> float:
        """The largest damping, or 0 where it is left out."""
        return max(self.damping.values()) if self.damped else 0.0

    def apply(self, b: Directions) -> Directions:
        """Divide along the eigenvectors, and multiply by ``rest`` outside of them."""
        weights = 1 / (self.values + self.level)
        if not self.rest and not self.is_complete:
            # Only p directions matter: solutions are combinations of these, and training examples need p numbers each.
            return project(self._scaled_vectors, weights, b)
        return self._multiply(b, weights - self.rest, self.rest)

    def apply_function(self, phi: Callable[[Tensor], Tensor], b: Directions) -> Directions:
        """Return phi(C) b.

        Raises:
            UnsupportedError: if eigenpairs are missing; or if the damping differs between blocks, so that what was
                decomposed is not C.
        """
        if not self.is_complete:
            return super().apply_function(phi, b)
        if len(set(self.damping.values())) > 1:
            raise UnsupportedError("A function of C needs one damping for all parameters. Give it as a number.")
        return self._multiply(b, phi(self.values), 0.0)

    def _multiply(self, b: Directions, weights: Tensor, rest: float) -> Directions:
        """Return D^-1/2 [U diag(weights) U^T + rest] D^-1/2 b."""
        roots = scales(self.damping) if self.damped else {}
        dtype = self.curvature.problem.dtype
        flat = _scale(b, roots).flatten().to(self.vectors)  # (Q, D)
        x = (flat @ self.vectors.T * weights.to(flat)) @ self.vectors
        if rest:
            x.add_(flat, alpha=rest)
        return _scale(Directions.unflatten(b.blocks, x.to(dtype)), roots)

    @cached_property
    def _scaled_vectors(self) -> Directions:
        """Return D^-1/2 U, as r directions."""
        roots = scales(self.damping) if self.damped else {}
        return _scale(Directions.unflatten(self.curvature.problem.blocks, self.vectors), roots)

    def self_influence(self, rows: Gradients) -> tuple[Tensor, Tensor]:
        """Return g^T (C + damping)^-1 g; along few eigenvectors no row is written out."""
        if self.rest or self.is_complete:
            return super().self_influence(rows)
        return project_self_influence(self._scaled_vectors, 1 / (self.values + self.level), rows)

    def report(self) -> dict[str, float | str]:
        """Return how many eigenpairs there are, the extreme ones and a bound on their errors; nothing of a full set."""
        if self.is_complete:
            return {}
        report: dict[str, float | str] = {
            "directions": len(self.values),
            "largest eigenvalue": float(self.values[0]),
            "smallest kept": float(self.values[-1]),
            "smallest kept / damping": float(self.values[-1]) / max(self.damping.values()),
        }
        if self.errors is not None:
            report["error of the Ritz values"] = float(self.errors.max())
        return report


# exact ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact(Solver):
    """Dense solve of (C + damping) x = b: primal (D x D) or dual (rows x rows), whichever is smaller.

    The primal matrix is decomposed once, in float64, so that another damping costs nothing. The dual is `Dual` with
    every row that carries anything; its Gram matrix is formed in the model's dtype, and the certificate says what that
    costs.

    Args:
        form: "primal", "dual", or "auto" for the smaller.
        memory: bytes that the matrices may take; more is refused with the number.
    """

    form: Literal["auto", "primal", "dual"] = "auto"
    memory: float = 12e9
    needs: ClassVar[Need] = Need.MATVEC

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Build and decompose the matrix.

        Raises:
            UnsupportedError: if the matrices would not fit into ``memory``.
        """
        if self._choose_form(curvature) == "dual":
            return self._dual().fit(curvature, damping)
        resolved = Damping.of(damping).resolve(curvature)
        values, vectors = curvature.cached(
            ("eigenpairs of C", _key(scales(resolved))), lambda: _decompose(curvature, scales(resolved))
        )
        return SpectralInverse(curvature, resolved, values, vectors)

    def _dual(self) -> Dual:
        return Dual(drop=1e-14, memory=self.memory)

    def _choose_form(self, curvature: Curvature) -> str:
        if self.form not in ("auto", "primal", "dual"):
            raise expected("form", "'auto', 'primal' or 'dual'", repr(self.form))
        if self.form == "dual":
            self._dual().check(curvature)

        sides = matrix_sides(curvature)
        form = self.form
        if form == "auto":
            form = "primal" if sides["dual"] >= sides["primal"] else "dual"

        needed = 3 * 8 * sides[form] ** 2  # the matrix, its factor and one copy in between
        if needed > self.memory:
            raise UnsupportedError(
                f"Exact ({form}) needs {needed / 2**30:.1f} GiB for {sides[form]:,.0f} x {sides[form]:,.0f} "
                f"matrices, allowed are {self.memory / 2**30:.1f} GiB. "
                "Use CG(preconditioner=Dual()) for the same answer, or raise `memory`."
            )
        return form


def matrix_sides(curvature: Curvature) -> dict[str, float]:
    """Return the sides of the two matrices that may be inverted.

    Returns:
        "primal": D; "dual": the number of rows of C, infinite if it has none.
    """
    rows = float("inf")
    if Need.GRADIENTS in curvature.offers:
        rows = next(curvature.gradients()).weights.shape[1] * len(curvature.problem.train)
    return {"primal": parameter_count(curvature), "dual": rows}


def write_matrix(curvature: Curvature) -> Tensor:
    """Write C out, coordinates block after block: (D, D) float64, symmetric."""
    problem, D = curvature.problem, parameter_count(curvature)
    if Need.GRADIENTS in curvature.offers:
        total = torch.zeros(D, D, dtype=torch.float64, device=problem.device)
        for rows in curvature.gradients():
            step = max(1, NUMBERS // (D * rows.weights.shape[1]))
            for i in range(0, len(rows), step):
                some = rows[i : i + step]
                b = some.dense().flatten().double()  # (n R, D)
                total += (b * some.weights.reshape(-1, 1)).T @ b
        return total / len(problem.train)

    units = torch.eye(D, dtype=problem.dtype, device=problem.device).split(COLUMNS)
    columns = [curvature.product(Directions.unflatten(problem.blocks, some)).flatten() for some in units]
    matrix = torch.cat(columns).double()
    return (matrix + matrix.T) / 2


def _decompose(curvature: Curvature, roots: ByBlock) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues (D,), ascending, and eigenvectors, rows (D, D), of D^-1/2 C D^-1/2."""
    matrix = curvature.cached("C written out", lambda: write_matrix(curvature))
    if roots:
        sizes = torch.tensor([block.size for block in curvature.problem.blocks])
        factors = torch.tensor([roots[block.name] for block in curvature.problem.blocks], dtype=torch.float64)
        by = factors.repeat_interleave(sizes).to(matrix)
        matrix = matrix * by * by.unsqueeze(1)
    values, columns = torch.linalg.eigh(matrix)
    # In memory as a file gives them back: a restored fit rounds alike.
    return values.contiguous(), columns.T.contiguous()


# Nystrom --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nystrom(Solver):
    """Low-rank approximation of the inverse, meant as a preconditioner: ``CG(preconditioner=Nystrom())``.

    Args:
        rank: r, right-hand sides of the one pass; memory is 3 r D numbers.
        seed: of the test matrix.
    """

    rank: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(rank=self.rank)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Make one pass over the training data with ``rank`` right-hand sides.

        Raises:
            UnsupportedError: if C is not positive semi-definite on the test matrix.
        """
        self.check(curvature)
        resolved = Damping.of(damping).resolve(curvature)
        roots = scales(resolved)
        values, vectors = curvature.cached(
            ("Nystrom eigenpairs", self.rank, self.seed, _key(roots)),
            lambda: _sketch_eigenpairs(curvature, roots, self.rank, self.seed),
        )
        # The smallest eigenvalue kept stands for all that are not.
        rest = 1 / (float(values[-1]) + max(resolved.values()))
        return SpectralInverse(curvature, resolved, values, vectors, rest)


def _sketch_eigenpairs(curvature: Curvature, roots: ByBlock, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (r,), largest first, and orthonormal rows (r, D) of the Nystrom approximation."""
    problem = curvature.problem
    D = parameter_count(curvature)
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randn(min(rank, D), D, generator=rng, dtype=problem.dtype).to(problem.device)
    # Drawn in the order of the parameters, which does not depend on how they are cut into blocks.
    omega = Directions.from_parameters(problem.blocks, unflatten(drawn, problem.shapes)).flatten()
    omega = torch.linalg.qr(omega.T)[0].T.contiguous()  # (r, D)

    scaled = _scale(Directions.unflatten(problem.blocks, omega), roots)
    y = _scale(curvature.product(scaled), roots).flatten()  # (r, D)
    small = (omega @ y.T).double()

    # A nudge keeps the small matrix definite, also where products are inexact; it is taken off again.
    nudge = max(torch.finfo(y.dtype).eps * float(y.norm()), float((small - small.T).norm()))
    y.add_(omega, alpha=nudge)
    small.diagonal().add_(nudge)
    factor, info = torch.linalg.cholesky_ex((small + small.T) / 2)
    if int(info):
        raise UnsupportedError(
            "Nystrom needs a positive semi-definite curvature, and this one has a negative direction. Take the GGN "
            "instead of the Hessian, or Exact()."
        )
    b = torch.linalg.solve_triangular(factor.to(y), y, upper=False)  # (r, D): b^T b = C_nys + nudge
    _, sigma, rows = torch.linalg.svd(b, full_matrices=False)
    return (sigma.double().square() - nudge).clamp(min=0), rows.contiguous()


# Arnoldi --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arnoldi(Solver):
    """Scores in the space of the top Ritz vectors.

    Args:
        rank: p, Ritz pairs kept, by absolute value.
        steps: n, products spent.
        sample: training examples that the products run over, drawn once; None: all.
        fresh: draw another sample for every product, as published.
        positive: keep eigenvalues above 0 only; self-influence is then not negative, also with the Hessian.
        damped: divide by lambda + damping; False divides by lambda, as published.
        seed: of the start and the samples.
    """

    rank: int = 100
    steps: int = 200
    sample: int | None = None
    fresh: bool = False
    positive: bool = False
    damped: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, steps=self.steps, sample=self.sample)
        if self.rank > self.steps:
            raise expected("rank", f"at most the {self.steps} steps", self.rank)
        if self.fresh and self.sample is None:
            raise expected("sample", "given, as fresh=True draws one for every product", None)

    def fit(self, curvature: Curvature, damping: float | Damping) -> Inverse:
        """Spend the n products, of C with each block divided by its damping over the largest.

        Raises:
            UnsupportedError: if no eigenvalue is left, or the damped ones are not away from 0.
        """
        self.check(curvature)
        resolved = Damping.of(damping).resolve(curvature)
        roots = scales(resolved) if self.damped else {}
        key = ("Krylov space", self.steps, self.sample, self.fresh, self.seed, _key(roots))
        krylov = curvature.cached(key, lambda: self._build_krylov(curvature, roots))

        values, coefficients, errors = krylov.ritz()
        order = values.abs().sort(descending=True).indices
        if self.positive:
            order = order[values[order] > 0]
        noise = 1e-6 if curvature.problem.dtype == torch.float32 else 1e-12  # an eigenvalue of 0, as computed
        order = order[values[order].abs() > noise * float(values.abs().max())][: self.rank]
        values, errors = values[order], errors[order]

        level = max(resolved.values()) if self.damped else 0.0
        if not len(order) or bool(((values + level).abs() <= 1e-9 * values.abs()).any()):
            raise UnsupportedError(
                f"{len(order)} eigenvalues were kept, and one of lambda + damping must not vanish: the curvature is "
                "indefinite. Take positive=True, another damping, or the GGN."
            )
        vectors = coefficients[:, order].T.to(krylov.basis) @ krylov.basis  # (p, D)
        return SpectralInverse(curvature, resolved, values, vectors, 0.0, self.damped, errors)

    def _build_krylov(self, curvature: Curvature, roots: ByBlock) -> Krylov:
        problem, rng = curvature.problem, torch.Generator().manual_seed(self.seed)
        start = draw_normal(problem, rng)

        def draw_sample() -> Tensor | None:
            return torch.randperm(len(problem.train), generator=rng)[: self.sample] if self.sample else None

        once = draw_sample()

        def product(v: Directions) -> Directions:
            index = draw_sample() if self.fresh else once
            return _scale(curvature.product(_scale(v, roots), index), roots)

        return arnoldi(product, start, self.steps)


# blocks with dampings of their own ------------------------------------------------------------------------------------


def scales(damping: ByBlock) -> ByBlock:
    """Return D^-1/2, by block: the root of the largest damping over each block's; empty where all are the same."""
    level = max(damping.values())
    roots = {name: (level / value) ** 0.5 for name, value in damping.items()}
    return roots if len(set(roots.values())) > 1 else {}


def _scale(v: Directions, roots: ByBlock) -> Directions:
    return v.scale(roots) if roots else v


def _key(roots: ByBlock) -> tuple[tuple[str, float], ...]:
    """Return what distinguishes one scaling from another, to be a key of a cache."""
    return tuple(roots.items())
