"""A score from several crops is the mean of their logits, whatever stands beside the image."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dgsnet import Detector
from dgsnet.config import Config, PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.detection.calibrate import calibrate_command
from dgsnet.detection.decisions import load_calibration
from dgsnet.detection.heatmaps import heatmap
from dgsnet.detection.scoring import predict_command
from dgsnet.detection.serve import create_app
from dgsnet.errors import UserError
from dgsnet.evaluation.evaluate import evaluate_command
from dgsnet.model.checkpoint import load_model, save_model
from PIL import Image
from starlette.testclient import TestClient

from tests.support.pictures import picture
from tests.support.tables import interrupted, read_csv
from tests.support.tiny import CROP

# Left upper corners of the crops of 32 pixels, of images of these heights and widths.
CORNERS = {
    (5, 70, 53): [(19, 10), (0, 0), (0, 21), (38, 0), (38, 21)],
    (5, 33, 32): [(0, 0), (0, 0), (0, 0), (1, 0), (1, 0)],
    ("tiles", 70, 53): [(0, 0), (0, 21), (19, 0), (19, 21), (38, 0), (38, 21)],
    ("tiles", 64, 32): [(0, 0), (32, 0)],
    ("tiles", 32, 32): [(0, 0)],
    ("tiles", 32, 129): [(0, 0), (0, 24), (0, 48), (0, 72), (0, 97)],
}
HOW = [{"batch": 4, "precision": "bf16"}, {"batch": 1, "precision": "fp32"}]


def logits_of(detector: Detector, images: list, **options) -> list[float]:
    found = list(detector.stream_logits(images, **options))
    assert not any(error for _, error in found)
    return [logit for logit, _ in found]


@pytest.mark.parametrize("how", HOW, ids=["bf16", "fp32"])
@pytest.mark.parametrize("crops, height, width", CORNERS)
def test_the_logit_is_the_mean_of_those_of_crops_cut_by_hand(run, how, crops, height, width):
    image = picture(height, width)
    cut = [image[top : top + 32, left : left + 32] for top, left in CORNERS[crops, height, width]]
    alone = logits_of(Detector.load(run, device="cpu", **how), cut)
    (found,) = logits_of(Detector.load(run, device="cpu", crops=crops, **how), [image])
    assert found == torch.tensor(alone).mean().item()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Images that have from one to twelve tiles, one of them smaller than a crop."""
    folder = tmp_path_factory.mktemp("mixed")
    for i, (height, width) in enumerate(
        [(32, 32), (90, 120), (33, 64), (20, 45), (64, 97), (50, 50), (96, 32)]
    ):
        Image.fromarray(picture(height, width, seed=i)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("crops, how, workers", [(5, HOW[0], 1), ("tiles", HOW[0], 2), ("tiles", HOW[1], 0)])
def test_company_order_and_workers_change_no_bit(run, mixed, crops, how, workers):
    paths = sorted(mixed.iterdir())
    detector = Detector.load(run, device="cpu", crops=crops, **how)
    alone = [logits_of(detector, [path])[0] for path in paths]
    assert len(set(alone)) == len(paths)
    assert logits_of(detector, paths, workers=0) == alone
    assert logits_of(detector, paths[::-1], workers=workers) == alone[::-1]
    views = Detector.load(run, device="cpu", crops=crops, views=3, **how)
    alone = [logits_of(views, [path])[0] for path in paths]
    assert logits_of(views, paths) == alone
    # The image as it is comes before its copies, which have other numbers of tiles.
    scores = detector.predict(paths, consistency=True)
    np.testing.assert_array_equal(scores[:, 0], detector.predict(paths))
    assert len(np.unique(scores)) > 4 * len(paths)


def test_one_crop_is_what_there_was_before(run, mixed):
    """The configuration, calibration and table of a model do not change by it."""
    plain, one = Detector.load(run, device="cpu"), Detector.load(run, device="cpu", crops=1)
    assert plain.crops == 1
    np.testing.assert_array_equal(
        plain.predict(sorted(mixed.iterdir())), one.predict(sorted(mixed.iterdir()))
    )
    for path in mixed.iterdir():
        image = read_image(path)
        assert torch.equal(plain.preprocess.crops(image), plain.preprocess(image)[None])
    assert plain.settings()["preprocessing"].keys() == {
        *("mode", "image_size", "patch_size", "num_patches", "normalization", "flip")
    }


def test_further_views_are_further_crops(run, mixed):
    (path, *_) = sorted(mixed.glob("1.png"))
    plain = Detector.load(run, device="cpu", views=3)
    crops = Detector.load(run, device="cpu", views=3, crops="tiles")
    own, others = (detector.preprocess.crops(read_image(path)) for detector in (plain, crops))
    assert len(others) == 12
    (of_plain,), (of_crops,) = logits_of(plain, [path]), logits_of(crops, [path])
    of_views = 3 * of_plain - plain.logits(own).item()
    np.testing.assert_allclose(14 * of_crops, crops.logits(others).sum().item() + of_views, rtol=1e-4)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A dataset whose photographs have several tiles."""
    root = tmp_path_factory.mktemp("data")
    for i in range(24):
        folder = root / ("0_real" if i % 3 else "1_fake")
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture(40 + 3 * i, 90 - i, seed=i)).save(folder / f"{i:02}.png")
    return root


def test_commands_and_the_page_score_alike(run, labelled, tmp_path):
    how = {"crops": "tiles", "views": 2, "batch": 4, "precision": "bf16"}
    reals = sorted((labelled / "0_real").iterdir())
    detector = Detector.load(run, device="cpu", **how)
    expected = [round(float(p), 6) for p in detector.predict(reals)]
    predict_command([str(labelled / "0_real")], run, str(tmp_path / "s.csv"), **how)
    assert [float(row["probability"]) for row in read_csv(tmp_path / "s.csv")] == pytest.approx(
        expected, abs=1e-6
    )
    evaluate_command([str(labelled)], run, str(tmp_path / "e"), robustness=["resize:0.5"], **how)
    rows = read_csv(tmp_path / "e" / "scores.csv")
    plain = {r["path"]: float(r["probability"]) for r in rows if not r["distortion"]}
    changed = {r["path"]: float(r["probability"]) for r in rows if r["distortion"]}
    assert [plain[str(path)] for path in reals] == pytest.approx(expected, abs=1e-6)
    assert len(changed) == 24 and len(set(changed.values()) - set(plain.values())) > 20
    page = (tmp_path / "e" / "report.html").read_text()
    assert "crops averaged per image: tiles, 2 views averaged per image." in page
    client = TestClient(create_app(detector), base_url="http://localhost")
    answers = [client.post("/api/score", content=path.read_bytes()).json() for path in reals[:3]]
    assert [answer["probability"] for answer in answers] == pytest.approx(expected[:3], abs=1e-6)
    assert client.get("/api/model").json()["crops"] == "tiles"
    found = heatmap(detector, read_image(reals[0]))
    picture_of = client.post("/api/heatmap", content=reals[0].read_bytes())
    assert picture_of.status_code == 200 and len(found.contributions) == 7


def test_a_calibration_holds_for_the_crops_it_was_made_with(run, labelled, tmp_path):
    model = shutil.copytree(run, tmp_path / "model")
    reals = [[str(labelled / "0_real")]]
    calibrate_command(str(model), reals, fpr=0.4, crops="tiles", batch=2, precision="fp32", device="cpu")
    assert load_calibration(model).crops == "tiles"
    assert Detector.load(model, device="cpu").crops == "tiles"
    for other in (1, 5):
        with pytest.raises(
            UserError, match=rf"calibrated for crops=tiles.* not hold for crops={other}: leave"
        ):
            Detector.load(model, device="cpu", crops=other)
    # One that says nothing is of the time of one crop.
    file = model / "best" / "calibration.json"
    before = json.loads(file.read_text())
    del before["crops"]
    file.write_text(json.dumps(before))
    assert load_calibration(model).crops == 1
    with pytest.raises(UserError, match=r"calibrated for crops=1.* --crops tiles"):
        Detector.load(model, device="cpu", crops="tiles")
    for wrong in (7, True, "5", 2.0):
        file.write_text(json.dumps(before | {"crops": wrong}))
        with pytest.raises(UserError, match="crops"):
            load_calibration(model)
        with pytest.raises(UserError, match=r"crops is .*; it must be one of 1, 5, tiles"):
            Detector.load(run, device="cpu", crops=wrong)


def test_a_models_own_crops_are_used_where_nothing_else_is_said(run, labelled, tmp_path):
    model, config = load_model(run)
    config = dataclasses.replace(config, preprocess=dataclasses.replace(CROP, crops=5))
    save_model(tmp_path / "m", model, config)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["preprocess"]["crops"] == 5
    images = sorted((labelled / "1_fake").iterdir())
    own, given = Detector.load(tmp_path / "m", device="cpu"), Detector.load(run, device="cpu", crops=5)
    np.testing.assert_array_equal(own.predict(images), given.predict(images))
    one = Detector.load(tmp_path / "m", device="cpu", crops=1)
    assert (one.predict(images) != own.predict(images)).all()


def test_what_was_begun_goes_on_with_the_same_crops_only(run, labelled, tmp_path):
    words, table = ([str(labelled)], run, str(tmp_path / "s.csv")), tmp_path / "s.csv"
    how = {"crops": "tiles", "batch": 4, "precision": "bf16", "workers": 0}
    predict_command(*words, **how)
    whole = table.read_bytes()
    table.unlink()
    interrupted(predict_command, *words, rows=5, **how)
    with pytest.raises(UserError, match=r"begun with other settings \(crops\)"):
        predict_command(*words, resume=True, **how | {"crops": 5})
    predict_command(*words, resume=True, **how)
    assert table.read_bytes() == whole
    measured = [str(labelled)], run, str(tmp_path / "e")
    interrupted(evaluate_command, *measured, rows=2, **how)
    with pytest.raises(UserError, match=r"begun with other settings \(crops\)"):
        evaluate_command(*measured, **how | {"crops": 1})


def test_mosaics_have_no_crops(run, tmp_path):
    with pytest.raises(ValueError, match=r"preprocess\.crops=5 goes with preprocess\.mode=crop only"):
        PreprocessConfig(crops=5)
    model, config = load_model(run)
    patches = PreprocessConfig(image_size=32, patch_size=8, num_patches=16)
    with pytest.raises(UserError, match=r"preprocess\.crops=tiles goes with"):
        Detector(model, Config(model=config.model, preprocess=patches), crops="tiles")


@pytest.mark.parametrize("small", ["upscale", "pad", "tile"])
def test_a_dot_and_a_long_panorama_are_scored_in_company_too(run, small):
    model, config = load_model(run)
    preprocess = dataclasses.replace(CROP, small=small)
    detector = Detector(model, dataclasses.replace(config, preprocess=preprocess), crops="tiles", batch=8)
    images = [picture(1, 1), picture(40, 20_000), picture(50, 45), picture(20, 3_000), picture(3, 90)]
    alone = [logits_of(detector, [image])[0] for image in images]
    assert logits_of(detector, images) == alone and len(set(alone)) == 5
    tiles = [len(detector.preprocess.crops(image)) for image in images]
    assert tiles[:3] == [1, 64, 4] and tiles[4] == (30 if small == "upscale" else 3)
    if small != "upscale":
        # Enlarging gives other tiles where a side is shorter than the crop.
        enlarging = logits_of(Detector(model, config, crops="tiles", batch=8), images)
        assert [a == b for a, b in zip(alone, enlarging)][1:] == [True, True, False, False]


def test_few_large_images_are_held_at_a_time(run):
    """With batches of 64, which one image fills."""
    taken, image = 0, picture(300, 300)

    def images():
        nonlocal taken
        for _ in range(12):
            taken += 1
            yield image

    detector = Detector.load(run, device="cpu", crops="tiles", batch=64)
    found = detector.stream(images(), workers=0)
    next(found)
    assert taken <= 3
    assert len({score for score, _ in found}) == 1 and taken == 12


def test_heatmaps_of_crops_are_their_logits_and_cost_no_pass(run, labelled, tmp_path, monkeypatch):
    passed, logits = [], Detector.logits

    def counting(self, pixels):
        passed.append(len(pixels))
        return logits(self, pixels)

    monkeypatch.setattr(Detector, "logits", counting)
    photographs = sorted((labelled / "0_real").iterdir())[:3]
    words = [str(path) for path in photographs], run, str(tmp_path / "s.csv")
    how = {"crops": "tiles", "batch": 4, "precision": "bf16", "workers": 0}
    predict_command(*words, **how)
    without = sum(passed)
    predict_command(*words, heatmaps=str(tmp_path / "maps"), **how)
    assert sum(passed) == 2 * without > 0
    detector = Detector.load(run, device="cpu", crops=1, batch=4, precision="bf16")
    for row in read_csv(tmp_path / "s.csv"):
        (file,) = (tmp_path / "maps").glob(f"*{Path(row['path']).stem}.png-*.json")
        content, image = json.loads(file.read_text()), read_image(row["path"])
        assert content["method"] == "logit of the crop by itself" and file.with_suffix(".png").is_file()
        boxes = [[round(x) for x in part["box"]] for part in content["patches"]]
        cut = [image[top:bottom, left:right] for left, top, right, bottom in boxes]
        assert {part.shape for part in cut} == {(32, 32, 3)} and len(cut) == len({*map(tuple, boxes)})
        assert [part["contribution"] for part in content["patches"]] == logits_of(detector, cut)
        assert content["probability"] == float(row["probability"])
        assert content["logit"] == pytest.approx(np.mean(logits_of(detector, cut)), abs=1e-6)
