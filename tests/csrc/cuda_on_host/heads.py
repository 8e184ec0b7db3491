"""surgery_head and its backward: the CUDA kernels on the CPU against the reference in float64."""

from ctypes import c_int64

import pytest
import torch

from dgs_kernels import reference
from tests.csrc.cuda_on_host import host
from tests.csrc.cuda_on_host.host import (
    DTYPES,
    LIBRARY,
    ORDERS,
    call,
    compute,
    launches,
    make,
    nans,
    order_of_threads,
    pointer,
    struct,
)
from tests.csrc.cuda_on_host.rows import stride

# This fixture runs around every case.
__all__ = ["order_of_threads"]

SurgeryHead = struct("""
    i32: dtype expert
    ptr: features teacher_features text_features
    i64: features_stride teacher_stride text_stride
    ptr: labels offsets image_weight teacher_weight text_weight image_bias teacher_bias text_bias
    i64: batch dim
    f64: reference_batch_size distillation
    ptr: losses logits residuals head_grads differences workspace
""")
SurgeryHeadBackward = struct("""
    i32: dtype order
    ptr: residuals image_weight teacher_weight text_weight image_scale alignment_scale
    ptr: differences distillation_scale
    i64: batch dim
    f64: reference_batch_size eps distillation
    ptr: grad_features
    i32: wide
""")


def surgery_head_case(
    dtype,
    batch,
    dim,
    *,
    reference_batch_size=None,
    order="align_first",
    with_text=True,
    expert=False,
    distillation=0.0,
    shift=0,
):
    wide = compute(dtype)
    features, teacher, text = (make(batch, dim, dtype=dtype, seed=i, shift=shift) for i in range(3))
    text = text if with_text else None
    labels = (torch.arange(batch) % 2).to(wide)
    offsets = make(batch, dtype=wide, seed=9) if expert else None
    weights = [make(1, dim, dtype=wide, seed=3 + i) * dim**-0.5 for i in range(3)]
    biases = [make(1, dtype=wide, seed=6 + i) for i in range(3)]
    if not with_text:
        weights[2] = biases[2] = None
    losses, logits, residuals = (nans(*shape, dtype=wide) for shape in [(4,), (3, batch), (3, batch)])
    head_grads = nans(2, dim + 1, dtype=wide)
    differences = nans(batch * dim + shift, dtype=dtype)[shift:] if distillation else None
    LIBRARY.c_surgery_head_workspace.restype = c_int64
    workspace = nans(LIBRARY.c_surgery_head_workspace(c_int64(batch), c_int64(dim)), dtype=wide)

    before = launches()
    matrices = [features, teacher, text]
    arguments = SurgeryHead(
        DTYPES.index(dtype), expert, *map(pointer, matrices), *map(stride, matrices), pointer(labels),
        pointer(offsets), *map(pointer, weights), *map(pointer, biases), batch, dim,
        reference_batch_size or 0, distillation,
        *map(pointer, [losses, logits, residuals, head_grads, differences, workspace]),
    )  # fmt: skip
    call("surgery_head", arguments)
    assert launches() - before <= 2

    def forward(to):
        heads = [None if t is None else t.to(to) for pair in zip(weights, biases) for t in pair]
        tensors = [None if t is None else t.to(to) for t in matrices]
        return reference.surgery_head(
            *tensors, labels.to(to), *heads, reference_batch_size, expert, offsets, distillation
        )

    results = losses, logits, residuals, head_grads
    exact = forward(torch.float64)
    for name, result, e, p in zip(
        ["losses", "logits", "residuals", "head_grads"], results, exact, forward(wide)
    ):
        host.check(result, e, p, size=1.0, what=f"{name} {dtype} {batch}x{dim}")
    if distillation:
        differences = differences.view(batch, dim)
        host.check_equal(differences, (features.to(wide) - teacher.to(wide)).to(dtype))

    scales = torch.tensor([3.0, 0.7, 2.0], dtype=wide)
    out = nans(batch * dim + shift, dtype=dtype)[shift:]
    arguments = SurgeryHeadBackward(
        DTYPES.index(dtype), ORDERS.index(order), pointer(residuals), *map(pointer, weights), pointer(scales),
        pointer(scales[1:]), pointer(differences), pointer(scales[2:]), batch, dim, reference_batch_size or 0,
        1e-6, distillation, pointer(out), wide == torch.float64,
    )  # fmt: skip
    before = launches()
    call("surgery_head_backward", arguments)
    assert launches() - before <= 1

    def backward(to):
        heads = [None if w is None else w.to(to) for w in weights]
        options = dict(out_dtype=min(to, dtype, key=lambda t: t.itemsize) if to == wide else to)
        return reference.surgery_head_backward(
            residuals.to(to),
            *heads,
            *scales[:2].to(to),
            order=order,
            reference_batch_size=reference_batch_size,
            differences=differences,
            distillation_scale=scales[2],
            distillation=distillation,
            **options,
        )

    size = 10 * dim**-0.5 / max(batch, 1)
    host.check(
        out.view(batch, dim), backward(torch.float64), backward(wide), size, f"backward {dtype} {batch}x{dim}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 5), (1, 1), (3, 123), (19, 768), (5, 1023), (9, 1024), (3, 4096)], ids=str
)
def test_surgery_head_shapes(dtype, shape):
    surgery_head_case(dtype, *shape)
    surgery_head_case(dtype, *shape, expert=True, distillation=0.3, shift=1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 65537), (1400, 8)], ids=["read twice", "several rows to a team"])
def test_surgery_head_large(shape):
    surgery_head_case(torch.float32, *shape, expert=True, distillation=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [776, 777], ids=["staged", "in registers"])
def test_surgery_head_rows_of_several_warps_one_after_the_other(dim):
    """A chunk has several rows and a row several warps: what they add up must not meet the next row's."""
    surgery_head_case(torch.float32, 530, dim)


@pytest.mark.parametrize("reference_batch_size", [None, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("with_text", [True, False])
def test_surgery_head_options(reference_batch_size, order, with_text):
    options = dict(reference_batch_size=reference_batch_size, order=order, with_text=with_text)
    surgery_head_case(torch.float32, 6, 64, **options)
    surgery_head_case(torch.bfloat16, 6, 64, shift=1, **options)
    surgery_head_case(torch.float16, 6, 64, expert=True, distillation=0.3, **options)
