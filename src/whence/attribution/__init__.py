"""From an inverse to scores."""

from whence.attribution.influence import Influence, attribute
from whence.attribution.scores import Scores, Top
from whence.attribution.source import SOURCE
from whence.attribution.tracin import TracIn

__all__ = ["SOURCE", "Influence", "Scores", "Top", "TracIn", "attribute"]
