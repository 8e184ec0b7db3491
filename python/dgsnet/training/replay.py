"""Old images beside new ones: which of them a step replays, and what their gradients do to its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgs_kernels import MAX_OBJECTIVES, ObjectiveSurgery
from dgsnet.data.items import Item

# Rule to what `ObjectiveSurgery` combines the gradients by; "none" replays nothing.
WEIGHTINGS = {"gem": "gem", "conflict": "pcgrad", "replay": "mean"}
REPLAYED = "replayed"


@dataclass(frozen=True)
class Update:
    """What makes a run an update of a detector."""

    start: dict[str, Tensor]  # the detector's `trained_state`
    trained_on: np.ndarray  # hashes of the files that it was trained on, int64 [N]
    samples: list[Item]  # old images
    rule: str  # of WEIGHTINGS, or "none"
    ratio: float  # replayed images for each new one of a step
    seed: int  # decides which old images a step replays
    record: dict[str, str]  # what is stored of it with the model

    @property
    def replayed(self) -> list[Item]:
        """The old images as far as steps use them."""
        return [] if self.rule == "none" else self.samples

    @cached_property
    def _cells(self) -> list[tuple[str, np.ndarray]]:
        """Objective, and places in `samples`, of every generator and class."""
        cells: dict[tuple[str, int], list[int]] = {}
        for place, sample in enumerate(self.samples):
            cells.setdefault((sample.generator, int(sample.label == 1)), []).append(place)
        generators = sorted({generator for generator, _ in cells})
        return [
            (self._objective(generators.index(generator), generators), np.array(cells[generator, label]))
            for generator, label in sorted(cells)
        ]

    def _objective(self, number: int, generators: list[str]) -> str:
        """GEM has a constraint for each old generator, as far as there may be so many."""
        if self.rule != "gem":
            return REPLAYED
        places = MAX_OBJECTIVES - 1
        return f"{REPLAYED}/{', '.join(generators[number % places :: places])}"

    def draw(self, step: int, images: int) -> dict[str, list[int]]:
        """Places in `samples` that stand beside `images` new ones in a step, by objective.

        A function of (seed, step), the same under every rule that replays. Generators and classes come as
        often as each other.
        """
        rng = np.random.default_rng((self.seed, step, 1))
        turns = np.resize(rng.permutation(len(self._cells)), max(1, round(self.ratio * images)))
        drawn: dict[str, list[int]] = {}
        for turn in turns:
            objective, places = self._cells[turn]
            drawn.setdefault(objective, []).append(int(rng.choice(places)))
        return drawn

    def surgery(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> ObjectiveSurgery | None:
        """The rule before every step of an optimiser; None where nothing is replayed."""
        if self.rule == "none":
            return None
        return ObjectiveSurgery(optimizer, WEIGHTINGS[self.rule], granularity="model", scaler=scaler)
