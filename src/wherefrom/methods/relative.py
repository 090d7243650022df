"""How much each training example moves the parameters: what theta-RelatIF divides by (Barshan et al. 2020).

|(C + damping I)^-1 grad l(z)|,       theta-RelatIF: score(q, z) over it,       l-RelatIF: over sqrt(self(z))

scores.relative()                              # l-RelatIF, of scores with self_influence=True
scores.relative(response_norms(fitted))     # theta-RelatIF
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from wherefrom.errors import ConvergenceWarning
from wherefrom.methods.influence import FittedInfluence
from wherefrom.solvers.base import warn_unconverged
from wherefrom.surroundings import undisturbed


@undisturbed()
def response_norms(fitted: FittedInfluence) -> Tensor:
    """Return |(C + damping)^-1 g| of every training example's loss gradient g, (N,): a solve for each.

    Over N it is how far removing the example moves the parameters. Solves go by the solver's own residual; examples
    that miss its tolerance are named in a `ConvergenceWarning`.
    """
    problem, inverse = fitted.problem, fitted.inverse
    norms, converged = [], []
    for _, batch in problem.batches(what="response norms"):
        with warnings.catch_warnings():  # named below by their numbers in the training set
            warnings.simplefilter("ignore", ConvergenceWarning)
            x, certificate = inverse.solve(problem.loss_gradients(batch).to_directions(), certify=False)
        norms.append(x.norm())
        converged.append(certificate.converged)
    warn_unconverged(torch.cat(converged), "training examples", inverse.tolerance or 0.0)
    return torch.cat(norms).to(problem.dtype)
