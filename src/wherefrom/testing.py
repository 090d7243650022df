"""The conformance suite: what every operator, solver and layer entry must fulfil, for the library's own and for yours.

    check_operator(GGN(problem))                                    # symmetric, linear, positive if it says so
    check_solver(MySolver(), GGN(problem), damping=0.1)             # the contract of fit, apply, restore
    check_layer(MyKind(), MyLayer(3, 5).double(), x)                # per-example gradients against autograd

Each returns None, or raises a `ConformanceError` that names what failed and by how much.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from wherefrom.curvature.base import Curvature, Need, Operator
from wherefrom.curvature.damping import Damping
from wherefrom.data.examples import tensors
from wherefrom.errors import AttributionError, ConvergenceWarning, UnsupportedError
from wherefrom.model.observe import copied
from wherefrom.model.problem import Problem
from wherefrom.persample import vectors
from wherefrom.persample.factored import Factored
from wherefrom.persample.gradients import Block
from wherefrom.persample.layers import LayerKind, transposed
from wherefrom.persample.vectors import Vectors
from wherefrom.solvers.base import Inverse, Solver, relative

RIGHT_HAND_SIDES = 3
LANCZOS = 12  # steps; they find a negative eigenvalue that is not tiny

Held = Mapping[str, Tensor]


class ConformanceError(AttributionError, AssertionError):
    """An operator, solver or layer entry breaks its contract."""


def check_operator(
    operator: Operator | Curvature,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Check a deterministic symmetric linear map on Vectors.

    Names, shapes and dtype are kept, the input is not modified, a repeated product is the same, several right-hand
    sides equal one at a time, C(2u - 3v) = 2Cu - 3Cv, u.Cv = v.Cu, and no negative eigenvalue where ``psd`` is claimed.

    Args:
        operator: the map, or a curvature, whose map over all the data is taken. One that draws minibatches fails.
        dtype: of the vectors; None takes the one of the curvature's model, or float64.
        tolerance: relative; None takes 1e-8 in float64 and 1e-3 in float32.
        seed: of the random vectors.

    Raises:
        ConformanceError: naming the first of these that does not hold.
    """
    problem = getattr(operator, "problem", None) or getattr(getattr(operator, "curvature", None), "problem", None)
    C = cast(Operator, operator.operator() if isinstance(operator, Curvature) else operator)
    like = next(iter(problem.parameters.values())) if isinstance(problem, Problem) else torch.empty(0).double()
    like = like.detach().to(dtype or like.dtype)
    tolerance, name = tolerance or _tolerance(like.dtype), type(operator).__name__
    u, v = _normal(C.shapes, like, seed), _normal(C.shapes, like, seed + 1)
    before = vectors.clone(v)
    cu, cv = C(u), C(v)
    _shaped(f"{name}: C v", cv, C.shapes, RIGHT_HAND_SIDES, like.dtype)
    _same(f"{name}: the input v after C v", v, before, 0.0)
    _same(f"{name}: a repeated C v (an operator that draws minibatches cannot pass)", C(v), cv, tolerance)
    single = vectors.concatenate([C(one) for one in vectors.chunk(v, 1)])
    _same(f"{name}: right-hand sides one at a time", single, cv, tolerance)
    both = C(vectors.add(vectors.scale(u, 2.0), v, -3.0))
    _same(f"{name}: linearity, C(2u - 3v)", both, vectors.add(vectors.scale(cu, 2.0), cv, -3.0), tolerance)
    gap = (vectors.dot(u, cv) - vectors.dot(v, cu)).abs() / (vectors.norm(u) * vectors.norm(cv)).clamp(min=1e-300)
    _small(f"{name}: symmetry, |u.Cv - v.Cu| / |u||Cv|", float(gap.max()), tolerance)
    if C.psd:
        values = _ritz(C, {p: t[:1] for p, t in v.items()})
        lowest = float(-values.min() / values.abs().max().clamp(min=1e-300))
        _small(f"{name}: claims psd, but has an eigenvalue below 0, relative to the largest", lowest, tolerance)


