"""Lists of images: lines of a .txt file or of standard input, rows of a .csv or .json file."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dgsnet.data.cells import unguarded
from dgsnet.data.images import ImageError, check_regular
from dgsnet.errors import UserError

STDIN = "-"


class Unlabelled(UserError):
    """Images, perhaps, but none with a label."""


# A row, and where it stands: "line 3".
Rows = Iterator[tuple[str, dict[str, Any]]]


def read_list(path: str, *, labelled: bool = False) -> Rows:
    """The rows of a list: `path`, and if there `label`, `generator`, `category`, ..., unchecked.

    Args:
        path: a file that ends in .txt, .csv or .json, or "-" for standard input.
        labelled: refuse a CSV without labels, or in another encoding than UTF-8 or marked UTF-16; else file
            names of other encodings are read as the bytes they are.

    Raises:
        UserError: it cannot be read, or is no such list.
    """
    if path == STDIN:
        return _lines(_standard_input())
    return LISTS[os.path.splitext(path)[1].lower()](path, labelled)


def _text_rows(path: str, labelled: bool) -> Rows:
    with open_text(path, labelled) as file:
        yield from _lines(file)


def _standard_input() -> Iterator[str]:
    lines = iter(sys.stdin.buffer)
    first = next(lines, b"")
    if _encoding(first, "standard input") == "utf-16":
        return io.StringIO((first + sys.stdin.buffer.read()).decode("utf-16", errors="replace"))
    return map(os.fsdecode, itertools.chain([first.removeprefix(codecs.BOM_UTF8)], lines))


def _lines(lines: Iterator[str] | TextIO) -> Rows:
    for number, line in enumerate(lines, 1):
        if name := line.rstrip("\r\n"):
            yield f"line {number}", {"path": name}


def _csv_rows(path: str, labelled: bool) -> Rows:
    with open_csv(path, labelled) as reader:
        if not {"path", "label" if labelled else "path"} <= set(reader.fieldnames or ()):
            columns = "the columns path and label (and generator, caption)" if labelled else "a column path"
            raise Unlabelled(f"{path}: its first line must name {columns}")
        for row in reader:
            yield f"line {reader.line_num}", {name: unguarded(value) for name, value in row.items()}


def _json_rows(path: str, labelled: bool) -> Rows:
    rows = read_json(path)
    if isinstance(rows, dict):
        rows = [{"path": name, "label": label} for name, label in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f'{path}: expected a JSON array of {{"path": ..., "label": ...}} or an object of path to label'
        )
    yield from ((f"entry {i}", row) for i, row in enumerate(rows, 1))


@contextlib.contextmanager
def open_csv(path: str, strict_text: bool, strict_cells: bool = False) -> Iterator[csv.DictReader[str]]:
    """The rows of a CSV file that `open_text` opens; UserError where it is none, also while it is read."""
    try:
        with open_text(path, strict_text) as file:
            yield csv.DictReader(file, strict=strict_cells)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8 or UTF-16: {error}") from None


def open_text(path: str, strict: bool) -> TextIO:
    """A text file in UTF-8 or marked UTF-16; what is not, unless strict, is read as the bytes it is."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            encoding = _encoding(file.read(2), path)
        # UTF-16 has no bytes to keep where it is damaged.
        lenient = "replace" if encoding == "utf-16" else "surrogateescape"
        return open(path, newline="", encoding=encoding, errors="strict" if strict else lenient)
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _encoding(start: bytes, name: str) -> str:
    """How a text is encoded that begins so: UTF-16 where marked, as PowerShell's > writes it, else UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if 0 in start[:2]:
        raise UserError(f"{name} looks like UTF-16 without a byte-order mark: save it as UTF-8")
    return "utf-8-sig"


def read_json(path: str | Path) -> Any:
    """What a JSON file holds, in UTF-8, UTF-16 or UTF-32; UserError if it cannot be read."""
    try:
        check_regular(path)
        text = Path(path).read_bytes()
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    return parse_json(text, str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON text's value; UserError names `where` it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError comes of no text, no JSON, and numbers of 4,300 digits.
        raise UserError(f"{where}: not readable as JSON: {error}") from None


LISTS: dict[str, Callable[[str, bool], Rows]] = {".csv": _csv_rows, ".json": _json_rows, ".txt": _text_rows}
