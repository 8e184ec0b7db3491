"""How many real images are called generated, source by source: beside what a calibration promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgsnet.detection.categories import CONFIDENCE, rate_interval
from dgsnet.evaluation.results import Evaluation, between, percent


@dataclass(frozen=True)
class SourceRate:
    """The false-positive rate of one source of real images.

    `exceeds`: so many are above what was promised that chance does not explain it, at the level of
    1 - CONFIDENCE for all sources together (binomial test, Bonferroni's correction).

    Attributes:
        source: the generator, with its suite where there are several, beside which the real images lie.
        n: its real images.
        wrong: those called generated.
        low, high: Clopper and Pearson's interval of the rate.
    """

    source: str
    n: int
    wrong: int
    low: float
    high: float
    exceeds: bool

    @property
    def rate(self) -> float:
        return self.wrong / self.n


def threshold_of(evaluation: Evaluation) -> float:
    calibrated = evaluation.calibrated_threshold
    return evaluation.threshold if calibrated is None else calibrated


def is_above(evaluation: Evaluation, wrong: int, n: int, of: int) -> bool:
    """Whether a rate of wrong / n is above what was promised, by a test at 1 - CONFIDENCE for all `of`."""
    from scipy.stats import binom

    promised = evaluation.promised_fpr
    return promised is not None and float(binom.sf(wrong - 1, n, promised)) < (1 - CONFIDENCE) / of


def source_rates(evaluation: Evaluation, distortion: str = "") -> list[SourceRate]:
    """The rate of every source that has real images, at the threshold of `threshold_of`."""
    counts: dict[tuple[str, str], list[int]] = {}
    for s in evaluation.scores:
        if not s.label and not s.error and s.distortion == distortion:
            count = counts.setdefault((s.suite, s.generator), [0, 0])
            count[0] += 1
            count[1] += s.probability > threshold_of(evaluation)
    rates = []
    for result in evaluation.of(distortion):
        if n_wrong := counts.get((result.suite, result.generator)):
            n, wrong = n_wrong
            exceeds = is_above(evaluation, wrong, n, len(counts))
            rates.append(SourceRate(evaluation.title(result), n, wrong, *rate_interval(wrong, n), exceeds))
    return rates


def document(evaluation: Evaluation, distortion: str) -> dict[str, Any]:
    """What metrics.json holds of it."""
    sources = {
        r.source: {"n": r.n, "wrong": r.wrong, "rate": r.rate}
        | {"interval": [r.low, r.high], "exceeds": r.exceeds}
        for r in source_rates(evaluation, distortion)
    }
    return {"threshold": threshold_of(evaluation), "promised": evaluation.promised_fpr, "sources": sources}


def rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows of a table under a head; empty without real images."""
    found = [
        [r.source, str(r.n), str(r.wrong), percent(r.rate), between((r.low, r.high))]
        for r in source_rates(evaluation)
    ]
    head = ["real images of", "images", "called generated", "%", f"{CONFIDENCE:.0%} interval"]
    return [head, *found] if found else []


def caption(evaluation: Evaluation) -> str:
    """What the table shows."""
    promised = evaluation.promised_fpr
    meant = "the model is not calibrated"
    if promised is not None:
        meant = f"calibrated for at most {percent(promised)}% of images like the calibration's"
    at = f"at the threshold {threshold_of(evaluation):g}"
    return f"Real images called generated {at}; {meant}. Clopper-Pearson intervals."


def sentences(evaluation: Evaluation) -> list[str]:
    """A warning where a source has more false positives than were promised."""
    above = {r.source: r for r in source_rates(evaluation) if r.exceeds}
    return broken_promise(evaluation, above, "real images of", "that source")


def broken_promise(evaluation: Evaluation, above: Mapping[str, Any], whose: str, remedy: str) -> list[str]:
    """The warning of rates above the promised one, by name; none of none."""
    if not above:
        return []
    named = ", ".join(f"{name} ({percent(r.rate)}%, {between((r.low, r.high))})" for name, r in above.items())
    return [
        f"The calibrated rate of {percent(evaluation.promised_fpr or 0)}% false positives does not hold for "
        f"{whose}: {named}. Calibrate with a --reals of {remedy}."
    ]
