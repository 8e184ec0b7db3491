"""`dgsnet predict`: images in, a table of scores out."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

from dgsnet.detector import THRESHOLD, Detector
from dgsnet.errors import UserError
from dgsnet.sources import find_images


def predict_command(
    paths: list[str],
    model: str,
    out: str = "scores.csv",
    device: str | None = None,
    workers: int | None = None,
) -> None:
    """Score images into a CSV with columns path, probability, decision, error.

    Args:
        paths: image files, folders (searched recursively) and glob patterns.
        model: a model folder, or the folder of a training run.
        out: the CSV to write; it appears under this name when complete.
        device: torch device; the GPU where there is one if not given.
        workers: processes that read and prepare images; chosen if not given.
    """
    from tqdm import tqdm

    files, missing = find_images(paths)
    if not files:
        path, why = next(iter(missing.items()), ("PATHS", "no path given"))
        raise UserError(f"{path}: {why}; give image files, folders or quoted glob patterns")
    detector = Detector.load(model, device)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    counts = {"real": 0, "generated": 0, "": 0}
    # surrogateescape writes file names that are not UTF-8 as the bytes they are.
    with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "probability", "decision", "error"])
        for path, why in missing.items():
            writer.writerow([path, "", "", why])
        scores = detector.stream(files, workers=workers)
        for path, (probability, error) in zip(files, tqdm(scores, total=len(files), unit="image")):
            # Rounded before the decision, so that the row agrees with itself.
            probability = round(probability, 6)
            decision = "" if error else "generated" if probability > THRESHOLD else "real"
            counts[decision] += 1
            writer.writerow([path, "" if error else f"{probability:.6f}", decision, error])
            file.flush()
    os.replace(partial, target)
    unreadable = counts[""] + len(missing)
    print(f"{target}: {counts['generated']} generated, {counts['real']} real, {unreadable} could not be read")
    if unreadable == len(files) + len(missing):
        raise UserError(f"none of the images could be read; {target} says why for each")
    if unreadable:
        print(f"the column error of {target} says why", file=sys.stderr)
