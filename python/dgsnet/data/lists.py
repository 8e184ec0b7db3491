"""Lists of images: lines of a .txt file or of standard input, rows of a .csv or .json file."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dgsnet.data.images import ImageError, check_regular
from dgsnet.errors import UserError

STDIN = "-"


class Unlabelled(UserError):
    """Images, perhaps, but none with a label."""


# A row, and where it stands: "line 3".
Rows = Iterator[tuple[str, dict[str, Any]]]


def read_list(path: str, *, labelled: bool = False) -> Rows:
    """The rows of a list: `path`, and where they are there `label`, `generator` and `caption`, unchecked.

    Args:
        path: a file that ends in .txt, .csv or .json, or "-" for standard input.
        labelled: refuse a CSV without labels, or in another encoding than UTF-8; else file names of other
            encodings are read as the bytes they are.

    Raises:
        UserError: it cannot be read, or is no such list.
    """
    if path == STDIN:
        return _lines(map(os.fsdecode, sys.stdin.buffer))
    return LISTS[os.path.splitext(path)[1].lower()](path, labelled)


def _text_rows(path: str, labelled: bool) -> Rows:
    with _open_text(path, labelled) as file:
        yield from _lines(file)


def _lines(lines: Iterator[str] | TextIO) -> Rows:
    for number, line in enumerate(lines, 1):
        if name := line.rstrip("\r\n"):
            yield f"line {number}", {"path": name}


def _csv_rows(path: str, labelled: bool) -> Rows:
    try:
        with _open_text(path, labelled) as file:
            reader = csv.DictReader(file)
            if not {"path", "label" if labelled else "path"} <= set(reader.fieldnames or ()):
                columns = (
                    "the columns path and label (and generator, caption)" if labelled else "a column path"
                )
                raise Unlabelled(f"{path}: its first line must name {columns}")
            for row in reader:
                yield f"line {reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8: {error}") from None


def _json_rows(path: str, labelled: bool) -> Rows:
    rows = read_json(path)
    if isinstance(rows, dict):
        rows = [{"path": name, "label": label} for name, label in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f'{path}: expected a JSON array of {{"path": ..., "label": ...}} or an object of path to label'
        )
    yield from ((f"entry {i}", row) for i, row in enumerate(rows, 1))


def _open_text(path: str, strict: bool) -> TextIO:
    try:
        check_regular(path)
        return open(path, newline="", encoding="utf-8-sig", errors="strict" if strict else "surrogateescape")
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; UserError if it cannot be read."""
    try:
        check_regular(path)
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ImageError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """A JSON text's value; UserError names `where` it stands."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON: {error}") from None


LISTS: dict[str, Callable[[str, bool], Rows]] = {".csv": _csv_rows, ".json": _json_rows, ".txt": _text_rows}
