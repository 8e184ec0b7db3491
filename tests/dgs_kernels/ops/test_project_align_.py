"""project_align_ on every backend: layers of many tensors against the formula in float64, and its errors."""

from __future__ import annotations

import os
from itertools import product
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dgs_kernels import backends, project_align_, reference
from dgs_kernels.ops.project_align_ import run
from dgs_kernels.reference import ORDERS, RULES
from tests.conftest import interpreted, on_backends
from tests.dgs_kernels.ops.lists import (
    DTYPES,
    GROUPS,
    SHAPES,
    Marked,
    aligned_but_one,
    assert_accurate,
    clones,
    doubles,
    draw,
    thrice_removed,
)

OPTIONS = list(product(ORDERS, RULES))
everywhere = on_backends("project_align_")


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order, rule", OPTIONS)
def test_accuracy(backend, dtype, order, rule, nan_filled):
    grads, harmful, beneficial = (draw(dtype=dtype, device=backend, seed=seed) for seed in range(3))
    for b, alignment in ((beneficial, 0.7), (None, 1.0)):
        out = clones(grads)
        options = {"alignment": alignment, "order": order, "rule": rule}
        sums = project_align_(out, harmful, b, groups=GROUPS, **options)
        assert_accurate(out, grads, harmful, b, GROUPS, **options)
        want = reference.layer_sums(doubles(grads), doubles(harmful), doubles(b), GROUPS, rule)
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        eps = 1e-12 if dtype == torch.float64 else 2e-5
        scale = torch.stack([want[:, [1, 2, 4]].sum(1)] * 6, 1)
        assert ((sums.double() - want).abs() <= eps * scale).all()


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_too_large_for_one_thread_or_cluster(backend, dtype, nan_filled):
    """They take two passes, each by all threads or blocks; the number of threads changes no bit."""
    large = ((20001,), (7,), (30, 700)) if interpreted() else ((140001,), (7,), (300, 700))
    shapes, groups = (*large, (3, 41)), (0, 1, 1, 2)
    grads, harmful, beneficial = (draw(shapes, dtype, backend, seed=seed) for seed in range(3))
    out, again = clones(grads), clones(grads)
    sums = project_align_(out, harmful, beneficial, groups=groups, alignment=0.7)
    assert_accurate(out, grads, harmful, beneficial, groups, alignment=0.7)
    want = reference.layer_sums(doubles(grads), doubles(harmful), doubles(beneficial), groups, "positive")
    torch.testing.assert_close(sums.double(), want, rtol=1e-4, atol=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    project_align_(again, harmful, beneficial, groups=groups, alignment=0.7)
    torch.set_num_threads(threads)
    assert all(map(torch.equal, out, again)) or os.environ[backends.VARIABLE] == "eager"


@everywhere
def test_every_tensor_is_its_own_layer_by_default(backend):
    grads, harmful = draw(device=backend), draw(device=backend, seed=1)
    out = clones(grads)
    project_align_(out, harmful)
    assert_accurate(out, grads, harmful, None, range(len(grads)))


@everywhere
def test_groups_are_any_numbers_and_sums_in_order_of_appearance(backend):
    grads, harmful = draw(device=backend), draw(device=backend, seed=1)
    sums = project_align_(clones(grads), harmful, groups=[100 - g for g in GROUPS])
    torch.testing.assert_close(sums, project_align_(clones(grads), harmful, groups=GROUPS), rtol=0, atol=0)


@everywhere
def test_layouts(backend, nan_filled):
    """Transposed, strided, misaligned and expanded tensors, and lists whose strides differ."""
    base = draw([(40, 30)] * 3, device=backend, seed=5)
    views = [
        lambda x: x.t(),
        lambda x: x[::2, ::3],
        lambda x: x.view(-1)[1:],
        lambda x: x,
        lambda x: x.view(2, 20, 30).permute(2, 0, 1),
    ]
    for view, other in product(views, views):
        grads, harmful, beneficial = view(base[0].clone()), view(base[1]), view(base[2])
        if other(base[1]).shape == harmful.shape:
            harmful = other(base[1])
        harmful = torch.empty_like(harmful, memory_format=torch.contiguous_format).copy_(harmful)
        before = grads.clone()
        project_align_([grads], [harmful], [beneficial], alignment=0.5)
        assert_accurate([grads], [before], [harmful], [beneficial], [0], alignment=0.5)
    expanded = torch.ones((), device=backend).expand(40, 30)
    out = clones(base[:1])
    project_align_(out, [expanded])
    assert_accurate(out, base[:1], [expanded.contiguous()], None, [0])


@everywhere
def test_lists_of_which_one_tensor_is_not_aligned(backend, nan_filled):
    """Triton's kernels ask all tensors one question."""
    lists = [draw([(16,), (2, 24)], device=backend, seed=seed) for seed in range(3)]
    for placed in aligned_but_one(*lists):
        project_align_(*placed, groups=[0, 0])
        assert_accurate(placed[0], *lists, [0, 0])


@everywhere
def test_mixed_dtypes_share_a_layer(backend):
    grads = [t.to(d) for t, d in zip(draw(SHAPES[:2], device=backend), (torch.bfloat16, torch.float32))]
    harmful = draw(SHAPES[:2], device=backend, seed=1)
    out = clones(grads)
    project_align_(out, harmful, groups=[0, 0])
    want = reference.project_align_([g.float() for g in grads], harmful, None, [0, 0])
    for a, w in zip(out, want):
        torch.testing.assert_close(
            a, w.to(a.dtype), rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", [None, *backends.BACKENDS])
def test_no_tensors(name, monkeypatch):
    """They have no device: a backend that serves another one than the CPU is no obstacle."""
    if name:
        monkeypatch.setenv(backends.VARIABLE, name)
    assert project_align_([], []).shape == (0, 6)


@everywhere
@pytest.mark.parametrize("order, rule", OPTIONS)
def test_sums_then_apply_is_all(backend, order, rule):
    grads, harmful, beneficial = (draw(device=backend, seed=seed) for seed in range(3))
    whole, halves = clones(grads), clones(grads)
    sums = project_align_(whole, harmful, beneficial, groups=GROUPS, alignment=0.3, order=order, rule=rule)
    given_sums = torch.full_like(sums, torch.nan)
    rest = (None, 0.3, 1e-6, order, rule)
    run(halves, harmful, beneficial, list(GROUPS), given_sums, *rest, "sums")
    assert all(torch.equal(a, b) for a, b in zip(halves, grads))
    torch.testing.assert_close(given_sums, sums, rtol=1e-6, atol=1e-6)
    run(halves, harmful, beneficial, list(GROUPS), given_sums, *rest, "apply")
    torch.testing.assert_close(halves, whole)


@everywhere
def test_apply_works_with_the_sums_it_is_given(backend):
    """Sums of several processes differ from those of the tensors here: three times the inner product, thrice
    what is removed."""
    grads, harmful, beneficial = (draw(device=backend, seed=seed) for seed in range(3))
    whole, given_foreign = clones(grads), clones(grads)
    foreign = project_align_(whole, harmful, beneficial, groups=GROUPS, alignment=0.3)
    foreign[:, [0, 3]] *= 3
    before = foreign.clone()
    options = (None, 0.3, 1e-6, "align_first", "positive", "apply")
    run(given_foreign, harmful, beneficial, list(GROUPS), foreign, *options)
    assert torch.equal(foreign, before)
    want = thrice_removed(grads, beneficial, whole, 0.3)
    torch.testing.assert_close(given_foreign, want, rtol=1e-5, atol=1e-5)


@everywhere
def test_deterministic(backend):
    results = []
    for _ in range(2):
        out = draw(device=backend)
        sums = project_align_(out, draw(device=backend, seed=1), draw(device=backend, seed=2), groups=GROUPS)
        results.append([sums, *out])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["grads", "harmful", "beneficial"])
def test_what_is_not_finite_stays_in_its_layer_and_stays_visible(backend, bad, where):
    # The relu or the minimum cuts such a number off.
    hidden = {"harmful": -torch.inf, "beneficial": torch.inf}.get(where) == bad
    # These tensors belong to layers 0 and 2.
    for place in (4, 5):
        names = ("grads", "harmful", "beneficial")
        lists = {name: draw(device=backend, seed=i) for i, name in enumerate(names)}
        lists[where][place].view(-1)[3] = bad
        sums = project_align_(*lists.values(), groups=GROUPS)
        finite = sums.isfinite().all(1).tolist()
        assert finite == [hidden or layer != GROUPS[place] for layer in range(len(sums))]
        for i, out in enumerate(lists["grads"]):
            assert out.isfinite().all() or (GROUPS[i] == GROUPS[place] and not hidden)
        assert hidden or not lists["grads"][place].isfinite().all()


@everywhere
@pytest.mark.parametrize("rule", RULES)
def test_zero_directions_remove_nothing(backend, rule):
    grads = draw(device=backend)
    out = clones(grads)
    project_align_(out, [torch.zeros_like(g) for g in grads], groups=GROUPS, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(out, grads))


@everywhere
def test_orthogonal_idempotent_and_without_conflict_unchanged(backend):
    grads, harmful = (draw(dtype=torch.float64, device=backend, seed=seed) for seed in range(2))
    out = clones(grads)
    before = project_align_(out, harmful, groups=GROUPS, eps=1e-14, rule="full")
    again = clones(out)
    after = project_align_(again, harmful, groups=GROUPS, eps=1e-14, rule="full")
    assert (after[:, 0].abs() <= 1e-12 * (before[:, 1] * before[:, 2]).sqrt()).all()
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)

    inner = reference.layer_sums(grads, harmful, None, GROUPS, "full")[:, 0]
    agreeing = [h * (1 if inner[group] > 0 else -1) for h, group in zip(harmful, GROUPS)]
    out = clones(grads)
    project_align_(out, agreeing, groups=GROUPS, rule="conflict")
    assert all(torch.equal(a, b) for a, b in zip(out, grads))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from(OPTIONS),
    st.floats(-2, 2),
    st.integers(0, 2**31),
)
def test_random_layers(layers, options, alignment, seed):
    order, rule = options
    numbers: dict[int, int] = {}
    groups = [numbers.setdefault(group, len(numbers)) for _, group in layers]
    shapes = [(size,) for size, _ in layers]
    grads, harmful, beneficial = (draw(shapes, seed=seed + i) for i in range(3))
    out = clones(grads)
    chosen = {"alignment": alignment, "order": order, "rule": rule}
    project_align_(out, harmful, beneficial, groups=groups, **chosen)
    assert_accurate(out, grads, harmful, beneficial, groups, **chosen)


