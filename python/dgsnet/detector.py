"""`Detector`: a trained model that scores images, in Python; scoring.py has the command `dgsnet predict`."""

from __future__ import annotations

import os
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
