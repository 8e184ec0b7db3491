"""Distortions against independent computations, and what is drawn of them for training images."""

import colorsys
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dgsnet.data import distortions
from dgsnet.data.distortions import OPERATIONS, PRESETS, Degradations
from dgsnet.data.images import ImageError, read_image
from dgsnet.evaluation import robustness
from dgsnet.evaluation.robustness import parse
from PIL import Image

RNG = np.random.default_rng(0)
# Smooth with an edge and some noise, neither side even.
PICTURE = np.clip(
    np.linspace(0, 200, 45)[None, :, None] + np.array([0, 20, 40]) + RNG.normal(0, 12, (37, 45, 3)), 0, 255
).astype(np.uint8)
PICTURE[10:20, 10:25] = (250, 10, 30)


def distort(word, image=PICTURE):
    (distortion,) = parse([word])
    return distortion(image)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
@pytest.mark.parametrize("quality", [20, 90])
def test_compression_is_what_a_file_of_that_quality_holds(kind, quality, tmp_path):
    path = tmp_path / f"a.{kind}"
    options = {"subsampling": 2} if kind == "jpeg" else {}
    Image.fromarray(PICTURE).save(path, quality=quality, **options)
    np.testing.assert_array_equal(distort(f"{kind}:{quality}"), read_image(path))


def test_lower_quality_is_further_from_the_original():
    errors = [
        np.abs(distort(f"{kind}:{q}").astype(int) - PICTURE).mean()
        for kind in ("jpeg", "webp")
        for q in (95, 60, 20)
    ]
    assert errors[:3] == sorted(errors[:3]) and errors[3:] == sorted(errors[3:]) and min(errors) > 0


@pytest.mark.parametrize("sigma", [0.7, 2])
def test_blur_is_the_gaussian_convolution(sigma):
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(PICTURE.astype(float), ((radius,) * 2, (radius,) * 2, (0, 0)), mode="symmetric")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    # The result is rounded to whole levels.
    assert np.abs(distort(f"blur:{sigma}") - padded).max() < 0.51


def test_resize_keeps_the_new_size_and_what_is_flat():
    assert distort("resize:0.5").shape == (18, 22, 3)
    assert distort("resize:2").shape == (74, 90, 3)
    flat = np.full((30, 40, 3), 77, np.uint8)
    assert (distort("resize:0.3", flat) == 77).all()
    assert distort("resize:0.01").shape == (1, 1, 3)
    # Antialiased: a pattern finer than the new grid becomes its mean.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(distort("resize:0.25", stripes)[4:-4, 4:-4].astype(int) - 100).max() <= 4


def test_crop_is_the_centre():
    np.testing.assert_array_equal(distort("crop:0.6"), PICTURE[7:29, 9:36])
    np.testing.assert_array_equal(distort("crop:1"), PICTURE)
    assert distort("crop:0.01").shape == (1, 1, 3)


def test_a_chain_is_applied_from_left_to_right():
    step = distort("jpeg:70", distort("resize:0.5", distort("jpeg:90")))
    np.testing.assert_array_equal(distort("jpeg:90+resize:0.5+jpeg:70"), step)
    assert (distort("resize:0.5+blur:1") != distort("blur:1+resize:0.5")).any()


@pytest.mark.parametrize("word", robustness.DEFAULT)
def test_the_same_image_is_always_distorted_alike_and_left_as_it_was(word):
    for distortion in parse([word]):
        before = PICTURE.copy()
        first = distortion(PICTURE)
        assert first.dtype == np.uint8 and first.flags.c_contiguous
        np.testing.assert_array_equal(first, distortion(PICTURE))
        np.testing.assert_array_equal(PICTURE, before)
        assert distortion(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)


def test_what_cannot_be_made_is_an_image_error(monkeypatch):
    with pytest.raises(ImageError, match="cannot be written as WEBP"):
        distort("webp:80", np.zeros((1, 16384, 3), np.uint8))
    monkeypatch.setattr(distortions, "MAX_PIXELS", 3000)
    with pytest.raises(ImageError, match="resize:2 makes it 90 x 74, more than 3,000"):
        distort("resize:2")


def test_jpeg_halves_chroma():
    """What a phone or a site writes, and what a high quality alone would not say."""
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, ::2, 0] = 255
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "JPEG", quality=95, subsampling=0)
    sharp = np.asarray(Image.open(buffer)).astype(int)
    halved = distort("jpeg:95", colours).astype(int)
    assert np.ptp(halved[8, :, 0]) < np.ptp(sharp[8, :, 0]) / 2


