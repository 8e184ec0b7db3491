"""Training loops on two processes with gloo; run by test_two_ranks.py, which compares what they leave."""

from __future__ import annotations

import contextlib
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from dgs_kernels import ObjectiveSurgery
from tests.dgs_kernels.hooks.training_loops import (
    ADAMW,
    HOOKS,
    STEPS,
    Hook,
    Net,
    batch,
    every_product,
    reference_loss,
    task_loss,
    weights,
)


def on_two_ranks(rank: int, folder: str) -> None:
    """Run every scenario and leave {(loop, kind): weights or the error's text} in `folder`/`rank`.pt."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # These modules import this one, so the top of the file cannot import them.
    from tests.dgs_kernels.hooks import tracked_on_ranks, trainer_on_ranks

    found = {}
    runs = [*itertools.product(SCENARIOS.items(), HOOKS)]
    runs += itertools.product(tracked_on_ranks.SCENARIOS.items(), HOOKS[1:])
    runs += itertools.product(tracked_on_ranks.SUBSPACES.items(), ["subspace"])
    runs += itertools.product(trainer_on_ranks.SCENARIOS.items(), HOOKS)
    # The last of these lets the ranks count their meetings differently, and later ones would wait.
    runs += itertools.product(CAPTURED.items(), ["objectives"])
    for (loop, scenario), kind in runs:
        try:
            found[loop, kind] = [full(w) for w in scenario(kind, rank)]
        except (RuntimeError, ValueError) as error:
            found[loop, kind] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def full(w: torch.Tensor) -> torch.Tensor:
    return w.full_tensor() if hasattr(w, "full_tensor") else w


def train(hook, model, rank, parts=1, unsynced=contextlib.nullcontext):
    """Each rank has half of every batch, in `parts`; all but the last of them within `unsynced()`."""
    for step in range(STEPS):
        mine = batch(step).part(rank, 2)
        for i in range(parts):
            with unsynced() if i < parts - 1 else contextlib.nullcontext():
                hook.backward(model, mine.part(i, parts), weight=1 / parts)
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    return weights(model)


def ddp(kind, rank, **options):
    model = DistributedDataParallel(Net(), **options)
    return train(Hook(kind, model), model, rank)


def ddp_bucket_views(kind, rank):
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    return train(Hook(kind, model), model, rank, parts=2)


def ddp_no_sync(kind, rank, **options):
    model = DistributedDataParallel(Net(), **options)
    return train(Hook(kind, model), model, rank, parts=2, unsynced=model.no_sync)


def ddp_no_sync_bucket_views(kind, rank):
    return ddp_no_sync(kind, rank, gradient_as_bucket_view=True)


def one_forward(kind, rank, task_first, **options):
    """All losses from one forward through DDP's wrapper: it reduces the first backward only."""
    model = DistributedDataParallel(Net())
    hook = Hook(kind, model, **options)
    for step in range(STEPS):
        mine = batch(step).part(rank, 2)
        if kind == "features":
            hook.backward(model, mine)
        else:
            predictions = model(torch.cat([mine.x, mine.x_harmful, mine.x_beneficial]))[0].chunk(3)
            losses = [task_loss(predictions[0], mine), *map(reference_loss, predictions[1:])]
            contexts = [contextlib.nullcontext, *hook.contexts()]
            for loss, context in sorted(
                zip(losses, contexts), key=lambda pair: (pair[0] is losses[0]) != task_first
            ):
                with context():
                    loss.backward(retain_graph=True)
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    return weights(model)


def ddp_two_backwards(kind, rank):
    return one_forward(kind, rank, task_first=False)


def ddp_two_backwards_remedy(kind, rank):
    options = {} if kind == "features" else {"process_group": dist.group.WORLD}
    return one_forward(kind, rank, task_first=True, **options)


def process_group_of_one(kind, rank):
    """Captured gradients that DDP has averaged already, over a group that is not all processes."""
    groups = [dist.new_group([r]) for r in range(2)]
    model = DistributedDataParallel(Net())
    options = {} if kind == "features" else {"process_group": groups[rank]}
    return train(Hook(kind, model, **options), model, rank)


