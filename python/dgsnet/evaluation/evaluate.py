"""Measuring a detector: labelled images, per generator and as the unweighted mean over generators."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.audit.audit import load_model
from dgsnet.data.distortions import encoded
from dgsnet.data.images import ImageError, file_hash, read_image
from dgsnet.data.nuisances import NUISANCES, file_nuisances
from dgsnet.data.tables import Table, damaged
from dgsnet.detection import arguments
from dgsnet.detection.decisions import DECIMALS, SETTINGS
from dgsnet.detection.detector import Detector, Prepared
from dgsnet.detection.engine import Engine, Job, answers
from dgsnet.detection.overlap import warn_of_both_labels, warn_of_training_images
from dgsnet.errors import UserError
from dgsnet.evaluation import categories, false_positives, shortcut_tables
from dgsnet.evaluation.baseline import FROZEN, frozen_detector
from dgsnet.evaluation.baseline import rows as frozen_rows
from dgsnet.evaluation.comparison import Comparison, write
from dgsnet.evaluation.metrics import THRESHOLD
from dgsnet.evaluation.report import published_methods, write_page, write_tables
from dgsnet.evaluation.results import Evaluation, Score, text_table
from dgsnet.evaluation.robustness import Distorted, parse, parse_codec
from dgsnet.evaluation.score_tables import ScoreTable, evaluate_table, samples_of, split_models

if TYPE_CHECKING:
    from dgsnet.audit.shortcuts import FileModel
    from dgsnet.data.distortions import Distortion
    from dgsnet.data.items import Item

# Logits as they are made: what a killed evaluation goes on from. Calibration and threshold are applied later.
JOURNAL = "scores.jsonl"
# What is measured, by the option that names it.
KINDS = {"--model": "models", "--scores": "tables"}
COLUMNS = ("distortion", "index", "path", "logit", "error")


def evaluate(
    detector: Detector,
    samples: Sequence[Item] | Mapping[str, Sequence[Item]],
    *,
    threshold: float = THRESHOLD,
    distortions: Sequence[Distortion] = (),
    file_model: FileModel | None = None,
    frozen: bool = False,
    reencode: str = "",
    journal: str | Path | None = None,
    workers: int | None = None,
    engine: Engine = "local",
    progress: bool = True,
) -> Evaluation:
    """Score labelled images; one that cannot be read is kept with its error and counted in no metric.

    Args:
        detector: the model; the threshold of its calibration, if it has one, is measured too.
        samples: what `dgsnet.data.items.find_samples` found, or suite to that.
        threshold, frozen, reencode: as in `evaluate_command`.
        distortions: each is measured on all images, besides the images as they are.
        file_model: what the files of other data say of the label, in place of what these images' own say.
        journal: file that keeps the logits as they are made. Scores already in it are not made again.
        workers, engine: as of `dgsnet.detection.engine.answers`.
        progress: show a progress bar on stderr, where that is a terminal.

    Raises:
        UserError: the journal is of another model or of other images, or there is no frozen head.
    """
    import torch
    from tqdm import tqdm

    if not isinstance(samples, Mapping):
        samples = {"": samples}
    listed = [(suite, sample) for suite, members in samples.items() for sample in members]
    variants = ["", *(distortion.name for distortion in distortions)]
    scorers = {"": detector}
    if frozen:
        variants.append(FROZEN)
        scorers[FROZEN] = frozen_detector(detector)
    nuisances = np.empty((len(listed), len(NUISANCES)), np.float32)
    hashes: list[int | None] = [None] * len(listed)
    examine = _Examined(detector, distortions, parse_codec(reencode) if reencode else None)
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(_journal(Path(journal), detector, listed, reencode)) if journal else None
        done: dict[str, dict[int, tuple[float, str]]] = {name: {} for name in variants}
        done |= _kept(table, listed) if table else {}
        bar = tqdm(total=len(variants) * len(listed), unit="image", disable=None if progress else True)
        stack.enter_context(bar)
        bar.update(sum(len(done[name]) for name in variants))
        if not bar.disable:
            # Those are no part of the speed shown.
            bar.initial = bar.n
        missing = {
            i: lacks
            for i in range(len(listed))
            if (lacks := [name for name in variants if i not in done[name]])
        }
        for index, (_, item) in enumerate(listed):
            if index not in missing:
                (hashes[index], nuisances[index]), _ = examine[item, []]
        wanted = [(listed[i][1], lacks) for i, lacks in missing.items()]
        job = Job(examine, scorers)
        for answer, index in zip(answers(job, wanted, engine=engine, workers=workers), missing):
            hashes[index], nuisances[index] = answer.note
            for name, (found, error) in answer.logits.items():
                done[name][index] = math.nan if error else found[0], error
                if table:
                    row = {"distortion": name, "index": index, "path": listed[index][1].path}
                    table.add(row | {"logit": None if error else found[0], "error": error})
                bar.set_postfix_str(detector.waiting(), refresh=False)
                bar.update()
    scores = []
    for name in variants:
        scorer = scorers.get(name, detector)
        logits = torch.tensor([done[name][i][0] for i in range(len(listed))], dtype=torch.float64)
        for i, probability in enumerate(scorer.probabilities(logits).tolist()):
            suite, sample = listed[i]
            # Rounded as in every table, so that the metrics can be recomputed from scores.csv.
            place = sample.path, sample.generator, int(sample.label == 1), round(probability, DECIMALS)
            scores.append(Score(*place, done[name][i][1], suite, name, sample.category))
    calibration = detector.calibration
    calibrated_threshold, promised = (calibration.threshold, calibration.fpr) if calibration else (None, None)
    beside = [replace(score, distortion="") for score in scores if score.distortion == FROZEN]
    return Evaluation(
        [score for score in scores if score.distortion != FROZEN],
        threshold,
        calibrated_threshold,
        nuisances,
        file_model,
        promised,
        Evaluation(beside, threshold) if frozen else None,
        hashes,
        reencode,
    )


class _Examined:
    """Map-style dataset from an item and names of variants to what one reading of its file gives.

    The note is its hash and its nuisances; the parts are the variants.
    """

    def __init__(
        self, detector: Detector, distortions: Sequence[Distortion], codec: tuple[str, float] | None
    ):
        self.codec = codec
        plain: Any = detector.preprocess
        preprocessors: Any = {"": plain, FROZEN: plain} | {d.name: Distorted(d, plain) for d in distortions}
        self.prepared = {name: Prepared(one, detector.views) for name, one in preprocessors.items()}

    def __getitem__(self, wanted: tuple[Item, list[str]]) -> tuple[tuple, dict[str, tuple]]:
        item, names = wanted
        (file, nuisances), _ = self.failed(wanted, "")
        try:
            data = item.read_bytes()
            file = file_hash(data)
            if self.codec:
                data = encoded(read_image(data, name=item.path), *self.codec)
            # Whoever decodes it says why.
            with contextlib.suppress(ImageError):
                nuisances = file_nuisances(data)
            image = read_image(data, name=item.path) if names else None
        except ImageError as error:
            return (file, nuisances), dict.fromkeys(names, (None, str(error)))
        parts: dict[str, tuple] = {}
        for name in names:
            if name == FROZEN and "" in parts:
                parts[name] = parts[""]
                continue
            views, why = self.prepared[name].part(image)
            parts[name] = views, why and f"{item.path}: {why}"
        return (file, nuisances), parts

    def failed(self, wanted: tuple[Item, list[str]], why: str) -> tuple[tuple, dict[str, tuple]]:
        """The answer where it cannot be examined."""
        item, names = wanted
        unknown = None, np.full(len(NUISANCES), np.nan, np.float32)
        return unknown, dict.fromkeys(names, (None, f"{item.path}: {why}"))


def _journal(path: Path, detector: Detector, listed: Sequence[tuple[str, Item]], reencode: str) -> Table:
    """The logits that are there, and more to come."""
    images = hashlib.sha256()
    for suite, sample in listed:
        images.update(repr((suite, sample.path, sample.label, sample.generator)).encode())
    settings = detector.settings() | {"images": images.hexdigest()[:16]}
    settings |= {"reencode": reencode} if reencode else {}
    return Table(path, settings, COLUMNS, missing=SETTINGS)


def _kept(table: Table, listed: Sequence[tuple[str, Item]]) -> dict[str, dict[int, tuple[float, str]]]:
    """Distortion to index of the image to (logit, error)."""
    kept: dict[str, dict[int, tuple[float, str]]] = {}
    for number, row in enumerate(table.rows(), 2):
        try:
            logit = math.nan if row["error"] else float(row["logit"])
            if row["path"] != listed[row["index"]][1].path:
                raise ValueError
            kept.setdefault(row["distortion"], {})[row["index"]] = logit, row["error"]
        except (TypeError, IndexError, ValueError):
            raise damaged(table.path, number) from None
    return kept


def evaluate_command(
    data: list[str] | None = None,
    model: list[str] | None = None,
    out: str | None = None,
    scores: list[str] | None = None,
    split: str | None = None,
    threshold: float = THRESHOLD,
    robustness: list[str] | None = None,
    audit: str | None = None,
    frozen: bool = False,
    reencode: str = "",
    views: arguments.Views = None,
    batch: arguments.Batch = None,
    precision: arguments.Precision = None,
    crops: arguments.Crops = None,
    device: arguments.Device = None,
    workers: arguments.Workers = None,
    engine: arguments.Engine = "local",
    pretrained: arguments.Pretrained = None,
    raw_cells: bool = False,
) -> None:
    """Measure a model on labelled images, per generator and on average; or several, side by side.

    Prints a table, and writes report.html, metrics.md, .json, .csv and .png, and scores.csv (every image).
    Several models have a folder each for these, and report.html, comparison.md and .json set them side by
    side. A killed evaluation goes on when it is called again. Tables of other programs' scores are measured
    like models, and beside them.

    Args:
        data: test suites: dataset folders, or JSON/CSV lists of path and label; NAME=PATH names a suite.
        model: a model folder, or the folder of a training run, or an .onnx that dgsnet export wrote;
            NAME=PATH names it. Of several, the first is what the others are compared with. A folder of
            calibrate --scores is the threshold of the table of its name, or of the only one.
        out: folder for the results; scores that are already in it are not made again.
        scores: CSV of another program's scores, columns path and score (any number, higher for generated
            images), matched with the images by path; NAME=TABLE names it. Without --data and other models,
            its rows with a label are the images, with generator, source and category where it has them.
        split: train, val or test, for folders that hold several.
        threshold: an image is called generated where its probability is above it.
        robustness: measure on distorted images too: default, or any of jpeg:90,50 webp:80 blur:1 resize:0.5
            crop:0.8 and chains such as jpeg:90+resize:0.5+jpeg:70.
        audit: audit.json of the training data: which images conflict with what *its* files say of the label,
            rather than with what the measured images' own say.
        frozen: measure the frozen backbone with the linear head of training's stage 1 beside the model.
        reencode: write every image as jpeg:QUALITY (jpeg444, webp, avif) first, both classes alike, so that
            formats tell nothing; what is left of the files is measured beside the model.
        raw_cells: write texts into the .csv files as they are; if not given, one that a spreadsheet would
            compute, such as a generator's name that begins with =, begins with an apostrophe.
    """
    if not out:
        raise UserError("--out: name the folder for the results")
    models = find_models(model or [], scores or [])
    tables = [entry for entry in models.values() if isinstance(entry, ScoreTable)]
    if tables and (reencode or (len(tables) == len(models) and (robustness or frozen))):
        raise UserError("--scores are of images as they are: leave --reencode, --robustness and --frozen out")
    if data or len(tables) < len(models):
        suites = find_suites(data or [], split)
    else:
        suites = {"": samples_of(tables[0].path)}
    listed = [sample for samples in suites.values() for sample in samples]
    options: dict[str, Any] = {
        "threshold": threshold,
        "distortions": parse(robustness or ()),
        "file_model": load_model(audit) if audit else None,
        "frozen": frozen,
        "reencode": reencode,
        "workers": workers,
        "engine": engine,
    }
    how: dict[str, Any] = {"views": views, "batch": batch, "precision": precision, "crops": crops}
    how["pretrained"] = pretrained
    detectors = {
        name: Detector.load(folder, device, **how)
        for name, folder in models.items()
        if isinstance(folder, str)
    }
    measured = {
        name: evaluate_table(table, suites, threshold)
        for name, table in models.items()
        if isinstance(table, ScoreTable)
    }
    found = {}
    for name, entry in models.items():
        place, averaged = Path(out) / name, dict[str, Any]()
        if isinstance(entry, ScoreTable):
            folder, result = entry.path, measured.pop(name)
        else:
            folder, detector = entry, detectors.pop(name)
            result = evaluate(detector, suites, journal=place / JOURNAL, **options)
            warn_of_training_images(folder, listed, result.hashes)
            averaged = {"views": detector.views, "crops": detector.crops}
        write_tables(place, result, raw_cells=raw_cells)
        write_page(place / "report.html", result, model=folder, **averaged)
        if name:
            print(f"\n{name}:")
        _print(result)
        found[name] = result
    result = next(iter(found.values()))
    if result.hashes is not None:
        warn_of_both_labels(listed, hashes=result.hashes)
    if len(found) > 1:
        for title, _, rows in write(out, Comparison(found))[:2]:
            print(f"\n{title.lower()}:\n{text_table(rows)}")
    for score in [] if result.raw else result.damaged:
        print(f"left out: {score.error}")
    unread, total = sum(bool(s.error) for s in result.plain), len(listed)
    if unread == total:
        raise UserError(f"none of the {total} images could be read")
    why = "have no score" if result.raw else "could not be read"
    print(f"{unread} of {total} images {why}; results in {out}")


def _print(result: Evaluation) -> None:
    print(result.table())
    if rates := false_positives.rows(result):
        print(f"\n{false_positives.caption(result)}\n{text_table(rates)}")
    if of_categories := categories.rows(result):
        print(f"\nby category:\n{text_table(of_categories)}")
    for sentence in false_positives.sentences(result) + categories.sentences(result):
        print(f"warning: {sentence}")
    if shortcuts := shortcut_tables.rows(result, detailed=False):
        print(f"\nbeside what the files alone say:\n{text_table(shortcuts)}")
    if beside := frozen_rows(result):
        print(f"\nbeside the frozen backbone with a linear head:\n{text_table(beside)}")
    for suite, comparison in result.comparisons().items():
        print(f"\n{suite}:\n{text_table(published_methods(comparison))}")


def find_models(folders: str | Sequence[str], scores: Sequence[str] = ()) -> dict[str, str | ScoreTable]:
    """Model folders and tables of scores by name: NAME=PATH, or what it is called; a single one has "".

    Raises:
        UserError: none, two of one name, a name that is no name of a folder, or a threshold without a table.
    """
    if isinstance(folders, (str, os.PathLike)):
        folders = [os.fspath(folders)]
    found = split_models(_named(folders, "--model"), _named(scores, "--scores"))
    if not found:
        raise UserError("give what is to be measured: --model, --scores or both")
    return found if len(found) > 1 else dict.fromkeys([""], *found.values())


def _named(paths: Sequence[str], option: str) -> list[tuple[str, str]]:
    """Names and paths of what an option names."""
    found: dict[str, str] = {}
    for given in paths:
        name, equals, path = given.partition("=")
        if not equals or os.path.exists(given):
            absolute = Path(given).absolute()
            name, path = absolute.stem if absolute.suffix == ".csv" else absolute.name, given
        if name in found:
            raise UserError(
                f"{option}: two {KINDS[option]} are called {name!r}; tell them apart as NAME={path}"
            )
        if not name or name in (".", "..") or "/" in name or os.sep in name:
            raise UserError(f"{option}: {name!r} cannot be the name of a folder of results")
        found[name] = path
    return [*found.items()]


def find_suites(sources: Sequence[str], split: str | None = None) -> dict[str, list[Item]]:
    """Test suites by name: NAME=PATH, or the name of the folder or list.

    A folder called train, val or test has its parent's name.

    Raises:
        UserError: as `find_samples`, and two suites of one name.
    """
    from dgsnet.data.items import SPLIT_FOLDERS, find_samples

    suites: dict[str, list[Item]] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        # Columns of Parquet come after a #.
        if not equals or "#" in name or os.path.exists(source):
            path = source
            parts = [part for part in Path(path).absolute().parts if part not in SPLIT_FOLDERS]
            name = Path(path).stem if os.path.isfile(path) else parts[-1]
        if name in suites:
            raise UserError(f"--data: two suites are called {name!r}; tell them apart as NAME={path}")
        suites[name] = find_samples(path, split)
    if not suites:
        raise UserError("--data: no dataset given; name a folder or a JSON/CSV list")
    return suites
