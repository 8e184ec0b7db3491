"""Parquet files with an image in every row, as Hugging Face's datasets and others write them.

Rows cannot be reached one by one, only row groups: those read last are kept, so that images may be asked for
in any order as long as neighbours in time are of few groups. They are read in a process of their own
(apart.py): a page may be unpacked to more than the footer says, and the reader is native code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from dgsnet.apart import MAX_MEMORY, Apart, Gone
from dgsnet.data.images import ImageError, check_regular, read_file
from dgsnet.errors import UserError

# Images in Parquet are held, and sent between processes, as they are: large ones must not add up.
MAX_IMAGE = 2**26
MAX_GROUP = 2**30
# Most rows of a row group, as rows of nothing take no bytes.
MAX_ROWS = 2**20
# A larger row group, read a row at a time, may be compressed so many times.
MOST_COMPRESSED = 8
# Encoded images of row groups that each process keeps.
KEPT_BYTES = 2**28
# Of a text, of the texts of a row group, and rows of texts in memory at a time: few bytes in a file can stand
# for the same text in every row.
MAX_TEXT = 2**20
MAX_TEXTS = 2**26
TEXT_ROWS = 16
# The columns that are looked for, the first that is there; others are named behind the path.
NAMES = {
    "image": ("image", "image_data"),
    "label": ("label",),
    "generator": ("generator", "model_name", "model"),
    "caption": ("caption", "prompt"),
    "twin": ("twin",),
    "category": ("category",),
}


def import_pyarrow() -> Any:
    """pyarrow with its Parquet part; UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'dgs-kernels[scale]'") from None
    return pyarrow


def split_source(source: str) -> tuple[str, dict[str, str]]:
    """Path, and column by what it is, of a source such as "photos.parquet#image=photo,label=is_fake"."""
    path, mark, words = source.rpartition(".parquet#")
    if not mark or os.path.exists(source):
        return source, {}
    named = dict(word.partition("=")[::2] for word in words.split(","))
    if unknown := named.keys() - NAMES.keys():
        raise UserError(f"{source}: {', '.join(sorted(unknown))} is none of {', '.join(NAMES)}")
    return f"{path}.parquet", named


