"""Folders and patterns: which files of the disk count as images, and in which order they come."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

from dgsnet.data.images import EXTENSIONS, is_inside
from dgsnet.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".z")
COMPRESSED_TARS = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")


def extension(path: str) -> str:
    """A file's kind, as ".png"; a compressed tar is a tar, and tar.py says what to do with it."""
    stem, kind = os.path.splitext(path.lower())
    return ".tar" if kind in COMPRESSED_TARS or (stem.endswith(".tar") and kind in COMPRESSED) else kind


def is_image(path: str) -> bool:
    """Whether a file counts as an image by its name."""
    return extension(path) in EXTENSIONS


def walk(root: str, *, follow: bool = False) -> Iterator[tuple[str, str]]:
    """Path and error of the images below a folder, by the order of their names.

    Only the names of open folders are held. Names that begin with a dot are left out. A folder that cannot be
    listed has an error, and its path a separator at the end.

    Args:
        root: the folder.
        follow: go into links to folders too, but not in circles. Without it one that leads out of the root
            has an error, and one that does not is left out: its images come under their own names.
    """
    open_folders: list[tuple[str, Iterator[os.DirEntry[str]]]] = []

    def enter(folder: str) -> Iterator[tuple[str, str]]:
        real = os.path.realpath(folder) if follow else folder
        if any(real == other for other, _ in open_folders):
            return
        try:
            with os.scandir(folder) as scan:
                open_folders.append((real, iter(sorted(scan, key=lambda entry: entry.name))))
        except OSError as error:
            yield folder if folder == root else f"{folder}{os.sep}", f"cannot be listed: {error.strerror}"

    yield from enter(root)
    while open_folders:
        if not (entry := next(open_folders[-1][1], None)):
            open_folders.pop()
        elif entry.name.startswith("."):
            continue
        # A link to itself would raise in entry.is_dir().
        elif os.path.isdir(entry.path) if (link := entry.is_symlink()) else entry.is_dir():
            if follow or not link:
                yield from enter(entry.path)
            elif not is_inside(entry.path, root):
                yield entry.path, f"a link out of {root}, not followed"
        elif is_image(entry.name):
            yield entry.path, ""


def expand(pattern: str) -> list[str]:
    """What a pattern with braces stands for, as "shards-{000..099}.tar"; UserError if they do not match."""
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise UserError(
            f"{pattern}: its braces do not match; write for example shards-{{000..099}}.tar"
        ) from None


def match(pattern: str) -> Iterator[str]:
    """Files and folders that a pattern with wildcards stands for, sorted."""
    return iter(sorted(glob.iglob(pattern, recursive=True)))


def fixed_folder(pattern: str) -> str:
    """The folder that matches of a pattern must not lead out of: what stands before its first wildcard."""
    fixed = next((i for i, c in enumerate(pattern) if c in "*?["), 0)
    return os.path.dirname(pattern[:fixed]) or "."