@everywhere
def test_alignment_may_be_a_tensor(backend):
    grads, harmful, beneficial = (draw(device=backend, seed=seed) for seed in range(3))
    out, want = clones(grads), clones(grads)
    project_align_(out, harmful, beneficial, alignment=torch.tensor(0.25, device=backend))
    project_align_(want, harmful, beneficial, alignment=0.25)
    torch.testing.assert_close(out, want)


def test_operator():
    grads, harmful, beneficial = (draw(SHAPES[:4], seed=seed) for seed in range(3))
    options = (0.5, 1e-6, "align_first", "positive", "all")
    for b, scale in ((beneficial, torch.tensor(0.5)), ([], None)):
        arguments = (grads, harmful, b, [0, 1, 1, 0], torch.zeros(2, 6), scale, *options)
        opcheck(torch.ops.dgs.project_align_.default, arguments)


def test_compiles_in_one_graph():
    def step(grads, harmful, beneficial, alignment):
        grads = [g * 2 for g in grads]
        sums = project_align_(grads, harmful, beneficial, groups=GROUPS[:3], alignment=alignment)
        return sums, grads

    arguments = (*(draw(SHAPES[:3], seed=seed) for seed in range(3)), torch.tensor(0.3))
    torch.testing.assert_close(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments), step(*arguments)
    )


