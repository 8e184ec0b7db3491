"""Pictures drawn from a seed."""

import numpy as np
import torch


def picture(height, width, seed=0):
    """Patches of every complexity: noise whose strength and coarseness vary over the image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    fine = rng.normal(size=(height, width, 3)) * (80 * x * y)[..., None]
    coarse = np.repeat(np.repeat(rng.normal(size=(height // 8 + 1, width // 8 + 1, 3)), 8, 0), 8, 1)
    smooth = 60 * np.stack([x, y, 1 - x], axis=-1) + 90
    return (smooth + fine + 25 * coarse[:height, :width]).clip(0, 255).astype(np.uint8)


def channels_first(image):
    """uint8 [H, W, 3] as a batch of one, [1, 3, H, W]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]
