"""Writing an evaluation: JSON, CSV, Markdown, a picture, and one HTML page with everything inside."""

from __future__ import annotations

import base64
import io
import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from dgsnet.config import Crops
from dgsnet.data.cells import row_writer
from dgsnet.data.images import ImageError, read_image
from dgsnet.detection.decisions import DECIMALS
from dgsnet.evaluation import baseline, categories, false_positives, shortcut_tables
from dgsnet.evaluation.metrics import CONFIDENCE, RESAMPLES, reliability, roc
from dgsnet.evaluation.published import AUTHORS_LOG, OFFICIAL, Comparison
from dgsnet.evaluation.results import COUNTS, Evaluation, Result, Score, between, images, percent
from dgsnet.files import write_file
from dgsnet.pages import page, plots

# Below it a generator counts as not recognised, above it the ranking as good.
POOR_AUC, GOOD_AUC = 0.75, 0.95
# Accuracy that a good ranking falls short of where the threshold is wrong.
LOW_ACCURACY = 0.9
MISTAKES = 8
THUMBNAIL = 112


def write_tables(out: str | Path, evaluation: Evaluation, *, raw_cells: bool = False) -> None:
    """Write metrics.json, metrics.csv, metrics.md, metrics.png and scores.csv into the folder `out`.

    `raw_cells`: in the .csv files no apostrophe stands before what a spreadsheet would compute.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "metrics.json", as_json(document(evaluation)))
    write_file(
        out / "metrics.csv", _csv([_row(evaluation, result) for result in evaluation.results], raw_cells)
    )
    write_file(out / "metrics.md", markdown(evaluation).encode(errors="surrogateescape"))
    said = shortcut_tables.file_probabilities(evaluation)
    frozen = evaluation.frozen.scores if evaluation.frozen else []
    beside = {id(s): f for s, f in zip(evaluation.plain, frozen)}
    named = any(s.category for s in evaluation.scores)
    score = {"probability": "score"} if evaluation.raw else {}
    rows = (
        {score.get(key, key): value for key, value in vars(s).items() if named or key != "category"}
        | (
            {"score": "" if s.error else s.probability}
            if evaluation.raw
            else {"probability": _probability(s)}
        )
        | {"files": f"{said[id(s)]:.{DECIMALS}f}" if id(s) in said else ""}
        | ({"frozen": _probability(beside.get(id(s)))} if beside else {})
        for s in evaluation.scores
    )
    write_file(out / "scores.csv", _csv(list(rows), raw_cells))
    figure = plots.generators(evaluation.by_generator(), evaluation.mean(), evaluation.threshold)
    plots.save(figure, out / "metrics.png")


def document(evaluation: Evaluation) -> dict[str, Any]:
    """What metrics.json holds: fractions, counts and intervals; published figures in percent."""

    def with_intervals(result: Result) -> dict[str, Any]:
        measured = {"intervals": {key: list(result.interval(key)) for key in evaluation.measures}}
        if shortcut := evaluation.shortcut_of(result):
            measured["shortcut"] = shortcut | shortcut_tables.details(evaluation, result)
        return result.values | measured

    def part(distortion: str) -> dict[str, Any]:
        suites = evaluation.suites if len(evaluation.suites) > 1 else []
        return {
            "mean": with_intervals(evaluation.mean_of(distortion)),
            "suites": {suite: with_intervals(evaluation.mean_of(distortion, suite)) for suite in suites},
            "generators": {evaluation.title(r): with_intervals(r) for r in evaluation.of(distortion)},
            "false_positives": false_positives.document(evaluation, distortion),
            **({"categories": found} if (found := categories.document(evaluation, distortion)) else {}),
        }

    return {
        "threshold": evaluation.threshold,
        **({"raw": True} if evaluation.raw else {}),
        **({"reencoded": evaluation.reencoded} if evaluation.reencoded else {}),
        "calibrated_threshold": evaluation.calibrated_threshold,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        **part(""),
        **({"frozen": document(evaluation.frozen)} if evaluation.frozen else {}),
        "robustness": {distortion: part(distortion) for distortion in evaluation.distortions},
        "published": {
            suite: {
                "source": AUTHORS_LOG,
                "note": comparison.published.note,
                "percent": published_methods(comparison)[1:],
                "missing": comparison.missing,
            }
            for suite, comparison in evaluation.comparisons().items()
        },
        "damaged": [
            {"path": s.path, "error": s.error, "distortion": s.distortion} for s in evaluation.damaged
        ],
    }


def markdown(evaluation: Evaluation) -> str:
    """The tables as Markdown, with intervals."""
    columns = [*evaluation.measures.values(), "images"]

    def cells(result: Result) -> list[str]:
        return [*(result.bounded(key) for key in evaluation.measures), str(images(result.values))]

    lines = ["# Evaluation", "", _caption(evaluation)]
    for suite in evaluation.suites:
        rows = [
            [r.generator, *cells(r)] for r in [*evaluation.of(suite=suite), evaluation.mean_of("", suite)]
        ]
        lines += markdown_section(page.plain(suite) or "Generators", "", [["generator", *columns], *rows])
    if len(evaluation.suites) > 1:
        rows = [["mean", *cells(evaluation.mean_of())]]
        lines += markdown_section("All suites", "", [["generator", *columns], *rows])
    for title, caption, table in _sections(evaluation):
        lines += markdown_section(title, caption, table)
    if evaluation.distortions:
        rows = [[name or "none", *cells(evaluation.mean_of(name))] for name in ("", *evaluation.distortions)]
        means = [["distortion", *columns], *rows]
        lines += markdown_section("Robustness", "Means over all generators.", means)
    for suite, comparison in evaluation.comparisons().items():
        title, methods = f"{page.plain(suite)}: published results", published_methods(comparison)
        lines += markdown_section(title, _source(comparison), methods)
        lines += ["", *markdown_table(published_generators(comparison))]
    if evaluation.damaged:
        lines += ["", "## Left out", "", *(f"- {page.plain(s.error)}" for s in evaluation.damaged)]
    return "\n".join(lines) + "\n"


def published_methods(comparison: Comparison) -> list[list[str]]:
    """Rows of method, accuracy and AP in percent, under a head: this model, then what is published."""
    count, total = len(comparison.generators), len(comparison.published.generators)
    rows = [["method", "generators", "accuracy", "AP"]]
    rows.append(["this model", f"{count} of {total}", *_one_decimal(comparison.own)])
    if count < total:
        rows.append([f"{OFFICIAL}, published", f"the same {count}", *_one_decimal(comparison.official)])
    for method, figures in comparison.published.methods.items():
        rows.append([f"{method}, published", f"all {total}", *_one_decimal(figures)])
    return rows


def published_generators(comparison: Comparison) -> list[list[str]]:
    """Rows of generator, own and published accuracy, own and published AP in percent, under a head."""
    rows = [["generator", "accuracy", "published", "AP", "published"]]
    for name, accuracy, ap, published_accuracy, published_ap in comparison.generators:
        rows.append([name, *_one_decimal((accuracy, published_accuracy, ap, published_ap))])
    return rows


def write_page(
    path: str | Path, evaluation: Evaluation, *, model: str, views: int = 1, crops: Crops = 1
) -> None:
    """Write the HTML page; `model` is the model's folder, as it was given."""
    # Only its version is wanted; whoever has something to write has imported it.
    import torch

    mean = evaluation.mean_of()
    suites = [_suite(evaluation, suite) for suite in evaluation.suites]
    text = page.render(
        Path(__file__).with_name("evaluation.html"),
        title=f"Evaluation of {model}",
        model=model,
        views=views,
        crops=crops,
        evaluation=evaluation,
        verdict=verdict(evaluation),
        tiles=[
            {"title": title, "value": percent(mean.values[key]), "interval": between(mean.interval(key))}
            for key, title in evaluation.measures.items()
        ],
        mean=mean,
        suites=suites,
        caption=_caption(evaluation),
        pooled=_pooled_figures(evaluation),
        sections=_sections(evaluation),
        robustness=_robustness(evaluation),
        mistakes=_mistakes(evaluation),
        images=images(mean.values),
        source=AUTHORS_LOG,
        machine=f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}",
    )
    write_file(Path(path), text.encode(errors="surrogateescape"))


