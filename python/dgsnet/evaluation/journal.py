"""The journal of an evaluation: logits on disk as they are made, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgsnet.errors import UserError
from dgsnet.files import lock

if TYPE_CHECKING:
    from dgsnet.data.items import Item
    from dgsnet.detection.detector import Detector


# What a setting that differs means.
WORDS = {
    "model": "another model",
    "preprocessing": "other preprocessing",
    "views": "another number of views",
    "images": "other images, or other names of suites",
}


class Journal:
    """An append-only file of logits: a first line of settings, then one JSON line per image and distortion.

    The settings name what a score depends on. Calibration and threshold are not among them: they are applied
    afterwards. Every line is complete or, after a kill, the last one and then cut off.

    Attributes:
        rows: distortion to index of the image to (logit, error), as found in the file.
    """

    def __init__(self, path: str | Path, detector: Detector, listed: Sequence[tuple[str, Item]]):
        self.path = Path(path)
        self.listed = listed
        self.rows: dict[str, dict[int, tuple[float, str]]] = {}
        settings = _settings(detector, listed)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+", encoding="ascii")  # noqa: SIM115 - held until close()
        if not lock(self.file):
            self.file.close()
            raise UserError(f"{self.path} is being written by another process; give another --out")
        try:
            end = self._read(settings)
        except UserError:
            self.file.close()  # and with it the lock
            raise
        self.file.truncate(end)
        if not end:
            self._write(settings)

    def add(self, distortion: str, index: int, logit: float, error: str) -> None:
        """Append a score; it is in the file when this returns."""
        row = {"distortion": distortion, "index": index, "path": self.listed[index][1].path}
        self._write(row | {"logit": None if error else logit, "error": error})

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(_line(row))
        self.file.flush()

    def _read(self, settings: dict[str, Any]) -> int:
        """Take in the file; returns the length of its sound part in bytes."""
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if end == 0:
                    if row is None and _line(settings).encode().startswith(line):  # killed within it
                        break
                    self._check(row, settings)
                elif not self._take(row):
                    break
                end += len(line)
        return end

    def _take(self, row: Any) -> bool:
        """Keep a row if it is whole and belongs to these images."""
        try:
            logit = math.nan if row["error"] else float(row["logit"])
            if row["path"] != self.listed[row["index"]][1].path:
                return False
            self.rows.setdefault(row["distortion"], {})[row["index"]] = logit, row["error"]
        except (TypeError, KeyError, IndexError, ValueError):
            return False
        return True

    def _check(self, found: Any, settings: dict[str, Any]) -> None:
        if not isinstance(found, dict) or found.keys() != settings.keys():
            raise UserError(f"{self.path} is not the journal of an evaluation: give --out another folder")
        if other := [WORDS[key] for key in settings if found[key] != settings[key]]:
            raise UserError(
                f"{self.path} holds scores that were made with {' and '.join(other)}: give --out a new "
                "folder, or delete that file to begin anew"
            )


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _settings(detector: Detector, listed: Sequence[tuple[str, Item]]) -> dict[str, Any]:
    """What the logits depend on, each as a word to compare."""
    from dgsnet.model.checkpoint import fingerprint, trained_state

    model = hashlib.sha256(fingerprint(detector.model).encode())
    for name, tensor in sorted(trained_state(detector.model).items()):
        model.update(name.encode() + tensor.numpy().tobytes())
    images = hashlib.sha256()
    for suite, sample in listed:
        images.update(repr((suite, sample.path, sample.label, sample.generator)).encode())
    return {
        "model": model.hexdigest()[:16],
        "preprocessing": asdict(detector.config.preprocess),
        "views": detector.views,
        "images": images.hexdigest()[:16],
    }
