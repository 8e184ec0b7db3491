"""Data: finding labelled images and captions on disk, and feeding them in a reproducible order."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dgsnet import shards
from dgsnet.errors import UserError
from dgsnet.images import EXTENSIONS, ImageError
from dgsnet.preprocess import Preprocessor
from dgsnet.sources import Item

CLASS_FOLDERS = {"0_real": 0, "1_fake": 1, "nature": 0, "ai": 1}
SPLIT_FOLDERS = ("train", "val", "test")
LABELS = {"0": 0, "1": 1, "real": 0, "fake": 1, "generated": 1}
CAPTIONS_FILE = "captions.json"
SHARDS_MIXED = 16  # shards read at a time


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Args:
        path: the image file; of an image in an archive `<archive>/<name>`.
        label: 0 real, 1 generated.
        generator: the group it is reported under.
        caption: text of the image; None while none is attached.
        archive, offset, size: the tar archive that holds it, and which of its bytes; "": a file of its own.
    """

    path: str
    label: int
    generator: str
    caption: str | None = None
    archive: str = ""
    offset: int = 0
    size: int | None = None

    @property
    def item(self) -> Item:
        """Where it lies, to be read or scored."""
        return Item(self.path, path=self.archive or self.path, offset=self.offset, size=self.size)


def find_samples(source: str | Path, split: str | None = None) -> list[Sample]:
    """List the labelled images of a folder, a JSON or CSV list, or WebDataset shards (layouts: docs/data.md).

    Args:
        source: folder with `[<generator>/][<class>/]{0_real,1_fake}/*` or
            `<generator>/{train,val}/{nature,ai}/*` in it, a list of path and label, or tar archives such as
            "shards-{000..099}.tar" or "shards-*.tar".
        split: "train", "val" or "test": folders of the other two names are left out. Lists and shards have no
            splits.

    Returns:
        The samples, sorted by path (lists and shards: in their order).

    Raises:
        UserError: nothing there or nothing recognised, several splits and none chosen, a bad list or shard.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from dgsnet.data import find_samples
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> (root / "progan/cat/1_fake").mkdir(parents=True)
        >>> Image.new("RGB", (8, 8)).save(root / "progan/cat/1_fake/a.png")
        >>> [(s.label, s.generator) for s in find_samples(root)]
        [(1, 'progan')]
    """
    source = Path(source)
    if split is not None and split not in SPLIT_FOLDERS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLIT_FOLDERS)}")
    if source.is_dir():
        return _samples_in_folder(source, split)
    if source.suffix.lower() == ".tar":
        return _samples_in_shards(str(source))
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; expected a dataset folder, a JSON or CSV list, or .tar shards"
        )
    readers = {".json": _json_rows, ".csv": _csv_rows}
    if source.suffix.lower() not in readers:
        raise UserError(
            f"{source}: expected a dataset folder or a list that ends in .json or .csv, or .tar shards"
        )
    rows = readers[source.suffix.lower()](source)
    samples = [_sample_of_row(row, where, source) for where, row in rows]
    if not samples:
        raise UserError(f"{source}: the list is empty; expected rows of path and label")
    return samples


def _samples_in_folder(root: Path, split: str | None) -> list[Sample]:
    found = [(path, folders) for path, folders in _walk(root) if _label(folders) is not None]
    splits = sorted({folder for _, folders in found for folder in folders if folder in SPLIT_FOLDERS})
    if split is None and len(splits) > 1:
        raise UserError(
            f"{root}: holds the splits {', '.join(splits)}; choose one as split, or name a folder of one"
        )
    left_out = set(SPLIT_FOLDERS) - {split} if split else set()
    samples = [
        Sample(path, _label(folders), _generator(root, folders))
        for path, folders in found
        if not left_out.intersection(folders)
    ]
    if not samples:
        which = f" of split {split}" if split else ""
        raise UserError(
            f"{root}: no labelled images{which} found; looked for [<generator>/][<class>/]{{0_real,1_fake}}/*"
            f" and <generator>/{{train,val}}/{{nature,ai}}/* with extensions {' '.join(sorted(EXTENSIONS))}"
        )
    return samples


def _label(folders: tuple[str, ...]) -> int | None:
    position = _class_folder(folders)
    return None if position is None else CLASS_FOLDERS[folders[position].lower()]


def _class_folder(folders: tuple[str, ...]) -> int | None:
    """Position of the innermost class folder: an outer "nature" is a class of pictures."""
    return max((i for i, folder in enumerate(folders) if folder.lower() in CLASS_FOLDERS), default=None)