def ddp_over_some_ranks(kind, rank):
    """DDP's wrapper knows its ranks, which are not all: the others, who train on their own, are not asked."""
    groups = [dist.new_group([r]) for r in range(2)]
    model = DistributedDataParallel(Net(), process_group=groups[rank])
    hook = Hook(kind, model)
    for step in range(STEPS):
        hook.backward(model, batch(step + STEPS * rank))
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    found = [weights(model)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def ddp_captures_without_the_wrapper(kind, rank):
    model = DistributedDataParallel(Net())
    hook = Hook(kind, model)
    hook.references(model.module, batch(0).part(rank, 2))
    hook.loss(model, batch(0).part(rank, 2)).backward()
    hook.optimizer.step()
    return weights(model)


def sharded(granularity):
    def fsdp2(kind, rank):
        model, hook = shard(kind, granularity)
        return train(hook, model, rank, parts=2)

    return fsdp2


def sharded_in_part(granularity):
    def fsdp2_in_part(kind, rank):
        """The backbone is sharded but for its last bias, which each process has whole, as it has the head."""
        model = Net()
        whole = [model.backbone[3].bias, *model.head.parameters()]
        fully_shard(model.backbone, mesh=init_device_mesh("cpu", (2,)), ignored_params={*whole})
        for p in whole:
            p.register_hook(averaged)
        options = {} if kind == "features" else {"model": model, "granularity": granularity}
        return train(Hook(kind, model, **options), model, rank)

    return fsdp2_in_part


def averaged(grad: torch.Tensor) -> torch.Tensor:
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def reduced_by_hand(kind, rank):
    """Each gradient, as it is made, by the loop itself: no wrapper and no mesh tells of it."""
    model = Net()
    for p in model.parameters():
        p.register_hook(averaged)
    return train(Hook(kind, model), model, rank)


def task_reduced_by_hand(kind, rank):
    model = Net()
    hook = Hook(kind, model)
    hook.backward(model, batch(0).part(rank, 2))
    for p in model.parameters():
        p.grad = averaged(p.grad)
    hook.optimizer.step()
    return weights(model)


def shard(kind, granularity="tensor", **options):
    model = Net()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.backbone, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options = {} if kind == "features" else {"model": model, "granularity": granularity, **options}
    return model, Hook(kind, model, **options)


def fsdp2_no_sync(kind, rank):
    model, hook = shard(kind)

    @contextlib.contextmanager
    def unsynced():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return train(hook, model, rank, parts=2, unsynced=unsynced)


def fsdp2_scaler(kind, rank):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, hook = shard(kind, scaler=scaler)
    for step in range(STEPS):
        mine = batch(step).part(rank, 2)
        hook.backward(model, mine, backward=lambda loss: scaler.scale(loss).backward())
        scaler.step(hook.optimizer)
        scaler.update()
        hook.optimizer.zero_grad()
    return weights(model)


def fsdp2_task_unreduced(kind, rank):
    """The task's micro-batch waits unreduced when a reference is captured."""
    model, hook = shard(kind)
    model.set_requires_gradient_sync(False)
    hook.loss(model, batch(0).part(rank, 2)).backward()
    model.set_requires_gradient_sync(True)
    hook.backward(model, batch(0).part(rank, 2))
    return weights(model)


def ranks_that_do_not_train_together(kind, rank):
    """Each has a model of its own, and data of its own; both tell what the first one learned."""
    model = Net()
    hook = Hook(kind, model, **({} if kind == "features" else {"check_ranks": False}))
    for step in range(STEPS):
        hook.backward(model, batch(step + 10 * rank))
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
    return weights(model)


def fsdp2_without_model(kind, rank):
    model, _ = shard("features")
    hook = Hook(kind, model)
    hook.references(model, batch(0).part(rank, 2))
    return weights(model)


# Every loss captured, the task's too: ObjectiveSurgery only.


def train_captured(hook, model, rank, ranks=2):
    for step in range(STEPS):
        hook.capture(model, batch(step).part(rank, ranks))
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    return weights(model)


def captured_ddp(kind, rank, **options):
    model = DistributedDataParallel(Net())
    return train_captured(Hook(kind, model, **options), model, rank)


# Of tensors with one number a running sum may be zero but for rounding, whose sign then decides.
RUNNING = {"mode": "running", "weighting": "pcgrad", "granularity": "model"}


def captured_running_ddp(kind, rank):
    return captured_ddp(kind, rank, **RUNNING)


def captured_without_the_wrapper(kind, rank, **options):
    """DDP reduces nothing: `process_group=` averages all."""
    model = DistributedDataParallel(Net())
    hook = Hook(kind, model, process_group=dist.group.WORLD, **options)
    return train_captured(hook, model.module, rank)


def captured_running_without_the_wrapper(kind, rank):
    return captured_without_the_wrapper(kind, rank, **RUNNING)


def captured_running_fsdp2(kind, rank):
    model, hook = shard(kind, "layer", mode="running", weighting="pcgrad")
    return train_captured(hook, model, rank)


def captured_scaler_fsdp2(kind, rank):
    """The remedy for FSDP2 with a GradScaler: combine() before it looks at `.grad`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, hook = shard(kind, scaler=scaler)
    for step in range(STEPS):
        hook.capture(model, batch(step).part(rank, 2), lambda loss: scaler.scale(loss).backward())
        hook.surgery.combine()
        scaler.step(hook.optimizer)
        scaler.update()
        hook.optimizer.zero_grad()
    return weights(model)


def captured_on_some_ranks(kind, rank):
    """A part of the model that a loss reaches on one rank only, and one that it reaches on none."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("both", "one", "none")}).double()
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, eps=0.5)
    surgery = ObjectiveSurgery(optimizer, every_product, process_group=dist.group.WORLD)
    x = torch.tensor([1.0, 2.0 + rank], dtype=torch.float64)
    for route in (rank == 0, True):
        with surgery.objective():
            hidden = model["both"](x)
            (model["one"](hidden) if route else hidden).square().sum().backward()
    optimizer.step()
    return weights(model)


