"""Curvature matrices: what a solver may ask of a model and its data."""

from whence.curvature.base import Curvature, Need, Operator
from whence.curvature.fisher import EmpiricalFisher
from whence.curvature.ggn import GGN
from whence.curvature.hessian import Hessian
from whence.curvature.kronecker import Basis, KroneckerBlock

__all__ = ["GGN", "Basis", "Curvature", "EmpiricalFisher", "Hessian", "KroneckerBlock", "Need", "Operator"]
