"""Scores of labelled images, and what follows from them: measures per generator, suite and mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from dgsnet.evaluation import published
from dgsnet.evaluation.metrics import CALIBRATED_MEASURES, MEASURES, THRESHOLD, interval, metrics, resampled

if TYPE_CHECKING:
    from dgsnet.audit.shortcuts import FileModel
    from dgsnet.evaluation.shortcuts import FileShortcut

COUNTS = ("n_real", "n_generated", "n_damaged")


@dataclass
class Score:
    """One image of an evaluation; probability is NaN and error says why where it could not be read.

    Attributes:
        category: what kind of picture it is, where its list says so.
    """

    path: str
    generator: str
    label: int
    probability: float
    error: str = ""
    suite: str = ""
    distortion: str = ""
    category: str = ""


@dataclass
class Result:
    """The measures of one generator, or their mean over generators.

    Attributes:
        suite: "" for the mean over all of several.
        generator: "mean" for a mean.
        distortion: "" for none.
        values: measures as fractions, and n_real, n_generated, n_damaged.
        is_mean: a generator may have that name.
    """

    suite: str
    generator: str
    distortion: str
    values: dict[str, float]
    draw: Callable[[], dict[str, np.ndarray]] = field(repr=False)
    is_mean: bool = False

    @cached_property
    def samples(self) -> dict[str, np.ndarray]:
        """Measure to its values in every bootstrap resample."""
        return self.draw()

    def bounded(self, key: str) -> str:
        """A measure in percent, with its interval in brackets."""
        return bounded(self.values[key], self.interval(key))

    def interval(self, key: str) -> tuple[float, float]:
        """Percentile interval of a measure; NaN for ece, which resampling raises above its value."""
        return (math.nan, math.nan) if key == "ece" else interval(self.samples[key])


@dataclass
class Evaluation:
    """Scores of labelled images, and what follows from them. The scores must not be changed afterwards.

    Attributes:
        scores: of every image of every suite, as it is and distorted.
        threshold: an image is called generated where its probability is above it.
        calibrated_threshold: None where the model has no calibration.
        file_model: what files say of the label; None: what these images' own say.
        promised_fpr: how many real images the calibration allows to be called generated.
        frozen: the same images measured by the frozen backbone.
        reencoded: codec:quality of what every image was written as first.
        raw: scores are another program's, any finite numbers, and no probabilities.
    """

    scores: list[Score]
    threshold: float = THRESHOLD
    calibrated_threshold: float | None = None
    # float32 [images, len(NUISANCES)] of the images as they are, in the order of their scores, a row of NaN
    # where there are none; None where files were not looked at.
    nuisances: np.ndarray | None = field(default=None, repr=False, compare=False)
    file_model: FileModel | None = None
    promised_fpr: float | None = None
    frozen: Evaluation | None = field(default=None, repr=False, compare=False)
    # `file_hash` of the images as they are, in the order of their scores; None of what cannot be read.
    hashes: Sequence[int | None] | None = field(default=None, repr=False, compare=False)
    reencoded: str = ""
    raw: bool = False

    @property
    def measures(self) -> dict[str, str]:
        """Key to column title of what was measured."""
        found = MEASURES | (CALIBRATED_MEASURES if self.calibrated_threshold is not None else {})
        return {key: title for key, title in found.items() if not (self.raw and key == "ece")}

    @cached_property
    def suites(self) -> list[str]:
        """The suites, in the order of their scores."""
        return list(dict.fromkeys(s.suite for s in self.scores))

    @cached_property
    def distortions(self) -> list[str]:
        """Names of the distortions, in the order of their scores, without "" for none."""
        return [name for name in dict.fromkeys(s.distortion for s in self.scores) if name]

    @cached_property
    def plain(self) -> list[Score]:
        """The images as they are."""
        return [s for s in self.scores if not s.distortion]

    @cached_property
    def read(self) -> dict[tuple[str, str], list[int]]:
        """(suite, generator) to the places in `plain` of the images it is measured on that could be read."""
        places: dict[tuple[str, str], list[int]] = {key: [] for key in self.members}
        for place, s in enumerate(self.plain):
            if not s.error:
                for generator in self._measured_with(s):
                    places[s.suite, generator].append(place)
        return {key: found for key, found in places.items() if found}

    @cached_property
    def members(self) -> dict[tuple[str, str], set[int]]:
        """(suite, generator) to the labels of its own images, whether they could be read or not."""
        labels: dict[tuple[str, str], set[int]] = {}
        for s in self.scores:
            labels.setdefault((s.suite, s.generator), set()).add(s.label)
        return labels

    @cached_property
    def borrowers(self) -> dict[str, list[str]]:
        """Suite to its generators without real images, where others have no generated ones.

        The others are photographs in a folder of their own, or of a Parquet file's "real": each generator
        that has none is measured against all of them.
        """
        return {
            suite: [name for (its, name), labels in self.members.items() if its == suite and labels == {1}]
            for suite in self.suites
            if any(its == suite and labels == {0} for (its, _), labels in self.members.items())
        }

    def is_lent(self, suite: str, generator: str) -> bool:
        """Whether it is no generator but real images that generators are measured against."""
        return self.members.get((suite, generator)) == {0} and bool(self.borrowers[suite])

    def _measured_with(self, score: Score) -> list[str]:
        """The generators whose measures an image is in."""
        lent = self.is_lent(score.suite, score.generator)
        return [score.generator, *(self.borrowers[score.suite] if lent else [])]

    @property
    def damaged(self) -> list[Score]:
        """The images that could not be read, and those that could not be distorted; they are in no metric."""
        unread = {s.path for s in self.scores if s.error and not s.distortion}
        return [s for s in self.scores if s.error and (not s.distortion or s.path not in unread)]

    @cached_property
    def results(self) -> list[Result]:
        """By distortion: every suite's generators in alphabetical order and their mean; then the mean of all.

        The mean is unweighted, over the generators that have the measure; real images that are lent to them
        count once in its numbers. The last result of a distortion is always the mean over all generators.
        Resamples of a generator depend on nothing but the scores that it is measured on.
        """
        groups: dict[tuple[str, str, str], list[Score]] = {}
        for s in self.scores:
            for generator in self._measured_with(s):
                groups.setdefault((s.distortion, s.suite, generator), []).append(s)
        results = []
        for distortion in ("", *self.distortions):
            generators = []
            for suite in self.suites:
                names = sorted(name for d, its, name in groups if (d, its) == (distortion, suite))
                members = [self._result(name, groups[distortion, suite, name]) for name in names]
                results += [*members, self._mean(members, suite)]
                generators += members
            if len(self.suites) > 1:
                results.append(self._mean(generators, ""))
        return results

    def of(self, distortion: str = "", suite: str | None = None) -> list[Result]:
        """The generators of a distortion, of one suite if given."""
        return [
            r
            for r in self.results
            if r.distortion == distortion and not r.is_mean and suite in (None, r.suite)
        ]

    def mean_of(self, distortion: str = "", suite: str | None = None) -> Result:
        """The mean over the generators of a distortion, of one suite if given."""
        return [r for r in self.results if r.distortion == distortion and suite in (None, r.suite)][-1]

    def by_generator(self, distortion: str = "") -> dict[str, dict[str, float]]:
        """Generator (suite/generator where there are several suites) to its `metrics` and n_damaged."""
        return {self.title(r): r.values for r in self.of(distortion)}

    def mean(self, distortion: str = "") -> dict[str, float]:
        """Unweighted mean over the generators that have the measure (NaN: none has), and total counts."""
        return self.mean_of(distortion).values

    @cached_property
    def shortcuts(self) -> dict[tuple[str, str], FileShortcut]:
        """(suite, generator) to how its scores go with what its files say, of the images as they are."""
        if self.nuisances is None:
            return {}
        from dgsnet.evaluation.shortcuts import file_shortcut

        return {
            key: file_shortcut(
                self.nuisances[chosen],
                np.array([self.plain[i].label for i in chosen]),
                np.array([self.plain[i].probability for i in chosen]),
                self.threshold,
                self.file_model,
                seed=_seed(*key),
            )
            for key, chosen in sorted(self.read.items())
        }

    def shortcut_of(self, result: Result) -> dict[str, float]:
        """What `shortcuts` has of a generator; of a mean, the mean over the generators that have the measure.

        Empty where files were not looked at, and of distorted images.
        """
        if result.distortion:
            return {}
        if not result.is_mean:
            found = self.shortcuts.get((result.suite, result.generator))
            return found.values if found else {}
        members = [
            found.values
            for (suite, name), found in self.shortcuts.items()
            if result.suite in ("", suite) and not self.is_lent(suite, name)
        ]
        return _means(members) if members else {}

    def comparisons(self) -> dict[str, published.Comparison]:
        """Suite to its comparison with published results, where there are any."""
        compared = {
            suite: published.compare(suite, {r.generator: r.values for r in self.of(suite=suite)})
            for suite in self.suites
        }
        return {suite: comparison for suite, comparison in compared.items() if comparison}

    def title(self, result: Result) -> str:
        """A result's name in tables: the suite stands before it where there are several."""
        several = len(self.suites) > 1 and result.suite
        return f"{result.suite}/{result.generator}" if several else result.generator

    def table(self) -> str:
        """The metrics in percent as lines of text, means last; then the mean under each distortion."""
        rows = [(self.title(r), r.values) for r in self.of()]
        if len(self.suites) > 1:
            rows += [(f"mean of {suite}", self.mean_of(suite=suite).values) for suite in self.suites]
        lines = self._text("generator", [*rows, ("mean", self.mean())])
        if self.distortions:
            means = [(name or "none", self.mean(name)) for name in ("", *self.distortions)]
            lines += "\n\n" + self._text("distortion", means)
        return lines

    def _result(self, generator: str, scores: list[Score]) -> Result:
        first, read = scores[0], [s for s in scores if not s.error]
        found = np.array([s.probability for s in read], dtype=np.float64)
        threshold, calibrated = self.threshold, self.calibrated_threshold
        # Their order alone is measured, whatever their range.
        if self.raw:
            own = threshold if calibrated is None else calibrated
            levels = np.unique([*found, threshold, own])
            found, *levelled = (np.searchsorted(levels, x) / len(levels) for x in (found, threshold, own))
            threshold, own = map(float, levelled)
            calibrated = None if calibrated is None else own
        arguments = np.array([s.label for s in read], dtype=np.int8), found, threshold, calibrated
        values = metrics(*arguments) | {"n_damaged": len(scores) - len(read)}
        if self.raw:
            values["ece"] = math.nan
        draw = partial(resampled, *arguments, seed=_seed(first.suite, generator))
        return Result(first.suite, generator, first.distortion, values, draw)

    def _mean(self, results: list[Result], suite: str) -> Result:
        """Of a distortion's generators, of one suite or of all ("")."""
        distortion = results[0].distortion
        members = [r for r in results if not self.is_lent(r.suite, r.generator)]
        own = [s for s in self.scores if s.distortion == distortion and suite in ("", s.suite)]
        read = [s.label for s in own if not s.error]
        counts = dict(zip(COUNTS, (read.count(0), read.count(1), len(own) - len(read))))
        values = _means([member.values for member in members]) | counts
        return Result(suite, "mean", distortion, values, partial(_mean_samples, members), is_mean=True)

    def _text(self, title: str, rows: list[tuple[str, dict[str, float]]]) -> str:
        lines = [[title, *self.measures.values(), "images"]]
        for name, values in rows:
            lines.append([name, *(percent(values[key]) for key in self.measures), str(images(values))])
        return text_table(lines)


