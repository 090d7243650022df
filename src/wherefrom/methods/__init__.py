"""Methods: from a fit to solutions and scores."""

from wherefrom.methods.base import Fitted, Method
from wherefrom.methods.baselines import Embeddings, GradCos, Random
from wherefrom.methods.call import attribute
from wherefrom.methods.candidates import recall, rescored, shortlist
from wherefrom.methods.gradient_store import GradientStore
from wherefrom.methods.influence import FittedInfluence, Influence
from wherefrom.methods.lexical import BM25, TFIDF
from wherefrom.methods.relative import response_norms
from wherefrom.methods.replay import Replay
from wherefrom.methods.similarity import similarity
from wherefrom.methods.solution import Solution
from wherefrom.methods.source import SOURCE
from wherefrom.methods.tracin import TracIn
from wherefrom.methods.trak import TRAK
from wherefrom.methods.unrolled import Unrolled
from wherefrom.scores import Certificate, Scores, Top, ensemble

__all__ = [
    "BM25",
    "SOURCE",
    "TFIDF",
    "TRAK",
    "Certificate",
    "Embeddings",
    "Fitted",
    "FittedInfluence",
    "GradCos",
    "GradientStore",
    "Influence",
    "Method",
    "Random",
    "Replay",
    "Scores",
    "Solution",
    "Top",
    "TracIn",
    "Unrolled",
    "attribute",
    "ensemble",
    "recall",
    "rescored",
    "response_norms",
    "shortlist",
    "similarity",
]
