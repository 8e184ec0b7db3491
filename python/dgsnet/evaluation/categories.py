"""Rates by category of image (night, screenshot, ...), where the lists of an evaluation name them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dgsnet.data.items import CLASSES
from dgsnet.detection.categories import CONFIDENCE, CategoryRate, category_rates
from dgsnet.evaluation.false_positives import broken_promise, is_above, threshold_of
from dgsnet.evaluation.results import Evaluation, between, percent


def rates(evaluation: Evaluation, distortion: str = "") -> tuple[CategoryRate, ...]:
    """Of every category, of all suites together, at the threshold of `threshold_of`."""
    read = [s for s in evaluation.scores if s.distortion == distortion and not s.error]
    called = [s.probability > threshold_of(evaluation) for s in read]
    return category_rates([s.category for s in read], [s.label for s in read], called)


def document(evaluation: Evaluation, distortion: str) -> list[dict[str, Any]]:
    """What metrics.json holds of it."""
    return [asdict(r) | {"rate": r.rate} for r in rates(evaluation, distortion)]


def rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows of a table under a head; empty where no category is named."""
    found = [
        [r.name, CLASSES[r.label], str(r.n), str(r.called), percent(r.rate), between((r.low, r.high))]
        for r in rates(evaluation)
    ]
    head = ["category", "images are", "images", "called generated", "%", f"{CONFIDENCE:.0%} interval"]
    return [head, *found] if found else []


def caption(evaluation: Evaluation) -> str:
    """What the table shows."""
    at = f"at the threshold {threshold_of(evaluation):g}"
    return f"Images called generated {at}. Clopper-Pearson intervals."


def sentences(evaluation: Evaluation) -> list[str]:
    """A warning where real images of a category are called generated more often than was promised."""
    real = [r for r in rates(evaluation) if not r.label]
    above = {r.name: r for r in real if is_above(evaluation, r.called, r.n, len(real))}
    return broken_promise(evaluation, above, "real images of the category", "these")
