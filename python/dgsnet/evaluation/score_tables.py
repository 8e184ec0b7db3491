"""Scores that other programs made, measured as a model's are: images are found in a table by their paths."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgsnet.data.items import Item
from dgsnet.data.scores import place_of, read_scores
from dgsnet.detection.decisions import Calibration, load_calibration
from dgsnet.errors import UserError
from dgsnet.evaluation.metrics import THRESHOLD
from dgsnet.evaluation.results import Evaluation, Score
from dgsnet.model.folders import holds_rule


@dataclass(frozen=True)
class ScoreTable:
    """A table, as `read_scores` takes it, and the folder of its threshold; "": it has none."""

    path: str
    rule: str = ""

    def calibration(self) -> Calibration | None:
        """UserError where the folder's calibration is of probabilities."""
        found = load_calibration(self.rule) if self.rule else None
        if found and not found.raw:
            raise UserError(f"{self.rule} is calibrated for a network's probabilities, not for {self.path}")
        return found


def split_models(
    models: Sequence[tuple[str, str]], scores: Sequence[tuple[str, str]]
) -> dict[str, str | ScoreTable]:
    """Networks' folders and tables by name; folders that hold a threshold alone go with the tables.

    Args:
        models, scores: names with folders, and with tables. A threshold is that of the table of its name, or
            where there is one of each, of that one.

    Raises:
        UserError: a threshold without a table, or two of one name.
    """
    networks = {name: folder for name, folder in models if not holds_rule(folder)}
    rules = {name: folder for name, folder in models if holds_rule(folder)}
    if len(rules) == len(scores) == 1:
        rules = {scores[0][0]: next(iter(rules.values()))}
    if both := networks.keys() & {name for name, _ in scores}:
        raise UserError(f"--scores: {min(both)!r} is a model too; give another name as NAME=TABLE")
    found: dict[str, str | ScoreTable] = dict(networks)
    found |= {name: ScoreTable(path, rules.pop(name, "")) for name, path in scores}
    if rules:
        name, folder = next(iter(rules.items()))
        raise UserError(
            f"{folder} holds the threshold of another program's scores: give these with --scores {name}=TABLE"
        )
    return found


def samples_of(table: str) -> list[Item]:
    """The labelled images of a table, of its generators; real ones are of their source where that is named.

    UserError where no row has a label.
    """
    stem, found = Path(table).stem, []
    for row in read_scores(table):
        if row.label is not None:
            group = row.generator or (row.source if not row.label else "") or stem
            found.append(Item(place_of(table, row.path), row.label, group, category=row.category))
    if not found:
        raise UserError(f"{table}: no row has a label: give the images with --data, or a column label")
    return found


def evaluate_table(
    table: ScoreTable, suites: Mapping[str, Sequence[Item]], threshold: float = THRESHOLD
) -> Evaluation:
    """Measure a table's scores of labelled images; those that it has none of are in no measure, and told.

    Args:
        table: of which the rows whose path is an image's count, from here or from the table's folder.
        suites: images by suite.
        threshold: an image is called generated where its score is above it; that of the table's calibration
            where it has one.

    Raises:
        UserError: the table is no such table, has two scores of an image, or one of none of the images.
    """
    listed = [(suite, item) for suite, items in suites.items() for item in items]
    places: dict[str, list[int]] = {}
    for i, (_, item) in enumerate(listed):
        places.setdefault(os.path.abspath(item.path), []).append(i)
    values, others, folder = np.full(len(listed), np.nan), 0, os.path.dirname(table.path)
    for row in read_scores(table.path):
        ways = (row.path, os.path.join(folder, row.path))
        here = next((places[way] for way in map(os.path.abspath, ways) if way in places), None)
        if here is None:
            others += 1
        elif not np.isnan(values[here]).all():
            raise UserError(f"{table.path}, line {row.line}: a second score of {listed[here[0]][1].path}")
        else:
            values[here] = row.score
    lacking = np.flatnonzero(np.isnan(values))
    if len(lacking) == len(listed):
        raise UserError(
            f"{table.path} has no score of any of the {len(listed)} images, such as {listed[0][1].path}: its "
            "paths must be theirs, from the current folder or from the table's"
        )
    if len(lacking):
        such = listed[lacking[0]][1].path
        print(f"{table.path}: no score of {len(lacking)} of {len(listed)} images, such as {such}")
    if others:
        print(f"{table.path}: {others} rows are of no image whose label is known, and left out")
    calibration = table.calibration()
    scores = []
    for (suite, item), value in zip(listed, values.tolist()):
        why = f"{item.path}: no score in {table.path}" if math.isnan(value) else ""
        place = item.path, item.generator, int(item.label == 1)
        scores.append(Score(*place, value, why, suite, "", item.category))
    own = calibration.threshold if calibration else None
    return Evaluation(
        scores,
        threshold if own is None else own,
        own,
        promised_fpr=calibration.fpr if calibration else None,
        raw=True,
    )
