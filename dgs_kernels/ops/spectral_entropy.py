"""Spectral entropy of image patches: `dgs::spectral_entropy`.

What an implementation has to do with the operator's arguments and its result `out`; the schema is below.

images [B, 3, H, W] are uint8 or float32. Channels and pixels lie either planar, the pixels of a row next to
each other and every other stride any, or interleaved as decoders leave them: the three channels of a pixel
next to each other, and then the next pixel's. out is contiguous float32 [B, (H // patch_size) * (W //
patch_size)], and may be empty. patch_size is `KERNEL_PATCH_SIZE`: other sizes, and float64 images and
results, are served by eager PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgs_kernels.arguments import WHOLE, check_tensors, check_whole, refuse_forward_mode
from dgs_kernels.backends import KERNEL_PATCH_SIZE
from dgs_kernels.operation import Named, Operation
from dgs_kernels.tensors import plain


def spectral_entropy(images: Tensor, patch_size: int = 32) -> Tensor:
    """Entropy in bits of the normalised power spectrum of every patch's luma.

    With x the luma of a patch in 0..1 and E = |FFT2(x)|^2, p = E / (sum E + 1e-12) and the result is
    -sum p log2(p + 1e-12) (the patch selection of DGS-Net, arXiv 2511.13108). A constant patch has 0; noise
    comes near 2 log2(patch_size). Computed in float32, or float64 for float64 images. It ranks patches and
    is not differentiable: the result never requires grad.

    Args:
        images: [B, 3, H, W] RGB, uint8 in 0..255 or floating point in 0..1, any strides. H and W are cut
            from the bottom and the right to multiples of the patch size.
        patch_size: side of a patch in pixels. Fused kernels serve 32 on all types but float64.

    Returns:
        [B, rows * columns], patches in row-major order; float64 for float64 images, else float32.

    Raises:
        ValueError, TypeError: the shape, the type or the patch size does not fit.

    Example:
        >>> import torch
        >>> from dgs_kernels import spectral_entropy
        >>> spectral_entropy(torch.full((1, 3, 64, 96), 255, dtype=torch.uint8)).shape
        torch.Size([1, 6])
    """
    # This comes before detach() drops the tangent.
    refuse_forward_mode("spectral_entropy", images)
    return _operation(images.detach() if isinstance(images, Tensor) else images, patch_size)


def _check(a: Named) -> None:
    check_tensors("spectral_entropy", images=a.images)
    check_whole("spectral_entropy", "patch_size", a.patch_size)
    if a.images.dim() != 4 or a.images.shape[1] != 3:
        raise ValueError(f"spectral_entropy: images must be [B, 3, H, W], got {list(a.images.shape)}")
    if a.images.dtype != torch.uint8 and not a.images.is_floating_point():
        raise TypeError(f"spectral_entropy: images must be uint8 or floating-point, got {a.images.dtype}")


def _case(a: Named) -> str | None:
    if a.patch_size != KERNEL_PATCH_SIZE:
        return f"its kernels serve patches of {KERNEL_PATCH_SIZE} pixels"
    return "its kernels compute in float32" if a.images.dtype == torch.float64 else None


def _results(a: Named) -> tuple[Tensor] | None:
    if a.images.dim() != 4 or not isinstance(a.patch_size, WHOLE):
        return None
    batch, _, height, width = a.images.shape
    dtype = torch.float64 if a.images.dtype == torch.float64 else torch.float32
    patches = (height // a.patch_size) * (width // a.patch_size)
    return (a.images.new_empty((batch, patches), dtype=dtype),)


def _lay_out(a: Named) -> Named:
    images = a.images
    if _case(a) is None:
        images = images if images.dtype == torch.uint8 else images.float()
        _, channel, _, pixel = images.stride()
        images = images if pixel == 1 or (channel, pixel) == (1, 3) else images.contiguous()
    return a._replace(images=plain(images))


_operation = Operation(
    "spectral_entropy(Tensor images, int patch_size) -> Tensor",
    kinds=_check,
    lay_out=_lay_out,
    results=_results,
    case=_case,
)
