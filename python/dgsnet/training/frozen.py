"""Features of the frozen towers, computed once, so that the towers need not run in a training step.

The features are kept on disk, in immutable `.npy` files of rows, which are memory-mapped. New ones go to a
new file that appears complete, so several processes may share a folder, and a kill costs at most one file.
Captions have a folder per text encoder; images one per set of images, views, preprocessing and encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Set
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dgsnet.data.loading import ImageDataset, loader_options, pixels_on
from dgsnet.errors import UserError
from dgsnet.files import one_line, replacing
from dgsnet.model.dgsnet import DGSNet

if TYPE_CHECKING:
    from accelerate import Accelerator

# Captions, or images, that are encoded at once.
BATCH = 256
KEY_BYTES = 16
# Images of a file.
CHUNK = 1024


def default_folder() -> Path:
    """$XDG_CACHE_HOME/dgsnet, or ~/.cache/dgsnet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dgsnet"


@contextlib.contextmanager
def _kept(folder: str | Path, kind: str, identity: str) -> Iterator[Path]:
    """A store's folder in the cache, made if missing; UserError if it cannot be written."""
    store = Path(folder or default_folder()).expanduser() / kind / identity
    try:
        store.mkdir(parents=True, exist_ok=True)
        yield store
    except OSError as error:
        raise UserError(
            f"features cannot be kept in {store} ({error.strerror or error}): set data.cache to another "
            "folder"
        ) from None


