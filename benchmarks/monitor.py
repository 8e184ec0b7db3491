"""How often `dgsnet monitor` raises an alarm, and how soon: beside a test of fixed size, looked at daily.

Streams of reviewed real images, of which each is called generated with one probability. At the promised one
every alarm is false, and anytime validity allows them in LEVEL of all streams, ever. The other test is what
one would do at hand: each day Clopper and Pearson's test of all images so far, at the same level, which holds
for one look alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from dgsnet.detection.monitor import LEVEL, levels, log_e_values
from dgsnet.pages import plots
from scipy.stats import binom

STREAMS, IMAGES = 10_000, 10_000
PROMISED = 0.01
RATES = (PROMISED, 0.02, 0.03, 0.1)
# Images a day.
DAILY = 100
# They share the images of a stream, each with its own test.
SOURCES = 4
# Streams in memory.
TOGETHER = 500


def boundary(images: int, promised: float, level: float) -> np.ndarray:
    """False positives from which the martingale raises an alarm, after each image, [images]."""
    first, number = np.empty(images, np.int64), np.arange(images + 1)
    most = 0
    for n in range(1, images + 1):
        # It rises by one at most with each image.
        while log_e_values(n, number[most], promised) < np.log(1 / level) and most <= n:
            most += 1
        first[n - 1] = most
    return first


def daily(images: int, promised: float, level: float, each: int = DAILY) -> np.ndarray:
    """The same of the test of a fixed size, at the end of each day; elsewhere more than there can be."""
    first = np.full(images, images + 1)
    at = np.arange(each, images + 1, each)
    first[at - 1] = binom.isf(level, at, promised).astype(np.int64) + 1
    return first


def alarms(wrong: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Images until the alarm of each stream [N, images]; infinity where there is none."""
    reached = np.cumsum(wrong, axis=1, dtype=np.int32) >= first
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)


def simulate(streams: int = STREAMS, images: int = IMAGES, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of each rate and test the share of streams with an alarm, and the median of images until then."""
    per_source = images // SOURCES
    tests = {
        "monitor": [boundary(images, PROMISED, LEVEL)],
        f"monitor, {SOURCES} sources": [
            boundary(per_source, PROMISED, level) for level in levels(SOURCES, named=True)
        ],
        "fixed size, looked at daily": [daily(images, PROMISED, LEVEL)],
    }
    rng = np.random.default_rng(seed)
    for rate in RATES:
        found: dict[str, list[np.ndarray]] = {name: [] for name in tests}
        for begin in range(0, streams, TOGETHER):
            wrong = rng.random((min(TOGETHER, streams - begin), images), np.float32) < rate
            for name, bounds in tests.items():
                # The sources' images come in turns.
                each = [alarms(wrong[:, i :: len(bounds)][:, : len(b)], b) for i, b in enumerate(bounds)]
                turns = [len(bounds) * (at - 1) + i + 1 for i, at in enumerate(each)]
                found[name].append(np.min(turns, axis=0))
        for name, parts in found.items():
            at = np.concatenate(parts)
            median = float(np.median(at))
            yield {
                "benchmark": "monitor",
                "rate": rate,
                "test": name,
                "alarms": float(np.isfinite(at).mean()),
                "median_images": median if np.isfinite(median) else None,
                "by_then": [float((at <= n).mean()) for n in shown(images)],
            }


def shown(images: int) -> list[int]:
    """Numbers of images that the plot shows."""
    return [n for n in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if n <= images]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of streams with an alarm against their images, a panel for each rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    for panel, rate in zip(panels, RATES):
        for row in rows:
            if row["rate"] == rate:
                panel.semilogx(shown(IMAGES)[: len(row["by_then"])], row["by_then"], label=row["test"])
        panel.axhline(LEVEL, color="0.6", linewidth=0.8, linestyle="--")
        panel.set_title(
            f"{rate:.0%} called generated" + (", as promised" if rate == PROMISED else ""), fontsize=9
        )
        panel.set_xlabel("reviewed images")
    panels[0].set_ylabel("streams with an alarm")
    panels[0].legend(fontsize=7, loc="upper left")
    panels[0].set_ylim(0, 1.02)
    plots.save(figure, path)


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows; the plot is beside the results."""
    rows = []
    for row in simulate():
        rows.append(row)
        median = f"median {row['median_images']:.0f} images" if row["median_images"] else "no median"
        print(
            f"{row['rate']:.0%}  {row['test']:28} alarms in {row['alarms']:.2%} of streams, {median}",
            flush=True,
        )
        yield row
    plot(rows, arguments.out.with_suffix(".png"))
