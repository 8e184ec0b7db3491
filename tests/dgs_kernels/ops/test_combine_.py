"""combine_ on every backend: weighted sums of K gradients against the formula in float64."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dgs_kernels import backends, combine_, gramian, reference
from tests.conftest import on_backends
from tests.dgs_kernels.ops.lists import DTYPES, Marked, aligned_but_one, clones, doubles, draw
from tests.dgs_kernels.ops.test_gramian import GROUPS, SHAPES, objectives

everywhere = on_backends("combine_")


def unwritten(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    return [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape in shapes]


def draw_weights(count, groups=GROUPS, dtype=torch.float32, device="cpu"):
    return draw([(max(groups) + 1, count)], dtype, device, seed=99)[0]


def assert_accurate(out, lists, weights, groups) -> None:
    """At most twice the error of plain PyTorch, plus a rounding of the largest term."""
    want = reference.combine_(doubles(out), [doubles(x) for x in lists], weights.double(), groups)
    plain = reference.combine_(out, lists, weights, groups)
    for t, (result, w, p) in enumerate(zip(out, want, plain)):
        if result.numel():
            inner = reference.compute_dtype(result)
            size = max(float(x[t].double().abs().max()) for x in lists) * float(weights.abs().max())
            rounding = torch.finfo(inner).eps * len(lists) * size
            if os.environ.get(backends.VARIABLE) == "triton" and result.device.type == "cpu":
                # Triton's interpreter cuts bfloat16 off instead of rounding it.
                rounding += torch.finfo(result.dtype).eps * w.abs().max()
            allowed = 2 * (p.double() - w).abs().max() + rounding
            assert (result.double() - w).abs().max() <= allowed


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_accuracy(backend, dtype, count):
    lists = objectives(count, dtype=dtype, device=backend)
    weights = draw_weights(count, dtype=reference.compute_dtype(lists[0][0]), device=backend)
    for of_layers in (weights, weights[1]):
        out = unwritten(dtype=dtype, device=backend)
        combine_(out, lists, of_layers, groups=GROUPS)
        assert_accurate(out, lists, of_layers, GROUPS)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_objectives_than_a_kernel_takes(backend, dtype):
    """Rounded once, where sums of 16 that are added up in bfloat16 would be rounded three times."""
    count = 18 if os.environ[backends.VARIABLE] == "triton" and backend == "cpu" else 40
    lists = objectives(count, dtype=dtype, device=backend)
    weights = draw_weights(count, device=backend)
    expected = unwritten(dtype=torch.float32, device=backend)
    combine_(expected, [[t.float() for t in tensors] for tensors in lists], weights, groups=GROUPS)
    # `grads` may be one of the lists.
    out, before = lists[17], [clones(tensors) for tensors in lists]
    combine_(out, lists, weights, groups=GROUPS)
    assert_accurate(out, before, weights, GROUPS)
    assert all(torch.equal(t, e.to(dtype)) for t, e in zip(out, expected))
    assert all(lists[k] is out or all(map(torch.equal, lists[k], before[k])) for k in range(count))
    combine_(out, before, weights[1], groups=GROUPS)
    assert_accurate(out, before, weights[1], GROUPS)
    lists[16] = [out[0].clone(), out[0].view(-1)[:1], *lists[16][2:]]
    with pytest.raises(ValueError, match=r"grads\[0\] and objectives\[16\]\[1\] share memory"):
        combine_(out, lists, weights, groups=GROUPS)


@everywhere
def test_larger_than_caches(backend):
    """On a CPU, results of more than 8 MiB are stored past the caches, where they divide by 16 bytes."""
    if os.environ[backends.VARIABLE] == "triton" and backend == "cpu":
        pytest.skip("the interpreter takes minutes, and has one path for all sizes")
    shapes = ((1100000,), (3, 41), (1100003,))
    for dtype in (torch.float32, torch.bfloat16):
        shapes_of = [s if dtype == torch.float32 else (*s, 2) for s in shapes]
        lists = objectives(2, shapes_of, dtype, backend)
        for skipped in (0, 1, 4):
            room = unwritten([(torch.Size(s).numel() + skipped,) for s in shapes_of], dtype, backend)
            out = [x[skipped:].view(s) for x, s in zip(room, shapes_of)]
            combine_(out, lists, torch.tensor([0.3, -2.0], device=backend))
            assert_accurate(out, lists, torch.tensor([0.3, -2.0], device=backend), range(3))
            assert all(x[:skipped].isnan().all() for x in room)


@everywhere
@pytest.mark.parametrize("place", [0, 1, 2])
def test_in_place_of_an_objective(backend, place):
    lists, weights = objectives(3, device=backend), draw_weights(3, device=backend)
    want = unwritten(device=backend)
    combine_(want, lists, weights, groups=GROUPS)
    combine_(lists[place], lists, weights, groups=GROUPS)
    assert all(map(torch.equal, lists[place], want))


@everywhere
def test_layouts(backend):
    """Transposed, strided and misaligned tensors, whose lists agree in shape but not in strides."""
    base = objectives(3, [(40, 30)], device=backend)
    views = [lambda x: x.t(), lambda x: x[::2, ::3], lambda x: x.view(-1)[1:], lambda x: x]
    for view in views:
        lists = [[view(x[0])] for x in base[1:]]
        for edited in (
            view(base[0][0].clone()),
            view(base[0][0]).clone(memory_format=torch.contiguous_format),
        ):
            combine_([edited], lists, torch.tensor([2.0, -1.0], device=backend))
            assert torch.equal(edited, 2 * lists[0][0] - lists[1][0])
        want = 2 * lists[0][0] - lists[1][0]
        combine_(lists[0], lists, torch.tensor([2.0, -1.0], device=backend))
        assert torch.equal(lists[0][0], want)


@everywhere
def test_lists_of_which_one_tensor_is_not_aligned(backend):
    shapes = [(16,), (2, 24)]
    weights = draw_weights(2, [0, 1], device=backend)
    for out, *lists in aligned_but_one(
        unwritten(shapes, device=backend), *objectives(2, shapes, device=backend)
    ):
        combine_(out, lists, weights)
        assert_accurate(out, lists, weights, [0, 1])


@everywhere
def test_mixed_dtypes(backend):
    """Results return to the types of grads; weights may be of any."""
    lists = objectives(2, [(50,), (60,)], device=backend)
    lists[1] = [lists[1][0].bfloat16(), lists[1][1].half()]
    out = [torch.empty(50, device=backend), torch.empty(60, dtype=torch.bfloat16, device=backend)]
    weights = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=torch.float64, device=backend)
    combine_(out, lists, weights)
    assert [t.dtype for t in out] == [torch.float32, torch.bfloat16]
    for t, w in enumerate(weights):
        want = sum(float(x) * y[t].double() for x, y in zip(w, lists))
        torch.testing.assert_close(out[t], want.to(out[t].dtype), rtol=1e-2 if t else 1e-6, atol=1e-6)


@everywhere
def test_nothing_to_write(backend):
    combine_([], [[], []], torch.ones(2, device=backend))
    empty = [torch.empty(0, 4, device=backend)]
    combine_(empty, [empty, empty], torch.ones(1, 2, device=backend))


@everywhere
def test_weights_of_layers_in_order_of_appearance(backend):
    lists = objectives(2, [(3,)] * 3, device=backend)
    out = unwritten([(3,)] * 3, device=backend)
    combine_(out, lists, torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=backend), groups=[7, 2, 7])
    assert all(map(torch.equal, out, [lists[0][0], lists[1][1], lists[0][2]]))


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible_in_its_tensor(backend, bad):
    lists = objectives(2, device=backend)
    lists[1][5][1, 2] = bad
    out = unwritten(device=backend)
    combine_(out, lists, torch.tensor([1.0, 0.0], device=backend), groups=GROUPS)
    assert [t.isfinite().all().item() for t in out] == [i != 5 for i in range(len(out))]
    assert out[5].isfinite().sum() == out[5].numel() - 1


@everywhere
def test_pcgrad_of_two_gradients(backend):
    """From the Gramian to weights and on: the sum of both, each without its conflict with the other."""
    lists = objectives(2, [(2, 3), (4,)], torch.float64, backend)
    lists[1] = [y - 3 * x for x, y in zip(*lists)]
    products = gramian(lists, groups=[0, 0])[0]
    conflict = products[0, 1].clamp(max=0)
    weights = 1 - torch.stack([conflict / products[0, 0], conflict / products[1, 1]])
    first, second = (torch.cat([t.reshape(-1) for t in x]) for x in lists)
    want = (first - first @ second / (second @ second) * second) + (
        second - first @ second / (first @ first) * first
    )
    combine_(lists[0], lists, weights, groups=[0, 0])
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in lists[0]]), want)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(2, 16),
)
def test_random_layers(layers, count):
    numbers: dict[int, int] = {}
    groups = [numbers.setdefault(group, len(numbers)) for _, group in layers]
    shapes = [(size,) for size, _ in layers]
    lists, weights, out = objectives(count, shapes), draw_weights(count, groups), unwritten(shapes)
    combine_(out, lists, weights, groups=groups)
    assert_accurate(out, lists, weights, groups)


@everywhere
def test_subclasses_and_parameters(backend):
    """Gradients of parameters are written without a graph."""
    lists, weights = objectives(2, device=backend), draw_weights(2, device=backend)
    want, out = unwritten(device=backend), unwritten(device=backend)
    combine_(want, lists, weights, groups=GROUPS)
    marked = [[t.clone().as_subclass(Marked) for t in x] for x in lists]
    combine_(out, marked, torch.nn.Parameter(weights), groups=GROUPS)
    assert all(map(torch.equal, out, want)) and not out[0].requires_grad
    parameters = [torch.nn.Parameter(t) for t in clones(lists[0])]
    combine_(parameters, [parameters, lists[1]], weights, groups=GROUPS)
    assert all(torch.equal(p.detach(), w) for p, w in zip(parameters, want))


def test_operator():
    flat = [t for tensors in objectives(3, SHAPES[:4]) for t in tensors]
    for weights in (draw_weights(3, [0, 1]), torch.ones(3)):
        opcheck(torch.ops.dgs.combine_.default, (draw(SHAPES[:4], seed=7), flat, weights, [0, 1, 1, 0]))


@pytest.mark.parametrize("times", [1, 9])
def test_compiles_in_one_graph(times):
    def step(first, second, weights):
        first = [t * 2 for t in first]
        combine_(first, [first, second] * times, weights.repeat(1, times) * 2, groups=GROUPS[:3])
        return [t + 1 for t in first]

    arguments = (*objectives(2, SHAPES[:3]), draw_weights(2, GROUPS[:3]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, step(*arguments))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode() as mode:
        lists = [[mode.from_tensor(t) for t in x] for x in objectives(3, SHAPES[:2])]
        combine_(lists[0], lists, torch.ones(3))


X = torch.zeros(6)


@pytest.mark.parametrize(
    ("grads", "lists", "message"),
    [
        ([X, X], [[X.clone(), X.clone()]] * 2, r"grads\[\d\] and grads\[\d\] share memory"),
        ([X[:4], X[3:]], [[torch.ones(4), torch.ones(3)]] * 2, r"grads\[0\] and grads\[1\] share memory"),
        (
            [X, X.clone()],
            [[X, X.clone()], [X.clone(), X]],
            r"grads\[0\] and objectives\[1\]\[1\] share memory; only grads\[1\] may be",
        ),
        ([X[:4]], [[X[:4]], [X[2:]]], r"grads\[0\] and objectives\[1\]\[0\] share memory"),
        ([X[2:]], [[torch.ones(4)], [X[:4]]], r"grads\[0\] and objectives\[1\]\[0\] share memory"),
        ([X[1:3].double()], [[X[:2]], [X[1:3]]], None),
        ([X[:3]], [[X[3:]], [X[:3]]], None),
    ],
)
def test_memory_that_is_read_elsewhere_is_not_written(grads, lists, message):
    if message is None:
        return combine_(grads, lists, torch.ones(2))
    with pytest.raises(ValueError, match=message):
        combine_(grads, lists, torch.ones(2))
    wide = [[t.double() if t is not grads[0] else t for t in tensors] for tensors in lists[:1]] + lists[1:]
    # Where types differ, the call takes another path.
    with pytest.raises(ValueError, match="share memory"):
        combine_(grads, wide, torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, r"grads must have 1 tensors as objectives\[0\] has, got 0"),
        (
            {"grads": [torch.ones(3)]},
            r"grads\[0\] must have shape \(2,\) as objectives\[0\]\[0\], got \(3,\)",
        ),
        ({"objectives": [[torch.ones(2)]]}, "objectives must be at least 2 lists, got 1"),
        ({"objectives": [[torch.ones(2)], [None]]}, r"objectives\[1\]\[0\] must be a tensor, got NoneType"),
        ({"weights": torch.ones(3)}, r"weights must be \[1, 2\] or \[2\], .*, got \(3,\)"),
        ({"weights": torch.ones(2, 2)}, r"weights must be \[1, 2\] or \[2\], .*, got \(2, 2\)"),
        ({"weights": [1.0, 2.0]}, "weights must be a tensor, got list"),
        ({"weights": torch.ones(2, device="meta")}, "weights must be on cpu as the tensors are, got meta"),
        ({"groups": [0, 1]}, "groups must name the layer of 1 tensors, got 2"),
        (
            {"grads": [torch.ones(2, dtype=torch.int32)]},
            "grads must be of torch.float32, .*, got torch.int32",
        ),
    ],
)
def test_errors(change, message):
    arguments = {"grads": [torch.ones(2)], "objectives": [[torch.ones(2)], [torch.ones(2)]]}
    arguments |= {"weights": torch.ones(2)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        combine_(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_graph_capture(name, monkeypatch):
    """Gramian, weights and combination in one graph, on tensors that are the graph's own."""
    monkeypatch.setenv(backends.VARIABLE, name)
    lists = objectives(3, device="cuda")

    def step(own):
        weights = gramian(own, groups=GROUPS).diagonal(dim1=1, dim2=2).rsqrt()
        combine_(own[0], own, weights, groups=GROUPS)
        return own[0]

    want = step([clones(x) for x in lists])
    graph, own = torch.cuda.CUDAGraph(), [clones(x) for x in lists]
    with torch.cuda.graph(graph):
        out = step(own)
    for _ in range(2):
        torch._foreach_copy_(own[0], lists[0])
        graph.replay()
        assert all(map(torch.equal, out, want))