def test_fake_tensors():
    """Shapes alone, as tracers see them; and no compiler ever sees the native operator."""
    with torch._subclasses.FakeTensorMode() as mode:
        lists = [[mode.from_tensor(t) for t in draw(SHAPES[:3], seed=seed)] for seed in range(3)]
        assert project_align_(*lists, groups=GROUPS[:3]).shape == (2, 6)
    seen = []
    step = torch.compile(lambda g, h: project_align_([g * 2], [h]), backend=lambda m, _: seen.append(m) or m)
    step(torch.ones(3), torch.ones(3))
    (graph,) = seen
    targets = {str(node.target) for node in graph.graph.nodes}
    assert "dgs.project_align_.default" in targets and not any("_native" in t for t in targets)


@everywhere
def test_subclasses_are_tensors_too(backend):
    lists = [draw(SHAPES[:3], device=backend, seed=seed) for seed in range(3)]
    marked = [[t.clone().as_subclass(Marked) for t in tensors] for tensors in lists]
    parameters = [[torch.nn.Parameter(t.clone(), requires_grad=False) for t in tensors] for tensors in lists]
    strength = torch.tensor(0.3, device=backend)
    sums = project_align_(*lists, alignment=strength)
    for others, alignment in ((marked, strength.as_subclass(Marked)), (parameters, strength)):
        assert torch.equal(project_align_(*others, alignment=alignment), sums)
        assert all(torch.equal(a.detach(), b) for a, b in zip(others[0], lists[0]))


