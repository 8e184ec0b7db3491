"""Ranks that train together: the groups that reduce their gradients, and whether these are the same."""

from __future__ import annotations

import collections
import datetime
import gc
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dgs_kernels import private_torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Ranks that reduce their gradients come to a step together.
PATIENCE = datetime.timedelta(seconds=5)
# How often this process has met the ranks of a group, by them.
_turns: dict[tuple[int, ...], Iterator[int]] = collections.defaultdict(itertools.count)


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    return hasattr(x, "device_mesh")


@torch.no_grad()
def average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        all_reduce(flat, group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(
            tensors, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
        )


def all_reduce(x: Tensor, group: dist.ProcessGroup, operation: Any = None) -> None:
    """torch.distributed's; RuntimeError says what to do where a rank does not come in the group's timeout."""
    try:
        dist.all_reduce(x, operation or dist.ReduceOp.SUM, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"ranks {dist.get_process_group_ranks(group)} of process_group= did not come to this step "
            f"together ({str(error).splitlines()[0]}): give the ranks that all train, each at every step"
        ) from error


def meet(group: dist.ProcessGroup) -> None:
    """Warn of ranks of a group that do not come to this step within PATIENCE; collectives wait for them."""
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank(group) < 0 or len(ranks) == 1:
        return
    store, places = private_torch.store(), _places(ranks)
    store.set(places[dist.get_rank()], "here")
    try:
        store.wait(list(places.values()), PATIENCE)
    except RuntimeError:
        late = [rank for rank, place in places.items() if not store.check([place])]
        warnings.warn(
            f"ranks {late} of process_group= have not come to this step within "
            f"{PATIENCE.total_seconds():g} seconds and are waited for, as long as the group's timeout says: "
            "give the ranks that all train",
            stacklevel=2,
        )


def _places(ranks: Sequence[int]) -> dict[int, str]:
    """Where each of these ranks leaves what it has at this meeting of theirs."""
    turn = next(_turns[tuple(ranks)])
    return {rank: f"dgs_kernels/{'-'.join(map(str, ranks))}/{turn}/{rank}" for rank in ranks}


def compare(norms: dict[str, Tensor], params: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Raise where ranks that reduce gradients together hold others; `norms` [G] of each kind of gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    shapes = [list(p.shape) for p in params]
    mine = {what: norm.double().tolist() for what, norm in norms.items()}
    groups = [group] if group is not None else _groups(params)
    for everywhere in [_gathered((shapes, mine), g) for g in groups] or [_left((shapes, mine))]:
        if any(theirs != shapes for theirs, _ in everywhere):
            raise RuntimeError(
                "the ranks hold different parameters: of ZeroRedundancyOptimizer hook the outer optimizer, "
                "not its .optim; for stages of a pipeline pass process_group=, the ranks that hold the same "
                'stage (granularity="model" is then the stage)'
            )
        for what, norm in mine.items():
            theirs = [rank[what] for _, rank in everywhere]
            if not all(len(t) == len(norm) and np.allclose(t, norm, 1e-3, 0, True) for t in theirs):
                raise RuntimeError(
                    f"the {what} gradients differ between ranks. DDP reduces only the first backward after a "
                    "forward: make that the task's, and pass process_group= to average captured gradients at "
                    "each step (ranks that do not train together: check_ranks=False)"
                )


def _gathered(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """What each rank of a group has; nothing, where this one is not of it."""
    if dist.get_rank(group) < 0:
        return []
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, mine, group)
    return everywhere


def _left(mine: Any) -> list[Any]:
    """What each rank has, where nothing says which ones train together; nothing, where some keep silent.

    Those may do something else meanwhile: a collective of all ranks would hang, or meet another one. So each
    rank leaves its own in the store through which the ranks have found each other.
    """
    store, places = private_torch.store(), _places(range(dist.get_world_size()))
    store.set(places[dist.get_rank()], json.dumps(mine))
    try:
        store.wait(list(places.values()), PATIENCE)
        return [json.loads(store.get(place)) for place in places.values()]
    except (RuntimeError, ValueError):
        # ValueError comes where a rank has taken its key back.
        store.set(places[dist.get_rank()], "")
        warnings.warn(
            "not all ranks came to this step, so their gradients were not compared: pass process_group=, the "
            "ranks that train together, or check_ranks=False",
            stacklevel=2,
        )
        return []


def _groups(params: Sequence[Tensor]) -> list[Any]:
    """The groups of DTensors' meshes and of DDP's wrappers."""
    meshes = {p.device_mesh for p in params if is_sharded(p)}
    if meshes:
        return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    # A parameter does not know the wrapper that reduces its gradient; this is once in a training.
    known = set(map(id, params))
    wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    groups = [w.process_group for w in wrappers if any(id(p) in known for p in w.parameters())]
    return list({id(group): group for group in groups}.values())
