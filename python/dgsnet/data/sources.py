"""Where the images to score come from: files, folders, patterns, lists, tars and Parquet, as one stream."""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from dgsnet.errors import UserError

# Images in Parquet are held, and sent between processes, as they are: large ones must not add up.
PARQUET_ROWS = 1
MAX_PARQUET_BYTES = 2**26
# No header of an honest tar comes near this; a hostile one can claim to be as large as the file.
MAX_TAR_HEADER = 2**20


@dataclass(frozen=True, slots=True)
class Item:
    """One image to score and where it lies. Small and picklable: reading is left to whoever scores it.

    Attributes:
        name: what its row is called: the path, `shard.tar/key.jpg` or `table.parquet/17`.
        path: the file that holds it.
        folder: a folder that the file, with all links followed, must lie in; "": anywhere.
        offset: first byte of the image in the file.
        size: its bytes; None: up to the end of the file.
        data: the encoded image itself, where it lies in no file of its own.
        error: why there is nothing to read, else "".
        missing: nothing is there under the name that was given: no image, so to speak, rather than a bad one.
    """

    name: str
    path: str = ""
    folder: str = ""
    offset: int = 0
    size: int | None = None
    data: bytes | None = None
    error: str = ""
    missing: bool = False

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """The encoded image; images.ImageError, with its name, if there is none."""
        from dgsnet.data.images import ImageError, read_file

        if self.error:
            raise ImageError(f"{self.name}: {self.error}")
        if self.data is not None:
            return self.data
        try:
            return read_file(self.path, folder=self.folder, offset=self.offset, size=self.size)
        except ImageError as error:
            raise ImageError(f"{self.name}: {error}") from None

    def read(self) -> np.ndarray:
        """Decode it to uint8 [H, W, 3]; images.ImageError, with its name, if it cannot be."""
        from dgsnet.data.images import read_image

        return read_image(self.read_bytes(), name=self.name)


def find_items(paths: Sequence[str | os.PathLike]) -> Iterator[Item]:
    """The images that paths stand for, in the order given, one at a time; docs/using.md lists the kinds.

    Args:
        paths: image files, folders (searched recursively), glob and brace patterns, lists (.txt, .csv, or
            "-" for standard input), tar shards and Parquet files.

    A file named outright is taken whatever its extension. In folders, names that begin with a dot are left
    out and links to folders not followed; links that lead out of the folder become items with an error.
    What several paths have in common comes once. A path that stands for nothing is an item with an error.

    Raises:
        UserError: a list is no list.

    Example:
        >>> import pathlib, tempfile
        >>> from dgsnet.data.sources import find_items
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> [(item.name == str(folder / "a.png"), item.error) for item in find_items([folder])]
        [(True, '')]
    """
    arguments = [os.fspath(path) for path in paths]
    # The names are kept only where one could come twice.
    seen: set[str] | None = set() if len(arguments) > 1 or any(map(glob.has_magic, arguments)) else None
    for argument in arguments:
        found = False
        repeatable = not _is_list(argument)
        for item in _expand(argument):
            found = True
            if seen is None or not repeatable:
                yield item
            elif item.name not in seen:
                seen.add(item.name)
                yield item
        if not found:
            yield Item(argument, error=_nothing(argument), missing=True)


def _expand(argument: str) -> Iterator[Item]:
    if argument == "-":
        yield from _listed(map(os.fsdecode, sys.stdin.buffer), folder="")
    elif os.path.isdir(argument):
        yield from _walk(argument)
    elif os.path.lexists(argument):
        yield from _open(argument)
    elif "{" in argument:
        import braceexpand

        try:
            names = braceexpand.braceexpand(argument)
        except ValueError as error:
            raise UserError(f"{argument}: {error}") from None
        for name in names:
            if name == argument:  # no pattern after all
                yield from _match(name)
            else:
                found = False
                for item in _expand(name):
                    found = True
                    yield item
                if not found:
                    yield Item(name, error=_nothing(name), missing=True)
    else:
        yield from _match(argument)


def _nothing(argument: str) -> str:
    if _is_list(argument):
        return "the list is empty"
    if os.path.isdir(argument):
        return "no image in this folder (tar and Parquet files are named: 'folder/*.tar')"
    if os.path.exists(argument):
        return "no image in this file"
    if glob.has_magic(argument) or "{" in argument:
        return "no image matches this pattern"
    return "no such file or folder"


def _is_list(path: str) -> bool:
    return path == "-" or _extension(path) in LISTS


def _is_image(path: str) -> bool:
    from dgsnet.data.images import EXTENSIONS

    return _extension(path) in EXTENSIONS


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _open(path: str) -> Iterator[Item]:
    """What one existing file that was named stands for."""
    reader = {**LISTS, **SHARDS}.get(_extension(path))
    return reader(path) if reader else iter([Item(path, path)])


def _match(pattern: str) -> Iterator[Item]:
    # Everything before the first wildcard is the folder that matches must not lead out of.
    fixed = next((i for i, c in enumerate(pattern) if c in "*?["), 0)
    folder = os.path.dirname(pattern[:fixed]) or "."
    for path in sorted(glob.iglob(pattern, recursive=True)):
        if os.path.isdir(path):
            yield from _walk(path)
        elif _is_image(path):
            yield Item(path, path, folder)
        elif _extension(path) in SHARDS:
            yield from SHARDS[_extension(path)](path)


