"""A score as a row of a table, and the images that have none yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dgsnet.data.sources import Item, find_items
from dgsnet.data.tables import read_rows
from dgsnet.detection.detector import Detector


class Score(NamedTuple):
    """An image's row.

    Attributes:
        path: the item's name.
        probability: that it was generated, rounded to six decimals; None if it could not be read.
        decision: "generated", "real" or "unsure"; "" if it could not be read.
        error: why it could not be read, else "".
    """

    path: str
    probability: float | None
    decision: str
    error: str

    @classmethod
    def of(cls, detector: Detector, item: Item, probability: float, error: str) -> Score:
        """The row of one of the detector's answers."""
        if error:
            return cls(item.name, None, "", error)
        # Rounded before the decision, so that the row agrees with itself.
        probability = round(probability, 6)
        return cls(item.name, probability, detector.decide([probability])[0], "")


@dataclass(frozen=True)
class Todo:
    """The images that have no row yet; can be gone through in another process.

    Attributes:
        paths: as find_items takes them.
        table: a partial table.
        end: its length in bytes when it was opened: later rows are of images gone through already.
    """

    paths: list[str]
    table: Path
    end: int

    def __iter__(self) -> Iterator[Item]:
        rows = read_rows(self.table, Score._fields, self.end)
        # Rows and items usually come in the same order, and then no more than one row is ever held.
        unmatched: Counter[str] = Counter()
        for item in find_items(self.paths):
            while not unmatched[item.name] and (row := next(rows, None)):
                unmatched[row["path"]] += 1
            unmatched[item.name] -= 1
            if unmatched[item.name] < 0:
                yield item
            if unmatched[item.name] <= 0:
                del unmatched[item.name]