def test_jpeg444_keeps_chroma():
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "JPEG", quality=60, subsampling=0)
    np.testing.assert_array_equal(distort("jpeg444:60"), np.asarray(Image.open(buffer)))


@pytest.mark.parametrize(("name", "kernel"), [("bilinear", 2), ("lanczos", 1), ("nearest", 0), ("resize", 3)])
def test_every_kernel_is_its_own(name, kernel):
    np.testing.assert_array_equal(
        distort(f"{name}:0.6"), np.asarray(Image.fromarray(PICTURE).resize((27, 22), kernel))
    )


def test_the_shorter_and_the_longer_side_shrink_and_never_grow():
    assert distort("shorter:20").shape == (20, 24, 3) and distort("longer:20").shape == (16, 20, 3)
    for word in ("shorter:37", "shorter:900", "longer:45", "longer:46"):
        np.testing.assert_array_equal(distort(word), PICTURE)


def test_noise_has_its_deviation_and_is_the_images_own():
    flat = np.full((200, 200, 3), 128, np.uint8)
    added = distort("noise:8", flat).astype(float) - 128
    assert abs(added.std() - 8) < 0.1 and abs(added.mean()) < 0.1
    assert abs(np.corrcoef(added[..., 0].ravel(), added[..., 1].ravel())[0, 1]) < 0.02
    other = distort("noise:8", flat + 1).astype(float) - 129
    assert abs(np.corrcoef(added.ravel(), other.ravel())[0, 1]) < 0.02
    # Levels are clipped, not wrapped around.
    assert set(np.unique(distort("noise:255"))) >= {0, 255}


def test_sharpening_adds_what_blurring_takes_away():
    blurred = distort("blur:3").astype(float)
    expected = np.clip(PICTURE + 1.5 * (PICTURE - blurred), 0, 255)
    # The blurred image is rounded here.
    assert np.abs(distort("sharpen:1.5") - expected).max() < 1.6
    np.testing.assert_array_equal(distort("sharpen:0"), PICTURE)


def test_cutout_is_grey_where_the_crop_would_be():
    rest = distort("cutout:0.4")
    changed = (rest != PICTURE).any(-1)
    assert changed[11:26, 13:31].all() and changed.sum() == 15 * 18 and (rest[changed] == 128).all()


