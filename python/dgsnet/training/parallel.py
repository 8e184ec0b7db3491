"""Several processes: weights sharded over them (FSDP2), and states that any number of them can load.

PyTorch's own functions are used rather than accelerate's plugin: that has no effect without a GPU, so that
nothing about it could be tested on a CPU, and a model is sharded once here for two stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dgsnet.model.checkpoint import whole


def shard(module: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Shard a module's parameters over all processes, in place; frozen ones too.

    Each of `blocks` is gathered when it is needed and freed after it, so that a process holds its share of
    the weights and one or two whole blocks. What is not in a block is gathered while the module runs.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


@contextlib.contextmanager
def no_sync(module: FSDPModule) -> Iterator[None]:
    """Let gradients add up on each process, to be exchanged in a later backward."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict with whole tensors, on the CPU; every process has to ask for it."""
    return _changed(optimizer.state_dict(), lambda _, x: whole(x).cpu() if isinstance(x, Tensor) else x)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of optimizer_state, sharded as the parameters are, over however many processes.

    Its options are the optimiser's own; ValueError where its tensors are of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def like(number: int, value: Any) -> Any:
        parameter = parameters[number]
        if not isinstance(value, Tensor) or (value.dim() and value.shape != parameter.shape):
            raise ValueError(f"the optimiser's state of parameter {number} is of another")
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.dim():
            value = value.to(parameter.device)
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)
        return value

    if any(entry.keys() != {"step", "exp_avg", "exp_avg_sq"} for entry in state["state"].values()):
        raise ValueError("the optimiser's state is not AdamW's")
    own = {"param_groups": optimizer.state_dict()["param_groups"]}
    optimizer.load_state_dict(_changed(state, like) | own)


def _changed(state: dict[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    """A state with changed values, given each with its parameter's number."""
    entries = state["state"].items()
    return state | {"state": {n: {k: change(n, x) for k, x in entry.items()} for n, entry in entries}}
