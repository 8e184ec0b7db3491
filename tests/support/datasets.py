"""Data sets on disk, of pictures that differ in size and content."""

import numpy as np
from PIL import Image


def write_image(path, seed=0):
    """Write noise; no two of twenty neighbouring seeds have the same size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed % 4, 24 + seed % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(root, *paths):
    """Write an image to each path below root."""
    for seed, path in enumerate(paths):
        write_image(root / path, seed)
    return root
