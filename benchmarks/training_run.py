"""Whole runs of `dgsnet train` on the official schedule: three epochs of stage 1, one of the three branches.

The frozen tower in every step, as published, against its features computed once and kept on disk
(`data.views: 1`, the cache empty), and plain LoRA's one epoch. Weights are random, images PNG files cut from
photographs. Each run is a process of its own, and all take turns; its time begins when the model is built and
the captions are encoded. Processor time, of all threads, says more where the machine does other work too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from dgsnet.builtin.crops import sample_crop
from dgsnet.builtin.photographs import PHOTOGRAPHS
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.items import find_samples
from dgsnet.training.plan import Job
from dgsnet.training.setup import accelerator_for
from dgsnet.training.trainer import Trainer
from PIL import Image

IN_STEPS, ONCE, PLAIN = "tower in every step", "features computed once", "plain LoRA, stage 2 alone"
# The side of an image file, in pixels.
SIDE = 256


def write_images(root: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    captions = {}
    photographs = [p for p in PHOTOGRAPHS["train"] if min(p.pixels().shape[:2]) >= SIDE]
    for i, name in zip(range(images), itertools.cycle(("0_real", "1_fake"))):
        (root / name).mkdir(parents=True, exist_ok=True)
        crop, captions[f"{name}/{i}.png"] = sample_crop(photographs[i % len(photographs)], SIDE, rng)
        Image.fromarray(np.ascontiguousarray(crop)).save(root / name / f"{i}.png", compress_level=1)
    (root / "captions.json").write_text(json.dumps(captions))


def configurations(root: Path, model: str, batch: int, workers: int | None) -> dict[str, Config]:
    config = Config(
        model=ModelConfig(name=model, pretrained=""),
        preprocess=PreprocessConfig(),
        data=DataConfig(train=[str(root)], workers=workers),
        optim=OptimConfig(batch_size=batch, head_epochs=3, epochs=1, precision="bf16"),
        checkpoint_every=10**6,
    )
    return {
        IN_STEPS: config,
        ONCE: replace(config, data=replace(config.data, views=1)),
        PLAIN: replace(config, surgery=SurgeryConfig(mode="none")),
    }


def time_of(config: Config, threads: int, answer: multiprocessing.connection.Connection) -> None:
    """Train in this process, in a new folder and with an empty cache; answers with the time it took."""
    torch.set_num_threads(threads)
    root = config.data.train[0]
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, data=replace(config.data, cache=f"{folder}/cache"))
        samples = attach_captions(find_samples(root), "auto", root)
        silence = io.StringIO()
        with (
            accelerator_for(config, Path(folder)) as accelerator,
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            whole = Trainer(Job(config, Path(folder), samples, []), accelerator)
            start, cpu = time.perf_counter(), time.process_time()
            whole.train()
            seconds = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    answer.send(seconds)


def results(arguments: argparse.Namespace) -> list[dict]:
    cuda = arguments.device == "cuda"
    model, images, batch, rounds = ("ViT-L-14-quickgelu", 2048, 32, 1) if cuda else ("ViT-B-32", 128, 16, 3)
    context = multiprocessing.get_context("spawn")
    found = []
    for threads in arguments.threads:
        print(f"\ntraining_run {model} images={images} batch={batch} threads={threads}", flush=True)
        with tempfile.TemporaryDirectory() as root:
            write_images(Path(root), images)
            variants = configurations(Path(root), model, batch, None if cuda else 0)
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
            for _, (name, config) in itertools.product(range(rounds), variants.items()):
                ours, theirs = context.Pipe()
                process = context.Process(target=time_of, args=(config, threads, theirs))
                process.start()
                theirs.close()
                samples[name].append(ours.recv())
                process.join()
        medians = {
            name: {kind: statistics.median(run[kind] for run in runs) for kind in ("s", "cpu_s")}
            for name, runs in samples.items()
        }
        for name, times in medians.items():
            print(f"{name:27}", end="")
            for kind, median in times.items():
                print(f"{median:8.1f} {kind:5} {medians[IN_STEPS][kind] / median:5.2f} x", end="")
            print(flush=True)
        found.append(
            {
                "operation": "training_run",
                "model": model,
                "images": images,
                "batch": batch,
                "device": arguments.device,
                "threads": threads,
                "variants": samples,
            }
        )
    return found
