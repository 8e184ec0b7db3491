"""spectral_entropy: images of `dim` x `dim` bytes, as decoders leave them, read once.

They have `rows` rows together: 65536 x 1024 are 64 images. Fewer rows than `dim` are one lower image. `dtype`
does not matter. The NumPy loop, one patch after the other on one thread, is how such code is usually written;
on a GPU, where images are many, it is left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference

SIZE = 32


def numpy_loop(images: Tensor) -> Tensor:
    entropies = []
    for image in images.permute(0, 2, 3, 1).numpy():
        luma = image.astype(np.float32) @ np.array(reference.LUMA, np.float32) / np.float32(255)
        for y in range(0, luma.shape[0] - SIZE + 1, SIZE):
            for x in range(0, luma.shape[1] - SIZE + 1, SIZE):
                energy = np.abs(np.fft.fft2(luma[y : y + SIZE, x : x + SIZE])) ** 2
                share = energy / (energy.sum() + reference.ENTROPY_EPS)
                entropies.append(-(share * np.log2(share + reference.ENTROPY_EPS)).sum())
    return torch.tensor(entropies, dtype=torch.float32).view(len(images), -1)


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    count = max(1, rows // dim)
    shape = (count, min(rows, dim), dim, 3)

    def inputs() -> tuple[Tensor]:
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        return (pixels.permute(0, 3, 1, 2),)

    torch._dynamo.reset()
    return harness.Case(
        operation="spectral_entropy",
        inputs=inputs,
        bytes_moved=math.prod(shape),
        variants={
            **harness.per_backend("spectral_entropy", device, dgs_kernels.spectral_entropy),
            harness.EAGER: harness.through("eager", dgs_kernels.spectral_entropy),
            harness.COMPILED: torch.compile(reference.spectral_entropy, dynamic=False),
            **({"NumPy loop": numpy_loop} if device == "cpu" else {}),
        },
        exact=lambda images: reference.spectral_entropy(images.double() / 255),
    )
