"""Tables that commands write, as tests read them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(rows: Iterable[dict[str, str]], table: Mapping[str, dict[str, str]]) -> None:
    """The rows are those of the table, by file name, whatever their paths are called."""
    found = {os.path.basename(row["path"]): row for row in rows}
    assert found.keys() == table.keys()
    for name, row in found.items():
        assert row["path"].endswith(name)
        for column in ("probability", "decision", "error"):
            assert row[column] == table[name][column], name


def measure(model: Path, data: Any, out: Path, **options: Any) -> Any:
    """What `dgsnet evaluate` writes into metrics.json, of one source or a list of them."""
    from dgsnet.evaluation.evaluate import evaluate_command

    sources = data if isinstance(data, list) else [data]
    evaluate_command([str(source) for source in sources], str(model), str(out), **options)
    return json.loads((out / "metrics.json").read_text())


def interrupted(command: Callable[..., object], *arguments: Any, rows: int, **options: Any) -> None:
    """Call a command and press Ctrl-C when so many rows are in its table."""
    from dgsnet.data.tables import Table

    add, left = Table.add, iter(range(rows))

    def add_or_stop(self: Table, row: dict[str, Any]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, row)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Table, "add", add_or_stop)
        command(*arguments, **options)