def _generator(root: Path, folders: tuple[str, ...]) -> str:
    """The first folder below the root; where images of one generator lie directly in it, the root itself."""
    outer = [folder for folder in folders[: _class_folder(folders)] if folder not in SPLIT_FOLDERS]
    above = [part for part in root.absolute().parts if part not in SPLIT_FOLDERS]
    return outer[0] if outer else above[-1]


def _walk(
    folder: Path, below: tuple[str, ...] = (), open_folders: frozenset = frozenset()
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Image files and the folders between root and them, sorted; links are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in open_folders:
        return
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*below, entry.name), open_folders | {real})
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield entry.path, below


def _samples_in_shards(source: str) -> list[Sample]:
    samples = []
    for archive in shards.expand(source):
        known = set()
        for record in shards.records(archive):
            if record.images:
                samples.append(_sample_of_record(record, archive))
            elif record.texts:
                raise UserError(
                    f"{archive}: {record.key} has no image; the members of a key must be neighbours"
                )
            if record.key in known:
                raise UserError(f"{archive}: {record.key} comes twice; a key must be unique in its shard")
            known.add(record.key)
    if not samples:
        raise UserError(f"{source}: holds no images; looked for members {' '.join(sorted(EXTENSIONS))}")
    return samples


def _sample_of_record(record: shards.Record, archive: str) -> Sample:
    where = f"{archive}, {record.key}"
    if len(record.images) > 1:
        raise UserError(f"{where}: {len(record.images)} images under one key; expected one")
    row = _parse_json(record.texts["json"], f"{where}.json") if "json" in record.texts else {}
    if not isinstance(row, dict):
        raise UserError(f'{where}.json: expected an object such as {{"label": 0, "caption": "a cat"}}')
    folders = tuple(record.key.split("/")[:-1])
    label = record.texts.get("cls", row.get("label", _label(folders)))
    if str(label).strip().lower() not in LABELS:
        raise UserError(
            f"{where}: label {label!r} is unknown; give 0 or real, 1, fake or generated as .cls or as "
            '"label" in .json, or put the key below 0_real or 1_fake'
        )
    caption = record.texts.get("txt", row.get("caption")) or None
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"{where}.json: caption is not text")
    outer = [name for name in folders if name.lower() not in CLASS_FOLDERS and name not in SPLIT_FOLDERS]
    generator = row.get("generator") or (outer[0] if outer else _shard_series(archive))
    name, offset, size = record.images[0]
    value = LABELS[str(label).strip().lower()]
    return Sample(f"{archive}/{name}", value, str(generator), caption, archive, offset, size)


def _shard_series(archive: str) -> str:
    """The name that shards have in common: progan-000.tar is of "progan"."""
    stem = Path(archive).stem
    return stem.rstrip("0123456789").rstrip("-_.") or stem


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    rows = _read_json(path)
    if isinstance(rows, dict):
        rows = [{"path": name, "label": label} for name, label in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f'{path}: expected a JSON array of {{"path": ..., "label": ...}} or an object of path to label'
        )
    return ((f"entry {i}", row) for i, row in enumerate(rows, 1))


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(f"line {reader.line_num}", row) for row in reader]
            columns = set(reader.fieldnames or ())
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8: {error}") from None
    if not {"path", "label"} <= columns:
        raise UserError(
            f"{path}: its first line must name the columns path and label (and generator, caption)"
        )
    return iter(rows)


def _sample_of_row(row: dict, where: str, source: Path) -> Sample:
    path, label = row.get("path"), str(row.get("label")).strip().lower()
    if not isinstance(path, str) or not path:
        raise UserError(f"{source}, {where}: path is missing")
    if label not in LABELS:
        raise UserError(
            f"{source}, {where}: label {row.get('label')!r} is unknown; use 0 or real, 1, fake or generated"
        )
    caption = row.get("caption") or None
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"{source}, {where}: caption is not text")
    return Sample(str(source.parent / path), LABELS[label], str(row.get("generator") or source.stem), caption)


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    return _parse_json(text, path)


