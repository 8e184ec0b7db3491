"""Scores are a function of the image, and damaged images cost one row."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from dgsnet.data.images import read_image
from dgsnet.detection.decisions import calibrate
from dgsnet.detection.detector import Detector, prepare_views
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import load_model
from PIL import Image

from tests.support.tiny import CROP, PATCHES, save_noise, save_tiny


@pytest.fixture(scope="module", params=[CROP, PATCHES], ids=["crop", "patches"])
def run(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_noise(tmp_path_factory.mktemp("images"), 40)


def test_scores_differ_between_images_and_agree_with_the_plain_model(run, images):
    paths = sorted(images.glob("*.png"))[:8]
    detector = Detector.load(run, device="cpu")
    probabilities = detector.predict(paths)
    assert probabilities.dtype == np.float32 and probabilities.shape == (8,)
    assert len(set(probabilities)) == 8 and detector.errors == {}

    model, _ = load_model(run)
    pixels = torch.stack([detector.preprocess(read_image(path)) for path in paths])
    with torch.no_grad():
        expected = torch.sigmoid(model.double().logits(pixels.double()))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"batch": 16, "precision": "bf16"}], ids=["alone", "in batches"])
def test_a_score_does_not_depend_on_company_order_or_workers(run, images, settings):
    paths = sorted(images.glob("*.png"))
    detector = Detector.load(run, device="cpu", **settings)
    together = detector.predict(paths, workers=2)
    np.testing.assert_array_equal(together, [detector.predict(path)[0] for path in paths])
    np.testing.assert_array_equal(together, detector.predict(paths[::-1], workers=0)[::-1])
    again = Detector.load(run, device="cpu", **settings)
    np.testing.assert_array_equal(together, again.predict(paths, workers=1))
    with_copies = again.predict(paths[5:12], consistency=True)
    np.testing.assert_array_equal(together[5:12], with_copies[:, 0])


def test_logits_of_a_batch_are_those_of_its_images(run):
    detector = Detector.load(run, device="cpu")
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = detector.logits(pixels)
    assert logits.shape == (5,) and logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.equal(logits, torch.cat([detector.logits(row[None]) for row in pixels]))
    assert detector.logits(pixels[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\], got \[5, 3, 16, 16\]"):
        detector.logits(pixels[:, :, :16, :16])


def test_path_pil_and_array_score_alike(run, images):
    path = sorted(images.glob("*.png"))[0]
    picture = Image.open(path)
    detector = Detector.load(run, device="cpu")
    scores = detector.predict([str(path), path, picture, np.asarray(picture)])
    assert len(set(scores)) == 1
    assert detector.predict(picture) == detector.predict(np.asarray(picture)) == scores[:1]


def test_unreadable_images_are_nan_and_told(run, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    detector = Detector.load(run, device="cpu")
    good = sorted(images.glob("*.png"))[0]
    probabilities = detector.predict([good, broken, tmp_path / "missing.png"])
    assert np.isnan(probabilities).tolist() == [False, True, True]
    assert "broken.jpg" in detector.errors[1] and "missing.png" in detector.errors[2]
    detector.predict(good)
    assert detector.errors == {}
    assert detector.predict([]).shape == (0,)


def test_views_are_a_function_of_the_image(run, images):
    paths = sorted(images.glob("*.png"))[:6]
    detector = Detector.load(run, device="cpu", views=4)
    logits = [logit for logit, _ in detector.stream_logits(paths)]
    again = Detector.load(run, device="cpu", views=4)
    assert [logit for logit, _ in again.stream_logits(paths[::-1], workers=1)] == logits[::-1]

    for path, logit in zip(paths, logits):
        views = prepare_views(detector.preprocess, read_image(path), 4)
        assert views.shape == (4, 3, 32, 32)
        # The plain view comes first.
        assert torch.equal(views[0], detector.preprocess(read_image(path)))
        assert len({view.numpy().tobytes() for view in views}) == 4
        torch.testing.assert_close(logit, detector.logits(views).mean().item())
        # More views begin with the fewer ones.
        assert torch.equal(prepare_views(detector.preprocess, read_image(path), 6)[:4], views)
    np.testing.assert_allclose(detector.predict(paths), 1 / (1 + np.exp(-np.array(logits))), rtol=1e-5)


def test_averaging_views_reduces_the_variance(run, images):
    # Independent views: the mean of four varies a quarter as much as one.
    detector = Detector.load(run, device="cpu")
    spread = []
    for path in sorted(images.glob("*.png"))[:16]:
        logits = detector.logits(prepare_views(detector.preprocess, read_image(path), 33)[1:])
        spread.append([logits.var(), logits.view(8, 4).mean(1).var()])
    one, four = np.mean(spread, axis=0)
    assert 2.5 < one / four < 6


def test_a_calibration_decides(run, images):
    paths = sorted(images.glob("*.png"))
    plain = Detector.load(run, device="cpu")
    logits = torch.tensor([logit for logit, _ in plain.stream_logits(paths, workers=0)])
    assert set(plain.decide(plain.predict(paths, workers=0))) == {"real", "generated"}
    calibration = replace(calibrate(logits, fpr=0.2), temperature=2.0, low=0.4, threshold=0.6)
    detector = Detector(plain.model, plain.config, calibration)
    scores = detector.predict(paths, workers=0)
    np.testing.assert_allclose(scores, torch.sigmoid(logits / 2), rtol=1e-5)
    assert detector.decide(scores) == [
        "generated" if p > 0.6 else "real" if p <= 0.4 else "unsure" for p in scores
    ]
    assert set(detector.decide(scores)) == {"real", "unsure", "generated"}
    assert detector.decide([np.nan]) == [""]
    with pytest.raises(UserError, match=r"calibrated for views=1.*views=2"):
        Detector(plain.model, plain.config, calibration, views=2)


def test_impossible_settings_are_one_line(run, images):
    with pytest.raises(UserError, match="device nonsense cannot be used"):
        Detector.load(run, device="nonsense")
    with pytest.raises(UserError, match="views is 0"):
        Detector.load(run, device="cpu", views=0)
    with pytest.raises(UserError, match="workers is -1"):
        Detector.load(run, device="cpu").predict(sorted(images.glob("*.png")), workers=-1)


def test_importing_the_detector_is_quick():
    code = "import sys; from dgsnet import Detector; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_else_an_image_may_be(run, images):
    detector = Detector.load(run, device="cpu")
    path = sorted(images.glob("*.png"))[0]
    single = np.asarray(Image.open(path))
    expected = detector.predict(path)[0]
    batch = np.stack([single, np.zeros_like(single), single])
    scores = detector.predict(batch)
    assert scores.shape == (3,) and scores[0] == scores[2] == expected != scores[1]
    opaque = np.concatenate([batch, np.full_like(batch[..., :1], 255)], axis=-1)
    np.testing.assert_array_equal(detector.predict(opaque), scores)
    assert detector.predict(path.read_bytes()) == detector.predict([path.read_bytes()]) == expected


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
        (torch.zeros(2, 3, 32, 32), TypeError, "got Tensor; Detector.logits takes prepared tensors"),
        (io.BytesIO(b"x"), TypeError, "got BytesIO; give the file's path, or its content as bytes"),
        (np.zeros((4, 5, 3)), ValueError, r"must be uint8 .* got float64 \[4, 5, 3\]"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"got uint8 \[3, 4, 5\]"),
        (np.zeros((2, 3, 4, 5), np.uint8), ValueError, r"got uint8 \[(2, )?3, 4, 5\]"),
        (np.zeros(5, np.uint8), ValueError, r"got uint8 \[5\]"),
    ],
)
def test_what_is_no_image_is_refused_at_once(run, images, image, error, message):
    detector = Detector.load(run, device="cpu")
    # Nothing is scored before the refusal.
    detector.logits = None
    good = sorted(images.glob("*.png"))[0]
    for given in (image, [good, image]):
        with pytest.raises(error, match=message):
            detector.predict(given)
    with pytest.raises(error, match=message):
        list(detector.stream(iter([image]), workers=0))
