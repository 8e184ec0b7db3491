"""The CUDA kernels, built for the CPU with the host shim, against the reference in float64.

`test_cuda_on_host.py` builds the library with sanitizers and runs this file in a process of its own, because
a sanitizer's runtime has to be loaded first.
"""

import ctypes
import os
from ctypes import byref, c_char_p, c_double, c_int32, c_int64, c_void_p

import pytest
import torch

from dgs_kernels import reference

torch.set_num_threads(1)
LIBRARY = ctypes.CDLL(os.environ["DGS_CUDA_ON_HOST"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of enum DType
ORDERS = list(reference.ORDERS)
RULES = list(reference.RULES)


def struct(fields):
    """A ctypes structure from lines of `type: names`."""
    types = {"ptr": c_void_p, "i32": c_int32, "i64": c_int64, "f64": c_double}
    pairs = (line.split(":") for line in fields.strip().splitlines())
    members = [(name, types[kind.strip()]) for kind, names in pairs for name in names.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


def call(name, *arguments):
    function = getattr(LIBRARY, f"c_{name}")
    function.restype = c_char_p
    error = function(*(byref(a) for a in arguments))
    assert error is None, error.decode()


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def launches():
    return LIBRARY.shim_launches()


@pytest.fixture(autouse=True, params=["forward", "reversed", "shuffled"])
def order_of_threads(request):
    """Every case runs with the blocks and threads in several orders: no result may depend on it."""
    LIBRARY.shim_set_order(["forward", "reversed", "shuffled"].index(request.param))
    LIBRARY.shim_set_clusters(True)


def compute(dtype):
    return reference.compute_dtype(torch.empty(0, dtype=dtype))


def nans(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def make(*shape, dtype, seed, shift=0):
    """Normal numbers; `shift` elements off a 16-byte boundary."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.cat([torch.zeros(shift, dtype=torch.float64), values]).to(dtype)[shift:].view(shape)


def check(result, exact, plain, size=0.0, what=""):
    """At most twice the error of plain PyTorch in the same type.

    Where that happens to be exact, one rounding; `size` is that of the numbers it is the difference of.
    """
    if not exact.numel():
        return
    rounding, inner_rounding = (torch.finfo(t).eps for t in (plain.dtype, compute(plain.dtype)))
    floor = rounding * exact.abs().max().item() + 2 * inner_rounding * size
    if plain.dtype == torch.float64:
        floor *= 8  # the exact answer is itself computed in float64
    allowed = 2 * (plain.double() - exact).abs().max().item() + floor
    error = (result.double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


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


def project_align_case(dtype, rows, dim, *, order, rule, aligned, broadcast=False, shift=0, clusters=True):
    LIBRARY.shim_set_clusters(clusters)
    grad = make(rows, dim, dtype=dtype, seed=1, shift=shift)
    harmful = make(1 if broadcast else rows, dim, dtype=dtype, seed=2, shift=shift).expand(rows, dim)
    beneficial = make(rows, dim, dtype=dtype, seed=3, shift=shift) if aligned else None
    if rows > 1 and not broadcast:
        harmful[1] = -1  # its positive part is zero: nothing to project
    out = nans(rows * dim + shift, dtype=dtype)[shift:].view(rows, dim)
    project_align(grad, harmful, beneficial, alignment=0.4, scale=0.5, order=order, rule=rule, out=out)

    def expected(to):
        tensors = [None if t is None else t.to(to) for t in (grad, harmful, beneficial)]
        return reference.project_align(*tensors, alignment=0.2, order=order, rule=rule)

    check(out, expected(torch.float64), expected(dtype), size=4.0, what=f"{dtype} {rows}x{dim}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_align_shapes(dtype, shape):
    project_align_case(dtype, *shape, order="align_first", rule="positive", aligned=True)


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


@pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "twin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [20001, 65536, 65537])
def test_project_align_long_rows(dtype, dim, clusters):
    project_align_case(dtype, 1, dim, order="align_first", rule="positive", aligned=True, clusters=clusters)


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
