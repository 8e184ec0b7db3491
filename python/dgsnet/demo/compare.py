"""Training and measuring several methods with several seeds on the same data, with a shortcut and without.

The comparison is fair by construction: for a task and a seed all methods have the same images, order and
schedule, and the test is on photographs and decoder families that no training has seen.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.evaluation.results import Evaluation, percent, text_table
from dgsnet.processes import follow_parent, usable_cores

if TYPE_CHECKING:
    from dgsnet.config import Config
    from dgsnet.demo.measure import Exam

SEEDS = tuple(range(6))
# Shares of real and of generated training images that are JPEG files. Tests are always balanced.
BALANCED, BIASED = "balanced", "jpeg"
TASKS = {BALANCED: (0.5, 0.5), BIASED: (0.8, 0.2)}
PROBE, LORA, DGSNET, EXPERT, TWINS = METHODS = (
    "linear probe",
    "LoRA",
    "DGS-Net",
    "DGS-Net with expert",
    "twins",
)
# It is not in the demo itself; see docs/builtin.md.
LAYERWISE = "DGS-Net by layer"
# What the expert sees, by name: settings of section data.
EXPERTS = {
    "files": {"nuisances": "files", "captions": "none"},
    "captions": {"nuisances": "none", "captions": "auto"},
    "both": {"nuisances": "files", "captions": "auto"},
}
# Chosen on validation photographs by `python -m benchmarks demo_settings`; see docs/builtin.md.
CHOSEN_EXPERT, DISTILLATION = "captions", 0.1
# Weight of the pull of twins to the frozen features.
PULL = 0.3
# Of a Run, in percent: field and column title.
MEASURES = {
    "auc": "AUC",
    "auc_conflicting": "AUC, conflicting",
    "zero_shot": "zero-shot",
    "cka": "CKA",
}


@dataclass
class Run:
    """One trained and measured model; measures are those of measure.Measures.

    Attributes:
        task: of TASKS.
        method: of `configurations`.
        seed: decides everything random in it, its training images too.
        evaluation: on the test images.
        auc: mean over test decoders.
    """

    task: str
    method: str
    seed: int
    folder: Path
    # Columns of metrics.csv in the main stage, with "step" counted from its start; NaN where empty.
    curves: dict[str, np.ndarray]
    evaluation: Evaluation
    auc: float
    auc_conflicting: float
    zero_shot: float
    cka: float
    seconds: float


def configurations(config: Config, seed: int) -> dict[str, Config]:
    """One configuration per method, which differ in nothing else."""
    config = replace(config, seed=seed)
    plain = replace(config.surgery, mode="none")
    return {
        PROBE: replace(config, model=replace(config.model, lora_rank=0), surgery=plain),
        LORA: replace(config, surgery=plain),
        DGSNET: replace(config, surgery=replace(config.surgery, mode="feature")),
        EXPERT: with_expert(config, CHOSEN_EXPERT, DISTILLATION),
        LAYERWISE: replace(config, surgery=replace(config.surgery, mode="layer")),
        TWINS: with_twins(config, PULL),
    }


def with_expert(config: Config, expert: str, distillation: float) -> Config:
    """The configuration with one of EXPERTS in place of the projection, and a pull to the frozen features."""
    surgery = replace(config.surgery, mode="feature", text="expert", distillation=distillation)
    data: Any = EXPERTS[expert]
    return replace(config, data=replace(config.data, **data), surgery=surgery)


def with_twins(config: Config, distillation: float) -> Config:
    """The configuration on twins in place of unrelated images, with a pull to the frozen features, without
    captions; without the teacher's head, which only the alignment needs."""
    sets = [str(twins_of(Path(images).parent) / "train") for images in config.data.train]
    surgery = replace(config.surgery, mode="feature", alignment=0.0, distillation=distillation)
    data = replace(config.data, train=sets, pairs=True, captions="none")
    return replace(config, data=data, surgery=surgery, optim=replace(config.optim, head_epochs=0))


def compare(
    data: Path,
    configure: Callable[[Path], Config],
    folder: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    tasks: Sequence[str] = tuple(TASKS),
    methods: Sequence[str] = METHODS,
) -> list[Run]:
    """Train every method on every task with every seed, and measure it on the split test below `data`.

    Training images go to data/TASK-SEED, their real ones with twins to data/TASK-SEED-twins; `configure`
    gives what the methods share for such a folder. The runs come ordered by task, method and seed.
    """
    pairs = [(task, seed) for seed in seeds for task in tasks]
    configs = {pair: configurations(configure(training_set(data, *pair)), pair[1]) for pair in pairs}
    # The slowest method first, so that no core is left with a long one at the end.
    jobs = [(*pair, method, configs[pair][method]) for method in reversed(methods) for pair in pairs]
    runs = list(train_all(data, "test", folder, jobs))
    return sorted(runs, key=lambda run: (tasks.index(run.task), methods.index(run.method), run.seed))


