"""scoring: from image files to a table, in images per second, end to end.

Parts, each of which can be chosen with --parts:

- rates: rounds in turn over the same JPEG files, for every model of --models and number of --threads: as
  `dgsnet predict` scores with what `dgsnet calibrate` chooses here; as it scored before (one image at a time,
  fp32, adapters apart); as a plain PyTorch loop does (a DataLoader, full batches of 64, bf16 autocast); the
  model alone on pixels in memory, and the images alone without a model. These two, and their processor time
  together on all cores, are what no scoring can exceed. And what bf16 changes: the largest difference of a
  probability from fp32's, and decisions at 0.5 that flip.
- ray: `dgsnet predict` with --engine ray and two workers against local, start-up taken out.
- page: what sixteen clients of the page get who ask at the same time.
- memory: of all processes while 15,000 images are scored.
- crops: images per second by the centre crop, by five crops and by tiles, at what `dgsnet calibrate` chooses.

Weights are random, for none can be downloaded where this was made; adapters are not at their initial zeros.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.data.items import Item, find_items
from dgsnet.data.preprocess import crop_corners
from dgsnet.detection.decisions import CROPS
from dgsnet.detection.detector import Detector, Prepared
from dgsnet.detection.rows import columns
from dgsnet.detection.scoring import WRITERS, predict_command, score
from dgsnet.detection.serve import create_app
from dgsnet.model.catalogue import own_settings
from dgsnet.model.checkpoint import save_model
from dgsnet.model.dgsnet import DGSNet
from dgsnet.processes import default_workers, usable_cores
from torch.utils.data import DataLoader

from benchmarks.data import encoded, photographs
from benchmarks.page import ORDINARY, ordinary, serving
from benchmarks.processor_time import ProcessorTime

MODELS = ("ViT-B-32", "ViT-B-16-SigLIP2", "ViT-L-14")
PARTS = ("page", "memory", "ray", "crops", "rates")
SIDE, PLAIN_BATCH = 512, 64
# Images a round, of what takes them one by one.
ALONE = 4
# Images whose scores in fp32 are made too.
COMPARED = 24
# Seconds that a round of the model alone should take: readers need some to start, which counts.
ROUND = 15.0
MOST_FILES = 1024
OURS, BEFORE, PLAIN = "ours", "one at a time, fp32", "plain PyTorch, batch 64, bf16"
CEILING, INPUT = "model alone", "images alone"
MEMORY_IMAGES, MEMORY_SAMPLES = 15_000, 30


def build(name: str, device: str) -> DGSNet:
    """Random weights, with adapters that change what the model says."""
    torch.manual_seed(0)
    model = DGSNet(ModelConfig(name=name, pretrained="", lora_rank=6), with_text=False).to(device).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.02)
    return model.requires_grad_(False)


def configuration(name: str) -> Config:
    """With what a model brings with it."""
    own = {key.removeprefix("preprocess."): value for key, value in own_settings(name).items()}
    fields = PreprocessConfig.__dataclass_fields__
    preprocess = PreprocessConfig(**{key: own[key] for key in fields if key in own})
    return Config(model=ModelConfig(name=name, pretrained="", lora_rank=6), preprocess=preprocess)


def write_files(folder: Path, count: int, side: int = SIDE) -> list[str]:
    """JPEG files of different content: crops' brightness differs, as does their noise."""
    rng, images = np.random.default_rng(0), photographs(side)
    for i in range(count):
        pixels = images[i % len(images)] + rng.normal(0, 6, (side, side, 1)) + rng.uniform(-20, 20)
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
    loader = DataLoader(
        Files(files, detector), PLAIN_BATCH, num_workers=workers, pin_memory=device.type == "cuda"
    )
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for pixels in loader:
            logits = detector.model.logits(pixels.to(device, non_blocking=True))
            found += logits.float().sigmoid().tolist()
    return found


def one_at_a_time(files: list[str], detector: Detector, workers: int) -> list[float]:
    device = next(detector.model.parameters()).device
    found: list[float] = []
    with torch.inference_mode():
        for pixels in DataLoader(Files(files, detector), batch_size=None, num_workers=workers):
            found.append(detector.model.logits(pixels[None].to(device)).sigmoid().item())
    return found


