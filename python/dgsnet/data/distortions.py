"""What happens to pictures on their way: compression, blur, resizing, noise, colour, and chains of them.

Each is applied to the decoded image, before preprocessing: a `Distortion` as it stands, to measure what it
does to scores; `Degradations` draw one for every training image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, features

from dgsnet.data.images import MAX_PIXELS, ImageError

# Lossy file formats: what Pillow is told. Chroma is halved in both directions, as by most programs and sites,
# or kept.
CODECS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "subsampling": "4:2:0"},
    "jpeg444": {"format": "JPEG", "subsampling": "4:4:4"},
    "webp": {"format": "WEBP"},
    "avif": {"format": "AVIF", "speed": 9},
}


def encoded(image: np.ndarray, codec: str, quality: float) -> bytes:
    """A file of one of CODECS: quality 1..100.

    Raises:
        ImageError: sides beyond what the format can hold, or a Pillow without it.
    """
    buffer = io.BytesIO()
    try:
        Image.fromarray(image).save(buffer, quality=int(quality), **CODECS[codec])
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"cannot be written as {CODECS[codec]['format']}: {error}") from None
    return buffer.getvalue()


def reencode(image: np.ndarray, quality: float, *, codec: str) -> np.ndarray:
    """A lossy file format and back by Pillow."""
    with Image.open(io.BytesIO(encoded(image, codec, quality)), formats=[CODECS[codec]["format"]]) as decoded:
        return np.array(decoded.convert("RGB"))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of each channel with this standard deviation in pixels."""
    return np.rint(_smooth(image, sigma)).astype(np.uint8)


def sharpen(image: np.ndarray, amount: float) -> np.ndarray:
    """Unsharp mask: so many times the difference to the image blurred by three pixels is added."""
    smooth = _smooth(image, 3)
    return _levels(image + np.float32(amount) * (image - smooth))


def resize(image: np.ndarray, factor: float, *, kernel: Image.Resampling) -> np.ndarray:
    """Both sides times this factor, antialiased; the image stays at its new size."""
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if height * width > MAX_PIXELS:
        raise ImageError(f"resize:{factor:g} makes it {width} x {height}, more than {MAX_PIXELS:,} pixels")
    return np.array(Image.fromarray(image).resize((width, height), kernel))


def shrink(image: np.ndarray, pixels: float, *, side: Callable[..., int]) -> np.ndarray:
    """The longer or shorter side to this many pixels, bicubic; an image that has no more stays as it is."""
    factor = min(1, pixels / side(image.shape[:2]))
    return image if factor == 1 else resize(image, factor, kernel=Image.Resampling.BICUBIC)


