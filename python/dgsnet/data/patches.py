"""Patch selection: the mosaic of an image's least and most complex patches that DGS-Net looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from dgs_kernels import spectral_entropy


def select_patches(
    images: Tensor, patch_size: int = 32, num_patches: int = 49, *, seed: int | Sequence[int] | Tensor
) -> Tensor:
    """Tile the patches of lowest and highest spectral entropy, shuffled, into a square mosaic.

    Of n patches floor(24 n / 49) are the lowest and the rest the highest (24 and 25 of 49, as in DGS-Net);
    equal entropies (to 2^-20 bits) keep row-major order. The chosen patches are shuffled by a permutation
    that depends on the seed alone. An image with fewer than n patches is first enlarged (see enlarged_size).

    Args:
        images: [B, 3, H, W] RGB, uint8 in 0..255 or floating point in 0..1; cut from the bottom and the
            right to multiples of the patch size.
        patch_size: side of a patch in pixels.
        num_patches: patches kept, a square number.
        seed: 64-bit seed of the shuffle, one for all images or one per image ([B]).

    Returns:
        [B, 3, S, S] of the images' dtype, S = patch_size * sqrt(num_patches); channels last in memory.

    Raises:
        ValueError: the shape is wrong, an image is empty, patch_size is below 1, num_patches is no square,
            or there are neither one nor B seeds.

    Example:
        >>> import torch
        >>> from dgsnet.data.patches import select_patches
        >>> images = torch.randint(256, (2, 3, 300, 400), dtype=torch.uint8)
        >>> select_patches(images, seed=0).shape
        torch.Size([2, 3, 224, 224])
    """
    images, chosen = _select(images, patch_size, num_patches, seed)
    rows, columns = (side // patch_size for side in images.shape[2:])
    cut = images[:, :, : rows * patch_size, : columns * patch_size].permute(0, 2, 3, 1)
    item = torch.arange(len(images), device=images.device)[:, None]
    first = (item * rows + chosen // columns) * patch_size * columns + chosen % columns
    return _tile(cut.reshape(-1, patch_size * 3), first, columns)


def selected_boxes(
    images: Tensor, patch_size: int = 32, num_patches: int = 49, *, seed: int | Sequence[int] | Tensor
) -> Tensor:
    """Where in the images the cells of `select_patches`' mosaics come from; arguments and errors are its.

    Returns:
        float64 [B, n, 4], cell by cell in row-major order: left, top, right, bottom in pixels of the images
        as given, with fractions where they had to be enlarged.

    Example:
        >>> import torch
        >>> from dgsnet.data.patches import selected_boxes
        >>> selected_boxes(torch.zeros(1, 3, 224, 224), seed=0).shape
        torch.Size([1, 49, 4])
    """
    enlarged, chosen = _select(images, patch_size, num_patches, seed)
    columns = enlarged.shape[3] // patch_size
    corners = torch.stack([chosen % columns, chosen // columns], dim=-1).double() * patch_size
    # Pixels of the image as given to one pixel of the enlarged one: across and down.
    scale = torch.tensor(
        [given / large for given, large in zip(images.shape[:1:-1], enlarged.shape[:1:-1])],
        dtype=torch.float64,
        device=images.device,
    )
    return torch.cat([corners * scale, (corners + patch_size) * scale], dim=-1)


def _select(
    images: Tensor, patch_size: int, num_patches: int, seed: int | Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """The images, enlarged where they must be, and [B, n] which of their patches a mosaic's cells hold."""
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    side = math.isqrt(max(num_patches, 0))
    if num_patches < 1 or side * side != num_patches:
        raise ValueError(f"num_patches must be a square number, got {num_patches}")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be [B, 3, H, W] with H and W at least 1, got {list(images.shape)}")
    batch = len(images)
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=images.device).reshape(-1)
    if len(seeds) not in (1, batch):
        raise ValueError(f"seed must be one number or one per image ({batch}), got {len(seeds)}")

    height, width = enlarged_size(images.shape[2], images.shape[3], patch_size, num_patches)
    if (height, width) != tuple(images.shape[2:]):
        images = resize_bicubic(images, height, width)
    order = _ranks(spectral_entropy(images, patch_size)).argsort(dim=1, stable=True)
    low = _lowest(num_patches)
    chosen = torch.cat([order[:, :low], order[:, order.shape[1] - (num_patches - low) :]], dim=1)
    # In row-major order before the shuffle, so that the mosaic depends on which patches are chosen and not
    # on how rounding ranks two of them.
    chosen = chosen.sort(dim=1).values
    return images, chosen.gather(1, permutations(seeds, num_patches).expand(batch, -1))


def _lowest(num_patches: int) -> int:
    """How many of a mosaic's patches are the least complex ones: 24 of 49, as in DGS-Net."""
    return 24 * num_patches // 49


def _ranks(entropy: Tensor) -> Tensor:
    """Entropies to 2^-20 bits: what differs by rounding, as flat patches of different grey do, is equal."""
    return (entropy * 2**20).round_()


def cut_patches(image: Tensor, patch_size: int = 32, num_patches: int = 49) -> Tensor:
    """The patches of one image, [H, W, 3] RGB, in row-major order, as `mosaics` takes them.

    An image that holds fewer than num_patches is enlarged first (see enlarged_size).

    Returns:
        [rows * columns, patch_size, patch_size, 3] of the image's dtype.
    """
    height, width = enlarged_size(image.shape[0], image.shape[1], patch_size, num_patches)
    if (height, width) != tuple(image.shape[:2]):
        image = resize_bicubic(image.permute(2, 0, 1)[None], height, width)[0].permute(1, 2, 0)
    rows, columns = height // patch_size, width // patch_size
    grid = image[: rows * patch_size, : columns * patch_size]
    grid = grid.reshape(rows, patch_size, columns, patch_size, 3).transpose(1, 2)
    return grid.reshape(rows * columns, patch_size, patch_size, 3)


