"""The pictures of evaluation and report: matplotlib figures, one palette, readable without colour vision."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's palette, which survives the common kinds of colour blindness, on white and on black.
REAL, GENERATED = "#009E73", "#D55E00"
SERIES = ("#8A8F98", "#E69F00", "#2B8CD6", "#CC79A7", "#56B4E9")
MARKERS = ("s", "^", "o", "D", "v")

# Inches of a page-wide figure: the report scales them all alike, so that their letters are of one size.
WIDTH = 10

# Stands for the ink until svg() or save() decides: the page's text colour, or near-black on paper.
INK = "#010203"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
}


def generators(
    by_generator: Mapping[str, Mapping[str, float]], mean: Mapping[str, float], threshold: float
) -> Figure:
    """Accuracy on real and on generated images, and AP, best generator first and the mean last."""
    order = sorted(by_generator, key=lambda name: -np.nan_to_num(by_generator[name]["accuracy"], nan=-1.0))
    rows = [*((name, by_generator[name]) for name in order), ("mean", mean)]
    y = np.arange(len(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.4 + 0.42 * len(rows)))
        axes = figure.subplots()
        for offset, key, label, color in (
            (-0.19, "real_accuracy", "accuracy on real", REAL),
            (0.19, "generated_accuracy", "accuracy on generated", GENERATED),
        ):
            axes.barh(y + offset, [100 * row[key] for _, row in rows], 0.34, color=color, label=label)
        axes.plot(
            [100 * row["ap"] for _, row in rows],
            y,
            "D",
            color=INK,
            markeredgecolor="white",
            markersize=6,
            label="AP",
            clip_on=False,
        )
        axes.axhline(len(rows) - 1.5, color=INK, linewidth=0.8)
        axes.set_yticks(y, [name or "(unnamed)" for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"percent, at threshold {threshold:g}")
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def methods_by_decoder(
    values: Mapping[str, Mapping[str, Sequence[float]]], label: str, *, chance: float
) -> Figure:
    """Every seed as a small mark and their mean as a large one, per decoder (columns) and method (colour).

    Args:
        values: method to decoder to one value in percent per seed; all methods have the same decoders.
        label: what the values are.
        chance: value of guessing, drawn as a dashed line.
    """
    decoders = list(next(iter(values.values())))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4))
        axes = figure.subplots()
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
        for m, (method, by_decoder) in enumerate(values.items()):
            shift = 0.22 * (m - (len(values) - 1) / 2)
            style = {"marker": MARKERS[m], "color": SERIES[m], "linestyle": "none"}
            for d, decoder in enumerate(decoders):
                seeds = by_decoder[decoder]
                axes.plot([d + shift] * len(seeds), seeds, markersize=4, alpha=0.55, **style)
            means = [np.mean(by_decoder[decoder]) for decoder in decoders]
            axes.plot(np.arange(len(decoders)) + shift, means, markersize=8, label=method, **style)
        axes.set_xticks(range(len(decoders)), decoders, rotation=25 if len(decoders) > 8 else 0)
        axes.set_xlim(-0.6, len(decoders) - 0.4)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(label)
        figure.legend(loc="outside upper center", ncols=len(values))
    return figure


def curves(runs: Mapping[str, Sequence[Mapping[str, np.ndarray]]], panels: Mapping[str, str]) -> Figure:
    """Training curves: one panel per quantity, one colour per method, a faint line per seed, their mean bold.

    Args:
        runs: method to its seeds, each a table of columns, "step" among them; a column may have NaN gaps.
        panels: column to the panel's title.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        for axes, (column, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
            for color, seeds in zip(SERIES, runs.values()):
                lines = [_without_gaps(seed["step"], seed[column]) for seed in seeds]
                # Few points are told from the line between them.
                style = {"color": color, "marker": "o" if len(lines[0][0]) < 20 else None}
                for x, y in lines:
                    axes.plot(x, y, linewidth=1, markersize=2, alpha=0.3, **style)
                if all(np.array_equal(x, lines[0][0]) for x, _ in lines):
                    mean = np.mean([y for _, y in lines], axis=0)
                    axes.plot(lines[0][0], mean, linewidth=2, markersize=4, **style)
            axes.set_title(title)
            axes.set_xlabel("step")
        handles = [Line2D([], [], color=color, linewidth=2) for color in SERIES[: len(runs)]]
        figure.legend(handles, list(runs), loc="outside upper center", ncols=len(runs))
    return figure


def feature_maps(maps: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Side-by-side scatter plots of points [N, 2], coloured by label [N] (0 real, 1 generated)."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 3.8))
        for axes, (title, points) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items()):
            for label, name, color, marker in ((0, "real", REAL, "o"), (1, "generated", GENERATED, "^")):
                chosen = points[labels == label]
                legend = name if axes is figure.axes[0] else None
                axes.scatter(
                    *chosen.T, s=12, color=color, marker=marker, alpha=0.75, linewidths=0, label=legend
                )
            axes.set_title(title)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_aspect("equal", adjustable="datalim")
            for spine in axes.spines.values():
                spine.set_visible(True)
                spine.set_alpha(0.25)
        figure.legend(loc="outside upper center", ncols=2, markerscale=2)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG (or what the extension says) on white paper."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")


def svg(figure: Figure, description: str) -> str:
    """The figure as an inline SVG with the page's text colour as ink; screen readers read `description`."""
    text = io.StringIO()
    # A salt of its own makes the ids of two figures on one page differ, and the file reproducible.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": description}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    # The page, not matplotlib, decides the size.
    box = re.search(r'viewBox="[^"]*"', text.getvalue())[0]
    body = text.getvalue().partition("<svg")[2].partition(">")[2]
    body = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{description}">{body}'
    )
    return body.replace(INK, "currentColor")


def _without_gaps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = ~np.isnan(y)
    return x[keep], y[keep]