def check_solver(
    solver: Solver,
    curvature: Curvature,
    damping: float | Damping,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Check the contract of a solver and of the inverse it fits.

    The solver is a frozen, hashable record with a repr that depends on its fields alone, and refuses a curvature
    without what it needs. A solution has the right-hand side's shapes, is finite, the same each time, the same for
    right-hand sides solved together and one by one, linear in b (unless the method iterates), and 0 for b = 0; its
    certificate is the residual computed here. What `Inverse.state` saves restores the same answers. Self-influence and
    the shorter way to scores, where there is one, agree with the solutions.

    Args:
        solver: what is checked.
        curvature: a curvature that offers what the solver needs, of a small problem with at least 2 examples.
        damping: as for `Solver.fit`.
        tolerance: relative; None takes 1e-8 in float64 and 1e-3 in float32. A method that stops at a tolerance of its
            own may repeat itself to 10 times that.
        seed: of the random right-hand sides.

    Raises:
        ConformanceError: naming the first of these that does not hold.
    """
    problem, name = curvature.problem, type(solver).__name__
    tolerance = tolerance or _tolerance(problem.dtype)
    _record(solver)
    _needs(solver, curvature, damping)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        inverse = solver.fit(curvature, damping)
        tolerance = max(tolerance, 10 * (inverse.tolerance or 0.0))
        b = _normal(problem.shapes, next(iter(problem.parameters.values())).detach(), seed)
        b = {p: torch.cat([t, torch.zeros_like(t[:1])]) for p, t in b.items()}  # the last one is zero
        x = _solution(name, inverse, b, tolerance)
        single = vectors.concatenate([inverse(one, certify=False).x for one in vectors.chunk(b, 1)])
        _same(f"{name}: right-hand sides solved one by one", single, x, tolerance)
        _same(f"{name}: the solution of a zero right-hand side", {p: t[-1:] for p, t in x.items()}, None, 0.0)
        if not inverse(b, certify=False).history.numel():
            mixed = {p: 2 * t[:1] - 3 * t[1:2] for p, t in b.items()}
            wanted = {p: 2 * t[:1] - 3 * t[1:2] for p, t in x.items()}
            _same(f"{name}: linearity, the solution of 2b - 3c", inverse.apply(mixed), wanted, tolerance)
        state = {key: t.clone() for key, t in inverse.state().items()}
        restored = solver.restore(curvature, dict(inverse.shift), state)
        _same(f"{name}: solutions after state and restore", restored(b, certify=False).x, x, tolerance)
        _pairs(name, inverse, problem, tolerance)


def check_layer(kind: LayerKind, layer: nn.Module, x: Tensor, tolerance: float | None = None) -> None:
    """Check a layer entry against a loop of autograd over examples.

    Rows are compared for the weight and the bias together and for each alone, with one and with three cotangents per
    example; then the contractions dot, combine, gram and square_norms of the rows with their dense form.

    Args:
        kind: the entry.
        layer: a module of its type; only ``weight`` and ``bias`` are looked at. A copy is used, in eval mode.
        x: its input for n examples, n at least 2, (n, ...).
        tolerance: relative; None takes 1e-8 in float64 and 1e-3 in float32.

    Raises:
        ConformanceError: naming the parameters and the first of these that does not hold.
    """
    layer = copied(layer).eval().requires_grad_(True)
    held = {part: p for part in ("weight", "bias") if (p := layer._parameters.get(part)) is not None}
    if not held or len(x) < 2:
        raise ConformanceError(f"check_layer needs a weight or a bias and 2 examples, got {layer}, {len(x)} examples.")
    y = layer(x)
    for parts in [tuple(held), *([(part,) for part in held] if len(held) > 1 else [])]:
        for R in (1, 3):
            name = f"{type(kind).__name__} for {type(layer).__name__}, {' and '.join(parts)}, R = {R}"
            chosen = {part: held[part] for part in parts}
            _layer(name, kind, layer, x, _random(y.detach(), R, *y.shape), chosen, tolerance or _tolerance(y.dtype))


# --- parts of the checks ---


def _layer(name: str, kind: LayerKind, layer: nn.Module, x: Tensor, g: Tensor, held: Held, tolerance: float) -> None:
    """Rows of the held parameters for cotangents g (R, n, ...), and their contractions."""
    R, n = g.shape[:2]
    truth: dict[str, list[Tensor]] = {part: [] for part in held}
    for i in range(n):
        y = layer(x[i : i + 1])
        for r in range(R):
            rows = torch.autograd.grad(y, list(held.values()), g[r, i : i + 1], retain_graph=r + 1 < R)
            for part, row in zip(held, rows, strict=True):
                truth[part].append(row)
    block = Block("layer", {part: p.shape for part, p in held.items()}, kind.matrix(layer), transposed(kind))
    with torch.no_grad():
        found = cast(Factored, kind.rows(layer, x, g, tuple(held)))  # or another form with the same methods
        dense = found.written().rows
    _near(f"{name}: shape of the rows", torch.tensor(dense.shape), torch.tensor((n, R, block.size)), 0.0)
    unpacked = block.unpack(dense.reshape(-1, *block.sides))
    _same(f"{name}: rows", unpacked, {part: torch.stack(some) for part, some in truth.items()}, tolerance)
    other = torch.arange(1, n, device=dense.device)
    v, w = _random(dense, 2, *block.sides), _random(dense, 2, n, R)
    wanted = torch.einsum("qnr,nrd->qd", w, dense).view(v.shape)
    gram = torch.einsum("nrd,msd->nrms", dense, dense[other])
    _near(f"{name}: dot", found.dot(v), torch.einsum("qd,nrd->qnr", v.flatten(1), dense), tolerance)
    _near(f"{name}: combine", found.combine(w), wanted, tolerance)
    _near(f"{name}: gram", found.gram(found[other]), gram, tolerance)
    _near(f"{name}: square_norms", found.square_norms(), dense.square().sum(2), tolerance)


def _record(solver: Solver) -> None:
    name, parameters = type(solver).__name__, getattr(type(solver), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or "__dataclass_params__" not in vars(type(solver)):
        raise ConformanceError(f"{name} must be decorated with @dataclass(frozen=True).")
    if type(solver).__hash__ is None:
        raise ConformanceError(f"{name} must be hashable: two with the same fields are the same solver.")
    hash(solver)
    twin = dataclasses.replace(solver)
    if twin != solver or repr(twin) != repr(solver) or re.search(r"\bat 0x", repr(solver)):
        raise ConformanceError(f"{name}: its repr must depend on its fields alone, got {solver!r} and {twin!r}.")


def _needs(solver: Solver, curvature: Curvature, damping: float | Damping) -> None:
    name = type(solver).__name__
    if not isinstance(solver.needs, Need):
        raise ConformanceError(f"{name}.needs must be a wherefrom.Need, got {solver.needs!r}.")
    lacking = copy.copy(curvature)
    rest = curvature.offers - {solver.needs}
    lacking.__class__ = type("Lacking", (type(curvature),), {"offers": property(lambda _: rest)})
    try:
        solver.check(lacking)
        solver.fit(lacking, damping)
    except UnsupportedError:
        return
    raise ConformanceError(
        f"{name} must refuse, with UnsupportedError, a curvature that offers no {solver.needs.value}."
    )


def _solution(name: str, inverse: Inverse, b: Vectors, tolerance: float) -> Vectors:
    """The solutions of b, after the checks of one call."""
    before, problem, Q = vectors.clone(b), inverse.curvature.problem, vectors.count(b)
    _shaped(f"{name}: apply", inverse.apply(b), problem.shapes, Q, problem.dtype)
    solution = inverse(b)
    x = solution.x
    _shaped(f"{name}: the solution", x, problem.shapes, Q, problem.dtype)
    _same(f"{name}: the right-hand side after solving", b, before, 0.0)
    if not all(t.isfinite().all() for t in x.values()):
        raise ConformanceError(f"{name}: the solution must be finite; raise DivergenceError otherwise.")
    again = inverse(b, certify=False)
    _same(f"{name}: solving again", again.x, x, tolerance)
    _same(f"{name}: apply without a certificate", inverse.apply(b), x, tolerance)
    if solution.residual is None or again.residual is not None:
        raise ConformanceError(f"{name}: residual must be measured if certify=True, and be None if certify=False.")
    for what, values in (("residual", solution.residual), ("converged", solution.converged)):
        if values.shape != (Q,):
            raise ConformanceError(f"{name}: {what} must have shape ({Q},), got {tuple(values.shape)}.")
    cx = inverse.curvature.operator()(x)
    wanted = relative({p: b[p] - cx[p] - inverse.shift[p] * x[p] for p in b}, b)
    gap = (solution.residual.double() - wanted).abs() / (1 + wanted)
    _small(f"{name}: the certificate against |(C + damping) x - b| / |b|", float(gap.max()), tolerance)
    return x


def _pairs(name: str, inverse: Inverse, problem: Problem, tolerance: float) -> None:
    """Self-influence and the shorter way to scores, on the loss gradients of the first examples."""
    g = problem.loss_gradients(problem.batch(range(min(4, len(problem.train)))))
    written = g.dense()
    x = inverse(written, certify=False).x
    _near(f"{name}: self-influence (quadratic)", inverse.quadratic(g)[0], vectors.dot(written, x), tolerance)
    short = inverse.pairing(g)
    if short is not None:
        _near(f"{name}: scores by pairing", short(g), g.dot(x)[..., 0], tolerance)


# --- comparisons ---


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-8 if dtype == torch.float64 else 1e-3


def _random(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def _normal(shapes: Mapping[str, torch.Size], like: Tensor, seed: int) -> Vectors:
    """Independent normal right-hand sides."""
    size = sum(s.numel() for s in shapes.values())
    return vectors.unflatten(_random(like, RIGHT_HAND_SIDES, size, seed=seed), shapes)


def _shaped(what: str, v: Vectors, shapes: Mapping[str, torch.Size], count: int, dtype: torch.dtype) -> None:
    wanted = {p: (count, *s) for p, s in shapes.items()}
    got = {p: tuple(t.shape) for p, t in v.items()}
    if got != wanted:
        raise ConformanceError(f"{what}: names and shapes must be {wanted}, got {got}.")
    if wrong := {str(t.dtype) for t in tensors(v) if t.dtype != dtype}:
        raise ConformanceError(f"{what}: dtype must be {dtype}, got {', '.join(sorted(wrong))}.")


def _same(what: str, got: Vectors, wanted: Vectors | None, tolerance: float) -> None:
    """Equal over all parameters, for each right-hand side; to zero if nothing is wanted."""
    wanted = vectors.zeros_like(got) if wanted is None else wanted
    if set(got) != set(wanted) or any(got[p].shape != wanted[p].shape for p in wanted):
        raise ConformanceError(f"{what}: names or shapes differ from those expected.")
    size = vectors.norm(wanted).clamp(min=1e-300)
    _small(what, float((vectors.norm(vectors.add(got, wanted, -1.0)) / size).max()), tolerance)


def _near(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape:
        raise ConformanceError(f"{what}: shape must be {tuple(wanted.shape)}, got {tuple(got.shape)}.")
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300)
    _small(what, float(difference), tolerance)


def _small(what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # NaN fails too
        raise ConformanceError(f"{what}: relative difference {error:.1e}, allowed is {tolerance:.0e}.")


def _ritz(C: Operator, v: Vectors) -> Tensor:
    """Eigenvalues of C on a Krylov space: the Lanczos method, fully orthogonalised, finds the extreme ones first."""
    shapes = {p: t.shape[1:] for p, t in v.items()}
    q = vectors.flatten(v)  # (1, D)
    basis, images = q[:0], q[:0]
    for _ in range(min(LANCZOS, q.shape[1])):
        basis = torch.cat([basis, q / q.norm()])
        image = vectors.flatten({p: C(vectors.unflatten(basis[-1:], shapes))[p] for p in shapes})
        images, q = torch.cat([images, image]), image
        for _ in range(2):
            q = q - q @ basis.T @ basis
        if float(q.norm()) <= 1e-10 * float(image.norm()):
            break
    projected = basis @ images.T
    return torch.linalg.eigvalsh((projected + projected.T) / 2)
