"""Small random autoencoders in diffusers' own format, saved once, and real images of many kinds."""

import numpy as np
import pytest
import torch
from dgsnet.builtin.photographs import PHOTOGRAPHS
from PIL import Image

KL = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 3,
}
TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory):
    """Folders `kl/vae`, of a pipeline; `sure/vae`, which draws nearly nothing; and `tiny`."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    root = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(3)
    kl = AutoencoderKL(**KL)
    kl.save_pretrained(root / "kl" / "vae")
    with torch.no_grad():
        kl.quant_conv.weight[3:] = 0
        kl.quant_conv.bias[3:] = -30
    kl.save_pretrained(root / "sure" / "vae")
    AutoencoderTiny(**TINY).save_pretrained(root / "tiny")
    return root


def crops(count, seed=0, low=40, high=120):
    """Parts of coloured photographs, of many sizes."""
    rng = np.random.default_rng(seed)
    photographs = [PHOTOGRAPHS["train"][i].pixels() for i in (0, 3, 8)]
    for number in range(count):
        pixels = photographs[number % len(photographs)]
        height, width = rng.integers(low, high, 2)
        top, left = rng.integers(pixels.shape[0] - height), rng.integers(pixels.shape[1] - width)
        yield Image.fromarray(pixels[top : top + height, left : left + width])
