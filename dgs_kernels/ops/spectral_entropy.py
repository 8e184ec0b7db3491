"""Spectral entropy of image patches: how evenly a patch's energy is spread over spatial frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
EPS = 1e-12

# Patches transformed at once: their spectra stay in a core's cache.
_CHUNK = 64


def spectral_entropy(images: Tensor, patch_size: int = 32) -> Tensor:
    """Entropy in bits of the normalised power spectrum of every patch's luma.

    With x the luma of a patch in 0..1 and E = |FFT2(x)|^2, p = E / (sum E + 1e-12) and the result is
    -sum p log2(p + 1e-12) (DGS-Net's patch selection). A constant patch has 0; noise comes near
    2 log2(patch_size). Computed in float32, or float64 for float64 images.

    Args:
        images: [B, 3, H, W] RGB, uint8 in 0..255 or floating point in 0..1, any strides. H and W are cut
            from the bottom and the right to multiples of the patch size.
        patch_size: side of a patch in pixels.

    Returns:
        [B, rows * columns], patches in row-major order; float64 for float64 images, else float32.

    Raises:
        ValueError: the shape or the patch size does not fit.

    Example:
        >>> import torch
        >>> from dgs_kernels.ops.spectral_entropy import spectral_entropy
        >>> spectral_entropy(torch.full((1, 3, 64, 96), 255, dtype=torch.uint8)).shape
        torch.Size([1, 6])
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    luma = _luma(images[:, :, : rows * patch_size, : columns * patch_size])
    patches = luma.reshape(batch, rows, patch_size, columns, patch_size).transpose(2, 3)
    patches = patches.reshape(-1, patch_size, patch_size)
    if not len(patches):
        return luma.new_zeros(batch, rows * columns)
    return torch.cat([_entropy(chunk) for chunk in patches.split(_CHUNK)]).reshape(batch, rows * columns)


def _luma(images: Tensor) -> Tensor:
    scale = 1.0 if images.is_floating_point() else 1 / 255
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    red, green, blue = images.to(dtype).unbind(1)
    luma = red * (LUMA[0] * scale)
    return luma.add_(green, alpha=LUMA[1] * scale).add_(blue, alpha=LUMA[2] * scale)


def _entropy(patches: Tensor) -> Tensor:
    """[n, S, S] real -> [n]. The spectrum of a real patch is symmetric: half of it, counted twice, is all."""
    size = patches.shape[-1]
    energy = torch.view_as_real(torch.fft.rfft2(patches)).square().sum(-1)
    copies = energy.new_full((energy.shape[-1],), 2.0)
    copies[0] = 1.0
    if size % 2 == 0:
        copies[-1] = 1.0
    share = energy / (energy.sum(1) @ copies + EPS)[:, None, None]
    return -((share * torch.log2(share + EPS)).sum(1) @ copies)