def _walk(root: str) -> Iterator[Item]:
    """Images below a folder, by the order of their paths, holding the names of open folders only."""
    open_folders = [iter([root])]
    while open_folders:
        for path in open_folders[-1]:
            if path.endswith(os.sep) or path == root:
                names, error = _names(path)
                if error:
                    yield Item(path, error=error)
                open_folders.append(iter(names))
                break
            if os.path.islink(path) and os.path.isdir(path):
                if not _inside(path, root):
                    yield Item(path, error=f"a link out of {root}, not followed")
            elif _is_image(path):
                yield Item(path, path, root)
        else:
            open_folders.pop()


def _names(folder: str) -> tuple[list[str], str]:
    """Paths of a folder's entries, sorted, folders with a separator at the end; and an error."""
    try:
        with os.scandir(folder) as scan:
            return sorted(
                os.path.join(folder, entry.name) + os.sep * entry.is_dir(follow_symlinks=False)
                for entry in scan
                if not entry.name.startswith(".")
            ), ""
    except OSError as error:
        return [], f"cannot be listed: {error.strerror}"


def _inside(path: str, folder: str) -> bool:
    path, folder = (os.path.join(os.path.realpath(p), "") for p in (path, folder))
    return path.startswith(folder)


def _text_list(path: str) -> Iterator[Item]:
    with _open_text(path) as lines:
        yield from _listed(lines, os.path.dirname(path))


def _listed(lines: Iterable[str], folder: str) -> Iterator[Item]:
    for line in lines:
        if name := line.rstrip("\r\n"):
            path = os.path.join(folder, name)
            yield Item(path, path)


def _csv_list(path: str) -> Iterator[Item]:
    try:
        with _open_text(path) as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise UserError(f"{path}: its first line must name a column path")
            for row in reader:
                if name := row["path"]:
                    image = os.path.join(os.path.dirname(path), name)
                    yield Item(image, image)
                else:
                    yield Item(f"{path}:{reader.line_num}", error="this line names no path")
    except csv.Error as error:
        raise UserError(f"{path}: not readable as CSV: {error}") from None


def _open_text(path: str) -> TextIO:
    from dgsnet.data.images import ImageError, check_regular

    try:
        check_regular(path)
        # surrogateescape reads file names that are not UTF-8 as the bytes they are.
        return open(path, newline="", encoding="utf-8-sig", errors="surrogateescape")
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class _Headers(io.FileIO):
    """A tar's file as tarfile sees it: only headers are read through it, and no header is huge."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _tar(path: str) -> Iterator[Item]:
    """The images of a tar: their places in it, so that nothing is unpacked and each can be read by itself."""
    from dgsnet.data.images import ImageError, check_regular

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
                base = os.path.basename(member.name)
                if not member.isdir() and _is_image(base) and not base.startswith("."):
                    name = f"{path}/{member.name}"
                    error = _refused(member)
                    yield (
                        Item(name, error=error)
                        if error
                        else Item(name, path, offset=member.offset_data, size=member.size)
                    )
    except ImageError as error:
        yield Item(path, error=str(error))
    # tarfile lets through what its parsing of a damaged header raises.
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        yield Item(path, error=f"not readable as an uncompressed tar: {reason}")


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


def _parquet(path: str) -> Iterator[Item]:
    """The images of a Parquet file, as bytes: its rows cannot be reached one by one."""
    from dgsnet.data.images import ImageError, check_regular

    pa = import_pyarrow()
    try:
        check_regular(path)
        with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            column = _image_column(file.schema_arrow, pa)
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    yield _parquet_item(f"{path}/{row}", value.as_py(), os.path.dirname(path))
                    row += 1
    except (ImageError, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        yield Item(path, error=f"not readable as Parquet: {reason}")


def import_pyarrow() -> Any:
    """pyarrow with its Parquet part; UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'dgs-kernels[scale]'") from None
    return pyarrow


def _image_column(schema: Any, pa: Any) -> str:
    """The column of encoded images: binary, or Hugging Face datasets' struct of bytes and path."""
    from dgsnet.data.images import ImageError

    def binary(kind: Any) -> bool:
        return any(
            test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
        )

    columns = [
        field.name
        for field in schema
        if binary(field.type)
        or (pa.types.is_struct(field.type) and any(f.name == "bytes" and binary(f.type) for f in field.type))
    ]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        found = f"several columns of bytes ({', '.join(columns)})" if columns else "no column of bytes"
        raise ImageError(f"{found}; call the one of the images image")
    return columns[0]


def _parquet_item(name: str, value: bytes | dict[str, Any] | None, folder: str) -> Item:
    if not isinstance(value, dict):
        value = {"bytes": value}
    if value["bytes"] is not None:
        if len(value["bytes"]) > MAX_PARQUET_BYTES:
            return Item(
                name, error=f"larger than {MAX_PARQUET_BYTES:,} bytes, the most of an image in Parquet"
            )
        return Item(name, data=value["bytes"])
    if path := value.get("path"):
        return Item(name, os.path.join(folder, path), folder or ".")
    return Item(name, error="no image in this row")


def find_images(paths: Sequence[str | os.PathLike]) -> tuple[list[Item], dict[str, str]]:
    """`find_items` all at once: the images; and for every path that stands for none, why."""
    items = list(find_items(paths))
    missing = {item.name: item.error for item in items if item.missing}
    return [item for item in items if not item.missing], missing


LISTS = {".csv": _csv_list, ".txt": _text_list}
SHARDS = {".parquet": _parquet, ".tar": _tar}
