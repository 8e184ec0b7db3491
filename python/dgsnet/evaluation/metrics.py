"""The measures of a detector, and bootstrap intervals of all of them at once.

A resample of n images is a vector of n counts. With scores sorted once, every measure is a lookup in
cumulated counts, and a thousand resamples of 4000 images take 0.15 s on one core; scipy.stats.bootstrap,
which would sort each resample anew, takes many times that for AUC alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dgsnet.detection.categories import CONFIDENCE
from dgsnet.detection.decisions import THRESHOLD

# The measures in the order of every table: key and column title.
MEASURES = {
    "accuracy": "accuracy",
    "ap": "AP",
    "auc": "AUC",
    "real_accuracy": "real",
    "generated_accuracy": "generated",
    "tpr_at_1": "TPR@1%",
    "tpr_at_5": "TPR@5%",
    "ece": "ECE",
}
# What a calibrated model has besides.
CALIBRATED_MEASURES = {
    "calibrated_accuracy": "calibrated",
    "calibrated_real_accuracy": "cal. real",
    "calibrated_generated_accuracy": "cal. generated",
}
# What a generator has besides, where its files were looked at.
SHORTCUT_MEASURES = {
    "file_auc": "files alone",
    "agree_auc": "AUC, agree",
    "conflict_auc": "AUC, conflict",
    "agree_accuracy": "accuracy, agree",
    "conflict_accuracy": "accuracy, conflict",
    "worst_group_accuracy": "worst group",
    "explained_real": "explained, real",
    "explained_generated": "explained, generated",
}
SHORTCUT_COUNTS = ("n_agree", "n_conflict")
FALSE_POSITIVE_RATES = {"tpr_at_1": 0.01, "tpr_at_5": 0.05}
ECE_BINS = 15
RESAMPLES = 1000
# Elements of the largest temporary array: stays in cache or near it, whatever the number of images.
CHUNK = 300_000


def metrics(
    labels: Any, probabilities: Any, threshold: float = THRESHOLD, calibrated_threshold: float | None = None
) -> dict[str, float]:
    """Every measure of labelled scores.

    Args:
        labels: [N] of any numeric type, 0 real, 1 generated.
        probabilities: [N] floats in 0..1, of being generated.
        threshold: an image is called generated where its probability is above it.
        calibrated_threshold: adds the accuracies at this threshold, as calibrated_accuracy,
            calibrated_real_accuracy and calibrated_generated_accuracy.

    Returns:
        Fractions, and the counts n_real and n_generated. What cannot be measured is NaN: ap, auc and tpr_at_*
        where a class is missing, the accuracy of a missing class, accuracy and ece of no images.

        - accuracy, real_accuracy, generated_accuracy: right decisions, on all, real and generated images.
        - ap: average precision, sum over thresholds of (recall gained) * precision, without interpolation.
        - auc: area under the ROC curve; ties count half.
        - tpr_at_1, tpr_at_5: the largest share of generated images found by any threshold that calls at most
          1% (5%) of these real images generated.
        - ece: expected calibration error: the mean over 15 bins of equal width of |mean probability - share
          of generated images|, weighted by the images in the bin.

    Raises:
        ValueError: shapes that differ, labels other than 0 and 1, NaN probabilities.

    >>> result = metrics([0, 0, 1, 1], [0.1, 0.6, 0.8, 0.9])
    >>> result["accuracy"], result["auc"], result["real_accuracy"]
    (0.75, 1.0, 0.5)
    """
    scores = _Scores(labels, probabilities)
    generated, real = np.ones((1, len(scores.generated))), np.ones((1, len(scores.real)))
    result = scores.measures(generated, real, threshold, calibrated_threshold)
    counts = {"n_real": len(scores.real), "n_generated": len(scores.generated)}
    return {key: float(values[0]) for key, values in result.items()} | counts


def resampled(
    labels: Any,
    probabilities: Any,
    threshold: float = THRESHOLD,
    calibrated_threshold: float | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: Any = 0,
) -> dict[str, np.ndarray]:
    """Every measure, [resamples] values each: images drawn with replacement, within each class.

    Args:
        labels, probabilities, threshold, calibrated_threshold: as in `metrics`.
        resamples: how many times the images are drawn.
        seed: anything numpy.random.default_rng takes.

    >>> values = resampled([0, 0, 1, 1], [0.1, 0.6, 0.8, 0.9], seed=1)
    >>> interval(values["accuracy"])
    (0.5, 1.0)
    """
    scores = _Scores(labels, probabilities)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // max(1, len(scores.real) + len(scores.generated)))
    chunks = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        generated = _draw(rng, len(scores.generated), size)
        real = _draw(rng, len(scores.real), size)
        chunks.append(scores.measures(generated, real, threshold, calibrated_threshold))
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of resampled values; NaN where there are none."""
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def roc(labels: Any, probabilities: Any) -> tuple[np.ndarray, np.ndarray]:
    """False- and true-positive rates at every threshold, from (0, 0) to (1, 1); needs both classes."""
    scores = _Scores(labels, probabilities)
    found = np.append(0, scores.generated_until) / len(scores.generated)
    return np.append(0, scores.real_until) / len(scores.real), found