def captured_stages(kind, rank):
    """Every rank holds a stage of its own, and says nothing of the ranks that hold the same."""
    model = torch.nn.Linear(2, 2 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    surgery = ObjectiveSurgery(optimizer)
    for _ in range(2):
        with surgery.objective():
            model(torch.rand(3, 2)).square().sum().backward()
    optimizer.step()


def captured_on_one_rank(kind, rank):
    """One rank trains, and the other waits for what comes of it, in a collective of its own."""
    model = Net()
    if rank == 0:
        with pytest.warns(UserWarning, match="pass process_group=, the ranks that train together"):
            train_captured(Hook(kind, model), model, rank, ranks=1)
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
    return weights(model)


def captured_zero(kind, rank):
    """The outer optimiser of ZeRO carries the hook, as it has all parameters."""
    model = DistributedDataParallel(Net())
    hook = Hook(kind, model)
    hook.optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAMW)
    hook.surgery = ObjectiveSurgery(hook.optimizer, every_product, "tensor")
    return train_captured(hook, model, rank)


CAPTURED = {
    "captured_stages": captured_stages,
    "captured_zero": captured_zero,
    "captured_ddp": captured_ddp,
    "captured_running_ddp": captured_running_ddp,
    "captured_without_the_wrapper": captured_without_the_wrapper,
    "captured_running_without_the_wrapper": captured_running_without_the_wrapper,
    "captured_running_fsdp2": captured_running_fsdp2,
    "captured_scaler_fsdp2": captured_scaler_fsdp2,
    "captured_on_some_ranks": captured_on_some_ranks,
    "captured_on_one_rank": captured_on_one_rank,
}
SCENARIOS = {
    "ddp": ddp,
    "ddp_bucket_views": ddp_bucket_views,
    "ddp_no_sync": ddp_no_sync,
    "ddp_no_sync_bucket_views": ddp_no_sync_bucket_views,
    "ddp_two_backwards": ddp_two_backwards,
    "ddp_two_backwards_remedy": ddp_two_backwards_remedy,
    "process_group_of_one": process_group_of_one,
    "ddp_over_some_ranks": ddp_over_some_ranks,
    "ddp_captures_without_the_wrapper": ddp_captures_without_the_wrapper,
    "ranks_that_do_not_train_together": ranks_that_do_not_train_together,
    "reduced_by_hand": reduced_by_hand,
    "task_reduced_by_hand": task_reduced_by_hand,
    "fsdp2": sharded("tensor"),
    "fsdp2_layer": sharded("layer"),
    "fsdp2_model": sharded("model"),
    "fsdp2_in_part": sharded_in_part("model"),
    "fsdp2_layer_in_part": sharded_in_part("layer"),
    "fsdp2_scaler": fsdp2_scaler,
    "fsdp2_no_sync": fsdp2_no_sync,
    "fsdp2_task_unreduced": fsdp2_task_unreduced,
    "fsdp2_without_model": fsdp2_without_model,
}
