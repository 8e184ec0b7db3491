"""Captions from JSON files, attached to the images that they describe."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dgsnet.data.items import SPLIT_FOLDERS, Item
from dgsnet.data.lists import read_json
from dgsnet.errors import UserError

CAPTIONS_FILE = "captions.json"


def attach_captions(
    samples: list[Item], captions: str | Path, root: str | Path, *, partly: bool = False
) -> list[Item]:
    """The same samples, every one with a caption.

    Args:
        samples: captions they already have are kept (except with "none").
        captions: JSON object of image path to text, keys absolute or relative to the root or to the JSON's
            folder; "auto": captions.json of the root and of its split folders; "none": the empty caption
            for every image (what that means for training: docs/data.md).
        root: what find_samples was given.
        partly: leave images without a caption as they are, if others have one.

    Raises:
        UserError: no or an unusable JSON file, or images without a caption, counted, with the remedy.

    Example:
        >>> from dgsnet.data.items import Item
        >>> from dgsnet.data.captions import attach_captions
        >>> attach_captions([Item("a.png", 0, "cats")], "none", ".")[0].caption
        ''
    """
    if captions == "none":
        return [dataclasses.replace(sample, caption="") for sample in samples]
    root = Path(root) if Path(root).is_dir() else Path(root).parent
    if captions == "auto":
        files = [folder / CAPTIONS_FILE for folder in (root, *(root / split for split in SPLIT_FOLDERS))]
        files = [file for file in files if file.exists()]
    else:
        files = [Path(captions)]
    read = {file: _read_captions(file) for file in files}
    # Where two readings of a key meet, the one relative to its own file's folder wins.
    table = {os.path.abspath(root / key): text for entries in read.values() for key, text in entries.items()}
    for file, entries in read.items():
        table.update((os.path.abspath(file.parent / key), text) for key, text in entries.items())

    captioned = [
        sample
        if sample.caption is not None
        else dataclasses.replace(sample, caption=table.get(os.path.abspath(sample.path)))
        for sample in samples
    ]
    missing = [sample.path for sample in captioned if sample.caption is None]
    if missing and not (partly and len(missing) < len(samples)):
        looked = ", ".join(map(str, files)) or f"{root / CAPTIONS_FILE}, which does not exist"
        raise UserError(
            f"{len(missing)} of {len(samples)} images have no caption, the first is {missing[0]} (looked in "
            f"{looked}); make captions with `dgsnet caption --data {root}`, or train without them: "
            "--data.captions none"
        )
    return captioned


def _read_captions(path: Path) -> dict[str, str]:
    entries = read_json(path)
    if not isinstance(entries, dict) or not all(isinstance(text, str) for text in entries.values()):
        raise UserError(f"{path}: expected a JSON object of image path to caption")
    return entries
