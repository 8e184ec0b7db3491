"""What tells the label is found, with an interval that holds; what does not is not found."""

import numpy as np
import pytest
from dgsnet.audit.shortcuts import (
    FEWEST,
    MEASURED,
    FileModel,
    Leak,
    features,
    find_shortcuts,
    folds,
    interval,
    predict,
    read_nuisances,
)
from dgsnet.data.items import Item
from dgsnet.data.nuisances import NUISANCES
from PIL import Image

AT = {name: i for i, name in enumerate(NUISANCES)}
WORDS = ["cat", "dog", "tree", "sky", "car", "house", "red", "blue", "old", "wide"]


def nuisances(n, rng):
    """Of n images of each class: formats, qualities, sizes and EXIF that say nothing; and the labels."""
    found = np.zeros((2 * n, len(NUISANCES)), np.float32)
    jpeg = rng.random(2 * n) < 0.6
    found[:, AT["format JPEG"]], found[:, AT["format PNG"]] = jpeg, ~jpeg
    found[:, AT["JPEG quality"]] = jpeg * rng.uniform(0.5, 1, 2 * n)
    found[:, AT["log2 width"]] = np.log2(rng.integers(200, 1000, 2 * n))
    found[:, AT["log2 bytes per pixel"]] = rng.normal(1, 1, 2 * n)
    found[:, AT["EXIF"]] = rng.random(2 * n) < 0.1
    return found, np.repeat([0, 1], n)


def plant(found, labels, kind, rng):
    generated = labels == 1
    flipped = rng.random(len(labels)) < np.where(generated, 0.2, 0.8)
    if kind == "format":
        found[:, AT["format JPEG"]], found[:, AT["format PNG"]] = flipped, ~flipped
        found[:, AT["JPEG quality"]] = flipped * 0.9
    elif kind == "quality":
        found[:, [AT["format JPEG"], AT["format PNG"]]] = 1, 0
        found[:, AT["JPEG quality"]] = rng.normal(np.where(flipped, 0.7, 0.8), 0.03)
    elif kind == "size":
        found[:, AT["log2 width"]] = np.where(flipped, np.log2(512), found[:, AT["log2 width"]] - 1)
    elif kind == "one size":
        # These are neither wider nor narrower than the photographs, which have many widths.
        found[generated, AT["log2 width"]] = np.log2(512)
    elif kind == "rare":
        found[:, AT["EXIF"]] = ~generated & (rng.random(len(labels)) < 0.3)


@pytest.mark.parametrize(
    ("kind", "strongest", "auc"),
    [
        ("format", "format JPEG", 0.8),
        ("quality", "JPEG quality", 0.8),
        ("size", "log2 width", 0.8),
        ("one size", "log2 width", 1.0),
        ("rare", "EXIF", 0.65),
    ],
)
def test_planted_shortcuts_are_found(kind, strongest, auc):
    rng = np.random.default_rng(1)
    found, labels = nuisances(120, rng)
    plant(found, labels, kind, rng)
    result = find_shortcuts(found, labels)
    assert result.verdict == "shortcut" and result.strongest[0] == strongest
    leak = result.nuisances[strongest]
    assert leak.auc == pytest.approx(auc, abs=0.07) and 0.5 < leak.low < leak.auc <= leak.high
    assert result.files.auc == pytest.approx(leak.auc, abs=0.06)
    assert not result.nuisances["log2 bytes per pixel"].found


def test_balanced_data_raise_no_alarm():
    """The intervals of an audit hold together in 99 of 100 data sets: of 50, two alarms would be a wonder."""
    alarms = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        found, labels = nuisances(30, rng)
        found[:, AT["JPEG quality"]] = found[:, AT["log2 bytes per pixel"]] = 0
        found[:, [i for i in AT.values() if i not in MEASURED]] = (
            rng.random((60, len(AT) - len(MEASURED))) < 0.5
        )
        captions = [" ".join(rng.choice(WORDS, 4)) for _ in labels]
        result = find_shortcuts(found, labels, captions=captions)
        alarms += result.verdict == "shortcut"
    assert alarms <= 1


def test_more_figures_widen_the_intervals():
    """One of thirty yes-or-no nuisances is far off by chance alone: it counts for less the more there are."""
    one, many = (interval(0.62, 100, 100, trained=False, figures=figures) for figures in (1, 30))
    assert one.found and not many.found
    assert interval(0.62, 1000, 1000, trained=False, figures=30).found


