"""Finding labelled images on disk: folders, lists and shards (layouts: docs/data.md)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgsnet.data import shards
from dgsnet.data.images import EXTENSIONS
from dgsnet.data.sources import Item
from dgsnet.errors import UserError

CLASS_FOLDERS = {"0_real": 0, "1_fake": 1, "nature": 0, "ai": 1}
SPLIT_FOLDERS = ("train", "val", "test")
LABELS = {"0": 0, "1": 1, "real": 0, "fake": 1, "generated": 1}


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Args:
        path: the image file; of an image in an archive `<archive>/<name>`.
        label: 0 real, 1 generated.
        generator: the group it is reported under.
        caption: text of the image; None while none is attached.
        archive, offset, size: the tar archive that holds it, and which of its bytes; "": a file of its own.
    """

    path: str
    label: int
    generator: str
    caption: str | None = None
    archive: str = ""
    offset: int = 0
    size: int | None = None

    @property
    def item(self) -> Item:
        """Where it lies, to be read or scored."""
        return Item(self.path, path=self.archive or self.path, offset=self.offset, size=self.size)


def find_samples(source: str | Path, split: str | None = None) -> list[Sample]:
    """List the labelled images of a folder, a JSON or CSV list, or WebDataset shards (layouts: docs/data.md).

    Args:
        source: folder with `[<generator>/][<class>/]{0_real,1_fake}/*` or
            `<generator>/{train,val}/{nature,ai}/*` in it, a list of path and label, or tar archives such as
            "shards-{000..099}.tar" or "shards-*.tar".
        split: "train", "val" or "test": folders of the other two names are left out. Lists and shards have no
            splits.

    Returns:
        The samples, sorted by path (lists and shards: in their order).

    Raises:
        UserError: nothing there or nothing recognised, several splits and none chosen, a bad list or shard.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from dgsnet.data.samples import find_samples
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> (root / "progan/cat/1_fake").mkdir(parents=True)
        >>> Image.new("RGB", (8, 8)).save(root / "progan/cat/1_fake/a.png")
        >>> [(s.label, s.generator) for s in find_samples(root)]
        [(1, 'progan')]
    """
    source = Path(source)
    if split is not None and split not in SPLIT_FOLDERS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLIT_FOLDERS)}")
    if source.is_dir():
        return _samples_in_folder(source, split)
    if source.suffix.lower() == ".tar":
        return _samples_in_shards(str(source))
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; expected a dataset folder, a JSON or CSV list, or .tar shards"
        )
    readers = {".json": _json_rows, ".csv": _csv_rows}
    if source.suffix.lower() not in readers:
        raise UserError(
            f"{source}: expected a dataset folder or a list that ends in .json or .csv, or .tar shards"
        )
    rows = readers[source.suffix.lower()](source)
    samples = [_sample_of_row(row, where, source) for where, row in rows]
    if not samples:
        raise UserError(f"{source}: the list is empty; expected rows of path and label")
    return samples


def find_labelled(source: str | Path) -> list[Sample]:
    """The labelled images of a folder (all splits), a CSV list or shards; none where nothing is labelled.

    Raises:
        UserError: labels that cannot be read.
    """
    source = Path(source)
    if source.is_dir():
        return [Sample(path, label, _generator(source, at)) for path, at, label in _labelled(source)]
    if source.suffix.lower() == ".csv" and source.is_file():
        with source.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            columns = next(csv.reader(file), [])
        return find_samples(source) if {"path", "label"} <= set(columns) else []
    if source.suffix.lower() == ".tar":
        records = (record for archive in shards.expand(str(source)) for record in shards.records(archive))
        labelled = any(
            {"cls", "json"} & record.texts.keys() or _label(tuple(record.key.split("/")[:-1])) is not None
            for record in records
        )
        return find_samples(source) if labelled else []
    return []


def _labelled(root: Path) -> list[tuple[str, tuple[str, ...], int]]:
    """Path, folders below the root and label of every image below a class folder."""
    return [(path, folders, label) for path, folders in _walk(root) if (label := _label(folders)) is not None]


def _samples_in_folder(root: Path, split: str | None) -> list[Sample]:
    found = _labelled(root)
    splits = sorted({folder for _, folders, _ in found for folder in folders if folder in SPLIT_FOLDERS})
    if split is None and len(splits) > 1:
        raise UserError(
            f"{root}: holds the splits {', '.join(splits)}; choose one with --split (in Python: split=), or "
            "name a folder of one"
        )
    left_out = set(SPLIT_FOLDERS) - {split} if split else set()
    samples = [
        Sample(path, label, _generator(root, folders))
        for path, folders, label in found
        if not left_out.intersection(folders)
    ]
    if not samples:
        which = f" of split {split}" if split else ""
        raise UserError(
            f"{root}: no labelled images{which} found; looked for [<generator>/][<class>/]{{0_real,1_fake}}/*"
            f" and <generator>/{{train,val}}/{{nature,ai}}/* with extensions {' '.join(sorted(EXTENSIONS))}"
        )
    return samples


