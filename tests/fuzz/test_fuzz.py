"""Ten seconds of `make fuzz`, and what it notices."""

import mmap
import time

import pytest
import torch
from dgsnet.errors import UserError

from tests.fuzz.__main__ import fuzz
from tests.fuzz.changes import changed_bytes
from tests.fuzz.target import Target
from tests.fuzz.targets import targets
from tests.support.cost import RESET

SECONDS = 10


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_changed_files_are_read_or_refused_in_one_line(tmp_path):
    with targets(tmp_path) as every:
        tallies, problems = fuzz(every, SECONDS, 0, tmp_path / "found")
    assert not problems, "\n".join(problems)
    assert all(tally.files for tally in tallies.values()) and len(tallies) == len(every)
    refused = sum(tally.refused for tally in tallies.values())
    # The changes are such that matter.
    assert refused > 0.2 * sum(tally.files for tally in tallies.values())


def raises(data):
    raise ValueError("a fault")


def says_much(data):
    raise UserError("a line\nand another")


def takes_long(data):
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


def takes_much(data):
    with mmap.mmap(-1, 2**28) as memory:
        memory.write(b"x" * 2**28)


@pytest.mark.parametrize(
    "read, said",
    [
        (raises, "ValueError: a fault"),
        (says_much, "and 2 lines"),
        (takes_long, "0.1 seconds"),
        pytest.param(
            takes_much,
            " MB; ",
            marks=pytest.mark.skipif(not RESET.exists(), reason="no peak of memory is told here"),
        ),
    ],
)
def test_what_is_wrong_is_told_and_the_file_kept(read, said, tmp_path):
    good = b"a good file"
    target = Target("a kind", [good], changed_bytes, lambda data: data == good or read(data))
    target.seconds = 5.0 if read is takes_much else 0.05
    tallies, problems = fuzz([target], 0, 1, tmp_path / "found", mutations=1)
    kept = sorted((tmp_path / "found").iterdir())
    assert len(kept) == len(problems) == tallies["a kind"].files == 1
    assert all(said in line and str(tmp_path / "found") in line for line in problems)
    assert all(path.read_bytes() != good for path in kept)


def test_memory_that_is_not_given_back_is_told(tmp_path):
    held = []

    def hold(data):
        if len(held) < 8:
            # Of the system, since what earlier tests have freed would not be seen.
            held.append(mmap.mmap(-1, 2**26))
            held[-1].write(b"x" * 2**26)

    _, problems = fuzz([Target("a kind", [b"good"], changed_bytes, hold)], 1, 0, tmp_path)
    assert len(problems) == 1 and "MB more memory" in problems[0]
