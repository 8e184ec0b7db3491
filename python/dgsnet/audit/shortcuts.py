"""How much of the label a few numbers, or a text, give away: cross-validated AUC with an interval.

The intervals of an audit hold all together with probability CONFIDENCE (Bonferroni's bound), so that an audit
of data without a shortcut finds one in at most one of a hundred data sets, however many figures it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import issparse
from scipy.stats import norm, rankdata
from sklearn import config_context
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from tqdm import tqdm

from dgsnet.data.images import ImageError
from dgsnet.data.items import Item
from dgsnet.data.nuisances import NUISANCES, file_nuisances

CONFIDENCE = 0.99
FOLDS = 5
# Images of each class that a figure needs.
FEWEST = 2 * FOLDS
# Nuisances that are amounts; the others are yes or no.
MEASURED = [i for i, name in enumerate(NUISANCES) if name == "JPEG quality" or name.startswith("log2")]
# Below it a nuisance counts as the same in all images.
LEAST_DEVIATION = 1e-6
WORDS = 8


class Leak(NamedTuple):
    """How well something tells the label: cross-validated AUC, 0.5 for nothing, with its interval."""

    auc: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        """Whether it tells more than chance would."""
        return self.low > 0.5


@dataclass(frozen=True)
class Prediction:
    """What models say of images that they were not fitted on.

    Attributes:
        logits: [N] of being generated, both classes counted alike; NaN: no model could be fitted.
        auc: mean over the folds of the AUC within each.
        trained: the order of the images was learned: not of a single column, of which only the sign is.
    """

    logits: np.ndarray
    auc: float
    trained: bool

    def leak(self, n_real: int, n_generated: int, **options: Any) -> Leak:
        """Its AUC with its `interval`."""
        return interval(self.auc, n_real, n_generated, trained=self.trained, **options)


@dataclass(frozen=True)
class Shortcuts:
    """What an audit found.

    Attributes:
        files: all nuisances together.
        captions: None where there are none.
        nuisances: each alone; exactly 0.5 where it is the same in all images.
        words: that speak most for "real" and for "generated", where captions tell.
    """

    files: Leak
    captions: Leak | None
    nuisances: dict[str, Leak]
    # "files" and "captions" of a generator's images alone, of those with FEWEST of each class.
    generators: dict[str, dict[str, Leak | None]]
    words: dict[str, list[str]]

    @property
    def verdict(self) -> str:
        """ "shortcut" where an interval lies above 0.5, else "none found"."""
        of_generators = [leak for leaks in self.generators.values() for leak in leaks.values()]
        leaks = [self.files, self.captions, *self.nuisances.values(), *of_generators]
        return "shortcut" if any(map(_is_found, leaks)) else "none found"

    @property
    def strongest(self) -> list[str]:
        """The nuisances that tell more than chance would, the strongest first."""
        found = [name for name, leak in self.nuisances.items() if leak.found]
        return sorted(found, key=lambda name: -self.nuisances[name].auc)


def read_nuisances(
    samples: Sequence[Item], *, seconds: float = math.inf, progress: bool = False
) -> tuple[np.ndarray, list[str]]:
    """The nuisances of images' files; after so many seconds no further one is read.

    Returns:
        float32 [n, len(NUISANCES)], a row of NaN where a file cannot be read, n smaller than N where time was
        up; and of each such file a line that says why.
    """
    rows, errors = [], []
    end = time.monotonic() + seconds
    # One by one: reading an image sets how warnings are treated, which threads share.
    for sample in tqdm(samples, "reading files", unit="image", disable=None if progress else True):
        try:
            rows.append(file_nuisances(sample.read_bytes(), name=sample.path))
        except ImageError as error:
            errors.append(str(error))
            rows.append(np.full(len(NUISANCES), np.nan, np.float32))
        if time.monotonic() > end:
            break
    return np.stack(rows) if rows else np.empty((0, len(NUISANCES)), np.float32), errors


def find_shortcuts(
    nuisances: np.ndarray,
    labels: np.ndarray,
    generators: Sequence[str] = (),
    captions: Sequence[str | None] | None = None,
) -> Shortcuts:
    """How much of the label nuisances and captions give away.

    Args:
        nuisances: finite [N, len(NUISANCES)].
        labels: [N], 0 real, 1 generated, at least FEWEST of each.
        generators: [N]; nothing is said of them where not given, or where there is only one.
        captions: [N] texts, None of images without one; None: there are none at all.

    All intervals hold together with probability CONFIDENCE.
    """
    columns, owner = features(nuisances)
    texts = np.array(captions if captions is not None else [None] * len(labels), dtype=object)
    captioned = np.array([text is not None for text in texts])
    found: dict[Any, tuple[Prediction | None, int, int]] = {}

    def measure_captions(key: Any, chosen: np.ndarray) -> None:
        chosen = chosen[captioned[chosen]]
        if min(_counts(labels[chosen])) >= FEWEST:
            found[key] = _predict_captions(texts[chosen], labels[chosen])

    counts, splits = _counts(labels), folds(labels)
    found["files"] = predict(columns, labels, splits), *counts
    measure_captions("captions", np.arange(len(labels)))
    for i in range(len(NUISANCES)):
        found[i] = predict(columns[:, owner == i], labels, splits), *counts
    names = np.array(generators)
    several = sorted(set(generators)) if len(set(generators)) > 1 else []
    large = [name for name in several if min(_counts(labels[names == name])) >= FEWEST]
    for name in large:
        chosen = np.flatnonzero(names == name)
        part, own = features(nuisances[chosen])[0], labels[chosen]
        found[name, "files"] = predict(part, own, folds(own)), *_counts(own)
        measure_captions((name, "captions"), chosen)

    figures = sum(prediction is not None for prediction, *_ in found.values())
    leaks = {
        key: prediction.leak(*classes, figures=figures) if prediction else Leak(0.5, 0.5, 0.5)
        for key, (prediction, *classes) in found.items()
    }
    return Shortcuts(
        files=leaks["files"],
        captions=leaks.get("captions"),
        nuisances={name: leaks[i] for i, name in enumerate(NUISANCES)},
        generators={
            name: {kind: leaks.get((name, kind)) for kind in ("files", "captions")} for name in large
        },
        words=_words(texts[captioned], labels[captioned]) if _is_found(leaks.get("captions")) else {},
    )


def features(nuisances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nuisances as a linear model takes them: of zero mean and unit variance, without those that never vary.

    Returns:
        float64 [N, C], and [C] which of NUISANCES each column is of.
    """
    columns = _columns(nuisances, _medians(nuisances))
    deviation = columns.std(axis=0)
    varied = deviation > LEAST_DEVIATION
    columns = (columns[:, varied] - columns[:, varied].mean(axis=0)) / deviation[varied]
    return columns, np.array([*range(len(NUISANCES)), *MEASURED])[varied]


