"""Stages, the position of a run, and optimiser steps cut into even micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgsnet.config import Config, OptimConfig
from dgsnet.data.items import Item
from dgsnet.training.replay import Update

HEAD, BRANCHES = 1, 2


@dataclass(frozen=True)
class Job:
    """What is to be trained, and in which folder, which no other job writes to."""

    config: Config
    out: Path
    samples: list[Item]
    val: list[Item]
    update: Update | None = None


@dataclass
class Position:
    """Where a run stands; with the trained weights and the optimiser, all that decides how it goes on.

    Attributes:
        stage: HEAD or BRANCHES, BRANCHES + 1 when finished.
        epoch: of the stage.
        seen: images of the epoch.
        stage_step: optimiser steps of the stage.
        step: and of the run.
    """

    stage: int
    epoch: int = 0
    seen: int = 0
    stage_step: int = 0
    step: int = 0


def lr_factor(optim: OptimConfig, step: int, steps: int) -> float:
    """By what the learning rate is multiplied in a stage's step, of `steps`: warm-up and schedule."""
    rising = round(optim.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if optim.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - rising) / max(1, steps - rising)))
    return 1.0


def dropout_seed(seed: int, step: int, process: int) -> int:
    """What a process draws dropout from in an optimiser step: one number for each three."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


@dataclass
class MicroBatch:
    """Images of one process and one backward pass, and their weight in the mean over the optimiser step.

    `objective` names those whose gradient is kept apart, such as replayed ones; "" are the step's own.
    """

    indices: list[int]
    weight: float
    objective: str = ""


class StepPlan:
    """Cuts an order of images into optimiser steps, and those into even micro-batches; a batch sampler.

    Every process gets its share of every step, no image comes twice and none is left out. The weights make an
    optimiser step the mean over its images, however they are split; in the last, smaller step too.

    Args:
        images, batch_size: of an optimiser step, over all processes; of a micro-batch, at most.
        rank, world: number of this process, and of all processes.
    """

    def __init__(self, images: int, batch_size: int, rank: int, world: int) -> None:
        self.images, self.batch_size = images, batch_size
        self.rank, self.world = rank, world
        # Images over all processes, micro-batches of this one.
        self.steps: list[tuple[int, list[MicroBatch]]] = []

    def set(
        self,
        order: Sequence[int] | np.ndarray,
        limit: int | None = None,
        replayed: Callable[[int], dict[str, np.ndarray]] | None = None,
    ) -> None:
        """Plan at most `limit` steps over `order`; a process may get empty batches of the last one.

        Rows of `order`, if it has two axes, stay in one micro-batch; -1 in it stands for no image.
        `replayed(n)`: the images beside those of the n-th of these steps, in rows of the same kind, by
        objective; each objective has a mean of its own.
        """
        units = np.reshape(order, (len(order), -1))
        ends = np.cumsum((units >= 0).sum(1))
        self.steps = []
        start = seen = 0
        while start < len(units) and len(self.steps) != limit:
            end = max(start + 1, int(np.searchsorted(ends, seen + self.images, side="right")))
            micro = self._split(units[start:end])
            for objective, others in (replayed(len(self.steps)) if replayed else {}).items():
                micro += self._split(np.reshape(others, (len(others), -1)), objective)
            self.steps.append((int(ends[end - 1]) - seen, micro))
            start, seen = end, int(ends[end - 1])

    def _split(self, units: np.ndarray, objective: str = "") -> list[MicroBatch]:
        at_a_time = max(1, self.batch_size // units.shape[1]) * self.world
        parts = np.array_split(units, math.ceil(len(units) / at_a_time) * self.world)[self.rank :: self.world]
        images = [part[part >= 0].tolist() for part in parts]
        # Data parallelism averages over processes, hence the factor.
        share = self.world / (units >= 0).sum()
        return [MicroBatch(part, share * len(part), objective) for part in images]

    def __iter__(self) -> Iterator[list[int]]:
        return (micro.indices for _, batches in self.steps for micro in batches)

    def __len__(self) -> int:
        return sum(len(batches) for _, batches in self.steps)
