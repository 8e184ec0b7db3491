"""What is decided before the first step: folder, data, processes and the size of a batch."""

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

from dgsnet.config import CONFIG_FILE, Config
from dgsnet.data.captions import attach_captions
from dgsnet.data.nuisances import NUISANCES
from dgsnet.data.samples import Sample, find_samples
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import build_model, read_config
from dgsnet.training.experts import FileExpert
from dgsnet.training.plan import BRANCHES
from dgsnet.training.step import Step, speed_up

# Settings that a resumed run may change, because they do not decide its weights.
FREE_SETTINGS = (
    "data.workers",
    "data.prefetch",
    "data.cache",
    "optim.parallel",
    "checkpoint_every",
    "log_every",
)
# Where the search for the largest batch starts, going down by tenths.
LARGEST_BATCH = 4096


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Refuse a folder that is taken, and a resumption with other settings; nothing is written yet."""
    saved = out / CONFIG_FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: give another folder, or --resume to go on with its run")
    if resume and saved.is_file():
        before, now = read_config(saved).flat(), config.flat()
        for name, value in now.items():
            found = name == "optim.batch_size" and value == "auto"  # and is kept
            if value != before[name] and name not in FREE_SETTINGS and not found:
                raise UserError(
                    f"cannot resume {out} with {name}={value}, it was started with {before[name]}: leave "
                    "the setting out, or start a new run"
                )
    if not config.data.train:
        nothing = f" ({out} holds no run to resume)" if resume else ""
        raise UserError(f"no training images: name a dataset with --data.train{nothing}")


def check_experts(config: Config) -> None:
    """Refuse experts, or a pull to the teacher, that nothing would use or make."""
    given = {
        f"surgery.text={config.surgery.text}": config.surgery.text != "project",
        f"surgery.distillation={config.surgery.distillation:g}": config.surgery.distillation > 0,
        f"data.nuisances={config.data.nuisances}": uses_nuisances(config),
    }
    used = next((name for name, value in given.items() if value), None)
    if used and not uses_surgery(config):
        raise UserError(
            f"{used} needs the three branches: leave it out, or set surgery.mode to feature or layer and "
            "model.lora_rank above 0"
        )
    if config.surgery.text != "project" and not (uses_text(config) or uses_nuisances(config)):
        raise UserError(
            f"surgery.text={config.surgery.text} has no expert with data.captions=none: give captions, or "
            "set data.nuisances=files"
        )


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
            loss, _, harmful, _ = step(pixels, torch.zeros(batch_size, device=device), text, nuisances)
        loss.backward(retain_graph=harmful is not None)
        if harmful is not None:
            harmful.backward()
        step.zero_grad()
        return batch_size

    return attempt()


def training_samples(config: Config, roots: list[str] | str, split: str) -> list[Sample]:
    """All samples of a split, with captions where the text branch needs them."""
    roots = [roots] if isinstance(roots, str) else roots
    found = {root: find_samples(root, split) for root in roots}
    if split == "train":
        labels = {sample.label for samples in found.values() for sample in samples}
        if len(labels) == 1:
            kind = "generated" if labels == {1} else "real"
            raise UserError(
                f"{', '.join(roots)}: all training images are {kind}; training needs both classes"
            )
        if uses_text(config):
            found = {root: attach_captions(s, config.data.captions, root) for root, s in found.items()}
    return [sample for samples in found.values() for sample in samples]


def uses_surgery(config: Config) -> bool:
    """Without adapters no gradient enters the encoder, so there is nothing to edit."""
    return config.surgery.mode != "none" and config.model.lora_rank > 0


def uses_text(config: Config) -> bool:
    return uses_surgery(config) and config.data.captions != "none"


def uses_nuisances(config: Config) -> bool:
    return config.data.nuisances != "none"


@contextlib.contextmanager
def accelerator_for(config: Config, out: Path) -> Iterator[Accelerator]:
    # bf16 needs no autocast: the backbone is kept in it, and all else widens what it takes.
    precision = "fp16" if config.optim.precision == "fp16" else "no"
    project = ProjectConfiguration(project_dir=str(out), logging_dir=str(out))
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        accelerator = Accelerator(mixed_precision=precision, log_with="tensorboard", project_config=project)
        kind = accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise UserError(
                f"training under accelerate's {kind} is not supported: launch plain data parallelism, and "
                "set optim.parallel=fsdp to shard the weights"
            )
        if (
            precision == "fp16" and accelerator.device.type == "cpu"
        ):  # accelerate would train in fp32 and not say so
            raise UserError("optim.precision=fp16 needs a GPU: use bf16 or fp32")
        if accelerator.device.type == "cuda":
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # cuBLAS is deterministic only with it
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield accelerator
        accelerator.end_training()
    finally:
        torch.use_deterministic_algorithms(deterministic)
        # The state is a singleton: without this a later run in this process could not have another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