def _parse_json(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not readable as JSON: {error}") from None


def attach_captions(samples: list[Sample], captions: str | Path, root: str | Path) -> list[Sample]:
    """The same samples, every one with a caption.

    Args:
        samples: from find_samples; captions they already have are kept (except with "none").
        captions: JSON object of image path to text, keys absolute or relative to the root or to the JSON's
            folder; "auto": captions.json of the root and of its split folders; "none": the empty caption
            for every image (what that means for training: docs/data.md).
        root: what find_samples was given.

    Raises:
        UserError: no or an unusable JSON file, or images without a caption, counted, with the remedy.

    Example:
        >>> from dgsnet.data import Sample, attach_captions
        >>> attach_captions([Sample("a.png", 0, "cats")], "none", ".")[0].caption
        ''
    """
    if captions == "none":
        return [dataclasses.replace(sample, caption="") for sample in samples]
    root = Path(root) if Path(root).is_dir() else Path(root).parent
    if captions == "auto":
        files = [folder / CAPTIONS_FILE for folder in (root, *(root / split for split in SPLIT_FOLDERS))]
        files = [file for file in files if file.exists()]
    else:
        files = [Path(captions)]
    read = {file: _read_captions(file) for file in files}
    # Where two readings of a key meet, the one relative to its own file's folder wins.
    table = {os.path.abspath(root / key): text for entries in read.values() for key, text in entries.items()}
    for file, entries in read.items():
        table.update((os.path.abspath(file.parent / key), text) for key, text in entries.items())

    captioned = [
        sample
        if sample.caption is not None
        else dataclasses.replace(sample, caption=table.get(os.path.abspath(sample.path)))
        for sample in samples
    ]
    missing = [sample.path for sample in captioned if sample.caption is None]
    if missing:
        looked = ", ".join(map(str, files)) or f"{root / CAPTIONS_FILE}, which does not exist"
        raise UserError(
            f"{len(missing)} of {len(samples)} images have no caption, the first is {missing[0]} (looked in "
            f"{looked}); make captions with `dgsnet caption --data {root}`, or train without: captions none"
        )
    return captioned


def _read_captions(path: Path) -> dict[str, str]:
    entries = _read_json(path)
    if not isinstance(entries, dict) or not all(isinstance(text, str) for text in entries.values()):
        raise UserError(f"{path}: expected a JSON object of image path to caption")
    return entries


class ImageDataset(Dataset):
    """Decoded and preprocessed samples; an image that cannot be read becomes an item with its error.

    Augmentation is a function of (seed, epoch, index) alone, whatever the number of workers.

    Args:
        samples: what to read.
        preprocess: a preprocess.Preprocessor.
        train: augment.
        seed: decides the augmentation, at least 0.
        selection: "workers": items hold the finished input; "device": in mode "patches" they hold all
            patches of the image, and `pixels_on` selects on the device, for the batch at once.
    """

    def __init__(
        self,
        samples: list[Sample],
        preprocess: Preprocessor,
        *,
        train: bool,
        seed: int = 0,
        selection: Literal["workers", "device"] = "workers",
    ) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.train = train
        self.seed = seed
        self.cut_only = selection == "device" and preprocess.config.mode == "patches"
        # Shared memory, because persistent workers hold their own copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn; reaches running workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """dict(pixels float32 [3, S, S], label, caption, index), or dict(error, index).

        Where the device selects, `patches`, `seed` and `flip` of `Preprocessor.cut` in place of `pixels`.
        """
        sample = self.samples[index]
        rng = np.random.default_rng((self.seed, int(self._epoch), index)) if self.train else None
        try:
            image = sample.item.read()
            if self.cut_only:
                content = dict(zip(("patches", "seed", "flip"), self.preprocess.cut(image, rng=rng)))
            else:
                content = {"pixels": self.preprocess(image, rng=rng)}
        except ImageError as error:
            text = str(error)
            return {"error": text if sample.path in text else f"{sample.path}: {text}", "index": index}
        return content | {"label": sample.label, "caption": sample.caption or "", "index": index}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the items that could be read.

    Returns:
        dict(pixels float32 [n, 3, S, S], labels float32 [n], captions list[str], index int64 [n],
        errors list of (index, message)). n may be 0, and pixels then is [0, 3, 0, 0]: skip such a batch.
        Where the device selects, the arguments of `Preprocessor.select` in place of `pixels`.
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
    return content | {
        "labels": torch.tensor([item["label"] for item in good], dtype=torch.float32),
        "captions": [item["caption"] for item in good],
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "errors": [(item["index"], item["error"]) for item in items if "error" in item],
    }


def pixels_on(device: torch.device, batch: dict[str, Any], preprocess: Preprocessor) -> Tensor:
    """The pixels of a batch of `collate` on the device, selected there if its workers have not.

    Returns:
        float32 [n, 3, S, S].
    """
    if "pixels" in batch:
        return batch["pixels"].to(device, non_blocking=True)
    names = ("patches", "counts", "seeds", "flips")
    return preprocess.select(*(batch[name].to(device, non_blocking=True) for name in names))


def epoch_order(samples: list[Sample], rng: np.random.Generator) -> np.ndarray:
    """A random order of the samples that reads shards a few at a time.

    Images in files of their own come in any order. Shards come in a random order, SHARDS_MIXED at a time,
    and the images of these, with an equal part of the images in files, in any order.
    """
    archives = np.array([sample.archive for sample in samples])
    if not archives.any():
        return rng.permutation(len(samples))
    names, shard = np.unique(archives, return_inverse=True)
    of_shard = np.split(np.argsort(shard, kind="stable"), np.cumsum(np.bincount(shard))[:-1])
    alone = rng.permutation(of_shard.pop(0)) if names[0] == "" else np.empty(0, np.int64)
    windows = max(1, -(-len(of_shard) // SHARDS_MIXED))
    parts = zip(
        np.array_split(rng.permutation(len(of_shard)), windows), np.array_split(alone, windows), strict=True
    )
    return np.concatenate(
        [rng.permutation(np.concatenate([files, *(of_shard[i] for i in few)])) for few, files in parts]
    )


class EpochSampler(Sampler[int]):
    """An order that is a function of (seed, epoch), and can start in the middle without decoding the rest."""

    def __init__(self, dataset: ImageDataset, *, shuffle: bool, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.skip = 0

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
        return max(len(self.dataset) - self.skip, 0)

    def __iter__(self) -> Iterator[int]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = epoch_order(self.dataset.samples, np.random.default_rng((self.seed, self.epoch)))
        return iter(order[self.skip :].tolist())


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 2,
    shuffle: bool = False,
    seed: int = 0,
) -> DataLoader:
    """A loader whose batches depend on seed and epoch alone.

    Before each epoch call `loader.sampler.set_epoch(epoch, skip=samples_already_seen)`; a run resumed that
    way sees the rest of its epoch as if it had not stopped, and decodes nothing twice.

    Args:
        dataset: what to load.
        batch_size: samples per batch, before damaged ones are dropped.
        workers: decoding processes, kept alive over epochs; 0 decodes in this process.
        prefetch: batches that every worker makes ahead.
        shuffle: draw a new order each epoch.
        seed: decides the order, at least 0.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(dataset, shuffle=shuffle, seed=seed),
        **loader_options(workers, prefetch),
    )


