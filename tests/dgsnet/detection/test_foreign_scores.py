"""Thresholds of other programs' scores, whatever their range: calibrate, predict, monitor with --scores."""

import csv
import json
import math
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from dgsnet.cli import main
from dgsnet.detection.decisions import calibrate, decide, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from scipy.stats import binom

from tests.support.tables import read_csv
from tests.support.tiny import CROP, save_tiny

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(-1, 1, 700), RNG.normal(1.5, 1, 300)
# Order-preserving: probabilities, logits of any scale, all within a rounding of 1, and without a bound.
SCALES = {
    "probabilities": lambda x: 1 / (1 + np.exp(-x)),
    "far off": lambda x: 1e6 + 40 * x,
    "near one": lambda x: 1 - 1e-9 * (5 - x),
    "cubes": lambda x: x**3 * 1e200,
}


def write(path, rows, columns=("path", "score", "label", "source", "category")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def rows_of(real, fake):
    found = [(f"r{i}.png", float(x), "real", ("press", "phone")[i % 3 == 0], "") for i, x in enumerate(real)]
    return [*found, *((f"f{i}.png", float(x), 1, "", "night") for i, x in enumerate(fake))]


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_threshold_is_an_order_statistic_whatever_the_scale(scale, tmp_path):
    """The same images are decided alike on every scale, and as the rules have it on logits."""
    table = write(tmp_path / "t.csv", rows_of(scale(REAL), scale(FAKE)))
    main(["calibrate", "--scores", table, "--out", str(tmp_path / "rule"), "--fpr", "0.04"])
    made = load_calibration(tmp_path / "rule")
    sources = {"phone": REAL[::3], "press": np.delete(REAL, np.s_[::3])}
    own = {}
    for name, values in sources.items():
        allowed = max(k for k in range(len(values)) if binom.cdf(k, len(values), 0.04) <= 0.05)
        own[name] = float(np.sort(scale(values))[::-1][allowed])
    assert {source.name: source.threshold for source in made.sources} == own
    assert made.threshold == max(own.values()) and made.raw and made.temperature == 1
    assert decide(scale(FAKE), made) == decide(scale(FAKE).tolist(), made)
    allowed = max(k for k in range(len(FAKE)) if binom.cdf(k, len(FAKE), 0.04) <= 0.05)
    last = np.sort(scale(FAKE))[allowed]
    calls = decide(scale(FAKE), made)
    assert calls.count("real") == int(
        (scale(FAKE) < min(last, math.nextafter(made.threshold, math.inf))).sum()
    )
    assert calls.count("generated") == int((scale(FAKE) > made.threshold).sum())
    assert calls.count("generated") == round(made.tpr_observed * len(FAKE))
    (night,) = made.categories
    assert (night.label, night.n, night.called) == (1, len(FAKE), calls.count("generated"))


def test_ties_only_lower_the_rate():
    """Scores of a few steps: as many as share the threshold are not above it."""
    real = np.repeat([0.0, 1.0, 2.0, 3.0], [400, 60, 30, 10])
    made = calibrate(real, np.repeat([1.0, 3.0], [10, 190]), fpr=0.05, raw=True)
    assert made.threshold == 2.0 and made.fpr_observed == 10 / 500
    assert decide([2.0, math.nextafter(2.0, 3.0)], made)[1] == "generated" != decide([2.0], made)[0]
    nothing = calibrate(np.ones(99), fpr=0.05, raw=True)
    assert decide([1.0, 1.1], nothing) == ["real", "generated"]


def test_where_nothing_can_be_called_real_no_score_is():
    """Of as few images as a rate needs, none is far enough below the threshold to say so."""
    made = calibrate(-np.arange(1.0, 8) * 1e300, fpr=0.4, raw=True)
    assert "unsure" in decide(-np.arange(1.0, 8) * 1e300, made)
    few = calibrate(np.arange(4.0), fpr=0.6, raw=True)
    assert "real" not in decide([-1e308, 0.0], few) and json.loads(few.to_json())["low"] < -1e308


def test_scores_that_run_the_other_way_are_refused(tmp_path, capsys):
    table = write(tmp_path / "t.csv", rows_of(-REAL, -FAKE))
    with pytest.raises(SystemExit):
        main(["calibrate", "--scores", table, "--out", str(tmp_path / "rule")])
    assert "turn the signs" in capsys.readouterr().err and not (tmp_path / "rule").exists()


@pytest.fixture
def rule(tmp_path):
    table = write(tmp_path / "t.csv", rows_of(50 * REAL, 50 * FAKE))
    main(["calibrate", "--scores", table, "--out", str(tmp_path / "rule"), "--fpr", "0.04"])
    return tmp_path / "rule"


def test_a_folder_in_use_is_left_as_it_is(rule, tmp_path, capsys):
    table, made = str(tmp_path / "t.csv"), load_calibration(rule)
    network = save_tiny(tmp_path / "run", CROP) / "best"
    for out, why in ((rule, "--replace"), (network, "in use"), (tmp_path / "t.csv", "in use")):
        with pytest.raises(SystemExit):
            main(["calibrate", "--scores", table, "--out", str(out), "--fpr", "0.2"])
        assert why in capsys.readouterr().err
    assert load_calibration(rule) == made and not (network / "calibration.json").exists()
    main(["calibrate", "--scores", table, "--out", str(rule), "--fpr", "0.2", "--replace"])
    assert load_calibration(rule).fpr == 0.2
    # A network decides on its own probabilities, and a table on its own scores.
    shutil.copy(rule / "calibration.json", network)
    with pytest.raises(UserError, match="calibrated for another program's scores"):
        Detector.load(network, "cpu")
    save_calibration(network, calibrate(range(99), fpr=0.1))
    shutil.copy(network / "calibration.json", rule)
    with pytest.raises(SystemExit):
        main(["predict", table, "--model", str(rule), "--out", str(tmp_path / "o.csv")])
    assert "no threshold of another program's scores" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_predict_decides_on_tables(kind, rule, tmp_path, capsys):
    scores = [-1e4, load_calibration(rule).low, 0.1 + 0.2, load_calibration(rule).threshold, 1e4, 1e-9]
    table = write(tmp_path / "new.csv", [(f"={i}.png", x) for i, x in enumerate(scores)], ("path", "score"))
    out = tmp_path / f"o.{kind}"
    main(["predict", table, "--model", str(rule), "--out", str(out)])
    if kind == "csv":
        found = [row | {"path": row["path"].removeprefix("'")} for row in read_csv(out)]
    elif kind == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        found = pq.read_table(out).to_pylist()
    assert [float(row["score"]) for row in found] == scores
    assert [row["path"] for row in found] == [f"={i}.png" for i in range(6)]
    assert [row["decision"] for row in found] == decide(scores, load_calibration(rule))
    assert {"real", "unsure", "generated"} == {row["decision"] for row in found}
    assert "1 generated" in capsys.readouterr().out


def test_predict_on_tables_takes_nothing_that_is_for_networks(rule, tmp_path, capsys):
    out = tmp_path / "o.csv"
    out.write_text("mine")
    write(tmp_path / "bad.csv", [("a", 1), ("b", "x")], ("path", "score"))
    for words, why in (([tmp_path / "t.csv", "--views", "2"], "--out"), ([tmp_path / "bad.csv"], "line 3")):
        with pytest.raises(SystemExit):
            main(["predict", *map(str, words), "--model", str(rule), "--out", str(out)])
        assert why in capsys.readouterr().err and out.read_text() == "mine"


def test_monitor_watches_a_table(rule, tmp_path, capsys):
    """As lines come: those without a label wait, and after an alarm nothing is called generated."""
    high, table = load_calibration(rule).threshold, tmp_path / "new.csv"
    calm = [(f"{i}.png", high - i, ("real", "0", "", "fake")[i % 4], "press") for i in range(80)]
    calm.append(("one.png", high + 1, "real", "press"))
    write(table, calm, ("path", "score", "label", "source"))
    words = ["monitor", "--model", str(rule), "--scores", str(table)]
    main(words)
    found = json.loads((rule / "monitor.json").read_text())
    assert (found["images"], found["false_positives"], found["alarm"]) == (41, 1, False)
    write(
        table,
        [*calm, *((f"n{i}.png", high + 1, 0, "press") for i in range(12))],
        ("path", "score", "label", "source"),
    )
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 3 and f"--scores TABLE --out {rule}" in capsys.readouterr().out
    main(["predict", str(table), "--model", str(rule), "--out", str(tmp_path / "o.csv")])
    assert {row["decision"] for row in read_csv(tmp_path / "o.csv")} <= {"real", "unsure"}
    assert "nothing is called generated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (("a", "nan", "real"), "line 2 has no finite score"),
        (("a", "x", "real"), "line 2 has no finite score"),
        (("a", "1", "maybe"), "line 2 has no finite score or no label"),
        (("a", "1"), "line 2 has no finite score or no label"),
    ],
)
def test_a_bad_line_for_monitor_is_named(cells, why, rule, tmp_path, capsys):
    table = write(tmp_path / "new.csv", [cells], ("path", "score", "label"))
    with pytest.raises(SystemExit) as stop:
        main(["monitor", "--model", str(rule), "--scores", table])
    assert stop.value.code == 2 and f"--scores {table}: {why}" in capsys.readouterr().err
    assert not (rule / "monitor.json").exists()


def test_a_pipe_is_not_waited_for(rule, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(SystemExit):
        main(["monitor", "--model", str(rule), "--scores", str(tmp_path / "pipe.csv")])
    assert "not a regular file" in capsys.readouterr().err


def test_monitor_takes_the_table_that_fits_the_model(rule, tmp_path, capsys):
    run = save_tiny(tmp_path / "run", CROP)
    save_calibration(run, calibrate(range(99), fpr=0.1))
    for words, why in (
        (["--model", run, "--scores", tmp_path / "t.csv"], "give --reviewed"),
        (["--model", rule], "give --reviewed or --scores"),
        (["--model", rule, "--scores", "a", "--reviewed", "b"], "give --reviewed or --scores"),
    ):
        with pytest.raises(SystemExit):
            main(["monitor", *map(str, words)])
        assert why in capsys.readouterr().err
