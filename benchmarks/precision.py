"""precision: what bf16 and fp16 change of scores, of detectors of the built-in data and of full-size weights.

Of detectors trained on the built-in data, on its test images: AUC, the largest change of a probability, and
decisions at 0.5 and at a calibrated threshold that flip; what AUC and decisions change by in the mean over
seeds, each against fp32 of the same detector, with the mean's standard error. Of random weights of full size
(--models), on crops of photographs: the largest change and decisions at the median that flip; what they say
means nothing.

    python -m benchmarks precision --threads 1 --models ViT-B-32 ViT-B-16-SigLIP2
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from dgsnet import builtin
from dgsnet.data.items import find_samples
from dgsnet.demo.compare import DGSNET, LORA, configurations
from dgsnet.detection.decisions import calibrate
from dgsnet.detection.detector import Detector
from dgsnet.training.train import train
from sklearn.metrics import roc_auc_score

from benchmarks.scoring import MODELS, build, configuration, write_files

SEEDS = (0, 1, 2)
BATCH, FULL_SIZE_IMAGES = 8, 32
OTHERS = ("bf16", "fp16")


def logits(detector: Detector, precision: str, images: list) -> np.ndarray:
    """Logits of images at a precision, in batches."""
    at = Detector(detector.model, detector.config, views=1, batch=BATCH, precision=precision)
    found = list(at.stream_logits(images))
    assert not any(error for _, error in found)
    return np.array([logit for logit, _ in found])


def compared(exact: np.ndarray, other: np.ndarray, thresholds: dict[str, float]) -> dict:
    """Largest change of a probability, and decisions at thresholds of the logit that flip."""
    change = np.abs(1 / (1 + np.exp(-exact)) - 1 / (1 + np.exp(-other))).max()
    flips = {name: int(((exact > at) != (other > at)).sum()) for name, at in thresholds.items()}
    return {"images": len(exact), "largest_change": float(change), "flipped": flips}


def trained(folder: Path, seed: int) -> Iterator[dict]:
    """Of LoRA and DGS-Net of one seed."""
    data = builtin.write_dataset(folder, seed=seed, compressed=(0.5, 0.5))
    test, reals = find_samples(data / "test"), [i for i in find_samples(data / "val") if i.label == 0]
    for method in (LORA, DGSNET):
        config = configurations(builtin.demo_config(data, steps=150), seed)[method]
        detector = Detector.load(train(config, folder / method), "cpu")
        exact, labels = logits(detector, "fp32", test), [item.label for item in test]
        threshold = calibrate(logits(detector, "fp32", reals), fpr=0.05).threshold
        thresholds = {"at 0.5": 0.0, "calibrated": float(np.log(threshold / (1 - threshold)))}
        for precision in OTHERS:
            other = logits(detector, precision, test)
            yield {
                **{"model": method, "seed": seed, "precision": precision},
                **{"auc": roc_auc_score(labels, other), "auc_fp32": roc_auc_score(labels, exact)},
                **compared(exact, other, thresholds),
            }


def means(rows: list[dict]) -> Iterator[dict]:
    """Over the seeds of each method: mean and standard error of what a precision changes."""
    for method, precision in itertools.product((LORA, DGSNET), OTHERS):
        of = [row for row in rows if (row["model"], row["precision"]) == (method, precision)]
        changes = {"auc": [row["auc"] - row["auc_fp32"] for row in of]}
        changes |= {f"flipped {at}": [row["flipped"][at] for row in of] for at in of[0]["flipped"]}
        yield {
            **{"model": method, "precision": precision, "seeds": [row["seed"] for row in of]},
            "largest_change": max(row["largest_change"] for row in of),
            "mean_change": {name: float(np.mean(values)) for name, values in changes.items()},
            "standard_error": {
                name: float(np.std(values, ddof=1) / len(values) ** 0.5) for name, values in changes.items()
            },
        }


def full_size(folder: Path, name: str) -> Iterator[dict]:
    """Of random weights, whose adapters are not at their zeros."""
    detector = Detector(build(name, "cpu"), configuration(name))
    files = write_files(folder, FULL_SIZE_IMAGES)
    exact = logits(detector, "fp32", files)
    for precision in OTHERS:
        other = logits(detector, precision, files)
        found = compared(exact, other, {"at the median": float(np.median(exact))})
        yield {"model": name, "precision": precision, **found}


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each detector and precision."""
    torch.set_num_threads(arguments.threads[0])

    def rows(folder: Path) -> Iterator[dict]:
        found = []
        for seed in SEEDS:
            for row in trained(folder / f"seed-{seed}", seed):
                found.append(row)
                yield row
        yield from means(found)
        for name in arguments.models or MODELS:
            (folder / name).mkdir()
            yield from full_size(folder / name, name)

    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)):
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            yield {"benchmark": "precision", "device": "cpu", **row}
