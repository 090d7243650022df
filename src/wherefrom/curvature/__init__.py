"""Curvature matrices: what a solver may ask of a model and its data."""

from wherefrom.curvature.base import Curvature, Need, Operator
from wherefrom.curvature.fisher import EmpiricalFisher
from wherefrom.curvature.ggn import GGN
from wherefrom.curvature.hessian import Hessian
from wherefrom.curvature.kronecker import Basis, KroneckerBlock

__all__ = ["GGN", "Basis", "Curvature", "EmpiricalFisher", "Hessian", "KroneckerBlock", "Need", "Operator"]
