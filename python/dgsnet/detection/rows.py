"""A score as a row of a table, and the images that have none yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dgsnet.data.declared import Declared
from dgsnet.data.items import Item, find_items
from dgsnet.data.tables import read_rows
from dgsnet.detection.decisions import DECIMALS
from dgsnet.detection.detector import Detector
from dgsnet.detection.provenance import Provenance


class Row(NamedTuple):
    """An image's row.

    Attributes:
        path: the item's name.
        probability: that it was generated, to six decimals; None if it could not be read.
        decision: "generated", "real" or "unsure"; "" if it could not be read.
        error: why it could not be read.
        spread: from the lowest to the highest probability of it and its copies, if any.
    """

    path: str
    probability: float | None
    decision: str
    error: str
    spread: float | None = None
    # `Provenance` of its file, "" where not asked for.
    provenance: str = ""
    issuer: str = ""
    source_type: str = ""
    provenance_note: str = ""
    # `Declared` of its file, "" where not asked for.
    declared: str = ""
    declared_by: str = ""

    @property
    def score(self) -> float | None:
        """The same number, of a table of scores that are no probabilities."""
        return self.probability

    @classmethod
    def of(cls, detector: Detector, item: Item, answer: float | Sequence[float], error: str) -> Row:
        """The row of one of the detector's answers: a probability, or those of the image and its copies."""
        if error:
            return cls(item.path, None, "", error)
        # Rounded before the decision, so that the row agrees with itself.
        rounded = [round(p, DECIMALS) for p in ([answer] if isinstance(answer, float) else answer)]
        spread = round(max(rounded) - min(rounded), DECIMALS) if len(rounded) > 1 else None
        return cls(item.path, rounded[0], detector.decide([rounded])[0], "", spread)


def columns(
    *, consistency: bool = False, provenance: bool = False, declared: bool = False
) -> tuple[str, ...]:
    """The columns of a table, which are fields of `Row`."""
    return (
        *("path", "probability", "decision", "error"),
        *(("spread",) if consistency else ()),
        *(Provenance._fields if provenance else ()),
        *(Declared._fields if declared else ()),
    )


def kept(declared: bool) -> tuple[str, ...]:
    """The columns of an unfinished table: all, without those that older tables lack unless asked for."""
    return tuple(name for name in Row._fields if declared or name not in Declared._fields)


@dataclass(frozen=True)
class Todo:
    """The images that have no row yet; can be gone through in another process.

    Attributes:
        paths: as find_items takes them.
        table: a partial table.
        end: its length in bytes when it was opened: later rows are of images gone through already.
        columns: of the table.
    """

    paths: list[str]
    table: Path
    end: int
    columns: Sequence[str] = Row._fields

    def __iter__(self) -> Iterator[Item]:
        rows = read_rows(self.table, self.columns, self.end)
        # Rows and items usually come in the same order, and then no more than one row is ever held.
        unmatched: Counter[str] = Counter()
        for item in find_items(self.paths):
            while not unmatched[item.path] and (row := next(rows, None)):
                unmatched[row["path"]] += 1
            unmatched[item.path] -= 1
            if unmatched[item.path] < 0:
                yield item
            if unmatched[item.path] <= 0:
                del unmatched[item.path]
