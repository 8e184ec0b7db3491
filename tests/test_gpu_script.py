"""benchmarks/gpu.sh on a machine that is played: its Python and its sanitizer note what they are asked."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu.sh"
PYTHON = """#!/usr/bin/env bash
[ "$1" = - ] && { cat >/dev/null; shift; printf '%s\\n' "$@"; exit; }
echo "$@" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo $CAPABILITY ;;
  *"import os, xdist"*) echo " -n 2" ;;
esac
for word in $FAILING; do [[ "$*" = *$word* ]] && exit 1; done
exit 0
"""
SANITIZER = """#!/usr/bin/env bash
echo sanitizer "$@" >>"$CALLS"
[ "$REFUSED" ] && { echo "========= Error: Device not supported"; exit 1; }
[[ "$*" = *"--tool $HAZARD"* ]] && exit 9
exit 0
"""


@pytest.fixture
def play(tmp_path):
    """play(**how) runs the script there; its exit code, the table, and the commands that it gave."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_kernel.py").write_text("pytestmark = pytest.mark.gpu\n")
    (tmp_path / "bin").mkdir()
    for name, text in {"python": PYTHON, "compute-sanitizer": SANITIZER}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**how: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        variables = {"PYTHON": f"{tmp_path}/bin/python", "OUT": f"{tmp_path}/out", "CALLS": str(calls)}
        variables |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CAPABILITY": "9.0", "FAILING": ""}
        variables |= {"REFUSED": "", "HAZARD": "none"}
        done = subprocess.run(
            ["bash", tmp_path / "benchmarks/gpu.sh"], env=variables | how, capture_output=True, text=True
        )
        assert not done.stderr, done.stderr
        return done.returncode, (tmp_path / "out/summary.txt").read_text(), calls.read_text().splitlines()

    return run


def test_limits_add_up_to_eight_minutes():
    table = re.search(r"declare -A seconds=\((.*?)\n\)", SCRIPT.read_text(), re.DOTALL)
    limits = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", table[1])}
    assert len(limits) > 20 and sum(limits.values()) <= 480
    # Nothing else takes time: whatever is run under a limit has it from there.
    assert re.findall(r"timeout .*", SCRIPT.read_text()) == [
        'timeout --signal=INT --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1',
        'timeout "${seconds[sanitizer]}" compute-sanitizer --kernel-name kernel_substring=dgs \\',
    ]


def measured(calls: list[str]) -> list[tuple[str, str]]:
    """First operation and backend of every benchmark that is for one backend alone."""
    other = {"(triton)": "cuda", "(cuda)": "triton"}
    found = [re.match(r"-m benchmarks (\w+) .*--without (\S+)", call) for call in calls]
    return [(match[1], other[match[2]]) for match in found if match]


def test_every_backend_has_a_process_of_its_own(play, tmp_path):
    code, table, calls = play()
    assert code == 0 and "all stages passed" in table and "left out" not in table
    operations = ["project_align", "project_align_", "project_align_", "project_align", "spectral_entropy"]
    assert measured(calls) == [(name, backend) for name in operations for backend in ("cuda", "triton")]
    tests = [call for call in calls if "pytest -m gpu" in call]
    assert ["-k not triton-cuda" in call for call in tests] == [True, False]
    assert ["-k triton-cuda" in call for call in tests] == [False, True]
    assert all(call.endswith("-n 2 tests/test_kernel.py") for call in tests)
    assert sum("--kernel-name kernel_substring=dgs" in c and "--tool" in c for c in calls) == 2
    with tarfile.open(tmp_path / "out/gpu.tar.gz") as archive:
        assert {"./build.log", "./tests_triton.log", "./summary.txt"} <= set(archive.getnames())


def test_without_cuda_kernels_triton_is_measured(play):
    code, table, calls = play(FAILING="build_ext")
    assert code == 1 and "CUDA, since it was not built" in table and "not all stages passed" in table
    assert "-m benchmarks.smoke triton" in calls
    assert {backend for _, backend in measured(calls)} == {"triton"} and len(measured(calls)) == 5
    assert not any(c.startswith("sanitizer") or "not triton-cuda" in c for c in calls)
    assert any("-k triton-cuda" in call for call in calls)


def test_a_machine_may_refuse_the_sanitizer(play):
    code, table, calls = play(REFUSED="yes")
    assert code == 0 and "does not work on this machine: ========= Error: Device not supported" in table
    assert not any("--tool" in call for call in calls)


def test_what_a_sanitizer_finds_is_a_failure(play):
    code, table, _ = play(HAZARD="racecheck")
    assert code == 1 and re.search(r"racecheck +exit 9 ", table) and re.search(r"memcheck +exit 0 ", table)


def test_what_fails_stops_nothing_else(play):
    code, table, calls = play(FAILING="smoke project_align_ addopts train_step")
    assert code == 1 and len(measured(calls)) == 10
    assert re.search(r"smoke +exit 1 .*\n(.*\n)*rows_cuda +exit 0 .*\n(.*\n)*layers_triton +exit 1 ", table)
    assert "left out: benchmarks/train_step.py" in table
    assert re.search(r"plots +exit 0 ", table)


def test_without_a_device_the_rest_is_said_to_be_skipped(play):
    code, table, calls = play(CAPABILITY="")
    assert code == 0 and "no CUDA device: benchmarks, tests, training step and sanitizers skipped" in table
    assert "-m benchmarks.smoke" in calls and not measured(calls)
