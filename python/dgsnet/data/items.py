"""Images and where they lie: in files, folders, lists, tar archives and Parquet files, labelled or not."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgsnet.data import folders, lists, parquet, tar
from dgsnet.data.images import EXTENSIONS, ImageError, read_file, read_image
from dgsnet.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# What a label means, and the folder that its images lie in, of those that are written here and of others.
CLASSES = ("real", "generated")
FOLDERS = ("0_real", "1_fake")
CLASS_FOLDERS = {**{name: label for label, name in enumerate(FOLDERS)}, "nature": 0, "ai": 1}
SPLIT_FOLDERS = ("train", "val", "test")
# What members of a tar besides the image tell.
TEXTS = {"cls": "label", "txt": "caption"}
# Most letters of a category's name.
MAX_CATEGORY = 200
LABELS = {**CLASS_FOLDERS, "0": 0, "1": 1, "real": 0, "fake": 1, "generated": 1}


@dataclass(frozen=True, slots=True)
class Item:
    """One image and where it lies. Small and picklable: reading is left to whoever needs it.

    Attributes:
        path: what its row is called: the file, `shard.tar/key.jpg` or `table.parquet/17`.
        label: 0 real, 1 generated; None: not known, or not asked for.
        generator: the group that a labelled image is reported under.
        caption: None while none is attached.
        twin: path of the image that it was made from, or that was made from it, if known.
        container: the tar or Parquet file that holds it; "": it is a file of its own.
        group: in Parquet the number of the row group.
        folder: a folder that the file, with all links followed, must lie in; "": anywhere.
        data: the encoded image itself, where it is at hand.
        error: why there is nothing to read.
        missing: nothing is there under the name that was given: no image, rather than a bad one.
        category: what kind of picture it is, as its list says: night, screenshot, ...
    """

    path: str
    label: int | None = None
    generator: str = ""
    caption: str | None = None
    twin: str | None = None
    container: str = ""
    # Which of the container's bytes; in Parquet the row in its group, and the group's bytes.
    offset: int = 0
    size: int | None = None
    group: int | None = None
    folder: str = ""
    data: bytes | None = None
    error: str = ""
    missing: bool = False
    category: str = ""

    def __str__(self) -> str:
        return self.path

    @property
    def file(self) -> str:
        """The file of the disk that holds it."""
        return parquet.split_source(self.container)[0] or self.path

    @property
    def shard(self) -> str:
        """What is read together with it: its archive or row group; "": nothing."""
        return self.container if self.group is None else f"{self.container}/{self.group:06d}"

    def read_bytes(self) -> bytes:
        """The encoded image; images.ImageError, with its name, if there is none."""
        try:
            if self.error:
                raise ImageError(self.error)
            if self.data is not None:
                return self.data
            if self.group is None:
                return read_file(self.file, folder=self.folder, offset=self.offset, size=self.size)
            return parquet.read_row(self.container, self.group, self.offset)
        except ImageError as error:
            raise ImageError(f"{self.path}: {error}") from None

    def read(self) -> np.ndarray:
        """Decode it to uint8 [H, W, 3]; images.ImageError, with its name, if it cannot be."""
        return read_image(self.read_bytes(), name=self.path)


def find_items(paths: Sequence[str | os.PathLike]) -> Iterator[Item]:
    """The images that paths stand for, in the order given, one at a time; docs/using.md lists the kinds.

    Args:
        paths: image files, folders (searched recursively), glob and brace patterns, lists (.txt, .csv, .json,
            or "-" for standard input), tar archives and Parquet files. Labels are not looked for.

    A file named outright is taken whatever its extension. In folders, names that begin with a dot are left
    out and links to folders not followed; links that lead out of the folder become items with an error.
    What several paths have in common comes once. A path that stands for nothing is an item with an error.

    Raises:
        UserError: a list is no list.

    Example:
        >>> import pathlib, tempfile
        >>> from dgsnet.data.items import find_items
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "a.png").touch()
        >>> [(item.path == str(folder / "a.png"), item.error) for item in find_items([folder])]
        [(True, '')]
    """
    arguments = [os.fspath(path) for path in paths]
    # The names are kept only where one could come twice.
    seen: set[str] | None = set() if len(arguments) > 1 or any(map(_is_pattern, arguments)) else None
    for argument in arguments:
        for item in _expand(argument):
            if seen is not None and not _is_list(argument):
                if item.path in seen:
                    continue
                seen.add(item.path)
            yield item


def find_images(paths: Sequence[str | os.PathLike]) -> tuple[list[Item], dict[str, str]]:
    """`find_items` all at once: the images; and for every path that stands for none, why."""
    # Rows of Parquet are read again when they are needed rather than held, all of them.
    items = [item if item.group is None else replace(item, data=None) for item in find_items(paths)]
    missing = {item.path: item.error for item in items if item.missing}
    return [item for item in items if not item.missing], missing


def _expand(argument: str) -> Iterator[Item]:
    """What a path or pattern stands for, an item that says so if that is nothing."""
    found = False
    for item in _of_path(argument):
        found = True
        yield item
    if not found:
        yield Item(argument, error=_nothing(argument), missing=True)


def _of_path(path: str) -> Iterator[Item]:
    if os.path.isdir(path):
        yield from (Item(found, folder=path, error=error) for found, error in folders.walk(path))
    elif path == lists.STDIN or os.path.lexists(parquet.split_source(path)[0]):
        yield from _of_file(path)
    elif (names := folders.expand(path) if "{" in path else [path]) != [path]:
        for name in names:
            yield from _expand(name)
    else:
        folder = folders.fixed_folder(path)
        for found in folders.match(path):
            if folders.is_image(found):
                yield Item(found, folder=folder)
            elif os.path.isdir(found) or folders.extension(found) in (".tar", ".parquet"):
                yield from _of_path(found)


def _of_file(path: str) -> Iterator[Item]:
    """What one file stands for that was named."""
    kind = folders.extension(parquet.split_source(path)[0])
    try:
        if _is_list(path):
            folder = os.path.dirname(path)
            for where, row in lists.read_list(path):
                if isinstance(name := row.get("path"), str) and name:
                    yield Item(os.path.join(folder, name), category=category_of(row, f"{path}, {where}"))
                else:
                    yield Item(f"{path}, {where}", error="it names no path")
        elif kind == ".tar":
            for name, offset, size, error in tar.images(path):
                yield Item(f"{path}/{name}", container=path, offset=offset, size=size, error=error)
        elif kind == ".parquet":
            file = parquet.split_source(path)[0]
            for number, (group, at, size, data, error) in enumerate(parquet.stream(path)):
                name = f"{file}/{number}"
                yield Item(name, container=path, offset=at, size=size, group=group, data=data, error=error)
        else:
            yield Item(path)
    except ImageError as error:
        yield Item(path, error=str(error))


def _nothing(argument: str) -> str:
    if _is_list(argument):
        return "the list is empty"
    if os.path.isdir(argument):
        return "no image in this folder (tar and Parquet files are named: 'folder/*.tar')"
    if os.path.exists(argument):
        return "no image in this file"
    if _is_pattern(argument):
        return "no image matches this pattern"
    return "no such file or folder"


def _is_list(path: str) -> bool:
    return path == lists.STDIN or folders.extension(path) in lists.LISTS


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) or "{" in path


def paths_hash(items: Iterable[Item]) -> str:
    """By which a call that goes on with a table knows that the images are the same."""
    paths = "\n".join(item.path for item in items)
    return hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest()[:16]


def find_samples(source: str | Path, split: str | None = None) -> list[Item]:
    """The labelled images of a folder, lists, tar archives or Parquet files (layouts: docs/data.md).

    Args:
        source: folder with `[<generator>/][<class>/]{0_real,1_fake}/*` or
            `<generator>/{train,val}/{nature,ai}/*` in it, or .json, .csv, .tar or .parquet files, of which
            a name such as "shards-{000..099}.tar" or "shards-*.tar" may stand for several.
        split: "train", "val" or "test": folders of the other two names are left out. Files have no splits.

    Returns:
        The images with their labels, sorted by path (files: in their order).

    Raises:
        UserError: nothing there or nothing recognised, several splits and none chosen, a bad list or archive,
            an image without a label.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from dgsnet.data.items import find_samples
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> (root / "progan/cat/1_fake").mkdir(parents=True)
        >>> Image.new("RGB", (8, 8)).save(root / "progan/cat/1_fake/a.png")
        >>> [(item.label, item.generator) for item in find_samples(root)]
        [(1, 'progan')]
    """
    if split is not None and split not in SPLIT_FOLDERS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLIT_FOLDERS)}")
    if os.path.isdir(source):
        return _of_split(Path(source), split)
    items = [item for file in _files(str(source)) for item in _labelled(file)]
    if not items:
        listed = "the list is empty; expected rows of path and label"
        raise UserError(f"{source}: {listed if _is_list(str(source)) else 'holds no images'}")
    if bad := [item for item in items if item.label is None]:
        # An image that lacks what others have is a mistake; where none has it, it is no dataset.
        raise (lists.Unlabelled if len(bad) == len(items) else UserError)(bad[0].error)
    return items


def find_labelled(source: str | Path) -> list[Item]:
    """The labelled images of a folder (all splits) or of files; none where nothing is labelled.

    Raises:
        UserError: labels that cannot be read.
    """
    try:
        return _of_folder(Path(source)) if os.path.isdir(source) else find_samples(source)
    except lists.Unlabelled:
        return []


def _of_folder(root: Path) -> list[Item]:
    found = []
    for path, error in folders.walk(str(root), follow=True):
        if error:
            raise UserError(f"{path}: {error}")
        below = _folders(root, path)
        if (label := _label(below)) is not None:
            found.append(Item(path, label, _generator(root, below)))
    return found


def _folders(root: Path, path: str) -> tuple[str, ...]:
    """The folders between root and an image."""
    return tuple(path[len(str(root)) :].strip(os.sep).split(os.sep)[:-1])


def _of_split(root: Path, split: str | None) -> list[Item]:
    found = _of_folder(root)
    places = [set(_folders(root, item.path)) & set(SPLIT_FOLDERS) for item in found]
    splits = sorted(set().union(*places))
    if split is None and len(splits) > 1:
        raise UserError(
            f"{root}: holds the splits {', '.join(splits)}; choose one with --split (in Python: split=), or "
            "name a folder of one"
        )
    left_out = set(SPLIT_FOLDERS) - {split} if split else set()
    chosen = [item for item, place in zip(found, places) if not place & left_out]
    if not chosen:
        which = f" of split {split}" if split else ""
        raise UserError(
            f"{root}: no labelled images{which} found; looked for [<generator>/][<class>/]{{0_real,1_fake}}/*"
            f" and <generator>/{{train,val}}/{{nature,ai}}/* with extensions {' '.join(sorted(EXTENSIONS))}"
        )
    return chosen


def _files(source: str) -> list[str]:
    """The lists, archives and Parquet files that a name stands for."""
    path = parquet.split_source(source)[0]
    if folders.extension(path) not in LABELLED or not (os.path.exists(path) or _is_pattern(path)):
        problem = "" if os.path.exists(path) else "no such file or folder; "
        raise lists.Unlabelled(
            f"{source}: {problem}expected a dataset folder, a list that ends in .json or .csv, or .tar or "
            ".parquet files"
        )
    found = set()
    for name in [path] if os.path.exists(path) else folders.expand(path):
        files = [name] if os.path.exists(name) else list(folders.match(name))
        if not files:
            raise UserError(f"{name}: no such archive (of {source})")
        found.update(files)
    return [f"{file}{source[len(path) :]}" for file in sorted(found)]


def _labelled(source: str) -> Iterator[Item]:
    """The images of one file; one without a label has that as its error."""
    path = parquet.split_source(source)[0]
    try:
        yield from LABELLED[folders.extension(path)](source)
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None


def _item(
    called: Callable[[str], str], name: str, where: str, row: Mapping[str, Any], generator: str, **place: Any
) -> Item:
    """An image as its list, archive or table tells of it; `called` makes paths of its name and its twin's."""
    label, caption, twin = (row.get(key) for key in ("label", "caption", "twin"))
    for what, value, kinds in (("caption", caption or "", str), ("twin", twin or "", (str, int))):
        if not isinstance(value, kinds):
            raise UserError(f"{where}: {what} is not text")
        if isinstance(value, str) and len(value) > tar.MAX_TEXT:
            raise UserError(f"{where}: a {what} of more than {tar.MAX_TEXT:,} letters")
    found = LABELS.get(str(label).strip().lower())
    if found is None:
        place["error"] = f"{where}: label {label!r} is unknown; use 0 or real, 1, fake or generated"
    twin = None if twin in (None, "") else called(str(twin))
    place["category"] = category_of(row, where)
    return Item(called(name), found, str(row.get("generator") or generator), caption or None, twin, **place)


