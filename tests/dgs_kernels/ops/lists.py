"""Lists of tensors in layers, for all operations on them: drawn, copied, laid out and compared."""

from __future__ import annotations

import numpy as np
import torch

from dgs_kernels import reference
from tests.dgs_kernels.ops.test_project_align import exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 41), (1,), (0,), (5,), (2, 3, 4), (1023,), (9001,), (64, 6), (7,))
GROUPS = (0, 1, 1, 2, 0, 2, 3, 4, 3)


def draw(shapes=SHAPES, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def doubles(tensors):
    return None if tensors is None else [t.double() for t in tensors]


def clones(tensors):
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


def assert_accurate(out, grads, harmful, beneficial, groups, **options) -> None:
    """Layer by layer at most twice the error of the plain formula in the same dtype, plus half a unit."""
    plain = reference.project_align_(grads, harmful, beneficial, groups, **options)
    for layer in reference.layers(groups):
        out_row, plain_row, g, h, b = (row(t, layer) for t in (out, plain, grads, harmful, beneficial))
        if len(g):
            want = exact(g, h, b, **options)
            errors = (x.double().cpu().numpy() - want for x in (out_row, plain_row))
            ours, theirs = (np.linalg.norm(e.astype(float)) for e in errors)
            units = 0.5 if len(g) >= 100 else 2.0
            size = float(g.double().norm()) + (0 if b is None else float(b.double().norm()))
            assert ours <= 2 * theirs + units * torch.finfo(g.dtype).eps * size
    assert [t.dtype for t in out] == [t.dtype for t in grads]


def row(tensors, layer):
    return None if tensors is None else torch.cat([tensors[i].reshape(-1) for i in layer])


def aligned_but_one(*lists):
    """The lists again and again, each time with another tensor one number behind where it could begin."""

    def placed(t, offset):
        return t.new_empty(t.numel() + offset)[offset:].view_as(t).copy_(t)

    count = sum(map(len, lists))
    for odd in range(count):
        offsets = iter([int(i == odd) for i in range(count)])
        yield [[placed(t, next(offsets)) for t in ts] for ts in lists]


def thrice_removed(grads, beneficial, edited, alignment):
    """What surgery leaves where the inner products it is given are three times the tensors' own."""
    aligned = [g + alignment * b.clamp(max=0) for g, b in zip(grads, beneficial)]
    return [a - 3 * (a - e) for a, e in zip(aligned, edited)]


class Marked(torch.Tensor):
    """A subclass that has no say in what operators do."""
