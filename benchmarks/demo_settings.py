"""Chooses what `dgsnet demo` trains with: on validation photographs, with seeds that it does not report.

One setting is changed at a time from START. The learning rate, which all methods share, is chosen for plain
LoRA, by its AUC averaged over both tasks; what the expert sees and the weight of distillation by the expert's
AUC on the task with the shortcut. The validation images are balanced; their photographs are in no training
set, their decoders are the training's. The test's photographs and decoders are not touched.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

from dgsnet import builtin
from dgsnet.config import Config
from dgsnet.demo import compare as demo

SEEDS = (100, 101, 102)
START = {"lr": 4e-3, "expert": "files", "distillation": 0.3}
CHOICES = {"lr": (2e-3, 4e-3), "expert": tuple(demo.EXPERTS), "distillation": (0.1, 0.3, 1.0)}


def configuration(train: Path, seed: int, setting: str, value: float | str) -> Config:
    """The run in which a setting of START has this value."""
    chosen = START | {setting: value}
    config = builtin.demo_config(train)
    config = replace(config, seed=seed, optim=replace(config.optim, lr=chosen["lr"]))
    if setting == "lr":
        return demo.configurations(config, seed)[demo.LORA]
    return demo.with_expert(config, chosen["expert"], chosen["distillation"])


def jobs(data: Path) -> dict[tuple, tuple[str, int, str, Config]]:
    """(setting, value, task, seed) to a job of `train_all`; what two settings share is trained once."""
    found, named = {}, {}
    for setting, choices in CHOICES.items():
        for task in demo.TASKS if setting == "lr" else (demo.BIASED,):
            for value in choices:
                for seed in SEEDS:
                    config = configuration(demo.training_set(data, task, seed), seed, setting, value)
                    name = named.setdefault((task, config.to_json()), f"{setting} {value}")
                    found[setting, value, task, seed] = (task, seed, name, config)
    return found


def results(arguments: argparse.Namespace) -> list[dict]:
    """A row for each setting and value, and the choice."""
    with tempfile.TemporaryDirectory() as folder:
        data = builtin.write_dataset(Path(folder) / "data", splits=("val",), compressed=(0.5, 0.5))
        planned = jobs(data)
        distinct = {job[:3]: job for job in planned.values()}
        trained = demo.train_all(data, "val", Path(folder) / "runs", list(distinct.values()))
        runs = {(run.task, run.seed, run.method): run for run in trained}
    found = []
    for setting, choices in CHOICES.items():
        for value in choices:
            members = [runs[job[:3]] for key, job in planned.items() if key[:2] == (setting, value)]
            measured = {key: mean(getattr(run, key) for run in members) for key in demo.MEASURES}
            found.append({"benchmark": "demo_settings", "setting": setting, "value": value} | measured)
            print(f"{setting} {value}: " + ", ".join(f"{k} {v:.4f}" for k, v in measured.items()), flush=True)
    chosen = {
        setting: max((row for row in found if row["setting"] == setting), key=lambda row: row["auc"])["value"]
        for setting in CHOICES
    }
    print(f"chosen: {chosen}")
    return [*found, {"benchmark": "demo_settings", "seeds": SEEDS, "start": START, "chosen": chosen}]
