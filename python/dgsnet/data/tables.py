"""Tables that grow row by row and outlive the process that writes them: long work goes on after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dgsnet.errors import UserError
from dgsnet.files import open_locked


class Table:
    """A table that grows row by row, and the truth about what is done: JSON Lines, the settings first.

    A kill can cut off no more than the last line, and half a line is cut away when the table is opened again.
    On a full disk the rows that are there stay whole.

    Args:
        path: the file; its folder is made where there is none.
        settings: what the rows depend on, as JSON values by name; always the same names in the same order.
        missing: what settings were that tables of earlier versions do not name.
        columns: of every row.
        resume: go on with rows that are there.

    Attributes:
        path: as given.
        done: the number of rows.
        end: the length in bytes of what was there when the table was opened.

    Raises:
        UserError: the file has rows and `resume` is False, it was begun with other settings or is no such
            table, or another process is writing it. It is left as it was.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> with Table(path, {"seed": 0}, ["path"]) as table:
        ...     table.add({"path": "a.png"})
        >>> with Table(path, {"seed": 0}, ["path"]) as table:
        ...     print(table.done, list(table.rows()))
        1 [{'path': 'a.png'}]
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        columns: Collection[str],
        *,
        missing: Mapping[str, Any] = {},
        resume: bool = True,
    ):
        self.path, self.columns, self._missing = path, columns, missing
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_locked(path)
        if file is None:
            raise UserError(f"{path} is being written by another process; give another --out")
        self._file = file
        try:
            self.done = self._repair(_line(settings), resume)
            self.end = file.seek(0, os.SEEK_END)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it survives the process when this returns.

        Raises:
            UserError: there is no room for it. The rows before it are whole.
        """
        self._write(_line(row))
        self.done += 1

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in their order; UserError names a line that is damaged."""
        return read_rows(self.path, self.columns)

    def remove(self) -> None:
        """Delete the file: what it was for is complete."""
        self.path.unlink()

    def _write(self, line: bytes) -> None:
        start, rest = self._file.seek(0, os.SEEK_END), line
        try:
            # A disk that becomes full takes only a part at first.
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(start)
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}), and its {self.done} rows are kept: make "
                "room, and give the same command again"
            ) from None

    def _repair(self, head: bytes, resume: bool) -> int:
        """Cut away half a last line, write or compare the settings; returns the number of rows."""
        with open(self.path, "rb") as file:
            first, end, lines = file.readline(), 0, 0
            file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    end, lines = end + len(line), lines + 1
        expected = json.loads(head)
        # What a kill leaves of the first line names the first of the settings, or a part of it.
        name = head[: head.index(b":") + 1]
        begun = first.startswith(name) or name.startswith(first)
        found = _parse(first) if lines else expected if begun else None
        if found is not None:
            found = {key: self._missing[key] for key in expected if key in self._missing} | found
        if found is None or found.keys() != expected.keys():
            raise UserError(
                f"{self.path} is no table of this command and version of dgsnet: give another --out, or "
                "delete it"
            )
        rows = max(lines - 1, 0)
        if rows and not resume:
            raise UserError(f"{self.path} holds {rows} rows already: go on with --resume, or delete it")
        if rows and (other := [key for key in expected if found[key] != expected[key]]):
            raise UserError(
                f"{self.path} was begun with other settings ({', '.join(other)}): give the same or another "
                "--out, or delete it"
            )
        self._file.truncate(end if rows else 0)
        if not rows:
            self.done = 0
            self._write(head)
        return rows


def partial(target: Path) -> Path:
    """The table that a file is made from when it is complete; it lies beside."""
    return target.with_name(target.name + ".partial")


def read_rows(path: Path, columns: Collection[str], end: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table, up to a length in bytes; UserError names a line without these columns."""
    names = set(columns)
    with open(path, "rb") as file:
        place = len(file.readline())
        for number, line in enumerate(file, 2):
            place += len(line)
            if end is not None and place > end:
                return
            row = _parse(line)
            if row is None or row.keys() != names:
                raise damaged(path, number)
            yield row


def damaged(path: Path, number: int) -> UserError:
    """The error of a line that cannot have been written as it is."""
    return UserError(f"{path}: line {number} is damaged: delete it and go on")


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None
