"""What frozen towers say, computed once, so that they need not run in a training step.

Text features of captions are kept on disk: a folder per text encoder holds immutable `.npy` files of (key,
feature) rows, which are memory-mapped. New captions go to a new file that appears complete, so several
processes may share a folder. Features of images are kept in memory.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dgsnet.data.loading import ImageDataset, loader_options, pixels_on
from dgsnet.errors import UserError
from dgsnet.model.dgsnet import DGSNet

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCH = 256  # captions, or images, encoded at once
KEY_BYTES = 16


def default_folder() -> Path:
    """$XDG_CACHE_HOME/dgsnet, or ~/.cache/dgsnet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dgsnet"


class CaptionFeatures:
    """Features of a set of captions, read from disk as they are asked for.

    Args:
        model: a DGSNet with its text tower, which encodes captions that are not there yet.
        captions: all captions that will be asked for.
        folder: the cache's folder; "" is `default_folder()`.
        progress: show a progress bar while encoding.

    Raises:
        UserError: the cache is damaged or cannot be written.

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
        folder = Path(folder or default_folder()).expanduser() / "text" / encoder_identity(model.text)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._places: dict[bytes, tuple[np.ndarray, int]] = {}
            for path in sorted(folder.glob("*.npy")):
                self._add(path, keys.keys())
            missing = sorted(keys.keys() - self._places.keys(), key=lambda k: (len(keys[k]), keys[k]))
            if missing:
                path = _encode(model, [keys[key] for key in missing], missing, folder, progress)
                self._add(path, keys.keys())
        except OSError as error:
            raise UserError(
                f"text features cannot be kept in {folder} ({error.strerror or error}): set data.cache to "
                "another folder"
            ) from None

    def _add(self, path: Path, wanted: Set[bytes]) -> None:
        try:
            rows = np.load(path, mmap_mode="r")
            found = {key.tobytes(): i for i, key in enumerate(rows["key"])}
            features = rows["feature"]
        except (ValueError, IndexError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, it will be computed again") from None
        self._places |= {key: (features, found[key]) for key in wanted & found.keys()}

    def __call__(self, captions: list[str]) -> Tensor:
        """Features [N, D], float32, on the CPU; KeyError for a caption that was not announced."""
        places = (self._places[_key(caption)] for caption in captions)
        return torch.from_numpy(np.stack([features[i] for features, i in places]))


@torch.no_grad()
def _encode(model: DGSNet, captions: list[str], keys: list[bytes], folder: Path, progress: bool) -> Path:
    """Write a file with the features of these captions; they come sorted by length, to be cut alike."""
    dim = model.dim
    path = folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.npy"
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    dtype = [("key", f"V{KEY_BYTES}"), ("feature", "<f4", (dim,))]
    rows = np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=(len(captions),))
    for start in tqdm(range(0, len(captions), BATCH), desc="encoding captions", disable=not progress):
        part = slice(start, start + BATCH)
        rows["key"][part] = np.frombuffer(b"".join(keys[part]), f"V{KEY_BYTES}")
        rows["feature"][part] = model.text_features(captions[part]).float().cpu().numpy()
    rows.flush()
    del rows
    os.replace(new, path)
    return path


def encoder_identity(text: nn.Module) -> str:
    """A hash of all weights of a text tower and of the length that it cuts captions to."""
    digest = hashlib.sha256(str(text.context_length).encode())
    for name, tensor in sorted(text.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode(errors="surrogateescape")).digest()[:KEY_BYTES]


class FrozenFeatures:
    """Features of every view of every training image from the tower without adapters, kept in memory.

    The processes share the work, and every one of them then holds all of the result. Batches are the same in
    every run on as many processes, so a resumed run has the same features to the last bit.

    Args:
        model: gives the features; in its device's precision, kept as float32.
        dataset: training images with `views` of 1 or more.
        accelerator: of the processes.
        workers: decoding processes.
    """

    def __init__(self, model: DGSNet, dataset: ImageDataset, accelerator: Accelerator, workers: int) -> None:
        self.dataset = dataset
        self.rows = torch.zeros(dataset.views, len(dataset), model.dim)
        own = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        loader = DataLoader(dataset, BATCH, sampler=own, **loader_options(workers, told=True))
        shown = accelerator.is_main_process and sys.stderr.isatty()
        for view in tqdm(range(dataset.views), desc="frozen features, view", disable=not shown):
            dataset.set_epoch(view)
            for batch in loader:
                if not len(batch["labels"]):  # all were damaged, of which training tells
                    continue
                pixels = pixels_on(accelerator.device, batch, dataset.preprocess)
                with accelerator.autocast():
                    features = model.teacher_features(pixels)
                self.rows[view, batch["index"]] = features.float().cpu()
            self.rows[view] = accelerator.reduce(self.rows[view].to(accelerator.device), "sum").cpu()

    def __call__(self, index: Tensor, epoch: int) -> Tensor:
        """Features [n, D], float32, on the CPU, of the images as an epoch sees them."""
        return self.rows[self.dataset.view_of(epoch), index]
