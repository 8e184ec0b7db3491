"""Shards in WebDataset's layout: finding out what lies where in tar archives, so that every image can be read
alone, in any order, from any process.

The webdataset package reads archives from front to back, and where such a stream stands cannot be told to
another number of processes. An index of the archives can: it makes shards one more kind of list of images.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dgsnet.data.images import EXTENSIONS
from dgsnet.errors import UserError

TEXTS = ("cls", "txt", "json")
# What stands before the first dot of a file's name is its key, as WebDataset has it.
_KEY = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")


class Place(NamedTuple):
    """A member's name in its archive, its first byte there, and its size in bytes."""

    name: str
    offset: int
    size: int


@dataclass
class Record:
    """What an archive holds under one key.

    Args:
        key: the members' common name, folders included.
        images: where its images lie.
        texts: the contents of the members .cls, .txt and .json, by extension.
    """

    key: str
    images: list[Place] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


def expand(source: str) -> list[str]:
    """Paths of the archives that a name such as "shards-{000..099}.tar" or "shards-*.tar" stands for, sorted.

    Raises:
        UserError: one of them does not exist.
    """
    import braceexpand

    try:
        names = list(braceexpand.braceexpand(source))
    except ValueError:
        raise UserError(
            f"{source}: its braces do not match; write for example shards-{{000..099}}.tar"
        ) from None
    archives = []
    for name in names:
        found = [name] if os.path.exists(name) else glob.glob(name)
        if not found:
            raise UserError(f"{name}: no such archive (of {source})")
        archives += found
    return sorted(set(archives))


def records(archive: str) -> Iterator[Record]:
    """What an archive holds, key by key in its order; image bytes are skipped, not read.

    Raises:
        UserError: it cannot be read, is compressed, cut short or no tar archive, or has two images under a
            key.
    """
    record = None
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                match = _KEY.match(member.name)
                if not match or not member.isreg():
                    continue
                key, extension = match[1], match[2].lower()
                if record is None or record.key != key:
                    if record is not None:
                        yield record
                    record = Record(key)
                if extension in TEXTS:
                    file = tar.extractfile(member)
                    assert file  # of a member that is a file
                    record.texts[extension] = file.read().decode("utf-8-sig").strip()
                elif f".{extension.rpartition('.')[2]}" in EXTENSIONS:
                    record.images.append(Place(member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{archive}: not readable as a tar archive ({reason}); shards must be complete and uncompressed"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{archive}, {member.name}: not text in UTF-8: {error}") from None
    if record is not None:
        yield record
