"""Tables of other programs' scores in an evaluation: alone, at their threshold, and beside models."""

import csv
import json

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.detection.decisions import decide, load_calibration
from dgsnet.detection.detector import Detector
from dgsnet.evaluation.metrics import metrics
from dgsnet.evaluation.results import Evaluation, Score
from scipy.stats import rankdata

from tests.support.tables import read_csv
from tests.support.tiny import CROP, save_picture, save_tiny


def write(path, rows, columns):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A table of scores far from 0 to 1, its threshold, and the labels of its images."""
    place, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    rows = []
    for label, source, generator, mean, count in (
        (0, "press", "", -700, 90),
        (0, "phone", "", -650, 60),
        (1, "", "sd", -300, 45),
        (1, "", "mj", -450, 35),
    ):
        for i in range(count):
            score = round(rng.normal(mean, 120), 1)
            rows.append(
                (f"{source}{generator}{i}.png", score, label, source, generator, "night" * (i % 4 == 1))
            )
    columns = ("path", "score", "label", "source", "generator", "category")
    table = write(place / "theirs.csv", [*rows, ("unknown.png", -1, "", "", "", "")], columns)
    main(["calibrate", "--scores", table, "--out", str(place / "rule"), "--fpr", "0.12"])
    main(["evaluate", "--scores", table, "--model", str(place / "rule"), "--out", str(place / "o")])
    return place, rows


def test_its_measures_are_those_of_its_order(place):
    """By way of ranks, which are numbers in 0..1 of the same order."""
    place, rows = place
    found, made = json.loads((place / "o" / "metrics.json").read_text()), load_calibration(place / "rule")
    scores, labels = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    assert found["raw"] and found["threshold"] == found["calibrated_threshold"] == made.threshold
    assert found["generators"].keys() == {"press", "phone", "sd", "mj"}
    for name in ("sd", "mj"):
        of = (labels == 0) | np.array([row[4] == name for row in rows])
        ranks, threshold = rankdata(scores[of]) / of.sum(), (scores[of] <= made.threshold).sum() / of.sum()
        expected = metrics(labels[of], ranks, threshold)
        for key in ("auc", "ap", "accuracy", "real_accuracy", "generated_accuracy", "tpr_at_1", "tpr_at_5"):
            assert found["generators"][name][key] == pytest.approx(expected[key]), key
        assert found["generators"][name]["ece"] is None
    called = [row for row, name in zip(rows, decide(scores, made)) if name == "generated"]
    sources = found["false_positives"]["sources"]
    for source in ("press", "phone"):
        assert sources[source]["wrong"] == sum(row[3] == source for row in called)
    assert found["false_positives"]["promised"] == 0.12
    assert [(r["name"], r["label"], r["called"]) for r in found["categories"]] == [
        ("night", label, sum(row[5] == "night" and row[2] == label for row in called)) for label in (0, 1)
    ]


def test_its_reports_have_the_scores_as_they_are(place):
    place, rows = place
    found = read_csv(place / "o" / "scores.csv")
    assert "probability" not in found[0] and [float(row["score"]) for row in found] == [
        row[1] for row in rows
    ]
    page = (place / "o" / "report.html").read_text()
    assert "theirs.csv" in page and "ECE" not in page.split("<table")[1]
    wrong = max((row for row in rows if not row[2]), key=lambda row: row[1])
    assert f"{wrong[1]:.6g}" in page
    assert "-" in (place / "o" / "metrics.md").read_text()


@pytest.mark.parametrize("scale", [1.0, 1e290, 1e-290])
def test_no_range_of_scores_breaks_a_measure(scale):
    values = np.array([-1.5, -0.5, -0.5, 0.5, 1.5])
    scores = [Score(f"{i}", "g", int(i > 1), float(x)) for i, x in enumerate(values * scale)]
    with np.errstate(all="raise"):
        found = Evaluation(scores, threshold=-0.5 * scale, raw=True).mean()
    assert found["auc"] == pytest.approx(5.5 / 6) and found["accuracy"] == 0.8 and np.isnan(found["ece"])


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Images, a model, its scores as somebody else's table, and another table, both under other paths."""
    place = tmp_path_factory.mktemp("beside")
    run = save_tiny(place / "run", CROP)
    for name, count in (("sd/0_real", 13), ("sd/1_fake", 11), ("mj/0_real", 7), ("mj/1_fake", 9)):
        for i in range(count):
            save_picture(place / "data" / name / f"{i}.png")
    paths = sorted((place / "data").rglob("*.png"))
    logits = [logit for logit, _ in Detector.load(run, "cpu").stream_logits(paths, workers=0)]
    same = [
        (path.relative_to(place), 7 * x - 100, int("fake" in str(path))) for path, x in zip(paths, logits)
    ]
    lacking = [(str(path), float(i % 5)) for i, path in enumerate(paths[::2])] + [("other.png", 3)]
    write(place / "same.csv", same, ("path", "score", "label"))
    write(place / "half.csv", lacking, ("path", "score"))
    real = write(place / "real.csv", [row for row in same if not row[2]], ("path", "score", "label"))
    main(["calibrate", "--scores", real, "--out", str(place / "rule"), "--fpr", "0.4"])
    return place


