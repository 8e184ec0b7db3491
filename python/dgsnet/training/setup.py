"""What is decided before the first step: processes and the size of a batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, find_executable_batch_size, gather_object

from dgsnet.config import CONFIG_FILE, Config, read_config
from dgsnet.data.nuisances import NUISANCES
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import build_model
from dgsnet.processes import announced_size
from dgsnet.training.checks import uses_nuisances, uses_surgery, uses_text
from dgsnet.training.experts import FileExpert
from dgsnet.training.plan import BRANCHES
from dgsnet.training.step import Step, speed_up

# Where the search for the largest batch starts, going down by tenths.
LARGEST_BATCH = 4096


def with_batch_size(config: Config, out: Path, accelerator: Accelerator) -> Config:
    """The configuration with a number for batch_size "auto": that of the run in `out`, or the largest."""
    if config.optim.batch_size != "auto":
        return config
    if (out / CONFIG_FILE).is_file():
        size = read_config(out / CONFIG_FILE).optim.batch_size
    elif accelerator.device.type != "cuda":
        raise UserError("optim.batch_size=auto fills a GPU's memory and there is no GPU: give a number")
    else:
        size = min(gather_object([largest_batch(config, accelerator.device)]))
        accelerator.print(f"optim.batch_size auto: {size}")
    return replace(config, optim=replace(config.optim, batch_size=size))


def largest_batch(config: Config, device: torch.device, start: int = LARGEST_BATCH) -> int:
    """The largest batch, of those nine tenths of the one before, whose forward and backward fit in memory."""
    model = speed_up(build_model(config, with_text=False).to(device), config.optim)
    surgery = config.surgery if uses_surgery(config) else None
    expert = FileExpert().to(device) if uses_nuisances(config) else None
    step = Step(model, BRANCHES, surgery, uses_text(config), expert)

    @find_executable_batch_size(starting_batch_size=start)
    def attempt(batch_size: int) -> int:
        pixels = torch.zeros(batch_size, 3, model.image_size, model.image_size, device=device)
        text = torch.zeros(batch_size, model.dim, device=device) if step.captioned else None
        nuisances = torch.zeros(batch_size, len(NUISANCES), device=device) if expert else None
        with torch.autocast(device.type, torch.float16, enabled=config.optim.precision == "fp16"):
            found = step(pixels, torch.zeros(batch_size, device=device), text, nuisances)
        found.loss.backward(retain_graph=found.harmful is not None)
        if found.harmful is not None:
            found.harmful.backward()
        step.zero_grad()
        return batch_size

    return attempt()


@contextlib.contextmanager
def accelerator_for(config: Config, out: Path) -> Iterator[Accelerator]:
    # bf16 needs no autocast: the backbone is kept in it, and all else widens what it takes.
    precision = "fp16" if config.optim.precision == "fp16" else "no"
    project = ProjectConfiguration(project_dir=str(out), logging_dir=str(out))
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        # Without a GPU accelerate makes a group only where it is told to use none.
        several = announced_size() > 1
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with="tensorboard",
            project_config=project,
            cpu=several and not torch.accelerator.is_available(),
        )
        if accelerator.num_processes != announced_size():
            raise UserError(
                f"{announced_size()} processes were started, but this one is in a group of "
                f"{accelerator.num_processes}: start them with torchrun, and with ACCELERATE_USE_CPU=1 where "
                "their GPUs are not CUDA's"
            )
        kind = accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise UserError(
                f"training under accelerate's {kind} is not supported: launch plain data parallelism, and "
                "set optim.parallel=fsdp to shard the weights"
            )
        # Accelerate would train in fp32 and not say so.
        if precision == "fp16" and accelerator.device.type == "cpu":
            raise UserError("optim.precision=fp16 needs a GPU: use bf16 or fp32")
        if accelerator.device.type == "cuda":
            # cuBLAS is deterministic only with it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield accelerator
        accelerator.end_training()
    finally:
        torch.use_deterministic_algorithms(deterministic)
        # The state is a singleton: without this a later run in this process could not have another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
