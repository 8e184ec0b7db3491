"""Feeding labelled images to training and measuring, in a reproducible order."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dgsnet.data.distortions import Degradations
from dgsnet.data.images import ImageError, file_hash, read_image
from dgsnet.data.items import Item
from dgsnet.data.nuisances import file_nuisances
from dgsnet.data.parquet import KEPT_BYTES as KEPT_GROUPS
from dgsnet.data.preprocess import Preprocessor
from dgsnet.processes import start_worker, usable_cores

# Shards read at a time.
SHARDS_MIXED = 16
# Decoded images that each process keeps: a small training set is decoded once, of a large one it is nothing.
KEPT_BYTES = 2**26
# Tell draws from others of the same numbers: of an image's degradations, and of what an epoch leaves out.
DEGRADED, BALANCED = 1, 2


class ImageDataset(Dataset):
    """Decoded and preprocessed samples; an image that cannot be read becomes an item with its error.

    Augmentation is a function of (seed, epoch, index) alone, whatever the number of workers.

    Args:
        train, seed: whether to augment, and what decides the augmentation, at least 0.
        selection: "workers": items hold the finished input; "device": in mode "patches" they hold all
            patches of the image, and `pixels_on` selects on the device, for the batch at once.
        nuisances: items hold `file_nuisances` of their file too.
        views: augmentations of an image, which the epochs take in turn; 0: a new one in every epoch.
        degradations: what images go through before they are preprocessed.
        drawn_as: places [N] of the images whose augmentation each of them has, as twins have the same, and
            whose patches decide which ones its mosaic shows; None: each its own.
    """

    def __init__(
        self,
        samples: list[Item],
        preprocess: Preprocessor,
        *,
        train: bool,
        seed: int = 0,
        selection: Literal["workers", "device"] = "workers",
        nuisances: bool = False,
        views: int = 0,
        degradations: Degradations | None = None,
        drawn_as: np.ndarray | None = None,
    ) -> None:
        self.samples, self.preprocess = samples, preprocess
        self.train, self.seed, self.degradations = train, seed, degradations
        self.nuisances, self.views, self.drawn_as = nuisances, views, drawn_as
        self._kept: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
        self._kept_bytes = 0
        self.cut_only = selection == "device" and preprocess.config.mode == "patches"
        # Shared memory, because persistent workers hold their own copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn; reaches running workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """dict(pixels float32 [3, S, S], label, caption, index, hash), or dict(error, index).

        Where the device selects, `patches`, `seed` and `flip` of `Preprocessor.cut` in place of `pixels`.
        With nuisances, float32 [len(NUISANCES)] as `nuisances`.
        """
        return self.item(index, self.view_of(int(self._epoch)))

    def item(self, index: int, view: int) -> dict[str, Any]:
        """An item as an epoch has it that sees this augmentation."""
        sample = self.samples[index]
        source = index if self.drawn_as is None else int(self.drawn_as[index])
        drawn = (self.seed, view, source)
        rng = np.random.default_rng(drawn) if self.train else None
        try:
            image, item = self._degraded(index, drawn)
            like = self._twin(source, drawn) if source != index else None
            if self.cut_only:
                content = dict(
                    zip(("patches", "seed", "flip"), self.preprocess.cut(image, rng=rng, like=like))
                )
            else:
                content = {"pixels": self.preprocess(image, rng=rng, like=like)}
        except ImageError as error:
            text = str(error)
            return {"error": text if sample.path in text else f"{sample.path}: {text}", "index": index}
        return content | item

    def view_of(self, epoch: int) -> int:
        """Number of the augmentation that an epoch sees."""
        return epoch % self.views if self.views else epoch

    def _degraded(self, index: int, drawn: tuple[int, ...]) -> tuple[np.ndarray, dict[str, Any]]:
        image, item = self._read(index)
        if self.degradations:
            # Draws of their own: with and without them crops and shuffles are the same.
            image = self.degradations(image, np.random.default_rng((*drawn, DEGRADED)))
        return image, item

    def _twin(self, index: int, drawn: tuple[int, ...]) -> np.ndarray | None:
        """The image whose patches decide, where there are patches and it can be read."""
        if self.preprocess.config.mode != "patches":
            return None
        try:
            return self._degraded(index, drawn)[0]
        except ImageError:
            return None

    def _read(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The decoded image, uint8 [H, W, 3], and those parts of its item that no augmentation changes."""
        if index in self._kept:
            return self._kept[index]
        sample = self.samples[index]
        data = sample.read_bytes()
        image = read_image(data, name=sample.path)
        item: dict[str, Any] = {"label": sample.label, "caption": sample.caption or "", "index": index}
        item["hash"] = file_hash(data)
        if self.nuisances:
            item["nuisances"] = torch.from_numpy(file_nuisances(data, name=sample.path))
        if self._kept_bytes + image.nbytes <= KEPT_BYTES:
            self._kept[index] = image, item
            self._kept_bytes += image.nbytes
        return image, item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the items that could be read.

    Returns:
        dict(pixels float32 [n, 3, S, S], labels float32 [n], captions list[str], index int64 [n], hashes
        int64 [n] of the files, errors list of (index, message)). n may be 0, and pixels then is [0, 3, 0, 0]:
        skip such a batch. Where the device selects, the arguments of `Preprocessor.select` in place of
        `pixels`. `nuisances` float32 [n, len(NUISANCES)] if the items have them.
    """
    good = [item for item in items if "error" not in item]
    if good and "patches" in good[0]:
        content = {
            "patches": torch.cat([item["patches"] for item in good]),
            "counts": torch.tensor([len(item["patches"]) for item in good]),
            "seeds": torch.tensor([item["seed"] for item in good]),
            "flips": torch.tensor([item["flip"] for item in good]),
        }
    else:
        content = {
            "pixels": torch.stack([item["pixels"] for item in good]) if good else torch.empty(0, 3, 0, 0)
        }
    if good and "nuisances" in good[0]:
        content["nuisances"] = torch.stack([item["nuisances"] for item in good])
    return content | {
        "labels": torch.tensor([item["label"] for item in good], dtype=torch.float32),
        "captions": [item["caption"] for item in good],
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "hashes": torch.tensor([item["hash"] for item in good], dtype=torch.int64),
        "errors": [(item["index"], item["error"]) for item in items if "error" in item],
    }


def pixels_on(device: torch.device, batch: dict[str, Any], preprocess: Preprocessor) -> Tensor:
    """The pixels [n, 3, S, S] of a batch of `collate` on the device, selected there if workers have not."""
    if "pixels" in batch:
        return batch["pixels"].to(device, non_blocking=True)
    names = ("patches", "counts", "seeds", "flips")
    return preprocess.select(*(batch[name].to(device, non_blocking=True) for name in names))


def epoch_order(samples: list[Item], rng: np.random.Generator) -> np.ndarray:
    """A random order of the samples that reads shards a few at a time.

    Images in files of their own come in any order. Shards, which are archives or row groups of Parquet, come
    in a random order, at most SHARDS_MIXED at a time, and the images of these, with an equal part of the
    images in files, in any order.
    """
    shards = [sample.shard for sample in samples]
    names = sorted(set(shards))
    if names in ([], [""]):
        return rng.permutation(len(samples))
    number = {name: i for i, name in enumerate(names)}
    shard = np.array([number[name] for name in shards])
    of_shard = np.split(np.argsort(shard, kind="stable"), np.cumsum(np.bincount(shard))[:-1])
    alone = rng.permutation(of_shard.pop(0)) if names[0] == "" else np.empty(0, np.int64)
    # Of row groups no more than the reader keeps.
    largest = max((sample.size or 0 for sample in samples if sample.group is not None), default=0)
    mixed = min(SHARDS_MIXED, max(1, KEPT_GROUPS // largest)) if largest else SHARDS_MIXED
    windows = max(1, -(-len(of_shard) // mixed))
    parts = zip(
        np.array_split(rng.permutation(len(of_shard)), windows), np.array_split(alone, windows), strict=True
    )
    return np.concatenate(
        [rng.permutation(np.concatenate([files, *(of_shard[i] for i in few)])) for few, files in parts]
    )


class EpochSampler(Sampler[int]):
    """An order that is a function of (seed, epoch), and can start in the middle without decoding the rest.

    It is one of the dataset's first `count` samples; None: of all. Pairs, places [P, 2], come one twin after
    the other, and with an image that is in several pairs each time.

    Args:
        balance, cap: as DataConfig has them; which images an epoch leaves out is drawn anew for each.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        shuffle: bool,
        seed: int = 0,
        count: int | None = None,
        pairs: np.ndarray | None = None,
        balance: Literal["none", "class", "generator"] = "none",
        cap: int = 0,
    ) -> None:
        self.dataset, self.samples = dataset, dataset.samples[:count]
        self.shuffle, self.seed = shuffle, seed
        # What stays together, as rows of places: an image, or a pair; -1 is beside one without a twin.
        self.units = np.arange(len(self.samples))[:, None]
        if pairs is not None:
            alone = np.setdiff1d(self.units, pairs)
            units = np.concatenate([np.stack([alone, np.full_like(alone, -1)], 1), pairs])
            self.units = units[np.argsort(units[:, 0], kind="stable")]
        self.balance, self.cap = balance, cap
        self.epoch = self.skip = 0
        self.images = int((self.units[self._chosen()] >= 0).sum())

    def set_epoch(self, epoch: int, skip: int | None = None) -> None:
        """Choose the epoch, of the dataset's augmentation too, and how many samples of it to leave out.

        Without `skip` nothing is left out of a new epoch, and an epoch already chosen keeps what it had
        (accelerate's loaders repeat the call when iteration starts).
        """
        if skip is not None or epoch != self.epoch:
            self.skip = skip or 0
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return max(self.images - self.skip, 0)

    def __iter__(self) -> Iterator[int]:
        left = self.left()
        return iter(left[left >= 0].tolist())

    def left(self) -> np.ndarray:
        """The rows of `units` that are not left out of the epoch, in its order."""
        order = np.arange(len(self.units))
        if self.shuffle:
            first = [self.samples[place] for place in self.units[:, 0]]
            order = epoch_order(first, np.random.default_rng((self.seed, self.epoch)))
        order = order[self._chosen()[order]]
        units = self.units[order]
        return units[np.searchsorted(np.cumsum((units >= 0).sum(1)), self.skip, side="right") :]

    def _chosen(self) -> np.ndarray:
        """Which units the epoch has, bool [U]."""
        chosen = np.ones(len(self.units), bool)
        if self.balance == "none" and not self.cap:
            return chosen
        rng = np.random.default_rng((self.seed, self.epoch, BALANCED))
        # A pair counts as its generated image, the second, and is of both classes.
        paired = self.units[:, -1] >= 0 if self.units.shape[1] == 2 else np.zeros(len(chosen), bool)
        samples = [self.samples[place] for place in np.where(paired, self.units[:, -1], self.units[:, 0])]
        generated = np.array([sample.label == 1 for sample in samples])
        made_by = np.array([sample.generator for sample in samples])
        cells = [np.flatnonzero(generated & (made_by == name)) for name in np.unique(made_by[generated])]
        most = self.cap or len(chosen)
        if self.balance == "generator":
            most = min(most, *map(len, cells))
        for cell in cells:
            chosen[rng.permutation(cell)[most:]] = False
        if self.balance != "none":
            alone = chosen & ~paired
            classes = [np.flatnonzero(alone & (generated == label)) for label in (False, True)]
            for units in classes:
                chosen[rng.permutation(units)[min(map(len, classes)) :]] = False
        return chosen


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 2,
    shuffle: bool = False,
    seed: int = 0,
    silent: bool = False,
) -> DataLoader:
    """A loader whose batches depend on seed and epoch alone.

    Before each epoch call `loader.sampler.set_epoch(epoch, skip=samples_already_seen)`; a run resumed that
    way sees the rest of its epoch as if it had not stopped, and decodes nothing twice.

    Args:
        batch_size: samples per batch, before damaged ones are dropped.
        workers, prefetch: decoding processes, 0 for none, and batches that each makes ahead.
        shuffle, seed: whether every epoch draws a new order, and from which seed.
        silent: another loader's workers give the warnings.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(dataset, shuffle=shuffle, seed=seed),
        **loader_options(workers, prefetch, silent),
    )


def loader_options(workers: int, prefetch: int = 2, silent: bool = False) -> dict[str, Any]:
    """What each DataLoader of an ImageDataset has; `silent`: as `processes.start_worker` has it."""
    return {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": workers > 0,
        "prefetch_factor": prefetch if workers else None,
        "worker_init_fn": partial(start_worker, silent=silent),
    }


class Wait:
    """How long a loop has waited for its images, and how many it had, since it was last begun.

    A wait counts where the device had nothing left to do when it ended.

    Args:
        device: what works.
        idle: whether it has nothing left to do; where not given, a GPU is asked.

    Example:
        >>> import torch
        >>> from dgsnet.data.loading import Wait
        >>> wait = Wait(torch.device("cpu"))
        >>> for images in ([1, 2], [3]):
        ...     _ = wait.next(iter([images]))
        ...     wait.step(len(images))
        >>> wait.images, 0 < wait.share < 1 and wait.rate < wait.could
        (3, True)
    """

    def __init__(self, device: torch.device, idle: Callable[[], bool] | None = None) -> None:
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        self.idle = idle or (self.done.query if self.done else lambda: True)
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.images, self.waited, self.opened = 0, 0.0, time.perf_counter()

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch, and a note of how long it took to come."""
        before = time.perf_counter()
        batch = next(batches)
        if self.idle():
            self.waited += time.perf_counter() - before
        return batch

    def step(self, images: int) -> None:
        """Work on so many images of this process has been handed to the device."""
        if self.done is not None:
            self.done.record()
        self.images += images

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.perf_counter() - self.opened

    @property
    def share(self) -> float:
        """Part of the time that was waited."""
        return self.waited / self.elapsed

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.elapsed

    @property
    def could(self) -> float:
        """Images per second that the loop could take if it never waited."""
        return self.images / (self.elapsed - self.waited)


