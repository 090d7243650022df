"""whence: which training examples made a PyTorch model behave so, how strongly, and how sure is the number."""

from whence.attribution import SOURCE, Influence, Scores, Top, TracIn, attribute
from whence.curvature import GGN, Curvature, EmpiricalFisher, Hessian, Need, Operator
from whence.curvature.spectrum import Spectrum, spectrum
from whence.damping import Damping
from whence.errors import (
    ArtefactError,
    ConvergenceWarning,
    DivergenceError,
    InputError,
    MissingExtraError,
    UnsupportedError,
    WhenceError,
    WhenceWarning,
)
from whence.factored import Factored, Written
from whence.layers import LayerKind, register
from whence.problem import Problem
from whence.solvers import (
    ASTRA,
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    Auto,
    DataInf,
    Dual,
    Exact,
    HyperINF,
    Identity,
    Inverse,
    Neumann,
    Nystrom,
    Pairing,
    RandProj,
    RandSelect,
    Solution,
    Solver,
)
from whence.task import Classification, Regression, Task
from whence.trajectory import Recorder, Trajectory
from whence.vectors import Vectors

__version__ = "0.1.0"

__all__ = [
    "ASTRA",
    "CG",
    "EKFAC",
    "GGN",
    "KFAC",
    "SOURCE",
    "Arnoldi",
    "ArtefactError",
    "Auto",
    "Classification",
    "ConvergenceWarning",
    "Curvature",
    "Damping",
    "DataInf",
    "DivergenceError",
    "Dual",
    "EmpiricalFisher",
    "Exact",
    "Factored",
    "Hessian",
    "HyperINF",
    "Identity",
    "Influence",
    "InputError",
    "Inverse",
    "LayerKind",
    "MissingExtraError",
    "Need",
    "Neumann",
    "Nystrom",
    "Operator",
    "Pairing",
    "Problem",
    "RandProj",
    "RandSelect",
    "Recorder",
    "Regression",
    "Scores",
    "Solution",
    "Solver",
    "Spectrum",
    "Task",
    "Top",
    "TracIn",
    "Trajectory",
    "UnsupportedError",
    "Vectors",
    "WhenceError",
    "WhenceWarning",
    "Written",
    "attribute",
    "register",
    "spectrum",
]
