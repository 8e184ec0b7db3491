"""Old images beside new ones: which of them a step replays, and what their gradients do to its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgs_kernels import MAX_OBJECTIVES, ObjectiveSurgery
from dgsnet.data.items import Item
from dgsnet.training.pins import Pins

# Rule to what `ObjectiveSurgery` combines the gradients by; "none" replays nothing.
WEIGHTINGS = {"gem": "gem", "conflict": "pcgrad", "replay": "mean"}
REPLAYED = "replayed"


@dataclass(frozen=True)
class Update:
    """What makes a run an update of a detector.

    Attributes:
        start: the detector's `trained_state`.
        trained_on: hashes of the files that it was trained on, int64 [N].
        samples: old images.
        rule: of WEIGHTINGS, or "none".
        ratio: replayed images for each new one of a step.
        seed: decides which old images a step replays.
        record: what is stored of it with the model.
        pins: images that are looked at at every checkpoint.
        pairs: of old twins, places [P, 2] in `samples`; None: they stay alone.
        margin: of the rule "gem".
    """

    start: dict[str, Tensor]
    trained_on: np.ndarray
    samples: list[Item]
    rule: str
    ratio: float
    seed: int
    record: dict[str, str]
    pins: Pins | None = None
    pairs: np.ndarray | None = None
    margin: float = 0.0

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

    @cached_property
    def _twins(self) -> dict[int, list[tuple[int, int]]]:
        """The pairs that each place is in."""
        found: dict[int, list[tuple[int, int]]] = {}
        for real, generated in self.pairs if self.pairs is not None else ():
            for place in (real, generated):
                found.setdefault(int(place), []).append((int(real), int(generated)))
        return found

    def draw(self, step: int, images: int) -> dict[str, np.ndarray]:
        """Places in `samples` that stand beside `images` new ones in a step, by objective.

        A function of (seed, step), the same under every rule that replays. Generators and classes come as
        often as each other. An image brings its twin with it, and with several one of them.

        Returns:
            int64 [n, 1]; with pairs [n, 2], of which a row stays together, -1 beside one without a twin.
        """
        rng = np.random.default_rng((self.seed, step, 1))
        wanted = max(1, round(self.ratio * images))
        turns = np.resize(rng.permutation(len(self._cells)), wanted)
        drawn: dict[str, list[tuple[int, ...]]] = {}
        for turn in turns:
            objective, places = self._cells[turn]
            place = int(rng.choice(places))
            pairs = self._twins.get(place)
            alone = (place,) if self.pairs is None else (place, -1)
            drawn.setdefault(objective, []).append(pairs[rng.integers(len(pairs))] if pairs else alone)
            wanted -= 2 if pairs else 1
            if wanted <= 0:
                break
        return {objective: np.array(units) for objective, units in drawn.items()}

    def surgery(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> ObjectiveSurgery | None:
        """The rule before every step of an optimiser; None where nothing is replayed."""
        if self.rule == "none":
            return None
        weighting = WEIGHTINGS[self.rule]
        return ObjectiveSurgery(optimizer, weighting, granularity="model", margin=self.margin, scaler=scaler)
