"""The tool that plants mutants, on a package of three functions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import psutil
import pytest
import yaml

from tests.mutants.population import Equivalents, draw

HERE = Path(__file__).parent
SOURCE = """
def sign(x: float | None) -> int:
    if x < 0:
        return -1
    return 1


def larger(x):
    return x > 7


def unseen(x):
    return x - 5
"""
UNREACHED = "def unreached(x):\n    return x + 1\n"
TOLD = "def told(x):\n    return x + 1\n"
NATIVE = """
// a < b
int half(int a) {
  if (a < 4) return 0;
  return a / 2;
}
"""
TEST = """
import os
from dgs_kernels.numbers import larger, sign

def test_sign():
    assert sign(-2) == -1 and sign(2) == 1

def test_larger():
    # What a process reaches that leaves without an end is seen too.
    if not (child := os.fork()):
        os._exit(larger(8) and not larger(7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
"""
# What fails behind it, and not alone, says nothing of the mutant.
TEST_TOLD = """
import sys
from dgs_kernels.told import told

def test_told():
    sys.told = told(1)
    # Tests may leave files, which are not the project.
    open("left", "w").close()
"""
TEST_BEHIND = """
import sys
from dgs_kernels.told import told

def test_behind():
    assert told(0) is not None and getattr(sys, "told", 2) == 2
"""
FILE = "dgs_kernels/numbers.py"


@pytest.fixture
def project(tmp_path) -> Path:
    """What the tool needs of a project, and the tool itself."""
    for name, text in {
        FILE: SOURCE,
        "dgs_kernels/told.py": TOLD,
        "dgs_kernels/unreached.py": UNREACHED,
        "dgs_kernels/__init__.py": "",
        "python/dgsnet/__init__.py": "",
        "tests/__init__.py": "",
        "tests/dgs_kernels/__init__.py": "",
        "tests/dgs_kernels/test_behind.py": TEST_BEHIND,
        "tests/dgs_kernels/test_numbers.py": TEST,
        "tests/dgs_kernels/test_told.py": TEST_TOLD,
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        ".gitignore": "build/\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(HERE, tmp_path / "tests/mutants", ignore=shutil.ignore_patterns("test_*", "__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def changes(project: Path, seed: int, files: str = "") -> list[tuple]:
    python, native, _ = draw(project, files, seed)
    return [(m.line, m.operator, m.after) for mutants in (python, native) for m in islice(mutants, 100)]


def test_sample_is_drawn_by_its_seed(project):
    drawn = changes(project, seed=1)
    assert drawn == changes(project, seed=1)
    assert drawn != changes(project, seed=2)
    assert {"if x <= 0:", "if not x < 0:", "return x > 8"} & {after for _, _, after in drawn}
    of_numbers = {line for line, _, _ in changes(project, seed=1, files="numbers.py")}
    # Line 2 has nothing but types.
    assert 3 in of_numbers and 2 not in of_numbers
    assert changes(project, seed=1, files="else where") == []


def test_native_code_is_changed_outside_comments(project):
    (project / "csrc/cpu").mkdir(parents=True)
    (project / "csrc/cpu/half.cpp").write_text(NATIVE)
    drawn = {after for seed in range(20) for _, _, after in changes(project, seed, "half.cpp")}
    assert {
        "if (a <= 4) return 0;",
        "if (!(a < 4)) return 0;",
        "if (a < 5) return 0;",
        "return a * 2;",
    } <= drawn
    assert not any("//" in after for after in drawn)


def test_equivalent_that_matches_nothing(project):
    entry = {"file": FILE, "before": "return x > 7", "after": "return x > 8", "why": "a test of the tool"}
    path = project / "equivalent.yaml"
    path.write_text(yaml.safe_dump([entry, entry | {"after": "return x > 9"}]))
    assert Equivalents(path).unmatched(project) == [f"{FILE}: return x > 7 -> return x > 9"]


def test_lines_of_equivalents_are_todays():
    """That each is a mutant of its line takes longer, and `make mutants` says it."""
    for entry in yaml.safe_load((HERE / "equivalent.yaml").read_text(encoding="utf-8")):
        lines = map(str.strip, (HERE.parents[1] / entry["file"]).read_text(encoding="utf-8").splitlines())
        assert entry["before"].partition("\n")[0] in lines, entry


def test_planted_in_a_package(project):
    equivalent = {"file": FILE, "before": "if x < 0:", "after": "if x < 1:", "why": "a test of the tool"}
    stale = equivalent | {"before": "if y < 0:"}
    (project / "tests/mutants/equivalent.yaml").write_text(yaml.safe_dump([equivalent, stale]))
    command = [sys.executable, "-m", "tests.mutants", "--sample", "200", "--seed", "3", "--preload", "yaml"]
    done = subprocess.run(
        command, cwd=project, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"no mutant of today's code: {FILE}: if y < 0: -> if x < 1:" in done.stderr
    lines = (project / "build/mutants/outcome.txt").read_text().splitlines()
    outcomes = [re.search(r"(\w+).py:(\d+)  (\w+)  (\w+) (.*)  \d+ s", line).groups() for line in lines]
    by = {(file, int(line), change.partition("_")[0]): rest for file, line, change, *rest in outcomes}
    test = "by tests/dgs_kernels/test_numbers.py::test_{}".format
    assert by["numbers", 3, "AddNot"] == ["killed", test("sign")]
    assert by["numbers", 9, "NumberReplacer"] == ["killed", test("larger")]
    assert by["numbers", 13, "ReplaceBinaryOperator"] == ["survived", "2 tests"]
    assert by["told", 2, "ReplaceBinaryOperator"] == ["survived", "2 tests"]
    assert "fails behind other tests only: tests/dgs_kernels/test_behind.py::test_behind" in done.stderr
    assert by["unreached", 2, "ReplaceBinaryOperator"] == ["survived", "no test reaches it"]
    survived = [outcome for *_, outcome, _ in outcomes if outcome == "survived"]
    count = sum(outcome != "equivalent" for *_, outcome, _ in outcomes)
    last = f"killed {count - len(survived)} of {count} ({len(outcomes) - count} equivalent)"
    assert done.stdout.splitlines()[-1] == last
    diffs = (project / "build/mutants/survivors.diff").read_text()
    assert "\n-    return x - 5\n" in diffs and diffs.count("\n@@") == len(survived)
    assert (project / FILE).read_text() == SOURCE
    # Once more: what is known is not tried again.
    [kept] = (project / "build/mutants").glob("outcomes-*.jsonl")
    tried = kept.read_text()
    again = subprocess.run(
        command, cwd=project, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert (again.stdout, kept.read_text()) == (done.stdout, tried), again.stderr
    assert [*(project / "build/mutants").glob("outcomes-*.jsonl")] == [kept]


def test_one_that_hangs_and_what_it_started(project):
    test = "tests/dgs_kernels/test_numbers.py::test_hangs"
    code = """
import os, subprocess, time

def test_hangs():
    with open("started", "w") as file:
        file.write(str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid))
    time.sleep(600)
"""
    (project / test.partition("::")[0]).write_text(code)
    places = {"MUTANTS_LOG": str(project / "log"), "MUTANTS_TEMPORARY": str(project / "temporary")}
    question = json.dumps({"stages": [[test]], "limits": {test: 3}})
    done = subprocess.run(
        [sys.executable, project / "tests/mutants/forks.py"],
        cwd=project,
        env=os.environ | places | {"PYTHONPATH": str(project)},
        input=question,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == {"outcome": "timeout", "test": test}, done.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int((project / "started").read_text())).status() == psutil.STATUS_ZOMBIE
