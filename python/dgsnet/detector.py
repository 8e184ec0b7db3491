"""Scoring images with a trained model: `Detector` in Python, `dgsnet predict` on the command line."""

from __future__ import annotations

import csv
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.errors import UserError

# torch, open_clip and the rest are imported where they are used: `from dgsnet import Detector` stays quick.
if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dgsnet.config import Config
    from dgsnet.model import DGSNet

THRESHOLD = 0.5
# More processes than this wait for the model, not for the images.
MAX_WORKERS = 8
# Starting processes takes about as long as preparing this many images.
MIN_IMAGES_FOR_WORKERS = 64


class Detector:
    """A trained model that says how likely an image was generated.

    A score is a function of the image alone: the patch shuffle is seeded from the image's content, and every
    image goes through the network by itself, because floating-point sums depend on the shape of the batch.
    Between machines, versions or numbers of threads the last digits may differ.

    Attributes:
        model: the network, in evaluation mode.
        config: the configuration it was trained with, preprocessing included.
        errors: index to message of the images that the last `predict` could not read.

    >>> detector = Detector.load("runs/demo/model")  # doctest: +SKIP
    >>> detector.predict(["photo.jpg", "broken.png"])  # doctest: +SKIP
    array([0.03121, nan], dtype=float32)
    >>> detector.errors  # doctest: +SKIP
    {1: 'broken.png: cannot identify image file'}
    """

    def __init__(self, model: DGSNet, config: Config):
        from dgsnet.preprocess import Preprocessor

        self.model = model.eval()
        self.config = config
        self.preprocess = Preprocessor(config.preprocess)
        self.errors: dict[int, str] = {}

    @classmethod
    def load(cls, run: str | Path, device: str | None = None) -> Detector:
        """Load a model folder, or the best model of a training run's folder.

        Args:
            run: folder written by `dgsnet train` or `dgsnet demo`.
            device: torch device, such as "cpu" or "cuda:1"; None takes the GPU where there is one.

        Raises:
            UserError: the folder holds no model, its backbone cannot be loaded, or there is no such device.
        """
        import torch

        from dgsnet.checkpoint import load_model

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device} cannot be used here ({error}); try cpu") from None
        return cls(*load_model(Path(run), device=device))

    def predict(self, images: Any, *, workers: int | None = None) -> np.ndarray:
        """Probability that each image was generated, float32 [N].

        Args:
            images: one image or a sequence of N; an image is a path, a PIL image or a uint8 array
                [H, W], [H, W, 3] or [H, W, 4].
            workers: processes that read and prepare images; None chooses, 0 works in this process.

        An image that cannot be read gives NaN, and `errors` tells why under its index.
        """
        if isinstance(images, (str, os.PathLike, np.ndarray)) or hasattr(images, "getbands"):
            images = [images]
        images = list(images)
        probabilities = np.full(len(images), np.nan, dtype=np.float32)
        self.errors = {}
        for index, (probability, error) in enumerate(self.stream(images, workers=workers)):
            probabilities[index] = probability
            if error:
                self.errors[index] = error
        return probabilities

    def stream(
        self, images: Sequence[str | Path | Image | np.ndarray], *, workers: int | None = None
    ) -> Iterator[tuple[float, str]]:
        """`predict` one (probability, error message) at a time, in order; the message is "" for a score."""
        import torch
        from torch.utils.data import DataLoader

        if workers is None:
            few = len(images) < MIN_IMAGES_FOR_WORKERS
            workers = 0 if few else min(MAX_WORKERS, os.cpu_count() or 1)
        elif workers < 0:
            raise UserError(f"workers is {workers}; it must be 0 or more")
        # batch_size=None hands the prepared images over one by one.
        for pixels, error in DataLoader(
            _Prepared(images, self.preprocess), batch_size=None, num_workers=workers
        ):
            if error:
                yield float("nan"), error
            else:
                yield torch.sigmoid(self.logits(pixels[None])).item(), ""

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits, float32 [N] on the model's device; generated is positive.

        Args:
            pixels: prepared and normalised images [N, 3, S, S], float, on any device; N may be 0.

        Raises:
            ValueError: another shape than the model's input.
        """
        import torch

        size = self.model.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [N, 3, {size}, {size}], got {list(pixels.shape)}")
        pixels = pixels.to(next(self.model.parameters()).device)
        with torch.inference_mode():
            rows = (
                [self.model.logits(row) for row in pixels.split(1)] if len(pixels) else [pixels.new_empty(0)]
            )
            return torch.cat(rows).float()


class _Prepared:
    """Map-style dataset of (pixels, "") or (None, error message)."""

    def __init__(self, images: Sequence[Any], preprocess: Any):
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        from dgsnet.images import ImageError, read_image

        image = self.images[index]
        try:
            return self.preprocess(read_image(image)), ""
        except ImageError as error:
            # What the preprocessing refuses does not know its file.
            named = not isinstance(image, (str, os.PathLike)) or os.fspath(image) in str(error)
            return None, str(error) if named else f"{os.fspath(image)}: {error}"


def find_images(paths: Sequence[str | Path]) -> tuple[list[str], dict[str, str]]:
    """The image files that files, folders (searched recursively) and glob patterns stand for.

    Returns:
        The files, in the order given and sorted within a folder or pattern, each once; and for every
        path that stands for none, why. A file named outright is taken whatever its extension; in folders,
        names that begin with a dot are left out and links to folders not followed.
    """
    from dgsnet.images import EXTENSIONS

    def is_image(path: str) -> bool:
        return Path(path).suffix.lower() in EXTENSIONS and os.path.isfile(path)

    def inside(folder: str) -> list[str]:
        found = []
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        return sorted(filter(is_image, found))

    files: dict[str, None] = {}
    missing: dict[str, str] = {}
    for path in map(str, paths):
        if os.path.isdir(path):
            found, why = inside(path), "no image in this folder"
        elif os.path.exists(path):
            found, why = [path], ""
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            found = [
                f for m in matches for f in (inside(m) if os.path.isdir(m) else [m] if is_image(m) else [])
            ]
            why = "no image matches this pattern"
        else:
            found, why = [], "no such file or folder"
        files.update(dict.fromkeys(found))
        if not found:
            missing[path] = why
    return list(files), missing


def predict_command(
    paths: list[str],
    model: str,
    out: str = "scores.csv",
    device: str | None = None,
    workers: int | None = None,
) -> None:
    """Score images into a CSV with columns path, probability, decision, error.

    Args:
        paths: image files, folders (searched recursively) and glob patterns.
        model: a model folder, or the folder of a training run.
        out: the CSV to write; it appears under this name when complete.
        device: torch device; the GPU where there is one if not given.
        workers: processes that read and prepare images; chosen if not given.
    """
    from tqdm import tqdm

    files, missing = find_images(paths)
    if not files:
        path, why = next(iter(missing.items()), ("PATHS", "no path given"))
        raise UserError(f"{path}: {why}; give image files, folders or quoted glob patterns")
    detector = Detector.load(model, device)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    counts = {"real": 0, "generated": 0, "": 0}
    # surrogateescape writes file names that are not UTF-8 as the bytes they are.
    with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "probability", "decision", "error"])
        for path, why in missing.items():
            writer.writerow([path, "", "", why])
        scores = detector.stream(files, workers=workers)
        for path, (probability, error) in zip(files, tqdm(scores, total=len(files), unit="image")):
            # Rounded before the decision, so that the row agrees with itself.
            probability = round(probability, 6)
            decision = "" if error else "generated" if probability > THRESHOLD else "real"
            counts[decision] += 1
            writer.writerow([path, "" if error else f"{probability:.6f}", decision, error])
            file.flush()
    os.replace(partial, target)
    unreadable = counts[""] + len(missing)
    print(f"{target}: {counts['generated']} generated, {counts['real']} real, {unreadable} could not be read")
    if unreadable == len(files) + len(missing):
        raise UserError(f"none of the images could be read; {target} says why for each")
    if unreadable:
        print(f"the column error of {target} says why", file=sys.stderr)
