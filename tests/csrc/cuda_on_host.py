"""The CUDA kernels, built for the CPU with the host shim, against the reference in float64.

`test_cuda_on_host.py` builds the library with sanitizers and runs this file in a process of its own, because
a sanitizer's runtime has to be loaded first.
"""

import ctypes
import itertools
import os
from ctypes import addressof, byref, c_char_p, c_double, c_int32, c_int64, c_void_p

import pytest
import torch

from dgs_kernels import reference

torch.set_num_threads(1)
LIBRARY = ctypes.CDLL(os.environ["DGS_CUDA_ON_HOST"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of enum DType
ORDERS = list(reference.ORDERS)
RULES = list(reference.RULES)
PARTS = ["all", "sums", "apply"]


def struct(fields):
    """A ctypes structure from lines of `type: names`."""
    types = {"ptr": c_void_p, "i32": c_int32, "i64": c_int64, "f64": c_double}
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


NEW_STREAM = itertools.count(1).__next__  # tables of lists are kept per stream


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
        floor *= 8  # the exact answer is itself computed in float64
    allowed = 2 * (plain.double() - exact).abs().max().item() + floor
    error = (result.double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def check_equal(result, expected):
    assert torch.equal(result, expected)


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
    check(room[:, :dim], exact, reference.project_align(*tensors, alignment=1.0, **options), size=4.0)
    assert room[:, dim:].isnan().all()


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


@WITH_AND_WITHOUT_CLUSTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [20000, 20001, 65537])
def test_project_align_long_rows(dtype, dim, device, code):
    clusters, before = clusters_serve(device, code), launches()
    project_align_case(dtype, 1, dim, order="align_first", rule="positive", aligned=True)
    in_registers = clusters and dim * (1 if dim % 2 == 0 else 2) * (dtype.itemsize // 4) <= 131072
    assert launches() - before == (1 if in_registers else 2)


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
        check(result, e, p, size=1.0, what=f"{name} {dtype} {batch}x{dim}")
    if distillation:
        differences = differences.view(batch, dim)
        check_equal(differences, (features.to(wide) - teacher.to(wide)).to(dtype))

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
    check(
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


ListTensor = struct("""
    i64: numel group
    ptr: grad harmful beneficial param exp_avg exp_avg_sq
""")
TensorList = struct("""
    i32: dtype order rule part
    ptr: tensors
    i64: num_tensors num_groups
    ptr: sums scale
    f64: alignment eps
""")


def tensor_list(columns, groups, *, alignment, order, rule, part="all"):
    """A TensorList from lists of tensors by name; also its sums, and what it points to."""
    grads = columns["grad"]
    dtype, num_groups = grads[0].dtype, max(groups) + 1
    tensors = (ListTensor * len(grads))(
        *(
            ListTensor(
                **{name: pointer(column[i]) for name, column in columns.items()},
                numel=grads[i].numel(),
                group=groups[i],
            )
            for i in range(len(grads))
        )
    )
    sums = nans(num_groups, 6, dtype=compute(dtype))
    scale = torch.tensor(0.5, dtype=compute(dtype))
    arguments = TensorList(
        DTYPES.index(dtype), ORDERS.index(order), RULES.index(rule), PARTS.index(part), addressof(tensors),
        len(grads), num_groups, pointer(sums), pointer(scale), alignment * 2, 1e-6,
    )  # fmt: skip
    return arguments, sums, [tensors, scale]


def make_list(sizes, dtype, shift=0):
    return [
        [make(n, dtype=dtype, seed=10 * i + k, shift=shift) for i, n in enumerate(sizes)] for k in range(3)
    ]


def thrice_removed(grads, beneficial, edited, alignment):
    """What surgery leaves where the inner products it is given are three times the tensors' own."""
    aligned = [g + alignment * b.clamp(max=0) for g, b in zip(grads, beneficial)]
    return [a - 3 * (a - e) for a, e in zip(aligned, edited)]


def project_align_list_case(
    sizes, groups, dtype, *, launched, shift=0, parts=1, order="align_first", rule="positive"
):
    grads, harmful, beneficial = make_list(sizes, dtype, shift)
    options = dict(alignment=0.2, order=order, rule=rule)

    def expected(to):
        lists = [[t.to(to) for t in column] for column in (grads, harmful, beneficial)]
        sums = reference.layer_sums(*lists, groups, rule)
        edited = reference.project_align_(*lists, groups, **options)
        return (edited if parts == 1 else thrice_removed(lists[0], lists[2], edited, 0.2)), sums

    (exact, exact_sums), (plain, _), (_, plain_sums) = map(expected, [torch.float64, dtype, compute(dtype)])
    columns = dict(grad=grads, harmful=harmful, beneficial=beneficial)
    before, stream = launches(), NEW_STREAM()
    if parts == 1:
        arguments, sums, _keep = tensor_list(columns, groups, **options)
        call("project_align_", arguments, stream=stream)
    else:
        first, sums, _keep = tensor_list(columns, groups, part="sums", **options)
        call("project_align_", first, stream=stream)
        second, given, _keep = tensor_list(columns, groups, part="apply", **options)
        given.copy_(sums)
        given[:, [0, 3]] *= 3  # as if other processes had added theirs
        call("project_align_", second, stream=stream)
    assert launches() - before == MAKE_TABLES + launched
    check(sums, exact_sums, plain_sums, size=exact_sums.abs().max().item(), what=f"sums {sizes} {dtype}")
    for i, (result, e, p) in enumerate(zip(grads, exact, plain)):
        check(result, e, p, size=4.0, what=f"tensor {i} of {sizes} {dtype}")


MAKE_TABLES = 2  # launches: the tensors of a short list, and their chunks
LAYERS = [0, 0, 1, 2, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [[768, 32, 4096, 16, 10000], [768, 1, 4096, 0, 10001]], ids=["aligned", "odd"]
)
def test_project_align_list_in_one_launch(dtype, sizes):
    project_align_list_case(sizes, LAYERS, dtype, launched=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_project_align_list_options(order, rule):
    project_align_list_case([96, 5, 64, 7, 32], LAYERS, torch.float32, launched=1, order=order, rule=rule)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("last", "shift"), [(160_000, 0), (160_001, 0), (100_000, 1)])
def test_project_align_list_in_three_launches(dtype, last, shift):
    project_align_list_case([768, 16, 4096, 16, last], LAYERS, dtype, launched=3, shift=shift)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunks", "largest", "launched"),
    [(3, 8, 1), (8, 8, 1), (9, 8, 3), (9, 16, 1), (12, 16, 1), (16, 16, 1), (17, 16, 3)],
)
def test_project_align_list_of_so_many_chunks(chunks, largest, launched):
    """Of 8192 numbers each, a block's. Not every device has clusters of more than 8 blocks."""
    LIBRARY.shim_set_largest_cluster(largest)
    sizes = [8192 * (chunks - 1), 100, 8092]
    project_align_list_case(sizes, [0, 1, 0], torch.float32, launched=launched)


def test_project_align_list_in_two_calls():
    project_align_list_case([768, 16, 4096, 16, 10000], LAYERS, torch.float32, launched=3, parts=2)


@WITH_AND_WITHOUT_CLUSTERS
def test_project_align_list_with_and_without_clusters(device, code):
    launched = 1 if clusters_serve(device, code) else 3
    project_align_list_case([768, 16, 4096, 16, 20000], LAYERS, torch.float32, launched=launched)


@pytest.mark.slow
def test_project_align_list_of_many_tensors():
    """A table of several pieces, with layers in any order, and chunks that mix wide and narrow accesses."""
    sizes = [8 + 5 * (i % 3) for i in range(70)]
    groups = [(7 * i) % 11 for i in range(70)]
    grads, harmful, beneficial = make_list(sizes, torch.float32)
    columns = dict(grad=grads, harmful=harmful, beneficial=beneficial)
    options = dict(alignment=0.2, order="align_first", rule="positive")
    exact = reference.project_align_(
        *([t.double() for t in column] for column in columns.values()), groups, **options
    )
    arguments, _sums, _keep = tensor_list(columns, groups, **options)
    before = launches()
    call("project_align_", arguments, stream=NEW_STREAM())
    assert launches() - before == 2 + 1 + 1
    for result, e in zip(grads, exact):
        torch.testing.assert_close(result, e.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_project_align_list_of_more_chunks_than_threads():
    """One block adds up a group's chunks, more of them than it has threads; every tensor has one at least."""
    project_align_list_case([8] * 3 + [5] * 600, [1] * 3 + [0] * 600, torch.float32, launched=3 + 10)


class List:
    """Tensors that are worked on again and again, as those of a training step are."""

    def __init__(self, sizes=(96, 5, 64, 7, 32), groups=LAYERS, dtype=torch.float32):
        self.groups = groups
        self.grads, self.harmful, self.beneficial = make_list(sizes, dtype)
        self.fresh = [g.clone() for g in self.grads]
        self.options = dict(alignment=0.2, order="align_first", rule="positive")

    def launches(self, stream, groups=None):
        """How many launches a call takes whose result is the right one."""
        columns = dict(grad=self.grads, harmful=self.harmful, beneficial=self.beneficial)
        groups = groups or self.groups
        for grad, fresh in zip(self.grads, self.fresh):
            grad.copy_(fresh)
        before = launches()
        arguments, _sums, _keep = tensor_list(columns, groups, **self.options)
        call("project_align_", arguments, stream=stream)
        exact = reference.project_align_(self.fresh, self.harmful, self.beneficial, groups, **self.options)
        for result, e in zip(self.grads, exact):
            torch.testing.assert_close(result, e)
        return launches() - before

    def in_the_same_memory(self, dtype):
        """Other tensors of as many numbers of a narrower type at the same addresses."""
        other = List([t.numel() for t in self.grads], self.groups, dtype)
        for name in ("grads", "harmful", "beneficial"):
            pairs = zip(getattr(self, name), getattr(other, name))
            setattr(other, name, [mine.view(dtype)[: t.numel()].copy_(t) for mine, t in pairs])
        return other


def test_tables_are_kept_while_all_of_the_list_is_the_same():
    first, second, stream, other = List(), List(), NEW_STREAM(), NEW_STREAM()
    assert [first.launches(stream) for _ in range(3)] == [MAKE_TABLES + 1, 1, 1]
    assert [second.launches(stream) for _ in range(2)] == [MAKE_TABLES + 1, 1]
    assert [first.launches(other) for _ in range(2)] == [MAKE_TABLES + 1, 1]
    assert first.launches(stream) == second.launches(stream) == 1
    assert first.launches(stream, groups=[0, 1, 1, 2, 2]) == MAKE_TABLES + 1
    first.harmful[3] = first.harmful[3].clone()
    assert [first.launches(stream) for _ in range(2)] == [MAKE_TABLES + 1, 1]


def test_tables_are_of_one_dtype():
    wide, stream = List([6000, 5], [0, 0], torch.float64), NEW_STREAM()
    assert [wide.launches(stream) for _ in range(2)] == [MAKE_TABLES + 1, 1]
    assert wide.in_the_same_memory(torch.float32).launches(stream) == MAKE_TABLES + 1


def test_tables_are_made_inside_a_captured_graph():
    """The graph has its own: neither does it depend on those outside, nor are its own kept."""
    tensors, stream = List(), NEW_STREAM()
    tensors.launches(stream)
    held = LIBRARY.c_allocations()
    LIBRARY.shim_set_capturing(True)
    assert [tensors.launches(stream) for _ in range(2)] == [MAKE_TABLES + 1] * 2
    assert LIBRARY.c_allocations() == held
    LIBRARY.shim_set_capturing(False)
    assert tensors.launches(stream) == 1


@pytest.mark.parametrize("which", range(1, MAKE_TABLES + 3 + 1))
def test_a_failed_launch_is_told_and_leaves_nothing_behind(which):
    """Nothing half made is kept: the next call is right."""
    LIBRARY.shim_set_largest_cluster(1)
    tensors, stream = List([20000, 5], [0, 0]), NEW_STREAM()
    LIBRARY.shim_fail_launch(which)
    with pytest.raises(AssertionError, match="invalid launch"):
        tensors.launches(stream)
    assert tensors.launches(stream) == 3 + (MAKE_TABLES if which <= MAKE_TABLES else 0)


@pytest.mark.parametrize("which", [1, 2])
def test_a_failed_launch_of_a_long_row_is_told(which):
    LIBRARY.shim_set_largest_cluster(1)
    LIBRARY.shim_fail_launch(which)
    with pytest.raises(AssertionError, match="invalid launch"):
        project_align_case(torch.float32, 1, 20000, order="align_first", rule="full", aligned=True)


@pytest.mark.slow
def test_tables_long_unused_are_given_up():
    first, *others = (List([8], [0]) for _ in range(33))
    stream = NEW_STREAM()
    for tensors in (first, *others):
        assert tensors.launches(stream) == MAKE_TABLES + 1
    assert LIBRARY.c_allocations() == 32
    assert others[-1].launches(stream) == 1
    assert first.launches(stream) == MAKE_TABLES + 1


Rates = struct("""
    f64: size eps
""")
AdamW = struct("""
    f64: lr beta1 beta2 weight_decay eps
    i32: maximize
    ptr: rates
    i32: all_alike
""")


def adamw_case(sizes, groups, dtype, *, launched, maximize=False, steps=(3,), foreign_sums=False):
    """`steps`: of every tensor, or of all alike."""
    surgery = dict(alignment=0.2, order="align_first", rule="positive")
    lr, betas, eps, weight_decay = 1e-2, (0.9, 0.99), 1e-4, 0.1
    lists = make_list(sizes, dtype)
    state = [[make(n, dtype=dtype, seed=90 + 10 * i + k) for i, n in enumerate(sizes)] for k in range(3)]
    state[2] = [t.abs() for t in state[2]]
    each = steps if len(steps) > 1 else steps * len(sizes)

    def expected(to):
        columns = [[t.to(to) for t in column] for column in lists]
        grads = reference.project_align_(*columns, groups, **surgery)
        if foreign_sums:
            grads = thrice_removed(columns[0], columns[2], grads, 0.2)
        tensors = zip(*([t.to(to) for t in column] for column in state))
        options = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        return [
            reference.adamw_step(p, g, m, v, step, **options)
            for (p, m, v), g, step in zip(tensors, grads, each)
        ]

    exact, plain = expected(torch.float64), expected(dtype)
    names = ["grad", "harmful", "beneficial", "param", "exp_avg", "exp_avg_sq"]
    roots = [(1 - betas[1] ** step) ** 0.5 for step in steps]
    rates = (Rates * len(steps))(
        *(Rates(lr / (1 - betas[0] ** step) * root, eps * root) for step, root in zip(steps, roots))
    )
    options = AdamW(lr, *betas, weight_decay, eps, maximize, addressof(rates), len(steps) == 1)
    part = "apply" if foreign_sums else "all"
    arguments, sums, _keep = tensor_list(dict(zip(names, lists + state)), groups, part=part, **surgery)
    if foreign_sums:
        sums.copy_(reference.layer_sums(*lists, groups, surgery["rule"]))
        sums[:, [0, 3]] *= 3
    before = launches()
    call("surgery_adamw_", arguments, options, stream=NEW_STREAM())
    assert launches() - before == MAKE_TABLES + launched
    for results, es, ps in zip(zip(*state), exact, plain):
        for name, result, e, p in zip(names[3:], results, es, ps):
            check(result, e, p, size=4.0, what=f"{name} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[768, 32, 512, 16, 64], [768, 1, 513, 0, 65]], ids=["even", "odd"])
def test_adamw_in_one_launch(dtype, sizes):
    adamw_case(sizes, LAYERS, dtype, launched=1)


def test_adamw_with_sums_of_elsewhere():
    adamw_case([96, 5, 64, 7, 32], LAYERS, torch.float32, launched=1, foreign_sums=True)


@pytest.mark.slow
def test_adamw_of_a_layer_of_many_chunks():
    adamw_case([8192 * 11, 100, 32], [0, 0, 1], torch.float32, launched=1)


def test_adamw_maximizes():
    adamw_case([96, 5], [0, 0], torch.float32, launched=1, maximize=True)


def test_adamw_of_tensors_that_have_taken_different_steps():
    adamw_case([96, 5, 64, 7, 32], [1, 0, 2, 1, 0], torch.float32, launched=2, steps=(1, 2, 3, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_in_three_launches(dtype):
    LIBRARY.shim_set_largest_cluster(1)
    adamw_case([20000, 1, 4096], [0, 0, 1], dtype, launched=3)


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
    check(out, exact, plain, size=exact.abs().max().item(), what=f"gramian {count} {sizes} {dtype}")
    before = launches()
    given, _keep = arguments(grads)
    call("combine_", given, stream=stream)
    assert launches() - before == MAKE_TABLES + 1
    for i, (result, e, p) in enumerate(zip(grads, exact_sums, plain_sums)):
        check(result, e, p, size=count, what=f"combine_ {count} tensor {i} of {sizes} {dtype}")


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
    check(out, exact, reference.spectral_entropy(images), what=f"{dtype} {batch}x{height}x{width}")
