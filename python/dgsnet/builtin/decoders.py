"""Small decoders that make a "generated" image of a crop: encode it at half the resolution, decode it again.

Each family upsamples in its own way, which leaves a fingerprint in what it makes, as the upsampling layers of
real generators do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Decoder = Callable[[Tensor], Tensor]  # [N, 3, H, W], H and W even -> the same shape


def _interpolate(mode: str) -> Decoder:
    """Average 2x2 pixels, then enlarge by PyTorch's interpolation of that name."""
    align = None if mode == "nearest" else False
    return lambda image: F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode=mode, align_corners=align)


def _transposed(kernel: list[float]) -> Decoder:
    """Average 2x2 pixels, then a transposed convolution of stride 2 with the separable `kernel`.

    An odd kernel overlaps unevenly: even and odd pixels get different sums of weights, the well-known
    checkerboard.
    """

    def decode(image: Tensor) -> Tensor:
        weight = torch.outer(torch.tensor(kernel), torch.tensor(kernel)).to(image.dtype)
        weight = 4 * weight / weight.sum()  # keeps the mean brightness
        latent = F.pad(F.avg_pool2d(image, 2), (1, 1, 1, 1), mode="replicate")
        up = F.conv_transpose2d(latent.flatten(0, 1).unsqueeze(1), weight[None, None], stride=2)
        up = up.squeeze(1).unflatten(0, latent.shape[:2])
        top = 1 + len(kernel) // 2
        h, w = image.shape[-2:]
        return up[..., top : top + h, top : top + w]

    return decode


def _pixel_shuffle(image: Tensor) -> Tensor:
    """Sub-pixel convolution: four 3x3 filters, one for each pixel of a 2x2 cell.

    They are bilinear weights, each a little off in its own way, as learned ones are.
    """
    generator = torch.Generator().manual_seed(0)
    ramp = {0: torch.tensor([0.25, 0.75, 0.0]), 1: torch.tensor([0.0, 0.75, 0.25])}
    weight = torch.stack([torch.outer(ramp[y], ramp[x]) for y in (0, 1) for x in (0, 1)])
    weight = weight + 0.06 * torch.randn(weight.shape, generator=generator)
    weight = weight / weight.sum((1, 2), keepdim=True) * torch.tensor([0.95, 1.02, 1.06, 0.97]).view(4, 1, 1)
    latent = F.pad(F.avg_pool2d(image, 2), (1, 1, 1, 1), mode="replicate")
    n, c = latent.shape[:2]
    cells = F.conv2d(latent.flatten(0, 1).unsqueeze(1), weight.unsqueeze(1).to(image.dtype))
    return F.pixel_shuffle(cells, 2).squeeze(1).unflatten(0, (n, c))


def _unpool(image: Tensor) -> Tensor:
    """Max-pooling undone at the places that the maxima came from; gaps are filled from their neighbours."""
    n, c = image.shape[:2]
    pooled, where = F.max_pool2d(image, 2, return_indices=True)
    sparse, mask = F.max_unpool2d(pooled, where, 2), F.max_unpool2d(torch.ones_like(pooled), where, 2)
    taps = torch.tensor([0.2, 0.7, 1.0, 0.7, 0.2]).to(image.dtype)
    weight = torch.outer(taps, taps)[None, None]
    total, count = (F.conv2d(t.flatten(0, 1).unsqueeze(1), weight, padding=2) for t in (sparse, mask))
    return (total / count).squeeze(1).unflatten(0, (n, c))


def _quincunx(image: Tensor) -> Tensor:
    """Keep the black squares of a chessboard of pixels; every white one becomes its four neighbours' mean."""
    n, c, h, w = image.shape
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=image.dtype) / 4
    padded = F.pad(image, (1, 1, 1, 1), mode="reflect")
    mean = F.conv2d(padded.flatten(0, 1).unsqueeze(1), cross[None, None]).view(n, c, h, w)
    white = (torch.arange(h)[:, None] + torch.arange(w)[None, :]) % 2 == 1
    return torch.where(white, mean, image)


def _codebook(image: Tensor) -> Tensor:
    """Each 2x2 cell keeps its mean; its three details are rounded to a few values, as by a codebook."""
    a, b, c, d = F.pixel_unshuffle(image, 2).unflatten(1, (-1, 4)).unbind(2)
    mean, dx, dy, dd = (a + b + c + d) / 4, (a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4
    dx, dy, dd = ((t / 0.06).round() * 0.06 for t in (dx, dy, dd))
    cells = torch.stack(
        [mean + dx + dy + dd, mean - dx + dy - dd, mean + dx - dy - dd, mean - dx - dy + dd], 2
    )
    return F.pixel_shuffle(cells.flatten(1, 2), 2)


def _resize_convolution(image: Tensor) -> Tensor:
    """Nearest-neighbour enlargement, then a 3x3 convolution, the usual cure for checkerboards."""
    up = F.pad(_interpolate("nearest")(image), (1, 1, 1, 1), mode="replicate")
    taps = torch.tensor([-0.1, 1.2, -0.1])
    return (
        F.conv2d(up.flatten(0, 1).unsqueeze(1), torch.outer(taps, taps)[None, None].to(image.dtype))
        .squeeze(1)
        .unflatten(0, image.shape[:2])
    )


DECODERS: dict[str, Decoder] = {
    "nearest": _interpolate("nearest"),
    "transposed": _transposed([0.58, 1.0, 0.58]),
    "shuffle": _pixel_shuffle,
    "bicubic": _interpolate("bicubic"),
    "transposed4": _transposed([0.3, 0.7, 0.8, 0.2]),
    "bilinear": _interpolate("bilinear"),
    "unpool": _unpool,
    "codebook": _codebook,
    "resizeconv": _resize_convolution,
    "quincunx": _quincunx,
}
