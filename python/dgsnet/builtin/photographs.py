"""The real photographs that scikit-image, scikit-learn and matplotlib carry in their wheels.

A photograph belongs to one split for ever: those of "train" are also all that the tiny CLIP was pretrained
on, those of "test" are seen by nothing before the evaluation.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dgsnet.errors import UserError

SPLITS = ("train", "val", "test")
_FOLDERS = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}


@dataclass(frozen=True)
class Photograph:
    """One photograph.

    Args:
        file: "package/file name".
        content: what it shows, wherever no region says more.
        regions: (left, top, right, bottom, content), as fractions of the picture; the first that holds a
            crop's centre names the crop.
    """

    file: str
    content: str
    regions: tuple[tuple[float, float, float, float, str], ...] = ()

    @property
    def name(self) -> str:
        """The file's name without package and ending."""
        return Path(self.file).stem

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
    "train": (
        Photograph(
            "skimage/astronaut.png",
            "an orange space suit",
            (
                (0.0, 0.0, 0.22, 0.65, "an american flag"),
                (0.25, 0.0, 0.52, 0.38, "the face of an astronaut"),
                (0.55, 0.0, 0.9, 0.55, "a model of a space shuttle"),
                (0.5, 0.6, 1.0, 1.0, "a helmet"),
            ),
        ),
        Photograph("skimage/brick.png", "a brick wall"),
        Photograph(
            "skimage/camera.png",
            "a lawn",
            (
                (0.1, 0.15, 0.48, 1.0, "a man in a dark coat"),
                (0.48, 0.15, 0.75, 1.0, "a camera on a tripod"),
                (0.0, 0.0, 1.0, 0.4, "the sky"),
                (0.48, 0.4, 1.0, 0.6, "buildings far away"),
            ),
        ),
        Photograph(
            "skimage/coffee.png",
            "a wooden table",
            (
                (0.4, 0.05, 0.7, 0.45, "a cup of coffee"),
                (0.6, 0.45, 0.8, 0.8, "a spoon"),
                (0.2, 0.25, 0.85, 0.85, "a red saucer"),
            ),
        ),
        Photograph("skimage/coins.png", "old coins"),
        Photograph("skimage/gravel.png", "gravel"),
        Photograph("skimage/hubble_deep_field.jpg", "galaxies in deep space"),
        Photograph(
            "skimage/ihc.png",
            "stained tissue under a microscope",
            ((0.2, 0.4, 0.45, 1.0, "blue cells under a microscope"),),
        ),
        Photograph(
            "skimage/motorcycle_left.png",
            "the floor of a garage",
            (
                (0.7, 0.35, 0.95, 0.9, "the wheel of a motorcycle"),
                (0.15, 0.5, 0.35, 0.9, "the wheel of a motorcycle"),
                (0.25, 0.3, 0.7, 0.85, "a red motorcycle"),
                (0.0, 0.0, 1.0, 0.45, "shelves in a garage"),
            ),
        ),
        Photograph("skimage/page.png", "a printed page"),
        Photograph(
            "skimage/retina.jpg",
            "the retina of an eye",
            ((0.0, 0.3, 0.4, 0.7, "blood vessels of a retina"),),
        ),
    ),
    "val": (
        Photograph("skimage/chelsea.png", "the fur of a cat", ((0.3, 0.2, 0.8, 0.8, "the face of a cat"),)),
        Photograph("skimage/moon.png", "the surface of the moon"),
        Photograph("skimage/text.png", "handwriting on paper"),
        Photograph(
            "skimage/rocket.jpg",
            "the evening sky",
            (
                (0.0, 0.15, 0.25, 0.95, "a steel tower"),
                (0.45, 0.3, 0.6, 0.95, "a rocket"),
                (0.0, 0.75, 1.0, 1.0, "a launch pad with lamps"),
            ),
        ),
    ),
    "test": (
        Photograph("matplotlib/grace_hopper.jpg", "a naval officer in uniform"),
        Photograph(
            "sklearn/china.jpg",
            "trees by a lake",
            ((0.15, 0.1, 0.6, 0.75, "a chinese temple"), (0.0, 0.0, 1.0, 0.35, "the sky")),
        ),
        Photograph("sklearn/flower.jpg", "leaves", ((0.3, 0.2, 0.7, 0.85, "an orange flower"),)),
        Photograph("skimage/grass.png", "grass"),
        Photograph("skimage/microaneurysms.png", "blood vessels"),
        Photograph("skimage/cell.png", "a cell under a microscope"),
    ),
}
