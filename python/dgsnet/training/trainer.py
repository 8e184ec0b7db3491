"""The loop of training: the teacher's head on the frozen encoder, then three branches with gradient surgery.

A run is a function of its configuration and data. Order, augmentation and dropout of every step are drawn
from (seed, step), never from a generator's history, so a run that was killed and resumed ends with the same
weights.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.nn.utils import clip_grad_norm_

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery
from dgsnet.config import CONFIG_FILE
from dgsnet.errors import UserError
from dgsnet.evaluation.metrics import metrics
from dgsnet.files import write_file
from dgsnet.model.checkpoint import build_model, damaged_state, fingerprint, load_trained_state
from dgsnet.training import drift, parallel
from dgsnet.training.checks import uses_nuisances, uses_surgery, uses_text
from dgsnet.training.experts import FileExpert
from dgsnet.training.feed import Feed
from dgsnet.training.log import VAL_COLUMNS, Log, Progress
from dgsnet.training.plan import BRANCHES, HEAD, Job, MicroBatch, dropout_seed, lr_factor
from dgsnet.training.setup import accelerator_for, with_batch_size
from dgsnet.training.state import STATE_FILE, State
from dgsnet.training.step import TRAIN_COLUMNS, Step, layer_surgery, parameter_groups, speed_up


def fit(job: Job) -> None:
    """Train from where the job's folder stands to the end; see train.train and update.update."""
    with accelerator_for(job.config, job.out) as accelerator:
        config = with_batch_size(job.config, job.out, accelerator)
        try:
            Trainer(replace(job, config=config), accelerator).train()
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory with optim.batch_size={config.optim.batch_size}: halve it and double "
                "optim.accumulation"
            ) from None


@dataclass
class Stage:
    """What one stage trains with.

    Attributes:
        module: the `Step`, as data parallelism wraps it.
        surgery: layer-wise.
        objectives: of replayed images.
        rates: learning rates of the optimiser's groups, without schedule.
    """

    module: Any
    optimizer: Any
    surgery: OptimizerSurgery | None
    objectives: ObjectiveSurgery | None
    epochs: int
    epochs_before: int
    rates: list[float]


