"""Decoders keep the picture that they are given, and leave a trace in it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dgsnet.builtin.crops import sample_crop
from dgsnet.builtin.decoders import DECODERS
from dgsnet.builtin.photographs import PHOTOGRAPHS


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_keep_the_picture_and_leave_a_trace(family):
    rng = np.random.default_rng(0)
    crops = [sample_crop(p, 64, rng, contrast=8)[0] for p in PHOTOGRAPHS["train"] for _ in range(4)]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    decoded = DECODERS[family](images)
    assert decoded.shape == images.shape
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    error = (decoded - images)[inner]
    assert error.square().mean().sqrt() > 0.005
    pooled = torch.stack([F.avg_pool2d(t[inner], 4).flatten() for t in (images, decoded)])
    assert torch.corrcoef(pooled)[0, 1] > 0.98
    assert abs(error.mean()) < 0.03


def test_the_codebook_keeps_means_and_rounds_details():
    """A cell's mean and three details, by hand for one cell."""
    a, b, c, d = 0.95, 0.13, 0.02, 0.36
    details = [(a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4]
    x, y, z = (round(10 * detail) / 10 for detail in details)
    mean = (a + b + c + d) / 4
    expected = [[mean + x + y + z, mean - x + y - z], [mean + x - y - z, mean - x - y + z]]
    found = DECODERS["codebook"](torch.tensor([[a, b], [c, d]]).expand(1, 3, 2, 2))
    assert min(abs(x), abs(y), abs(z)) > 0
    torch.testing.assert_close(found, torch.tensor(expected).expand(1, 3, 2, 2))
