"""What hooks measure and keep over steps, on two processes; run by two_ranks.py."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.dgs_kernels.hooks.training_loops import STEPS, Hook, Net, batch, reference_loss, weights
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


SCENARIOS = {
    "tracked_fsdp2": tracked_fsdp2,
    "tracked_ddp": tracked_ddp,
    "kept_fsdp2": kept_fsdp2,
    "kept_process_group": kept_process_group,
}
