"""apart: what it costs `dgsnet predict` that images are decoded in a process that has limits.

Blocks of the same JPEGs in turn, decoded there and in the process that scores, each first every other time:
wall time and processor time of all processes, an image. The network is the built-in one, the fastest there
is; with any other the share is smaller.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from dgsnet import apart
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data import images
from dgsnet.detection.detector import Detector
from dgsnet.model.checkpoint import build_model

from benchmarks.scoring import SIDE, write_files

BLOCK = 48
WAYS = ("apart", "in the same process")


def here(function: str, data: bytes, *words: Any) -> tuple[Any, bytearray]:
    """A call of `Apart`, without a process of its own."""
    value, _, parts = apart._function(function)(data, *words)
    return value, bytearray().join(parts)


def processor_seconds() -> float:
    """Of this process and of those that it has started."""
    process = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each number of threads, with medians of the blocks and of their pairs' ratios."""
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=0),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
    )
    detector = Detector(build_model(config, with_text=False).eval(), config)
    images.prepare()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        yield measure(detector, arguments.seconds) | {"threads": threads}


def measure(detector: Detector, seconds: float) -> dict[str, Any]:
    """Milliseconds an image of both ways, wall and processor time, and what one is of the other."""
    roads = {WAYS[0]: images._apart, WAYS[1]: here}
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), BLOCK)
        try:
            begin = time.monotonic()
            while time.monotonic() - begin < seconds or len(taken[WAYS[0]]) < 8:
                for way in WAYS if len(taken[WAYS[0]]) % 2 else WAYS[::-1]:
                    images._apart = roads[way]  # type: ignore[assignment]
                    detector.predict(files[:4], workers=0)
                    wall, processor = time.perf_counter(), processor_seconds()
                    detector.predict(files, workers=0)
                    wall, processor = time.perf_counter() - wall, processor_seconds() - processor
                    taken[way].append((1e3 * wall / BLOCK, 1e3 * processor / BLOCK))
        finally:
            images._apart = roads[WAYS[0]]  # type: ignore[assignment]
    wall, processor = np.median(np.divide(taken[WAYS[0]], taken[WAYS[1]]), axis=0)
    medians = {way: np.median(of_way, axis=0).round(3).tolist() for way, of_way in taken.items()}
    print(f"\napart, JPEGs of {SIDE} x {SIDE} pixels, {len(taken[WAYS[0]])} pairs of blocks of {BLOCK}")
    for way, (of_wall, of_processor) in medians.items():
        print(f"  {way:20} {of_wall:7.2f} ms, {of_processor:7.2f} ms of processor time")
    print(f"  medians of pairs: {wall:.3f} times the wall time, {processor:.3f} times the processor time")
    return {
        **{"operation": "apart", "side": SIDE, "blocks": len(taken[WAYS[0]])},
        **{"ms_wall_and_processor": medians, "wall": float(wall), "processor": float(processor)},
    }
