"""gramian and combine_: the CUDA kernels on the CPU against the reference in float64."""

from ctypes import addressof

import pytest
import torch

from dgs_kernels import reference
from tests.csrc.cuda_on_host import host
from tests.csrc.cuda_on_host.host import (
    DTYPES,
    NEW_STREAM,
    call,
    compute,
    launches,
    make,
    nans,
    order_of_threads,
    pointer,
    struct,
)
from tests.csrc.cuda_on_host.lists import LAYERS, MAKE_TABLES

# This fixture runs around every case.
__all__ = ["order_of_threads"]

ObjectivesTensor = struct(f"""
    i64: numel group
    ptr: grad {" ".join(f"objective_{k}" for k in range(16))}
""")
Objectives = struct("""
    i32: dtype count
    ptr: tensors
    i64: num_tensors num_groups
    ptr: gramian weights
    i64: weights_stride
""")


def objectives_case(count, sizes, groups, dtype, *, shift=0, in_place=False, one_weight=False):
    """gramian in two launches and combine_ in one, on the same lists."""
    wide, num_groups = compute(dtype), max(groups) + 1
    lists = [
        [make(n, dtype=dtype, seed=20 * k + i, shift=shift) for i, n in enumerate(sizes)]
        for k in range(count)
    ]
    grads = lists[-1] if in_place else [nans(n + shift, dtype=dtype)[shift:] for n in sizes]
    weights = make(*([] if one_weight else [num_groups]), count, dtype=wide, seed=5)
    out = nans(num_groups, count, count, dtype=wide)

    def expected(to):
        of_type = [[t.to(to) for t in tensors] for tensors in lists]
        combined = reference.combine_(of_type[0], of_type, weights.to(compute(to)), groups)
        return reference.gramian(of_type, groups), combined

    (exact, exact_sums), (plain, plain_sums) = map(expected, [torch.float64, dtype])

    def arguments(written):
        tensors = (ObjectivesTensor * len(sizes))(
            *(
                ObjectivesTensor(n, group, pointer(grad), *(pointer(tensors[i]) for tensors in lists))
                for i, (n, group, grad) in enumerate(zip(sizes, groups, written))
            )
        )
        stride = 0 if one_weight else count
        given = Objectives(
            DTYPES.index(dtype), count, addressof(tensors), len(sizes), num_groups, pointer(out),
            pointer(weights), stride,
        )  # fmt: skip
        return given, tensors

    stream, before = NEW_STREAM(), launches()
    given, _keep = arguments([None] * len(sizes))
    call("gramian", given, stream=stream)
    call("gramian", given, stream=stream)
    assert launches() - before == MAKE_TABLES + 2 * 2
    host.check(out, exact, plain, size=exact.abs().max().item(), what=f"gramian {count} {sizes} {dtype}")
    before = launches()
    given, _keep = arguments(grads)
    call("combine_", given, stream=stream)
    assert launches() - before == MAKE_TABLES + 1
    for i, (result, e, p) in enumerate(zip(grads, exact_sums, plain_sums)):
        host.check(result, e, p, size=count, what=f"combine_ {count} tensor {i} of {sizes} {dtype}")


@pytest.mark.parametrize(
    ("count", "dtype"), [*((2, dtype) for dtype in DTYPES), (16, torch.float32)], ids=str
)
def test_objectives(count, dtype):
    objectives_case(count, [768, 32, 9000], [0, 1, 0], dtype)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 9, 15])
def test_objectives_of_other_numbers(count):
    """Up to a kernel's own number, and just beyond that of the kernel before it."""
    objectives_case(count, [40], [0], torch.float32)


@pytest.mark.parametrize(
    ("count", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (16, torch.bfloat16)], ids=str
)
def test_objectives_of_odd_tensors(count, dtype):
    """Empty, misaligned and of odd lengths; in place of one of them; the same weights for all layers."""
    objectives_case(count, [767, 1, 4099, 0, 16], LAYERS, dtype, shift=1, in_place=True)
    objectives_case(count, [8, 0, 5000, 0, 16], [0, 1, 0, 2, 1], dtype, one_weight=True)
