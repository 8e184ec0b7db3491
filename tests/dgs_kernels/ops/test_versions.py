"""Autograd learns what an operation has written in place: a graph that needs the former numbers refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from dgs_kernels import SurgeryAdamW, combine_, project_align_
from dgs_kernels.ops import project_align_ as lists_of_layers
from tests.conftest import on_backends
from tests.dgs_kernels.ops.lists import draw
from tests.dgs_kernels.ops.test_surgery_adamw_ import GROUPS, call, drawn

as_given = pytest.mark.parametrize(
    "tensors", ["as they are", "with gaps", "of two dtypes", "watched by torch"]
)


def given(tensors: str, *lists: list[Tensor]) -> AbstractContextManager:
    """Change the lists so that kernels write to copies, or have torch look on, or neither."""
    for ts in lists if tensors == "with gaps" else ():
        ts[:] = [t.repeat_interleave(2, dim=0)[::2] for t in ts]
    if tensors == "of two dtypes":
        lists[0][:] = [t.double() for t in lists[0]]
    return FlopCounterMode(display=False) if tensors == "watched by torch" else nullcontext()


def versions(*lists: list[Tensor]) -> list[int]:
    return [t._version for ts in lists for t in ts]


def changed(before: list[int], *lists: list[Tensor]) -> list[bool]:
    return [now > then for now, then in zip(versions(*lists), before)]


def assert_first_list_alone_is_written(operation: Callable, backend: str, tensors: str) -> None:
    lists = [draw(device=backend, seed=seed) for seed in range(3)]
    with given(tensors, *lists):
        before = versions(*lists)
        operation(*lists)
    count = len(lists[0])
    assert changed(before, *lists) == [True] * count + [False] * 2 * count


@on_backends("project_align_")
@as_given
def test_project_align_(backend, tensors):
    assert_first_list_alone_is_written(project_align_, backend, tensors)


@on_backends("project_align_")
@as_given
def test_sums_alone_write_no_gradient(backend, tensors):
    lists = [draw(device=backend, seed=seed) for seed in range(3)]
    dtype = torch.float64 if tensors == "of two dtypes" else torch.float32
    sums = torch.zeros(len(lists[0]), 6, dtype=dtype, device=backend)
    with given(tensors, *lists):
        before = versions(*lists)
        groups, options = list(range(len(lists[0]))), (None, 1.0, 1e-6, "align_first", "positive", "sums")
        lists_of_layers.run(*lists, groups, sums, *options)
    assert sums.any() and not any(changed(before, *lists))


@on_backends("combine_")
@as_given
def test_combine_(backend, tensors):
    weights = torch.tensor([0.3, 0.7], device=backend)

    def combined(grads: list[Tensor], *objectives: list[Tensor]) -> None:
        combine_(grads, objectives, weights)

    assert_first_list_alone_is_written(combined, backend, tensors)


@on_backends("surgery_adamw_")
@as_given
def test_surgery_adamw_(backend, tensors):
    lists = [list(ts) for ts in drawn(backend)]
    # List 4 holds the steps, which are single numbers.
    with given(tensors, *(ts for i, ts in enumerate(lists) if i != 4)):
        before = versions(*lists)
        sums = torch.zeros(
            max(GROUPS) + 1,
            6,
            dtype=torch.float64 if tensors == "of two dtypes" else torch.float32,
            device=backend,
        )
        call(lists, sums=sums)
    count, written = len(lists[0]), [True, False, True, True, True, False, False]
    assert changed(before, *lists) == [change for change in written for _ in range(count)]


@pytest.fixture(params=["tensors", "distributed tensors"])
def spread(request) -> Iterator[Callable[[Tensor], Tensor]]:
    """What makes parameters of tensors: as they are, or spread over a mesh of this process alone."""
    if request.param == "tensors":
        yield lambda x: x
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda x: distribute_tensor(x, mesh, [Shard(0)])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, SurgeryAdamW])
def test_a_graph_of_former_weights_refuses(optimizer_class, spread):
    """Without that, its gradients would silently be of new weights and old activations."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(spread(torch.randn(4, 4)))
    options = {"model": torch.nn.ParameterList([weight])} if optimizer_class is SurgeryAdamW else {}
    optimizer = optimizer_class([weight], **options)
    loss = (weight * spread(torch.randn(4, 4)).requires_grad_()).sum()
    if options:
        with optimizer.harmful():
            (weight * weight).sum().backward()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
