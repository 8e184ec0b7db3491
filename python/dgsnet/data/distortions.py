"""What happens to pictures on their way: compression, blur, resizing, cropping and chains of them.

A distortion is applied to the decoded image, before preprocessing, and draws nothing at random.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dgsnet.data.images import MAX_PIXELS, ImageError


def jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """JPEG and back by Pillow: quality 1..100, chroma halved in both directions (4:2:0)."""
    return _encoded(image, "JPEG", quality=int(quality), subsampling="4:2:0")


def webp(image: np.ndarray, quality: float) -> np.ndarray:
    """Lossy WebP and back by Pillow: quality 1..100."""
    return _encoded(image, "WEBP", quality=int(quality))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of each channel with this standard deviation in pixels."""
    from scipy.ndimage import gaussian_filter

    return np.rint(gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))).astype(np.uint8)


def resize(image: np.ndarray, factor: float) -> np.ndarray:
    """Both sides times this factor, bicubic, antialiased; the image stays at its new size."""
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if height * width > MAX_PIXELS:
        raise ImageError(f"resize:{factor:g} makes it {width} x {height}, more than {MAX_PIXELS:,} pixels")
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def crop(image: np.ndarray, share: float) -> np.ndarray:
    """The centre, with this share of either side."""
    (top, height), (left, width) = (_centre(side, share) for side in image.shape[:2])
    return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class Operation:
    """What a name stands for, and which values it takes."""

    apply: Callable[[np.ndarray, float], np.ndarray]
    lowest: float
    highest: float
    whole: bool = False


OPERATIONS = {
    "jpeg": Operation(jpeg, 1, 100, whole=True),
    "webp": Operation(webp, 1, 100, whole=True),
    "blur": Operation(blur, 0.1, 50),
    "resize": Operation(resize, 0.01, 8),
    "crop": Operation(crop, 0.01, 1),
}


@dataclass(frozen=True)
class Distortion:
    """A chain of operations.

    Attributes:
        steps: (name in OPERATIONS, value), in the order they are applied.

    >>> distortion = Distortion((("jpeg", 90), ("resize", 0.5)))
    >>> distortion.name, distortion(np.zeros((40, 60, 3), np.uint8)).shape
    ('jpeg:90+resize:0.5', (20, 30, 3))
    """

    steps: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        return "+".join(f"{operation}:{value:g}" for operation, value in self.steps)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Apply to uint8 [H, W, 3]; ImageError where the result cannot be made."""
        for operation, value in self.steps:
            image = OPERATIONS[operation].apply(image, value)
        return np.ascontiguousarray(image)


# What an image is likely to go through on its way, and what should not turn a decision on it.
COPIES = tuple(
    Distortion((step,)) for step in (("jpeg", 90), ("jpeg", 75), ("resize", 0.75), ("resize", 1.25))
)


def _encoded(image: np.ndarray, kind: str, **options: Any) -> np.ndarray:
    buffer = io.BytesIO()
    try:
        Image.fromarray(image).save(buffer, kind, **options)
        with Image.open(buffer, formats=[kind]) as decoded:
            return np.array(decoded.convert("RGB"))
    # Sides beyond what the format can hold, or a Pillow without it.
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"cannot be written as {kind}: {error}") from None


def _centre(side: int, share: float) -> tuple[int, int]:
    """First pixel and length of the centre."""
    length = max(1, round(side * share))
    return (side - length) // 2, length
