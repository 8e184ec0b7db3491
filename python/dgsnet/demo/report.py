"""The demo's report: one HTML file with everything inside, whose sentences are made from the numbers."""

from __future__ import annotations

import base64
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from dgsnet.config import Config
from dgsnet.data.samples import Sample
from dgsnet.demo.compare import DGSNET, LORA, MEASURES, METHODS, Run, by_seed, first, mean_and_spread
from dgsnet.evaluation.results import percent
from dgsnet.pages import page, plots

EXAMPLES_PER_DECODER = 2
# Mean AUC below which no order of the methods is worth a word.
NEAR_CHANCE = 0.55
COLORS = dict(zip(METHODS, plots.SERIES))


def write(
    path: str | Path,
    runs: list[Run],
    *,
    samples: Mapping[str, Sequence[Sample]],
    maps: Mapping[str, np.ndarray],
    map_labels: np.ndarray,
    seconds: float,
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        runs: every method with every seed.
        samples: split ("train", "val", "test") to its images.
        maps: title to t-SNE points [N, 2].
        map_labels: [N], 0 real, 1 generated.
        seconds: time of the whole demo.
    """
    config = Config.load(first(runs, DGSNET).folder / "config.json")
    decoders = list(runs[0].evaluation.by_generator())
    auc = {
        method: {d: [100 * v for v in by_seed(runs, method, "auc", d)] for d in decoders}
        for method in METHODS
    }
    curves = {method: [run.curves for run in runs if run.method == method] for method in METHODS}
    panels = {
        "image_loss": "loss (training)",
        "accuracy": "accuracy (training)",
        "val_auc": "AUC (validation)",
    }
    figures = {
        "auc": plots.svg(
            plots.methods_by_decoder(auc, "AUC (percent)", chance=50), "AUC by decoder and method"
        ),
        "curves": plots.svg(plots.curves(curves, panels), "training curves by method"),
        "maps": plots.svg(plots.feature_maps(maps, map_labels), "t-SNE of the test images' features"),
    }
    text = page.render(
        Path(__file__).with_name("report.html"),
        figures={name: Markup(svg) for name, svg in figures.items()},
        methods=METHODS,
        colors=COLORS,
        measures=MEASURES,
        table=_table(runs),
        decoder_table=_decoder_table(runs, decoders),
        verdict=verdict(runs),
        splits=[_split(name, split) for name, split in samples.items()],
        examples=_examples(runs, decoders),
        config=config,
        steps=int(first(runs, DGSNET).curves["step"].max()),
        seeds=sorted({run.seed for run in runs}),
        map_count=len(map_labels),
        model=_shown(Path(path).parent / "model"),
        minutes=f"{seconds / 60:.1f}",
        machine=f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}",
    )
    Path(path).write_text(text, encoding="utf-8")


def verdict(runs: list[Run]) -> list[str]:
    """What the numbers say, as sentences: the order of the methods, and surgery against none seed by seed."""
    auc = {method: by_seed(runs, method, "auc") for method in METHODS}
    order = sorted(METHODS, key=lambda method: -np.mean(auc[method]))
    ranking = ", ".join(f"{method} {_plus_minus(auc[method])}" for method in order)
    gains = [100 * (a - b) for a, b in zip(auc[DGSNET], auc[LORA])]
    mean_gain = _signed(float(np.mean(gains)))
    by_seed_text = ", ".join(map(_signed, gains))
    if min(gains) > 0:
        meaning = "DGS-Net ranks unseen decoders better than LoRA with every seed"
    elif max(gains) < 0:
        meaning = "DGS-Net ranks unseen decoders worse than LoRA with every seed: surgery did not help here"
    else:
        meaning = "The sign changes from seed to seed: this run does not tell the two apart"
    meaning += f"; {len(gains)} seeds are few."
    if np.mean(auc[order[0]]) < NEAR_CHANCE:
        meaning += " No method is far from guessing, so the order of the methods means little."
    accuracy = {method: by_seed(runs, method, "accuracy") for method in METHODS}
    return [
        f"By AUC, averaged over test decoders: {ranking}.",
        f"DGS-Net minus LoRA, seed by seed: {by_seed_text} points of AUC, on average {mean_gain}.",
        meaning,
        "Accuracy at the threshold 0.5: "
        + ", ".join(f"{method} {_plus_minus(accuracy[method])}" for method in order)
        + ". Guessing gives 50 in both.",
    ]


def _plus_minus(values: list[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{percent(mean)} ± {percent(spread)}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _shown(path: Path) -> str:
    """A path as one would type it here: relative if it lies below."""
    below = path.resolve().is_relative_to(Path.cwd())
    return os.path.relpath(path) if below else str(path.resolve())


def _table(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of the main table; the best mean of a column is marked."""
    means = {k: {m: mean_and_spread(by_seed(runs, m, k))[0] for m in METHODS} for k in MEASURES}
    return [
        {
            "method": method,
            "cells": [
                {
                    "text": _plus_minus(by_seed(runs, method, key)),
                    "best": means[key][method] == max(means[key].values()),
                }
                for key in MEASURES
            ],
            "seconds": f"{np.mean([run.seconds for run in runs if run.method == method]):.0f}",
        }
        for method in METHODS
    ]


def _decoder_table(runs: list[Run], decoders: list[str]) -> list[dict[str, Any]]:
    """Accuracy per decoder and method, with that on real and generated images."""

    def cell(method: str, decoder: str) -> dict[str, str]:
        keys = ("accuracy", "real_accuracy", "generated_accuracy")
        return {key: percent(float(np.mean(by_seed(runs, method, key, decoder)))) for key in keys}

    return [
        {"decoder": decoder, "cells": [cell(method, decoder) for method in METHODS]} for decoder in decoders
    ]


def _split(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    labels = Counter(sample.label for sample in samples)
    decoders = sorted({sample.generator for sample in samples})
    return {"name": name, "real": labels[0], "generated": labels[1], "decoders": ", ".join(decoders)}


def _examples(runs: list[Run], decoders: list[str]) -> list[dict[str, Any]]:
    """Images drawn by lot, some of either class per decoder, with every method's score (first seed)."""
    rng = np.random.default_rng(0)
    shown = {method: first(runs, method).evaluation.scores for method in METHODS}
    scores = shown[DGSNET]
    examples = []
    for decoder in decoders:
        for label in (0, 1):
            pool = [
                i for i, s in enumerate(scores) if s.generator == decoder and s.label == label and not s.error
            ]
            for i in rng.choice(pool, min(EXAMPLES_PER_DECODER, len(pool)), replace=False):
                picture = base64.b64encode(Path(scores[i].path).read_bytes()).decode()
                bars = [
                    {"method": method, "probability": p, "right": (p > 0.5) == label}
                    for method in METHODS
                    for p in [shown[method][i].probability]
                ]
                examples.append({"decoder": decoder, "label": label, "picture": picture, "bars": bars})
    return examples
