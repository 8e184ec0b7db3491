"""Where the crops of an image lie, and what becomes of images that are smaller than one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data.preprocess import MAX_TILES, Preprocessor, crop_corners
from torchvision.transforms.functional import center_crop

from tests.support.pictures import channels_first, picture

SIDE = 32
SMALL = ["upscale", "pad", "tile"]
# Height and width: smaller than a crop in one way or both, as large as one, and larger.
SIZES = [(1, 1), (7, 10), (20, 200), (90, 31), (32, 32), (32, 76), (100, 41)]


def prepare(small: str, crops=1, **options) -> Preprocessor:
    return Preprocessor(PreprocessConfig("crop", SIDE, crops=crops, small=small, **options))


def pixels_of(preprocess: Preprocessor, image: np.ndarray, **options) -> np.ndarray:
    return preprocess(image, normalised=False, **options).permute(1, 2, 0).numpy()


def coded(height: int, width: int) -> np.ndarray:
    """A picture whose pixels tell their column and row, from 1."""
    y, x = np.mgrid[1 : height + 1, 1 : width + 1]
    return np.stack([x, y, x // 256 * 16 + y // 256], axis=-1).astype(np.uint8)


def along(height: int, width: int, size: int) -> list[list[int]]:
    """Tops and lefts of the tiles, each in order; the tiles are all pairs of them."""
    corners = crop_corners(height, width, size, "tiles")
    places = [sorted({corner[axis] for corner in corners}) for axis in (0, 1)]
    assert sorted(corners) == [(top, left) for top in places[0] for left in places[1]]
    return places


@pytest.mark.parametrize("size", [32, 224])
def test_tiles_are_as_few_as_cover_the_image_and_lie_evenly(size):
    rng = np.random.default_rng(0)
    for height, width in [
        (size, size),
        (size + 1, 8 * size),
        *rng.integers(size, 8 * size + 1, (60, 2)).tolist(),
    ]:
        for side, places in zip((height, width), along(height, width, size)):
            assert len(places) == -(-side // size)
            assert places[0] == 0 and places[-1] == side - size
            gaps = np.diff(places)
            assert len(gaps) == 0 or (gaps.max() <= size and np.ptp(gaps) <= 1)


@pytest.mark.parametrize(
    "height, width, rows, columns",
    [
        (3000, 4000, 7, 9),
        (4000, 3000, 9, 7),
        # One side has one pixel more than 64 tiles cover.
        (1793, 1792, 8, 8),
        (224, 20_000, 1, 64),
        (20_000, 230, 64, 1),
        (300, 60_000, 1, 64),
        (2**14, 2**13, 11, 5),
        (2**13, 2**14, 5, 11),
    ],
)
def test_beyond_the_bound_tiles_lie_apart_evenly(height, width, rows, columns):
    tops, lefts = along(height, width, 224)
    assert (len(tops), len(lefts)) == (rows, columns) and rows * columns <= MAX_TILES == 64
    for side, places in ((height, tops), (width, lefts)):
        assert np.ptp(np.diff([*places])) <= 1 if len(places) > 1 else places == [(side - 224) // 2]
        assert len(places) == 1 or (places[0], places[-1]) == (0, side - 224)


@pytest.mark.parametrize("size", SIZES)
def test_small_images_are_padded_or_repeated_as_others_do(size):
    image = picture(*size)
    padded = center_crop(channels_first(image), [SIDE, SIDE])[0].permute(1, 2, 0)
    np.testing.assert_array_equal(pixels_of(prepare("pad"), image), padded)
    missing = [(0, max(SIDE - side, 0)) for side in size]
    repeated = np.pad(image, [*missing, (0, 0)], mode="wrap")
    top, left = ((side - SIDE) // 2 for side in repeated.shape[:2])
    expected = repeated[top : top + SIDE, left : left + SIDE]
    np.testing.assert_array_equal(pixels_of(prepare("tile"), image), expected)


@pytest.mark.parametrize("crops", [5, "tiles"])
@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("size", SIZES)
def test_crops_show_what_their_boxes_say(size, small, crops):
    image = coded(*size)
    preprocess = prepare(small, crops, flip=False)
    found, boxes = preprocess.crops(image, normalised=False), preprocess.crop_boxes(image)
    assert found.dtype == torch.uint8 and found.shape == (len(boxes), 3, SIDE, SIDE)
    assert torch.equal(preprocess.crops(image), preprocess.normalise(found))
    assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor(size).flip(0)).all()
    for crop, box in zip(found.numpy(), boxes.tolist()):
        left, top, right, bottom = map(round, box)
        shown = np.unique(crop.reshape(3, -1).T[crop[0].ravel() > 0], axis=0)
        whole = np.unique(image[top:bottom, left:right].reshape(-1, 3), axis=0)
        # Where the image is enlarged, new pixels lie between the old ones.
        if small != "upscale" or min(size) >= SIDE:
            np.testing.assert_array_equal(shown, whole)
    # Tiles leave no pixel out.
    if crops == "tiles" and small != "upscale":
        seen = {tuple(pixel) for crop in found.numpy() for pixel in crop.reshape(3, -1).T}
        assert seen >= {tuple(pixel) for pixel in image.reshape(-1, 3)}


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [None, 3])
def test_cells_of_a_crop_show_what_their_boxes_say(size, small, seed):
    """Also mirrored. Of padding there are none; of a border of two copies it is all of the side."""
    image, preprocess = coded(*size), prepare(small)
    rng = [np.random.default_rng(seed) if seed else None for _ in range(3)]
    crop, (cells, boxes) = pixels_of(preprocess, image, rng=rng[0]), preprocess.boxes(image, rng=rng[1])
    (whole,) = preprocess.crop_boxes(image, rng=rng[2]) if seed else prepare(small).crop_boxes(image)
    assert boxes[:, :2].amin(0).tolist() == whole[:2].tolist()
    assert boxes[:, 2:].amax(0).tolist() == whole[2:].tolist()
    for (left, top, right, bottom), box in zip(cells.tolist(), boxes.tolist()):
        shown = crop[top:bottom, left:right].reshape(-1, 3)
        shown = shown[shown[:, 0] > 0]
        x, y, x_end, y_end = map(round, box)
        inside = image[y : max(y_end, y + 1), x : max(x_end, x + 1)].reshape(-1, 3)
        if small == "upscale" and min(size) < SIDE:
            # test_heatmaps.py covers enlarged images.
            continue
        assert {*map(tuple, shown)} <= {*map(tuple, inside)} and len(shown)
    if small == "pad":
        height, width = (min(side, SIDE) for side in size)
        assert int((boxes[:, 2:] - boxes[:, :2]).prod(1).sum()) == height * width


@pytest.mark.parametrize("small", ["pad", "tile"])
def test_training_moves_along_the_longer_side_only(small):
    image = coded(20, 60)
    preprocess, rng = prepare(small, flip=False), np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        crop = pixels_of(preprocess, image, rng=rng)
        columns = np.unique(crop[..., 0][crop[..., 0] > 0])
        assert len(columns) == SIDE and np.unique(crop[..., 1][crop[..., 1] > 0]).tolist() == [*range(1, 21)]
        seen.add(int(columns.min()))
    assert seen == set(range(1, 30))


def test_long_lines_need_no_more_memory_than_their_crops():
    """Which enlarged would have more pixels than any image may have."""
    line = np.zeros((1, 2**19, 3), np.uint8)
    for small in ("pad", "tile"):
        assert len(prepare(small, "tiles").crops(line)) == 64
        assert Preprocessor(PreprocessConfig("crop", 518, small=small))(line).shape == (3, 518, 518)


@pytest.mark.parametrize("name, value", [("small", "stretch"), ("crops", 4)])
def test_other_words_are_one_line_on_the_command_line(name, value, capsys):
    from dgsnet.cli import main

    words = ["train", "--data.train", "x", "--model.name", "dgsnet-tiny", "--out", "new"]
    with pytest.raises(SystemExit):
        main([*words, f"--preprocess.{name}={value}"])
    said = capsys.readouterr().err.strip()
    assert f"preprocess.{name}" in said and "\n" not in said
