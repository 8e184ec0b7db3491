"""Ranks that train together: the groups that reduce their gradients, and whether these are the same."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    return hasattr(x, "device_mesh")


def average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(
            tensors, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
        )


def compare(norms: dict[str, Tensor], params: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Raise where ranks that reduce gradients together hold others; `norms` [G] of each kind of gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    shapes = [tuple(p.shape) for p in params]
    mine = {what: norm.double().cpu() for what, norm in norms.items()}
    for together in [group] if group is not None else _groups(params):
        if dist.get_rank(together) < 0:
            continue
        everywhere: list = [None] * dist.get_world_size(together)
        dist.all_gather_object(everywhere, (shapes, mine), together)
        if any(theirs != shapes for theirs, _ in everywhere):
            raise RuntimeError(
                "the ranks hold different parameters: of ZeroRedundancyOptimizer hook the outer optimizer, "
                "not its .optim; for stages of a pipeline pass process_group=, the ranks that hold the same "
                'stage (granularity="model" is then the stage)'
            )
        for what, norm in mine.items():
            theirs = [rank[what] for _, rank in everywhere]
            if not all(len(t) == len(norm) and torch.allclose(t, norm, 1e-3, 0, True) for t in theirs):
                raise RuntimeError(
                    f"the {what} gradients differ between ranks. DDP reduces only the first backward after a "
                    "forward: make that the task's, and pass process_group= to average captured gradients at "
                    "each step (ranks that do not train together: check_ranks=False)"
                )


def _groups(params: Sequence[Tensor]) -> list[Any]:
    """The groups of DTensors' meshes and of DDP's wrappers; [None], all ranks, where there are none.

    Others than those would be waited for without end.
    """
    meshes = {p.device_mesh for p in params if is_sharded(p)}
    if meshes:
        return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    # A parameter does not know the wrapper that reduces its gradient; this is once in a training.
    known = set(map(id, params))
    wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    groups = [w.process_group for w in wrappers if any(id(p) in known for p in w.parameters())]
    return list({id(group): group for group in groups}.values()) or [None]
