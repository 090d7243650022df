"""From an inverse to scores."""

from whence.attribution.baselines import Embeddings, GradCos, Random
from whence.attribution.call import attribute
from whence.attribution.candidates import recall, rescored, shortlist
from whence.attribution.gradient_store import GradientStore
from whence.attribution.influence import Influence
from whence.attribution.lexical import BM25, TFIDF
from whence.attribution.relative import response_norms
from whence.attribution.replay import Replay
from whence.attribution.scores import Scores, Top, ensemble
from whence.attribution.similarity import similarity
from whence.attribution.source import SOURCE
from whence.attribution.tracin import TracIn
from whence.attribution.trak import TRAK
from whence.attribution.unrolled import Unrolled

__all__ = [
    "BM25",
    "SOURCE",
    "TFIDF",
    "TRAK",
    "Embeddings",
    "GradCos",
    "GradientStore",
    "Influence",
    "Random",
    "Replay",
    "Scores",
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
