"""Scores beside what files alone say: of detectors that follow the files, and of others."""

import csv
import json
import math

import numpy as np
import pytest
from dgsnet import cli
from dgsnet.audit.audit import audit_command
from dgsnet.audit.shortcuts import FileModel, interval
from dgsnet.data.nuisances import NUISANCES
from dgsnet.evaluation.metrics import CONFIDENCE, SHORTCUT_MEASURES, metrics
from dgsnet.evaluation.shortcuts import file_shortcut
from PIL import Image

from tests.support.tiny import CROP, save_tiny

JPEG, WIDTH = NUISANCES.index("format JPEG"), NUISANCES.index("log2 width")


def images(n, share=0.8, seed=0):
    """n images of each class; this share of the real and the other share of the generated are JPEG."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], n)
    found = np.zeros((2 * n, len(NUISANCES)), np.float32)
    found[:, JPEG] = rng.random(2 * n) < np.where(labels == 1, 1 - share, share)
    found[:, WIDTH] = rng.normal(9, 1, 2 * n)
    return found, labels, rng


def probability(logits):
    return 1 / (1 + np.exp(-logits))


def test_a_detector_that_follows_the_files():
    found, labels, rng = images(300)
    result = file_shortcut(found, labels, probability(2 - 4 * found[:, JPEG] + rng.normal(0, 0.5, 600)), 0.5)
    values = result.values
    assert values["file_auc"] == pytest.approx(0.8, abs=0.05)
    assert values["agree_auc"] > 0.99 and values["conflict_auc"] < 0.01
    assert values["agree_accuracy"] > 0.99 and values["worst_group_accuracy"] < 0.01
    assert result.worst_group.endswith("conflict")
    # Of a variance of 4^2 p (1 - p) + 0.5^2 with p = 0.8 all but the last.
    assert values["explained_real"] == pytest.approx(0.91, abs=0.03)
    assert values["n_agree"] + values["n_conflict"] == 600 and values["n_conflict"] == pytest.approx(
        120, abs=25
    )


def test_a_detector_that_does_not():
    found, labels, rng = images(300)
    values = file_shortcut(found, labels, probability(rng.normal(4 * labels - 2, 1)), 0.5).values
    assert values["conflict_auc"] == pytest.approx(values["agree_auc"], abs=0.02)
    assert values["explained_real"] < 0.02 and values["explained_generated"] < 0.02
    # Of the label itself nothing is explained within a class, however much the files tell of it.
    assert file_shortcut(found, labels, probability(4.0 * labels - 2), 0.5).values["explained_real"] != 0


def test_the_measures_are_those_of_their_images():
    found, labels, rng = images(60)
    scores = rng.random(120).round(2)
    result = file_shortcut(found, labels, scores, 0.3)
    agrees = (result.probabilities > 0.5) == (labels == 1)
    for part, chosen in (("agree", agrees), ("conflict", ~agrees)):
        expected = metrics(labels[chosen], scores[chosen], 0.3)
        for key in ("auc", "accuracy"):
            assert result.values[f"{part}_{key}"] == expected[key]
            low, high = result.intervals[f"{part}_{key}"]
            assert low < expected[key] < high
    right = (scores > 0.3) == labels
    groups = {
        f"{name}, {part}": np.mean(right[(labels == label) & chosen])
        for label, name in enumerate(("real", "generated"))
        for part, chosen in (("agree", agrees), ("conflict", ~agrees))
    }
    worst = min(groups, key=groups.get)
    assert (result.worst_group, result.values["worst_group_accuracy"]) == (worst, groups[worst])


def test_the_files_auc_is_as_sure_as_its_images_are_many():
    """Of other data's model nothing is learned here; of few images of one class little is known."""
    training, labels, _ = images(100, share=0.9)
    model = FileModel.fit(training, labels)
    found, labels, rng = images(200, seed=1)
    part = np.r_[:200, 200:230]
    for known, trained in ((model, False), (None, True)):
        result = file_shortcut(found[part], labels[part], rng.random(230), 0.5, known)
        auc = result.values["file_auc"]
        expected = interval(auc, 200, 30, trained=trained, confidence=CONFIDENCE)
        assert 0.6 < auc < 1 and result.intervals["file_auc"] == expected[1:]
        assert interval(auc, 30, 200, trained=trained, confidence=CONFIDENCE) != expected


