"""Work on strangers' bytes in a process of its own, which has limits of memory and of processor time.

Decoders are native code, and no rules about one format or another bound what all of them can be made to cost.
What such a process is stopped at, or dies of, is an answer about one file.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from dgsnet.errors import UserError
from dgsnet.files import one_line

# What one call may take: seconds of processor time, and bytes beyond those of the process when it is ready.
MAX_SECONDS = 10.0
MAX_MEMORY = 1228 * 2**20
# Of the clock, so long that only a process at a standstill takes them.
MAX_WAIT = 120.0
# What may come back: it is the answer of a process that strangers' bytes may have taken over.
MAX_BYTES = 2**29

# Bytes of memory that both processes see, where the system has such: what fits is copied once, where a pipe
# copies twice and takes pages in between.
MAX_SHARED = 2**24

PROGRAM = "import sys; sys.path[:] = {path}; from dgsnet import apart; apart.answer({shared})"
# One thread, since many such processes work beside each other. Large memory is given back when it is freed,
# or the next call would have less; small is kept, because taking it anew takes time.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(2**22),
    "MALLOC_TRIM_THRESHOLD_": str(2**25),
}
# Most bytes that are kept.
MAX_KEPT = 2**27
# Bytes that a pipe holds, where the system allows.
PIPE = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
# Exit status of a process without memory.
OUT_OF_MEMORY = 77
# Bytes of the words, which are JSON, of data behind them, and of data in the memory that both have.
_HEAD = struct.Struct("<QQQ")
# Of a pipe that is closed, and of what is no answer at all.
_NO_ANSWER = (EOFError, OSError, ValueError, RecursionError)
_Data = TypeVar("_Data", bytes, bytearray)


class Gone(Exception):
    """No answer: str(error) says of what the process died, or at which limit it was stopped."""


class Apart:
    """Calls functions in processes of their own: one for each thread that calls at the same time.

    Each process answers one call after another. What it dies of is told as `Gone`, and the next call gets a
    new one. Where earlier calls could have done the harm, the call is tried once more in a new process, so
    that an answer depends on its own bytes alone. Processes end with this one; one that was forked off from
    this one has its own.

    Args:
        prepare: "module:function" that each process calls first, for what takes time; what it raises means
            that nothing works here.
        arguments: of `prepare`, JSON values.
        library: what errors call the library that works there.
        seconds: of processor time for each call; not limited on Windows.
        memory: bytes for each call; limited on Linux.
        kept: of them, how many a call may leave in use in a process that is used again.

    Example:
        >>> from dgsnet.apart import Apart
        >>> with Apart("dgsnet.data.images:prepare", library="Pillow") as call:
        ...     call("dgsnet.data.images:decode", b"no image", "a.png")[0]["error"][:19]
        'a.png: not an image'
    """

    def __init__(
        self,
        prepare: str,
        *arguments: Any,
        library: str,
        seconds: float = MAX_SECONDS,
        memory: int = MAX_MEMORY,
        kept: int = MAX_KEPT,
    ):
        self.library, self.seconds, self.memory = library, seconds, memory
        self._setup = [prepare, arguments, seconds, memory, kept]
        self._idle: list[_Process] = []

    def __call__(self, function: str, data: bytes, *words: Any) -> tuple[Any, bytearray]:
        """Call "module:function" there with bytes and JSON values; it returns a JSON value, a size
        in bytes, and the parts of so many bytes, which may be made while they are sent.

        Raises:
            Gone: the process died, or was stopped at a limit.
            UserError: there is no process to be had, or what it needs does not work here.
        """
        while True:
            process, used = self._take()
            try:
                answer = process.ask([function, *words], data)
            except _NO_ANSWER as error:
                # One that has died of itself is waited for, since its status says of what.
                status = process.end(patience=10.0 if isinstance(error, (EOFError, OSError)) else 0.0)
                late = status == -getattr(signal, "SIGPROF", 0)
                if used and not late and not process.stopped:
                    continue
                raise Gone(self._reason(process, status, late)) from None
            except BaseException:
                # After an interrupt, its answer would be taken for another's.
                process.end()
                raise
            self._idle.append(process)
            return answer

    def start(self) -> None:
        """Have a process, so that what does not work here is told before there is anything to do.

        Raises:
            UserError: as in calling.
        """
        self._idle.append(self._take()[0])

    def close(self) -> None:
        """End the processes."""
        while self._idle:
            self._idle.pop().end()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> tuple[_Process, bool]:
        """A process that works, and whether it has worked before."""
        while self._idle:
            process = self._idle.pop()
            if process.lives():
                return process, True
            process.end()
        process = _Process()
        try:
            problem, _ = process.ask(self._setup)
        except _NO_ANSWER:
            problem = "its process ends at once"
        except BaseException:
            process.end()
            raise
        if problem:
            process.end()
            raise UserError(f"{self.library} does not work here: {problem}")
        return process, False

    def _reason(self, process: _Process, status: int, late: bool) -> str:
        if late:
            return f"not read within {self.seconds:g} seconds of processor time"
        if process.stopped:
            return f"not read within {MAX_WAIT:g} seconds"
        if status == OUT_OF_MEMORY:
            return f"it takes more than {self.memory / 2**30:.1f} GiB of memory to read"
        with contextlib.suppress(ValueError):
            return f"the process that read it died of {signal.Signals(-status).name}"
        return "the process that read it died"


class _Process:
    """A process that answers, and the pipes to it, without buffers: a fork would double what is in them."""

    def __init__(self) -> None:
        # With the search path of this one, so that nothing is imported from the current folder; and without
        # the files of site-packages, which take as long as all the rest.
        path = [entry for entry in sys.path if entry] + [str(Path(__file__).parents[1])]
        shared = _new_shared()
        command = [sys.executable, "-I", "-S", "-c", PROGRAM.format(path=path, shared=shared)]
        try:
            self._shared = _map(shared)
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
                pass_fds=[] if shared is None else [shared],
            )
        except OSError as error:
            raise UserError(f"a process that reads images cannot be started: {one_line(error)}") from None
        finally:
            if shared is not None:
                os.close(shared)
        self.stopped = False
        _all.add(self)
        for pipe in self._pipes():
            with contextlib.suppress(ImportError, AttributeError, OSError):
                import fcntl

                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)

    def ask(self, words: Any, data: bytes = b"") -> tuple[Any, bytearray]:
        requests, answers = self._pipes()
        _send(requests, words, [data], len(data), self._shared)
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(answers, select.POLLIN)
            if not poll.poll(MAX_WAIT * 1000):
                self.stopped = True
                raise EOFError
        return _receive(answers, _read, self._shared)

    def lives(self) -> bool:
        return self._process.poll() is None

    def end(self, patience: float = 0.0) -> int:
        """End the process and give its exit status, which is its own if it ends within so many seconds."""
        for pipe in self._pipes():
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not self.stopped:
                self._process.wait(patience)
        self._process.kill()
        self._shared.release()
        return self._process.wait()

    def disown(self) -> None:
        """Leave it to the process that this one was forked from."""
        for pipe in self._pipes():
            pipe.close()
        self._shared.release()
        self._process.returncode = 0

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin and self._process.stdout
        return self._process.stdin, self._process.stdout


_all: weakref.WeakSet[_Process] = weakref.WeakSet()


def _new_shared() -> int | None:
    """The descriptor of memory that can be shared with a process that is started; None on other than Linux.

    Nobody can make it smaller, which would kill whoever reads it then.
    """
    try:
        import fcntl

        memory = os.memfd_create("dgsnet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, MAX_SHARED)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except (ImportError, AttributeError, OSError):
        return None
    return memory


def _map(shared: int | None) -> memoryview:
    return memoryview(bytearray() if shared is None else mmap.mmap(shared, MAX_SHARED))


def _send(pipe: IO[bytes], words: Any, parts: Iterable[Any], size: int, shared: memoryview) -> None:
    text, place = json.dumps(words).encode("ascii"), 0
    if fits := size <= len(shared):
        for part in parts:
            content = memoryview(part).cast("B")
            shared[place : place + len(content)] = content
            place += len(content)
        parts = ()
    head = _HEAD.pack(len(text), 0 if fits else size, place)
    for part in itertools.chain([head + text], parts):
        rest = memoryview(part).cast("B")
        while rest:
            rest = rest[pipe.write(rest) :]


def _receive(
    pipe: IO[bytes], read: Callable[[IO[bytes], int], _Data], shared: memoryview
) -> tuple[Any, _Data]:
    words, size, there = _HEAD.unpack(read(pipe, _HEAD.size))
    answer, data = json.loads(read(pipe, words)), read(pipe, size)
    if there > len(shared):
        raise ValueError
    return answer, type(data)(shared[:there]) if there else data


def _read(pipe: IO[bytes], size: int) -> bytearray:
    """So many bytes of a pipe without a buffer; EOFError if it ends before."""
    if size > MAX_BYTES:
        raise ValueError
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        if not (count := pipe.readinto(rest)):  # type: ignore[attr-defined]  # raw files have it
            raise EOFError
        rest = rest[count:]
    return content


def _read_whole(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content


def answer(descriptor: int | None) -> None:
    """The other process: answers what comes through standard input, until that is closed."""
    # An interrupt of the terminal is the other's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions = sys.stdin.buffer
    with contextlib.suppress(EOFError, OSError), open(os.dup(1), "wb", buffering=0) as answers:
        # Whatever else is printed goes to stderr.
        os.dup2(2, 1)
        shared = _map(descriptor)
        (prepare, arguments, seconds, memory, kept), _ = _receive(questions, _read_whole, shared)
        try:
            _function(prepare)(*arguments)
            _limit(memory)
        except Exception as error:
            return _send(answers, one_line(error) or type(error).__name__, (), 0, shared)
        _send(answers, "", (), 0, shared)
        has = _addresses()
        while _addresses() <= has + kept:
            try:
                (function, *words), data = _receive(questions, _read_whole, shared)
                _set_clock(seconds)
                value, size, parts = _function(function)(data, *words)
                _send(answers, value, parts, size, shared)
                _set_clock(0)
                del data, parts
            except MemoryError:
                os._exit(OUT_OF_MEMORY)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _limit(memory: int) -> None:
    """Limit the addresses that this process may have, by those it has now."""
    if has := _addresses():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (has + memory,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _addresses() -> int:
    """Bytes of memory that this process has asked for; 0 where that is not known: not on Linux."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[0]) * PAGE
    except OSError:
        return 0


def _set_clock(seconds: float) -> None:
    """End this process after so much processor time; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _end_all() -> None:
    for process in list(_all):
        process.end()


def _disown_all() -> None:
    for process in list(_all):
        process.disown()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
