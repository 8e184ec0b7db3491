"""`dgsnet evaluate`: what it measures, prints and writes."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from dgsnet.data import distortions
from dgsnet.data.images import read_image
from dgsnet.data.items import Item, find_samples
from dgsnet.detection.decisions import Calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation import robustness
from dgsnet.evaluation.evaluate import evaluate, evaluate_command, find_suites
from dgsnet.evaluation.metrics import metrics
from PIL import Image

from tests.support.tables import measure, read_csv
from tests.support.tiny import save_picture


def test_evaluate_command(model, data, tmp_path, capsys):
    out = tmp_path / "results"
    evaluate_command([str(data)], str(model), str(out))
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["alpha", "beta", "mean"]
    assert "left out: " in printed and "broken.png" in printed and "1 of 23 images" in printed

    document = json.loads((out / "metrics.json").read_text())
    assert document["generators"]["beta"]["n_generated"] == 6
    assert document["generators"]["beta"]["n_damaged"] == document["mean"]["n_damaged"] == 1
    assert [d["path"].endswith("broken.png") for d in document["damaged"]] == [True]

    scores = read_csv(out / "scores.csv")
    assert len(scores) == 23 and sum(row["probability"] == "" for row in scores) == 1
    alpha = [row for row in scores if row["generator"] == "alpha"]
    again = metrics([int(r["label"]) for r in alpha], [float(r["probability"]) for r in alpha])
    assert again == {key: document["generators"]["alpha"][key] for key in again}

    table = read_csv(out / "metrics.csv")
    assert [row["generator"] for row in table] == ["alpha", "beta", "mean"]
    assert float(table[2]["auc"]) == document["mean"]["auc"]
    assert Image.open(out / "metrics.png").width > 500
    assert not list(out.glob("*.partial")) and not list(out.glob(".*"))


def test_one_class_is_null_in_json_and_empty_in_csv(model, data, tmp_path):
    shutil.rmtree(data / "alpha/0_real")
    evaluate_command([str(data / "alpha")], str(model), str(tmp_path / "o"))
    assert json.loads((tmp_path / "o/metrics.json").read_text())["mean"]["auc"] is None
    assert read_csv(tmp_path / "o/metrics.csv")[0]["auc"] == ""


@dataclass(frozen=True, slots=True)
class Deadly(Item):
    """An image whose decoder takes its process with it."""

    def read_bytes(self):
        os.kill(os.getpid(), signal.SIGSEGV)


def test_an_image_that_kills_its_reader_costs_one_row(model, data):
    samples = find_samples(str(data))[:4]
    detector = Detector.load(model, "cpu")
    expected = evaluate(detector, samples, progress=False).plain
    dead = Deadly("dead.png", label=1, generator="alpha")
    found = evaluate(detector, [*samples[:2], dead, *samples[2:]], workers=1, progress=False).plain
    assert found.pop(2).error == "dead.png: the process that read it died"
    assert found == expected and not any(score.error for score in found)


def test_several_sources_are_kept_apart(model, data, tmp_path, capsys):
    sources = [str(data), str(data / "alpha")]
    evaluate_command(sources, str(model), str(tmp_path / "o"))
    generators = json.loads((tmp_path / "o/metrics.json").read_text())["generators"]
    assert sorted(generators) == ["alpha/alpha", "data/alpha", "data/beta"]


def test_nothing_readable_is_an_error(model, tmp_path):
    folder = tmp_path / "d/0_real"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        evaluate_command([str(tmp_path / "d")], str(model), str(tmp_path / "o"))


def test_the_scores_are_those_of_predict(model, data, tmp_path):
    measure(model, data, tmp_path / "o", robustness=["jpeg:60", "blur:1+crop:0.9"])
    detector = Detector.load(model, device="cpu")
    scores = read_csv(tmp_path / "o/scores.csv")
    assert [row["distortion"] for row in scores] == [""] * 23 + ["jpeg:60"] * 23 + ["blur:1+crop:0.9"] * 23
    for distortion in (lambda image: image, *robustness.parse(["jpeg:60", "blur:1+crop:0.9"])):
        name = getattr(distortion, "name", "")
        chosen = [row for row in scores if row["distortion"] == name and not row["error"]]
        assert len(chosen) == 22
        expected = detector.predict([distortion(read_image(row["path"])) for row in chosen])
        np.testing.assert_allclose([float(row["probability"]) for row in chosen], expected, atol=1e-6)


def test_robustness_is_reported_per_distortion(model, data, tmp_path, capsys):
    document = measure(model, data, tmp_path / "o", robustness=["jpeg:20,80"])
    assert list(document["robustness"]) == ["jpeg:20", "jpeg:80"]
    assert set(document["robustness"]["jpeg:20"]["generators"]) == {"alpha", "beta"}
    assert document["robustness"]["jpeg:20"]["mean"]["n_damaged"] == 1
    # The image does not count once more for every distortion.
    assert len(document["damaged"]) == 1
    printed = capsys.readouterr().out
    lines = printed.split("distortion ")[1].splitlines()[2:5]
    assert [line.split()[0] for line in lines] == ["none", "jpeg:20", "jpeg:80"]
    table = read_csv(tmp_path / "o/metrics.csv")
    assert [(r["generator"], r["distortion"]) for r in table[3:6]] == [
        ("alpha", "jpeg:20"),
        ("beta", "jpeg:20"),
        ("mean", "jpeg:20"),
    ]
    assert "| jpeg:80 |" in (tmp_path / "o/metrics.md").read_text()


def test_a_file_is_opened_once_for_all_that_is_asked_of_it(model, data, tmp_path):
    """For its hash, its nuisances, and what it looks like as it is and distorted."""
    # Without photographs no mistake is shown.
    shutil.rmtree(data / "alpha/0_real"), shutil.rmtree(data / "beta/0_real")
    known = shutil.copytree(model, tmp_path / "known")
    np.save(known / "best" / "training_images.npy", np.array([1, 2], np.int64))
    opened = Counter()
    sys.addaudithook(lambda event, words: event == "open" and opened.update([str(words[0])]))
    measure(known, data, tmp_path / "o", robustness=["jpeg:60", "blur:1"], threshold=0.0, workers=0)
    images = list(data.rglob("*.png"))
    assert len(images) == 14 and [opened[str(path)] for path in images] == [1] * 14


def test_an_image_that_cannot_be_distorted_is_listed(model, tmp_path, monkeypatch):
    for i in range(4):
        save_picture(tmp_path / f"d/{i % 2}_{'real' if i % 2 == 0 else 'fake'}/{i}.png")
    monkeypatch.setattr(distortions, "MAX_PIXELS", 3000)
    document = measure(model, tmp_path / "d", tmp_path / "o", robustness=["resize:2"])
    assert [d["distortion"] for d in document["damaged"]] == ["resize:2"] * 4
    assert all("0.png: resize:2 makes it" in d["error"] for d in document["damaged"][:1])
    assert document["mean"]["n_damaged"] == 0 and document["robustness"]["resize:2"]["mean"]["n_damaged"] == 4


def test_intervals_hold_the_value_and_are_reproducible(model, data, tmp_path):
    first, again = (measure(model, data, tmp_path / name) for name in ("a", "b"))
    assert first["generators"] == again["generators"] and first["confidence"] == 0.95
    for row in (first["mean"], *first["generators"].values()):
        for key, (low, high) in row["intervals"].items():
            assert (low is None and key == "ece") or low <= row[key] <= high, key
    # The interval of a generator depends on its scores and its name alone.
    shutil.rmtree(data / "beta")
    assert measure(model, data, tmp_path / "c")["generators"]["alpha"] == first["generators"]["alpha"]


def test_a_calibrated_model_is_measured_at_its_threshold_too(model, data, tmp_path, capsys):
    calibrated = shutil.copytree(model, tmp_path / "m")
    plain = measure(calibrated, data, tmp_path / "o")
    assert plain["calibrated_threshold"] is None and "calibrated_accuracy" not in plain["mean"]
    journal = (tmp_path / "o/scores.jsonl").read_bytes()
    threshold = sorted(
        float(r["probability"]) for r in read_csv(tmp_path / "o/scores.csv") if r["probability"]
    )[7]
    values = {"fpr": 0.1, "fpr_upper": 0.08, "fpr_observed": 0.05, "miss_rate": None, "miss_upper": None}
    values |= {"unsure_reals": 0.0, "unsure_generated": None, "tpr_observed": None, "confidence": 0.95}
    calibration = Calibration(
        threshold=threshold, low=threshold, temperature=1.0, n_reals=99, n_generated=0, **values
    )
    save_calibration(calibrated, calibration)
    capsys.readouterr()
    document = measure(calibrated, data, tmp_path / "o")
    assert document["calibrated_threshold"] == threshold
    again = read_csv(tmp_path / "o/scores.csv")
    beta = [r for r in again if r["generator"] == "beta" and r["probability"]]
    right = [(float(r["probability"]) > threshold) == (r["label"] == "1") for r in beta]
    assert document["generators"]["beta"]["calibrated_accuracy"] == pytest.approx(np.mean(right))
    assert {k: v for k, v in document["mean"].items() if k in plain["mean"] and k != "intervals"} == {
        k: v for k, v in plain["mean"].items() if k != "intervals"
    }
    found = document["false_positives"]
    wrong = sum(r["label"] == "0" and float(r["probability"]) > threshold for r in beta)
    assert (found["threshold"], found["promised"]) == (threshold, 0.1)
    assert found["sources"]["beta"]["wrong"] == wrong and found["sources"]["beta"]["exceeds"]
    printed = capsys.readouterr().out
    assert "calibrated" in printed.splitlines()[0] and "\nreal images of" in printed
    assert "\nwarning: The calibrated rate of 10.0% false positives does not hold" in printed
    # Calibrating does not score anew.
    assert (tmp_path / "o/scores.jsonl").read_bytes() == journal


def test_the_names_of_suites(model, data, tmp_path):
    (tmp_path / "AIGIBench").mkdir()
    shutil.copytree(data, tmp_path / "AIGIBench/test")
    (tmp_path / "list.csv").write_text(f"path,label\n{data}/alpha/0_real/0.png,0\n")
    shutil.copytree(data, tmp_path / "a=b")
    found = find_suites(
        [str(tmp_path / "AIGIBench/test"), str(tmp_path / "list.csv"), str(tmp_path / "a=b"), f"x={data}"]
    )
    assert list(found) == ["AIGIBench", "list", "a=b", "x"]
    with pytest.raises(UserError, match=r"two suites are called 'data'.*NAME="):
        find_suites([str(data), str(data)])
    with pytest.raises(UserError, match="no such file"):
        find_suites([f"x={tmp_path}/nowhere"])


def test_reencoding_treats_both_classes_alike(model, tmp_path, capsys):
    """Real JPEG and generated PNG files of one size: nothing is left of what the files alone say."""
    rng = np.random.default_rng(0)
    for i in range(60):
        folder, kind = (("0_real", "jpg"), ("1_fake", "png"))[i % 2]
        path = tmp_path / "data/g" / folder / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        # Both classes are compressed once.
        pixels = distortions.reencode(noise, 90, codec="jpeg") if i % 2 else noise
        Image.fromarray(pixels).save(path, quality=90)
    found = {}
    for name, options in {"as they are": {}, "alike": {"reencode": "jpeg:96"}}.items():
        found[name] = measure(model, tmp_path / "data", tmp_path / name, **options)["generators"]["g"]
    assert found["as they are"]["shortcut"]["file_auc"] == 1
    assert found["alike"]["shortcut"]["file_auc"] < 0.8
    assert "Every image was written as jpeg:96 first" in (tmp_path / "alike/metrics.md").read_text()
    (alike,) = robustness.parse(["jpeg:96"])
    rows = read_csv(tmp_path / "alike/scores.csv")
    expected = Detector.load(model, device="cpu").predict([alike(read_image(row["path"])) for row in rows])
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected, atol=1e-6)
    with pytest.raises(UserError, match="as they are"):
        measure(model, tmp_path / "data", tmp_path / "as they are", reencode="jpeg:96")


@pytest.mark.parametrize("word", ["jpeg:90,80", "blur:1", "default", "jpeg:90+webp:80", "jpeg:200", "png:1"])
def test_what_no_image_can_be_written_as_is_refused(word, model, data, tmp_path):
    with pytest.raises(UserError, match=f"--reencode {word}: ".replace("+", r"\+")) as error:
        evaluate_command([str(data)], str(model), str(tmp_path / "o"), reencode=word)
    assert "\n" not in str(error.value) and not (tmp_path / "o").exists()