def to_table(files: list[str], detector: Detector, table: Path) -> None:
    """As `dgsnet predict` does, with the processes that it chooses."""
    WRITERS[".csv"](table, score(detector, find_items(files)), columns())


def written(found: list[float], files: list[str], table: Path) -> None:
    """The plain loop's table."""
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(zip(files, found))


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    device = arguments.device
    for part in arguments.parts or PARTS:
        if part != "rates":
            torch.set_num_threads(arguments.threads[0])
            yield {"ray": ray, "page": page, "memory": memory, "crops": crops}[part](device)
            continue
        for name, threads in itertools.product(arguments.models or MODELS, arguments.threads):
            torch.set_num_threads(threads)
            yield rates(name, device, threads, arguments.seconds)


def faster(name: str, device: str) -> tuple[Detector, Detector]:
    """A detector as it was before, and as `dgsnet calibrate` chooses."""
    before = Detector(build(name, device), configuration(name))
    return before, before.fastest()


def rates(name: str, device: str, threads: int, seconds: float) -> dict:
    """Images per second of every way, and what precision changes.

    All are medians of at least two rounds, shares too: those of a round were measured one after the other.
    """
    before, ours = faster(name, device)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        count = PLAIN_BATCH * _fitting(ours)
        files, table = write_files(Path(folder), count), Path(folder, "table.csv")
        pixels = torch.stack([before.preprocess(read_image(file)) for file in files[: ours.batch]])
        batches = max(2, count // (4 * len(pixels)))
        prepare = Prepared(ours.preprocess, 1)
        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            CEILING: (
                batches * len(pixels),
                lambda: [ours.logits(pixels).sum().item() for _ in range(batches)],
            ),
            OURS: (count, lambda: to_table(files, ours, table)),
            PLAIN: (count, lambda: written(plain(files, before, default_workers()), files, table)),
            INPUT: (count, lambda: [len(filled) for filled in ours.filled(prepare, files)]),
            BEFORE: (ALONE, lambda: written(one_at_a_time(files[:ALONE], before, 1), files, table)),
        }
        ours.predict(files[:1])
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        begin = time.monotonic()
        while time.monotonic() - begin < seconds or len(found[CEILING]) < 2:
            for way, (images, work) in ways.items():
                since = time.perf_counter()
                with ProcessorTime() as taken:
                    work()
                found[way].append(((time.perf_counter() - since) / images, taken.seconds / images))
        some = files[: min(count, COMPARED)]
        exact = Detector(before.model, before.config, batch=ours.batch).predict(some)
        scored = ours.predict(some)
    walls, used = ({way: np.array(of_way)[:, kind] for way, of_way in found.items()} for kind in range(2))
    rate = {way: float(1 / np.median(walls[way])) for way in ways}
    core = {way: float(1e3 * np.median(used[way])) for way in ways}
    cores = usable_cores()
    both = (used[CEILING] + used[INPUT]) / cores if device == "cpu" else np.zeros(1)
    of_cores = float(1 / np.median(both)) if device == "cpu" else math.inf

    def share(least: np.ndarray) -> float:
        """Of the speed at which an image takes so many seconds, in each round."""
        return float(np.median(least / walls[OURS]))

    result = {
        **{"operation": "scoring", "part": "rates", "model": name, "device": device, "threads": threads},
        **{"side": SIDE, "batch": ours.batch, "precision": ours.precision, "images": count},
        **{"rounds": len(found[OURS]), "images_per_second": rate, "core_ms_per_image": core},
        "seconds_per_image": {way: list(walls[way]) for way in ways},
        "cores_allow": of_cores if math.isfinite(of_cores) else None,
        "of_before": share(walls[BEFORE]),
        "of_plain": share(walls[PLAIN]),
        "of_ceiling": share(walls[CEILING]),
        "of_bound": share(np.maximum(np.maximum(walls[CEILING], walls[INPUT]), both)),
        "largest_change": float(np.abs(exact - scored).max()),
        "flipped": int(((exact > 0.5) != (scored > 0.5)).sum()),
        "compared": len(some),
    }
    print(
        f"\nscoring {name} threads={threads}: batches of {ours.batch} at {ours.precision}, {count} images\n"
        + "\n".join(
            f"  {way:32s} {rate[way]:8.2f} images/s {core[way]:8.1f} core ms an image" for way in ways
        )
        + f"\n  both on {cores} cores at most      {of_cores:8.2f} images/s"
        f"\n  ours: {result['of_before']:.2f} of before, {result['of_plain']:.2f} of plain, "
        f"{result['of_ceiling']:.2f} of the model alone, {result['of_bound']:.2f} of what is possible; "
        f"a probability moves by at most {result['largest_change']:.1e}, "
        f"{result['flipped']} of {len(some)} decisions flip",
        flush=True,
    )
    return result