def verdict(evaluation: Evaluation) -> list[str]:
    """What the numbers say, as sentences."""
    generators, mean = evaluation.of(), evaluation.mean_of()
    count = f"{len(generators)} generators" if len(generators) > 1 else "one generator"
    sentences = [
        f"Over {count}: accuracy {mean.bounded('accuracy')} at the threshold "
        f"{evaluation.threshold:g}, AUC {mean.bounded('auc')}, AP {mean.bounded('ap')}."
    ]
    if not math.isnan(mean.values["tpr_at_1"]):
        sentences.append(
            f"With one false alarm per hundred real images, {mean.bounded('tpr_at_1')} of generated "
            f"images are found; with five, {mean.bounded('tpr_at_5')}."
        )

    def names(test: Callable[[dict[str, float]], bool]) -> str:
        chosen = sorted((r for r in generators if test(r.values)), key=lambda r: r.values["auc"])
        return ", ".join(f"{evaluation.title(r)} (AUC {percent(r.values['auc'])})" for r in chosen)

    if poor := names(lambda v: v["auc"] < POOR_AUC):
        sentences.append(f"Not told apart (AUC below {percent(POOR_AUC)}): {poor}.")
    if misplaced := names(lambda v: v["auc"] >= GOOD_AUC and v["accuracy"] < LOW_ACCURACY):
        sentences.append(
            f"The ranking is right and the threshold {evaluation.threshold:g} is wrong: {misplaced}."
        )
    if evaluation.frozen:
        beside = evaluation.frozen.mean_of()
        sentences.append(
            f"The frozen backbone with a linear head: accuracy {beside.bounded('accuracy')}, AUC "
            f"{beside.bounded('auc')}."
        )
    if evaluation.distortions and not math.isnan(mean.values["auc"]):
        drops = {name: mean.values["auc"] - evaluation.mean(name)["auc"] for name in evaluation.distortions}
        worst = max(drops, key=drops.__getitem__)
        change = f"{-100 * drops[worst]:+.1f}".replace("-", "\N{MINUS SIGN}")
        sentences.append(f"Of the distortions {worst} costs most: {change} points of AUC.")
    sentences += false_positives.sentences(evaluation) + categories.sentences(evaluation)
    sentences += shortcut_tables.sentences(evaluation)
    if evaluation.damaged:
        lost = len(evaluation.damaged)
        which = (
            "1 image could not be read and is" if lost == 1 else f"{lost} images could not be read and are"
        )
        sentences.append(f"{which} in no figure.")
    return sentences


