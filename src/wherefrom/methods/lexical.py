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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected, missing_extra
from wherefrom.scores import Scores, unsolved

Text = str | Sequence[Hashable] | Tensor | NDArray
Words = Sequence[Hashable]


Compare = Callable[[list[Words]], NDArray[np.float64]]  # Q queries, split into words -> similarities (Q, N)


class Lexical(ABC):
    """Scores by the words that queries and documents share; sparse, so that a hundred thousand documents fit."""

    def fit(self, texts: Sequence[Text]) -> FittedLexical:
        r"""Count the words of N documents.

        Args:
            texts: strings, whose words are the matches of ``\w+`` in lower case; or sequences of words or of token
                numbers, of any length, without padding.

        Raises:
            InputError: if there are none, or one string in place of several.
            MissingExtraError: if the package that counts is not installed.
        """
        documents = _split_texts(texts, "texts")
        distinct = dict.fromkeys(chain(*documents))
        vocabulary = {word: number for number, word in enumerate(distinct)}
        # The packages refuse documents without any words. Nothing is like them, so that all scores are zero.
        compare = self.index(documents, vocabulary) if vocabulary else None
        return FittedLexical(self, vocabulary, len(documents), compare)

    @abstractmethod
    def index(self, documents: list[Words], vocabulary: Mapping[Hashable, int]) -> Compare:
        """Return what scores the documents for queries.

        Args:
            documents: split into words.
            vocabulary: the number of each word of theirs.
        """


@dataclass(frozen=True, eq=False)
class FittedLexical:
    """Documents whose words are counted, ready for queries.

    Args:
        method: the settings.
        vocabulary: the number of each word of the documents.
        documents: how many there are.
        compare: what scores them; None if they have no words.
    """

    method: Lexical
    vocabulary: Mapping[Hashable, int]
    documents: int
    compare: Compare | None

    def score(self, queries: Sequence[Text]) -> Scores:
        """Compare Q queries with the N documents, (Q, N) float64; words of no document count nothing.

        Args:
            queries: in the form of the documents.

        Raises:
            InputError: if the documents were words and the queries are numbers, or the other way round.
        """
        split_queries = _split_texts(queries, "queries")
        has_text = _forms(self.vocabulary)
        if has_text and not _forms(chain(*split_queries)) <= has_text:
            raise expected("queries", "in the form of the documents", "words for token numbers or numbers for words")

        similarities = np.zeros((len(split_queries), self.documents))
        if self.compare is not None:
            similarities = self.compare(split_queries)
        return unsolved(torch.from_numpy(similarities), solver=repr(self.method), examples=self.documents)


@dataclass(frozen=True)
class TFIDF(Lexical):
    """Cosines of TF-IDF vectors, with smoothed document frequencies, by scikit-learn."""

    def index(self, documents: list[Words], vocabulary: Mapping[Hashable, int]) -> Compare:
        """Make vectors of the documents."""
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise missing_extra("TFIDF", "scikit-learn", "eval") from error

        # The rows are of length one by default, so that dot products are cosines. Without our vocabulary scikit-learn
        # would sort the words, which not all that may be words can be.
        analyzer: Any = _itself  # its annotations name text alone
        vectorizer = TfidfVectorizer(analyzer=analyzer, vocabulary=vocabulary, lowercase=False)
        rows = vectorizer.fit_transform(documents)  # sparse (N, V)
        return lambda queries: (vectorizer.transform(queries) @ rows.T).toarray()


@dataclass(frozen=True)
class BM25(Lexical):
    """Okapi BM25, by bm25s.

    Args:
        k1: how late repetition of a word saturates.
        b: how much a document's length counts against it, 0 to 1.
    """

    k1: float = 1.5
    b: float = 0.75

    def index(self, documents: list[Words], vocabulary: Mapping[Hashable, int]) -> Compare:
        """Count the words of the documents."""
        try:
            import bm25s
        except ImportError as error:
            raise missing_extra("BM25", "bm25s", "eval") from error

        def number_words(words: Words) -> list[int]:  # leaving out those of no document
            return [vocabulary[word] for word in words if word in vocabulary]

        # bm25s takes strings for words; a word of ours may be anything hashable, so that it is given numbers.
        numbered = [number_words(words) for words in documents]
        retriever = bm25s.BM25(method="lucene", k1=self.k1, b=self.b, dtype="float64")
        retriever.index(
            (numbered, {str(number): number for number in vocabulary.values()}),
            create_empty_token=False,
            show_progress=False,
        )

        def compare(queries: list[Words]) -> NDArray[np.float64]:
            similarities = np.zeros((len(queries), len(documents)))
            for row, words in zip(similarities, queries, strict=True):
                numbers = number_words(words)
                if numbers:  # bm25s takes no query without known words
                    row[:] = retriever.get_scores_from_ids(numbers)
            return similarities

        return compare


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
