"""Stages, the position of a run, and optimiser steps cut into even micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgsnet.config import Config
from dgsnet.data.items import Item
from dgsnet.training.replay import Update

HEAD, BRANCHES = 1, 2  # the stages


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
    """Where a run stands; with the trained weights and the optimiser, all that decides how it goes on."""

    stage: int  # HEAD or BRANCHES, BRANCHES + 1 when finished
    epoch: int = 0  # of the stage
    seen: int = 0  # images of the epoch
    stage_step: int = 0  # optimiser steps of the stage
    step: int = 0  # and of the run


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
        order: list[int],
        limit: int | None = None,
        replayed: Callable[[int], dict[str, list[int]]] | None = None,
    ) -> None:
        """Plan at most `limit` steps over `order`; a process may get empty batches of the last one.

        `replayed(n)`: the images beside those of the n-th of these steps, by objective; each objective has a
        mean of its own.
        """
        self.steps = []
        for number, start in enumerate(range(0, len(order), self.images)[:limit]):
            images = order[start : start + self.images]
            micro = self._split(images)
            for objective, others in (replayed(number) if replayed else {}).items():
                micro += self._split(others, objective)
            self.steps.append((len(images), micro))

    def _split(self, images: Sequence[int], objective: str = "") -> list[MicroBatch]:
        micro_steps = math.ceil(len(images) / (self.batch_size * self.world))
        parts = np.array_split(np.asarray(images), micro_steps * self.world)[self.rank :: self.world]
        # Data parallelism averages over processes, hence the factor.
        return [MicroBatch(part.tolist(), self.world * len(part) / len(images), objective) for part in parts]

    def __iter__(self) -> Iterator[list[int]]:
        return (micro.indices for _, batches in self.steps for micro in batches)

    def __len__(self) -> int:
        return sum(len(batches) for _, batches in self.steps)
