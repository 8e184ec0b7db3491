"""Training: the teacher's linear head on the frozen encoder, then the three branches with gradient surgery.

A run is a function of its configuration and data. Order, augmentation and dropout of every step are drawn
from (seed, step), never from a generator's history, so a run that was killed and resumed ends with the same
weights.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, find_executable_batch_size, gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dgs_kernels import OptimizerSurgery

from . import parallel
from .captions_cache import CaptionFeatures
from .checkpoint import (
    build_model,
    fingerprint,
    load_state,
    load_trained_state,
    read_config,
    save_state,
    trained_state,
    write_file,
    write_model,
)
from .config import CONFIG_FILE, Config, OptimConfig, SurgeryConfig
from .data import (
    DamageReport,
    EpochSampler,
    ImageDataset,
    LoaderWatch,
    Sample,
    attach_captions,
    collate,
    find_samples,
    loader_options,
    make_loader,
    pixels_on,
)
from .errors import UserError
from .evaluation import metrics
from .model import DGSNet
from .preprocess import Preprocessor

STATE_FILE = Path("state") / "resume.pt"
METRICS_FILE = "metrics.csv"
TRAIN_COLUMNS = ("loss", "image_loss", "text_loss", "alignment_loss", "accuracy")
VAL_COLUMNS = ("val_loss", "val_accuracy", "val_ap", "val_auc")
COLUMNS = ("step", "stage", "epoch", *TRAIN_COLUMNS, *VAL_COLUMNS)
HEAD, BRANCHES = 1, 2  # the stages
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


def train(config: Config, out: str | Path, *, resume: bool = False) -> Path:
    """Train a detector.

    Writes into `out`: config.json, metrics.csv, tensorboard/, best/ and last/ (model folders, see
    checkpoint.load_model) and state/ (what a killed run resumes from). docs/training.md describes them.

    Args:
        config: the run.
        out: the run's folder: new or empty, unless resuming.
        resume: go on with the run in `out`, or start it if there is none yet.

    Returns:
        `out`, which every command takes as --model.

    Raises:
        UserError: data, model or configuration cannot be used, `out` is taken, training diverged or ran out
            of GPU memory; one line with the remedy.

    Example:
        >>> from dgsnet.config import Config, DataConfig
        >>> train(Config(data=DataConfig(train=["photos"])), "runs/mine")  # doctest: +SKIP
        PosixPath('runs/mine')
    """
    out = Path(out)
    _check_folder(config, out, resume)
    samples = _samples(config, config.data.train, "train")
    val_samples = _samples(config, config.data.val, "val") if config.data.val else []
    with _accelerator(config, out) as accelerator:
        try:
            config = _with_batch_size(config, out, accelerator)
            _Run(config, out, accelerator, samples, val_samples).train()
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory with optim.batch_size={config.optim.batch_size}: halve it and double "
                "optim.accumulation"
            ) from None
    return out


def _check_folder(config: Config, out: Path, resume: bool) -> None:
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


def _with_batch_size(config: Config, out: Path, accelerator: Accelerator) -> Config:
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
    surgery = config.surgery if _uses_surgery(config) else None
    step = Step(model, BRANCHES, surgery, captioned=_uses_text(config))

    @find_executable_batch_size(starting_batch_size=start)
    def attempt(batch_size: int) -> int:
        pixels = torch.zeros(batch_size, 3, model.image_size, model.image_size, device=device)
        text = torch.zeros(batch_size, model.dim, device=device) if step.captioned else None
        with torch.autocast(device.type, torch.float16, enabled=config.optim.precision == "fp16"):
            loss, _, harmful = step(pixels, torch.zeros(batch_size, device=device), text)
        loss.backward(retain_graph=harmful is not None)
        if harmful is not None:
            harmful.backward()
        model.zero_grad()
        return batch_size

    return attempt()


def speed_up(model: DGSNet, optim: OptimConfig) -> DGSNet:
    """Make the model as the settings of precision, memory and compilation say."""
    if optim.precision == "bf16":
        model.set_base_dtype(torch.bfloat16)
    model.set_grad_checkpointing(optim.checkpointing)
    if optim.compile != "no":
        model.compile_blocks(optim.compile)
    return model


def _samples(config: Config, roots: list[str], split: str) -> list[Sample]:
    """All samples of a split, with captions where the text branch needs them."""
    found = {root: find_samples(root, split) for root in roots}
    if split == "train":
        labels = {sample.label for samples in found.values() for sample in samples}
        if len(labels) == 1:
            kind = "generated" if labels == {1} else "real"
            raise UserError(
                f"{', '.join(roots)}: all training images are {kind}; training needs both classes"
            )
        if _uses_text(config):
            found = {root: attach_captions(s, config.data.captions, root) for root, s in found.items()}
    return [sample for samples in found.values() for sample in samples]


def _watched() -> bool:
    return sys.stderr.isatty()


def _uses_surgery(config: Config) -> bool:
    """Without adapters no gradient enters the encoder, so there is nothing to edit."""
    return config.surgery.mode != "none" and config.model.lora_rank > 0


def _uses_text(config: Config) -> bool:
    return _uses_surgery(config) and config.data.captions != "none"


@contextlib.contextmanager
def _accelerator(config: Config, out: Path) -> Iterator[Accelerator]:
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


class Step(nn.Module):
    """One forward pass of a stage, from images to losses, inside one module as data parallelism needs it.

    Args:
        model: the model; which parameters require a gradient is set here.
        stage: HEAD or BRANCHES.
        surgery: settings of the three branches; None trains the student alone, plain LoRA or a linear probe.
        captioned: whether there are text features.
    """

    def __init__(
        self, model: DGSNet, stage: int, surgery: SurgeryConfig | None, captioned: bool = True
    ) -> None:
        super().__init__()
        self.model, self.surgery, self.captioned = model, surgery, captioned
        self.enter(stage)

    def enter(self, stage: int) -> None:
        """Go to a stage: what requires a gradient is what it trains."""
        self.stage = stage
        for name, parameter in self.model.named_parameters():
            if "lora_" in name or "image_head" in name:
                parameter.requires_grad_(stage == BRANCHES)
        self.model.head.teacher_head.requires_grad_(stage == HEAD)
        # Without captions the text head has no gradient, and data parallelism must not wait for one.
        self.model.head.text_head.requires_grad_(
            stage == BRANCHES and self.surgery is not None and self.captioned
        )

    def forward(
        self, pixels: Tensor, labels: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None] | Tensor:
        """The loss to differentiate, TRAIN_COLUMNS as one detached tensor [5], and for layer-wise surgery the
        harmful reference loss; means over the batch. Without labels, the logits of the head in training.

        An empty batch (all its images damaged, or none for this process in an epoch's last step) counts as a
        black image of no weight, so that this process takes part in what the processes exchange.
        """
        empty = not len(pixels)
        if empty:
            pixels = pixels.new_zeros(1, 3, self.model.image_size, self.model.image_size)
        if labels is None:
            return (self.model.teacher_logits if self.stage == HEAD else self.model.logits)(pixels)
        if not empty:
            return self._losses(pixels, labels, text)
        text = pixels.new_zeros(1, self.model.dim) if self.captioned else None
        found = self._losses(pixels, labels.new_zeros(1), text)
        return tuple(None if value is None else value * 0 for value in found)

    def _losses(
        self, pixels: Tensor, labels: Tensor, text: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.stage == HEAD or self.surgery is None:
            return self._one_branch(pixels, labels)
        teacher = self.model.teacher_features(pixels)  # first, while no activations are kept for backward
        student = self.model.student_features(pixels)
        options = {k: getattr(self.surgery, k) for k in ("order", "eps", "reference_batch_size")}
        harmful = None
        with torch.autocast(pixels.device.type, enabled=False):  # heads and losses stay in fp32
            student, teacher = _wide(student), _wide(teacher)
            if self.surgery.mode == "layer":
                # Without text features nothing is projected here; the alignment stays.
                out = self.model.head(student, teacher, None, labels, **options)
                if text is not None:
                    text_loss, harmful = self._harmful(student, text, labels)
                    out = out._replace(text_loss=text_loss)
            else:
                out = self.model.head(student, teacher, text, labels, **options)
            loss = out.image_loss + out.text_loss + self.surgery.alignment * out.alignment_loss
        losses = (loss, out.image_loss, out.text_loss, out.alignment_loss)
        return loss, _values(losses, out.image_logits, labels), harmful

    def _harmful(self, student: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The text loss, and <student, h> with the constant harmful directions h = relu(dL_text/dt).

        The gradient of the latter is every layer's harmful reference: the vector-Jacobian product of the
        features with h. The beneficial one is that of the alignment loss, and needs no pass of its own.
        """
        head = self.model.head.text_head
        logits = head(text).squeeze(-1)
        with torch.no_grad():
            residuals = (torch.sigmoid(logits) - labels) / len(labels)
            directions = torch.relu(residuals[:, None] * head.weight)
        return F.binary_cross_entropy_with_logits(logits, labels), (student * directions).sum()

    def _one_branch(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, None]:
        teaching = self.stage == HEAD
        features = (self.model.teacher_features if teaching else self.model.student_features)(pixels)
        head = self.model.head.teacher_head if teaching else self.model.head.image_head
        with torch.autocast(pixels.device.type, enabled=False):
            logits = head(_wide(features)).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss, _values((loss, *loss.new_zeros(3)), logits, labels), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def named_parameters(model: DGSNet) -> list[tuple[str, nn.Parameter]]:
    """What is trained, with A and B of an adapter named as tensors of the module they adapt: one layer."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [(re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name), p) for name, p in named]


def layer_surgery(
    optimizer: torch.optim.Optimizer,
    surgery: SurgeryConfig,
    scaler: torch.amp.GradScaler | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> OptimizerSurgery:
    """Project every adapter's harmful reference out of its gradient before each step.

    Positive parts are taken where signs mean something, at the features, hence the "full" rule here: the
    signs of an adapter's A and B are arbitrary.
    """
    return OptimizerSurgery(
        optimizer,
        eps=surgery.eps,
        rule="full",
        granularity="layer",
        scaler=scaler,
        process_group=process_group,
    )


def _values(losses: tuple[Tensor, ...], logits: Tensor, labels: Tensor) -> Tensor:
    accuracy = ((logits > 0) == (labels > 0.5)).float().mean()
    return torch.stack([*losses, accuracy]).detach()


@dataclass
class Position:
    """Where a run stands; with the trained weights and the optimiser, all that decides how it goes on.

    Args:
        stage: HEAD or BRANCHES, BRANCHES + 1 when finished.
        epoch: epoch within the stage.
        seen: images of this epoch already used.
        stage_step: optimiser steps done in this stage.
        step: optimiser steps done in the run.
    """

    stage: int
    epoch: int = 0
    seen: int = 0
    stage_step: int = 0
    step: int = 0


@dataclass
class MicroBatch:
    """Images of one process and one backward pass, and their weight in the mean over the optimiser step."""

    indices: list[int]
    weight: float


class StepPlan:
    """Cuts an order of images into optimiser steps, and those into even micro-batches; a batch sampler.

    Every process gets its share of every step, no image comes twice and none is left out. The weights make an
    optimiser step the mean over its images, however they are split; in the last, smaller step too.

    Args:
        images: images of an optimiser step, over all processes.
        batch_size: images of a micro-batch, at most.
        rank, world: number of this process, and of all processes.
    """

    def __init__(self, images: int, batch_size: int, rank: int, world: int) -> None:
        self.images, self.batch_size = images, batch_size
        self.rank, self.world = rank, world
        self.steps: list[
            tuple[int, list[MicroBatch]]
        ] = []  # images over all processes, micro-batches of this one

    def set(self, order: list[int], limit: int | None = None) -> None:
        """Plan at most `limit` steps over `order`; a process may get empty batches of the last one."""
        self.steps = []
        for start in range(0, len(order), self.images)[:limit]:
            images = np.asarray(order[start : start + self.images])
            micro_steps = math.ceil(len(images) / (self.batch_size * self.world))
            parts = np.array_split(images, micro_steps * self.world)[self.rank :: self.world]
            # Data parallelism averages over processes, hence the factor.
            micro = [MicroBatch(part.tolist(), self.world * len(part) / len(images)) for part in parts]
            self.steps.append((len(images), micro))

    def __iter__(self) -> Iterator[list[int]]:
        return (micro.indices for _, batches in self.steps for micro in batches)

    def __len__(self) -> int:
        return sum(len(batches) for _, batches in self.steps)


class _Run:
    """A training run: the state that lives through it, and its loops."""

    def __init__(
        self, config: Config, out: Path, accelerator: Accelerator, samples: list[Sample], val: list[Sample]
    ) -> None:
        self.config, self.out, self.accelerator = config, out, accelerator
        rank, self.world = accelerator.process_index, accelerator.num_processes
        self.data_hash = _hash(samples)
        self.preprocess = Preprocessor(config.preprocess)
        optim, data = config.optim, config.data
        dataset = ImageDataset(
            samples, self.preprocess, train=True, seed=config.seed, selection=data.selection
        )
        self.order = EpochSampler(dataset, shuffle=True, seed=config.seed)
        images = optim.batch_size * optim.accumulation * self.world
        self.plan = StepPlan(images, optim.batch_size, rank, self.world)
        options = loader_options(data.workers, data.prefetch)
        self.loader = DataLoader(dataset, batch_sampler=self.plan, **options)
        self.watch = LoaderWatch(data.workers, accelerator.device)
        self.watch.told = not accelerator.is_main_process  # one process speaks for all
        self.val_loader = None
        if val:
            val_dataset = ImageDataset(
                val[rank :: self.world], self.preprocess, train=False, selection=data.selection
            )
            self.val_loader = make_loader(
                val_dataset, batch_size=optim.batch_size, workers=data.workers, prefetch=data.prefetch
            )
            # As many on every process, since a sharded model is gathered from all of them for each.
            self.val_batches = math.ceil(math.ceil(len(val) / self.world) / optim.batch_size)
        self.damage, self.val_damage = DamageReport(len(samples)), DamageReport(len(val))

        self.model = build_model(config, with_text=_uses_text(config))
        if self.model.image_size != config.preprocess.image_size:
            raise UserError(
                f"model {config.model.name} takes images of {self.model.image_size} pixels, but "
                f"preprocess.image_size is {config.preprocess.image_size}: make them equal"
            )
        self.backbone = fingerprint(self.model)
        self.model.to(accelerator.device)
        self.text = None
        if self.model.text is not None:
            with accelerator.main_process_first():  # which encodes, so that the others find all done
                captions = (sample.caption for sample in samples)
                self.text = CaptionFeatures(self.model, captions, config.data.cache, progress=_watched())
            self.model.text = None
        speed_up(self.model, optim)
        self.position = Position(HEAD if _uses_surgery(config) else BRANCHES)
        self.best: list[float] | None = None
        self.sharded: Step | None = None  # sharded once, for both stages
        # Sums of the logged values, weighted, and of the weights, since the last logged step.
        self.sums = torch.zeros(len(TRAIN_COLUMNS) + 1, device=accelerator.device)

    def train(self) -> None:
        """Train from where `out` stands to the end."""
        state = self._restore()
        if self.position.stage > BRANCHES:
            return self.accelerator.print(f"{self.out} is already trained")
        self.accelerator.wait_for_everyone()  # every process has looked at the folder before one writes
        if self.accelerator.is_main_process:
            (self.out / STATE_FILE).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.out / CONFIG_FILE, self.config.to_json().encode())
        self.log = _Log(self.out, self.accelerator, state and state["metrics_bytes"], self.position.step)
        self.readable = self.position.step > 0
        while self.position.stage <= BRANCHES:
            self._train_stage(state)
            state = None
        for report in (self.damage, self.val_damage):
            for errors in gather_object([report.errors]):
                report.errors |= errors
            if self.accelerator.is_main_process and report.errors:
                print(report.summary(), file=sys.stderr)
        self.accelerator.print(f"trained: {self.out}")

    def _train_stage(self, state: dict[str, Any] | None) -> None:
        """Train from the position to the end of its stage; `state` is given right after a resumption."""
        stage, optim = self.position.stage, self.config.optim
        surgery = self.config.surgery if _uses_surgery(self.config) else None
        if self.sharded is None:
            step = Step(self.model, stage, surgery, captioned=self.text is not None)
        else:
            step = self.sharded
            step.enter(stage)
        if self.config.optim.parallel == "fsdp" and self.sharded is None and self.world > 1:
            parallel.shard(step, list(self.model.visual.transformer.resblocks), self.accelerator.device)
            self.sharded = step
        layerwise = stage == BRANCHES and surgery is not None and surgery.mode == "layer"
        # Without weight decay AdamW is Adam. The fused one would operate on gradients still scaled for fp16.
        optimizer = torch.optim.AdamW(
            named_parameters(self.model),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=not (layerwise and optim.precision == "fp16"),
        )
        self.surgery = None
        if layerwise:
            group = dist.group.WORLD if self.world > 1 and self.sharded is None else None
            self.surgery = layer_surgery(optimizer, surgery, self.accelerator.scaler, group)
        if state and state["optimizer"]:
            parallel.load_optimizer_state(optimizer, state["optimizer"])
        if self.sharded is None:
            self.step_module, self.optimizer = self.accelerator.prepare(step, optimizer)
        else:
            self.step_module, self.optimizer = step, optimizer
        if state and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        epochs = optim.head_epochs if stage == HEAD else optim.epochs
        while self.position.epoch < epochs and not self._at_max_steps():
            self._train_epoch(epochs)
        self.position = Position(stage + 1, step=self.position.step)
        self.optimizer = None
        self._checkpoint()

    def _at_max_steps(self) -> bool:
        limit = self.config.optim.max_steps
        return bool(limit) and self.position.stage == BRANCHES and self.position.stage_step >= limit

    def _train_epoch(self, epochs: int) -> None:
        position, optim = self.position, self.config.optim
        earlier = optim.head_epochs if position.stage == BRANCHES else 0
        self.order.set_epoch(earlier + position.epoch, skip=position.seen)
        limited = optim.max_steps and position.stage == BRANCHES
        self.plan.set(list(self.order), optim.max_steps - position.stage_step if limited else None)
        self.model.train()
        batches = iter(self.loader) if self.plan.steps else iter(())
        self.watch.start()
        bar = tqdm(
            self.plan.steps,
            desc=f"stage {position.stage} epoch {position.epoch + 1}/{epochs}",
            unit="step",
            disable=not (_watched() and self.accelerator.is_main_process),
        )
        started, images = time.monotonic(), 0
        for number, (size, micro_batches) in enumerate(bar, 1):
            self._optimiser_step(batches, micro_batches)
            self.watch.step(sum(len(micro.indices) for micro in micro_batches))
            position.step += 1
            position.stage_step += 1
            position.seen += size
            images += size
            more = number < len(self.plan.steps)
            if not more or position.step % self.config.log_every == 0:
                speed = images / (time.monotonic() - started)
                loss = self._log_training(speed)
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.1f}")
            if more and position.step % self.config.checkpoint_every == 0:
                self._checkpoint()
        if not any(gather_object([self.readable])):
            raise UserError(f"none of the training images could be read; {self.damage.summary(shown=1)}")
        self._end_epoch(epochs)

    def _optimiser_step(self, batches: Iterator[dict[str, Any]], micro_batches: list[MicroBatch]) -> None:
        # Dropout depends on this seed alone, so that no generator's state need outlive a kill.
        key = (self.config.seed, self.position.step, self.accelerator.process_index)
        set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        device = self.accelerator.device
        texts = self.text if self.position.stage == BRANCHES else None
        for number, micro in enumerate(micro_batches, 1):
            batch = self.watch.next(batches)
            self.damage.add(batch["errors"])
            self.readable |= len(batch["labels"]) > 0
            last = number == len(micro_batches)
            pixels, labels = pixels_on(device, batch, self.preprocess), batch["labels"]
            unsynced = parallel.no_sync if self.sharded else self.accelerator.no_sync
            with contextlib.nullcontext() if last else unsynced(self.step_module):
                text = texts(batch["captions"]) if texts and batch["captions"] else None
                loss, values, harmful = self.step_module(
                    *(x if x is None else x.to(device, non_blocking=True) for x in (pixels, labels, text))
                )
                # The task's backward comes first: data parallelism reduces no other.
                self.accelerator.backward(loss * micro.weight, retain_graph=harmful is not None)
                if harmful is not None:
                    with self.surgery.harmful():
                        self.accelerator.backward(harmful * micro.weight)
            weight = micro.weight * (len(batch["labels"]) > 0)
            self.sums += weight * torch.cat([values, values.new_ones(1)])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _log_training(self, speed: float) -> float:
        """Write the means since the last call; returns the loss."""
        *values, weight = self.accelerator.reduce(self.sums, "mean").tolist()
        self.sums.zero_()
        if not weight:  # every image since then was damaged
            return math.nan
        row = {name: value / weight for name, value in zip(TRAIN_COLUMNS, values)}
        if self.position.stage == HEAD or not _uses_surgery(self.config):
            row = {name: row[name] for name in ("loss", "accuracy")}  # there is one branch
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"training diverged: the loss is {row['loss']} at step {self.position.step}; lower optim.lr"
                + (", or use optim.precision bf16" if self.config.optim.precision == "fp16" else "")
            )
        operated = self.surgery and self.surgery.metrics()
        self.log.write(
            self.position, row, images_per_second=speed, **(operated.scalars() if operated else {})
        )
        return row["loss"]

    def _end_epoch(self, epochs: int) -> None:
        """Validate, keep the model if it is the best, and make this a point to resume from."""
        position = self.position
        result = self._validate() if self.val_loader else {}
        text = "".join(f", {name} {value:.4f}" for name, value in result.items())
        place = f"stage {position.stage} epoch {position.epoch + 1}/{epochs}: step {position.step}"
        self.accelerator.print(place + text)
        if result:
            self.log.write(position, result)
        if position.stage == BRANCHES:
            # Equal AP, as at 1, is decided by the loss, and so is AP that one class alone does not have.
            score = [np.nan_to_num(result["val_ap"]).item(), -result["val_loss"]] if result else None
            if score is None or self.best is None or score > self.best:
                self.best = score
                self._save_model("best", result)
        position.epoch, position.seen = position.epoch + 1, 0
        self._checkpoint(result)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """VAL_COLUMNS over all validation images, of the head that this stage trains."""
        self.model.eval()
        scored: list[tuple[float, float]] = []
        batches = itertools.chain(self.val_loader, itertools.repeat(collate([])))
        for batch in itertools.islice(batches, self.val_batches):
            rank, world = self.accelerator.process_index, self.world
            self.val_damage.add((index * world + rank, message) for index, message in batch["errors"])
            logits = self.step_module(pixels_on(self.accelerator.device, batch, self.preprocess))
            scored += zip(logits.float().tolist(), batch["labels"].tolist())  # none of an empty batch
        scored = gather_object(scored)
        if not scored:
            raise UserError(
                f"none of the validation images could be read; {self.val_damage.summary(shown=1)}"
            )
        logits, labels = torch.tensor(scored, dtype=torch.float64).T
        result = metrics(labels.numpy(), torch.sigmoid(logits).numpy())
        loss = F.binary_cross_entropy_with_logits(logits, labels).item()
        return {"val_loss": loss} | {name: result[name.removeprefix("val_")] for name in VAL_COLUMNS[1:]}

    def _save_model(self, name: str, result: dict[str, float]) -> None:
        trained = trained_state(self.model)  # of a sharded model from all processes
        if self.accelerator.is_main_process:
            finite = {key: value for key, value in result.items() if math.isfinite(value)}
            write_model(
                self.out / name, trained, self.backbone, self.config, step=self.position.step, **finite
            )

    def _checkpoint(self, result: dict[str, float] | None = None) -> None:
        """Write the last model, then the state to resume from, which counts on all else being there."""
        sums = self.accelerator.reduce(self.sums, "mean")
        if self.position.stage == BRANCHES and self.position.stage_step:
            self._save_model("last", result or {})
        trained = trained_state(self.model)
        optimizer = parallel.optimizer_state(self.optimizer) if self.optimizer else None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "position": asdict(self.position),
                "model": trained,
                "optimizer": optimizer,
                "scaler": scaler.state_dict() if scaler else None,
                "sums": sums,
                "images_per_step": self.plan.images,
                "best": self.best,
                "metrics_bytes": self.log.sync(),
                "data": self.data_hash,
                "backbone": self.backbone,
            }
            save_state(self.out / STATE_FILE, state)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> dict[str, Any] | None:
        """Go to where the run in `out` stands, if it has got anywhere."""
        path = self.out / STATE_FILE
        if not path.is_file():
            return None
        state = load_state(path)
        for key, now, what in (
            ("data", self.data_hash, "the training images, their labels or captions"),
            ("backbone", self.backbone, f"the weights of {self.config.model.name}"),
        ):
            if state[key] != now:
                raise UserError(
                    f"cannot resume {self.out}: {what} have changed since it was started; start a new run"
                )
        load_trained_state(self.model, state["model"])
        self.position = Position(**state["position"])
        self.best = state["best"]
        self.sums.copy_(state["sums"])
        # On another number of processes a step keeps its images, in more or fewer micro-batches.
        self.plan.images = state["images_per_step"]
        return state


def _hash(samples: list[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.path}\0{sample.label}\0{sample.caption}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class _Log:
    """metrics.csv and TensorBoard; both go back to where a resumed run stands.

    Args:
        out: the run's folder.
        accelerator: carries the tracker.
        size: bytes of metrics.csv that count, None for a new run.
        step: the run's step; TensorBoard hides what it had after it.
    """

    def __init__(self, out: Path, accelerator: Accelerator, size: int | None, step: int) -> None:
        self.accelerator = accelerator
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        self.file: io.TextIOWrapper | None = None
        if not accelerator.is_main_process:
            return
        path = out / METRICS_FILE
        if size is None:
            write_file(path, (",".join(COLUMNS) + "\n").encode())
        elif path.is_file() and path.stat().st_size >= size:
            os.truncate(path, size)
        else:
            raise UserError(
                f"cannot resume {out}: {path} is shorter than it was; put it back or start a new run"
            )
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="", lineterminator="\n")

    def write(self, position: Position, row: dict[str, float], **tracked: float) -> None:
        """Add a row; `tracked` goes to TensorBoard only (times, which no two runs share)."""
        place = {"step": position.step, "stage": position.stage, "epoch": position.epoch + 1}
        if self.file:
            self.writer.writerow(place | {name: f"{value:.6g}" for name, value in row.items()})
            self.file.flush()
        finite = {name: value for name, value in (row | tracked).items() if math.isfinite(value)}
        self.accelerator.log(finite, step=position.step)

    def sync(self) -> int:
        """Have metrics.csv on the disk; returns its size in bytes."""
        os.fsync(self.file.fileno())
        return self.file.seek(0, io.SEEK_END)
