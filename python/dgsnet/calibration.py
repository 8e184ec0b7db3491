"""Decisions with a stated error rate: a threshold for a wanted false-positive rate, a temperature, and a band
between "real" and "generated" in which the detector says "unsure". docs/decisions.md has the rules.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

# Without a calibration: the published rule, and no abstaining.
THRESHOLD = 0.5
# Scores are written, calibrated and compared at this many decimals, so that a written row agrees with itself.
DECIMALS = 6
# Probability with which the stated rates hold, over the choice of calibration images.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Calibration:
    """How a model's scores become decisions; `calibration.json` of a model folder.

    All probabilities are calibrated ones, sigmoid(logit / temperature), rounded to DECIMALS.

    Attributes:
        threshold: above it an image is called generated.
        low: at or below it an image is called real; between the two it is unsure. low <= threshold.
        temperature: what logits are divided by; 1 where no generated images were given.
        fpr: the rate asked for: how many of all real images may be called generated.
        fpr_upper: upper confidence bound of that rate at `threshold`; at most `fpr`.
        fpr_observed: share of the calibration's real images above `threshold`.
        miss_rate: how many of all generated images may be called real; None where none were given.
        miss_upper: upper confidence bound of that rate at `low`; None where none were given.
        unsure_reals: share of the calibration's real images in the band.
        unsure_generated: the same of its generated images; None where none were given.
        tpr_observed: share of its generated images above `threshold`; None where none were given.
        confidence: of the bounds.
        n_reals: real images it rests on.
        n_generated: generated images it rests on.
        views: mosaics averaged per image; the calibration holds for scores made with as many.
    """

    threshold: float
    low: float
    temperature: float
    fpr: float
    fpr_upper: float
    fpr_observed: float
    miss_rate: float | None
    miss_upper: float | None
    unsure_reals: float
    unsure_generated: float | None
    tpr_observed: float | None
    confidence: float
    n_reals: int
    n_generated: int
    views: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.threshold <= 1:
            raise ValueError(
                f"low={self.low} and threshold={self.threshold} must be 0 <= low <= threshold <= 1"
            )
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1")

    @property
    def high(self) -> float:
        """Upper end of the band: the threshold."""
        return self.threshold

    def to_json(self) -> str:
        """The text of calibration.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of to_json; ValueError says what is wrong."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        names = {f.name for f in fields(cls)}
        if wrong := sorted(values.keys() ^ names):
            raise ValueError(f"{'unknown' if wrong[0] not in names else 'missing'} field {wrong[0]}")
        for name, value in values.items():
            if not (value is None and "None" in cls.__annotations__[name]) and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise ValueError(f"{name}={value!r} is no number")
        return cls(**values)


def decide(probabilities: Any, calibration: Calibration | None = None) -> list[str]:
    """Names "generated", "real" or "unsure" for each probability; "" for NaN.

    Args:
        probabilities: [N] floats, or one; rounded to DECIMALS before they are compared.
        calibration: the rule; None is "generated" above 0.5, else "real".

    >>> decide([0.2, 0.7, float("nan")])
    ['real', 'generated', '']
    """
    low, high = (calibration.low, calibration.high) if calibration else (THRESHOLD, THRESHOLD)
    rounded = np.round(np.atleast_1d(np.asarray(probabilities, dtype=np.float64)), DECIMALS)
    return [
        "" if math.isnan(p) else "generated" if p > high else "real" if p <= low else "unsure"
        for p in rounded
    ]
