"""gramian on every backend: inner products of K gradients, layer by layer, against the formula in float64."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dgs_kernels import backends, gramian, reference
from tests.conftest import on_backends
from tests.dgs_kernels.ops.lists import DTYPES, Marked, aligned_but_one, clones, doubles, draw

SHAPES = ((3, 41), (1,), (0,), (5,), (9000,), (64, 6), (7,))
GROUPS = (0, 1, 1, 2, 0, 3, 1)
everywhere = on_backends("gramian")


def objectives(count, shapes=SHAPES, dtype=torch.float32, device="cpu"):
    return [draw(shapes, dtype, device, seed=seed) for seed in range(count)]


def assert_accurate(out, lists, groups) -> None:
    """At most twice the error of plain PyTorch, plus a few roundings of the vectors' sizes."""
    want = reference.gramian([doubles(tensors) for tensors in lists], groups)
    plain = reference.gramian(lists, groups)
    assert out.dtype == plain.dtype and out.shape == want.shape
    sizes = want.diagonal(dim1=1, dim2=2).sqrt()
    # Plain PyTorch's error depends on where the tensors lie, and may be none; float64 is held against itself.
    units = 16 if out.dtype == torch.float64 else 4
    rounding = torch.finfo(out.dtype).eps * sizes[:, :, None] * sizes[:, None]
    allowed = 2 * (plain - want).abs() + units * rounding
    assert ((out - want).abs() <= allowed).all()
    assert torch.equal(out, out.mT)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_accuracy(backend, dtype, count, nan_filled):
    lists = objectives(count, dtype=dtype, device=backend)
    assert_accurate(gramian(lists, groups=GROUPS), lists, GROUPS)


@everywhere
@pytest.mark.parametrize("count", [3, 8, 16])
def test_other_numbers_of_objectives(backend, count):
    lists = objectives(count, SHAPES[:2], device=backend)
    assert_accurate(gramian(lists), lists, range(2))


@everywhere
@pytest.mark.parametrize("count", [17, 40])
def test_more_objectives_than_a_kernel_takes(backend, count):
    if count > 17 and os.environ[backends.VARIABLE] == "triton" and backend == "cpu":
        pytest.skip("the interpreter takes 20 seconds for what 17 show too")
    lists = objectives(count, SHAPES[:2], device=backend)
    out = gramian(lists, groups=[0, 0])
    assert_accurate(out, lists, [0, 0])
    assert torch.equal(out, gramian(lists, groups=[0, 0]))
    # One list of float64 makes all sums float64.
    lists[-1] = doubles(lists[-1])
    assert_accurate(gramian(lists, groups=[0, 0]), [doubles(tensors) for tensors in lists], [0, 0])


@everywhere
def test_layers_that_many_threads_share(backend, nan_filled):
    """The number of threads changes no bit; a piece that a thread takes begins and ends inside of tensors."""
    shapes, groups = ((70001,), (7,), (100, 700), (3, 41)), (0, 1, 1, 2)
    lists = objectives(2, shapes, device=backend)
    out, threads = gramian(lists, groups=groups), torch.get_num_threads()
    assert_accurate(out, lists, groups)
    torch.set_num_threads(3 - min(threads, 2))
    again = gramian(lists, groups=groups)
    torch.set_num_threads(threads)
    assert torch.equal(out, again) or os.environ[backends.VARIABLE] == "eager"


@everywhere
def test_layouts(backend, nan_filled):
    """Transposed, strided, misaligned and expanded tensors, whose lists agree in shape but not in strides."""
    base = objectives(2, [(40, 30)], device=backend)
    views = [lambda x: x.t(), lambda x: x[::2, ::3], lambda x: x.view(-1)[1:], lambda x: x[:1].expand(40, 30)]
    for view in views:
        plain = [view(base[0][0]), view(base[1][0])]
        for other in (plain[1], plain[1].clone(memory_format=torch.contiguous_format)):
            lists = [[plain[0]], [other]]
            assert_accurate(gramian(lists), [[t.contiguous()] for (t,) in lists], [0])


@everywhere
def test_lists_of_which_one_tensor_is_not_aligned(backend):
    for lists in aligned_but_one(*objectives(3, [(16,), (2, 24)], device=backend)):
        assert_accurate(gramian(lists), lists, [0, 1])


@everywhere
def test_mixed_dtypes_share_a_layer(backend):
    types = (torch.bfloat16, torch.float32, torch.float16)
    lists = objectives(3, [(50,)] * 3, device=backend)
    lists = [[t.to(dtype) for t, dtype in zip(tensors, types)] for tensors in lists]
    lists[1][0] = lists[1][0].float()
    assert_accurate(gramian(lists, groups=[0, 0, 1]), lists, [0, 0, 1])
    lists[2][2] = lists[2][2].double()
    out = gramian(lists)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, reference.gramian([doubles(x) for x in lists], range(3)))


