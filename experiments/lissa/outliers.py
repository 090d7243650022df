"""Is the plan stable in mean square on the real data? A lower bound on the growth, from single outlying examples.

Squared errors evolve by M -> E (I - a (C_b + damping)) M (I - a (C_b + damping)), self-adjoint in M, so that its
largest eigenvalue is at least its Rayleigh quotient at M = q q^T, for any unit vector q:

    growth >= (1 - a (q.C q + damping))^2 + (a^2 / |B|) (E_i (q.C_i q)^2 - (q.C q)^2),

the mean over examples i. A value above 1 proves that mean squares diverge. Tried: the heaviest row of each of the 100
examples with the largest tr C_i. Since C_i^2 <= tr(C_i) C_i, condition C.1 holds with c = max tr C_i / tr C, whatever
the distribution; the plan takes the c of the top eigenvectors, which is smaller.

    python -m experiments.lissa.outliers                       # about a minute of one core
"""

from __future__ import annotations

import torch
from torch import Tensor

import wherefrom
from experiments.lissa import problems
from wherefrom.curvature import GGN
from wherefrom.curvature.lanczos import Estimate
from wherefrom.solvers.neumann import corollary

TRIED = 100


def traces(curvature: GGN) -> Tensor:
    """Trace tr C_i of every example, (N,) float64."""
    parts = []
    for g in curvature.gradients():
        norms = sum(r.square_norms().double() for r in g.rows.values())
        parts.append((norms * g.weights).sum(1))
    return torch.cat(parts)


def forms(curvature: GGN, heaviest: Tensor) -> Tensor:
    """q.C_i q for the heaviest row q of each of these examples and every example i, (Q, N) float64."""
    rows = next(curvature.gradients())
    assert len(rows) == len(curvature.problem.train)
    some = rows[heaviest]
    norms = sum(r.square_norms().double() for r in some.rows.values()) * some.weights  # (Q, R)
    written = some.dense()  # (Q R, ...)
    at = torch.arange(len(heaviest)) * norms.shape[1] + norms.argmax(1)
    q = written[at]
    q = q.scale(1 / q.norm())
    return (rows.dot(q).double().square() * rows.weights).sum(-1)


def growth(found: Tensor, damping: float, step: float, batch: int) -> float:
    """The largest of the lower bounds."""
    mean = found.mean(1)
    bound = (1 - step * (mean + damping)).square() + step**2 / batch * (found.square().mean(1) - mean.square())
    return float(bound.max())


def main() -> None:
    heads = ["problem", "max tr Cᵢ / tr C", "c of the plan", "plan", "|B|", "step", "growth a step, at least"]
    print("| " + " | ".join(h.replace("|", "\\|") for h in heads) + " |\n|" + "---|" * len(heads))
    for name in problems.NAMES:
        case = problems.load(name)
        influence = case.fit(wherefrom.Neumann(), wherefrom.Damping.per_example())
        curvature, damping = influence.inverse.curvature, min(influence.inverse.damping.values())
        assert isinstance(curvature, GGN)
        each = traces(curvature)
        found = forms(curvature, each.sort(descending=True).indices[:TRIED])
        seen = curvature.cached(("spectrum", 0), lambda: None)
        worst = float(each.max() / each.mean())
        safe = vars(seen) | {"constant": Estimate(worst, 0.0)}
        own = corollary(seen, damping)
        tenth = max(1, round(0.1 * own.batch))
        plans = {
            "Corollary 1": own,
            "twice the batch": own,
            "a tenth of the batch, the step for it": corollary(seen, damping, batch=tenth),
            "Corollary 1, c = max tr Cᵢ / tr C": corollary(wherefrom.Spectrum(**safe), damping),
        }
        for label, plan in plans.items():
            batch = 2 * plan.batch if label.startswith("twice") else plan.batch
            bound = growth(found, damping, plan.step, batch)
            cells = [name, f"{worst:.1f}", f"{own.constant:.1f}", label, str(batch), f"{plan.step:.3g}", f"{bound:.3f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