def test_torch_sees_the_operator_where_it_watches():
    """The native functions take a way past torch, but not while a mode or the profiler is there."""

    class Watching(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    grads, harmful = [torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]
    with Watching():
        project_align_(grads, harmful)
    assert "dgs.project_align_.default" in Watching.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        project_align_(grads, harmful)
    assert any(event.key == "dgs::project_align_" for event in profile.key_averages())


def test_leaves_the_graph_alone():
    """Gradients of parameters that require grad, and directions that do, are edited without a graph."""
    grads = [torch.randn(4)]
    harmful = [torch.randn(4, requires_grad=True)]
    project_align_(grads, harmful)
    assert not grads[0].requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"harmful": draw(SHAPES[:3])}, "harmful must have 9 tensors as grads has, got 3"),
        (
            {"harmful": draw(SHAPES[::-1])},
            r"harmful\[0\] must have shape \(3, 41\) as grads\[0\], got \(7,\)",
        ),
        ({"beneficial": draw(SHAPES[1:])}, "beneficial must have 9 tensors"),
        (
            {"harmful": [torch.zeros(s, dtype=torch.int32) for s in SHAPES]},
            "harmful must be of torch.float32, .*, got torch.int32",
        ),
        ({"harmful": [torch.zeros(s, device="meta") for s in SHAPES]}, "harmful has a tensor on meta"),
        ({"groups": [0, 1]}, "groups must name the layer of 9 tensors, got 2"),
        ({"order": "first"}, "order must be one of align_first, project_first, got 'first'"),
        ({"rule": "half"}, "rule must be one of positive, full, conflict, got 'half'"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"eps": "small"}, "eps must be a number, got str"),
        ({"harmful": [1.0] * 9}, r"harmful\[0\] must be a torch.Tensor, got float"),
        ({"alignment": torch.ones(2)}, "alignment must be a number or a 0-dim tensor"),
        (
            {"grads": [torch.eye(3)], "harmful": [torch.eye(3).to_sparse()]},
            r"harmful\[0\] must be a dense tensor .*sparse_coo",
        ),
    ],
)
def test_errors(change, message):
    arguments = {"grads": draw(), "harmful": draw(seed=1)} | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        project_align_(arguments.pop("grads"), arguments.pop("harmful"), **arguments)


def test_types_that_no_kernel_computes_in_are_refused():
    grads = [torch.zeros(3, dtype=torch.float8_e5m2)]
    with pytest.raises(TypeError, match=r"grads must be of torch.float32, .*, got torch.float8_e5m2"):
        project_align_(grads, grads)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_graph_capture(name, monkeypatch):
    """A captured call works on what its tensors hold at each replay, whatever was called in between."""
    monkeypatch.setenv(backends.VARIABLE, name)
    lists = [draw(device="cuda", seed=seed) for seed in range(3)]
    fresh, others = clones(lists[0]), [draw(device="cuda", seed=seed) for seed in range(3, 6)]

    def call(grads, harmful, beneficial):
        return project_align_(grads, harmful, beneficial, groups=GROUPS, alignment=0.4)

    want = clones(fresh)
    want_sums = call(want, *lists[1:])
    call(*lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = call(*lists)
    for _ in range(2):
        torch._foreach_copy_(lists[0], fresh)
        call(*others)
        sums.fill_(torch.nan)
        graph.replay()
        assert torch.equal(sums, want_sums)
        assert all(map(torch.equal, lists[0], want))


def test_numbers_reach_a_captured_graph_as_they_are():
    """Addresses have more bits than a double keeps."""
    layers = pytest.importorskip("dgs_kernels.triton.project_align_")
    numbers = [0, 1, -7, 2**62 + 1, 2**63 - 1, *range(500)]
    assert layers.as_arguments(numbers, torch.device("cpu")).tolist() == numbers
