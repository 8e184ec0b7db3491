"""Work in a process of its own: its limits hold for one call, its death is one answer, and it leaves nothing.

What is called is defined here and imported in that process, which torch at the top would make take seconds.
"""

import contextlib
import gc
import json
import os
import signal
import stat
import sys
import threading
import time

import psutil
import pytest
from dgsnet import apart
from dgsnet.apart import Apart, Gone
from dgsnet.errors import UserError

HERE = "tests.dgsnet.test_apart"
calls = 0


def prepare():
    pass


def refuse(reason):
    raise RuntimeError(reason)


def leave():
    os._exit(1)


def backwards(data, *words):
    print("what a library prints is no answer")
    return list(words)[::-1], len(data), [data[:-4:-1], data[-4::-1]]


def pid(data):
    return os.getpid(), 0, ()


def compute(data, seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return seconds, 0, ()


def allocate(data, size):
    return len(bytearray(size)), 0, ()


def die(data, number):
    os.kill(os.getpid(), number)


def die_second(data):
    """Where an earlier call has left something behind."""
    global calls
    calls += 1
    if calls > 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return calls, 0, ()


def babble(data):
    """An answer such as one that strangers' bytes have taken over might give."""
    for descriptor in range(3, 20):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"\xff" * 100)
    time.sleep(60)


def shrink(data):
    """Make the memory that both have smaller, so that whoever reads it dies."""
    tried = 0
    for descriptor in range(3, 20):
        with contextlib.suppress(OSError):
            if "memfd" in os.readlink(f"/proc/self/fd/{descriptor}"):
                tried += 1
                os.ftruncate(descriptor, 0)
    return tried > 0, 3, [b"abc"]


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


@pytest.fixture(scope="module")
def call():
    with Apart(f"{HERE}:prepare", library="a library", seconds=0.3, memory=2**28) as call:
        yield call


@pytest.mark.parametrize("size", [0, 1, 70_001, 2**22, apart.MAX_SHARED + 1])
def test_words_and_bytes_go_there_and_back(call, size):
    data = os.urandom(size)
    words = ["\udcff\n", 3, None]
    assert call(f"{HERE}:backwards", data, *words) == (words[::-1], data[::-1])


def test_words_and_bytes_go_where_no_memory_can_be_shared(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with Apart(f"{HERE}:prepare", library="a library") as call:
        assert call(f"{HERE}:shrink", b"") == (False, b"abc")
        assert call(f"{HERE}:backwards", b"ab" * 70_001, 3) == ([3], b"ba" * 70_001)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory is shared on this system")
def test_a_process_cannot_take_memory_away_from_its_reader(call):
    assert call(f"{HERE}:shrink", b"") == (True, b"abc")


def test_processor_time_is_limited_for_each_call(call):
    first, _ = call(f"{HERE}:pid", b"")
    for _ in range(3):
        # The calls together take more than one may take.
        assert call(f"{HERE}:compute", b"", 0.2)[0] == 0.2
    assert call(f"{HERE}:pid", b"")[0] == first
    with pytest.raises(Gone, match=r"^not read within 0.3 seconds of processor time$"):
        call(f"{HERE}:compute", b"", 60)
    assert call(f"{HERE}:pid", b"")[0] != first


def test_memory_is_limited(call):
    for _ in range(3):
        assert call(f"{HERE}:allocate", b"", 2**27)[0] == 2**27
    with pytest.raises(Gone, match=r"^it takes more than 0.2 GiB of memory to read$"):
        call(f"{HERE}:allocate", b"", 2**29)
    assert call(f"{HERE}:allocate", b"", 2**27)[0] == 2**27


def test_a_process_at_a_standstill_is_stopped(call, monkeypatch):
    call.start()
    monkeypatch.setattr(apart, "MAX_WAIT", 0.5)
    with pytest.raises(Gone, match=r"^not read within 0.5 seconds$"):
        call(f"{HERE}:die", b"", signal.SIGSTOP)


def test_death_is_told(call):
    with pytest.raises(Gone, match=r"^the process that read it died of SIGSEGV$"):
        call(f"{HERE}:die", b"", signal.SIGSEGV)
    assert call(f"{HERE}:backwards", b"ab") == ([], b"ba")


def test_what_an_earlier_call_has_done_is_not_held_against_a_later_one(call):
    assert [call(f"{HERE}:die_second", b"")[0] for _ in range(3)] == [1, 1, 1]


def test_an_answer_that_is_none_is_a_death(call):
    start = time.monotonic()
    with pytest.raises(Gone, match=r"^the process that read it died"):
        call(f"{HERE}:babble", b"")
    assert time.monotonic() - start < 5


def test_threads_have_a_process_each(call):
    answers, both = [], threading.Barrier(2)

    def work():
        both.wait()
        for _ in range(20):
            answers.append(call(f"{HERE}:compute", b"", 0.01)[0])

    before = children()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: len(children() - before) == 2)
    for thread in threads:
        thread.join()
    assert answers == [0.01] * 40


def test_a_forked_process_has_its_own(call):
    own, _ = call(f"{HERE}:pid", b"")
    read, write = os.pipe()
    if not (child := os.fork()):
        answers = [call(f"{HERE}:pid", b"")[0], call(f"{HERE}:backwards", b"ab")[1].decode()]
        os.write(write, json.dumps(answers).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        other, text = json.loads(file.read())
    os.waitpid(child, 0)
    assert other != own and text == "ba"
    assert eventually(lambda: not psutil.pid_exists(other))
    assert call(f"{HERE}:pid", b"")[0] == own


def test_nothing_is_left_behind():
    """Neither a process, dead or alive, nor its pipes."""
    before = held()
    with Apart(f"{HERE}:prepare", library="a library") as call:
        call.start()
        assert len(children() - before[0]) == 1
        with pytest.raises(Gone):
            call(f"{HERE}:die", b"", signal.SIGKILL)
        assert children() == before[0]
        call(f"{HERE}:backwards", b"")
    assert held() == before


def test_a_process_that_is_killed_between_two_calls_is_replaced(call):
    first, _ = call(f"{HERE}:pid", b"")
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    assert call(f"{HERE}:pid", b"")[0] != first


def test_an_interrupt_leaves_no_answer_for_the_next_call(call):
    call.start()
    # A shell may have had it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        call(f"{HERE}:compute", b"", 0.25)
    signal.signal(signal.SIGINT, before)
    assert call(f"{HERE}:backwards", b"ab") == ([], b"ba")


@pytest.mark.parametrize(
    "prepare, reason", [("refuse", "no such library"), ("leave", "its process ends at once")]
)
def test_a_library_that_does_not_work_is_told_at_once(prepare, reason):
    before = children()
    arguments = ["no such\nlibrary"] if prepare == "refuse" else []
    with pytest.raises(UserError, match=f"^a library does not work here: {reason}$"):
        Apart(f"{HERE}:{prepare}", *arguments, library="a library").start()
    assert children() == before


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with Apart(f"{HERE}:prepare", library="a library") as call:
        assert call(f"{HERE}:backwards", b"ab") == ([], b"ba")
