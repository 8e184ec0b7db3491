"""Results by generator and suite, and their means."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from dgsnet.evaluation.results import COUNTS, Evaluation, Score

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


def test_real_images_apart_are_lent_to_every_generator_without_any():
    """As in a Parquet file whose real images are one source: measured as if each generator had them."""
    real = [(f"r{i}", 0, p) for i, p in enumerate((0.1, 0.2, 0.6))]
    own = {"a": [("a0", 1, 0.9), ("a1", 1, 0.15)], "b": [("b0", 1, 0.7)]}
    c = [("c0", 1, 0.4), ("c1", 0, 0.5)]
    scores = [Score(path, "photos", *rest) for path, *rest in real]
    scores += [Score(path, name, *rest) for name, images in own.items() for path, *rest in images]
    scores += [Score(path, "c", *rest) for path, *rest in c]
    scores.append(Score("bad", "photos", 0, math.nan, "unread"))
    scores = [replace(s, suite="main") for s in scores]
    scores += [replace(s, suite="other") for s in scores if s.generator == "a"]
    found = Evaluation(scores)
    each = [(name, *image) for name, images in own.items() for image in [*real, *images]]
    each += [("c", *image) for image in c]
    wanted = Evaluation([Score(path, name, *rest) for name, path, *rest in each])
    for result in wanted.of():
        (same,) = [r for r in found.of(suite="main") if r.generator == result.generator]
        assert {k: v for k, v in same.values.items() if k != "n_damaged"} == pytest.approx(
            {k: v for k, v in result.values.items() if k != "n_damaged"}
        )
        assert same.interval("auc") == result.interval("auc")
    means = found.mean_of(suite="main").values, wanted.mean()
    assert means[0]["auc"] == pytest.approx(means[1]["auc"])
    assert means[0]["accuracy"] == pytest.approx(means[1]["accuracy"])
    assert [means[0][key] for key in COUNTS] == [4, 4, 1]
    assert next(r for r in found.of(suite="main") if r.generator == "photos").values["n_real"] == 3
    # Another suite's photographs are not this one's.
    assert math.isnan(found.by_generator()["other/a"]["auc"])


def test_suites_keep_their_order_and_generators_are_sorted():
    """Two suites that share a generator's name, given out of order, as they are and distorted."""
    found = [
        Score(f"{suite}{generator}{label}{i}", generator, label, (i + label) / 7, "", suite, distortion)
        for distortion in ("", "jpeg:50")
        for suite, generator, counts in (("z", "b", (2, 3)), ("a", "b", (4, 5)), ("z", "a", (1, 2)))
        for label, count in enumerate(counts)
        for i in range(count)
    ]
    found.append(Score("bad", "a", 0, math.nan, "unread", "z"))
    evaluation = Evaluation(found)
    plain = [(r.suite, r.generator, r.is_mean) for r in evaluation.results if not r.distortion]
    z, a = (
        [("z", "a", False), ("z", "b", False), ("z", "mean", True)],
        [("a", "b", False), ("a", "mean", True)],
    )
    assert plain == [*z, *a, ("", "mean", True)]
    assert list(evaluation.by_generator("jpeg:50")) == ["z/a", "z/b", "a/b"]
    counts = {
        r.suite: [r.values[key] for key in COUNTS]
        for r in evaluation.results
        if r.is_mean and not r.distortion
    }
    assert counts == {"z": [3, 5, 1], "a": [4, 5, 0], "": [7, 10, 1]}
    assert evaluation.mean("jpeg:50")["n_damaged"] == 0
    lines = evaluation.table().splitlines()
    names = [line.rsplit(maxsplit=9)[0].strip() for line in lines[2:8]]
    assert names == ["z/a", "z/b", "a/b", "mean of z", "mean of a", "mean"]


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
