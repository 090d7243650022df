"""Lexical baselines for text: which documents share the query's words, the rare ones above all.

    TFIDF   the cosine of vectors  tf(t, d) (ln((1 + n) / (1 + df(t))) + 1)
    BM25    sum over the query's words t of  ln(1 + (n - df + 1/2) / (df + 1/2)) tf / (tf + k1 (1 - b + b |d| / mean))

n documents, df(t) of them with word t, tf(t, d) times in document d, |d| words in document d. TF-IDF is that of
scikit-learn with its defaults. BM25 is that of Robertson & Zaragoza 2009 with the logarithm that Lucene takes, which is
never negative, and is computed by bm25s. No model is asked. The best of many documents are candidates for a method that
asks one: ``TFIDF().fit(texts).score(queries).top(k).proponents``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected, missing_extra
from wherefrom.methods.base import fitted
from wherefrom.scores import Scores, unsolved

Text = str | Sequence[Hashable] | Tensor | NDArray
Words = Sequence[Hashable]
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
            MissingExtraError: if the package that counts is not installed.
        """
        documents = _split_texts(texts, "texts")
        distinct = dict.fromkeys(chain(*documents))
        self._vocabulary = {word: number for number, word in enumerate(distinct)}
        self._n_documents = len(documents)
        # The packages refuse documents without any words. Nothing is like them, so that all scores are zero.
        if self._vocabulary:
            self._index(documents)
        return self

    def score(self, queries: Sequence[Text]) -> Scores:
        """Compare Q queries with the N documents, (Q, N) float64; words of no document count nothing.

        Args:
            queries: in the form of the documents.

        Raises:
            InputError: if the documents were words and the queries are numbers, or the other way round.
        """
        vocabulary = fitted(self, "_vocabulary")
        split_queries = _split_texts(queries, "queries")
        has_text = _forms(vocabulary)
        if has_text and not _forms(chain(*split_queries)) <= has_text:
            raise expected("queries", "in the form of the documents", "words for token numbers or numbers for words")

        similarities = np.zeros((len(split_queries), self._n_documents))
        if vocabulary:
            similarities = self._compare(split_queries)
        return unsolved(torch.from_numpy(similarities), solver=repr(self), examples=self._n_documents)

    @abstractmethod
    def _index(self, documents: list[Words]) -> None:
        """Prepare what `_compare` needs from the words of the documents; ``_vocabulary`` has them all."""

    @abstractmethod
    def _compare(self, queries: list[Words]) -> NDArray[np.float64]:
        """Score the documents for each query, (Q, N)."""


@dataclass
class TFIDF(Lexical):
    """Cosines of TF-IDF vectors, with smoothed document frequencies, by scikit-learn."""

    def _index(self, documents: list[Words]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise missing_extra("TFIDF", "scikit-learn", "eval") from error

        # The rows are of length one by default, so that dot products are cosines. Without our vocabulary scikit-learn
        # would sort the words, which not all that may be words can be.
        analyzer: Any = _itself  # its annotations name text alone
        self._vectorizer = TfidfVectorizer(analyzer=analyzer, vocabulary=self._vocabulary, lowercase=False)
        self._documents = self._vectorizer.fit_transform(documents)  # sparse (N, V)

    def _compare(self, queries: list[Words]) -> NDArray[np.float64]:
        return (self._vectorizer.transform(queries) @ self._documents.T).toarray()


@dataclass
class BM25(Lexical):
    """Okapi BM25, by bm25s.

    Args:
        k1: how late repetition of a word saturates.
        b: how much a document's length counts against it, 0 to 1.
    """

    k1: float = 1.5
    b: float = 0.75

    def _index(self, documents: list[Words]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise missing_extra("BM25", "bm25s", "eval") from error

        # bm25s takes strings for words; a word of ours may be anything hashable, so that it is given numbers.
        vocabulary = {str(number): number for number in self._vocabulary.values()}
        numbers = [self._number_words(words) for words in documents]
        self._retriever = bm25s.BM25(method="lucene", k1=self.k1, b=self.b, dtype="float64")
        self._retriever.index((numbers, vocabulary), create_empty_token=False, show_progress=False)

    def _compare(self, queries: list[Words]) -> NDArray[np.float64]:
        similarities = np.zeros((len(queries), self._n_documents))
        for row, words in zip(similarities, queries, strict=True):
            numbers = self._number_words(words)
            if numbers:  # bm25s takes no query without known words
                row[:] = self._retriever.get_scores_from_ids(numbers)
        return similarities

    def _number_words(self, words: Words) -> list[int]:
        """Replace words by their numbers, leaving out those of no document."""
        return [self._vocabulary[word] for word in words if word in self._vocabulary]


def _itself(words: Any) -> Any:
    """Give a text that is split already to scikit-learn; a function with a name, so that a method can be pickled."""
    return words


def _forms(words: Iterable[Hashable]) -> set[bool]:
    """Which forms words come in: True for text, False for token numbers."""
    return {isinstance(word, str) for word in words}


def _split_texts(texts: Sequence[Text], what: str) -> list[Words]:
    """Split each text into its words."""
    if isinstance(texts, str) or not len(texts):
        raise expected(what, "a list of texts", f"{texts!r}"[:60])
    return [_split_text(text, what) for text in texts]


def _split_text(text: Text, what: str) -> Words:
    if isinstance(text, str):
        return re.findall(r"\w+", text.lower())
    if isinstance(text, (Tensor, np.ndarray)) and text.ndim == 1:
        return text.tolist()
    if not isinstance(text, Sequence):
        raise expected(f"each of {what}", "a string, or a sequence of words or token numbers", type(text).__name__)
    return text
