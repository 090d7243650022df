"""Every solver on every problem: all of them run, however the layers cut their rows, and no batch size matters."""

import warnings

import pytest
import torch

import solving
from problems import NAMES, TinyProblem, problem
from solving import close
from wherefrom import (
    ASTRA,
    CG,
    EKFAC,
    GGN,
    KFAC,
    Arnoldi,
    Auto,
    DataInf,
    Dual,
    EmpiricalFisher,
    Exact,
    HyperINF,
    Identity,
    Neumann,
    Nystrom,
    Problem,
    RandProj,
    RandSelect,
)

pytestmark = pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning")
DAMPING = 0.1
EXACT = {  # the answer itself
    "exact primal": Exact(form="primal"),
    "exact dual": Exact(form="dual"),
    "dual": Dual(drop=0.0),
    "cg": CG(tolerance=1e-12, steps=2000),
    "cg block": CG(tolerance=1e-12, steps=2000, block=True),
    "cg nystrom": CG(Nystrom(rank=20), tolerance=1e-12, steps=2000),
    "cg pruned dual": CG(Dual(drop=1.0), tolerance=1e-12, steps=2000),
    "nystrom": Nystrom(rank=1000),
    "auto": Auto(tolerance=1e-12),
}
OTHERS = {  # each to a formula of its own: see the tests of each
    "ekfac": EKFAC(),
    "ekfac true": EKFAC(labels="true"),
    "kfac": KFAC(),
    "kfac true": KFAC(labels="true"),
    "pruned dual": Dual(drop=1.0),
    "small nystrom": Nystrom(rank=5),
    "arnoldi": Arnoldi(rank=4, steps=15),
    "neumann": Neumann(step=0.01, batch=4, steps=5),
    "astra": ASTRA(step=0.01, batch=4, steps=5),
    "projection": RandProj(8),
    "selection": RandSelect(8),
    "identity": Identity(),
    "datainf": DataInf(),
    "hyperinf": HyperINF(),
    "hyperinf input": HyperINF(side="input"),
    "hyperinf output": HyperINF(side="output"),
    "hyperinf larger": HyperINF(side="larger", drop_r=False),
    "hyperinf cholesky": HyperINF(inverse="cholesky"),
    "fisher blocks": HyperINF(matrix="fim"),
}


def solve(p: TinyProblem, solver, kind, batch: int, b: torch.Tensor) -> torch.Tensor:
    """The solutions for rows b (Q, D) with batches of this size, (Q, D)."""
    problem = Problem(p.model, p.task, p.train, batch_size=batch, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inverse = solver.fit(kind(problem), DAMPING)
        return p.flatten(solving.solve(inverse, p.unflatten(b), certify=False).x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [GGN, EmpiricalFisher])
def test_exact_solvers_give_the_dense_answer_on_every_problem(name, kind):
    p = problem(name)
    C = p.ggn() if kind is GGN else p.empirical_fisher()
    b = torch.cat([p.measurement_gradients(), p.loss_gradients()[:1]])
    wanted = torch.linalg.solve(C + DAMPING * torch.eye(p.dim).double(), b.T).T
    for i, (label, solver) in enumerate(EXACT.items()):
        for batch in (3, 100) if i % 2 else (100,):
            found = solve(p, solver, kind, batch, b)
            assert float((found - wanted).norm()) <= 1e-9 * float(wanted.norm()), (label, batch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [GGN, EmpiricalFisher])
def test_the_other_solvers_do_not_depend_on_the_batch_size(name, kind):
    p = problem(name)
    b = torch.cat([p.measurement_gradients(), p.loss_gradients()[:1]])
    for label, solver in OTHERS.items():
        found, again = (solve(p, solver, kind, batch, b) for batch in (100, 3))
        assert found.isfinite().all() and float(found.norm()) > 0, label
        assert float((found - again).norm()) <= 1e-10 * float(found.norm()), label


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["auto", "larger", "input", "output", "all"])
def test_hyperinf_is_its_formula_on_every_problem(name, side):
    """x = b (G + damping)^-1 with G = (1/N) sum of M^T M, M an example's gradient as the matrix of its block."""
    p = problem(name)
    lib = Problem(p.model, p.task, p.train, batch_size=4, progress=False)
    solver = HyperINF(matrix="fim") if side == "all" else HyperINF(side=side)
    inverse = solver.fit(EmpiricalFisher(lib), DAMPING)
    b, g = p.unflatten(p.measurement_gradients()), p.unflatten(p.loss_gradients())
    found, wanted = solving.apply(inverse, b), {}
    for block in lib.blocks:
        v, m, taken = block.pack(b), block.pack(g), inverse.sides[block.name]  # (Q, G, O, I), (N, G, O, I)
        if taken == "all":
            flat, rows = v.flatten(1), m.flatten(1)
            A = rows.T @ rows / p.n + DAMPING * torch.eye(rows.shape[1]).double()
            x = torch.linalg.solve(A, flat.T).T.view_as(v)
        elif taken == "input":
            A = torch.einsum("ngoi,ngoj->gij", m, m) / p.n + DAMPING * torch.eye(m.shape[3]).double()
            x = torch.einsum("qgoi,gij->qgoj", v, torch.linalg.inv(A))
        else:
            A = torch.einsum("ngoi,ngpi->gop", m, m) / p.n + DAMPING * torch.eye(m.shape[2]).double()
            x = torch.einsum("gop,qgpi->qgoi", torch.linalg.inv(A), v)
        wanted |= block.unpack(x)
    close(p.flatten(found), p.flatten(wanted), 1e-9)  # together: a layer before a norm may have a gradient of rounding
