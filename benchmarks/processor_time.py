"""Processor time of this process and of all that it starts, those that are gone by then included."""

from __future__ import annotations

import contextlib
import threading

import psutil


class ProcessorTime(contextlib.AbstractContextManager):
    """Measures the block of a `with`.

    Looks now and then, because what a process has used is forgotten when it is gone.

    Attributes:
        seconds: when the block has ended.
    """

    def __init__(self, interval: float = 0.1) -> None:
        self.seconds = 0.0
        self._used: dict[tuple[int, float], float] = {}
        self._begin: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(interval,), daemon=True)

    def __enter__(self) -> ProcessorTime:
        self._look()
        self._begin = dict(self._used)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.seconds = sum(used - self._begin.get(process, 0.0) for process, used in self._used.items())

    def _watch(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self._look()

    def _look(self) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                self._used[process.pid, process.create_time()] = used.user + used.system