def test_tables_stand_beside_a_model(beside, capsys):
    """A table of the model's own logits has its AUC, and whatever lacks a score is in no comparison."""
    words = [
        "evaluate",
        "--model",
        f"ours={beside}/run",
        f"same={beside}/rule",
        "--data",
        str(beside / "data"),
    ]
    words += ["--scores", f"{beside}/same.csv", f"theirs={beside}/half.csv", "--out", str(beside / "o")]
    main([*words, "--workers", "0"])
    said = capsys.readouterr().out
    assert f"half.csv: no score of 20 of 40 images, such as {beside}/data/mj/0_real/1.png" in said
    assert "half.csv: 1 rows are of no image" in said and "same.csv: " not in said
    found = json.loads((beside / "o" / "comparison.json").read_text())
    assert list(found["models"]) == ["ours", "same", "theirs"]
    ours, same, theirs = found["models"].values()
    # What rounds to the same probability is one score to the model.
    assert same["mean"]["auc"] == pytest.approx(ours["mean"]["auc"], abs=1e-3)
    assert same["calibrated"] and same["threshold"] == load_calibration(beside / "rule").threshold
    assert not theirs["calibrated"] and theirs["threshold"] == 0.5
    assert theirs["mean"]["n_damaged"] == 20 and ours["mean"]["n_damaged"] == 0
    assert all(
        each["of"] != "AUC" or each["name"] != "same" or abs(each["value"]) < 0.05
        for each in found["differences"]
    )
    rows = {name: read_csv(beside / "o" / name / "scores.csv") for name in ("ours", "theirs")}
    assert [row["path"] for row in rows["ours"]] == [row["path"] for row in rows["theirs"]]
    assert sum("no score in" in row["error"] for row in rows["theirs"]) == 20
    page = (beside / "o" / "report.html").read_text()
    assert "theirs" in page and "20" in page
    # Those apart in rank come first, whatever the scores' range.
    read = [i for i, row in enumerate(rows["theirs"]) if not row["error"]]
    values = {
        name: np.array([found_score(row) for row in read_csv(beside / "o" / name / "scores.csv")])
        for name in found["models"]
    }
    ranks = {name: rankdata(column, nan_policy="omit") for name, column in values.items()}
    paths = [row["path"] for row in rows["ours"]]
    apart = {
        paths[i]: max(ranks[name][i] for name in ranks) - min(ranks[name][i] for name in ranks) for i in read
    }
    order = [apart[each["path"]] for each in found["disagreements"]]
    assert len(order) > 5 and order == sorted(order, reverse=True)
    first = found["disagreements"][0]
    assert first["probability"] == {
        name: column[paths.index(first["path"])] for name, column in values.items()
    }


def found_score(row):
    return float(row.get("score") or row.get("probability") or "nan")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--model", "{0}/rule"], "give these with --scores rule=TABLE"),
        (["--model", "{0}/run", "--scores", "run={0}/same.csv"], "'run' is a model too"),
        (["--model", "{0}/run", "--scores", "{0}/same.csv", "--reencode", "jpeg:90"], "leave --reencode"),
        (["--scores", "{0}/same.csv", "--robustness", "blur:1"], "--robustness"),
        (["--scores", "{0}/same.csv", "x/same={0}/half.csv"], "cannot be the name"),
        (["--scores", "{0}/same.csv", "{0}/./same.csv"], "two tables are called 'same'"),
        (["--scores", "{0}/half.csv", "--data", "{0}/data"], ""),
        (["--scores", "{0}/half.csv"], "no row has a label"),
        (["--scores", "{0}/twice.csv", "--data", "{0}/data"], "line 3: a second score of"),
        (["--scores", "{0}/others.csv", "--data", "{0}/data"], "no score of any of the 40 images"),
        (["--scores", "{0}/none.csv"], "none.csv: cannot be read"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_scored(words, why, beside, tmp_path, capsys):
    image = "data/sd/0_real/1.png"
    write(beside / "twice.csv", [(image, 1), (f"data/../{image}", 2)], ("path", "score"))
    write(beside / "others.csv", [("a.png", 1)], ("path", "score"))
    line = ["evaluate", *(word.format(beside) for word in words), "--out", str(tmp_path / "o")]
    if not why:
        return main(line)
    with pytest.raises(SystemExit) as stop:
        main(line)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and why in said and said.count("\n") == 1 and not (tmp_path / "o").exists()
    return None