def chosen_patches(patches: Tensor, num_patches: int = 49) -> Tensor:
    """Which patches of one image its mosaic shows: places, [num_patches], in ascending order.

    Args:
        patches: [n, p, p, 3], as `cut_patches` gives them.
    """
    order = _ranks(spectral_entropy(patches.permute(0, 3, 1, 2), patches.shape[1])[:, 0]).argsort(stable=True)
    low = _lowest(num_patches)
    return torch.cat([order[:low], order[len(order) - (num_patches - low) :]]).sort().values


def mosaics(patches: Tensor, counts: Tensor, num_patches: int = 49, *, seeds: Tensor) -> Tensor:
    """select_patches for images of any sizes in one batch, given as their patches, without a host sync.

    The patches of all images are ranked by one kernel and one sort, so a batch on a GPU costs the same few
    launches whatever its sizes. The mosaics are those of select_patches, unless rounding on another device
    ranks two patches otherwise at the edge of the selection.

    Args:
        patches: [N, p, p, 3] RGB, uint8 in 0..255 or floating point in 0..1: those of the first image in
            row-major order, then the next one's (`cut_patches`).
        counts: [B] integers that sum to N, how many patches each image has; at least num_patches each.
        num_patches: patches kept of each image, a square number.
        seeds: [B] int64, each image's 64-bit seed of the shuffle.

    Returns:
        [B, 3, S, S] of the patches' dtype, S = p * sqrt(num_patches); channels last in memory.

    Example:
        >>> import torch
        >>> from dgsnet.data.patches import cut_patches, mosaics
        >>> images = [torch.zeros(size, dtype=torch.uint8) for size in ((300, 400, 3), (64, 64, 3))]
        >>> cut = [cut_patches(image) for image in images]
        >>> counts = torch.tensor([len(patches) for patches in cut])
        >>> mosaics(torch.cat(cut), counts, seeds=torch.tensor([0, 1])).shape
        torch.Size([2, 3, 224, 224])
    """
    device = patches.device
    image = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=len(patches))
    entropy = spectral_entropy(patches.permute(0, 3, 1, 2), patches.shape[1])[:, 0]
    order = _ranks(entropy).argsort(stable=True)
    # The order is by image, then by entropy, then by place.
    order = order[image[order].argsort(stable=True)]
    ends = counts.cumsum(0)[:, None]
    low, kept = _lowest(num_patches), torch.arange(num_patches, device=device)
    place = torch.where(kept < low, ends - counts[:, None], ends - num_patches) + kept
    chosen = order[place].sort(dim=1).values.gather(1, permutations(seeds, num_patches))
    size = patches.shape[1]
    return _tile(patches.reshape(-1, size * 3), chosen * size, 1)


def _tile(pixels: Tensor, first: Tensor, step: int) -> Tensor:
    """The mosaics of patches, each given by its rows of pixels.

    Args:
        pixels: [R, p * 3], rows of patches.
        first: [B, n], the first row of every patch, n a square number.
        step: from one row of a patch to its next.

    Returns:
        [B, 3, S, S], with a pixel's channels next to each other in memory.
    """
    batch, count = first.shape
    side, size = math.isqrt(count), pixels.shape[1] // 3
    rows = torch.arange(size, device=pixels.device)[:, None] * step
    # In the order in which the mosaic has them, so that one gather is all.
    order = first.reshape(batch, side, 1, side) + rows
    mosaic = pixels.index_select(0, order.flatten())
    return mosaic.reshape(batch, side * size, side * size, 3).permute(0, 3, 1, 2)


def enlarged_size(height: int, width: int, patch_size: int, num_patches: int) -> tuple[int, int]:
    """Height and width after the smallest enlargement, of both sides alike, that holds enough patches.

    That is the smallest scale s >= 1 with floor(s height / patch) * floor(s width / patch) >= num_patches;
    sides are rounded to whole pixels. An image that holds enough keeps its size.

    Example:
        >>> from dgsnet.data.patches import enlarged_size
        >>> enlarged_size(100, 100, 32, 49), enlarged_size(300, 400, 32, 49), enlarged_size(32, 64, 32, 49)
        ((224, 224), (300, 400), (160, 320))
    """

    def holds(scale: Fraction) -> bool:
        return int(scale * height / patch_size) * int(scale * width / patch_size) >= num_patches

    if holds(Fraction(1)):
        return height, width
    # The count of patches grows only where one side reaches a whole number of patches.
    scales = {Fraction(k * patch_size, side) for side in (height, width) for k in range(1, num_patches + 1)}
    scale = min(s for s in scales if s > 1 and holds(s))
    return round(scale * height), round(scale * width)


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic enlargement of [B, C, H, W], rounded and clamped back to 0..255 for uint8."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    resized = torch.nn.functional.interpolate(images.to(dtype), size=(height, width), mode="bicubic")
    if not images.is_floating_point():
        resized = resized.round_().clamp_(0, 255)
    return resized.to(images.dtype)


def permutations(seeds: Tensor, count: int) -> Tensor:
    """[B] int64 seeds -> [B, count] permutations of 0..count-1, the same on every device and version."""
    return splitmix64(seeds, count).argsort(dim=1, stable=True)


def splitmix64(seeds: Tensor, count: int) -> Tensor:
    """[B] int64 seeds -> [B, count], the first numbers of SplitMix64 (Steele, Lea and Flood, 2014)."""
    steps = torch.arange(1, count + 1, device=seeds.device)
    # The published unsigned constants, as the signed numbers of the same bits.
    x = seeds[:, None] + steps * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
