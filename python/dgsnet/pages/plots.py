"""The pictures of evaluation and report: matplotlib figures, one palette, readable without colour vision."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dgsnet.files import replacing

# Okabe and Ito's palette, which survives the common kinds of colour blindness, on white and on black.
REAL, GENERATED = "#009E73", "#D55E00"
CLASSES = ((0, "real", REAL), (1, "generated", GENERATED))
SERIES = ("#8A8F98", "#E69F00", "#2B8CD6", "#CC79A7", "#56B4E9")
MARKERS = ("s", "^", "o", "D", "v")

# Inches of a page-wide figure: the report scales them all alike, so that their letters are of one size.
WIDTH = 10

# Stands for the ink until svg() or save() decides: the page's text colour, or near-black on paper.
INK = "#010203"
# matplotlib's type would list every key there is.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.12,
    **dict.fromkeys((f"axes.{part}color" for part in ("edge", "label", "title")), INK),
    **dict.fromkeys(("grid.color", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    # A folder's name may hold a dollar sign.
    "text.parse_math": False,
}

DASHED: Any = {"color": INK, "linewidth": 0.8, "linestyle": "--", "alpha": 0.6}


@matplotlib.rc_context(STYLE)
def generators(
    by_generator: Mapping[str, Mapping[str, float]],
    mean: Mapping[str, float],
    threshold: float,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """Accuracy on real and on generated images, and AP, best generator first and the mean last.

    All are `metrics` as fractions; a generator's `intervals` are drawn as whiskers.
    """
    order = sorted(by_generator, key=lambda name: -np.nan_to_num(by_generator[name]["accuracy"], nan=-1.0))
    rows = [*((name, by_generator[name]) for name in order), ("mean", mean)]
    y = np.arange(len(rows))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.4 * len(rows)))
    axes = figure.subplots()
    for offset, key, label, color in (
        (-0.19, "real_accuracy", "accuracy on real", REAL),
        (0.19, "generated_accuracy", "accuracy on generated", GENERATED),
    ):
        axes.barh(y + offset, [100 * row[key] for _, row in rows], 0.34, color=color, label=label)
        for i, name in enumerate(order if intervals else ()):
            bounds = 100 * np.array(intervals[name][key])  # type: ignore[index] # there are some
            axes.plot(bounds, [i + offset] * 2, color=INK, linewidth=1.2, alpha=0.7)
    style: Any = {"color": INK, "markeredgecolor": "white", "markersize": 6, "clip_on": False}
    axes.plot([100 * row["ap"] for _, row in rows], y, "D", label="AP", **style)
    axes.axhline(len(rows) - 1.5, color=INK, linewidth=0.8)
    axes.set_yticks(y, [name or "(unnamed)" for name, _ in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, 100), xlabel=f"percent, at threshold {threshold:g}")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def roc_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], auc: Mapping[str, float]) -> Figure:
    """ROC curves, false positives on a logarithmic axis; the worst generators are named, the others faint.

    `curves`: generator to false-positive and true-positive rates, from (0, 0) to (1, 1).
    """
    order = sorted(curves, key=lambda name: auc[name])
    named = order[: len(SERIES)]
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    for name in reversed(order):
        false, found = curves[name]
        style: dict[str, Any] = {"color": INK, "linewidth": 1, "alpha": 0.25}
        if name in named:
            style = {"color": SERIES[named.index(name)], "linewidth": 2}
            style["label"] = f"{name}  {100 * auc[name]:.1f}"
        axes.step(100 * false, 100 * found, where="post", **style)
    chance = np.geomspace(0.1, 100, 100)
    axes.plot(chance, chance, **DASHED)
    for rate in (1, 5):
        axes.axvline(rate, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
    axes.set(xscale="log", xlim=(0.1, 100), ylim=(0, 101))
    axes.set(xlabel="real images called generated, percent", ylabel="generated images found, percent")
    axes.set_xticks([0.1, 1, 5, 10, 100], ["0.1", "1", "5", "10", "100"])
    axes.set_xticks([], minor=True)
    title = "AUC" if len(order) <= len(SERIES) else "lowest AUC"
    figure.legend(loc="outside right upper", title=title, alignment="left", reverse=True)
    return figure


@matplotlib.rc_context(STYLE)
def calibration(
    labels: np.ndarray,
    probabilities: np.ndarray,
    bins: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float],
) -> Figure:
    """Left: how scores are distributed in each class. Right: how many images of a score are generated.

    `bins`: `dgsnet.evaluation.metrics.reliability` of the probabilities [N]. Thresholds are drawn as lines.
    """
    figure = Figure(figsize=(WIDTH, 3.8))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _histograms(left, probabilities, labels, np.linspace(0, 1, 51))
    for (name, at), line in zip(thresholds.items(), ("--", "-.")):
        left.axvline(at, color=INK, linewidth=1, linestyle=line, label=f"threshold {name}")
    left.set(yscale="log", xlim=(0, 1), title="distribution of scores", xlabel="score")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.set_ylabel("percent of the class")
    left.legend()
    right.plot([0, 1], [0, 1], **DASHED)
    sizes = 12 + 200 * np.sqrt(bins["count"] / max(bins["count"].max(), 1))
    right.plot(bins["probability"], bins["generated"], color=SERIES[2], linewidth=1, alpha=0.6)
    right.scatter(bins["probability"], bins["generated"], s=sizes, color=SERIES[2], alpha=0.85, linewidths=0)
    right.set(xlim=(0, 1), ylim=(-0.02, 1.02), title="reliability")
    right.set(xlabel="mean score", ylabel="share of generated images")
    return figure


@matplotlib.rc_context(STYLE)
def robustness(panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """One panel per measure, one row per distortion, a dot with its interval; dashed: undistorted.

    `panels`: title to distortion to (value, low, high) as fractions; the first distortion is none at all.
    """
    names = list(next(iter(panels.values())))
    y = np.arange(len(names))
    figure = Figure(figsize=(WIDTH, 1.1 + 0.32 * len(names)))
    for axes, color, (title, rows) in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), SERIES[2:], panels.items()
    ):
        values, low, high = 100 * np.array(list(rows.values())).T
        axes.axvline(values[0], **DASHED)
        axes.hlines(y, low, high, color=color, linewidth=2.5, alpha=0.45)
        axes.plot(values, y, "o", color=color, markersize=6)
        axes.set(title=title, xlabel="percent")
        axes.set_yticks(y, names)
    axes.invert_yaxis()
    return figure


@matplotlib.rc_context(STYLE)
def intervals(rows: Mapping[str, tuple[float, float, float]], label: str, *, chance: float) -> Figure:
    """Per row a dot with its interval: (value, low, high) as fractions; what is above chance is coloured."""
    y = np.arange(len(rows))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(rows)))
    axes = figure.subplots()
    axes.axvline(100 * chance, **DASHED)
    values, low, high = 100 * np.array(list(rows.values())).T
    colors = np.where(low > 100 * chance, GENERATED, SERIES[0])
    axes.hlines(y, low, high, color=colors, linewidth=2.5, alpha=0.45)
    axes.scatter(values, y, color=colors, s=36, zorder=2)
    axes.set_yticks(y, list(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(min(100 * chance - 15, *low), 100))
    axes.set_xlabel(f"{label}, percent")
    return figure


@matplotlib.rc_context(STYLE)
def by_class(panels: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """How some quantities, title to values [N], are distributed in either class: one panel each."""
    figure = Figure(figsize=(WIDTH, 2.8))
    for axes, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
        _histograms(axes, values, labels, np.histogram_bin_edges(values, 20))
        axes.set_title(title)
    first = figure.axes[0]
    first.set_ylabel("percent of the class")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def methods_by_decoder(
    values: Mapping[str, Mapping[str, Sequence[float]]], label: str, *, chance: float
) -> Figure:
    """Every seed as a small mark and their mean as a large one, per decoder (columns) and method (colour).

    `values`: method to decoder to one value in percent per seed; all methods have the same decoders.
    """
    decoders = list(next(iter(values.values())))
    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    axes.axhline(chance, **DASHED)
    for m, (method, by_decoder) in enumerate(values.items()):
        shift = 0.22 * (m - (len(values) - 1) / 2)
        style: dict[str, Any] = {"marker": MARKERS[m], "color": SERIES[m], "linestyle": "none"}
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


@matplotlib.rc_context(STYLE)
def differences(grid: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """Paired differences: a row of panels per task, a column per measure, a line per method.

    Small marks are the seeds, a large one their mean, the bar one standard error of it to either side.

    `grid`: task to measure to method to one difference per seed, in percent points.
    """
    panels = next(iter(grid.values()))
    figure = Figure(figsize=(WIDTH, 0.6 + 1.7 * len(grid)))
    rows = figure.subplots(len(grid), len(panels), sharex="col", squeeze=False)
    for row, (task, measures) in zip(rows, grid.items()):
        for axes, (title, methods) in zip(row, measures.items()):
            axes.axvline(0, **DASHED)
            for m, values in enumerate(methods.values()):
                style: dict[str, Any] = {"color": SERIES[m], "marker": MARKERS[m]}
                axes.plot(values, [m] * len(values), linestyle="none", markersize=4, alpha=0.45, **style)
                error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
                axes.errorbar(np.mean(values), m, xerr=error, markersize=8, linewidth=2, **style)
            first = axes is row[0]
            axes.set_yticks(range(len(methods)), list(methods) if first else [""] * len(methods))
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.set_title(f"{task}: {title}" if first else title)
    return figure


@matplotlib.rc_context(STYLE)
def curves(runs: Mapping[str, Sequence[Mapping[str, np.ndarray]]], panels: Mapping[str, str]) -> Figure:
    """Training curves: one panel per quantity, one colour per method, a faint line per seed, their mean bold.

    `runs`: method to its seeds, each a table of columns, "step" among them; a column may have NaN gaps.
    """
    figure = Figure(figsize=(WIDTH, 3.2))
    for axes, (column, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
        for color, seeds in zip(SERIES, runs.values()):
            lines = [_without_gaps(seed["step"], seed[column]) for seed in seeds]
            # Few points are marked: a line between them says less than they do.
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


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def feature_maps(maps: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Side-by-side scatter plots of points [N, 2], coloured by label [N] (0 real, 1 generated)."""
    figure = Figure(figsize=(WIDTH, 3.8))
    for axes, (title, points) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items()):
        for (label, name, color), marker in zip(CLASSES, "o^"):
            chosen = points[labels == label].T
            axes.scatter(*chosen, s=12, color=color, marker=marker, alpha=0.75, linewidths=0, label=name)
        axes.set(title=title, xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_alpha(0.25)
    entries = figure.axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper center", ncols=2, markerscale=2)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG (or what the extension says) on white paper."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=150, facecolor="white")


def svg(figure: Figure, description: str) -> Markup:
    """The figure as an inline SVG with the page's text colour as ink; screen readers read `description`."""
    text = io.StringIO()
    # A salt of its own makes the ids of two figures on one page differ, and the file reproducible.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": description}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    # The page, not matplotlib, decides the size.
    (box,) = re.findall(r'<svg[^>]*(viewBox="[^"]*")', text.getvalue())
    body = text.getvalue().partition("<svg")[2].partition(">")[2]
    body = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" '
        f'aria-label="{html.escape(description)}">{body}'
    )
    return Markup(body.replace(INK, "currentColor"))


def _histograms(axes: Any, values: np.ndarray, labels: np.ndarray, edges: np.ndarray) -> None:
    """How values [N] are distributed in either class, in percent of it."""
    for label, name, color in CLASSES:
        if len(chosen := values[labels == label]):
            weights = np.full(len(chosen), 100 / len(chosen))
            axes.hist(chosen, edges, weights=weights, color=color, alpha=0.6, label=name)


def _without_gaps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = ~np.isnan(y)
    return x[keep], y[keep]
