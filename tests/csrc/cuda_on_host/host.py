"""The CUDA kernels, built for the CPU with the host shim: what all cases share.

`test_cuda_on_host.py` builds the library with sanitizers and runs the cases beside this file in a process of
its own, because a sanitizer's runtime has to be loaded first.
"""

import ctypes
import itertools
import os
from ctypes import byref, c_bool, c_char_p, c_double, c_int32, c_int64, c_void_p

import pytest
import torch

from dgs_kernels import reference

torch.set_num_threads(1)
LIBRARY = ctypes.CDLL(os.environ["DGS_CUDA_ON_HOST"])
# The order is that of `enum DType`.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ORDERS = list(reference.ORDERS)
RULES = list(reference.RULES)
PARTS = ["all", "sums", "apply"]
# An H200's cache has this size.
CACHE_BYTES = 50 << 20


def struct(fields):
    """A ctypes structure from lines of `type: names`."""
    types = {"ptr": c_void_p, "bool": c_bool, "i32": c_int32, "i64": c_int64, "f64": c_double}
    pairs = (line.split(":") for line in fields.strip().splitlines())
    members = [(name, types[kind.strip()]) for kind, names in pairs for name in names.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


def call(name, *arguments, stream=None):
    """Structures go by reference; `stream` is a number, for functions that take one."""
    function = getattr(LIBRARY, f"c_{name}")
    function.restype = c_char_p
    error = function(*(byref(a) for a in arguments), *([] if stream is None else [c_void_p(stream)]))
    assert error is None, error.decode()


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def launches():
    return LIBRARY.shim_launches()


class Launch(ctypes.Structure):
    """What the shim tells of a launch."""

    _fields_ = [
        ("kernel", c_void_p),
        *((name, ctypes.c_uint32) for name in ("grid", "threads", "cluster", "shared")),
        ("params", c_void_p),
        ("params_bytes", ctypes.c_uint64),
    ]


ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Launch))
AFTER_BLOCK = ctypes.CFUNCTYPE(None)
# Tables of lists are kept for each stream, so a new stream has none yet.
NEW_STREAM = itertools.count(1).__next__


@pytest.fixture(autouse=True, params=["forward", "shuffled"])
def order_of_threads(request):
    """Cases run with the blocks and threads in two orders: no result may depend on it.

    Backward, each warp as far as it can, with the blocks shuffled; then forward, all threads in turn, where a
    case is short, and in one type, since barriers are the same in all.
    """
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if request.param == "forward" and (dtype != torch.float32 or request.node.get_closest_marker("slow")):
        pytest.skip("runs in one order")
    LIBRARY.shim_set_order(["forward", "shuffled"].index(request.param))
    LIBRARY.shim_set_largest_cluster(16)
    LIBRARY.shim_set_cache_bytes(CACHE_BYTES)
    LIBRARY.shim_set_compiled_for(90)
    LIBRARY.shim_set_capturing(False)
    yield
    assert LIBRARY.c_left_behind() == 0


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
        # The exact answer is itself computed in float64.
        floor *= 8
    allowed = 2 * (plain.double() - exact).abs().max().item() + floor
    error = (result.double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def check_equal(result, expected):
    assert torch.equal(result, expected)


def clusters_serve(device, code):
    """Whether clusters are there: the device may grant them, and the loaded code have their instructions."""
    LIBRARY.shim_set_largest_cluster(8 if device else 1)
    LIBRARY.shim_set_compiled_for(code)
    return device and code >= 90


WITH_AND_WITHOUT_CLUSTERS = pytest.mark.parametrize(
    ("device", "code"),
    [(True, 90), (False, 80), (True, 80)],
    ids=["clusters", "no clusters", "clusters, but compiled for 8.0+PTX"],
)