def _label(folders: tuple[str, ...]) -> int | None:
    position = _class_folder(folders)
    return None if position is None else CLASS_FOLDERS[folders[position].lower()]


def _class_folder(folders: tuple[str, ...]) -> int | None:
    """Position of the innermost class folder: an outer "nature" is a class of pictures."""
    return max((i for i, folder in enumerate(folders) if folder.lower() in CLASS_FOLDERS), default=None)


def _generator(root: Path, folders: tuple[str, ...]) -> str:
    """The first folder below the root; where images of one generator lie directly in it, the root itself."""
    outer = [folder for folder in folders[: _class_folder(folders)] if folder not in SPLIT_FOLDERS]
    above = [part for part in root.absolute().parts if part not in SPLIT_FOLDERS]
    return outer[0] if outer else above[-1]


def _walk(
    folder: Path, below: tuple[str, ...] = (), open_folders: frozenset = frozenset()
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Image files and the folders between root and them, sorted; links are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in open_folders:
        return
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*below, entry.name), open_folders | {real})
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield entry.path, below


def _samples_in_shards(source: str) -> list[Sample]:
    samples = []
    for archive in shards.expand(source):
        known = set()
        for record in shards.records(archive):
            if record.images:
                samples.append(_sample_of_record(record, archive))
            elif record.texts:
                raise UserError(
                    f"{archive}: {record.key} has no image; the members of a key must be neighbours"
                )
            if record.key in known:
                raise UserError(f"{archive}: {record.key} comes twice; a key must be unique in its shard")
            known.add(record.key)
    if not samples:
        raise UserError(f"{source}: holds no images; looked for members {' '.join(sorted(EXTENSIONS))}")
    return samples


def _sample_of_record(record: shards.Record, archive: str) -> Sample:
    where = f"{archive}, {record.key}"
    if len(record.images) > 1:
        raise UserError(f"{where}: {len(record.images)} images under one key; expected one")
    row = parse_json(record.texts["json"], f"{where}.json") if "json" in record.texts else {}
    if not isinstance(row, dict):
        raise UserError(f'{where}.json: expected an object such as {{"label": 0, "caption": "a cat"}}')
    folders = tuple(record.key.split("/")[:-1])
    label = record.texts.get("cls", row.get("label", _label(folders)))
    if str(label).strip().lower() not in LABELS:
        raise UserError(
            f"{where}: label {label!r} is unknown; give 0 or real, 1, fake or generated as .cls or as "
            '"label" in .json, or put the key below 0_real or 1_fake'
        )
    caption = record.texts.get("txt", row.get("caption")) or None
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"{where}.json: caption is not text")
    outer = [name for name in folders if name.lower() not in CLASS_FOLDERS and name not in SPLIT_FOLDERS]
    generator = row.get("generator") or (outer[0] if outer else _shard_series(archive))
    name, offset, size = record.images[0]
    value = LABELS[str(label).strip().lower()]
    return Sample(f"{archive}/{name}", value, str(generator), caption, archive, offset, size)


def _shard_series(archive: str) -> str:
    """The name that shards have in common: progan-000.tar is of "progan"."""
    stem = Path(archive).stem
    return stem.rstrip("0123456789").rstrip("-_.") or stem


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    rows = read_json(path)
    if isinstance(rows, dict):
        rows = [{"path": name, "label": label} for name, label in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f'{path}: expected a JSON array of {{"path": ..., "label": ...}} or an object of path to label'
        )
    return ((f"entry {i}", row) for i, row in enumerate(rows, 1))


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(f"line {reader.line_num}", row) for row in reader]
            columns = set(reader.fieldnames or ())
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8: {error}") from None
    if not {"path", "label"} <= columns:
        raise UserError(
            f"{path}: its first line must name the columns path and label (and generator, caption)"
        )
    return iter(rows)


def _sample_of_row(row: dict, where: str, source: Path) -> Sample:
    path, label = row.get("path"), str(row.get("label")).strip().lower()
    if not isinstance(path, str) or not path:
        raise UserError(f"{source}, {where}: path is missing")
    if label not in LABELS:
        raise UserError(
            f"{source}, {where}: label {row.get('label')!r} is unknown; use 0 or real, 1, fake or generated"
        )
    caption = row.get("caption") or None
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"{source}, {where}: caption is not text")
    return Sample(str(source.parent / path), LABELS[label], str(row.get("generator") or source.stem), caption)


def read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    return parse_json(text, path)


def parse_json(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not readable as JSON: {error}") from None
