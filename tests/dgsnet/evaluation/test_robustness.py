"""The words of `--robustness`, and what they are done to."""

import numpy as np
import pytest
from dgsnet.data.distortions import Distortion
from dgsnet.errors import UserError
from dgsnet.evaluation import robustness
from dgsnet.evaluation.robustness import Distorted, parse

PICTURE = np.random.default_rng(0).integers(0, 256, (37, 45, 3), np.uint8)


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


def test_preprocessing_sees_the_distorted_image_and_its_own_options():
    seen = []

    def preprocess(image, *, rng=None):
        seen.append((image, rng))
        return image.shape

    prepared = Distorted(Distortion((("crop", 0.5),)), preprocess)
    assert prepared(PICTURE, rng=3) == (18, 22, 3)
    np.testing.assert_array_equal(seen[0][0], Distortion((("crop", 0.5),))(PICTURE))
    assert seen[0][1] == 3
