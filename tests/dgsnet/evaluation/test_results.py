"""Results by generator and suite, and their means."""

import pickle

import numpy as np
import pytest
from dgsnet.evaluation.results import Evaluation, Score

RNG = np.random.default_rng(0)


def test_mean_is_over_generators_not_images():
    scores = [Score(f"{i}", "large", 1, 0.9) for i in range(98)] + [Score("r", "large", 0, 0.1)]
    scores += [Score("a", "small", 1, 0.1), Score("b", "small", 0, 0.1)]
    mean = Evaluation(scores).mean()
    assert mean["accuracy"] == pytest.approx((1.0 + 0.5) / 2)
    assert (mean["n_real"], mean["n_generated"]) == (2, 99)


def test_mean_leaves_out_generators_without_the_measure():
    scores = [Score("a", "both", 0, 0.1), Score("b", "both", 1, 0.9), Score("c", "one class", 1, 0.2)]
    mean = Evaluation(scores).mean()
    assert mean["auc"] == 1.0
    assert mean["accuracy"] == 0.5


def test_the_mean_is_surer_than_its_parts():
    scores = [
        Score(f"{g}{i}", g, i % 2, float(np.clip(RNG.normal(0.4 + 0.2 * (i % 2), 0.2), 0, 1)))
        for g in "abcdefghi"
        for i in range(100)
    ]
    results = Evaluation(scores).results
    widths = [np.diff(r.interval("auc"))[0] for r in results]
    assert widths[-1] == pytest.approx(np.mean(widths[:-1]) / 3, rel=0.2)
    assert results[-1].is_mean and not any(r.is_mean for r in results[:-1])


def test_an_evaluation_crosses_processes():
    result = Evaluation([Score("a", "x", 0, 0.1), Score("b", "x", 1, 0.9)])
    interval_here = result.mean_of().interval("auc")
    assert pickle.loads(pickle.dumps(result)).mean_of().interval("auc") == interval_here