def _medians(nuisances: np.ndarray) -> np.ndarray:
    return np.median(nuisances[:, MEASURED].astype(np.float64), axis=0)


def _columns(nuisances: np.ndarray, medians: np.ndarray) -> np.ndarray:
    """The nuisances, and how far the amounts are from a median: generated images that are all of one size
    amidst photographs of many have no other direction."""
    values = nuisances.astype(np.float64)
    return np.concatenate([values, np.abs(values[:, MEASURED] - medians)], axis=1)


@dataclass(frozen=True)
class FileModel:
    """What the files of a data set say of the label, to be asked of other images.

    Attributes:
        medians: of the MEASURED nuisances.
        weights: of the nuisances and of the MEASURED ones' distances from the medians.
    """

    medians: list[float]
    weights: list[float]
    bias: float

    @classmethod
    def fit(cls, nuisances: np.ndarray, labels: np.ndarray) -> FileModel:
        """Logistic regression on nuisances [N, len(NUISANCES)] and labels [N], both classes counted alike."""
        medians = _medians(nuisances)
        columns = _columns(nuisances, medians)
        mean, deviation = columns.mean(axis=0), columns.std(axis=0)
        # What never varies says nothing.
        scale = np.where(deviation > LEAST_DEVIATION, 1 / deviation.clip(LEAST_DEVIATION), 0)
        model = _fit((columns - mean) * scale, labels)
        weights = model.coef_[0] * scale
        return cls(medians.tolist(), weights.tolist(), float(model.intercept_[0] - mean @ weights))

    def logits(self, nuisances: np.ndarray) -> np.ndarray:
        """[N] of being generated."""
        return _columns(nuisances, np.array(self.medians)) @ np.array(self.weights) + self.bias


def folds(labels: np.ndarray, groups: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """FOLDS pairs of indices to fit on and to test on, classes in equal shares, FOLDS of each or more.

    Images of one of the groups [N] are never on both sides of a fold.
    """
    split = StratifiedKFold if groups is None else StratifiedGroupKFold
    return list(split(FOLDS, shuffle=True, random_state=0).split(labels, labels, groups))


def predict(
    columns: Any, labels: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]
) -> Prediction | None:
    """Logistic regression on columns [N, C], an array or sparse, cross-validated over `folds` of labels [N].

    None without columns, or where no fold has both classes on both sides.
    """
    if not columns.shape[1]:
        return None
    logits = np.full(len(labels), np.nan)
    areas, pairs = [], []
    for train, test in splits:
        if not min(*_counts(labels[train]), *_counts(labels[test])):
            continue
        logits[test] = _logits(columns[train], labels[train], columns[test])
        areas.append(_area(logits[test], labels[test]))
        pairs.append(math.prod(_counts(labels[test])))
    if not areas:
        return None
    return Prediction(logits, float(np.average(areas, weights=pairs)), columns.shape[1] > 1)


