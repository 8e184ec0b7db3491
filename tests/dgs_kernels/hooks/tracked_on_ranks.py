"""What hooks measure and keep over steps, on two processes; run by two_ranks.py."""

from __future__ import annotations

import io
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
from tests.dgs_kernels.hooks.two_ranks import full, shard

WAYS = ["never", "checkpoint", "each its own", "whole", "in one process"]


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
    optimizer, surgery = with_subspace(model, **options)
    subspace_steps(optimizer, surgery, called, range(4), rank, ranks, references)
    return [*weights(model), surgery.metrics().removed, surgery.metrics().rank]


def with_subspace(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, ReferenceSubspace(3, optimizer, "layer", model=model, **options)


def subspace_steps(optimizer, surgery, called, steps, rank, ranks, references=None) -> None:
    for step in steps:
        mine = batch(step).part(rank, ranks)
        for x in (mine.x_harmful, mine.x_beneficial):
            with surgery.reference():
                reference_loss((references or called)(x)[0]).backward()
        task_loss(called(mine.x)[0], mine).backward()
        optimizer.step()
        optimizer.zero_grad()


def subspace_resumed(way):
    def resumed(kind, rank):
        """Saved after two of four steps of sharded training, and gone on with, in one of several ways."""
        model, _ = shard("features")
        optimizer, surgery = with_subspace(model)
        subspace_steps(optimizer, surgery, model, range(2), rank, 2)
        if way == "never":
            subspace_steps(optimizer, surgery, model, range(2, 4), rank, 2)
            return weights(model)
        state = surgery.state_dict()
        if way == "in one process":
            other = Net()
            other.load_state_dict({name: full(p) for name, p in model.state_dict().items()})
            optimizer, surgery = with_subspace(other, check_ranks=False)
            surgery.load_state_dict(state)
            subspace_steps(optimizer, surgery, other, range(2, 4), 0, 1)
            return weights(other)
        other, _ = shard("features")
        other_optimizer, again = with_subspace(other)
        if way == "checkpoint":
            folder = [tempfile.mkdtemp() if rank == 0 else None]
            dist.broadcast_object_list(folder)
            dcp.save({"model": model, "subspace": surgery}, checkpoint_id=folder[0])
            dcp.load({"model": other, "subspace": again}, checkpoint_id=folder[0])
            dist.barrier()
            shutil.rmtree(folder[0], ignore_errors=True)
        else:
            other.load_state_dict(model.state_dict())
            if way == "whole":
                state["basis"] = {place: full(of) for place, of in state["basis"].items()}
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            again.load_state_dict(torch.load(file, weights_only=True))
        subspace_steps(other_optimizer, again, other, range(2, 4), rank, 2)
        return weights(other)

    return resumed


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
    **{f"subspace_resumed: {way}": subspace_resumed(way) for way in WAYS},
}
SCENARIOS = {
    "tracked_fsdp2": tracked_fsdp2,
    "tracked_ddp": tracked_ddp,
    "kept_fsdp2": kept_fsdp2,
    "kept_process_group": kept_process_group,
}
