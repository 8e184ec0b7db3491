"""Measuring a detector: the field's metrics, per generator and as the unweighted mean over generators."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.detector import THRESHOLD, Detector
from dgsnet.errors import UserError

if TYPE_CHECKING:
    from dgsnet.data import Sample

# The measures in the order of every table: key and column title.
MEASURES = {
    "accuracy": "accuracy",
    "ap": "AP",
    "auc": "AUC",
    "real_accuracy": "real",
    "generated_accuracy": "generated",
}


def metrics(labels: Any, probabilities: Any, threshold: float = THRESHOLD) -> dict[str, float]:
    """Accuracy, average precision, area under the ROC curve and accuracy per class.

    Args:
        labels: [N] of any numeric type, 0 real, 1 generated.
        probabilities: [N] floats, of being generated.
        threshold: an image is called generated where its probability is above it.

    Returns:
        accuracy, ap, auc, real_accuracy, generated_accuracy as fractions, and the counts n_real and
        n_generated. What cannot be measured is NaN: ap and auc where a class is missing, the
        accuracy of a missing class, accuracy of no images.

    Raises:
        ValueError: shapes that differ, labels other than 0 and 1, NaN probabilities.

    >>> result = metrics([0, 0, 1, 1], [0.1, 0.6, 0.8, 0.9])
    >>> result["accuracy"], result["auc"], result["real_accuracy"]
    (0.75, 1.0, 0.5)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != probabilities.shape:
        raise ValueError(
            f"labels and probabilities must both be [N], got {labels.shape} and {probabilities.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (real) or 1 (generated)")
    if np.isnan(probabilities).any():
        raise ValueError("probabilities contain NaN: leave out images that could not be read")
    generated = labels == 1
    correct = (probabilities > threshold) == generated
    two_classes = generated.any() and not generated.all()

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else math.nan

    return {
        "accuracy": mean(correct),
        "ap": float(average_precision_score(generated, probabilities)) if two_classes else math.nan,
        "auc": float(roc_auc_score(generated, probabilities)) if two_classes else math.nan,
        "real_accuracy": mean(correct[~generated]),
        "generated_accuracy": mean(correct[generated]),
        "n_real": int((~generated).sum()),
        "n_generated": int(generated.sum()),
    }


@dataclass
class Score:
    """One image of an evaluation; probability is NaN and error says why where it could not be read."""

    path: str
    generator: str
    label: int
    probability: float
    error: str = ""


@dataclass
class Evaluation:
    """Scores of labelled images, and what follows from them."""

    scores: list[Score]
    threshold: float = THRESHOLD

    @property
    def damaged(self) -> list[Score]:
        """The images that could not be read; they are in no metric."""
        return [score for score in self.scores if score.error]

    def by_generator(self) -> dict[str, dict[str, float]]:
        """`metrics` and n_damaged of each generator, in alphabetical order."""
        return {
            name: self._metrics([s for s in self.scores if s.generator == name])
            for name in sorted({s.generator for s in self.scores})
        }

    def mean(self) -> dict[str, float]:
        """Unweighted mean over the generators that have the measure (NaN: none has), and total counts."""
        rows = list(self.by_generator().values())
        result: dict[str, float] = {}
        for key in MEASURES:
            values = [row[key] for row in rows if not math.isnan(row[key])]
            result[key] = sum(values) / len(values) if values else math.nan
        return result | {key: sum(row[key] for row in rows) for key in ("n_real", "n_generated", "n_damaged")}

    def _metrics(self, scores: list[Score]) -> dict[str, float]:
        read = [s for s in scores if not s.error]
        result = metrics([s.label for s in read], [s.probability for s in read], self.threshold)
        return result | {"n_damaged": len(scores) - len(read)}

    def table(self) -> str:
        """The metrics in percent as lines of text, the mean over generators last."""
        rows = [["generator", *MEASURES.values(), "images"]]
        for name, row in [*self.by_generator().items(), ("mean", self.mean())]:
            cells = [percent(row[key]) for key in MEASURES]
            rows.append([name, *cells, str(row["n_real"] + row["n_generated"])])
        return text_table(rows)

    def save(self, out: str | Path) -> None:
        """Write metrics.json, metrics.csv, scores.csv and metrics.png into the folder `out`."""
        from dgsnet import plots
        from dgsnet.checkpoint import write_file

        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        by_generator, mean = self.by_generator(), self.mean()
        document = {
            "threshold": self.threshold,
            "mean": mean,
            "generators": by_generator,
            "damaged": [{"path": s.path, "error": s.error} for s in self.damaged],
        }
        write_file(out / "metrics.json", (json.dumps(_null_for_nan(document), indent=2) + "\n").encode())
        rows = [
            {"generator": name} | {k: "" if math.isnan(v) else v for k, v in row.items()}
            for name, row in [*by_generator.items(), ("mean", mean)]
        ]
        write_file(out / "metrics.csv", _csv(rows))
        rows = [vars(s) | {"probability": "" if s.error else f"{s.probability:.6f}"} for s in self.scores]
        write_file(out / "scores.csv", _csv(rows))
        plots.save(plots.generators(by_generator, mean, self.threshold), out / "metrics.png")


def evaluate(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    threshold: float = THRESHOLD,
    workers: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score labelled images; one that cannot be read is kept with its error and counted in no metric.

    Args:
        detector: the model.
        samples: what `dgsnet.data.find_samples` found.
        threshold: decision threshold of the accuracies.
        workers: as in `Detector.predict`.
        progress: show a progress bar on stderr.
    """
    from tqdm import tqdm

    stream = detector.stream([sample.path for sample in samples], workers=workers)
    scores = [
        # Rounded as in scores.csv, so that the metrics can be recomputed from the file.
        Score(sample.path, sample.generator, int(sample.label), round(probability, 6), error)
        for sample, (probability, error) in zip(
            samples, tqdm(stream, total=len(samples), unit="image", disable=not progress)
        )
    ]
    return Evaluation(scores, threshold)


def evaluate_command(
    data: list[str],
    model: str,
    out: str,
    split: str | None = None,
    threshold: float = THRESHOLD,
    device: str | None = None,
    workers: int | None = None,
) -> None:
    """Measure a model on labelled images, per generator and on average.

    Prints a table, and writes metrics.json, metrics.csv, scores.csv (every image) and metrics.png.

    Args:
        data: dataset folders, or JSON/CSV lists of path and label.
        model: a model folder, or the folder of a training run.
        out: folder for the results.
        split: train, val or test, for folders that hold several.
        threshold: an image is called generated where its probability is above it.
        device: torch device; the GPU where there is one if not given.
        workers: processes that read and prepare images; chosen if not given.
    """
    from dgsnet.data import find_samples

    samples = []
    for source in data:
        found = find_samples(source, split)
        if len(data) > 1:
            # The same generator in two suites is two lines of the table.
            found = [replace(s, generator=f"{Path(source).stem}/{s.generator}") for s in found]
        samples += found
    if not samples:
        raise UserError("--data: no dataset given; name a folder or a JSON/CSV list")
    result = evaluate(Detector.load(model, device), samples, threshold=threshold, workers=workers)
    result.save(out)
    print(result.table())
    for score in result.damaged:
        print(f"left out: {score.error}")
    if len(result.damaged) == len(result.scores):
        raise UserError(f"none of the {len(result.scores)} images could be read")
    print(f"{len(result.damaged)} of {len(result.scores)} images could not be read; results in {out}")


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


def _null_for_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _null_for_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_null_for_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    # File names that are not UTF-8 are written as the bytes they are.
    return text.getvalue().encode(errors="surrogateescape")
