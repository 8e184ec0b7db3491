"""Processor time of this process and of all that it starts, those that are gone by then included."""

from __future__ import annotations

import contextlib

import psutil


class ProcessorTime(contextlib.AbstractContextManager):
    """Measures the block of a `with`. What a process has used that is gone, the one that waited for it knows.

    Attributes:
        seconds: when the block has ended.
    """

    def __enter__(self) -> ProcessorTime:
        self.seconds = -_used()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += _used()


def _used() -> float:
    me, used = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used += sum(process.cpu_times()[:4])
    return used