def percent(value: float) -> str:
    """A fraction in percent with one decimal; a dash for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def between(bounds: Sequence[float]) -> str:
    """An interval in percent; "" for NaN."""
    low, high = bounds
    return "" if math.isnan(low) else f"{percent(low)}–{percent(high)}"


def bounded(value: float, bounds: Sequence[float]) -> str:
    """A fraction in percent, with its interval in brackets."""
    brackets = between(bounds)
    return percent(value) + (f" ({brackets})" if brackets else "")


def text_table(rows: list[list[str]]) -> str:
    """Aligned lines: the first column to the left, the others to the right, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def images(values: Mapping[str, float]) -> int:
    """How many images a result rests on."""
    return int(values["n_real"] + values["n_generated"])


def _seed(suite: str, generator: str) -> list[int]:
    """Resamples of a generator depend on nothing but its name and its scores."""
    return list(f"{suite}/{generator}".encode(errors="surrogateescape"))


def _means(members: list[dict[str, float]]) -> dict[str, float]:
    """Unweighted means over those that have the measure, and sums of counts."""
    result: dict[str, float] = {}
    for key in members[0]:
        having = [values[key] for values in members if not math.isnan(values[key])]
        mean = math.fsum(having) / len(having) if having else math.nan
        result[key] = sum(having) if key.startswith("n_") else mean
    return result


def _mean_samples(members: list[Result]) -> dict[str, np.ndarray]:
    """Resamples of a mean: its generators are fixed, their images are drawn independently."""
    result = {}
    for key, one in members[0].samples.items():
        having = [m.samples[key] for m in members if not math.isnan(m.values[key])]
        result[key] = np.mean(having, axis=0) if having else one
    return result
