"""A converted published detector in predict, evaluate and the page: the same scores in all of them.

On Ray it is in tests/dgsnet/detection/test_ray_engine.py, beside the one that is trained here.
"""

import json
from dataclasses import replace

import pytest
from dgsnet.cli import main
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.scoring import predict_command
from dgsnet.detection.serve import create_app
from dgsnet.evaluation.evaluate import evaluate_command
from fastapi.testclient import TestClient

from tests.support import published
from tests.support.tables import interrupted, read_csv

SIZES = ((260, 301), (150, 97), (256, 256), (400, 120), (300, 333))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("used")
    published.register(folder)
    published.convert_community(folder, "timm/vit_small_patch16_224_two")
    for kind in ("0_real", "1_fake"):
        (folder / "photos" / kind).mkdir(parents=True)
    published.pictures(folder / "photos" / "0_real", *SIZES[:3])
    published.pictures(folder / "photos" / "1_fake", *SIZES[3:])
    made = calibrate(range(99), fpr=0.1)
    save_calibration(folder / "model", replace(made, low=0.68, threshold=0.7))
    return folder


@pytest.fixture(scope="module")
def rows(place):
    """Of an undisturbed predict, which decides in both ways."""
    main(["predict", str(place / "photos"), "--model", str(place / "model"), "--out", str(place / "all.csv")])
    found = read_csv(place / "all.csv")
    assert len(found) == 5 and len({row["decision"] for row in found}) > 1
    assert len({row["probability"] for row in found}) == 5
    return found


def test_a_killed_predict_goes_on(place, rows):
    arguments = [str(place / "photos")], str(place / "model"), str(place / "again.csv")
    interrupted(predict_command, *arguments, rows=2)
    predict_command(*arguments, resume=True)
    assert (place / "again.csv").read_bytes() == (place / "all.csv").read_bytes()


def test_evaluate_measures_it_and_goes_on(place, rows):
    data, model = [str(place / "photos")], str(place / "model")
    interrupted(evaluate_command, data, model, str(place / "o"), rows=3, robustness=["jpeg:60"])
    evaluate_command(data, model, str(place / "o"), robustness=["jpeg:60"])
    found = [row for row in read_csv(place / "o" / "scores.csv") if not row["distortion"]]
    assert {row["path"]: row["probability"] for row in found} == {r["path"]: r["probability"] for r in rows}
    measured = json.loads((place / "o" / "metrics.json").read_text())
    made = json.loads((place / "model" / "calibration.json").read_text())
    assert measured["calibrated_threshold"] == made["threshold"] and "jpeg:60" in measured["robustness"]
    called = {row["path"] for row in rows if row["decision"] == "generated"}
    real = [row["path"] for row in rows if "0_real" in row["path"]]
    assert measured["mean"]["calibrated_real_accuracy"] == sum(path not in called for path in real) / len(
        real
    )


def test_the_page_says_the_same(place, rows):
    client = TestClient(create_app(Detector.load(place / "model", "cpu")), base_url="http://localhost")
    for row in rows:
        with open(row["path"], "rb") as file:
            answer = client.post("/api/score", content=file.read()).json()
        assert f"{answer['probability']:.6f}" == row["probability"] and answer["decision"] == row["decision"]
    assert client.get("/api/model").json()["calibrated"]
