"""project_align_: the CUDA kernels on the CPU against the reference in float64."""

from ctypes import addressof

import pytest
import torch

from dgs_kernels import reference
from tests.csrc.cuda_on_host import host
from tests.csrc.cuda_on_host.host import (
    DTYPES,
    LIBRARY,
    NEW_STREAM,
    ORDERS,
    PARTS,
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
from tests.csrc.cuda_on_host.rows import project_align_case

# This fixture runs around every case.
__all__ = ["order_of_threads"]

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
        # Other processes would have added their sums here.
        given[:, [0, 3]] *= 3
        call("project_align_", second, stream=stream)
    assert launches() - before == MAKE_TABLES + launched
    host.check(sums, exact_sums, plain_sums, size=exact_sums.abs().max().item(), what=f"sums {sizes} {dtype}")
    for i, (result, e, p) in enumerate(zip(grads, exact, plain)):
        host.check(result, e, p, size=4.0, what=f"tensor {i} of {sizes} {dtype}")


# Two launches write the tensors of a short list, and their chunks.
MAKE_TABLES = 2
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
def test_project_align_list_in_two_launches(dtype, last, shift):
    project_align_list_case([768, 16, 4096, 16, last], LAYERS, dtype, launched=2, shift=shift)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunks", "largest", "launched"),
    [(2, 2, 1), (3, 2, 2), (8, 8, 1), (9, 8, 2), (9, 16, 1), (12, 16, 1), (16, 16, 1), (17, 16, 2)],
)
def test_project_align_list_of_so_many_chunks(chunks, largest, launched):
    """Of 8192 numbers each, a block's. Not every device has clusters of more than 8 blocks, or of 3."""
    LIBRARY.shim_set_largest_cluster(largest)
    sizes = [8192 * (chunks - 1), 100, 8092]
    project_align_list_case(sizes, [0, 1, 0], torch.float32, launched=launched)


def test_project_align_list_in_two_calls():
    project_align_list_case([768, 16, 4096, 16, 10000], LAYERS, torch.float32, launched=3, parts=2)


@WITH_AND_WITHOUT_CLUSTERS
def test_project_align_list_with_and_without_clusters(device, code):
    launched = 1 if clusters_serve(device, code) else 2
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
@pytest.mark.parametrize(("chunks", "launched"), [(270, 2 + 4), (520, 3 + 9)])
def test_project_align_list_of_more_chunks_than_threads(chunks, launched):
    """A block adds up a group's chunks, more of them than it has threads; every tensor has one at least.

    Up to 512, every block that edits does. The pieces of the table are launches too.
    """
    groups = [1] * 3 + [0] * chunks
    project_align_list_case([8] * 3 + [5] * chunks, groups, torch.float32, launched=launched)


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
@pytest.mark.parametrize(
    ("sizes", "cache_bytes"),
    [([20000, 5, 0], host.CACHE_BYTES), ([20000, 5, 7], 1)],
    ids=["in one turn", "in two turns"],
)
def test_a_failed_launch_is_told_and_leaves_nothing_behind(sizes, cache_bytes, which):
    """Nothing half made is kept: the next call is right."""
    LIBRARY.shim_set_largest_cluster(1)
    LIBRARY.shim_set_cache_bytes(cache_bytes)
    tensors, stream = List(sizes, [0, 0, 1]), NEW_STREAM()
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
