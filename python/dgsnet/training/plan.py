"""Who sees what when: stages, the position of a run, and optimiser steps cut into even micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

HEAD, BRANCHES = 1, 2  # the stages


@dataclass
class Position:
    """Where a run stands; with the trained weights and the optimiser, all that decides how it goes on.

    Args:
        stage: HEAD or BRANCHES, BRANCHES + 1 when finished.
        epoch: epoch within the stage.
        seen: images of this epoch already used.
        stage_step: optimiser steps done in this stage.
        step: optimiser steps done in the run.
    """

    stage: int
    epoch: int = 0
    seen: int = 0
    stage_step: int = 0
    step: int = 0


def dropout_seed(seed: int, step: int, process: int) -> int:
    """What a process draws dropout from in an optimiser step: one number for each three."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


@dataclass
class MicroBatch:
    """Images of one process and one backward pass, and their weight in the mean over the optimiser step."""

    indices: list[int]
    weight: float


class StepPlan:
    """Cuts an order of images into optimiser steps, and those into even micro-batches; a batch sampler.

    Every process gets its share of every step, no image comes twice and none is left out. The weights make an
    optimiser step the mean over its images, however they are split; in the last, smaller step too.

    Args:
        images: images of an optimiser step, over all processes.
        batch_size: images of a micro-batch, at most.
        rank, world: number of this process, and of all processes.
    """

    def __init__(self, images: int, batch_size: int, rank: int, world: int) -> None:
        self.images, self.batch_size = images, batch_size
        self.rank, self.world = rank, world
        self.steps: list[
            tuple[int, list[MicroBatch]]
        ] = []  # images over all processes, micro-batches of this one

    def set(self, order: list[int], limit: int | None = None) -> None:
        """Plan at most `limit` steps over `order`; a process may get empty batches of the last one."""
        self.steps = []
        for start in range(0, len(order), self.images)[:limit]:
            images = np.asarray(order[start : start + self.images])
            micro_steps = math.ceil(len(images) / (self.batch_size * self.world))
            parts = np.array_split(images, micro_steps * self.world)[self.rank :: self.world]
            # Data parallelism averages over processes, hence the factor.
            micro = [MicroBatch(part.tolist(), self.world * len(part) / len(images)) for part in parts]
            self.steps.append((len(images), micro))

    def __iter__(self) -> Iterator[list[int]]:
        return (micro.indices for _, batches in self.steps for micro in batches)

    def __len__(self) -> int:
        return sum(len(batches) for _, batches in self.steps)
