"""Decoders that arrive one after the other: what `dgsnet update` learns and forgets under each of its rules.

The built-in tiny CLIP is trained as the demo's DGS-Net on three decoders (docs/builtin.md). Then others
arrive in turn, each an update of the detector before, with the images of all earlier decoders to replay.
After each it is measured on every decoder, on photographs that no training has seen: accuracy at 0.5 and AUC.
With one seed all rules start from the same detector and see the same new images in the same order.

Settings, which all rules share, are chosen first, for plain replay, on validation photographs, with seeds
that are not reported and the first arrival alone: one is changed at a time from START, and the best AUC
taken, half of the old decoders and half of the new one. What the result file holds is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
import torch
from dgsnet import builtin
from dgsnet.config import Config
from dgsnet.data.images import read_image
from dgsnet.data.items import FOLDERS
from dgsnet.data.preprocess import Preprocessor
from dgsnet.evaluation.metrics import metrics
from dgsnet.model.checkpoint import load_model
from dgsnet.training.train import train
from dgsnet.training.update import Rule, update
from torch import Tensor

NAME, CHOICE = "update", "update_settings"
RULES, MEASURES, GROUPS = get_args(Rule), ("auc", "accuracy"), ("old", "new", "all")
SEEDS = range(8)
# Those of the test's five decoders that training on nothing else teaches most, on validation photographs.
BASE, ARRIVALS = builtin.FAMILIES["train"], ("bilinear", "codebook", "resizeconv")
# Share of JPEG files, in both classes.
COMPRESSED = 0.5
# Images of each class and decoder, and a seed that no training has.
TEST_IMAGES, TEST_SEED = 60, 10**6

CHOICE_RULE, CHOICE_SEEDS, CHOICE_ARRIVALS = "replay", (100, 101, 102), ARRIVALS[:1]
START = {"lr": 2e-3, "steps": 20, "replay_share": 0.5}
# More steps, or more replayed images, would take more time than the study may.
CHOICES = {"lr": (1e-3, 2e-3, 4e-3), "steps": (10, 20), "replay_share": (0.25, 0.5)}


def write_images(folder: Path, family: str, seed: int) -> str:
    """Training images of one decoder, as a dataset folder of its name."""
    for label, name in enumerate(FOLDERS):
        place = folder / family / name
        place.mkdir(parents=True, exist_ok=True)
        count = builtin.COUNTS["train"]
        files = builtin.make_files("train", family, label, count, seed=seed, compressed=COMPRESSED)
        for number, (data, _) in enumerate(files):
            ending = "jpg" if data.startswith(builtin.JPEG_MAGIC) else "png"
            (place / f"{number:04d}.{ending}").write_bytes(data)
    return str(folder / family)


@cache
def exam(split: str, settings: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and labels of the images that every detector is measured on, by decoder."""
    preprocess = Preprocessor(Config.from_dict(json.loads(settings)).preprocess)
    found = {}
    for family in (*BASE, *ARRIVALS):
        files = [
            (data, label)
            for label in (0, 1)
            for data, _ in builtin.make_files(
                split, family, label, TEST_IMAGES, seed=TEST_SEED, compressed=COMPRESSED
            )
        ]
        pixels = torch.stack([preprocess(read_image(data)) for data, _ in files])
        found[family] = pixels, torch.tensor([label for _, label in files])
    return found


@torch.inference_mode()
def measured(run: Path, split: str) -> dict[str, dict[str, float]]:
    """Accuracy and AUC of a run's detector on every decoder."""
    model, config = load_model(run)
    plain = Config(preprocess=config.preprocess).to_json()
    found: dict[str, dict[str, float]] = {"accuracy": {}, "auc": {}}
    for family, (pixels, labels) in exam(split, plain).items():
        values = metrics(labels.numpy(), torch.sigmoid(model.logits(pixels).double()).numpy())
        for key in found:
            found[key][family] = values[key]
    return found


def start(folder: Path, seed: int) -> Path:
    """The detector of the first three decoders, and the images of all."""
    run = folder / f"start-{seed}"
    if not run.exists():
        data = folder / f"data-{seed}"
        builtin.write_dataset(data, seed=seed, splits=("train",), compressed=(COMPRESSED, COMPRESSED))
        for family in ARRIVALS:
            write_images(data, family, seed)
        train(replace(builtin.demo_config(data, steps=150), seed=seed), run)
    return run


def chain(folder: Path, seed: int, rule: Rule, chosen: dict, split: str, arrivals: tuple) -> Iterator[dict]:
    """A row for the detector before anything arrives, and after each arrival."""
    run, data = start(folder, seed), folder / f"data-{seed}"
    yield {"seed": seed, "rule": rule, "arrived": ""} | measured(run, split)
    old = [str(data / "train" / family) for family in BASE]
    for number, family in enumerate(arrivals, 1):
        before = time.perf_counter()
        following = folder / f"{seed}-{rule}-{number}-{'-'.join(map(str, chosen.values()))}"
        run = update(run, [str(data / family)], old, following, rule=rule, test=[], **chosen)
        seconds = round(time.perf_counter() - before, 2)
        row = {"seed": seed, "rule": rule, "arrived": family, "seconds": seconds}
        yield row | measured(run, split)
        old.append(str(data / family))


