"""spectral_entropy: an image of `rows` x `dim` bytes as decoders leave it, read once.

`dtype` does not matter. The NumPy loop, one patch after the other on one thread, is how such code is usually
written.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference

SIZE = 32


def numpy_loop(images: Tensor) -> Tensor:
    image = images[0].permute(1, 2, 0).cpu().numpy()
    luma = image.astype(np.float32) @ np.array(reference.LUMA, np.float32) / np.float32(255)
    entropies = []
    for y in range(0, luma.shape[0] - SIZE + 1, SIZE):
        for x in range(0, luma.shape[1] - SIZE + 1, SIZE):
            energy = np.abs(np.fft.fft2(luma[y : y + SIZE, x : x + SIZE])) ** 2
            share = energy / (energy.sum() + reference.ENTROPY_EPS)
            entropies.append(-(share * np.log2(share + reference.ENTROPY_EPS)).sum())
    return torch.tensor([entropies], dtype=torch.float32, device=images.device)


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    def inputs() -> tuple[Tensor]:
        pixels = torch.randint(0, 256, (1, rows, dim, 3), dtype=torch.uint8, device=device)
        return (pixels.permute(0, 3, 1, 2),)

    torch._dynamo.reset()
    return harness.Case(
        operation="spectral_entropy",
        inputs=inputs,
        bytes_moved=3 * rows * dim,
        variants={
            **harness.per_backend("spectral_entropy", device, dgs_kernels.spectral_entropy),
            harness.EAGER: harness.through("eager", dgs_kernels.spectral_entropy),
            harness.COMPILED: torch.compile(reference.spectral_entropy, dynamic=False),
            "NumPy loop": numpy_loop,
        },
        exact=lambda images: reference.spectral_entropy(images.double() / 255),
    )
