"""Ways of applying (C + damping I)^-1, one short file each."""

from wherefrom.solvers.arnoldi import Arnoldi
from wherefrom.solvers.auto import Auto
from wherefrom.solvers.base import Inverse, Pairing, Solution, Solver
from wherefrom.solvers.cg import CG
from wherefrom.solvers.datainf import DataInf
from wherefrom.solvers.exact import Exact
from wherefrom.solvers.gram import Dual
from wherefrom.solvers.hyperinf import HyperINF
from wherefrom.solvers.identity import Identity
from wherefrom.solvers.kronecker import EKFAC, KFAC
from wherefrom.solvers.neumann import ASTRA, Neumann
from wherefrom.solvers.nystrom import Nystrom
from wherefrom.solvers.projection import RandProj, RandSelect

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