def train_all(
    data: Path, split: str, folder: Path, jobs: Sequence[tuple[str, int, str, Config]]
) -> Iterator[Run]:
    """Make the training sets, then train and measure each job; gives the runs as they end.

    A job is task, seed, name of the method, and configuration, trained on `training_set`. One thread each, as
    many at a time as there are cores: a model this small gains little from a second thread and much from a
    second process.
    """
    started = time.monotonic()
    processes = min(len(jobs), usable_cores())
    print(f"training {len(jobs)} models, {processes} at a time ...", flush=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (folder,)) as pool:
        try:
            sets = [pool.submit(_write, data, *pair) for pair in dict.fromkeys(job[:2] for job in jobs)]
            for written in sets:
                written.result()
            waiting = [pool.submit(_train_one, data, split, folder, *job) for job in jobs]
            for future in as_completed(waiting):
                run = future.result()
                found = ", ".join(f"{title} {percent(getattr(run, key))}" for key, title in MEASURES.items())
                name = f"{run.task}, {run.method}, seed {run.seed}"
                print(f"[{time.monotonic() - started:4.0f} s] {name}: {found}", flush=True)
                yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(folder: Path) -> None:
    """Print to a log, for the lines of several trainings would mix; end when the demo is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"process-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    follow_parent()


def training_set(data: Path, task: str, seed: int) -> Path:
    return data / f"{task}-{seed}"


def twins_of(images: Path) -> Path:
    """Where the twins of a training set's real images are."""
    return images.with_name(f"{images.name}-twins")


def _write(data: Path, task: str, seed: int) -> None:
    import torch

    from dgsnet import builtin

    torch.set_num_threads(1)
    root = training_set(data, task, seed)
    for folder, twins in (root, False), (twins_of(root), True):
        builtin.write_dataset(folder, seed=seed, splits=("train",), compressed=TASKS[task], twins=twins)


def _train_one(
    data: Path, split: str, folder: Path, task: str, seed: int, method: str, config: Config
) -> Run:
    import torch

    from dgsnet.config import Config
    from dgsnet.demo.measure import measure
    from dgsnet.detection.detector import Detector
    from dgsnet.training.train import train

    torch.set_num_threads(1)
    started = time.monotonic()
    # The methods share it.
    config = replace(config, data=replace(config.data, cache=str(folder / "cache")))
    name = f"{task}-{method.lower().replace(' ', '-')}-{seed}"
    print(f"== {name}", flush=True)
    run = train(config, folder / name)
    shared = Config(model=replace(config.model, lora_rank=0), preprocess=config.preprocess)
    found = measure(Detector.load(run, "cpu").model, _exam(data, split, shared.to_json()))
    return Run(
        task,
        method,
        seed,
        run,
        _curves(run / "metrics.csv"),
        found.evaluation,
        found.evaluation.mean()["auc"],
        found.conflicting,
        found.zero_shot,
        found.cka,
        time.monotonic() - started,
    )


@cache
def _exam(data: Path, split: str, config: str) -> Exam:
    """The exam of all runs of this process."""
    from dgsnet.config import Config
    from dgsnet.demo.measure import prepare

    return prepare(data, split, Config.from_dict(json.loads(config)))


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


def of(runs: list[Run], task: str, method: str) -> list[Run]:
    return sorted((r for r in runs if (r.task, r.method) == (task, method)), key=lambda run: run.seed)


def values(runs: list[Run], task: str, method: str, key: str) -> np.ndarray:
    """A measure of MEASURES for every seed, as a fraction."""
    return np.array([getattr(run, key) for run in of(runs, task, method)])


@dataclass
class Gain:
    """Paired difference of a method to plain LoRA: same task, seed and images.

    Attributes:
        mean: over seeds, as a fraction.
        error: standard error of the mean; NaN of a single seed.
        won: seeds in which the method has more.
    """

    mean: float
    error: float
    won: int
    seeds: int

    def __str__(self) -> str:
        """In percent points: mean ± standard error (seeds won)."""
        mean = f"{100 * self.mean:+.1f}".replace("-", "\N{MINUS SIGN}")
        return f"{mean} ± {percent(self.error)} ({self.won}/{self.seeds})"


def gain(runs: list[Run], task: str, method: str, key: str) -> Gain:
    """What a method has more of a measure than plain LoRA."""
    differences = values(runs, task, method, key) - values(runs, task, LORA, key)
    n = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Gain(float(differences.mean()), error, int((differences > 0).sum()), n)


def table(runs: list[Run]) -> str:
    """Per task: every method's mean and standard deviation over the seeds, in percent; then the gains."""
    lines = []
    for task in dict.fromkeys(run.task for run in runs):
        methods = list(dict.fromkeys(run.method for run in runs))
        rows = [[f"training images: {task}", *MEASURES.values()]]
        for method in methods:
            cells = [mean_and_spread(values(runs, task, method, key)) for key in MEASURES]
            rows.append([method, *cells])
        for method in methods:
            if method != LORA:
                cells = [str(gain(runs, task, method, key)) for key in MEASURES]
                rows.append([f"{method} \N{MINUS SIGN} LoRA", *cells])
        lines.append(text_table(rows))
    return "\n\n".join(lines)


def mean_and_spread(fractions: np.ndarray) -> str:
    """Mean ± sample standard deviation, in percent; the latter NaN of a single value."""
    spread = float(fractions.std(ddof=1)) if len(fractions) > 1 else math.nan
    return f"{percent(float(fractions.mean()))} ± {percent(spread)}"


def results(runs: list[Run]) -> list[dict]:
    """What results.json holds."""
    return [
        {name: getattr(run, name) for name in ("task", "method", "seed", *MEASURES)}
        | {"seconds": round(run.seconds, 1), "decoders": run.evaluation.by_generator()}
        for run in runs
    ]
