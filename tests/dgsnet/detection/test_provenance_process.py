"""The process that reads Content Credentials: its death is one answer, and its end leaves nothing behind.

What is defined here is imported in that process, which would take seconds longer with torch at the top.
"""

import gc
import os
import signal
import threading
import time
from dataclasses import dataclass

import psutil
import pytest
from dgsnet.data.items import Item
from dgsnet.detection import provenance
from dgsnet.detection.provenance import Provenance, ProvenanceReader
from dgsnet.errors import UserError

from tests.support.credentials import picture


@dataclass(frozen=True, slots=True)
class Deadly(Item):
    """An image that takes the process with it that reads it."""

    def read_bytes(self):
        os.kill(os.getpid(), signal.SIGSEGV)


@dataclass(frozen=True, slots=True)
class Endless(Item):
    """An image at which the process that reads it hangs."""

    def read_bytes(self):
        time.sleep(60)


def children():
    """Processes started here and not waited for yet, dead ones too."""
    return {child.pid for child in psutil.Process().children()}


def held():
    gc.collect()
    return children(), threading.active_count(), psutil.Process().num_fds()


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_an_image_that_stops_the_library_costs_one_answer(monkeypatch):
    with ProvenanceReader() as read:
        assert read(Deadly("a.jpg")) == Provenance("invalid", "", "", "the process that read it died")
        assert read(picture()) == Provenance("absent")
        monkeypatch.setattr(provenance, "MAX_SECONDS", 0.5)
        assert read(Endless("b.jpg")) == Provenance("invalid", "", "", "not read within 0.5 seconds")
        monkeypatch.undo()
        assert read(picture()) == Provenance("absent")


def test_nothing_is_left_behind():
    """Neither a process, dead or alive, nor its pipes, nor the clock of an image that was in time."""
    before = held()
    with ProvenanceReader() as read:
        assert read(picture()) == Provenance("absent")
        assert len(children() - before[0]) == 1
        assert eventually(lambda: threading.active_count() == before[1])
        read(Deadly("a.jpg"))
        assert children() == before[0]
        assert read(picture()) == Provenance("absent")
    assert children() == before[0]
    assert eventually(lambda: held() == before)


def test_a_process_that_is_killed_between_two_images_is_replaced():
    before = children()
    with ProvenanceReader() as read:
        (first,) = children() - before
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
        assert read(picture()) == Provenance("absent")
        (second,) = children() - before
        assert second != first
    assert children() == before


def test_a_library_that_does_not_work_is_told_at_once(monkeypatch):
    before = children()
    monkeypatch.setattr(provenance, "PROGRAM", "import sys; {path}; sys.exit(1)")
    with pytest.raises(UserError, match="c2pa-python does not work here: its process ends at once"):
        ProvenanceReader()
    assert children() == before
