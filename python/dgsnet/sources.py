"""Where images come from: the files that paths, folders and patterns stand for."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from dgsnet.images import EXTENSIONS


def find_images(paths: Sequence[str | Path]) -> tuple[list[str], dict[str, str]]:
    """The image files that files, folders (searched recursively) and glob patterns stand for.

    Returns:
        The files, in the order given and sorted within a folder or pattern, each once; and for every
        path that stands for none, why. A file named outright is taken whatever its extension; in folders,
        names that begin with a dot are left out and links to folders not followed.
    """

    def is_image(path: str) -> bool:
        return Path(path).suffix.lower() in EXTENSIONS and os.path.isfile(path)

    def inside(folder: str) -> list[str]:
        found = []
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        return sorted(filter(is_image, found))

    files: dict[str, None] = {}
    missing: dict[str, str] = {}
    for path in map(str, paths):
        if os.path.isdir(path):
            found, why = inside(path), "no image in this folder"
        elif os.path.exists(path):
            found, why = [path], ""
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            found = [
                f for m in matches for f in (inside(m) if os.path.isdir(m) else [m] if is_image(m) else [])
            ]
            why = "no image matches this pattern"
        else:
            found, why = [], "no such file or folder"
        files.update(dict.fromkeys(found))
        if not found:
            missing[path] = why
    return list(files), missing
