"""Files and folders that are on the disk whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dgsnet.errors import UserError

LOCK_FILE = ".lock"
# Letters of a message: names in it may come from strangers, and the remedy stands at its end.
LONGEST_LINE = 1500


def one_line(error: BaseException | str, longest: int = LONGEST_LINE) -> str:
    """An error's message without line breaks; of more letters than `longest` the middle is left out."""
    line = " ".join(str(error).split())
    if len(line) <= longest:
        return line
    begin = longest // 2
    return f"{line[:begin]} [...] {line[begin + 7 - longest :]}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made where there is none, for this process alone; the folder is left as it was found.

    The lock is one that the system releases when a process ends, however it ends: the file of a process that
    was killed holds nobody up.

    Raises:
        UserError: another process holds the folder, which it names; or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    file = open_locked(path)
    if file is None:
        holder = "another process"
        # It is gone meanwhile.
        with contextlib.suppress(OSError):
            holder = path.read_text() or holder
        raise UserError(f"{folder} is in use by {holder}: wait for its end, or give another folder")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        for parent in made:
            try:
                parent.rmdir()
            except OSError:
                # It is not empty.
                break


def open_locked(path: Path) -> IO[bytes] | None:
    """Open a file, made where there is none, to append to it; None where another process has it open so.

    It has no buffer, and is locked until it is closed or this process ends.
    """
    while True:
        file = open_own(path, "a+b", buffering=0)
        if not _lock(file):
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        # Whoever held it has removed it meanwhile.
        file.close()


def open_own(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file to append to it, made where there is none; never one elsewhere that a link here leads to.

    Folders may come from strangers.

    Raises:
        UserError: it is a link.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    link = f"{path} is a link, which may lead anywhere, and is not written: delete it"
    try:
        file = open(path, mode, opener=opener, **options)  # noqa: SIM115 - held by the caller
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(link) from None
        raise
    # It has a hard link.
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise UserError(link)
    return file


def _lock(file: IO[Any]) -> bool:
    """Lock an open file until this process ends or closes it; False where another process has done so."""
    try:
        import fcntl
    except ImportError:
        # Windows has no such module.
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            # What is left are file systems without locks.
            raise
    # Processes that read images must not keep the lock when this one is killed.
    os.register_at_fork(after_in_child=file.close)
    return True


def check_new(out: Path) -> None:
    """UserError if something is there that is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give --out a new one")


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a new folder, then put it in the place of `folder`.

    The new folder is on the disk before the old one is moved aside, and the old one is deleted last. A kill
    between the two renames leaves the old one under its other name, where model_folder finds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, previous = folder.with_name(f".{folder.name}.new"), aside(folder)
    _clear(new)
    new.mkdir()
    fill(new)
    sync_folder(new)
    if folder.exists():
        _clear(previous)
        os.rename(folder, previous)
    os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def _clear(path: Path) -> None:
    """Have nothing under a name; what a link leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one atomic step."""
    with replacing(path, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, mode: str, *, owner: str = "", **options: Any) -> Iterator[IO[Any]]:
    """A new file that takes the place of `path` when it is complete and on the disk; an error removes it.

    `owner` is in its name until then, where several processes may make the same file.
    """
    new = path.with_name(f".{path.name}{owner and f'.{owner}'}.new")
    try:
        # What a kill has left, or a link that a stranger has.
        _clear(new)
        with open(new, mode.replace("w", "x"), **options) as file:
            yield file
            sync(file)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()
