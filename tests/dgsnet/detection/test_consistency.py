"""`--consistency`: copies as Pillow makes them, and "unsure" where one of them is decided otherwise."""

import csv
import io
import json

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.data import distortions
from dgsnet.detection.decisions import SETTINGS, Calibration, decide
from dgsnet.detection.detector import Detector
from dgsnet.detection.scoring import predict_command
from dgsnet.errors import UserError
from PIL import Image

from tests.support.tables import interrupted
from tests.support.tiny import CROP, save_noise, save_tiny

N = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), CROP)


@pytest.fixture(scope="module")
def detector(run):
    return Detector.load(run, device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return sorted(save_noise(tmp_path_factory.mktemp("images"), N, (45, 80)).glob("*.png"))


@pytest.fixture(scope="module")
def probabilities(detector, images):
    return detector.predict(images, consistency=True)


def encoded(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(file)


def resized(image, factor):
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def test_the_copies_are_those_of_pillow(detector, images, probabilities):
    opened = [Image.open(path) for path in images[:6]]
    copies = [
        opened,
        [encoded(image, 90) for image in opened],
        [encoded(image, 75) for image in opened],
        [resized(image, 0.75) for image in opened],
        [resized(image, 1.25) for image in opened],
    ]
    expected = np.stack([detector.predict(column) for column in copies], axis=1)
    assert probabilities.shape == (N, 5) and probabilities.dtype == np.float32
    np.testing.assert_array_equal(probabilities[:6], expected)
    assert len({*expected[0]}) == 5


def test_scores_are_those_without_copies(detector, images, probabilities):
    np.testing.assert_array_equal(detector.predict(images), probabilities[:, 0])
    assert detector.predict([], consistency=True).shape == (0, 5)


def test_with_views_each_copy_has_as_many(run, images):
    several = Detector.load(run, device="cpu", views=3)
    opened = Image.open(images[0])
    expected = [several.predict(image)[0] for image in (opened, encoded(opened, 90))]
    np.testing.assert_array_equal(several.predict(images[0], consistency=True)[0, :2], expected)


def test_what_differs_is_unsure(detector, probabilities):
    plain = detector.decide(probabilities[:, 0])
    agree = [len({value > 0.5 for value in row}) == 1 for row in probabilities]
    assert {True, False} == set(agree) and set(plain) == {"real", "generated"}
    expected = [name if same else "unsure" for name, same in zip(plain, agree)]
    assert detector.decide(probabilities) == expected


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ([0.9, 0.95, 0.81], "generated"),
        # One copy is in the band.
        ([0.9, 0.95, 0.8], "unsure"),
        # The image itself is in the band.
        ([0.7, 0.9, 0.9], "unsure"),
        ([0.3, 0.1, 0.2], "real"),
        ([0.3, 0.9, 0.2], "unsure"),
        ([0.7, 0.5, 0.6], "unsure"),
        ([float("nan"), 0.9, 0.9], ""),
    ],
)
def test_the_band_of_a_calibration_counts(row, name):
    numbers = {field: 0.5 for field in Calibration.__dataclass_fields__}
    rest = {"n_reals": 300, "n_generated": 200, "sources": (), "categories": (), "raw": False}
    calibration = Calibration(**numbers | SETTINGS | rest | {"threshold": 0.8, "low": 0.3})
    assert decide([row], calibration) == [name]
    assert decide([[p] for p in row], calibration) == decide(row, calibration)


def test_a_copy_that_cannot_be_made_is_told(detector, images, monkeypatch):
    with Image.open(images[0]) as image:
        monkeypatch.setattr(distortions, "MAX_PIXELS", image.width * image.height)
    assert np.isnan(detector.predict(images[0], consistency=True)).all()
    assert detector.errors[0].startswith(f"{images[0]}: its copy resize:1.25 cannot be scored: ")
    assert not np.isnan(detector.predict(images[0])).any()


def test_the_table_has_the_spread(run, images, probabilities, tmp_path):
    words = ["predict", str(images[0].parent), "--model", str(run), "--device", "cpu", "--out"]
    main([*words, str(tmp_path / "plain.csv")])
    main([*words, str(tmp_path / "t.csv"), "--consistency"])
    main([*words, str(tmp_path / "t.jsonl"), "--consistency", "--workers", "1"])
    plain, table = (
        list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("plain.csv", "t.csv")
    )
    assert list(plain[0]) == ["path", "probability", "decision", "error"]
    assert list(table[0]) == [*plain[0], "spread"]
    for before, after, row in zip(plain, table, probabilities.astype(float).round(6)):
        assert after["probability"] == before["probability"]
        assert float(after["spread"]) == pytest.approx(row.max() - row.min(), abs=2e-6)
        turned = len({*(row > 0.5)}) > 1
        assert after["decision"] == ("unsure" if turned else before["decision"])
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [f"{row['spread']:.6f}" for row in rows] == [row["spread"] for row in table]


def test_a_table_begun_without_copies_is_not_completed_with_them(run, images, tmp_path):
    arguments = [str(path) for path in images[:3]], str(run), str(tmp_path / "t.csv")
    interrupted(predict_command, *arguments, rows=2)
    with pytest.raises(UserError, match=r"other settings \(consistency\)"):
        predict_command(*arguments, consistency=True, resume=True)
