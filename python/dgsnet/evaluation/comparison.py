"""Several detectors on the same images: measures side by side, paired tests, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgsnet.evaluation import false_positives
from dgsnet.evaluation.changes import Change
from dgsnet.evaluation.metrics import CONFIDENCE
from dgsnet.evaluation.report import as_json, markdown_section, thumbnail
from dgsnet.evaluation.results import Evaluation, Result, Score, between, bounded, percent
from dgsnet.files import write_file
from dgsnet.pages import page

# Most images shown that the detectors disagree on.
SHOWN = 12
FILES = "files alone"
RANKING = {"auc": "AUC", "tpr_at_1": "TPR@1%", "tpr_at_5": "TPR@5%"}
DECISIONS = {"accuracy": "accuracy", "real_accuracy": "real", "generated_accuracy": "generated"}

Table = list[list[str]]


def auc_influence(labels: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """An AUC, and what each image adds to its sampling error.

    Args:
        labels: [N] of 0 (real) and 1 (generated).
        scores: [N], higher for generated images.

    Returns:
        The AUC, and float64 [N] whose squares add up to its variance as DeLong, DeLong and Clarke-Pearson
        estimate it (1988, Biometrics 44:837), by midranks (Sun and Xu 2014). The squares of differences of
        two detectors' add up to the variance of the difference. NaN with fewer than two images of a class.
    """
    from scipy.stats import rankdata

    generated, real = labels == 1, labels == 0
    m, n = int(generated.sum()), int(real.sum())
    found = np.full(len(labels), np.nan)
    if min(m, n) < 2:
        return math.nan, found
    ranks = rankdata(scores)
    # The share of real images that each is above.
    above = (ranks[generated] - rankdata(scores[generated])) / n
    below = 1 - (ranks[real] - rankdata(scores[real])) / m
    auc = float(above.mean())
    found[generated] = (above - auc) / math.sqrt(m * (m - 1))
    found[real] = (below - auc) / math.sqrt(n * (n - 1))
    return auc, found


@dataclass(frozen=True)
class Difference:
    """What a detector has more than the first of something, and how sure that is.

    Attributes:
        generator: "" for the mean over generators, and for decisions.
        name: of the detector.
        of: what is compared.
    """

    generator: str
    name: str
    of: str
    value: float
    low: float
    high: float
    p_value: float
    test: str


@dataclass
class Comparison:
    """Evaluations of the same images by several detectors, by name; the others are held against the first.

    Each decides at its calibrated threshold, where it has one, else at the evaluation's.
    """

    evaluations: Mapping[str, Evaluation]

    @cached_property
    def first(self) -> Evaluation:
        return next(iter(self.evaluations.values()))

    @cached_property
    def places(self) -> np.ndarray:
        """Places of the images that all could read, among the images as they are."""
        errors = [[bool(s.error) for s in evaluation.plain] for evaluation in self.evaluations.values()]
        return np.flatnonzero(~np.any(errors, axis=0))

    def differences(self) -> list[Difference]:
        """Of every other detector to the first: AUC of each generator and their mean, and decisions."""
        return [
            difference
            for name in list(self.evaluations)[1:]
            for difference in (*self._of_auc(name), *self._of_decisions(name))
        ]

    def _of_auc(self, name: str) -> list[Difference]:
        from scipy.stats import norm

        plain = self.first.plain
        labels = np.array([s.label for s in plain])
        scores = [np.array([s.probability for s in e.plain]) for e in (self.first, self.evaluations[name])]
        read = set(self.places.tolist())
        parts: list[tuple[str, float, np.ndarray]] = []
        for result in self.first.of():
            key = result.suite, result.generator
            at = np.array([i for i in self.first.read.get(key, []) if i in read], np.intp)
            (before, old), (after, new) = (auc_influence(labels[at], values[at]) for values in scores)
            if not math.isnan(after):
                influence = np.zeros(len(plain))
                influence[at] = new - old
                parts.append((self.first.title(result), after - before, influence))
        if len(parts) > 1:
            values, influences = [value for _, value, _ in parts], [part for *_, part in parts]
            # Real images that several generators share count in each.
            parts.insert(0, ("", float(np.mean(values)), np.mean(influences, axis=0)))
        found = []
        for generator, value, influence in parts:
            error = float(np.sqrt(np.square(influence).sum()))
            reach = norm.ppf((1 + CONFIDENCE) / 2) * error
            p = 2 * norm.sf(abs(value) / error) if error else float(value == 0)
            of = "AUC" if generator or len(parts) == 1 else "mean AUC"
            found.append(
                Difference(generator, name, of, value, value - reach, value + reach, float(p), "DeLong")
            )
        return found

    def _of_decisions(self, name: str) -> list[Difference]:
        right = [self._right(evaluation) for evaluation in (self.first, self.evaluations[name])]
        labels = np.array([self.first.plain[i].label for i in self.places])
        found = []
        for words, chosen in (
            ("accuracy", labels >= 0),
            ("accuracy, real", labels == 0),
            ("accuracy, generated", labels == 1),
        ):
            before, after = (which[chosen] for which in right)
            if chosen.any():
                change = Change(
                    *(int(both.sum()) for both in (before & after, ~before & after)),
                    *(int(both.sum()) for both in (before & ~after, ~before & ~after)),
                )
                values = change.difference, *change.interval(), change.p_value
                found.append(Difference("", name, words, *values, "McNemar"))
        return found

    def _right(self, evaluation: Evaluation) -> np.ndarray:
        """Which of the images of `places` it decides rightly."""
        threshold = false_positives.threshold_of(evaluation)
        scores = [evaluation.plain[i] for i in self.places]
        return np.array([(s.probability > threshold) == bool(s.label) for s in scores], bool)

    def disagreements(self) -> list[tuple[Score, dict[str, float]]]:
        """Images that not all decide alike, with each one's probability; those furthest apart come first."""
        found, apart = [], self._apart()
        for place in self.places:
            scores = {name: e.plain[place].probability for name, e in self.evaluations.items()}
            calls = {
                p > false_positives.threshold_of(e)
                for p, e in zip(scores.values(), self.evaluations.values())
            }
            if len(calls) > 1:
                found.append((-apart[place], self.first.plain[place], scores))
        return [(score, each) for _, score, each in sorted(found, key=lambda one: (one[0], one[1].path))]

    def _apart(self) -> np.ndarray:
        """How far apart the detectors are on each image: in probability, or in rank where some have none."""
        from scipy.stats import rankdata

        rows = [np.array([s.probability for s in e.plain]) for e in self.evaluations.values()]
        if any(evaluation.raw for evaluation in self.evaluations.values()):
            rows = [rankdata(row, nan_policy="omit") / len(row) for row in rows]
        return np.ptp(rows, axis=0)

    def tables(self) -> list[tuple[str, str, Table]]:
        """Title, caption and rows under a head."""
        found = [("Side by side", self._caption(), self._summary())]
        found.append(("Differences", self._tests_caption(), self._tests()))
        found += [(title, "", self._by_generator(key, title)) for key, title in RANKING.items()]
        found.append(("Accuracy at each one's threshold", "", self._by_generator("accuracy", "accuracy")))
        if rates := self._sources():
            caption = "Of real images, by where they lie. Clopper-Pearson intervals."
            found.append(("Called generated, of real images", caption, rates))
        return found

    def _caption(self) -> str:
        words = [
            f"{name} decides at {false_positives.threshold_of(e):g}"
            + (", calibrated" if e.calibrated_threshold is not None else ", not calibrated")
            for name, e in self.evaluations.items()
        ]
        return (
            f"Percent. {'; '.join(words)}. Means are unweighted over generators; in brackets "
            f"{CONFIDENCE:.0%} intervals. {FILES.capitalize()}: what format, compression, size and "
            "metadata say of the label, which a detector has to beat."
        )

    def _tests_caption(self) -> str:
        return (
            f"Against {next(iter(self.evaluations))}, on the same images, percent points with "
            f"{CONFIDENCE:.0%} intervals. p is of each test by itself; adjusted, by Holm's rule for all rows."
        )

    def _summary(self) -> Table:
        head = ["", "mean AUC", "worst generator", "worst degradation", *list(RANKING.values())[1:]]
        rows = [[*head, *DECISIONS.values()]]
        for name, evaluation in self.evaluations.items():
            mean = evaluation.mean_of()
            rows.append(
                [
                    *(name, mean.bounded("auc")),
                    _worst({evaluation.title(r): r.values["auc"] for r in evaluation.of()}),
                    _worst({d: evaluation.mean(d)["auc"] for d in evaluation.distortions}),
                    *(mean.bounded(key) for key in list(RANKING)[1:]),
                    *(mean.bounded(_at_threshold(evaluation, key)) for key in DECISIONS),
                ]
            )
        files = {self.first.title(r): self._files(r) for r in self.first.of()}
        if any(not math.isnan(value) for value in files.values()):
            mean_of_files = percent(self._files(self.first.mean_of()))
            rows.append([FILES, mean_of_files, _worst(files), *["-"] * (len(rows[0]) - 3)])
        return rows

    def _files(self, result: Result) -> float:
        return self.first.shortcut_of(result).get("file_auc", math.nan)

    def _tests(self) -> Table:
        found = self.differences()
        adjusted = holm([difference.p_value for difference in found])
        rows = [["", "of", "generator", "difference", "p", "adjusted", "test"]]
        for d, p in zip(found, adjusted):
            value = bounded(d.value, (d.low, d.high)).replace("-", "\N{MINUS SIGN}")
            rows.append([d.name, d.of, d.generator, value, f"{d.p_value:.2g}", f"{p:.2g}", d.test])
        return rows

    def _by_generator(self, key: str, title: str) -> Table:
        rows = [["generator", *self.evaluations, *([FILES] if key == "auc" else [])]]
        results = [[*e.of(), e.mean_of()] for e in self.evaluations.values()]
        keys = [key if key in RANKING else _at_threshold(e, key) for e in self.evaluations.values()]
        for members in zip(*results):
            cells = [result.bounded(measure) for result, measure in zip(members, keys)]
            files = [percent(self._files(members[0]))] if key == "auc" else []
            name = "mean" if members[0].is_mean else self.first.title(members[0])
            rows.append([name, *cells, *files])
        return rows

    def _sources(self) -> Table:
        rates = {
            name: {rate.source: rate for rate in false_positives.source_rates(evaluation)}
            for name, evaluation in self.evaluations.items()
        }
        sources = list(next(iter(rates.values())))
        head = ["real images of", "images", *rates]
        rows = [
            [
                *(source, str(next(iter(rates.values()))[source].n)),
                *(
                    f"{percent(r.rate)} ({between((r.low, r.high))})"
                    for r in (found[source] for found in rates.values())
                ),
            ]
            for source in sources
            if all(source in found for found in rates.values())
        ]
        return [head, *rows] if rows else []

    def document(self) -> dict[str, Any]:
        """What comparison.json holds: fractions."""
        found = self.differences()
        adjusted = holm([difference.p_value for difference in found])
        return {
            "models": {
                name: {
                    "threshold": false_positives.threshold_of(evaluation),
                    "calibrated": evaluation.calibrated_threshold is not None,
                    "mean": evaluation.mean(),
                    "generators": evaluation.by_generator(),
                    "robustness": {d: evaluation.mean(d) for d in evaluation.distortions},
                }
                for name, evaluation in self.evaluations.items()
            },
            "files": {self.first.title(r): self._files(r) for r in self.first.of()},
            "differences": [vars(d) | {"adjusted": p} for d, p in zip(found, adjusted)],
            "disagreements": [
                {"path": score.path, "label": score.label, "generator": score.generator, "probability": each}
                for score, each in self.disagreements()
            ],
        }


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for there being several: Holm's rule (1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = most
    return adjusted


