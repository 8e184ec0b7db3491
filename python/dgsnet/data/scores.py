"""Tables of scores that other programs made: CSV with an image and its score in every row."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from dgsnet.data.cells import unguarded
from dgsnet.data.items import LABELS, category_of
from dgsnet.data.lists import open_csv
from dgsnet.errors import UserError

COLUMNS = ("path", "score")


class Scored(NamedTuple):
    """A row.

    Attributes:
        path: as the table has it.
        score: finite; higher is generated.
        label: 0 real, 1 generated; None: not known.
        generator, source, category: "" where the table does not say.
    """

    line: int
    path: str
    score: float
    label: int | None
    generator: str
    source: str
    category: str


def read_scores(table: str) -> Iterator[Scored]:
    """The rows of a table, one at a time; of those before, hashes of the paths are held.

    Args:
        table: CSV with columns path and score, and label, generator, source and category where they are
            known. Numbers are taken as they are.

    Raises:
        UserError: it cannot be read, or a row is not as it must be; with the line.
    """
    known: set[int] = set()
    with open_csv(table, strict_text=False, strict_cells=True) as reader:
        names = list(reader.fieldnames or ())
        if lacking := [name for name in COLUMNS if name not in names]:
            raise UserError(f"{table}: its first line names no column {' and no '.join(lacking)}")
        if len({*names}) < len(names):
            raise UserError(f"{table}: its first line names a column twice")
        for row in reader:
            found = _scored(f"{table}, line {reader.line_num}", reader.line_num, row)
            if (place := hash(found.path)) in known:
                raise UserError(f"{table}, line {found.line}: {found.path} comes twice")
            known.add(place)
            yield found


def place_of(table: str, path: str) -> str:
    """Where the file of a row is: as its path says from here, or else from the table's folder."""
    return path if os.path.exists(path) else os.path.join(os.path.dirname(table), path)


def _scored(where: str, line: int, row: dict[str, str]) -> Scored:
    if None in row or None in row.values():
        raise UserError(f"{where}: not as many cells as the first line names columns")
    row = {name: unguarded(value) for name, value in row.items()}
    if not row["path"]:
        raise UserError(f"{where}: path is missing")
    try:
        score = float(row["score"])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: score {row['score'][:80]!r} is no finite number")
    label = row.get("label", "").strip().lower()
    if label and label not in LABELS:
        raise UserError(
            f"{where}: label {label[:80]!r} is unknown; use 0 or real, 1, fake or generated, or none"
        )
    generator, source = (row.get(name, "").strip() for name in ("generator", "source"))
    known = LABELS.get(label)
    return Scored(line, row["path"], score, known, generator, source, category_of(row, where))
