"""Degradations of crops are drawn from their levels, and captions say what they do."""

import numpy as np
from dgsnet.builtin.crops import BLUR, JPEG, NOISE, Quality, degrade, describe, sample_crop
from dgsnet.builtin.photographs import PHOTOGRAPHS


def test_degradations_are_drawn_from_their_levels():
    rng, names = np.random.default_rng(0), ("blur", "noise", "jpeg", "gain", "offset")
    drawn = {}
    for quality in (Quality.draw(rng) for _ in range(3000)):
        for name, word in zip(names, (*quality.words, "", "")):
            drawn.setdefault((name, word), []).append(getattr(quality, name))
    ranges = {
        **{("blur", "sharp"): (0, 0.4), ("blur", "soft"): (0.6, 1.1), ("blur", "blurry"): (1.3, 2.2)},
        **{("noise", "clean"): (0, 1), ("noise", "grainy"): (3, 6), ("noise", "noisy"): (8, 14)},
        **{("jpeg", "uncompressed"): (100, 100), ("jpeg", "compressed"): (70, 92)},
        **{("jpeg", "heavily compressed"): (30, 55), ("gain", ""): (0.75, 1.2), ("offset", ""): (-12, 12)},
    }
    assert drawn.keys() == ranges.keys()
    for key, (low, high) in ranges.items():
        tolerance = 0 if key[0] == "jpeg" else (high - low) / 100
        assert low <= min(drawn[key]) <= low + tolerance and high - tolerance <= max(drawn[key]) <= high, key
        assert len(drawn[key]) > 900


def test_degrade_does_what_the_caption_says():
    rng = np.random.default_rng(0)
    crop, _ = sample_crop(PHOTOGRAPHS["train"][1], 48, rng)
    same = dict(gain=1.0, offset=0.0, words=("sharp", "clean", "uncompressed"))
    assert np.array_equal(degrade(crop, Quality(0.0, 0.0, 100, **same), rng), crop)

    def roughness(image):
        return np.abs(np.diff(image.astype(float), axis=1)).mean()

    assert roughness(degrade(crop, Quality(2.0, 0.0, 100, **same), rng)) < 0.7 * roughness(crop)
    assert roughness(degrade(crop, Quality(0.0, 12.0, 100, **same), rng)) > 1.1 * roughness(crop)
    assert not np.array_equal(degrade(crop, Quality(0.0, 0.0, 40, **same), rng), crop)
    drawn = [Quality.draw(rng) for _ in range(300)]
    for quality in drawn:
        for value, word, table in zip(
            (quality.blur, quality.noise, quality.jpeg), quality.words, (BLUR, NOISE, JPEG)
        ):
            low, high = next((low, high) for name, low, high in table if name == word)
            assert low <= value <= high
    assert len({quality.words for quality in drawn}) == 27
    assert describe("a cat", ("soft", "noisy", "compressed")) == "a soft, noisy, compressed photo of a cat"