def reliability(labels: Any, probabilities: Any, bins: int = ECE_BINS) -> dict[str, np.ndarray]:
    """What ece averages, per bin: count, mean probability and share of generated images (NaN: empty)."""
    labels, probabilities = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    which = _bin(probabilities, bins)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        return {
            "count": count,
            "probability": np.bincount(which, probabilities, bins) / count,
            "generated": np.bincount(which, labels, bins) / count,
        }


class _Scores:
    """Scores sorted from high to low, split by class; `*_until[k]` of a class lie at or above threshold k."""

    def __init__(self, labels: Any, probabilities: Any):
        labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
        if labels.ndim != 1 or labels.shape != probabilities.shape:
            raise ValueError(
                f"labels and probabilities must both be [N], got {labels.shape} and {probabilities.shape}"
            )
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("labels must be 0 (real) or 1 (generated)")
        if np.isnan(probabilities).any():
            raise ValueError("probabilities contain NaN: leave out images that could not be read")
        order = np.argsort(-probabilities, kind="stable")
        probabilities, generated = probabilities[order], labels[order] == 1
        self.generated, self.real = probabilities[generated], probabilities[~generated]
        # Equal scores share a threshold.
        last = np.flatnonzero(np.append(np.diff(probabilities) != 0, len(probabilities) > 0))
        self.generated_until = np.cumsum(generated)[last]
        self.real_until = last + 1 - self.generated_until

    def measures(
        self,
        generated_counts: np.ndarray,
        real_counts: np.ndarray,
        threshold: float,
        calibrated_threshold: float | None,
    ) -> dict[str, np.ndarray]:
        """`metrics` of B resamples: how often each takes each image, [B, generated] and [B, real]."""
        n_generated, n_real = len(self.generated), len(self.real)
        # Column k: images among the k highest scores of the class.
        above_generated, above_real = _cumulated(generated_counts), _cumulated(real_counts)
        result = self._accuracies(above_generated, above_real, threshold)
        missing = np.full(len(generated_counts), math.nan)
        ranking: dict[str, np.ndarray] = dict.fromkeys(("ap", "auc", *FALSE_POSITIVE_RATES), missing)
        if n_generated and n_real:
            found = above_generated[:, self.generated_until]
            false = above_real[:, self.real_until]
            gained = np.diff(found, prepend=0)
            precision = found / np.maximum(found + false, 1)
            ranking["ap"] = np.einsum("bk,bk->b", gained, precision) / n_generated
            midway = false - np.diff(false, prepend=0) / 2
            ranking["auc"] = 1 - np.einsum("bk,bk->b", gained, midway) / (n_generated * n_real)
            for key, rate in FALSE_POSITIVE_RATES.items():
                allowed = np.count_nonzero(false <= rate * n_real + 1e-9, axis=1)
                best = np.take_along_axis(found, np.maximum(allowed - 1, 0)[:, None], axis=1)[:, 0]
                ranking[key] = np.where(allowed > 0, best, 0) / n_generated
        result |= ranking
        # Per bin, the sum of probability - label.
        gaps = generated_counts @ _spread(self.generated, self.generated - 1)
        gaps += real_counts @ _spread(self.real, self.real)
        images = n_generated + n_real
        result["ece"] = np.abs(gaps).sum(axis=1) / images if images else missing
        if calibrated_threshold is not None:
            calibrated = self._accuracies(above_generated, above_real, calibrated_threshold)
            result |= {f"calibrated_{key}": values for key, values in calibrated.items()}
        return {key: result[key] for key in (*MEASURES, *CALIBRATED_MEASURES) if key in result}

    def _accuracies(
        self, above_generated: np.ndarray, above_real: np.ndarray, threshold: float
    ) -> dict[str, np.ndarray]:
        n_generated, n_real = len(self.generated), len(self.real)
        right_generated = above_generated[:, np.count_nonzero(self.generated > threshold)]
        right_real = n_real - above_real[:, np.count_nonzero(self.real > threshold)]

        def share(right: np.ndarray, count: int) -> np.ndarray:
            return right / count if count else np.full(len(right), math.nan)

        return {
            "accuracy": share(right_generated + right_real, n_generated + n_real),
            "real_accuracy": share(right_real, n_real),
            "generated_accuracy": share(right_generated, n_generated),
        }


def _cumulated(counts: np.ndarray) -> np.ndarray:
    """[B, n] to [B, n + 1], beginning with 0."""
    result = np.zeros((len(counts), counts.shape[1] + 1))
    np.cumsum(counts, axis=1, out=result[:, 1:])
    return result


def _draw(rng: np.random.Generator, images: int, resamples: int) -> np.ndarray:
    """How often each of `images` is among as many drawn with replacement, float64 [resamples, images]."""
    if not images:
        return np.zeros((resamples, 0))
    drawn = rng.integers(images, size=(resamples, images), dtype=np.int32)
    drawn += (np.arange(resamples, dtype=np.int32) * images)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * images)
    return counts.reshape(resamples, images).astype(np.float64)


def _bin(probabilities: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Index of the bin of equal width over 0..1; 1 belongs to the last."""
    return np.clip((probabilities * bins).astype(np.intp), 0, bins - 1)


def _spread(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n] values as rows of [n, ECE_BINS], each in its probability's bin."""
    result = np.zeros((len(values), ECE_BINS))
    result[np.arange(len(values)), _bin(probabilities)] = values
    return result
