"""The conformance suite: what every operator, solver and layer entry must fulfil, for the library's own and for yours.

    check_operator(GGN(problem))                                    # symmetric, linear, positive if it says so
    check_solver(MySolver(), GGN(problem), damping=0.1)             # the contract of fit, apply, saving
    check_layer(MyKind(), MyLayer(3, 5).double(), x)                # per-example gradients against autograd

Each returns None, or raises a `ConformanceError` that names what failed and by how much.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from wherefrom import records
from wherefrom.curvature.base import Curvature, Need, Operator
from wherefrom.curvature.damping import Damping
from wherefrom.errors import AttributionError, ConvergenceWarning, UnsupportedError
from wherefrom.methods.influence import saved_classes
from wherefrom.model.observe import copy_model
from wherefrom.model.problem import Problem
from wherefrom.persample.blocks import Block
from wherefrom.persample.directions import Directions, concatenate
from wherefrom.persample.factored import Factored
from wherefrom.persample.layers import LayerKind, transposed
from wherefrom.solvers.base import Inverse, Solver, relative_norm

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
    """Check a deterministic symmetric linear map on `Directions`.

    Blocks, shapes and dtype are kept, the input is not modified, a repeated product is the same, several right-hand
    sides equal one at a time, C(2u - 3v) = 2Cu - 3Cv, u.Cv = v.Cu, and no negative eigenvalue where ``psd`` is claimed.

    Args:
        operator: the map, or a curvature, whose map over all the data is taken. One that draws minibatches fails.
        dtype: of the directions; None takes the one of the curvature's model, or float64.
        tolerance: relative; None takes 1e-8 in float64 and 1e-3 in float32.
        seed: of the random directions.

    Raises:
        ConformanceError: naming the first of these that does not hold.
    """
    problem = getattr(operator, "problem", None) or getattr(getattr(operator, "curvature", None), "problem", None)
    C = cast(Operator, operator.operator() if isinstance(operator, Curvature) else operator)
    like = next(iter(problem.parameters.values())) if isinstance(problem, Problem) else torch.empty(0).double()
    like = like.detach().to(dtype or like.dtype)
    tolerance, name = tolerance or _tolerance(like.dtype), type(operator).__name__
    u, v = _draw(C.blocks, like, seed), _draw(C.blocks, like, seed + 1)
    before = v.clone()
    cu, cv = C(u), C(v)
    _check_shape(f"{name}: C v", cv, C.blocks, RIGHT_HAND_SIDES, like.dtype)
    _check_same(f"{name}: the input v after C v", v, before, 0.0)
    _check_same(f"{name}: a repeated C v (an operator that draws minibatches cannot pass)", C(v), cv, tolerance)
    single = concatenate([C(one) for one in v.chunk(1)])
    _check_same(f"{name}: right-hand sides one at a time", single, cv, tolerance)
    both = C(u.scale(2.0).axpy(-3.0, v))
    _check_same(f"{name}: linearity, C(2u - 3v)", both, cu.scale(2.0).axpy(-3.0, cv), tolerance)
    gap = (u.dot(cv) - v.dot(cu)).abs() / (u.norm() * cv.norm()).clamp(min=1e-300)
    _check_small(f"{name}: symmetry, |u.Cv - v.Cu| / |u||Cv|", float(gap.max()), tolerance)
    if C.psd:
        values = _ritz_values(C, v[:1])
        lowest = float(-values.min() / values.abs().max().clamp(min=1e-300))
        what = f"{name}: claims psd, but has an eigenvalue below 0, relative to the largest"
        _check_small(what, lowest, tolerance)


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
    certificate is the residual computed here. The fields of the inverse, saved and read again, give the same answers.
    Self-influence agrees with the solutions, and so do the solutions of per-sample gradients that are not written out.

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
        b = _draw(problem.blocks, next(iter(problem.parameters.values())).detach(), seed)
        b = concatenate([b, b[:1].zeros_like()])  # the last one is zero
        x = _check_solution(name, inverse, b, tolerance)
        single = concatenate([inverse.solve(one, certify=False)[0].dense() for one in b.chunk(1)])
        _check_same(f"{name}: right-hand sides solved one by one", single, x, tolerance)
        _check_same(f"{name}: the solution of a zero right-hand side", x[-1:], None, 0.0)
        if not inverse.solve(b, certify=False)[1].history.numel():
            mixed = b[:1].scale(2.0).axpy(-3.0, b[1:2])
            wanted = x[:1].scale(2.0).axpy(-3.0, x[1:2])
            _check_same(f"{name}: linearity, the solution of 2b - 3c", inverse.apply(mixed), wanted, tolerance)
        restored = _save_and_restore(name, inverse)
        _check_same(f"{name}: solutions after saving and restoring", restored.apply(b), x, tolerance)
        _check_gradients(name, inverse, problem, tolerance)


def _save_and_restore(name: str, inverse: Inverse) -> Inverse:
    """Take an inverse apart and put it together again, as a file would."""
    given = {"curvature": inverse.curvature, "damping": inverse.damping}
    try:
        tensors, description = records.describe(inverse, given)
        saved = {path: t.clone() for path, t in tensors.items()}
        return records.rebuild(json.loads(json.dumps(description)), saved, given, saved_classes())
    except AttributionError as error:
        raise ConformanceError(f"{name}: its inverse cannot be restored by its fields: {error}") from error


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
    layer = copy_model(layer).eval().requires_grad_(True)
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
        arguments = (((x,), {}),) if getattr(kind, "whole", False) else ()  # those of the call, where a rule wants them
        found = cast(Factored, kind.rows(layer, x, g, tuple(held), *arguments))  # or another form with the same methods
        dense = found.written().rows
    _check_near(f"{name}: shape of the rows", torch.tensor(dense.shape), torch.tensor((n, R, block.size)), 0.0)
    wanted_rows = Directions.from_parameters((block,), {part: torch.stack(some) for part, some in truth.items()})
    rows = Directions((block,), {block.name: dense.reshape(-1, *block.sides)})
    _check_same(f"{name}: rows", rows, wanted_rows, tolerance)  # each row, over the weight and the bias together
    other = torch.arange(1, n, device=dense.device)
    v, w = _random(dense, 2, *block.sides), _random(dense, 2, n, R)
    wanted = torch.einsum("qnr,nrd->qd", w, dense).view(v.shape)
    gram = torch.einsum("nrd,msd->nrms", dense, dense[other])
    _check_near(f"{name}: dot", found.dot(v), torch.einsum("qd,nrd->qnr", v.flatten(1), dense), tolerance)
    _check_near(f"{name}: combine", found.combine(w), wanted, tolerance)
    _check_near(f"{name}: gram", found.gram(found[other]), gram, tolerance)
    _check_near(f"{name}: square_norms", found.square_norms(), dense.square().sum(2), tolerance)


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


def _check_solution(name: str, inverse: Inverse, b: Directions, tolerance: float) -> Directions:
    """Check one solve, and return the solutions of b."""
    before, problem, Q = b.clone(), inverse.curvature.problem, len(b)
    _check_shape(f"{name}: apply", inverse.apply(b), problem.blocks, Q, problem.dtype)
    x, certificate = inverse.solve(b)
    x = x.dense()
    _check_shape(f"{name}: the solution", x, problem.blocks, Q, problem.dtype)
    _check_same(f"{name}: the right-hand side after solving", b, before, 0.0)
    if not x.is_finite().all():
        raise ConformanceError(f"{name}: the solution must be finite; raise DivergenceError otherwise.")
    again, uncertified = inverse.solve(b, certify=False)
    _check_same(f"{name}: solving again", again, x, tolerance)
    _check_same(f"{name}: apply without a certificate", inverse.apply(b), x, tolerance)
    if certificate.residual is None or uncertified.residual is not None:
        raise ConformanceError(f"{name}: residual must be measured if certify=True, and be None if certify=False.")
    for what, values in (("residual", certificate.residual), ("converged", certificate.converged)):
        if values.shape != (Q,):
            raise ConformanceError(f"{name}: {what} must have shape ({Q},), got {tuple(values.shape)}.")
    image = inverse.curvature.operator()(x)
    wanted = relative_norm(b.axpy(-1.0, image).axpy({k: -s for k, s in inverse.damping.items()}, x), b)
    gap = (certificate.residual.double() - wanted).abs() / (1 + wanted)
    _check_small(f"{name}: the certificate against |(C + damping) x - b| / |b|", float(gap.max()), tolerance)
    return x


def _check_gradients(name: str, inverse: Inverse, problem: Problem, tolerance: float) -> None:
    """Check self-influence, and scores from factored right-hand sides, on the loss gradients of the first examples."""
    g = problem.loss_gradients(problem.batch(range(min(4, len(problem.train)))))
    x = inverse.solve(g.dense(), certify=False)[0].dense()
    _check_near(f"{name}: self-influence", inverse.self_influence(g)[0], g.dense().dot(x), tolerance)
    b = g.to_directions().to_eigenbasis(inverse.scoring_basis)
    factored = inverse.solve(b, certify=False)[0]
    _check_near(f"{name}: scores by factored right-hand sides", g.dot(factored), g.dot(x), tolerance)


# --- comparisons ---


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-8 if dtype == torch.float64 else 1e-3


def _random(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def _draw(blocks: tuple[Block, ...], like: Tensor, seed: int) -> Directions:
    """Draw independent normal right-hand sides."""
    size = sum(block.size for block in blocks)
    return Directions.unflatten(blocks, _random(like, RIGHT_HAND_SIDES, size, seed=seed))


def _check_shape(what: str, v: object, blocks: tuple[Block, ...], count: int, dtype: torch.dtype) -> None:
    if not isinstance(v, Directions):
        raise ConformanceError(f"{what} must be wherefrom.Directions, got {type(v).__name__}.")
    wanted = {block.name: (count, *block.sides) for block in blocks}
    got = {name: tuple(t.shape) for name, t in v.dense().tensors().items()}
    if got != wanted:
        raise ConformanceError(f"{what}: blocks and shapes must be {wanted}, got {got}.")
    if wrong := {str(t.dtype) for t in v.dense().tensors().values() if t.dtype != dtype}:
        raise ConformanceError(f"{what}: dtype must be {dtype}, got {', '.join(sorted(wrong))}.")


def _check_same(what: str, got: Directions, wanted: Directions | None, tolerance: float) -> None:
    """Check that directions are equal, each over all its blocks; or zero, if nothing is wanted."""
    mine = got.dense().tensors()
    wanted = got.dense().zeros_like() if wanted is None else wanted.dense()
    theirs = wanted.tensors()
    if set(mine) != set(theirs) or any(mine[name].shape != t.shape for name, t in theirs.items()):
        raise ConformanceError(f"{what}: blocks or shapes differ from those expected.")
    size = wanted.norm().clamp(min=1e-300)
    _check_small(what, float((got.axpy(-1.0, wanted).norm() / size).max()), tolerance)


def _check_near(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape:
        raise ConformanceError(f"{what}: shape must be {tuple(wanted.shape)}, got {tuple(got.shape)}.")
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300)
    _check_small(what, float(difference), tolerance)


def _check_small(what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # NaN fails too
        raise ConformanceError(f"{what}: relative difference {error:.1e}, allowed is {tolerance:.0e}.")


def _ritz_values(C: Operator, v: Directions) -> Tensor:
    """Find eigenvalues of C on a Krylov space: the fully orthogonalised Lanczos method finds the extreme ones first."""
    q = v.flatten()  # (1, D)
    basis, images = q[:0], q[:0]
    for _ in range(min(LANCZOS, q.shape[1])):
        basis = torch.cat([basis, q / q.norm()])
        image = C(Directions.unflatten(v.blocks, basis[-1:])).flatten()
        images, q = torch.cat([images, image]), image
        for _ in range(2):
            q = q - q @ basis.T @ basis
        if float(q.norm()) <= 1e-10 * float(image.norm()):
            break
    projected = basis @ images.T
    return torch.linalg.eigvalsh((projected + projected.T) / 2)
