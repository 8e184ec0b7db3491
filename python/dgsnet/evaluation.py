"""Measuring a detector: labelled images, per generator and as the unweighted mean over generators."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet import published, robustness
from dgsnet.calibration import DECIMALS
from dgsnet.detector import Detector
from dgsnet.errors import UserError
from dgsnet.journal import Journal
from dgsnet.metrics import CALIBRATED_MEASURES, MEASURES, THRESHOLD, interval, metrics, resampled

if TYPE_CHECKING:
    from dgsnet.data import Sample
    from dgsnet.robustness import Distortion

COUNTS = ("n_real", "n_generated", "n_damaged")
# Scores as they are made, one line each: what a killed evaluation goes on from.
JOURNAL = "scores.jsonl"


@dataclass
class Score:
    """One image of an evaluation; probability is NaN and error says why where it could not be read."""

    path: str
    generator: str
    label: int
    probability: float
    error: str = ""
    suite: str = ""
    distortion: str = ""


@dataclass
class Result:
    """The measures of one generator, or their mean over generators.

    Attributes:
        suite: the test suite; "" for the mean over all of several.
        generator: the generator, "mean" for a mean.
        distortion: what was done to the images; "" for nothing.
        values: measures as fractions, and n_real, n_generated, n_damaged.
        is_mean: told from a generator of that name.
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

    def interval(self, key: str) -> tuple[float, float]:
        """Percentile interval of a measure; NaN for ece, which resampling raises above its value."""
        return (math.nan, math.nan) if key == "ece" else interval(self.samples[key])


@dataclass
class Evaluation:
    """Scores of labelled images, and what follows from them. The scores must not be changed afterwards.

    Attributes:
        scores: every image of every suite, as it is and distorted.
        threshold: an image is called generated where its probability is above it.
        calibrated_threshold: that of the model's calibration; None where it has none.
    """

    scores: list[Score]
    threshold: float = THRESHOLD
    calibrated_threshold: float | None = None

    @property
    def measures(self) -> dict[str, str]:
        """Key to column title of what was measured."""
        return MEASURES | (CALIBRATED_MEASURES if self.calibrated_threshold is not None else {})

    @cached_property
    def suites(self) -> list[str]:
        """The suites, in the order of their scores."""
        return list(dict.fromkeys(s.suite for s in self.scores))

    @cached_property
    def distortions(self) -> list[str]:
        """Names of the distortions, in the order of their scores, without "" for none."""
        return [name for name in dict.fromkeys(s.distortion for s in self.scores) if name]

    @property
    def damaged(self) -> list[Score]:
        """The images that could not be read, and those that could not be distorted; they are in no metric."""
        unread = {s.path for s in self.scores if s.error and not s.distortion}
        return [s for s in self.scores if s.error and (not s.distortion or s.path not in unread)]

    @cached_property
    def results(self) -> list[Result]:
        """By distortion: every suite's generators in alphabetical order and their mean; then the mean of all.

        The mean is unweighted, over the generators that have the measure. The last result of a distortion is
        always the mean over all generators. Resamples of a generator depend on nothing but its own scores.
        """
        groups: dict[tuple[str, str, str], list[Score]] = {}
        for s in self.scores:
            groups.setdefault((s.distortion, s.suite, s.generator), []).append(s)
        results = []
        for distortion in ("", *self.distortions):
            generators = []
            for suite in self.suites:
                names = sorted(name for d, its, name in groups if (d, its) == (distortion, suite))
                members = [self._result(groups[distortion, suite, name]) for name in names]
                results += [*members, _mean(members, suite)]
                generators += members
            if len(self.suites) > 1:
                results.append(_mean(generators, ""))
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

    def save(self, out: str | Path) -> None:
        """Write metrics.json, .csv, .md and .png and scores.csv into the folder `out`."""
        from dgsnet import evaluation_report

        evaluation_report.write_tables(out, self)

    def _result(self, scores: list[Score]) -> Result:
        first, read = scores[0], [s for s in scores if not s.error]
        arguments = (
            np.array([s.label for s in read], dtype=np.int8),
            np.array([s.probability for s in read], dtype=np.float64),
            self.threshold,
            self.calibrated_threshold,
        )
        values = metrics(*arguments) | {"n_damaged": len(scores) - len(read)}
        seed = list(f"{first.suite}/{first.generator}".encode(errors="surrogateescape"))
        draw = partial(resampled, *arguments, seed=seed)
        return Result(first.suite, first.generator, first.distortion, values, draw)

    def _text(self, title: str, rows: list[tuple[str, dict[str, float]]]) -> str:
        lines = [[title, *self.measures.values(), "images"]]
        for name, values in rows:
            lines.append([name, *(percent(values[key]) for key in self.measures), str(images(values))])
        return text_table(lines)


