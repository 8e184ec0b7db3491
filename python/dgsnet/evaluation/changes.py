"""Two detectors on the same images: which of them one decides rightly and the other does not."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dgsnet.data.cells import row_writer
from dgsnet.evaluation.metrics import CONFIDENCE
from dgsnet.evaluation.results import Score, bounded, percent, text_table

ALL = "all"


@dataclass(frozen=True)
class Change:
    """How many of n images are decided rightly by two detectors, `before` and `after`.

    Attributes:
        gained: by `after` alone.
        lost: by `before` alone.
    """

    both: int
    gained: int
    lost: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.gained + self.lost + self.neither

    @property
    def before(self) -> float:
        """Accuracy of the first detector."""
        return (self.both + self.lost) / self.n

    @property
    def after(self) -> float:
        """Accuracy of the second."""
        return (self.both + self.gained) / self.n

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def p_value(self) -> float:
        """McNemar's test (1947), exact and two-sided: of gains and losses that are as likely as each other.

        The binomial probability of a split as uneven as this one; 1 where nothing changed.
        """
        from scipy.stats import binomtest

        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed).pvalue) if changed else 1.0

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Of the difference: Newcombe's square-and-add interval for paired proportions.

        Newcombe 1998 (Statistics in Medicine 17:2635), method 10: Wilson's score intervals of the two
        accuracies, added up as their correlation over the images asks, that with a continuity correction.
        """
        from scipy.stats import binomtest

        n = self.n
        (low, high), (low_before, high_before) = (
            binomtest(right, n).proportion_ci(confidence, "wilson")
            for right in (self.both + self.gained, self.both + self.lost)
        )
        product: float = self.both * self.neither - self.gained * self.lost
        if product > 0:
            product = max(product - n / 2, 0)
        margins = self.after * (1 - self.after) * self.before * (1 - self.before)
        correlation = product / (n * n * math.sqrt(margins)) if margins > 0 else 0.0

        def added(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0))

        down = added(self.after - low, high_before - self.before)
        up = added(high - self.after, self.before - low_before)
        return self.difference - down, self.difference + up


@dataclass(frozen=True)
class Group:
    """The changes of one generator, or of all: of its images, of the real and of the generated ones."""

    suite: str
    generator: str
    images: Change
    real: Change
    generated: Change

    def to_dict(self) -> dict[str, Any]:
        """Counts, accuracies, the difference with its interval and McNemar's p, as JSON holds them."""
        low, high = self.images.interval()
        values: dict[str, Any] = {
            "suite": self.suite,
            "generator": self.generator,
            "n": self.images.n,
            "accuracy_before": self.images.before,
            "accuracy_after": self.images.after,
            "difference": self.images.difference,
            "difference_low": low,
            "difference_high": high,
            "gained": self.images.gained,
            "lost": self.images.lost,
            "mcnemar_p": self.images.p_value,
        }
        for name, part in (("real", self.real), ("generated", self.generated)):
            values |= {f"n_{name}": part.n, f"gained_{name}": part.gained, f"lost_{name}": part.lost}
        return values


def compare(before: Sequence[Score], after: Sequence[Score], threshold: float) -> list[Group]:
    """What changed from one detector to another, by suite and generator; all of each of several suites after.

    An image that either could not read counts nowhere; both decide at one threshold. ValueError if the scores
    are not of the same images in the same order.
    """
    pairs = list(_pairs(before, after))
    suites = list(dict.fromkeys(old.suite for old, _ in pairs))
    groups = []
    for suite in suites:
        generators = sorted({old.generator for old, _ in pairs if old.suite == suite})
        for name in generators:
            members = [pair for pair in pairs if (pair[0].suite, pair[0].generator) == (suite, name)]
            groups.append(_group(suite, name, members, threshold))
        if len(generators) > 1:
            groups.append(_group(suite, ALL, [pair for pair in pairs if pair[0].suite == suite], threshold))
    return groups


def table(groups: Sequence[Group]) -> str:
    """Groups as lines of text: percentages, and counts of gains and losses (real + generated)."""
    rows = [["", "images", "before", "after", "difference", "gained", "lost", "McNemar's p"]]
    for group in groups:
        name = f"{group.suite}/{group.generator}" if group.suite else group.generator
        change, real, generated = group.images, group.real, group.generated
        row = [name, str(change.n), percent(change.before), percent(change.after)]
        row += [bounded(change.difference, change.interval())]
        row += [f"{change.gained} ({real.gained} + {generated.gained})"]
        row += [f"{change.lost} ({real.lost} + {generated.lost})", f"{change.p_value:.2g}"]
        rows.append(row)
    return text_table(rows)


def per_image(before: Sequence[Score], after: Sequence[Score], threshold: float) -> str:
    """CSV, a row for every image: both probabilities, and whether its right decision was gained or lost."""
    text = io.StringIO()
    write = row_writer(text, lineterminator="\n")
    write(["suite", "generator", "path", "label", "before", "after", "change", "error"])
    for old, new in zip(before, after, strict=True):
        error = old.error or new.error
        change = "" if error else _change(old, new, threshold)
        place = [old.suite, old.generator, old.path, old.label]
        write([*place, *("" if s.error else s.probability for s in (old, new)), change, error])
    return text.getvalue()


def _pairs(before: Sequence[Score], after: Sequence[Score]) -> Iterable[tuple[Score, Score]]:
    for old, new in zip(before, after, strict=True):
        if (old.suite, old.path) != (new.suite, new.path):
            raise ValueError(f"scores of other images: {old.path} stands beside {new.path}")
        if not (old.error or new.error):
            yield old, new


def _group(suite: str, generator: str, pairs: Sequence[tuple[Score, Score]], threshold: float) -> Group:
    def counted(*labels: int) -> Change:
        words = [_change(old, new, threshold) for old, new in pairs if old.label in labels]
        return Change(*(words.count(word) for word in ("kept", "gained", "lost", "wrong")))

    return Group(suite, generator, counted(0, 1), counted(0), counted(1))


def _change(old: Score, new: Score, threshold: float) -> str:
    was, now = ((score.probability > threshold) == bool(score.label) for score in (old, new))
    return {(True, True): "kept", (False, True): "gained", (True, False): "lost"}.get((was, now), "wrong")