def test_the_word_of_other_data():
    """Balanced images have no shortcut of their own; those against the training's are told all the same."""
    training, labels, _ = images(100, share=0.9)
    model = FileModel.fit(training, labels)
    found, labels, _ = images(200, share=0.5, seed=1)
    scores = probability(2 - 4 * found[:, JPEG] + labels)
    result = file_shortcut(found, labels, scores, 0.5, model)
    assert result.values["file_auc"] == pytest.approx(0.5, abs=0.1)
    assert result.values["agree_auc"] > 0.95 and result.values["conflict_auc"] < 0.05
    jpeg = found[:, JPEG] == 1
    assert np.mean((result.probabilities < 0.5) == jpeg) > 0.95


def test_what_cannot_be_told():
    found, labels, rng = images(9)
    few = file_shortcut(found, labels, rng.random(18), 0.5)
    assert all(math.isnan(few.values[key]) for key in SHORTCUT_MEASURES) and few.worst_group == ""
    found, labels, rng = images(40)
    found[:30] = np.nan
    part = file_shortcut(found, labels, rng.random(80), 0.5)
    assert np.isnan(part.probabilities).tolist() == [True] * 30 + [False] * 50
    assert part.values["n_agree"] + part.values["n_conflict"] == 50
    found[:] = found[-1]
    alike = file_shortcut(found, labels, rng.random(80), 0.5)
    assert math.isnan(alike.values["file_auc"]) and alike.values["explained_real"] == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), CROP)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One generator: 14 of 16 real images are JPEG, 2 of 16 generated ones."""
    root = tmp_path_factory.mktemp("data") / "set"
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 40, 3), dtype=np.uint8)
    for label, folder in enumerate(("0_real", "1_fake")):
        (root / folder).mkdir(parents=True)
        for i in range(16):
            jpeg = (i < 14) != label
            Image.fromarray(noise[16 * label + i]).save(root / folder / f"{i}.{'jpg' if jpeg else 'png'}")
    return root


def test_the_command(model, data, tmp_path, capsys):
    audit_command([str(data)], str(tmp_path / "audit"))
    words = ["evaluate", "--data", str(data), "--model", str(model), "--out"]
    cli.main([*words, str(tmp_path / "own"), "--robustness", "jpeg:90"])
    assert "beside what the files alone say:" in capsys.readouterr().out
    cli.main([*words, str(tmp_path / "other"), "--audit", str(tmp_path / "audit" / "audit.json")])
    for name in ("own", "other"):
        out = tmp_path / name
        shortcut = json.loads((out / "metrics.json").read_text())["generators"]["set"]["shortcut"]
        assert shortcut["file_auc"] == pytest.approx(28 / 32, abs=0.1) and shortcut["n_conflict"] == 4
        scores = list(csv.DictReader((out / "scores.csv").open()))
        plain = [row for row in scores if not row["distortion"]]
        # The files' word stands beside every score, so that the groups can be made again.
        conflict = [row for row in plain if (float(row["files"]) > 0.5) != (row["label"] == "1")]
        assert len(conflict) == 4 and {row["files"] for row in scores if row["distortion"]} <= {""}
        right = [(float(row["probability"]) > 0.5) == (row["label"] == "1") for row in conflict]
        assert np.mean(right) == shortcut["conflict_accuracy"]
        (row, mean) = list(csv.DictReader((out / "metrics.csv").open()))[:2]
        assert float(row["conflict_auc"]) == float(mean["conflict_auc"]) == shortcut["conflict_auc"]
        assert "Beside what the files alone say" in (out / "report.html").read_text()
    assert "on the audited" not in (tmp_path / "own/metrics.md").read_text()
    assert "fitted to the audited images" in (tmp_path / "other/metrics.md").read_text()


def test_a_wrong_audit_is_told_before_the_model_is_loaded(data, tmp_path, capsys):
    words = ["--data", str(data), "--model", str(tmp_path / "none"), "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", *words, "--audit", str(tmp_path / "none.json")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "none.json: not readable as JSON" in error and len(error.splitlines()) == 1
