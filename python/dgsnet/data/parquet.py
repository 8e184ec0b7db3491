"""Parquet files with an image in every row, as Hugging Face's datasets and others write them.

Rows cannot be reached one by one, only row groups: those read last are kept, so that images may be asked for
in any order as long as neighbours in time are of few groups.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from dgsnet.data.images import ImageError, check_regular, read_file
from dgsnet.errors import UserError

# Images in Parquet are held, and sent between processes, as they are: large ones must not add up.
MAX_IMAGE = 2**26
MAX_GROUP = 2**30
MOST_COMPRESSED = 8  # times, of a larger row group that is read a row at a time
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

    Images are not read. What is told are label, generator, caption and twin, where there are such columns.

    Raises:
        ImageError: it is not readable, or a row group or a text in it is too large.
    """
    with _opened(source) as (file, columns):
        image = columns.pop("image")
        names = _class_names(file.schema_arrow)
        for group in range(file.num_row_groups):
            size = _checked_size(file, group, image, MAX_GROUP)
            for row, found in enumerate(_columns_of(file, group, columns, names)):
                yield group, row, size, found


def stream(source: str) -> Iterator[tuple[int, int, int, bytes | None, str]]:
    """Every row, without reading further than it is taken: its row group, number there, the group's bytes of
    images, and its image or why there is none.

    Raises:
        ImageError: it is not readable, or a row group is made to fill the memory.
    """
    with _opened(source) as (file, columns):
        for group in range(file.num_row_groups):
            size, compressed = _sizes(file, group, columns["image"])
            # Encoded images hardly become smaller: what does is made to fill the memory, a page at a time.
            if size > max(MAX_GROUP, MOST_COMPRESSED * compressed):
                raise ImageError(_too_large(group, columns["image"], MAX_GROUP))
            for row, value in enumerate(_values(file, columns["image"], group)):
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
    values = _kept.get((source, group, state.st_mtime_ns, state.st_size))
    if row >= len(values):
        raise ImageError("its row is gone")
    return _content(values[row], source)


class _Kept:
    """The images of the row groups read last."""

    def __init__(self) -> None:
        self.groups: OrderedDict[tuple, tuple[list[Any], int]] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple) -> list[Any]:
        """The images of a row group of a file in this state."""
        with self.lock:
            return self._get(key)

    def _get(self, key: tuple) -> list[Any]:
        if key not in self.groups:
            with _opened(key[0]) as (file, columns):
                _checked_size(file, key[1], columns["image"], MAX_GROUP)
                values, size = [], 0
                for value in _values(file, columns["image"], key[1]):
                    values.append(value)
                    size += len(_bytes(value) or b"")
                    # A dictionary's few bytes can stand for many times as much.
                    if size > MAX_GROUP:
                        raise ImageError(_too_large(key[1], columns["image"], MAX_GROUP))
            self.groups[key] = values, size
            self.bytes += size
            while self.bytes > KEPT_BYTES and len(self.groups) > 1:
                _, (_, freed) = self.groups.popitem(last=False)
                self.bytes -= freed
        self.groups.move_to_end(key)
        return self.groups[key][0]


_kept = _Kept()


@contextlib.contextmanager
def _opened(source: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file, and the names of its columns by what they are."""
    pa = import_pyarrow()
    path, named = split_source(source)
    try:
        check_regular(path)
        with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file, _find_columns(file.schema_arrow, named, pa)
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


def _checked_size(file: Any, group: int, column: str, most: int) -> int:
    """Bytes of a column in a row group, as the file's footer tells; ImageError if they are too many."""
    if (size := _sizes(file, group, column)[0]) > most:
        raise ImageError(_too_large(group, column, most))
    return size


def _sizes(file: Any, group: int, column: str) -> tuple[int, int]:
    """Bytes of a column in a row group, and those that they take in the file."""
    found = file.metadata.row_group(group)
    parts = (found.column(i) for i in range(found.num_columns))
    of_column = [part for part in parts if part.path_in_schema.split(".")[0] == column]
    return sum(part.total_uncompressed_size for part in of_column), sum(
        part.total_compressed_size for part in of_column
    )


def _too_large(group: int, column: str, most: int) -> str:
    return (
        f"{column} of row group {group} takes more than {most:,} bytes; write the file anew with smaller row "
        "groups (row_group_size=100)"
    )


def _columns_of(
    file: Any, group: int, columns: dict[str, str], names: dict[str, list[str]]
) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for column in columns.values():
        _checked_size(file, group, column, MAX_TEXTS)
    chosen = list(columns.values())
    for batch in file.iter_batches(TEXT_ROWS, row_groups=[group], columns=chosen, use_threads=False):
        for values in batch.to_pylist():
            found = {what: values[name] for what, name in columns.items()}
            for what, value in found.items():
                words = names.get(columns[what], [])
                if isinstance(value, int) and value in range(len(words)):
                    found[what] = words[value]
                elif isinstance(value, bool):
                    found[what] = int(value)
                elif isinstance(value, str) and len(value) > MAX_TEXT:
                    raise ImageError(f"a {what} of more than {MAX_TEXT:,} letters")
            yield found


def _values(file: Any, column: str, group: int) -> Iterator[Any]:
    # Threads of a pool do not outlive a fork, and loaders fork.
    for batch in file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False):
        for value in batch.column(0):
            yield value.as_py()


def _bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


def _content(value: Any, source: str) -> bytes:
    """The image that a cell holds, or that it names, which must lie in the file's folder."""
    if (data := _bytes(value)) is not None:
        if len(data) > MAX_IMAGE:
            raise ImageError(f"larger than {MAX_IMAGE:,} bytes, the most of an image in Parquet")
        return data
    if isinstance(value, dict) and (path := value.get("path")):
        folder = os.path.dirname(split_source(source)[0])
        return read_file(os.path.join(folder, path), folder=folder or ".")
    raise ImageError("no image in this row")
