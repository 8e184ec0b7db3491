"""spectral_entropy: the CUDA kernels on the CPU against the reference in float64."""

import pytest
import torch

from dgs_kernels import reference
from tests.csrc.cuda_on_host import host
from tests.csrc.cuda_on_host.host import call, make, nans, order_of_threads, pointer, struct

# This fixture runs around every case.
__all__ = ["order_of_threads"]

SpectralEntropy = struct("""
    i32: is_uint8
    ptr: images
    i64: batch height width batch_stride channel_stride row_stride pixel_stride
    ptr: entropy
""")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"]
)
@pytest.mark.parametrize(
    ("batch", "height", "width", "shift"), [(2, 100, 160, 0), (1, 64, 97, 0), (3, 32, 32, 1)]
)
def test_spectral_entropy(dtype, layout, batch, height, width, shift):
    spectral_entropy_case(dtype, layout, batch, height, width, shift)


def spectral_entropy_case(dtype, layout, batch, height, width, shift):
    """Noise on a gradient, and a constant patch; sizes that are no multiple of 32; rows off alignment."""
    ramp = torch.linspace(0, 1, width).expand(batch, 3, height, width)
    pixels = (ramp + 0.2 * make(batch, 3, height, width, dtype=torch.float32, seed=1)).clamp(0, 1)
    pixels[0, :, :32, :32] = 0.5
    values = (pixels * 255).to(dtype) if dtype == torch.uint8 else pixels
    images = values.contiguous(memory_format=layout)
    room = torch.zeros(images.numel() + shift, dtype=dtype)
    images = room[shift:].as_strided(images.shape, images.stride()).copy_(images)
    out = nans(batch, height // 32 * (width // 32), dtype=torch.float32)
    arguments = SpectralEntropy(
        dtype == torch.uint8, pointer(images), batch, height, width, *images.stride(), pointer(out)
    )
    call("spectral_entropy", arguments)
    exact = reference.spectral_entropy(images.double() / (255 if dtype == torch.uint8 else 1))
    host.check(out, exact, reference.spectral_entropy(images), what=f"{dtype} {batch}x{height}x{width}")
