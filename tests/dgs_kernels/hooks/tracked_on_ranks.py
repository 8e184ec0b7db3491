"""What hooks measure and keep over steps, on two processes; run by two_ranks.py."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from tests.dgs_kernels.hooks.training_loops import STEPS, Hook, Net, batch
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


SCENARIOS = {"tracked_fsdp2": tracked_fsdp2, "tracked_ddp": tracked_ddp}
