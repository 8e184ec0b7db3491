"""Pinned images: those whose decision an update may not change for the worse, tested at every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.data.images import ImageError
from dgsnet.data.items import Item, find_samples
from dgsnet.detection.decisions import SETTINGS, decide
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.files import one_line, write_file

if TYPE_CHECKING:
    from dgsnet.config import Config
    from dgsnet.model.dgsnet import DGSNet

PINS_FILE = "pins.json"
# Decisions from wrong to right, by label.
RANKS = (("generated", "unsure", "real"), ("real", "unsure", "generated"))
SHOWN = 3


class PinsLost(UserError):
    """An update has changed the decision on pinned images for the worse; its run is complete."""

    code = 3


def find_pins(pinned: str) -> list[Item]:
    """The labelled images of a list; UserError where one cannot be read, which could be lost unseen."""
    items = find_samples(pinned)
    for item in items:
        try:
            item.read()
        except ImageError as error:
            raise UserError(f"--pinned {pinned}: {error}") from None
    return items


@dataclass
class Pins:
    """Pinned images, and how the model that is updated decides on them.

    Every model decides at the threshold of the first one's calibration, as it scores.

    Args:
        items: labelled images.
        before: the model that is updated.
        out: the run's folder, in which PINS_FILE tells of every checkpoint.
    """

    items: Sequence[Item]
    before: Detector
    out: Path
    ranks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = self._ranks(self.before)

    def lost(self, model: DGSNet, config: Config) -> list[str]:
        """Paths of those on which a model decides worse than the first one did."""
        training = model.training
        how: dict[str, Any] = {name: getattr(self.before, name) for name in SETTINGS}
        try:
            found = self._ranks(Detector(model, config, self.before.calibration, **how))
        finally:
            model.train(training)
        return [item.path for item, was, now in zip(self.items, self.ranks, found) if now < was]

    def check(self, model: DGSNet, config: Config, step: int) -> list[str]:
        """`lost`, of the checkpoint of a step: told, and noted in PINS_FILE."""
        lost = self.lost(model, config)
        # What a killed run had come to beyond its last checkpoint is done again.
        checkpoints = [*self._before(step), {"step": step, "lost": lost}]
        wrong = [item.path for item, rank in zip(self.items, self.ranks) if rank < len(RANKS[0]) - 1]
        content = {
            "images": len(self.items),
            "threshold": self.before.threshold,
            "not_right_before": wrong,
            "lost": lost,
            "checkpoints": checkpoints,
        }
        write_file(self.out / PINS_FILE, (json.dumps(content, indent=2) + "\n").encode())
        if lost:
            print(f"step {step}: {_said(lost)} of {len(self.items)} pinned images")
        return lost

    def _before(self, step: int) -> list[dict[str, Any]]:
        """What PINS_FILE has of earlier steps."""
        path = self.out / PINS_FILE
        try:
            return [each for each in json.loads(path.read_bytes())["checkpoints"] if each["step"] < step]
        except FileNotFoundError:
            return []
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({one_line(error, 200)}): remove it") from None

    def _ranks(self, detector: Detector) -> list[int]:
        """0 for a wrong decision, 1 for unsure, 2 for a right one."""
        probabilities = detector.predict(self.items, workers=0)
        if np.isnan(probabilities).any():
            raise UserError(f"pinned: {next(iter(detector.errors.values()))}")
        calls = decide(probabilities, self.before.calibration, self.before.threshold)
        return [RANKS[item.label or 0].index(call) for item, call in zip(self.items, calls)]


def settle(pins: Pins, model: DGSNet, config: Config, *, allow_lost: bool) -> None:
    """Tell what the finished update has lost; PinsLost where that is something and not allowed."""
    lost, of_all = pins.lost(model, config), f"of {len(pins.items)} pinned images"
    if not lost:
        return print(f"none {of_all} is lost")
    if allow_lost:
        return print(f"the update {_said(lost)} {of_all}")
    raise PinsLost(
        f"the update {_said(lost)} {of_all}: {pins.out} is complete, and its {PINS_FILE} tells of every "
        "checkpoint; replay more like them, take fewer steps, or accept it with --allow-lost"
    )


def _said(lost: Sequence[str]) -> str:
    """Lost images in words."""
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return f"loses {', '.join(lost[:SHOWN])}{more}, {len(lost)}"
