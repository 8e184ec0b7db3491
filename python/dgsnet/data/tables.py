"""Tables that grow row by row and outlive the process that writes them: long work goes on after a kill."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dgsnet.errors import UserError
from dgsnet.files import lock


class Partial:
    """A table that grows row by row, and the truth about what is done: JSON Lines, the settings first.

    After a kill the last line may be cut off: it is cut away.

    Args:
        target: the file that is made from it when it is complete; it lies beside.
        settings: what the rows depend on, each as a word or a JSON value to compare.
        resume: go on with a table that is there.

    Attributes:
        path: the table.
        done: its number of rows.
        end: its length in bytes when it was opened.

    Raises:
        UserError: it exists and `resume` is not given, was made with other settings, is being written by
            another process, or is damaged.

    Example:
        >>> import pathlib, tempfile
        >>> from dgsnet.data.tables import Partial, read_rows
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.json"
        >>> with Partial(target, {"seed": 0}, resume=False) as table:
        ...     table.add({"path": "a.png"})
        >>> with Partial(target, {"seed": 0}, resume=True) as table:
        ...     print(table.done, list(read_rows(table.path, ["path"])))
        1 [{'path': 'a.png'}]
    """

    def __init__(self, target: Path, settings: dict[str, Any], *, resume: bool):
        self.path = target.with_name(target.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - held until __exit__
        try:
            if not lock(self.file):
                raise UserError(f"{self.path} is being written by another process; give another --out")
            self.done = self._repair(settings, resume)
        except UserError:
            self.file.close()
            raise
        self.end = self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it survives the process when this returns."""
        self._write(row)
        self.done += 1

    def remove(self) -> None:
        """Delete it: what it was for is complete."""
        self.path.unlink()

    def _write(self, line: dict[str, Any]) -> None:
        # One write: a kill can cut the last line, but not mix two.
        self.file.write(json.dumps(line).encode() + b"\n")

    def _repair(self, settings: dict[str, Any], resume: bool) -> int:
        """Cut away half a last line, write or compare the settings; returns the number of rows."""
        end = lines = 0
        with open(self.path, "rb") as file:
            first = file.readline()
            for line in itertools.chain([first], file):
                if line.endswith(b"\n"):
                    end += len(line)
                    lines += 1
        self.file.truncate(end)
        if lines < 2:  # nothing to lose
            self.file.truncate(0)
            self._write(settings)
            return 0
        if not resume:
            raise UserError(
                f"{self.path} holds {lines - 1} rows of a stopped run: go on with --resume, or delete it"
            )
        found = _parse(self.path, 1, first)
        if found.keys() != settings.keys():
            raise UserError(f"{self.path} is no partial table of this version of dgsnet: delete it")
        if other := [key for key in settings if found[key] != settings[key]]:
            raise UserError(
                f"{self.path} was begun with other settings ({', '.join(other)}): give the same, or delete it"
            )
        return lines - 1


def read_rows(path: Path, columns: Collection[str], end: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a partial table, up to a length in bytes; UserError names a line without these columns."""
    with open(path, "rb") as file:
        place = len(file.readline())
        for number, line in enumerate(file, 2):
            place += len(line)
            if end is not None and place > end:
                return
            row = _parse(path, number, line)
            if row.keys() != set(columns):
                raise UserError(_damaged(path, number))
            yield row


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(_damaged(path, number))
    return value


def _damaged(path: Path, number: int) -> str:
    return f"{path}: line {number} is damaged: delete it and go on"


@contextmanager
def replacing(target: Path, mode: str, **options: Any) -> Iterator[IO]:
    """A new file that takes the place of `target` when it is complete and on the disk."""
    new = target.with_name(f".{target.name}.new")
    with open(new, mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, target)
