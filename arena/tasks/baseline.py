"""Simple models for comparison, of conversations and of texts: logistic regression on TF-IDF and lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from arena.data.task import Baseline
from arena.metrics import log_loss

WORDS = 20_000  # the most frequent words and word pairs
SWAPPED = [1, 0, 2]  # the order of classes when A and B are exchanged
STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # candidates for the inverse regularisation
TEXT_STRENGTHS = (0.1, 1.0, 10.0)
FITTED = 20_000  # most rows; more change little and take minutes


def fit_baseline(rows: Dataset, labels: np.ndarray, seed: int = 0) -> Baseline:
    """Trains on labelled rows (at most `FITTED`, sampled by the seed), to judge others.

    The features are TF-IDF of words and word pairs, A's minus B's, and the logarithms of both lengths and their
    difference. Each training row is also used with A and B exchanged. The regularisation is chosen on a fifth of the
    rows.

    Args:
        rows: conversations.
        labels: float64 (len(rows), 3).

    Returns:
        What gives the probabilities of other conversations, float64 (n, 3).

    Raises:
        ValueError: there are too few rows, or no words in them.
    """
    train = _sample(len(rows), seed)
    a, b = _answers(rows.select(train))
    words = _words()
    words.fit(a + b)
    lengths = StandardScaler().fit(np.vstack([_lengths(a, b), _lengths(b, a)]))
    both = _features(words, lengths, a, b), _features(words, lengths, b, a)
    known = labels[train]

    def judged(c: float, fitted: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.asarray(_fit(both, known, c, fitted).predict_proba(both[0][others]))

    model = _fit(both, known, _strength(STRENGTHS, known, judged, seed), np.ones(len(train), dtype=bool))
    return lambda others: np.asarray(model.predict_proba(_features(words, lengths, *_answers(others))))


def fit_text_baseline(rows: Dataset, labels: np.ndarray, seed: int = 0) -> Baseline:
    """Trains on labelled rows (at most `FITTED`, sampled by the seed), to classify others.

    The features of each column of texts are TF-IDF of words and word pairs, and the logarithm of the length. The
    regularisation is chosen on a fifth of the rows.

    Args:
        rows: columns of texts.
        labels: float64 (len(rows), C).

    Returns:
        What gives the probabilities of other rows, float64 (n, C); 0 for a class that no row trained on has.

    Raises:
        ValueError: there are too few rows, or no words in them.
    """
    train = _sample(len(rows), seed)
    texts, known = _columns(rows.select(train)), labels[train]
    words = [_words().fit(column) for column in texts]
    features = _text_features(words, texts)

    def classified(c: float, fitted: np.ndarray, others: np.ndarray) -> np.ndarray:
        return _fit_texts(features[fitted], known[fitted], c, features[others])

    strength = _strength(TEXT_STRENGTHS, known, classified, seed)
    return lambda others: _fit_texts(features, known, strength, _text_features(words, _columns(others)))


def _fit_texts(features: csr_matrix, labels: np.ndarray, c: float, asked: csr_matrix) -> np.ndarray:
    """The probabilities of `asked` by a fit of other rows. A soft label counts as one row of each of its classes."""
    rows, classes = np.nonzero(labels)
    model = LogisticRegression(C=c, max_iter=500).fit(features[rows], classes, sample_weight=labels[rows, classes])
    result = np.zeros((asked.shape[0], labels.shape[1]))
    result[:, model.classes_] = model.predict_proba(asked)
    return result


def _columns(rows: Dataset) -> list[list[str]]:
    return [[text or "" for text in rows[name]] for name in rows.column_names]


def _text_features(words: Sequence[TfidfVectorizer], columns: Sequence[list[str]]) -> csr_matrix:
    parts = []
    for each, texts in zip(words, columns, strict=True):
        parts += [each.transform(texts), csr_matrix(np.log1p([[len(text.split())] for text in texts]))]
    return hstack(parts).tocsr()


def _sample(n: int, seed: int) -> np.ndarray:
    return np.arange(n) if n <= FITTED else np.sort(np.random.default_rng(seed).choice(n, FITTED, replace=False))


def _words() -> TfidfVectorizer:
    return TfidfVectorizer(
        token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), max_features=WORDS, sublinear_tf=True, dtype=np.float64
    )


def _strength(
    strengths: Sequence[float],
    labels: np.ndarray,
    predict: Callable[[float, np.ndarray, np.ndarray], np.ndarray],
    seed: int,
) -> float:
    """The inverse regularisation with which four fifths of the rows predict the others best.

    Args:
        predict: gives probabilities from a strength, the rows to fit and the rows to predict, both bool (n,).
    """
    fitted = np.random.default_rng(seed).random(len(labels)) < 0.8
    losses = [log_loss(labels[~fitted], predict(c, fitted, ~fitted)) for c in strengths]
    return strengths[int(np.argmin(losses))]


def _fit(both: tuple[csr_matrix, csr_matrix], labels: np.ndarray, c: float, which: np.ndarray) -> LogisticRegression:
    """Fits some rows, each in both orders. A soft label counts as one row of each class with that weight."""
    features = vstack([each[which] for each in both])
    weights = np.vstack([labels[which], labels[which][:, SWAPPED]])
    model = LogisticRegression(C=c, max_iter=500)
    classes = np.repeat([0, 1, 2], features.shape[0])
    return model.fit(vstack([features] * 3), classes, sample_weight=weights.T.reshape(-1))


def _answers(rows: Dataset) -> tuple[list[str], list[str]]:
    joined = [
        [" \n ".join(text or "" for text in turns) for turns in rows[name]] for name in ("response_a", "response_b")
    ]
    return joined[0], joined[1]


def _lengths(a: list[str], b: list[str]) -> np.ndarray:
    sizes = np.log1p(np.array([[len(x.split()), len(y.split())] for x, y in zip(a, b, strict=True)]))
    gap = sizes[:, 0] - sizes[:, 1]
    return np.column_stack([sizes, gap, np.abs(gap)])


def _features(words: TfidfVectorizer, lengths: StandardScaler, a: list[str], b: list[str]) -> csr_matrix:
    return hstack([words.transform(a) - words.transform(b), csr_matrix(lengths.transform(_lengths(a, b)))]).tocsr()