def _logits(columns: Any, labels: np.ndarray, others: Any) -> np.ndarray:
    # Only which way it points is learned.
    if columns.shape[1] == 1:
        return np.sign(columns[labels == 1].mean() - columns[labels == 0].mean()) * others[:, 0]
    return _fit(columns, labels).decision_function(others)


def _fit(columns: Any, labels: np.ndarray) -> LogisticRegression:
    # Newton's steps take a fifth of the time for few columns; texts' sparse ones are many.
    solver = "lbfgs" if issparse(columns) else "newton-cholesky"
    # Checks of arguments take longer than small fits.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return LogisticRegression(solver=solver, class_weight="balanced", max_iter=1000).fit(columns, labels)


def _area(logits: np.ndarray, labels: np.ndarray) -> float:
    """AUC, ties half; what differs by rounding alone is a tie."""
    ranks = rankdata(logits.round(9))[labels == 1]
    n_real, n_generated = _counts(labels)
    return float(ranks.mean() - (n_generated + 1) / 2) / n_real


def interval(
    auc: float,
    n_real: int,
    n_generated: int,
    *,
    trained: bool,
    figures: int = 1,
    confidence: float = CONFIDENCE,
) -> Leak:
    """The AUC of a cross-validated prediction with its interval.

    All true values that the measured one is not too far from, by Hanley and McNeil's variance at the true
    value (Newcombe's method 5). That variance is of a fixed order of the images. Where the order was learned,
    the models of the folds share images, and it is larger by 1 + FOLDS / (FOLDS - 1) (Nadeau and Bengio).

    Args:
        n_real, n_generated: images of each class.
        trained: whether the order was learned.
        figures, confidence: how many intervals are to hold together, and with which probability.

    Example:
        >>> from dgsnet.audit.shortcuts import interval
        >>> leak = interval(0.8, 100, 100, trained=True, figures=20)
        >>> f"{leak.low:.2f} to {leak.high:.2f}"
        '0.64 to 0.90'
    """
    quantile = norm.ppf(1 - (1 - confidence) / (2 * figures))
    true = np.sort(np.append(np.linspace(0, 1, 2001), auc))
    one, other = true / (2 - true), 2 * true**2 / (1 + true)
    variance = true * (1 - true) + (n_generated - 1) * (one - true**2) + (n_real - 1) * (other - true**2)
    variance *= (1 + FOLDS / (FOLDS - 1) if trained else 1) / (n_real * n_generated)
    within = true[np.abs(true - auc) <= quantile * np.sqrt(variance.clip(0))]
    return Leak(auc, float(within[0]), float(within[-1]))


def _is_found(leak: Leak | None) -> bool:
    return leak is not None and leak.found


def _predict_captions(captions: np.ndarray, labels: np.ndarray) -> tuple[Prediction | None, int, int]:
    """The prediction from texts, and how many of each class it rests on.

    Images of one caption lie in one fold: what is asked is whether *words* tell the label, and a caption that
    a real and a generated image share would speak against itself. Each then counts once. Where a class has
    hardly more than one caption that is impossible, and they are what tells.
    """
    words = _words_of(captions)
    if words is None:
        return None, 0, 0
    _, groups = np.unique(captions.astype(str), return_inverse=True)
    distinct = [len(set(groups[labels == label])) for label in (0, 1)]
    if min(distinct) < FOLDS:
        return predict(words[1], labels, folds(labels)), *_counts(labels)
    return predict(words[1], labels, folds(labels, groups)), distinct[0], distinct[1]


def _words_of(captions: np.ndarray) -> tuple[TfidfVectorizer, Any] | None:
    """Weights of the words that occur more than once, sparse [N, words]; None where there are none."""
    vectorizer = TfidfVectorizer(min_df=2, sublinear_tf=True)
    try:
        return vectorizer, vectorizer.fit_transform(captions)
    except ValueError:
        # The vocabulary is empty.
        return None


def _words(captions: np.ndarray, labels: np.ndarray) -> dict[str, list[str]]:
    """The words that speak most for either class."""
    found = _words_of(captions)
    # Captions without words would tell nothing.
    assert found
    vectorizer, weights = found
    speaks = _fit(weights, labels).coef_[0]
    names = vectorizer.get_feature_names_out()
    return {
        kind: [names[i] for i in np.argsort(-way, kind="stable")[:WORDS] if way[i] > 0]
        for kind, way in (("real", -speaks), ("generated", speaks))
    }


def _counts(labels: np.ndarray) -> tuple[int, int]:
    """How many are real and generated."""
    generated = int(np.count_nonzero(labels))
    return len(labels) - generated, generated
