"""What hooks measure and keep over steps, on two processes; run by two_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dgs_kernels import ReferenceSubspace
from tests.dgs_kernels.hooks.training_loops import (
    STEPS,
    Hook,
    Net,
    batch,
    reference_loss,
    task_loss,
    weights,
)
from tests.dgs_kernels.hooks.two_ranks import shard


def steps(hook, model, rank=0, ranks=1) -> None:
    for step in range(STEPS):
        hook.backward(model, batch(step).part(rank, ranks))
        hook.optimizer.step()
        hook.optimizer.zero_grad()


def tracked(hook, model, rank=0, ranks=1) -> list:
    """What the steps' metrics say of the updates."""
    steps(hook, model, rank, ranks)
    metrics = hook.surgery.metrics()
    return [metrics.update_cosine, metrics.promise_held]


def tracked_fsdp2(kind, rank):
    model, hook = shard(kind, "layer", track_update=True)
    return tracked(hook, model, rank, 2)


def tracked_ddp(kind, rank):
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    hook = Hook(kind, model, model=model.module, granularity="layer", track_update=True)
    return tracked(hook, model, rank, 2)


def kept(hook, model, rank=0, ranks=1, references=None) -> list:
    """Weights after four steps, in every second of which references are captured anew."""
    for step in range(4):
        mine = batch(step).part(rank, ranks)
        if step % 2 == 0:
            for context, x in zip(hook.contexts(), (mine.x_harmful, mine.x_beneficial)):
                with context(steps=2):
                    reference_loss((references or model)(x)[0]).backward()
        hook.loss(model, mine).backward()
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    cosines = hook.surgery.metrics().refresh_cosine
    return [*weights(model), *(cosines[name] for name in sorted(cosines))]


def kept_fsdp2(kind, rank):
    model, hook = shard(kind, "layer")
    return kept(hook, model, rank, 2)


def kept_process_group(kind, rank):
    """What is captured is averaged once, though it serves twice."""
    model = DistributedDataParallel(Net())
    hook = Hook(kind, model, model=model.module, granularity="layer", process_group=dist.group.WORLD)
    return kept(hook, model, rank, 2, references=model.module)


def subspace(called, model, rank=0, ranks=1, references=None, **options) -> list:
    """Weights after four steps with two references each, of which the basis has room for three."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = ReferenceSubspace(3, optimizer, "layer", model=model, **options)
    for step in range(4):
        mine = batch(step).part(rank, ranks)
        for x in (mine.x_harmful, mine.x_beneficial):
            with surgery.reference():
                reference_loss((references or called)(x)[0]).backward()
        task_loss(called(mine.x)[0], mine).backward()
        optimizer.step()
        optimizer.zero_grad()
    if called is model and ranks > 1:
        with pytest.raises(RuntimeError, match="sharded by FSDP2"):
            surgery.state_dict()
    return [*weights(model), surgery.metrics().removed, surgery.metrics().rank]


def subspace_fsdp2(kind, rank):
    model, _ = shard("features")
    return subspace(model, model, rank, 2)


def subspace_ddp(kind, rank):
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    return subspace(model, model.module, rank, 2)


def subspace_process_group(kind, rank):
    model = DistributedDataParallel(Net())
    return subspace(model, model.module, rank, 2, model.module, process_group=dist.group.WORLD)


def subspace_unreduced(kind, rank):
    model = DistributedDataParallel(Net())
    return subspace(model, model.module, rank, 2, model.module)


SUBSPACES = {
    "subspace_fsdp2": subspace_fsdp2,
    "subspace_ddp": subspace_ddp,
    "subspace_process_group": subspace_process_group,
    "subspace_unreduced": subspace_unreduced,
}
SCENARIOS = {
    "tracked_fsdp2": tracked_fsdp2,
    "tracked_ddp": tracked_ddp,
    "kept_fsdp2": kept_fsdp2,
    "kept_process_group": kept_process_group,
}
