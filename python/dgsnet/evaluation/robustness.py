"""`dgsnet evaluate --robustness`: the distortions that its words stand for, and how they are applied."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.data.distortions import CODECS, Distortion, parse_step, parse_value
from dgsnet.errors import UserError

if TYPE_CHECKING:
    from dgsnet.data.preprocess import Preprocessor

# The sweep of `--robustness default`.
DEFAULT = (
    "jpeg:90,70,50",
    "webp:80",
    "blur:1,2",
    "resize:0.75,0.5",
    "crop:0.8",
    "jpeg:90+resize:0.5+jpeg:70",
)


class Distorted:
    """A preprocessor that distorts the image first; takes what the preprocessor takes."""

    def __init__(self, distortion: Distortion, preprocess: Preprocessor):
        self.distortion, self.preprocess = distortion, preprocess

    def __call__(self, image: np.ndarray, **options: Any) -> Any:
        return self.preprocess(self.distortion(image), **options)

    def crops(self, image: np.ndarray, **options: Any) -> Any:
        return self.preprocess.crops(self.distortion(image), **options)


def parse_codec(word: str) -> tuple[str, float]:
    """Codec and quality of a word such as `jpeg:96`; UserError if it is none."""
    steps = [step for distortion in parse([word], "--reencode") for step in distortion.steps]
    if len(steps) != 1 or steps[0][0] not in CODECS:
        known = ", ".join(f"{name}:QUALITY" for name in CODECS)
        raise UserError(f"--reencode {word}: is no file format with a quality; use {known}")
    return steps[0]


def parse(words: Sequence[str], option: str = "--robustness") -> list[Distortion]:
    """The distortions that words such as `jpeg:90,50` and `jpeg:90+resize:0.5` stand for, each once.

    The word `default` stands for those of DEFAULT.

    Raises:
        UserError: an unknown operation, or a value that is missing or out of range.

    >>> [distortion.name for distortion in parse(["jpeg:90,50", "blur:1+jpeg:70"])]
    ['jpeg:90', 'jpeg:50', 'blur:1+jpeg:70']
    """
    distortions: dict[Distortion, None] = {}
    for word in itertools.chain.from_iterable(DEFAULT if word == "default" else [word] for word in words):
        # Every combination, where several steps of a chain have several values.
        for steps in itertools.product(*(_parse_step(step, f"{option} {word}") for step in word.split("+"))):
            distortions[Distortion(steps)] = None
    return list(distortions)


def _parse_step(step: str, words: str) -> list[tuple[str, float]]:
    try:
        name, values = parse_step(step)
    except ValueError as error:
        raise UserError(f"{words}: {error}, commas between values, + between steps") from None
    return [(name, _parse_value(name, value, step, words)) for value in values.split(",")]


def _parse_value(name: str, text: str, step: str, words: str) -> float:
    try:
        return parse_value(name, text)
    except ValueError as error:
        raise UserError(f"{words}: {text!r} in {step!r} {error}") from None
