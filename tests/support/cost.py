"""What a piece of work costs this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# "5" in it makes the peak what is resident now; Linux alone has it.
RESET = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Seconds of processor time, and bytes at the peak beyond those that were resident before."""

    seconds: float = 0.0
    memory: int = 0


@contextlib.contextmanager
def cost() -> Iterator[Cost]:
    """Yields what the work within it has cost, once that has ended or raised."""
    found = Cost()
    if RESET.exists():
        RESET.write_text("5")
    before, begin = resident(), time.process_time()
    try:
        yield found
    finally:
        found.seconds = time.process_time() - begin
        found.memory = peak() - before


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak() -> int:
    """The most that there were since `cost` began; elsewhere than on Linux, those that there are."""
    if not RESET.exists():
        return resident()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
