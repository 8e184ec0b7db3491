"""Tar archives, WebDataset's shards among them: what lies where, so that each image can be read by itself.

The webdataset package reads archives from front to back, and where such a stream stands cannot be told to
another number of processes. An index of the archives can: it makes shards one more kind of list of images.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dgsnet.data.folders import is_image
from dgsnet.data.images import ImageError, check_regular

# No header of an honest tar comes near this; a hostile one can claim to be as large as the file.
MAX_HEADER = 2**20
# A label, a caption, or some lines of JSON.
MAX_TEXT = 2**20
TEXTS = ("cls", "txt", "json")
# How files begin that gzip, bzip2, xz, Zstandard and lz4 have made.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
# What stands before the first dot of a file's name is its key, as WebDataset has it.
_KEY = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")


class Member(NamedTuple):
    """An image in an archive: its name there, first byte, size in bytes, and why it is not to be read."""

    name: str
    offset: int
    size: int
    error: str


@dataclass
class Record:
    """What an archive holds under one key.

    Attributes:
        key: the members' common name, folders included.
        texts: of .cls, .txt and .json, by extension.
    """

    key: str
    images: list[Member] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


def images(path: str) -> Iterator[Member]:
    """The images of an archive, in its order; nothing is unpacked.

    Raises:
        ImageError: why it cannot be read, or read on, without its path.
    """
    for _, member in _members(path):
        base = os.path.basename(member.name)
        if not member.isdir() and is_image(base) and not base.startswith("."):
            yield _place(member)


def records(path: str) -> Iterator[Record]:
    """What an archive holds, key by key in its order; image bytes are skipped, not read.

    Raises:
        ImageError: as of `images`; and a text is too long or not in UTF-8.
    """
    record = None
    for tar, member in _members(path):
        if not (found := _KEY.match(member.name)) or member.isdir():
            continue
        key, kind = found[1], found[2].lower()
        if record is None or record.key != key:
            if record is not None:
                yield record
            record = Record(key)
        if kind in TEXTS and not _refused(member):
            record.texts[kind] = _text(tar, member)
        elif is_image(member.name):
            record.images.append(_place(member))
    if record is not None:
        yield record


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT:
        raise ImageError(f"{member.name}: a text of more than {MAX_TEXT:,} bytes")
    file = tar.extractfile(member)
    # The member is a file.
    assert file
    try:
        return file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ImageError(f"{member.name}: not text in UTF-8: {error}") from None


def _place(member: tarfile.TarInfo) -> Member:
    return Member(member.name, member.offset_data, member.size, _refused(member))


def _refused(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link in a tar, not followed"
    if not member.isreg():
        return "not a regular file"
    if member.sparse:
        return "a sparse file in a tar"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the tar"
    return ""


class _Headers(io.FileIO):
    """A tar's file as tarfile sees it: only headers and texts are read through it, and none is huge."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= max(MAX_HEADER, MAX_TEXT):
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    try:
        check_regular(path)
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            # Nothing is in it, and next() of Python 3.10 would look for more before the file's beginning.
            if tar.firstmember is None:  # type: ignore[attr-defined]  # typeshed lacks it
                return
            while (member := tar.next()) is not None:
                # They would hold all there are.
                tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it
                if member.offset <= last:
                    raise tarfile.ReadError("members in a circle")
                last = member.offset
                yield tar, member
    except ImageError:
        raise
    # tarfile lets through what its parsing of a damaged header raises.
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        with contextlib.suppress(OSError), open(path, "rb") as start:
            if start.read(6).startswith(COMPRESSED):
                reason = "a compressed tar"
        raise ImageError(
            f"not readable as a tar archive ({reason}); shards must be complete and uncompressed"
        ) from None
