"""Texts of strangers in cells of CSV: one that a spreadsheet would compute begins with an apostrophe."""

from __future__ import annotations

import re
from typing import Any

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
