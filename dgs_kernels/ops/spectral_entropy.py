"""Spectral entropy of image patches: how evenly a patch's energy is spread over spatial frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
EPS = 1e-12

# Patches transformed at once, so that their spectra stay in a core's cache.
_CHUNK = 128


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
    if not batch * rows * columns:
        return _luma(images[:, :, :0, :0]).reshape(batch, rows * columns)
    cut = images[:, :, : rows * patch_size, : columns * patch_size]
    bands = cut.split(patch_size * max(1, _CHUNK // (batch * columns)), dim=2)
    return torch.cat([_entropies(_luma(band), patch_size) for band in bands], dim=1)


def _luma(images: Tensor) -> Tensor:
    scale = 1.0 if images.is_floating_point() else 1 / 255
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    # A decoded image's channels alternate byte by byte: parting them before converting is faster.
    red, green, blue = (x.to(dtype).mul_(c * scale) for x, c in zip(images.contiguous().unbind(1), LUMA))
    return red.add_(green).add_(blue)


def _entropies(luma: Tensor, size: int) -> Tensor:
    """[B, rows * size, columns * size] -> [B, rows * columns]."""
    batch, height, width = luma.shape
    patches = luma.reshape(batch, height // size, size, width // size, size).transpose(2, 3)
    # The spectrum of real numbers is symmetric: half of it, most of that counted twice, is all of it.
    squares = torch.view_as_real(torch.fft.rfft2(patches)).square()
    energy = squares[..., 0] + squares[..., 1]
    copies = luma.new_full((energy.shape[-1],), 2.0)
    copies[0] = 1.0
    if size % 2 == 0:
        copies[-1] = 1.0
    share = energy / (energy.sum(-2) @ copies + EPS)[..., None, None]
    return -((share * torch.log2(share + EPS)).sum(-2) @ copies).flatten(1)
