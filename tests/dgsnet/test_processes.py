"""Locks that end with their process, groups that a launcher announces, children that do not stay behind."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from dgsnet import processes
from dgsnet.errors import UserError
from dgsnet.files import LOCK_FILE, locked

ACCELERATE = "ACCELERATE_MIXED_PRECISION"
LAUNCHERS = (*processes.SIZES, *processes.RANKS, "LOCAL_WORLD_SIZE", "MASTER_ADDR", ACCELERATE)


def python(code, *words):
    """A process that runs this code, and the children that it names when it is at work."""
    command = [sys.executable, "-c", code, *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return child, [int(pid) for pid in child.stdout.readline().split()]


HOLD = """
import os, sys, time
from pathlib import Path
from dgsnet.files import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as processes that read images are: it must not keep the lock
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_process_s_until_that_ends_however_it_ends(tmp_path):
    folder = tmp_path / "a" / "run"
    holder, children = python(HOLD, folder)
    try:
        named = f"run is in use by process {holder.pid} on "
        with pytest.raises(UserError, match=named) as refused, locked(folder):
            pass
        assert "\n" not in str(refused.value)
        holder.kill()
        holder.wait()
        assert all(map(alive, children)) and (folder / LOCK_FILE).exists()
        with locked(folder):
            (folder / "result").touch()
    finally:
        holder.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    assert os.listdir(folder) == ["result"]


def test_a_folder_that_nothing_was_left_in_is_as_it_was(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path) == ["mine"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: give a folder"), locked(tmp_path / "file"):
        pass


@pytest.fixture
def launched(monkeypatch):
    """Make this process's environment that of a launcher."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)

    def set_environment(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_the_number_of_processes_is_what_the_launcher_says(launched):
    assert (processes.announced_size(), processes.announced_rank()) == (1, 0)
    launched(OMPI_COMM_WORLD_SIZE="3", OMPI_COMM_WORLD_RANK="2")
    assert (processes.announced_size(), processes.announced_rank()) == (3, 2)
    launched(WORLD_SIZE="2", RANK="0")
    assert (processes.announced_size(), processes.announced_rank()) == (2, 0)


def test_a_launcher_that_starts_one_process_of_several_is_refused(launched):
    launched(**{ACCELERATE: "no"}, MASTER_ADDR="127.0.0.1")
    with pytest.raises(UserError, match=r"started one.*torchrun"):
        processes.announced_size()
    # A launcher that sets ranks has started all processes.
    launched(RANK="0", WORLD_SIZE="2")
    assert processes.announced_size() == 2


def test_workers_fit_the_machine(launched, monkeypatch):
    for cores, local, workers in (
        (1, 1, 1),
        (6, 1, 6),
        (6, 2, 3),
        (2, 4, 1),
        (128, 2, processes.MOST_WORKERS),
    ):
        launched(LOCAL_WORLD_SIZE=str(local))
        monkeypatch.setattr(processes, "usable_cores", lambda cores=cores: cores)
        assert processes.default_workers() == workers


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity to set")
def test_cores_are_those_that_may_be_used():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from dgsnet.processes import usable_cores; print(usable_cores())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


def test_one_worker_warns(monkeypatch):
    monkeypatch.setattr(processes, "follow_parent", lambda: None)
    for number, silent, heard in ((0, False, 1), (1, False, 0), (0, True, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processes.start_worker(number, silent)
            warnings.warn("the same in every worker", stacklevel=1)
        assert len(caught) == heard


# The worker is where a killed parent leaves it: waiting until somebody takes what it has prepared.
STUCK = """
import multiprocessing, os, sys, time
from dgsnet.processes import start_worker
def work(pids):
    start_worker(0)
    pids.put(os.getpid())
    time.sleep(60)
context = multiprocessing.get_context("fork")
pids = context.Queue()
children = [context.Process(target=work, args=(pids,)) for _ in range(2)]
for child in children:
    child.start()
found = [pids.get() for _ in children]
print(*found, flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_parent_that_is_killed():
    parent, workers = python(STUCK)
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
