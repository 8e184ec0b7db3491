"""`python -m benchmarks.pictures [RESULTS]`: draws the README's pictures, docs/surgery.svg and docs/demo.svg.

RESULTS is the results.json that a demo leaves: what the picture shows of it replaces results/cpu_demo.json.
Without RESULTS that file is drawn as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
from dgsnet.demo.compare import LORA, MEASURES, gain
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DEMO = Path(__file__).parent / "results" / "cpu_demo.json"
# Okabe and Ito's colours, distinct also to colour-blind eyes.
TASK, HARMFUL, BENEFICIAL, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8F98"
COLOURS = {"linear probe": GREY, "DGS-Net": TASK, "DGS-Net with expert": BENEFICIAL, "twins": "#CC79A7"}
STYLE: Any = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False},
    **{"figure.constrained_layout.use": True, "svg.hashsalt": "dgs-kernels", "savefig.facecolor": "white"},
}


def differences(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Task to measure to method: mean difference to LoRA and its standard error, in percent points."""
    found: Any = [SimpleNamespace(**run) for run in runs]
    tasks, methods = (list(dict.fromkeys(run[key] for run in runs)) for key in ("task", "method"))
    return {
        task: {
            title: {
                method: [round(100 * number, 1) for number in (difference.mean, difference.error)]
                for method in methods
                if method != LORA
                for difference in [gain(found, task, method, measure)]
            }
            for measure, title in MEASURES.items()
        }
        for task in tasks
    }


def demo(found: dict[str, dict[str, dict[str, list[float]]]]) -> Figure:
    """What the methods gain or lose against LoRA: a row of panels per task, a column per measure."""
    panels = next(iter(found.values()))
    figure = Figure(figsize=(10, 0.8 + 1.5 * len(found)))
    rows = figure.subplots(len(found), len(panels), sharex="col", squeeze=False)
    for row, (task, measures) in zip(rows, found.items()):
        for column, (axes, (title, methods)) in enumerate(zip(row, measures.items())):
            axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
            for place, (method, (mean, error)) in enumerate(methods.items()):
                axes.barh(place, mean, 0.7, xerr=error, color=COLOURS[method], ecolor="black", capsize=2)
            axes.set_yticks(range(len(methods)), list(methods) if column == 0 else [""] * len(methods))
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.margins(x=0.15)
            if task == next(iter(found)):
                axes.set_title(title, loc="left")
        row[0].set_ylabel(f"training images:\n{task}")
    figure.supxlabel("percent points above or below LoRA, with standard errors", fontsize=10)
    return figure


def surgery() -> Figure:
    """The two steps on vectors in the plane, by the formulas of docs/method.md."""
    gradient, harmful, beneficial = np.array([1.6, 0.3]), np.array([1.1, -0.6]), np.array([-0.4, 0.8])
    aligned = gradient + 0.5 * beneficial
    direction = harmful / np.linalg.norm(harmful)
    projected = aligned - (aligned @ direction) * direction
    figure = Figure(figsize=(10, 3.2))
    first, second, third = figure.subplots(1, 3, sharex=True, sharey=True)
    arrow(first, gradient, TASK, "the task's gradient", (0.1, 0.1))
    arrow(first, harmful, HARMFUL, "harmful direction", (-0.35, -0.25))
    arrow(first, beneficial, BENEFICIAL, "beneficial direction", (-0.45, 0.12))
    first.set_title("1. three gradients")
    arrow(second, gradient, TASK, "", faint=True)
    arrow(second, 0.5 * beneficial, BENEFICIAL, "", start=gradient)
    arrow(second, aligned, TASK, "aligned", (0, 0.12))
    second.set_title("2. align: add the beneficial one")
    second.plot(*np.outer(direction, [-1, 2]), color=HARMFUL, linewidth=1, linestyle=":")
    third.plot(*np.outer(direction, [-1, 2]), color=HARMFUL, linewidth=1, linestyle=":")
    arrow(third, aligned, TASK, "", faint=True)
    arrow(third, projected - aligned, HARMFUL, "removed", (0.55, -0.15), start=aligned)
    arrow(third, projected, TASK, "what the step follows", (-0.5, 0.18))
    third.set_title("3. project: take the harmful part out")
    for axes in (first, second, third):
        axes.set(xlim=(-0.9, 2.4), ylim=(-1.15, 1.75), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.plot(0, 0, "o", color="black", markersize=4)
    return figure


def arrow(
    axes: Axes,
    vector: np.ndarray,
    colour: str,
    text: str,
    shift: tuple[float, float] = (0, 0),
    *,
    start: np.ndarray | tuple[float, float] = (0, 0),
    faint: bool = False,
) -> None:
    """An arrow with its name at `shift` from its tip."""
    end = np.add(start, vector)
    style = {"color": colour, "alpha": 0.3 if faint else 1, "linewidth": 2.2, "arrowstyle": "-|>"}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 16})
    if text:
        axes.text(*np.add(end, shift), text, color=colour)


def main(words: Sequence[str]) -> None:
    if words:
        found = differences(json.loads(Path(words[0]).read_text()))
        DEMO.write_text(json.dumps(found, indent=1) + "\n")
    with matplotlib.rc_context(STYLE):
        for name, figure in {"surgery": surgery(), "demo": demo(json.loads(DEMO.read_text()))}.items():
            figure.savefig(ROOT / "docs" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