# Of the time spent waiting; below it there is little to gain.
WAITING = 0.2


class LoaderWatch(Wait):
    """Warns once, with figures, when training waits for its images rather than they for it.

    Shares are taken over at least `STEPS` steps and `SECONDS` seconds, after the first `WARM_UP` steps of an
    epoch, in which workers start.
    """

    WARM_UP, STEPS, SECONDS = 5, 20, 5.0

    def __init__(self, workers: int, device: torch.device) -> None:
        super().__init__(device)
        self.workers = workers
        self.warned = False
        self.start()

    def start(self) -> None:
        """Begin an epoch."""
        self._open(-self.WARM_UP)

    def step(self, images: int) -> None:
        """An optimiser step over so many images of this process has been handed to the device."""
        super().step(images)
        self.steps += 1
        if self.steps == 0:
            self._open(0)
        elif self.steps >= self.STEPS and self.elapsed >= self.SECONDS:
            if self.share > WAITING and not self.warned:
                warnings.warn(self._message(), stacklevel=2)
                self.warned = True
            self._open(0)

    def _open(self, steps: int) -> None:
        self.steps = steps
        self.begin()

    def _message(self) -> str:
        cores = usable_cores()
        more = (
            f"raise data.workers ({self.workers} now, the machine has {cores} cores)"
            if self.workers < cores
            else f"all {cores} cores are busy: scale the images down beforehand, or use more cores per GPU"
        )
        return (
            f"training waits for its images {self.share:.0%} of the time: they come at {self.rate:.0f} "
            f"images/s, the step could take {self.could:.0f} images/s; {more} (docs/data.md, Speed)"
        )


class DamageReport:
    """Keeps count of images that could not be read: one warning per file, and a line for the end.

    Example:
        >>> import warnings
        >>> from dgsnet.data.loading import DamageReport
        >>> report = DamageReport(total=100)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     report.add([(7, "b.png: empty file")])
        >>> report.summary()
        '1 of 100 images could not be read and was left out: b.png: empty file'
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.errors: dict[int, str] = {}

    def add(self, errors: Iterable[tuple[int, str]]) -> None:
        """Take in a batch's errors."""
        for index, message in errors:
            if index not in self.errors:
                self.errors[index] = message
                warnings.warn(f"left out: {message}", stacklevel=2)

    def summary(self, shown: int = 3) -> str | None:
        """One line with the count and the first few, None if all could be read."""
        if not self.errors:
            return None
        count = len(self.errors)
        first = "; ".join(list(self.errors.values())[:shown])
        more = f"; and {count - shown} more" if count > shown else ""
        verb = "was" if count == 1 else "were"
        return f"{count} of {self.total} images could not be read and {verb} left out: {first}{more}"
