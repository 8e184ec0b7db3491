"""Distortions against independent computations, and the words that name them."""

import io

import numpy as np
import pytest
from dgsnet.data import distortions
from dgsnet.data.distortions import Distortion
from dgsnet.data.images import ImageError, read_image
from dgsnet.errors import UserError
from dgsnet.evaluation import robustness
from dgsnet.evaluation.robustness import Distorted, parse
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
    assert np.abs(distort(f"blur:{sigma}") - padded).max() < 0.51  # rounded to whole levels


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


def test_words():
    assert [d.name for d in parse(["jpeg:90,70", "blur:1.50"])] == ["jpeg:90", "jpeg:70", "blur:1.5"]
    assert [d.name for d in parse(["jpeg:90,50+crop:0.8,0.5"])] == [
        "jpeg:90+crop:0.8",
        "jpeg:90+crop:0.5",
        "jpeg:50+crop:0.8",
        "jpeg:50+crop:0.5",
    ]
    assert len(parse(["jpeg:90", "jpeg:90.0", "jpeg:90,90"])) == 1
    for distortion in parse(robustness.DEFAULT):
        assert parse([distortion.name]) == [distortion]


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("gif:3", "'gif:3' is no operation"),
        ("jpeg", "'jpeg' is no operation"),
        ("jpeg:", "is no operation"),
        ("jpeg:90+", "'' is no operation"),
        ("jpeg:0", "whole number from 1 to 100"),
        ("jpeg:90.5", "whole number"),
        ("blur:a", "'a' in 'blur:a'"),
        ("blur:nan", "from 0.1 to 50"),
        ("resize:0", "from 0.01 to 8"),
        ("crop:1.1", "from 0.01 to 1"),
    ],
)
def test_wrong_words_are_refused_in_one_line(word, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse(["jpeg:90", word])
    assert f"--robustness {word}: " in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_made_is_an_image_error(monkeypatch):
    with pytest.raises(ImageError, match="cannot be written as WEBP"):
        distort("webp:80", np.zeros((1, 16384, 3), np.uint8))
    monkeypatch.setattr(distortions, "MAX_PIXELS", 3000)
    with pytest.raises(ImageError, match="resize:2 makes it 90 x 74, more than 3,000"):
        distort("resize:2")


def test_preprocessing_sees_the_distorted_image_and_its_own_options():
    seen = []

    def preprocess(image, *, rng=None):
        seen.append((image, rng))
        return image.shape

    prepared = Distorted(Distortion((("crop", 0.5),)), preprocess)
    assert prepared(PICTURE, rng=3) == (18, 22, 3)
    np.testing.assert_array_equal(seen[0][0], distort("crop:0.5"))
    assert seen[0][1] == 3


def test_jpeg_halves_chroma():
    """What a phone or a site writes, and what a high quality alone would not say."""
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, ::2, 0] = 255
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "JPEG", quality=95, subsampling=0)
    sharp = np.asarray(Image.open(buffer)).astype(int)
    halved = distort("jpeg:95", colours).astype(int)
    assert np.ptp(halved[8, :, 0]) < np.ptp(sharp[8, :, 0]) / 2
