"""A detector's scores beside what files alone say, as rows, columns and sentences of the reports."""

from __future__ import annotations

import math
from typing import Any

from dgsnet.evaluation.metrics import SHORTCUT_COUNTS, SHORTCUT_MEASURES
from dgsnet.evaluation.results import Evaluation, Result, bounded, percent

NO_INTERVAL = (math.nan, math.nan)


def rows(evaluation: Evaluation, *, detailed: bool = True) -> list[list[str]]:
    """Rows of generator and its measures, the mean last, under a head; [] without files.

    `detailed`: with intervals, and the worst group's name.
    """
    result = [["generator", *SHORTCUT_MEASURES.values(), "conflict"]]
    for of in (*evaluation.of(), evaluation.mean_of()):
        if values := evaluation.shortcut_of(of):
            more = details(evaluation, of) if detailed else {}
            intervals, worst = more.get("intervals", {}), more.get("worst_group")
            cells = {key: bounded(values[key], intervals.get(key, NO_INTERVAL)) for key in SHORTCUT_MEASURES}
            if worst:
                cells["worst_group_accuracy"] += f": {worst}"
            agree, conflict = (int(values[key]) for key in SHORTCUT_COUNTS)
            result.append([evaluation.title(of), *cells.values(), f"{conflict} of {agree + conflict}"])
    return result if len(result) > 1 else []


def columns(evaluation: Evaluation, result: Result) -> dict[str, float]:
    """A result's columns of metrics.csv, NaN where not measured; none without files."""
    if not evaluation.shortcuts:
        return {}
    values = evaluation.shortcut_of(result)
    return {key: values.get(key, math.nan) for key in (*SHORTCUT_MEASURES, *SHORTCUT_COUNTS)}


def details(evaluation: Evaluation, result: Result) -> dict[str, Any]:
    """Worst group and intervals of a generator; nothing of a mean."""
    if result.is_mean:
        return {}
    found = evaluation.shortcuts[result.suite, result.generator]
    intervals = {key: list(bounds) for key, bounds in found.intervals.items()}
    return {"worst_group": found.worst_group or None, "intervals": intervals}


def file_probabilities(evaluation: Evaluation) -> dict[int, float]:
    """By a score's id(), what the files alone say; without those of which they say nothing."""
    return {
        id(evaluation.plain[place]): probability
        for key, found in evaluation.shortcuts.items()
        for place, probability in zip(evaluation.read[key], found.probabilities.tolist())
        if not math.isnan(probability) and evaluation.plain[place].generator == key[1]
    }


def sentences(evaluation: Evaluation) -> list[str]:
    """What the figures say, of the generators whose files say something of the label."""
    names = [
        f"{evaluation.title(of)} (AUC {percent(values['conflict_auc'])} and {percent(values['agree_auc'])})"
        for of in evaluation.of()
        if (values := evaluation.shortcut_of(of))
        and evaluation.shortcuts[of.suite, of.generator].intervals.get("file_auc", NO_INTERVAL)[0] > 0.5
    ]
    if not names:
        return []
    return [
        f"Files alone tell the label in part; on images that conflict and that agree: {', '.join(names)}."
    ]


def caption(evaluation: Evaluation) -> str:
    """What the columns mean."""
    whose = "fitted to the audited images" if evaluation.file_model else "cross-validated on these images"
    return (
        "Files alone: AUC of what format, compression, size and metadata say of the label, by a linear model "
        f"{whose}. Images agree where it is right and conflict where it is wrong. Worst group: the lowest "
        "accuracy among real and generated images that agree and that conflict. Explained: the share of the "
        "variance of a class's logits that files explain. A detector that does not follow the files is as "
        "good on images that conflict, and has 0 explained. Percent; in brackets 95% intervals."
    )
