"""Metrics and their intervals against hand-computed, brute-force and published implementations' values."""

import math

import numpy as np
import pytest
from dgsnet.evaluation import metrics as evaluation_metrics
from dgsnet.evaluation.metrics import _Scores, interval, metrics, reliability, resampled, roc

RNG = np.random.default_rng(0)


def brute_force_auc(labels, scores):
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return np.mean(pairs)


def test_metrics_by_hand():
    result = metrics([0, 0, 1, 1, 1], [0.1, 0.7, 0.9, 0.6, 0.5])
    # A score of 0.5 is not above 0.5.
    assert result["accuracy"] == 3 / 5
    assert result["real_accuracy"] == 1 / 2
    assert result["generated_accuracy"] == 2 / 3
    assert result["ap"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert result["auc"] == pytest.approx(4 / 6)
    assert (result["n_real"], result["n_generated"]) == (2, 3)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_all_pairs(ties):
    labels = RNG.integers(0, 2, 60)
    scores = RNG.random(60).round(1 if ties else 9)
    assert metrics(labels, scores)["auc"] == pytest.approx(brute_force_auc(labels, scores))


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_against_scikit_learn(ties):
    from sklearn.metrics import auc, average_precision_score, roc_auc_score

    for n in (2, 3, 10, 500):
        labels = np.append(RNG.integers(0, 2, n - 2), [0, 1])
        scores = RNG.random(n).round(1 if ties else 9)
        result = metrics(labels, scores)
        assert result["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert result["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        false, found = roc(labels, scores)
        assert auc(false, found) == pytest.approx(result["auc"], abs=1e-12)
        assert (false[0], found[0], false[-1], found[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "rate", "key"), [(300, 0.05, "tpr_at_5"), (100, 0.01, "tpr_at_1"), (40, 0.01, "tpr_at_1")]
)
def test_tpr_is_the_best_of_all_thresholds_within_the_rate(ties, n, rate, key):
    labels = RNG.permutation(np.repeat([0, 1], [n, n // 2 + 3]))
    scores = (0.4 * RNG.random(len(labels)) + 0.3 * labels).round(2 if ties else 9)
    allowed = [
        np.mean(scores[labels == 1] > threshold)
        for threshold in [-1, *scores]
        if np.mean(scores[labels == 0] > threshold) <= rate
    ]
    assert metrics(labels, scores)[key] == pytest.approx(max(allowed))


def test_tpr_where_every_threshold_calls_reals_generated():
    assert metrics([0, 1, 1], [0.9, 0.9, 0.2])["tpr_at_1"] == 0
    assert metrics([0, 1, 1], [0.9, 0.95, 0.2])["tpr_at_5"] == 0.5


def test_ece_by_hand():
    # Bins of 1/15: two images in the last, one in the first.
    assert metrics([1, 0, 0], [0.95, 0.97, 0.01])["ece"] == pytest.approx((abs(0.95 + 0.97 - 1) + 0.01) / 3)
    assert metrics([1, 0], [1.0, 0.0])["ece"] == 0
    bins = reliability([1, 0, 0], [0.95, 0.97, 0.01])
    assert bins["count"].tolist() == [1, *[0] * 13, 2]
    assert bins["generated"][14] == 0.5 and bins["probability"][14] == pytest.approx(0.96)


def test_ece_does_not_merge_neighbouring_bins():
    """Of fifteen: 0.05 lies in the first, 0.08 in the second."""
    assert metrics([0, 1], [0.05, 0.08])["ece"] == pytest.approx((0.05 + 0.92) / 2)


def test_ece_vanishes_for_probabilities_that_are_true():
    scores = RNG.random(200_000)
    labels = RNG.random(200_000) < scores
    assert metrics(labels, scores)["ece"] < 0.005
    assert metrics(labels, np.sqrt(scores))["ece"] > 0.1


def test_calibrated_threshold_adds_its_accuracies():
    labels, scores = RNG.integers(0, 2, 100), RNG.random(100)
    both = metrics(labels, scores, 0.5, 0.8)
    other = metrics(labels, scores, 0.8)
    for key in ("accuracy", "real_accuracy", "generated_accuracy"):
        assert both[f"calibrated_{key}"] == other[key]
    assert {k: v for k, v in both.items() if not k.startswith("calibrated")} == metrics(labels, scores)


@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_has_the_metrics_of_its_images(ties):
    labels = np.append(RNG.integers(0, 2, 58), [0, 1])
    scores = RNG.random(60).round(1 if ties else 9)
    sorted_scores = _Scores(labels, scores)
    counts = [
        RNG.multinomial(len(g), np.full(len(g), 1 / len(g)), size=5).astype(float)
        for g in (sorted_scores.generated, sorted_scores.real)
    ]
    values = sorted_scores.measures(*counts, 0.5, 0.7)
    for b in range(5):
        drawn = [
            np.repeat(g, c[b].astype(int))
            for g, c in zip((sorted_scores.generated, sorted_scores.real), counts)
        ]
        expected = metrics(np.repeat([1, 0], [len(d) for d in drawn]), np.concatenate(drawn), 0.5, 0.7)
        assert {key: v[b] for key, v in values.items()} == pytest.approx(
            {k: expected[k] for k in values}, abs=1e-12
        )


def test_resampling_is_seeded_and_within_classes(monkeypatch):
    labels, scores = np.arange(50) % 5 == 0, RNG.random(50)
    first, again, other = (resampled(labels, scores, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert (first["auc"] != other["auc"]).any() and len(first["auc"]) == 1000
    # The share of generated images is not left to chance.
    assert set(resampled(labels, np.ones(50), seed=0)["accuracy"]) == {0.2}
    from dgsnet.evaluation import metrics as module

    monkeypatch.setattr(module, "CHUNK", 500)
    assert len(resampled(labels, scores, resamples=37)["auc"]) == 37


def test_intervals_are_those_of_theory_and_of_scipy():
    from scipy.stats import bootstrap
    from sklearn.metrics import roc_auc_score

    labels = np.arange(800) % 2
    scores = np.clip(RNG.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    values, result = resampled(labels, scores, seed=0), metrics(labels, scores)
    low, high = interval(values["real_accuracy"])
    p = result["real_accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 400), rel=0.12)
    assert low < p < high

    def auc(generated, real):
        return roc_auc_score(
            np.repeat([1, 0], [len(generated), len(real)]), np.concatenate([generated, real])
        )

    theirs = bootstrap(
        (scores[labels == 1], scores[labels == 0]),
        auc,
        vectorized=False,
        n_resamples=500,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert interval(values["auc"]) == pytest.approx(tuple(theirs), abs=0.006)


def test_threshold_moves_accuracy_and_not_the_ranking():
    labels, scores = [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]
    assert metrics(labels, scores)["accuracy"] == 0.5
    assert metrics(labels, scores, threshold=0.25)["accuracy"] == 1.0
    assert metrics(labels, scores)["auc"] == metrics(labels, scores, threshold=0.25)["auc"] == 1.0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_accuracy_but_no_ranking(label):
    result = metrics([label] * 3, [0.2, 0.8, 0.9])
    assert result["accuracy"] == pytest.approx(2 / 3 if label else 1 / 3)
    assert math.isnan(result["ap"]) and math.isnan(result["auc"])
    missing = "real_accuracy" if label else "generated_accuracy"
    assert math.isnan(result[missing])


def test_no_images_is_nan_everywhere():
    result = metrics([], [])
    assert all(math.isnan(result[key]) for key in evaluation_metrics.MEASURES)
    assert result["n_real"] == result["n_generated"] == 0
    assert all(math.isnan(bound) for bound in interval(resampled([], [])["auc"]))


@pytest.mark.parametrize(
    ("labels", "scores", "complaint"),
    [([0, 1], [0.5], "must both be"), ([0, 2], [0.1, 0.2], "0 .real."), ([0, 1], [0.1, math.nan], "NaN")],
)
def test_wrong_input_is_refused(labels, scores, complaint):
    with pytest.raises(ValueError, match=complaint):
        metrics(labels, scores)