def _sections(evaluation: Evaluation) -> list[tuple[str, str, list[list[str]]]]:
    """Title, caption and rows, under a head, of the tables that not every evaluation has."""
    parts = {
        "False positives by source": false_positives,
        "By category": categories,
        "Beside the frozen backbone": baseline,
        "Beside what the files alone say": shortcut_tables,
    }
    return [
        (name, of.caption(evaluation), rows) for name, of in parts.items() if (rows := of.rows(evaluation))
    ]


def _caption(evaluation: Evaluation) -> str:
    calibrated = evaluation.calibrated_threshold
    at = "" if calibrated is None else f", calibrated ones at {calibrated:g}"
    first = f"Every image was written as {evaluation.reencoded} first. " if evaluation.reencoded else ""
    return (
        f"{first}Percent; in brackets the {CONFIDENCE:.0%} bootstrap interval. Decisions at "
        f"{evaluation.threshold:g}{at}. TPR@1%: share of generated images found while at most 1% of these "
        "real images are called generated. ECE: expected calibration error. Means are unweighted over "
        "generators."
    )


def _source(comparison: Comparison) -> str:
    missing = f" Not measured here: {', '.join(comparison.missing)}." if comparison.missing else ""
    return (
        f"At the threshold 0.5; {comparison.published.note}. Published figures of {OFFICIAL} are from "
        f"{AUTHORS_LOG}, those of other methods from the paper; none was measured here.{missing}"
    )


def _suite(evaluation: Evaluation, suite: str) -> dict[str, Any]:
    """What the page shows of one suite."""
    members = evaluation.of(suite=suite)
    comparison = evaluation.comparisons().get(suite)
    values = {r.generator: r.values for r in members}
    intervals = {
        r.generator: {key: r.interval(key) for key in ("real_accuracy", "generated_accuracy", "ap")}
        for r in members
    }
    mean = evaluation.mean_of("", suite)
    both = [r for r in members if r.values["n_real"] and r.values["n_generated"]]
    title = f"by generator{' of ' + suite if suite else ''}"
    figure = plots.generators(values, mean.values, evaluation.threshold, intervals)
    curves = {r.generator: roc(*_arrays(evaluation, suite, r.generator)) for r in both}
    return {
        "name": suite,
        "rows": [
            {
                "name": r.generator,
                "mean": r.is_mean,
                "cells": [(percent(r.values[k]), between(r.interval(k))) for k in evaluation.measures],
                "images": images(r.values),
                "damaged": int(r.values["n_damaged"]),
            }
            for r in [*members, mean]
        ],
        "figure": plots.svg(figure, f"accuracy and AP {title}"),
        "roc": plots.svg(
            plots.roc_curves(curves, {r.generator: r.values["auc"] for r in both}), f"ROC curves {title}"
        )
        if both
        else None,
        "published": comparison
        and {
            "methods": published_methods(comparison),
            "generators": published_generators(comparison),
            "source": _source(comparison),
        },
    }


def _arrays(evaluation: Evaluation, suite: str, generator: str) -> tuple[list[int], list[float]]:
    scores = [evaluation.plain[i] for i in evaluation.read[suite, generator]]
    return [s.label for s in scores], [s.probability for s in scores]


