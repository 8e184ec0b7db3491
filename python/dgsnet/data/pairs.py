"""Twins: a real image and what a generator made of it, alike in all else, and which images they are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgsnet.data.items import CLASS_FOLDERS, SPLIT_FOLDERS, Item
from dgsnet.data.lists import read_list

TWINS_FILE = "twins.csv"


def attach_twins(samples: list[Item], root: str | Path) -> list[Item]:
    """The same samples; those that name no twin have the one that the dataset gives them, if any.

    Args:
        samples: of find_samples.
        root: what it was given. A folder's twins.csv, or that of its split folders, names pairs in its
            columns `path` and `twin`, relative to it. Without such a file, images of one generator and
            name in a folder for real and in one for generated images are twins: `0_real/7.png` and
            `1_fake/7.png`.

    Raises:
        UserError: a twins.csv that cannot be read.
    """
    if not os.path.isdir(root):
        return samples
    folders = (Path(root), *(Path(root) / split for split in SPLIT_FOLDERS))
    tables = [folder / TWINS_FILE for folder in folders if (folder / TWINS_FILE).exists()]
    if tables:
        # A line that ends too early lacks one of the two.
        rows = [
            (file.parent, row)
            for file in tables
            for _, row in read_list(str(file))
            if row.get("twin") and row["path"]
        ]
        table = {_path(folder, row["twin"]): _path(folder, row["path"]) for folder, row in rows}
        found = [table.get(os.path.abspath(sample.path)) for sample in samples]
    else:
        real = {_name(sample, root): sample.path for sample in samples if sample.label == 0}
        found = [real.get(_name(sample, root)) if sample.label == 1 else None for sample in samples]
    return [
        sample if sample.twin is not None or twin is None else dataclasses.replace(sample, twin=twin)
        for sample, twin in zip(samples, found)
    ]


def find_pairs(samples: Sequence[Item]) -> np.ndarray:
    """Places of the twins among labelled samples, int64 [P, 2]: a real image and a generated one.

    A real image with several twins is in as many pairs. A twin that is not among the samples, or has the
    same label, makes no pair.
    """
    places = {os.path.abspath(sample.path): place for place, sample in enumerate(samples)}
    pairs: dict[tuple[int, int], None] = {}
    for place, sample in enumerate(samples):
        other = places.get(os.path.abspath(sample.twin)) if sample.twin is not None else None
        if other is not None and samples[other].label != sample.label:
            pairs[(other, place) if sample.label else (place, other)] = None
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def _path(folder: Path, name: str) -> str:
    return os.path.abspath(folder / name)


def _name(sample: Item, root: str | Path) -> str:
    """What twins have in common: the path below the root, without ending and class."""
    parts = os.path.relpath(sample.path, root).split(os.sep)
    *folders, name = [part for part in parts if part not in CLASS_FOLDERS]
    return os.sep.join([*folders, os.path.splitext(name)[0]])
