"""scoring: from image files to probabilities, in images per second, end to end.

Rounds in turn over the same JPEG files: as `dgsnet predict` scores with what `dgsnet calibrate` chooses here;
as it scored before (one image at a time, fp32, adapters apart); as a plain PyTorch loop does (a DataLoader,
full batches of 64, bf16 autocast); and the model alone on pixels in memory, which is the ceiling. And what
bf16 changes: the largest difference of a probability from fp32's, and decisions at 0.5 that flip. Weights are
random, for none can be downloaded where this was made; adapters are not at their initial zeros.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.detection.detector import Detector
from dgsnet.model.catalogue import own_settings
from dgsnet.model.dgsnet import DGSNet
from torch.utils.data import DataLoader

from benchmarks.data import encoded, photographs

MODELS = ("ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP2")
SIDE, PLAIN_BATCH, IMAGES = 512, 64, 64
ALONE = 8  # images a round of what takes them one by one
OURS, BEFORE, PLAIN, CEILING = "ours", "one at a time, fp32", "plain PyTorch, batch 64, bf16", "model alone"


def build(name: str, device: str) -> DGSNet:
    """Random weights, with adapters that change what the model says."""
    torch.manual_seed(0)
    model = DGSNet(ModelConfig(name=name, pretrained="", lora_rank=6), with_text=False).to(device).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.02)
    return model.requires_grad_(False)


def write_files(folder: Path, count: int) -> list[str]:
    """JPEG files of different content: crops' brightness differs, as does their noise."""
    rng, images = np.random.default_rng(0), photographs(SIDE)
    for i in range(count):
        pixels = images[i % len(images)] + rng.normal(0, 6, (SIDE, SIDE, 1)) + rng.uniform(-20, 20)
        (folder / f"{i:04d}.jpg").write_bytes(encoded(pixels.clip(0, 255).astype(np.uint8), "jpeg"))
    return sorted(map(str, folder.glob("*.jpg")))


class Files:
    """A map-style dataset as an able user writes it."""

    def __init__(self, files: list[str], detector: Detector) -> None:
        self.files, self.preprocess = files, detector.preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(read_image(self.files[index]))


def plain(files: list[str], detector: Detector, workers: int) -> list[float]:
    device = next(detector.model.parameters()).device
    found: list[float] = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for pixels in DataLoader(Files(files, detector), PLAIN_BATCH, num_workers=workers):
            found += detector.model.logits(pixels.to(device)).float().sigmoid().tolist()
    return found


def one_at_a_time(files: list[str], detector: Detector, workers: int) -> list[float]:
    device = next(detector.model.parameters()).device
    found: list[float] = []
    with torch.inference_mode():
        for pixels in DataLoader(Files(files, detector), batch_size=None, num_workers=workers):
            found.append(detector.model.logits(pixels[None].to(device)).sigmoid().item())
    return found


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    device = arguments.device
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in MODELS:
            yield measure(name, device, threads, arguments.seconds)


def measure(name: str, device: str, threads: int, seconds: float) -> dict:
    """Images per second of every way, the median of at least two rounds, and what precision changes."""
    own = {key.removeprefix("preprocess."): value for key, value in own_settings(name).items()}
    preprocess = {key: own[key] for key in PreprocessConfig.__dataclass_fields__ if key in own}
    model, config = build(name, device), Config(preprocess=PreprocessConfig(**preprocess))
    before = Detector(model, config)
    ours = before.fastest()
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), IMAGES)
        pixels = torch.stack([before.preprocess(read_image(file)) for file in files[: ours.batch]])
        ways: dict[str, Callable[[list[str]], object]] = {
            OURS: lambda part: ours.predict(part, workers=1),
            BEFORE: lambda part: one_at_a_time(part, before, 1),
            PLAIN: lambda part: plain(part, before, 1),
            CEILING: lambda part: [ours.logits(pixels) for _ in range(max(1, len(part) // len(pixels)))],
        }
        ours.predict(files[:1])
        rates: dict[str, list[float]] = {way: [] for way in ways}
        counts = {way: ALONE if way == BEFORE else len(files) for way in ways}
        begin = time.monotonic()
        while time.monotonic() - begin < seconds or len(rates[CEILING]) < 2:
            for way, score in ways.items():
                since = time.perf_counter()
                score(files[: counts[way]])
                rates[way].append(counts[way] / (time.perf_counter() - since))
        exact = Detector(model, config, batch=ours.batch).predict(files)
        found = ours.predict(files)
    medians = {way: float(np.median(of_way)) for way, of_way in rates.items()}
    result = {
        "operation": "scoring",
        **{"model": name, "device": device, "threads": threads, "batch": ours.batch},
        **{"precision": ours.precision, "images_per_second": medians},
        "of_before": medians[OURS] / medians[BEFORE],
        "of_ceiling": medians[OURS] / medians[CEILING],
        "of_plain": medians[OURS] / medians[PLAIN],
        "largest_change": float(np.abs(exact - found).max()),
        "flipped": int(((exact > 0.5) != (found > 0.5)).sum()),
    }
    print(
        f"\nscoring {name} threads={threads}: batches of {ours.batch} at {ours.precision}\n"
        + "\n".join(f"  {way:32s} {rate:8.2f} images/s" for way, rate in medians.items())
        + f"\n  ours: {result['of_before']:.2f} of before, {result['of_ceiling']:.2f} of the model alone, "
        f"{result['of_plain']:.2f} of plain; a probability moves by at most {result['largest_change']:.1e}, "
        f"{result['flipped']} of {len(found)} decisions flip",
        flush=True,
    )
    return result