class Trainer:
    """Trains a job's model, from wherever its folder stands; optim.batch_size is a number by now."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        config = job.config
        self.config, self.out, self.update, self.accelerator = config, job.out, job.update, accelerator
        self.model = build_model(config, with_text=uses_text(config))
        backbone = fingerprint(self.model)
        if job.update:
            load_trained_state(self.model, job.update.start)
        self.model.to(accelerator.device)
        self.expert = FileExpert().to(accelerator.device) if uses_nuisances(config) else None
        self.feed = Feed(job, accelerator)
        self.feed.encode_captions(self.model)
        speed_up(self.model, config.optim)
        self.state = State(job, accelerator, self.model, self.expert, self.feed, backbone)
        self.log = Log(job.out, accelerator)
        # It serves both stages, since weights are sharded once.
        self.sharded: Step | None = None

    def train(self) -> None:
        saved = self.state.restore()
        if self.state.position.stage > BRANCHES:
            return self.accelerator.print(f"{self.out} is already trained")
        if self.expert is not None and saved is None:
            shown = sys.stderr.isatty() and self.accelerator.is_main_process
            self.expert.standardise(self.feed.order.dataset.samples, progress=shown)
        self.feed.compute_frozen(self.model, self.state.backbone)
        # Every process has looked at the folder before one writes.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_file(self.out / CONFIG_FILE, self.config.to_json().encode())
        self.log.open(saved["metrics_bytes"] if saved else None, self.state.position.step)
        while self.state.position.stage <= BRANCHES:
            stage = self._enter(self.state.position.stage, saved)
            while self.state.position.epoch < stage.epochs and self._steps_left() != 0:
                self._train_epoch(stage)
            self.state.end_stage()
            self.state.save(None, self.log)
            saved = None
        self.feed.report_damage()
        self.accelerator.print(f"trained: {self.out}")

    def _enter(self, number: int, saved: dict[str, Any] | None) -> Stage:
        """Make a stage; `saved` is the state that it is resumed from, if it is."""
        config, optim, world = self.config, self.config.optim, self.accelerator.num_processes
        surgery = config.surgery if uses_surgery(config) else None
        if self.sharded is None:
            captioned = self.feed.text is not None
            step = Step(self.model, number, surgery, captioned, self.expert, optim.label_smoothing)
            if optim.parallel == "fsdp" and world > 1:
                parallel.shard(step, list(self.model.backbone.blocks), self.accelerator.device)
                self.sharded = step
        else:
            step = self.sharded
            step.enter(number)
        layerwise = surgery if surgery and surgery.mode == "layer" and number == BRANCHES else None
        # Without weight decay AdamW is Adam. The fused one would operate on gradients still scaled for fp16.
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.expert),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=not ((layerwise or self.update or optim.clip) and optim.precision == "fp16"),
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        scaler = self.accelerator.scaler
        objectives = self.update.surgery(optimizer, scaler) if self.update else None
        group = dist.group.WORLD if world > 1 and self.sharded is None else None
        shared = {"scaler": scaler, "process_group": group}
        projection = layer_surgery(optimizer, layerwise, **shared) if layerwise else None
        if optim.clip:
            # After surgery, whose hook has been called by then.
            trained = [p for group in optimizer.param_groups for p in group["params"]]

            def clip(*_: Any) -> None:
                clip_grad_norm_(trained, optim.clip)

            optimizer.register_step_pre_hook(clip)
        with damaged_state(self.out / STATE_FILE):
            if saved and saved["optimizer"]:
                parallel.load_optimizer_state(optimizer, saved["optimizer"])
        module, prepared = step, optimizer
        if self.sharded is None:
            module, prepared = self.accelerator.prepare(step, optimizer)
        with damaged_state(self.out / STATE_FILE):
            if saved and saved["scaler"]:
                scaler.load_state_dict(saved["scaler"])
        epochs, before = (optim.head_epochs, 0) if number == HEAD else (optim.epochs, optim.head_epochs)
        return Stage(module, prepared, projection, objectives, epochs, before, rates)

    def _steps_left(self) -> int | None:
        """Optimiser steps that optim.max_steps leaves of this stage; None: there is no limit."""
        limit, position = self.config.optim.max_steps, self.state.position
        return limit - position.stage_step if limit and position.stage == BRANCHES else None

    def _set_rates(self, stage: Stage) -> None:
        """The learning rates of the next step, a function of its place in the stage."""
        optim, position = self.config.optim, self.state.position
        steps = stage.epochs * math.ceil(self.feed.order.images / self.feed.plan.images)
        if optim.max_steps and position.stage == BRANCHES:
            steps = min(steps, optim.max_steps)
        factor = lr_factor(optim, position.stage_step, steps)
        for group, rate in zip(stage.optimizer.param_groups, stage.rates):
            group["lr"] = factor * rate

    def _train_epoch(self, stage: Stage) -> None:
        position = self.state.position
        epoch = stage.epochs_before + position.epoch
        steps = self.feed.start(position, epoch, self._steps_left(), replay=stage.objectives is not None)
        self.model.train()
        done = math.ceil(position.seen / self.feed.plan.images)
        place = f"stage {position.stage} epoch {position.epoch + 1}/{stage.epochs}"
        silent = not self.accelerator.is_main_process
        with Progress(place, done, done + len(steps), silent=silent) as progress:
            for size, micro_batches in steps:
                self._set_rates(stage)
                self._optimiser_step(stage, micro_batches)
                position.step += 1
                position.stage_step += 1
                position.seen += size
                progress.step(size)
                more = progress.done < progress.total
                if not more or position.step % self.config.log_every == 0:
                    progress.show(self._log_training(stage, progress.speed))
                if more and position.step % self.config.checkpoint_every == 0:
                    self.state.save(stage.optimizer, self.log)
        self.feed.check_readable()
        result = self._validate(stage)
        text = "".join(f", {name} {value:.4f}" for name, value in result.items())
        self.accelerator.print(f"{place}: step {position.step}{text}")
        if result:
            self.log.write(position, result)
        if position.stage == BRANCHES:
            self.state.keep_best(result)
        position.epoch, position.seen = position.epoch + 1, 0
        self.state.save(stage.optimizer, self.log, result)

    def _optimiser_step(self, stage: Stage, micro_batches: list[MicroBatch]) -> None:
        # Dropout depends on this seed alone, so that no generator's state need outlive a kill.
        seed = dropout_seed(self.config.seed, self.state.position.step, self.accelerator.process_index)
        if self.accelerator.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            # Without a GPU, torch would note each seed for one that may come.
            set_seed(seed)
        for name, group in itertools.groupby(micro_batches, key=lambda micro: micro.objective):
            # The step's own gradient stays in .grad, which makes it the first objective.
            with stage.objectives.objective(name) if name and stage.objectives else contextlib.nullcontext():
                self._backward(stage, list(group))
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        self.feed.watch.step(sum(len(micro.indices) for micro in micro_batches))

    def _backward(self, stage: Stage, micro_batches: list[MicroBatch]) -> None:
        """Add up the gradient of one objective."""
        unsynced = parallel.no_sync if self.sharded else self.accelerator.no_sync
        for number, micro in enumerate(micro_batches, 1):
            batch = self.feed.next()
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else unsynced(stage.module):
                found = stage.module(*batch)
                # The task's backward comes first: data parallelism reduces no other.
                self.accelerator.backward(found.loss * micro.weight, retain_graph=found.harmful is not None)
                if found.harmful is not None and stage.surgery is not None:
                    with stage.surgery.harmful():
                        self.accelerator.backward(found.harmful * micro.weight)
            # Means are of the step's own images that could be read.
            self.state.add(found, micro.weight * (len(batch.pixels) > 0 and not micro.objective))

    def _log_training(self, stage: Stage, speed: float) -> float:
        """Write the means since the last call; returns the loss."""
        *values, weight = self.accelerator.reduce(self.state.sums, "mean").tolist()
        moments = self.accelerator.reduce(self.state.moments, "mean")
        self.state.sums.zero_()
        self.state.moments.zero_()
        # Every image since then was damaged.
        if not weight:
            return math.nan
        position = self.state.position
        row = {name: value / weight for name, value in zip(TRAIN_COLUMNS, values)}
        tracked = drift.summary(moments / weight)
        if position.stage == HEAD or not uses_surgery(self.config):
            tracked = {}
            # This stage has one branch.
            row = {name: row[name] for name in ("loss", "accuracy")}
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"training diverged: the loss is {row['loss']} at step {position.step}; lower optim.lr"
                + (", or use optim.precision bf16" if self.config.optim.precision == "fp16" else "")
            )
        for surgery in (stage.surgery, stage.objectives):
            if surgery and (operated := surgery.metrics()):
                tracked |= operated.scalars()
        self.log.write(position, row, images_per_second=speed, **tracked)
        return row["loss"]

    @torch.no_grad()
    def _validate(self, stage: Stage) -> dict[str, float]:
        """VAL_COLUMNS over all validation images, of the head that this stage trains; empty without any."""
        if self.feed.val_loader is None:
            return {}
        self.model.eval()
        scored: list[tuple[float, float, str]] = []
        for pixels, labels, generators in self.feed.validation():
            logits = stage.module(pixels)
            # An empty batch adds none.
            scored += zip(logits.float().tolist(), labels.tolist(), generators)
        scored = gather_object(scored)
        if not scored:
            raise UserError(
                f"none of the validation images could be read; {self.feed.val_damage.summary(shown=1)}"
            )
        logits, labels = torch.tensor([score[:2] for score in scored], dtype=torch.float64).T
        truth, probabilities = labels.numpy(), torch.sigmoid(logits).numpy()
        real, made_by = truth == 0, np.array([name for *_, name in scored])
        result = metrics(truth, probabilities)
        against = [real | (made_by == name) for name in np.unique(made_by[~real])]
        aucs = [metrics(truth[of], probabilities[of])["auc"] for of in against]
        result["worst_auc"] = min(aucs, default=math.nan)
        loss = F.binary_cross_entropy_with_logits(logits, labels).item()
        return {"val_loss": loss} | {name: result[name.removeprefix("val_")] for name in VAL_COLUMNS[1:]}