def test_colours():
    np.testing.assert_array_equal(distort("brightness:0.5"), PICTURE // 2)
    assert (distort("brightness:2")[PICTURE > 127] == 255).all()
    assert (np.ptp(distort("saturation:0"), axis=-1) == 0).all() and np.ptp(distort("contrast:0")) == 0
    for name in ("brightness", "saturation", "contrast"):
        np.testing.assert_array_equal(distort(f"{name}:1"), PICTURE)
    assert distort("contrast:1.5").std() > 1.2 * PICTURE.std()
    orange = np.full((4, 4, 3), (250, 120, 20), np.uint8)
    for turn in (-0.3, 0.25, 0.5):
        hue, saturation, value = colorsys.rgb_to_hsv(*orange[0, 0] / 255)
        turned = 255 * np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
        # Pillow stores hues as whole numbers.
        assert np.abs(distort(f"hue:{turn}", orange)[0, 0] - turned).max() < 8


# What users are told of each operation.
TABLE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text().splitlines()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_changes_pictures_and_takes_both_ends_of_its_range(name):
    """The highest that a small picture allows; without chance it is the same each time."""
    low, high = OPERATIONS[name].lowest, OPERATIONS[name].highest
    assert f"| {low:g} to {high:g} |" in next(row for row in TABLE if f"`{name}:" in row)
    for value in (low, high):
        first = distort(f"{name}:{value}")
        assert first.dtype == np.uint8 and first.ndim == 3
        np.testing.assert_array_equal(first, distort(f"{name}:{value}"))
    assert any(not np.array_equal(distort(f"{name}:{value}"), PICTURE) for value in (low, high))


def rngs(count=2000):
    return map(np.random.default_rng, range(count))


def test_steps_and_values_are_drawn_with_their_probabilities():
    degradations = Degradations.parse(["blur:0.5..2@0.3", "jpeg:40..42@0.5 | webp:7@0.2", "crop:0.9"])
    drawn = [degradations.draw(rng).steps for rng in rngs()]
    shares = {name: count / 2000 for name, count in Counter(name for s in drawn for name, _ in s).items()}
    assert shares.pop("crop") == 1
    assert shares == pytest.approx({"blur": 0.3, "jpeg": 0.5, "webp": 0.2}, abs=0.03)
    assert not any({"jpeg", "webp"} <= {name for name, _ in steps} for steps in drawn)
    values = {
        name: [value for s in drawn for n, value in s if n == name] for name in ("blur", "jpeg", "webp")
    }
    assert set(values["jpeg"]) == {40, 41, 42} and set(values["webp"]) == {7}
    assert 0.5 <= min(values["blur"]) < 0.52 and 1.98 < max(values["blur"]) <= 2
    assert np.mean(values["blur"]) == pytest.approx(1.25, abs=0.06)
    # Each by itself: what comes first says nothing of what comes next.
    both = np.mean(["blur" in dict(s) and "jpeg" in dict(s) for s in drawn])
    assert both == pytest.approx(0.15, abs=0.03)


def test_a_choice_is_a_chain_and_its_order_is_kept():
    degradations = Degradations.parse(["jpeg:90+resize:0.5+jpeg:70@1 | blur:1@0"])
    assert degradations.draw(np.random.default_rng(0)).name == "jpeg:90+resize:0.5+jpeg:70"
    np.testing.assert_array_equal(
        degradations(PICTURE, np.random.default_rng(3)), distort("jpeg:90+resize:0.5+jpeg:70")
    )


def test_places_and_noise_are_drawn_too_and_alike_for_images_of_one_size():
    crops = Degradations.parse(["crop:0.5"])
    counted = np.arange(37 * 45, dtype=np.uint32).reshape(37, 45)
    places = np.stack([counted >> 8, counted & 255, counted * 0], -1).astype(np.uint8)
    corners = {tuple(crops(places, rng)[0, 0]) for rng in rngs(200)}
    assert len(corners) > 100
    for words in (["crop:0.5"], ["noise:20"], ["cutout:0.5"]):
        degradations, flat = Degradations.parse(words), np.full((64, 96, 3), 100, np.uint8)
        first, second, other = (
            degradations(flat + added, np.random.default_rng(seed)).astype(int) - added
            for added, seed in ((0, 5), (7, 5), (0, 6))
        )
        if words != ["cutout:0.5"]:
            np.testing.assert_array_equal(first, second)
        else:
            # The part that is cut out is grey in both.
            np.testing.assert_array_equal(first == 128, second == 121)
        assert words == ["crop:0.5"] or not np.array_equal(first, other)


def test_what_cannot_be_made_is_left_out_of_training(monkeypatch):
    monkeypatch.setattr(distortions, "MAX_PIXELS", 3000)
    degradations = Degradations.parse(["resize:2+jpeg:30"])
    np.testing.assert_array_equal(degradations(PICTURE, np.random.default_rng(0)), distort("jpeg:30"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    degradations = Degradations.parse(PRESETS[name])
    results = [degradations(PICTURE, rng) for rng in rngs(25)]
    assert all(image.dtype == np.uint8 and image.shape[2:] == (3,) for image in results)
    same = sum(np.array_equal(image, PICTURE) for image in results)
    assert (same == 25) == (name == "none") and all(image.flags.c_contiguous for image in results)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("gif:3", "'gif:3' is no operation"),
        ("jpeg", "'jpeg' is no operation"),
        ("jpeg:30..", "'30..' in 'jpeg:30..' must be a whole number"),
        ("jpeg:..30", "must be a whole number from 1 to 100"),
        ("jpeg:80..30", "the lowest comes first"),
        ("jpeg:30..80.5", "whole number"),
        ("jpeg:30@2", "'2' in 'jpeg:30@2' must be a probability"),
        ("jpeg:30@x", "must be a probability"),
        ("jpeg:30@nan", "must be a probability"),
        ("jpeg:30@", "must be a probability"),
        ("jpeg:30@0.7 | webp:80@0.4", "more than 1 in all"),
        ("jpeg:30+", "'' is no operation"),
        ("", "'' is no operation"),
    ],
)
def test_wrong_words_of_training_are_refused(word, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        Degradations.parse(["blur:1", word])
    assert "\n" not in str(error.value)