def test_interval_by_hand():
    """At 0.5 the variance is that of Mann and Whitney, (n + m + 1) / (12 n m); a learned order widens it."""
    from scipy.stats import norm

    z = norm.ppf(1 - 0.01 / 2 / 10)
    half = z * np.sqrt((40 + 60 + 1) / (12 * 40 * 60))
    for offset in (-1e-3, 1e-3):
        assert interval(0.5 + half + offset, 40, 60, trained=False, figures=10).found == (offset > 0)
        wide = 0.5 + 1.5 * half + offset
        assert interval(wide, 40, 60, trained=True, figures=10).found == (offset > 0)
    low, high = interval(1.0, 50, 50, trained=True)[1:]
    assert 0.6 < low < 0.95 and high == 1
    mirrored = interval(0.3, 40, 60, trained=False), interval(0.7, 60, 40, trained=False)
    assert mirrored[0].low == pytest.approx(1 - mirrored[1].high, abs=2e-3)


@pytest.mark.parametrize("columns", [1, 8])
def test_intervals_cover_what_they_should(columns):
    """Of cross-validated predictions of nothing, 1% at most lie above their interval's other end."""
    rng = np.random.default_rng(0)
    labels, far = np.repeat([0, 1], 40), 0
    for _ in range(60):
        prediction = predict(rng.standard_normal((80, columns)), labels, folds(labels))
        far += interval(prediction.auc, 40, 40, trained=columns > 1, confidence=0.8).found
    # A tenth is expected; 13 or more have a probability below 0.01.
    assert far <= 12


def test_captions():
    rng = np.random.default_rng(2)
    found, labels = nuisances(100, rng)
    captions = [" ".join(rng.choice(WORDS, 4)) for _ in labels]
    assert not find_shortcuts(found, labels, captions=captions).words
    planted = [text + " render" * (label and rng.random() < 0.6) for text, label in zip(captions, labels)]
    result = find_shortcuts(found, labels, captions=planted)
    assert result.verdict == "shortcut" and not result.files.found
    assert result.captions.auc == pytest.approx(0.8, abs=0.08) and result.words["generated"][0] == "render"
    # What is shared by a real and a generated image tells nothing, and does not pass for its contrary.
    pairs = [" ".join(rng.permutation(WORDS)[:5]) for _ in range(100)] * 2
    shared = find_shortcuts(found, labels, captions=pairs).captions
    assert shared.auc == pytest.approx(0.5, abs=0.05)
    # One caption for each class, and images without one.
    template = [None, *("a photo" if not label else "a picture of it" for label in labels[1:])]
    assert find_shortcuts(found, labels, captions=template).captions.auc == 1
    assert find_shortcuts(found, labels, captions=[""] * 200).captions == Leak(0.5, 0.5, 0.5)


def test_generators_by_themselves():
    """Two generators whose shortcuts point opposite ways: nothing is left of them together."""
    rng = np.random.default_rng(3)
    found, labels = nuisances(200, rng)
    generators = np.where(np.arange(400) % 2, "up", "down")
    generators[:3] = "few"
    jpeg = (labels == 1) == (generators == "up")
    found[:, AT["format JPEG"]], found[:, AT["format PNG"]] = jpeg, ~jpeg
    found[:, AT["JPEG quality"]] = 0
    result = find_shortcuts(found, labels, generators)
    assert not result.nuisances["format JPEG"].found and result.verdict == "shortcut"
    assert set(result.generators) == {"up", "down"}
    assert all(leaks["files"].auc == 1 and leaks["captions"] is None for leaks in result.generators.values())


def test_what_is_the_same_in_all_images_says_nothing():
    found, labels = nuisances(FEWEST, np.random.default_rng(0))
    found[:] = found[0]
    result = find_shortcuts(found, labels)
    assert result.verdict == "none found"
    assert {result.files, *result.nuisances.values()} == {Leak(0.5, 0.5, 0.5)}


def test_few_images_suffice_where_all_speak_alike():
    found, labels = nuisances(FEWEST, np.random.default_rng(0))
    found[:, AT["EXIF"]] = labels == 0
    assert find_shortcuts(found, labels).strongest == ["EXIF"]


def test_model_of_files():
    rng = np.random.default_rng(4)
    found, labels = nuisances(100, rng)
    plant(found, labels, "one size", rng)
    logits = FileModel.fit(found, labels).logits(found)
    assert np.mean((logits > 0) == labels) > 0.9
    from sklearn.linear_model import LogisticRegression

    # The other solver, taken to its end.
    columns = features(found)[0]
    expected = LogisticRegression(class_weight="balanced", max_iter=10000, tol=1e-9).fit(columns, labels)
    np.testing.assert_allclose(logits, expected.decision_function(columns), atol=1e-3)


def test_reading(tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"")
    samples = [Item(str(tmp_path / f"{name}.png"), 0, "g") for name in "abcd"]
    rows, errors = read_nuisances(samples)
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, False, True]
    assert rows[0, AT["log2 width"]] == 3 and "b.png: empty" in errors[0] and "d.png: no such" in errors[1]
    assert len(read_nuisances(samples, seconds=0)[0]) == 1
