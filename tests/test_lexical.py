"""TF-IDF and BM25 against their formulas written out, on every form of text."""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import pytest
import torch

import wherefrom
from wherefrom import BM25, TFIDF, InputError, MissingExtraError

pytest.importorskip("sklearn")
pytest.importorskip("bm25s")

METHODS = [TFIDF(), BM25(), BM25(k1=0.9, b=0.0), BM25(k1=2.0, b=1.0)]


def numbers(n: int, seed: int, most: int = 30, vocabulary: int = 25) -> list[list[int]]:
    """Documents of 0 to ``most`` tokens, the later ones of the vocabulary rarer."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, vocabulary + 1)
    return [rng.choice(vocabulary, rng.integers(0, most + 1), p=odds / odds.sum()).tolist() for _ in range(n)]


DOCUMENTS = [*numbers(40, 0), [], [3, 3, 3], [24]]
QUERIES = [*numbers(6, 1, vocabulary=35), [], [99, 99], [3], [0, 0, 0, 24]]  # some tokens are of no document


def words(texts: list[list[int]]) -> list[list[str]]:
    return [[f"w{token}" for token in text] for text in texts]


def close(found: torch.Tensor, wanted: object, tolerance: float = 1e-13) -> None:
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_scores_equal_the_formula_written_out(method):
    n, mean = len(DOCUMENTS), sum(map(len, DOCUMENTS)) / len(DOCUMENTS)
    df = {t: sum(t in d for d in DOCUMENTS) for d in DOCUMENTS for t in d}

    def vector(text):
        v = {t: text.count(t) * (math.log((1 + n) / (1 + df[t])) + 1) for t in text if t in df}
        length = math.sqrt(sum(x * x for x in v.values()))
        return {t: x / length for t, x in v.items()}

    def score(query, document):
        if isinstance(method, TFIDF):
            a, b = vector(query), vector(document)
            return sum(x * b.get(t, 0.0) for t, x in a.items())
        total = 0.0
        for t in query:
            if tf := document.count(t):
                late = method.k1 * (1 - method.b + method.b * len(document) / mean)
                total += math.log(1 + (n - df[t] + 0.5) / (df[t] + 0.5)) * tf / (tf + late)
        return total

    scores = method.fit(DOCUMENTS).score(QUERIES)
    close(scores.values, [[score(q, d) for d in DOCUMENTS] for q in QUERIES])
    assert (scores.values >= 0).all() and scores.residual is None and scores.converged.all()
    assert scores.provenance == {"solver": repr(method), "examples": n}


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_every_form_of_text_gives_the_same(method):
    wanted = method.fit(DOCUMENTS).score(QUERIES).values
    forms = {
        "words": words,
        "strings": lambda texts: [" ".join(text) for text in words(texts)],
        "cased and punctuated": lambda texts: ["W" + ", W".join(t[1:] for t in text) + "!" for text in words(texts)],
        "tensors": lambda texts: [torch.tensor(text, dtype=torch.long) for text in texts],
        "arrays": lambda texts: [np.array(text, dtype=np.int32) for text in texts],
        "tuples": lambda texts: tuple(tuple(text) for text in texts),
    }
    for name, form in forms.items():
        documents, asked = form(DOCUMENTS), form(QUERIES)
        if name == "cased and punctuated":  # an empty text would be the word w
            documents, asked = ([t if t != "W!" else "..." for t in texts] for texts in (documents, asked))
        close(method.fit(documents).score(asked).values, wanted)


def test_case_and_punctuation_do_not_count():
    asked = TFIDF().fit(["the CAT sat", "Dogs, and a dog."]).score(["cat: The!", "DOGS dog"]).values
    close(asked, TFIDF().fit(["the cat sat", "dogs and a dog"]).score(["cat the", "dogs dog"]).values)
    assert (asked.diagonal() > 0.5).all() and asked[0, 1] == asked[1, 0] == 0


def test_texts_of_one_length_may_be_a_matrix():
    texts = torch.tensor([[1, 2, 3], [3, 3, 4]])
    close(BM25().fit(texts).score(texts).values, BM25().fit(texts.tolist()).score(texts.tolist()).values)


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_equal_documents_tie_and_come_by_number(method):
    documents = [[5, 1, 2], [9], [2, 5, 1], [7, 7], [1, 2, 5]] * 7
    scores = method.fit(documents).score([[1, 2, 5, 9]])
    top = scores.top(len(documents)).proponents[0]
    same = [i for i in range(len(documents)) if i % 5 in (0, 2, 4)]
    assert len(set(scores.values[0, same].tolist())) == 1
    assert [i for i in top.tolist() if i in same] == same


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_documents_without_words(method):
    assert (method.fit(["", "..."]).score(["a", ""]).values == torch.zeros(2, 2)).all()


@pytest.mark.parametrize(
    ("method", "package", "name"), [(TFIDF(), "sklearn", "scikit-learn"), (BM25(), "bm25s", "bm25s")]
)
def test_a_missing_package_is_told_with_the_extra_that_installs_it(monkeypatch, method, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.feature_extraction.text", None)
    with pytest.raises(MissingExtraError, match=rf'{name}.*pip install "wherefrom\[eval\]"'):
        method.fit(["a"])


def test_words_may_be_anything_hashable():
    texts = [[("a", 1), 2, None], [("a", 1)]]
    for method in METHODS[:2]:
        assert (method.fit(texts).score([[None], [("a", 1)]]).values > 0).tolist() == [[True, False], [True, True]]


def test_what_is_no_list_of_texts_is_refused():
    for texts in ("one string", [], torch.empty(0, 3)):
        with pytest.raises(InputError, match="texts must be a list of texts, got"):
            TFIDF().fit(texts)
    with pytest.raises(InputError, match="each of texts must be a string, or a sequence of words .*, got int"):
        TFIDF().fit([3, 4])
    with pytest.raises(InputError, match="BM25 must be fitted"):
        BM25().score(["a"])
    for documents, queries in (([[1, 2]], ["one"]), (["one"], [[1, 2]])):
        with pytest.raises(InputError, match="queries must be in the form of the documents"):
            TFIDF().fit(documents).score(queries)


def test_the_best_are_candidates_for_a_method_that_asks_the_model():
    found = TFIDF().fit(DOCUMENTS).score(QUERIES).top(3).proponents
    assert found.shape == (len(QUERIES), 3) and isinstance(found, torch.Tensor)
    assert isinstance(TFIDF().fit(DOCUMENTS).score(QUERIES), wherefrom.Scores)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_a_hundred_thousand_documents(method):
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.3, 100_000 * 40) % 50_000
    documents = [list(map(int, d)) for d in np.split(tokens, 100_000)]
    start = time.perf_counter()
    scores = method.fit(documents).score(documents[:20])
    assert time.perf_counter() - start < 120
    assert scores.values.shape == (20, 100_000)
    if isinstance(method, TFIDF):
        assert torch.equal(scores.values.argmax(1), torch.arange(20))
