"""What training is fed: images in each epoch's order, cut into steps, and the features that go with them."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from dgsnet.data import loading
from dgsnet.data.items import Item
from dgsnet.data.pairs import find_pairs
from dgsnet.data.preprocess import Preprocessor
from dgsnet.errors import UserError
from dgsnet.model.dgsnet import DGSNet
from dgsnet.processes import default_workers
from dgsnet.training.checks import degradations, uses_nuisances, uses_surgery
from dgsnet.training.frozen import CaptionFeatures, ImageFeatures
from dgsnet.training.plan import BRANCHES, HEAD, Job, MicroBatch, Position, StepPlan
from dgsnet.training.step import Batch


class Feed:
    """Batches for one process of a run, in the order of its steps; the processes share the images.

    Attributes:
        data_hash: tells these training images, labels and captions from others.
        plan: the epoch's steps, cut into micro-batches.
        trained_on: hashes of the files that this process has trained on, or that the updated detector was.
        readable: whether any training image could be read so far.
    """

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.config, self.update, self.accelerator = job.config, job.update, accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        config, optim, data = job.config, job.config.optim, job.config.data
        # The number has been decided before.
        assert optim.batch_size != "auto"
        samples = [*job.samples, *(job.update.replayed if job.update else [])]
        self.data_hash = _hash(samples)
        self.preprocess = Preprocessor(config.preprocess)
        pairs = find_pairs(job.samples) if data.pairs else None
        drawn_as = None
        if pairs is not None:
            both = pairs
            if job.update and job.update.replayed and job.update.pairs is not None:
                both = np.concatenate([pairs, len(job.samples) + job.update.pairs])
            self.data_hash = hashlib.sha256(f"{self.data_hash} {both.tolist()}".encode()).hexdigest()
            if data.pairs != "independent":
                drawn_as = np.arange(len(samples))
                drawn_as[both[:, 1]] = both[:, 0]
        dataset = loading.ImageDataset(
            samples,
            self.preprocess,
            train=True,
            seed=config.seed,
            selection=data.selection,
            nuisances=uses_nuisances(config),
            views=data.views,
            degradations=degradations(config),
            drawn_as=drawn_as,
        )
        self.order = loading.EpochSampler(
            dataset,
            shuffle=True,
            seed=config.seed,
            count=len(job.samples),
            pairs=pairs,
            balance=data.balance,
            cap=data.cap,
        )
        images = optim.batch_size * optim.accumulation * self.world
        self.plan = StepPlan(images, optim.batch_size, self.rank, self.world)
        workers = default_workers() if data.workers is None else data.workers
        # One process speaks for all.
        silent = not accelerator.is_main_process
        options = loading.loader_options(workers, data.prefetch, silent=silent)
        self.loader = DataLoader(dataset, batch_sampler=self.plan, **options)
        self.watch = loading.LoaderWatch(workers, accelerator.device)
        self.watch.warned = silent
        self.val_loader: DataLoader | None = None
        if job.val:
            self.val = job.val[self.rank :: self.world]
            val_dataset = loading.ImageDataset(
                self.val, self.preprocess, train=False, selection=data.selection
            )
            self.val_loader = loading.make_loader(
                val_dataset, batch_size=optim.batch_size, workers=workers, prefetch=data.prefetch, silent=True
            )
        # As many on every process, since a sharded model is gathered from all of them for each.
        self.val_batches = math.ceil(math.ceil(len(job.val) / self.world) / optim.batch_size)
        self.damage, self.val_damage = loading.DamageReport(len(samples)), loading.DamageReport(len(job.val))
        self.trained_on = set(job.update.trained_on.tolist()) if job.update else set[int]()
        self.readable = False
        self.text: CaptionFeatures | None = None
        self.frozen: ImageFeatures | None = None
        self._batches: Iterator[dict[str, Any]] = iter(())
        # Whether the stage reads captions.
        self._captioned = False

    def encode_captions(self, model: DGSNet) -> None:
        """Have the features of all captions, and free the model of the tower that makes them."""
        if model.text is None:
            return
        # The first encodes, so that the others find all done.
        with self.accelerator.main_process_first():
            captions = (sample.caption or "" for sample in self.order.dataset.samples)
            shown = sys.stderr.isatty()
            self.text = CaptionFeatures(model, captions, self.config.data.cache, progress=shown)
        model.text = None

    def compute_frozen(self, model: DGSNet, backbone: str) -> None:
        """Have the frozen tower's features of all views, if views are few and something asks for them."""
        config = self.config
        if config.data.views and (uses_surgery(config) or not config.model.lora_rank):
            encoder = f"{config.model.name} {backbone} {config.optim.precision}"
            dataset, workers = self.order.dataset, self.loader.num_workers
            self.frozen = ImageFeatures(model, dataset, self.accelerator, workers, config.data.cache, encoder)

    def start(
        self, position: Position, epoch: int, limit: int | None, *, replay: bool
    ) -> list[tuple[int, list[MicroBatch]]]:
        """Begin, or go on with, an epoch, whose number over both stages decides order and augmentation.

        Returns at most `limit` steps: each its images over all processes and this process's micro-batches.
        """
        self.order.set_epoch(epoch, skip=position.seen)

        def replayed(number: int) -> dict[str, np.ndarray]:
            """Old images of the n-th step from here, which follow the new ones in the dataset."""
            assert self.update
            drawn = self.update.draw(position.step + number, self.plan.images)
            first = len(self.order.samples)
            return {name: np.where(units < 0, units, first + units) for name, units in drawn.items()}

        self.plan.set(self.order.left(), limit, replayed if replay else None)
        self._captioned = position.stage == BRANCHES
        loader = self.loader
        head_alone = not self.config.model.lora_rank and not uses_surgery(self.config)
        if self.frozen is not None and (position.stage == HEAD or head_alone):
            # What is known of an image is all that a linear head on frozen features needs.
            loader = DataLoader(self.frozen.images(), batch_sampler=self.plan, collate_fn=loading.collate)
        self._batches = iter(loader) if self.plan.steps else iter(())
        self.watch.start()
        return self.plan.steps

    def next(self) -> Batch:
        """The next micro-batch, on the device."""
        batch = self.watch.next(self._batches)
        self.damage.add(batch["errors"])
        self.readable |= len(batch["labels"]) > 0
        self.trained_on.update(batch["hashes"].tolist())
        text = self.text(batch["captions"]) if self.text and self._captioned and batch["captions"] else None
        frozen = None
        if self.frozen is not None:
            frozen = self.frozen(batch["index"], self.order.epoch, batch["hashes"])
        device = self.accelerator.device
        others = (batch["labels"], text, batch.get("nuisances"), frozen)
        moved = (x if x is None else x.to(device, non_blocking=True) for x in others)
        return Batch._make((loading.pixels_on(device, batch, self.preprocess), *moved))

    def validation(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Pixels on the device, labels and generators [n] of this process's batches; n may be 0."""
        assert self.val_loader
        batches = itertools.chain(self.val_loader, itertools.repeat(loading.collate([])))
        for batch in itertools.islice(batches, self.val_batches):
            self.val_damage.add((i * self.world + self.rank, message) for i, message in batch["errors"])
            pixels = loading.pixels_on(self.accelerator.device, batch, self.preprocess)
            yield pixels, batch["labels"], [self.val[place].generator for place in batch["index"]]

    def check_readable(self) -> None:
        """UserError if no process could read any training image."""
        if not any(gather_object([self.readable])):
            raise UserError(f"none of the training images could be read; {self.damage.summary(shown=1)}")

    def report_damage(self) -> None:
        """Name the images that some process could not read."""
        for report in (self.damage, self.val_damage):
            for errors in gather_object([report.errors]):
                report.errors |= errors
            if self.accelerator.is_main_process and report.errors:
                print(report.summary(), file=sys.stderr)


def _hash(samples: list[Item]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.path}\0{sample.label}\0{sample.caption}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
