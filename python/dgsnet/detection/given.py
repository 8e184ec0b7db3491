"""What `Detector.predict` may be given for images, told before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from dgsnet.data.items import Item


def listed(images: Any) -> list[Any]:
    """What `predict` was given, as a list of images."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    elif isinstance(images, (str, bytes, os.PathLike, np.ndarray)) or hasattr(images, "getbands"):
        images = [images]
    elif not isinstance(images, Iterable) or hasattr(images, "read") or _is_tensor(images):
        # It is refused below.
        images = [images]
    return [checked(image) for image in images]


def checked(image: Any) -> Any:
    """The same image, or TypeError or ValueError where it is none."""
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            return image
        raise ValueError(
            f"an array must be uint8 [H, W], [H, W, 3] or [H, W, 4], got {image.dtype} {list(image.shape)}"
        )
    if isinstance(image, (str, bytes, os.PathLike, Item)) or hasattr(image, "getbands"):
        return image
    remedy = ""
    if _is_tensor(image):
        remedy = "; Detector.logits takes prepared tensors [N, 3, S, S]"
    elif hasattr(image, "read"):
        remedy = "; give the file's path, or its content as bytes"
    raise TypeError(
        f"an image is a path, bytes, a PIL image or a uint8 array, got {type(image).__name__}{remedy}"
    )


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.startswith("torch") and hasattr(value, "numpy")