def memory_folder() -> str | None:
    """Where files are in memory."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _fitting(detector: Detector) -> int:
    """How many plain batches the model alone takes in about ROUND seconds; at least one."""
    side = detector.model.image_size
    pixels = torch.zeros(detector.batch, 3, side, side)
    detector.logits(pixels)
    since = time.perf_counter()
    detector.logits(pixels).sum().item()
    rate = len(pixels) / (time.perf_counter() - since)
    return max(1, min(MOST_FILES // PLAIN_BATCH, round(ROUND * rate / PLAIN_BATCH)))


def ray(device: str, name: str = MODELS[0], counts: tuple[int, int] = (64, 768)) -> dict:
    """Images per second of commands on two workers, by the difference of many images and few.

    The few are scored once before, for the first actors of a Ray take longest to start.
    """
    import ray as cluster

    _, ours = faster(name, device)
    rate: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    begin = time.perf_counter()
    os.environ.setdefault("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", "0.05")
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        run = str(save_model(Path(folder, "run", "best"), ours.model, ours.config).parent)
        (images := Path(folder, "images")).mkdir()
        files = write_files(images, max(counts))
        cluster.init(include_dashboard=False, log_to_driver=False)
        started = time.perf_counter() - begin
        try:
            for engine in ("local", "ray"):
                took = []
                for count in (counts[0], *counts):
                    since = time.perf_counter()
                    predict_command(
                        files[:count],
                        run,
                        str(Path(folder, f"{engine}.csv")),
                        device=device,
                        batch=ours.batch,
                        precision=ours.precision,
                        workers=2,
                        engine=engine,  # type: ignore[arg-type]
                    )
                    took.append(time.perf_counter() - since)
                seconds[engine] = took
                rate[engine] = (counts[1] - counts[0]) / (took[2] - took[1])
            same = Path(folder, "ray.csv").read_text() == Path(folder, "local.csv").read_text()
        finally:
            cluster.shutdown()
    print(
        f"\nscoring on Ray: {rate['ray']:.1f} images/s, local {rate['local']:.1f}; same table: {same}",
        flush=True,
    )
    return {
        **{"operation": "scoring", "part": "ray", "model": name, "device": device, "workers": 2},
        "threads": torch.get_num_threads(),
        **{"batch": ours.batch, "precision": ours.precision, "images": counts, "same_table": same},
        **{"images_per_second": rate, "of_local": rate["ray"] / rate["local"], "start_s": started},
        "seconds": seconds,
    }


def page(device: str, name: str = MODELS[0], each: int = 6) -> dict:
    """Images per second, and how long an answer takes, under sixteen clients; and of one alone."""
    _, ours = faster(name, device)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(write_files(Path(folder), 1)[0]).read_bytes()
    with serving(create_app(ours, per_minute=1_000_000)) as port:
        ordinary(port, image, 1)
        since = time.perf_counter()
        took = ordinary(port, image, each)
        rate = len(took) / (time.perf_counter() - since)
        one = ordinary(port, image, each, clients=1)
    result = {
        **{"operation": "scoring", "part": "page", "model": name, "device": device, "clients": ORDINARY},
        "threads": torch.get_num_threads(),
        **{"batch": ours.batch, "precision": ours.precision, "images_per_second": rate},
        "median_ms": 1e3 * float(np.median(took)),
        "alone_ms": 1e3 * float(np.median(one)),
    }
    print(
        f"\nscoring by the page: {rate:.1f} images/s for {ORDINARY} clients, who wait for "
        f"{result['median_ms']:.0f} ms; one alone waits for {result['alone_ms']:.0f} ms",
        flush=True,
    )
    return result


def crops(device: str, name: str = MODELS[0], side: int = SIDE, rounds: int = 3) -> dict:
    """Images per second from files to a table, medians of rounds in turn, and of crops alike."""
    config = configuration(name)
    config.preprocess = replace(config.preprocess, mode="crop")
    ours = Detector(build(name, device), config).fastest()
    rows = {number: len(crop_corners(side, side, ours.model.image_size, number)) for number in CROPS}
    taken: dict[Any, list[float]] = {number: [] for number in rows}
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        files = write_files(Path(folder), 4 * max(ours.batch, 8), side)
        for _, (number, times) in itertools.product(range(rounds), taken.items()):
            how: dict[str, Any] = {"batch": ours.batch, "precision": ours.precision, "crops": number}
            detector = Detector(ours.model, config, **how)
            detector.predict(files[:1])
            since = time.perf_counter()
            some = files[: -(-len(files) // rows[number])]
            to_table(some, detector, Path(folder, "table.csv"))
            times.append((time.perf_counter() - since) / len(some))
    rate = {str(number): float(1 / np.median(times)) for number, times in taken.items()}
    print(
        f"\nscoring {name}, JPEG of {side} x {side}, batches of {ours.batch} at {ours.precision}:", flush=True
    )
    for number, of_crops in rows.items():
        each = rate[str(number)]
        print(f"  crops {number}: {each:.2f} images/s, {each * of_crops:.1f} crops/s", flush=True)
    return {
        **{"operation": "scoring", "part": "crops", "model": name, "device": device, "side": side},
        **{"threads": torch.get_num_threads(), "batch": ours.batch, "precision": ours.precision},
        **{"rounds": rounds, "crops": {str(key): value for key, value in rows.items()}},
        "images_per_second": rate,
    }


def memory(device: str, images: int = MEMORY_IMAGES, samples: int = MEMORY_SAMPLES) -> dict:
    """Memory of this process and of all together while small images are scored by a small model.

    The slopes are of the last two thirds, by least squares.
    """
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=0),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
    )
    model = DGSNet(config.model, with_text=False).to(device).eval()
    detector = Detector(model, config, batch=16)
    me, seen = psutil.Process(), []
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        files = write_files(Path(folder), 100, side=96)
        # Without an end, before which the processes that read would go.
        rows = score(detector, (Item(file) for file in itertools.cycle(files)), workers=2)
        since = time.perf_counter()
        for done, row in enumerate(itertools.islice(rows, images), 1):
            assert not row.error
            if done % (images // samples) == 0:
                own = me.memory_info().rss
                others = sum(child.memory_info().rss for child in me.children(recursive=True))
                seen.append((done, own / 2**20, (own + others) / 2**20))
        rate = images / (time.perf_counter() - since)
        rows.close()  # type: ignore[attr-defined]  # it is a generator
    done, own, together = np.array(seen[len(seen) // 3 :]).T
    slopes = [1e3 * float(np.polyfit(done, mib, 1)[0]) for mib in (own, together)]
    print(
        f"\nscoring {images} images, {rate:.0f} a second: MiB after {done[0]:.0f} and at the end\n"
        f"  this process {own[0]:.0f}, {own[-1]:.0f}: {slopes[0]:+.3f} per 1000 images\n"
        f"  all processes {together[0]:.0f}, {together[-1]:.0f}: {slopes[1]:+.3f} per 1000 images",
        flush=True,
    )
    return {
        **{"operation": "scoring", "part": "memory", "model": config.model.name, "device": device},
        **{"images": images, "images_per_second": rate, "mib": seen},
        **{"own_mib_per_1000": slopes[0], "all_mib_per_1000": slopes[1]},
    }