def _read(evaluation: Evaluation) -> list[Score]:
    """The images as they are that could be read."""
    return [s for s in evaluation.plain if not s.error]


def _probability(score: Score | None) -> str:
    """As scores.csv has it; "" where there is none."""
    return "" if score is None or score.error else f"{score.probability:.{DECIMALS}f}"


def _pooled_figures(evaluation: Evaluation) -> Markup | None:
    """Distribution of scores and reliability, over all images."""
    scores = _read(evaluation)
    if not scores or evaluation.raw:
        return None
    labels = np.array([s.label for s in scores])
    probabilities = np.array([s.probability for s in scores])
    thresholds = {f"{evaluation.threshold:g}": evaluation.threshold}
    if evaluation.calibrated_threshold is not None:
        thresholds["calibrated"] = evaluation.calibrated_threshold
    figure = plots.calibration(labels, probabilities, reliability(labels, probabilities), thresholds)
    return plots.svg(figure, "distribution of scores, and how often images of a score are generated")


def _robustness(evaluation: Evaluation) -> dict[str, Any] | None:
    """Means under every distortion, and AUC by generator and distortion."""
    if not evaluation.distortions:
        return None
    names = ["", *evaluation.distortions]
    means = {name or "none": evaluation.mean_of(name) for name in names}
    keys = {"auc": "AUC", "accuracy": f"accuracy at {evaluation.threshold:g}", "tpr_at_5": "TPR at 5% FPR"}
    figure = plots.robustness(
        {
            title: {name: (r.values[key], *r.interval(key)) for name, r in means.items()}
            for key, title in keys.items()
        }
    )
    by_name = {name: {(r.suite, r.generator): r for r in evaluation.of(name)} for name in names}
    rows = []
    for which, plain in by_name[""].items():
        auc = [by_name[name][which].values["auc"] for name in names]
        # Shade: how much of the way from the undistorted AUC to guessing is lost.
        span = max(auc[0] - 0.5, 0.05)
        shades = [0 if math.isnan(a) else round(100 * min(max((auc[0] - a) / span, 0), 1)) for a in auc]
        rows.append({"name": evaluation.title(plain), "cells": list(zip(map(percent, auc), shades))})
    return {"figure": plots.svg(figure, "measures under distortions"), "names": list(means), "rows": rows}


def _mistakes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The wrong decisions furthest from the threshold, of either class, with small pictures."""
    sections = []
    for label, title in ((0, "Real, called generated"), (1, "Generated, called real")):
        wrong = [
            s
            for s in _read(evaluation)
            if s.label == label and (s.probability > evaluation.threshold) != label
        ]
        wrong.sort(key=lambda s: (s.probability if label else -s.probability, s.path))
        total = sum(s.label == label for s in _read(evaluation))
        shown = [{"score": s, "picture": thumbnail(s.path)} for s in wrong[:MISTAKES]]
        sections.append({"title": title, "count": len(wrong), "total": total, "shown": shown})
    return sections


def thumbnail(path: str) -> str | None:
    """The picture as base64 JPEG; None where it cannot be read any more."""
    try:
        picture = Image.fromarray(read_image(path))
    except ImageError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _row(evaluation: Evaluation, result: Result) -> dict[str, Any]:
    """A line of metrics.csv."""
    row: dict[str, Any] = {key: getattr(result, key) for key in ("suite", "generator", "distortion")}
    for key in evaluation.measures:
        low, high = result.interval(key)
        row |= {key: result.values[key], f"{key}_low": low, f"{key}_high": high}
    row |= {key: result.values[key] for key in COUNTS}
    row |= shortcut_tables.columns(evaluation, result)
    return {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def markdown_section(title: str, caption: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A table under a title and, if it is not empty, a caption, which both are Markdown."""
    return ["", f"## {title}", "", *([caption, ""] if caption else []), *markdown_table(rows)]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    escaped = [[page.plain(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]


def _one_decimal(values: Sequence[float]) -> list[str]:
    """Percent to text."""
    return [percent(value / 100) for value in values]


def as_json(value: Any) -> bytes:
    """JSON, which has no NaN: null."""
    return (
        json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2) + "\n"
    ).encode()


def _csv(rows: list[dict[str, Any]], raw: bool) -> bytes:
    text = io.StringIO(newline="")
    write = row_writer(text, raw=raw)
    write(rows[0])
    for row in rows:
        write(row[name] for name in rows[0])
    # File names that are not UTF-8 are written as the bytes they are.
    return text.getvalue().encode(errors="surrogateescape")
