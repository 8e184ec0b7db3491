"""Preprocessing: from a decoded image to the model's normalised square input."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from dgsnet.config import NORMALIZATIONS, Crops, PreprocessConfig
from dgsnet.data.images import MAX_PIXELS, ImageError
from dgsnet.data.patches import (
    chosen_patches,
    cut_patches,
    enlarged_size,
    mosaics,
    resize_bicubic,
    select_patches,
    selected_boxes,
)

# Crops of one image, at most. Of one that needs more they lie apart, as evenly over it as they cover others:
# its pixels stay the ones that the model was trained on, which those of a smaller copy would not be.
MAX_TILES = 64


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
        self,
        image: np.ndarray,
        *,
        rng: np.random.Generator | None = None,
        like: np.ndarray | None = None,
        normalised: bool = True,
    ) -> Tensor:
        """Preprocess one image.

        Args:
            image: uint8 [H, W, 3] RGB.
            rng: for training: crop position, flip and shuffle are drawn from it. None, for scoring: no flip,
                the centre crop, and a shuffle seeded by the image's pixels, so that a score is a function
                of the image.
            like: an image whose patches decide in mode "patches" which ones the mosaic shows, if it is of
                the same size.
            normalised: False leaves to `normalise` what is cheaper on the model's device.

        Returns:
            float32 [3, S, S] with S = image_size, normalised; else uint8.

        Raises:
            ImageError: so narrow an image that it would have to be enlarged beyond MAX_PIXELS.
        """
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        if self.config.mode == "patches":
            seed = _draw_seed(rng) if rng else content_seed(image)
            if like is None:
                pixels = self._mosaic(pixels, seed)
            else:
                patches = self._patches(image, like)
                counts = torch.tensor([len(patches)])
                pixels = mosaics(patches, counts, self.config.num_patches, seeds=torch.tensor([seed]))[0]
        else:
            pixels = self._crop(self._resized(pixels), rng)
        if rng and self.config.flip and rng.random() < 0.5:
            pixels = pixels.flip(2)
        return self.normalise(pixels) if normalised else pixels.contiguous()

    def crops(self, image: np.ndarray, *, normalised: bool = True) -> Tensor:
        """What an image's logit is the mean over: its crops as `config.crops` says, or its one mosaic.

        Arguments and errors are those of calling the preprocessor without rng, which gives the centre crop.

        Returns:
            [n, 3, S, S]; `crop_boxes` says where they lie.
        """
        if self.config.crops == 1:
            return self(image, normalised=normalised)[None]
        resized = self._resized(torch.from_numpy(image).permute(2, 0, 1))
        pixels, corners = self._prepared(resized, self.config.crops)
        crops = torch.stack([self._cut(pixels, top, left) for top, left in corners])
        return self.normalise(crops) if normalised else crops

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [..., 3, S, S] of uint8 ones, on their device."""
        # Of two types at once it takes a processor four times as long, for the same bits.
        return torch.addcmul(self._shift.to(pixels.device), pixels.float(), self._scale.to(pixels.device))

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
            shape = self._resized_size(*pixels.shape[1:])
            boxes = self._shown(cells, shape, self._draw_corner(shape, rng))
            boxes = self._in_image(boxes, pixels.shape[1:])
        if rng and self.config.flip and rng.random() < 0.5:
            cells = torch.stack([size - cells[:, 2], cells[:, 1], size - cells[:, 0], cells[:, 3]], dim=1)
        # What was put around the image does not count.
        seen = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return cells[seen], boxes[seen]

    def crop_boxes(self, image: np.ndarray, *, rng: np.random.Generator | None = None) -> Tensor:
        """Which part of an image each of its crops shows, in mode "crop".

        Arguments and errors are those of calling the preprocessor.

        Returns:
            float64 [n, 4] of left, top, right, bottom in pixels of the image: of those of `crops`, or of the
            one that is drawn from rng.
        """
        side, shape = self.config.image_size, self._resized_size(*image.shape[:2])
        whole = torch.tensor([[0, 0, side, side]])
        if rng:
            corners = [self._draw_corner(shape, rng)]
        else:
            corners = self._corners(*self._enlarged(*shape), self.config.crops)
        boxes = torch.cat([self._shown(whole, shape, corner) for corner in corners])
        return self._in_image(boxes, image.shape[:2])

    def cut(
        self,
        image: np.ndarray,
        *,
        rng: np.random.Generator | None = None,
        like: np.ndarray | None = None,
    ) -> tuple[Tensor, int, bool]:
        """The part of preprocessing in mode "patches" that comes before the selection.

        `select` makes of it what calling the preprocessor makes; arguments and errors are the same.

        Returns:
            The patches of the image to select from, uint8 [n, p, p, 3]; the seed of the shuffle; whether to
            mirror.
        """
        seed = _draw_seed(rng) if rng else content_seed(image)
        flip = bool(rng and self.config.flip and rng.random() < 0.5)
        return self._patches(image, like), seed, flip

    def _patches(self, image: np.ndarray, like: np.ndarray | None) -> Tensor:
        """All patches of an image, or those alone that another of its size would have chosen."""
        self._check_enlarged(*image.shape[:2])
        size, count = self.config.patch_size, self.config.num_patches
        patches = cut_patches(torch.from_numpy(image), size, count)
        if like is None or like.shape != image.shape:
            return patches
        return patches[chosen_patches(cut_patches(torch.from_numpy(like), size, count), count)]

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

    def _resized(self, pixels: Tensor) -> Tensor:
        """[3, H, W] in the size that crops are cut from, without what is beyond the last cell of the grid."""
        height, width = self._scaled_size(*pixels.shape[1:])
        if (height, width) != tuple(pixels.shape[1:]):
            if self.config.antialias:
                image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
                resized = image.resize((width, height), Image.Resampling.BILINEAR)
                pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
            else:
                pixels = interpolate(pixels[None].float(), (height, width), mode="bilinear")[0]
                pixels = pixels.round().to(torch.uint8)
        height, width = self._trimmed(height, width)
        return pixels[:, :height, :width]

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        return self._trimmed(*self._scaled_size(height, width))

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        side = self.config.side
        if self.config.resize == "squash":
            return side, side
        if self.config.resize == "shorter":
            shorter = min(height, width)
            height, width = (side * length // shorter for length in (height, width))
            _check_size(height, width)
        return height, width

    def _trimmed(self, height: int, width: int) -> tuple[int, int]:
        grid = self.config.grid
        return (height - height % grid or height), (width - width % grid or width)

    def _in_image(self, boxes: Tensor, shape: Sequence[int]) -> Tensor:
        """Boxes of a resized image as those of the image, of this height and width."""
        height, width = self._scaled_size(*shape)
        scale = torch.tensor([shape[1] / width, shape[0] / height], dtype=torch.float64)
        return boxes * scale.repeat(2)

    def _corners(self, height: int, width: int, crops: Crops) -> list[tuple[int, int]]:
        """Top and left of the crops of an image of which no side is shorter than theirs."""
        config, grid = self.config, self.config.grid
        cells = crop_corners(height // grid, width // grid, config.image_size // grid, crops)
        if crops != "tiles" and (config.small != "upscale" or config.resize != "none"):
            # Where torchvision's CenterCrop has it, which detectors with such settings were trained with.
            down, across = (length // grid - config.image_size // grid for length in (height, width))
            cells[0] = round(down / 2), round(across / 2)
        return [(top * grid, left * grid) for top, left in cells]

    def _crop(self, pixels: Tensor, rng: np.random.Generator | None) -> Tensor:
        corner = self._draw_corner(pixels.shape[1:], rng)
        return self._cut(self._prepared(pixels, 1)[0], *corner)

    def _prepared(self, pixels: Tensor, crops: Crops) -> tuple[Tensor, list[tuple[int, int]]]:
        """[3, H, W] that crops are cut from by `_cut`, enlarged if it must be, and the crops' corners."""
        height, width = self._enlarged(*pixels.shape[1:])
        if self.config.small == "upscale" and (height, width) != tuple(pixels.shape[1:]):
            pixels = resize_bicubic(pixels[None], height, width)[0]
        return pixels, self._corners(height, width, crops)

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after the rule for small ones."""
        size = self.config.image_size
        if self.config.small != "upscale":
            return max(height, size), max(width, size)
        if min(height, width) < size:
            scale = size / min(height, width)
            height, width = round(height * scale), round(width * scale)
            _check_size(height, width)
        return height, width

    def _draw_corner(self, shape: Sequence[int], rng: np.random.Generator | None) -> tuple[int, int]:
        """Top and left of a crop of an image of this height and width: of the centre without rng."""
        size = self.config.image_size
        height, width = self._enlarged(*shape)
        if rng:
            grid = self.config.grid
            top, left = (int(rng.integers((length - size) // grid + 1)) for length in (height, width))
            return top * grid, left * grid
        return self._corners(height, width, 1)[0]

    def _cut(self, pixels: Tensor, top: int, left: int) -> Tensor:
        """One crop [3, S, S]. Sides that are shorter are filled up here: the image would be as large as S."""
        size = self.config.image_size
        crop = pixels[:, top : top + size, left : left + size]
        height, width = crop.shape[1:]
        if (height, width) == (size, size):
            return crop
        if self.config.small == "pad":
            above, before = (size - height) // 2, (size - width) // 2
            return pad(crop, (before, size - width - before, above, size - height - above))
        return crop[:, torch.arange(size) % height][:, :, torch.arange(size) % width]

    def _shown(self, cells: Tensor, shape: Sequence[int], corner: tuple[int, int]) -> Tensor:
        """Boxes, float64, in an image of this height and width, of cells [n, 4] of its crop."""
        across, down = (
            self._shown_along(cells[:, axis::2], shape[1 - axis], self._enlarged(*shape)[1 - axis], start)
            for axis, start in enumerate(corner[::-1])
        )
        return torch.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], dim=1)

    def _shown_along(self, ends: Tensor, side: int, enlarged: int, start: int) -> Tensor:
        """The same along one axis, [n, 2]: of cells' ends, from the image's side and the crop's start."""
        if self.config.small == "upscale" or enlarged == side:
            return (ends + start) * torch.tensor(side / enlarged, dtype=torch.float64)
        if self.config.small == "pad":
            return (ends - (enlarged - side) // 2).clamp(0, side).double()
        low = ends[:, :1] % side
        shown = torch.cat([low, low + ends[:, 1:] - ends[:, :1]], dim=1)
        # What shows the end of one copy and the beginning of the next may show all of the side.
        return torch.where(shown[:, 1:] > side, torch.tensor([0, side]), shown).double()


def crop_corners(height: int, width: int, size: int, crops: Crops) -> list[tuple[int, int]]:
    """Top and left of an image's crops, of which no side is shorter than a crop's, `size`.

    Tiles are as few as cover the image and lie evenly, so that neighbours overlap. Where they would be more
    than MAX_TILES, rows and columns are left out until they are not.

    Example:
        >>> from dgsnet.data.preprocess import crop_corners
        >>> crop_corners(100, 90, 64, 5)
        [(18, 13), (0, 0), (0, 26), (36, 0), (36, 26)]
        >>> crop_corners(100, 64, 64, "tiles")
        [(0, 0), (36, 0)]
    """
    down, across = height - size, width - size
    if crops == "tiles":
        rows, columns = _grid(height, width, size)
        return [(top, left) for top in _spread(down, rows) for left in _spread(across, columns)]
    centre = down // 2, across // 2
    return [centre] if crops == 1 else [centre, (0, 0), (0, across), (down, 0), (down, across)]


def _grid(height: int, width: int, size: int) -> tuple[int, int]:
    """How many rows and columns of tiles an image has."""
    rows, columns = (min(-(-side // size), MAX_TILES) for side in (height, width))
    while rows * columns > MAX_TILES:
        # Of the two the one that has more of them to a pixel, or else more: turned images have turned tiles.
        if rows > 1 and (rows * width, rows) > (columns * height, columns):
            rows -= 1
        else:
            columns -= 1
    return rows, columns


def _spread(length: int, count: int) -> list[int]:
    """So many places from 0 to the length, as evenly as whole pixels allow; one is in the middle."""
    return [length // 2] if count == 1 else [i * length // (count - 1) for i in range(count)]


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
