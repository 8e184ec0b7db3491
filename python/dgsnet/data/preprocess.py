"""Preprocessing: from a decoded image to the model's normalised square input."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from dgsnet.config import NORMALIZATIONS, PreprocessConfig
from dgsnet.data.images import MAX_PIXELS, ImageError
from dgsnet.data.patches import (
    cut_patches,
    enlarged_size,
    mosaics,
    resize_bicubic,
    select_patches,
    selected_boxes,
)


class Preprocessor:
    """Makes the model's input from an image, as PreprocessConfig says.

    Example:
        >>> import numpy as np
        >>> from dgsnet.config import PreprocessConfig
        >>> from dgsnet.data.preprocess import Preprocessor
        >>> Preprocessor(PreprocessConfig())(np.zeros((300, 400, 3), np.uint8)).shape
        torch.Size([3, 224, 224])
    """

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        mean, std = NORMALIZATIONS[config.normalization]
        # (pixel / 255 - mean) / std as one multiplication and one addition.
        self._scale = torch.tensor([1 / (255 * s) for s in std])[:, None, None]
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std)])[:, None, None]

    def __call__(
        self, image: np.ndarray, *, rng: np.random.Generator | None = None, normalised: bool = True
    ) -> Tensor:
        """Preprocess one image.

        Args:
            image: uint8 [H, W, 3] RGB.
            rng: for training: crop position, flip and shuffle are drawn from it. None, for scoring: no flip,
                the centre crop, and a shuffle seeded by the image's pixels, so that a score is a function
                of the image.
            normalised: False leaves to `normalise` what is cheaper on the model's device.

        Returns:
            float32 [3, S, S] with S = image_size, normalised; else uint8.

        Raises:
            ImageError: so narrow an image that it would have to be enlarged beyond MAX_PIXELS.
        """
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        if self.config.mode == "patches":
            pixels = self._mosaic(pixels, _draw_seed(rng) if rng else content_seed(image))
        else:
            pixels = self._crop(pixels, rng)
        if rng and self.config.flip and rng.random() < 0.5:
            pixels = pixels.flip(2)
        return self.normalise(pixels) if normalised else pixels.contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [..., 3, S, S] of uint8 ones, on their device."""
        return torch.addcmul(self._shift.to(pixels.device), pixels, self._scale.to(pixels.device))

    def boxes(self, image: np.ndarray, *, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Which part of an image every cell of its model input shows.

        Cells are the mosaic's patches, or in mode "crop" a grid of as many squares over the crop, the last
        row and column of which may be narrower.

        Arguments and errors are those of calling the preprocessor, and the same numbers are drawn from rng.

        Returns:
            Two tensors [cells, 4] of left, top, right, bottom: int64 in pixels of the input and
            float64 in pixels of the image. Mirrored cells are where mirroring puts them.
        """
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        size, cell = self.config.image_size, -(-self.config.image_size // math.isqrt(self.config.num_patches))
        low = torch.arange(0, size, cell)
        top, left = (x.flatten() for x in torch.meshgrid(low, low, indexing="ij"))
        cells = torch.stack([left, top, (left + cell).clamp(max=size), (top + cell).clamp(max=size)], dim=1)
        if self.config.mode == "patches":
            self._check_enlarged(*pixels.shape[1:])
            seed = _draw_seed(rng) if rng else content_seed(image)
            boxes = selected_boxes(pixels[None], cell, self.config.num_patches, seed=seed)[0]
        else:
            height, width, *corner = self._place(pixels.shape[1], pixels.shape[2], rng)
            scale = torch.tensor([pixels.shape[2] / width, pixels.shape[1] / height], dtype=torch.float64)
            boxes = (cells + torch.tensor(corner[::-1]).repeat(2)) * scale.repeat(2)
        if rng and self.config.flip and rng.random() < 0.5:
            cells = torch.stack([size - cells[:, 2], cells[:, 1], size - cells[:, 0], cells[:, 3]], dim=1)
        return cells, boxes

    def cut(self, image: np.ndarray, *, rng: np.random.Generator | None = None) -> tuple[Tensor, int, bool]:
        """The part of preprocessing in mode "patches" that comes before the selection.

        `select` makes of it what calling the preprocessor makes; arguments and errors are the same.

        Returns:
            All patches of the image, uint8 [n, p, p, 3]; the seed of the shuffle; whether to mirror.
        """
        self._check_enlarged(*image.shape[:2])
        seed = _draw_seed(rng) if rng else content_seed(image)
        flip = bool(rng and self.config.flip and rng.random() < 0.5)
        patches = cut_patches(torch.from_numpy(image), self.config.patch_size, self.config.num_patches)
        return patches, seed, flip

    def select(self, patches: Tensor, counts: Tensor, seeds: Tensor, flips: Tensor) -> Tensor:
        """The rest of preprocessing, for a batch of images of any sizes, on the tensors' device.

        Args:
            patches: uint8 [N, p, p, 3], what `cut` gave for the images, one after the other.
            counts, seeds, flips: int64, int64 and bool [B], an image's number of patches, seed and mirroring.

        Returns:
            float32 [B, 3, S, S], normalised.
        """
        pixels = mosaics(patches, counts, self.config.num_patches, seeds=seeds)
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
        return self.normalise(pixels)

    def _mosaic(self, pixels: Tensor, seed: int) -> Tensor:
        self._check_enlarged(*pixels.shape[1:])
        return select_patches(pixels[None], self.config.patch_size, self.config.num_patches, seed=seed)[0]

    def _check_enlarged(self, height: int, width: int) -> None:
        _check_size(*enlarged_size(height, width, self.config.patch_size, self.config.num_patches))

    def _crop(self, pixels: Tensor, rng: np.random.Generator | None) -> Tensor:
        size = self.config.image_size
        height, width, top, left = self._place(pixels.shape[1], pixels.shape[2], rng)
        if (height, width) != tuple(pixels.shape[1:]):
            pixels = resize_bicubic(pixels[None], height, width)[0]
        return pixels[:, top : top + size, left : left + size]

    def _place(self, height: int, width: int, rng: np.random.Generator | None) -> tuple[int, int, int, int]:
        """Height and width that an image is enlarged to, and the top left corner of its crop."""
        size = self.config.image_size
        if min(height, width) < size:
            scale = size / min(height, width)
            height, width = round(height * scale), round(width * scale)
            _check_size(height, width)
        if rng:
            return height, width, int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        return height, width, (height - size) // 2, (width - size) // 2


def content_seed(image: np.ndarray) -> int:
    """Seed in 0..2^63-1 from an image's shape and pixels: the same image, the same seed, on any machine."""
    digest = hashlib.sha1(np.ascontiguousarray(image).data, usedforsecurity=False)
    digest.update(repr(image.shape).encode())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"would have to be enlarged to {width} x {height}, more than {MAX_PIXELS:,} pixels; crop it first"
        )
