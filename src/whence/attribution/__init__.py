"""From an inverse to scores."""

from whence.attribution.influence import Influence, attribute
from whence.attribution.scores import Scores, Top

__all__ = ["Influence", "Scores", "Top", "attribute"]
