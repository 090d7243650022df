"""Ways of applying (C + damping I)^-1: solvers, frozen records, and the inverses that they fit."""

from wherefrom.solvers.auto import Auto
from wherefrom.solvers.base import Inverse, Iterates, Solver
from wherefrom.solvers.cg import CG
from wherefrom.solvers.datainf import DataInf
from wherefrom.solvers.gram import Dual
from wherefrom.solvers.hyperinf import HyperINF
from wherefrom.solvers.identity import Identity
from wherefrom.solvers.kronecker import EKFAC, KFAC
from wherefrom.solvers.neumann import ASTRA, Neumann
from wherefrom.solvers.projection import RandProj, RandSelect
from wherefrom.solvers.spectral import Arnoldi, Exact, Nystrom

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
    "Iterates",
    "Neumann",
    "Nystrom",
    "RandProj",
    "RandSelect",
    "Solver",
]