def _worst(values: Mapping[str, float]) -> str:
    """The lowest value in percent, and whose it is."""
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    if not known:
        return "-"
    name = min(known, key=lambda key: known[key])
    return f"{percent(known[name])}, {name}"


def _at_threshold(evaluation: Evaluation, key: str) -> str:
    """The key of a measure of decisions at the threshold that the detector decides at."""
    return f"calibrated_{key}" if evaluation.calibrated_threshold is not None else key


def write(out: str | Path, comparison: Comparison) -> list[tuple[str, str, Table]]:
    """Write report.html, comparison.json and comparison.md into the folder `out`; returns their tables."""
    out = Path(out)
    tables, disagreements = comparison.tables(), comparison.disagreements()
    write_file(out / "comparison.json", as_json(comparison.document()))
    lines = ["# Comparison"]
    for title, caption, rows in tables:
        lines += markdown_section(title, page.plain(caption), rows)
    write_file(out / "comparison.md", ("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    text = page.render(
        Path(__file__).with_name("comparison.html"),
        names=list(comparison.evaluations),
        raw={name for name, evaluation in comparison.evaluations.items() if evaluation.raw},
        images=len(comparison.places),
        tables=tables,
        disagreements=len(disagreements),
        shown=[
            {"score": score, "probabilities": each, "picture": thumbnail(score.path)}
            for score, each in disagreements[:SHOWN]
        ],
    )
    write_file(out / "report.html", text.encode(errors="surrogateescape"))
    return tables
