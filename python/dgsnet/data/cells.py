"""Texts of strangers in cells of CSV: one that a spreadsheet would compute begins with an apostrophe."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from typing import IO, Any

# An apostrophe in front of such a text is part of it, so that what was written can be read back.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def guarded(value: Any) -> Any:
    """A cell's value, with an apostrophe before a text that spreadsheets take for a formula.

    >>> guarded("=1+1"), guarded("a=1"), guarded(-0.5), guarded("'=1")
    ("'=1+1", 'a=1', -0.5, "''=1")
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unguarded(value: Any) -> Any:
    """The inverse of `guarded`, of what a cell holds.

    >>> unguarded("'=1+1"), unguarded("'tis"), unguarded("=1")
    ('=1+1', "'tis", '=1')
    """
    quoted = isinstance(value, str) and value.startswith("'") and _FORMULA.match(value)
    return value[1:] if quoted else value


def row_writer(
    file: IO[str], *, raw: bool = False, lineterminator: str = "\r\n"
) -> Callable[[Iterable[Any]], None]:
    """What writes a row of cells into a file as CSV; each is `guarded`, if not `raw`.

    NUL, which a list may hold by mistake and Python 3.10 does not write, becomes U+FFFD.
    """
    writer = csv.writer(file, lineterminator=lineterminator)

    def write(cells: Iterable[Any]) -> None:
        texts = (cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell for cell in cells)
        writer.writerow(texts if raw else map(guarded, texts))

    return write