def summary(row: dict, key: str) -> dict[str, float]:
    """A measure after an arrival, by GROUPS: mean over decoders known before, the new one, mean over all."""
    known = (*BASE, *ARRIVALS[: ARRIVALS.index(row["arrived"])])
    values = [row[key][family] for family in known], row[key][row["arrived"]]
    return dict(zip(GROUPS, (mean(values[0]), values[1], mean([*values[0], values[1]]))))


def choose(folder: Path, kept: list[dict]) -> Iterator[dict]:
    """A row for every value of every setting: AUC after the arrival, of old decoders and the new, by seed."""
    done = {str(row["settings"]): {"auc": row["auc"]} for row in kept if row["benchmark"] == CHOICE}
    for name, values in CHOICES.items():
        for value in values:
            chosen = START | {name: value}
            row = done.get(str(chosen)) or {"auc": ends(folder, chosen)}
            done[str(chosen)] = row
            case = {"benchmark": CHOICE, "device": "cpu", "setting": name, "value": value, "settings": chosen}
            yield case | row


def ends(folder: Path, chosen: dict) -> list[float]:
    """For each seed the AUC after the arrival, half of the old decoders' and half of the new one's."""
    found = []
    for seed in CHOICE_SEEDS:
        *_, last = chain(folder, seed, CHOICE_RULE, chosen, "val", CHOICE_ARRIVALS)
        of = summary(last, "auc")
        found.append((of["old"] + of["new"]) / 2)
    return found


def study(folder: Path, kept: list[dict], chosen: dict) -> Iterator[dict]:
    """The rows of every chain, with the settings chosen."""
    case = {"benchmark": NAME, "device": "cpu", "settings": chosen}
    for seed in SEEDS:
        for rule in RULES:
            wanted = case | {"seed": seed, "rule": rule}
            rows = [row for row in kept if wanted.items() <= row.items()]
            whole = len(rows) == 1 + len(ARRIVALS)
            for row in rows if whole else chain(folder, seed, rule, chosen, "test", ARRIVALS):
                yield case | row


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    """The rows of the choice, then those of the study, as they are made; what is in the file is kept."""
    torch.set_num_threads(1)
    kept = json.loads(arguments.out.read_text())["results"] if arguments.out.is_file() else []
    found = []
    with tempfile.TemporaryDirectory() as name:
        for row in quietly(choose(Path(name), kept)):
            yield row
            found.append(row)
            print(line(row), flush=True)
        chosen = best(found)
        print(f"chosen: {chosen}", flush=True)
        for row in quietly(study(Path(name), kept, chosen)):
            yield row
            found.append(row)
            print(line(row), flush=True)
    print(f"\n{table(found)}")


def best(rows: list[dict]) -> dict[str, float]:
    """The value of each setting with the highest mean AUC."""
    rows = [row for row in rows if row["benchmark"] == CHOICE]
    return {row["setting"]: row["value"] for row in sorted(rows, key=lambda row: mean(row["auc"]))}


def line(row: dict) -> str:
    if row["benchmark"] == CHOICE:
        return f"{row['setting']} {row['value']:g}: AUC {mean(row['auc']):.4f}"
    place = f"seed {row['seed']}, {row['rule']}, {row['arrived'] or 'start'}"
    if not row["arrived"]:
        return place
    return f"{place}: " + ", ".join(f"{name} {value:.4f}" for name, value in summary(row, "auc").items())


def table(rows: list[dict]) -> str:
    """Markdown, in percent, means over seeds with standard errors: after every arrival by rule, then paired
    differences between rules, of the mean over arrivals."""
    # Of each seed the values of a line.
    found: dict[tuple, list[list[float]]] = {}
    for row in (row for row in rows if row["benchmark"] == NAME and row["arrived"]):
        values = [summary(row, key)[group] for key in MEASURES for group in GROUPS]
        found.setdefault((row["arrived"], row["rule"]), []).append(values)
    arrivals = list(dict.fromkeys(arrival for arrival, _ in found))
    head = ["arrived", "rule", *(f"{key}, {group}" for key in MEASURES for group in GROUPS)]
    lines = [head, ["---"] * len(head)]
    places = [(arrival, rule) for arrival in arrivals for rule in RULES]
    lines += [[*place, *cells(found[place], "")] for place in places]
    means = {rule: np.mean([found[arrival, rule] for arrival in arrivals], axis=0) for rule in RULES}
    for base in [rule for rule in ("none", "replay") if rule in RULES]:
        for rule in RULES[: RULES.index(base)]:
            lines.append(["mean", f"{rule} \N{MINUS SIGN} {base}", *cells(means[rule] - means[base], "+")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(values: Sequence, sign: str) -> list[str]:
    """Mean and standard error of the columns of [seeds, columns]."""
    percents = 100 * np.asarray(values)
    count = len(percents)
    errors = percents.std(axis=0, ddof=1) / count**0.5 if count > 1 else np.full(len(percents[0]), np.nan)
    pairs = zip(percents.mean(axis=0), errors)
    return [f"{value:{sign}.1f} ± {error:.1f}".replace("-", "\N{MINUS SIGN}") for value, error in pairs]


def quietly(rows: Iterator[dict]) -> Iterator[dict]:
    """The rows, without what is printed while they are made."""
    with open(os.devnull, "w") as nowhere:
        while True:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                row = next(rows, None)
            if row is None:
                return
            yield row