def category_of(row: Mapping[str, Any], where: str) -> str:
    """What a list's row says of it; UserError where that is no short text."""
    category = row.get("category")
    if category is not None and not (isinstance(category, (str, int)) and len(str(category)) <= MAX_CATEGORY):
        raise UserError(f"{where}: category is no text of at most {MAX_CATEGORY} letters")
    return "" if category is None else str(category).strip()


def _inside(container: str) -> Callable[[str], str]:
    return lambda name: f"{container}/{name}"


def _of_list(path: str) -> Iterator[Item]:
    folder = Path(path).parent
    for line, row in lists.read_list(path, labelled=True):
        where = f"{path}, {line}"
        if not isinstance(name := row.get("path"), str) or not name:
            raise UserError(f"{where}: path is missing")
        yield _item(lambda name: str(folder / name), name, where, row, Path(path).stem)


def _of_tar(path: str) -> Iterator[Item]:
    known = set()
    for record in tar.records(path):
        where = f"{path}, {record.key}"
        if record.key in known:
            raise UserError(f"{where} comes twice; a key must be unique in its shard")
        known.add(record.key)
        if len(record.images) > 1:
            raise UserError(f"{where}: {len(record.images)} images under one key; expected one")
        if not record.images:
            if record.texts:
                raise UserError(f"{where} has no image; the members of a key must be neighbours")
            continue
        row = lists.parse_json(record.texts.get("json", "{}"), f"{where}.json")
        if not isinstance(row, dict):
            raise UserError(f'{where}.json: expected an object such as {{"label": 0, "caption": "a cat"}}')
        below = tuple(record.key.split("/")[:-1])
        outer = [name for name in below if name.lower() not in CLASS_FOLDERS and name not in SPLIT_FOLDERS]
        name, offset, size, error = record.images[0]
        texts = {TEXTS[kind]: text for kind, text in record.texts.items() if kind in TEXTS}
        row = {"label": _label(below)} | row | texts
        place = {"container": path, "offset": offset, "size": size, "error": error}
        yield _item(_inside(path), name, where, row, outer[0] if outer else _series(path), **place)