@everywhere
def test_groups_are_any_numbers_in_order_of_appearance(backend):
    lists = objectives(2, device=backend)
    out = gramian(lists, groups=GROUPS)
    assert torch.equal(gramian(lists, groups=[100 - g for g in GROUPS]), out)
    assert torch.equal(gramian(lists, groups=list(map(str, GROUPS))), out)


@everywhere
def test_nothing_to_sum(backend):
    assert gramian([[], [], []]).shape == (0, 3, 3)
    empty = [torch.empty(0, 4, device=backend)]
    assert torch.equal(gramian([empty, empty]).cpu(), torch.zeros(1, 2, 2))


@everywhere
def test_twice_alike(backend):
    lists = objectives(5, device=backend)
    assert torch.equal(gramian(lists, groups=GROUPS), gramian([clones(x) for x in lists], groups=GROUPS))


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_objective_and_layer(backend, bad):
    for tensor, objective in ((4, 1), (5, 2)):
        lists = objectives(3, device=backend)
        lists[objective][tensor].view(-1)[17] = bad
        finite = gramian(lists, groups=GROUPS).isfinite().cpu()
        expected = torch.ones(4, 3, 3, dtype=torch.bool)
        expected[GROUPS[tensor], objective] = expected[GROUPS[tensor], :, objective] = False
        assert torch.equal(finite, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(2, 16),
)
def test_random_layers(layers, count):
    numbers: dict[int, int] = {}
    groups = [numbers.setdefault(group, len(numbers)) for _, group in layers]
    lists = objectives(count, [(size,) for size, _ in layers])
    assert_accurate(gramian(lists, groups=groups), lists, groups)


@everywhere
def test_subclasses_and_parameters(backend):
    lists = objectives(2, device=backend)
    out = gramian(lists)
    assert torch.equal(gramian([[t.as_subclass(Marked) for t in x] for x in lists]), out)
    of_parameters = gramian([[torch.nn.Parameter(t) for t in x] for x in lists])
    assert torch.equal(of_parameters, out) and not of_parameters.requires_grad


def test_operator():
    flat = [t for tensors in objectives(3, SHAPES[:4]) for t in tensors]
    opcheck(torch.ops.dgs.gramian.default, (flat, [0, 1, 1, 0], 3))


@pytest.mark.parametrize("times", [1, 9])
def test_compiles_in_one_graph(times):
    def step(first, second):
        return gramian([[t * 2 for t in first], second] * times, groups=GROUPS[:3]).sqrt()

    arguments = objectives(2, SHAPES[:3])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, step(*arguments), equal_nan=True)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode() as mode:
        lists = [[mode.from_tensor(t) for t in x] for x in objectives(3, SHAPES[:2], torch.float64)]
        out = gramian(lists)
    assert out.shape == (2, 3, 3) and out.dtype == torch.float64


@pytest.mark.parametrize(
    ("lists", "options", "message"),
    [
        ([[torch.ones(2)]], {}, "objectives must be at least 2 lists, got 1"),
        ([[torch.ones(2)]] * 17 + [[torch.ones(3)]], {}, r"objectives\[17\]\[0\] must have shape"),
        ([[torch.ones(2)], []], {}, r"objectives\[1\] must have 1 tensors as objectives\[0\] has, got 0"),
        (
            [[torch.ones(2)], [torch.ones(3)]],
            {},
            r"objectives\[1\]\[0\] must have shape \(2,\) as objectives\[0\]\[0\], got \(3,\)",
        ),
        (
            [[torch.ones(2)], [None]],
            {},
            r"objectives\[1\]\[0\] must be a tensor, got NoneType; .* pass zeros",
        ),
        ([[torch.ones(2, dtype=torch.int32)]] * 2, {}, r"must be of torch.float32, .*, got torch.int32"),
        ([[torch.ones(2)], [torch.ones(2, device="meta")]], {}, r"objectives\[1\] has a tensor on meta"),
        ([[torch.eye(2).to_sparse()]] * 2, {}, "must be a dense tensor"),
        ([[torch.ones(2)]] * 2, {"groups": [0, 1]}, "groups must name the layer of 1 tensors, got 2"),
    ],
)
def test_errors(lists, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gramian(lists, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_graph_capture(name, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, name)
    lists = objectives(3, device="cuda")
    want = gramian(lists, groups=GROUPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gramian(lists, groups=GROUPS)
    for _ in range(2):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)