def crop(image: np.ndarray, share: float, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """A part with this share of either side: at a place that is drawn, or the centre."""
    return image[_box(image, share, rng)]


def cutout(image: np.ndarray, share: float, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Grey where `crop` would be."""
    image = image.copy()
    image[_box(image, share, rng)] = 128
    return image


def noise(image: np.ndarray, sigma: float, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Gaussian noise with this standard deviation in grey levels; without `rng` the image decides it."""
    from dgsnet.data.preprocess import content_seed

    rng = rng or np.random.default_rng(content_seed(image))
    return _levels(image + np.float32(sigma) * rng.standard_normal(image.shape, np.float32))


def enhance(image: np.ndarray, factor: float, *, kind: Callable[[Image.Image], Any]) -> np.ndarray:
    """Pillow's ImageEnhance: 1 changes nothing, 0 is black, flat grey or without colour."""
    return np.array(kind(Image.fromarray(image)).enhance(factor))


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Colours turned by this part of the circle."""
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


@dataclass(frozen=True)
class Operation:
    """What a name stands for, and which values it takes; `chance`: it has an `rng` beside them."""

    apply: Callable[..., np.ndarray]
    lowest: float
    highest: float
    whole: bool = False
    chance: bool = False


OPERATIONS = {
    **{name: Operation(partial(reencode, codec=name), 1, 100, whole=True) for name in CODECS},
    "blur": Operation(blur, 0.1, 50),
    "sharpen": Operation(sharpen, 0, 10),
    "resize": Operation(partial(resize, kernel=Image.Resampling.BICUBIC), 0.01, 8),
    "bilinear": Operation(partial(resize, kernel=Image.Resampling.BILINEAR), 0.01, 8),
    "lanczos": Operation(partial(resize, kernel=Image.Resampling.LANCZOS), 0.01, 8),
    "nearest": Operation(partial(resize, kernel=Image.Resampling.NEAREST), 0.01, 8),
    "shorter": Operation(partial(shrink, side=min), 1, 2**16, whole=True),
    "longer": Operation(partial(shrink, side=max), 1, 2**16, whole=True),
    "crop": Operation(crop, 0.01, 1, chance=True),
    "cutout": Operation(cutout, 0.01, 1, chance=True),
    "noise": Operation(noise, 0, 255, chance=True),
    "brightness": Operation(partial(enhance, kind=ImageEnhance.Brightness), 0, 10),
    "contrast": Operation(partial(enhance, kind=ImageEnhance.Contrast), 0, 10),
    "saturation": Operation(partial(enhance, kind=ImageEnhance.Color), 0, 10),
    "hue": Operation(hue, -0.5, 0.5),
}


@dataclass(frozen=True)
class Distortion:
    """A chain of operations.

    Attributes:
        steps: (name in OPERATIONS, value), in the order they are applied.

    >>> distortion = Distortion((("jpeg", 90), ("resize", 0.5)))
    >>> distortion.name, distortion(np.zeros((40, 60, 3), np.uint8)).shape
    ('jpeg:90+resize:0.5', (20, 30, 3))
    """

    steps: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        return "+".join(f"{operation}:{value:g}" for operation, value in self.steps)

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Apply to uint8 [H, W, 3]; ImageError where the result cannot be made.

        rng: draws noise and the places of `crop` and `cutout`; None: nothing is left to chance.
        """
        for name, value in self.steps:
            operation = OPERATIONS[name]
            image = operation.apply(image, value, **({"rng": rng} if operation.chance else {}))
        return np.ascontiguousarray(image)


# What an image is likely to go through on its way, and what should not turn a decision on it.
COPIES = tuple(
    Distortion((step,)) for step in (("jpeg", 90), ("jpeg", 75), ("resize", 0.75), ("resize", 1.25))
)

# What detectors are trained on, in the words of `Degradations.parse`, in the order of their published code.
PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    # CNNDetection and UniversalFakeDetect, data/datasets.py: blur_jpg_prob0.5.
    "wang": ("blur:0.1..3@0.5", "jpeg:30..100@0.5"),
    # What a picture goes through on the web: Sieve's training of Community Forensics, train.py. Made a
    # thumbnail or rescaled, then written once or twice.
    "web": (
        "shorter:180..320@0.35 | resize:0.4..1.3@0.115 | bilinear:0.4..1.3@0.115 | lanczos:0.4..1.3@0.115"
        " | nearest:0.4..1.3@0.11",
        "jpeg:30..95@0.6375 | webp:30..95@0.2125",
        "jpeg:30..95@0.225 | webp:30..95@0.075",
    ),
    # Dual Data Alignment, custom_transforms.py, without pepper noise, median, motion blur and vertical flips.
    # OpenCV's kernels of 3 and 5 pixels have these standard deviations.
    "dda": (
        "jpeg:55..100@0.15",
        "noise:55@0.1",
        "blur:0.8@0.05 | blur:1.1@0.05",
        "sharpen:1..3@0.1",
        "brightness:0.6..1.4+contrast:0.6..1.4+saturation:0.6..1.4+hue:-0.175..0.175@0.2",
        "saturation:0@0.1",
    ),
    # OpenFake, experiments/augmentations: without rotation and the crop's aspect ratio.
    "openfake": (
        "crop:0.71..1",
        "brightness:0.7..1.3+contrast:0.5..1.5+saturation:0.5..1.5@0.8",
        "blur:0.1..0.5@0.5",
        "jpeg:55..95@0.315 | jpeg:55..95+jpeg:50..85@0.135 | webp:65..90@0.2 | avif:40..80@0.1"
        " | longer:720..1080+jpeg:65..85@0.1",
    ),
    # AlignedForensics, training_code/utils/processing.py; its crops' shares of the area are squares of these.
    "aligned": (
        "crop:0.29..1@0.2",
        "brightness:0.6..1.4+contrast:0.6..1.4+saturation:0.6..1.4+hue:-0.1..0.1@0.8",
        "saturation:0@0.2",
        "cutout:0.2@0.2",
        "noise:3.2..7.1@0.2",
        "blur:0.1..3@0.5",
        "jpeg:30..100@0.5",
    ),
}


@dataclass(frozen=True)
class Choice:
    """Operations and the ranges of their values, (name, lowest, highest), and how often they are chosen."""

    steps: tuple[tuple[str, float, float], ...]
    probability: float


@dataclass(frozen=True)
class Degradations:
    """Chains of operations drawn at random, for training.

    Attributes:
        steps: one after the other; of each at most one choice is taken, with its probability.

    >>> degradations = Degradations.parse(["blur:0.1..3@0.5", "jpeg:30..95@0.7 | webp:80@0.3"])
    >>> degradations.draw(np.random.default_rng(1)).name
    'webp:80'
    """

    steps: tuple[tuple[Choice, ...], ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Degradations:
        """Each word a step: `OPERATION:LOWEST..HIGHEST@PROBABILITY`, or one value; chained by + and chosen
        between by |. Without a probability it is 1.

        Raises:
            ValueError: what is wrong with a word, in one line.
        """
        return cls(tuple(_parse_choices(word) for word in words))

    def draw(self, rng: np.random.Generator) -> Distortion:
        """What an image goes through; values are drawn evenly from their ranges."""
        drawn: list[tuple[str, float]] = []
        for choices in self.steps:
            left = rng.random()
            for choice in choices:
                left -= choice.probability
                if left < 0:
                    drawn += [(name, _between(name, low, high, rng)) for name, low, high in choice.steps]
                    break
        return Distortion(tuple(drawn))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw and apply to uint8 [H, W, 3]; a step that would make it too large is left out."""
        for step in self.draw(rng).steps:
            with contextlib.suppress(ImageError):
                image = Distortion((step,))(image, rng)
        return image


def parse_step(step: str) -> tuple[str, str]:
    """Name and values of `OPERATION:VALUES`; ValueError if it is unknown or has none."""
    name, _, values = step.partition(":")
    if name not in OPERATIONS or not values:
        known = ", ".join(f"{known}:VALUE" for known in OPERATIONS)
        raise ValueError(f"{step!r} is no operation with its values; use {known}")
    if name == "avif" and not features.check("avif"):
        raise ValueError(f"{step!r}: this Pillow cannot write AVIF")
    return name, values


def parse_value(name: str, text: str) -> float:
    """A value of an operation; ValueError if it is out of its range."""
    operation = OPERATIONS[name]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not operation.lowest <= value <= operation.highest or (operation.whole and value != int(value)):
        kind = "a whole number" if operation.whole else "a number"
        raise ValueError(f"must be {kind} from {operation.lowest:g} to {operation.highest:g}")
    return value


def _parse_choices(word: str) -> tuple[Choice, ...]:
    choices = tuple(_parse_choice(part.strip(), word) for part in word.split("|"))
    if sum(choice.probability for choice in choices) > 1 + 1e-9:
        raise ValueError(f"{word!r}: the probabilities of its choices are more than 1 in all")
    return choices


def _parse_choice(part: str, word: str) -> Choice:
    chain, at, probability = part.partition("@")
    steps = []
    for step in chain.split("+"):
        name, values = parse_step(step)
        low, dots, high = values.partition("..")
        try:
            steps.append((name, parse_value(name, low), parse_value(name, high if dots else low)))
        except ValueError as error:
            raise ValueError(f"{values!r} in {step!r} {error}") from None
        if steps[-1][1] > steps[-1][2]:
            raise ValueError(f"{values!r} in {step!r}: the lowest comes first")
    try:
        share = float(probability) if at else 1.0
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise ValueError(f"{probability!r} in {part!r} must be a probability from 0 to 1")
    return Choice(tuple(steps), share)


def _between(name: str, low: float, high: float, rng: np.random.Generator) -> float:
    return int(rng.integers(int(low), int(high) + 1)) if OPERATIONS[name].whole else rng.uniform(low, high)


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))


def _levels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _box(image: np.ndarray, share: float, rng: np.random.Generator | None) -> tuple[slice, ...]:
    """Rows and columns of a part with this share of either side."""
    box = []
    for side in image.shape[:2]:
        length = max(1, round(side * share))
        start = (side - length) // 2 if rng is None else int(rng.integers(side - length + 1))
        box.append(slice(start, start + length))
    return tuple(box)
