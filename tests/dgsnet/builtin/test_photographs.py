"""The photographs that other packages carry: large enough, and none in two splits."""

import hashlib

import numpy as np
import pytest
from dgsnet import builtin
from dgsnet.builtin.photographs import PHOTOGRAPHS, SPLITS, Photograph
from dgsnet.errors import UserError


def test_photographs_are_disjoint_across_splits_and_large_enough():
    files = [photograph.file for split in SPLITS for photograph in PHOTOGRAPHS[split]]
    assert len(files) == len(set(files))
    pixels = []
    for split in SPLITS:
        for photograph in PHOTOGRAPHS[split]:
            pixels.append(photograph.pixels())
            assert pixels[-1].dtype == np.uint8 and pixels[-1].shape[2] == 3
            assert min(pixels[-1].shape[:2]) >= builtin.SIZES[split] + 2 * builtin.MARGIN
    # Not the same pixels under two names either.
    assert len({hashlib.sha256(p.tobytes()).hexdigest() for p in pixels}) == len(pixels)


def test_regions_lie_in_their_photographs():
    for photograph in (p for split in SPLITS for p in PHOTOGRAPHS[split]):
        for left, top, right, bottom, content in photograph.regions:
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and content != photograph.content


def test_a_missing_photograph_is_a_user_error():
    with pytest.raises(UserError, match=r"no_such\.png.*reinstall skimage"):
        Photograph("skimage/no_such.png", "nothing").pixels()
