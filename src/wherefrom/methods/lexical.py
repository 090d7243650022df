"""Lexical baselines for text: which documents share the query's words, the rare ones above all.

    TFIDF   the cosine of vectors  tf(t, d) (ln((1 + n) / (1 + df(t))) + 1)
    BM25    sum over the query's words t of  ln(1 + (n - df + 1/2) / (df + 1/2)) tf / (tf + k1 (1 - b + b |d| / mean))

n documents, df(t) of them with word t, |d| words in document d. BM25 is that of Robertson & Zaragoza 2009 with the
logarithm that Lucene takes, which is never negative. No model is asked. The best of many documents are candidates for a
method that asks one: ``TFIDF().fit(texts).score(queries).top(k).proponents``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected
from wherefrom.methods.base import fitted
from wherefrom.scores import Scores, unsolved

if TYPE_CHECKING:
    from scipy import sparse

Text = str | Sequence[Hashable] | Tensor | NDArray
Self = TypeVar("Self", bound="Lexical")


class Lexical(ABC):
    """Scores by the words that queries and documents share; sparse, so that a hundred thousand documents fit."""

    def fit(self: Self, texts: Sequence[Text]) -> Self:
        r"""Count the words of N documents.

        Args:
            texts: strings, whose words are the matches of ``\w+`` in lower case; or sequences of words or of token
                numbers, of any length, without padding.

        Returns:
            Itself.

        Raises:
            InputError: if there are none, or one string in place of several.
        """
        documents = _words(texts, "texts")
        self._vocabulary = {word: column for column, word in enumerate(dict.fromkeys(chain(*documents)))}
        counts = _counts(documents, self._vocabulary)
        df = np.bincount(counts.indices, minlength=len(self._vocabulary))
        self._idf = self._rarity(len(documents), df)
        self._documents = self._weighted(counts)
        return self

    def score(self, queries: Sequence[Text]) -> Scores:
        """Similarities of Q queries with the N documents, (Q, N) float64; words of no document count nothing.

        Args:
            queries: in the form of the documents.

        Raises:
            InputError: if the documents were words and the queries are numbers, or the other way round.
        """
        vocabulary, asked = fitted(self, "_vocabulary"), _words(queries, "queries")
        known, given = ({isinstance(word, str) for word in words} for words in (vocabulary, chain(*asked)))
        if known and not given <= known:
            raise expected("queries", "in the form of the documents", "words for token numbers or numbers for words")
        found = (self._asked(_counts(asked, vocabulary)) @ self._documents.T).toarray()
        return unsolved(torch.from_numpy(found), solver=repr(self), examples=found.shape[1])

    @abstractmethod
    def _rarity(self, n: int, df: NDArray) -> NDArray:
        """The weight of each word by the number of documents that have it, (V,)."""

    @abstractmethod
    def _weighted(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Documents (N, V), from how often they have each word."""

    @abstractmethod
    def _asked(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Queries (Q, V), from how often they have each word."""


@dataclass
class TFIDF(Lexical):
    """Cosines of TF-IDF vectors, with smoothed document frequencies."""

    def _rarity(self, n: int, df: NDArray) -> NDArray:
        return np.log((1 + n) / (1 + df)) + 1

    def _weighted(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        v = _with(counts, counts.data * self._idf[counts.indices])
        length = np.sqrt(_sums(v.multiply(v)))
        return _with(v, v.data / length[_rows(v)])

    def _asked(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        return self._weighted(counts)


@dataclass
class BM25(Lexical):
    """Okapi BM25.

    Args:
        k1: how late repetition of a word saturates.
        b: how much a document's length counts against it, 0 to 1.
    """

    k1: float = 1.5
    b: float = 0.75

    def _rarity(self, n: int, df: NDArray) -> NDArray:
        return np.log1p((n - df + 0.5) / (df + 0.5))

    def _weighted(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        length = _sums(counts)
        late = self.k1 * (1 - self.b + self.b * length / max(length.mean(), 1e-300))
        return _with(counts, self._idf[counts.indices] * counts.data / (counts.data + late[_rows(counts)]))

    def _asked(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        return counts


def _words(texts: Sequence[Text], what: str) -> list[Sequence[Hashable]]:
    """The words of each text."""
    if isinstance(texts, str) or not len(texts):
        raise expected(what, "a list of texts", f"{texts!r}"[:60])
    return [_split(text, what) for text in texts]


def _split(text: Text, what: str) -> Sequence[Hashable]:
    if isinstance(text, str):
        return re.findall(r"\w+", text.lower())
    if isinstance(text, (Tensor, np.ndarray)) and text.ndim == 1:
        return text.tolist()
    if not isinstance(text, Sequence):
        raise expected(f"each of {what}", "a string, or a sequence of words or token numbers", type(text).__name__)
    return text


def _counts(texts: Sequence[Sequence[Hashable]], vocabulary: Mapping[Hashable, int]) -> sparse.csr_matrix:
    """How often each text has each word of the vocabulary, (n, V) float64, columns in order."""
    from scipy import sparse  # a second of import that only text needs

    columns = np.fromiter((vocabulary.get(word, -1) for text in texts for word in text), np.int64)
    rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])[columns >= 0]
    columns = columns[columns >= 0]
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(texts), len(vocabulary)))


def _rows(m: sparse.csr_matrix) -> NDArray:
    """The row of each number stored."""
    return np.repeat(np.arange(len(m.indptr) - 1), np.diff(m.indptr))


def _sums(m: sparse.csr_matrix) -> NDArray:
    """The sum of each row."""
    return np.asarray(m.sum(1)).ravel()


def _with(m: sparse.csr_matrix, data: NDArray) -> sparse.csr_matrix:
    """The same pattern with other numbers."""
    m = m.copy()
    m.data = data
    return m
