"""Ways of applying (C + damping I)^-1, one short file each."""

from whence.solvers.arnoldi import Arnoldi
from whence.solvers.auto import Auto
from whence.solvers.base import Inverse, Pairing, Solution, Solver
from whence.solvers.cg import CG
from whence.solvers.datainf import DataInf
from whence.solvers.dual import Dual
from whence.solvers.exact import Exact
from whence.solvers.hyperinf import HyperINF
from whence.solvers.identity import Identity
from whence.solvers.kronecker import EKFAC, KFAC
from whence.solvers.neumann import ASTRA, Neumann
from whence.solvers.nystrom import Nystrom
from whence.solvers.projection import RandProj, RandSelect

__all__ = [
    "ASTRA",
    "CG",
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "Auto",
    "DataInf",
    "Dual",
    "Exact",
    "HyperINF",
    "Identity",
    "Inverse",
    "Neumann",
    "Nystrom",
    "Pairing",
    "RandProj",
    "RandSelect",
    "Solution",
    "Solver",
]