def places(source: str) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Of every row its row group, its number there, the group's bytes of images, and what else is told of it.

    Images are not read. What is told are the other columns of NAMES, where there are such.

    Raises:
        ImageError: it is not readable, or a row group or a text in it is too large.
    """
    columns, groups = _ask("layout", source)
    for group, (rows, sizes) in enumerate(groups):
        for what, (size, _) in sizes.items():
            if size > (most := MAX_GROUP if what == "image" else MAX_TEXTS):
                raise ImageError(_too_large(group, columns[what], most))
        if rows > MAX_ROWS:
            raise ImageError(f"row group {group} has more than {MAX_ROWS:,} rows; write the file anew")
        others = _rows("texts", source, group) if len(columns) > 1 else ({} for _ in range(rows))
        for row, found in enumerate(others):
            yield group, row, sizes["image"][0], found


def stream(source: str) -> Iterator[tuple[int, int, int, bytes | None, str]]:
    """Every row, without reading much further than it is taken: its row group, number there, the group's
    bytes of images, and its image or why there is none.

    Raises:
        ImageError: it is not readable, or a row group is made to fill the memory.
    """
    columns, groups = _ask("layout", source)
    for group, (_, sizes) in enumerate(groups):
        size, compressed = sizes["image"]
        # Encoded images hardly become smaller: what does is made to fill the memory, a page at a time.
        if size > max(MAX_GROUP, MOST_COMPRESSED * compressed):
            raise ImageError(_too_large(group, columns["image"], MAX_GROUP))
        for row, value in enumerate(_rows("images", source, group)):
            try:
                yield group, row, size, _content(value, source), ""
            except ImageError as error:
                yield group, row, size, None, str(error)


def read_row(source: str, group: int, row: int) -> bytes:
    """The encoded image of a row. Its row group is read and kept, as far as KEPT_BYTES allow.

    Raises:
        ImageError: there is none, or it or its row group is too large or not readable.
    """
    try:
        state = os.stat(split_source(source)[0])
    except OSError as error:
        raise ImageError(f"cannot be opened: {error.strerror}") from None
    # The same relative path is another file after a change of folder.
    file = state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size
    values = _kept.get((source, group, file))
    if row >= len(values):
        raise ImageError("its row is gone")
    return _content(values[row], source)


# An image's size in bytes, where it lies if it is not here, and its bytes.
_Value = tuple[int, str, bytes | None]


class _Kept:
    """The images of the row groups read last."""

    def __init__(self) -> None:
        self.groups: OrderedDict[tuple, tuple[list[_Value], int]] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple) -> list[_Value]:
        """The images of a row group of a file in this state."""
        with self.lock:
            return self._get(key)

    def _get(self, key: tuple) -> list[_Value]:
        if key not in self.groups:
            values: list[_Value] = []
            size = 0
            for value in _rows("images", key[0], key[1]):
                values.append(value)
                size += len(value[2] or b"")
                # A dictionary's few bytes, and a footer that lies, can stand for many times as much.
                if size > MAX_GROUP or len(values) > MAX_ROWS:
                    raise ImageError(_too_large(key[1], "image", MAX_GROUP))
            self.groups[key] = values, size
            self.bytes += size
            while self.bytes > KEPT_BYTES and len(self.groups) > 1:
                _, (_, freed) = self.groups.popitem(last=False)
                self.bytes -= freed
        self.groups.move_to_end(key)
        return self.groups[key][0]


_kept = _Kept()


def _content(value: _Value, source: str) -> bytes:
    """The image of a row, which may lie in a file that it names, in the folder of the source."""
    size, path, data = value
    if size > MAX_IMAGE:
        raise ImageError(f"larger than {MAX_IMAGE:,} bytes, the most of an image in Parquet")
    if data is not None:
        return data
    if path:
        folder = os.path.dirname(split_source(source)[0])
        return read_file(os.path.join(folder, path), folder=folder or ".")
    raise ImageError("no image in this row")


def _too_large(group: int, column: str, most: int) -> str:
    return (
        f"{column} of row group {group} takes more than {most:,} bytes; write the file anew with smaller row "
        "groups (row_group_size=100)"
    )


# What an open reader holds is no harm that an earlier call has done.
_apart = Apart("dgsnet.data.parquet:prepare", library="pyarrow", kept=MAX_MEMORY)


def _ask(function: str, source: str, *words: Any) -> Any:
    """Call a function on a source in the process that reads Parquet, whose footers may lie."""
    import_pyarrow()
    path, named = split_source(source)
    try:
        check_regular(path)
        # That process has the current folder in which it was started.
        place = os.path.abspath(path)
        answer, content = _apart(f"{__name__}:{function}", b"", place, named, *words)
    except OSError as error:
        raise ImageError(f"not readable as Parquet: {error.strerror}") from None
    except (Gone, ImageError) as error:
        raise ImageError(f"not readable as Parquet: {error}") from None
    if "error" in answer:
        raise ImageError(answer["error"])
    return (answer["value"], content) if function == "images" else answer["value"]


def _rows(function: str, source: str, group: int) -> Iterator[Any]:
    """The rows of a row group, some at a time."""
    start, ended = 0, False
    while not ended:
        if function == "images":
            (rows, ended), content = _ask(function, source, group, start)
            place = 0
            for size, path in rows:
                here = 0 <= size <= MAX_IMAGE
                yield size, path, bytes(content[place : place + size]) if here else None
                place += size if here else 0
        else:
            rows, ended = _ask(function, source, group, start)
            yield from rows
        start += len(rows)


# What follows is called in the process that reads Parquet.

_Answer = tuple[Any, int, list[bytes]]
# By what is read, the file and its state, the row group and the next row: readers that have come so far.
_running: dict[tuple, Iterator[Any]] = {}
MAX_RUNNING = 4
# Most bytes of images, or of rows of texts, in one answer.
CALL_BYTES = 2**23
CALL_ROWS = 1024


def prepare() -> None:
    """What such a process does first: it reads in one thread, and takes memory only as it needs it."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    pa = import_pyarrow()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def _answering(read: Callable[..., tuple[Any, list[bytes]]]) -> Callable[..., _Answer]:
    @functools.wraps(read)
    def answer(_: bytes, *words: Any) -> _Answer:
        try:
            value, parts = read(*words)
        except ImageError as error:
            return {"error": str(error)}, 0, []
        return {"value": value}, sum(map(len, parts)), parts

    return answer


@_answering
def layout(path: str, named: dict[str, str]) -> tuple[Any, list[bytes]]:
    """The columns by what they are, and of each row group its rows and each column's bytes, also packed."""
    with _opened(path, named) as (file, columns):
        groups = [
            (file.metadata.row_group(group).num_rows, _sizes(file, group, columns))
            for group in range(file.num_row_groups)
        ]
    return (columns, groups), []


@_answering
def texts(path: str, named: dict[str, str], group: int, start: int) -> tuple[Any, list[bytes]]:
    """What is told of rows besides their images, and whether these are the last."""
    rows, size = [], 0
    with _from(start, _texts_of, path, named, group) as (values, left):
        for found in values:
            rows.append(found)
            size += sum(len(value) for value in found.values() if isinstance(value, str))
            if size >= CALL_BYTES or len(rows) >= CALL_ROWS:
                left(start + len(rows))
                return (rows, False), []
    return (rows, True), []