def loader_options(workers: int, prefetch: int = 2) -> dict[str, Any]:
    """What every DataLoader of an ImageDataset has in common."""
    return {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": workers > 0,
        "prefetch_factor": prefetch if workers else None,
    }


class LoaderWatch:
    """Warns once, with figures, when training waits for its images rather than they for it.

    A wait counts where the device had nothing left to do when it ended. Shares are taken over at least
    `STEPS` steps and `SECONDS` seconds, after the first `WARM_UP` steps of an epoch, in which workers start.

    Args:
        workers: data-loading processes of this process.
        device: where training computes.
    """

    WARM_UP, STEPS, SECONDS = 5, 20, 5.0
    SHARE = 0.2  # of the time spent waiting; below it there is little to gain

    def __init__(self, workers: int, device: torch.device) -> None:
        self.workers = workers
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        self.told = False
        self.start()

    def start(self) -> None:
        """Begin an epoch."""
        self._open(-self.WARM_UP)

    def next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch, and a note of how long it took to come."""
        before = time.perf_counter()
        batch = next(batches)
        if self.done is None or self.done.query():
            self.waited += time.perf_counter() - before
        return batch

    def step(self, images: int) -> None:
        """An optimiser step over so many images of this process has been handed to the device."""
        if self.done is not None:
            self.done.record()
        self.steps += 1
        self.images += images
        elapsed = time.perf_counter() - self.opened
        if self.steps == 0:
            self._open(0)
        elif self.steps >= self.STEPS and elapsed >= self.SECONDS:
            if self.waited > self.SHARE * elapsed and not self.told:
                warnings.warn(self._message(elapsed), stacklevel=2)
                self.told = True
            self._open(0)

    def _open(self, steps: int) -> None:
        self.steps, self.images, self.waited, self.opened = steps, 0, 0.0, time.perf_counter()

    def _message(self, elapsed: float) -> str:
        cores = os.cpu_count() or 1
        more = (
            f"raise data.workers ({self.workers} now, the machine has {cores} cores)"
            if self.workers < cores
            else f"all {cores} cores are busy: scale the images down beforehand, or use more cores per GPU"
        )
        return (
            f"training waits for its images {self.waited / elapsed:.0%} of the time: they come at "
            f"{self.images / elapsed:.0f} images/s, the step could take "
            f"{self.images / (elapsed - self.waited):.0f} images/s; {more} (docs/data.md, Speed)"
        )


class DamageReport:
    """Keeps count of images that could not be read: one warning per file, and a line for the end.

    Example:
        >>> import warnings
        >>> from dgsnet.data import DamageReport
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
