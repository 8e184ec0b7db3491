"""Gains and losses between two detectors: counts by hand, McNemar's test and the interval as published."""

import csv
import io
import math

import numpy as np
import pytest
from dgsnet.evaluation.changes import Change, Group, compare, per_image, table
from dgsnet.evaluation.results import Score
from scipy.stats import binom


def scores(rows, column):
    """Of (generator, label, before, after) rows one detector's scores; None is an unreadable image."""
    return [
        Score(f"{i}.png", row[0], row[1], math.nan if row[column] is None else row[column], suite="s")
        if row[column] is not None
        else Score(f"{i}.png", row[0], row[1], math.nan, "damaged", suite="s")
        for i, row in enumerate(rows)
    ]


ROWS = [
    # Both are right.
    ("a", 0, 0.1, 0.2),
    # A real image is lost.
    ("a", 0, 0.1, 0.9),
    # A generated image is gained.
    ("a", 1, 0.2, 0.9),
    # Another one is gained.
    ("a", 1, 0.3, 0.9),
    # A generated image is lost, since a score at the threshold means real.
    ("a", 1, 0.9, 0.6),
    # Both are wrong.
    ("a", 1, 0.1, 0.2),
    # A real image is gained.
    ("b", 0, 0.7, 0.6),
    # An image that the second cannot read counts nowhere.
    ("b", 1, 0.9, None),
    # Both are right.
    ("b", 1, 0.8, 0.7),
]


def test_counts():
    before, after = scores(ROWS, 2), scores(ROWS, 3)
    a, b, whole = compare(before, after, 0.6)
    assert (a.suite, a.generator, b.generator, whole.generator) == ("s", "a", "b", "all")
    assert a.images == Change(both=1, gained=2, lost=2, neither=1)
    assert a.real == Change(1, 0, 1, 0) and a.generated == Change(0, 2, 1, 1)
    assert b.images == Change(1, 1, 0, 0)
    assert whole.images == Change(2, 3, 2, 1)
    assert (whole.images.n, whole.images.before, whole.images.after) == (8, 4 / 8, 5 / 8)
    values = whole.to_dict()
    assert values["difference"] == 1 / 8 and (values["gained_real"], values["lost_generated"]) == (1, 1)
    lines = table([a, b, whole]).splitlines()
    assert lines[2].split()[:4] == ["s/a", "6", "50.0", "50.0"] and "2 (0 + 2)" in lines[2]


def test_every_count_has_its_own_name():
    real, generated = Change(9, 1, 4, 0), Change(3, 2, 5, 7)
    values = Group("s", "g", Change(12, 3, 9, 7), real, generated).to_dict()
    low, high = Change(12, 3, 9, 7).interval()
    assert values == {
        "suite": "s",
        "generator": "g",
        "n": 31,
        "accuracy_before": 21 / 31,
        "accuracy_after": 15 / 31,
        "difference": -6 / 31,
        "difference_low": low,
        "difference_high": high,
        "gained": 3,
        "lost": 9,
        "mcnemar_p": pytest.approx(2 * binom.cdf(3, 12, 0.5)),
        "n_real": 14,
        "gained_real": 1,
        "lost_real": 4,
        "n_generated": 17,
        "gained_generated": 2,
        "lost_generated": 5,
    }


def test_a_row_for_every_image():
    rows = list(csv.DictReader(io.StringIO(per_image(scores(ROWS, 2), scores(ROWS, 3), 0.6))))
    changes = [row["change"] for row in rows]
    assert changes == ["kept", "lost", "gained", "gained", "lost", "wrong", "gained", "", "kept"]
    assert (rows[7]["before"], rows[7]["after"], rows[7]["error"]) == ("0.9", "", "damaged")


def test_other_images_are_refused():
    before, after = scores(ROWS, 2), scores(ROWS, 3)
    with pytest.raises(ValueError, match="stands beside"):
        compare(before, [after[1], after[0], *after[2:]], 0.5)
    with pytest.raises(ValueError):
        compare(before, after[1:], 0.5)


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (5, 5), (2, 11), (30, 12), (0, 9)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    """Twice the tail of a fair coin."""
    expected = min(1.0, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5))
    assert Change(40, gained, lost, 7).p_value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "cells, expected",
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((20, 12, 2, 16), (0.0562, 0.3292)),
        ((18, 12, 2, 18), (0.0562, 0.3290)),
        ((36, 14, 0, 0), (0.1528, 0.4167)),
        ((35, 14, 0, 1), (0.1461, 0.4175)),
        ((1, 97, 1, 1), (0.8736, 0.9850)),
        ((0, 30, 0, 0), (0.8395, 1.0)),
        ((54, 0, 0, 0), (-0.0664, 0.0664)),
    ],
)
def test_the_interval_is_the_published_one(cells, expected):
    """Newcombe 1998, table III, method 10."""
    # The publication rounds its figures, and z as well.
    assert Change(*cells).interval() == pytest.approx(expected, abs=1e-4)


def test_the_interval_covers():
    """In 95 of 100 samples, or nearly, it holds the difference; more often where changes are rare."""
    rng = np.random.default_rng(0)
    for p in ([0.6, 0.15, 0.05, 0.2], [0.95, 0.03, 0.01, 0.01]):
        truth, drawn = p[1] - p[2], rng.multinomial(60, p, size=400)
        ends = np.array([Change(*row).interval() for row in drawn.tolist()])
        share = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
        assert share >= 0.93


def test_no_change_leaves_doubt():
    low, high = Change(20, 0, 0, 0).interval()
    assert low < 0 < high and low == pytest.approx(-high)
    assert Change(20, 0, 0, 0).p_value == 1