@_answering
def images(path: str, named: dict[str, str], group: int, start: int) -> tuple[Any, list[bytes]]:
    """Images: bytes of each, or -1 and the path that is told; and whether these rows are the last."""
    rows: list[tuple[int, str]] = []
    parts: list[bytes] = []
    size = 0
    with _from(start, _images_of, path, named, group) as (values, left):
        for value in values:
            data = value.get("bytes") if isinstance(value, dict) else value
            rows.append(
                (-1 if data is None else len(data), value.get("path") or "" if data is None and value else "")
            )
            if data is not None and len(data) <= MAX_IMAGE:
                parts.append(data)
                size += len(data)
            if size >= CALL_BYTES or len(rows) >= CALL_ROWS:
                left(start + len(rows))
                return (rows, False), parts
    return (rows, True), parts


@contextlib.contextmanager
def _from(
    start: int, rows: Callable[..., Iterator[Any]], path: str, named: dict[str, str], group: int
) -> Iterator[tuple[Iterator[Any], Callable[[int], None]]]:
    """The rows of a row group from one on, of a reader that was left there if there is one."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise ImageError(f"not readable as Parquet: {error.strerror}") from None
    key = rows, path, tuple(named.items()), group, state.st_mtime_ns, state.st_size
    values = _running.pop((key, start), None) or itertools.islice(rows(path, named, group), start, None)

    def left(place: int) -> None:
        _running[key, place] = values
        if len(_running) > MAX_RUNNING:
            del _running[next(iter(_running))]

    yield values, left


@contextlib.contextmanager
def _opened(path: str, named: dict[str, str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file, and the names of its columns by what they are."""
    pa = import_pyarrow()
    try:
        with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file, _find_columns(file.schema_arrow, named, pa)
    except MemoryError:
        # This process's caller sees to it.
        raise
    except (ImageError, pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ImageError(f"not readable as Parquet: {reason}") from None


def _find_columns(schema: Any, named: dict[str, str], pa: Any) -> dict[str, str]:
    if missing := [name for name in named.values() if name not in schema.names]:
        raise ImageError(f"it has no column {missing[0]}, but {', '.join(schema.names)}")
    found = {
        what: name for what, names in NAMES.items() for name in names[::-1] if name in schema.names
    } | named
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)

    def holds_bytes(kind: Any) -> bool:
        """Binary, or Hugging Face datasets' struct of bytes and path."""
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return any(test(kind) for test in tests)

    images = [field.name for field in schema if holds_bytes(field.type)]
    if found.get("image") not in images:
        if "image" in named or len(images) != 1:
            several = f"several columns of bytes ({', '.join(images)})" if images else "no column of bytes"
            raise ImageError(f"{several}; call the one of the images image, or name it: FILE#image=COLUMN")
        found["image"] = images[0]
    return found


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names that the numbers of a column stand for, where Hugging Face's datasets wrote them down."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: kind["names"]
            for column, kind in features.items()
            if isinstance(kind, dict)
            and kind.get("_type") == "ClassLabel"
            and isinstance(kind["names"], list)
        }
    return {}


def _sizes(file: Any, group: int, columns: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Bytes of columns in a row group, and those that they take in the file, as its footer tells."""
    found = file.metadata.row_group(group)
    parts = [found.column(i) for i in range(found.num_columns)]
    sizes = {}
    for what, column in columns.items():
        of_column = [part for part in parts if part.path_in_schema.split(".")[0] == column]
        sizes[what] = (
            sum(part.total_uncompressed_size for part in of_column),
            sum(part.total_compressed_size for part in of_column),
        )
    return sizes


def _texts_of(path: str, named: dict[str, str], group: int) -> Iterator[dict[str, Any]]:
    with _opened(path, named) as (file, columns):
        names = _class_names(file.schema_arrow)
        others = {what: column for what, column in columns.items() if what != "image"}
        chosen = list(others.values())
        for batch in file.iter_batches(TEXT_ROWS, row_groups=[group], columns=chosen, use_threads=False):
            for values in batch.to_pylist():
                yield {
                    what: _checked(what, values[column], names.get(column, []))
                    for what, column in others.items()
                }


def _checked(what: str, value: Any, words: list[str]) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and value in range(len(words)):
        return words[value]
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ImageError(f"a {what} of more than {MAX_TEXT:,} letters")
    # Values of other kinds are neither labels nor texts, and a message shows them.
    return value if value is None or isinstance(value, (str, int, float)) else [repr(value)[:80]]


def _images_of(path: str, named: dict[str, str], group: int) -> Iterator[Any]:
    with _opened(path, named) as (file, columns):
        column = columns["image"]
        for batch in file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False):
            for value in batch.column(0):
                yield value.as_py()
