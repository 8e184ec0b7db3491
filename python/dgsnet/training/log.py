"""The records of a run: metrics.csv, TensorBoard, and its progress on stderr."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from tqdm import tqdm

from dgsnet.data.cells import row_writer
from dgsnet.errors import UserError
from dgsnet.files import open_own, write_file
from dgsnet.training.plan import Position
from dgsnet.training.step import TRAIN_COLUMNS

METRICS_FILE = "metrics.csv"
VAL_COLUMNS = ("val_loss", "val_accuracy", "val_ap", "val_auc", "val_worst_auc")
COLUMNS = ("step", "stage", "epoch", *TRAIN_COLUMNS, *VAL_COLUMNS)


class Log:
    """metrics.csv and TensorBoard; both go back to where a resumed run stands."""

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.out, self.accelerator = out, accelerator
        self.file: IO[str] | None = None

    def open(self, size: int | None, step: int) -> None:
        """Begin to write: after `size` bytes of metrics.csv (None: it is new), after `step` in TensorBoard.

        UserError if metrics.csv has fewer bytes.
        """
        trackers = {"tensorboard": {"purge_step": step + 1}}
        self.accelerator.init_trackers("tensorboard", init_kwargs=trackers)
        if not self.accelerator.is_main_process:
            return
        path = self.out / METRICS_FILE
        columns: Sequence[str] = COLUMNS
        if size is None:
            write_file(path, (",".join(COLUMNS) + "\n").encode())
        elif not path.is_file() or path.stat().st_size < size:
            raise UserError(
                f"cannot resume {self.out}: {path} is shorter than it was; put it back or start a new run"
            )
        else:
            columns = _columns(path)
        self.file = file = open_own(path, "a", newline="", encoding="utf-8")
        if size is not None:
            file.truncate(size)
        # Numbers and words of ours, and a number below 0 is no formula.
        self.columns, self.write_row = columns, row_writer(file, raw=True, lineterminator="\n")

    def write(self, position: Position, row: dict[str, float], **tracked: float) -> None:
        """Add a row; `tracked` goes to TensorBoard only (times, which no two runs share)."""
        place = {"step": position.step, "stage": position.stage, "epoch": position.epoch + 1}
        if self.file:
            cells: dict[str, object] = place | {name: f"{value:.6g}" for name, value in row.items()}
            self.write_row(cells.get(column, "") for column in self.columns)
            self.file.flush()
        finite = {name: value for name, value in (row | tracked).items() if math.isfinite(value)}
        self.accelerator.log(finite, step=position.step)

    def sync(self) -> int:
        """Have metrics.csv on the disk; returns its size in bytes."""
        # The main process calls this.
        assert self.file
        os.fsync(self.file.fileno())
        return self.file.seek(0, io.SEEK_END)


def _columns(path: Path) -> list[str]:
    """Those that a run goes on with, which are fewer where an older version began it."""
    with path.open("rb") as begun:
        line = begun.readline(2**16)
    try:
        columns = next(csv.reader([line.decode()]))
    except (UnicodeDecodeError, csv.Error, StopIteration):
        columns = []
    if columns[:3] != list(COLUMNS[:3]):
        raise UserError(f"{path} is damaged, its first line names no columns: put it back or start a new run")
    return columns


class Progress:
    """How far an epoch is, in optimiser steps, on stderr: a bar on a terminal, a line per `show` in a log."""

    def __init__(self, place: str, done: int, total: int, *, silent: bool = False) -> None:
        self.place, self.done, self.total = place, done, total
        terminal = sys.stderr.isatty()
        self.lines = not terminal and not silent
        self.bar = tqdm(desc=place, initial=done, total=total, unit="step", disable=silent or not terminal)
        self.begun, self.first, self.images = time.monotonic(), done, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, images: int) -> None:
        self.done += 1
        self.images += images
        self.bar.update()

    @property
    def speed(self) -> float:
        """Images per second since the epoch was begun or gone on with."""
        return self.images / (time.monotonic() - self.begun)

    def show(self, loss: float) -> None:
        """Show the loss, the speed and, as the bar does by itself, the time that is left of the epoch."""
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.speed:.1f} images/s")
        if self.lines:
            left = (self.total - self.done) * (time.monotonic() - self.begun) / (self.done - self.first)
            print(
                f"{self.place}: step {self.done}/{self.total}, loss {loss:.4f}, {self.speed:.1f} images/s, "
                f"{tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )
