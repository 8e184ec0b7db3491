"""What a run writes down of itself: metrics.csv and TensorBoard."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path

from accelerate import Accelerator

from dgsnet.errors import UserError
from dgsnet.files import write_file
from dgsnet.training.plan import Position
from dgsnet.training.step import TRAIN_COLUMNS

METRICS_FILE = "metrics.csv"
VAL_COLUMNS = ("val_loss", "val_accuracy", "val_ap", "val_auc")
COLUMNS = ("step", "stage", "epoch", *TRAIN_COLUMNS, *VAL_COLUMNS)


class Log:
    """metrics.csv and TensorBoard; both go back to where a resumed run stands.

    Args:
        out: the run's folder.
        accelerator: carries the tracker.
        size: bytes of metrics.csv that count, None for a new run.
        step: the run's step; TensorBoard hides what it had after it.
    """

    def __init__(self, out: Path, accelerator: Accelerator, size: int | None, step: int) -> None:
        self.accelerator = accelerator
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        self.file: io.TextIOWrapper | None = None
        if not accelerator.is_main_process:
            return
        path = out / METRICS_FILE
        if size is None:
            write_file(path, (",".join(COLUMNS) + "\n").encode())
        elif path.is_file() and path.stat().st_size >= size:
            os.truncate(path, size)
        else:
            raise UserError(
                f"cannot resume {out}: {path} is shorter than it was; put it back or start a new run"
            )
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="", lineterminator="\n")

    def write(self, position: Position, row: dict[str, float], **tracked: float) -> None:
        """Add a row; `tracked` goes to TensorBoard only (times, which no two runs share)."""
        place = {"step": position.step, "stage": position.stage, "epoch": position.epoch + 1}
        if self.file:
            self.writer.writerow(place | {name: f"{value:.6g}" for name, value in row.items()})
            self.file.flush()
        finite = {name: value for name, value in (row | tracked).items() if math.isfinite(value)}
        self.accelerator.log(finite, step=position.step)

    def sync(self) -> int:
        """Have metrics.csv on the disk; returns its size in bytes."""
        assert self.file  # the main process calls this
        os.fsync(self.file.fileno())
        return self.file.seek(0, io.SEEK_END)
