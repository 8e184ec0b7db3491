"""What `--consistency` is worth: errors among the images decided, against refusing as many by other rules.

Detectors of the built-in data (docs/builtin.md), trained with the demo's settings, decide about images of
photographs that no training has seen: out of the training's decoders, as they are and compressed once more,
and out of decoders that are new. Consistency refuses those on which a re-encoded or resized copy is decided
otherwise. It is set against rules that refuse as many: the images whose logit is nearest to the threshold,
which takes no copies; and, with as many forward passes as consistency takes, those whose mean logit over
the copies is nearest, deciding by the plain logit or by that mean.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from dgsnet import builtin
from dgsnet.data.distortions import COPIES, Distortion
from dgsnet.data.images import read_image
from dgsnet.data.items import find_samples
from dgsnet.data.preprocess import Preprocessor
from dgsnet.demo.compare import DGSNET, LORA, configurations
from dgsnet.detection.decisions import calibrate
from dgsnet.detection.detector import Detector
from dgsnet.training.train import train
from scipy.special import logit

SEEDS, METHODS = range(4), (LORA, DGSNET)
# The 120 real images of a calibration allow this rate.
FPR = 0.05
# Seeds of the validation images: for the threshold, and for the tests.
CALIBRATION, CROPS = 0, (1, 2, 3)
# Split, seeds and what was done to the images before.
TESTS = {
    "known decoders": ("val", CROPS, None),
    "known decoders, JPEG 60 before": ("val", CROPS, Distortion((("jpeg", 60),))),
    "unknown decoders": ("test", (CALIBRATION,), None),
}
BATCH = 256
# Images, and how often they are scored.
TIMED, ROUNDS = 100, 3
RULES = ("consistency", "nearest", "nearest by the mean", "mean, nearest by the mean")


class Images:
    """Images in memory: labels [N] and inputs [1 + copies, N, 3, S, S], the images themselves first."""

    def __init__(
        self, folders: Sequence[Path], preprocess: Preprocessor, before: Distortion | None = None
    ) -> None:
        samples = [sample for folder in folders for sample in find_samples(folder)]
        images = [read_image(sample.path) for sample in samples]
        images = [before(image) for image in images] if before else images
        self.labels = np.array([sample.label for sample in samples])
        variants = [images, *([copy(image) for image in images] for copy in COPIES)]
        self.pixels = torch.stack([torch.stack([preprocess(image) for image in each]) for each in variants])

    @torch.inference_mode()
    def logits(self, detector: Detector) -> np.ndarray:
        """[1 + copies, N]."""
        parts = self.pixels.flatten(0, 1).split(BATCH)
        found = torch.cat([detector.model.logits(part) for part in parts])
        return found.reshape(self.pixels.shape[:2]).double().numpy()


def thresholds(val: Images, detector: Detector) -> dict[str, tuple[float, float]]:
    """Rule to threshold on the logits and on their mean over the copies, both chosen alike."""
    logits = val.logits(detector)[:, val.labels == 0]
    chosen = (calibrate(reals, fpr=FPR).threshold for reals in (logits[0], logits.mean(axis=0)))
    return {"0.5": (0.0, 0.0), f"calibrated, {FPR:.0%}": tuple(float(logit(p)) for p in chosen)}


def compared(logits: np.ndarray, labels: np.ndarray, threshold: float, mean_threshold: float) -> dict:
    """Errors among the images that each rule decides, all of them refusing as many as consistency does."""
    called, distance = logits > threshold, np.abs(logits[0] - threshold)
    mean = logits.mean(axis=0) - mean_threshold
    agree = (called == called[0]).all(axis=0)
    refused = np.count_nonzero(~agree)

    def rates(generated: np.ndarray, decided: np.ndarray) -> dict[str, float]:
        wrong = generated != labels
        return {
            "error": float(wrong[decided].mean()),
            "false_positives": float(wrong[decided & (labels == 0)].mean()),
            "misses": float(wrong[decided & (labels == 1)].mean()),
        }

    def furthest(distance: np.ndarray) -> np.ndarray:
        decided = np.ones(len(distance), bool)
        decided[np.argsort(distance, kind="stable")[:refused]] = False
        return decided

    everything = np.ones(len(labels), bool)
    return {
        "unsure": refused / len(labels),
        # Decisions that were spared.
        "unsure_wrong": float((called[0] != labels)[~agree].mean()),
        "all": rates(called[0], everything),
        "all by the mean": rates(mean > 0, everything),
        "consistency": rates(called[0], agree),
        "nearest": rates(called[0], furthest(distance)),
        "nearest by the mean": rates(called[0], furthest(np.abs(mean))),
        "mean, nearest by the mean": rates(mean > 0, furthest(np.abs(mean))),
    }


def seconds(detector: Detector, images: list[np.ndarray]) -> dict[str, float]:
    """Median seconds for an image, without and with copies, in turns."""
    taken: dict[str, list[float]] = {"plain": [], "consistency": []}
    for _, (name, times) in itertools.product(range(ROUNDS + 1), taken.items()):
        begin = time.perf_counter()
        detector.predict(images, workers=0, consistency=name == "consistency")
        times.append((time.perf_counter() - begin) / len(images))
    return {name: float(np.median(times[1:])) for name, times in taken.items()}


def preparing(side: tuple[int, int]) -> dict[str, float]:
    """Median seconds to make the default inputs of one large image, without and with its copies."""
    from dgsnet.config import PreprocessConfig
    from dgsnet.detection.detector import Prepared

    image = np.random.default_rng(0).integers(0, 256, (*side, 3), dtype=np.uint8)
    # There is no noise in it, as no camera has so much.
    image = Distortion((("blur", 2), ("jpeg", 90)))(image)
    taken: dict[str, list[float]] = {"plain": [], "consistency": []}
    for _, (name, times) in itertools.product(range(ROUNDS + 1), taken.items()):
        prepare = Prepared(Preprocessor(PreprocessConfig()), 1, COPIES if name == "consistency" else ())
        begin = time.perf_counter()
        prepare.part(image)
        times.append(time.perf_counter() - begin)
    return {name: float(np.median(times[1:])) for name, times in taken.items()}


def results(arguments: argparse.Namespace) -> list[dict]:
    """A row for each detector, test and threshold; then what the copies cost."""
    torch.set_num_threads(1)
    found, about = [], {"benchmark": "consistency", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        data = {seed: Path(folder) / f"data-{seed}" for seed in (CALIBRATION, *CROPS)}
        for seed, root in data.items():
            splits = ("val", "test") if seed == CALIBRATION else ("val",)
            builtin.write_dataset(root, seed=seed, splits=splits, compressed=(0.5, 0.5))
        preprocess = Preprocessor(builtin.demo_config(folder).preprocess)
        tests = {
            name: Images([data[seed] / split for seed in seeds], preprocess, before)
            for name, (split, seeds, before) in TESTS.items()
        }
        val = Images([data[CALIBRATION] / "val"], preprocess)
        for seed, method in itertools.product(SEEDS, METHODS):
            root = Path(folder) / f"train-{seed}"
            if not root.exists():
                builtin.write_dataset(root, seed=seed, splits=("train",), compressed=(0.5, 0.5))
            config = configurations(builtin.demo_config(root, steps=150), seed)[method]
            detector = Detector.load(train(config, Path(folder) / f"{method}-{seed}"), "cpu")
            chosen = thresholds(val, detector)
            for (test, images), (rule, pair) in itertools.product(tests.items(), chosen.items()):
                row = compared(images.logits(detector), images.labels, *pair)
                found.append(about | {"method": method, "seed": seed, "test": test, "threshold": rule} | row)
        some = [read_image(sample.path) for sample in find_samples(data[CALIBRATION] / "test")[:TIMED]]
        cost = {"tiny, a 48 x 48 image": seconds(detector, some)}
    cost["preparing 4000 x 3000 for ViT-L/14, without the network"] = preparing((3000, 4000))
    print(summary(found))
    for name, taken in cost.items():
        ratio = taken["consistency"] / taken["plain"]
        print(f"{name}: {taken['plain']:.2e} s, with copies {ratio:.1f} times that")
    return [*found, about | {"seconds": cost}]


def summary(found: list[dict]) -> str:
    """Means over detectors, and how each rule's error differs from consistency's: mean and 95% interval."""
    from scipy.stats import t

    lines = []
    for test, threshold in dict.fromkeys((row["test"], row["threshold"]) for row in found):
        members = [row for row in found if (row["test"], row["threshold"]) == (test, threshold)]
        unsure = np.mean([row["unsure"] for row in members])
        lines.append(f"{test}, threshold {threshold}: unsure {unsure:.1%}")
        ours = np.array([row["consistency"]["error"] for row in members])
        for rule in ("all", "all by the mean", *RULES):
            rates = {key: np.mean([row[rule][key] for row in members]) for key in members[0][rule]}
            gap = np.array([row[rule]["error"] for row in members]) - ours
            half = t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
            lines.append(
                f"  {rule}: "
                + ", ".join(f"{key} {value:.1%}" for key, value in rates.items())
                + f"; minus consistency's {100 * gap.mean():+.2f} ± {100 * half:.2f} points"
            )
    return "\n".join(lines)
