"""What only a GPU can show: streams, other devices, captured graphs, and sizes with paths of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dgs_kernels
from dgs_kernels import backends, project_align, project_align_, reference
from dgs_kernels.ops.project_align_ import run as apply_surgery
from dgs_kernels.ops.surgery_adamw_ import run as surgery_adamw_
from tests.dgs_kernels.ops.lists import assert_accurate, clones, draw
from tests.dgs_kernels.ops.test_project_align import assert_accurate as assert_rows_accurate
from tests.dgs_kernels.ops.test_project_align import draw as draw_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
# The device waits for so many cycles, which are some ten milliseconds.
CYCLES = 20_000_000


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request, monkeypatch):
    for operation in backends.OPERATIONS:
        if reason := backends.obstacle(request.param, operation, "cuda"):
            pytest.skip(reason)
    monkeypatch.setenv(backends.VARIABLE, request.param)


def rows(device: str) -> list[Tensor]:
    gradients = draw_rows(3, 8, 96, device=device)
    return [project_align(*gradients, alignment=0.3)]


def head(device: str) -> list[Tensor]:
    features, teacher, text = draw_rows(3, 8, 96, device=device)
    weights = draw_rows(3, 1, 96, device=device, seed=1)
    bias, labels = torch.zeros(1, device=device), torch.arange(8, device=device) % 2
    leaf = features.requires_grad_()
    heads = [t for weight in weights for t in (weight, bias)]
    out = dgs_kernels.surgery_head(leaf, teacher, text, labels.float(), *heads)
    (out.image_loss + 0.2 * out.alignment_loss).backward()
    return [out.image_loss.detach(), leaf.grad]


def layers(device: str) -> list[Tensor]:
    grads, harmful, beneficial = (draw(device=device, seed=seed) for seed in range(3))
    return [project_align_(grads, harmful, beneficial, alignment=0.3), *grads]


def adamw(device: str) -> list[Tensor]:
    params, grads, averages, squares, harmful = (draw(device=device, seed=seed) for seed in range(5))
    squares = [s.square() for s in squares]
    count = len(grads)
    sums, steps = torch.zeros(count, 6, device=device), [torch.zeros(()) for _ in grads]
    lists = (params, grads, averages, squares, steps, harmful, [])
    surgery = (list(range(count)), sums, None, 1.0, 1e-6, "align_first", "positive", "all")
    surgery_adamw_(*lists, *surgery, 0.1, 0.9, 0.99, 0.01, 1e-4, False)
    return [sums, *params, *averages, *squares]


def entropy(device: str) -> list[Tensor]:
    return [dgs_kernels.spectral_entropy(draw_rows(2, 3, 64, 96, device=device).sigmoid())]


EVERY_OPERATION = pytest.mark.parametrize("operation", [rows, head, layers, adamw, entropy])


def in_eager(operation: Callable, monkeypatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setenv(backends.VARIABLE, "eager")
        return operation("cuda")


@EVERY_OPERATION
def test_two_streams(operation, monkeypatch):
    """What one stream makes late is not what another one reads early."""
    want = in_eager(operation, monkeypatch)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams * 2:
        with torch.cuda.stream(stream):
            if stream is streams[0]:
                torch.cuda._sleep(CYCLES)
            found.append(operation("cuda"))
    torch.cuda.synchronize()
    for results in found:
        torch.testing.assert_close(results, want, rtol=1e-4, atol=1e-4)


@EVERY_OPERATION
def test_another_device_than_the_current_one(operation, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    want = in_eager(operation, monkeypatch)
    with torch.cuda.device(0):
        results = operation("cuda:1")
        assert torch.cuda.current_device() == 0
    assert all(r.device.index == 1 for r in results)
    torch.testing.assert_close([r.to("cuda:0") for r in results], want, rtol=1e-4, atol=1e-4)


def test_a_graph_outlives_the_tables_of_its_lists():
    lists = [draw(device="cuda", seed=seed) for seed in range(3)]
    fresh, want = clones(lists[0]), clones(lists[0])
    project_align_(want, *lists[1:], alignment=0.4)
    project_align_(lists[0], *lists[1:], alignment=0.4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        project_align_(*lists, alignment=0.4)
    # No backend could keep the tables of so many lists.
    for i in range(80):
        project_align_(draw([(i + 1,)], device="cuda"), draw([(i + 1,)], device="cuda"))
    torch.cuda.empty_cache()
    noise = [torch.full((1 << 20,), 7, dtype=torch.int64, device="cuda") for _ in range(8)]
    for _ in range(2):
        torch._foreach_copy_(lists[0], fresh)
        graph.replay()
        torch.testing.assert_close(lists[0], want, rtol=0, atol=0)
    del noise


def test_tensors_made_under_capture():
    """As in a graph of a whole step, whose gradients live in the graph's memory."""
    sources = [draw(device="cuda", seed=seed) for seed in range(3)]
    want = clones(sources[0])
    project_align_(want, *sources[1:], groups=(0, 1, 1, 2, 0, 2, 3, 4, 3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads, harmful, beneficial = ([t * 1 for t in tensors] for tensors in sources)
        project_align_(grads, harmful, beneficial, groups=(0, 1, 1, 2, 0, 2, 3, 4, 3))
        results = [g * 1 for g in grads]
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, results, want))