def _of_parquet(source: str) -> Iterator[Item]:
    path = parquet.split_source(source)[0]
    for number, (group, at, size, row) in enumerate(parquet.places(source)):
        place = {"container": source, "offset": at, "size": size, "group": group}
        yield _item(_inside(path), str(number), f"{path}/{number}", row, _series(path), **place)


LABELLED = {".csv": _of_list, ".json": _of_list, ".parquet": _of_parquet, ".tar": _of_tar}


def _label(below: tuple[str, ...]) -> int | None:
    position = _class_folder(below)
    return None if position is None else CLASS_FOLDERS[below[position].lower()]


def _class_folder(below: tuple[str, ...]) -> int | None:
    """Position of the innermost class folder: an outer "nature" is a class of pictures."""
    return max((i for i, folder in enumerate(below) if folder.lower() in CLASS_FOLDERS), default=None)


def _generator(root: Path, below: tuple[str, ...]) -> str:
    """The first folder below the root; where images of one generator lie directly in it, the root itself."""
    outer = [folder for folder in below[: _class_folder(below)] if folder not in SPLIT_FOLDERS]
    above = [part for part in root.absolute().parts if part not in SPLIT_FOLDERS]
    return outer[0] if outer else above[-1]


def _series(path: str) -> str:
    """The name that files have in common: progan-000.tar is of "progan"."""
    stem = Path(path).stem
    return stem.rstrip("0123456789").rstrip("-_.") or stem