def evaluate(
    detector: Detector,
    samples: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    *,
    threshold: float = THRESHOLD,
    distortions: Sequence[Distortion] = (),
    journal: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score labelled images; one that cannot be read is kept with its error and counted in no metric.

    Args:
        detector: the model; the threshold of its calibration, if it has one, is measured too.
        samples: what `dgsnet.data.find_samples` found, or suite to that.
        threshold: decision threshold of the accuracies.
        distortions: each is measured on all images, besides the images as they are.
        journal: file that keeps the logits as they are made. Scores already in it are not made again.
        workers: as in `Detector.predict`.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the journal is of another model or of other images.
    """
    from tqdm import tqdm

    if not isinstance(samples, Mapping):
        samples = {"": samples}
    listed = [(suite, sample) for suite, members in samples.items() for sample in members]
    kept = Journal(journal, detector, listed) if journal else None
    scores = []
    variants = [("", detector), *((d.name, _distorting(detector, d)) for d in distortions)]
    with tqdm(total=len(variants) * len(listed), unit="image", disable=not progress) as bar:
        for name, scorer in variants:
            done = dict(kept.rows.get(name, {})) if kept else {}
            bar.update(len(done))
            if progress:
                bar.initial += len(done)  # not part of the speed shown
            missing = [i for i in range(len(listed)) if i not in done]
            stream = scorer.stream_logits([listed[i][1].item for i in missing], workers=workers)
            for index, (logit, error) in zip(missing, stream):
                done[index] = logit, error
                if kept:
                    kept.add(name, index, logit, error)
                bar.update()
            probabilities = _probabilities(detector, [done[i][0] for i in range(len(listed))])
            scores += [
                Score(sample.path, sample.generator, int(sample.label), probability, done[i][1], suite, name)
                for i, ((suite, sample), probability) in enumerate(zip(listed, probabilities))
            ]
    if kept:
        kept.close()
    calibration = detector.calibration
    return Evaluation(scores, threshold, calibration.threshold if calibration else None)


def _distorting(detector: Detector, distortion: Distortion) -> Detector:
    """The same detector, which distorts every image before its preprocessing."""
    result: Any = copy.copy(detector)  # Distorted stands in for a Preprocessor
    result.preprocess = robustness.Distorted(distortion, detector.preprocess)
    return result


def _probabilities(detector: Detector, logits: list[float]) -> list[float]:
    import torch

    values = detector.probabilities(torch.tensor(logits, dtype=torch.float64)).tolist()
    # Rounded as in scores.csv and by `dgsnet predict`, so that the metrics can be recomputed from the file.
    return [round(value, DECIMALS) for value in values]


def evaluate_command(
    data: list[str],
    model: str,
    out: str,
    split: str | None = None,
    threshold: float = THRESHOLD,
    robustness: list[str] | None = None,
    views: int | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> None:
    """Measure a model on labelled images, per generator and on average.

    Prints a table, and writes report.html, metrics.md, .json, .csv and .png, and scores.csv (every image).
    A killed evaluation goes on when it is called again.

    Args:
        data: test suites: dataset folders, or JSON/CSV lists of path and label; NAME=PATH names a suite.
        model: a model folder, or the folder of a training run.
        out: folder for the results; scores that are already in it are not made again.
        split: train, val or test, for folders that hold several.
        threshold: an image is called generated where its probability is above it.
        robustness: measure on distorted images too: default, or any of jpeg:90,50 webp:80 blur:1 resize:0.5
            crop:0.8 and chains such as jpeg:90+resize:0.5+jpeg:70.
        views: views averaged per image; what the calibration was made with, else 1, if not given.
        device: torch device; the GPU where there is one if not given.
        workers: processes that read and prepare images; chosen if not given.
    """
    from dgsnet import evaluation_report

    distortions = _distortions(robustness or ())
    suites = find_suites(data, split)
    detector = Detector.load(model, device, views=views)
    result = evaluate(
        detector,
        suites,
        threshold=threshold,
        distortions=distortions,
        journal=Path(out) / JOURNAL,
        workers=workers,
    )
    evaluation_report.write_tables(out, result)
    evaluation_report.write_page(Path(out) / "report.html", result, model=model, views=detector.views)
    print(result.table())
    for suite, comparison in result.comparisons().items():
        print(f"\n{suite}:\n{text_table(evaluation_report.published_methods(comparison))}")
    for score in result.damaged:
        print(f"left out: {score.error}")
    unread = sum(bool(s.error) for s in result.scores if not s.distortion)
    total = sum(map(len, suites.values()))
    if unread == total:
        raise UserError(f"none of the {total} images could be read")
    print(f"{unread} of {total} images could not be read; results in {out}")


def _distortions(words: Sequence[str]) -> list[Distortion]:
    """What --robustness asks for; "default" is the default sweep."""
    return robustness.parse(
        [w for word in words for w in (robustness.DEFAULT if word == "default" else (word,))]
    )


def find_suites(sources: Sequence[str], split: str | None = None) -> dict[str, list[Sample]]:
    """Test suites by name: NAME=PATH, or the name of the folder or list.

    A folder called train, val or test has its parent's name.

    Raises:
        UserError: as `find_samples`, and two suites of one name.
    """
    from dgsnet.data import SPLIT_FOLDERS, find_samples

    suites: dict[str, list[Sample]] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        if not equals or os.path.exists(source):
            path = source
            parts = [part for part in Path(path).absolute().parts if part not in SPLIT_FOLDERS]
            name = Path(path).stem if os.path.isfile(path) else parts[-1]
        if name in suites:
            raise UserError(f"--data: two suites are called {name!r}; tell them apart as NAME={path}")
        suites[name] = find_samples(path, split)
    if not suites:
        raise UserError("--data: no dataset given; name a folder or a JSON/CSV list")
    return suites


def percent(value: float) -> str:
    """A fraction in percent with one decimal; a dash for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


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


def _mean(members: list[Result], suite: str) -> Result:
    values: dict[str, float] = {}
    for key in (key for key in members[0].values if key not in COUNTS):
        having = [m.values[key] for m in members if not math.isnan(m.values[key])]
        values[key] = math.fsum(having) / len(having) if having else math.nan
    values |= {key: sum(m.values[key] for m in members) for key in COUNTS}
    draw = partial(_mean_samples, members)
    return Result(suite, "mean", members[0].distortion, values, draw, is_mean=True)


def _mean_samples(members: list[Result]) -> dict[str, np.ndarray]:
    """Resamples of a mean: its generators are fixed, their images are drawn independently."""
    result = {}
    for key, one in members[0].samples.items():
        having = [m.samples[key] for m in members if not math.isnan(m.values[key])]
        result[key] = np.mean(having, axis=0) if having else one
    return result
