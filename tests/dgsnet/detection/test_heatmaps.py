"""A heatmap points at the part of the original image that makes the score, wherever the mosaic put it."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config, PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.detection.detector import Detector, view_generator
from dgsnet.detection.heatmaps import Heatmap, draw, heatmap, save
from PIL import Image

from tests.support.tiny import PATCHES, save_tiny

CROP = PreprocessConfig(mode="crop", image_size=36, num_patches=25)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"))


class Roughness(torch.nn.Module):
    """Stands where a network would: its logit is the variation of the reddest cell, wherever that is."""

    def __init__(self, size: int):
        super().__init__()
        self.image_size = size
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def logits(self, pixels):
        reddish = pixels[:, 0] > pixels[:, 1] + 0.5
        return (pixels[:, 0] * reddish).diff(dim=-1).abs().sum(dim=(1, 2)) / 100 + self.nothing


def planted(height, width, box, seed=0):
    """Grey noise with a rough red patch in `box` (left, top, right, bottom)."""
    rng = np.random.default_rng(seed)
    image = np.repeat(rng.integers(100, 130, (height, width, 1), dtype=np.uint8), 3, axis=2)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 0
    image[top:bottom, left:right, 0] = rng.choice([160, 255], (bottom - top, right - left))
    return image


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    "size, box",
    [
        # The image has 30 patches, of which 16 are chosen.
        ((40, 48), (16, 24, 24, 32)),
        # The sides are no multiples of the patch.
        ((45, 63), (48, 8, 56, 16)),
        # The image is enlarged to twice its sides.
        ((16, 16), (4, 8, 8, 12)),
    ],
)
def test_the_map_points_at_the_planted_patch(size, box, views):
    detector = Detector(Roughness(32), Config(preprocess=PATCHES), views=views)
    image = planted(*size, box)
    result = heatmap(detector, image)
    assert result.boxes.shape == (16, 4) and len(np.unique(result.boxes, axis=0)) == 16
    strongest = result.contributions.argmax()
    np.testing.assert_allclose(result.boxes[strongest], box)
    others = np.delete(result.contributions, strongest)
    # Enlarging smears the patch over its neighbours.
    assert result.contributions[strongest] > 4 * np.abs(others).max()
    # What is left of the logit without the patch is what the model says of it painted over.
    assert 0 < result.contributions[strongest] <= result.logit * (1 + 1e-6)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("size", [(36, 36), (60, 80), (20, 30)])
def test_crops_are_mapped_back_too(size, views):
    detector = Detector(Roughness(36), Config(preprocess=CROP), views=views)
    height, width = size
    box = (width // 2 - 4, height // 2 - 4, width // 2 + 4, height // 2 + 4)
    result = heatmap(detector, planted(height, width, box))
    seen = result.pixels(height, width)
    inside = np.zeros(size, bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert np.nanmean(seen[inside]) > 5 * np.nanmean(np.abs(seen[~inside]))


def test_contributions_are_those_of_painting_over_the_original(tiny_run):
    """With a real network: paint a chosen patch of the image itself, keeping which patches are chosen."""
    detector = Detector.load(tiny_run, device="cpu")
    rng = np.random.default_rng(0)
    # As many patches as the mosaic has, so that painting cannot change the choice.
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    result = heatmap(detector, image)
    assert result.logit == pytest.approx(next(detector.stream_logits([image]))[0], abs=1e-6)
    prepared, (cells, boxes) = detector.preprocess(image), detector.preprocess.boxes(image)
    # The cell shows its box of the image, to the normalisation.
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for (l, t, r, b), box in zip(cells.tolist(), boxes.long().tolist()):
        shown = (prepared[:, t:b, l:r] * std + mean) * 255
        original = torch.from_numpy(image[box[1] : box[3], box[0] : box[2]]).permute(2, 0, 1)
        torch.testing.assert_close(shown.round().to(torch.uint8), original)
    place = {tuple(box): i for i, box in enumerate(result.boxes.tolist())}
    for index in (0, 7, 15):
        l, t, r, b = cells[index].tolist()
        painted = prepared.clone()
        painted[:, t:b, l:r] = painted[:, t:b, l:r].mean(dim=(1, 2), keepdim=True)
        expected = detector.logits(prepared[None]) - detector.logits(painted[None])
        got = result.contributions[place[tuple(boxes[index].tolist())]]
        assert got == pytest.approx(expected.item(), abs=1e-5)
    assert np.abs(result.contributions).max() > 1e-4
    again = heatmap(detector, image)
    np.testing.assert_array_equal(again.contributions, result.contributions)


def test_of_several_views_it_is_their_mean(tiny_run):
    detector = Detector.load(tiny_run, device="cpu", views=3)
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected, logits = defaultdict(list), []
    for view in range(3):
        pixels = detector.preprocess(image, rng=view_generator(image, view))
        cells, boxes = detector.preprocess.boxes(image, rng=view_generator(image, view))
        logits.append(detector.logits(pixels[None]).item())
        for (l, t, r, b), box in zip(cells.tolist(), boxes.tolist()):
            painted = pixels.clone()
            painted[:, t:b, l:r] = painted[:, t:b, l:r].mean(dim=(1, 2), keepdim=True)
            expected[tuple(box)].append(logits[-1] - detector.logits(painted[None]).item())
    assert len({round(logit, 4) for logit in logits}) == 3
    result = heatmap(detector, image)
    assert result.logit == pytest.approx(np.mean(logits), abs=1e-6)
    assert result.logit == pytest.approx(next(detector.stream_logits([image]))[0], abs=1e-6)
    found = dict(zip(map(tuple, result.boxes.tolist()), result.contributions))
    assert found.keys() == expected.keys() and all(len(values) == 3 for values in expected.values())
    assert found == pytest.approx({box: np.mean(values) for box, values in expected.items()}, abs=1e-4)


def test_where_boxes_overlap_a_pixel_has_their_mean():
    boxes = np.array([[0, 0, 4, 2], [2, 0, 6, 2]], float)
    values = Heatmap(boxes, np.array([1.0, -3.0]), 0.0).pixels(3, 7)
    np.testing.assert_array_equal(values[0], [1, 1, -1, -1, -3, -3, np.nan])
    assert np.isnan(values[2]).all()


def test_what_was_not_looked_at_is_hatched_and_not_zero(tmp_path):
    detector = Detector(Roughness(32), Config(preprocess=PATCHES))
    image = planted(160, 240, (80, 80, 88, 88))
    result = heatmap(detector, image)
    values = result.pixels(160, 240)
    assert np.isnan(values).sum() == 160 * 240 - 16 * 64
    draw(result, image, "a $title").savefig(tmp_path / "map.png")
    assert min(Image.open(tmp_path / "map.png").size) > 300


def test_predict_saves_heatmaps_of_upright_images(tiny_run, tmp_path):
    image = planted(40, 56, (16, 24, 24, 32))
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    # The photograph lies on its side.
    exif[0x0112] = 6
    Image.fromarray(image).save(folder / "lying $1$.png", exif=exif)
    (folder / "broken.png").write_bytes(b"no image")
    options = {"model": tiny_run, "device": "cpu", "out": tmp_path / "s.jsonl", "heatmaps": tmp_path / "maps"}
    main(["predict", str(folder), *(f"--{name}={value}" for name, value in options.items())])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["probability"] is not None)
    assert len(rows) == 2
    (written,) = (tmp_path / "maps").glob("*.json")
    assert written.with_suffix(".png").is_file()
    content = json.loads(written.read_text())
    assert (content["width"], content["height"]) == (40, 56)
    assert content["path"] == row["path"] and content["decision"] == row["decision"]
    assert content["probability"] == pytest.approx(row["probability"], abs=1.1e-6)
    boxes = np.array([patch["box"] for patch in content["patches"]])
    assert (boxes >= 0).all() and (boxes[:, 2] <= 40).all() and (boxes[:, 3] <= 56).all()
    expected = heatmap(Detector.load(tiny_run, device="cpu"), read_image(row["path"]))
    np.testing.assert_allclose(
        [patch["contribution"] for patch in content["patches"]], expected.contributions, atol=1e-9
    )


def test_names_that_no_file_system_takes(tiny_run, tmp_path):
    detector = Detector.load(tiny_run, device="cpu")
    image = planted(40, 48, (16, 24, 24, 32))
    names = ["shard.tar/a/b:c?.jpg", "shard.tar/a/b:c*.jpg", "x" * 400 + ".jpg", "../../up.jpg", "\udcff.jpg"]
    written = {save(detector, name, image, tmp_path) for name in names}
    assert len(written) == len(names) and {path.parent for path in written} == {tmp_path}
