"""`dgsnet calibrate`: a model's threshold, from images whose class is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from dgsnet.detection.decisions import calibrate, summary
from dgsnet.errors import UserError


def calibrate_command(
    model: str,
    reals: list[str],
    generated: list[str] | None = None,
    fpr: float = 0.01,
    miss_rate: float | None = None,
    views: int = 1,
    device: str | None = None,
    workers: int | None = None,
) -> None:
    """Set a model's threshold for a false-positive rate, from images whose class is known.

    Writes calibration.json into the model's folder; `dgsnet predict` then says generated, real or unsure.

    Args:
        model: a model folder, or the folder of a training run.
        reals: real images like those to be decided on: files, folders (searched recursively), glob patterns.
        generated: generated images; needed for calibrated probabilities and a bound on misses.
        fpr: how many of all real images may be called generated.
        miss_rate: how many of all generated images may be called real; as fpr if not given.
        views: mosaics averaged per image, then and whenever the model is used.
        device: torch device; the GPU where there is one if not given.
        workers: processes that read and prepare images; chosen if not given.
    """
    from dgsnet.detection.decisions import save_calibration
    from dgsnet.detection.detector import Detector

    # An older calibration must not decide how these scores are made.
    detector = Detector.load(model, device, views=views, calibrated=False)
    logits = [_logits(detector, paths, workers) for paths in (reals, generated) if paths]
    result = calibrate(*logits, fpr=fpr, miss_rate=miss_rate, views=views)
    print(summary(result))
    print(f"written to {save_calibration(model, result)}")


def _logits(detector: Any, paths: list[str], workers: int | None) -> np.ndarray:
    """Logits of the images that can be read; one that is there twice counts once, as its score tells."""
    from tqdm import tqdm

    from dgsnet.data.sources import find_images

    files, missing = find_images(paths)
    for path, why in missing.items():
        raise UserError(f"{path}: {why}; give image files, folders or quoted glob patterns")
    scores = list(
        tqdm(detector.stream_logits(files, workers=workers), total=len(files), unit="image", disable=None)
    )
    for _, error in scores:
        if error:
            print(f"left out: {error}")
    return np.unique([logit for logit, error in scores if not error])
