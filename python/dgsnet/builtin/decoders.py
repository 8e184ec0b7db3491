"""Small decoders that make a "generated" image of a crop: encode it at half the resolution, decode it again.

Each family upsamples in its own way, which leaves a fingerprint in what it makes, as the upsampling layers of
real generators do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# float32 [N, 3, H, W] in 0..1, H and W multiples of 4, to the same shape.
Decoder = Callable[[Tensor], Tensor]


def _on_channels(operation: Decoder, image: Tensor) -> Tensor:
    """Apply an operation on [N, 1, H, W] to each channel alone."""
    return operation(image.flatten(0, 1).unsqueeze(1)).squeeze(1).unflatten(0, image.shape[:2])


def _separable(taps: list[float]) -> Tensor:
    """The [1, 1, k, k] kernel that filters rows and columns with the same taps."""
    return torch.outer(torch.tensor(taps), torch.tensor(taps))[None, None]


def _pad(image: Tensor) -> Tensor:
    return F.pad(image, (1, 1, 1, 1), mode="replicate")


def _interpolate(mode: str) -> Decoder:
    """Average 2x2 pixels, then enlarge by PyTorch's interpolation of that name."""
    align = None if mode == "nearest" else False
    return lambda image: F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode=mode, align_corners=align)


def _transposed(image: Tensor) -> Tensor:
    """Average 2x2 pixels, then a transposed convolution of stride 2 with an odd kernel.

    It overlaps unevenly: even and odd pixels get different sums of weights, the well-known checkerboard.
    """
    kernel = _separable([0.58, 1.0, 0.58])
    # This keeps the mean brightness.
    kernel = 4 * kernel / kernel.sum()
    latent = _pad(F.avg_pool2d(image, 2))
    up = _on_channels(lambda channel: F.conv_transpose2d(channel, kernel, stride=2), latent)
    h, w = image.shape[-2:]
    return up[..., 2 : 2 + h, 2 : 2 + w]


def _shuffle(image: Tensor) -> Tensor:
    """Sub-pixel convolution: four 3x3 filters, one for each pixel of a 2x2 cell, then pixel shuffle.

    They are bilinear weights, each a little off in its own way, as learned ones are.
    """
    generator = torch.Generator().manual_seed(0)
    ramp = {0: torch.tensor([0.25, 0.75, 0.0]), 1: torch.tensor([0.0, 0.75, 0.25])}
    filters = torch.stack([torch.outer(ramp[y], ramp[x]) for y in (0, 1) for x in (0, 1)])
    filters = filters + 0.06 * torch.randn(filters.shape, generator=generator)
    gains = torch.tensor([0.95, 1.02, 1.06, 0.97]).view(4, 1, 1)
    filters = (filters / filters.sum((1, 2), keepdim=True) * gains).unsqueeze(1)
    latent = _pad(F.avg_pool2d(image, 2))
    return _on_channels(lambda channel: F.pixel_shuffle(F.conv2d(channel, filters), 2), latent)


def _unpool(image: Tensor) -> Tensor:
    """Max-pooling undone at the places that the maxima came from; gaps are filled from their neighbours."""
    kernel = _separable([0.2, 0.7, 1.0, 0.7, 0.2])
    pooled, where = F.max_pool2d(image, 2, return_indices=True)
    sparse, mask = (F.max_unpool2d(values, where, [2, 2]) for values in (pooled, torch.ones_like(pooled)))
    total, count = (_on_channels(lambda c: F.conv2d(c, kernel, padding=2), part) for part in (sparse, mask))
    return total / count


def _codebook(image: Tensor) -> Tensor:
    """Each 2x2 cell keeps its mean; its three details are rounded to a few values, as by a codebook."""
    # A Haar transform: rows of the matrix are the mean and the three details of a cell's pixels.
    haar = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 4
    cells = F.pixel_unshuffle(image, 2).unflatten(1, (-1, 4))
    codes = torch.einsum("ij,ncjhw->ncihw", haar, cells)
    codes = torch.cat([codes[:, :, :1], (codes[:, :, 1:] / 0.1).round() * 0.1], dim=2)
    return F.pixel_shuffle(torch.einsum("ij,ncihw->ncjhw", 4 * haar, codes).flatten(1, 2), 2)


def _resize_convolution(image: Tensor) -> Tensor:
    """Nearest-neighbour enlargement, then a 3x3 convolution, the usual cure for checkerboards."""
    kernel = _separable([-0.1, 1.2, -0.1])
    return _on_channels(lambda channel: F.conv2d(channel, kernel), _pad(_interpolate("nearest")(image)))


def _progressive(image: Tensor) -> Tensor:
    """The quarter-size picture faded into the half-size one, as in progressively grown generators."""
    half = F.avg_pool2d(image, 2)
    quarter = F.interpolate(F.avg_pool2d(half, 2), scale_factor=2, mode="nearest")
    return F.interpolate((half + quarter) / 2, scale_factor=2, mode="bilinear", align_corners=False)


DECODERS: dict[str, Decoder] = {
    "nearest": _interpolate("nearest"),
    "transposed": _transposed,
    "shuffle": _shuffle,
    "bilinear": _interpolate("bilinear"),
    "unpool": _unpool,
    "codebook": _codebook,
    "resizeconv": _resize_convolution,
    "progressive": _progressive,
}
