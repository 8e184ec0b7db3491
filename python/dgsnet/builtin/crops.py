"""Crops of photographs at native resolution, degraded as cameras and networks do, with captions that say so.

Real and generated images pass through the same `degrade`, drawn from the same distribution, so that lost
detail gives nothing away.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from dgsnet.builtin.photographs import Photograph

# Levels of each degradation: its word and the range that its strength is drawn from. Here the standard
# deviation of a Gaussian in pixels,
BLUR = (("sharp", 0.0, 0.4), ("soft", 0.6, 1.1), ("blurry", 1.3, 2.2))
# the standard deviation of white noise, of 255,
NOISE = (("clean", 0.0, 1.0), ("grainy", 3.0, 6.0), ("noisy", 8.0, 14.0))
# and the quality.
JPEG = (("uncompressed", 100, 100), ("compressed", 70, 92), ("heavily compressed", 30, 55))


@dataclass(frozen=True)
class Quality:
    """How a crop is degraded, and in which words.

    Attributes:
        blur: standard deviation of a Gaussian, in pixels.
        noise: standard deviation of white noise, of 255.
        jpeg: quality; 100 is no JPEG.
        gain, offset: of brightness.
        words: for blur, noise and JPEG.
    """

    blur: float
    noise: float
    jpeg: int
    gain: float
    offset: float
    words: tuple[str, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, shares: tuple[tuple[float, ...], ...] | None = None) -> Quality:
        """A random quality; `shares`: how often each level of blur, noise and JPEG comes (None: equally)."""
        tables = (BLUR, NOISE, JPEG)
        if shares is None:
            drawn = [table[rng.integers(len(table))] for table in tables]
        else:
            drawn = [table[rng.choice(len(table), p=p)] for table, p in zip(tables, shares)]
        blur, noise, jpeg = (rng.uniform(low, high) for _, low, high in drawn)
        words = tuple(word for word, _, _ in drawn)
        return cls(blur, noise, round(jpeg), rng.uniform(0.75, 1.2), rng.uniform(-12, 12), words)


def sample_crop(
    photograph: Photograph, size: int, rng: np.random.Generator, *, contrast: float = 0.0
) -> tuple[np.ndarray, str]:
    """A random uint8 [size, size, 3] crop and what it shows.

    Crops whose grey values have a standard deviation below `contrast` are drawn again, up to 50 times: empty
    sky holds no trace of any decoder.
    """
    pixels = photograph.pixels()
    height, width = pixels.shape[:2]
    for _ in range(50):
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        crop = pixels[top : top + size, left : left + size]
        if crop.mean(axis=2).std() >= contrast:
            break
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop, photograph.content_at((left + size / 2) / width, (top + size / 2) / height)


def degrade(crop: np.ndarray, quality: Quality, rng: np.random.Generator) -> np.ndarray:
    """Blur, brightness, noise and JPEG, in this order, on a [H, W, 3] crop in 0..255; returns uint8."""
    damaged = damage(crop, quality, rng)
    if quality.jpeg < 100:
        damaged = np.asarray(Image.open(io.BytesIO(encode(damaged, quality.jpeg))))
    return damaged


def damage(crop: np.ndarray, quality: Quality, rng: np.random.Generator) -> np.ndarray:
    """All of `degrade` but JPEG."""
    pixels = crop.astype(np.float32)
    # Below that, a Gaussian on the pixel grid is the identity.
    if quality.blur > 0.15:
        pixels = gaussian_filter(pixels, (quality.blur, quality.blur, 0), mode="nearest", truncate=3.0)
    pixels = pixels * quality.gain + quality.offset
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * quality.noise
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, jpeg: int) -> bytes:
    """A JPEG file of that quality; of 100, a PNG file."""
    file = io.BytesIO()
    if jpeg < 100:
        Image.fromarray(pixels).save(file, "JPEG", quality=jpeg)
    else:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def describe(content: str, words: Sequence[str]) -> str:
    """A caption: what a crop shows and how good it is, from a Quality's words."""
    blur, noise, jpeg = words
    return f"a {blur}, {noise}, {jpeg} photo of {content}"