def _load(path: Path) -> np.ndarray:
    """A file of a store, memory-mapped; UserError if it is damaged."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:
        # NumPy reads the header as Python; its errors share no class.
        raise _unusable(path, f"damaged ({one_line(error, 200)})") from None


def _unusable(path: Path, why: str) -> UserError:
    return UserError(f"{path} is {why}: remove it, it will be computed again")


class CaptionFeatures:
    """Features of a set of captions, read from disk as they are asked for.

    Args:
        model: a DGSNet with its text tower, which encodes captions that are not there yet.
        captions: all captions that will be asked for.
        folder: the cache's folder; "" is `default_folder()`. UserError if it is damaged or cannot be written.

    Example:
        >>> import tempfile
        >>> from dgsnet.config import ModelConfig
        >>> from dgsnet.model.dgsnet import DGSNet
        >>> model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=""))
        >>> features = CaptionFeatures(model, ["a dog", "a cat"], tempfile.mkdtemp())
        >>> features(["a cat", "a cat", "a dog"]).shape
        torch.Size([3, 96])
    """

    def __init__(
        self, model: DGSNet, captions: Iterable[str], folder: str | Path = "", *, progress: bool = False
    ) -> None:
        if model.text is None:
            raise ValueError("the model was built with with_text=False and has no text tower")
        keys = {_key(caption): caption for caption in captions}
        self._dtype = _caption_dtype(model.dim)
        self._places: dict[bytes, tuple[np.ndarray, int]] = {}
        with _kept(folder, "text", encoder_identity(model.text)) as store:
            for path in sorted(store.glob("*.npy")):
                self._add(path, keys.keys())
            missing = sorted(keys.keys() - self._places.keys(), key=lambda k: (len(keys[k]), keys[k]))
            if missing:
                path = _encode(model, [keys[key] for key in missing], missing, store, progress)
                self._add(path, keys.keys())

    def _add(self, path: Path, wanted: Set[bytes]) -> None:
        rows = _load(path)
        try:
            if rows.dtype != self._dtype or rows.ndim != 1:
                raise ValueError(f"numbers of type {str(rows.dtype)[:80]} and shape {rows.shape}")
            found = {key.tobytes(): i for i, key in enumerate(rows["key"])}
            features = rows["feature"]
        except (ValueError, IndexError) as error:
            raise _unusable(path, f"damaged ({error})") from None
        self._places |= {key: (features, found[key]) for key in wanted & found.keys()}

    def __call__(self, captions: list[str]) -> Tensor:
        """Features [N, D], float32, on the CPU; KeyError for a caption that was not announced."""
        places = (self._places[_key(caption)] for caption in captions)
        return torch.from_numpy(np.stack([features[i] for features, i in places]))


@torch.no_grad()
def _encode(model: DGSNet, captions: list[str], keys: list[bytes], folder: Path, progress: bool) -> Path:
    """Write a file with the features of these captions; they come sorted by length, to be cut alike."""
    path = folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.npy"
    dtype = _caption_dtype(model.dim)
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (len(captions),),
    }
    with replacing(path, "wb", owner=str(os.getpid())) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, len(captions), BATCH), desc="encoding captions", disable=not progress):
            part = slice(start, start + BATCH)
            rows = np.empty(len(captions[part]), dtype)
            rows["key"] = np.frombuffer(b"".join(keys[part]), f"V{KEY_BYTES}")
            rows["feature"] = model.text_features(captions[part]).float().cpu().numpy()
            file.write(rows.tobytes())
    return path


def _caption_dtype(dim: int) -> np.dtype:
    """Of a row of a file of captions."""
    return np.dtype([("key", f"V{KEY_BYTES}"), ("feature", "<f4", (dim,))])


def encoder_identity(text: nn.Module) -> str:
    """A hash of all weights of a text tower and of the length that it cuts captions to."""
    digest = hashlib.sha256(str(text.context_length).encode())
    for name, tensor in sorted(text.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode(errors="surrogateescape")).digest()[:KEY_BYTES]


class ImageFeatures:
    """Features of every view of every training image from the tower without adapters, read from disk.

    A row of a file holds the feature of a view, the hash of its image's file, and a checksum that no row of
    another store or place has. A file's batches are the same in every run, and so are the features, as far as
    the devices round alike.

    Args:
        model: gives the features, in its precision; kept as float32.
        dataset: training images with `views` of 1 or more.
        accelerator: of the processes, which share the work.
        workers: decoding processes.
        folder: the cache's folder; "" is `default_folder()`.
        encoder: a name for the model's weights and precision, part of the store's key.

    Raises:
        UserError: the store is damaged or foreign or cannot be written.
    """

    def __init__(
        self,
        model: DGSNet,
        dataset: ImageDataset,
        accelerator: Accelerator,
        workers: int,
        folder: str | Path = "",
        encoder: str = "",
    ) -> None:
        self.dataset = dataset
        self._identity = _views_identity(dataset, encoder)
        self._dtype = np.dtype([("check", "<u4"), ("hash", "<i8"), ("feature", "<f4", (model.dim,))])
        self._files: dict[int, np.ndarray] = {}
        # All processes share the work; where they have no common disk, those of a machine do what is left.
        local, here = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        shares = ((accelerator.process_index, accelerator.num_processes), (local % here, here))
        with _kept(folder, "images", self._identity) as self._folder:
            for first, step in shares:
                mine = self._missing()[first::step]
                # All processes must have seen the same files.
                accelerator.wait_for_everyone()
                if mine:
                    self._compute(mine, model, accelerator, workers)
                accelerator.wait_for_everyone()

    def __call__(self, index: Tensor, epoch: int, hashes: Tensor) -> Tensor:
        """Features [n, D], float32, on the CPU, of the images at `index` [n] as an epoch sees them.

        UserError if the store is damaged, or a file has not the hash [n] of when its feature was computed.
        """
        rows = [self._row(int(i), epoch) for i in index]
        for i, row, file_hash in zip(index.tolist(), rows, hashes.tolist()):
            if row["hash"] != file_hash:
                raise UserError(
                    f"{self.dataset.samples[i].path} has changed since its features were kept: remove "
                    f"{self._folder}, they will be computed again"
                )
        features = np.array([row["feature"] for row in rows], np.float32)
        return torch.from_numpy(features.reshape(-1, *self._dtype["feature"].shape))

    def images(self) -> Dataset:
        """The training images without pixels, for stages that need none: items as of the dataset's."""
        return _WithoutPixels(self)

    def _row(self, index: int, epoch: int) -> np.void:
        row = self.dataset.view_of(epoch) * len(self.dataset) + index
        file, place = divmod(row, CHUNK)
        if file not in self._files:
            self._files[file] = self._open(file)
        found = self._files[file][place]
        if found["check"] != self._check(row, found):
            raise _unusable(self._path(file), "damaged or of another store")
        return found

    def _check(self, row: int, content: np.void) -> int:
        checked = content["hash"].tobytes() + content["feature"].tobytes()
        return zlib.crc32(checked, zlib.crc32(f"{self._identity} {row}".encode()))

    def _path(self, file: int) -> Path:
        return self._folder / f"{file:06d}.npy"

    def _places(self, file: int) -> range:
        """The rows of a file."""
        return range(file * CHUNK, min((file + 1) * CHUNK, len(self.dataset) * self.dataset.views))

    def _open(self, file: int) -> np.ndarray:
        rows = _load(self._path(file))
        if rows.dtype != self._dtype or rows.shape != (len(self._places(file)),):
            raise _unusable(self._path(file), "of another store")
        return rows

    def _missing(self) -> list[int]:
        """Numbers of the files that are not there; those that are there are opened."""
        missing = []
        for file in range(-(-len(self.dataset) * self.dataset.views // CHUNK)):
            if self._path(file).is_file():
                self._open(file)
            else:
                missing.append(file)
        return missing

    @torch.no_grad()
    def _compute(self, files: list[int], model: DGSNet, accelerator: Accelerator, workers: int) -> None:
        batches = [
            list(rows[start : start + BATCH])
            for rows in map(self._places, files)
            for start in range(0, len(rows), BATCH)
        ]
        loaded = iter(
            DataLoader(_Views(self.dataset), batch_sampler=batches, **loader_options(workers, silent=True))
        )
        shown = accelerator.is_main_process and sys.stderr.isatty()
        for file in tqdm(files, desc="frozen features", unit_scale=CHUNK, unit=" images", disable=not shown):
            rows = self._places(file)
            content = np.zeros(len(rows), self._dtype)
            # An image that cannot be read has none, which training reports.
            content["feature"] = np.nan
            for _ in range(0, len(rows), BATCH):
                batch = next(loaded)
                if len(batch["labels"]):
                    with accelerator.autocast():
                        pixels = pixels_on(accelerator.device, batch, self.dataset.preprocess)
                        features = model.teacher_features(pixels)
                    places = batch["index"] - rows.start
                    content["feature"][places] = features.float().cpu()
                    content["hash"][places] = batch["hashes"]
            content["check"] = [self._check(row, one) for row, one in zip(rows, content)]
            with replacing(self._path(file), "wb", owner=str(os.getpid())) as out:
                np.save(out, content)


class _Views(Dataset):
    """All views of a dataset, one view after the other; an item's index is its place here."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.views * len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        view, index = divmod(row, len(self.dataset))
        return self.dataset.item(index, view) | {"index": row}


class _WithoutPixels(Dataset):
    def __init__(self, features: ImageFeatures) -> None:
        self.features, self.dataset = features, features.dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.features._row(index, epoch=0)
        if np.isnan(row["feature"]).all():
            # It comes with the error, since it cannot be read.
            return self.dataset[index]
        sample = self.dataset.samples[index]
        item = {"label": sample.label, "caption": sample.caption or "", "index": index}
        return item | {"pixels": torch.empty(0), "hash": int(row["hash"])}


def _views_identity(dataset: ImageDataset, encoder: str) -> str:
    """A hash of all that decides the features; size and time of a file stand for its content."""
    digest = hashlib.sha256()
    settings: list[Any] = [encoder, dataset.preprocess.config.of_one(), dataset.seed, dataset.views]
    # Stores of former versions have none.
    if dataset.degradations:
        settings.append(asdict(dataset.degradations))
    if dataset.drawn_as is not None:
        settings.append(dataset.drawn_as.tolist())
        # Twins had their own patches before.
        if dataset.preprocess.config.mode == "patches":
            settings.append("shared patches")
    digest.update(json.dumps(settings).encode())
    for item in dataset.samples:
        try:
            found = os.stat(item.file)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            state = "cannot be read"
        digest.update(f"{item.path}\0{item.offset}\0{item.size}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
