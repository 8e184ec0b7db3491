"""The real photographs that scikit-image, scikit-learn and matplotlib carry in their wheels.

A photograph belongs to one split for ever: those of "train" are also all that the tiny CLIP was pretrained
on, those of "test" are seen by nothing before the evaluation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from dgsnet.errors import UserError

SPLITS = ("train", "val", "test")
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


@dataclass(frozen=True)
class Photograph:
    """One photograph, as photographs.yaml has it."""

    file: str
    content: str
    regions: Sequence[tuple[float, float, float, float, str]] = ()

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3], RGB at native resolution; raises UserError where the wheel lacks the file."""
        return _read(self.file)

    def content_at(self, x: float, y: float) -> str:
        """What is seen at a point given as fractions of width and height."""
        for left, top, right, bottom, content in self.regions:
            if left <= x < right and top <= y < bottom:
                return content
        return self.content


@cache
def _read(file: str) -> np.ndarray:
    package, name = file.split("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / _FOLDERS[package] / name if spec and spec.origin else Path(file)
    if not path.is_file():
        raise UserError(f"{path}: a built-in photograph is missing; reinstall {package} from its wheel")
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


PHOTOGRAPHS: dict[str, tuple[Photograph, ...]] = {
    split: tuple(Photograph(**photograph) for photograph in photographs)
    for split, photographs in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
}
