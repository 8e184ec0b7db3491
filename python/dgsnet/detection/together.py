"""Scores of images that come one by one, in batches: who comes while the model works is in its next batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from dgsnet.detection.detector import Detector

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class _Asked:
    """An image that waits: as `Prepared` makes it, and its logits when it has been scored."""

    versions: list[Tensor]
    logits: list[float] | None = None

    @property
    def rows(self) -> int:
        return sum(map(len, self.versions))


class Together:
    """Scores what tasks of an event loop ask for at the same time in the same batches of a detector.

    Whose turn it is has the model score its own image, and those of others for which there is room in the
    same batches. So nobody waits for company, and a lone image goes through at once.

    Args:
        detector: the model, which works in a thread.
    """

    def __init__(self, detector: Detector):
        self.detector = detector
        self.size = detector.batches.size
        # Whoever has waited for longest gets it.
        self._model = anyio.Lock()
        self._waiting: list[_Asked] = []

    async def __call__(self, versions: list[Tensor]) -> list[float]:
        """Mean logits [1 + copies] of what `Prepared` makes of an image."""
        asked = _Asked(versions)
        self._waiting.append(asked)
        try:
            async with self._model:
                if asked.logits is None:
                    await self._score(asked)
        finally:
            self._waiting.remove(asked)
        assert asked.logits is not None
        return asked.logits

    async def _score(self, asked: _Asked) -> None:
        together, room = [asked], -asked.rows % self.size
        for other in self._waiting:
            if other is not asked and other.logits is None and other.rows <= room:
                together.append(other)
                room -= other.rows
        try:
            await self._take(together)
        except Exception:
            if len(together) == 1:
                raise
            # The fault may be another's.
            await self._take([asked])

    async def _take(self, together: list[_Asked]) -> None:
        def work() -> None:
            found = iter(self.detector.mean_logits([rows for asked in together for rows in asked.versions]))
            for asked in together:
                asked.logits = [*itertools.islice(found, len(asked.versions))]

        await anyio.to_thread.run_sync(work)
