"""Spectral entropy of image patches: `dgs::spectral_entropy`, its schema, shape rules and fake kernel.

What an implementation has to do (`dgs_kernels.triton.spectral_entropy`; that of
`dgs_kernels._native` fills a result it is given)::

    spectral_entropy(Tensor images, int patch_size) -> Tensor

images [B, 3, H, W] are uint8 or float32, B >= 1, H and W at least the patch size. Channels and pixels lie
either planar, the pixels of a row next to each other and every other stride any, or interleaved as decoders
leave them: the three channels of a pixel next to each other, and then the next pixel's. The result is
float32 [B, (H // patch_size) * (W // patch_size)]. patch_size is `KERNEL_PATCH_SIZE`: other sizes, and
float64 images, are served by eager PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgs_kernels import backends
from dgs_kernels.ops.arguments import check_tensors, check_whole

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "spectral_entropy(Tensor images, int patch_size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


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
    _check(images, patch_size)
    return _op(images.detach(), patch_size)


def _check(images: Tensor, patch_size: int) -> None:
    check_tensors("spectral_entropy", images=images)
    check_whole("spectral_entropy", "patch_size", patch_size)
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"spectral_entropy: images must be [B, 3, H, W], got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"spectral_entropy: images must be uint8 or floating-point, got {images.dtype}")


def _result(images: Tensor, patch_size: int) -> Tensor:
    """Check the arguments and allocate the result."""
    _check(images, patch_size)
    batch, _, height, width = images.shape
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    return images.new_empty((batch, (height // patch_size) * (width // patch_size)), dtype=dtype)


def _kernel(images: Tensor, patch_size: int) -> Tensor:
    out = _result(images, patch_size)
    if not out.numel():
        return out
    case = None
    if patch_size != backends.KERNEL_PATCH_SIZE:
        case = f"its kernels serve patches of {backends.KERNEL_PATCH_SIZE} pixels"
    elif images.dtype == torch.float64:
        case = "its kernels compute in float32"
    elif images.dtype != torch.uint8:
        images = images.float()
    _, channel, _, pixel = images.stride()
    if case is None and pixel != 1 and (channel, pixel) != (1, 3):
        images = images.contiguous()
    images = backends.plain(images)
    serve = backends.implementation("spectral_entropy", images.device.type, case)
    if not backends.is_native(serve):
        return serve(images, patch_size)
    served = serve(images, out, patch_size)
    assert served, "a native function takes what has been checked and laid out"
    return out


_library.impl("spectral_entropy", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::spectral_entropy", _result, lib=_library)
_op = torch.ops.dgs.spectral_entropy.default
