"""Spectral entropy of image patches in plain PyTorch, for patches of any size and in float64 too."""

from __future__ import annotations

import torch
from torch import Tensor

from dgs_kernels import reference
from dgs_kernels.reference import ENTROPY_EPS

# Patches transformed at once, so that their spectra stay in a core's cache.
_PATCHES_AT_ONCE = 128


def spectral_entropy(images: Tensor, patch_size: int, out: Tensor) -> None:
    if not out.numel():
        return
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images[:, :, : rows * patch_size, : columns * patch_size]
    bands = cut.split(patch_size * max(1, _PATCHES_AT_ONCE // (batch * columns)), dim=2)
    torch.cat([_entropies(reference.luma(band), patch_size) for band in bands], dim=1, out=out)


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
    share = energy / (energy.sum(-2) @ copies + ENTROPY_EPS)[..., None, None]
    return -((share * torch.log2(share + ENTROPY_EPS)).sum(-2) @ copies).flatten(1)