@EVERY_OPERATION
def test_compiled_with_cuda_graphs(operation, monkeypatch):
    """`reduce-overhead` raises an error where memory of ours stays alive in its pool."""
    if operation is adamw:
        pytest.skip("it counts its steps on the host and refuses to be captured")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(x: Tensor) -> Tensor:
        features = x.sin()
        if operation is layers:
            grads = [features * 2, features * 3]
            sums = project_align_(grads, [x, -x], alignment=0.3)
            return sums.sum() + sum(g.sum() for g in grads)
        if operation is entropy:
            return dgs_kernels.spectral_entropy(features.square().view(1, 3, 32, 64)).sum()
        if operation is head:
            y = torch.ones(64, device=x.device)
            heads = [t for i in range(3) for t in (x[i : i + 1], x[i, :1])]
            return dgs_kernels.surgery_head(features, features, features, y, *heads).image_loss
        return project_align(features, x, -x, alignment=0.3).sum()

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            x = draw_rows(64, 96, device="cuda", seed=seed)
            torch.testing.assert_close(compiled(x).clone(), step(x), rtol=1e-3, atol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [20000, 20001, 131072, 131073, 3_000_000])
def test_long_rows(dtype, dim, nan_filled):
    """In clusters, up to 131072 numbers, and in parts."""
    tensors = draw_rows(3, 2, dim, dtype=dtype, device="cuda")
    options = {"alignment": 0.7, "order": "project_first", "rule": "positive"}
    assert_rows_accurate(project_align(*tensors, **options), *tensors, **options)


def test_inner_products_of_a_row_of_50_million_numbers():
    """Added one after the other in float32 they would be off by 4e-5."""
    grad = torch.ones(1, 50_331_648, device="cuda")
    harmful = torch.full_like(grad, 1.1)
    out = project_align(grad, harmful, rule="full")
    assert out.abs().max() < 1e-5


@pytest.mark.parametrize("chunks", [2, 5, 8, 9, 16, 40])
def test_layers_of_so_many_chunks(chunks, nan_filled):
    """Of 8192 numbers each: a cluster has up to 8, or 16 where the device grants it."""
    shapes, groups = ((8192 * (chunks - 1),), (100,), (8092,), (7,)), (0, 1, 0, 2)
    grads, harmful, beneficial = (draw(shapes, device="cuda", seed=seed) for seed in range(3))
    out = clones(grads)
    sums = project_align_(out, harmful, beneficial, groups=groups, alignment=0.7)
    assert_accurate(out, grads, harmful, beneficial, groups, alignment=0.7)
    wide = [[t.double() for t in tensors] for tensors in (grads, harmful, beneficial)]
    want = reference.layer_sums(*wide, groups, "positive")
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_list_larger_than_the_cache(dtype):
    """It may take turns; sums and update as two calls never do: the same bits, and in a graph too."""
    sizes = [1_000_003, 20_000_000, 500, *[1_200_000] * 20]
    layers = (0, 1, 2, *(3 + i // 2 for i in range(20)))
    draw = torch.Generator("cuda").manual_seed(0)
    grads, harmful, beneficial = (
        [torch.randn(n, generator=draw, device="cuda").to(dtype) for n in sizes] for _ in range(3)
    )
    options = (None, 0.7, 1e-6, "align_first", "positive")

    def edited(*parts: str) -> list[Tensor]:
        out, sums = clones(grads), torch.zeros(13, 6, device="cuda")
        for part in parts:
            apply_surgery(out, harmful, beneficial, list(layers), sums, *options, part)
        return [sums, *out]

    want = edited("sums", "apply")
    assert not torch.equal(want[1], grads[0])
    found = [edited("all") for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = edited("all")
    for _ in range(2):
        graph.replay()
        found.append(clones(captured))
    for results in found:
        assert all(map(torch.equal, results, want))
