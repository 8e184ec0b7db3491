"""Spectral entropy in Triton: the portable GPU kernel behind `dgs::spectral_entropy`.

The image is read once. A patch's transform is two products with one 32 x 32 matrix whose columns are the
cosines and sines of a real transform, packed: a real signal of 32 numbers has 32 real Fourier coefficients.
2 x 32768 multiplications a patch, a quarter of what complex products would take, are about as long as reading
it from memory takes on a large GPU. Every program makes the matrix for its four patches, a twentieth of their
work: a matrix in memory would have to be kept for graphs, and there be sent within their capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.reference import ENTROPY_EPS, LUMA
from dgs_kernels.triton.project_align import multiple, row_start

SIZE = tl.constexpr(32)
# Neighbouring patches of one program: their rows of 128 pixels are whole cache lines.
PATCHES = 4
WARPS = 4
RED, GREEN, BLUE = (tl.constexpr(weight) for weight in LUMA)
EPS = tl.constexpr(ENTROPY_EPS)


@triton.jit
def _term(share):
    return share * tl.log2(share + EPS)


# [32, 32]: column 2k is cos(2 pi k n / 32) and column 2k + 1 its sine, save column 1: cos(pi n). The cosine
# of d / 32 of a circle is the sine of pi z / 2 at z = 1 - d / 8. Its polynomial is right to an ulp and a half
# at each of these z, and exact at -1, 0 and 1.
@triton.jit
def _basis():
    n, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    turn = n * (column // 2) - SIZE // 4 * (column % 2)
    turn = tl.where(column == 1, SIZE // 2 * n, turn) & (SIZE - 1)
    z = (tl.abs(turn - SIZE // 2) - SIZE // 4).to(tl.float32) / (SIZE // 4)
    square = z * z
    series = 1.51837147e-4 * square - 4.67445617e-3
    series = (series * square + 7.96900742e-2) * square - 6.45963773e-1
    return (series * square + 1.57079632) * z


# Of the strides only a pixel's has a kernel of its own where it is 1; ALIGNED speaks for all others.
@triton.jit(
    do_not_specialize=["images_ptr", "rows", "columns", "batch_stride", "channel_stride", "row_stride"],
    do_not_specialize_on_alignment=["pixel_stride"],
)
def _kernel(
    images_ptr,
    out_ptr,
    rows,
    columns,
    batch_stride,
    channel_stride,
    row_stride,
    pixel_stride,
    ALIGNED: tl.constexpr,
    SCALE: tl.constexpr,
    PATCHES: tl.constexpr,
):
    strips = tl.cdiv(columns, PATCHES)
    program = tl.program_id(0).to(tl.int64)
    strip, band = program % strips, program // strips
    patch_row, image = band % rows, band // rows

    y = tl.arange(0, SIZE)[:, None]
    x = strip * (PATCHES * SIZE) + tl.arange(0, PATCHES * SIZE)[None, :]
    inside = x < columns * SIZE
    at = row_start(images_ptr, image, batch_stride, ALIGNED)
    at += (patch_row * SIZE + y) * multiple(row_stride, ALIGNED) + x * pixel_stride
    channel_stride = multiple(channel_stride, ALIGNED)
    red = tl.load(at, inside, 0).to(tl.float32) * (RED * SCALE)
    green = tl.load(at + channel_stride, inside, 0).to(tl.float32) * (GREEN * SCALE)
    blue = tl.load(at + 2 * channel_stride, inside, 0).to(tl.float32) * (BLUE * SCALE)
    luma = tl.reshape(red + green + blue, (SIZE, PATCHES, SIZE))
    luma = tl.reshape(tl.permute(luma, (1, 0, 2)), (PATCHES * SIZE, SIZE))

    basis = _basis()
    # Along x, then along y: [patch, x frequency, y frequency], each axis as 16 pairs of cosine and sine.
    found = tl.dot(luma, basis, input_precision="ieee")
    found = tl.permute(tl.reshape(found, (PATCHES, SIZE, SIZE)), (0, 2, 1))
    found = tl.dot(tl.reshape(found, (PATCHES * SIZE, SIZE)), basis, input_precision="ieee")
    of_cosine, of_sine = tl.split(tl.permute(tl.reshape(found, (PATCHES, 16, 2, SIZE)), (0, 1, 3, 2)))
    cc, cs = tl.split(tl.reshape(of_cosine, (PATCHES, 16, 16, 2)))
    sc, ss = tl.split(tl.reshape(of_sine, (PATCHES, 16, 16, 2)))

    # The energies at (x, y) and (x, -y) from two pairs; (-x, -y) and (-x, y), their mirror images, have
    # the same. The first pair of an axis holds frequencies 0 and 16, which are their own.
    half_x = (tl.arange(0, 16) == 0)[None, :, None]
    half_y = (tl.arange(0, 16) == 0)[None, None, :]
    first = (cc - ss) * (cc - ss) + (cs + sc) * (cs + sc)
    second = (cc + ss) * (cc + ss) + (cs - sc) * (cs - sc)
    first = tl.where(half_x, cc * cc + cs * cs, tl.where(half_y, cc * cc + sc * sc, first))
    second = tl.where(half_x, sc * sc + ss * ss, tl.where(half_y, cs * cs + ss * ss, second))
    # Where both are, the four are four frequencies of their own, each there once.
    corner = half_x & half_y
    energy = tl.where(corner, cc * cc, 2 * first) + tl.where(corner, ss * ss + cs * cs + sc * sc, 2 * second)
    total = tl.sum(tl.sum(energy, 2), 1)[:, None, None] + EPS
    general = 2 * (_term(first / total) + _term(second / total))
    corners = (
        _term(cc * cc / total) + _term(cs * cs / total) + _term(sc * sc / total) + _term(ss * ss / total)
    )
    entropy = -tl.sum(tl.sum(tl.where(corner, corners, general), 2), 1)

    patch = strip * PATCHES + tl.arange(0, PATCHES)
    tl.store(out_ptr + band * columns + patch, entropy, patch < columns)


def spectral_entropy(images: Tensor, patch_size: int, out: Tensor) -> None:
    if not out.numel():
        return
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    with torch.cuda.device_of(images):
        _kernel[(batch * rows * triton.cdiv(columns, PATCHES),)](
            images,
            out,
            rows,
            columns,
            *images.stride(),
            ALIGNED=not any(n % 16 for n in (images.data_ptr(), *images.stride()[:3])),
            SCALE=1 / 255 if images.dtype == torch.uint8 else 1.0,
            PATCHES=PATCHES,
            num_warps=WARPS,
        )
