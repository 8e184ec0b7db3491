"""Runs tests in forks of a process that has imported the large packages, but nothing of the project's.

Started in a copy of the project with the packages' names. It reads, a line each,
{"stages": [[test, ...], ...], "limits": {test: seconds}}, and answers with
{"outcome": "passed" | "failed" | "timeout", "test": the one at which it ended}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time

import psutil
import pytest

# Collecting the tests may take so many seconds.
TO_COLLECT = 180


class Chosen:
    """Runs the chosen tests in their order, and tells which is next and which has failed."""

    def __init__(self, tests: list[str], tell) -> None:
        self.rank, self.tell = {name: i for i, name in enumerate(tests)}, tell

    # conftest.py has an order of its own, and comes first.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list) -> None:
        chosen = [item for item in items if item.nodeid in self.rank]
        items[:] = sorted(chosen, key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell("next", nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.tell("failed", report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.tell("failed", report.nodeid)


def child(stages: list[list[str]], pipe: int) -> None:
    os.setsid()
    log = os.open(os.environ["MUTANTS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def tell(*words: str) -> None:
        os.write(pipe, json.dumps(words).encode() + b"\n")

    code = 0
    for tests in stages:
        files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
        options = [
            "-x",
            "-p",
            "no:cacheprovider",
            "--durations=0",
            "--basetemp",
            os.environ["MUTANTS_TEMPORARY"],
        ]
        tell("collect", files[0])
        code = int(pytest.main([*options, *files], plugins=[Chosen(tests, tell)]))
        if code not in (0, 5):
            break
    else:
        tell("done", "")
    sys.stdout.flush()
    os._exit(0)


def run(stages: list[list[str]], limits: dict[str, float]) -> dict[str, str]:
    """What came of the tests. One that ends its process has failed."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(ours)
            child(stages, theirs)
        finally:
            os._exit(1)
    os.close(theirs)
    outcome, test, rest, end = "failed", "", b"", time.monotonic() + TO_COLLECT
    try:
        while True:
            if not select.select([ours], [], [], max(0.0, end - time.monotonic()))[0]:
                outcome = "timeout"
                break
            if not (read := os.read(ours, 1 << 16)):
                break
            *lines, rest = (rest + read).split(b"\n")
            for event, name in map(json.loads, lines):
                test = name or test
                end = time.monotonic() + limits.get(name, TO_COLLECT)
                if event == "done":
                    outcome = "passed"
            if outcome == "passed":
                break
            if any(json.loads(line)[0] == "failed" for line in lines):
                break
    finally:
        os.close(ours)
        # What the tests have started goes with them.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for process in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"outcome": outcome, "test": test}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import hypothesis

    hypothesis.settings.register_profile("mutants", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    early = {name.partition(".")[0] for name in sys.modules} & {"dgs_kernels", "dgsnet", "tests"}
    assert not early, f"imported before the fork: {early}"
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
