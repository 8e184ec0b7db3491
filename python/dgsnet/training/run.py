"""Training: the teacher's linear head on the frozen encoder, then the three branches with gradient surgery.

A run is a function of its configuration and data. Order, augmentation and dropout of every step are drawn
from (seed, step), never from a generator's history, so a run that was killed and resumed ends with the same
weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader

from dgs_kernels import OptimizerSurgery
from dgsnet.config import CONFIG_FILE, Config
from dgsnet.data.items import Item
from dgsnet.data.loading import (
    DamageReport,
    EpochSampler,
    ImageDataset,
    LoaderWatch,
    collate,
    loader_options,
    make_loader,
    pixels_on,
)
from dgsnet.data.preprocess import Preprocessor
from dgsnet.errors import UserError
from dgsnet.evaluation.metrics import metrics
from dgsnet.files import write_file
from dgsnet.model.catalogue import check_image_size
from dgsnet.model.checkpoint import (
    build_model,
    fingerprint,
    load_state,
    load_trained_state,
    save_state,
    trained_state,
    whole,
    write_model,
)
from dgsnet.processes import default_workers
from dgsnet.training import drift, parallel
from dgsnet.training.checks import uses_nuisances, uses_surgery, uses_text
from dgsnet.training.experts import FileExpert
from dgsnet.training.frozen import CaptionFeatures, ImageFeatures
from dgsnet.training.log import VAL_COLUMNS, Log, Progress
from dgsnet.training.plan import BRANCHES, HEAD, MicroBatch, Position, StepPlan, dropout_seed
from dgsnet.training.replay import Update
from dgsnet.training.setup import accelerator_for, with_batch_size
from dgsnet.training.step import TRAIN_COLUMNS, Step, layer_surgery, parameter_groups, speed_up

STATE_FILE = Path("state") / "resume.pt"


def run(
    config: Config,
    out: Path,
    samples: list[Item],
    val_samples: list[Item],
    update: Update | None = None,
) -> None:
    """Train from where `out`, which is this run's alone, stands to the end; see train.train and update."""
    with accelerator_for(config, out) as accelerator:
        try:
            config = with_batch_size(config, out, accelerator)
            _Run(config, out, accelerator, samples, val_samples, update).train()
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory with optim.batch_size={config.optim.batch_size}: halve it and double "
                "optim.accumulation"
            ) from None


