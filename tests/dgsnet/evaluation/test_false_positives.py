"""False positives by source of real images: counted at the calibrated threshold, beside what was promised."""

import json

import pytest
from dgsnet.evaluation import false_positives
from dgsnet.evaluation.false_positives import source_rates
from dgsnet.evaluation.report import markdown, verdict, write_page, write_tables
from dgsnet.evaluation.results import Evaluation, Score
from scipy.stats import beta


def scores(suite, source, wrong, right, *, label=0, distortion=""):
    """Scores of a source, `wrong` of which are above 0.8, and as many as are right exactly there."""
    values = [0.800001] * wrong + [0.8] * right
    return [
        Score(f"{suite}/{source}/{label}{i}", source, label, value, "", suite, distortion)
        for i, value in enumerate(values)
    ]


@pytest.fixture
def evaluation():
    """Three sources: as promised, four times that, and without real images; and one suite more."""
    found = [
        *scores("phones", "fine", 1, 99),
        *scores("phones", "fine", 50, 50, label=1),
        *scores("phones", "worse", 8, 192),
        Score("unread", "worse", 0, float("nan"), "cannot be read", "phones"),
        *scores("phones", "fakes alone", 5, 5, label=1),
        *scores("scans", "fine", 0, 40),
        *scores("phones", "fine", 30, 70, distortion="jpeg:50"),
        *scores("phones", "worse", 0, 1, label=1, distortion="jpeg:50"),
        *scores("phones", "fakes alone", 0, 1, label=1, distortion="jpeg:50"),
        *scores("scans", "fine", 0, 40, distortion="jpeg:50"),
    ]
    return Evaluation(found, calibrated_threshold=0.8, promised_fpr=0.01)


def test_rates_are_counted_where_there_are_real_images(evaluation):
    found = [(r.source, r.n, r.wrong) for r in source_rates(evaluation)]
    assert found == [("phones/fine", 100, 1), ("phones/worse", 200, 8), ("scans/fine", 40, 0)]
    distorted = [(r.source, r.wrong) for r in source_rates(evaluation, "jpeg:50")]
    assert distorted == [("phones/fine", 30), ("scans/fine", 0)]


def test_intervals_are_clopper_and_pearsons(evaluation):
    for r in source_rates(evaluation):
        low = beta.ppf(0.025, r.wrong, r.n - r.wrong + 1) if r.wrong else 0
        assert r.low == pytest.approx(low) and r.rate == r.wrong / r.n
        assert r.high == pytest.approx(beta.ppf(0.975, r.wrong + 1, r.n - r.wrong))


def test_a_source_above_the_promise_is_named(evaluation):
    assert [r.source for r in source_rates(evaluation) if r.exceeds] == ["phones/worse"]
    (sentence,) = false_positives.sentences(evaluation)
    assert "rate of 1.0% " in sentence and "phones/worse (4.0%, 1.7–7.7)" in sentence
    assert "fine" not in sentence and "--reals" in sentence
    assert sentence in verdict(evaluation)


def test_chance_among_many_sources_is_no_broken_promise():
    """Four of a hundred at a promise of one happen in 1.8% of sources, and so to one of many."""
    alone = Evaluation(scores("", "odd", 4, 96), calibrated_threshold=0.8, promised_fpr=0.01)
    assert [r.exceeds for r in source_rates(alone)] == [True]
    others = [score for i in range(9) for score in scores("", f"o{i}", 1, 99)]
    many = Evaluation([*alone.scores, *others], calibrated_threshold=0.8, promised_fpr=0.01)
    assert len(source_rates(many)) == 10 and not any(r.exceeds for r in source_rates(many))


def test_without_a_calibration_nothing_was_promised():
    evaluation = Evaluation(scores("", "photos", 3, 1), threshold=0.8)
    (rate,) = source_rates(evaluation)
    assert (rate.source, rate.wrong, rate.exceeds) == ("photos", 3, False)
    assert "not calibrated" in false_positives.caption(evaluation)
    assert false_positives.sentences(evaluation) == []
    assert false_positives.rows(Evaluation(scores("", "fakes", 1, 1, label=1))) == []


def test_it_stands_in_every_report(evaluation, tmp_path):
    write_tables(tmp_path, evaluation)
    document = json.loads((tmp_path / "metrics.json").read_text())
    found = document["false_positives"]
    assert (found["threshold"], found["promised"]) == (0.8, 0.01)
    worse = found["sources"]["phones/worse"]
    assert (worse["n"], worse["wrong"], worse["rate"], worse["exceeds"]) == (200, 8, 0.04, True)
    assert worse["interval"] == pytest.approx([0.01742, 0.07730], abs=1e-5)
    assert document["robustness"]["jpeg:50"]["false_positives"]["sources"]["phones/fine"]["wrong"] == 30
    assert "| phones/worse | 200 | 8 | 4.0 | 1.7–7.7 |" in markdown(evaluation)
    write_page(tmp_path / "report.html", evaluation, model="runs/mine")
    page = (tmp_path / "report.html").read_text()
    assert "False positives by source" in page and "<td>phones/worse</td><td>200</td><td>8</td>" in page
