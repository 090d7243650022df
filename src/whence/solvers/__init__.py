"""Ways of applying (C + damping I)^-1, one short file each."""

from whence.solvers.base import Inverse, Solution, Solver
from whence.solvers.cg import CG
from whence.solvers.dual import Dual
from whence.solvers.exact import Exact
from whence.solvers.identity import Identity
from whence.solvers.kronecker import EKFAC, KFAC
from whence.solvers.neumann import ASTRA, Neumann

__all__ = ["ASTRA", "CG", "EKFAC", "KFAC", "Dual", "Exact", "Identity", "Inverse", "Neumann", "Solution", "Solver"]
