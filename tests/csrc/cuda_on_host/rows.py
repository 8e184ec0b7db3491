"""project_align: the CUDA kernels on the CPU against the reference in float64."""

import pytest
import torch

from dgs_kernels import reference
from tests.csrc.cuda_on_host import host
from tests.csrc.cuda_on_host.host import (
    DTYPES,
    ORDERS,
    RULES,
    WITH_AND_WITHOUT_CLUSTERS,
    call,
    clusters_serve,
    compute,
    launches,
    make,
    nans,
    order_of_threads,
    pointer,
    struct,
)

# This fixture runs around every case.
__all__ = ["order_of_threads"]

ProjectAlign = struct("""
    ptr: grad harmful beneficial scale out
    i64: rows dim grad_stride harmful_stride beneficial_stride out_stride
    f64: alignment eps
    i32: order rule dtype
""")


def stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


def project_align(grad, harmful, beneficial, *, alignment, scale, order, rule, out, eps=1e-6):
    rows, dim = grad.shape
    tensors = [grad, harmful, beneficial]
    factor = None if scale is None else torch.tensor(scale, dtype=compute(grad.dtype))
    arguments = ProjectAlign(
        *map(pointer, tensors), pointer(factor), pointer(out), rows, dim, *map(stride, tensors), stride(out),
        alignment, eps, ORDERS.index(order), RULES.index(rule), DTYPES.index(grad.dtype),
    )  # fmt: skip
    call("project_align", arguments)
    return out


SHAPES = [(0, 5), (1, 1), (3, 1), (67, 5), (3, 123), (5, 768), (3, 1023), (9, 1024), (3, 4096), (1, 16388)]


def project_align_case(dtype, rows, dim, *, order, rule, aligned, broadcast=False, shift=0):
    grad = make(rows, dim, dtype=dtype, seed=1, shift=shift)
    harmful = make(1 if broadcast else rows, dim, dtype=dtype, seed=2, shift=shift).expand(rows, dim)
    beneficial = make(rows, dim, dtype=dtype, seed=3, shift=shift) if aligned else None
    if rows > 1 and not broadcast:
        # The positive part of this row is zero, so there is nothing to project.
        harmful[1] = -1
    out = nans(rows * dim + shift, dtype=dtype)[shift:].view(rows, dim)
    project_align(grad, harmful, beneficial, alignment=0.4, scale=0.5, order=order, rule=rule, out=out)

    def expected(to):
        tensors = [None if t is None else t.to(to) for t in (grad, harmful, beneficial)]
        return reference.project_align(*tensors, alignment=0.2, order=order, rule=rule)

    host.check(out, expected(torch.float64), expected(dtype), size=4.0, what=f"{dtype} {rows}x{dim}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_align_shapes(dtype, shape):
    project_align_case(dtype, *shape, order="align_first", rule="positive", aligned=True)


@pytest.mark.parametrize(
    ("dtype", "rows", "dim"),
    [
        (torch.float32, 16931, 20),
        (torch.float32, 707, 764),
        (torch.float32, 265, 2044),
        (torch.bfloat16, 1411, 760),
    ],
)
def test_project_align_of_many_rows(dtype, rows, dim):
    """So many that a thread has more than a pack."""
    project_align_case(dtype, rows, dim, order="project_first", rule="positive", aligned=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("aligned", [True, False])
def test_project_align_options(order, rule, aligned):
    project_align_case(torch.float32, 9, 96, order=order, rule=rule, aligned=aligned)
    project_align_case(torch.bfloat16, 9, 97, order=order, rule=rule, aligned=aligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_align_misaligned_and_broadcast(dtype):
    options = dict(order="project_first", rule="positive", aligned=True)
    project_align_case(dtype, 4, 768, shift=1, **options)
    project_align_case(dtype, 4, 768, broadcast=True, **options)


@pytest.mark.parametrize("dim", [5, 8])
def test_project_align_rows_that_lie_apart(dim):
    """Each begins on a boundary, whether or not it ends on one; what lies between them is left alone."""
    tensors = [make(4, 12, dtype=torch.float32, seed=i)[:, :dim] for i in range(3)]
    room = nans(4, 12, dtype=torch.float32)
    options = dict(order="align_first", rule="positive")
    project_align(*tensors, alignment=1.0, scale=None, out=room[:, :dim], **options)
    exact = reference.project_align(*(t.double() for t in tensors), alignment=1.0, **options)
    host.check(room[:, :dim], exact, reference.project_align(*tensors, alignment=1.0, **options), size=4.0)
    assert room[:, dim:].isnan().all()


@WITH_AND_WITHOUT_CLUSTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [20000, 20001, 65537])
def test_project_align_long_rows(dtype, dim, device, code):
    clusters, before = clusters_serve(device, code), launches()
    project_align_case(dtype, 1, dim, order="align_first", rule="positive", aligned=True)
    in_registers = clusters and dim * (1 if dim % 2 == 0 else 2) * (dtype.itemsize // 4) <= 131072
    assert launches() - before == (1 if in_registers else 2)


@pytest.mark.parametrize(("largest", "launched"), [(2, 2), (3, 1)])
def test_project_align_row_of_three_blocks(largest, launched):
    """A slice of a device may have room for fewer, which is known once it is asked."""
    host.LIBRARY.shim_set_largest_cluster(largest)
    before = launches()
    for _ in range(2):
        project_align_case(torch.float32, 1, 40000, order="align_first", rule="positive", aligned=True)
    assert launches() - before == 2 * launched


@pytest.mark.slow
@pytest.mark.parametrize("dim", [131072, 131073])
def test_project_align_longest_row_of_a_cluster(dim):
    before = launches()
    project_align_case(torch.float32, 2, dim, order="project_first", rule="full", aligned=True)
    assert launches() - before == (1 if dim == 131072 else 2)


@pytest.mark.slow
def test_project_align_row_of_millions():
    """Its parts are several steps long each, and their sums as accurate as plain PyTorch's."""
    project_align_case(torch.float32, 1, 2_000_003, order="align_first", rule="full", aligned=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["grad", "harmful", "beneficial"])
@pytest.mark.parametrize("rule", RULES)
def test_project_align_shows_what_is_not_finite(place, value, rule):
    tensors = {
        name: make(3, 64, dtype=torch.float32, seed=i)
        for i, name in enumerate(["grad", "harmful", "beneficial"])
    }
    tensors[place][1, 5] = -value if place == "beneficial" else value
    out = nans(3, 64, dtype=torch.float32)
    project_align(*tensors.values(), alignment=1.0, scale=None, order="align_first", rule=rule, out=out)
    exact = reference.project_align(*tensors.values(), rule=rule)
    assert not exact[1].isfinite().all()
    assert not out[1].isfinite().all()
    assert out[::2].isfinite().all()
