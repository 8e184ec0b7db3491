"""The demo's report: one HTML file with everything inside, whose sentences are made from the numbers."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from dgsnet.config import Config
from dgsnet.data.items import Item
from dgsnet.demo import compare as demo
from dgsnet.demo.measure import conflicting
from dgsnet.evaluation.metrics import CONFIDENCE
from dgsnet.pages import page, plots

EXAMPLES_PER_DECODER = 1
# Mean AUC below which no order of the methods is worth a word.
NEAR_CHANCE = 0.55
COLORS = dict(zip(demo.METHODS, plots.SERIES))
TITLES = {demo.BALANCED: "Balanced training images", demo.BIASED: "Training images with a JPEG shortcut"}
SPOKEN = demo.MEASURES | {"auc_conflicting": "AUC on conflicting images", "zero_shot": "zero-shot accuracy"}


def write(
    path: str | Path,
    runs: list[demo.Run],
    *,
    samples: Mapping[str, Sequence[Item]],
    maps: Mapping[str, np.ndarray],
    map_labels: np.ndarray,
    seconds: float,
) -> None:
    """Write the report of runs of every task, method and seed.

    `samples`: name of a set to its images. `maps`: title to t-SNE points [N, 2]. `seconds`: of the demo.
    """
    first = demo.of(runs, demo.BIASED, demo.EXPERT)[0]
    decoders = list(first.evaluation.by_generator())
    auc = {
        method: {
            d: [100 * run.evaluation.by_generator()[d]["auc"] for run in demo.of(runs, demo.BIASED, method)]
            for d in decoders
        }
        for method in demo.METHODS
    }
    curves = {method: [run.curves for run in demo.of(runs, demo.BIASED, method)] for method in demo.METHODS}
    figures = {
        "gains": plots.svg(plots.differences(_differences(runs)), "differences to LoRA, seed by seed"),
        "auc": plots.svg(
            plots.methods_by_decoder(auc, "AUC (percent)", chance=50), "AUC by decoder and method"
        ),
        "curves": plots.svg(
            plots.curves(curves, {"image_loss": "loss (training)", "accuracy": "accuracy (training)"}),
            "training curves by method",
        ),
        "maps": plots.svg(plots.feature_maps(maps, map_labels), "t-SNE of the test images' features"),
    }
    text = page.render(
        Path(__file__).with_name("report.html"),
        figures=figures,
        methods=demo.METHODS,
        colors=COLORS,
        measures=demo.MEASURES,
        tables={TITLES[task]: _table(runs, task) for task in demo.TASKS},
        verdict=verdict(runs),
        sets=[_set(name, members) for name, members in samples.items()],
        examples=_examples(runs, decoders),
        config=Config.load(first.folder / "config.json"),
        twins=Config.load(demo.of(runs, demo.BIASED, demo.TWINS)[0].folder / "config.json"),
        steps=int(first.curves["step"].max()),
        seeds=sorted({run.seed for run in runs}),
        map_count=len(map_labels),
        model=_shown(Path(path).parent / "model"),
        minutes=f"{seconds / 60:.1f}",
        machine=f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}",
    )
    Path(path).write_text(text, encoding="utf-8")


def verdict(runs: list[demo.Run]) -> list[str]:
    """What the numbers say, as sentences: each way beyond plain LoRA against it, task by task."""
    sentences = []
    for task, title in TITLES.items():
        for method in (demo.DGSNET, demo.EXPERT, demo.TWINS):
            gains = {name: demo.gain(runs, task, method, key) for key, name in SPOKEN.items()}
            found = ", ".join(f"{name} {value}: {said(value)}" for name, value in gains.items())
            sentences.append(f"{title}, {method} against plain LoRA: {found}.")
        if demo.values(runs, task, demo.LORA, "auc").mean() < NEAR_CHANCE:
            sentences.append("There LoRA is not far from guessing, so differences in AUC mean little.")
    seeds = len(demo.of(runs, demo.BIASED, demo.LORA))
    return [
        *sentences,
        "Percent points, mean ± standard error (seeds in which it is higher). “More” and “less”: the "
        f"{CONFIDENCE:.0%} interval over {seeds} seeds leaves out 0. It covers the seeds and their training "
        "images, not other photographs or decoders.",
    ]


def said(found: demo.Gain) -> str:
    """A gain in a word: whether its interval of CONFIDENCE, by Student's t, holds 0."""
    reach = student.ppf((1 + CONFIDENCE) / 2, found.seeds - 1) * found.error if found.seeds > 1 else np.inf
    if abs(found.mean) <= reach:
        return "not told apart"
    return "more" if found.mean > 0 else "less"


def _differences(runs: list[demo.Run]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {
        task: {
            title: {
                method: (
                    100 * (demo.values(runs, task, method, key) - demo.values(runs, task, demo.LORA, key))
                ).tolist()
                for method in demo.METHODS
            }
            for key, title in demo.MEASURES.items()
        }
        for task in demo.TASKS
    }


def _shown(path: Path) -> str:
    """A path as one would type it here: relative if it lies below."""
    below = path.resolve().is_relative_to(Path.cwd())
    return os.path.relpath(path) if below else str(path.resolve())


def _table(runs: list[demo.Run], task: str) -> list[dict[str, Any]]:
    """Rows of a task's table; the best mean of a column is marked."""
    means = {key: {m: demo.values(runs, task, m, key).mean() for m in demo.METHODS} for key in demo.MEASURES}
    return [
        {
            "method": method,
            "cells": [
                {
                    "text": demo.mean_and_spread(demo.values(runs, task, method, key)),
                    "gain": "" if method == demo.LORA else str(demo.gain(runs, task, method, key)),
                    "best": means[key][method] == max(means[key].values()),
                }
                for key in demo.MEASURES
            ],
            "seconds": f"{np.mean([run.seconds for run in demo.of(runs, task, method)]):.0f}",
        }
        for method in demo.METHODS
    ]


def _set(name: str, samples: Sequence[Item]) -> dict[str, Any]:
    def count(label: int) -> str:
        members = [sample.path for sample in samples if sample.label == label]
        return f"{len(members)} ({sum(path.endswith('.jpg') for path in members)})"

    decoders = sorted({sample.generator for sample in samples})
    return {"name": name, "real": count(0), "generated": count(1), "decoders": ", ".join(decoders)}


def _examples(runs: list[demo.Run], decoders: list[str]) -> list[dict[str, Any]]:
    """Test images drawn by lot, per decoder, class and file format, with every score of the first seed."""
    rng = np.random.default_rng(0)
    shown = {method: demo.of(runs, demo.BIASED, method)[0].evaluation.scores for method in demo.METHODS}
    scores = shown[demo.LORA]
    examples = []
    for decoder in decoders:
        for label in (0, 1):
            for misleading in (False, True):
                pool = [
                    i
                    for i, s in enumerate(scores)
                    if (s.generator, s.label, conflicting(s)) == (decoder, label, misleading)
                ]
                for i in rng.choice(pool, min(EXAMPLES_PER_DECODER, len(pool)), replace=False):
                    path = Path(scores[i].path)
                    kind = "jpeg" if path.suffix == ".jpg" else "png"
                    bars = [
                        {"method": method, "probability": p, "right": (p > 0.5) == label}
                        for method in demo.METHODS
                        for p in [shown[method][i].probability]
                    ]
                    picture = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
                    words = f"{decoder}, {kind.upper()}{', conflicting' if misleading else ''}"
                    examples.append({"words": words, "label": label, "picture": picture, "bars": bars})
    return examples
