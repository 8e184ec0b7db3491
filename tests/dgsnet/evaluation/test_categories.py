"""Rates by category of image, of a list's column: in an evaluation, a calibration, and what they write."""

import csv
import json

import pytest
from dgsnet.cli import main
from dgsnet.detection.categories import category_rates
from dgsnet.detection.decisions import calibrate, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.evaluation import categories
from dgsnet.evaluation.report import markdown, verdict, write_page, write_tables
from dgsnet.evaluation.results import Evaluation, Score
from scipy.stats import beta

from tests.support.tables import read_csv
from tests.support.tiny import CROP, save_picture, save_tiny


def scores(category, label, above, below, suite="s"):
    """Images of a category, `above` of which are above 0.8, and as many as are below exactly there."""
    values = [0.800001] * above + [0.8] * below
    return [
        Score(f"{category}{label}{i}", f"g{i % 2}", label, value, "", suite, "", category)
        for i, value in enumerate(values)
    ]


@pytest.fixture
def evaluation():
    found = [*scores("night", 0, 9, 91), *scores("night", 1, 40, 20), *scores("scan", 0, 1, 99)]
    found += [*scores("scan", 0, 0, 50, "t"), *scores("", 0, 3, 7)]
    found.append(Score("gone", "g0", 0, float("nan"), "cannot be read", "s", "", "night"))
    return Evaluation(found, calibrated_threshold=0.8, promised_fpr=0.01)


def test_rates_are_counted_by_category_and_class_over_all_suites(evaluation):
    found = categories.rates(evaluation)
    assert [(r.name, r.label, r.n, r.called) for r in found] == [
        ("night", 0, 100, 9),
        ("night", 1, 60, 40),
        ("scan", 0, 150, 1),
    ]
    for r in found:
        assert r.low == pytest.approx(beta.ppf(0.025, r.called, r.n - r.called + 1))
        assert r.high == pytest.approx(beta.ppf(0.975, r.called + 1, r.n - r.called))
    with pytest.raises(ValueError):
        category_rates(["a"], [0, 1], [True, False])


def test_they_stand_in_every_report(evaluation, tmp_path):
    write_tables(tmp_path, evaluation)
    first, *_ = json.loads((tmp_path / "metrics.json").read_text())["categories"]
    assert (first["name"], first["label"], first["rate"]) == ("night", 0, 0.09)
    assert {row["category"] for row in read_csv(tmp_path / "scores.csv")} == {"", "night", "scan"}
    assert "| night | real | 100 | 9 | 9.0 | 4.2–16.4 |" in markdown(evaluation)
    (sentence,) = categories.sentences(evaluation)
    assert "night (9.0%, 4.2–16.4)" in sentence and "scan" not in sentence and sentence in verdict(evaluation)
    write_page(tmp_path / "report.html", evaluation, model="runs/mine")
    assert "<td>night</td><td>real</td><td>100</td><td>9</td>" in (tmp_path / "report.html").read_text()


def test_without_categories_nothing_is_said_of_them(tmp_path):
    evaluation = Evaluation(scores("", 0, 3, 7))
    write_tables(tmp_path, evaluation)
    assert "category" not in read_csv(tmp_path / "scores.csv")[0]
    assert "categories" not in json.loads((tmp_path / "metrics.json").read_text())
    assert categories.rows(evaluation) == [] and categories.sentences(evaluation) == []


def test_calibrate_and_evaluate_take_them_from_a_list(tmp_path, capsys):
    folder, rows = str(save_tiny(tmp_path / "run", CROP)), []
    for i in range(31):
        save_picture(tmp_path / f"{i}.png")
        rows.append((f"{i}.png", int(i % 3 == 2), ("night", "", "old scan")[i % 4 % 3]))
    rows.append(("gone.png", 0, "night"))
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "category"), *rows])
    given = ["--reals", str(tmp_path / "mine.csv"), "--fpr", "0.4", "--batch", "1", "--workers", "0"]
    main(["calibrate", "--model", folder, *given])
    said, calibration = capsys.readouterr().out, load_calibration(folder)
    detector = Detector.load(folder, "cpu")
    real = [row for row in rows if not row[1] and row[0] != "gone.png"]
    calls = detector.decide(detector.predict([tmp_path / name for name, *_ in real], workers=0))
    for name in ("night", "old scan"):
        called = [call == "generated" for call, row in zip(calls, real) if row[2] == name]
        (rate,) = (r for r in calibration.categories if r.name == name)
        assert (rate.label, rate.n, rate.called) == (0, len(called), sum(called)) and rate.n > 4
        assert f"{name}, real: {rate.rate:.2%} of {rate.n} called generated" in said
    assert any(0 < r.called < r.n for r in calibration.categories)
    main(["evaluate", "--model", folder, "--data", str(tmp_path / "mine.csv"), "--out", str(tmp_path / "o")])
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())["categories"]
    assert [(r["name"], r["label"], r["n"], r["called"]) for r in found if not r["label"]] == [
        (r.name, r.label, r.n, r.called) for r in calibration.categories
    ]
    assert "by category" in capsys.readouterr().out


def test_a_calibration_of_an_earlier_version_has_none(tmp_path):
    folder = save_tiny(tmp_path / "run", CROP)
    path = save_calibration(folder, calibrate(range(99), fpr=0.1))
    assert "categories" not in path.read_text() and load_calibration(folder).categories == ()
    path.write_text(path.read_text().replace("\n}", ',\n "categories": [{"name": "night"}]\n}'))
    with pytest.raises(Exception, match="categories are not what calibrate writes"):
        load_calibration(folder)