class _Run:
    """A training run: the state that lives through it, and its loops."""

    def __init__(
        self,
        config: Config,
        out: Path,
        accelerator: Accelerator,
        samples: list[Item],
        val: list[Item],
        update: Update | None,
    ) -> None:
        self.config, self.out, self.accelerator, self.update = config, out, accelerator, update
        rank, self.world = accelerator.process_index, accelerator.num_processes
        own, samples = len(samples), [*samples, *(update.replayed if update else [])]
        self.data_hash = _hash(samples)
        self.preprocess = Preprocessor(config.preprocess)
        optim, data = config.optim, config.data
        assert optim.batch_size != "auto"  # decided before
        dataset = ImageDataset(
            samples,
            self.preprocess,
            train=True,
            seed=config.seed,
            selection=data.selection,
            nuisances=uses_nuisances(config),
            views=data.views,
        )
        self.order = EpochSampler(dataset, shuffle=True, seed=config.seed, count=own)
        images = optim.batch_size * optim.accumulation * self.world
        self.plan = StepPlan(images, optim.batch_size, rank, self.world)
        workers = default_workers() if data.workers is None else data.workers
        options = loader_options(workers, data.prefetch, told=not accelerator.is_main_process)
        self.loader = DataLoader(dataset, batch_sampler=self.plan, **options)
        self.watch = LoaderWatch(workers, accelerator.device)
        self.watch.told = not accelerator.is_main_process  # one process speaks for all
        self.val_loader = None
        if val:
            val_dataset = ImageDataset(
                val[rank :: self.world], self.preprocess, train=False, selection=data.selection
            )
            self.val_loader = make_loader(
                val_dataset, batch_size=optim.batch_size, workers=workers, prefetch=data.prefetch, told=True
            )
            # As many on every process, since a sharded model is gathered from all of them for each.
            self.val_batches = math.ceil(math.ceil(len(val) / self.world) / optim.batch_size)
        self.damage, self.val_damage = DamageReport(len(samples)), DamageReport(len(val))

        self.model = build_model(config, with_text=uses_text(config))
        check_image_size(config.model.name, self.model.image_size, config.preprocess.image_size)
        self.backbone = fingerprint(self.model)
        if update:
            load_trained_state(self.model, update.start)
        self.model.to(accelerator.device)
        self.text = None
        if self.model.text is not None:
            with accelerator.main_process_first():  # which encodes, so that the others find all done
                captions = (sample.caption or "" for sample in samples)
                shown = sys.stderr.isatty()
                self.text = CaptionFeatures(self.model, captions, config.data.cache, progress=shown)
            self.model.text = None
        speed_up(self.model, optim)
        self.expert = FileExpert().to(accelerator.device) if uses_nuisances(config) else None
        self.frozen: ImageFeatures | None = None
        self.position = Position(HEAD if uses_surgery(config) else BRANCHES)
        self.best: list[float] | None = None
        # Hashes of the files that this process has trained on, or that the updated detector was trained on.
        self.trained_on = set(update.trained_on.tolist()) if update else set[int]()
        self.sharded: Step | None = None  # sharded once, for both stages
        # Sums of the logged values, weighted, and of the weights, since the last logged step.
        self.sums = torch.zeros(len(TRAIN_COLUMNS) + 1, device=accelerator.device)
        self.moments = torch.zeros(drift.size(self.model.dim), dtype=torch.float64, device=accelerator.device)

    def train(self) -> None:
        """Train from where `out` stands to the end."""
        state = self._restore()
        if self.position.stage > BRANCHES:
            return self.accelerator.print(f"{self.out} is already trained")
        if self.expert is not None and state is None:
            shown = sys.stderr.isatty() and self.accelerator.is_main_process
            self.expert.standardise(self.order.dataset.samples, progress=shown)
        if self.config.data.views and (uses_surgery(self.config) or not self.config.model.lora_rank):
            self.frozen = ImageFeatures(
                self.model,
                self.order.dataset,
                self.accelerator,
                self.loader.num_workers,
                self.config.data.cache,
                f"{self.config.model.name} {self.backbone} {self.config.optim.precision}",
            )
        self.accelerator.wait_for_everyone()  # every process has looked at the folder before one writes
        if self.accelerator.is_main_process:
            (self.out / STATE_FILE).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.out / CONFIG_FILE, self.config.to_json().encode())
        self.log = Log(
            self.out, self.accelerator, state["metrics_bytes"] if state else None, self.position.step
        )
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
        surgery = self.config.surgery if uses_surgery(self.config) else None
        if self.sharded is None:
            step = Step(self.model, stage, surgery, self.text is not None, self.expert)
        else:
            step = self.sharded
            step.enter(stage)
        if self.config.optim.parallel == "fsdp" and self.sharded is None and self.world > 1:
            parallel.shard(step, list(self.model.backbone.blocks), self.accelerator.device)
            self.sharded = step
        layerwise = stage == BRANCHES and surgery is not None and surgery.mode == "layer"
        # Without weight decay AdamW is Adam. The fused one would operate on gradients still scaled for fp16.
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.expert),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=not ((layerwise or self.update) and optim.precision == "fp16"),
        )
        self.surgery: OptimizerSurgery | None = None
        self.objectives = self.update.surgery(optimizer, self.accelerator.scaler) if self.update else None
        if layerwise and surgery is not None:
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

    def _loader(self) -> DataLoader:
        """Gives the stage's batches; those of a head on frozen features that are known have no pixels."""
        head_alone = not self.config.model.lora_rank and not uses_surgery(self.config)
        if self.frozen is not None and (self.position.stage == HEAD or head_alone):
            return DataLoader(self.frozen.images(), batch_sampler=self.plan, collate_fn=collate)
        return self.loader

    def _at_max_steps(self) -> bool:
        limit = self.config.optim.max_steps
        return bool(limit) and self.position.stage == BRANCHES and self.position.stage_step >= limit

    def _train_epoch(self, epochs: int) -> None:
        position, optim = self.position, self.config.optim
        earlier = optim.head_epochs if position.stage == BRANCHES else 0
        self.order.set_epoch(earlier + position.epoch, skip=position.seen)
        limited = optim.max_steps and position.stage == BRANCHES
        left = optim.max_steps - position.stage_step if limited else None
        self.plan.set(list(self.order), left, self._replayed if self.objectives else None)
        self.model.train()
        batches = iter(self._loader()) if self.plan.steps else iter(())
        self.watch.start()
        done = math.ceil(position.seen / self.plan.images)
        total = done + len(self.plan.steps)
        with Progress(
            self._place(epochs), done, total, silent=not self.accelerator.is_main_process
        ) as progress:
            for size, micro_batches in self.plan.steps:
                self._optimiser_step(batches, micro_batches)
                self.watch.step(sum(len(micro.indices) for micro in micro_batches))
                position.step += 1
                position.stage_step += 1
                position.seen += size
                progress.step(size)
                more = progress.done < total
                if not more or position.step % self.config.log_every == 0:
                    progress.tell(self._log_training(progress.speed))
                if more and position.step % self.config.checkpoint_every == 0:
                    self._checkpoint()
        if not any(gather_object([self.readable])):
            raise UserError(f"none of the training images could be read; {self.damage.summary(shown=1)}")
        self._end_epoch(epochs)

    def _replayed(self, number: int) -> dict[str, list[int]]:
        """Old images in the n-th step from here, by objective; they follow the new ones in the dataset."""
        assert self.update
        drawn = self.update.draw(self.position.step + number, self.plan.images)
        return {name: [len(self.order.samples) + i for i in places] for name, places in drawn.items()}

    def _optimiser_step(self, batches: Iterator[dict[str, Any]], micro_batches: list[MicroBatch]) -> None:
        # Dropout depends on this seed alone, so that no generator's state need outlive a kill.
        device = self.accelerator.device
        seed = dropout_seed(self.config.seed, self.position.step, self.accelerator.process_index)
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:  # without a GPU it would note each seed for one that may come
            set_seed(seed)
        for name, group in itertools.groupby(micro_batches, key=lambda micro: micro.objective):
            # The step's own gradient stays in .grad, which makes it the first objective.
            with self.objectives.objective(name) if name and self.objectives else contextlib.nullcontext():
                self._backward(batches, list(group))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self, batches: Iterator[dict[str, Any]], micro_batches: list[MicroBatch]) -> None:
        """Add up the gradient of one objective."""
        device = self.accelerator.device
        texts = self.text if self.position.stage == BRANCHES else None
        for number, micro in enumerate(micro_batches, 1):
            batch = self.watch.next(batches)
            self.damage.add(batch["errors"])
            self.readable |= len(batch["labels"]) > 0
            self.trained_on.update(batch["hashes"].tolist())
            last = number == len(micro_batches)
            pixels, labels = pixels_on(device, batch, self.preprocess), batch["labels"]
            unsynced = parallel.no_sync if self.sharded else self.accelerator.no_sync
            with contextlib.nullcontext() if last else unsynced(self.step_module):
                text = texts(batch["captions"]) if texts and batch["captions"] else None
                frozen = None
                if self.frozen is not None:
                    frozen = self.frozen(batch["index"], self.order.epoch, batch["hashes"])
                inputs = (pixels, labels, text, batch.get("nuisances"), frozen)
                loss, values, harmful, moments = self.step_module(
                    *(x if x is None else x.to(device, non_blocking=True) for x in inputs)
                )
                # The task's backward comes first: data parallelism reduces no other.
                self.accelerator.backward(loss * micro.weight, retain_graph=harmful is not None)
                if harmful is not None and self.surgery is not None:
                    with self.surgery.harmful():
                        self.accelerator.backward(harmful * micro.weight)
            weight = micro.weight * (len(batch["labels"]) > 0 and not micro.objective)
            self.sums += weight * torch.cat([values, values.new_ones(1)])
            if moments is not None:
                self.moments += weight * moments

    def _log_training(self, speed: float) -> float:
        """Write the means since the last call; returns the loss."""
        *values, weight = self.accelerator.reduce(self.sums, "mean").tolist()
        moments = self.accelerator.reduce(self.moments, "mean")
        self.sums.zero_()
        self.moments.zero_()
        if not weight:  # every image since then was damaged
            return math.nan
        row = {name: value / weight for name, value in zip(TRAIN_COLUMNS, values)}
        tracked = drift.summary(moments / weight)
        if self.position.stage == HEAD or not uses_surgery(self.config):
            tracked = {}
            row = {name: row[name] for name in ("loss", "accuracy")}  # there is one branch
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"training diverged: the loss is {row['loss']} at step {self.position.step}; lower optim.lr"
                + (", or use optim.precision bf16" if self.config.optim.precision == "fp16" else "")
            )
        for surgery in (self.surgery, self.objectives):
            if surgery and (operated := surgery.metrics()):
                tracked |= operated.scalars()
        self.log.write(self.position, row, images_per_second=speed, **tracked)
        return row["loss"]

    def _place(self, epochs: int) -> str:
        return f"stage {self.position.stage} epoch {self.position.epoch + 1}/{epochs}"

    def _end_epoch(self, epochs: int) -> None:
        """Validate, keep the model if it is the best, and make this a point to resume from."""
        position = self.position
        result = self._validate() if self.val_loader else {}
        text = "".join(f", {name} {value:.4f}" for name, value in result.items())
        self.accelerator.print(f"{self._place(epochs)}: step {position.step}{text}")
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
        assert self.val_loader
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
        hashes = self._all_trained_on()
        if self.accelerator.is_main_process:
            extra: dict[str, Any] = {key: value for key, value in result.items() if math.isfinite(value)}
            if self.update:
                extra["update"] = self.update.told
            write_model(
                self.out / name,
                trained,
                self.backbone,
                self.config,
                trained_on=hashes,
                step=self.position.step,
                **extra,
            )

    def _all_trained_on(self) -> np.ndarray:
        """Hashes of the files that any process has trained on, int64, ascending."""
        parts = gather_object([np.fromiter(self.trained_on, np.int64, len(self.trained_on))])
        return np.unique(np.concatenate(parts))

    def _checkpoint(self, result: dict[str, float] | None = None) -> None:
        """Write the last model, then the state to resume from, which counts on all else being there."""
        sums, moments = (self.accelerator.reduce(x, "mean") for x in (self.sums, self.moments))
        if self.position.stage == BRANCHES and self.position.stage_step:
            self._save_model("last", result or {})
        trained, hashes = trained_state(self.model), self._all_trained_on()
        optimizer = parallel.optimizer_state(self.optimizer) if self.optimizer else None
        expert = self.expert and {name: whole(t).cpu() for name, t in self.expert.state_dict().items()}
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "position": asdict(self.position),
                "model": trained,
                "optimizer": optimizer,
                "scaler": scaler.state_dict() if scaler else None,
                "expert": expert,
                "sums": sums,
                "moments": moments,
                "images_per_step": self.plan.images,
                "best": self.best,
                "metrics_bytes": self.log.sync(),
                "data": self.data_hash,
                "backbone": self.backbone,
                "trained_on": torch.from_numpy(hashes),
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
        if "trained_on" in state:  # a state of an older version has none
            self.trained_on = set(state["trained_on"].tolist())
        self.sums.copy_(state["sums"])
        if self.expert is not None:
            self.expert.load_state_dict(state["expert"])
        if "moments" in state:  # likewise
            self.moments.copy_(state["moments"])
        # On another number of processes a step keeps its images, in more or fewer micro-batches.
        self.plan.images = state["images_per_step"]
        return state


def _hash(samples: list[Item]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.path}\0{sample.label}\0{sample.caption}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
