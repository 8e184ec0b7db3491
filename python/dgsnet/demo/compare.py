"""Training and measuring several methods with several seeds on the same data.

The comparison is fair by construction: same data, same seeds, same schedule, and a test on photographs and
decoder families that no training has seen.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgsnet.evaluation.evaluate import evaluate
from dgsnet.evaluation.report import write_tables
from dgsnet.evaluation.results import Evaluation, percent, text_table
from dgsnet.processes import follow_parent, usable_cores

if TYPE_CHECKING:
    from dgsnet.config import Config

SEEDS = (0, 1, 2)
PROBE, LORA, DGSNET = METHODS = ("linear probe", "LoRA", "DGS-Net")
LAYERWISE = "DGS-Net by layer"  # not in the demo itself; see docs/builtin.md
# What the demo is judged by: key in Evaluation.mean() and column title.
MEASURES = {"auc": "AUC", "ap": "AP", "accuracy": "accuracy"}


@dataclass
class Run:
    """One trained and measured model.

    Args:
        method: one of METHODS, or LAYERWISE.
        seed: decides everything random in it.
        folder: the run's folder.
        curves: columns of metrics.csv in the main stage, with "step" counted from its start; NaN where empty.
        evaluation: its scores on the test images.
        seconds: time it took.
    """

    method: str
    seed: int
    folder: Path
    curves: dict[str, np.ndarray]
    evaluation: Evaluation
    seconds: float


def configurations(config: Config, seed: int) -> dict[str, Config]:
    """One configuration per method, which differ in nothing else."""
    config = replace(config, seed=seed)
    plain = replace(config.surgery, mode="none")
    return {
        PROBE: replace(config, model=replace(config.model, lora_rank=0), surgery=plain),
        LORA: replace(config, surgery=plain),
        DGSNET: replace(config, surgery=replace(config.surgery, mode="feature")),
        LAYERWISE: replace(config, surgery=replace(config.surgery, mode="layer")),
    }


def compare(
    data: Path,
    config: Config,
    folder: Path,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = METHODS,
) -> list[Run]:
    """Train every method with every seed and measure it on the test split.

    One thread each, as many at a time as there are cores: a model this small gains little from a second
    thread and much from a second process.

    Args:
        data: dataset folder with the splits train, val and test.
        config: what the methods share; see `configurations`.
        folder: for the runs' folders.
        seeds: one run of every method for each.
        methods: names of `configurations`.

    Returns:
        The runs, ordered by method and seed.
    """
    started = time.monotonic()
    # The slowest method first, so that no core is left with a long one at the end.
    jobs = [(method, seed) for method in reversed(methods) for seed in seeds]
    processes = min(len(jobs), usable_cores())
    print(f"training {len(jobs)} models, {processes} at a time ...", flush=True)
    runs = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (folder,)) as pool:
        waiting = [pool.submit(_train_one, data, config, folder, *job) for job in jobs]
        try:
            for future in as_completed(waiting):
                runs.append(future.result())
                run = runs[-1]
                mean = run.evaluation.mean()
                scores = ", ".join(f"{title} {percent(mean[key])}" for key, title in MEASURES.items())
                print(
                    f"[{time.monotonic() - started:4.0f} s] {run.method}, seed {run.seed}: {scores}",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(runs, key=lambda run: (methods.index(run.method), run.seed))


def _start_worker(folder: Path) -> None:
    """Print to a log, for the lines of several trainings would mix; end when the demo is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"process-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    follow_parent()


def _train_one(data: Path, config: Config, folder: Path, method: str, seed: int) -> Run:
    """Train and measure one model."""
    import torch

    from dgsnet.data.samples import find_samples
    from dgsnet.detection.detector import Detector
    from dgsnet.training.train import train

    torch.set_num_threads(1)
    started = time.monotonic()
    name = f"{method.lower().replace(' ', '-')}-{seed}"
    print(f"== {name}", flush=True)
    run = train(configurations(config, seed)[method], folder / name)
    evaluation = evaluate(Detector.load(run), find_samples(data, "test"), workers=0, progress=False)
    write_tables(run / "test", evaluation)
    return Run(method, seed, run, _curves(run / "metrics.csv"), evaluation, time.monotonic() - started)


def _curves(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    # Stage 1 trains the teacher's head alone, and only where there is surgery.
    before = max((int(row["step"]) for row in rows if row["stage"] == "1"), default=0)
    rows = [row for row in rows if row["stage"] == "2"]
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    # Where nothing but the image branch is trained, its loss is the whole loss.
    image_loss = np.where(np.isnan(columns["image_loss"]), columns["loss"], columns["image_loss"])
    return columns | {"step": columns["step"] - before, "image_loss": image_loss}


def first(runs: list[Run], method: str) -> Run:
    """The run that stands for its method where only one can be shown: that of the first seed."""
    return next(run for run in runs if run.method == method)


def by_seed(runs: list[Run], method: str, key: str, decoder: str | None = None) -> list[float]:
    """A measure for every seed of a method: the mean over decoders, or that of one decoder."""
    chosen = [run.evaluation for run in runs if run.method == method]
    return [e.by_generator()[decoder][key] if decoder else e.mean()[key] for e in chosen]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter NaN of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def table(runs: list[Run]) -> str:
    """Mean and spread over the seeds per method, in percent, as lines of text."""
    rows = [["mean over test decoders", *MEASURES.values()]]
    for method in dict.fromkeys(run.method for run in runs):
        cells = [mean_and_spread(by_seed(runs, method, key)) for key in MEASURES]
        rows.append([method, *(f"{percent(mean)} ± {percent(spread)}" for mean, spread in cells)])
    return text_table(rows)


def results(runs: list[Run]) -> list[dict]:
    """What results.json holds: every run with its metrics per decoder and their mean."""
    return [
        {
            "method": run.method,
            "seed": run.seed,
            "seconds": round(run.seconds, 1),
            "mean": run.evaluation.mean(),
            "decoders": run.evaluation.by_generator(),
        }
        for run in runs
    ]
