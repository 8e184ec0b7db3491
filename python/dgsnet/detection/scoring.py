"""`dgsnet predict`: images in, a table of one row each out; what was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dgsnet.data.cells import row_writer
from dgsnet.data.declared import of_item
from dgsnet.data.items import Item, find_items
from dgsnet.data.parquet import import_pyarrow
from dgsnet.data.scores import read_scores
from dgsnet.data.tables import Table, partial
from dgsnet.detection import arguments
from dgsnet.detection.decisions import DECIMALS, SETTINGS, decide, load_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.engine import Engine, answers
from dgsnet.detection.heatmaps import save
from dgsnet.detection.monitor import ALARMED, alarmed
from dgsnet.detection.provenance import ProvenanceReader
from dgsnet.detection.rows import Row, Todo, columns, kept
from dgsnet.errors import UserError
from dgsnet.files import replacing
from dgsnet.model.folders import holds_rule

# Rows of a Parquet table that are in memory at a time and become one row group.
ROW_GROUP = 2**16
SCORE_COLUMNS = ("path", "score", "decision", "error")
# Settings that unfinished tables of former versions do not have, and what they were.
MISSING = SETTINGS | {"declared": False, "alarm": False}


def score(
    detector: Detector,
    items: Iterable[Item],
    *,
    workers: int | None = None,
    consistency: bool = False,
    provenance: ProvenanceReader | None = None,
    declared: bool = False,
    on_score: Callable[[Item, Row], None] | None = None,
    engine: Engine = "local",
    heatmaps: str | Path | None = None,
) -> Iterator[Row]:
    """Score images one after the other, whatever becomes of the processes that read them.

    Args:
        detector: the model.
        items: what to score, of any length.
        workers, engine: as of `dgsnet.detection.engine.answers`.
        consistency: score re-encoded and resized copies too, and be unsure where they are decided otherwise.
        provenance: reads each file's Content Credentials.
        declared: read what each file declares of its origin.
        on_score: called with every image that could be scored, and its row.
        heatmaps: folder for a picture and a .json of each of them, as `heatmaps.save` writes.

    Yields:
        One row for each item, in their order.

    Example:
        >>> for row in score(Detector.load("runs/demo/model"), find_items(["photos"])):  # doctest: +SKIP
        ...     print(row.path, row.decision)
    """
    for answer in answers(detector.job(consistency), items, engine=engine, workers=workers):
        item, (found, error) = answer.item, answer.logits[""]
        row = Row.of(detector, item, detector.probabilities(found).tolist(), error)
        if provenance and not error:
            row = row._replace(**provenance(item)._asdict())
        if declared and not error:
            row = row._replace(**of_item(item)._asdict())
        if on_score and not error:
            on_score(item, row)
        if heatmaps and not error:
            save(detector, item.path, item.read(), heatmaps, answer.single[""][0][0])
        yield row


def predict_command(
    paths: list[str],
    model: arguments.Model,
    out: str = "scores.csv",
    device: arguments.Device = None,
    views: arguments.Views = None,
    batch: arguments.Batch = None,
    precision: arguments.Precision = None,
    crops: arguments.Crops = None,
    workers: arguments.Workers = None,
    resume: bool = False,
    engine: arguments.Engine = "local",
    heatmaps: str | None = None,
    consistency: bool = False,
    provenance: bool = False,
    trust: arguments.Trust = None,
    declared: bool = False,
    pretrained: arguments.Pretrained = None,
    raw_cells: bool = False,
) -> None:
    """Score images into a table with columns path, probability, decision, error.

    With a folder of calibrate --scores for a model, PATHS are tables of another program's scores, and the
    columns are path, score, decision, error.

    Args:
        paths: image files, folders (searched recursively), quoted glob and brace patterns, lists (.txt or
            .csv; - for standard input), tar shards and Parquet files.
        out: the .csv, .jsonl or .parquet to write; it appears under this name when complete.
        resume: go on where a call with the same words was stopped or killed.
        heatmaps: folder for a picture and a .json per image of what made its score; 50 times the work, but
            for that of writing them none with several crops.
        consistency: score re-encoded and resized copies too, in a further column how far apart they are, and
            decide "unsure" where they are decided otherwise; 5 times the work and more.
        provenance: in further columns, the file's Content Credentials: verified, unverified, invalid, absent.
        declared: in further columns, what the file's metadata declare, unsigned: generated, partly, captured,
            none.
        raw_cells: write texts into the .csv as they are; if not given, one that a spreadsheet would compute,
            such as a file's name that begins with =, begins with an apostrophe.
    """
    local = {"heatmaps": heatmaps, "provenance": provenance, "declared": declared}
    for option, given in local.items():
        if given and engine != "local":
            raise UserError(f"--{option} goes with --engine local, not {engine}")
    if engine == "ray" and "-" in paths:
        raise UserError("engine ray cannot read a list from standard input: write it to a .txt file")
    if trust and not provenance:
        raise UserError("--trust goes with --provenance")
    target = Path(out)
    write = WRITERS.get(target.suffix)
    if not write:
        raise UserError(f"{out}: the table's name must end in one of {', '.join(WRITERS)}")
    if write is _write_parquet:
        import_pyarrow()
    elif raw_cells and write is _write_csv:
        write = functools.partial(_write_csv, raw=True)
    if holds_rule(model):
        others = (device, views, batch, precision, crops, workers, resume, heatmaps, consistency, provenance)
        if any((*others, declared, pretrained, engine != "local")):
            raise UserError(f"{model} holds a threshold and no network: it takes --out and --raw_cells alone")
        counts = Counter[str]()
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, _decided(paths, model, counts), SCORE_COLUMNS)
        return _tell(target, counts, model, alarmed(model))
    _check_found(paths)
    how: dict[str, Any] = {"views": views, "batch": batch, "precision": precision, "crops": crops}
    with ProvenanceReader(trust) if provenance else contextlib.nullcontext() as reader:
        detector = Detector.load(model, device, pretrained=pretrained, **how)
        begun = settings(detector, paths, consistency=consistency, provenance=reader, declared=declared)
        fields = kept(declared)
        with Table(partial(target), begun, fields, missing=MISSING, resume=resume) as table:
            todo = Todo(paths, table.path, table.end, fields)
            options: Any = {"consistency": consistency, "provenance": reader, "declared": declared}
            options |= {"engine": engine, "heatmaps": heatmaps}
            rows = score(detector, todo, workers=workers, **options)
            rate = _fill(table, rows, detector.waiting)
            counts = Counter(row["decision"] for row in table.rows())
            finished = (Row(**row) for row in table.rows())
            write(
                target, finished, columns(consistency=consistency, provenance=provenance, declared=declared)
            )
            table.remove()
    _tell(target, counts, model, detector.alarmed, rate)


def _decided(paths: Sequence[str], model: str, counts: Counter[str]) -> Iterator[Row]:
    """Decisions on the rows of tables of scores, and how many there are of each."""
    calibration, alarm = load_calibration(model), alarmed(model)
    if not calibration or not calibration.raw:
        raise UserError(
            f"{model} has no threshold of another program's scores: see dgsnet calibrate --scores"
        )
    for path in paths:
        for row in read_scores(path):
            (name,) = decide(row.score, calibration)
            name = "unsure" if alarm and name == "generated" else name
            counts[name] += 1
            yield Row(row.path, row.score, name, "")


def _tell(target: Path, counts: Counter[str], model: str, alarm: bool, rate: str = "") -> None:
    """What came of it, by decision; UserError where nothing could be read."""
    if alarm:
        print(ALARMED.format(model), file=sys.stderr)
    read = ", ".join(
        f"{counts[d]} {d}" for d in ("generated", "real", "unsure") if counts[d] or d != "unsure"
    )
    print(f"{target}: {read}, {counts['']} could not be read{rate}")
    if counts[""] == counts.total():
        raise UserError(f"none of the images could be read; {target} says why for each")
    if counts[""]:
        print(f"the column error of {target} says why", file=sys.stderr)


def _check_found(paths: Sequence[str]) -> None:
    """One line where there is nothing to score at all. Standard input can be read but once: not looked at."""
    if "-" in paths:
        return
    item = Item("PATHS", error="no path given")
    for item in find_items(paths):
        if not item.missing:
            return
    raise UserError(f"{item.path}: {item.error}; give image files, folders, lists, shards or quoted patterns")


def settings(
    detector: Detector,
    paths: Sequence[str],
    *,
    consistency: bool = False,
    provenance: ProvenanceReader | None = None,
    declared: bool = False,
) -> dict[str, Any]:
    """What the rows depend on, as JSON values."""
    return detector.settings() | {
        "calibration": detector.calibration and detector.calibration.values(),
        "paths": list(paths),
        "consistency": consistency,
        "provenance": hashlib.sha256(provenance.anchors.encode()).hexdigest()[:16] if provenance else "",
        "declared": declared,
        "alarm": detector.alarmed,
    }


def _fill(table: Table, rows: Iterator[Row], waiting: Callable[[], str]) -> str:
    """Take down every row; returns how fast, in words, and what the model waits for."""
    from tqdm import tqdm

    before, begin = table.done, time.monotonic()
    with tqdm(initial=before, unit="image", disable=None) as progress:
        for row in rows:
            table.add({name: getattr(row, name) for name in table.columns})
            progress.set_postfix_str(waiting(), refresh=False)
            progress.update()
    new, seconds = table.done - before, time.monotonic() - begin
    why = f" (the model {waits})" if (waits := waiting()) else ""
    return f"; {new / seconds:.1f} images per second{why}" if new else ""


def _write_csv(target: Path, rows: Iterator[Row], columns: Sequence[str], *, raw: bool = False) -> None:
    # surrogateescape writes file names that are not UTF-8 as the bytes they are.
    with replacing(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        write = row_writer(file, raw=raw)
        write(columns)
        for row in rows:
            values = (getattr(row, column) for column in columns)
            # No probability is below 0, and no number is a formula.
            # Scores of another program have all their digits.
            short = columns != SCORE_COLUMNS
            write(f"{x:.{DECIMALS}f}" if short and isinstance(x, float) else x for x in values)


def _write_jsonl(target: Path, rows: Iterator[Row], columns: Sequence[str]) -> None:
    with replacing(target, "w", encoding="ascii") as file:
        for row in rows:
            file.write(json.dumps(_with_nulls(row, columns)) + "\n")


def _write_parquet(target: Path, rows: Iterator[Row], columns: Sequence[str]) -> None:
    pa = import_pyarrow()
    words = pa.dictionary(pa.int8(), pa.string())
    kinds = {"probability": pa.float64(), "score": pa.float64(), "spread": pa.float64(), "decision": words}
    kinds |= {"provenance": words, "declared": words}
    schema = pa.schema([(column, kinds.get(column, pa.string())) for column in columns])
    with replacing(target, "wb") as file, pa.parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            rows_of_group = [_utf8(_with_nulls(row, columns)) for row in group]
            writer.write_table(pa.Table.from_pylist(rows_of_group, schema))


def _with_nulls(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    values = {column: getattr(row, column) for column in columns}
    return {column: None if value == "" else value for column, value in values.items()}


def _utf8(row: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a file name that are no UTF-8 as \\xNN: Parquet holds no others."""
    return {
        key: os.fsencode(value).decode(errors="backslashreplace") if isinstance(value, str) else value
        for key, value in row.items()
    }


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
