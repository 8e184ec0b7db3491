"""Files and folders that are on the disk whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def one_line(error: BaseException | str) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a new folder, then put it in the place of `folder`.

    The new folder is on the disk before the old one is moved aside, and the old one is deleted last. A kill
    between the two renames leaves the old one under its other name, where model_folder finds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, previous = folder.with_name(f".{folder.name}.new"), aside(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    fill(new)
    sync_folder(new)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one atomic step."""
    new = path.with_name(f".{path.name}.new")
    write_synced(new, data)
    os.replace(new, path)
    sync_folder(path.parent)


def aside(folder: Path) -> Path:
    """Where replace_folder keeps the old folder until the new one is in its place."""
    return folder.with_name(f".{folder.name}.old")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file of a new folder, and have it on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Have an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable, where the system can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
